// SPDX-License-Identifier: Apache-2.0
//! Workflows: which step an actor's record asks for next, and what is due at what time.
//!
//! A workflow is not a program that runs through; it is the record. [`next`] reads from the state, the work and the
//! placement which step has not happened yet; the step is run (it is idempotent: its ids were persisted before); its
//! outcome is an [`Event`](crate::state::Event), whose commit is the progress. A control plane that starts anew asks
//! the same question of the same record, so a crash at any point repeats at most one step.
//!
//! | Workflow | Steps (undo) |
//! |---|---|
//! | resume, reset | `Place` (give the booking back) → commit RESUMING → `EnsureImages` → `Activate` (`UndoActivate`: release) → commit RUNNING |
//! | suspend | commit SUSPENDING → `Checkpoint` (refused: commit RUNNING) → commit the node snapshot → `Release` → commit → `Upload` → commit SUSPENDED |
//! | pause | the same without `Upload` |
//! | checkpoint | commit the snapshot's id → `CheckpointLive` → commit the snapshot → `Upload` when durable |
//! | promote | commit the wish → `Upload` → commit SUSPENDED |
//! | delete | commit DELETING → `DeleteRelease` → commit → `Purge` → commit the removal → `Collect` |
//!
//! `Upload` runs beside the others: once a node snapshot is good, nothing waits for the store but those who asked for
//! durability.
mod fault;
pub(crate) mod steps;

#[cfg(test)]
pub use fault::Rule;
pub use fault::{FaultPoint, Faults, Injected, NoFaults, StepName, When};

use std::time::Duration;

use crate::model::{Actor, State, UploadWish, Work, quantity};

/// A step that a record asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// RESUMING: images, then activation.
    Activate,
    /// SUSPENDING, PAUSING: the checkpoint that ends memory.
    Checkpoint,
    /// SUSPENDING, PAUSING: the worker goes back.
    Release,
    /// RUNNING: the checkpoint that keeps it running.
    CheckpointLive,
    /// DELETING: end what runs.
    DeleteRelease,
    /// DELETING: remove files, then the record.
    Purge,
}

/// The step that a record asks for.
pub fn next(actor: &Actor) -> Option<Next> {
    match (actor.state, &actor.work) {
        (State::Resuming, _) => Some(Next::Activate),
        (State::Suspending | State::Pausing, Some(Work::Stop(work))) if !work.taken => Some(Next::Checkpoint),
        (State::Suspending | State::Pausing, _) if actor.placement.is_some() => Some(Next::Release),
        (State::Running, Some(Work::Checkpoint(_))) => Some(Next::CheckpointLive),
        (State::Deleting, _) if actor.placement.is_some() => Some(Next::DeleteRelease),
        (State::Deleting, _) => Some(Next::Purge),
        _ => None,
    }
}

/// Whether something set for `at_ms` is due. No more than `longest_ms` can be left of it: where more seems to be left, the
/// wall clock was set back, and nothing waits for it to catch up.
fn is_due(at_ms: i64, longest_ms: i64, now_ms: i64) -> bool {
    at_ms <= now_ms || at_ms > now_ms.saturating_add(longest_ms)
}

/// Moment and longest wait of the next background checkpoint.
fn checkpoint_at(actor: &Actor) -> Option<(i64, i64)> {
    if actor.state != State::Running || actor.checkpoint.interval.is_empty() {
        return None;
    }
    let interval = quantity::duration(&actor.checkpoint.interval).ok()?.as_millis() as i64;
    let since = actor.last_snapshot().map_or(0, |it| it.time_ms).max(actor.state_since_ms);
    // A snapshot's time is of its node's clock, which may be a little ahead.
    Some((since.saturating_add(interval), interval.saturating_mul(2)))
}

fn promotion_at(actor: &Actor) -> Option<(i64, i64)> {
    let at = actor.promote_at_ms;
    (at != 0 && actor.state == State::Paused).then_some((at, at.saturating_sub(actor.state_since_ms)))
}

/// Whether a background checkpoint is due.
pub fn checkpoint_is_due(actor: &Actor, now_ms: i64) -> bool {
    checkpoint_at(actor).is_some_and(|(at, longest)| is_due(at, longest, now_ms))
}

/// Whether a pause is to become durable.
pub fn promotion_is_due(actor: &Actor, now_ms: i64) -> bool {
    promotion_at(actor).is_some_and(|(at, longest)| is_due(at, longest, now_ms))
}

/// Whether an owed upload may be tried (again).
pub fn upload_is_due(wish: &UploadWish, now_ms: i64) -> bool {
    is_due(wish.not_before_ms, LONGEST_BACKOFF_MS, now_ms)
}

/// Time until something is due without anyone asking.
pub fn wake_in(actor: &Actor, now_ms: i64) -> Option<Duration> {
    let upload = actor
        .owed_upload()
        .and_then(|snapshot| snapshot.upload.as_ref())
        .filter(|wish| wish.attempts > 0)
        .map(|wish| (wish.not_before_ms, LONGEST_BACKOFF_MS));
    let wait = |(at, longest): (i64, i64)| if is_due(at, longest, now_ms) { 0 } else { at - now_ms };
    let next = [upload, promotion_at(actor), checkpoint_at(actor)].into_iter().flatten().map(wait).min();
    next.map(|ms| Duration::from_millis(ms as u64))
}

/// Longest pause between two attempts, ms.
const LONGEST_BACKOFF_MS: i64 = 60_000;

/// Pause before the next attempt of something that failed, ms: doubles from half a second to a minute.
pub fn backoff_ms(attempts: u32) -> i64 {
    500_i64.saturating_mul(1 << attempts.min(7)).min(LONGEST_BACKOFF_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_back_delays_nothing() {
        let wish = UploadWish { attempts: 3, not_before_ms: 1_000_000, error: String::new() };
        assert!(!upload_is_due(&wish, 999_999));
        assert!(upload_is_due(&wish, 1_000_000));
        // An hour back: it must not wait for an hour.
        assert!(upload_is_due(&wish, 1_000_000 - 3_600_000));
        let mut actor = crate::testing::fixtures::actor();
        actor.state = State::Running;
        actor.state_since_ms = 1_000_000;
        actor.checkpoint.interval = "10s".into();
        assert_eq!(wake_in(&actor, 1_000_000), Some(Duration::from_secs(10)));
        assert!(!checkpoint_is_due(&actor, 1_009_999) && checkpoint_is_due(&actor, 1_010_000));
        assert_eq!(wake_in(&actor, 900_000), Some(Duration::ZERO));
    }
}
