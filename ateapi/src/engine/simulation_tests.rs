// SPDX-License-Identifier: Apache-2.0
//! Random weather: clients and a router use the control plane, while nodes, networks, disks and clocks misbehave and the
//! control plane itself is killed, all drawn from a seed (see `testing::world` and
//! `docs/decisions/2026-11-simulation.md`). P1–P5 are checked all along and when it has cleared up. A failing seed
//! replays exactly: `ATEAPI_SEED=n ATEAPI_SEEDS=1`.
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use substrate_proto::types;

use super::{Answer, CallError, Engine, RequestKey, Verb, lock};
use crate::inventory::{Fate, Inventory};
use crate::model::{Actor, ActorUid, NodeName, Quota, State, TemplateUid};
use crate::node::SharedNode;
use crate::secrets::Sealer;
use crate::store::{self, EventQuery, Kind, MemoryStore, Query, SharedStore, Store as _, StoreError};
use crate::testing::net::{Disk, Far, Link};
use crate::testing::settings;
use crate::testing::stub::{Blobs, StubNode};
use crate::testing::world::{SimClock, World};
use crate::workflow::{FaultPoint, Faults, Injected, Rule, StepName};

const ACTORS: usize = 4;
/// Most actors at once, forks included.
const CROWD: usize = 6;
const CLIENTS: usize = 3;
const STEPS: usize = 24;

/// Crashes and failures at the control plane's own fault points.
struct Mishaps {
    world: Arc<World>,
    undone: Option<Rule>,
}

impl Faults for Mishaps {
    fn hit(&self, point: FaultPoint) -> Injected {
        if self.world.roll(0.002) {
            self.world.note(format_args!("the control plane dies {:?} {:?}", point.when, point.step));
            return Injected::Crash;
        }
        // A checkpoint that fails before it began is one whose sandbox may be gone: the nodes do that themselves.
        let ends_memory = matches!(point.step, StepName::Checkpoint | StepName::CheckpointLive);
        if !ends_memory && self.world.roll(0.01) { Injected::Fail } else { Injected::Nothing }
    }

    fn undoes(&self, rule: Rule) -> bool {
        self.undone == Some(rule)
    }
}

struct Sim {
    world: Arc<World>,
    clock: Arc<SimClock>,
    clocks: Vec<Arc<SimClock>>,
    nodes: Vec<Arc<StubNode>>,
    links: Vec<Arc<Link>>,
    blobs: Arc<Blobs>,
    store: Arc<MemoryStore>,
    faults: Arc<Mishaps>,
    engine: Mutex<Arc<Engine>>,
    uids: Mutex<Vec<ActorUid>>,
    count: AtomicU64,
    swept: AtomicU64,
    /// The template that asks for a golden snapshot.
    golden: OnceLock<TemplateUid>,
    /// Actors that started from it, and calls that a quota refused.
    from_golden: AtomicU64,
    limited: AtomicU64,
}

async fn start(
    world: &Arc<World>,
    store: &Arc<MemoryStore>,
    clock: &Arc<SimClock>,
    links: &[Arc<Link>],
    nodes: &[Arc<StubNode>],
    faults: &Arc<Mishaps>,
) -> Arc<Engine> {
    let disk: SharedStore = Arc::new(Disk { world: Arc::clone(world), store: Arc::clone(store) });
    let clients = nodes
        .iter()
        .zip(links)
        .map(|(node, link)| (NodeName(node.name.clone()), Arc::new(Far(Arc::clone(link))) as SharedNode))
        .collect();
    let sealer = Sealer::with_key([7; 32]);
    let faults = Arc::clone(faults) as Arc<dyn Faults>;
    Engine::start(disk, Arc::clone(clock) as _, sealer, settings(), clients, faults).await.unwrap()
}

