// SPDX-License-Identifier: Apache-2.0
//! Which calls start now, wait, join what is in progress, or are refused; and when a call is answered.
//!
//! A call that cannot start yet keeps its place in the queue; it never holds up others that can. Calls with the same
//! goal share it: resumes join the activation in flight, and checkpoints that wait when one begins share that one
//! (group commit), because it began after all of them arrived.
use std::collections::BTreeMap;

use substrate_proto::{atelet, types};

use super::driver::{Driver, End, Op, Waiter};
use super::{Call, CallError, Update, Verb};
use crate::egress;
use crate::model::{Actor, ActorUid, Snapshot, SnapshotId, State, StopKind, Template, Work};
use crate::state::{self, Event, way_out};
use crate::store::{self, RequestRecord, StoreError};

/// What a call waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Goal {
    /// RUNNING, or the resume's failure.
    Running,
    /// The stop that makes this snapshot has ended.
    Stopped(SnapshotId),
    /// This snapshot is complete on its node.
    OnNode(SnapshotId),
    /// This snapshot, or a later one, is in the blob store.
    Durable(SnapshotId),
    /// The record is gone.
    Deleted,
}

/// A call that was started, answered or joined; or that has to wait.
pub(super) enum Admitted {
    Yes,
    Wait(Call),
}

type Verdict = Result<Option<Snapshot>, CallError>;

impl Driver {
    /// Tries each waiting call once, in order. True when one was admitted.
    pub(super) async fn admit_queue(&mut self) -> Result<bool, End> {
        let mut any = false;
        let mut left = self.queue.len();
        while left > 0 {
            left -= 1;
            let Some(call) = self.queue.pop_front() else { break };
            match self.admit(call).await? {
                Admitted::Yes => any = true,
                Admitted::Wait(call) => self.queue.push_back(call),
            }
        }
        Ok(any)
    }

    /// Whether a goal is reached, failed, or still open. `seen`: its snapshot has been complete.
    pub(super) fn judge(&self, goal: &Goal, seen: bool) -> Option<Verdict> {
        let actor = &self.actor;
        let is_stopping = matches!(actor.state, State::Suspending | State::Pausing);
        let in_progress = |id: &SnapshotId| match &actor.work {
            Some(Work::Stop(work)) => work.snapshot == *id,
            Some(Work::Checkpoint(work)) => work.snapshot == *id,
            _ => false,
        };
        let found = |id: &SnapshotId| actor.snapshot(id).cloned();
        match goal {
            Goal::Deleted => None,
            Goal::Running => match actor.state {
                State::Running => Some(Ok(actor.last_snapshot().cloned())),
                State::Resuming => None,
                _ => Some(Err(self.refusal_or_failed())),
            },
            Goal::Stopped(id) if is_stopping && in_progress(id) => None,
            Goal::Stopped(id) => Some(found(id).map(Some).ok_or_else(|| self.refusal_or_failed())),
            Goal::OnNode(id) => match found(id) {
                Some(snapshot) => Some(Ok(Some(snapshot))),
                None if in_progress(id) => None,
                None => Some(Err(self.refusal_or_failed())),
            },
            Goal::Durable(id) => {
                let later = || {
                    let begun = actor.snapshots.iter().skip_while(|it| it.id != *id);
                    let superseding = actor.last_snapshot().filter(|_| found(id).is_none());
                    begun.chain(superseding).find(|it| it.is_durable()).cloned()
                };
                match found(id) {
                    Some(snapshot) if snapshot.is_durable() => Some(Ok(Some(snapshot))),
                    Some(snapshot) => match &snapshot.upload {
                        Some(wish) if wish.attempts == 0 || wish.not_before_ms == 0 => None,
                        Some(wish) => Some(Err(self.upload_failed(&snapshot.id, &wish.error))),
                        None => Some(later().map(Some).ok_or_else(|| self.refusal_or_failed())),
                    },
                    None if in_progress(id) => None,
                    // It never came to be: what is there is older.
                    None if !seen => Some(Err(self.refusal_or_failed())),
                    // Superseded by a later one, which began later still; one that was lost is not judged here.
                    None => match (later(), actor.owed_upload()) {
                        (Some(snapshot), _) => Some(Ok(Some(snapshot))),
                        (None, Some(owed)) => match &owed.upload {
                            Some(wish) if wish.attempts > 0 => {
                                Some(Err(self.upload_failed(&owed.id, &wish.error)))
                            }
                            _ => None,
                        },
                        (None, None) => Some(Err(self.refusal_or_failed())),
                    },
                }
            }
        }
    }

