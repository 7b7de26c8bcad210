// SPDX-License-Identifier: Apache-2.0
//! What goes wrong around the driver: it is killed at each step of a call, its gateway is gone for long or does not
//! read, its socket is somebody else's, and there are many sandboxes.
use std::fmt::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::time::Duration;

use crate::stub::{Bench, Stub, phase, sandbox};
use openshell_driver_substrate::names;
use substrate_proto::compute::watch_sandboxes_event::Payload;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

const ID: &str = "0198c0de-0000-7000-8000-000000000001";

/// One call of the gateway's; whether it succeeded.
async fn ask(bench: &mut Bench, what: &str) -> bool {
    match what {
        "create" => bench.create(sandbox(ID, "alice")).await.is_ok(),
        "stop" => bench.stop(ID).await.is_ok(),
        "start" => bench.start_sandbox(ID).await.is_ok(),
        _ => bench.delete(ID).await.is_ok(),
    }
}

/// Kills the driver at one call to the control plane after the other, before it has its effect and after it, until
/// the gateway's call comes through; `check` looks at what the next driver makes of it.
async fn killed_at_each_step(what: &str, before: &[&str], check: impl AsyncFn(&mut Bench, &str)) {
    for works in [false, true] {
        for nth in 0.. {
            let mut bench = Bench::start().await;
            bench.stub.until(|stub| stub.calls("list_atespaces") > 0).await;
            for step in before {
                assert!(ask(&mut bench, step).await, "{step}");
            }
            bench.make_mortal().await;
            bench.stub.kill_at(nth, works);
            let answered = ask(&mut bench, what).await;
            if !bench.is_dead() {
                assert!(answered && nth > 0, "{what} makes calls, and succeeds without a fault");
                break;
            }
            // One that was answered died of what it did beside: its sweep of what others left.
            bench.start_driver().await;
            bench.until_it_answers().await;
            let at = format!("{what} killed at call {nth}, {}", if works { "done" } else { "not done" });
            check(&mut bench, &at).await;
        }
    }
}

#[tokio::test]
async fn a_driver_killed_at_any_step_of_a_create_leaves_all_or_nothing() {
    killed_at_each_step("create", &[], async |bench, at| {
        // The gateway has dropped the row and asks no more: what is not done is swept.
        let settled = |stub: &Stub| match stub.actor(ID) {
            None => stub.inventory().is_empty(),
            Some(actor) => {
                let marks = actor.spec.unwrap_or_default().annotations;
                marks.get(names::CREATE).is_some_and(|mark| mark.starts_with("made-"))
            }
        };
        bench.stub.until(settled).await;
        // A retry, which other gateways may make, finds or makes it; and it can always be deleted.
        bench.create(sandbox(ID, "alice")).await.unwrap_or_else(|error| panic!("{at}: {error}"));
        assert_eq!(bench.list().await.unwrap().len(), 1, "{at}");
        assert!(bench.delete(ID).await.unwrap(), "{at}");
        assert!(!bench.stub.inventory().iter().any(|thing| thing.starts_with("actor")), "{at}");
    })
    .await;
}

#[tokio::test]
async fn a_driver_killed_at_any_step_of_a_stop_is_ready_or_stopped_and_can_be_both() {
    killed_at_each_step("stop", &["create"], async |bench, at| {
        let seen = phase(&bench.get(ID).await.unwrap());
        assert!(matches!(seen, "ready" | "stopped"), "{at}: {seen}");
        bench.stop(ID).await.unwrap_or_else(|error| panic!("{at}: {error}"));
        assert_eq!(phase(&bench.get(ID).await.unwrap()), "stopped", "{at}");
        bench.start_sandbox(ID).await.unwrap_or_else(|error| panic!("{at}: {error}"));
        assert_eq!(phase(&bench.get(ID).await.unwrap()), "ready", "{at}");
    })
    .await;
}

#[tokio::test]
async fn a_driver_killed_at_any_step_of_a_start_can_start_again() {
    killed_at_each_step("start", &["create", "stop"], async |bench, at| {
        let seen = phase(&bench.get(ID).await.unwrap());
        assert!(matches!(seen, "ready" | "stopped" | "provisioning"), "{at}: {seen}");
        bench.start_sandbox(ID).await.unwrap_or_else(|error| panic!("{at}: {error}"));
        assert_eq!(phase(&bench.get(ID).await.unwrap()), "ready", "{at}");
    })
    .await;
}

#[tokio::test]
async fn a_driver_killed_at_any_step_of_a_delete_leaves_nothing_after_the_next() {
    killed_at_each_step("delete", &["create"], async |bench, at| {
        // It may be gone already: then the gateway is told so.
        bench.delete(ID).await.unwrap_or_else(|error| panic!("{at}: {error}"));
        assert!(bench.get(ID).await.is_err(), "{at}");
        let swept = |stub: &Stub| !stub.inventory().iter().any(|thing| thing.starts_with("template"));
        bench.stub.until(swept).await;
    })
    .await;
}

