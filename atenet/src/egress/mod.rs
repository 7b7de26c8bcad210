// SPDX-License-Identifier: Apache-2.0
//! The egress proxy of a node: the only way out for its actors (P7).
//!
//! * [`packet`]: the socket that ateoms hand connections over on; [`slot`] is its other end.
//! * [`actors`]: policies and names per (uid, generation). [`policy`], [`filter`]: what is allowed, what never is.
//! * [`dns`]: the resolver's answers. [`flow`]: one connection, with [`sniff`] and [`resolve`].
//! * [`audit`]: every flow and every denial, in a file and to the control plane.
//!
//! A worker's network namespace has no route out: what is not carried here does not leave. DNS over HTTPS needs no
//! special case: its server is a name or an address like any other.
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use substrate_proto::atenet::egress_frame::Frame;
use substrate_proto::atenet::{DnsAnswer, FlowClosed, FlowOwner, PacketDenied};
use substrate_proto::seam::ListenError;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::control;

mod actors;
mod audit;
mod dns;
mod filter;
mod flow;
pub mod packet;
mod policy;
mod resolve;
pub mod slot;
mod sniff;
#[cfg(test)]
mod tests;

/// A service that an administrator opens to actors by name though its address is refused (the model server, the
/// session hub). The proxy connects to it; an actor's own policy must still allow the name and port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The name that actors use, lower case.
    pub name: String,
    /// The port that actors dial.
    pub port: u16,
    /// Where the proxy connects to.
    pub target: SocketAddr,
    /// Atespaces that may use it; empty: all.
    pub atespaces: Vec<String>,
}

/// What the proxy needs to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// SOCK_SEQPACKET socket to listen on (`RUN/egress.sock`).
    pub socket: PathBuf,
    /// The control plane: `unix:/path` or `http://host:port`.
    pub ateapi: String,
    /// JSON lines, see `docs/egress.md`.
    pub audit_log: PathBuf,
    /// Resolver of real names; default: the system's (`/etc/resolv.conf`, `/etc/hosts`).
    pub resolver: Option<SocketAddr>,
    /// Further networks that no rule opens: the control plane's, pods', services'.
    pub refuse: Vec<IpNet>,
    /// Services opened by name.
    pub publish: Vec<Published>,
    /// Bounds.
    pub limits: Limits,
}

impl Config {
    /// The defaults with this socket, control plane and audit log.
    pub fn new(socket: impl Into<PathBuf>, ateapi: impl Into<String>, audit_log: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            ateapi: ateapi.into(),
            audit_log: audit_log.into(),
            resolver: None,
            refuse: Vec::new(),
            publish: Vec::new(),
            limits: Limits::default(),
        }
    }
}

/// Bounds of the proxy.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Actors whose policy is remembered; default 4096.
    pub actors: usize,
    /// Connections in all; default 8192.
    pub flows: usize,
    /// Connections of one actor; default 512.
    pub flows_per_actor: usize,
    /// Names one actor may have addresses of; default 1024.
    pub names_per_actor: usize,
    /// Queries of one worker under way; more are answered SERVFAIL; default 256.
    pub queries: usize,
    /// How long a connection may take to show where it goes; default 10 s.
    pub sniff_timeout: Duration,
    /// How long a name may take to resolve; default 5 s.
    pub resolve_timeout: Duration,
    /// How long connecting may take over all addresses; default 10 s.
    pub connect_timeout: Duration,
    /// Longest silence of a connection; default 1 h.
    pub idle: Duration,
    /// Size at which the audit log is rotated, bytes; default 64 MiB.
    pub audit_bytes: u64,
    /// Rotated audit logs kept; default 4.
    pub audit_files: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            actors: 4096,
            flows: 8192,
            flows_per_actor: 512,
            names_per_actor: 1024,
            queries: 256,
            sniff_timeout: Duration::from_secs(10),
            resolve_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(10),
            idle: Duration::from_hours(1),
            audit_bytes: 64 << 20,
            audit_files: 4,
        }
    }
}