    pub(super) fn label(&self) -> String {
        format!("{}/{}", self.actor.atespace, self.actor.name)
    }

    pub(super) fn failed(&self) -> CallError {
        CallError::Failed {
            actor: self.label(),
            state: self.actor.state,
            reason: self.actor.reason.clone(),
            message: self.actor.message.clone(),
            snapshot: self.actor.last.clone(),
        }
    }

    fn refusal_or_failed(&self) -> CallError {
        self.refusal.clone().unwrap_or_else(|| self.failed())
    }

    pub(super) fn upload_failed(&self, snapshot: &SnapshotId, error: &str) -> CallError {
        CallError::Failed {
            actor: self.label(),
            state: self.actor.state,
            reason: "UPLOAD_FAILED".to_owned(),
            message: format!(
                "snapshot {snapshot} is complete on its node and not yet in the blob store; it is uploaded as soon \
                 as that is possible: {error}"
            ),
            snapshot: Some(snapshot.clone()),
        }
    }

    pub(super) fn refused(&self, verb: &str) -> CallError {
        let actor = &self.actor;
        CallError::Refused(state::Refused {
            reason: "WRONG_STATE",
            state: actor.state,
            message: format!("cannot {verb} actor {}: it is {}", self.label(), actor.state),
            way_out: way_out(actor.state),
        })
    }

    fn wait_for(&mut self, call: Call, goal: Goal) -> Admitted {
        self.waiters.push(Waiter { call, goal, seen: false });
        Admitted::Yes
    }

    pub(super) fn reply(&self, call: Call, verdict: Verdict) -> Admitted {
        let answer = verdict.map(|snapshot| self.answer(snapshot, false));
        let _ = call.reply.send(answer);
        Admitted::Yes
    }

    async fn admit(&mut self, call: Call) -> Result<Admitted, End> {
        if let Some(key) = &call.request {
            match self.engine.store.request(&key.id).await {
                Err(error) => return Ok(self.reply(call, Err(error.into()))),
                Ok(Some(record)) if record.fingerprint != key.fingerprint => {
                    let id = key.id.rsplit('/').next().unwrap_or_default().to_owned();
                    return Ok(self.reply(call, Err(CallError::RequestReused(id))));
                }
                Ok(Some(record)) => match self.replay(call, &record).await? {
                    Ok(admitted) => return Ok(admitted),
                    // That attempt led to nothing: it is made again.
                    Err(call) => return self.admit_anew(call).await,
                },
                Ok(None) => {}
            }
        }
        self.admit_anew(call).await
    }

