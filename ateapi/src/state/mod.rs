// SPDX-License-Identifier: Apache-2.0
//! The actor state machine: design section 5 as one pure function. `docs/states.md` shows the table.
//!
//! ```text
//!            Resume            Activated             Stop             Snapshotted, Released
//!  NEW ───────────────▶ RESUMING ───────▶ RUNNING ─────────▶ SUSPENDING ──────▶ (upload) ──▶ SUSPENDED
//!   ▲  failed, again      │  ▲ │                │                 │  │ store unreachable        ▲
//!   └─────────────────────┘  │ └ for good ──▶ CRASHED             │  └────────▶ PAUSED ─────────┘
//!  SUSPENDED, PAUSED ────────┘                │ │                 │ lost before it was good     Uploaded
//!  EXITED, CRASHED ── Reset ─┘                │ └ Exited ▶ EXITED ▼
//!                                             └ WorkerLost ──▶ last snapshot's state, or CRASHED
//! ```
//!
//! What may end memory is decided here and nowhere else: `last` moves only to a snapshot that is complete (P2), a
//! placement is given up only with an event that proves that nothing runs there any more (P1), and going back to an
//! older state always records which and how old (P4). Everything not listed is refused with the way out (P3).
mod event;

pub use event::{Effect, Event, Failure, FailureKind, Manifest, Refused};

use crate::model::{
    Actor, CheckpointWork, EventDraft, Exit, Generation, Placement, ResumeWork, Snapshot, SnapshotId, State,
    StopKind, StopWork, UploadWish, Work,
};

/// What leads out of a state.
pub fn way_out(state: State) -> &'static str {
    match state {
        State::New => "resume it to boot it, or delete it",
        State::Suspended => "resume, fork, revert, reset or delete it",
        State::Resuming => "wait until it runs or has failed, or delete it",
        State::Running => "suspend, pause, checkpoint or delete it",
        State::Suspending => "wait until it is suspended, resume it, or delete it",
        State::Pausing => "wait until it is paused, or delete it",
        State::Paused => "resume, promote, fork, revert, reset or delete it",
        State::Exited | State::Crashed => {
            "reset it (boots afresh, volumes kept), revert it to a snapshot, or delete it"
        }
        State::Deleting => "wait until it is gone",
    }
}

/// The event that records something about this actor.
pub fn draft(actor: &Actor, at_ms: i64, reason: &str, message: String, warning: bool) -> EventDraft {
    // What happens to the maker of a golden snapshot is its template's matter.
    let (kind, subject, subject_uid) = match &actor.golden {
        None => ("actor", &actor.name, &actor.uid.0),
        Some(_) => ("template", &actor.spec.template, &actor.template_uid.0),
    };
    EventDraft {
        kind: kind.to_owned(),
        atespace: actor.atespace.clone(),
        subject: subject.clone(),
        subject_uid: subject_uid.clone(),
        reason: reason.to_owned(),
        message,
        warning,
        metadata: std::collections::BTreeMap::from([("generation".to_owned(), actor.generation.to_string())]),
        time_ms: at_ms,
    }
}

/// The state a last snapshot stands for.
fn rest_state(last: Option<&Snapshot>) -> Option<State> {
    last.map(|snapshot| if snapshot.is_durable() { State::Suspended } else { State::Paused })
}

/// Applies an event. `at_ms` is unix time.
pub fn transition(actor: &Actor, event: Event, at_ms: i64) -> Result<(Actor, Vec<Effect>), Refused> {
    let mut step = Step { before: actor, next: actor.clone(), effects: Vec::new(), at_ms };
    step.apply(event)?;
    Ok((step.next, step.effects))
}

struct Step<'a> {
    before: &'a Actor,
    next: Actor,
    effects: Vec<Effect>,
    at_ms: i64,
}

