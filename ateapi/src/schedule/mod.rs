// SPDX-License-Identifier: Apache-2.0
//! Workers and who holds them; the pick of a free one.
//!
//! Free workers are indexed by what they offer: (pool, class, runtime digest, architecture, CPU features, facts). A
//! machine park has few distinct offers and many workers, so a pick looks at each fitting offer and takes the first
//! worker of a preferred node, or of any, one with a sandbox prepared before one that is still at it: O(offers × log
//! workers). A worker is free when it is alive, not cordoned, empty as its node reported, and assigned to nobody by our
//! own books.
use std::collections::{BTreeMap, BTreeSet};

use substrate_proto::types::{Assignment, Compatibility};
use substrate_proto::{atelet, ateom};

use crate::model::{ActorUid, Generation, NodeName, WorkerId, WorkerRecord};

/// Pool of workers whose template names none.
pub const DEFAULT_POOL: &str = "default";

/// What a worker offers, compared as a whole.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Offer {
    pool: String,
    class: String,
    runtime_digest: String,
    architecture: String,
    cpu_features: BTreeSet<String>,
    facts: BTreeMap<String, String>,
    /// Of an older runtime: there for the snapshots that need it.
    restores_only: bool,
}

impl Offer {
    /// Whether it is for a boot, or for a snapshot with these needs.
    fn takes(&self, needs: Option<&Compatibility>) -> bool {
        needs.map_or(!self.restores_only, |needs| self.fits(needs))
    }

    fn fits(&self, needs: &Compatibility) -> bool {
        self.class == needs.sandbox_class
            && self.runtime_digest == needs.runtime_digest
            && (needs.architecture.is_empty() || self.architecture == needs.architecture)
            && needs.cpu_features.iter().all(|feature| self.cpu_features.contains(feature))
            // Facts that only the snapshot has are the runtime's to judge.
            && needs.facts.iter().all(|(key, value)| self.facts.get(key).is_none_or(|here| here == value))
    }
}

/// A worker as it is known now.
#[derive(Debug, Clone)]
pub struct Worker {
    /// What is persisted of it.
    pub record: WorkerRecord,
    /// As its node last reported it.
    pub phase: ateom::slot_status::Phase,
    /// Its next sandbox is there.
    prepared: bool,
    /// Pid of its ateom.
    pub pid: u32,
    offer: Offer,
    reported: bool,
}

impl Worker {
    fn is_free(&self) -> bool {
        self.record.alive
            && !self.record.cordoned
            && self.record.actor.is_none()
            && self.reported
            && self.phase == ateom::slot_status::Phase::Empty
    }

    fn place(&self) -> Place {
        (!self.prepared, self.record.node.clone(), self.record.id.clone())
    }
}

/// What an actor needs of a worker.
#[derive(Debug, Clone)]
pub struct Need<'a> {
    /// Pool.
    pub pool: &'a str,
    /// Sandbox class.
    pub class: &'a str,
    /// What its snapshot needs; none for a cold boot.
    pub snapshot: Option<&'a Compatibility>,
    /// Only this node has what it needs.
    pub only: Option<&'a NodeName>,
    /// Nodes that have the snapshot or the image, best first.
    pub prefer: &'a [NodeName],
}

/// Why there is no worker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoWorker {
    /// There are such workers, all taken.
    #[error("all {workers} workers of pool {pool:?} that could run it are taken{}", if *.being_freed { " (one is being freed)" } else { "" })]
    #[allow(missing_docs)]
    Full { pool: String, workers: usize, being_freed: bool },
    /// There is none at all.
    #[error("{0}")]
    None(String),
}

/// Where a free worker is listed: prepared ones first.
type Place = (Unprepared, NodeName, WorkerId);
type Unprepared = bool;

/// All workers. Owned by one lock; every method is short.
#[derive(Debug, Default)]
pub struct Pool {
    workers: BTreeMap<WorkerId, Worker>,
    free: BTreeMap<Offer, BTreeSet<Place>>,
    by_node: BTreeMap<NodeName, BTreeSet<WorkerId>>,
}

impl Pool {
    /// Takes up what was remembered of a worker before its node reports it.
    pub fn remember(&mut self, record: WorkerRecord) {
        let offer = Offer {
            pool: record.pool.clone(),
            class: record.class.clone(),
            runtime_digest: record.runtime_digest.clone(),
            architecture: String::new(),
            cpu_features: BTreeSet::new(),
            facts: BTreeMap::new(),
            restores_only: false,
        };
        self.by_node.entry(record.node.clone()).or_default().insert(record.id.clone());
        let record = WorkerRecord {
            alive: false,
            actor: None,
            atespace: String::new(),
            actor_name: String::new(),
            ..record
        };
        let phase = ateom::slot_status::Phase::Unspecified;
        self.workers.insert(
            record.id.clone(),
            Worker { record, phase, prepared: false, pid: 0, offer, reported: false },
        );
    }

