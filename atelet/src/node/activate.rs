// SPDX-License-Identifier: Apache-2.0
//! Activate and Release: putting an actor on a worker and taking it off.
//!
//! ```text
//! Activate ─ valid? of this session? newest? ─▶ task of (uid, generation), joined by retries
//!   ─▶ worker up, slot free; lower generations of the actor ended wherever they are
//!   ─▶ images ∥ snapshot files, each local and verified
//!   ─▶ /run/ate, files, volumes ─▶ sandbox resolved ─▶ one of the few starts at a time ─▶ lease
//!   ─▶ ateom Run │ Restore ─▶ OK
//! ```
//!
//! Whatever fails, nothing of the assignment runs when the call returns: the slot was cleared, or its worker fenced.
//! Release, or a higher generation, cancels the task, waits for its end and clears the slot.
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures::future::try_join_all;
use substrate_proto::atelet::{ActivateRequest, ActivateResponse, SnapshotSource};
use substrate_proto::ateom::slot_status::Phase;
use substrate_proto::ateom::{RestoreRequest, RunRequest, SandboxSpec, StepTime, TerminateRequest};
use substrate_proto::types::{ActorSpec, Assignment, Compatibility, TemplateSpec};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{Node, answers};
use crate::actor::place::ActorPlaces;
use crate::actor::resolve::{self, ImageFacts, MountedImage};
use crate::asset::Start;
use crate::config::WorkerClass;
use crate::error::{NodeError, actor_name};
use crate::image::{Image, ImageError, Reference};
use crate::snapshot::node::{NodeSnapshot, Pin};
use crate::snapshot::restore::Wanted;
use crate::snapshot::{SnapshotError, Source, unix_ms};
use crate::worker::{Client, News, View, Worker};

/// How long a start waits for a worker that is just being started.
const WORKER_WAIT: Duration = Duration::from_secs(5);
/// How long it waits for a lease.
const LEASE_WAIT: Duration = Duration::from_secs(5);
/// A start needs at least this much of a lease.
const MIN_LEASE_NS: i64 = 1_000_000_000;
/// Room that any start needs on the disk.
const START_BYTES: u64 = 64 << 20;
/// How long clearing a slot is tried before the caller is told that it goes on.
const CLEAR: Duration = Duration::from_mins(1);

/// Names and times the parts of a call.
#[derive(Default)]
pub(super) struct Steps {
    steps: Vec<StepTime>,
    since: Option<Instant>,
}

impl Steps {
    /// Begins to time.
    pub(super) fn begin() -> Self {
        Self { steps: Vec::new(), since: Some(Instant::now()) }
    }

    /// Ends the part that began with the last one's end.
    pub(super) fn done(&mut self, name: &str) {
        let now = Instant::now();
        let since = self.since.replace(now).unwrap_or(now);
        self.steps.push(StepTime { name: name.to_owned(), micros: (now - since).as_micros() as u64 });
    }

    /// Puts in the parts of a call that just ended.
    pub(super) fn include(&mut self, prefix: &str, steps: Vec<StepTime>) {
        self.since = Some(Instant::now());
        self.steps.extend(
            steps
                .into_iter()
                .map(|step| StepTime { name: format!("{prefix}.{}", step.name), micros: step.micros }),
        );
    }

    /// All of them.
    pub(super) fn into_vec(self) -> Vec<StepTime> {
        self.steps
    }
}

/// A snapshot that is local and verified, kept while it is restored.
struct Ready {
    snapshot: NodeSnapshot,
    source: Source,
    _pin: Pin,
}

impl Node {
    /// Refuses what was sent in an earlier session and arrives late.
    pub(super) fn of_this_session(&self, session: &str) -> Result<(), NodeError> {
        let stands = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if *stands == session { Ok(()) } else { Err(NodeError::OtherSession) }
    }

