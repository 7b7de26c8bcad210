// SPDX-License-Identifier: Apache-2.0
//! The engine: what the service, the drivers and the node sessions share.
//!
//! Who owns what: an actor's record is written by its driver alone (created by `create`); the pool, the trackers of
//! running actors and the timers are each behind one lock that is never held across an await; a node's lease is its
//! session's. Lock order: registry, then any other, never two others.
mod admit;
mod background;
mod commit;
#[cfg(test)]
mod crash_tests;
mod create;
mod driver;
mod error;
mod fork;
mod golden;
#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod loss_tests;
mod lost;
#[cfg(test)]
mod policy_tests;
mod quota;
mod registry;
mod signal;
#[cfg(test)]
mod simulation_tests;
mod templates;
#[cfg(test)]
mod tests;
mod timers;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use substrate_proto::{atelet, ateom, types};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

pub(crate) use admit::has_labels;
pub use error::CallError;
pub use quota::QuotaExceeded;
pub(crate) use signal::Signal;

use crate::Clock;
use crate::idle::{Decision, Policy, Tracker};
use crate::model::{
    Actor, ActorUid, Atespace, Exit, Generation, NodeName, NodeRecord, Snapshot, WorkerId, WorkerRecord,
};
use crate::node::SharedNode;
use crate::schedule::Pool;
use crate::secrets::Sealer;
use crate::store::{self, Kind, Query, SharedStore, StoreError};
use crate::workflow::Faults;

/// How long requests in flight may end when a caller does not say, ms.
pub(crate) const DEFAULT_DRAIN_MS: u32 = 2_000;

/// What the engine is told.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Settings {
    pub lease_term: Duration,
    pub lease_margin: Duration,
    pub idle_suspend_after: Option<Duration>,
    pub evict_after: Option<Duration>,
    pub place_wait: Duration,
    pub changelog_keep: u64,
    pub events_keep: u64,
    pub calls_per_actor: usize,
}

impl From<&crate::Config> for Settings {
    fn from(config: &crate::Config) -> Self {
        let some = |ms: u64| Some(Duration::from_millis(ms)).filter(|_| ms > 0);
        Self {
            lease_term: config.lease_term(),
            lease_margin: config.lease_margin(),
            idle_suspend_after: some(config.idle_suspend_after_ms),
            evict_after: some(config.evict_after_ms),
            place_wait: Duration::from_millis(config.place_wait_ms),
            changelog_keep: config.changelog_keep,
            events_keep: config.events_keep,
            calls_per_actor: config.calls_per_actor,
        }
    }
}

/// What is asked of an actor.
#[derive(Debug, Clone)]
pub(crate) enum Verb {
    Resume { cause: String },
    Reset,
    Suspend { by: String, only_if_idle: bool, drain_ms: u32 },
    Pause { by: String, only_if_idle: bool, drain_ms: u32, promote_after: Option<Duration> },
    Promote,
    Checkpoint { durable: bool, generation: u64, max_heap: u64 },
    Revert { snapshot: String },
    Fork { name: String, snapshot: String },
    Delete,
    Update(Box<Update>),
    Tag { snapshot: String, tag: String },
    Untag { tag: String },
    Bind { generation: u64, name: String },
    NodeLost { node: NodeName, message: String },
}

/// What an update replaces.
#[derive(Debug, Clone, Default)]
pub(crate) struct Update {
    pub(crate) labels: Option<BTreeMap<String, String>>,
    pub(crate) annotations: Option<BTreeMap<String, String>>,
    pub(crate) idle: Option<types::IdlePolicy>,
    pub(crate) egress: Option<types::EgressPolicy>,
}

/// What a call ends with.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) actor: Actor,
    pub(crate) snapshot: Option<Snapshot>,
    pub(crate) steps: Vec<substrate_proto::ateapi::Step>,
    pub(crate) was_running: bool,
    pub(crate) name: Option<substrate_proto::ateapi::EgressName>,
}

pub(crate) type Reply = oneshot::Sender<Result<Answer, CallError>>;

/// A request id with the digest of what was asked.
#[derive(Debug, Clone)]
pub(crate) struct RequestKey {
    pub(crate) id: String,
    pub(crate) fingerprint: String,
}

