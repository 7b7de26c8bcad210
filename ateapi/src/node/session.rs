// SPDX-License-Identifier: Apache-2.0
//! The session of one node: its workers, its news, its lease.
//!
//! ```text
//!            connected, synced                       lease + margin passed in silence
//!   Down ─────────────────────▶ Up        Down ─────────────────────────────────────▶ Lost
//!    ▲                          │ stream ended, or no renewal asked for in time        │
//!    └──────────────────────────┘◀──────────────────────── connected, synced ──────────┘
//! ```
//!
//! **Lease (P1).** The node asks; what will be granted is booked (in memory and in the store) before it is sent, so no
//! grant reaches beyond what we know of. The grant names the assignments as they are booked at that moment; an
//! assignment is booked before its activation is sent. Silence proves nothing until the last booked end plus the margin
//! has passed: then every slot of the node has frozen its actor by itself, and whatever comes back later is of a lower
//! generation than what was started elsewhere.
//!
//! **Reconciliation.** A session begins with the node's report of its slots. What our records hold and a slot holds too
//! is adopted; what a slot holds and no record does is released; what a record holds and its slot does not is lost.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use substrate_proto::atelet::session_event::Event as Said;
use substrate_proto::atelet::session_request::Request as Say;
use substrate_proto::{atelet, ateom, types};
use tokio::sync::mpsc;

use crate::engine::{Command, Engine, Link, News, NodeHandle, lock};
use crate::model::{ActorUid, EventDraft, Exit, Generation, NodeRecord, Stored as _, WorkerId};
use crate::store::{Expect, Tx};

const DIAL_PAUSE: Duration = Duration::from_millis(100);
const DIAL_PAUSE_MOST: Duration = Duration::from_secs(2);

/// Keeps a node's session for as long as the engine lives.
pub(crate) async fn run(engine: Arc<Engine>, node: Arc<NodeHandle>) {
    let mut pause = DIAL_PAUSE;
    loop {
        let ended = tokio::select! {
            biased;
            ended = converse(&engine, &node, &mut pause) => ended,
            () = watch_lease(&engine, &node) => "it has not asked for its lease".to_owned(),
        };
        tracing::info!(node = %node.name, ended, "session ended");
        disconnect(&engine, &node);
        let wait = pause;
        pause = (pause * 2).min(DIAL_PAUSE_MOST);
        tokio::select! {
            biased;
            () = engine.pause(wait) => {}
            () = watch_lease(&engine, &node) => {}
        }
    }
}

fn disconnect(engine: &Arc<Engine>, node: &Arc<NodeHandle>) {
    if node.is_up() {
        node.link.set(Link::Down);
    }
    let silent = lock(&engine.pool).silence(&node.name);
    engine.pool_touched(silent);
}

/// Returns never while the node is given up already or holds nothing; else once its lease and the margin have passed,
/// after giving up what it held.
async fn watch_lease(engine: &Arc<Engine>, node: &Arc<NodeHandle>) {
    loop {
        let until = node.lease_until() + engine.settings.lease_margin;
        #[cfg(test)]
        let until = if engine.faults.undoes(crate::workflow::Rule::WaitForTheLease) && !node.is_up() {
            until.saturating_sub(engine.settings.lease_margin + engine.settings.lease_term)
        } else {
            until
        };
        let moved = node.lease_moved.notified();
        if engine.clock.now() < until {
            tokio::select! {
                biased;
                () = engine.clock.sleep_until(until) => {}
                () = moved => {}
            }
            continue;
        }
        let held = lock(&engine.pool).assignments(&node.name);
        let is_given_up = node.link.read(|link| matches!(link, Link::Lost(_)));
        if held.is_empty() || is_given_up {
            // Nothing to give up; looked at again when something is assigned there, which extends the lease. What is
            // still booked on a node that was given up is on its way out.
            moved.await;
            continue;
        }
        let message = format!(
            "node {} has been silent beyond its lease of {} s and the margin",
            node.name,
            engine.settings.lease_term.as_secs()
        );
        tracing::error!(node = %node.name, held = held.len(), "giving up a silent node");
        node.link.set(Link::Lost(message.clone()));
        let silent = lock(&engine.pool).silence(&node.name);
        engine.pool_touched(silent);
        for assignment in held {
            tell_lost(engine, &assignment, message.clone());
        }
        return;
    }
}

fn tell_lost(engine: &Arc<Engine>, assignment: &types::Assignment, message: String) {
    let generation = Generation(assignment.generation);
    let uid = ActorUid(assignment.actor_uid.clone());
    engine.tell(&uid, Command::News(News::Lost { generation, message }));
}