    /// A retry of a call whose first attempt was begun: waits for or finds what that one led to.
    async fn replay(&mut self, call: Call, record: &RequestRecord) -> Result<Result<Admitted, Call>, End> {
        let id = SnapshotId(record.outcome.clone());
        Ok(Ok(match &call.verb {
            Verb::Suspend { .. } | Verb::Pause { .. } => {
                let goal = Goal::Stopped(id.clone());
                if self.judge(&goal, false).is_some() && self.actor.snapshot(&id).is_none() {
                    return Ok(Err(call));
                }
                self.wait_for(call, goal)
            }
            Verb::Checkpoint { durable, .. } => {
                if self.judge(&Goal::OnNode(id.clone()), false).is_some()
                    && self.actor.snapshot(&id).is_none()
                {
                    return Ok(Err(call));
                }
                let goal = if *durable { Goal::Durable(id) } else { Goal::OnNode(id) };
                self.wait_for(call, goal)
            }
            Verb::Reset if self.actor.state == State::Resuming => self.wait_for(call, Goal::Running),
            Verb::Fork { .. } => match store::load::<Actor>(&*self.engine.store, &record.outcome).await {
                Ok(Some(fork)) => {
                    let mut answer = self.answer(fork.last_snapshot().cloned(), false);
                    answer.actor = fork;
                    let _ = call.reply.send(Ok(answer));
                    Admitted::Yes
                }
                Ok(None) => {
                    let gone = CallError::NotFound { kind: "actor", name: record.outcome.clone() };
                    self.reply(call, Err(gone))
                }
                Err(error) => self.reply(call, Err(error.into())),
            },
            // It came about, or failed and says so, or was undone since: only a failure is tried again.
            Verb::Resume { .. }
                if matches!(self.actor.state, State::Running | State::Resuming)
                    || !self.actor.reason.is_empty() =>
            {
                return Ok(Err(call));
            }
            // Joins the upload in flight, or finds it done; an actor that has moved on was promoted.
            Verb::Promote if self.actor.state == State::Paused => return Ok(Err(call)),
            Verb::Tag { .. } | Verb::Untag { .. } => {
                let tagged = self.actor.snapshot(&id).cloned();
                self.reply(call, Ok(tagged))
            }
            _ => {
                let last = self.actor.last_snapshot().cloned();
                self.reply(call, Ok(last))
            }
        }))
    }

    async fn admit_anew(&mut self, call: Call) -> Result<Admitted, End> {
        if self.actor.state == State::Deleting {
            let gone = CallError::NotFound { kind: "actor", name: self.label() };
            return Ok(self.reply(call, Err(gone)));
        }
        match call.verb.clone() {
            Verb::Resume { cause } if cause == "traffic" && !self.may_wake_on_traffic() => {
                let error = CallError::Precondition {
                    reason: "NO_WAKE_ON_TRAFFIC",
                    message: format!("actor {} is asleep and is not woken by traffic", self.label()),
                    way_out: "resume it explicitly",
                };
                Ok(self.reply(call, Err(error)))
            }
            Verb::Resume { .. } => Ok(self.admit_resume(call)),
            Verb::Reset => Ok(self.admit_reset(call)),
            Verb::Suspend { by, only_if_idle, drain_ms } => {
                self.admit_stop(call, StopKind::Suspend, by, only_if_idle, drain_ms, 0).await
            }
            Verb::Pause { by, only_if_idle, drain_ms, promote_after } => {
                let after = promote_after.map_or(0, |after| after.as_millis() as u64);
                self.admit_stop(call, StopKind::Pause, by, only_if_idle, drain_ms, after).await
            }
            Verb::Promote => self.admit_promote(call).await,
            Verb::Checkpoint { .. } => self.admit_checkpoint(call).await,
            Verb::Revert { snapshot } => self.admit_revert(call, &snapshot).await,
            Verb::Fork { name, snapshot } => self.admit_fork(call, &name, &snapshot).await,
            Verb::Update(update) => self.admit_update(call, *update).await,
            Verb::Tag { snapshot, tag } => self.admit_tag(call, Some(&snapshot), &tag).await,
            Verb::Untag { tag } => self.admit_tag(call, None, &tag).await,
            Verb::Bind { generation, name } => self.admit_bind(call, generation, &name).await,
            // Handled as it arrives.
            Verb::Delete | Verb::NodeLost { .. } => Ok(Admitted::Wait(call)),
        }
    }

    fn may_wake_on_traffic(&self) -> bool {
        !self.actor.spec.wake_on_traffic_disabled
            || matches!(self.actor.state, State::Running | State::Resuming)
    }

