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

mod clock;
mod config;
pub mod model;

pub use clock::{Clock, SystemClock, TokioClock};
pub use config::{Config, NodeEndpoint};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Why the control plane could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key of the configuration is wrong.
    #[error("configuration of the control plane: {0}")]
    Config(String),
    /// The socket could not be opened.
    #[error(transparent)]
    Listen(#[from] substrate_proto::seam::ListenError),
    /// gRPC serving ended.
    #[error("serving the control plane's socket failed: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// Runs the control plane until `shutdown`; `ready` is told once the socket accepts calls.
pub async fn serve(
    config: Config,
    ready: oneshot::Sender<()>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    config.validate()?;
    let peers = substrate_proto::seam::Peers { uid: config.socket_peer_uid, gid: config.socket_peer_gid };
    let incoming = substrate_proto::seam::listen(&config.socket, peers)?;
    let (_, health) = tonic_health::server::health_reporter();
    let _ = ready.send(());
    tonic::transport::Server::builder()
        .add_service(health)
        .serve_with_incoming_shutdown(incoming, shutdown.cancelled_owned())
        .await?;
    Ok(())
}
