// SPDX-License-Identifier: Apache-2.0
//! The steps: each is idempotent I/O on a node and ends in an event for the state machine.
//!
//! A transport failure leaves the outcome unknown, so the same call is sent again, for as long as the node may still
//! be there: until it answers, or until its lease has ended with the margin, which proves that nothing runs there.
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use substrate_proto::{ateapi, atelet, ateom, types};
use tonic::Status;

use super::{FaultPoint, Injected, StepName, When};
use crate::engine::{Command, Engine, NodeHandle, lock};
use crate::model::{Actor, Generation, NodeName, Snapshot, SnapshotId, Template, Work};
use crate::node::{Fault, SharedNode, classify};
use crate::state::{Event, Failure, FailureKind, Manifest};
use crate::store;

/// Attempts of an activation whose outcome stays unknown although the node is there, before it is undone.
const ACTIVATE_ATTEMPTS: u32 = 5;
/// Attempts of an upload before it is left for later.
const UPLOAD_ATTEMPTS: u32 = 3;

/// The control plane was killed at a fault point.
#[derive(Debug)]
pub(crate) struct Killed;

/// What a step led to.
pub(crate) struct Outcome {
    pub(crate) event: Event,
    pub(crate) steps: Vec<ateapi::Step>,
}

impl Outcome {
    fn of(event: Event) -> Self {
        Self { event, steps: Vec::new() }
    }
}

/// Why a node did not do what it was insistently asked.
enum Insist {
    /// It answered.
    Fault(Fault),
    /// It is gone: nothing runs there any more.
    NodeLost(String),
    Killed,
}

impl From<Killed> for Insist {
    fn from(_: Killed) -> Self {
        Self::Killed
    }
}

pub(crate) fn hit(engine: &Engine, step: StepName, when: When) -> Result<Option<Status>, Killed> {
    match engine.faults.hit(FaultPoint { step, when }) {
        Injected::Nothing => Ok(None),
        Injected::Fail => Ok(Some(Status::internal(format!("injected failure {when:?} {step:?}")))),
        Injected::Crash => {
            engine.kill();
            Err(Killed)
        }
    }
}

/// Calls until the outcome is known. `attempts` bounds how often an unknown outcome is accepted while the node is there.
async fn insist<T, F, R>(
    engine: &Engine,
    node: &NodeHandle,
    step: StepName,
    attempts: Option<u32>,
    call: F,
) -> Result<T, Insist>
where
    F: Fn(SharedNode) -> R + Send,
    R: Future<Output = Result<T, Status>> + Send,
    T: Send,
{
    let mut tried = 0;
    loop {
        node.reachable().await.map_err(Insist::NodeLost)?;
        let result = if let Some(status) = hit(engine, step, When::Before)? {
            Err(status)
        } else {
            let result = call(Arc::clone(&node.client)).await;
            match hit(engine, step, When::After)? {
                // Done but not known to be done.
                Some(_) if tried == 0 => Err(Status::unavailable("injected loss of the answer")),
                _ => result,
            }
        };
        let status = match result {
            Ok(value) => return Ok(value),
            Err(status) => status,
        };
        match classify(&status, engine.clock.wall_ms()) {
            Fault::Unknown { reason, message } => {
                tried += 1;
                tracing::debug!(node = %node.name, ?step, tried, message, "the outcome is unknown, asking again");
                if attempts.is_some_and(|most| tried >= most) {
                    return Err(Insist::Fault(Fault::Unknown { reason, message }));
                }
                engine.pause(Duration::from_millis(50 << tried.min(5))).await;
            }
            fault => return Err(Insist::Fault(fault)),
        }
    }
}

fn timed(steps: Vec<ateom::StepTime>) -> Vec<ateapi::Step> {
    steps.into_iter().map(|it| ateapi::Step { name: it.name, micros: it.micros }).collect()
}