/// A verb on its way.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) verb: Verb,
    pub(crate) request: Option<RequestKey>,
    pub(crate) reply: Reply,
    /// Resumes that were tried again on another worker.
    pub(crate) tries: u8,
    /// Waits for the present snapshot to be durable first.
    pub(crate) after_upload: bool,
}

/// What a node tells of an assignment.
#[derive(Debug, Clone)]
pub(crate) enum News {
    /// The worker died and is fenced, or its lease ended with the margin.
    Lost { generation: Generation, message: String },
    /// The workload ended by itself.
    Exited { generation: Generation, exit: Exit },
    /// After a session began: whether its slot is there at all and holds the assignment.
    Reported {
        generation: Generation,
        slot_is_there: bool,
        holds_it: bool,
        ingress_endpoint: String,
        /// On the engine's clock: what began to run later is not in the report.
        begun: Duration,
    },
}

/// What a driver is sent.
#[derive(Debug)]
pub(crate) enum Command {
    Call(Call),
    News(News),
    Progress {
        generation: Generation,
        step: String,
        percent: u32,
    },
    /// Look at the record: something may be due.
    Wake,
}

/// Whether a node can be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Link {
    Down,
    Up,
    /// Silent for longer than its lease and the margin: nothing runs there.
    Lost(String),
}

/// A node and its lease.
pub(crate) struct NodeHandle {
    pub(crate) name: NodeName,
    pub(crate) client: SharedNode,
    pub(crate) link: Signal<Link>,
    /// What its latest session is called; starts that are sent name it.
    pub(crate) session: Mutex<String>,
    /// On the engine's clock: nothing that was granted reaches beyond it.
    pub(crate) lease_until: Mutex<Duration>,
    /// Tells the session that the lease moved.
    pub(crate) lease_moved: Notify,
}

impl NodeHandle {
    /// To end what an assignment runs there, in the session that stands.
    pub(crate) fn release_request(&self, assignment: types::Assignment) -> atelet::ReleaseRequest {
        atelet::ReleaseRequest { assignment: Some(assignment), session: lock(&self.session).clone() }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.link.read(|link| *link == Link::Up)
    }

    /// Waits until it can be asked, or is lost.
    pub(crate) async fn reachable(&self) -> Result<(), String> {
        let state = |link: &Link| match link {
            Link::Down => None,
            Link::Up => Some(Ok(())),
            Link::Lost(message) => Some(Err(message.clone())),
        };
        self.link.wait_for(state).await
    }

    pub(crate) fn lease_until(&self) -> Duration {
        *lock(&self.lease_until)
    }

    pub(crate) fn extend_lease(&self, until: Duration) {
        let mut lease = lock(&self.lease_until);
        *lease = (*lease).max(until);
        drop(lease);
        self.lease_moved.notify_one();
    }
}

/// What is known of a running actor beyond its record.
pub(crate) struct Live {
    pub(crate) generation: Generation,
    /// On the engine's clock: when its record said so first, as far as this process knows.
    pub(crate) since: Duration,
    pub(crate) policy: Policy,
    pub(crate) tracker: Option<Tracker>,
    /// A stop was asked for and is not decided yet.
    pub(crate) asked: bool,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing behind these locks is left half-changed by a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the module.
pub struct Engine {
    pub(crate) store: SharedStore,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) sealer: Sealer,
    pub(crate) settings: Settings,
    pub(crate) faults: Arc<dyn Faults>,
    pub(crate) nodes: BTreeMap<NodeName, Arc<NodeHandle>>,
    pub(crate) pool: Mutex<Pool>,
    pub(crate) quotas: Mutex<quota::Quotas>,
    goldens: Mutex<golden::Goldens>,
    golden_wanted: Notify,
    pub(crate) pool_changed: Notify,
    pub(crate) live: Mutex<HashMap<ActorUid, Live>>,
    pub(crate) dirty_workers: Mutex<BTreeSet<WorkerId>>,
    pub(crate) workers_changed: Notify,
    pub(crate) timers: Mutex<timers::Timers>,
    pub(crate) timers_changed: Notify,
    pub(crate) garbage_added: Notify,
    pub(crate) collecting: tokio::sync::Mutex<()>,
    drivers: Mutex<HashMap<ActorUid, mpsc::Sender<Command>>>,
    tasks: tokio_util::task::TaskTracker,
    /// Ends everything; nothing is committed afterwards.
    pub(crate) dead: CancellationToken,
}

