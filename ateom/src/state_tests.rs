// SPDX-License-Identifier: Apache-2.0
//! Tests of the slot's pure core: each rule by name, and random sequences against promise P1.
use proptest::prelude::*;

use super::*;

fn actor(uid: &str, generation: u64) -> Assignment {
    Assignment { actor_uid: uid.into(), generation, ..Assignment::default() }
}

fn running(uid: &str, generation: u64) -> State {
    let mut state = State::default();
    assert_eq!(state.start(&actor(uid, generation), 100, 0), Ok(Start::Begin));
    assert!(state.started());
    state
}

fn exit(code: i32) -> Phase {
    Phase::Exited(ExitStatus { code, ..ExitStatus::default() })
}

#[test]
fn starting_is_idempotent_and_exclusive() {
    let mut state = State::default();
    assert_eq!(state.start(&actor("a", 2), 100, 0), Ok(Start::Begin));
    assert_eq!(state.start(&actor("a", 2), 100, 0), Ok(Start::Join));
    assert!(matches!(state.start(&actor("b", 9), 100, 0), Err(SlotError::Occupied { .. })));
    assert!(state.started());
    assert_eq!(state.start(&actor("a", 2), 100, 0), Ok(Start::Done));
    assert!(matches!(state.start(&actor("a", 1), 100, 0), Err(SlotError::Stale { known: 2, .. })));
    assert!(matches!(state.start(&actor("a", 3), 100, 0), Err(SlotError::Occupied { .. })));
}

#[test]
fn nothing_starts_without_a_lease() {
    let mut state = State::default();
    assert!(matches!(state.start(&actor("a", 1), 100, 100), Err(SlotError::LeaseExpired(_))));
    assert!(matches!(state.start(&actor("a", 1), 0, 5), Err(SlotError::LeaseExpired(_))));
    assert_eq!(state.phase, Phase::Empty);
}

#[test]
fn generations_outlive_their_actor_but_bind_only_it() {
    let mut state = running("a", 7);
    assert_eq!(state.terminate(&actor("a", 7)), Ok(Terminate::TearDown));
    state.torn_down(Ok(()));
    assert_eq!(state.phase, Phase::Empty);
    assert!(matches!(state.start(&actor("a", 6), 100, 0), Err(SlotError::Stale { .. })));
    assert_eq!(state.start(&actor("b", 1), 100, 0), Ok(Start::Begin));
}

#[test]
fn a_copy_that_served_does_not_start_twice() {
    // Saved, and its start delivered again.
    let mut state = running("a", 7);
    state.checkpoint(&actor("a", 7), true).unwrap();
    state.torn_down(Ok(()));
    assert!(matches!(state.start(&actor("a", 7), 100, 0), Err(SlotError::Ended { .. })));
    assert_eq!(state.start(&actor("a", 8), 100, 0), Ok(Start::Begin));
    // One that failed to start may be tried again.
    assert!(state.start_failed());
    state.torn_down(Ok(()));
    assert_eq!(state.start(&actor("a", 8), 100, 0), Ok(Start::Begin));
}

#[test]
fn terminate_ends_its_own_and_lower_generations_and_leaves_others_alone() {
    let mut state = running("a", 7);
    assert_eq!(state.terminate(&actor("b", 99)), Ok(Terminate::Done));
    assert_eq!(state.phase, Phase::Running);
    assert!(matches!(state.terminate(&actor("a", 6)), Err(SlotError::Stale { .. })));
    assert_eq!(state.terminate(&actor("a", 8)), Ok(Terminate::TearDown));
    assert_eq!(state.phase, Phase::Terminating);
    // A retry waits for the same.
    assert_eq!(state.terminate(&actor("a", 8)), Ok(Terminate::TearDown));
    state.torn_down(Ok(()));
    assert_eq!(state.terminate(&actor("a", 8)), Ok(Terminate::Done));
    // Terminated before it came: a start that is late is refused.
    assert_eq!(state.terminate(&actor("c", 4)), Ok(Terminate::Done));
    assert!(matches!(state.start(&actor("c", 3), 100, 0), Err(SlotError::Stale { .. })));
}

