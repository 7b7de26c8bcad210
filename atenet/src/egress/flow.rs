// SPDX-License-Identifier: Apache-2.0
//! One connection of an actor, from the handed-over socket to its audit record.
//!
//! ```text
//! destination ─synthetic─▶ its name ─▶ rule for name:port? ─▶ look at the first bytes (SNI, Host)
//!      │                                                             │ the name
//!      │                                                   resolve, filter every address
//!      └─raw─▶ filter ─▶ rule for address:port? ──────────┐          │
//!                                                         ▼          ▼
//!                                   connect to what was checked ─▶ carry, count, audit
//! ```
//!
//! HTTP is not passed through but read and written anew, request by request, so that each one's Host is checked and
//! no two parsers can disagree about where one ends. Whatever is refused or fails is reset, so that the actor's
//! software sees an error at once. A flow ends when its actor's copy does, or when the policy no longer allows it.
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use http::header::{CONNECTION, EXPECT, HOST, HeaderValue, UPGRADE};
use http::{Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::BodyExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::{TokioIo, TokioTimer};
use substrate_proto::atenet::FlowOwner;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::actors::{Entry, Missing};
use super::audit::{self, Record, Verdict};
use super::filter::is_synthetic;
use super::policy::{Check, Policy};
use super::resolve::Unresolved;
use super::sniff::{self, Hello, SecondHello};
use super::{Limits, Proxy};
use crate::hop;
use crate::pipe::{self, Counted, End, Traffic};

/// Delay before the next address is tried beside the ones under way (RFC 8305 section 5).
const NEXT_ADDRESS: Duration = Duration::from_millis(250);
const HEAD: usize = 64 << 10;

/// Why a flow is not carried, or no longer.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stop {
    Denied(String),
    Failed(String),
}

fn denied(reason: impl Into<String>) -> Stop {
    Stop::Denied(reason.into())
}

/// What is known of a flow so far, for its record.
#[derive(Debug, Default)]
struct Facts {
    protocol: &'static str,
    name: String,
    upstream: Option<SocketAddr>,
}

struct Flow<'a> {
    proxy: &'a Proxy,
    entry: Arc<Entry>,
    destination: SocketAddr,
    facts: Mutex<Facts>,
    traffic: Arc<Traffic>,
}

/// A connection that an ateom has handed over.
pub(crate) struct Handed {
    pub(crate) owner: FlowOwner,
    pub(crate) destination: String,
    pub(crate) socket: OwnedFd,
}

/// Carries or refuses a connection and writes its record.
pub(crate) async fn run(proxy: &Proxy, handed: Handed, session: &CancellationToken) {
    let start = tokio::time::Instant::now();
    let mut record = record(&handed.owner, "tcp", &handed.destination);
    // Shares the socket, so that it can be reset however it is wrapped below.
    let last = handed.socket.try_clone();
    let stop = carry(proxy, handed, session, &mut record).await.err();
    match stop {
        None => record.verdict = Verdict::Allowed,
        Some(stop) => {
            (record.verdict, record.reason) = match stop {
                Stop::Denied(reason) => (Verdict::Denied, reason),
                // It was carried; how it ended is no more than a remark.
                Stop::Failed(reason) if !record.upstream.is_empty() => (Verdict::Allowed, reason),
                Stop::Failed(reason) => (Verdict::Failed, reason),
            };
            match last {
                Ok(socket) => reset(&socket),
                Err(error) => tracing::debug!(%error, "cannot reset a refused connection"),
            }
        }
    }
    record.ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    record.time = audit::now();
    proxy.audit.write(record).await;
}

/// Refuses a connection that is not even looked at.
pub(crate) async fn refuse(proxy: &Proxy, handed: Handed, reason: &str) {
    let mut record = record(&handed.owner, "tcp", &handed.destination);
    reason.clone_into(&mut record.reason);
    reset(&handed.socket);
    proxy.audit.write(record).await;
}

