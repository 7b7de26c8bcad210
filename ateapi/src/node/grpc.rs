// SPDX-License-Identifier: Apache-2.0
//! The node client over gRPC. One lazy channel per node; a broken connection is dialled again by the next call.
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use hyper_util::rt::TokioIo;
use substrate_proto::atelet::node_client::NodeClient as Stub;
use substrate_proto::tls::ClientFiles;
use substrate_proto::{atelet, types};
use tonic::codegen::http::uri::Authority;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use super::{Messages, NodeClient};

/// Deadlines of calls. A call that may be long for good reason has its own.
const SHORT: Duration = Duration::from_mins(1);
const ACTIVATE: Duration = Duration::from_mins(15);
const CHECKPOINT: Duration = Duration::from_mins(10);
const UPLOAD: Duration = Duration::from_hours(1);
/// Largest message: a template with its files, or a pack list.
const MAX_MESSAGE: usize = 16 << 20;

/// See the module.
#[derive(Debug, Clone)]
pub struct GrpcNode(Stub<Channel>);

impl GrpcNode {
    /// Of an endpoint `unix:/path`, or `https://host:port` and the files for it; dials later.
    ///
    /// # Errors
    /// What is wrong with the endpoint or the files.
    pub fn new(endpoint: &str, tls: Option<&ClientFiles>) -> Result<Self, String> {
        let settled = |address: String| {
            let endpoint = Endpoint::from_shared(address).map_err(|error| error.to_string())?;
            Ok::<_, String>(
                endpoint
                    .connect_timeout(Duration::from_secs(5))
                    .http2_keep_alive_interval(Duration::from_secs(10))
                    .keep_alive_timeout(Duration::from_secs(10))
                    .keep_alive_while_idle(true),
            )
        };
        let channel = match (endpoint.strip_prefix("https://"), tls) {
            (Some(authority), Some(files)) => {
                files.check().map_err(|error| error.to_string())?;
                let parsed: Authority =
                    authority.parse().map_err(|error| format!("it is no address ({error})"))?;
                let port = parsed.port_u16().ok_or("it has no port")?;
                let (host, files) = (parsed.host().trim_matches(['[', ']']).to_owned(), files.clone());
                // The connector does the TLS, with the files as they are at each dial; tonic is to see none.
                settled(format!("http://{authority}"))?.connect_with_connector_lazy(tower::service_fn(
                    move |_| {
                        let (host, files) = (host.clone(), files.clone());
                        async move { files.dial(&host, port).await.map(TokioIo::new) }
                    },
                ))
            }
            (Some(_), None) => return Err("it needs tls: ca, cert and key".to_owned()),
            (None, None) if endpoint.starts_with("unix:/") => settled(endpoint.to_owned())?.connect_lazy(),
            (None, _) => return Err("it is neither a Unix socket nor a TLS address with a port".to_owned()),
        };
        Ok(Self(
            Stub::new(channel).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE),
        ))
    }
}

fn within<T>(message: T, deadline: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

fn messages<T: Send + 'static>(response: Response<tonic::Streaming<T>>) -> Messages<T> {
    response.into_inner().into_stream().boxed()
}

#[async_trait::async_trait]
impl NodeClient for GrpcNode {
    async fn get_node(&self) -> Result<atelet::GetNodeResponse, Status> {
        let request = within(atelet::GetNodeRequest {}, SHORT);
        self.0.clone().get_node(request).await.map(Response::into_inner)
    }

    async fn session(
        &self,
        requests: tokio::sync::mpsc::Receiver<atelet::SessionRequest>,
    ) -> Result<Messages<atelet::SessionEvent>, Status> {
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        self.0.clone().session(requests).await.map(messages)
    }

    async fn ensure_image(
        &self,
        request: atelet::EnsureImageRequest,
    ) -> Result<Messages<atelet::EnsureImageProgress>, Status> {
        self.0.clone().ensure_image(request).await.map(messages)
    }

    async fn activate(&self, request: atelet::ActivateRequest) -> Result<atelet::ActivateResponse, Status> {
        self.0.clone().activate(within(request, ACTIVATE)).await.map(Response::into_inner)
    }

    async fn checkpoint(
        &self,
        request: atelet::CheckpointRequest,
    ) -> Result<atelet::CheckpointResponse, Status> {
        self.0.clone().checkpoint(within(request, CHECKPOINT)).await.map(Response::into_inner)
    }

    async fn upload(&self, request: atelet::UploadRequest) -> Result<atelet::UploadResponse, Status> {
        self.0.clone().upload(within(request, UPLOAD)).await.map(Response::into_inner)
    }

    async fn release(&self, request: atelet::ReleaseRequest) -> Result<(), Status> {
        self.0.clone().release(within(request, SHORT)).await.map(drop)
    }

    async fn drop_snapshot(&self, request: atelet::DropSnapshotRequest) -> Result<(), Status> {
        self.0.clone().drop_snapshot(within(request, SHORT)).await.map(drop)
    }

    async fn delete_blobs(&self, request: atelet::DeleteBlobsRequest) -> Result<(), Status> {
        self.0.clone().delete_blobs(within(request, SHORT)).await.map(drop)
    }

    async fn purge(&self, request: atelet::PurgeRequest) -> Result<(), Status> {
        self.0.clone().purge(within(request, SHORT)).await.map(drop)
    }

    async fn set_egress(&self, request: atelet::SetEgressRequest) -> Result<(), Status> {
        self.0.clone().set_egress(within(request, SHORT)).await.map(drop)
    }

    async fn exec(
        &self,
        inputs: tokio::sync::mpsc::Receiver<types::ExecInput>,
    ) -> Result<Messages<types::ExecOutput>, Status> {
        let inputs = tokio_stream::wrappers::ReceiverStream::new(inputs);
        self.0.clone().exec(inputs).await.map(messages)
    }

    async fn logs(&self, request: atelet::LogsRequest) -> Result<Messages<atelet::LogsChunk>, Status> {
        self.0.clone().logs(request).await.map(messages)
    }
}