#[test]
fn an_exit_stays_visible_until_it_is_terminated() {
    let mut state = running("a", 1);
    assert!(state.ended(exit(3)));
    assert!(state.holds);
    state.torn_down(Ok(()));
    assert_eq!(state.phase, exit(3));
    assert!(matches!(state.checkpoint(&actor("a", 1), true), Err(SlotError::WorkloadExited(_))));
    assert!(matches!(state.start(&actor("b", 1), 100, 0), Err(SlotError::Occupied { .. })));
    assert_eq!(state.terminate(&actor("a", 1)), Ok(Terminate::Done));
    assert_eq!(state.phase, Phase::Empty);
}

#[test]
fn a_sandbox_that_is_stopped_on_purpose_is_not_lost() {
    let mut state = running("a", 1);
    assert_eq!(state.checkpoint(&actor("a", 1), true), Ok(Checkpoint::Begin));
    assert!(!state.ended(Phase::Lost("sandbox died".into())));
    state.torn_down(Ok(()));
    assert_eq!(state.phase, Phase::Empty);

    let mut state = running("a", 1);
    state.checkpoint(&actor("a", 1), true).unwrap();
    assert!(state.ended(exit(0)), "the workload ended before it was saved");

    let mut state = running("a", 1);
    assert_eq!(state.checkpoint(&actor("a", 1), false), Ok(Checkpoint::Begin));
    assert!(state.serving());
    assert!(state.ended(Phase::Lost("sandbox died".into())));
    assert!(!state.checkpoint_over());
}

#[test]
fn a_failed_checkpoint_loses_and_a_refused_one_does_not() {
    let mut state = running("a", 1);
    state.checkpoint(&actor("a", 1), true).unwrap();
    assert!(!state.serving());
    assert!(state.checkpoint_over());
    assert!(state.serving());
    state.checkpoint(&actor("a", 1), true).unwrap();
    assert!(state.checkpoint_lost("disk".into()));
    state.torn_down(Ok(()));
    assert_eq!(state.phase, Phase::Lost("disk".into()));
}

#[test]
fn leases_freeze_thaw_and_give_way() {
    let mut state = running("a", 5);
    assert_eq!(state.tick(99), LeaseChange::Nothing);
    assert_eq!(state.tick(100), LeaseChange::Freeze);
    assert_eq!(state.wire_phase(), slot_status::Phase::Frozen);
    assert!(!state.serving());
    assert!(matches!(state.checkpoint(&actor("a", 5), true), Err(SlotError::LeaseExpired(_))));
    assert!(matches!(state.set_lease("a", 4, 999, 101), Err(SlotError::Stale { .. })));
    assert_eq!(state.set_lease("a", 5, 200, 101), Ok(LeaseSet::Renewed(LeaseChange::Thaw)));
    assert!(state.serving());
    assert!(matches!(state.set_lease("b", 5, 200, 101), Err(SlotError::NotHere { .. })));
    assert_eq!(state.set_lease("a", 6, 300, 102), Ok(LeaseSet::Superseded));
    assert_eq!(state.phase, Phase::Terminating);
    assert!(matches!(state.set_lease("a", 5, 300, 103), Err(SlotError::Stale { .. })));
}

#[test]
fn a_slot_that_cannot_be_emptied_is_broken_until_it_can() {
    let mut state = running("a", 1);
    state.terminate(&actor("a", 1)).unwrap();
    state.torn_down(Err("stuck".into()));
    assert!(matches!(state.start(&actor("b", 1), 100, 0), Err(SlotError::Broken(_))));
    assert_eq!(state.terminate(&actor("a", 1)), Ok(Terminate::TearDown));
    state.torn_down(Ok(()));
    assert_eq!(state.phase, Phase::Empty);
}

#[derive(Debug, Clone)]
enum Step {
    Start(u8, u64, i64),
    Started,
    StartFailed,
    Checkpoint(u8, u64, bool),
    CheckpointOver,
    CheckpointLost,
    Ended(bool),
    Terminate(u8, u64),
    TornDown(bool),
    Lease(u8, u64, i64),
    Pass(i64),
}