    fn admit_resume(&mut self, call: Call) -> Admitted {
        match self.actor.state {
            State::Running => {
                let mut answer = self.answer(self.actor.last_snapshot().cloned(), true);
                answer.steps.clear();
                let _ = call.reply.send(Ok(answer));
                Admitted::Yes
            }
            State::Resuming => self.wait_for(call, Goal::Running),
            State::Pausing => Admitted::Wait(call),
            State::New | State::Suspended | State::Paused | State::Suspending => {
                let settled = match &self.actor.work {
                    Some(Work::Stop(work)) => work.taken && self.actor.placement.is_none(),
                    _ => true,
                };
                if self.op.is_some() || !settled {
                    return Admitted::Wait(call);
                }
                if call.after_upload
                    && let Some(wish) = self.actor.last_snapshot().and_then(|it| it.upload.as_ref())
                {
                    if wish.attempts == 0 || wish.not_before_ms == 0 {
                        return Admitted::Wait(call);
                    }
                    let id = self.actor.last.clone().unwrap_or_else(|| "?".into());
                    let error = self.upload_failed(&id, &wish.error);
                    return self.reply(call, Err(error));
                }
                self.start_place(call, false)
            }
            State::Exited | State::Crashed | State::Deleting => {
                let refused = self.refused("resume");
                self.reply(call, Err(refused))
            }
        }
    }

    fn admit_reset(&mut self, call: Call) -> Admitted {
        match self.actor.state {
            State::Suspended | State::Paused | State::Exited | State::Crashed if self.op.is_none() => {
                self.start_place(call, true)
            }
            State::Suspended
            | State::Paused
            | State::Exited
            | State::Crashed
            | State::Suspending
            | State::Pausing => Admitted::Wait(call),
            _ => {
                let refused = self.refused("reset");
                self.reply(call, Err(refused))
            }
        }
    }

    fn start_place(&mut self, call: Call, afresh: bool) -> Admitted {
        let future = Box::pin(super::background::place(
            std::sync::Arc::clone(&self.engine),
            self.actor.clone(),
            afresh,
        ));
        self.op = Some(Op::Place { call, future });
        Admitted::Yes
    }

    async fn admit_stop(
        &mut self,
        call: Call,
        kind: StopKind,
        by: String,
        only_if_idle: bool,
        drain_ms: u32,
        promote_after_ms: u64,
    ) -> Result<Admitted, End> {
        let last = self.actor.last_snapshot().cloned();
        Ok(match (self.actor.state, kind) {
            (State::Running, _) if self.op.is_some() || self.actor.work.is_some() => Admitted::Wait(call),
            (State::Running, _) if !self.node_is_up() => {
                let node = self.actor.placement.as_ref().map_or_else(String::new, |it| it.node.0.clone());
                self.engine.disturb(&self.uid);
                self.reply(call, Err(CallError::NodeUnreachable(node)))
            }
            (State::Running, _) => {
                self.steps.clear();
                self.refusal = None;
                let snapshot = SnapshotId::draw(&*self.engine.clock);
                let id = snapshot.clone();
                let event = Event::Stop { kind, snapshot, by, only_if_idle, drain_ms, promote_after_ms };
                self.apply(event, call.request.as_ref()).await?;
                self.wait_for(call, Goal::Stopped(id))
            }
            (State::Suspending, StopKind::Suspend) | (State::Pausing, StopKind::Pause) => {
                match self.actor.work.clone() {
                    Some(Work::Stop(work)) => self.wait_for(call, Goal::Stopped(work.snapshot)),
                    _ => Admitted::Wait(call),
                }
            }
            (State::Suspended, StopKind::Suspend) | (State::Paused, StopKind::Pause) => {
                self.reply(call, Ok(last))
            }
            (State::Paused, StopKind::Suspend) => self.admit_promote(call).await?,
            (State::Resuming | State::Suspending | State::Pausing, _) => Admitted::Wait(call),
            (state, _) => {
                let verb = if kind == StopKind::Suspend { "suspend" } else { "pause" };
                let refused = self.refused(verb);
                debug_assert!(state != State::Running);
                self.reply(call, Err(refused))
            }
        })
    }