fn placed(engine: &Engine, actor: &Actor) -> Option<(Arc<NodeHandle>, types::Assignment)> {
    let placement = actor.placement.as_ref()?;
    Some((engine.node(&placement.node)?, actor.assignment()?))
}

fn node_is_unknown(actor: &Actor) -> Outcome {
    // The configuration no longer names the node: nothing can be asked of it. Its workers fence themselves when their
    // lease ends, which a node that nobody grants to has long seen.
    let node = actor.placement.as_ref().map_or("?", |it| it.node.as_str());
    Outcome::of(Event::WorkerLost {
        generation: actor.generation,
        message: format!("node {node} is no longer part of the configuration"),
    })
}

fn lost(generation: Generation, message: String) -> Outcome {
    Outcome::of(Event::WorkerLost { generation, message })
}

// ---------------------------------------------------------------------------------------------------------------------
// resume

/// `EnsureImages` (cold boot only), `Activate`; undo: `UndoActivate`.
///
/// Race: an activation whose answer was lost may be running. It is asked for again with the same assignment, which
/// joins or finds it; when it is given up, `UndoActivate` ends it *before* the failure is committed, so that no other
/// worker is ever assigned while it may run (P1).
pub(crate) async fn activate(engine: Arc<Engine>, actor: Actor) -> Result<Outcome, Killed> {
    let Some((node, assignment)) = placed(&engine, &actor) else { return Ok(node_is_unknown(&actor)) };
    let Some(Work::Resume(work)) = actor.work.clone() else { return Ok(node_is_unknown(&actor)) };
    let generation = actor.generation;
    let mut steps = Vec::new();
    let began = engine.clock.now();
    let attempt: Result<atelet::ActivateResponse, Insist> = async {
        let mut request =
            request(&engine, &actor, work.source.as_ref(), work.keep_volumes, assignment.clone())
                .await
                .map_err(Insist::Fault)?;
        // Nothing is built inside the deadline of a call that has one; where the snapshot is, its image is too.
        if request.snapshot.as_ref().is_none_or(|snapshot| snapshot.node_digest.is_empty()) {
            for container in request.template.iter().flat_map(|template| &template.containers) {
                let mounted = container.image_mounts.iter().map(|mount| &mount.image);
                for image in std::iter::once(&container.image).chain(mounted) {
                    ensure_image(&engine, &node, &actor, image).await?;
                }
            }
            let elapsed = engine.clock.now().saturating_sub(began).as_micros() as u64;
            steps.push(ateapi::Step { name: "ensure_images".to_owned(), micros: elapsed });
            progress(&engine, &actor, "starting_sandbox", 0);
        }
        request.lease_term_ms = engine.lease_for_activation(&node);
        insist(&engine, &node, StepName::Activate, Some(ACTIVATE_ATTEMPTS), |client| {
            let session = lock(&node.session).clone();
            let request = atelet::ActivateRequest { session, ..request.clone() };
            async move { client.activate(request).await }
        })
        .await
    }
    .await;
    let failure = match attempt {
        Ok(answer) => {
            steps.extend(timed(answer.steps));
            if !answer.restored_from.is_empty() {
                steps.push(ateapi::Step {
                    name: format!("restored_from_{}", answer.restored_from),
                    micros: 0,
                });
            }
            let event = Event::Activated { generation, ingress_endpoint: answer.ingress_endpoint };
            return Ok(Outcome { event, steps });
        }
        Err(Insist::Killed) => return Err(Killed),
        Err(Insist::NodeLost(message)) => return Ok(lost(generation, message)),
        Err(Insist::Fault(fault)) => fault,
    };
    let event = match failure {
        Fault::Exited(exit) => Event::Exited { generation, exit },
        fault => Event::ActivateFailed {
            generation,
            failure: activation_failure(&actor, work.source.as_ref(), fault),
        },
    };
    match let_go(&engine, &node, StepName::UndoActivate, &assignment).await {
        Err(Insist::Killed) => return Err(Killed),
        // A node that is lost has nothing running; one that knows a higher generation neither.
        Ok(()) | Err(Insist::NodeLost(_) | Insist::Fault(Fault::Stale(_))) => {}
        Err(Insist::Fault(fault)) => {
            tracing::warn!(actor = %actor.uid, node = %node.name, ?fault, "ending a failed activation failed");
            return lost_unless_released(&engine, &node, assignment, event).await;
        }
    }
    Ok(Outcome { event, steps })
}

