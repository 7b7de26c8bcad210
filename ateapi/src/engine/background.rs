// SPDX-License-Identifier: Apache-2.0
//! Finding workers, and what runs beside the drivers: timers, publishing of workers, collection, trimming.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use substrate_proto::{atelet, types};

use super::driver::{Booking, PlaceError};
use super::{CallError, Engine, Link, Verb, lock};
use crate::model::{Actor, ActorUid, Generation, NodeName, Placement, State, Stored as _, WorkerId};
use crate::schedule::{Need, NoWorker, Pool};
use crate::store::{Expect, Garbage, Kind, Query, Trim, Tx};
use crate::workflow::steps::{Killed, hit};
use crate::workflow::{StepName, When};

/// Stops at once that share the machine in `suspend_all`.
const STOPS_AT_ONCE: usize = 8;
/// How often what is beyond its bounds is forgotten.
const TRIM_EVERY: Duration = Duration::from_mins(1);
/// How long request ids are remembered.
const REQUESTS_KEPT_MS: i64 = 24 * 3_600 * 1_000;
/// How long garbage waits that could not be deleted.
const COLLECT_AGAIN: Duration = Duration::from_secs(1);
/// Between records of what workers do.
const PUBLISH_PAUSE: Duration = Duration::from_millis(100);

/// Finds and books a worker (`Place`; undo: the booking is given back when it is dropped).
///
/// A full pool first suspends its longest idle actor (the next one where that is busy after all), then waits for the worker that is being freed, within bounds.
/// Right after a start it waits for the nodes to report.
pub(super) async fn place(engine: Arc<Engine>, actor: Actor, afresh: bool) -> Result<Booking, PlaceError> {
    let killed = |Killed| PlaceError::Killed;
    if let Some(status) = hit(&engine, StepName::Place, When::Before).map_err(killed)? {
        return Err(PlaceError::Call(CallError::NoWorker(NoWorker::None(status.message().to_owned()))));
    }
    let last = actor.last_snapshot().filter(|_| !afresh);
    let goldens = if afresh { Vec::new() } else { engine.goldens_for(&actor) };
    let makes = super::golden::needs(&actor);
    let only = last.filter(|it| !it.is_durable()).and_then(|it| it.node.clone());
    if last.is_some_and(|it| !it.is_durable() && it.node.is_none()) {
        let message = "its snapshot has no copy left; revert or reset it".to_owned();
        return Err(PlaceError::Call(CallError::NoWorker(NoWorker::None(message))));
    }
    let mut prefer: Vec<NodeName> = last.and_then(|it| it.node.clone()).into_iter().collect();
    prefer.extend(actor.nodes.iter().cloned());
    let need = Need {
        pool: &actor.pool,
        class: &actor.class,
        snapshot: last.map(|it| &it.compatibility).or(makes.as_ref()),
        only: only.as_ref(),
        prefer: &prefer,
    };
    let deadline = engine.clock.now() + engine.settings.place_wait;
    if makes.is_none() {
        engine.take_start(&actor.atespace).map_err(|exceeded| PlaceError::Call(exceeded.into()))?;
    }
    let mut victim: Option<ActorUid> = None;
    loop {
        let changed = engine.pool_changed.notified();
        let error = {
            let mut pool = lock(&engine.pool);
            if makes.is_none()
                && let Err(exceeded) = engine.running_quota(&pool, &actor.atespace)
            {
                return Err(PlaceError::Call(exceeded.into()));
            }
            // From a golden snapshot where a worker fits one, else from the image.
            let golden = goldens.iter().find_map(|golden| {
                let prefer: Vec<NodeName> = golden.node.iter().cloned().collect();
                let need = Need { snapshot: Some(&golden.compatibility), prefer: &prefer, ..need.clone() };
                pool.pick(&need).ok().map(|picked| (picked, golden.clone()))
            });
            let (picked, golden) = match golden {
                Some((picked, golden)) => (Ok(picked), Some(Box::new(golden))),
                None => (pool.pick(&need), None),
            };
            match picked {
                Ok((worker, node)) => {
                    let generation = actor.generation.next();
                    let assignment = types::Assignment {
                        actor_uid: actor.uid.0.clone(),
                        atespace: actor.atespace.clone(),
                        actor_name: actor.name.clone(),
                        generation: generation.0,
                        worker_id: worker.0.clone(),
                    };
                    pool.assign(&node, &assignment);
                    drop(pool);
                    let placement = Some(Placement { worker, node });
                    let booking = Booking {
                        engine: Arc::clone(&engine),
                        uid: actor.uid.clone(),
                        generation,
                        placement,
                        golden,
                    };
                    hit(&engine, StepName::Place, When::After).map_err(killed)?;
                    return Ok(booking);
                }
                Err(error) => {
                    if only.is_some() && pool.pick(&Need { only: None, ..need.clone() }).is_ok() {
                        return Err(PlaceError::Elsewhere(error.into()));
                    }
                    error
                }
            }
        };
        let freeing = matches!(error, NoWorker::Full { being_freed: true, .. });
        // One at a time; when it turns out to be busy, the next one is asked.
        victim = victim.filter(|uid| engine.is_asked(uid));
        if matches!(error, NoWorker::Full { .. }) && !freeing && victim.is_none() && makes.is_none() {
            victim = engine.evict_longest_idle(&need);
        }
        let settling = matches!(error, NoWorker::None(_))
            && engine.nodes.values().any(|node| node.link.read(|link| *link == Link::Down));
        if !(freeing || victim.is_some() || settling) || engine.clock.now() >= deadline {
            return Err(PlaceError::Call(error.into()));
        }
        tokio::select! {
            biased;
            () = changed => {}
            () = engine.clock.sleep_until(deadline) => {}
        }
    }
}