pub(crate) fn record(owner: &FlowOwner, protocol: &str, destination: &str) -> Record {
    Record {
        time: audit::now(),
        verdict: Verdict::Denied,
        atespace: owner.atespace.clone(),
        actor: owner.actor_name.clone(),
        uid: owner.actor_uid.clone(),
        generation: owner.generation,
        worker: owner.worker_id.clone(),
        protocol: protocol.to_owned(),
        destination: destination.to_owned(),
        name: String::new(),
        upstream: String::new(),
        reason: String::new(),
        sent: 0,
        received: 0,
        ms: 0,
        count: 1,
    }
}

/// Lets the close of a socket send RST instead of FIN.
fn reset(socket: &OwnedFd) {
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    if let Err(error) = nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::Linger, &linger) {
        tracing::debug!(%error, "SO_LINGER");
    }
}

async fn carry(
    proxy: &Proxy,
    handed: Handed,
    session: &CancellationToken,
    record: &mut Record,
) -> Result<(), Stop> {
    let destination: SocketAddr =
        handed.destination.parse().map_err(|_| denied("the destination is not an address and port"))?;
    let destination = SocketAddr::new(destination.ip().to_canonical(), destination.port());
    let entry = proxy.actors.get(&handed.owner).await.map_err(missing)?;
    let _permit = entry
        .flows
        .clone()
        .try_acquire_owned()
        .map_err(|_| denied("the actor has too many connections open"))?;
    let socket = take(handed.socket).map_err(|error| Stop::Failed(format!("the handed socket: {error}")))?;
    let flow = Flow {
        proxy,
        entry: entry.clone(),
        destination,
        facts: Mutex::new(Facts { protocol: "tcp", ..Facts::default() }),
        traffic: Traffic::new(),
    };
    let result = tokio::select! {
        biased;
        () = entry.over.cancelled() => Err(Stop::Failed("the actor left this worker".into())),
        () = session.cancelled() => Err(Stop::Failed("the worker's connection to the proxy ended".into())),
        () = flow.revoked() => Err(denied("the policy no longer allows it")),
        result = flow.carry(socket) => result,
    };
    let facts = flow.facts();
    facts.protocol.clone_into(&mut record.protocol);
    record.name.clone_from(&facts.name);
    record.upstream = facts.upstream.map(|address| address.to_string()).unwrap_or_default();
    record.sent = flow.traffic.sent();
    record.received = flow.traffic.received();
    result
}

fn take(socket: OwnedFd) -> io::Result<TcpStream> {
    let socket = std::net::TcpStream::from(socket);
    socket.set_nonblocking(true)?;
    let socket = TcpStream::from_std(socket)?;
    socket.set_nodelay(true)?;
    Ok(socket)
}

fn missing(missing: Missing) -> Stop {
    match missing {
        Missing::Stale(reason) => denied(format!("stale generation: {reason}")),
        Missing::Denied(reason) => denied(reason),
        Missing::Unavailable(reason) => denied(format!("the actor's policy is not known: {reason}")),
    }
}