async fn let_go(
    engine: &Engine,
    node: &NodeHandle,
    step: StepName,
    assignment: &types::Assignment,
) -> Result<(), Insist> {
    insist(engine, node, step, None, |client| {
        let request = node.release_request(assignment.clone());
        async move { client.release(request).await }
    })
    .await
}

/// The node refuses to release: ask until it does or is gone, slowly.
async fn lost_unless_released(
    engine: &Engine,
    node: &NodeHandle,
    assignment: types::Assignment,
    event: Event,
) -> Result<Outcome, Killed> {
    loop {
        engine.pause(Duration::from_secs(1)).await;
        match let_go(engine, node, StepName::UndoActivate, &assignment).await {
            Err(Insist::Killed) => return Err(Killed),
            Err(Insist::Fault(Fault::Stale(_)) | Insist::NodeLost(_)) | Ok(()) => {
                return Ok(Outcome::of(event));
            }
            Err(Insist::Fault(fault)) => tracing::warn!(node = %node.name, ?fault, "release failed again"),
        }
    }
}

fn activation_failure(actor: &Actor, source: Option<&SnapshotId>, fault: Fault) -> Failure {
    let of = |kind, reason: &str, message: String| Failure { kind, reason: reason.to_owned(), message };
    match fault {
        Fault::Corrupt { source: place, message } => {
            let snapshot = source.and_then(|id| actor.snapshot(id));
            let on_node = snapshot.is_some_and(|it| {
                it.node.is_some()
                    && it.node.as_ref() == actor.placement.as_ref().map(|placement| &placement.node)
            });
            let id = source.map_or("?", SnapshotId::as_str);
            let message = format!("snapshot {id}: {message}");
            if on_node && place != "durable" {
                of(FailureKind::NodeCopy, "SNAPSHOT_CORRUPT", message)
            } else {
                of(FailureKind::ForGood, "SNAPSHOT_CORRUPT", message)
            }
        }
        Fault::Refused { reason, message, .. } => {
            of(FailureKind::ForGood, reason.as_deref().unwrap_or("INCOMPATIBLE"), message)
        }
        Fault::ForGood { reason, message } => of(FailureKind::ForGood, &reason, message),
        Fault::Again { reason, message } => of(FailureKind::Again, &reason, message),
        Fault::Unknown { reason, message } => {
            of(FailureKind::Again, reason.as_deref().unwrap_or("NODE_UNREACHABLE"), message)
        }
        Fault::Stale(message) => of(FailureKind::Again, "STALE_GENERATION", message),
        Fault::Exited(_) => of(FailureKind::ForGood, "WORKLOAD_EXITED", "the workload ended".to_owned()),
    }
}