impl Engine {
    /// Asks the longest quiet actor that holds a fitting worker to suspend, if it has been quiet for long enough.
    fn evict_longest_idle(self: &Arc<Self>, need: &Need<'_>) -> Option<ActorUid> {
        let after = self.settings.evict_after?;
        let held: Vec<(ActorUid, Generation)> = {
            let pool = lock(&self.pool);
            pool.iter()
                .filter(|worker| Pool::would_fit(worker, need))
                .filter_map(|worker| worker.record.actor.clone())
                .collect()
        };
        let victim = {
            let mut live = lock(&self.live);
            let longest = held
                .into_iter()
                .filter_map(|(uid, generation)| {
                    let it = live.get(&uid).filter(|it| it.generation == generation && !it.asked)?;
                    Some((it.tracker.as_ref()?.quiet_for(), uid))
                })
                .filter(|(quiet, _)| *quiet >= after)
                .max();
            if let Some((_, uid)) = &longest
                && let Some(it) = live.get_mut(uid)
            {
                it.asked = true;
            }
            longest
        };
        let (_, uid) = victim?;
        let verb = Verb::Suspend { by: "evict".to_owned(), only_if_idle: true, drain_ms: 0 };
        self.ask_quietly(&uid, verb);
        Some(uid)
    }

    pub(super) fn spawn_background(self: &Arc<Self>) {
        let engine = Arc::clone(self);
        self.spawn(async move { engine.run_timers().await });
        let engine = Arc::clone(self);
        self.spawn(async move { engine.publish_workers().await });
        let engine = Arc::clone(self);
        self.spawn(async move { engine.run_collector().await });
        let engine = Arc::clone(self);
        self.spawn(async move { engine.run_golden().await });
        let engine = Arc::clone(self);
        self.spawn(async move {
            loop {
                let trim = Trim {
                    changelog_keep: engine.settings.changelog_keep,
                    events_keep: engine.settings.events_keep,
                    requests_before_ms: engine.clock.wall_ms() - REQUESTS_KEPT_MS,
                };
                if let Err(error) = engine.store.trim(trim).await {
                    tracing::warn!(%error, "trimming the store failed");
                }
                engine.pause(TRIM_EVERY).await;
            }
        });
    }

    /// Commits what watchers and a next start should know of workers; the latest state of each, in order, and not every
    /// step of a busy one.
    async fn publish_workers(self: Arc<Self>) {
        loop {
            self.workers_changed.notified().await;
            self.flush_workers().await;
            self.pause(PUBLISH_PAUSE).await;
        }
    }