/// One session, until it ends; says why.
async fn converse(engine: &Arc<Engine>, node: &Arc<NodeHandle>, pause: &mut Duration) -> String {
    let described = match node.client.get_node().await {
        Ok(described) => described,
        Err(status) => return format!("cannot be reached: {status}"),
    };
    let (say, requests) = mpsc::channel(16);
    let hello = atelet::SessionHello { controller: crate::model::ids::uuid(&*engine.clock) };
    lock(&node.session).clone_from(&hello.controller);
    // A fresh channel has room.
    let _ = say.try_send(atelet::SessionRequest { request: Some(Say::Hello(hello)) });
    let mut events = match node.client.session(requests).await {
        Ok(events) => events,
        Err(status) => return format!("refused the session: {status}"),
    };
    let mut session = Session {
        engine,
        node,
        say,
        boot_id: described.boot_id,
        reports: BTreeMap::new(),
        synced: false,
        begun: engine.clock.now(),
    };
    loop {
        match events.next().await {
            None => return "the node closed it".to_owned(),
            Some(Err(status)) => return status.to_string(),
            Some(Ok(event)) => {
                if let Some(event) = event.event
                    && let Err(ended) = session.on(event).await
                {
                    return ended;
                }
                if session.synced {
                    *pause = DIAL_PAUSE;
                }
            }
        }
    }
}

struct Session<'a> {
    engine: &'a Arc<Engine>,
    node: &'a Arc<NodeHandle>,
    say: mpsc::Sender<atelet::SessionRequest>,
    boot_id: String,
    /// The latest report of each slot.
    reports: BTreeMap<WorkerId, atelet::Worker>,
    synced: bool,
    /// On the engine's clock: what began to run later is not in the first reports.
    begun: Duration,
}

