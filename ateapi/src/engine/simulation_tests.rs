// SPDX-License-Identifier: Apache-2.0
//! Random weather: verbs, lost workers, nodes that go silent, reboot and come back, failing uploads, crashes of the
//! control plane, all drawn from a seed, on a simulated clock and an in-memory store and network. The promises are
//! checked all along and when it has cleared up. A failing seed replays.
use std::collections::BTreeMap;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tonic::Status;

use super::{Verb, lock};
use crate::model::{ActorUid, State};
use crate::testing::Harness;
use crate::workflow::{FaultPoint, Injected, StepName, When};

const ACTORS: usize = 4;
const STEPS: usize = 120;

/// What an actor's memory held when it was last promised to be kept, and how often it had been reset by then.
#[derive(Default)]
struct Oracle {
    promised: BTreeMap<ActorUid, (u64, usize)>,
}

async fn resets(h: &Harness, uid: &ActorUid) -> usize {
    h.events("Resetting").await.iter().filter(|event| event.subject_uid == uid.0).count()
}

fn check_copies(h: &Harness, uids: &[ActorUid], what: &str) {
    for uid in uids {
        // Frozen copies do not serve and are not counted by the stub.
        let copies = h.copies(uid);
        assert!(copies <= 1, "{what}: {copies} live copies of {uid}");
    }
}

/// No record names a snapshot that does not exist.
async fn check_references(h: &Harness, uids: &[ActorUid], what: &str) {
    for uid in uids {
        let Some(actor) = h.find(uid).await else { continue };
        let Some(last) = actor.last_snapshot() else { continue };
        let durable =
            h.blobs.manifests().contains(&format!("{}/{}-{}", last.origin, last.generation, last.id));
        let on_node = h.nodes.iter().any(|node| node.has_snapshot(last.origin.as_str(), last.id.as_str()));
        assert!(if last.is_durable() { durable } else { on_node }, "{what}: {uid} dangles on {}", last.id);
    }
}

async fn weather(h: &mut Harness, rng: &mut StdRng, uids: &[ActorUid], oracle: &mut Oracle) {
    let uid = &uids[rng.random_range(0..uids.len())];
    let node = std::sync::Arc::clone(&h.nodes[rng.random_range(0..h.nodes.len())]);
    let by = "user".to_owned();
    let runs_here = node.copy_of(uid.as_str()).is_some();
    match rng.random_range(0..20) {
        0..=3 => h.engine.ask_quietly(uid, Verb::Resume { cause: by }),
        4..=5 => h.engine.ask_quietly(uid, Verb::Suspend { by, only_if_idle: false, drain_ms: 0 }),
        6 => {
            let promote_after = Some(Duration::from_secs(3));
            h.engine.ask_quietly(uid, Verb::Pause { by, only_if_idle: false, drain_ms: 0, promote_after });
        }
        7 => h.engine.ask_quietly(uid, Verb::Reset),
        8..=10 if runs_here => {
            let resets_before = resets(h, uid).await;
            let memory = node.work(uid.as_str());
            let verb = Verb::Checkpoint { durable: rng.random_bool(0.5), generation: 0, max_heap: 0 };
            let answer = tokio::time::timeout(Duration::from_secs(20), h.engine.ask(uid, verb, None)).await;
            // What was answered is kept, whatever comes.
            if let Ok(Ok(_)) = answer {
                oracle.promised.insert(uid.clone(), (memory, resets_before));
            }
        }
        11 if runs_here => node.kill_worker_of(uid.as_str()),
        // A silent node, and its actors wanted elsewhere.
        12 => {
            node.go_down();
            for uid in uids {
                h.engine.ask_quietly(uid, Verb::Resume { cause: by.clone() });
            }
        }
        13 => node.come_back(),
        14 => {
            for uid in uids {
                h.engine.ask_quietly(uid, Verb::Resume { cause: by.clone() });
            }
        }
        15 => node.fail("upload", Status::unavailable("the store is away")),
        16 => {
            let methods = ["activate", "release", "checkpoint"];
            node.fail(methods[rng.random_range(0..3)], Status::unavailable("lost"));
        }
        17 => {
            let step = StepName::ALL[rng.random_range(0..StepName::ALL.len())];
            let when = if rng.random_bool(0.5) { When::Before } else { When::After };
            h.faults.set(FaultPoint { step, when }, rng.random_range(0..4), Injected::Crash);
        }
        18 => h.restart().await,
        _ => {}
    }
    if h.engine.dead.is_cancelled() {
        h.faults.clear();
        h.restart().await;
    }
    let time = Duration::from_millis(rng.random_range(0..8_000));
    tokio::time::sleep(time).await;
}

async fn simulate(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut h = Harness::new(&[2, 2]).await;
    let mut uids = Vec::new();
    for i in 0..ACTORS {
        uids.push(h.create(&format!("a{i}")).await);
    }
    let mut oracle = Oracle::default();
    for step in 0..STEPS {
        weather(&mut h, &mut rng, &uids, &mut oracle).await;
        let what = format!("seed {seed}, step {step}");
        check_copies(&h, &uids, &what);
        check_references(&h, &uids, &what).await;
    }
    // It clears up.
    h.faults.clear();
    for node in &h.nodes {
        node.come_back();
        node.stop_failing();
    }
    h.restart().await;
    // Sessions begin anew, leases are granted again.
    tokio::time::sleep(Duration::from_secs(10)).await;
    let mut tries = 0;
    while h.engine.drivers() > 0 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        tries += 1;
        assert!(tries < 300, "seed {seed}: something is in progress for ever");
    }
    check_copies(&h, &uids, &format!("seed {seed}, at the end"));
    for uid in &uids {
        let actor = h.actor(uid).await;
        let what = format!("seed {seed}: {uid} is {} ({})", actor.state, actor.reason);
        assert!(
            matches!(
                actor.state,
                State::New
                    | State::Running
                    | State::Suspended
                    | State::Paused
                    | State::Crashed
                    | State::Exited
            ),
            "{what}"
        );
        assert_eq!(h.copies(uid) == 1, actor.state == State::Running, "{what}");
        // A verb leads on.
        if matches!(actor.state, State::Running) {
            h.suspend(uid).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        let verb = match actor.state {
            State::Crashed | State::Exited => Verb::Reset,
            _ => Verb::Resume { cause: "user".into() },
        };
        h.ask(uid, verb).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        // Resets give memory up on purpose; nothing else may.
        if let Some((promised, resets_before)) = oracle.promised.get(uid)
            && resets(&h, uid).await == *resets_before
        {
            let memory = h.host(uid).copy_of(uid.as_str()).map_or(0, |copy| copy.memory);
            assert!(memory >= *promised, "{what}: {promised} was promised to be kept, {memory} is left");
        }
        h.suspend(uid).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    }
    // No worker leaked.
    let booked: usize =
        h.nodes.iter().map(|node| lock(&h.engine.pool).assignments(&node.name.as_str().into()).len()).sum();
    assert_eq!(booked, 0, "seed {seed}: a worker leaked");
    let running: usize = h.nodes.iter().map(|node| node.copies().len()).sum();
    assert_eq!(running, 0, "seed {seed}: a copy leaked");
}

#[tokio::test(start_paused = true)]
async fn random_weather() {
    // How many, and from which; a failing one is replayed with ATEAPI_SEED=n ATEAPI_SEEDS=1.
    let number =
        |name: &str, default| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let first: u64 = number("ATEAPI_SEED", 0);
    let seeds = first..first + number("ATEAPI_SEEDS", 30);
    for seed in seeds {
        simulate(seed).await;
    }
}