async fn request(
    engine: &Engine,
    actor: &Actor,
    source: Option<&SnapshotId>,
    keep_volumes: bool,
    assignment: types::Assignment,
) -> Result<atelet::ActivateRequest, Fault> {
    let again = |message: String| Fault::Again { reason: "STORE_FAILED".to_owned(), message };
    let template: Template = store::load(&*engine.store, actor.template_uid.as_str())
        .await
        .map_err(|error| again(error.to_string()))?
        .ok_or_else(|| Fault::ForGood {
            reason: "TEMPLATE_GONE".to_owned(),
            message: format!("template {} no longer exists", actor.spec.template),
        })?;
    let mut spec = template.spec;
    if let Some(egress) = &actor.egress {
        spec.egress = Some(egress.clone());
    }
    let files = engine.files_of(&actor.uid).await.map_err(|error| again(error.to_string()))?;
    let snapshot = match source {
        None => None,
        Some(id) => Some(actor.snapshot(id).ok_or_else(|| Fault::ForGood {
            reason: "SNAPSHOT_GONE".to_owned(),
            message: format!("snapshot {id} is no longer recorded"),
        })?),
    };
    let here = actor.placement.as_ref().map(|placement| &placement.node);
    Ok(atelet::ActivateRequest {
        snapshot: snapshot.map(|it| atelet::SnapshotSource {
            snapshot_id: it.id.0.clone(),
            actor_uid: it.origin.0.clone(),
            generation: it.generation.0,
            manifest_digest: it.manifest.clone().unwrap_or_default(),
            node_digest: if it.node.as_ref() == here { it.node_digest.clone() } else { String::new() },
            compatibility: Some(it.compatibility.clone()),
        }),
        identity: identity(actor),
        template: Some(spec),
        actor: Some(types::ActorSpec { files, ..actor.spec.clone() }),
        lease_term_ms: 0,
        keep_volumes,
        clone: actor.clone,
        assignment: Some(assignment),
        // Of the moment when it is sent.
        session: String::new(),
    })
}

/// What `/run/ate` shows.
fn identity(actor: &Actor) -> BTreeMap<String, Vec<u8>> {
    [
        ("name", actor.name.clone()),
        ("atespace", actor.atespace.clone()),
        ("uid", actor.uid.0.clone()),
        ("generation", actor.generation.to_string()),
        ("clone", actor.clone.to_string()),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value.into_bytes()))
    .collect()
}

fn progress(engine: &Arc<Engine>, actor: &Actor, step: &str, percent: u32) {
    let command = Command::Progress { generation: actor.generation, step: step.to_owned(), percent };
    engine.tell(&actor.uid, command);
}

async fn ensure_image(
    engine: &Arc<Engine>,
    node: &NodeHandle,
    actor: &Actor,
    reference: &str,
) -> Result<atelet::ImageInfo, Insist> {
    let seen = std::sync::atomic::AtomicU32::new(u32::MAX);
    pull(engine, node, &actor.atespace, &actor.class, reference, |percent| {
        // In steps of ten: each is a commit.
        let rounded = percent / 10 * 10;
        if seen.swap(rounded, std::sync::atomic::Ordering::Relaxed) != rounded {
            progress(engine, actor, "pulling_image", rounded);
        }
    })
    .await
}

async fn pull(
    engine: &Engine,
    node: &NodeHandle,
    atespace: &str,
    class: &str,
    reference: &str,
    report: impl Fn(u32) + Send + Sync,
) -> Result<atelet::ImageInfo, Insist> {
    let report = &report;
    insist(engine, node, StepName::EnsureImages, Some(ACTIVATE_ATTEMPTS), |client| {
        let request = atelet::EnsureImageRequest {
            atespace: atespace.to_owned(),
            reference: reference.to_owned(),
            sandbox_class: class.to_owned(),
        };
        async move {
            let mut messages = client.ensure_image(request).await?;
            while let Some(message) = messages.next().await {
                let message = message?;
                if let Some(image) = message.image {
                    return Ok(image);
                }
                let percent = (message.bytes_done * 100).checked_div(message.bytes_total);
                if message.phase != "ready" && message.phase != "resolving" {
                    report(percent.unwrap_or(0).min(100) as u32);
                }
            }
            Err(Status::unavailable("the node ended the pull without a result"))
        }
    })
    .await
}

