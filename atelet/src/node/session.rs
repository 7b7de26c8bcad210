// SPDX-License-Identifier: Apache-2.0
//! The control plane's session: news upwards, leases down.
//!
//! **News.** The stream begins with every worker, the exits and losses that may not have been heard, and `synced`; then
//! comes every change. Changes go through a bounded queue; a session that does not keep up is ended and has to begin
//! anew, which loses nothing, since it begins with everything. Statistics are latest-wins, notices are dropped when the
//! queue is full. A new session ends the one before.
//!
//! **Leases** (see [`crate::lease`]). The node asks as soon as it is synced, then every third of the term, and at once
//! when a start needs a longer one. A grant is handed to every ateom it names; what it does not name is ended.
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use substrate_proto::atelet::{
    self, Exited, LeaseGrant, LeaseRequest, SessionEvent, SessionRequest, SyncDone, WorkerLost, WorkerNotice,
    WorkerStats, session_event, session_request,
};
use substrate_proto::ateom::SetLeaseRequest;
use substrate_proto::ateom::slot_status::Phase;
use substrate_proto::types::Assignment;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::{Node, answers};
use crate::lease::{Local, Verdict, decide};
use crate::worker::{News, View, Worker};

/// Changes that a session may lag behind.
const QUEUE: usize = 1024;
/// Between lease requests before the first grant.
const FIRST_RENEWAL: Duration = Duration::from_secs(1);
const SET_LEASE: Duration = Duration::from_secs(5);

struct Outbox {
    sender: mpsc::Sender<session_event::Event>,
    stats: Arc<Mutex<BTreeMap<String, WorkerStats>>>,
    stats_ready: Arc<Notify>,
    ended: CancellationToken,
}

#[derive(Default)]
struct Inner {
    outbox: Option<Outbox>,
    /// Losses, told again at the start of each session until the worker is used again.
    lost: BTreeMap<String, WorkerLost>,
    /// Assignments whose end was told, by worker: a status repeats itself.
    told: HashMap<String, Assignment>,
}

/// Where news of the workers meet the session.
#[derive(Default)]
pub(crate) struct Hub {
    inner: Mutex<Inner>,
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes news of a worker; `message` and `view` are its present state. `quiet`: its actor is being started, and the
    /// answer of that call tells how it ends.
    pub(super) fn news(&self, worker: &str, news: News, message: atelet::Worker, view: &View, quiet: bool) {
        let mut inner = self.lock();
        match news {
            News::Changed => {
                inner.send(session_event::Event::Worker(message));
                if let Some(event) = ended_event(worker, view).filter(|_| !quiet) {
                    let assignment = view.assignment().cloned().unwrap_or_default();
                    if inner.told.insert(worker.to_owned(), assignment.clone()) != Some(assignment) {
                        inner.send(event);
                    }
                }
            }
            News::Vacant => {}
            News::Lost { assignment, reason } => {
                let lost = WorkerLost { worker_id: worker.to_owned(), assignment, reason };
                inner.lost.insert(worker.to_owned(), lost.clone());
                inner.send(session_event::Event::Lost(lost));
                inner.send(session_event::Event::Worker(message));
            }
            News::Stats(assignment, stats) => {
                if let Some(outbox) = &inner.outbox {
                    let stats = WorkerStats {
                        worker_id: worker.to_owned(),
                        assignment,
                        stats: Some(stats),
                        now_ns: ateom::boottime_ns(),
                    };
                    outbox
                        .stats
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .insert(worker.to_owned(), stats);
                    outbox.stats_ready.notify_one();
                }
            }
            News::Notice(assignment, notice) => {
                let event = WorkerNotice { worker_id: worker.to_owned(), assignment, notice: Some(notice) };
                if let Some(outbox) = &inner.outbox
                    && outbox.sender.try_send(session_event::Event::Notice(event)).is_err()
                {
                    tracing::warn!(worker, "a notice was dropped: the session does not keep up");
                }
            }
        }
    }

    /// A worker is used again: what was lost there before is history.
    pub(super) fn worker_used(&self, worker: &str) {
        let mut inner = self.lock();
        inner.lost.remove(worker);
        inner.told.remove(worker);
    }

    /// Ends the session: nobody is told anything any more.
    pub(super) fn close(&self) {
        if let Some(outbox) = self.lock().outbox.take() {
            outbox.ended.cancel();
        }
    }

