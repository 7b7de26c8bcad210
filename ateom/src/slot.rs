// SPDX-License-Identifier: Apache-2.0
//! The slot: one task that owns the state ([`crate::state`]) and everything the actor holds, and is spoken to by
//! messages.
//!
//! The task itself never waits: what takes time (preparing, starting, checkpointing, tearing down) runs in tasks of
//! its own ([`work`]) and comes back as a message, so that a lease that ends, a sandbox that dies or a Terminate is
//! seen at once, whatever else is going on. Such a task is about one [`Activation`], by number; a message about a past
//! one is dropped.
//!
//! * **Start**: takes the activation that was prepared, or waits for it; gate opened when ready.
//! * **Exit, loss**: noticed by two watchers per activation; the rest is torn down, the outcome stays until Terminate.
//! * **Teardown**: connections cut, control group killed and seen empty (that is when the slot is free and callers are
//!   answered); files, link and namespace go while the next activation is prepared.
//! * **Lease**: a timer on CLOCK_BOOTTIME; freezing and thawing go through one task in order.
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use substrate_proto::ateom::{
    CheckpointRequest, CheckpointResponse, EgressCidr, Notice, SandboxSpec, SetLeaseRequest, SlotStatus,
    Stats, StepTime, checkpoint_request, slot_event,
};
use substrate_proto::types::{Assignment, ExitStatus};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::boottime_ns;
use crate::cgroup::{Cgroup, blocking};
use crate::error::SlotError;
use crate::lease::{BoottimeTimer, LeaseChange};
use crate::network::Namespace;
use crate::occupancy::Pass;
use crate::runtime::{Sandbox, check_compatibility};
use crate::state::{Checkpoint, LeaseSet, Phase, Start, State, Terminate};

mod growth;
mod handle;
mod work;

pub use handle::{Config, Slot, SnapshotRequest, StartRequest};

use work::{Checkpointed, Outcome};

const QUEUE: usize = 64;
/// Events that a slow watcher may be behind.
const EVENTS: usize = 64;
/// How long processes may take to die after cgroup.kill.
const FENCE_LIMIT: Duration = Duration::from_secs(10);
const FREEZE_LIMIT: Duration = Duration::from_secs(5);
const STATS_PERIOD: Duration = Duration::from_secs(1);
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

type Reply<T> = oneshot::Sender<Result<T, SlotError>>;

enum Command {
    Start(Box<StartRequest>, Reply<Vec<StepTime>>),
    Checkpoint(CheckpointRequest, Reply<CheckpointResponse>),
    Terminate(Assignment, Reply<()>),
    SetLease(SetLeaseRequest, Reply<()>),
    SetEgress(Assignment, Vec<EgressCidr>, Reply<()>),
    Exec(Assignment, Reply<(Arc<dyn Sandbox>, Pass)>),
    Shutdown(Reply<()>),
}

enum Internal {
    Prepared(u64, Result<Activation, String>),
    RetryPreparation,
    Started(u64, Result<Vec<StepTime>, SlotError>),
    Checkpointed(u64, Checkpointed),
    Exited(u64, ExitStatus),
    Died(u64, String),
    TornDown(u64, Result<(), String>),
    FreezeFailed(u64, String),
}

/// One sandbox with its place: prepared, then used once.
struct Activation {
    number: u64,
    sandbox: Arc<dyn Sandbox>,
    cgroup: Cgroup,
    namespace: Namespace,
    directory: PathBuf,
    /// Ends what waits for this activation.
    cancel: CancellationToken,
    /// What was started in it; empty while it is only prepared.
    spec: Arc<SandboxSpec>,
}

/// A checkpoint under way.
struct CheckpointJob {
    request: CheckpointRequest,
    waiters: Vec<Reply<CheckpointResponse>>,
}