impl Engine {
    /// Takes up where the store stands: books what holds a worker, starts a driver for whatever is in progress, then
    /// opens the sessions. Nothing is granted before everything is booked, so that no lease names too few.
    pub async fn start(
        store: SharedStore,
        clock: Arc<dyn Clock>,
        sealer: Sealer,
        settings: Settings,
        nodes: Vec<(NodeName, SharedNode)>,
        faults: Arc<dyn Faults>,
    ) -> Result<Arc<Self>, StoreError> {
        let now = clock.now();
        let mut handles = BTreeMap::new();
        for (name, client) in nodes {
            let record: Option<NodeRecord> = store::load(&*store, name.as_str()).await?;
            // The last grant may have been given just before the stop, on a clock that is not ours: assume so.
            let until = record.map_or(now, |record| now + Duration::from_millis(record.term_ms));
            let handle = NodeHandle {
                name: name.clone(),
                client,
                link: Signal::new(Link::Down),
                lease_until: Mutex::new(until),
                session: Mutex::default(),
                lease_moved: Notify::new(),
            };
            handles.insert(name, Arc::new(handle));
        }
        let mut pool = Pool::default();
        for record in store::list_all::<WorkerRecord>(&*store, Query::all(Kind::Worker)).await? {
            pool.remember(record);
        }
        let mut quotas = quota::Quotas::default();
        for atespace in store::list_all::<Atespace>(&*store, Query::all(Kind::Atespace)).await? {
            quotas.set(&atespace.name, atespace.quota, now);
        }
        let mut query = Query::all(Kind::Actor);
        query.busy = true;
        let mut unsettled: Vec<Actor> = store::list_all(&*store, query.clone()).await?;
        query.kind = Kind::Golden;
        unsettled.extend(store::list_all::<Actor>(&*store, query).await?);
        for actor in &unsettled {
            if let (Some(placement), Some(assignment)) = (&actor.placement, actor.assignment()) {
                pool.assign(&placement.node, &assignment);
            }
        }
        let engine = Arc::new(Self {
            store,
            clock,
            sealer,
            settings,
            faults,
            nodes: handles,
            pool: Mutex::new(pool),
            quotas: Mutex::new(quotas),
            goldens: Mutex::default(),
            golden_wanted: Notify::new(),
            pool_changed: Notify::new(),
            live: Mutex::default(),
            dirty_workers: Mutex::default(),
            workers_changed: Notify::new(),
            timers: Mutex::default(),
            timers_changed: Notify::new(),
            garbage_added: Notify::new(),
            collecting: tokio::sync::Mutex::default(),
            drivers: Mutex::default(),
            tasks: tokio_util::task::TaskTracker::new(),
            dead: CancellationToken::new(),
        });
        for actor in &unsettled {
            engine.note_live(actor);
            engine.note_timer(actor);
            if crate::workflow::next(actor).is_some() || actor.owed_upload().is_some() {
                engine.tell(&actor.uid, Command::Wake);
            }
        }
        engine.spawn_background();
        for node in engine.nodes.values() {
            engine.spawn(crate::node::session::run(Arc::clone(&engine), Arc::clone(node)));
        }
        Ok(engine)
    }

    /// Ends without another commit, as a crash would. For tests of recovery; `stop` is for people.
    pub fn kill(&self) {
        self.dead.cancel();
    }