impl Sim {
    async fn new(seed: u64, undone: Option<Rule>) -> Arc<Self> {
        let world = World::new(seed);
        let clock = SimClock::new(&world, 0);
        let blobs = Arc::new(Blobs::default());
        let (mut clocks, mut nodes, mut links) = (Vec::new(), Vec::new(), Vec::new());
        for (name, drift) in [("n0", 400), ("n1", -400)] {
            let own = SimClock::new(&world, drift);
            let time = Arc::clone(&own) as _;
            let node = StubNode::within(Some(Arc::clone(&world)), name, 2, Arc::clone(&blobs), time);
            links.push(Link::new(&world, &node));
            nodes.push(node);
            clocks.push(own);
        }
        world.inhabit(&nodes);
        let store = Arc::new(MemoryStore::new());
        let faults = Arc::new(Mishaps { world: Arc::clone(&world), undone });
        let engine = start(&world, &store, &clock, &links, &nodes, &faults).await;
        engine.create_atespace("space", BTreeMap::new()).await.unwrap();
        let sim = Self {
            world,
            clock,
            clocks,
            nodes,
            links,
            blobs,
            store,
            faults,
            engine: Mutex::new(engine),
            uids: Mutex::default(),
            count: AtomicU64::new(0),
            swept: AtomicU64::new(0),
            golden: OnceLock::new(),
            from_golden: AtomicU64::new(0),
            limited: AtomicU64::new(0),
        };
        // Sessions begin.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let main = types::Container {
            name: "main".into(),
            image: "oci:/images/counter".into(),
            ..Default::default()
        };
        let spec = types::TemplateSpec { containers: vec![main], ..Default::default() };
        sim.engine().create_template("space", "t", &spec, BTreeMap::new(), false).await.unwrap();
        let spec = types::TemplateSpec { golden: true, ..spec };
        let golden = sim.engine().create_template("space", "g", &spec, BTreeMap::new(), false).await.unwrap();
        let _ = sim.golden.set(golden.uid);
        for _ in 0..ACTORS {
            sim.create().await;
        }
        Arc::new(sim)
    }

    fn engine(&self) -> Arc<Engine> {
        Arc::clone(&lock(&self.engine))
    }

    fn number(&self) -> u64 {
        self.count.fetch_add(1, Ordering::Relaxed)
    }

    fn pick(&self) -> Option<ActorUid> {
        let uids = lock(&self.uids);
        (!uids.is_empty()).then(|| uids[self.world.below(uids.len())].clone())
    }

    async fn find(&self, uid: &ActorUid) -> Option<Actor> {
        store::load(&*self.store, uid.as_str()).await.unwrap()
    }

    fn key(&self, what: &str) -> RequestKey {
        RequestKey { id: format!("{what}/{}", self.number()), fingerprint: what.to_owned() }
    }

    /// A new control plane over what was committed, after some time without one.
    async fn restart(&self, down: Duration) {
        let old = self.engine();
        old.kill();
        old.stop().await;
        self.world.note(format_args!("no control plane for {down:?}"));
        tokio::time::sleep(down).await;
        let new = start(&self.world, &self.store, &self.clock, &self.links, &self.nodes, &self.faults).await;
        *lock(&self.engine) = new;
    }

    /// Asks as a client does: gives up after some time and asks again with the same id.
    async fn call(
        &self,
        uid: &ActorUid,
        verb: &Verb,
        key: Option<&RequestKey>,
    ) -> Option<Result<Answer, CallError>> {
        for _ in 0..3 {
            let engine = self.engine();
            let patience = self.world.ms(2_000, 60_000);
            let asked = engine.ask(uid, verb.clone(), key.cloned());
            match tokio::time::timeout(patience, asked).await {
                Err(_) | Ok(Err(CallError::Stopping | CallError::Store(StoreError::Io(_)))) => {
                    tokio::time::sleep(self.world.ms(10, 2_000)).await;
                }
                Ok(outcome) => {
                    let said = outcome.as_ref().err().map(ToString::to_string);
                    if matches!(outcome, Err(CallError::Quota(_))) {
                        self.limited.fetch_add(1, Ordering::Relaxed);
                    }
                    self.world.note(format_args!("{uid}: {verb:?}: {said:?}"));
                    return Some(outcome);
                }
            }
        }
        None
    }

    async fn create(&self) {
        let (name, key) = (format!("a{}", self.number()), self.key("create"));
        for _ in 0..5 {
            let template = if self.world.below(3) == 0 { "t" } else { "g" };
            let spec = types::ActorSpec { template: template.into(), ..Default::default() };
            let engine = self.engine();
            match engine.create_actor("space", &name, spec, None, false, Some(key.clone())).await {
                Ok(actor) => return lock(&self.uids).push(actor.uid),
                Err(_) => tokio::time::sleep(self.world.ms(100, 2_000)).await,
            }
        }
    }

    /// One request through the router, answered once a checkpoint that began after it is committed.
    async fn request(&self, uid: &ActorUid) {
        let is_running = async || self.find(uid).await.filter(|actor| actor.state == State::Running);
        if is_running().await.is_none() {
            let _ = self.call(uid, &Verb::Resume { cause: "traffic".into() }, None).await;
        }
        let epoch = self.world.epoch(uid.as_str());
        let Some(actor) = is_running().await else { return };
        let Some(placement) = &actor.placement else { return };
        let Some(node) = self.nodes.iter().find(|node| node.name == placement.node.as_str()) else { return };
        // By now the route may be of the past; what serves is for the slot to say.
        tokio::time::sleep(self.world.delay()).await;
        let (generation, id) = (actor.generation.0, self.number());
        if node.serve(uid.as_str(), generation, id).is_none() {
            return;
        }
        self.world.served(uid.as_str(), generation, id);
        let durable = self.world.below(2) == 0;
        let verb = Verb::Checkpoint { durable, generation, max_heap: 0 };
        if let Some(Ok(answer)) = self.call(uid, &verb, None).await {
            match answer.snapshot {
                Some(snapshot) if snapshot.is_durable() || !durable => {
                    self.world.promised(uid.as_str(), epoch, id);
                }
                // P4: it names what it made, and how durable that is.
                other => self.world.broke(&format!("P4: {uid}: a checkpoint was answered with {other:?}")),
            }
        }
    }

    /// P5: the same call again finds the first one's outcome.
    async fn stop_twice(&self, uid: &ActorUid, verb: Verb) {
        let key = self.key("stop");
        let Some(Ok(first)) = self.call(uid, &verb, Some(&key)).await else { return };
        // One that found the actor asleep already began nothing that could be found again.
        let record = self.store.request(&key.id).await.unwrap();
        let made = first.snapshot.as_ref().map(|it| it.id.0.clone());
        let began = record.is_some_and(|record| Some(record.outcome) == made);
        let Some(Ok(second)) = self.call(uid, &verb, Some(&key)).await else { return };
        let (Some(first), Some(second)) = (first.snapshot, second.snapshot) else { return };
        let known = self.find(uid).await.is_some_and(|actor| actor.snapshot(&first.id).is_some());
        if known && began && first.id != second.id {
            self.world.broke(&format!("P5: {uid}: {} and then {} for one request", first.id, second.id));
        }
    }

    async fn fork(&self, uid: &ActorUid) {
        let name = format!("f{}", self.number());
        let verb = Verb::Fork { name, snapshot: String::new() };
        let key = self.key("fork");
        let Some(Ok(first)) = self.call(uid, &verb, Some(&key)).await else { return };
        let known = self.find(&first.actor.uid).await.is_some();
        let again = self.call(uid, &verb, Some(&key)).await;
        match again {
            Some(Ok(second)) if known && second.actor.uid != first.actor.uid => {
                self.world.broke(&format!("P5: {uid} was forked twice for one request"));
            }
            _ => {}
        }
        lock(&self.uids).push(first.actor.uid);
    }

    async fn one_call(&self) {
        let Some(uid) = self.pick() else { return self.create().await };
        let by = "user".to_owned();
        let crowd = lock(&self.uids).len();
        match self.world.below(24) {
            0..=1 => {
                let _ = self.call(&uid, &Verb::Resume { cause: by }, None).await;
            }
            2..=4 => {
                self.stop_twice(&uid, Verb::Suspend { by, only_if_idle: false, drain_ms: 0 }).await;
            }
            5 => {
                let promote_after = Some(self.world.ms(1_000, 20_000));
                self.stop_twice(&uid, Verb::Pause { by, only_if_idle: false, drain_ms: 0, promote_after })
                    .await;
            }
            6 => {
                let _ = self.call(&uid, &Verb::Promote, None).await;
            }
            7 => {
                self.world.gives_up(uid.as_str());
                let _ = self.call(&uid, &Verb::Reset, Some(&self.key("reset"))).await;
            }
            8 => {
                let Some(actor) = self.find(&uid).await else { return };
                let Some(snapshot) = actor.snapshots.first().map(|it| it.id.0.clone()) else { return };
                self.world.gives_up(uid.as_str());
                let _ = self.call(&uid, &Verb::Revert { snapshot }, Some(&self.key("revert"))).await;
                self.world.gives_up(uid.as_str());
            }
            9 if crowd < CROWD => self.fork(&uid).await,
            10 if crowd > 2 => {
                self.world.gives_up(uid.as_str());
                lock(&self.uids).retain(|it| *it != uid);
                let _ = self.call(&uid, &Verb::Delete, None).await;
                self.create().await;
            }
            11 => {
                let tag = Verb::Tag { snapshot: String::new(), tag: "keep".into() };
                let _ = self.call(&uid, &tag, None).await;
            }
            _ => self.request(&uid).await,
        }
    }

    /// One thing goes wrong.
    async fn weather(self: &Arc<Self>) {
        let at = self.world.below(self.nodes.len());
        let (node, link) = (Arc::clone(&self.nodes[at]), Arc::clone(&self.links[at]));
        let copies = node.copies();
        let victim =
            (!copies.is_empty()).then(|| copies[self.world.below(copies.len())].assignment.actor_uid.clone());
        let jump = self.world.ms(0, 7_200_000).as_millis() as i64 - 3_600_000;
        match self.world.below(17) {
            0..=1 => {
                if let Some(uid) = victim {
                    self.world.note(format_args!("the worker of {uid} dies"));
                    node.kill_worker_of(&uid);
                }
            }
            2 => {
                if let Some(uid) = victim {
                    self.world.note(format_args!("{uid} exits"));
                    node.exit(&uid, 1);
                }
            }
            3 => {
                self.world.note(format_args!("{} reboots", node.name));
                node.reboot();
            }
            4 => {
                self.world.note(format_args!("the agent of {} starts anew", node.name));
                node.restart_agent();
            }
            5..=7 => {
                let time = self.world.ms(500, 90_000);
                link.cut(true);
                tokio::spawn(async move {
                    tokio::time::sleep(time).await;
                    link.cut(false);
                });
            }
            8 => self.clock.jump(jump),
            9 => self.clocks[at].jump(jump),
            10 => {
                let down = if self.world.below(4) == 0 { 90_000 } else { 3_000 };
                self.restart(self.world.ms(10, down)).await;
            }
            11..=12 => node.evict(),
            13 => node.rot(),
            14 => {
                let quota = match self.world.below(5) {
                    0 => Quota { actors: 3, ..Quota::default() },
                    1 => Quota { running: 1, ..Quota::default() },
                    2 => Quota { snapshot_bytes: 300, ..Quota::default() },
                    3 => Quota { wakeups_per_s: 1, ..Quota::default() },
                    _ => Quota::default(),
                };
                self.limit(quota).await;
            }
            _ => {}
        }
        if self.engine().dead.is_cancelled() {
            self.restart(self.world.ms(10, 3_000)).await;
        }
    }

    async fn limit(&self, quota: Quota) {
        let outcome = self.engine().set_quota("space", quota).await;
        self.world.note(format_args!("{quota:?}: {:?}", outcome.err().map(|error| error.to_string())));
    }

    /// What is counted for quotas is what there is.
    async fn check_usage(&self) -> Result<(), String> {
        let actors: Vec<Actor> = store::list_all(&*self.store, Query::all(Kind::Actor)).await.unwrap();
        let usage = self.store.usage("space").await.unwrap();
        let bytes = actors.iter().map(Actor::snapshot_bytes).sum::<u64>();
        let is = (actors.len() as u64, bytes);
        if (usage.actors, usage.bytes) != is {
            return Err(format!("quotas count {usage:?}, and there is {is:?}"));
        }
        Ok(())
    }

    /// The golden snapshot is there once nothing is in its way, and whole.
    async fn check_golden(&self) -> Result<(), String> {
        let template = self.golden.get().ok_or("no golden template")?;
        for _ in 0..600 {
            if self.engine().golden_status(template).iter().any(|golden| golden.state == "READY") {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Err(format!("P5: no golden snapshot: {:?}", self.engine().golden_status(template)))
    }

    /// Of actors, and of makers of golden snapshots.
    async fn records(&self) -> Vec<Actor> {
        let mut actors = store::list_all(&*self.store, Query::all(Kind::Actor)).await.unwrap();
        actors.extend(store::list_all::<Actor>(&*self.store, Query::all(Kind::Golden)).await.unwrap());
        actors
    }

    /// P2: what records name is there.
    async fn check_references(&self) {
        let actors = self.records().await;
        for actor in actors.iter().filter(|actor| actor.state != State::Deleting) {
            for snapshot in &actor.snapshots {
                let id = &snapshot.id;
                if snapshot.is_durable() {
                    let directory = format!("{}/{}-{id}", snapshot.origin, snapshot.generation);
                    if !self.blobs.is_whole(&directory) {
                        self.world.broke(&format!(
                            "P2: {} names {directory}, which is not whole in the store",
                            actor.uid
                        ));
                    }
                } else if let Some(name) = &snapshot.node {
                    let node = self.nodes.iter().find(|node| node.name == name.as_str());
                    if !node.is_some_and(|node| node.has_snapshot(snapshot.origin.as_str(), id.as_str())) {
                        self.world.broke(&format!("P2: the only copy of {id} of {} is gone", actor.uid));
                    }
                }
            }
        }
    }

    /// What is checked while it goes on.
    async fn check(&self) -> Result<(), String> {
        self.world.check_copies();
        self.check_references().await;
        self.world.verdict().map_or(Ok(()), Err)
    }

    /// It has cleared up: everything comes to rest, and a verb leads on from wherever it rests (P3).
    async fn conclude(self: &Arc<Self>) -> Result<(), String> {
        for link in &self.links {
            link.cut(false);
        }
        self.restart(Duration::from_millis(100)).await;
        // Messages that are under way arrive; sessions begin anew, leases are granted again.
        tokio::time::sleep(Duration::from_mins(1)).await;
        self.limit(Quota::default()).await;
        let mut tries = 0;
        while self.engine().drivers() > 0 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            tries += 1;
            if tries == 300 {
                return Err("P5: something is in progress for ever".to_owned());
            }
        }
        self.check().await?;
        // Also those of whose creation no client ever heard.
        let actors: Vec<Actor> = store::list_all(&*self.store, Query::all(Kind::Actor)).await.unwrap();
        let golden = |actor: &&Actor| actor.snapshots.iter().any(|snapshot| snapshot.cause == "golden");
        self.from_golden.fetch_add(actors.iter().filter(golden).count() as u64, Ordering::Relaxed);
        let uids: Vec<ActorUid> = actors.into_iter().map(|actor| actor.uid).collect();
        for uid in &uids {
            let Some(actor) = self.find(uid).await else { continue };
            let what = format!("{uid} is {} ({} {})", actor.state, actor.reason, actor.message);
            let moving = [State::Resuming, State::Suspending, State::Pausing, State::Deleting];
            if moving.contains(&actor.state) {
                return Err(format!("P5: {what}, and nothing is in progress"));
            }
            let copies = self.nodes.iter().filter(|node| node.copy_of(uid.as_str()).is_some()).count();
            if (copies == 1) != (actor.state == State::Running) {
                return Err(format!("P3: {what}, with {copies} copies"));
            }
        }
        // A verb leads on from each, one after the other: there are fewer workers than actors.
        let engine = self.engine();
        let suspend = Verb::Suspend { by: "user".into(), only_if_idle: false, drain_ms: 0 };
        for uid in &uids {
            if self.find(uid).await.is_some_and(|actor| actor.state == State::Running) {
                let slept = engine.ask(uid, suspend.clone(), None).await;
                slept.map_err(|error| format!("P3: {uid} cannot be suspended: {error}"))?;
            }
        }
        for uid in &uids {
            let Some(actor) = self.find(uid).await else { continue };
            let verb = match actor.state {
                State::Crashed | State::Exited => Verb::Reset,
                _ => Verb::Resume { cause: "user".into() },
            };
            for verb in [verb, suspend.clone()] {
                if let Err(error) = engine.ask(uid, verb.clone(), None).await {
                    let now = self.find(uid).await.map(|actor| actor.state);
                    return Err(format!(
                        "P3: {verb:?} of {uid}, which was {}: {error}; now {now:?}",
                        actor.state
                    ));
                }
            }
        }
        for uid in self.world.regressed() {
            let query = EventQuery { limit: 10_000, ..EventQuery::default() };
            let said = ["RolledBack", "Crashed", "Exited", "Reverted", "Resetting", "SnapshotLost"];
            let events = self.store.events(&query).await.unwrap();
            if !events.iter().any(|(_, it)| it.subject_uid == uid && said.contains(&it.reason.as_str())) {
                return Err(format!("P4: {uid} went back, and no event says so"));
            }
        }
        self.check_usage().await?;
        // Everybody sleeps: workers are free for the maker.
        self.check_golden().await?;
        let booked: usize = self
            .nodes
            .iter()
            .map(|node| lock(&self.engine().pool).assignments(&node.name.as_str().into()).len())
            .sum();
        let held: usize = self.nodes.iter().map(|node| node.held()).sum();
        if booked + held > 0 {
            return Err(format!("{booked} workers and {held} copies leaked"));
        }
        self.check().await
    }

    /// `substrate gc`, which takes its time between listing, reading the records and deleting.
    async fn sweep(&self) {
        let listed = self.blobs.manifests();
        tokio::time::sleep(self.world.ms(0, 5_000)).await;
        // The references are read later than the records here, which can only show more of them.
        let actors = self.records().await;
        let (refs, garbage) = self.store.blobs();
        let inventory = Inventory::new(actors, refs, garbage);
        tokio::time::sleep(self.world.ms(0, 5_000)).await;
        for manifest in listed {
            if inventory.fate(&format!("actors/{manifest}/manifest")) == Fate::Orphan {
                self.world.note(format_args!("swept {manifest}"));
                self.blobs.delete(&manifest);
                self.swept.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    async fn run(self: &Arc<Self>) -> Result<(), String> {
        self.world.set_calm(false);
        let sim = Arc::clone(self);
        let sweeper = tokio::spawn(async move {
            while !sim.world.is_calm() {
                sim.sweep().await;
            }
        });
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                let sim = Arc::clone(self);
                tokio::spawn(async move {
                    while !sim.world.is_calm() {
                        tokio::time::sleep(sim.world.ms(10, 3_000)).await;
                        sim.one_call().await;
                    }
                })
            })
            .collect();
        for _ in 0..STEPS {
            self.weather().await;
            tokio::time::sleep(self.world.ms(100, 8_000)).await;
            self.check().await?;
        }
        self.world.set_calm(true);
        if self.engine().dead.is_cancelled() {
            self.restart(Duration::from_millis(100)).await;
        }
        for client in clients {
            let ended = tokio::time::timeout(Duration::from_mins(20), client).await;
            ended.map_err(|_| "a call is never answered".to_owned())?.map_err(|error| error.to_string())?;
        }
        let ended = tokio::time::timeout(Duration::from_mins(1), sweeper).await;
        ended.map_err(|_| "a sweep never ends".to_owned())?.map_err(|error| error.to_string())?;
        self.conclude().await
    }
}

/// What a seed led to: the digest of all that happened, how many answers had to be kept, how many orphans were
/// swept, actors came from the golden snapshot and calls were refused by a quota, and what broke.
struct Run {
    digest: u64,
    promises: usize,
    swept: u64,
    from_golden: u64,
    limited: u64,
    outcome: Result<(), String>,
}

/// Each seed has a runtime of its own, so that nothing of an earlier one (the phase of its timers) is left in it.
fn simulate(seed: u64, undone: Option<Rule>) -> Run {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let sim = Sim::new(seed, undone).await;
        let outcome = sim.run().await;
        sim.engine().kill();
        let outcome = outcome.map_err(|what| {
            let trace = if sim.world.verdict().is_some() { String::new() } else { sim.world.last() };
            format!("seed {seed} (replay: ATEAPI_SEED={seed} ATEAPI_SEEDS=1): {what}\n{trace}")
        });
        let [swept, from_golden, limited] =
            [&sim.swept, &sim.from_golden, &sim.limited].map(|count| count.load(Ordering::Relaxed));
        let promises = sim.world.promises();
        Run { digest: sim.world.digest(), promises, swept, from_golden, limited, outcome }
    })
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn random_weather() {
    let first = number("ATEAPI_SEED", 0);
    let (mut promises, mut swept, mut failed) = (0, 0, Vec::new());
    let (mut from_golden, mut limited) = (0, 0);
    for seed in first..first + number("ATEAPI_SEEDS", 300) {
        let run = simulate(seed, None);
        promises += run.promises;
        swept += run.swept;
        from_golden += run.from_golden;
        limited += run.limited;
        failed.extend(run.outcome.err());
    }
    assert!(failed.is_empty(), "{} seeds failed:\n{}", failed.len(), failed.join("\n\n"));
    assert!(promises > 0, "nothing was answered, so nothing was checked");
    assert!(swept > 0, "nothing was ever swept");
    assert!(from_golden > 0, "nothing ever started from a golden snapshot");
    assert!(limited > 0, "no quota ever refused a call");
}

#[test]
fn a_seed_replays_exactly() {
    for seed in 0..5 {
        let (first, again) = (simulate(seed, None), simulate(seed, None));
        assert_eq!(first.digest, again.digest, "seed {seed} did not happen the same way twice");
    }
    assert_ne!(simulate(0, None).digest, simulate(1, None).digest);
}

#[test]
fn an_undone_rule_is_noticed() {
    for (rule, promise) in [(Rule::DropAfterDurable, "P2"), (Rule::WaitForTheLease, "P1")] {
        let found = (0..60).find_map(|seed| simulate(seed, Some(rule)).outcome.err());
        let found = found.unwrap_or_else(|| panic!("{rule:?} was undone, and no seed noticed"));
        assert!(found.contains(promise), "{rule:?}: {found}");
    }
}