    /// Takes in a node's report; true when something that is persisted changed.
    pub fn report(&mut self, node: &NodeName, report: &atelet::Worker) -> bool {
        let id = WorkerId(report.worker_id.clone());
        let slot = report.slot.clone().unwrap_or_default();
        // A worker whose process is down says nothing of what it offers: what it offered stands.
        let known = self.workers.get(&id).map(|worker| worker.offer.clone());
        let capabilities = report.capabilities.clone().unwrap_or_else(|| {
            known.map_or_else(Default::default, |offer| ateom::GetCapabilitiesResponse {
                sandbox_class: offer.class,
                runtime_digest: offer.runtime_digest,
                runtime_version: self
                    .workers
                    .get(&id)
                    .map(|it| it.record.runtime_version.clone())
                    .unwrap_or_default(),
                architecture: offer.architecture,
                cpu_features: offer.cpu_features.into_iter().collect(),
                facts: offer.facts,
                ..Default::default()
            })
        });
        let pool = if report.pool.is_empty() { DEFAULT_POOL.to_owned() } else { report.pool.clone() };
        let old = self.workers.get(&id).map(|worker| worker.record.clone());
        self.unlist(&id);
        if let Some(old) = old.as_ref().filter(|old| old.node != *node)
            && let Some(workers) = self.by_node.get_mut(&old.node)
        {
            workers.remove(&id);
        }
        let record = WorkerRecord {
            id: id.clone(),
            node: node.clone(),
            pool: pool.clone(),
            class: capabilities.sandbox_class.clone(),
            runtime_digest: capabilities.runtime_digest.clone(),
            runtime_version: capabilities.runtime_version.clone(),
            alive: report.alive,
            cordoned: old.as_ref().is_some_and(|old| old.cordoned),
            actor: old.as_ref().and_then(|old| old.actor.clone()),
            atespace: old.as_ref().map(|old| old.atespace.clone()).unwrap_or_default(),
            actor_name: old.as_ref().map(|old| old.actor_name.clone()).unwrap_or_default(),
            revision: old.as_ref().map_or(0, |old| old.revision),
        };
        let changed = old.as_ref() != Some(&record);
        let offer = Offer {
            pool,
            class: capabilities.sandbox_class,
            runtime_digest: capabilities.runtime_digest,
            architecture: capabilities.architecture,
            cpu_features: capabilities.cpu_features.into_iter().collect(),
            facts: capabilities.facts,
            restores_only: report.restores_only,
        };
        let (phase, prepared, pid) = (slot.phase(), slot.prepared, slot.pid);
        let worker = Worker { record, phase, prepared, pid, offer, reported: true };
        self.by_node.entry(node.clone()).or_default().insert(id.clone());
        self.workers.insert(id.clone(), worker);
        self.list(&id);
        changed
    }

    fn change(&mut self, id: &WorkerId, change: impl FnOnce(&mut Worker)) -> bool {
        self.unlist(id);
        let known = self.workers.get_mut(id).map(change).is_some();
        self.list(id);
        known
    }

    fn unlist(&mut self, id: &WorkerId) {
        if let Some(worker) = self.workers.get(id)
            && let Some(free) = self.free.get_mut(&worker.offer)
        {
            free.remove(&worker.place());
            if free.is_empty() {
                self.free.remove(&worker.offer);
            }
        }
    }

    fn list(&mut self, id: &WorkerId) {
        if let Some(worker) = self.workers.get(id).filter(|worker| worker.is_free()) {
            self.free.entry(worker.offer.clone()).or_default().insert(worker.place());
        }
    }

    /// Books a worker for an assignment. The caller has picked it under the same lock, or adopts what runs there; a
    /// worker that no node has reported yet is taken up, so that a lease names every assignment.
    pub fn assign(&mut self, node: &NodeName, assignment: &Assignment) {
        let id = WorkerId(assignment.worker_id.clone());
        if !self.workers.contains_key(&id) {
            self.remember(WorkerRecord {
                id: id.clone(),
                node: node.clone(),
                pool: String::new(),
                class: String::new(),
                runtime_digest: String::new(),
                runtime_version: String::new(),
                alive: false,
                cordoned: false,
                actor: None,
                atespace: String::new(),
                actor_name: String::new(),
                revision: 0,
            });
        }
        self.change(&id, |worker| {
            let uid = ActorUid(assignment.actor_uid.clone());
            worker.record.actor = Some((uid, Generation(assignment.generation)));
            worker.record.atespace.clone_from(&assignment.atespace);
            worker.record.actor_name.clone_from(&assignment.actor_name);
        });
    }