    async fn admit_promote(&mut self, call: Call) -> Result<Admitted, End> {
        let last = self.actor.last_snapshot().cloned();
        Ok(match (self.actor.state, last) {
            (State::Suspended, last) => self.reply(call, Ok(last)),
            (State::Paused, Some(last)) => {
                // In flight already, or asked for anew at once.
                if last.upload.as_ref().is_none_or(|wish| wish.attempts > 0) {
                    self.apply(Event::Promote, call.request.as_ref()).await?;
                }
                self.wait_for(call, Goal::Durable(last.id))
            }
            (State::Suspending, _) => match self.actor.work.clone() {
                Some(Work::Stop(work)) => self.wait_for(call, Goal::Stopped(work.snapshot)),
                _ => Admitted::Wait(call),
            },
            (State::Pausing, _) => Admitted::Wait(call),
            _ => {
                let refused = self.refused("promote");
                self.reply(call, Err(refused))
            }
        })
    }

    /// What has to hold for a checkpoint call whatever the state: its generation, and the bound on memory.
    fn checkpoint_is_fair(&self, generation: u64, max_heap: u64) -> Result<Option<Snapshot>, CallError> {
        let actor = &self.actor;
        let is_awake =
            matches!(actor.state, State::Resuming | State::Running | State::Suspending | State::Pausing);
        if generation != 0 && (generation != actor.generation.0 || !is_awake) {
            // A stop that ended that generation captured all that it ever did. Where none did, the actor has gone back,
            // and what the caller saw is lost.
            let last = actor
                .snapshots
                .iter()
                .rev()
                .find(|it| it.generation.0 == generation && it.origin == actor.uid && it.is_final());
            return last.cloned().map(Some).ok_or_else(|| CallError::StaleGeneration {
                actor: self.label(),
                asked: generation,
                present: actor.generation.0,
            });
        }
        if let Some((memory, _)) = self.engine.counted(&self.uid)
            && max_heap > 0
            && memory > max_heap
        {
            return Err(CallError::TooLarge { actor: self.label(), memory, bound: max_heap });
        }
        Ok(None)
    }

    async fn admit_checkpoint(&mut self, call: Call) -> Result<Admitted, End> {
        let Verb::Checkpoint { durable, generation, max_heap } = call.verb else {
            return Ok(Admitted::Wait(call));
        };
        let goal = |id: SnapshotId, durable| if durable { Goal::Durable(id) } else { Goal::OnNode(id) };
        match self.checkpoint_is_fair(generation, max_heap) {
            Err(error) => return Ok(self.reply(call, Err(error))),
            Ok(Some(last)) if durable && !last.is_durable() => {
                return Ok(self.wait_for(call, Goal::Durable(last.id)));
            }
            Ok(Some(last)) => return Ok(self.reply(call, Ok(Some(last)))),
            Ok(None) => {}
        }
        match self.actor.state {
            State::Running if self.op.is_none() && self.actor.work.is_none() && self.node_is_up() => {
                if let Err(error) = self.engine.snapshot_quota(&self.actor.atespace).await {
                    return Ok(self.reply(call, Err(error)));
                }
            }
            State::Running if !self.node_is_up() && self.op.is_none() => {
                let node = self.actor.placement.as_ref().map_or_else(String::new, |it| it.node.0.clone());
                return Ok(self.reply(call, Err(CallError::NodeUnreachable(node))));
            }
            State::Running | State::Resuming => return Ok(Admitted::Wait(call)),
            // The stop's snapshot captures all that the actor ever did in this generation, so it also holds whatever
            // the caller saw before it called.
            State::Suspending | State::Pausing => {
                return Ok(match self.actor.work.clone() {
                    Some(Work::Stop(work)) if work.taken => self.wait_for(call, goal(work.snapshot, durable)),
                    _ => Admitted::Wait(call),
                });
            }
            State::Suspended | State::Paused => {
                let last = self.actor.last_snapshot().cloned();
                return if durable && self.actor.state == State::Paused {
                    self.admit_promote(call).await
                } else {
                    Ok(self.reply(call, Ok(last)))
                };
            }
            _ => {
                let refused = self.refused("checkpoint");
                return Ok(self.reply(call, Err(refused)));
            }
        }
        // Group commit: everyone who waits now arrived before this checkpoint begins.
        let mut group = vec![(call, durable)];
        let mut rest = std::collections::VecDeque::new();
        while let Some(other) = self.queue.pop_front() {
            match other.verb {
                Verb::Checkpoint { durable, generation, max_heap }
                    if other.request.is_none()
                        && matches!(self.checkpoint_is_fair(generation, max_heap), Ok(None)) =>
                {
                    group.push((other, durable));
                }
                _ => rest.push_back(other),
            }
        }
        self.queue = rest;
        self.steps.clear();
        self.refusal = None;
        let snapshot = SnapshotId::draw(&*self.engine.clock);
        let event = Event::Checkpoint {
            snapshot: snapshot.clone(),
            durable: group.iter().any(|(_, durable)| *durable),
        };
        let request = group.iter().find_map(|(call, _)| call.request.clone());
        self.apply(event, request.as_ref()).await?;
        for (call, durable) in group {
            self.wait_for(call, goal(snapshot.clone(), durable));
        }
        Ok(Admitted::Yes)
    }

