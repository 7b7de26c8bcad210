// SPDX-License-Identifier: Apache-2.0
//! The seam to the nodes: a trait over `atelet.v1.Node`, what its errors mean, and one session per node.
mod errors;
mod grpc;
pub(crate) mod session;

use std::sync::Arc;

use futures::stream::BoxStream;
use substrate_proto::{atelet, types};
use tonic::Status;

pub use errors::{Fault, classify};
pub use grpc::GrpcNode;

/// A stream of messages of a node.
pub type Messages<T> = BoxStream<'static, Result<T, Status>>;

/// `atelet.v1.Node` as the control plane calls it. Every call is idempotent; the contract is the proto's.
#[async_trait::async_trait]
#[allow(missing_docs)]
pub trait NodeClient: Send + Sync + 'static {
    async fn get_node(&self) -> Result<atelet::GetNodeResponse, Status>;
    async fn session(
        &self,
        requests: tokio::sync::mpsc::Receiver<atelet::SessionRequest>,
    ) -> Result<Messages<atelet::SessionEvent>, Status>;
    async fn ensure_image(
        &self,
        request: atelet::EnsureImageRequest,
    ) -> Result<Messages<atelet::EnsureImageProgress>, Status>;
    async fn activate(&self, request: atelet::ActivateRequest) -> Result<atelet::ActivateResponse, Status>;
    async fn checkpoint(
        &self,
        request: atelet::CheckpointRequest,
    ) -> Result<atelet::CheckpointResponse, Status>;
    async fn upload(&self, request: atelet::UploadRequest) -> Result<atelet::UploadResponse, Status>;
    async fn release(&self, request: atelet::ReleaseRequest) -> Result<(), Status>;
    async fn drop_snapshot(&self, request: atelet::DropSnapshotRequest) -> Result<(), Status>;
    async fn delete_blobs(&self, request: atelet::DeleteBlobsRequest) -> Result<(), Status>;
    async fn purge(&self, request: atelet::PurgeRequest) -> Result<(), Status>;
    async fn set_egress(&self, request: atelet::SetEgressRequest) -> Result<(), Status>;
    async fn exec(
        &self,
        inputs: tokio::sync::mpsc::Receiver<types::ExecInput>,
    ) -> Result<Messages<types::ExecOutput>, Status>;
    async fn logs(&self, request: atelet::LogsRequest) -> Result<Messages<atelet::LogsChunk>, Status>;
}

/// A client that is shared.
pub type SharedNode = Arc<dyn NodeClient>;
