// SPDX-License-Identifier: Apache-2.0
//! Random sequences of events against P1–P3, and the table itself.
use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::testing::fixtures;

fn placement(n: u8) -> Placement {
    Placement { worker: format!("w{n}").into(), node: format!("n{}", n % 2).into() }
}

/// An event as a number of a family: the generation it is about is the present one or a stale one.
fn event(family: u8, choice: u8, actor: &Actor) -> Event {
    let stale = choice.is_multiple_of(7) && actor.generation.0 > 0;
    let generation = if stale { Generation(actor.generation.0 - 1) } else { actor.generation };
    let wanted = match &actor.work {
        Some(Work::Stop(work)) => work.snapshot.clone(),
        Some(Work::Checkpoint(work)) => work.snapshot.clone(),
        _ => format!("s{choice}").into(),
    };
    let some = actor
        .snapshots
        .get(usize::from(choice) % actor.snapshots.len().max(1))
        .map_or_else(|| "none".into(), |it| it.id.clone());
    let message = "m".to_owned();
    match family {
        0 => Event::Resume { placement: placement(choice), cause: "user".into() },
        1 => Event::Reset { placement: placement(choice) },
        2 => Event::Activated { generation, ingress_endpoint: "unix:/x".into() },
        3 => {
            let kind =
                [FailureKind::Again, FailureKind::ForGood, FailureKind::NodeCopy][usize::from(choice) % 3];
            Event::ActivateFailed { generation, failure: Failure { kind, reason: "R".into(), message } }
        }
        4 => Event::Stop {
            kind: if choice.is_multiple_of(2) { StopKind::Suspend } else { StopKind::Pause },
            snapshot: format!("s{}", actor.state_since_ms).into(),
            by: "user".into(),
            only_if_idle: false,
            drain_ms: 0,
            promote_after_ms: 0,
        },
        5 => Event::Checkpoint {
            snapshot: format!("c{}", actor.state_since_ms).into(),
            durable: choice.is_multiple_of(2),
        },
        6 => {
            let mut snapshot = fixtures::snapshot(wanted.as_str(), false);
            snapshot.generation = actor.generation;
            snapshot.time_ms = actor.state_since_ms;
            Event::Snapshotted { generation, snapshot: Box::new(snapshot) }
        }
        7 => Event::CheckpointRefused { generation, reason: "BUSY".into(), message },
        8 => Event::CheckpointFailed { generation, message },
        9 => Event::CheckpointAbandoned { generation, message },
        10 => Event::Released { generation },
        11 => Event::Uploaded {
            snapshot: actor.owed_upload().map_or(some, |it| it.id.clone()),
            manifest: Manifest { digest: "d".into(), packs: vec![], bytes: 1, stored_bytes: 1 },
        },
        12 => Event::UploadFailed {
            snapshot: actor.owed_upload().map_or(some, |it| it.id.clone()),
            message,
            not_before_ms: 1,
        },
        13 => Event::Promote,
        14 => Event::Revert { snapshot: some },
        15 => Event::WorkerLost { generation, message },
        16 => Event::Exited {
            generation,
            exit: Exit { container: "main".into(), code: 1, signal: 0, time_ms: 0 },
        },
        17 => Event::NodeCopyLost { snapshot: some, message },
        18 => Event::Delete,
        _ => Event::Deleted,
    }
}

/// The last copy of an actor's state is given up only by these.
fn may_lose_the_last(event: &Event) -> bool {
    matches!(event, Event::NodeCopyLost { .. } | Event::Delete | Event::Deleted)
}

