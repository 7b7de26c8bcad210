// SPDX-License-Identifier: Apache-2.0
//! The driver of one actor: the only task that writes its record.
//!
//! ```text
//!   calls, news ──▶ queue ──▶ admit ──▶ transition ──▶ commit ──▶ settle (answers whoever waited for this)
//!                                           ▲             │
//!                                 outcome ──┘             └──▶ next(record) ──▶ one step at a time
//!                                                         └──▶ owed upload  ──▶ one upload beside it
//! ```
//!
//! Nothing but the record decides what is done next, so the start after a crash is the same code as any other moment.
//! When a commit fails the driver forgets everything, reads the record anew and goes on from there: what a step did is
//! found again, because steps are idempotent.
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use substrate_proto::ateapi;
use tokio::sync::mpsc;

use super::admit::Goal;
use super::{Answer, Call, CallError, Command, Engine, News, Verb};
use crate::model::{Actor, ActorUid, Placement, Snapshot, SnapshotId, State, Work};
use crate::schedule::NoWorker;
use crate::state::{self, Event};
use crate::store::StoreError;
use crate::workflow::steps::{self, Killed, Outcome};
use crate::workflow::{self, Next, StepName};

/// Times a resume is taken to another worker before its caller is told.
const RESUME_TRIES: u8 = 2;

/// A call that waits for its end.
pub(super) struct Waiter {
    pub(super) call: Call,
    pub(super) goal: Goal,
    /// The record has held its snapshot: when it is gone, a later one stands for it.
    pub(super) seen: bool,
}