/// Why the proxy does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The audit log cannot be written: without it nothing is carried.
    #[error("cannot write the egress audit log {path}: {source}; make its directory writable")]
    Audit {
        /// Its path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The resolver cannot be used.
    #[error("cannot use resolver {0}")]
    Resolver(String),
    /// A published service's name is none.
    #[error("published service {0:?} is not a lower-case host name")]
    Published(String),
    /// The control plane's address is unusable.
    #[error(transparent)]
    Dial(#[from] control::DialError),
}

pub(crate) struct Proxy {
    actors: Arc<actors::Actors>,
    filter: filter::Filter,
    names: resolve::Names,
    audit: audit::Audit,
    publish: Vec<Published>,
    limits: Limits,
    flows: Arc<Semaphore>,
}

/// Runs the proxy until `shutdown`; `ready` fires when the socket is there.
///
/// # Errors
/// Only before `ready`: the socket, the audit log or the resolver is unusable.
pub async fn serve(
    config: Config,
    ready: oneshot::Sender<()>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let node: filter::NodeAddresses = Arc::new(filter::interface_addresses);
    serve_with(config, node, Vec::new(), ready, shutdown).await
}

/// [`serve`] with the machine's addresses from elsewhere and networks exempt from the filter, for tests.
async fn serve_with(
    config: Config,
    node: filter::NodeAddresses,
    exempt: Vec<IpNet>,
    ready: oneshot::Sender<()>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let limits = config.limits;
    for service in &config.publish {
        if policy::normal_name(&service.name).as_deref() != Some(service.name.as_str()) {
            return Err(Error::Published(service.name.clone()));
        }
    }
    let control = control::dial(&config.ateapi)?;
    let names = resolve::Names::new(config.resolver, limits.resolve_timeout).map_err(Error::Resolver)?;
    let rotation = audit::Rotation { bytes: limits.audit_bytes, keep: limits.audit_files };
    // Ends the log after the last flow, not with it.
    let quiet = CancellationToken::new();
    let (audit, writer) = audit::start(&config.audit_log, rotation, control.clone(), quiet.clone())
        .await
        .map_err(|source| Error::Audit { path: config.audit_log.clone(), source })?;
    let listener = packet::Listener::bind(&config.socket)?;
    let bounds = actors::Bounds {
        actors: limits.actors,
        flows_per_actor: limits.flows_per_actor,
        names_per_actor: limits.names_per_actor,
    };
    let proxy = Arc::new(Proxy {
        actors: actors::Actors::new(control, bounds),
        filter: filter::Filter::new(config.refuse, exempt, node),
        names,
        audit,
        publish: config.publish,
        flows: Arc::new(Semaphore::new(limits.flows)),
        limits,
    });
    let stop = shutdown.child_token();
    let _stop_when_dropped = stop.clone().drop_guard();
    let tasks = TaskTracker::new();
    tasks.spawn(proxy.actors.clone().keep(stop.clone()));
    tracing::info!(socket = %config.socket.display(), "egress is ready");
    // Nobody may be waiting.
    let _ = ready.send(());
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(packets) => {
                tasks.spawn(session(proxy.clone(), packets, stop.clone(), tasks.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a worker's connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    tasks.close();
    if tokio::time::timeout(Duration::from_secs(5), tasks.wait()).await.is_err() {
        tracing::warn!(tasks = tasks.len(), "egress ends with flows that do not");
    }
    quiet.cancel();
    drop(proxy);
    if let Err(error) = writer.await {
        tracing::error!(%error, "the audit log's task failed");
    }
    if let Err(error) = std::fs::remove_file(&config.socket) {
        tracing::warn!(socket = %config.socket.display(), %error, "cannot remove the egress socket");
    }
    Ok(())
}

/// Says `FlowClosed` exactly once, however a flow ends.
struct Closing {
    flow_id: u64,
    out: mpsc::UnboundedSender<Frame>,
}

impl Drop for Closing {
    fn drop(&mut self) {
        // The connection has ended: its ateom has no use for it any more.
        let _ = self.out.send(Frame::Closed(FlowClosed { flow_id: self.flow_id }));
    }
}

async fn session(proxy: Arc<Proxy>, packets: packet::Packets, stop: CancellationToken, tasks: TaskTracker) {
    let packets = Arc::new(packets);
    let worker = match tokio::time::timeout(Duration::from_secs(10), packets.receive()).await {
        Ok(Ok(Some((Frame::Hello(hello), None)))) => hello.worker_id,
        other => {
            tracing::warn!(?other, "a worker's connection did not begin with Hello");
            return;
        }
    };
    // One frame per flow and query under way at most, and those are bounded.
    let (out, mut frames) = mpsc::unbounded_channel();
    let writer = packets.clone();
    let writer = tokio::spawn(async move {
        while let Some(frame) = frames.recv().await {
            if let Err(error) = writer.send(frame, None).await {
                tracing::debug!(%error, "cannot answer a worker");
                return;
            }
        }
    });
    let cut = stop.child_token();
    let queries = Arc::new(Semaphore::new(proxy.limits.queries));
    loop {
        let received = tokio::select! {
            () = stop.cancelled() => break,
            received = packets.receive() => received,
        };
        match received {
            Ok(None) => break,
            Err(error) => {
                tracing::warn!(%worker, %error, "a worker's connection broke");
                break;
            }
            Ok(Some((Frame::Open(open), Some(socket)))) => {
                let closing = Closing { flow_id: open.flow_id, out: out.clone() };
                let owner = open.owner.unwrap_or_default();
                let handed = flow::Handed { owner, destination: open.original_destination, socket };
                let permit = proxy.flows.clone().try_acquire_owned();
                let (proxy, cut) = (proxy.clone(), cut.clone());
                tasks.spawn(async move {
                    match permit {
                        Ok(_permit) => flow::run(&proxy, handed, &cut).await,
                        Err(_) => {
                            flow::refuse(&proxy, handed, "the proxy has too many connections open").await;
                        }
                    }
                    drop(closing);
                });
            }
            Ok(Some((Frame::Open(open), None))) => {
                tracing::warn!(%worker, flow_id = open.flow_id, "a flow without a socket");
                drop(Closing { flow_id: open.flow_id, out: out.clone() });
            }
            Ok(Some((Frame::DnsQuery(query), _))) => {
                let owner = query.owner.unwrap_or_default();
                let query_id = query.query_id;
                let answer = move |message| Frame::DnsAnswer(DnsAnswer { query_id, message });
                if let Ok(permit) = queries.clone().try_acquire_owned() {
                    let (proxy, out) = (proxy.clone(), out.clone());
                    tasks.spawn(async move {
                        let message = resolve_query(&proxy, &owner, &query.message).await;
                        // The connection has ended: nobody waits for it.
                        let _ = out.send(answer(message));
                        drop(permit);
                    });
                } else if out.send(answer(dns::busy(&query.message))).is_err() {
                    break;
                }
            }
            Ok(Some((Frame::Denied(denied), _))) => packet_denied(&proxy, denied).await,
            Ok(Some((frame @ (Frame::Hello(_) | Frame::Closed(_) | Frame::DnsAnswer(_)), _))) => {
                tracing::warn!(%worker, ?frame, "a frame that a worker does not send");
            }
        }
    }
    cut.cancel();
    drop(out);
    if tokio::time::timeout(Duration::from_secs(5), writer).await.is_err() {
        tracing::debug!(%worker, "the last frames to a worker were not sent");
    }
}

async fn resolve_query(proxy: &Proxy, owner: &FlowOwner, message: &[u8]) -> Vec<u8> {
    let (query, name, kind) = match dns::read(message) {
        dns::Asked::Nothing => return Vec::new(),
        dns::Asked::Done { answer, denied } => {
            if let Some(said) = denied {
                dns_denied(proxy, owner, &said, "this kind of question is not answered").await;
            }
            return answer;
        }
        dns::Asked::Name { query, name, kind } => (query, name, kind),
    };
    let known = match known(proxy, owner, &name, kind).await {
        Ok(known) => known,
        Err(reason) => {
            dns_denied(proxy, owner, &name, &reason).await;
            dns::Known::Denied
        }
    };
    dns::answer(&query, kind, known)
}

/// What is known of a name, or why it is denied.
async fn known(proxy: &Proxy, owner: &FlowOwner, name: &str, kind: dns::Kind) -> Result<dns::Known, String> {
    use actors::Missing;
    let missing = |missing: Missing| match missing {
        Missing::Stale(reason) => Err(format!("stale generation: {reason}")),
        Missing::Denied(reason) => Err(reason),
        Missing::Unavailable(reason) => {
            tracing::warn!(uid = owner.actor_uid, name, %reason, "cannot answer for a name now");
            Ok(dns::Known::Unavailable)
        }
    };
    let entry = match proxy.actors.get(owner).await {
        Ok(entry) => entry,
        Err(why) => return missing(why),
    };
    if !entry.policy().allows_name(name) {
        return Err("no rule allows this name".into());
    }
    if kind == dns::Kind::Other {
        // Its address does not matter, so none is taken.
        return Ok(dns::Known::Addresses([0, 0, 0, 0].into(), [0; 16].into()));
    }
    match proxy.actors.bind(&entry, name).await {
        Ok((v4, v6)) => Ok(dns::Known::Addresses(v4, v6)),
        Err(why) => missing(why),
    }
}

async fn dns_denied(proxy: &Proxy, owner: &FlowOwner, name: &str, reason: &str) {
    let mut record = flow::record(owner, "dns", name);
    reason.clone_into(&mut record.reason);
    proxy.audit.write(record).await;
}

async fn packet_denied(proxy: &Proxy, denied: PacketDenied) {
    let owner = denied.owner.unwrap_or_default();
    let mut record = flow::record(&owner, &denied.protocol, &denied.destination);
    "not allowed by the worker's rules".clone_into(&mut record.reason);
    record.count = denied.count.max(1);
    proxy.audit.write(record).await;
}
