// SPDX-License-Identifier: Apache-2.0
//! A node that keeps fake actors: memory is a number, a snapshot is a copy of it, the blob store is a map. It keeps the
//! contract of `atelet.proto`, and remembers enough to check the promises: which copies ever ran at once, what was
//! uploaded, which snapshot holds what. In a [`World`] its work takes time and may fail half-way.
mod serve;

pub use serve::Stub;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use substrate_proto::atelet::session_event::Event as Said;
use substrate_proto::{atelet, ateom, types};
use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::world::World;
use crate::Clock;

/// One running copy.
#[derive(Debug, Clone)]
pub struct Copy {
    pub assignment: types::Assignment,
    /// What only its memory holds: a count, and which requests it has taken.
    pub memory: u64,
    pub log: Vec<u64>,
    /// A checkpoint that will end it has closed the gate.
    stopping: bool,
    pub clone: bool,
    pub identity: BTreeMap<String, Vec<u8>>,
    pub files: Vec<types::File>,
    /// On the stub's clock: past it the copy is frozen.
    deadline: Duration,
    /// Last lease request that had been sent when it was activated.
    since: u64,
}

#[derive(Debug, Clone)]
struct Saved {
    snapshot: atelet::NodeSnapshot,
    memory: u64,
    log: Vec<u64>,
    /// Its bytes changed on the disk.
    rotten: bool,
}

#[derive(Debug, Default)]
struct Slot {
    copy: Option<Copy>,
    dead: bool,
}

#[derive(Default)]
struct Inner {
    down: bool,
    slots: BTreeMap<String, Slot>,
    snapshots: BTreeMap<(String, String), Saved>,
    droppable: BTreeSet<(String, String)>,
    sessions: Vec<mpsc::Sender<Result<atelet::SessionEvent, Status>>>,
    /// What the session that stands is called.
    session: String,
    failures: HashMap<&'static str, VecDeque<Status>>,
    calls: HashMap<&'static str, usize>,
    purged: Vec<String>,
    highest: HashMap<String, u64>,
    /// Generations whose release was asked for: a late start of theirs is refused.
    ended: HashMap<String, u64>,
    /// Checkpoints that were refused: a duplicate that comes late is refused as well.
    refused: BTreeSet<(String, String)>,
    /// When each checkpoint began, by snapshot id.
    begun: Vec<(String, Duration)>,
    /// What was granted last, for activations.
    granted: Duration,
    requests: HashMap<u64, Duration>,
    sequence: u64,
    boot: u64,
    /// Raised when the agent or the machine starts anew: whatever it was doing ends.
    epoch: u64,
    losses: BTreeMap<String, atelet::WorkerLost>,
    tells_losses: bool,
}

/// What a manifest holds.
#[derive(Debug, Clone)]
struct Stored {
    memory: u64,
    log: Vec<u64>,
    packs: Vec<String>,
}

#[derive(Default)]
struct Shelf {
    /// By "uid/generation-snapshot".
    manifests: BTreeMap<String, Stored>,
    packs: BTreeSet<String>,
}

/// The blob store, shared by nodes. A manifest appears whole or not at all; its packs are there before it.
#[derive(Default)]
pub struct Blobs(Mutex<Shelf>);

impl Blobs {
    /// A manifest that nobody uploaded.
    #[cfg(feature = "testing")]
    pub fn insert(&self, directory: String) {
        let nothing = Stored { memory: 0, log: Vec::new(), packs: Vec::new() };
        lock(&self.0).manifests.insert(directory, nothing);
    }

    pub fn manifests(&self) -> Vec<String> {
        lock(&self.0).manifests.keys().cloned().collect()
    }

    /// What `substrate gc` does to an orphan.
    pub fn delete(&self, manifest: &str) {
        lock(&self.0).manifests.remove(manifest);
    }

