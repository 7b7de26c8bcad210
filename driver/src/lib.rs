// SPDX-License-Identifier: Apache-2.0
//! OpenShell's compute driver for substrate: `openshell.compute.v1.ComputeDriver` on a Unix socket, carried out by the
//! control plane (`ateapi.v1.Control`). It knows nothing of storage, runtimes or nodes.
//!
//! ```text
//! gateway ──▶ service ─┬▶ validate ▶ synthesize ▶ supervisor   a request as a template and an actor (pure)
//!                      ├▶ create, journal                      three records and their undo
//!                      ├▶ lifecycle                            stop, start, delete
//!                      ├▶ atespace                             workspaces
//!                      └▶ hub ▶ mirror ▶ condition             one watch for all, what the gateway is told (pure)
//!                         boot                                 first boots that failed
//!                         session, policy                      sessions of supervisors, and their egress policies
//!                         probe                                whether a runtime can bring a supervisor back
//!             all of them ▶ control ──▶ ateapi
//! ```
//!
//! The driver keeps no state of its own: everything it has to remember stands in labels and annotations of actors,
//! templates and atespaces ([`names`]), so it can be killed at any moment and started again.
#![forbid(unsafe_code)]

pub mod atespace;
pub mod backoff;
pub mod boot;
pub mod bundle;
pub mod condition;
pub mod config;
pub mod control;
pub mod create;
pub mod driver;
pub mod driver_config;
pub mod failure;
pub mod gates;
pub mod hub;
pub mod image;
pub mod journal;
pub mod lifecycle;
pub mod metrics;
pub mod mirror;
pub mod names;
pub mod policy;
pub mod probe;
pub mod quantity;
pub mod receipt;
pub mod service;
pub mod session;
pub mod supervisor;
pub mod synthesize;
pub mod tls;
pub mod token;
pub mod validate;

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use substrate_proto::compute::compute_driver_server::ComputeDriverServer;
use substrate_proto::seam::{self, Peers};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use config::{Config, ConfigError, Supervisor, SupervisorMode};

/// How long calls under way may take once the driver is told to stop.
const GRACE: Duration = Duration::from_secs(20);

/// Why the driver could not serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The socket cannot be opened.
    #[error(transparent)]
    Listen(#[from] seam::ListenError),
    /// The session hub cannot be started.
    #[error("cannot start the session hub: {0}")]
    Sessions(std::io::Error),
    /// The server failed.
    #[error("the driver's server on {path} failed: {source}")]
    Serve {
        /// Its socket.
        path: String,
        /// Why.
        source: tonic::transport::Error,
    },
}

/// Serves the gateway until `shutdown`; `ready` is told once the socket listens.
///
/// The control plane may be away, at the start and later: calls then fail with a clear error, and the watch heals.
///
/// # Errors
/// When the configuration is contradictory, the socket cannot be opened, or the server fails.
pub async fn serve(
    config: Config,
    ready: oneshot::Sender<()>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    config.check()?;
    let peers = Peers { uid: config.socket_peer_uid, gid: config.socket_peer_gid };
    let incoming = seam::listen(&config.socket_path, peers)?;
    let path = config.socket_path.display().to_string();
    let control = control::Control::new(&config);
    let delivery = supervisor::Delivery::prepare(&config)?;
    let tasks = TaskTracker::new();
    // Ends the watchers and background work after the server was told to stop taking calls.
    let quit = shutdown.child_token();
    let (boots, failed_boots) = mpsc::unbounded_channel();
    let policies = Arc::new(OnceLock::new());
    let (receipts, shown) = mpsc::unbounded_channel();
    let sessions = session::Sessions::new(
        &config,
        &control,
        &delivery.master_key,
        &policies,
        receipts.clone(),
        quit.clone(),
    )
    .map_err(Error::Sessions)?;
    let (hub, hub_task) = hub::Hub::new(control.clone(), boots, sessions, quit.clone());
    let _ = policies.set(policy::Policies::new(control.clone(), hub.clone()));
    let class = config.default_sandbox_class;
    let probes = supervisor::probe_sandbox(&config, &delivery).map(|(template, files)| {
        probe::Probes::new(control.clone(), template, files, &config.supervisor.store)
    });
    let driver = Arc::new(driver::Driver {
        config,
        probes: probes.clone(),
        delivery,
        control,
        hub,
        gates: gates::Gates::default(),
        sweep: Arc::new(Notify::new()),
        debts: Mutex::default(),
        receipts,
        tasks: tasks.clone(),
    });
    tasks.spawn(hub_task);
    tasks.spawn(journal::run(Arc::clone(&driver), quit.clone()));
    tasks.spawn(receipt::run(Arc::clone(&driver), shown, quit.clone()));
    tasks.spawn(boot::run(Arc::clone(&driver), failed_boots, quit.clone()));
    if let Some(probes) = probes {
        // So that the first create need not wait for it.
        let quit = quit.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = quit.cancelled() => {}
                probed = probes.reason(class) => if let Err(failure) = probed {
                    tracing::warn!(error = %failure, "no supervisor yet");
                }
            }
        });
    }
    tracing::info!(socket = path, endpoint = driver.control.endpoint(), "the driver serves");
    if ready.send(()).is_err() {
        tracing::debug!("nobody waited for the driver to be ready");
    }
    let served = tonic::transport::Server::builder()
        .add_service(ComputeDriverServer::new(service::Service::new(driver)))
        .serve_with_incoming_shutdown(incoming, shutdown.clone().cancelled_owned());
    let served = tokio::select! {
        served = served => served.map_err(|source| Error::Serve { path, source }),
        () = async { shutdown.cancelled().await; tokio::time::sleep(GRACE).await } => {
            tracing::warn!("calls under way took longer than {} s and are cut off", GRACE.as_secs());
            Ok(())
        }
    };
    quit.cancel();
    tasks.close();
    if tokio::time::timeout(GRACE, tasks.wait()).await.is_err() {
        tracing::warn!("background work did not end in time; the next start takes it up");
    }
    served
}