    pub(crate) async fn flush_workers(&self) {
        let ids: Vec<WorkerId> = std::mem::take(&mut *lock(&self.dirty_workers)).into_iter().collect();
        let mut tx = Tx::default();
        {
            let pool = lock(&self.pool);
            for id in &ids {
                match pool.get(id) {
                    Some(worker) => tx.puts.push((worker.record.object(), Expect::Any)),
                    None => tx.deletes.push((Kind::Worker, id.0.clone(), Expect::Any)),
                }
            }
        }
        if tx.puts.is_empty() && tx.deletes.is_empty() {
            return;
        }
        if let Err(error) = self.store.commit(tx).await {
            tracing::warn!(%error, "recording workers failed");
            lock(&self.dirty_workers).extend(ids);
            self.pause(Duration::from_millis(500)).await;
            self.workers_changed.notify_one();
        }
    }

    async fn run_collector(self: Arc<Self>) {
        loop {
            let left = self.collect(Duration::from_mins(1)).await;
            if left {
                tokio::select! {
                    biased;
                    () = self.garbage_added.notified() => {}
                    () = self.pause(COLLECT_AGAIN) => {}
                }
            } else {
                self.garbage_added.notified().await;
            }
        }
    }

    /// Works garbage off (`Collect`), within a time. True when some is left.
    ///
    /// Race: an entry is written in the commit that dropped the last reference, and nothing can refer to it again: a
    /// parent of an upload is a committed snapshot of the same actor. Deleting twice is the same as once.
    pub(crate) async fn collect(&self, within: Duration) -> bool {
        let deadline = self.clock.now() + within;
        tokio::select! {
            biased;
            left = self.collect_all() => left,
            () = self.clock.sleep_until(deadline) => true,
        }
    }

    async fn collect_all(&self) -> bool {
        let _one_at_a_time = self.collecting.lock().await;
        let Some(_permit) = self.store.deletion_permit() else {
            tracing::info!("deletions wait for a backup to end");
            return true;
        };
        loop {
            let batch = match self.store.garbage(500).await {
                Ok(batch) => batch,
                Err(error) => {
                    tracing::warn!(%error, "reading garbage failed");
                    return true;
                }
            };
            if batch.is_empty() {
                return false;
            }
            let all = batch.len();
            let done = match self.delete(batch).await {
                Ok(done) => done,
                Err(Killed) => return true,
            };
            if done.is_empty() {
                return true;
            }
            let some_left = done.len() < all;
            let tx = Tx { garbage_done: done, ..Tx::default() };
            if let Err(error) = self.store.commit(tx).await {
                tracing::warn!(%error, "recording deletions failed");
                return true;
            }
            if some_left {
                return true;
            }
        }
    }

    async fn delete(&self, batch: Vec<(i64, String, Garbage)>) -> Result<Vec<i64>, Killed> {
        let mut done = Vec::new();
        // Blobs by the actor whose they are: one call each. Any node reaches the blob store.
        let mut blobs: BTreeMap<String, (atelet::DeleteBlobsRequest, Vec<i64>)> = BTreeMap::new();
        if hit(self, StepName::Collect, When::Before)?.is_some() {
            return Ok(done);
        }
        for (id, holder, item) in batch {
            let owner = holder.split('/').next().unwrap_or_default().to_owned();
            match item {
                Garbage::Manifest { actor, directory } => {
                    let entry = blobs.entry(actor).or_default();
                    entry.0.manifests.push(directory);
                    entry.1.push(id);
                }
                Garbage::Pack { key } => {
                    let entry = blobs.entry(owner).or_default();
                    entry.0.packs.push(key);
                    entry.1.push(id);
                }
                Garbage::NodeCopy { node, actor, snapshot } => {
                    let request = atelet::DropSnapshotRequest { actor_uid: actor, snapshot_id: snapshot };
                    match self.node(&NodeName(node)) {
                        // Nobody to tell: the node is no longer ours.
                        None => done.push(id),
                        Some(node) if node.is_up() => match node.client.drop_snapshot(request).await {
                            Ok(()) => done.push(id),
                            Err(status) => {
                                tracing::warn!(node = %node.name, %status, "a node copy was not given up");
                            }
                        },
                        Some(_) => {}
                    }
                }
                Garbage::Purge { node, actor, atespace, name } => {
                    let request = atelet::PurgeRequest { actor_uid: actor, atespace, actor_name: name };
                    match self.node(&NodeName(node)) {
                        None => done.push(id),
                        Some(node) if node.is_up() => match node.client.purge(request).await {
                            Ok(()) => done.push(id),
                            Err(status) => tracing::warn!(node = %node.name, %status, "a purge failed"),
                        },
                        Some(_) => {}
                    }
                }
            }
        }
        for (owner, (mut request, ids)) in blobs {
            let Some(node) = self.nodes.values().find(|node| node.is_up()) else { break };
            request.actor_uid.clone_from(&owner);
            match node.client.delete_blobs(request).await {
                Ok(()) => done.extend(ids),
                Err(status) => tracing::warn!(actor = owner, %status, "deleting blobs failed"),
            }
        }
        hit(self, StepName::Collect, When::After)?;
        Ok(done)
    }