    /// Every assignment on a node, as a lease names them.
    pub fn assignments(&self, node: &NodeName) -> Vec<Assignment> {
        self.of_node(node)
            .filter_map(|worker| {
                let (uid, generation) = worker.record.actor.as_ref()?;
                Some(Assignment {
                    actor_uid: uid.0.clone(),
                    atespace: worker.record.atespace.clone(),
                    actor_name: worker.record.actor_name.clone(),
                    generation: generation.0,
                    worker_id: worker.record.id.0.clone(),
                })
            })
            .collect()
    }

    /// Ends a booking, if it is still that one. `empty`: its node has said that nothing runs there.
    pub fn free(&mut self, id: &WorkerId, uid: &ActorUid, generation: Generation, empty: bool) -> bool {
        let held = self.workers.get(id).is_some_and(|worker| {
            worker.record.actor.as_ref().is_some_and(|(held, number)| held == uid && *number <= generation)
        });
        held && self.change(id, |worker| {
            worker.record.actor = None;
            worker.record.atespace.clear();
            worker.record.actor_name.clear();
            worker.prepared = false;
            if empty {
                worker.phase = ateom::slot_status::Phase::Empty;
            }
        })
    }

    /// Cordons a worker or undoes it; none: unknown.
    pub fn cordon(&mut self, id: &WorkerId, cordoned: bool) -> Option<Worker> {
        self.change(id, |worker| worker.record.cordoned = cordoned);
        self.workers.get(id).cloned()
    }

    /// A worker died: it is not alive until its node reports it again.
    pub fn lost(&mut self, id: &WorkerId) {
        self.change(id, |worker| {
            worker.record.alive = false;
            worker.reported = false;
        });
    }

    /// A node fell silent: nothing new goes to its workers until they are reported again.
    pub fn silence(&mut self, node: &NodeName) -> Vec<WorkerId> {
        let ids: Vec<_> = self.by_node.get(node).into_iter().flatten().cloned().collect();
        for id in &ids {
            self.lost(id);
        }
        ids
    }

    /// Forgets workers of a node that its report did not name.
    pub fn prune(&mut self, node: &NodeName) -> Vec<WorkerRecord> {
        let gone: Vec<_> = self
            .by_node
            .get(node)
            .into_iter()
            .flatten()
            .filter(|id| self.workers.get(*id).is_some_and(|it| !it.reported && it.record.actor.is_none()))
            .cloned()
            .collect();
        let mut records = Vec::new();
        for id in gone {
            self.unlist(&id);
            if let Some(workers) = self.by_node.get_mut(node) {
                workers.remove(&id);
            }
            records.extend(self.workers.remove(&id).map(|worker| worker.record));
        }
        records
    }

    /// A worker.
    pub fn get(&self, id: &WorkerId) -> Option<&Worker> {
        self.workers.get(id)
    }

    /// A record of a worker with what is only known now.
    pub fn dress(&self, record: WorkerRecord) -> Worker {
        match self.workers.get(&record.id) {
            Some(now) => Worker { record, ..now.clone() },
            None => Worker {
                offer: Offer {
                    pool: record.pool.clone(),
                    class: record.class.clone(),
                    runtime_digest: record.runtime_digest.clone(),
                    architecture: String::new(),
                    cpu_features: BTreeSet::new(),
                    facts: BTreeMap::new(),
                    restores_only: false,
                },
                record,
                phase: ateom::slot_status::Phase::Unspecified,
                prepared: false,
                pid: 0,
                reported: false,
            },
        }
    }

    /// All workers, by id.
    pub fn iter(&self) -> impl Iterator<Item = &Worker> {
        self.workers.values()
    }