impl Step<'_> {
    fn refuse(&self, what: &str) -> Refused {
        let actor = self.before;
        Refused {
            reason: "WRONG_STATE",
            state: actor.state,
            message: format!("actor {}/{} is {}: {what}", actor.atespace, actor.name, actor.state),
            way_out: way_out(actor.state),
        }
    }

    fn of_generation(&self, generation: Generation) -> Result<(), Refused> {
        if generation == self.before.generation && self.before.placement.is_some() {
            return Ok(());
        }
        Err(Refused {
            reason: "STALE_GENERATION",
            ..self.refuse(&format!(
                "generation {generation} is not its assignment (generation {})",
                self.before.generation
            ))
        })
    }

    fn record(&mut self, reason: &str, message: String, warning: bool) {
        self.effects.push(Effect::Record(draft(&self.next, self.at_ms, reason, message, warning)));
    }

    fn enter(&mut self, state: State, reason: &str, message: &str) {
        self.next.state = state;
        reason.clone_into(&mut self.next.reason);
        message.clone_into(&mut self.next.message);
        self.next.state_since_ms = self.at_ms;
        if !matches!(state, State::Resuming) {
            self.next.progress_step.clear();
            self.next.progress_percent = 0;
        }
        // Kept while a stop may still be refused; shown only while it runs.
        if !matches!(state, State::Running | State::Suspending | State::Pausing) {
            self.next.ingress_endpoint.clear();
        }
        if !matches!(state, State::Suspending | State::Suspended | State::Pausing | State::Paused) {
            self.next.suspended_by.clear();
        }
        if state != State::Paused {
            self.next.promote_at_ms = 0;
        }
    }

    /// Gives the worker up. Only where the event proves that nothing of this generation runs any more (P1).
    fn free(&mut self) {
        if let Some(placement) = self.next.placement.take() {
            self.effects.push(Effect::Free {
                worker: placement.worker,
                node: placement.node,
                generation: self.next.generation,
            });
        }
    }

    fn assign(&mut self, placement: Placement) {
        // P1: every assignment has a generation of its own.
        self.next.generation = self.next.generation.next();
        self.next.nodes.insert(placement.node.clone());
        self.next.placement = Some(placement);
        self.next.exit = None;
    }

    /// Memory is gone: back to the last snapshot, saying so (P4).
    fn fall_back(&mut self, reason: &str, message: &str) {
        self.next.work = None;
        self.free();
        let Some(last) = self.next.last_snapshot().cloned() else {
            let message = format!("{message}; there was no snapshot to go back to");
            self.enter(State::Crashed, reason, &message);
            self.record("Crashed", message, true);
            return;
        };
        let age_ms = (self.at_ms - last.time_ms).max(0);
        let state = rest_state(Some(&last)).unwrap_or(State::Crashed);
        self.enter(state, reason, message);
        let said = format!(
            "back to snapshot {} ({}, {}.{:03} s old): {message}",
            last.id,
            last.cause,
            age_ms / 1_000,
            age_ms % 1_000
        );
        let mut event = draft(&self.next, self.at_ms, "RolledBack", said, true);
        event.metadata.insert("snapshot".to_owned(), last.id.0.clone());
        event.metadata.insert("age_ms".to_owned(), age_ms.to_string());
        event.metadata.insert("cause".to_owned(), reason.to_owned());
        self.effects.push(Effect::Record(event));
    }

    fn apply(&mut self, event: Event) -> Result<(), Refused> {
        use State::{
            Crashed, Deleting, Exited, New, Paused, Pausing, Resuming, Running, Suspended, Suspending,
        };
        let state = self.before.state;
        match event {
            Event::Resume { placement, cause } => match state {
                New | Suspended | Paused => {
                    self.resume(placement, cause);
                    Ok(())
                }
                // The node snapshot is good and its worker free: the upload goes on beside it.
                Suspending if self.stop_is_taken() && self.before.placement.is_none() => {
                    self.resume(placement, cause);
                    Ok(())
                }
                Suspending => Err(self.refuse("its snapshot is not complete yet")),
                Running | Resuming | Pausing | Exited | Crashed | Deleting => {
                    Err(self.refuse("it cannot be resumed"))
                }
            },
            Event::Clone { placement, cause, golden } => {
                if state != New {
                    return Err(self.refuse("it has a state of its own"));
                }
                let mut golden = *golden;
                "golden".clone_into(&mut golden.cause);
                // Stored once, for the template.
                golden.stored_bytes = 0;
                golden.tags.clear();
                golden.upload = None;
                self.next.last = Some(golden.id.clone());
                self.next.snapshots.push(golden);
                self.next.clone = true;
                self.resume(placement, cause);
                Ok(())
            }
            Event::Reset { placement } => match state {
                Suspended | Paused | Exited | Crashed => {
                    self.assign(placement);
                    self.next.clone = false;
                    self.next.work = Some(Work::Resume(ResumeWork {
                        source: None,
                        keep_volumes: true,
                        came_from: state,
                        cause: "reset".to_owned(),
                    }));
                    self.enter(Resuming, "", "");
                    self.record("Resetting", "boots afresh from its image, volumes kept".to_owned(), false);
                    Ok(())
                }
                _ => Err(self.refuse("it cannot be reset")),
            },
            Event::Activated { generation, ingress_endpoint } => {
                self.of_generation(generation)?;
                let (Resuming, Some(Work::Resume(work))) = (state, self.next.work.take()) else {
                    return Err(self.refuse("it is not being resumed"));
                };
                self.next.clone = false;
                self.enter(Running, "", "");
                self.next.ingress_endpoint = ingress_endpoint;
                let message = match &work.source {
                    Some(snapshot) => format!("runs from snapshot {snapshot}, generation {generation}"),
                    None => format!("booted from its image, generation {generation}"),
                };
                self.record(if work.source.is_some() { "Resumed" } else { "Started" }, message, false);
                Ok(())
            }
            Event::ActivateFailed { generation, failure } => {
                self.of_generation(generation)?;
                if state != Resuming {
                    return Err(self.refuse("it is not being resumed"));
                }
                self.activate_failed(&failure);
                Ok(())
            }
            Event::Stop { kind, snapshot, by, only_if_idle, drain_ms, promote_after_ms } => {
                if state != Running || self.before.work.is_some() {
                    return Err(self.refuse("it cannot be stopped"));
                }
                let work = StopWork {
                    kind,
                    snapshot,
                    by: by.clone(),
                    only_if_idle,
                    drain_ms,
                    promote_after_ms,
                    taken: false,
                };
                self.next.work = Some(Work::Stop(work));
                self.enter(
                    match kind {
                        StopKind::Suspend => Suspending,
                        StopKind::Pause => Pausing,
                    },
                    "",
                    "",
                );
                self.next.suspended_by = by;
                Ok(())
            }
            Event::Checkpoint { snapshot, durable } => {
                if state != Running || self.before.work.is_some() {
                    return Err(self.refuse("it cannot be checkpointed"));
                }
                self.next.work = Some(Work::Checkpoint(CheckpointWork { snapshot, durable }));
                Ok(())
            }
            Event::Snapshotted { generation, snapshot } => self.snapshotted(generation, *snapshot),
            Event::CheckpointRefused { generation, reason, message } => {
                self.of_generation(generation)?;
                match state {
                    Suspending | Pausing if !self.stop_is_taken() => {
                        self.next.work = None;
                        self.enter(Running, &reason, &message);
                        self.record("StopRefused", message, false);
                        Ok(())
                    }
                    Running if matches!(self.before.work, Some(Work::Checkpoint(_))) => {
                        self.next.work = None;
                        self.record("CheckpointRefused", message, false);
                        Ok(())
                    }
                    _ => Err(self.refuse("no checkpoint is in progress")),
                }
            }
            Event::CheckpointAbandoned { generation, message } => {
                self.of_generation(generation)?;
                if state != Running || !matches!(self.before.work, Some(Work::Checkpoint(_))) {
                    return Err(self.refuse("no checkpoint is in progress"));
                }
                self.next.work = None;
                self.record("CheckpointFailed", message, true);
                Ok(())
            }
            Event::CheckpointFailed { generation, message } => {
                self.of_generation(generation)?;
                match state {
                    Suspending | Pausing if !self.stop_is_taken() => {
                        self.fall_back("CHECKPOINT_FAILED", &message);
                        Ok(())
                    }
                    Running if matches!(self.before.work, Some(Work::Checkpoint(_))) => {
                        self.fall_back("CHECKPOINT_FAILED", &message);
                        Ok(())
                    }
                    _ => Err(self.refuse("no checkpoint is in progress")),
                }
            }
            Event::Released { generation } => {
                self.of_generation(generation)?;
                match state {
                    Suspending | Pausing if self.stop_is_taken() => {
                        self.free();
                        self.settle_stop();
                        Ok(())
                    }
                    Deleting => {
                        self.free();
                        Ok(())
                    }
                    _ => Err(self.refuse("its worker is not to be released")),
                }
            }
            Event::Uploaded { snapshot, manifest } => {
                if state == Deleting {
                    return Err(self.refuse("its snapshots are being removed"));
                }
                let Some(found) = self.next.snapshot_mut(&snapshot) else {
                    return Err(Refused {
                        reason: "UNKNOWN_SNAPSHOT",
                        ..self.refuse("that snapshot is gone")
                    });
                };
                found.manifest = Some(manifest.digest);
                found.packs = manifest.packs;
                found.bytes = manifest.bytes;
                found.stored_bytes = manifest.stored_bytes;
                found.upload = None;
                self.settle_stop();
                if state == Paused && self.next.last.as_ref() == Some(&snapshot) {
                    let by = self.next.suspended_by.clone();
                    self.enter(Suspended, "", "");
                    self.next.suspended_by = by;
                    self.record("Promoted", format!("snapshot {snapshot} is durable"), false);
                }
                Ok(())
            }
            Event::UploadFailed { snapshot, message, not_before_ms } => {
                if state == Deleting {
                    return Err(self.refuse("its snapshots are being removed"));
                }
                let Some(wish) = self.next.snapshot_mut(&snapshot).and_then(|it| it.upload.as_mut()) else {
                    return Err(Refused {
                        reason: "UNKNOWN_SNAPSHOT",
                        ..self.refuse("no such upload is owed")
                    });
                };
                let first = wish.attempts == 0;
                wish.attempts += 1;
                wish.not_before_ms = not_before_ms;
                wish.error.clone_from(&message);
                if state == Suspending && self.before.placement.is_none() && self.is_stop_of(&snapshot) {
                    self.next.work = None;
                    let by = self.next.suspended_by.clone();
                    self.enter(Paused, "UPLOAD_FAILED", &message);
                    self.next.suspended_by = by;
                }
                if first {
                    self.record(
                        "UploadFailed",
                        format!("snapshot {snapshot} stays on its node and is uploaded later: {message}"),
                        true,
                    );
                }
                Ok(())
            }
            Event::Promote => {
                if state != Paused {
                    return Err(self.refuse("only a paused actor is promoted"));
                }
                self.next.promote_at_ms = 0;
                let last = self.next.last.clone();
                if let Some(found) = last.and_then(|id| self.next.snapshot_mut(&id)) {
                    let attempts = found.upload.as_ref().map_or(0, |wish| wish.attempts);
                    found.upload = Some(UploadWish { attempts, not_before_ms: 0, error: String::new() });
                }
                Ok(())
            }
            Event::Revert { snapshot } => self.revert(&snapshot),
            Event::WorkerLost { generation, message } => self.worker_lost(generation, &message),
            Event::Exited { generation, exit } => {
                self.of_generation(generation)?;
                match state {
                    // RESUMING too: a command may end before it was ever ready.
                    Running | Resuming => self.exited(exit),
                    Suspending | Pausing if !self.stop_is_taken() => self.exited(exit),
                    _ => return Err(self.refuse("its workload has ended already")),
                }
                Ok(())
            }
            Event::NodeCopyLost { snapshot, message } => self.node_copy_lost(&snapshot, &message),
            Event::Delete => {
                if state == Deleting {
                    return Err(self.refuse("it is being deleted"));
                }
                self.next.work = None;
                for snapshot in &mut self.next.snapshots {
                    snapshot.upload = None;
                }
                self.enter(Deleting, "", "");
                Ok(())
            }
            Event::Deleted => {
                if state != Deleting || self.before.placement.is_some() {
                    return Err(self.refuse("something of it may still run"));
                }
                self.effects.push(Effect::Remove);
                self.record("Deleted", "deleted with its snapshots, volumes and logs".to_owned(), false);
                Ok(())
            }
        }
    }

    fn stop_is_taken(&self) -> bool {
        matches!(&self.before.work, Some(Work::Stop(work)) if work.taken)
    }

    fn is_stop_of(&self, snapshot: &SnapshotId) -> bool {
        matches!(&self.next.work, Some(Work::Stop(work)) if work.taken && work.snapshot == *snapshot)
    }

    fn resume(&mut self, placement: Placement, cause: String) {
        self.assign(placement);
        self.next.work = Some(Work::Resume(ResumeWork {
            source: self.next.last.clone(),
            keep_volumes: false,
            came_from: self.before.state,
            cause,
        }));
        self.enter(State::Resuming, "", "");
        if self.next.last.is_some() {
            // What comes first is known: said in the same commit.
            "restoring".clone_into(&mut self.next.progress_step);
        }
    }

    fn activate_failed(&mut self, failure: &Failure) {
        let Some(Work::Resume(work)) = self.next.work.take() else { return };
        self.free();
        let mut failure = failure.clone();
        if let (State::New, Some(golden)) = (work.came_from, &work.source) {
            // It never ran: its own first state is still its image's.
            self.next.snapshots.retain(|it| it.id != *golden);
            self.next.last = None;
            self.next.clone = false;
            self.next.boots_cold = failure.kind != FailureKind::Again;
            self.enter(State::New, &failure.reason, &failure.message);
            return self.record("ResumeFailed", failure.message, true);
        }
        if failure.kind == FailureKind::NodeCopy {
            let source = work.source.as_ref().and_then(|id| self.next.snapshot_mut(id));
            if let Some(snapshot) = source {
                if snapshot.is_durable() {
                    // The durable copy is as good; the broken one is forgotten.
                    snapshot.node = None;
                    failure.kind = FailureKind::Again;
                } else {
                    failure.kind = FailureKind::ForGood;
                }
            }
        }
        let was_cold = matches!(work.came_from, State::New | State::Exited | State::Crashed);
        let state = match failure.kind {
            FailureKind::ForGood => State::Crashed,
            _ if was_cold => work.came_from,
            _ => rest_state(self.next.last_snapshot()).unwrap_or(work.came_from),
        };
        self.enter(state, &failure.reason, &failure.message);
        let name = if state == State::Crashed { "Crashed" } else { "ResumeFailed" };
        self.record(name, failure.message, true);
    }

    fn snapshotted(&mut self, generation: Generation, mut snapshot: Snapshot) -> Result<(), Refused> {
        self.of_generation(generation)?;
        let (wanted, upload) = match (&mut self.next.work, self.before.state) {
            (Some(Work::Stop(work)), State::Suspending | State::Pausing) if !work.taken => {
                work.taken = true;
                work.kind.cause().clone_into(&mut snapshot.cause);
                (work.snapshot.clone(), work.kind == StopKind::Suspend)
            }
            (Some(Work::Checkpoint(work)), State::Running) => {
                "checkpoint".clone_into(&mut snapshot.cause);
                (work.snapshot.clone(), work.durable)
            }
            _ => return Err(self.refuse("no checkpoint is in progress")),
        };
        if wanted != snapshot.id {
            return Err(Refused {
                reason: "UNKNOWN_SNAPSHOT",
                ..self.refuse(&format!("snapshot {} is not the one in progress ({wanted})", snapshot.id))
            });
        }
        if upload {
            snapshot.upload = Some(UploadWish { attempts: 0, not_before_ms: 0, error: String::new() });
        }
        if self.before.state == State::Running {
            self.next.work = None;
        }
        self.next.last = Some(snapshot.id.clone());
        self.next.snapshots.push(snapshot);
        Ok(())
    }

    /// A stop whose snapshot is good and whose worker is free ends here.
    fn settle_stop(&mut self) {
        let Some(Work::Stop(work)) = &self.next.work else { return };
        if !work.taken || self.next.placement.is_some() {
            return;
        }
        let durable = self.next.snapshot(&work.snapshot).is_some_and(Snapshot::is_durable);
        let (state, name) = match (work.kind, durable) {
            (_, true) => (State::Suspended, "Suspended"),
            (StopKind::Pause, false) => (State::Paused, "Paused"),
            (StopKind::Suspend, false) => return,
        };
        let (snapshot, by) = (work.snapshot.clone(), work.by.clone());
        let promote_after_ms = work.promote_after_ms as i64;
        self.next.work = None;
        self.enter(state, "", "");
        if state == State::Paused && promote_after_ms > 0 {
            self.next.promote_at_ms = self.at_ms + promote_after_ms;
        }
        self.next.suspended_by.clone_from(&by);
        self.record(name, format!("snapshot {snapshot} is complete (asked for by {by})"), false);
    }

    fn revert(&mut self, id: &SnapshotId) -> Result<(), Refused> {
        use State::{Crashed, Exited, Paused, Suspended};
        let Some(snapshot) = self.before.snapshot(id).cloned() else {
            return Err(Refused {
                reason: "UNKNOWN_SNAPSHOT",
                way_out: "choose one that ListSnapshots shows",
                ..self.refuse(&format!("it has no snapshot {id}"))
            });
        };
        match self.before.state {
            Suspended | Paused | Exited | Crashed => {
                self.next.last = Some(id.clone());
                self.next.exit = None;
                let state = rest_state(Some(&snapshot)).unwrap_or(Suspended);
                self.enter(state, "", "");
                self.record("Reverted", format!("snapshot {id} is the latest now"), false);
                Ok(())
            }
            _ => Err(self.refuse("it cannot be reverted")),
        }
    }

    fn worker_lost(&mut self, generation: Generation, message: &str) -> Result<(), Refused> {
        self.of_generation(generation)?;
        match self.before.state {
            State::Resuming => {
                let failure = Failure {
                    kind: FailureKind::Again,
                    reason: "WORKER_LOST".to_owned(),
                    message: message.to_owned(),
                };
                self.activate_failed(&failure);
            }
            // The snapshot is good: the worker's death only frees it.
            State::Suspending | State::Pausing if self.stop_is_taken() => {
                self.free();
                self.settle_stop();
            }
            State::Running | State::Suspending | State::Pausing => self.fall_back("WORKER_LOST", message),
            State::Deleting => self.free(),
            _ => return Err(self.refuse("it holds no worker")),
        }
        Ok(())
    }

    fn exited(&mut self, exit: Exit) {
        self.next.work = None;
        self.free();
        let message = if exit.signal == 0 {
            format!("container {} exited with code {}", exit.container, exit.code)
        } else {
            format!("container {} was ended by signal {}", exit.container, exit.signal)
        };
        self.next.exit = Some(exit);
        self.enter(State::Exited, "WORKLOAD_EXITED", &message);
        self.record("Exited", message, true);
    }

    fn node_copy_lost(&mut self, id: &SnapshotId, message: &str) -> Result<(), Refused> {
        let at_rest = matches!(
            self.before.state,
            State::Suspended | State::Paused | State::Exited | State::Crashed | State::Suspending
        ) && self.before.placement.is_none();
        // One that runs loses what it could have gone back to, and no more.
        let runs = self.before.state == State::Running;
        let Some(snapshot) = self.next.snapshot_mut(id).filter(|_| at_rest || runs) else {
            return Err(self.refuse("it does not rest on that copy"));
        };
        snapshot.node = None;
        snapshot.upload = None;
        if snapshot.is_durable() {
            return Ok(());
        }
        // The only copy: the snapshot no longer exists.
        self.next.snapshots.retain(|snapshot| snapshot.id != *id);
        if self.before.last.as_ref() != Some(id) {
            return Ok(());
        }
        self.next.last = self.next.snapshots.iter().rev().find(|it| it.is_durable()).map(|it| it.id.clone());
        match self.before.state {
            State::Exited | State::Crashed | State::Running => {
                self.record("SnapshotLost", format!("snapshot {id} is lost: {message}"), true);
            }
            _ => self.fall_back("SNAPSHOT_LOST", message),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