    /// Whether a manifest is there with every pack it names.
    pub fn is_whole(&self, directory: &str) -> bool {
        let shelf = lock(&self.0);
        shelf
            .manifests
            .get(directory)
            .is_some_and(|stored| stored.packs.iter().all(|pack| shelf.packs.contains(pack)))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the module.
pub struct StubNode {
    pub name: String,
    inner: Mutex<Inner>,
    blobs: Arc<Blobs>,
    clock: Arc<dyn Clock>,
    /// Methods that are held until they are let go.
    held: watch::Sender<BTreeSet<&'static str>>,
    /// Counts every call, for tests that wait for one.
    pub seen: watch::Sender<usize>,
    lease_every: Duration,
    world: Option<Arc<World>>,
}

impl Inner {
    fn restart_agent(&mut self) {
        self.epoch += 1;
        self.sessions.clear();
        self.session.clear();
        self.requests.clear();
        self.granted = Duration::ZERO;
        self.refused.clear();
        for slot in self.slots.values_mut() {
            if let Some(copy) = &mut slot.copy {
                copy.stopping = false;
            }
        }
    }
}

/// A snapshot's copy that is missing or damaged.
pub fn corrupt(source: &str) -> Status {
    let metadata = [("source".to_owned(), source.to_owned())];
    let details = tonic_types::ErrorDetails::with_error_info("SNAPSHOT_CORRUPT", "substrate", metadata);
    let message = "pages.img: digest differs";
    <Status as tonic_types::StatusExt>::with_error_details(tonic::Code::DataLoss, message, details)
}

pub fn unavailable() -> Status {
    Status::unavailable("the node is away")
}

impl StubNode {
    pub fn new(name: &str, workers: usize, blobs: Arc<Blobs>, clock: Arc<dyn Clock>) -> Arc<Self> {
        Self::within(None, name, workers, blobs, clock)
    }

    /// A node whose work takes time and fails as the world says.
    pub fn within(
        world: Option<Arc<World>>,
        name: &str,
        workers: usize,
        blobs: Arc<Blobs>,
        clock: Arc<dyn Clock>,
    ) -> Arc<Self> {
        let slots = (0..workers).map(|i| (format!("{name}-w{i}"), Slot::default())).collect();
        let node = Self {
            name: name.to_owned(),
            inner: Mutex::new(Inner { slots, boot: 1, ..Inner::default() }),
            blobs,
            clock,
            held: watch::Sender::new(BTreeSet::new()),
            seen: watch::Sender::new(0),
            lease_every: Duration::from_secs(10),
            world,
        };
        Arc::new(node)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// The next call of a method answers this.
    pub fn fail(&self, method: &'static str, status: Status) {
        self.lock().failures.entry(method).or_default().push_back(status);
    }

    pub fn stop_failing(&self) {
        self.lock().failures.clear();
    }

    pub fn calls(&self, method: &'static str) -> usize {
        self.lock().calls.get(method).copied().unwrap_or_default()
    }

    /// Calls of a method wait until they are let go.
    pub fn hold(&self, method: &'static str) {
        self.held.send_modify(|held| {
            held.insert(method);
        });
    }

    pub fn let_go(&self, method: &'static str) {
        self.held.send_modify(|held| {
            held.remove(method);
        });
    }

    /// Waits until a method was called (again) since `before` calls.
    pub async fn called(&self, method: &'static str, before: usize) {
        let mut seen = self.seen.subscribe();
        while self.calls(method) <= before {
            seen.changed().await.unwrap();
        }
    }

    fn of_this_session(&self, session: &str) -> Result<(), Status> {
        if self.lock().session == session { Ok(()) } else { Err(unavailable()) }
    }

    /// The node goes away: sessions end and every call fails. Its copies go on until their lease ends.
    pub fn go_down(&self) {
        let mut inner = self.lock();
        inner.down = true;
        inner.sessions.clear();
    }

    pub fn come_back(&self) {
        self.lock().down = false;
    }

    /// A reboot: what ran is gone, snapshots stay.
    pub fn reboot(&self) {
        let mut inner = self.lock();
        inner.boot += 1;
        inner.restart_agent();
        for slot in inner.slots.values_mut() {
            slot.copy = None;
        }
    }

    /// The agent's process ends and starts again; what runs goes on under the deadlines it has.
    pub fn restart_agent(&self) {
        self.lock().restart_agent();
    }

    /// The disk needs room: what may be dropped is dropped.
    pub fn evict(&self) {
        let mut inner = self.lock();
        for key in std::mem::take(&mut inner.droppable) {
            inner.snapshots.remove(&key);
        }
    }

    /// The bytes of a snapshot that is in the blob store too change on the disk.
    pub fn rot(&self) {
        let mut inner = self.lock();
        let shelf = lock(&self.blobs.0);
        for ((uid, id), saved) in &mut inner.snapshots {
            let directory = format!("{uid}/{}-{id}", saved.snapshot.generation);
            saved.rotten |= shelf.manifests.contains_key(&directory);
        }
    }

    /// A request reaches the slot: uid, generation, gate and lease are checked there. What memory has taken so far.
    pub fn serve(&self, uid: &str, generation: u64, request: u64) -> Option<u64> {
        let now = self.clock.now();
        let mut inner = self.lock();
        let copy = inner.slots.values_mut().filter_map(|slot| slot.copy.as_mut()).find(|copy| {
            copy.assignment.actor_uid == uid
                && copy.assignment.generation == generation
                && now <= copy.deadline
                && !copy.stopping
        })?;
        copy.memory += 1;
        copy.log.push(request);
        Some(copy.memory)
    }

    /// Copies that run here; frozen ones do not serve.
    pub fn copies(&self) -> Vec<Copy> {
        let now = self.clock.now();
        let inner = self.lock();
        inner
            .slots
            .values()
            .filter_map(|slot| slot.copy.clone())
            .filter(|copy| now <= copy.deadline)
            .collect()
    }

    pub fn copy_of(&self, uid: &str) -> Option<Copy> {
        self.copies().into_iter().find(|copy| copy.assignment.actor_uid == uid)
    }

    /// The actor does something that only its memory knows.
    pub fn work(&self, uid: &str) -> u64 {
        let mut inner = self.lock();
        let copy = inner
            .slots
            .values_mut()
            .filter_map(|slot| slot.copy.as_mut())
            .find(|copy| copy.assignment.actor_uid == uid)
            .expect("the actor runs here");
        copy.memory += 1;
        copy.memory
    }

    /// Copies that slots hold, frozen ones too.
    pub fn held(&self) -> usize {
        self.lock().slots.values().filter(|slot| slot.copy.is_some()).count()
    }

    pub fn has_snapshot(&self, uid: &str, id: &str) -> bool {
        self.lock().snapshots.contains_key(&(uid.to_owned(), id.to_owned()))
    }

    pub fn purged(&self) -> Vec<String> {
        self.lock().purged.clone()
    }

    pub fn checkpoints(&self) -> Vec<(String, Duration)> {
        self.lock().begun.clone()
    }

    #[expect(clippy::needless_pass_by_value, reason = "each caller makes it for this")]
    fn say(&self, event: Said) {
        let mut inner = self.lock();
        inner.sessions.retain(|session| {
            session.try_send(Ok(atelet::SessionEvent { event: Some(event.clone()) })).is_ok()
        });
    }

    /// Empties the slot that runs an actor.
    fn take(&self, uid: &str) -> (String, Option<types::Assignment>) {
        let mut inner = self.lock();
        let (id, slot) = inner
            .slots
            .iter_mut()
            .find(|(_, slot)| slot.copy.as_ref().is_some_and(|copy| copy.assignment.actor_uid == uid))
            .expect("the actor runs here");
        (id.clone(), slot.copy.take().map(|copy| copy.assignment))
    }

    /// The worker dies with what it runs; the node fences it and starts it again.
    pub fn kill_worker_of(&self, uid: &str) {
        let (id, assignment) = self.take(uid);
        self.say(Said::Lost(atelet::WorkerLost {
            worker_id: id.clone(),
            assignment,
            reason: "killed".into(),
        }));
        self.report(&id);
    }

    /// The workload ends by itself.
    pub fn exit(&self, uid: &str, code: i32) {
        let (id, assignment) = self.take(uid);
        let exit = Some(types::ExitStatus { container: "main".into(), code, signal: 0, time_ms: 1 });
        self.say(Said::Exited(atelet::Exited { assignment, exit }));
        self.report(&id);
    }

    /// Counts of an actor, as a slot sends them.
    pub fn stats(&self, uid: &str, stats: ateom::Stats) {
        let copy = self.copy_of(uid).expect("the actor runs here");
        let now_ns = stats.at_ns;
        self.say(Said::Stats(atelet::WorkerStats {
            worker_id: copy.assignment.worker_id.clone(),
            assignment: Some(copy.assignment),
            stats: Some(stats),
            now_ns,
        }));
    }

    /// Each later session begins with this worker's last loss.
    pub fn tell_losses_again(&self) {
        self.lock().tells_losses = true;
    }

    pub fn drain(&self) {
        self.say(Said::Drain(atelet::Drain { worker_id: String::new() }));
    }

    fn worker(id: &str, slot: &Slot) -> atelet::Worker {
        use ateom::slot_status::Phase;
        let phase = if slot.copy.is_some() { Phase::Running } else { Phase::Empty };
        atelet::Worker {
            worker_id: id.to_owned(),
            pool: String::new(),
            capabilities: Some(ateom::GetCapabilitiesResponse {
                worker_id: id.to_owned(),
                sandbox_class: "gvisor".into(),
                runtime_digest: "rd".into(),
                architecture: "amd64".into(),
                ..Default::default()
            }),
            slot: Some(ateom::SlotStatus {
                phase: phase as i32,
                assignment: slot.copy.as_ref().map(|copy| copy.assignment.clone()),
                ingress_endpoint: slot.copy.as_ref().map(|_| format!("unix:/{id}")).unwrap_or_default(),
                ..Default::default()
            }),
            alive: !slot.dead,
            restores_only: false,
        }
    }

    fn report(&self, id: &str) {
        let worker = {
            let inner = self.lock();
            let Some(slot) = inner.slots.get(id) else { return };
            Self::worker(id, slot)
        };
        self.say(Said::Worker(worker));
    }

    /// What every call passes: the node may be away, the method held or told to fail.
    async fn enter(&self, method: &'static str) -> Result<(), Status> {
        *self.lock().calls.entry(method).or_default() += 1;
        self.seen.send_modify(|seen| *seen += 1);
        let mut held = self.held.subscribe();
        held.wait_for(|held| !held.contains(method)).await.map_err(|_| unavailable())?;
        let mut inner = self.lock();
        if inner.down {
            return Err(unavailable());
        }
        match inner.failures.get_mut(method).and_then(VecDeque::pop_front) {
            Some(status) => Err(status),
            None => Ok(()),
        }
    }

    /// A part of some work that takes time. It ends in nothing when the agent starts anew meanwhile.
    async fn stage(&self, what: &'static str) -> Result<(), Status> {
        let Some(world) = &self.world else { return Ok(()) };
        let epoch = self.lock().epoch;
        tokio::time::sleep(world.work_time()).await;
        world.note(format_args!("{} {what}", self.name));
        if self.lock().epoch == epoch { Ok(()) } else { Err(unavailable()) }
    }

    /// Whether something goes wrong at a stage that can.
    fn fails(&self, chance: f64) -> bool {
        self.world.as_ref().is_some_and(|world| world.roll(chance))
    }

    fn moved(&self) {
        if let Some(world) = &self.world {
            world.check_copies();
        }
    }

    fn same(a: &types::Assignment, b: &types::Assignment) -> bool {
        a.actor_uid == b.actor_uid && a.generation == b.generation
    }

    /// A grant came: it extends what it names and ends the rest, except what was activated after it was asked for.
    fn granted(&self, grant: &atelet::LeaseGrant) {
        let mut ended = Vec::new();
        {
            let mut inner = self.lock();
            let Some(asked) = inner.requests.remove(&grant.sequence) else { return };
            let deadline = asked + Duration::from_millis(grant.term_ms);
            inner.granted = inner.granted.max(deadline);
            for (id, slot) in &mut inner.slots {
                let Some(copy) = &mut slot.copy else { continue };
                let own = grant.assignments.iter().find(|it| it.actor_uid == copy.assignment.actor_uid);
                match own {
                    Some(named) if named.generation == copy.assignment.generation => {
                        copy.deadline = copy.deadline.max(deadline);
                    }
                    Some(named) if named.generation < copy.assignment.generation => {}
                    None if copy.since >= grant.sequence => {}
                    _ => {
                        slot.copy = None;
                        ended.push(id.clone());
                    }
                }
            }
        }
        for id in ended {
            self.report(&id);
        }
        self.moved();
    }

    fn lease_request(&self) -> Option<atelet::SessionEvent> {
        let mut inner = self.lock();
        if inner.down {
            return None;
        }
        inner.sequence += 1;
        let sequence = inner.sequence;
        let now = self.clock.now();
        inner.requests.insert(sequence, now);
        Some(atelet::SessionEvent { event: Some(Said::Lease(atelet::LeaseRequest { sequence })) })
    }
}
