// SPDX-License-Identifier: Apache-2.0
//! Sessions from end to end, with the real hub and shim over real sockets.
mod world;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use substrate_session::hub::View;
use substrate_session::shim::supervisor_side;
use tokio::net::UnixStream;
use world::{Gateway, Hubbed, Sandbox, Seen, Spares, Supervisor, UID, echo, hub, is_spare, until, within};

struct World {
    gateway: Gateway,
    hubbed: Hubbed,
    sandbox: Sandbox,
    supervisor: Supervisor,
    session: tokio::task::JoinHandle<u32>,
}

/// A sandbox that runs and is Ready.
async fn ready() -> World {
    ready_in(Sandbox::start().await).await
}

async fn ready_in(sandbox: Sandbox) -> World {
    // With RUST_LOG, to see what happens.
    let _ = tracing_subscriber::fmt()
        .with_test_writer()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .try_init();
    let gateway = Gateway::start("127.0.0.1:0").await;
    let hubbed = hub(&gateway, sandbox.dir.path());
    hubbed.hub.update(UID, sandbox.wake(1));
    let supervisor = Supervisor::connect(&sandbox.supervisor_socket).await;
    let (id, session) = supervisor.session("one").await;
    assert_eq!(id, "session-1");
    World { gateway, hubbed, sandbox, supervisor, session }
}

