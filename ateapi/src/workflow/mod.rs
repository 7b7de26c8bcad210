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

pub use fault::{FaultPoint, Faults, Injected, NoFaults, StepName, When};

use crate::model::{Actor, State, Work, quantity};

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

/// When the next background checkpoint is due, unix ms.
pub fn checkpoint_due(actor: &Actor) -> Option<i64> {
    if actor.state != State::Running || actor.checkpoint.interval.is_empty() {
        return None;
    }
    let interval = quantity::duration(&actor.checkpoint.interval).ok()?.as_millis() as i64;
    let since = actor.last_snapshot().map_or(0, |it| it.time_ms).max(actor.state_since_ms);
    Some(since + interval)
}

/// The next moment at which something is due without anyone asking, unix ms.
pub fn wake_at(actor: &Actor) -> Option<i64> {
    let upload = actor
        .owed_upload()
        .and_then(|snapshot| snapshot.upload.as_ref())
        .filter(|wish| wish.attempts > 0)
        .map(|wish| wish.not_before_ms);
    let promote = Some(actor.promote_at_ms).filter(|at| *at != 0 && actor.state == State::Paused);
    [upload, promote, checkpoint_due(actor)].into_iter().flatten().min()
}

/// Pause before the next attempt of something that failed, ms: doubles from half a second to a minute.
pub fn backoff_ms(attempts: u32) -> i64 {
    500_i64.saturating_mul(1 << attempts.min(7)).min(60_000)
}
