// SPDX-License-Identifier: Apache-2.0
//! The stub's side of `atelet.v1.Node`.
use futures::{StreamExt as _, stream};
use substrate_proto::atelet::session_request::Request as Say;
use tokio_stream::wrappers::ReceiverStream;

use super::{
    Arc, Copy, Duration, Inner, Said, Saved, Status, Stored, StubNode, atelet, ateom, corrupt, lock, mpsc,
    types, unavailable,
};
use crate::node::{Messages, NodeClient};

impl Inner {
    /// Refuses what is of the past; a lower generation of the actor ends wherever it is.
    fn begin(&mut self, assignment: &types::Assignment) -> Result<(), Status> {
        let highest = self.highest.entry(assignment.actor_uid.clone()).or_default();
        if assignment.generation < *highest {
            return Err(Status::aborted("a higher generation is known"));
        }
        *highest = assignment.generation;
        if self.ended.get(&assignment.actor_uid).is_some_and(|ended| *ended >= assignment.generation) {
            return Err(Status::aborted("it was released"));
        }
        for slot in self.slots.values_mut() {
            let lower = |copy: &Copy| {
                copy.assignment.actor_uid == assignment.actor_uid
                    && copy.assignment.generation < assignment.generation
            };
            if slot.copy.as_ref().is_some_and(lower) {
                slot.copy = None;
            }
        }
        Ok(())
    }

    fn copy_of(&mut self, assignment: &types::Assignment) -> Result<&mut Copy, Status> {
        self.slots
            .get_mut(&assignment.worker_id)
            .ok_or_else(|| Status::internal("no such worker"))?
            .copy
            .as_mut()
            .filter(|copy| StubNode::same(&copy.assignment, assignment))
            .ok_or_else(|| Status::not_found("nothing of that assignment runs here"))
    }
}