#[tokio::test]
async fn the_way_to_the_gateway_is_for_root_alone_and_takes_the_place_of_what_is_left() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: not root, cannot be somebody else");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    let socket = dir.path().join("session/gateway.sock");
    drop(supervisor_side::bind(&socket).unwrap());
    let _listener = supervisor_side::bind(&socket).unwrap();
    UnixStream::connect(&socket).await.unwrap();
    let nobody_sees =
        |path: &Path| Command::new("test").arg("-e").arg(path).uid(65_534).status().unwrap().success();
    assert!(nobody_sees(socket.parent().unwrap()));
    assert!(!nobody_sees(&socket));
    // Where it cannot be, it says which path is in the way.
    let error = supervisor_side::bind(&socket.join("below")).unwrap_err().to_string();
    assert!(error.contains("gateway.sock"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_sleeps_and_wakes_for_relays_without_the_gateway_or_the_supervisor_noticing() {
    let world = ready().await;
    let mut wanted = world.hubbed.wanted.clone();
    for generation in 2..42 {
        world.hubbed.hub.update(UID, world.sandbox.sleep());
        world.gateway.heartbeat().await;
        let wakes = world.hubbed.wakes.load(Ordering::SeqCst);
        let asking = tokio::spawn({
            let gateway = world.gateway.clone();
            async move { gateway.relay(&format!("relay-{generation}")).await }
        });
        within("the wake-up", wanted.changed()).await.unwrap();
        world.hubbed.hub.update(UID, world.sandbox.wake(generation));
        let mut relay = within("the relay", asking).await.unwrap();
        echo(&mut relay, b"hello").await;
        assert!(world.hubbed.wakes.load(Ordering::SeqCst) > wakes);
        // A relay that is still closing would wake it by itself.
        until("the hold", || world.sandbox.held.load(Ordering::SeqCst) == 1).await;
        drop(relay);
        until("the release", || world.sandbox.held.load(Ordering::SeqCst) == 0).await;
        wanted.mark_unchanged();
    }
    assert_eq!(world.gateway.seen(), [Seen::Connected("one".to_owned())]);
    assert!(!world.session.is_finished(), "the supervisor's session was never interrupted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_relays_wake_and_hold() {
    let world = ready().await;
    until("the connection", || world.sandbox.background.load(Ordering::SeqCst) == 1).await;
    assert_eq!(world.sandbox.held.load(Ordering::SeqCst), 0);
    let mut relay = world.gateway.relay("r").await;
    echo(&mut relay, b"x").await;
    until("the hold", || world.sandbox.held.load(Ordering::SeqCst) == 1).await;
    drop(relay);
    until("the release", || world.sandbox.held.load(Ordering::SeqCst) == 0).await;
    world.hubbed.hub.update(UID, world.sandbox.sleep());
    for _ in 0..20 {
        world.gateway.heartbeat().await;
    }
    // A call after the heartbeats on the same connection is answered only when they were read.
    world.hubbed.hub.update(UID, world.sandbox.wake(2));
    assert_eq!(world.supervisor.ask("after".into()).await.1, 0);
    assert_eq!(world.hubbed.wakes.load(Ordering::SeqCst), 0);
}

/// Runs a command; the hub asks for a relay in reserve after it.
async fn a_command(world: &World, channel: &str) {
    let before = world.supervisor.spares();
    echo(&mut world.gateway.relay(channel).await, b"x").await;
    until("a relay in reserve", || world.supervisor.spares() > before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_command_gets_the_relay_in_reserve() {
    let world = ready().await;
    echo(&mut world.gateway.forward("no command").await, b"x").await;
    until("the release", || world.sandbox.held.load(Ordering::SeqCst) == 0).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(world.supervisor.spares(), 0, "nobody runs commands yet");
    a_command(&world, "first").await;
    for round in 0..20 {
        let mut relay = world.gateway.relay(&format!("command {round}")).await;
        // It may be on its way still; a second command does not wait for it.
        let mut other = world.gateway.relay(&format!("beside {round}")).await;
        for bytes in [&b"hello"[..], &vec![7; 10_000]] {
            echo(&mut relay, bytes).await;
            echo(&mut other, bytes).await;
        }
        until("the hold", || world.sandbox.held.load(Ordering::SeqCst) == 1).await;
        drop((relay, other));
        until("another in reserve", || world.supervisor.spares() == round + 2).await;
    }
    let asked_for = world.supervisor.asked_for();
    assert!(!asked_for.iter().any(|channel| channel.starts_with("command")), "{asked_for:?}");
    // It is no way to a port.
    echo(&mut world.gateway.forward("a forward").await, b"x").await;
    assert_eq!(world.supervisor.asked_for().last().unwrap(), "a forward");
    assert_eq!(world.gateway.seen(), [Seen::Connected("one".to_owned())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_in_reserve_keeps_nobody_awake_and_does_not_outlive_a_sleep() {
    let world = ready().await;
    a_command(&world, "first").await;
    until("the release", || world.sandbox.held.load(Ordering::SeqCst) == 0).await;
    world.hubbed.hub.update(UID, world.sandbox.sleep());
    world.gateway.heartbeat().await;
    assert!(world.supervisor.ended().iter().all(|(channel, ..)| !is_spare(channel)), "it sleeps");
    world.hubbed.hub.update(UID, world.sandbox.wake(2));
    until("its end", || world.supervisor.ended().iter().any(|(channel, ..)| is_spare(channel))).await;
    let (_, said, status) =
        world.supervisor.ended().into_iter().find(|(channel, ..)| is_spare(channel)).unwrap();
    // Otherwise the server of commands has an attack in its log.
    assert_eq!((said.as_slice(), status), (&b"SSH-2.0-substrate\r\n"[..], 0));
    assert_eq!(world.hubbed.wakes.load(Ordering::SeqCst), 0);
    assert_eq!(world.sandbox.held.load(Ordering::SeqCst), 0);
    a_command(&world, "second").await;
    assert!(world.supervisor.asked_for().contains(&"second".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_does_without_a_relay_in_reserve_that_does_not_come_or_ends() {
    let mut world = ready().await;
    let vain = [
        (Spares::Ignores, "ignored"),
        (Spares::Refuses, "refused"),
        (Spares::Silent, "silent"),
        (Spares::Ends, "ended"),
    ];
    for (does, what) in vain {
        world.supervisor.with_spares(does);
        a_command(&world, &format!("{what} after")).await;
        let spares = world.supervisor.spares();
        for next in ["next", "then"] {
            let next = format!("{what} {next}");
            echo(&mut world.gateway.relay(&next).await, b"x").await;
            assert!(world.supervisor.asked_for().contains(&next));
        }
        // A supervisor that has none to give is not asked again.
        until("the release", || world.sandbox.held.load(Ordering::SeqCst) == 0).await;
        assert_eq!(world.supervisor.spares(), spares);
        world.session.abort();
        world.session = world.supervisor.session("one").await.1;
    }
    // Nor one of a supervisor that began again.
    world.supervisor.with_spares(Spares::Opens);
    a_command(&world, "with another").await;
    let before = world.supervisor.asked_for().len();
    world.session.abort();
    let (_, _session) = world.supervisor.session("one").await;
    let mut relay = world.gateway.relay("anew").await;
    echo(&mut relay, b"x").await;
    // For it, or for one in reserve.
    assert!(world.supervisor.asked_for().len() > before, "this one was asked");
    assert_eq!(
        world.gateway.seen(),
        [Seen::Connected("one".to_owned())],
        "the gateway hears nothing of them"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_in_an_image_without_a_shell_is_refused_with_the_reason() {
    let world = ready_in(Sandbox::with_shell("/no/such/shell").await).await;
    let refused = |channel: &str| {
        world.gateway.seen().into_iter().find_map(|seen| match seen {
            Seen::Refused(which, why) if which == channel => Some(why),
            _ => None,
        })
    };
    let mut wanted = world.hubbed.wanted.clone();
    for channel in ["awake", "asleep"] {
        let gateway = world.gateway.clone();
        let asking = tokio::spawn(async move { gateway.relay(channel).await });
        if channel == "asleep" {
            // It may have one by now: only the sandbox knows.
            within("the wake-up", wanted.wait_for(|wanted| *wanted > 0)).await.unwrap();
            assert_eq!(refused(channel), None);
            world.hubbed.hub.update(UID, world.sandbox.wake(2));
        }
        until("the refusal", || refused(channel).is_some()).await;
        let why = refused(channel).unwrap();
        assert!(why.contains("/bin/bash") && why.contains("image"), "{why}");
        asking.abort();
        // What needs no shell still works.
        echo(&mut world.gateway.forward(&format!("{channel} forward")).await, b"x").await;
        until("the release", || world.sandbox.held.load(Ordering::SeqCst) == 0).await;
        world.hubbed.hub.update(UID, world.sandbox.sleep());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_byte_is_lost_or_doubled_wherever_connections_break() {
    let world = ready().await;
    let mut relay = world.gateway.relay("r").await;
    // The first connection lives until it is cut; those after it break by themselves.
    for (generation, cut_after) in (2..).zip([6000, 6001, 7777, 9001, 12_345, 40_000]) {
        world.sandbox.cut_after.store(cut_after, Ordering::SeqCst);
        world.hubbed.hub.update(UID, world.sandbox.sleep());
        world.hubbed.hub.update(UID, world.sandbox.wake(generation));
        for round in 0..40_usize {
            let bytes: Vec<u8> = (0..round * 97).map(|at| (at * generation as usize) as u8).collect();
            echo(&mut relay, &bytes).await;
        }
    }
    assert_eq!(world.gateway.seen(), [Seen::Connected("one".to_owned())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_ends_the_session_and_a_start_opens_a_fresh_one() {
    let world = ready().await;
    world.hubbed.hub.update(UID, world.sandbox.sleep());
    world.hubbed.hub.update(UID, View::Stopped);
    until("the end of the session", || world.gateway.seen().len() == 2).await;
    world.hubbed.hub.update(UID, View::Starting);
    world.hubbed.hub.update(UID, world.sandbox.wake(2));
    until("a fresh session", || world.gateway.seen().len() == 3).await;
    let expected = [Seen::Connected("one".to_owned()), Seen::Disconnected, Seen::Connected("one".to_owned())];
    assert_eq!(world.gateway.seen(), expected);
    let mut relay = world.gateway.relay("r").await;
    echo(&mut relay, b"x").await;
    assert!(!world.session.is_finished());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_goes_and_comes_back_is_greeted_again_and_the_supervisor_does_not_notice() {
    let world = ready().await;
    world.hubbed.hub.update(UID, world.sandbox.sleep());
    world.gateway.end.cancel();
    let address = world.gateway.address.to_string();
    drop(world.gateway);
    let again = Gateway::start(&address).await;
    let mut sessions = again.sessions.clone();
    within("a session", sessions.wait_for(|sessions| *sessions == 1)).await.unwrap();
    assert_eq!(world.hubbed.wakes.load(Ordering::SeqCst), 0, "a Hello needs no sandbox");
    let mut wanted = world.hubbed.wanted.clone();
    let asking = tokio::spawn({
        let gateway = again.clone();
        async move { gateway.relay("r").await }
    });
    within("the wake-up", wanted.wait_for(|wanted| *wanted > 0)).await.unwrap();
    world.hubbed.hub.update(UID, world.sandbox.wake(2));
    echo(&mut within("the relay", asking).await.unwrap(), b"x").await;
    assert!(!world.session.is_finished());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sandbox_that_was_booted_afresh_begins_anew() {
    let world = ready().await;
    world.hubbed.hub.update(UID, world.sandbox.sleep());
    let fresh = Sandbox::start().await;
    let supervisor = Supervisor::connect(&fresh.supervisor_socket).await;
    world.hubbed.hub.update(UID, fresh.wake(2));
    let (_, session) = supervisor.session("two").await;
    assert_eq!(world.gateway.seen().last(), Some(&Seen::Connected("two".to_owned())));
    let mut relay = world.gateway.relay("r").await;
    echo(&mut relay, b"x").await;
    assert!(!session.is_finished());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_supervisor_that_says_hello_again_is_told_of_the_session_it_has() {
    let world = ready().await;
    world.session.abort();
    let (id, session) = world.supervisor.session("one").await;
    assert_eq!(id, "session-1", "the gateway was not asked");
    let mut relay = world.gateway.relay("r").await;
    echo(&mut relay, b"x").await;
    assert!(!session.is_finished());
    assert_eq!(world.gateway.seen(), [Seen::Connected("one".to_owned())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_was_lost_costs_calls_a_clear_error_and_nothing_else() {
    let world = ready().await;
    drop(world.hubbed);
    let again = hub(&world.gateway, world.sandbox.dir.path());
    again.hub.update(UID, world.sandbox.wake(1));
    within("the end of the session", world.session).await.unwrap();
    let (_, session) = world.supervisor.session("one").await;
    let mut relay = world.gateway.relay("r").await;
    echo(&mut relay, b"x").await;
    assert!(!session.is_finished());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_comes_back_gives_sleeping_sandboxes_their_session_without_waking_them() {
    let world = ready().await;
    let asleep = world.sandbox.sleep();
    drop(world.hubbed);
    until("the end of the session", || world.gateway.seen().len() == 2).await;
    let again = hub(&world.gateway, world.sandbox.dir.path());
    again.hub.update(UID, asleep);
    until("the session", || world.gateway.seen().len() == 3).await;
    assert_eq!(again.wakes.load(Ordering::SeqCst), 0);
    let mut wanted = again.wanted.clone();
    let asking = tokio::spawn({
        let gateway = world.gateway.clone();
        async move { gateway.relay("r").await }
    });
    within("the wake-up", wanted.wait_for(|wanted| *wanted > 0)).await.unwrap();
    again.hub.update(UID, world.sandbox.wake(2));
    // Its stream was reset; it says Hello again and hears of the relay that waits.
    within("the end of the stream", world.session).await.unwrap();
    let (_, _session) = world.supervisor.session("one").await;
    echo(&mut within("the relay", asking).await.unwrap(), b"x").await;
    assert_eq!(world.gateway.seen().len(), 3, "the gateway saw one session all along");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_that_cannot_be_applied_does_not_reach_the_supervisor() {
    let world = ready().await;
    assert_eq!(world.supervisor.ask("fine".into()).await, (Some("fine".into()), 0));
    assert_eq!(world.supervisor.ask("to be refused".into()).await, (None, 14));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_larger_than_every_window_comes_through() {
    let world = ready().await;
    let bytes: Vec<u8> = (0..700_000_u32).map(|at| at as u8).collect();
    let (answer, status) = world.supervisor.ask(bytes.clone().into()).await;
    assert_eq!(status, 0);
    assert!(answer.is_some_and(|answer| answer == bytes), "the same bytes");
}