    /// Activate; see the module.
    pub(super) async fn activate(
        self: &Arc<Self>,
        request: ActivateRequest,
    ) -> Result<ActivateResponse, Status> {
        let assignment = required(request.assignment.clone(), "assignment")?;
        let template = required(request.template.clone(), "template")?;
        let actor = request.actor.clone().unwrap_or_default();
        resolve::validate(&assignment, &template, &actor)?;
        self.worker(&assignment.worker_id)?;
        self.of_this_session(&request.session)?;
        let since = self.lease.lock().unwrap_or_else(PoisonError::into_inner).last_sequence();
        let names = template.containers.iter().map(|container| container.name.clone()).collect();
        self.ledger.begin(&assignment, names, since)?;
        let node = Arc::clone(self);
        let key = (assignment.actor_uid.clone(), assignment.generation);
        self.activations
            .run(key, move |cancel| async move {
                let begun = std::time::Instant::now();
                let outcome = node.start(&assignment, &template, &actor, &request, &cancel).await;
                let from = match outcome.as_ref().map(|response| response.restored_from.as_str()) {
                    Ok("node") => "node",
                    Ok("durable") => "durable",
                    Err(_) if request.snapshot.is_some() => "snapshot",
                    _ => "image",
                };
                crate::metrics::activation(from, outcome.is_ok(), begun);
                Ok(outcome?)
            })
            .await
    }

    async fn start(
        self: &Arc<Self>,
        assignment: &Assignment,
        template: &TemplateSpec,
        actor: &ActorSpec,
        request: &ActivateRequest,
        cancel: &CancellationToken,
    ) -> Result<ActivateResponse, NodeError> {
        self.starting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(assignment.actor_uid.clone(), assignment.clone());
        // Set before an ateom is asked to start it: from then on a failure has something to clear.
        let touched = AtomicBool::new(false);
        let begun = async {
            self.end_lower(assignment).await?;
            let worker = self.worker(&assignment.worker_id)?;
            // Nothing was started: another worker may be taken, instead of asking for this one again.
            let (view, client) = worker.up(WORKER_WAIT).await.map_err(|_| NodeError::WorkerLost {
                worker: worker.id.clone(),
                during: "a start",
                reason: worker.view().trouble,
            })?;
            if let Some(response) = running(&view, assignment) {
                return Ok(response);
            }
            self.vacate(worker, &view, assignment).await?;
            self.hub.worker_used(&worker.id);
            self.start_on(worker, &view, client, assignment, template, actor, request, &touched).await
        };
        let outcome = tokio::select! {
            outcome = begun => outcome,
            () = cancel.cancelled() => Err(NodeError::Superseded {
                actor: actor_name(assignment),
                generation: assignment.generation,
                by: "a release or a higher generation",
            }),
        };
        if outcome.is_err() {
            if touched.load(Ordering::SeqCst) {
                self.clear(assignment).await;
            }
            self.release_images(assignment);
            self.ledger.displaced(assignment);
        }
        if self.is_starting(assignment) {
            self.starting.lock().unwrap_or_else(PoisonError::into_inner).remove(&assignment.actor_uid);
        }
        if outcome.is_ok() {
            // What happened to it since was kept quiet.
            self.take_news(&assignment.worker_id, News::Changed);
        }
        outcome
    }