    fn open(&self) -> (Arc<Session>, Vec<WorkerLost>) {
        let (sender, events) = mpsc::channel(QUEUE);
        let session = Arc::new(Session {
            events: tokio::sync::Mutex::new(events),
            stats: Arc::default(),
            stats_ready: Arc::default(),
            ended: CancellationToken::new(),
        });
        let mut inner = self.lock();
        if let Some(before) = inner.outbox.replace(Outbox {
            sender,
            stats: Arc::clone(&session.stats),
            stats_ready: Arc::clone(&session.stats_ready),
            ended: session.ended.clone(),
        }) {
            before.ended.cancel();
        }
        (session, inner.lost.values().cloned().collect())
    }
}

impl Inner {
    fn send(&mut self, event: session_event::Event) {
        let Some(outbox) = &self.outbox else { return };
        match outbox.sender.try_send(event) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                tracing::warn!(
                    "the control plane does not keep up: its session is ended, it will begin anew"
                );
                outbox.ended.cancel();
                self.outbox = None;
            }
            Err(TrySendError::Closed(_)) => self.outbox = None,
        }
    }
}

/// What a slot whose actor has ended says upwards.
fn ended_event(worker: &str, view: &View) -> Option<session_event::Event> {
    let slot = view.slot.as_ref()?;
    let assignment = view.assignment().cloned();
    match slot.phase() {
        Phase::Exited => Some(session_event::Event::Exited(Exited { assignment, exit: slot.exit.clone() })),
        // The worker lives, the actor is lost all the same: its sandbox died and is fenced.
        Phase::Lost => Some(session_event::Event::Lost(WorkerLost {
            worker_id: worker.to_owned(),
            assignment,
            reason: slot.message.clone(),
        })),
        _ => None,
    }
}

struct Session {
    events: tokio::sync::Mutex<mpsc::Receiver<session_event::Event>>,
    stats: Arc<Mutex<BTreeMap<String, WorkerStats>>>,
    stats_ready: Arc<Notify>,
    ended: CancellationToken,
}

type Out = mpsc::Sender<Result<SessionEvent, Status>>;

impl Node {
    /// Opens a session; its task ends with the stream, or with the next session.
    pub(super) fn open_session(
        self: &Arc<Self>,
        requests: Streaming<SessionRequest>,
    ) -> ReceiverStream<Result<SessionEvent, Status>> {
        // The queue is opened before the workers are looked at, so that no change falls between.
        let (session, lost) = self.hub.open();
        self.call_session(String::new());
        let (out, stream) = mpsc::channel(16);
        self.lease.lock().unwrap_or_else(PoisonError::into_inner).new_session();
        let node = Arc::clone(self);
        tokio::spawn(async move {
            let ended = session.ended.clone();
            let outcome = tokio::select! {
                outcome = node.run_session(&session, requests, lost, &out) => outcome,
                () = ended.cancelled() => Err(Status::aborted("another session began, or this one did not keep up")),
                () = out.closed() => Ok(()),
            };
            if let Err(status) = outcome {
                tracing::info!(reason = status.message(), "session ended");
                // Nobody may be listening any more.
                let _ = out.send(Err(status)).await;
            }
        });
        ReceiverStream::new(stream)
    }

    /// Every slot, what was lost before the session, and that this was all.
    async fn report(&self, lost: Vec<WorkerLost>, out: &Out) -> Result<(), Status> {
        for worker in self.workers.values() {
            send(out, session_event::Event::Worker(Self::worker_message(worker))).await?;
            let view = worker.view();
            let quiet = view.assignment().is_some_and(|held| self.is_starting(held));
            if let Some(event) = ended_event(&worker.id, &view).filter(|_| !quiet) {
                send(out, event).await?;
            }
        }
        for lost in lost {
            send(out, session_event::Event::Lost(lost)).await?;
        }
        send(out, session_event::Event::Synced(SyncDone {})).await
    }

    async fn run_session(
        self: &Arc<Self>,
        session: &Session,
        mut requests: Streaming<SessionRequest>,
        lost: Vec<WorkerLost>,
        out: &Out,
    ) -> Result<(), Status> {
        let first = requests.message().await?.and_then(|request| request.request);
        let Some(session_request::Request::Hello(hello)) = first else {
            return Err(Status::invalid_argument("a session begins with its hello"));
        };
        tracing::info!(controller = hello.controller, "session of the control plane");
        self.call_session(hello.controller);
        // What an adopted worker holds is known only once it has answered; until then it would be taken for lost.
        let settled = futures::future::join_all(self.workers.values().map(Worker::settled));
        tokio::pin!(settled);
        let mut lost = Some(lost);
        let mut renewal = Instant::now();
        let mut events = session.events.lock().await;
        loop {
            tokio::select! {
                _ = &mut settled, if lost.is_some() => self.report(lost.take().unwrap_or_default(), out).await?,
                request = requests.message() => match request?.and_then(|request| request.request) {
                    Some(session_request::Request::Grant(grant)) => {
                        if let Some(after) = self.take_grant(&grant) {
                            renewal = after;
                        }
                    }
                    Some(session_request::Request::Hello(_)) | None => return Ok(()),
                },
                event = events.recv() => match event {
                    Some(event) => send(out, event).await?,
                    None => return Err(Status::aborted("another session began, or this one did not keep up")),
                },
                () = session.stats_ready.notified() => {
                    let stats = std::mem::take(
                        &mut *session.stats.lock().unwrap_or_else(PoisonError::into_inner),
                    );
                    for stats in stats.into_values() {
                        send(out, session_event::Event::Stats(stats)).await?;
                    }
                }
                () = tokio::time::sleep_until(renewal) => {
                    self.ask_for_lease(out).await?;
                    renewal = Instant::now() + self.renew_after();
                }
                () = self.lease_wanted.notified() => self.ask_for_lease(out).await?,
            }
        }
    }