    pub(super) fn unknown_snapshot(&self, asked: &str) -> CallError {
        CallError::NotFound { kind: "snapshot", name: format!("{asked:?} of actor {}", self.label()) }
    }

    async fn admit_revert(&mut self, call: Call, asked: &str) -> Result<Admitted, End> {
        match self.actor.state {
            State::Suspending | State::Pausing => return Ok(Admitted::Wait(call)),
            State::Suspended | State::Paused | State::Exited | State::Crashed if self.op.is_some() => {
                return Ok(Admitted::Wait(call));
            }
            State::Suspended | State::Paused | State::Exited | State::Crashed => {}
            _ => {
                let refused = self.refused("revert");
                return Ok(self.reply(call, Err(refused)));
            }
        }
        let Some(snapshot) = self.actor.find_snapshot(asked).map(|it| it.id.clone()) else {
            let unknown = self.unknown_snapshot(asked);
            return Ok(self.reply(call, Err(unknown)));
        };
        match self.try_apply(Event::Revert { snapshot }, call.request.as_ref()).await? {
            Ok(()) => {
                let last = self.actor.last_snapshot().cloned();
                Ok(self.reply(call, Ok(last)))
            }
            Err(refused) => Ok(self.reply(call, Err(refused.into()))),
        }
    }

    async fn admit_update(&mut self, call: Call, update: Update) -> Result<Admitted, End> {
        let mut next = self.actor.clone();
        if let Some(labels) = update.labels {
            next.spec.labels = labels;
        }
        if let Some(annotations) = update.annotations {
            next.spec.annotations = annotations;
        }
        if let Some(idle) = update.idle {
            next.idle = idle;
        }
        let policy = update.egress;
        if let Some(egress) = &policy
            && next.egress.as_ref() != Some(egress)
        {
            next.egress = Some(egress.clone());
            next.egress_revision += 1;
        }
        let request = call.request.clone().map(|key| (key, self.uid.0.clone()));
        if (next != self.actor || request.is_some()) && !self.write(next, Vec::new(), request).await? {
            let error = StoreError::Io("the record was read anew; call again".to_owned());
            return Ok(self.reply(call, Err(error.into())));
        }
        // Names are the proxy's, which asks for the policy; addresses are enforced in the slot, which is told here.
        let target = self.actor.placement.as_ref().and_then(|placement| self.engine.node(&placement.node));
        match (policy, target, self.actor.assignment()) {
            (Some(policy), Some(node), Some(assignment)) if self.actor.state == State::Running => {
                let answer = self.answer(None, false);
                let engine = std::sync::Arc::clone(&self.engine);
                self.engine.spawn(async move {
                    let told = engine.set_egress(&node, assignment, policy).await;
                    let _ = call.reply.send(told.map(|()| answer));
                });
                Ok(Admitted::Yes)
            }
            _ => Ok(self.reply(call, Ok(None))),
        }
    }

