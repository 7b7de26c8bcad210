// SPDX-License-Identifier: Apache-2.0
//! The ingress router: HTTP from clients to actors, waking those that sleep.
//!
//! * [`address`]: which actor a request is for. [`forward`]: the path of one request.
//! * [`routes`]: where actors are, from the control plane's watch. [`wake`]: one resume per actor, bounded waiting.
//! * [`upstream`]: one connection per request through the worker's ateom. [`reply`] and [`hold`]: the way back and
//!   `checkpoint.onReply`.
//!
//! The listener speaks HTTP/1.1 and HTTP/2 without TLS, on loopback unless told otherwise; actors are spoken to in
//! HTTP/1.1. Every wait has a bound (see [`Limits`]); what a client meets at one is a JSON answer.
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::control;
use crate::pipe::Prefixed;
use crate::token::{TokenError, Verifier};

mod address;
mod answer;
mod body;
mod forward;
mod hold;
mod reply;
mod routes;
#[cfg(test)]
mod tests;
mod upstream;
mod wake;

/// A reply's body on its way to the client.
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// What the router needs to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where clients connect; default `127.0.0.1:8480`. Port 0: any, told by `ready`.
    pub listen: SocketAddr,
    /// The control plane: `unix:/path` or `http://host:port`.
    pub ateapi: String,
    /// File with one or more Ed25519 public keys in PEM; see [`crate::token::ensure_key_pair`].
    pub public_key: PathBuf,
    /// Actors are `<actor>.<atespace>.<domain>`; default `actors.localhost`.
    pub domain: String,
    /// Bounds.
    pub limits: Limits,
}

impl Config {
    /// The defaults with this control plane and public key.
    pub fn new(ateapi: impl Into<String>, public_key: impl Into<PathBuf>) -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8480)),
            ateapi: ateapi.into(),
            public_key: public_key.into(),
            domain: "actors.localhost".into(),
            limits: Limits::default(),
        }
    }
}

/// Bounds of the router.
#[derive(Debug, Clone)]
pub struct Limits {
    /// How long a request may take to reach its actor, waking included; default 60 s.
    pub resume_timeout: Duration,
    /// Requests that may wait for one actor; default 256.
    pub parked_per_actor: usize,
    /// Requests that may wait in all; default 4096.
    pub parked: usize,
    /// Wake-ups of one actor in a burst; default 60.
    pub wakeups_burst: u32,
    /// Wake-ups of one actor per second in the long run; default 1.
    pub wakeups_per_second: f64,
    /// Client connections; default 4096. More wait in the listener's queue.
    pub connections: usize,
    /// Requests in flight in all; default 16384.
    pub requests: usize,
    /// Longest request head, bytes; default 64 KiB.
    pub header_bytes: usize,
    /// How long a client may take to send a request's head, also on a kept connection; default 60 s.
    pub header_read: Duration,
    /// Longest request body, bytes; default 4 GiB.
    pub request_body: u64,
    /// How long an actor may take to begin its reply; default 10 min.
    pub reply_head: Duration,
    /// Longest silence of either side of a body, stream or upgraded connection; default 15 min.
    pub idle: Duration,
    /// How long requests in flight may end at shutdown; default 5 s.
    pub drain: Duration,
    /// Sleeping actors whose route is remembered; default 4096.
    pub remembered: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            resume_timeout: Duration::from_mins(1),
            parked_per_actor: 256,
            parked: 4096,
            wakeups_burst: 60,
            wakeups_per_second: 1.0,
            connections: 4096,
            requests: 16384,
            header_bytes: 64 << 10,
            header_read: Duration::from_mins(1),
            request_body: 4 << 30,
            reply_head: Duration::from_mins(10),
            idle: Duration::from_mins(15),
            drain: Duration::from_secs(5),
            remembered: 4096,
        }
    }
}