/// What is in flight.
pub(super) enum Op {
    Place { call: Call, future: BoxFuture<'static, Result<Booking, PlaceError>> },
    Step { future: BoxFuture<'static, Result<Outcome, Killed>> },
    Purge { future: BoxFuture<'static, Result<Vec<crate::model::NodeName>, Killed>> },
}

enum Done {
    Placed(Call, Result<Booking, PlaceError>),
    Step(Result<Outcome, Killed>),
    Purged(Result<Vec<crate::model::NodeName>, Killed>),
}

/// Why there is no booking.
pub(super) enum PlaceError {
    Killed,
    Call(CallError),
    /// Full on the one node that has the snapshot, but there is room elsewhere once it is durable.
    Elsewhere(CallError),
}

/// A worker booked for the next assignment; given back when it is not used.
pub(super) struct Booking {
    pub(super) engine: Arc<Engine>,
    pub(super) uid: ActorUid,
    pub(super) generation: crate::model::Generation,
    pub(super) placement: Option<Placement>,
    /// What a new actor starts from there.
    pub(super) golden: Option<Box<Snapshot>>,
}

impl Drop for Booking {
    fn drop(&mut self) {
        if let Some(placement) = self.placement.take() {
            super::lock(&self.engine.pool).free(&placement.worker, &self.uid, self.generation, true);
            self.engine.pool_touched([placement.worker]);
        }
    }
}

pub(super) struct Driver {
    pub(super) engine: Arc<Engine>,
    pub(super) uid: ActorUid,
    inbox: mpsc::Receiver<Command>,
    /// Present from the first read on.
    pub(super) actor: Actor,
    pub(super) queue: VecDeque<Call>,
    pub(super) waiters: Vec<Waiter>,
    pub(super) op: Option<Op>,
    pub(super) upload: Option<(SnapshotId, BoxFuture<'static, Result<Outcome, Killed>>)>,
    /// A loss or exit that waits for the answer of a checkpoint in flight.
    pub(super) held: Option<News>,
    pub(super) steps: Vec<ateapi::Step>,
    /// Why the last stop or checkpoint did not happen, for those who asked.
    pub(super) refusal: Option<CallError>,
    pub(super) failures: u32,
}

/// The actor is gone, or the control plane is.
pub(super) struct End;

/// A driver that has not read its record yet.
pub(super) struct DriverStart {
    pub(super) engine: Arc<Engine>,
    pub(super) uid: ActorUid,
    pub(super) inbox: mpsc::Receiver<Command>,
}

impl DriverStart {
    pub(super) async fn run(mut self) {
        let actor = loop {
            match super::golden::load(&self.engine, &self.uid).await {
                Ok(Some(actor)) => break actor,
                Ok(None) => {
                    // Nobody of that uid: answer until nobody asks any more.
                    while let Ok(command) = self.inbox.try_recv() {
                        refuse_unknown(&self.uid, command);
                    }
                    if self.engine.retire_driver(&self.uid, &self.inbox) {
                        return;
                    }
                }
                Err(error) => {
                    tracing::error!(actor = %self.uid, %error, "cannot read an actor's record");
                    while let Ok(command) = self.inbox.try_recv() {
                        if let Command::Call(call) = command {
                            let _ = call.reply.send(Err(error.clone().into()));
                        }
                    }
                    self.engine.pause(Duration::from_millis(500)).await;
                }
            }
        };
        let driver = Driver {
            engine: self.engine,
            uid: self.uid,
            inbox: self.inbox,
            actor,
            queue: VecDeque::new(),
            waiters: Vec::new(),
            op: None,
            upload: None,
            held: None,
            steps: Vec::new(),
            refusal: None,
            failures: 0,
        };
        driver.run().await;
    }
}

fn refuse_unknown(uid: &ActorUid, command: Command) {
    if let Command::Call(call) = command {
        let _ = call.reply.send(Err(CallError::NotFound { kind: "actor", name: uid.to_string() }));
    }
}

impl Driver {
    async fn run(mut self) {
        loop {
            if self.pump().await.is_err() {
                break;
            }
            if self.is_at_rest() && self.engine.retire_driver(&self.uid, &self.inbox) {
                return;
            }
            let turn = {
                let op = next_op(&mut self.op);
                let upload = next_upload(&mut self.upload);
                tokio::select! {
                    biased;
                    command = self.inbox.recv() => Turn::Command(command),
                    done = op => Turn::Done(done),
                    outcome = upload => Turn::Uploaded(outcome),
                }
            };
            let ended = match turn {
                Turn::Command(None) => Err(End),
                Turn::Command(Some(command)) => self.on_command(command).await,
                Turn::Done(done) => self.on_done(done).await,
                Turn::Uploaded(outcome) => {
                    self.upload = None;
                    match outcome {
                        Ok(outcome) => self.on_outcome(outcome).await,
                        Err(Killed) => Err(End),
                    }
                }
            };
            if ended.is_err() {
                break;
            }
        }
        self.end();
    }

    /// The record is gone or the control plane is: whoever still waits is told.
    fn end(mut self) {
        let killed = self.engine.dead.is_cancelled();
        let gone = || {
            if killed {
                CallError::Stopping
            } else {
                CallError::NotFound { kind: "actor", name: self.uid.to_string() }
            }
        };
        for waiter in self.waiters.drain(..) {
            let answer = if waiter.goal == Goal::Deleted && !killed {
                Ok(Answer {
                    actor: self.actor.clone(),
                    snapshot: None,
                    steps: Vec::new(),
                    was_running: false,
                    name: None,
                })
            } else {
                Err(gone())
            };
            let _ = waiter.call.reply.send(answer);
        }
        for call in self.queue.drain(..) {
            let _ = call.reply.send(Err(gone()));
        }
        if killed {
            return;
        }
        // Later commands find no record.
        loop {
            while let Ok(command) = self.inbox.try_recv() {
                refuse_unknown(&self.uid, command);
            }
            if self.engine.retire_driver(&self.uid, &self.inbox) {
                return;
            }
        }
    }

    fn is_at_rest(&self) -> bool {
        self.op.is_none()
            && self.upload.is_none()
            && self.queue.is_empty()
            && self.waiters.is_empty()
            && self.held.is_none()
    }

    /// Starts whatever the record and the queue ask for.
    async fn pump(&mut self) -> Result<(), End> {
        loop {
            self.settle();
            if self.op.is_none() {
                self.start_step();
            }
            self.start_upload();
            let before = self.actor.revision;
            let moved = self.do_what_is_due().await? || self.admit_queue().await?;
            // A call may wait and yet have changed the record (a fork that promotes first).
            if !moved && self.actor.revision == before {
                return Ok(());
            }
        }
    }

    fn start_step(&mut self) {
        let Some(next) = workflow::next(&self.actor) else { return };
        let (engine, actor) = (Arc::clone(&self.engine), self.actor.clone());
        self.op = Some(match next {
            Next::Activate => Op::Step { future: Box::pin(steps::activate(engine, actor)) },
            Next::Checkpoint | Next::CheckpointLive => {
                Op::Step { future: Box::pin(steps::checkpoint(engine, actor)) }
            }
            Next::Release => Op::Step { future: Box::pin(steps::release(engine, actor, StepName::Release)) },
            Next::DeleteRelease => {
                Op::Step { future: Box::pin(steps::release(engine, actor, StepName::DeleteRelease)) }
            }
            Next::Purge => Op::Purge { future: Box::pin(steps::purge(engine, actor)) },
        });
    }

    fn start_upload(&mut self) {
        if self.upload.is_some() || self.actor.state == State::Deleting {
            return;
        }
        // P2's order: the worker is free before its snapshot is uploaded, so that waiting for the store holds no slot.
        if matches!(self.actor.state, State::Suspending | State::Pausing) && self.actor.placement.is_some() {
            return;
        }
        let now = self.engine.clock.wall_ms();
        let due = self.actor.owed_upload().filter(|snapshot| {
            snapshot.upload.as_ref().is_some_and(|wish| workflow::upload_is_due(wish, now))
        });
        if let Some(snapshot) = due {
            let id = snapshot.id.clone();
            let future = steps::upload(Arc::clone(&self.engine), self.actor.clone(), id.clone());
            self.upload = Some((id, Box::pin(future)));
        }
    }

    /// Promotions and background checkpoints whose time has come.
    async fn do_what_is_due(&mut self) -> Result<bool, End> {
        let now = self.engine.clock.wall_ms();
        let actor = &self.actor;
        if workflow::promotion_is_due(actor, now) {
            self.apply(Event::Promote, None).await?;
            return Ok(true);
        }
        if workflow::checkpoint_is_due(actor, now)
            && actor.work.is_none()
            && self.op.is_none()
            && self.node_is_up()
            && self.engine.snapshot_quota(&actor.atespace).await.is_ok()
        {
            let event = Event::Checkpoint {
                snapshot: SnapshotId::draw(&*self.engine.clock),
                durable: actor.checkpoint.durability != "node",
            };
            self.apply(event, None).await?;
            return Ok(true);
        }
        Ok(false)
    }

    pub(super) fn node_is_up(&self) -> bool {
        let node = self.actor.placement.as_ref().and_then(|placement| self.engine.node(&placement.node));
        node.is_some_and(|node| node.is_up())
    }

    async fn on_command(&mut self, command: Command) -> Result<(), End> {
        match command {
            Command::Call(call) => self.on_call(call).await,
            Command::News(news) => self.on_news(news).await,
            Command::Progress { generation, step, percent } => {
                let actor = &self.actor;
                let fresh = actor.state == State::Resuming && actor.generation == generation;
                if fresh && (actor.progress_step != step || actor.progress_percent != percent) {
                    let mut next = actor.clone();
                    next.progress_step = step;
                    next.progress_percent = percent;
                    // Lost progress is no loss: the driver reads its record anew and goes on.
                    self.write(next, Vec::new(), None).await?;
                }
                Ok(())
            }
            Command::Wake => {
                self.engine.note_timer_again(&self.actor);
                Ok(())
            }
        }
    }

    async fn on_call(&mut self, call: Call) -> Result<(), End> {
        if matches!(call.verb, Verb::Delete) {
            return self.delete(call).await;
        }
        if let Verb::NodeLost { node, message } = call.verb.clone() {
            return self.node_lost(call, &node, &message).await;
        }
        if self.queue.len() + self.waiters.len() >= self.engine.settings.calls_per_actor {
            let _ = call.reply.send(Err(CallError::Overloaded(self.engine.settings.calls_per_actor)));
            return Ok(());
        }
        self.queue.push_back(call);
        Ok(())
    }

    /// Delete overtakes everything: what is in flight is dropped, and `DeleteRelease` ends it at the node.
    async fn delete(&mut self, call: Call) -> Result<(), End> {
        if self.actor.state != State::Deleting {
            self.op = None;
            self.upload = None;
            self.held = None;
            self.apply(Event::Delete, call.request.as_ref()).await?;
            if self.actor.state != State::Deleting {
                let _ = call.reply.send(Err(CallError::Store(StoreError::Io(
                    "the record was read anew; call again".to_owned(),
                ))));
                return Ok(());
            }
        }
        self.waiters.push(Waiter { call, goal: Goal::Deleted, seen: false });
        Ok(())
    }

    async fn on_news(&mut self, news: News) -> Result<(), End> {
        let checkpointing =
            matches!(workflow::next(&self.actor), Some(Next::Checkpoint | Next::CheckpointLive))
                && matches!(self.op, Some(Op::Step { .. }));
        let ends = match &news {
            News::Lost { generation, .. } | News::Exited { generation, .. } => {
                *generation == self.actor.generation && self.actor.placement.is_some()
            }
            News::Reported { .. } => false,
        };
        if ends && checkpointing {
            // Whether the snapshot was complete before is for the checkpoint's own answer to say.
            self.held = Some(news);
            return Ok(());
        }
        match news {
            News::Lost { generation, message } => {
                if ends {
                    self.op = None;
                    self.apply(Event::WorkerLost { generation, message }, None).await?;
                }
            }
            News::Exited { generation, exit } => {
                // Released already, or being deleted: the end was asked for.
                if ends
                    && workflow::next(&self.actor) != Some(Next::Release)
                    && self.actor.state != State::Deleting
                {
                    self.op = None;
                    self.apply(Event::Exited { generation, exit }, None).await?;
                }
            }
            News::Reported { generation, slot_is_there, holds_it, ingress_endpoint, begun } => {
                if generation != self.actor.generation || self.actor.placement.is_none() {
                    return Ok(());
                }
                let gone = match self.actor.state {
                    // What began to run after the report was made is not in it.
                    State::Running => !holds_it && self.engine.ran_before(&self.uid, begun),
                    // A step in flight finds out by itself what the slot did.
                    State::Resuming => !slot_is_there,
                    _ => false,
                };
                if gone {
                    let message = "its worker came back without it".to_owned();
                    return Box::pin(self.on_news(News::Lost { generation, message })).await;
                }
                if self.actor.state == State::Running
                    && !ingress_endpoint.is_empty()
                    && ingress_endpoint != self.actor.ingress_endpoint
                {
                    let mut next = self.actor.clone();
                    next.ingress_endpoint = ingress_endpoint;
                    self.write(next, Vec::new(), None).await?;
                }
            }
        }
        Ok(())
    }

    async fn on_done(&mut self, done: Done) -> Result<(), End> {
        self.op = None;
        match done {
            Done::Placed(call, result) => self.on_placed(call, result).await,
            Done::Step(Err(Killed)) | Done::Purged(Err(Killed)) => Err(End),
            Done::Step(Ok(outcome)) => self.on_outcome(outcome).await,
            Done::Purged(Ok(left)) => self.remove(left).await,
        }
    }

    async fn on_outcome(&mut self, outcome: Outcome) -> Result<(), End> {
        self.steps.extend(outcome.steps);
        match (&outcome.event, self.held.take()) {
            // The checkpoint failed because the workload ended: say that.
            (Event::CheckpointFailed { .. }, Some(News::Exited { generation, exit })) => {
                return self.apply(Event::Exited { generation, exit }, None).await;
            }
            (Event::CheckpointFailed { .. }, held) => drop(held),
            (Event::CheckpointRefused { reason, message, .. }, held) => {
                self.refusal =
                    Some(CallError::NotStopped { reason: reason.clone(), message: message.clone() });
                self.engine.disturb(&self.uid);
                self.held = held;
            }
            (_, held) => self.held = held,
        }
        let lost = match &outcome.event {
            Event::NodeCopyLost { snapshot, .. } => Some(snapshot.clone()),
            _ => None,
        };
        self.apply(outcome.event, None).await?;
        if let Some(id) = lost {
            self.fail_those_who_wait_for(&id);
        }
        if let Some(held) = self.held.take() {
            self.on_news(held).await?;
        }
        Ok(())
    }

    async fn on_placed(&mut self, call: Call, result: Result<Booking, PlaceError>) -> Result<(), End> {
        match result {
            Err(PlaceError::Killed) => Err(End),
            Err(PlaceError::Elsewhere(error)) if call.after_upload => self.resume_failed(call, error).await,
            Err(PlaceError::Elsewhere(_)) => {
                if self.actor.state == State::Paused {
                    self.apply(Event::Promote, None).await?;
                }
                self.queue.push_front(Call { after_upload: true, ..call });
                Ok(())
            }
            Err(PlaceError::Call(error)) => self.resume_failed(call, error).await,
            Ok(mut booking) => {
                let Some(placement) = booking.placement.clone() else { return Ok(()) };
                let event = match (&call.verb, booking.golden.take()) {
                    (Verb::Resume { cause }, Some(golden)) => {
                        Event::Clone { placement, cause: cause.clone(), golden }
                    }
                    (Verb::Resume { cause }, None) => Event::Resume { placement, cause: cause.clone() },
                    _ => Event::Reset { placement },
                };
                self.steps.clear();
                let before = self.actor.generation;
                self.apply(event, call.request.as_ref()).await?;
                if self.actor.generation == before.next() {
                    // The record holds the booking now.
                    booking.placement = None;
                    self.waiters.push(Waiter { call, goal: Goal::Running, seen: false });
                } else {
                    self.queue.push_front(call);
                }
                Ok(())
            }
        }
    }

    /// No worker: the record says why, and everyone who asked meanwhile is told the same.
    async fn resume_failed(&mut self, call: Call, error: CallError) -> Result<(), End> {
        let (reason, message) = match &error {
            CallError::NoWorker(NoWorker::Full { .. }) => ("WORKER_POOL_FULL", error.to_string()),
            CallError::NoWorker(_) => ("NO_WORKER", error.to_string()),
            CallError::Quota(it) if it.quota == "running" => ("QUOTA_EXCEEDED", error.to_string()),
            _ => ("", String::new()),
        };
        if !reason.is_empty() && (self.actor.reason != reason || self.actor.message != message) {
            let mut next = self.actor.clone();
            reason.clone_into(&mut next.reason);
            next.message.clone_from(&message);
            let event = state::draft(&next, self.engine.clock.wall_ms(), "ResumeFailed", message, true);
            self.write(next, vec![event], None).await?;
        }
        let mut others = Vec::new();
        self.queue.retain_mut(|queued| {
            let same = matches!(queued.verb, Verb::Resume { .. });
            if same {
                let (reply, _) = tokio::sync::oneshot::channel();
                others.push(std::mem::replace(&mut queued.reply, reply));
            }
            !same
        });
        for reply in others {
            let _ = reply.send(Err(error.clone()));
        }
        let _ = call.reply.send(Err(error));
        Ok(())
    }

    /// Answers whoever waited for what the record now says.
    fn settle(&mut self) {
        let mut index = 0;
        while index < self.waiters.len() {
            let actor = &self.actor;
            let waiter = &mut self.waiters[index];
            waiter.seen |= matches!(&waiter.goal, Goal::Durable(id) if actor.snapshot(id).is_some());
            let (goal, seen) = (waiter.goal.clone(), waiter.seen);
            let Some(verdict) = self.judge(&goal, seen) else {
                index += 1;
                continue;
            };
            let mut waiter = self.waiters.remove(index);
            match verdict {
                Err(CallError::Failed { state, .. })
                    if waiter.goal == Goal::Running
                        && matches!(waiter.call.verb, Verb::Resume { .. })
                        && matches!(state, State::New | State::Suspended | State::Paused)
                        && self.is_worth_another_worker()
                        && waiter.call.tries < RESUME_TRIES =>
                {
                    waiter.call.tries += 1;
                    self.queue.push_front(waiter.call);
                }
                Err(error) => {
                    let _ = waiter.call.reply.send(Err(error));
                }
                Ok(snapshot) => {
                    let answer = self.answer(snapshot, false);
                    let _ = waiter.call.reply.send(Ok(answer));
                }
            }
        }
        if self.waiters.is_empty() && !matches!(self.actor.work, Some(Work::Stop(_) | Work::Checkpoint(_))) {
            self.refusal = None;
        }
    }

    /// A snapshot is gone that no later one stands for.
    pub(super) fn fail_those_who_wait_for(&mut self, id: &SnapshotId) {
        if self.actor.snapshot(id).is_some() {
            return;
        }
        let error = self.failed();
        let (gone, rest) = std::mem::take(&mut self.waiters).into_iter().partition(
            |waiter| matches!(&waiter.goal, Goal::Durable(wanted) | Goal::Stopped(wanted) if wanted == id),
        );
        self.waiters = rest;
        let gone: Vec<Waiter> = gone;
        for waiter in gone {
            let _ = waiter.call.reply.send(Err(error.clone()));
        }
    }

    /// The failure was the worker's or the node copy's, not the actor's.
    fn is_worth_another_worker(&self) -> bool {
        matches!(self.actor.reason.as_str(), "WORKER_LOST" | "NODE_UNREACHABLE" | "SNAPSHOT_CORRUPT")
            // From its image, where the golden snapshot was of no use.
            || (self.actor.boots_cold && self.actor.state == State::New)
    }

    pub(super) fn answer(&self, snapshot: Option<Snapshot>, was_running: bool) -> Answer {
        Answer { actor: self.actor.clone(), snapshot, steps: self.steps.clone(), was_running, name: None }
    }
}

enum Turn {
    Command(Option<Command>),
    Done(Done),
    Uploaded(Result<Outcome, Killed>),
}

async fn next_op(op: &mut Option<Op>) -> Done {
    match op {
        None => std::future::pending().await,
        Some(Op::Place { future, .. }) => {
            let result = future.await;
            match op.take() {
                Some(Op::Place { call, .. }) => Done::Placed(call, result),
                _ => std::future::pending().await,
            }
        }
        Some(Op::Step { future }) => Done::Step(future.await),
        Some(Op::Purge { future }) => Done::Purged(future.await),
    }
}

async fn next_upload(
    upload: &mut Option<(SnapshotId, BoxFuture<'static, Result<Outcome, Killed>>)>,
) -> Result<Outcome, Killed> {
    match upload {
        None => std::future::pending().await,
        Some((_, future)) => future.await,
    }
}