    async fn admit_tag(&mut self, call: Call, asked: Option<&str>, tag: &str) -> Result<Admitted, End> {
        let mut next = self.actor.clone();
        let id = match asked {
            Some("") => next.last.clone(),
            Some(asked) => next.find_snapshot(asked).map(|it| it.id.clone()),
            None => next.find_snapshot(tag).map(|it| it.id.clone()),
        };
        let Some(id) = id.filter(|id| next.snapshot(id).is_some()) else {
            let unknown = self.unknown_snapshot(asked.filter(|it| !it.is_empty()).unwrap_or(tag));
            return Ok(self.reply(call, Err(unknown)));
        };
        for snapshot in &mut next.snapshots {
            // A tag names one snapshot of an actor: it moves.
            snapshot.tags.remove(tag);
            if asked.is_some() && snapshot.id == id {
                snapshot.tags.insert(tag.to_owned());
            }
        }
        let tagged = next.snapshot(&id).cloned();
        let request = call.request.clone().map(|key| (key, id.0));
        if (next != self.actor || request.is_some()) && !self.write(next, Vec::new(), request).await? {
            let error = StoreError::Io("the record was read anew; call again".to_owned());
            return Ok(self.reply(call, Err(error.into())));
        }
        Ok(self.reply(call, Ok(tagged)))
    }

    async fn admit_bind(&mut self, call: Call, generation: u64, name: &str) -> Result<Admitted, End> {
        if generation != self.actor.generation.0 {
            let stale = CallError::StaleGeneration {
                actor: self.label(),
                asked: generation,
                present: self.actor.generation.0,
            };
            return Ok(self.reply(call, Err(stale)));
        }
        let policy = match self.engine.egress_of(&self.actor).await {
            Ok(policy) => policy,
            Err(error) => return Ok(self.reply(call, Err(error))),
        };
        let (index, is_new) = match egress::bind(&self.actor.egress_names, &policy, name) {
            Ok(bound) => bound,
            Err(error) => return Ok(self.reply(call, Err(error.into()))),
        };
        if is_new {
            let mut next = self.actor.clone();
            next.egress_names.insert(name.to_owned(), index);
            if !self.write(next, Vec::new(), None).await? {
                let error = StoreError::Io("the record was read anew; call again".to_owned());
                return Ok(self.reply(call, Err(error.into())));
            }
        }
        let mut answer = self.answer(None, false);
        answer.name = Some(egress::bound(name, index));
        let _ = call.reply.send(Ok(answer));
        Ok(Admitted::Yes)
    }
}

impl super::Engine {
    /// The egress policy that an actor is held to.
    pub(crate) async fn egress_of(&self, actor: &Actor) -> Result<types::EgressPolicy, CallError> {
        if let Some(policy) = &actor.egress {
            return Ok(policy.clone());
        }
        let template: Option<Template> = store::load(&*self.store, actor.template_uid.as_str()).await?;
        Ok(template.and_then(|template| template.spec.egress).unwrap_or_default())
    }

    /// Hands a policy to the slot; tries for as long as the assignment holds.
    async fn set_egress(
        self: &std::sync::Arc<Self>,
        node: &super::NodeHandle,
        assignment: types::Assignment,
        policy: types::EgressPolicy,
    ) -> Result<(), CallError> {
        loop {
            let request = atelet::SetEgressRequest {
                assignment: Some(assignment.clone()),
                policy: Some(policy.clone()),
            };
            let status = match node.client.set_egress(request).await {
                Ok(()) => return Ok(()),
                Err(status) => status,
            };
            let uid = ActorUid(assignment.actor_uid.clone());
            let now: Option<Actor> = store::load(&*self.store, uid.as_str()).await?;
            let holds = now.is_some_and(|actor| {
                actor.generation.0 == assignment.generation && actor.state == State::Running
            });
            if !holds {
                // The next activation carries the policy.
                return Ok(());
            }
            tracing::warn!(actor = %uid, node = %node.name, %status, "handing over an egress policy failed");
            self.pause(std::time::Duration::from_millis(500)).await;
        }
    }
}

/// Labels all of which an actor has.
pub(crate) fn has_labels(actor: &Actor, wanted: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| actor.spec.labels.get(key) == Some(value))
}