fn check(before: &Actor, event: &Event, after: &Actor, effects: &[Effect]) -> Result<(), TestCaseError> {
    use State::{Deleting, Paused, Pausing, Resuming, Running, Suspended, Suspending};
    // P1: generations only rise, by one, and exactly with an assignment.
    prop_assert!(after.generation >= before.generation && after.generation.0 <= before.generation.0 + 1);
    let assigned = after.generation > before.generation;
    prop_assert_eq!(assigned, matches!(event, Event::Resume { .. } | Event::Reset { .. }));
    if assigned {
        prop_assert!(before.placement.is_none(), "a second copy while the first may run");
        prop_assert_eq!(after.state, Resuming);
    }
    // A worker is held exactly where the table says, and its end is always announced.
    match after.state {
        Resuming | Running => prop_assert!(after.placement.is_some()),
        Suspending | Pausing | Deleting => {}
        _ => prop_assert!(after.placement.is_none()),
    }
    let freed = effects.iter().filter(|it| matches!(it, Effect::Free { .. })).count();
    let gave_up = before.placement.is_some() && after.placement.is_none();
    prop_assert_eq!(freed, usize::from(gave_up));
    // P2: what is latest is complete, is recorded, and is lost to nothing but the loss of its only copy.
    if let Some(last) = &after.last {
        let last = after.snapshot(last);
        prop_assert!(last.is_some(), "a dangling reference");
        prop_assert!(last.is_some_and(|it| it.is_durable() || it.node.is_some()));
    }
    if before.last.is_some() && !may_lose_the_last(event) {
        prop_assert!(after.last.is_some(), "the last good snapshot was lost");
    }
    if before.last != after.last {
        let by_design =
            matches!(event, Event::Snapshotted { .. } | Event::Revert { .. } | Event::NodeCopyLost { .. });
        prop_assert!(by_design, "{:?} moved the latest snapshot", event);
    }
    for it in before.snapshots.iter().filter(|it| it.is_durable()) {
        prop_assert!(after.snapshot(&it.id).is_some(), "a durable snapshot vanished");
    }
    // Memory ends only when a snapshot is complete, or it is said what was lost (P4).
    let had_memory = matches!(before.state, Running | Suspending | Pausing)
        && !matches!(&before.work, Some(Work::Stop(work)) if work.taken);
    let rests = matches!(after.state, Suspended | Paused);
    if had_memory && rests {
        let said =
            effects.iter().any(|it| matches!(it, Effect::Record(event) if event.reason == "RolledBack"));
        prop_assert!(said, "memory ended without a word: {:?}", event);
    }
    // What a rest state promises is there.
    match after.state {
        Suspended => prop_assert!(after.last_snapshot().is_some_and(Snapshot::is_durable)),
        Paused => prop_assert!(after.last_snapshot().is_some_and(|it| it.node.is_some())),
        _ => {}
    }
    // Work belongs to its state.
    let fits = match &after.work {
        None => !matches!(after.state, Resuming | Suspending | Pausing),
        Some(Work::Resume(_)) => after.state == Resuming,
        Some(Work::Stop(_)) => matches!(after.state, Suspending | Pausing),
        Some(Work::Checkpoint(_)) => after.state == Running,
    };
    prop_assert!(fits, "{:?} in {}", after.work, after.state);
    Ok(())
}

/// P3: a verb leads out of every state, and not only delete; where work is in progress, its end does.
fn leads_on(actor: &Actor) -> Result<(), TestCaseError> {
    let accepted: BTreeSet<u8> = (0..20)
        .filter(|family| {
            (0..6).any(|choice| {
                let choice = choice * 7 + 1 + choice;
                transition(actor, event(*family, choice, actor), actor.state_since_ms + 1).is_ok()
            })
        })
        .collect();
    let wanted: &[u8] = match actor.state {
        State::New => &[0, 18],
        State::Suspended => &[0, 1, 14, 18],
        State::Paused => &[0, 1, 13, 14, 18],
        State::Resuming => &[2, 3, 15, 16, 18],
        State::Running if actor.work.is_some() => &[6, 7, 8, 15, 16, 18],
        State::Running => &[4, 5, 15, 16, 18],
        State::Suspending | State::Pausing if !matches!(&actor.work, Some(Work::Stop(w)) if w.taken) => {
            &[6, 7, 8, 15, 16, 18]
        }
        State::Suspending if actor.placement.is_none() => &[0, 11, 12, 18],
        State::Suspending | State::Pausing => &[10, 15, 18],
        State::Exited | State::Crashed if actor.snapshots.is_empty() => &[1, 18],
        State::Exited | State::Crashed => &[1, 14, 18],
        State::Deleting if actor.placement.is_some() => &[10, 15],
        State::Deleting => &[19],
    };
    for family in wanted {
        prop_assert!(accepted.contains(family), "{} refuses family {family}: {:#?}", actor.state, actor);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_000, ..ProptestConfig::default() })]
    #[test]
    fn any_sequence_of_events_keeps_the_promises(
        events in proptest::collection::vec((0u8..20, 0u8..=255, 0u8..3), 1..80)
    ) {
        let mut actor = fixtures::actor();
        let mut at_ms = 1;
        for (family, choice, force) in events {
            at_ms += 1;
            // Deletion ends the walk: rarely.
            let family = if family == 18 && force > 0 { 2 } else { family };
            let event = event(family, choice, &actor);
            let Ok((after, effects)) = transition(&actor, event.clone(), at_ms) else { continue };
            check(&actor, &event, &after, &effects)?;
            leads_on(&after)?;
            // A record survives its own form on disk.
            let text = serde_json::to_string(&after).unwrap();
            let read: Actor = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(&read, &after);
            if effects.contains(&Effect::Remove) {
                break;
            }
            actor = after;
            // As the driver does with each commit.
            if actor.state != State::Deleting {
                crate::retention::retire(&mut actor);
            }
        }
    }

    #[test]
    fn a_stale_generation_never_changes_anything(family in 0u8..20, choice in 0u8..=255) {
        let mut actor = fixtures::actor();
        actor.generation = Generation(5);
        actor.placement = Some(placement(1));
        actor.state = State::Running;
        let mut old = actor.clone();
        old.generation = Generation(4);
        let event = event(family, choice | 1, &old);
        let about = match &event {
            Event::Activated { generation, .. }
            | Event::ActivateFailed { generation, .. }
            | Event::Snapshotted { generation, .. }
            | Event::CheckpointRefused { generation, .. }
            | Event::CheckpointFailed { generation, .. }
            | Event::CheckpointAbandoned { generation, .. }
            | Event::Released { generation }
            | Event::WorkerLost { generation, .. }
            | Event::Exited { generation, .. } => Some(*generation),
            _ => None,
        };
        if about.is_some() {
            let refused = transition(&actor, event, 1).unwrap_err();
            prop_assert_eq!(refused.reason, "STALE_GENERATION");
        }
    }
}