    /// Ends and waits until every task has.
    pub async fn stop(&self) {
        self.dead.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    pub(crate) fn spawn(self: &Arc<Self>, task: impl Future<Output = ()> + Send + 'static) {
        let dead = self.dead.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = dead.cancelled() => {}
                () = task => {}
            }
        });
    }

    pub(crate) fn node(&self, name: &NodeName) -> Option<Arc<NodeHandle>> {
        self.nodes.get(name).cloned()
    }

    /// Waits on the engine's clock; for backoffs.
    pub(crate) async fn pause(&self, time: Duration) {
        self.clock.sleep_until(self.clock.now() + time).await;
    }

    /// The lease term to start an assignment under, ms; nothing is granted beyond what is booked here.
    pub(crate) fn lease_for_activation(&self, node: &NodeHandle) -> u64 {
        node.extend_lease(self.clock.now() + self.settings.lease_term);
        self.settings.lease_term.as_millis() as u64
    }

    /// The files of an actor, opened.
    pub(crate) async fn files_of(&self, uid: &ActorUid) -> Result<Vec<types::File>, CallError> {
        match self.store.sealed(uid.as_str()).await? {
            None => Ok(Vec::new()),
            Some(sealed) => Ok(self.sealer.unseal(uid.as_str(), &sealed)?),
        }
    }

    /// Tells waiting placements and watchers that workers changed.
    pub(crate) fn pool_touched(&self, workers: impl IntoIterator<Item = WorkerId>) {
        lock(&self.dirty_workers).extend(workers);
        self.workers_changed.notify_one();
        self.pool_changed.notify_waiters();
    }

    /// Follows a record into or out of the set of running actors.
    pub(crate) fn note_live(&self, actor: &Actor) {
        let mut live = lock(&self.live);
        if actor.state == crate::model::State::Running {
            let policy = Policy::read(&actor.idle, self.settings.idle_suspend_after);
            let (generation, since) = (actor.generation, self.clock.now());
            let new = || Live { generation, since, policy, tracker: None, asked: false };
            let entry = live.entry(actor.uid.clone()).or_insert_with(new);
            if entry.generation != actor.generation {
                *entry = new();
            }
            entry.policy = policy;
        } else {
            live.remove(&actor.uid);
        }
    }

    /// Whether a running actor has been asked to stop and that is not decided yet.
    pub(crate) fn is_asked(&self, uid: &ActorUid) -> bool {
        lock(&self.live).get(uid).is_some_and(|live| live.asked)
    }

    /// Whether a running actor has been running since before a moment.
    pub(crate) fn ran_before(&self, uid: &ActorUid, moment: Duration) -> bool {
        lock(&self.live).get(uid).is_none_or(|live| live.since < moment)
    }

    /// A stop that was asked for idleness was refused: quiet begins anew.
    pub(crate) fn disturb(&self, uid: &ActorUid) {
        if let Some(live) = lock(&self.live).get_mut(uid) {
            live.asked = false;
            if let Some(tracker) = &mut live.tracker {
                tracker.disturb();
            }
        }
        // Whoever waits for the worker that this was to free looks for another.
        self.pool_changed.notify_waiters();
    }

    /// Takes a count in and puts what is idle to sleep.
    pub(crate) fn on_stats(
        self: &Arc<Self>,
        uid: &ActorUid,
        generation: Generation,
        stats: ateom::Stats,
        now_ns: i64,
    ) {
        let decision = {
            let mut all = lock(&self.live);
            let Some(live) = all.get_mut(uid).filter(|live| live.generation == generation) else { return };
            match &mut live.tracker {
                Some(tracker) => tracker.observe(stats, now_ns),
                none => *none = Some(Tracker::new(stats, now_ns)),
            }
            let decision =
                live.tracker.as_ref().map_or(Decision::Stay, |tracker| tracker.decide(live.policy));
            if live.asked || decision == Decision::Stay {
                return;
            }
            live.asked = true;
            decision
        };
        let by = "idle".to_owned();
        let verb = match decision {
            Decision::Stay => return,
            Decision::Suspend => Verb::Suspend { by, only_if_idle: true, drain_ms: 0 },
            Decision::Pause { promote_after } => {
                Verb::Pause { by, only_if_idle: true, drain_ms: 0, promote_after: Some(promote_after) }
            }
        };
        self.ask_quietly(uid, verb);
    }

    /// Memory of a running actor, bytes, and its processes, as last counted.
    pub(crate) fn counted(&self, uid: &ActorUid) -> Option<(u64, u32)> {
        let live = lock(&self.live);
        let stats = &live.get(uid)?.tracker.as_ref()?.stats;
        Some((stats.memory_bytes, stats.processes))
    }

    /// A worker as it was recorded, with what is only known now.
    pub(crate) fn worker_of(&self, record: WorkerRecord) -> crate::schedule::Worker {
        lock(&self.pool).dress(record)
    }
}
