// SPDX-License-Identifier: Apache-2.0
//! `atelet.v1.Node` over gRPC: thin.
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use substrate_proto::atelet as api;
use substrate_proto::atelet::node_server;
use substrate_proto::ateom::SetEgressRequest;
use substrate_proto::types::{ExecInput, ExecOutput, exec_input};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::activate::required;
use super::{Node, answers};
use crate::actor::resolve::egress_cidrs;
use crate::error::NodeError;
use crate::image::Reference;

/// How long a call waits for a worker that is just being started.
const WORKER_WAIT: Duration = Duration::from_secs(5);

/// Serves a node.
pub(super) struct Service(pub(super) Arc<Node>);

type Answer<T> = Result<Response<T>, Status>;
type Output<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl node_server::Node for Service {
    async fn get_node(&self, _: Request<api::GetNodeRequest>) -> Answer<api::GetNodeResponse> {
        let node = &self.0;
        let usage = node.disk.usage().map_err(NodeError::io("reading the disk's usage"))?;
        Ok(Response::new(api::GetNodeResponse {
            node: node.config.node.clone(),
            boot_id: node.boot_id.clone(),
            workers: node.workers.values().map(Node::worker_message).collect(),
            disk_used: usage.used,
            disk_free: usage.free,
        }))
    }

    type SessionStream = ReceiverStream<Result<api::SessionEvent, Status>>;

    async fn session(&self, request: Request<Streaming<api::SessionRequest>>) -> Answer<Self::SessionStream> {
        Ok(Response::new(self.0.open_session(request.into_inner())))
    }

    type EnsureImageStream = Output<api::EnsureImageProgress>;

    async fn ensure_image(
        &self,
        request: Request<api::EnsureImageRequest>,
    ) -> Answer<Self::EnsureImageStream> {
        let request = request.into_inner();
        let failed = |source| NodeError::Image { container: String::new(), source };
        let reference: Reference = request.reference.parse().map_err(failed)?;
        self.0.disk.admit("an image", 0).map_err(NodeError::from)?;
        let (images, node) = (self.0.images.clone(), Arc::clone(&self.0));
        let of_machine = request.sandbox_class == "microvm";
        // Latest wins: a reader that is slow sees fewer steps, never stale ones at the end.
        let (progress, mut seen) = tokio::sync::watch::channel(None);
        let work = tokio::spawn(async move {
            let image = images
                .ensure(&request.atespace, &reference, |now| {
                    // Not ready before its disk is.
                    if !(of_machine && now.phase == crate::image::Phase::Ready) {
                        progress.send_replace(Some(now));
                    }
                })
                .await?;
            if of_machine {
                let (bytes_done, bytes_total) = (0, 0);
                let phase = crate::image::Phase::Building;
                progress.send_replace(Some(crate::image::Progress { phase, bytes_done, bytes_total }));
                node.erofs.ensure(&image).await?;
            }
            Ok(image)
        });
        let (sender, answers) = mpsc::channel(8);
        tokio::spawn(async move {
            while seen.changed().await.is_ok() {
                let Some(now) = *seen.borrow_and_update() else { continue };
                let step = api::EnsureImageProgress {
                    phase: now.phase.as_str().to_owned(),
                    bytes_done: now.bytes_done,
                    bytes_total: now.bytes_total,
                    image: None,
                };
                if now.phase != crate::image::Phase::Ready && sender.send(Ok(step)).await.is_err() {
                    // The pull goes on: a retry finds it further on.
                    return;
                }
            }
            let last = match work.await {
                Ok(Ok(image)) => Ok(api::EnsureImageProgress {
                    phase: "ready".to_owned(),
                    image: Some(image_info(&image)),
                    ..api::EnsureImageProgress::default()
                }),
                Ok(Err(error)) => Err(failed(error).into()),
                Err(error) => Err(Status::internal(format!("the task that pulls images ended: {error}"))),
            };
            // Gone callers ask again.
            let _ = sender.send(last).await;
        });
        Ok(Response::new(ReceiverStream::new(answers).boxed()))
    }

    async fn activate(&self, request: Request<api::ActivateRequest>) -> Answer<api::ActivateResponse> {
        self.0.activate(request.into_inner()).await.map(Response::new)
    }

    async fn checkpoint(&self, request: Request<api::CheckpointRequest>) -> Answer<api::CheckpointResponse> {
        self.0.checkpoint(request.into_inner()).await.map(Response::new)
    }

    async fn upload(&self, request: Request<api::UploadRequest>) -> Answer<api::UploadResponse> {
        self.0.upload(request.into_inner()).await.map(Response::new)
    }

    async fn release(&self, request: Request<api::ReleaseRequest>) -> Answer<api::ReleaseResponse> {
        let request = request.into_inner();
        let assignment = required(request.assignment, "assignment")?;
        self.0.of_this_session(&request.session)?;
        self.0.release(assignment).await?;
        Ok(Response::new(api::ReleaseResponse {}))
    }

    async fn list_snapshots(
        &self,
        request: Request<api::ListSnapshotsRequest>,
    ) -> Answer<api::ListSnapshotsResponse> {
        let snapshots = self.0.list_snapshots(request.into_inner().actor_uid).await?;
        Ok(Response::new(api::ListSnapshotsResponse { snapshots }))
    }

    async fn drop_snapshot(
        &self,
        request: Request<api::DropSnapshotRequest>,
    ) -> Answer<api::DropSnapshotResponse> {
        self.0.drop_snapshot(request.into_inner()).await?;
        Ok(Response::new(api::DropSnapshotResponse {}))
    }

    async fn delete_blobs(
        &self,
        request: Request<api::DeleteBlobsRequest>,
    ) -> Answer<api::DeleteBlobsResponse> {
        self.0.delete_blobs(request.into_inner()).await?;
        Ok(Response::new(api::DeleteBlobsResponse {}))
    }

    async fn purge(&self, request: Request<api::PurgeRequest>) -> Answer<api::PurgeResponse> {
        self.0.purge(request.into_inner()).await?;
        Ok(Response::new(api::PurgeResponse {}))
    }

    async fn set_egress(&self, request: Request<api::SetEgressRequest>) -> Answer<api::SetEgressResponse> {
        let request = request.into_inner();
        let assignment = required(request.assignment, "assignment")?;
        self.0.ledger.check(&assignment)?;
        let worker = self.0.worker(&assignment.worker_id)?;
        let (view, mut client) = worker.up(WORKER_WAIT).await?;
        let cidrs = egress_cidrs(request.policy.as_ref());
        let answered = client.set_egress(SetEgressRequest { assignment: Some(assignment), cidrs }).await;
        if let Err(status) = answered {
            return Err(self
                .0
                .failed(worker, &view, "a change of egress", &status, answers::other)
                .await
                .into());
        }
        Ok(Response::new(api::SetEgressResponse {}))
    }

    type ExecStream = Output<ExecOutput>;

    async fn exec(&self, request: Request<Streaming<ExecInput>>) -> Answer<Self::ExecStream> {
        let mut input = request.into_inner();
        let first = required(input.message().await?, "start")?;
        let Some(exec_input::Input::Start(start)) = &first.input else {
            return Err(NodeError::invalid("start", "must be the first message").into());
        };
        let assignment = required(start.assignment.clone(), "start.assignment")?;
        self.0.ledger.check(&assignment)?;
        let worker = self.0.worker(&assignment.worker_id)?;
        let (_, mut client) = worker.up(WORKER_WAIT).await?;
        // A broken input is an end of input: the process decides what that means, as with a pipe.
        let rest = input
            .take_while(|message| std::future::ready(message.is_ok()))
            .filter_map(|message| std::future::ready(message.ok()));
        let forward = futures::stream::once(std::future::ready(first)).chain(rest);
        let id = worker.id.clone();
        let output = client
            .exec(forward)
            .await
            .map_err(|status| Status::from(answers::other(&id, &status)))?
            .into_inner()
            .map(move |output| output.map_err(|status| answers::other(&id, &status).into()));
        Ok(Response::new(output.boxed()))
    }

    type LogsStream = Output<api::LogsChunk>;

    async fn logs(&self, request: Request<api::LogsRequest>) -> Answer<Self::LogsStream> {
        let request = request.into_inner();
        let known = self.0.ledger.get(&request.actor_uid).ok_or_else(|| {
            Status::not_found(format!("this node knows nothing of actor {}", request.actor_uid))
        })?;
        let container = if request.container.is_empty() {
            known.containers.first().cloned().unwrap_or_default()
        } else {
            request.container
        };
        if !known.containers.contains(&container) {
            return Err(NodeError::invalid(
                "container",
                format!("{container:?} is none of {}", known.containers.join(", ")),
            )
            .into());
        }
        let path = self.0.places.log_dir(&known.atespace, &known.name).join(format!("{container}.log"));
        let chunks = self.0.logs.read(path, request.tail, request.follow)?;
        Ok(Response::new(chunks.map(|chunk| chunk.map(|data| api::LogsChunk { data })).boxed()))
    }
}

fn image_info(image: &crate::image::Image) -> api::ImageInfo {
    let config = &image.config;
    api::ImageInfo {
        digest: image.digest.to_string(),
        pinned_reference: image.pinned_reference.to_string(),
        size: image.size,
        entrypoint: config.entrypoint.clone(),
        cmd: config.cmd.clone(),
        env: config.env.clone(),
        user: config.user.clone(),
        working_dir: config.working_dir.clone(),
        exposed_ports: config.exposed_ports.iter().map(|port| u32::from(*port)).collect(),
    }
}