fn suspended() -> Actor {
    let mut actor = fixtures::actor();
    actor.state = State::Suspended;
    actor.generation = Generation(1);
    actor.snapshots = vec![fixtures::snapshot("s1", true)];
    actor.last = Some("s1".into());
    actor
}

fn step(actor: &Actor, event: Event) -> Actor {
    transition(actor, event, 5_000).unwrap_or_else(|refused| panic!("{refused}")).0
}

fn resumed() -> Actor {
    let actor = step(&suspended(), Event::Resume { placement: placement(1), cause: "user".into() });
    step(&actor, Event::Activated { generation: Generation(2), ingress_endpoint: "unix:/x".into() })
}

fn stopping(kind: StopKind) -> Actor {
    let event = Event::Stop {
        kind,
        snapshot: "s2".into(),
        by: "user".into(),
        only_if_idle: false,
        drain_ms: 0,
        promote_after_ms: 0,
    };
    step(&resumed(), event)
}

fn taken(kind: StopKind) -> Actor {
    let mut snapshot = fixtures::snapshot("s2", false);
    snapshot.generation = Generation(2);
    step(&stopping(kind), Event::Snapshotted { generation: Generation(2), snapshot: Box::new(snapshot) })
}

#[test]
fn the_order_of_a_suspend() {
    let actor = taken(StopKind::Suspend);
    assert_eq!((actor.state, actor.last.as_ref().unwrap().as_str()), (State::Suspending, "s2"));
    assert!(actor.placement.is_some(), "the worker goes only after the node snapshot is recorded");
    let resume = || Event::Resume { placement: placement(2), cause: "user".into() };
    assert!(transition(&actor, resume(), 0).is_err());
    let actor = step(&actor, Event::Released { generation: Generation(2) });
    assert_eq!(actor.state, State::Suspending);
    // The node snapshot is good: it may run again while the upload goes on.
    assert_eq!(step(&actor, resume()).state, State::Resuming);
    let manifest = Manifest { digest: "d".into(), packs: vec![], bytes: 1, stored_bytes: 1 };
    let done = step(&actor, Event::Uploaded { snapshot: "s2".into(), manifest: manifest.clone() });
    assert_eq!((done.state, done.suspended_by.as_str()), (State::Suspended, "user"));
    let failed = Event::UploadFailed { snapshot: "s2".into(), message: "full".into(), not_before_ms: 9 };
    let paused = step(&actor, failed);
    assert_eq!((paused.state, paused.reason.as_str()), (State::Paused, "UPLOAD_FAILED"));
    assert_eq!(step(&paused, Event::Uploaded { snapshot: "s2".into(), manifest }).state, State::Suspended);
}