impl Flow<'_> {
    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limits(&self) -> &Limits {
        &self.proxy.limits
    }

    /// Returns when a change of the policy forbids what this flow does.
    async fn revoked(&self) {
        let mut changes = self.entry.policy_changes();
        while changes.changed().await.is_ok() {
            let policy = changes.borrow_and_update().clone();
            if !self.still_allowed(&policy) {
                return;
            }
        }
        std::future::pending::<()>().await;
    }

    fn still_allowed(&self, policy: &Policy) -> bool {
        let facts = self.facts();
        let port = self.destination.port();
        if facts.name.is_empty() {
            return is_synthetic(self.destination.ip()) || policy.address(self.destination.ip(), port);
        }
        policy.host(&facts.name, port).is_some_and(|check| match facts.protocol {
            "tls" => check.tls || check.open,
            "http" => check.http || check.open,
            _ => check.open || facts.upstream.is_none(),
        })
    }

    async fn carry(&self, mut socket: TcpStream) -> Result<(), Stop> {
        let ip = self.destination.ip();
        if !is_synthetic(ip) {
            self.proxy.filter.check(ip).map_err(|why| denied(format!("the address is refused ({why})")))?;
            if !self.entry.policy().address(ip, self.destination.port()) {
                return Err(denied("no rule allows this address and port"));
            }
            let upstream = self.connect(vec![self.destination]).await?;
            return self.pass(&mut socket, upstream, |_| Ok(())).await;
        }
        let name = self.name(ip).await?;
        self.facts().name.clone_from(&name);
        let check = self
            .entry
            .policy()
            .host(&name, self.destination.port())
            .ok_or_else(|| denied("no rule allows this name and port"))?;
        match check {
            Check { open: true, .. } => {
                let upstream = self.dial(&name).await?;
                self.pass(&mut socket, upstream, |_| Ok(())).await
            }
            Check { tls: true, http: false, .. } => self.tls(socket, name).await,
            Check { tls: false, .. } => self.http(socket, name).await,
            Check { tls: true, http: true, .. } => {
                let mut first = [0];
                let peek = tokio::time::timeout(self.limits().sniff_timeout, socket.peek(&mut first)).await;
                match peek {
                    Ok(Ok(1)) if first[0] == 22 => self.tls(socket, name).await,
                    Ok(Ok(1)) => self.http(socket, name).await,
                    Ok(Ok(_)) => Ok(()),
                    Ok(Err(error)) => Err(Stop::Failed(format!("the actor's connection broke: {error}"))),
                    Err(_) => Err(denied("nothing was sent that shows where it goes")),
                }
            }
        }
    }

    async fn name(&self, ip: IpAddr) -> Result<String, Stop> {
        if let Some(name) = self.entry.name_of(ip) {
            return Ok(name);
        }
        // Bound by an earlier copy of the actor, and remembered by its memory.
        self.proxy.actors.refresh(&self.entry).await;
        self.entry.name_of(ip).ok_or_else(|| denied("no name of this actor has this address"))
    }

    async fn tls(&self, mut socket: TcpStream, name: String) -> Result<(), Stop> {
        self.facts().protocol = "tls";
        let mut start = Vec::with_capacity(2048);
        let read = async {
            loop {
                match sniff::client_hello(&start) {
                    Hello::Name(said) if said == name => return Ok(true),
                    Hello::Name(said) => return Err(denied(format!("the ClientHello is for {said}"))),
                    Hello::Refused(why) => return Err(denied(why)),
                    Hello::More => {}
                }
                // Not beyond the bound, however much the peer has sent.
                let room = (sniff::MAX_HELLO - start.len()) as u64;
                match (&mut socket).take(room).read_buf(&mut start).await {
                    Ok(0) if start.is_empty() => return Ok(false),
                    Ok(0) => return Err(denied("the connection ended within its ClientHello")),
                    Ok(_) => {}
                    Err(error) => {
                        return Err(Stop::Failed(format!("the actor's connection broke: {error}")));
                    }
                }
            }
        };
        let read = tokio::time::timeout(self.limits().sniff_timeout, read).await;
        if !read.map_err(|_| denied("no ClientHello was sent in time"))?? {
            return Ok(());
        }
        let mut upstream = self.dial(&name).await?;
        upstream
            .write_all(&start)
            .await
            .map_err(|error| Stop::Failed(format!("the connection to {name} broke: {error}")))?;
        self.traffic.add_sent(start.len());
        let mut second = SecondHello::new(name);
        self.pass(&mut socket, upstream, move |block| second.feed(block).map_err(str::to_owned)).await
    }

    async fn pass(
        &self,
        socket: &mut TcpStream,
        mut upstream: TcpStream,
        inspect: impl FnMut(&[u8]) -> Result<(), String>,
    ) -> Result<(), Stop> {
        match pipe::both_ways(socket, &mut upstream, self.limits().idle, &self.traffic, inspect).await {
            End::Closed => Ok(()),
            End::Idle => Err(Stop::Failed(format!("nothing passed for {:?}", self.limits().idle))),
            End::Broken(error) => Err(Stop::Failed(format!("the connection broke: {error}"))),
            End::Refused(reason) => Err(denied(reason)),
        }
    }

    /// Connects to a name: a published service, or an address of it that the filter passes.
    async fn dial(&self, name: &str) -> Result<TcpStream, Stop> {
        let port = self.destination.port();
        let atespace = &self.entry.owner.atespace;
        let published = self.proxy.publish.iter().find(|service| {
            service.name == name
                && service.port == port
                && (service.atespaces.is_empty() || service.atespaces.contains(atespace))
        });
        let addresses = match published {
            Some(service) => vec![service.target],
            None => match self.proxy.names.resolve(name, &self.proxy.filter).await {
                Ok(found) => found.into_iter().map(|ip| SocketAddr::new(ip, port)).collect(),
                Err(Unresolved::Denied(reason)) => return Err(denied(reason)),
                Err(Unresolved::Failed(reason)) => return Err(Stop::Failed(reason)),
            },
        };
        self.connect(addresses).await
    }

    async fn connect(&self, addresses: Vec<SocketAddr>) -> Result<TcpStream, Stop> {
        let mut left = addresses.into_iter();
        let mut attempts = FuturesUnordered::new();
        let mut failure = "there is no address".to_owned();
        let attempt = |address: SocketAddr| async move { (address, TcpStream::connect(address).await) };
        let race = async {
            attempts.extend(left.next().map(attempt));
            loop {
                tokio::select! {
                    ended = attempts.next() => match ended {
                        Some((address, Ok(stream))) => return Ok((address, stream)),
                        Some((address, Err(error))) => {
                            failure = format!("cannot connect to {address}: {error}");
                            attempts.extend(left.next().map(attempt));
                        }
                        None => return Err(Stop::Failed(failure.clone())),
                    },
                    () = tokio::time::sleep(NEXT_ADDRESS), if left.len() > 0 => {
                        attempts.extend(left.next().map(attempt));
                    }
                }
            }
        };
        let limit = self.limits().connect_timeout;
        let (address, stream) = tokio::time::timeout(limit, race)
            .await
            .map_err(|_| Stop::Failed(format!("no address answered within {limit:?}")))??;
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY");
        }
        self.facts().upstream = Some(address);
        Ok(stream)
    }

    async fn http(&self, socket: TcpStream, name: String) -> Result<(), Stop> {
        self.facts().protocol = "http";
        let stop: Mutex<Option<Stop>> = Mutex::new(None);
        let upstream: tokio::sync::Mutex<Option<Hop>> = tokio::sync::Mutex::new(None);
        let service = hyper::service::service_fn(|request: Request<Incoming>| async {
            self.request(request, &name, &upstream).await.map_err(|reason| {
                *stop.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
                io::Error::other("not carried")
            })
        });
        let io = TokioIo::new(Counted::new(socket, self.traffic.clone()));
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits().idle)
            .max_buf_size(HEAD)
            .half_close(true)
            .serve_connection(io, service)
            .with_upgrades();
        let ended = tokio::select! {
            ended = connection => ended,
            () = self.traffic.idle(self.limits().idle) => {
                return Err(Stop::Failed(format!("nothing passed for {:?}", self.limits().idle)));
            }
        };
        if let Some(stop) = stop.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(stop);
        }
        let mut upstream = upstream.into_inner();
        if let Some(tunnel) = upstream.as_mut().and_then(|hop| hop.tunnel.take()) {
            return self.tunnel(tunnel).await;
        }
        match ended {
            Ok(()) => Ok(()),
            Err(error) if error.is_parse() || error.is_parse_too_large() => {
                Err(denied(format!("not an HTTP/1 request: {error}")))
            }
            Err(error) => Err(Stop::Failed(format!("the actor's connection broke: {error}"))),
        }
    }

    /// Checks one request and passes it on.
    async fn request(
        &self,
        mut request: Request<Incoming>,
        name: &str,
        upstream: &tokio::sync::Mutex<Option<Hop>>,
    ) -> Result<Response<UnsyncBoxBody<Bytes, hyper::Error>>, Stop> {
        if request.method() == Method::CONNECT {
            return Err(denied("CONNECT asks for a proxy, and there is none"));
        }
        let port = self.destination.port();
        sniff::http_host(request.version(), request.uri(), request.headers(), name, port).map_err(denied)?;
        let mut upstream = upstream.lock().await;
        if upstream.as_ref().is_none_or(|hop| hop.sender.is_closed()) {
            let stream = self.dial(name).await?;
            *upstream = Some(Hop::start(stream).await.map_err(|error| broke(name, &error))?);
        }
        let Some(hop) = upstream.as_mut() else { return Err(Stop::Failed("no connection".into())) };
        let upgrade = hop::upgrade(request.headers());
        let client = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
        let (mut head, body) = request.into_parts();
        let path = head.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        head.uri = path.parse().unwrap_or_else(|_| Uri::from_static("/"));
        head.version = Version::HTTP_11;
        let host = head.headers.get(HOST).cloned();
        hop::strip(&mut head.headers);
        head.headers.remove(EXPECT);
        // `connection: host` would have taken it away after it was checked.
        if let Some(host) = host {
            head.headers.insert(HOST, host);
        }
        if let Some(protocol) = &upgrade {
            head.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            head.headers.insert(UPGRADE, protocol.clone());
        }
        hop.sender.ready().await.map_err(|error| broke(name, &error))?;
        let response = hop
            .sender
            .send_request(Request::from_parts(head, body))
            .await
            .map_err(|error| broke(name, &error))?;
        let protocol = hop::upgrade(response.headers());
        let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let (mut head, body) = response.into_parts();
        hop::strip(&mut head.headers);
        head.version = Version::HTTP_11;
        if switched {
            let client = client.ok_or_else(|| Stop::Failed(format!("{name} changed protocols unasked")))?;
            let server = hyper::upgrade::on(Response::from_parts(head.clone(), body));
            hop.tunnel = Some((client, server));
            head.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            if let Some(protocol) = protocol {
                head.headers.insert(UPGRADE, protocol);
            }
            let empty = http_body_util::Empty::new().map_err(|never| match never {}).boxed_unsync();
            return Ok(Response::from_parts(head, empty));
        }
        Ok(Response::from_parts(head, body.boxed_unsync()))
    }

    /// Carries what follows an upgrade. Its bytes are counted where the actor's socket is read and written.
    async fn tunnel(&self, (client, server): Tunnel) -> Result<(), Stop> {
        let both = async { tokio::try_join!(client, server) }.await;
        let (client, server) =
            both.map_err(|error| Stop::Failed(format!("the upgrade broke off: {error}")))?;
        let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
        let uncounted = Traffic::new();
        match pipe::both_ways(&mut client, &mut server, self.limits().idle, &uncounted, |_| Ok(())).await {
            End::Closed => Ok(()),
            End::Idle => Err(Stop::Failed(format!("nothing passed for {:?}", self.limits().idle))),
            End::Broken(error) => Err(Stop::Failed(format!("the connection broke: {error}"))),
            End::Refused(reason) => Err(denied(reason)),
        }
    }
}

fn broke(name: &str, error: &hyper::Error) -> Stop {
    Stop::Failed(format!("the connection to {name} broke: {error}"))
}

type Tunnel = (hyper::upgrade::OnUpgrade, hyper::upgrade::OnUpgrade);

/// The connection to the server of an HTTP flow.
struct Hop {
    sender: SendRequest<Incoming>,
    tunnel: Option<Tunnel>,
    _connection: AbortOnDropHandle<()>,
}

impl Hop {
    async fn start(stream: TcpStream) -> hyper::Result<Self> {
        let (sender, connection) = hyper::client::conn::http1::Builder::new()
            .max_buf_size(HEAD)
            .handshake(TokioIo::new(stream))
            .await?;
        let connection = tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "an egress HTTP connection ended");
            }
        });
        Ok(Self { sender, tunnel: None, _connection: AbortOnDropHandle::new(connection) })
    }
}