struct Task {
    config: Config,
    state: State,
    current: Option<Activation>,
    prepared: Option<Activation>,
    preparing: bool,
    /// Fenced, with files, link and namespace yet to go.
    old: Vec<Activation>,
    next_number: u64,
    retry: Duration,
    /// Why preparing does not succeed.
    trouble: String,
    /// Accepted while the next activation is still being prepared.
    pending: Option<Box<StartRequest>>,
    start_waiters: Vec<Reply<Vec<StepTime>>>,
    checkpoint: Option<CheckpointJob>,
    /// For a retry after a lost answer.
    last_checkpoint: Option<(CheckpointRequest, CheckpointResponse)>,
    tearing: bool,
    teardown_waiters: Vec<Reply<()>>,
    /// Told to the callers once nothing runs any more.
    failed_start: Option<SlotError>,
    /// The sets of the rules are not empty.
    egress_loaded: bool,
    rules: Arc<tokio::sync::Mutex<()>>,
    internal: mpsc::Sender<Internal>,
    freezer: mpsc::Sender<work::Freeze>,
    growth: Arc<std::sync::Mutex<growth::Growth>>,
    status: watch::Sender<SlotStatus>,
    events: broadcast::Sender<slot_event::Event>,
    timer: BoottimeTimer,
}

impl Task {
    fn spawn(
        config: Config,
        commands: mpsc::Receiver<Command>,
        status: watch::Sender<SlotStatus>,
        events: broadcast::Sender<slot_event::Event>,
    ) -> std::io::Result<()> {
        let (internal, internal_queue) = mpsc::channel(QUEUE);
        let (freezer, freezer_queue) = mpsc::channel(QUEUE);
        tokio::spawn(work::freezer(freezer_queue, internal.clone()));
        let task = Self {
            timer: BoottimeTimer::new()?,
            config,
            state: State::default(),
            current: None,
            prepared: None,
            preparing: false,
            old: Vec::new(),
            next_number: 1,
            retry: FIRST_RETRY,
            trouble: String::new(),
            pending: None,
            start_waiters: Vec::new(),
            checkpoint: None,
            last_checkpoint: None,
            tearing: false,
            teardown_waiters: Vec::new(),
            failed_start: None,
            egress_loaded: false,
            rules: Arc::default(),
            internal,
            freezer,
            growth: Arc::default(),
            status,
            events,
        };
        tokio::spawn(task.run(commands, internal_queue));
        Ok(())
    }