    /// Has a node end what is left of an assignment that no record holds any more.
    pub(crate) fn release_quietly(self: &Arc<Self>, assignment: types::Assignment, node: &NodeName) {
        let Some(node) = self.node(node).filter(|node| node.is_up()) else { return };
        self.spawn(async move {
            let worker = assignment.worker_id.clone();
            if let Err(status) = node.client.release(node.release_request(assignment)).await {
                // Its next report shows the slot again, and it is released then.
                tracing::warn!(node = %node.name, worker, %status, "releasing an ended assignment failed");
            }
        });
    }

    /// Suspends everything that runs or is about to. Names of those that could not.
    pub(crate) async fn suspend_all(self: &Arc<Self>, by: &str) -> Result<(u32, Vec<String>), CallError> {
        let mut query = Query::all(Kind::Actor);
        query.states = [State::Running, State::Resuming, State::Suspending, State::Pausing]
            .map(|state| state.to_proto() as i64)
            .to_vec();
        let mut actors: Vec<Actor> = crate::store::list_all(&*self.store, query.clone()).await?;
        query.kind = Kind::Golden;
        actors.extend(crate::store::list_all::<Actor>(&*self.store, query).await?);
        let outcomes: Vec<(String, Result<_, CallError>)> = futures::stream::iter(actors)
            .map(|actor| async move {
                let label = format!("{}/{}", actor.atespace, actor.name);
                (label, self.suspend(&actor.uid, by).await)
            })
            .buffer_unordered(STOPS_AT_ONCE)
            .collect()
            .await;
        let suspended = outcomes.iter().filter(|(_, outcome)| outcome.is_ok()).count() as u32;
        let failed = outcomes
            .into_iter()
            .filter_map(|(label, outcome)| outcome.err().map(|error| format!("{label}: {error}")))
            .collect();
        Ok((suspended, failed))
    }

    async fn suspend(self: &Arc<Self>, uid: &ActorUid, by: &str) -> Result<(), CallError> {
        let verb =
            Verb::Suspend { by: by.to_owned(), only_if_idle: false, drain_ms: super::DEFAULT_DRAIN_MS };
        self.ask(uid, verb, None).await.map(drop)
    }

    /// Cordons a worker or undoes it.
    pub(crate) async fn cordon(
        &self,
        id: &WorkerId,
        cordoned: bool,
    ) -> Result<crate::schedule::Worker, CallError> {
        let worker = lock(&self.pool).cordon(id, cordoned);
        let worker = worker.ok_or_else(|| CallError::NotFound { kind: "worker", name: id.to_string() })?;
        self.pool_touched([id.clone()]);
        self.flush_workers().await;
        Ok(worker)
    }

    /// Cordons a worker and suspends what it runs.
    pub(crate) async fn drain(self: &Arc<Self>, id: &WorkerId) -> Result<crate::schedule::Worker, CallError> {
        let worker = self.cordon(id, true).await?;
        if let Some((uid, _)) = &worker.record.actor {
            self.suspend(uid, "drain").await?;
        }
        let now = lock(&self.pool).get(id).cloned();
        Ok(now.unwrap_or(worker))
    }

    /// A node is to be drained, or one worker of it.
    pub(crate) fn drain_node(self: &Arc<Self>, node: &NodeName, worker: Option<WorkerId>) {
        let ids: Vec<WorkerId> = match worker {
            Some(id) => vec![id],
            None => lock(&self.pool).of_node(node).map(|worker| worker.record.id.clone()).collect(),
        };
        for id in ids {
            let engine = Arc::clone(self);
            self.spawn(async move {
                if let Err(error) = engine.drain(&id).await {
                    tracing::error!(worker = %id, %error, "draining a worker failed");
                }
            });
        }
    }
}
