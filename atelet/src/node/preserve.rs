// SPDX-License-Identifier: Apache-2.0
//! Checkpoint, Upload, and what becomes of snapshots (P2).
//!
//! ```text
//! Checkpoint ─ there already? ─▶ task of (uid, snapshot id), joined by retries
//!   ─ refused while nothing was touched: not enough disk, volumes with KEEP_RUNNING, what the ateom refuses
//!   ─▶ ateom writes and fsyncs ─▶ volumes archived (STOP) ─▶ digests, record, rename, fsync ─▶ OK
//! Upload ─ node snapshot verified and pinned ─▶ parents' manifests ─▶ pack ─▶ manifest ─▶ OK
//! ```
//!
//! A checkpoint goes on in the ateom when this process dies. The retry after its restart finds the unfinished
//! directory and asks the ateom for the same directory again, which joins it or answers what it made (`ateom.proto`).
use std::sync::{Arc, PoisonError};

use substrate_proto::atelet::{
    CheckpointRequest, CheckpointResponse, DeleteBlobsRequest, DropSnapshotRequest, NodeSnapshot,
    PurgeRequest, UploadRequest, UploadResponse,
};
use substrate_proto::ateom as ateom_proto;
use substrate_proto::ateom::checkpoint_request::Mode;
use substrate_proto::types::Assignment;
use tonic::{Code, Status};

use super::activate::{Steps, required};
use super::{Node, SnapshotKey, answers};
use crate::error::{NodeError, actor_name};
use crate::snapshot::node::{Draft, NodeSnapshot as Local, Staging, described};
use crate::snapshot::restore::Wanted;
use crate::snapshot::{FileKind, SnapshotError, Source, check_name, unix_ms, volume};
use crate::worker::{Client, View, Worker};

/// Room that a checkpoint needs besides the actor's memory and volumes, bytes.
const CHECKPOINT_BYTES: u64 = 32 << 20;
/// Refused checkpoints that are remembered.
const REFUSED: usize = 1024;
const WORKER_WAIT: std::time::Duration = std::time::Duration::from_secs(10);

/// The actor is not in its slot.
fn not_running(worker: &Worker, view: &View, assignment: &Assignment) -> NodeError {
    NodeError::NotRunning {
        actor: actor_name(assignment),
        generation: assignment.generation,
        worker: worker.id.clone(),
        found: view.assignment().map_or("the slot is empty".to_owned(), |held| {
            format!("{} (generation {}) is there", actor_name(held), held.generation)
        }),
    }
}

impl Node {
    /// Checkpoint; see the module.
    pub(super) async fn checkpoint(
        self: &Arc<Self>,
        request: CheckpointRequest,
    ) -> Result<CheckpointResponse, Status> {
        let assignment = required(request.assignment.clone(), "assignment")?;
        let uid = assignment.actor_uid.clone();
        check_name("actor uid", &uid).map_err(NodeError::from)?;
        check_name("snapshot id", &request.snapshot_id).map_err(NodeError::from)?;
        if request.mode() == Mode::Unspecified {
            return Err(NodeError::invalid("mode", "must be STOP or KEEP_RUNNING").into());
        }
        self.ledger.check(&assignment)?;
        let node = Arc::clone(self);
        let key = (uid, request.snapshot_id.clone());
        if let Some(status) = self.refused_before(&key) {
            return Err(status);
        }
        self.checkpoints
            .run(key.clone(), move |_| async move {
                let begun = std::time::Instant::now();
                let outcome = node.make_checkpoint(&assignment, &request).await;
                let mode = if request.mode() == Mode::Stop { "stop" } else { "keep" };
                crate::metrics::checkpoint(mode, outcome.is_ok(), begun);
                let outcome = outcome.map_err(Status::from);
                if let Err(status) = &outcome
                    && status.code() == Code::FailedPrecondition
                {
                    node.note_refused(key, status.clone());
                }
                outcome
            })
            .await
    }