/// Why the router does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address cannot be listened on.
    #[error("cannot listen on {listen} for ingress: {source}; choose another address with --listen")]
    Listen {
        /// The address asked for.
        listen: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// The public key is unusable.
    #[error(transparent)]
    Key(#[from] TokenError),
    /// The control plane's address is unusable.
    #[error(transparent)]
    Dial(#[from] control::DialError),
}

/// Runs the router until `shutdown`; `ready` gets the address it listens on.
///
/// # Errors
/// Only before `ready` was told: the address, the key or the control plane's endpoint is unusable.
pub async fn serve(
    config: Config,
    ready: oneshot::Sender<SocketAddr>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let verifier = Verifier::from_file(&config.public_key)?;
    let control = control::dial(&config.ateapi)?;
    let failed = |source| Error::Listen { listen: config.listen, source };
    let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let limits = config.limits;
    let routes = routes::Routes::new(control.clone(), limits.remembered);
    let waker = wake::Waker::new(
        control.clone(),
        routes.clone(),
        wake::Bounds {
            resume_timeout: limits.resume_timeout,
            parked_per_actor: limits.parked_per_actor,
            parked: limits.parked,
            wakeups_burst: limits.wakeups_burst,
            wakeups_per_second: limits.wakeups_per_second,
        },
    );
    let router = Arc::new(forward::Router {
        domain: config.domain.trim_matches('.').to_ascii_lowercase(),
        verifier,
        checkpoints: reply::Checkpoints::new(control, routes.clone()),
        requests: Arc::new(Semaphore::new(limits.requests)),
        routes: routes.clone(),
        waker,
        limits,
    });
    let stop = shutdown.child_token();
    let _stop_when_dropped = stop.clone().drop_guard();
    tokio::spawn(routes.keep(stop.clone()));
    if !address.ip().is_loopback() {
        tracing::warn!(%address, "ingress listens beyond this machine without TLS: tokens can be read on the way");
    }
    tracing::info!(%address, "ingress is ready");
    // Nobody may be waiting for the address.
    let _ = ready.send(address);
    accept(listener, router, stop).await;
    Ok(())
}

async fn accept(listener: TcpListener, router: Arc<forward::Router>, shutdown: CancellationToken) {
    let connections = Arc::new(Semaphore::new(router.limits.connections));
    let tracker = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = async {
                let permit = connections.clone().acquire_owned().await;
                (permit, listener.accept().await)
            } => accepted,
        };
        match accepted {
            (Ok(permit), Ok((stream, peer))) => {
                let router = router.clone();
                let shutdown = shutdown.clone();
                tracker.spawn(async move {
                    connection(stream, peer, router, shutdown).await;
                    drop(permit);
                });
            }
            (Err(_), _) => break,
            (_, Err(error)) => {
                // Out of descriptors, mostly: waiting for some to be closed is all that helps.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    tracker.close();
    if tokio::time::timeout(router.limits.drain, tracker.wait()).await.is_err() {
        tracing::info!(connections = tracker.len(), "ingress ends with requests in flight");
    }
}

/// Reads until it is clear whether the client speaks HTTP/2.
async fn read_preface(mut stream: TcpStream) -> io::Result<Prefixed<TcpStream>> {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let mut start = Vec::with_capacity(PREFACE.len());
    while start.len() < PREFACE.len() && PREFACE.starts_with(&start) {
        let room = (PREFACE.len() - start.len()) as u64;
        if (&mut stream).take(room).read_buf(&mut start).await? == 0 {
            break;
        }
    }
    Ok(Prefixed::new(start, stream))
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: Arc<forward::Router>,
    shutdown: CancellationToken,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, %peer, "TCP_NODELAY");
    }
    let limits = router.limits.clone();
    // The bound on a request's head begins only when its protocol is known, so this part has its own.
    let stream = tokio::select! {
        () = shutdown.cancelled() => return,
        preface = tokio::time::timeout(limits.header_read, read_preface(stream)) => match preface {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return tracing::debug!(%error, %peer, "a client's connection ended"),
            Err(_) => return tracing::debug!(%peer, "a client sent nothing in time"),
        }
    };
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let router = router.clone();
        async move { Ok::<_, std::convert::Infallible>(router.handle(request, peer).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_read)
        .max_buf_size(limits.header_bytes.max(8 << 10));
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX))
        .max_concurrent_streams(256)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20));
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            match tokio::time::timeout(limits.drain, connection).await {
                Ok(ended) => ended,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, %peer, "a client's connection ended");
    }
}