#[tokio::test]
async fn a_gateway_that_was_away_for_long_finds_everything_as_it_is() {
    let mut bench = Bench::start().await;
    for id in ["asleep", "gone", "stopped"] {
        bench.create(sandbox(id, id)).await.unwrap();
    }
    drop(bench.watch().await.unwrap());
    // As much as happens in hours, with nobody watching.
    for _ in 0..100 {
        for _ in 0..50 {
            bench.stub.sleep("asleep", "idle");
            bench.stub.wake("asleep");
        }
        // The driver takes them in meanwhile.
        bench.get("asleep").await.unwrap();
    }
    bench.stub.sleep("asleep", "idle");
    bench.stub.remove_actor(&names::uid("gone"));
    bench.stop("stopped").await.unwrap();
    let mut watching = bench.watch().await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 2 {
        let event = tokio::time::timeout(Duration::from_secs(20), watching.message()).await;
        let event = event.expect("an event in time").unwrap().expect("the watch goes on");
        if let Some(Payload::Sandbox(event)) = event.payload {
            let sandbox = event.sandbox.unwrap();
            seen.push(format!("{} {}", sandbox.id, phase(&sandbox)));
        }
    }
    seen.sort();
    assert_eq!(seen, ["asleep ready", "stopped stopped"]);
    assert_eq!(bench.stub.calls("watch"), 1, "the watch of the control plane never broke");
}

#[tokio::test]
async fn a_hundred_sandboxes_cost_one_watch_and_nothing_by_the_second() {
    let mut bench = Bench::start().await;
    for index in 0..100 {
        let id = format!("s{index}");
        bench.create(sandbox(&id, &id)).await.unwrap();
        if index % 2 == 0 {
            bench.stub.sleep(&id, "idle");
        }
    }
    bench.make_mortal().await;
    let mut watching = bench.watch().await.unwrap();
    let mut sandboxes = 0;
    while sandboxes < 100 {
        let event = tokio::time::timeout(Duration::from_secs(20), watching.message()).await;
        let event = event.expect("an event in time").unwrap().expect("the watch goes on");
        sandboxes += usize::from(matches!(event.payload, Some(Payload::Sandbox(_))));
    }
    // The sweep of the start ends with the templates.
    bench.stub.until(|stub| stub.calls("list_templates") > 0).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (calls, cpu) = (bench.stub.all_calls(), bench.driver_cpu());
    // Not waiting for something: looking that nothing happens.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (made, used) = (bench.stub.all_calls() - calls, bench.driver_cpu().saturating_sub(cpu));
    assert_eq!(made, 0, "calls to the control plane while nothing happens");
    // Half a percent of a core: its own timers, nothing that grows with the sandboxes.
    assert!(used < Duration::from_millis(15), "{used:?} of CPU in 3 s while nothing happens");
    assert_eq!(bench.stub.calls("watch"), 2, "one for each driver there was");
}

/// Why the driver does not start there.
async fn refusal(bench: &Bench) -> String {
    let serving = openshell_driver_substrate::serve(
        bench.config.clone(),
        oneshot::channel().0,
        CancellationToken::new(),
    );
    let refused = tokio::time::timeout(Duration::from_secs(20), serving).await.expect("it does not serve");
    let mut text = String::new();
    let mut error: Option<&dyn std::error::Error> = Some(&refused.expect_err("a refusal"));
    while let Some(cause) = error {
        write!(text, "{cause} ").unwrap();
        error = cause.source();
    }
    text
}

#[tokio::test]
async fn a_socket_or_directory_of_another_user_is_left_alone_and_named() {
    const STRANGER: u32 = 54_321;
    let mut bench = Bench::start().await;
    bench.stop_driver().await;
    let socket = bench.config.socket_path.clone();
    let dir = socket.parent().unwrap().to_owned();
    if std::fs::metadata(&dir).unwrap().uid() != 0 {
        use std::io::Write as _;
        writeln!(std::io::stderr(), "skipped: only root can give a file to another user").unwrap();
        return;
    }
    std::fs::remove_file(&socket).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    drop(listener);
    std::os::unix::fs::chown(&socket, Some(STRANGER), None).unwrap();
    let said = refusal(&bench).await;
    assert!(said.contains(&socket.display().to_string()), "{said}");
    assert!(socket.exists(), "it is not ours to remove");
    std::fs::remove_file(&socket).unwrap();
    std::os::unix::fs::chown(&dir, Some(STRANGER), None).unwrap();
    let said = refusal(&bench).await;
    assert!(said.contains(&STRANGER.to_string()) && said.contains(&dir.display().to_string()), "{said}");
    std::os::unix::fs::chown(&dir, Some(0), None).unwrap();
    bench.start_driver().await;
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    bench.list().await.unwrap();
}