/// Resolves an image on a node, for a template. The pull goes on there when the caller gives up; a retry joins it.
pub(crate) async fn resolve_image(
    engine: &Engine,
    node: &NodeHandle,
    atespace: &str,
    class: &str,
    reference: &str,
) -> Result<atelet::ImageInfo, Fault> {
    match pull(engine, node, atespace, class, reference, |_| {}).await {
        Ok(image) => Ok(image),
        Err(Insist::Fault(fault)) => Err(fault),
        Err(Insist::NodeLost(message)) => Err(Fault::Unknown { reason: None, message }),
        Err(Insist::Killed) => {
            let message = "the control plane is stopping".to_owned();
            Err(Fault::Unknown { reason: None, message })
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// suspend, pause, checkpoint

fn snapshot_of(actor: &Actor, node: &NodeName, id: &SnapshotId, made: atelet::NodeSnapshot) -> Snapshot {
    Snapshot {
        id: id.clone(),
        origin: actor.uid.clone(),
        generation: actor.generation,
        time_ms: made.time_ms,
        bytes: made.bytes,
        stored_bytes: 0,
        node: Some(node.clone()),
        node_digest: made.node_digest,
        manifest: None,
        packs: Vec::new(),
        compatibility: made.compatibility.unwrap_or_default(),
        cause: String::new(),
        tags: std::collections::BTreeSet::new(),
        upload: None,
    }
}

/// `Checkpoint`: OK means that the snapshot's files and record are fsynced; only then does memory's end count.
///
/// Race: the worker may die between the complete snapshot and the answer. The call is repeated with the same snapshot
/// id until the node says what became of it: a snapshot that it has is found, whatever happened to the worker.
pub(crate) async fn checkpoint(engine: Arc<Engine>, actor: Actor) -> Result<Outcome, Killed> {
    let Some((node, assignment)) = placed(&engine, &actor) else { return Ok(node_is_unknown(&actor)) };
    let generation = actor.generation;
    let (id, step, mode, only_if_idle, drain_ms) = match &actor.work {
        Some(Work::Stop(work)) => (
            work.snapshot.clone(),
            StepName::Checkpoint,
            ateom::checkpoint_request::Mode::Stop,
            work.only_if_idle,
            work.drain_ms,
        ),
        Some(Work::Checkpoint(work)) => (
            work.snapshot.clone(),
            StepName::CheckpointLive,
            ateom::checkpoint_request::Mode::KeepRunning,
            false,
            0,
        ),
        _ => return Ok(node_is_unknown(&actor)),
    };
    let request = atelet::CheckpointRequest {
        assignment: Some(assignment.clone()),
        snapshot_id: id.0.clone(),
        mode: mode as i32,
        only_if_idle,
        drain_ms,
    };
    let result = insist(&engine, &node, step, None, |client| {
        let request = request.clone();
        async move { client.checkpoint(request).await }
    })
    .await;
    let live = step == StepName::CheckpointLive;
    let event = match result {
        Ok(answer) => {
            let Some(made) = answer.snapshot else {
                let message = "the node answered without a snapshot".to_owned();
                return Ok(Outcome::of(Event::CheckpointFailed { generation, message }));
            };
            let snapshot = Box::new(snapshot_of(&actor, &node.name, &id, made));
            let event = Event::Snapshotted { generation, snapshot };
            return Ok(Outcome { event, steps: timed(answer.steps) });
        }
        Err(Insist::Killed) => return Err(Killed),
        Err(Insist::NodeLost(message)) => Event::WorkerLost { generation, message },
        Err(Insist::Fault(Fault::Refused { busy, reason, message })) => {
            let fallback = if busy { "BUSY" } else { "REFUSED" };
            Event::CheckpointRefused {
                generation,
                reason: reason.unwrap_or_else(|| fallback.to_owned()),
                message,
            }
        }
        Err(Insist::Fault(Fault::Exited(exit))) => Event::Exited { generation, exit },
        Err(Insist::Fault(fault)) => {
            let message = fault_text(fault);
            if live && still_runs(&engine, &node, &assignment).await? {
                Event::CheckpointAbandoned { generation, message }
            } else {
                Event::CheckpointFailed { generation, message }
            }
        }
    };
    // The sandbox of a failed checkpoint is gone or of no use: its slot is freed before the failure counts.
    if matches!(event, Event::CheckpointFailed { .. }) {
        release_failed(&engine, &node, &assignment).await?;
    }
    Ok(Outcome::of(event))
}

async fn release_failed(
    engine: &Engine,
    node: &NodeHandle,
    assignment: &types::Assignment,
) -> Result<(), Killed> {
    match let_go(engine, node, StepName::Release, assignment).await {
        Err(Insist::Killed) => Err(Killed),
        Err(Insist::Fault(fault)) => {
            tracing::warn!(node = %node.name, ?fault, "releasing after a failed checkpoint failed");
            Ok(())
        }
        _ => Ok(()),
    }
}

/// After a failed checkpoint that should have kept it running: asks the node what the slot holds.
async fn still_runs(
    engine: &Engine,
    node: &NodeHandle,
    assignment: &types::Assignment,
) -> Result<bool, Killed> {
    use ateom::slot_status::Phase;
    let report =
        insist(engine, node, StepName::CheckpointLive, None, |client| async move { client.get_node().await });
    match report.await {
        Err(Insist::Killed) => Err(Killed),
        Err(_) => Ok(false),
        Ok(report) => Ok(report.workers.iter().any(|worker| {
            let Some(slot) = &worker.slot else { return false };
            worker.alive
                && worker.worker_id == assignment.worker_id
                && matches!(slot.phase(), Phase::Running | Phase::Frozen | Phase::Checkpointing)
                && slot.assignment.as_ref().is_some_and(|held| {
                    held.actor_uid == assignment.actor_uid && held.generation == assignment.generation
                })
        })),
    }
}

fn fault_text(fault: Fault) -> String {
    match fault {
        Fault::Unknown { message, .. }
        | Fault::Stale(message)
        | Fault::Refused { message, .. }
        | Fault::Corrupt { message, .. }
        | Fault::ForGood { message, .. }
        | Fault::Again { message, .. } => message,
        Fault::Exited(exit) => format!("the workload ended with code {}", exit.code),
    }
}

/// `Release`, `DeleteRelease`: returns when the cgroup is empty. A higher generation there is as good.
pub(crate) async fn release(engine: Arc<Engine>, actor: Actor, step: StepName) -> Result<Outcome, Killed> {
    let Some((node, assignment)) = placed(&engine, &actor) else { return Ok(node_is_unknown(&actor)) };
    let generation = actor.generation;
    let began = engine.clock.now();
    loop {
        match let_go(&engine, &node, step, &assignment).await {
            Ok(()) | Err(Insist::Fault(Fault::Stale(_))) => {
                let micros = engine.clock.now().saturating_sub(began).as_micros() as u64;
                let steps = vec![ateapi::Step { name: "release".to_owned(), micros }];
                return Ok(Outcome { event: Event::Released { generation }, steps });
            }
            Err(Insist::Killed) => return Err(Killed),
            Err(Insist::NodeLost(message)) => return Ok(lost(generation, message)),
            Err(Insist::Fault(fault)) => {
                tracing::warn!(actor = %actor.uid, node = %node.name, ?fault, "a release failed, trying again");
                engine.pause(Duration::from_secs(1)).await;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// upload

/// `Upload`: OK means that pack and manifest are durable in the blob store.
///
/// Race: the actor may run again meanwhile, from this very snapshot, and make others. The outcome is about this
/// snapshot alone. Its parent is the newest durable snapshot, which retention keeps until a newer one is committed:
/// that is this one, since an actor has one upload at a time. So no pack it refers to can have become garbage.
pub(crate) async fn upload(engine: Arc<Engine>, actor: Actor, id: SnapshotId) -> Result<Outcome, Killed> {
    let failed = |engine: &Engine, attempts: u32, message: String| {
        let not_before_ms = engine.clock.wall_ms() + super::backoff_ms(attempts);
        Outcome::of(Event::UploadFailed { snapshot: id.clone(), message, not_before_ms })
    };
    let Some(snapshot) = actor.snapshot(&id) else {
        return Ok(failed(&engine, 0, "the snapshot is no longer recorded".to_owned()));
    };
    let attempts = snapshot.upload.as_ref().map_or(0, |wish| wish.attempts);
    let Some(name) = &snapshot.node else {
        return Ok(failed(&engine, attempts, "no node has a copy of it".to_owned()));
    };
    let Some(node) = engine.node(name) else {
        return Ok(failed(&engine, attempts, format!("node {name} is no longer part of the configuration")));
    };
    let parents = actor.snapshots.iter().rev().filter(|it| it.id != id).find_map(|it| {
        Some(atelet::ParentManifest {
            actor_uid: it.origin.0.clone(),
            snapshot_id: it.id.0.clone(),
            generation: it.generation.0,
            manifest_digest: it.manifest.clone()?,
        })
    });
    let request = atelet::UploadRequest {
        actor_uid: snapshot.origin.0.clone(),
        atespace: actor.atespace.clone(),
        generation: snapshot.generation.0,
        snapshot_id: id.0.clone(),
        node_digest: snapshot.node_digest.clone(),
        parents: parents.into_iter().collect(),
    };
    let mut last = String::new();
    for attempt in 0..UPLOAD_ATTEMPTS {
        if attempt > 0 {
            engine.pause(Duration::from_millis(200)).await;
        }
        // A node that is away is not waited for: the wish stays, and is tried again.
        if !node.is_up() {
            last = format!("node {name} is not connected");
            break;
        }
        let result = if let Some(status) = hit(&engine, StepName::Upload, When::Before)? {
            Err(status)
        } else {
            let result = node.client.upload(request.clone()).await;
            match hit(&engine, StepName::Upload, When::After)? {
                Some(status) => Err(status),
                None => result,
            }
        };
        match result {
            Ok(answer) => {
                let manifest = Manifest {
                    digest: answer.manifest_digest,
                    packs: answer.packs,
                    bytes: answer.bytes,
                    stored_bytes: answer.stored_bytes,
                };
                let event = Event::Uploaded { snapshot: id, manifest };
                return Ok(Outcome { event, steps: timed(answer.steps) });
            }
            Err(status) => match classify(&status, engine.clock.wall_ms()) {
                // Only the node has it and the node has not: what a verb leads on from is decided by the record.
                Fault::Corrupt { source, message } if source == "node" => {
                    let event = Event::NodeCopyLost { snapshot: id, message };
                    return Ok(Outcome::of(event));
                }
                fault => last = fault_text(fault),
            },
        }
    }
    Ok(failed(&engine, attempts, last))
}

// ---------------------------------------------------------------------------------------------------------------------
// delete

/// `Purge`: removes what nodes have of the actor. A node that is away is left to the collector.
pub(crate) async fn purge(engine: Arc<Engine>, actor: Actor) -> Result<Vec<NodeName>, Killed> {
    let mut left = Vec::new();
    for name in &actor.nodes {
        let request = atelet::PurgeRequest {
            actor_uid: actor.uid.0.clone(),
            atespace: actor.atespace.clone(),
            actor_name: actor.name.clone(),
        };
        let done = match engine.node(name).filter(|node| node.is_up()) {
            None => Err(Status::unavailable("not connected")),
            Some(node) => match hit(&engine, StepName::Purge, When::Before)? {
                Some(status) => Err(status),
                None => node.client.purge(request).await,
            },
        };
        hit(&engine, StepName::Purge, When::After)?;
        if let Err(status) = done {
            tracing::info!(actor = %actor.uid, node = %name, %status, "purging is left for later");
            left.push(name.clone());
        }
    }
    Ok(left)
}