    /// Whether an activation of this assignment is under way.
    pub(super) fn is_starting(&self, assignment: &Assignment) -> bool {
        let starting = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        starting.get(&assignment.actor_uid).is_some_and(|own| own.generation == assignment.generation)
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one request, used nowhere else")]
    async fn start_on(
        self: &Arc<Self>,
        worker: &Worker,
        view: &View,
        mut client: Client,
        assignment: &Assignment,
        template: &TemplateSpec,
        actor: &ActorSpec,
        request: &ActivateRequest,
        touched: &AtomicBool,
    ) -> Result<ActivateResponse, NodeError> {
        let mut steps = Steps::begin();
        let volumes = ActorPlaces::volume_bytes(template)?;
        self.disk.admit("starting an actor with its volumes", START_BYTES + volumes)?;
        // Before anything is fetched; its age is known only then.
        if let Some(needs) = request.snapshot.as_ref().and_then(|source| source.compatibility.as_ref()) {
            self.may_start(worker, assignment, &needs.runtime_digest, request, unix_ms())?;
        }
        let (images, ready) = futures::try_join!(
            self.local_images(worker.class, assignment, template),
            self.local_snapshot(assignment, request.snapshot.as_ref())
        )?;
        steps.done("fetch");
        let capabilities = view.up.as_ref().map(|up| &up.capabilities);
        if let Some(ready) = &ready {
            let record = &ready.snapshot.record;
            let made_ms = record.time_ms;
            self.may_start(worker, assignment, &record.compatibility.runtime_digest, request, made_ms)?;
            let mismatch = capabilities
                .and_then(|capabilities| incompatible(&record.compatibility, capabilities))
                .or_else(|| other_images(&record.compatibility, &images));
            if let Some(reason) = mismatch {
                return Err(SnapshotError::Incompatible {
                    snapshot: record.snapshot_id.clone(),
                    worker: worker.id.clone(),
                    reason,
                }
                .into());
            }
        }
        if let Some(capabilities) = capabilities {
            self.may_start(worker, assignment, &capabilities.runtime_digest, request, unix_ms())?;
        }
        let spec = self.prepare(assignment, template, actor, request, &images, ready.as_ref()).await?;
        let images: Vec<Image> = images.into_iter().flat_map(|(_, images, _)| images).collect();
        let (node, uid) = (Arc::clone(self), assignment.actor_uid.clone());
        let digests: Vec<String> = images.iter().map(|image| image.digest.to_string()).collect();
        crate::blocking(move || node.places.note_images(&uid, &digests)).await?;
        self.hold_images(assignment, images);
        steps.done("prepare");
        let kind = if ready.is_some() { &self.restores } else { &self.boots };
        let _permit = Arc::clone(kind).acquire_owned().await.map_err(|_| NodeError::WorkerDown {
            worker: worker.id.clone(),
            reason: "the node stops".into(),
        })?;
        steps.done("queue");
        let lease_deadline_ns = self.lease_for(request.lease_term_ms).await?;
        steps.done("lease");
        touched.store(true, Ordering::SeqCst);
        let answered = match &ready {
            None => client
                .run(RunRequest { assignment: Some(assignment.clone()), spec: Some(spec), lease_deadline_ns })
                .await
                .map(|response| response.into_inner().steps),
            Some(ready) => client
                .restore(RestoreRequest {
                    assignment: Some(assignment.clone()),
                    spec: Some(spec),
                    directory: ready.snapshot.files_dir().display().to_string(),
                    compatibility: Some(ready.snapshot.record.compatibility.clone()),
                    lease_deadline_ns,
                    clone: request.clone,
                })
                .await
                .map(|response| response.into_inner().steps),
        };
        match answered {
            Ok(inner) => {
                steps.include("ateom", inner);
                // Releases, leases and losses go by the view: it has to show what runs before anyone is told that it
                // does, or a worker that dies now would be reported without it.
                let shows = |now: &View| now.assignment().is_some_and(|held| held == assignment);
                worker.wait_for(WORKER_WAIT, |now| now.up.is_none() || shows(now)).await;
                if !shows(&worker.view()) {
                    let reason = worker.fenced_since(view).await;
                    return Err(NodeError::WorkerLost {
                        worker: worker.id.clone(),
                        during: "a start",
                        reason: reason.unwrap_or_else(|| "it does not show what it started".to_owned()),
                    });
                }
                steps.done("seen");
            }
            Err(status) => return Err(self.failed(worker, view, "a start", &status, answers::start).await),
        }
        Ok(ActivateResponse {
            steps: steps.into_vec(),
            // The same for the whole life of a worker's process.
            ingress_endpoint: view
                .slot
                .as_ref()
                .map(|slot| slot.ingress_endpoint.clone())
                .unwrap_or_default(),
            restored_from: ready.map_or("", |ready| ready.source.as_str()).to_owned(),
        })
    }

    /// Whether the sandbox config lets something start on a runtime, from a snapshot that was made then.
    fn may_start(
        &self,
        worker: &Worker,
        assignment: &Assignment,
        runtime: &str,
        request: &ActivateRequest,
        made_ms: i64,
    ) -> Result<(), NodeError> {
        let Some(policy) = &self.sandbox else { return Ok(()) };
        let snapshot = request.snapshot.as_ref().filter(|source| !source.snapshot_id.is_empty());
        let start = Start {
            class: worker.class,
            runtime,
            atespace: &assignment.atespace,
            actor: &assignment.actor_name,
            snapshot: snapshot.map(|source| (source.snapshot_id.as_str(), made_ms)),
        };
        policy.judge(start, unix_ms())
    }

    /// What a failed call to an ateom means: a worker that died under it is waited for until it is fenced.
    pub(super) async fn failed(
        &self,
        worker: &Worker,
        before: &View,
        during: &'static str,
        status: &Status,
        meaning: fn(&str, &Status) -> NodeError,
    ) -> NodeError {
        if answers::is_transport(status)
            && let Some(reason) = worker.fenced_since(before).await
        {
            return NodeError::WorkerLost { worker: worker.id.clone(), during, reason };
        }
        meaning(&worker.id, status)
    }

    async fn prepare(
        self: &Arc<Self>,
        assignment: &Assignment,
        template: &TemplateSpec,
        actor: &ActorSpec,
        request: &ActivateRequest,
        images: &[(String, Vec<Image>, ImageFacts)],
        ready: Option<&Ready>,
    ) -> Result<SandboxSpec, NodeError> {
        let node = Arc::clone(self);
        let facts: BTreeMap<String, ImageFacts> =
            images.iter().map(|(name, _, facts)| (name.clone(), facts.clone())).collect();
        let (assignment, template, actor) = (assignment.clone(), template.clone(), actor.clone());
        let (identity, keep) = (request.identity.clone(), request.keep_volumes);
        let snapshot = ready.map(|ready| ready.snapshot.clone());
        crate::blocking(move || {
            let places =
                node.places.prepare(&assignment, &template, &actor, &identity, snapshot.as_ref(), keep)?;
            resolve::sandbox(&assignment, &template, &actor, &facts, &places)
        })
        .await
    }

    /// Makes the images of all containers local, side by side.
    async fn local_images(
        &self,
        class: WorkerClass,
        assignment: &Assignment,
        template: &TemplateSpec,
    ) -> Result<Vec<(String, Vec<Image>, ImageFacts)>, NodeError> {
        try_join_all(template.containers.iter().map(|container| async {
            let failed = |source: ImageError| NodeError::Image { container: container.name.clone(), source };
            let reference: Reference = container.image.parse().map_err(failed)?;
            let image = self.images.ensure(&assignment.atespace, &reference, |_| {}).await.map_err(failed)?;
            let run_as = container
                .security_context
                .as_ref()
                .map(|security| security.run_as.clone())
                .unwrap_or_default();
            let disk = async |image: &Image| match class {
                WorkerClass::Gvisor => Ok(None),
                WorkerClass::Microvm => self.erofs.ensure(image).await.map(Some),
            };
            let rootfs = disk(&image).await.map_err(failed)?.unwrap_or_else(|| image.rootfs.clone());
            let resolving = image.clone();
            let user = crate::blocking(move || resolving.user(Some(&run_as))).await.map_err(failed)?;
            let mounted = try_join_all(container.image_mounts.iter().map(|mount| async {
                let reference: Reference = mount.image.parse()?;
                let image = self.images.ensure(&assignment.atespace, &reference, |_| {}).await?;
                let mounted = MountedImage { root: image.rootfs.clone(), disk: disk(&image).await? };
                Ok((image, mounted))
            }))
            .await
            .map_err(failed)?;
            let facts = ImageFacts {
                digest: image.digest.to_string(),
                rootfs,
                entrypoint: image.config.entrypoint.clone(),
                cmd: image.config.cmd.clone(),
                env: image.config.env.clone(),
                working_dir: image.config.working_dir.clone(),
                exposed_ports: image.config.exposed_ports.clone(),
                uid: user.uid,
                gid: user.gid,
                groups: user.groups,
                home: user.home,
                mounted: mounted.iter().map(|(_, mounted)| mounted.clone()).collect(),
            };
            let images = std::iter::once(image).chain(mounted.into_iter().map(|(image, _)| image)).collect();
            Ok((container.name.clone(), images, facts))
        }))
        .await
    }

    /// Makes the snapshot's files local and verifies them: those of this node if they are good, else the durable ones.
    async fn local_snapshot(
        self: &Arc<Self>,
        assignment: &Assignment,
        source: Option<&SnapshotSource>,
    ) -> Result<Option<Ready>, NodeError> {
        let Some(source) = source.filter(|source| !source.snapshot_id.is_empty()) else { return Ok(None) };
        let local = self.verified(source).await;
        let unusable = match local {
            Ok(Some(snapshot)) => return Ok(Some(self.ready(source, snapshot, Source::Node)?)),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if source.manifest_digest.is_empty() {
            return Err(unusable
                .unwrap_or_else(|| SnapshotError::Missing {
                    snapshot: source.snapshot_id.clone(),
                    place: format!("on node {}", self.config.node),
                    from: Source::Node,
                })
                .into());
        }
        if let Some(error) = unusable {
            tracing::warn!(%error, "the copy on this node is not used; fetching the durable one");
        }
        let wanted = Wanted {
            atespace: assignment.atespace.clone(),
            actor_uid: source.actor_uid.clone(),
            snapshot_id: source.snapshot_id.clone(),
            generation: source.generation,
            manifest_digest: source.manifest_digest.clone(),
        };
        let (node, fetched) = (Arc::clone(self), wanted.clone());
        let key = (source.actor_uid.clone(), source.snapshot_id.clone());
        let fetch = self.fetches.run(key, move |_| async move {
            let _slot =
                node.fetch_slots.acquire().await.map_err(|_| Status::unavailable("the node stops"))?;
            node.disk.admit("fetching a snapshot", START_BYTES).map_err(NodeError::from)?;
            let begun = std::time::Instant::now();
            let outcome = node.durable.fetch(&node.snapshots, &fetched).await;
            let bytes =
                outcome.as_ref().map(|snapshot| snapshot.record.files.iter().map(|file| file.size).sum());
            crate::metrics::fetch(bytes.ok(), begun);
            outcome.map_err(NodeError::from)?;
            Ok(())
        });
        if let Err(status) = fetch.await {
            let (reason, metadata) = tonic_types::StatusExt::get_details_error_info(&status)
                .map_or_else(Default::default, |info| (info.reason, info.metadata));
            // Already in this node's words.
            return Err(NodeError::Ateom {
                worker: assignment.worker_id.clone(),
                code: status.code(),
                reason,
                message: status.message().to_owned(),
                metadata,
            });
        }
        let source_of_record = SnapshotSource { node_digest: String::new(), ..source.clone() };
        let snapshot = self.verified(&source_of_record).await?.ok_or_else(|| SnapshotError::Missing {
            snapshot: source.snapshot_id.clone(),
            place: "on this node any more, right after it was fetched".to_owned(),
            from: Source::Node,
        })?;
        Ok(Some(self.ready(source, snapshot, Source::Durable)?))
    }

    fn ready(
        &self,
        source: &SnapshotSource,
        snapshot: NodeSnapshot,
        from: Source,
    ) -> Result<Ready, SnapshotError> {
        if let Some(expected) = &source.compatibility
            && *expected != snapshot.record.compatibility
        {
            return Err(SnapshotError::Foreign {
                snapshot: source.snapshot_id.clone(),
                reason: "what it needs is not what the actor's record says".to_owned(),
            });
        }
        let pin = self.snapshots.pin(&snapshot);
        Ok(Ready { snapshot, source: from, _pin: pin })
    }

    /// This node's copy, if it is the one that is meant and good. A copy that is known by neither digest is not.
    async fn verified(&self, source: &SnapshotSource) -> Result<Option<NodeSnapshot>, SnapshotError> {
        let (snapshots, source) = (self.snapshots.clone(), source.clone());
        crate::blocking(move || {
            let Some(found) = snapshots.find(&source.actor_uid, &source.snapshot_id)? else {
                return Ok(None);
            };
            let by_record = source.node_digest == found.node_digest;
            let by_manifest = !source.manifest_digest.is_empty()
                && found.manifest_digest().as_deref() == Some(source.manifest_digest.as_str());
            if !by_record && !by_manifest {
                let expected = if source.node_digest.is_empty() { "another" } else { &source.node_digest };
                snapshots.verify(&found, Some(expected))?;
            }
            snapshots.verify(&found, None)?;
            Ok(Some(found))
        })
        .await
    }

    /// A deadline under the last grant, waiting for a newer one if too little of it is left.
    async fn lease_for(&self, term_ms: u64) -> Result<i64, NodeError> {
        let mut granted = self.granted.subscribe();
        let long_enough = |granted: &Option<crate::lease::Granted>| {
            granted.is_some_and(|granted| {
                granted.deadline_for(term_ms) > ateom::boottime_ns().saturating_add(MIN_LEASE_NS)
            })
        };
        if !long_enough(&granted.borrow()) {
            self.lease_wanted.notify_one();
        }
        let waited = tokio::time::timeout(LEASE_WAIT, granted.wait_for(long_enough)).await;
        match waited {
            Ok(Ok(granted)) => granted.map(|granted| granted.deadline_for(term_ms)).ok_or(NodeError::NoLease),
            _ => Err(NodeError::NoLease),
        }
    }

    /// Ends what lower generations of the actor still have on this node (P1: before the new one starts).
    async fn end_lower(self: &Arc<Self>, assignment: &Assignment) -> Result<(), NodeError> {
        let lower = |life: &(String, u64)| life.0 == assignment.actor_uid && life.1 < assignment.generation;
        self.activations.cancel(lower).await;
        for (worker, held) in self.holding(&assignment.actor_uid) {
            if held.generation < assignment.generation {
                self.terminate(worker, &held).await?;
            }
        }
        Ok(())
    }

    /// Makes sure that the slot is free for the assignment: what ended by itself there is cleared away, anything else
    /// is another's.
    async fn vacate(&self, worker: &Worker, view: &View, assignment: &Assignment) -> Result<(), NodeError> {
        let Some(held) = view.assignment() else { return Ok(()) };
        let own = held.actor_uid == assignment.actor_uid && held.generation == assignment.generation;
        match view.phase() {
            // Joined, or answered, by the ateom.
            _ if own && view.phase() != Phase::Lost => Ok(()),
            Phase::Exited | Phase::Lost | Phase::Terminating => self.terminate(worker, held).await,
            _ => Err(NodeError::SlotBusy {
                worker: worker.id.clone(),
                holder: format!("{} (generation {})", actor_name(held), held.generation),
            }),
        }
    }

    /// Kills an assignment on a worker and returns when it is gone: by the ateom, or by the fence.
    async fn terminate(&self, worker: &Worker, assignment: &Assignment) -> Result<(), NodeError> {
        worker.wait_for(CLEAR, View::is_settled).await;
        if worker.view().vacant {
            return Ok(());
        }
        let (view, mut client) = worker.up(WORKER_WAIT).await?;
        let request = TerminateRequest { assignment: Some(assignment.clone()) };
        match client.terminate(request).await {
            Ok(_) => {
                // The status that says so is on its way; the next start looks at the view.
                worker
                    .wait_for(WORKER_WAIT, |view| {
                        view.up.is_none() || view.assignment().is_none_or(|held| held != assignment)
                    })
                    .await;
                Ok(())
            }
            Err(status) => match self.failed(worker, &view, "a release", &status, answers::other).await {
                // With a higher one there, this one is not.
                NodeError::WorkerLost { .. } | NodeError::Ateom { code: tonic::Code::Aborted, .. } => Ok(()),
                error => Err(error),
            },
        }
    }

    /// After a failed start: nothing of it may run.
    async fn clear(&self, assignment: &Assignment) {
        let Some(worker) = self.workers.get(&assignment.worker_id) else { return };
        if let Err(error) = self.terminate(worker, assignment).await {
            tracing::error!(%error, "cannot clear the slot of a failed start; the lease ends it");
        }
    }

    /// Release: ends what the assignment, or a lower generation of its actor, has on this node.
    pub(super) async fn release(self: &Arc<Self>, assignment: Assignment) -> Result<(), Status> {
        crate::snapshot::check_name("actor uid", &assignment.actor_uid).map_err(NodeError::from)?;
        let node = Arc::clone(self);
        let key = (assignment.actor_uid.clone(), assignment.generation);
        self.releases
            .run(key, move |_| async move {
                if let Err(error) = node.ledger.end(&assignment) {
                    tracing::warn!(%error, "a late start would not be recognised after a restart of this process");
                }
                let past =
                    |life: &(String, u64)| life.0 == assignment.actor_uid && life.1 <= assignment.generation;
                node.activations.cancel(past).await;
                let holding = node.holding(&assignment.actor_uid);
                for (worker, held) in &holding {
                    if held.generation <= assignment.generation {
                        node.terminate(worker, held).await?;
                    }
                }
                // A view may be older than a start that was cancelled just now: the worker itself is asked.
                let named = node.workers.get(&assignment.worker_id);
                if let Some(worker) = named.filter(|named| holding.iter().all(|(worker, _)| worker.id != named.id)) {
                    node.terminate(worker, &assignment).await?;
                }
                node.release_images(&assignment);
                let node = Arc::clone(&node);
                crate::blocking(move || {
                    let is_latest = || {
                        let latest = node.ledger.get(&assignment.actor_uid);
                        latest.is_none_or(|entry| entry.generation <= assignment.generation)
                    };
                    if is_latest() {
                        node.places.forget_secrets(&assignment.actor_uid);
                    }
                    node.places.close_volumes(&assignment.actor_uid, is_latest);
                })
                .await;
                Ok(())
            })
            .await
    }
}

pub(super) fn required<T>(value: Option<T>, field: &str) -> Result<T, NodeError> {
    value.ok_or_else(|| NodeError::invalid(field, "is missing"))
}

/// The answer for an assignment that runs already.
fn running(view: &View, assignment: &Assignment) -> Option<ActivateResponse> {
    let slot = view.slot.as_ref()?;
    let same = view.assignment().is_some_and(|held| {
        held.actor_uid == assignment.actor_uid && held.generation == assignment.generation
    });
    (same && matches!(slot.phase(), Phase::Running | Phase::Frozen | Phase::Checkpointing)).then(|| {
        ActivateResponse { ingress_endpoint: slot.ingress_endpoint.clone(), ..ActivateResponse::default() }
    })
}

/// The first thing that a worker lacks for a snapshot.
fn incompatible(
    needed: &Compatibility,
    here: &substrate_proto::ateom::GetCapabilitiesResponse,
) -> Option<String> {
    for (what, needed, here) in [
        ("the sandbox class", &needed.sandbox_class, &here.sandbox_class),
        ("the runtime", &needed.runtime_digest, &here.runtime_digest),
        ("the architecture", &needed.architecture, &here.architecture),
    ] {
        if needed != here {
            return Some(format!("{what} is {here}, needed is {needed}"));
        }
    }
    if let Some(feature) = needed.cpu_features.iter().find(|feature| !here.cpu_features.contains(feature)) {
        return Some(format!("the CPU has no {feature}"));
    }
    // Facts that only a snapshot has are the runtime's to judge.
    needed.facts.iter().find_map(|(name, value)| {
        let here = here.facts.get(name).filter(|here| *here != value)?;
        Some(format!("{name} is {here}, needed is {value}"))
    })
}

/// The first container whose image is not the snapshot's.
fn other_images(needed: &Compatibility, images: &[(String, Vec<Image>, ImageFacts)]) -> Option<String> {
    needed.images.iter().find_map(|(name, digest)| {
        match images.iter().find(|(container, _, _)| container == name) {
            Some((_, _, facts)) if facts.digest == *digest => None,
            Some((_, _, facts)) => {
                Some(format!("container {name} has image {}, needed is {digest}", facts.digest))
            }
            None => Some(format!("the template has no container {name}")),
        }
    })
}

#[cfg(test)]
mod tests {
    use substrate_proto::ateom::GetCapabilitiesResponse;

    use super::*;

    type Change = fn(&mut Compatibility);

    #[test]
    fn what_a_worker_lacks_is_named() {
        let here = GetCapabilitiesResponse {
            sandbox_class: "gvisor".into(),
            runtime_digest: "aa".into(),
            architecture: "amd64".into(),
            cpu_features: vec!["avx".into(), "avx2".into()],
            facts: [("platform".to_owned(), "systrap".to_owned())].into(),
            ..GetCapabilitiesResponse::default()
        };
        let fits = Compatibility {
            sandbox_class: "gvisor".into(),
            runtime_digest: "aa".into(),
            architecture: "amd64".into(),
            cpu_features: vec!["avx".into()],
            facts: [
                ("platform".to_owned(), "systrap".to_owned()),
                ("of.snapshot".to_owned(), "1".to_owned()),
            ]
            .into(),
            ..Compatibility::default()
        };
        assert_eq!(incompatible(&fits, &here), None);
        let changes: [(&str, Change); 5] = [
            ("sandbox class", |needed| needed.sandbox_class = "microvm".into()),
            ("runtime", |needed| needed.runtime_digest = "bb".into()),
            ("architecture", |needed| needed.architecture = "arm64".into()),
            ("avx512f", |needed| needed.cpu_features.push("avx512f".into())),
            ("platform", |needed| drop(needed.facts.insert("platform".into(), "kvm".into()))),
        ];
        for (word, change) in changes {
            let mut needed = fits.clone();
            change(&mut needed);
            let reason = incompatible(&needed, &here).unwrap();
            assert!(reason.contains(word), "{reason}");
        }
    }
}