    async fn run(mut self, mut commands: mpsc::Receiver<Command>, mut internal: mpsc::Receiver<Internal>) {
        self.prepare();
        let mut stats = tokio::time::interval(STATS_PERIOD);
        stats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.publish();
            tokio::select! {
                biased;
                fired = self.timer.fired() => {
                    if let Err(error) = fired {
                        tracing::error!(%error, "the lease timer does not work: treating the lease as expired");
                        self.apply_lease(LeaseChange::Freeze);
                    }
                    let change = self.state.tick(boottime_ns());
                    self.apply_lease(change);
                }
                Some(message) = internal.recv() => self.handle(message),
                command = commands.recv() => match command {
                    Some(Command::Shutdown(reply)) => {
                        if let Some(refusal) = self.refuse_shutdown() {
                            drop(reply.send(Err(refusal)));
                            continue;
                        }
                        drop(reply.send(self.finish(&mut internal).await));
                        return;
                    }
                    Some(command) => self.command(command),
                    None => return,
                },
                _ = stats.tick(), if self.state.holds => self.publish_stats(),
            }
        }
    }

    fn command(&mut self, command: Command) {
        // A caller that has gone away needs no answer.
        match command {
            Command::Start(request, reply) => self.start(request, reply),
            Command::Checkpoint(request, reply) => self.begin_checkpoint(request, reply),
            Command::Terminate(assignment, reply) => match self.state.terminate(&assignment) {
                Ok(Terminate::Done) => drop(reply.send(Ok(()))),
                Ok(Terminate::TearDown) => {
                    self.teardown_waiters.push(reply);
                    self.tear_down();
                }
                Err(error) => drop(reply.send(Err(error))),
            },
            Command::SetLease(request, reply) => {
                let now = boottime_ns();
                let result =
                    self.state.set_lease(&request.actor_uid, request.generation, request.deadline_ns, now);
                drop(reply.send(result.map(|set| match set {
                    LeaseSet::Renewed(change) => self.apply_lease(change),
                    LeaseSet::Superseded => {
                        tracing::warn!(
                            actor = request.actor_uid,
                            generation = request.generation,
                            "a newer copy exists: ending this one"
                        );
                        if self.state.holds {
                            self.tear_down();
                        }
                    }
                })));
            }
            Command::SetEgress(assignment, cidrs, reply) => match self.state.check_exec(&assignment) {
                Ok(()) => {
                    self.egress_loaded = true;
                    let load =
                        work::load_egress(self.config.children.clone(), Arc::clone(&self.rules), cidrs);
                    tokio::spawn(async move { drop(reply.send(load.await)) });
                }
                Err(error) => drop(reply.send(Err(error))),
            },
            Command::Exec(assignment, reply) => {
                let entered = self.state.check_exec(&assignment).and_then(|()| {
                    match (&self.current, self.config.occupancy.pass_exec()) {
                        (Some(activation), Some(pass)) => Ok((Arc::clone(&activation.sandbox), pass)),
                        _ => Err(SlotError::Terminated),
                    }
                });
                drop(reply.send(entered));
            }
            Command::Shutdown(_) => {}
        }
    }

    fn handle(&mut self, message: Internal) {
        match message {
            Internal::Prepared(number, result) => self.note_prepared(number, result),
            Internal::RetryPreparation => self.prepare(),
            Internal::Started(number, result) if self.is_current(number) => self.note_started(result),
            Internal::Checkpointed(number, result) if self.is_current(number) => {
                self.note_checkpointed(result);
            }
            Internal::Exited(number, exit) if self.is_current(number) => {
                if self.state.ended(Phase::Exited(exit.clone())) {
                    tracing::info!(code = exit.code, "the workload ended");
                    self.failed_start = Some(SlotError::WorkloadExited(exit));
                    self.tear_down();
                }
            }
            Internal::Died(number, why) => self.note_died(number, why),
            Internal::TornDown(number, result) if self.is_current(number) => self.note_torn_down(result),
            Internal::FreezeFailed(number, why) if self.is_current(number) => {
                // It must not run past its lease: what cannot be stopped is ended.
                tracing::error!(why, "cannot freeze: ending the actor");
                self.state.ended(Phase::Lost(format!("its lease ended and it could not be frozen: {why}")));
                self.tear_down();
            }
            // About an activation of the past.
            Internal::Started(..)
            | Internal::Checkpointed(..)
            | Internal::Exited(..)
            | Internal::TornDown(..)
            | Internal::FreezeFailed(..) => {}
        }
    }

    fn is_current(&self, number: u64) -> bool {
        self.current.as_ref().is_some_and(|activation| activation.number == number)
    }

    // Preparing.

    fn prepare(&mut self) {
        if self.preparing || self.prepared.is_some() || self.state.holds && self.current.is_some() {
            return;
        }
        self.preparing = true;
        self.state.prepared = false;
        // What nobody waits for yet must not slow down an actor that wakes up elsewhere on this machine.
        self.set_background(self.pending.is_none());
        let number = self.next_number;
        self.next_number += 1;
        let (config, old, internal) =
            (self.config.clone(), std::mem::take(&mut self.old), self.internal.clone());
        tokio::spawn(async move {
            let result = work::prepare(&config, number, old).await;
            // The slot's task outlives its work.
            drop(internal.send(Internal::Prepared(number, result)).await);
        });
    }

    fn set_background(&self, background: bool) {
        if let Err(error) = self.config.cgroup.set_background(background) {
            tracing::warn!(%error, background, "cannot set the worker's share of the processors");
        }
    }

    fn note_prepared(&mut self, number: u64, result: Result<Activation, String>) {
        self.preparing = false;
        match result {
            Ok(activation) => {
                self.retry = FIRST_RETRY;
                self.trouble.clear();
                let (sandbox, internal) = (Arc::clone(&activation.sandbox), self.internal.clone());
                let cancel = activation.cancel.clone();
                tokio::spawn(async move {
                    tokio::select! {
                        why = sandbox.died() => drop(internal.send(Internal::Died(number, why)).await),
                        () = cancel.cancelled() => {}
                    }
                });
                if let Some(request) = self.pending.take() {
                    self.launch(activation, *request);
                } else {
                    self.prepared = Some(activation);
                    self.state.prepared = true;
                }
            }
            Err(why) => {
                tracing::error!(why, "cannot prepare a sandbox");
                self.trouble = format!("cannot prepare a sandbox: {why}");
                if self.pending.take().is_some() {
                    self.state.torn_down(Ok(()));
                    self.answer_starts(&Err(SlotError::StartFailed(self.trouble.clone())));
                    self.config.occupancy.leave();
                }
                let (pause, internal) = (self.retry, self.internal.clone());
                self.retry = (self.retry * 2).min(LONGEST_RETRY);
                tokio::spawn(async move {
                    tokio::time::sleep(pause).await;
                    drop(internal.send(Internal::RetryPreparation).await);
                });
            }
        }
    }

    // Starting.

    fn start(&mut self, request: Box<StartRequest>, reply: Reply<Vec<StepTime>>) {
        let refusal = self.config.runtime.validate(&request.spec).err().or_else(|| {
            let snapshot = request.snapshot.as_ref()?;
            let here = self.config.runtime.compatibility(&request.spec);
            check_compatibility(&here, &self.config.runtime.in_own_words(&snapshot.compatibility)).err()
        });
        if let Some(refusal) = refusal {
            drop(reply.send(Err(refusal)));
            return;
        }
        match self.state.start(&request.assignment, request.lease_deadline_ns, boottime_ns()) {
            Err(error) => drop(reply.send(Err(error))),
            Ok(Start::Done) => drop(reply.send(Ok(Vec::new()))),
            Ok(Start::Join) => self.start_waiters.push(reply),
            Ok(Start::Begin) => {
                self.start_waiters.push(reply);
                self.last_checkpoint = None;
                self.set_background(false);
                self.config.occupancy.enter(request.assignment.clone(), request.spec.ingress_port);
                if let Some(activation) = self.prepared.take() {
                    self.launch(activation, *request);
                } else {
                    self.pending = Some(request);
                    self.prepare();
                }
            }
        }
    }

    fn launch(&mut self, mut activation: Activation, request: StartRequest) {
        activation.spec = Arc::new(request.spec.clone());
        self.state.prepared = false;
        let load_egress = self.egress_loaded || !request.spec.egress_cidrs.is_empty();
        self.egress_loaded = !request.spec.egress_cidrs.is_empty();
        let start = work::StartWork {
            number: activation.number,
            sandbox: Arc::clone(&activation.sandbox),
            cgroup: activation.cgroup.clone(),
            children: self.config.children.clone(),
            rules: Arc::clone(&self.rules),
            overhead_bytes: self.config.runtime.overhead_bytes(),
            load_egress,
            events: self.events.clone(),
            internal: self.internal.clone(),
            cancel: activation.cancel.clone(),
        };
        let (number, cancel, internal) =
            (activation.number, activation.cancel.clone(), self.internal.clone());
        self.current = Some(activation);
        tokio::spawn(async move {
            let result = tokio::select! {
                biased;
                () = cancel.cancelled() => Err(SlotError::Terminated),
                result = start.run(request) => result,
            };
            drop(internal.send(Internal::Started(number, result)).await);
        });
    }

    fn note_started(&mut self, result: Result<Vec<StepTime>, SlotError>) {
        match result {
            Ok(steps) => {
                if self.state.started() {
                    self.config.occupancy.set_gate(self.state.serving());
                    self.answer_starts(&Ok(steps));
                }
            }
            Err(error) => {
                if self.state.start_failed() {
                    tracing::warn!(%error, "start failed");
                    self.failed_start = Some(error);
                    self.tear_down();
                }
            }
        }
    }

    fn answer_starts(&mut self, result: &Result<Vec<StepTime>, SlotError>) {
        for waiter in self.start_waiters.drain(..) {
            drop(waiter.send(result.clone()));
        }
    }

    // Checkpointing.

    fn begin_checkpoint(&mut self, request: CheckpointRequest, reply: Reply<CheckpointResponse>) {
        if let Some((past, response)) = &self.last_checkpoint
            && past.assignment == request.assignment
            && past.directory == request.directory
            && past.mode == request.mode
        {
            drop(reply.send(Ok(response.clone())));
            return;
        }
        let assignment = request.assignment.clone().unwrap_or_default();
        let stop = request.mode() == checkpoint_request::Mode::Stop;
        match self.state.checkpoint(&assignment, stop) {
            Err(error) => drop(reply.send(Err(error))),
            Ok(Checkpoint::Join) => match &mut self.checkpoint {
                Some(job)
                    if job.request.directory == request.directory && job.request.mode == request.mode =>
                {
                    job.waiters.push(reply);
                }
                _ => drop(reply.send(Err(SlotError::NotNow {
                    actor: assignment.actor_uid,
                    phase: "being checkpointed".to_owned(),
                    hint: "another checkpoint is under way, retry when it is done".to_owned(),
                }))),
            },
            Ok(Checkpoint::Begin) => {
                let Some(activation) = &self.current else {
                    self.state.checkpoint_over();
                    drop(reply.send(Err(SlotError::Terminated)));
                    return;
                };
                if request.only_if_idle
                    && let Err(live) = self.config.occupancy.close_if_idle()
                {
                    self.state.checkpoint_over();
                    drop(reply.send(Err(SlotError::Busy(live))));
                    return;
                }
                if stop {
                    self.config.occupancy.set_gate(false);
                }
                let checkpoint = work::CheckpointWork {
                    sandbox: Arc::clone(&activation.sandbox),
                    cgroup: activation.cgroup.clone(),
                    occupancy: self.config.occupancy.clone(),
                    events: self.events.clone(),
                };
                let (number, cancel, internal) =
                    (activation.number, activation.cancel.clone(), self.internal.clone());
                let (spec, runtime) = (Arc::clone(&activation.spec), Arc::clone(&self.config.runtime));
                let work_request = request.clone();
                self.checkpoint = Some(CheckpointJob { request, waiters: vec![reply] });
                tokio::spawn(async move {
                    let outcome = tokio::select! {
                        biased;
                        () = cancel.cancelled() => Outcome::Cancelled,
                        outcome = checkpoint.run(&work_request, &*runtime, &spec) => outcome,
                    };
                    drop(internal.send(Internal::Checkpointed(number, Checkpointed { stop, outcome })).await);
                });
            }
        }
    }

    fn note_checkpointed(&mut self, done: Checkpointed) {
        match done.outcome {
            Outcome::Saved(response, fenced) => {
                if let Some(job) = &self.checkpoint {
                    self.last_checkpoint = Some((job.request.clone(), response.clone()));
                }
                self.answer_checkpoint(&Ok(response));
                if done.stop {
                    // It was killed and seen empty as part of the work.
                    self.note_torn_down(fenced);
                } else if self.state.checkpoint_over() {
                    self.config.occupancy.set_gate(self.state.serving());
                }
            }
            Outcome::Refused(error) => {
                if self.state.checkpoint_over() {
                    self.config.occupancy.set_gate(self.state.serving());
                }
                self.answer_checkpoint(&Err(error));
            }
            Outcome::Lost(why) => {
                if self.state.checkpoint_lost(why.clone()) {
                    self.tear_down();
                }
                self.answer_checkpoint(&Err(SlotError::SandboxLost(why)));
            }
            Outcome::Cancelled => {
                let error = match &self.state.phase {
                    Phase::Exited(exit) => SlotError::WorkloadExited(exit.clone()),
                    Phase::Lost(why) => SlotError::SandboxLost(why.clone()),
                    _ => SlotError::Terminated,
                };
                self.answer_checkpoint(&Err(error));
            }
        }
    }

    fn answer_checkpoint(&mut self, result: &Result<CheckpointResponse, SlotError>) {
        for waiter in self.checkpoint.take().into_iter().flat_map(|job| job.waiters) {
            drop(waiter.send(result.clone()));
        }
    }

    // Ending.

    fn note_died(&mut self, number: u64, why: String) {
        if self.prepared.as_ref().is_some_and(|activation| activation.number == number) {
            tracing::warn!(why, "a prepared sandbox died; preparing another");
            self.old.extend(self.prepared.take());
            self.prepare();
        } else if self.is_current(number) {
            let oom = self.current.as_ref().map_or(0, |activation| activation.cgroup.stats().oom_kills);
            let why = if oom > 0 {
                format!(
                    "{why}: killed by the kernel, the sandbox exceeded its memory limit ({oom} processes)"
                )
            } else {
                why
            };
            if self.state.ended(Phase::Lost(why.clone())) {
                tracing::warn!(why, "the sandbox is lost");
                self.failed_start = Some(SlotError::SandboxLost(why));
                self.tear_down();
            }
        }
    }

    fn tear_down(&mut self) {
        self.config.occupancy.leave();
        let Some(activation) = &self.current else {
            // Accepted, but not launched: no process of the actor exists.
            self.pending = None;
            self.note_torn_down(Ok(()));
            return;
        };
        activation.cancel.cancel();
        if std::mem::replace(&mut self.tearing, true) {
            return;
        }
        let (number, cgroup, internal) =
            (activation.number, activation.cgroup.clone(), self.internal.clone());
        tokio::spawn(async move {
            let result = cgroup.fence(FENCE_LIMIT).await.map_err(|error| error.to_string());
            drop(internal.send(Internal::TornDown(number, result)).await);
        });
    }

    fn note_torn_down(&mut self, result: Result<(), String>) {
        self.tearing = false;
        if let Err(why) = &result {
            tracing::error!(why, "cannot empty the slot");
        }
        self.state.torn_down(result.clone());
        let reply = result.map_err(SlotError::Broken);
        if reply.is_ok() {
            self.config.occupancy.leave();
            if let Some(activation) = self.current.take() {
                activation.cancel.cancel();
                self.old.push(activation);
            }
            // The work was cancelled with the sandbox; its own word comes too late.
            if self.checkpoint.is_some() {
                self.note_checkpointed(Checkpointed { stop: false, outcome: Outcome::Cancelled });
            }
            self.prepare();
        }
        for waiter in self.teardown_waiters.drain(..) {
            drop(waiter.send(reply.clone()));
        }
        let error = self.failed_start.take().unwrap_or(SlotError::Terminated);
        self.answer_starts(&Err(error));
    }

    fn refuse_shutdown(&self) -> Option<SlotError> {
        let owner = self.state.assignment.clone()?;
        Some(SlotError::Occupied {
            actor: owner.actor_uid,
            generation: owner.generation,
            phase: self.state.phase.name().to_owned(),
        })
    }

    /// Removes everything this slot has; the task ends after.
    async fn finish(&mut self, internal: &mut mpsc::Receiver<Internal>) -> Result<(), SlotError> {
        while self.preparing {
            match internal.recv().await {
                Some(Internal::Prepared(_, result)) => {
                    self.preparing = false;
                    self.prepared = result.ok();
                }
                Some(_) => {}
                None => break,
            }
        }
        self.old.extend(self.prepared.take());
        work::remove(std::mem::take(&mut self.old)).await.map_err(SlotError::Broken)
    }

    // Lease and status.

    fn apply_lease(&mut self, change: LeaseChange) {
        let stop = match change {
            LeaseChange::Nothing => return,
            LeaseChange::Freeze => true,
            LeaseChange::Thaw => false,
        };
        tracing::info!(stop, deadline_ns = self.state.lease.deadline_ns(), "lease");
        self.config.occupancy.set_gate(self.state.serving());
        let Some(activation) = &self.current else { return };
        let job = work::Freeze { number: activation.number, cgroup: activation.cgroup.clone(), stop };
        if let Err(error) = self.freezer.try_send(job) {
            tracing::error!(%error, "the freezer does not keep up");
            self.state.ended(Phase::Lost("it could not be frozen".to_owned()));
            self.tear_down();
        }
    }

    fn publish(&mut self) {
        let alarm = (self.state.holds && !self.state.lease.frozen()).then(|| self.state.lease.deadline_ns());
        if let Err(error) = self.timer.set(alarm) {
            tracing::error!(%error, "cannot set the lease timer");
        }
        let (exit, message) = match &self.state.phase {
            Phase::Exited(exit) => (Some(exit.clone()), String::new()),
            Phase::Lost(why) | Phase::Broken(why) => (None, why.clone()),
            _ => (None, self.trouble.clone()),
        };
        let status = SlotStatus {
            phase: self.state.wire_phase().into(),
            assignment: self.state.assignment.clone(),
            exit,
            lease_deadline_ns: self.state.lease.deadline_ns(),
            prepared: self.state.prepared,
            message,
            ingress_endpoint: self.config.ingress_endpoint.clone(),
            pid: std::process::id(),
            highest_generation: self.state.highest_generation(),
        };
        self.status.send_if_modified(|known| {
            let changed = *known != status;
            *known = status;
            changed
        });
    }

    fn publish_stats(&self) {
        let (Some(activation), Some(owner)) = (&self.current, &self.state.assignment) else { return };
        let usage = self.config.occupancy.usage();
        let (cgroup, generation, events) = (activation.cgroup.clone(), owner.generation, self.events.clone());
        // A frozen sandbox, or one that is being saved, is not asked.
        let running = self.state.phase == Phase::Running && self.checkpoint.is_none();
        let written = running.then(|| {
            (Arc::clone(&self.growth), Arc::clone(&activation.sandbox), activation.spec.memory_bytes)
        });
        let number = activation.number;
        tokio::spawn(async move {
            let used = blocking(move || cgroup.stats()).await;
            if let Some((growth, sandbox, limit)) = written {
                let worth = growth.lock().unwrap_or_else(std::sync::PoisonError::into_inner).is_worth_asking(
                    number,
                    used.memory_bytes,
                    limit,
                );
                if worth {
                    tokio::spawn(growth::look(growth, sandbox, number, limit, events.clone()));
                }
            }
            let stats = Stats {
                generation,
                cpu_usec: used.cpu_usec,
                memory_bytes: used.memory_bytes,
                ingress_connections: usage.ingress,
                egress_connections: usage.egress,
                execs: usage.execs,
                busy_until_ns: usage.busy_until_ns,
                last_activity_ns: usage.last_activity_ns,
                processes: used.processes,
                at_ns: boottime_ns(),
            };
            // Nobody may be watching.
            drop(events.send(slot_event::Event::Stats(stats)));
        });
    }
}

/// Tells watchers something for people.
fn notify(events: &broadcast::Sender<slot_event::Event>, reason: &str, message: String) {
    tracing::warn!(reason, message, "notice");
    let notice = Notice { reason: reason.to_owned(), message };
    // Nobody may be watching.
    drop(events.send(slot_event::Event::Notice(notice)));
}
