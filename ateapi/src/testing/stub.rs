// SPDX-License-Identifier: Apache-2.0
//! A node that keeps fake actors: memory is a number, a snapshot is a copy of it, the blob store is a map. It keeps the
//! contract of `atelet.proto`, and remembers enough to check the promises: which copies ever ran at once, what was
//! uploaded, which snapshot holds what.
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{StreamExt as _, stream};
use substrate_proto::atelet::session_event::Event as Said;
use substrate_proto::atelet::session_request::Request as Say;
use substrate_proto::{atelet, ateom, types};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::Clock;
use crate::node::{Messages, NodeClient};

/// One running copy.
#[derive(Debug, Clone)]
pub struct Copy {
    pub assignment: types::Assignment,
    /// What only its memory holds.
    pub memory: u64,
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
}

#[derive(Debug, Default)]
struct Slot {
    copy: Option<Copy>,
    /// Highest generation ever seen per actor.
    dead: bool,
}

#[derive(Default)]
struct Inner {
    down: bool,
    slots: BTreeMap<String, Slot>,
    snapshots: BTreeMap<(String, String), Saved>,
    droppable: BTreeSet<(String, String)>,
    sessions: Vec<mpsc::Sender<Result<atelet::SessionEvent, Status>>>,
    failures: HashMap<&'static str, VecDeque<Status>>,
    calls: HashMap<&'static str, usize>,
    purged: Vec<String>,
    highest: HashMap<String, u64>,
    /// When each checkpoint began, by snapshot id.
    begun: Vec<(String, Duration)>,
    /// What was granted last, for activations.
    granted: Duration,
    requests: HashMap<u64, Duration>,
    sequence: u64,
    boot: u64,
    losses: BTreeMap<String, atelet::WorkerLost>,
    tells_losses: bool,
}

/// The blob store, shared by nodes: manifests by "uid/generation-snapshot", with what they hold.
#[derive(Default)]
pub struct Blobs(Mutex<BTreeMap<String, u64>>);

impl Blobs {
    /// A manifest that nobody uploaded.
    pub fn insert(&self, directory: String) {
        lock(&self.0).insert(directory, 0);
    }