    /// Workers of a node.
    pub fn of_node<'a>(&'a self, node: &NodeName) -> impl Iterator<Item = &'a Worker> {
        self.by_node.get(node).into_iter().flatten().filter_map(|id| self.workers.get(id))
    }

    /// Runtimes of a pool's live workers of a class, each with how many workers there are and how many are free.
    pub fn runtimes(&self, pool: &str, class: &str) -> Vec<(String, usize, usize)> {
        let pool = if pool.is_empty() { DEFAULT_POOL } else { pool };
        let mut found: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for worker in self.workers.values() {
            let fits = worker.offer.pool == pool && worker.offer.class == class && worker.record.alive;
            if fits && !worker.record.cordoned {
                let (all, free) = found.entry(&worker.offer.runtime_digest).or_default();
                *all += 1;
                *free += usize::from(worker.is_free());
            }
        }
        found.into_iter().map(|(digest, (all, free))| (digest.to_owned(), all, free)).collect()
    }

    /// Workers that an atespace's actors hold.
    pub fn held_by(&self, atespace: &str) -> usize {
        self.workers.values().filter(|it| it.record.actor.is_some() && it.record.atespace == atespace).count()
    }

    /// Whether a worker that is taken would do if it were free.
    pub fn would_fit(worker: &Worker, need: &Need<'_>) -> bool {
        let pool = if need.pool.is_empty() { DEFAULT_POOL } else { need.pool };
        let class = if need.class.is_empty() { "gvisor" } else { need.class };
        worker.record.alive
            && !worker.record.cordoned
            && worker.offer.pool == pool
            && worker.offer.class == class
            && need.only.is_none_or(|node| worker.record.node == *node)
            && worker.offer.takes(need.snapshot)
    }

    /// Picks a free worker.
    pub fn pick(&self, need: &Need<'_>) -> Result<(WorkerId, NodeName), NoWorker> {
        let pool = if need.pool.is_empty() { DEFAULT_POOL } else { need.pool };
        let class = if need.class.is_empty() { "gvisor" } else { need.class };
        let first = Offer {
            pool: pool.to_owned(),
            class: class.to_owned(),
            runtime_digest: String::new(),
            architecture: String::new(),
            cpu_features: BTreeSet::new(),
            facts: BTreeMap::new(),
            restores_only: false,
        };
        let fitting: Vec<_> = self
            .free
            .range(first..)
            .take_while(|(offer, _)| offer.pool == pool && offer.class == class)
            .filter(|(offer, _)| offer.takes(need.snapshot))
            .map(|(_, workers)| workers)
            .collect();
        let on = |node: &NodeName| {
            [false, true].into_iter().find_map(|unprepared| {
                let from = (unprepared, node.clone(), WorkerId(String::new()));
                let first = fitting.iter().filter_map(|workers| workers.range(&from..).next());
                first.filter(|(is, found, _)| *is == unprepared && found == node).min()
            })
        };
        let picked = match need.only {
            Some(node) => on(node),
            None => need
                .prefer
                .iter()
                .find_map(on)
                .or_else(|| fitting.iter().filter_map(|workers| workers.first()).min()),
        };
        picked
            .map(|(_, node, worker)| (worker.clone(), node.clone()))
            .ok_or_else(|| self.explain(need, pool, class))
    }

    /// Only when there is none: looks at every worker to say why.
    fn explain(&self, need: &Need<'_>, pool: &str, class: &str) -> NoWorker {
        let of_pool: Vec<_> = self
            .workers
            .values()
            .filter(|it| it.offer.pool == pool && it.offer.class == class && it.record.alive)
            .collect();
        if of_pool.is_empty() {
            return NoWorker::None(format!("pool {pool:?} has no live worker of class {class:?}"));
        }
        let open: Vec<_> = of_pool.iter().filter(|it| !it.record.cordoned).collect();
        if open.is_empty() {
            return NoWorker::None(format!("every worker of pool {pool:?} is cordoned"));
        }
        let fit: Vec<_> = open
            .iter()
            .filter(|it| it.offer.takes(need.snapshot))
            .filter(|it| need.only.is_none_or(|node| it.record.node == *node))
            .collect();
        if fit.is_empty() {
            return NoWorker::None(match (need.only, need.snapshot) {
                (Some(node), _) => {
                    format!("its snapshot is only on node {node}, which has no worker for it now")
                }
                (None, Some(needs)) => format!(
                    "no worker of pool {pool:?} can restore its snapshot: it needs runtime {} on {} with every CPU \
                     feature it was made with; start a node that has it, or `reset` the actor (volumes kept, memory \
                     lost)",
                    needs.runtime_digest, needs.architecture
                ),
                (None, None) => format!("no worker of pool {pool:?} fits"),
            });
        }
        let being_freed = fit.iter().any(|it| {
            it.record.actor.is_none()
                && !matches!(
                    it.phase,
                    ateom::slot_status::Phase::Broken | ateom::slot_status::Phase::Unspecified
                )
        });
        NoWorker::Full { pool: pool.to_owned(), workers: fit.len(), being_freed }
    }
}

#[cfg(test)]
mod tests;