#[test]
fn a_worker_lost_after_the_snapshot_loses_nothing() {
    let lost = Event::WorkerLost { generation: Generation(2), message: "killed".into() };
    assert_eq!(step(&taken(StopKind::Suspend), lost.clone()).state, State::Suspending);
    let paused = step(&taken(StopKind::Pause), lost.clone());
    assert_eq!((paused.state, paused.last.unwrap().as_str()), (State::Paused, "s2"));
    let back = step(&stopping(StopKind::Suspend), lost);
    assert_eq!((back.state, back.last.unwrap().as_str()), (State::Suspended, "s1"));
}

#[test]
fn going_back_says_to_what_and_how_old_it_is() {
    let lost = Event::WorkerLost { generation: Generation(2), message: "killed".into() };
    let (_, effects) = transition(&resumed(), lost, 61_500).unwrap();
    let event = effects
        .iter()
        .find_map(|it| match it {
            Effect::Record(event) if event.reason == "RolledBack" => Some(event),
            _ => None,
        })
        .unwrap();
    assert_eq!(event.metadata["snapshot"], "s1");
    assert_eq!(event.metadata["age_ms"], "60500");
    assert!(event.message.contains("60.500 s old") && event.warning);
}

#[test]
fn a_refused_stop_runs_on_with_its_endpoint() {
    let refused = Event::CheckpointRefused {
        generation: Generation(2),
        reason: "BUSY".into(),
        message: "an exec runs".into(),
    };
    let actor = step(&stopping(StopKind::Suspend), refused);
    assert_eq!((actor.state, actor.ingress_endpoint.as_str()), (State::Running, "unix:/x"));
}

#[test]
fn a_lost_only_copy_goes_back_to_the_durable_one() {
    let paused = step(&taken(StopKind::Pause), Event::Released { generation: Generation(2) });
    let lost = Event::NodeCopyLost { snapshot: "s2".into(), message: "disk died".into() };
    let actor = step(&paused, lost.clone());
    assert_eq!((actor.state, actor.last.as_ref().unwrap().as_str()), (State::Suspended, "s1"));
    let mut alone = paused;
    alone.snapshots.remove(0);
    let actor = step(&alone, lost);
    assert_eq!((actor.state, actor.last), (State::Crashed, None));
}

/// Which verbs each state takes: the table of the design, verb by verb.
#[test]
fn the_table_of_verbs() {
    let verbs = |actor: &Actor| -> String {
        let resume = Event::Resume { placement: placement(2), cause: "user".into() };
        let stop = Event::Stop {
            kind: StopKind::Suspend,
            snapshot: "x".into(),
            by: "user".into(),
            only_if_idle: false,
            drain_ms: 0,
            promote_after_ms: 0,
        };
        [
            ("resume ", resume),
            ("reset ", Event::Reset { placement: placement(2) }),
            ("stop ", stop),
            ("checkpoint ", Event::Checkpoint { snapshot: "x".into(), durable: true }),
            ("promote ", Event::Promote),
            ("revert ", Event::Revert { snapshot: "s1".into() }),
            ("delete ", Event::Delete),
        ]
        .into_iter()
        .filter(|(_, event)| transition(actor, event.clone(), 0).is_ok())
        .map(|(name, _)| name)
        .collect()
    };
    let crashed = |state| Actor { state, ..suspended() };
    let released = step(&taken(StopKind::Suspend), Event::Released { generation: Generation(2) });
    let paused = step(&taken(StopKind::Pause), Event::Released { generation: Generation(2) });
    let resuming = step(&suspended(), Event::Resume { placement: placement(1), cause: "user".into() });
    for (actor, expected) in [
        (fixtures::actor(), "resume delete "),
        (suspended(), "resume reset revert delete "),
        (resuming, "delete "),
        (resumed(), "stop checkpoint delete "),
        (stopping(StopKind::Suspend), "delete "),
        (released, "resume delete "),
        (stopping(StopKind::Pause), "delete "),
        (paused, "resume reset promote revert delete "),
        (crashed(State::Exited), "reset revert delete "),
        (crashed(State::Crashed), "reset revert delete "),
        (step(&resumed(), Event::Delete), ""),
    ] {
        assert_eq!(verbs(&actor), expected, "{}", actor.state);
    }
}