fn step() -> impl Strategy<Value = Step> {
    let (uid, generation, term) = (0u8..2, 1u64..5, 0i64..50);
    prop_oneof![
        3 => (uid.clone(), generation.clone(), term.clone()).prop_map(|(u, g, t)| Step::Start(u, g, t)),
        2 => Just(Step::Started),
        1 => Just(Step::StartFailed),
        1 => (uid.clone(), generation.clone(), any::<bool>()).prop_map(|(u, g, s)| Step::Checkpoint(u, g, s)),
        1 => Just(Step::CheckpointOver),
        1 => Just(Step::CheckpointLost),
        1 => any::<bool>().prop_map(Step::Ended),
        1 => (uid.clone(), generation.clone()).prop_map(|(u, g)| Step::Terminate(u, g)),
        2 => any::<bool>().prop_map(Step::TornDown),
        2 => (uid, generation, term.clone()).prop_map(|(u, g, t)| Step::Lease(u, g, t)),
        1 => term.prop_map(Step::Pass),
    ]
}

proptest! {
    /// Whatever happens in whatever order: what serves has a valid lease and the highest generation known of its
    /// actor; the slot is given to another only after it was seen empty; and a verb always leads back to EMPTY.
    #[test]
    fn one_live_copy_with_a_valid_lease(steps in proptest::collection::vec(step(), 1..60)) {
        let mut state = State::default();
        let mut now = 0;
        let mut highest: HashMap<String, u64> = HashMap::new();
        for step in steps {
            let before = state.clone();
            match step {
                Step::Start(uid, generation, term) => {
                    let who = actor(&uid.to_string(), generation);
                    if state.start(&who, now + term, now) == Ok(Start::Begin) {
                        prop_assert!(!before.holds, "started while processes of another may live");
                        prop_assert!(generation >= highest.get(&who.actor_uid).copied().unwrap_or(0));
                        highest.insert(who.actor_uid, generation);
                    }
                }
                Step::Started => drop(state.started()),
                Step::StartFailed => drop(state.start_failed()),
                Step::Checkpoint(uid, generation, stop) => {
                    drop(state.checkpoint(&actor(&uid.to_string(), generation), stop));
                }
                Step::CheckpointOver => drop(state.checkpoint_over()),
                Step::CheckpointLost => drop(state.checkpoint_lost("x".into())),
                Step::Ended(exits) => {
                    state.ended(if exits { exit(1) } else { Phase::Lost("x".into()) });
                }
                Step::Terminate(uid, generation) => {
                    let who = actor(&uid.to_string(), generation);
                    if state.terminate(&who).is_ok() {
                        let known = highest.entry(who.actor_uid).or_default();
                        *known = generation.max(*known);
                    }
                }
                // Nothing is torn down while it serves.
                Step::TornDown(ok) if !state.serving() && state.holds && state.phase != Phase::Starting
                    && !state.lease.frozen() => {
                    state.torn_down(if ok { Ok(()) } else { Err("x".into()) });
                }
                Step::TornDown(_) => {}
                Step::Lease(uid, generation, term) => {
                    let uid = uid.to_string();
                    if state.set_lease(&uid, generation, now + term, now).is_ok() {
                        let known = highest.entry(uid).or_default();
                        *known = generation.max(*known);
                    }
                }
                Step::Pass(time) => now += time,
            }
            state.tick(now);
            if state.serving() {
                let owner = state.assignment.clone().unwrap();
                prop_assert!(state.lease.valid(now), "serves past its lease");
                prop_assert!(state.holds);
                prop_assert_eq!(owner.generation, highest[&owner.actor_uid], "an old copy serves");
            }
            prop_assert_eq!(state.phase == Phase::Empty, state.assignment.is_none());
            prop_assert!(!(state.phase == Phase::Empty && state.holds), "EMPTY but not empty");
        }
        if let Some(owner) = state.assignment.clone() {
            let who = actor(&owner.actor_uid, state.highest_generation());
            if state.terminate(&who).unwrap() == Terminate::TearDown {
                state.torn_down(Ok(()));
            }
            prop_assert_eq!(state.phase, Phase::Empty);
        }
    }
}