    fn call_session(&self, name: String) {
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = name;
    }

    fn renew_after(&self) -> Duration {
        self.granted.borrow().map_or(FIRST_RENEWAL, |granted| granted.renew_after())
    }

    async fn ask_for_lease(&self, out: &Out) -> Result<(), Status> {
        // Room first: the clock is read when the request really goes.
        let room = out.reserve().await.map_err(|_| Status::cancelled("the session is gone"))?;
        let sequence =
            self.lease.lock().unwrap_or_else(PoisonError::into_inner).request(ateom::boottime_ns());
        let event = session_event::Event::Lease(LeaseRequest { sequence });
        room.send(Ok(SessionEvent { event: Some(event) }));
        Ok(())
    }

    /// Takes a grant; says when the next request is due.
    fn take_grant(self: &Arc<Self>, grant: &LeaseGrant) -> Option<Instant> {
        let granted = {
            let mut lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
            lease.grant(grant.sequence, grant.term_ms)?
        };
        self.granted.send_replace(Some(granted));
        for verdict in decide(&self.local(), &grant.assignments, grant.sequence) {
            let node = Arc::clone(self);
            match verdict {
                Verdict::Extend(assignment) => {
                    tokio::spawn(async move { node.extend(&assignment, granted.deadline_ns()).await });
                }
                Verdict::Fence(assignment) => {
                    tracing::warn!(
                        actor = assignment.actor_uid,
                        generation = assignment.generation,
                        worker = assignment.worker_id,
                        "the lease does not name it: it is of the past and ended"
                    );
                    tokio::spawn(async move {
                        if let Err(status) = node.release(assignment).await {
                            tracing::error!(%status, "cannot end what the lease does not name; the next grant tries");
                        }
                    });
                }
                Verdict::Leave(_) => {}
            }
        }
        Some(Instant::now() + granted.renew_after())
    }

    /// Every assignment on this node, running or being started.
    fn local(&self) -> Vec<Local> {
        let mut local = self.starting.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for worker in self.workers.values() {
            if let Some(held) = worker.view().assignment() {
                let known = local.entry(held.actor_uid.clone()).or_insert_with(|| held.clone());
                if known.generation < held.generation {
                    *known = held.clone();
                }
            }
        }
        local
            .into_values()
            .map(|assignment| {
                let since = self
                    .ledger
                    .get(&assignment.actor_uid)
                    .filter(|entry| entry.generation == assignment.generation)
                    .map_or(0, |entry| entry.since);
                Local { assignment, since }
            })
            .collect()
    }

    async fn extend(&self, assignment: &Assignment, deadline_ns: i64) {
        let Some(worker) = self.workers.get(&assignment.worker_id) else { return };
        let view = worker.view();
        // One that is still being prepared gets its deadline when it starts; a worker that is down has nothing.
        let (Some(up), true) = (view.up.clone(), view.assignment().is_some()) else { return };
        let mut client = up.client;
        let request = SetLeaseRequest {
            actor_uid: assignment.actor_uid.clone(),
            generation: assignment.generation,
            deadline_ns,
        };
        match timeout(SET_LEASE, client.set_lease(request)).await {
            Ok(Ok(_)) => {}
            Ok(Err(status)) => {
                let error = answers::other(&worker.id, &status);
                tracing::debug!(%error, "the lease was not taken");
            }
            Err(_) => tracing::warn!(worker = worker.id, "does not take its lease in time"),
        }
    }
}

async fn send(out: &Out, event: session_event::Event) -> Result<(), Status> {
    let event = SessionEvent { event: Some(event) };
    out.send(Ok(event)).await.map_err(|_| Status::cancelled("the session is gone"))
}
