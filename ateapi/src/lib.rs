// SPDX-License-Identifier: Apache-2.0
//! substrate's control plane: atespaces, templates, actors, their states, workers and leases.
//!
//! ```text
//!  gRPC ──▶ service ──▶ engine ──▶ drivers (one task per actor that has something to do)
//!                         │            │  state::transition  (pure: what may happen)
//!                         │            │  workflow::next     (pure: which step comes next)
//!                         │            │  workflow::steps    (I/O: one idempotent step)
//!                         │            ▼
//!                         │          store  (one commit = one row compared and set, its changelog, its events)
//!                         ▼
//!                       node sessions (workers, news, leases) ──▶ atelet.v1.Node
//! ```
//!
//! An actor's record is the only truth about it. Everything that must survive a crash is in it: its state, its
//! assignment and generation, its snapshots, the work in progress. A driver task is spawned when something happens to
//! an actor and ends when nothing is left to do, so that sleeping actors cost neither a task nor memory.
#![forbid(unsafe_code)]

pub mod access;
pub mod backup;
mod clock;
mod config;
mod egress;
mod engine;
mod idle;
pub mod inventory;
mod metrics;
pub mod model;
pub mod node;
mod retention;
mod schedule;
mod secrets;
mod service;
pub mod state;
pub mod store;
#[cfg(any(test, feature = "testing"))]
mod testing;
pub mod workflow;

use std::sync::Arc;

#[cfg(feature = "testing")]
#[doc(hidden)]
pub use testing::bench;

pub use clock::{Clock, SystemClock, TokioClock};
pub use config::{Config, NodeEndpoint};

use substrate_proto::ateapi::admin_server::AdminServer;
use substrate_proto::ateapi::control_server::ControlServer;
use substrate_proto::tls;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Largest request: a template, or an actor with its files.
const MAX_REQUEST: usize = 4 << 20;
/// How long answers may take once the control plane is told to stop.
const LAST_ANSWERS: std::time::Duration = std::time::Duration::from_secs(5);

/// Why the control plane could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key of the configuration is wrong.
    #[error("configuration of the control plane: {0}")]
    Config(String),
    /// An endpoint of a node is no address.
    #[error(
        "node {node}: endpoint {endpoint:?} cannot be used: {reason}; write \"unix:/path\", or \"https://host:port\" and tls"
    )]
    #[allow(missing_docs)]
    Endpoint { node: String, endpoint: String, reason: String },
    /// The key file.
    #[error(transparent)]
    Secret(#[from] secrets::SecretError),
    /// The database.
    #[error(transparent)]
    Store(#[from] store::StoreError),
    /// The TCP listener, its certificates, or the audit log.
    #[error(transparent)]
    Access(#[from] access::AccessError),
    /// The socket could not be opened.
    #[error(transparent)]
    Listen(#[from] substrate_proto::seam::ListenError),
    /// The reflection service does not understand the descriptors.
    #[error("gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// gRPC serving ended.
    #[error("serving the control plane's socket failed: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// Runs the control plane until `shutdown`; `ready` is told once the socket accepts calls, with the address of the TCP
/// listener if there is one. Actors are left as they are: whoever wants them suspended first calls `SuspendAll`.
pub async fn serve(
    config: Config,
    ready: oneshot::Sender<Option<std::net::SocketAddr>>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    config.validate()?;
    let mut nodes = Vec::new();
    for node in &config.nodes {
        let client = node::GrpcNode::new(&node.endpoint, node.tls.as_ref()).map_err(|reason| {
            Error::Endpoint { node: node.name.clone(), endpoint: node.endpoint.clone(), reason }
        })?;
        nodes.push((model::NodeName(node.name.clone()), Arc::new(client) as node::SharedNode));
    }
    let sealer = secrets::Sealer::open(&config.keys)?;
    let store: store::SharedStore = Arc::new(store::SqliteStore::open(&config.database).await?);
    // The socket first: when another control plane serves on it, nothing of its nodes is touched.
    let peers = substrate_proto::seam::Peers { uid: config.socket_peer_uid, gid: config.socket_peer_gid };
    let local = substrate_proto::seam::listen(&config.socket, peers)?;
    let access = Arc::new(access::Access::open(config.remote.as_ref(), &config.audit_log())?);
    let remote = match &config.remote {
        Some(remote) => {
            Some(tls::Listener::bind(remote.listener()).await.map_err(access::AccessError::from)?)
        }
        None => None,
    };
    let engine = engine::Engine::start(
        Arc::clone(&store),
        Arc::new(SystemClock),
        sealer,
        engine::Settings::from(&config),
        nodes,
        Arc::new(workflow::NoFaults),
    )
    .await?;
    engine.spawn(metrics::watch(Arc::clone(&engine), config.database.clone()));
    let service = service::ControlService::new(Arc::clone(&engine));
    let control = ControlServer::new(access::Guarded::new(service, Arc::clone(&access)))
        .max_decoding_message_size(MAX_REQUEST);
    let admin = AdminServer::new(service::admin::AdminService::new(Arc::clone(&engine), Arc::clone(&access)))
        .max_decoding_message_size(MAX_REQUEST);
    // Health is anyone's who got a connection; the list of RPCs is for callers who say who they are.
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<ControlServer<access::Guarded>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(substrate_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let known_only = move |request: tonic::Request<()>| {
        access.identify(request.extensions(), request.metadata()).map(|_| request)
    };
    let reflection = tonic::service::interceptor::InterceptedService::new(reflection, known_only);
    let address = remote.as_ref().map(tls::Listener::address);
    let incoming = tls::either(local, remote);
    let _ = ready.send(address);
    // Watches and execs end with the engine, so that serving does not wait for clients that never leave.
    let stopping = Arc::clone(&engine);
    let overdue = shutdown.clone();
    let signal = async move {
        shutdown.cancelled().await;
        stopping.stop().await;
    };
    let server = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(std::time::Duration::from_secs(20)))
        .add_service(control)
        .add_service(admin)
        .add_service(health)
        .add_service(reflection)
        .serve_with_incoming_shutdown(incoming, signal);
    let served = tokio::select! {
        served = server => served,
        // A client that keeps its connection and does not read would hold the end up.
        () = async { overdue.cancelled().await; tokio::time::sleep(LAST_ANSWERS).await } => Ok(()),
    };
    engine.stop().await;
    store.close().await;
    Ok(served?)
}