impl Session<'_> {
    async fn on(&mut self, event: Said) -> Result<(), String> {
        match event {
            Said::Worker(worker) => self.on_worker(&worker),
            Said::Lease(request) => return self.grant(request.sequence).await,
            Said::Lost(lost) => self.on_lost(lost).await,
            Said::Exited(exited) => {
                if let (Some(assignment), Some(exit)) = (exited.assignment, exited.exit) {
                    self.tell_exit(&assignment, &exit);
                }
            }
            Said::Stats(stats) => {
                if let (Some(assignment), Some(counted)) = (stats.assignment, stats.stats) {
                    let uid = ActorUid(assignment.actor_uid);
                    let generation = Generation(assignment.generation);
                    self.engine.on_stats(&uid, generation, counted, stats.now_ns);
                }
            }
            Said::Synced(atelet::SyncDone {}) => self.on_synced(),
            Said::Notice(notice) => self.on_notice(notice).await,
            Said::Drain(drain) => {
                let worker = Some(WorkerId(drain.worker_id)).filter(|id| !id.as_str().is_empty());
                self.engine.drain_node(&self.node.name, worker);
            }
        }
        Ok(())
    }

    fn on_worker(&mut self, worker: &atelet::Worker) {
        let id = WorkerId(worker.worker_id.clone());
        let changed = lock(&self.engine.pool).report(&self.node.name, worker);
        self.reports.insert(id.clone(), worker.clone());
        if changed {
            self.engine.pool_touched([id]);
        } else {
            self.engine.pool_touched([]);
        }
        if self.synced {
            self.release_if_foreign(worker);
        }
    }

    /// A slot runs something that our records do not have there: it is of the past.
    fn release_if_foreign(&self, worker: &atelet::Worker) {
        use ateom::slot_status::Phase;
        let Some(slot) = &worker.slot else { return };
        let Some(held) = slot.assignment.clone().filter(|held| !held.actor_uid.is_empty()) else { return };
        if matches!(slot.phase(), Phase::Unspecified | Phase::Empty | Phase::Terminating) {
            return;
        }
        let booked = lock(&self.engine.pool).assignments(&self.node.name);
        if booked.iter().any(|it| it.actor_uid == held.actor_uid && it.generation == held.generation) {
            return;
        }
        tracing::warn!(
            node = %self.node.name, worker = worker.worker_id, actor = held.actor_uid,
            generation = held.generation, "a slot runs what no record has there: releasing it"
        );
        self.engine.release_quietly(held, &self.node.name);
    }

    async fn grant(&self, sequence: u64) -> Result<(), String> {
        let term = self.engine.settings.lease_term;
        // Counted by the node from before it asked: what is booked here can only be later.
        self.node.extend_lease(self.engine.clock.now() + term);
        let record = NodeRecord {
            name: self.node.name.clone(),
            boot_id: self.boot_id.clone(),
            term_ms: term.as_millis() as u64,
            lease_until_ms: self.engine.clock.wall_ms() + term.as_millis() as i64,
            revision: 0,
        };
        let tx = Tx { puts: vec![(record.object(), Expect::Any)], ..Tx::default() };
        if let Err(error) = self.engine.store.commit(tx).await {
            // Not recorded, not granted: the node asks again.
            tracing::error!(node = %self.node.name, %error, "cannot record a lease");
            return Ok(());
        }
        let grant = atelet::LeaseGrant {
            sequence,
            term_ms: term.as_millis() as u64,
            assignments: lock(&self.engine.pool).assignments(&self.node.name),
        };
        let request = atelet::SessionRequest { request: Some(Say::Grant(grant)) };
        self.say.send(request).await.map_err(|_| "the node no longer listens".to_owned())
    }

    fn tell_exit(&self, assignment: &types::Assignment, exit: &types::ExitStatus) {
        let generation = Generation(assignment.generation);
        let exit = Exit {
            container: exit.container.clone(),
            code: exit.code,
            signal: exit.signal,
            time_ms: exit.time_ms,
        };
        let uid = ActorUid(assignment.actor_uid.clone());
        self.engine.tell(&uid, Command::News(News::Exited { generation, exit }));
    }

    async fn on_lost(&self, lost: atelet::WorkerLost) {
        // Whether the worker itself lives is for its report to say: this may be of its sandbox alone.
        let id = WorkerId(lost.worker_id);
        let held = lost.assignment.filter(|assignment| !assignment.actor_uid.is_empty());
        let booked = lock(&self.engine.pool).get(&id).and_then(|worker| worker.record.actor.clone());
        let is_booked = match (&held, &booked) {
            (Some(held), Some((uid, generation))) => {
                held.actor_uid == uid.0 && held.generation == generation.0
            }
            // The node may not know any more what the dead slot held; our books do.
            (None, Some(_)) => self.synced,
            (_, None) => false,
        };
        // At the start of a session the node tells its losses again.
        if !self.synced && !is_booked {
            return;
        }
        let message = format!("worker {id} of node {} was lost: {}", self.node.name, lost.reason);
        let event = EventDraft {
            kind: "worker".to_owned(),
            atespace: held.as_ref().map(|it| it.atespace.clone()).unwrap_or_default(),
            subject: id.0.clone(),
            subject_uid: held.as_ref().map(|it| it.actor_uid.clone()).unwrap_or_default(),
            reason: "WorkerLost".to_owned(),
            message: message.clone(),
            warning: true,
            metadata: BTreeMap::new(),
            time_ms: self.engine.clock.wall_ms(),
        };
        self.record(event).await;
        if let (true, Some((uid, generation))) = (is_booked, booked) {
            self.engine.tell(&uid, Command::News(News::Lost { generation, message }));
        }
    }

    async fn on_notice(&self, notice: atelet::WorkerNotice) {
        let (Some(assignment), Some(said)) = (notice.assignment, notice.notice) else { return };
        let event = EventDraft {
            kind: "actor".to_owned(),
            atespace: assignment.atespace,
            subject: assignment.actor_name,
            subject_uid: assignment.actor_uid,
            reason: said.reason,
            message: said.message,
            warning: true,
            metadata: BTreeMap::from([("worker".to_owned(), notice.worker_id)]),
            time_ms: self.engine.clock.wall_ms(),
        };
        self.record(event).await;
    }

    async fn record(&self, event: EventDraft) {
        let tx = Tx { events: vec![event], ..Tx::default() };
        if let Err(error) = self.engine.store.commit(tx).await {
            tracing::warn!(%error, "recording an event failed");
        }
    }

    /// The node has told of every slot: compare with our records.
    fn on_synced(&mut self) {
        use ateom::slot_status::Phase;
        self.synced = true;
        let (gone, booked) = {
            let mut pool = lock(&self.engine.pool);
            (pool.prune(&self.node.name), pool.assignments(&self.node.name))
        };
        let reports: Vec<_> = self.reports.values().collect();
        self.engine.pool_touched(gone.into_iter().map(|record| record.id));
        // From here on steps may run: they, not this comparison, find out about slots of work in progress.
        self.node.link.set(Link::Up);
        tracing::info!(node = %self.node.name, workers = reports.len(), held = booked.len(), "session synced");
        for assignment in booked {
            let slot = reports.iter().find(|it| it.worker_id == assignment.worker_id && it.alive);
            let status = slot.and_then(|it| it.slot.as_ref());
            let holds = status.is_some_and(|it| {
                it.assignment.as_ref().is_some_and(|held| {
                    held.actor_uid == assignment.actor_uid && held.generation == assignment.generation
                })
            });
            let phase = status.map_or(Phase::Unspecified, ateom::SlotStatus::phase);
            if let Some(exit) =
                status.filter(|_| holds && phase == Phase::Exited).and_then(|it| it.exit.as_ref())
            {
                self.tell_exit(&assignment, exit);
                continue;
            }
            let runs =
                matches!(phase, Phase::Running | Phase::Frozen | Phase::Checkpointing | Phase::Starting);
            let news = News::Reported {
                generation: Generation(assignment.generation),
                slot_is_there: slot.is_some(),
                holds_it: holds && runs,
                begun: self.begun,
                ingress_endpoint: status.map(|it| it.ingress_endpoint.clone()).unwrap_or_default(),
            };
            self.engine.tell(&ActorUid(assignment.actor_uid), Command::News(news));
        }
        for report in reports {
            self.release_if_foreign(report);
        }
    }
}