    fn refused_before(&self, key: &SnapshotKey) -> Option<Status> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.iter().find(|(known, _)| known == key).map(|(_, status)| status.clone())
    }

    fn note_refused(&self, key: SnapshotKey, status: Status) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if refused.len() == REFUSED {
            refused.pop_front();
        }
        refused.push_back((key, status));
    }

    async fn make_checkpoint(
        self: &Arc<Self>,
        assignment: &Assignment,
        request: &CheckpointRequest,
    ) -> Result<CheckpointResponse, NodeError> {
        let (uid, id) = (assignment.actor_uid.clone(), request.snapshot_id.clone());
        if let Some(found) = self.find(&uid, &id).await? {
            if found.record.generation != assignment.generation {
                return Err(SnapshotError::Taken {
                    snapshot: id,
                    found: format!("generation {}", found.record.generation),
                }
                .into());
            }
            return Ok(CheckpointResponse { snapshot: Some(found.to_proto()), steps: Vec::new() });
        }
        let worker = self.worker(&assignment.worker_id)?;
        // Fenced and not up again: the actor is not there, and whoever waits for it should know at once.
        let view = worker.view();
        if view.vacant {
            return Err(not_running(worker, &view, assignment));
        }
        let (view, client) = worker.up(WORKER_WAIT).await?;
        let stop = request.mode() == Mode::Stop;
        let mut steps = Steps::begin();
        let time_ms = unix_ms();
        // Begun before this process: the ateom joins it, or answers what it made. A directory that it refuses is of an
        // attempt that came to nothing.
        let mut begun = None;
        if let Some(staging) = self.snapshots.unfinished(&uid, &id) {
            tracing::info!(
                snapshot = id,
                worker = worker.id,
                "picking up a checkpoint that was begun before"
            );
            match self.ask_checkpoint(worker, &view, client.clone(), assignment, request, &staging).await {
                Err(NodeError::Ateom { reason, .. }) if reason == "DIRECTORY" => {
                    crate::blocking(move || staging.discard()).await;
                }
                answer => begun = Some((answer, staging)),
            }
        }
        let (answer, staging) = if let Some(begun) = begun {
            begun
        } else {
            let staging = self.stage_checkpoint(worker, &view, assignment, stop, &id).await?;
            steps.done("prepare");
            (self.ask_checkpoint(worker, &view, client, assignment, request, &staging).await, staging)
        };
        let response = match answer {
            Ok(response) => response,
            Err(error) => {
                // With the outcome unknown, the directory may yet become a snapshot.
                let unknown = matches!(
                    &error,
                    NodeError::Ateom { code: Code::Unavailable | Code::Unknown | Code::Cancelled, .. }
                );
                if !unknown {
                    crate::blocking(move || staging.discard()).await;
                }
                return Err(error);
            }
        };
        steps.include("ateom", response.steps);
        if stop && let Err(error) = self.ledger.end(assignment) {
            tracing::warn!(%error, "a late start would not be recognised after a restart of this process");
        }
        let draft = Draft {
            snapshot_id: id,
            actor_uid: uid.clone(),
            generation: assignment.generation,
            time_ms,
            memory_bytes: response.memory_bytes,
            compatibility: response.compatibility.unwrap_or_default(),
        };
        let files = described(&response.files);
        let node = Arc::clone(self);
        let made = crate::blocking(move || node.record(staging, &draft, &files, stop)).await?;
        steps.done("record");
        if stop {
            self.release_images(assignment);
            let node = Arc::clone(self);
            crate::blocking(move || node.places.forget_secrets(&uid)).await;
        }
        Ok(CheckpointResponse { snapshot: Some(made.to_proto()), steps: steps.into_vec() })
    }

    async fn ask_checkpoint(
        &self,
        worker: &Worker,
        view: &View,
        mut client: Client,
        assignment: &Assignment,
        request: &CheckpointRequest,
        staging: &Staging,
    ) -> Result<ateom_proto::CheckpointResponse, NodeError> {
        let asked = ateom_proto::CheckpointRequest {
            assignment: Some(assignment.clone()),
            directory: staging.files_dir().display().to_string(),
            mode: request.mode,
            only_if_idle: request.only_if_idle,
            drain_ms: request.drain_ms,
        };
        match client.checkpoint(asked).await {
            Ok(response) => Ok(response.into_inner()),
            Err(status) => Err(self.failed(worker, view, "a checkpoint", &status, answers::checkpoint).await),
        }
    }

    /// A new directory for a checkpoint. Refusals here leave the actor running.
    async fn stage_checkpoint(
        self: &Arc<Self>,
        worker: &Worker,
        view: &View,
        assignment: &Assignment,
        stop: bool,
        id: &str,
    ) -> Result<Staging, NodeError> {
        let here = view.assignment().is_some_and(|held| {
            held.actor_uid == assignment.actor_uid && held.generation == assignment.generation
        });
        if !here {
            return Err(not_running(worker, view, assignment));
        }
        let memory = view.stats.as_ref().map_or(0, |stats| stats.memory_bytes);
        let (node, uid, id) = (Arc::clone(self), assignment.actor_uid.clone(), id.to_owned());
        crate::blocking(move || {
            let volumes = node.places.volumes(&uid)?;
            if !stop && !volumes.is_empty() {
                return Err(NodeError::CheckpointRefused(
                    "an actor with volumes or a root on a disk cannot be checkpointed while it goes on: they and its memory \
                     would be of different moments; suspend or pause it, or take them out of its template"
                        .to_owned(),
                ));
            }
            let bytes: u64 = volumes.iter().map(|(_, dir)| volume::disk_bytes(dir)).sum();
            let room = || node.disk.admit("a checkpoint", CHECKPOINT_BYTES + memory + bytes);
            if room().is_err()
                && let Err(error) = node.snapshots.evict(0)
            {
                tracing::warn!(%error, "cannot evict cached snapshots");
            }
            room().map_err(|low| NodeError::CheckpointRefused(low.to_string()))?;
            // Nothing was touched if this fails.
            node.snapshots.stage(&uid, &id).map_err(|error| NodeError::CheckpointRefused(error.to_string()))
        })
        .await
    }

    /// Makes a node snapshot of what an ateom wrote. The actor's memory may be nowhere else by now, so a disk that is
    /// full gets a second chance without the cache.
    fn record(
        &self,
        staging: Staging,
        draft: &Draft,
        files: &[(FileKind, String, u64)],
        stop: bool,
    ) -> Result<Local, NodeError> {
        let attempt = || {
            let mut files = files.to_vec();
            files.extend(self.archive_volumes(&staging, &draft.actor_uid, stop)?);
            Ok::<_, NodeError>(self.snapshots.commit(&staging, draft.clone(), &files)?)
        };
        let made = attempt().or_else(|error| {
            tracing::warn!(%error, "a checkpoint could not be recorded; trying once more without the cache");
            match self.snapshots.evict(0) {
                Ok(_) => attempt(),
                Err(_) => Err(error),
            }
        });
        let made = match made {
            Ok(made) => made,
            Err(error) => {
                staging.discard();
                return Err(error);
            }
        };
        if stop {
            self.places.volumes_are_at(&made.record.actor_uid, &made);
        }
        if let Err(error) = self.snapshots.discard_unfinished(&made.record.actor_uid) {
            tracing::warn!(%error, "unfinished checkpoints stay behind");
        }
        Ok(made)
    }

    fn archive_volumes(
        &self,
        staging: &Staging,
        uid: &str,
        stop: bool,
    ) -> Result<Vec<(FileKind, String, u64)>, NodeError> {
        if !stop {
            return Ok(Vec::new());
        }
        self.places
            .volumes(uid)?
            .into_iter()
            .map(|(name, dir)| {
                let path = staging.path(FileKind::Volume, &name);
                // From an attempt that this process did not finish.
                crate::durable::remove_file(&path)
                    .and_then(|()| volume::pack(&dir, &path))
                    .map(|size| (FileKind::Volume, name, size))
                    .map_err(NodeError::io("archiving the actor's volumes"))
            })
            .collect()
    }

    async fn find(&self, uid: &str, id: &str) -> Result<Option<Local>, SnapshotError> {
        let (snapshots, uid, id) = (self.snapshots.clone(), uid.to_owned(), id.to_owned());
        crate::blocking(move || snapshots.find(&uid, &id)).await
    }

    /// Upload; see the module.
    pub(super) async fn upload(self: &Arc<Self>, request: UploadRequest) -> Result<UploadResponse, Status> {
        let key = (request.actor_uid.clone(), request.snapshot_id.clone());
        let node = Arc::clone(self);
        self.uploads
            .run(key, move |_| async move {
                let begun = std::time::Instant::now();
                let outcome = node.make_upload(request).await;
                let ended = outcome.as_ref().ok().map(|response| (response.bytes, response.stored_bytes));
                crate::metrics::upload(ended, begun);
                Ok(outcome?)
            })
            .await
    }

    async fn make_upload(self: &Arc<Self>, request: UploadRequest) -> Result<UploadResponse, NodeError> {
        let mut steps = Steps::begin();
        let _slot = self
            .upload_slots
            .acquire()
            .await
            .map_err(|_| NodeError::WorkerDown { worker: String::new(), reason: "the node stops".into() })?;
        steps.done("queue");
        let snapshot = self.find(&request.actor_uid, &request.snapshot_id).await?.ok_or_else(|| {
            SnapshotError::Missing {
                snapshot: request.snapshot_id.clone(),
                place: format!("on node {}", self.config.node),
                from: Source::Node,
            }
        })?;
        if snapshot.record.generation != request.generation {
            return Err(NodeError::invalid(
                "generation",
                format!("is {}, the snapshot was made by {}", request.generation, snapshot.record.generation),
            ));
        }
        let _pin = self.snapshots.pin(&snapshot);
        let (snapshots, verifying, digest) =
            (self.snapshots.clone(), snapshot.clone(), request.node_digest.clone());
        crate::blocking(move || {
            snapshots
                .verify(&verifying, Some(&digest).filter(|digest| !digest.is_empty()).map(String::as_str))
        })
        .await?;
        steps.done("verify");
        let mut parents = Vec::new();
        for parent in &request.parents {
            let wanted = Wanted {
                atespace: request.atespace.clone(),
                actor_uid: parent.actor_uid.clone(),
                snapshot_id: parent.snapshot_id.clone(),
                generation: parent.generation,
                manifest_digest: parent.manifest_digest.clone(),
            };
            match self.durable.manifest(&wanted).await {
                Ok(manifest) => parents.push(manifest),
                // It only saves bytes; what is not referenced is written.
                Err(error) => tracing::warn!(%error, "a parent cannot be referenced"),
            }
        }
        steps.done("parents");
        let uploaded = self.durable.upload(&snapshot, &request.atespace, &parents).await?;
        let (snapshots, digest) = (self.snapshots.clone(), uploaded.manifest_digest.clone());
        crate::blocking(move || snapshots.set_uploaded(&snapshot, &digest)).await;
        steps.done("upload");
        Ok(UploadResponse {
            manifest_digest: uploaded.manifest_digest,
            bytes: uploaded.bytes,
            stored_bytes: uploaded.stored_bytes,
            packs: uploaded.packs,
            steps: steps.into_vec(),
        })
    }

    /// Complete snapshots of an actor on this node.
    pub(super) async fn list_snapshots(&self, uid: String) -> Result<Vec<NodeSnapshot>, NodeError> {
        let snapshots = self.snapshots.clone();
        let found = crate::blocking(move || snapshots.list(&uid)).await?;
        Ok(found.iter().map(Local::to_proto).collect())
    }

    /// The control plane does not need this copy.
    pub(super) async fn drop_snapshot(&self, request: DropSnapshotRequest) -> Result<(), NodeError> {
        let (snapshots, limit) = (self.snapshots.clone(), self.config.snapshot_cache_bytes);
        crate::blocking(move || {
            snapshots.allow_drop(&request.actor_uid, &request.snapshot_id)?;
            if let Err(error) = snapshots.evict(limit) {
                tracing::warn!(%error, "the cache of snapshots may be larger than it should");
            }
            Ok(())
        })
        .await
    }

    /// Deletes what the control plane no longer references.
    pub(super) async fn delete_blobs(&self, request: DeleteBlobsRequest) -> Result<(), NodeError> {
        Ok(self.durable.delete(&request.actor_uid, &request.manifests, &request.packs).await?)
    }

    /// Removes everything of a deleted actor from this node.
    pub(super) async fn purge(self: &Arc<Self>, request: PurgeRequest) -> Result<(), Status> {
        let uid = request.actor_uid.clone();
        check_name("actor uid", &uid).map_err(NodeError::from)?;
        for (what, name) in [("atespace", &request.atespace), ("actor_name", &request.actor_name)] {
            if !crate::config::is_label(name) {
                return Err(NodeError::invalid(what, "is not a DNS-1123 label").into());
            }
        }
        let generation = self.ledger.get(&uid).map_or(0, |entry| entry.generation);
        let highest = self.holding(&uid).iter().map(|(_, held)| held.generation).max().unwrap_or(0);
        self.release(Assignment {
            actor_uid: uid.clone(),
            atespace: request.atespace.clone(),
            actor_name: request.actor_name.clone(),
            generation: generation.max(highest),
            worker_id: String::new(),
        })
        .await?;
        // What still reads or writes its files comes to its end first.
        self.checkpoints.settle(|key| key.0 == uid).await;
        self.uploads.settle(|key| key.0 == uid).await;
        self.fetches.settle(|key| key.0 == uid).await;
        let node = Arc::clone(self);
        let removed = crate::blocking(move || {
            node.snapshots.purge(&uid)?;
            node.places.purge(&uid, &request.atespace, &request.actor_name)?;
            node.logs.forget(&node.places.log_dir(&request.atespace, &request.actor_name));
            node.ledger.forget(&uid);
            Ok::<_, NodeError>(())
        })
        .await;
        Ok(removed?)
    }
}