impl StubNode {
    /// What a snapshot holds: of this node's copy, else of the blob store's.
    fn content(
        &self,
        inner: &Inner,
        source: Option<&atelet::SnapshotSource>,
    ) -> Result<(u64, Vec<u64>), Status> {
        let Some(source) = source else { return Ok((0, Vec::new())) };
        let here = inner
            .snapshots
            .get(&(source.actor_uid.clone(), source.snapshot_id.clone()))
            .filter(|saved| saved.snapshot.node_digest == source.node_digest);
        match here {
            Some(saved) if saved.rotten => return Err(corrupt("node")),
            Some(saved) => return Ok((saved.memory, saved.log.clone())),
            None if source.manifest_digest.is_empty() => return Err(corrupt("node")),
            None => {}
        }
        let directory = format!("{}/{}-{}", source.actor_uid, source.generation, source.snapshot_id);
        let shelf = lock(&self.blobs.0);
        let stored = shelf.manifests.get(&directory).ok_or_else(|| corrupt("durable"))?;
        if let Some(pack) = stored.packs.iter().find(|pack| !shelf.packs.contains(*pack)) {
            return Err(Status::data_loss(format!("pack {pack} is missing")));
        }
        Ok((stored.memory, stored.log.clone()))
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
        let first = requests.recv().await.and_then(|it| it.request);
        let Some(Say::Hello(hello)) = first else { return Err(unavailable()) };
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
            inner.session = hello.controller;
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
                    biased;
                    request = requests.recv() => match request.and_then(|it| it.request) {
                        None | Some(Say::Hello(_)) => return,
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
        let assignment = request.assignment.clone().unwrap();
        let answer = atelet::ActivateResponse {
            ingress_endpoint: format!("unix:/{}", assignment.worker_id),
            restored_from: String::new(),
            ..Default::default()
        };
        self.0.of_this_session(&request.session)?;
        // Begun: from here on a lower generation has ended, and a release of this one ends what is under way.
        self.0.lock().begin(&assignment)?;
        self.0.stage("starts an actor").await?;
        if self.0.fails(0.03) {
            return Err(Status::internal("no memory left"));
        }
        {
            let mut inner = self.0.lock();
            inner.begin(&assignment)?;
            let (memory, log) = self.0.content(&inner, request.snapshot.as_ref())?;
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
            if let Some(world) = &self.0.world {
                world.activated(&self.0.name, &assignment, &request, &log);
            }
            slot.copy = Some(Copy {
                assignment: assignment.clone(),
                memory,
                log,
                stopping: false,
                clone: request.clone,
                identity: request.identity,
                files: request.actor.unwrap_or_default().files,
                deadline,
                since,
            });
        }
        self.0.moved();
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
        let stops = request.mode() == ateom::checkpoint_request::Mode::Stop;
        let made = |saved: &Saved| atelet::CheckpointResponse {
            snapshot: Some(saved.snapshot.clone()),
            ..Default::default()
        };
        let captured = {
            let mut inner = self.0.lock();
            if let Some(saved) = inner.snapshots.get(&key) {
                return Ok(made(saved));
            }
            if inner.refused.contains(&key) {
                return Err(Status::failed_precondition("it was refused before"));
            }
            let copy = inner.copy_of(&assignment)?;
            if stops {
                copy.stopping = true;
            }
            (copy.memory, copy.log.clone())
        };
        self.0.stage("writes a snapshot").await?;
        {
            let mut inner = self.0.lock();
            if let Some(saved) = inner.snapshots.get(&key) {
                return Ok(made(saved));
            }
            let copy = inner.copy_of(&assignment)?;
            if self.0.fails(0.05) {
                copy.stopping = false;
                inner.refused.insert(key);
                return Err(Status::failed_precondition("the disk is full"));
            }
            let breaks = stops && self.0.fails(0.03);
            if stops {
                let slot = inner.slots.get_mut(&assignment.worker_id);
                slot.ok_or_else(|| Status::internal("no such worker"))?.copy = None;
            }
            if breaks {
                return Err(Status::internal("the sandbox died while it was saved"));
            }
            let (memory, log) = captured;
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
            inner.snapshots.insert(key.clone(), Saved { snapshot, memory, log, rotten: false });
        }
        self.0.lock().snapshots.get(&key).map(made).ok_or_else(unavailable)
    }

    async fn upload(&self, request: atelet::UploadRequest) -> Result<atelet::UploadResponse, Status> {
        self.0.enter("upload").await?;
        let key = (request.actor_uid.clone(), request.snapshot_id.clone());
        let saved = self.0.lock().snapshots.get(&key).cloned().ok_or_else(|| corrupt("node"))?;
        let directory = format!("{}/{}-{}", request.actor_uid, request.generation, request.snapshot_id);
        let own = format!("{directory}/pack");
        self.0.stage("writes a pack").await?;
        if self.0.fails(0.1) {
            return Err(Status::unavailable("the store is away"));
        }
        lock(&self.0.blobs.0).packs.insert(own.clone());
        self.0.stage("writes a manifest").await?;
        if self.0.fails(0.1) {
            return Err(Status::unavailable("the store went away half-way"));
        }
        let mut shelf = lock(&self.0.blobs.0);
        // Blocks that a parent has are referenced, not written.
        let parents = request.parents.iter().filter_map(|parent| {
            let name = format!("{}/{}-{}", parent.actor_uid, parent.generation, parent.snapshot_id);
            shelf.manifests.get(&name).and_then(|stored| stored.packs.last()).cloned()
        });
        let packs: Vec<String> = parents.chain([own]).collect();
        let stored = Stored { memory: saved.memory, log: saved.log, packs: packs.clone() };
        shelf.manifests.insert(directory, stored);
        Ok(atelet::UploadResponse {
            manifest_digest: format!("md-{}", request.snapshot_id),
            bytes: 100,
            stored_bytes: 40,
            packs,
            ..Default::default()
        })
    }

    async fn release(&self, request: atelet::ReleaseRequest) -> Result<(), Status> {
        self.0.enter("release").await?;
        self.0.of_this_session(&request.session)?;
        let assignment = request.assignment.unwrap();
        let mut freed = Vec::new();
        {
            let mut inner = self.0.lock();
            let ended = inner.ended.entry(assignment.actor_uid.clone()).or_default();
            *ended = (*ended).max(assignment.generation);
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
        self.0.stage("empties a cgroup").await?;
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
            blobs.manifests.remove(&format!("{}/{directory}", request.actor_uid));
        }
        for pack in request.packs {
            blobs.packs.remove(&pack);
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