    pub fn manifests(&self) -> Vec<String> {
        lock(&self.0).keys().cloned().collect()
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
        let slots = (0..workers).map(|i| (format!("{name}-w{i}"), Slot::default())).collect();
        let node = Self {
            name: name.to_owned(),
            inner: Mutex::new(Inner { slots, boot: 1, ..Inner::default() }),
            blobs,
            clock,
            held: watch::Sender::new(BTreeSet::new()),
            seen: watch::Sender::new(0),
            lease_every: Duration::from_secs(10),
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
        for slot in inner.slots.values_mut() {
            slot.copy = None;
        }
        inner.sessions.clear();
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

    /// The worker dies with what it runs; the node fences it and starts it again.
    pub fn kill_worker_of(&self, uid: &str) {
        let (id, assignment) = {
            let mut inner = self.lock();
            let (id, slot) = inner
                .slots
                .iter_mut()
                .find(|(_, slot)| slot.copy.as_ref().is_some_and(|copy| copy.assignment.actor_uid == uid))
                .expect("the actor runs here");
            (id.clone(), slot.copy.take().map(|copy| copy.assignment))
        };
        self.say(Said::Lost(atelet::WorkerLost {
            worker_id: id.clone(),
            assignment,
            reason: "killed".into(),
        }));
        self.report(&id);
    }

    /// The workload ends by itself.
    pub fn exit(&self, uid: &str, code: i32) {
        let (id, assignment) = {
            let mut inner = self.lock();
            let (id, slot) = inner
                .slots
                .iter_mut()
                .find(|(_, slot)| slot.copy.as_ref().is_some_and(|copy| copy.assignment.actor_uid == uid))
                .expect("the actor runs here");
            (id.clone(), slot.copy.take().map(|copy| copy.assignment))
        };
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

/// A node as several engines see it, one after the other.
pub struct Stub(pub Arc<StubNode>);

#[async_trait::async_trait]
impl NodeClient for Stub {
    async fn get_node(&self) -> Result<atelet::GetNodeResponse, Status> {
        self.0.enter("get_node").await?;
        let inner = self.0.lock();
        Ok(atelet::GetNodeResponse {
            node: self.0.name.clone(),
            boot_id: inner.boot.to_string(),
            workers: inner.slots.iter().map(|(id, slot)| StubNode::worker(id, slot)).collect(),
            ..Default::default()
        })
    }

    async fn session(
        &self,
        mut requests: mpsc::Receiver<atelet::SessionRequest>,
    ) -> Result<Messages<atelet::SessionEvent>, Status> {
        self.0.enter("session").await?;
        let (say, events) = mpsc::channel(1_024);
        {
            let mut inner = self.0.lock();
            for (id, slot) in &inner.slots {
                let event = Some(Said::Worker(StubNode::worker(id, slot)));
                say.try_send(Ok(atelet::SessionEvent { event })).map_err(|_| unavailable())?;
            }
            for lost in inner.losses.values().filter(|_| inner.tells_losses) {
                let event = Some(Said::Lost(lost.clone()));
                say.try_send(Ok(atelet::SessionEvent { event })).map_err(|_| unavailable())?;
            }
            let event = Some(Said::Synced(atelet::SyncDone {}));
            say.try_send(Ok(atelet::SessionEvent { event })).map_err(|_| unavailable())?;
            inner.sessions = vec![say.clone()];
        }
        if let Some(event) = self.0.lease_request() {
            let _ = say.try_send(Ok(event));
        }
        // Only the list holds the session open: going down ends it.
        let weak = say.downgrade();
        drop(say);
        let node = Arc::clone(&self.0);
        tokio::spawn(async move {
            loop {
                let next = node.clock.now() + node.lease_every;
                tokio::select! {
                    request = requests.recv() => match request.and_then(|it| it.request) {
                        None => return,
                        Some(Say::Hello(_)) => {}
                        Some(Say::Grant(grant)) => node.granted(&grant),
                    },
                    () = node.clock.sleep_until(next) => {
                        let Some(say) = weak.upgrade() else { return };
                        if let Some(event) = node.lease_request() {
                            let _ = say.try_send(Ok(event));
                        }
                    }
                }
            }
        });
        Ok(ReceiverStream::new(events).boxed())
    }

    async fn ensure_image(
        &self,
        request: atelet::EnsureImageRequest,
    ) -> Result<Messages<atelet::EnsureImageProgress>, Status> {
        self.0.enter("ensure_image").await?;
        let image = atelet::ImageInfo {
            digest: "sha256:00".into(),
            pinned_reference: format!(
                "{}@sha256:{}",
                request.reference.split('@').next().unwrap(),
                "0".repeat(64)
            ),
            exposed_ports: vec![8080],
            ..Default::default()
        };
        let half = atelet::EnsureImageProgress {
            phase: "pulling".into(),
            bytes_done: 1,
            bytes_total: 2,
            image: None,
        };
        let done =
            atelet::EnsureImageProgress { phase: "ready".into(), image: Some(image), ..Default::default() };
        Ok(stream::iter([Ok(half), Ok(done)]).boxed())
    }

    async fn activate(&self, request: atelet::ActivateRequest) -> Result<atelet::ActivateResponse, Status> {
        self.0.enter("activate").await?;
        let assignment = request.assignment.unwrap();
        let answer = atelet::ActivateResponse {
            ingress_endpoint: format!("unix:/{}", assignment.worker_id),
            restored_from: String::new(),
            ..Default::default()
        };
        {
            let mut inner = self.0.lock();
            let highest = inner.highest.entry(assignment.actor_uid.clone()).or_default();
            if assignment.generation < *highest {
                return Err(Status::aborted("a higher generation is known"));
            }
            *highest = assignment.generation;
            // Lower generations of the actor end wherever they are.
            for slot in inner.slots.values_mut() {
                let lower = |copy: &Copy| {
                    copy.assignment.actor_uid == assignment.actor_uid
                        && copy.assignment.generation < assignment.generation
                };
                if slot.copy.as_ref().is_some_and(lower) {
                    slot.copy = None;
                }
            }
            let memory = match &request.snapshot {
                None => 0,
                Some(source) => {
                    let key = (source.actor_uid.clone(), source.snapshot_id.clone());
                    let on_node = inner
                        .snapshots
                        .get(&key)
                        .filter(|saved| saved.snapshot.node_digest == source.node_digest)
                        .map(|saved| saved.memory);
                    let durable = lock(&self.0.blobs.0)
                        .get(&format!("{}/{}-{}", source.actor_uid, source.generation, source.snapshot_id))
                        .copied()
                        .filter(|_| !source.manifest_digest.is_empty());
                    on_node.or(durable).ok_or_else(|| Status::data_loss("memory.img is missing"))?
                }
            };
            // Never beyond what was granted.
            let deadline =
                inner.granted.min(self.0.clock.now() + Duration::from_millis(request.lease_term_ms));
            let since = inner.sequence;
            let slot = inner
                .slots
                .get_mut(&assignment.worker_id)
                .ok_or_else(|| Status::internal("no such worker"))?;
            match &slot.copy {
                Some(copy) if StubNode::same(&copy.assignment, &assignment) => return Ok(answer),
                Some(copy) => {
                    return Err(Status::internal(format!("the slot holds {}", copy.assignment.actor_uid)));
                }
                None => {}
            }
            slot.copy = Some(Copy {
                assignment: assignment.clone(),
                memory,
                clone: request.clone,
                identity: request.identity,
                files: request.actor.unwrap().files,
                deadline,
                since,
            });
        }
        self.0.report(&assignment.worker_id);
        Ok(answer)
    }

    async fn checkpoint(
        &self,
        request: atelet::CheckpointRequest,
    ) -> Result<atelet::CheckpointResponse, Status> {
        let assignment = request.assignment.clone().unwrap();
        let key = (assignment.actor_uid.clone(), request.snapshot_id.clone());
        let began = self.0.clock.now();
        self.0.enter("checkpoint").await?;
        {
            let mut inner = self.0.lock();
            if let Some(saved) = inner.snapshots.get(&key) {
                return Ok(atelet::CheckpointResponse {
                    snapshot: Some(saved.snapshot.clone()),
                    ..Default::default()
                });
            }
            let slot = inner
                .slots
                .get_mut(&assignment.worker_id)
                .ok_or_else(|| Status::internal("no such worker"))?;
            let copy = slot
                .copy
                .as_ref()
                .filter(|copy| StubNode::same(&copy.assignment, &assignment))
                .ok_or_else(|| Status::not_found("nothing of that assignment runs here"))?;
            let memory = copy.memory;
            if request.mode() == ateom::checkpoint_request::Mode::Stop {
                slot.copy = None;
            }
            let snapshot = atelet::NodeSnapshot {
                snapshot_id: request.snapshot_id.clone(),
                actor_uid: assignment.actor_uid.clone(),
                generation: assignment.generation,
                node_digest: format!("nd-{}", request.snapshot_id),
                bytes: 100,
                memory_bytes: 90,
                compatibility: Some(types::Compatibility {
                    sandbox_class: "gvisor".into(),
                    runtime_digest: "rd".into(),
                    architecture: "amd64".into(),
                    ..Default::default()
                }),
                time_ms: self.0.clock.wall_ms(),
            };
            inner.begun.push((request.snapshot_id.clone(), began));
            inner.snapshots.insert(key.clone(), Saved { snapshot, memory });
        }
        let snapshot = self.0.lock().snapshots.get(&key).map(|saved| saved.snapshot.clone());
        Ok(atelet::CheckpointResponse { snapshot, ..Default::default() })
    }

    async fn upload(&self, request: atelet::UploadRequest) -> Result<atelet::UploadResponse, Status> {
        self.0.enter("upload").await?;
        let inner = self.0.lock();
        let key = (request.actor_uid.clone(), request.snapshot_id.clone());
        let saved = inner.snapshots.get(&key).ok_or_else(|| corrupt("node"))?;
        let directory = format!("{}/{}-{}", request.actor_uid, request.generation, request.snapshot_id);
        lock(&self.0.blobs.0).insert(directory.clone(), saved.memory);
        Ok(atelet::UploadResponse {
            manifest_digest: format!("md-{}", request.snapshot_id),
            bytes: 100,
            stored_bytes: 40,
            packs: vec![format!("{directory}/pack")],
            ..Default::default()
        })
    }

    async fn release(&self, request: atelet::ReleaseRequest) -> Result<(), Status> {
        self.0.enter("release").await?;
        let assignment = request.assignment.unwrap();
        let mut freed = Vec::new();
        {
            let mut inner = self.0.lock();
            let highest = inner.highest.entry(assignment.actor_uid.clone()).or_default();
            if assignment.generation < *highest {
                return Err(Status::aborted("a higher generation is known"));
            }
            for (id, slot) in &mut inner.slots {
                let ends = slot.copy.as_ref().is_some_and(|copy| {
                    copy.assignment.actor_uid == assignment.actor_uid
                        && copy.assignment.generation <= assignment.generation
                });
                if ends {
                    slot.copy = None;
                    freed.push(id.clone());
                }
            }
        }
        for id in freed {
            self.0.report(&id);
        }
        Ok(())
    }

    async fn drop_snapshot(&self, request: atelet::DropSnapshotRequest) -> Result<(), Status> {
        self.0.enter("drop_snapshot").await?;
        self.0.lock().droppable.insert((request.actor_uid, request.snapshot_id));
        Ok(())
    }

    async fn delete_blobs(&self, request: atelet::DeleteBlobsRequest) -> Result<(), Status> {
        self.0.enter("delete_blobs").await?;
        let mut blobs = lock(&self.0.blobs.0);
        for directory in request.manifests {
            blobs.remove(&format!("{}/{directory}", request.actor_uid));
        }
        Ok(())
    }

    async fn purge(&self, request: atelet::PurgeRequest) -> Result<(), Status> {
        self.0.enter("purge").await?;
        let mut inner = self.0.lock();
        inner.snapshots.retain(|(uid, _), _| *uid != request.actor_uid);
        inner.purged.push(request.actor_uid);
        Ok(())
    }

    async fn set_egress(&self, _: atelet::SetEgressRequest) -> Result<(), Status> {
        self.0.enter("set_egress").await
    }

    async fn exec(
        &self,
        mut inputs: mpsc::Receiver<types::ExecInput>,
    ) -> Result<Messages<types::ExecOutput>, Status> {
        use types::exec_output::Output;
        self.0.enter("exec").await?;
        let Some(types::exec_input::Input::Start(start)) = inputs.recv().await.and_then(|it| it.input) else {
            return Err(Status::invalid_argument("no start"));
        };
        let outputs = vec![
            Ok(types::ExecOutput { output: Some(Output::Stdout(start.command.join(" ").into_bytes())) }),
            Ok(types::ExecOutput { output: Some(Output::Exit(types::ExitStatus::default())) }),
        ];
        Ok(stream::iter(outputs).boxed())
    }

    async fn logs(&self, request: atelet::LogsRequest) -> Result<Messages<atelet::LogsChunk>, Status> {
        self.0.enter("logs").await?;
        let chunk = atelet::LogsChunk { data: format!("log of {}", request.actor_uid).into_bytes() };
        Ok(stream::iter([Ok(chunk)]).boxed())
    }
}
