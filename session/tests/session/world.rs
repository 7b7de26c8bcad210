// SPDX-License-Identifier: Apache-2.0
//! A world for sessions: a gateway that behaves as OpenShell's does where it matters here, a worker's ingress that can
//! be cut and moved, a shim, and a supervisor. Hub and shim are the real ones.
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::IoSlice;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use http::{Request, Response};
use http_body::Frame as BodyFrame;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use prost::Message as _;
use substrate_proto::atenet::{IngressOpen, IngressOpened, ingress_opened::Code};
use substrate_proto::supervisor::{
    GatewayHeartbeat, GatewayMessage, RelayFrame, RelayInit, RelayOpen, RelayOpenResult, SessionAccepted,
    SupervisorHello, SupervisorMessage, TcpRelayTarget, gateway_message, relay_frame, relay_open,
    supervisor_message,
};
use substrate_session::grpc::{self, Deframer, Framed};
use substrate_session::hub::gateway::Carrier;
use substrate_session::hub::{Awake, Config, Hub, Shown, View};
use substrate_session::mux::Mux;
use substrate_session::shim::{hub_side, supervisor_side};
use substrate_session::wire::SessionKey;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

pub const UID: &str = "actor-1";
pub const LIMIT: Duration = Duration::from_secs(20);
const MASTER: &[u8] = &[9; 32];

type Body = StreamBody<ReceiverStream<Result<BodyFrame<Bytes>, Infallible>>>;
type Feed = mpsc::Sender<Result<BodyFrame<Bytes>, Infallible>>;

/// Fails the test instead of hanging it.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("{what}: not within {LIMIT:?}"))
}

/// What the gateway saw of sessions, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// A relay, and why.
    Refused(String, String),
    Connected(String),
    Disconnected,
}

/// A gateway: a sandbox is Ready while a session is open, a relay goes over the session that is open when it is asked
/// for (`supervisor_session.rs`: `register`, `open_relay`), and pending relays are repeated to a session that takes
/// over (`replay_pending_relays`).
#[derive(Clone)]
pub struct Gateway {
    pub address: std::net::SocketAddr,
    inner: Arc<Mutex<Inner>>,
    pub sessions: watch::Receiver<usize>,
    changed: watch::Sender<usize>,
    pub end: CancellationToken,
}

#[derive(Default)]
struct Inner {
    session: Option<(usize, Feed)>,
    count: usize,
    seen: Vec<Seen>,
    pending: VecDeque<(String, tokio::sync::oneshot::Sender<(Deframed, Feed)>)>,
}

/// The supervisor's side of a relay, at the gateway.
pub struct Deframed {
    body: Incoming,
    deframer: Deframer,
    /// What the stream ended with.
    status: Option<u32>,
}

impl Deframed {
    pub async fn next(&mut self) -> Option<Framed> {
        loop {
            if let Some(framed) = self.deframer.take().expect("messages are short") {
                return Some(framed);
            }
            let frame = self.body.frame().await?.ok()?;
            match frame.into_data() {
                Ok(data) => self.deframer.push(&data),
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    self.status = grpc::status_of(&trailers).map(|(code, _)| code);
                }
            }
        }
    }
}

impl Gateway {
    pub async fn start(address: &str) -> Self {
        // One that was told to end may still be there for a moment.
        let listener = within("the gateway's port", async {
            loop {
                match TcpListener::bind(address).await {
                    Ok(listener) => return listener,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        })
        .await;
        let (changed, sessions) = watch::channel(0);
        let gateway = Self {
            address: listener.local_addr().unwrap(),
            inner: Arc::default(),
            sessions,
            changed,
            end: CancellationToken::new(),
        };
        let serving = gateway.clone();
        tokio::spawn(async move {
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    () = serving.end.cancelled() => return,
                };
                let (stream, _) = accepted.unwrap();
                let gateway = serving.clone();
                tokio::spawn(async move {
                    let end = gateway.end.clone();
                    let service = service_fn(move |request| {
                        let gateway = gateway.clone();
                        async move { Ok::<_, Infallible>(gateway.call(request).await) }
                    });
                    let served = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service);
                    tokio::select! {
                        _ = served => {}
                        () = end.cancelled() => {}
                    }
                });
            }
        });
        gateway
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.inner.lock().unwrap().seen.clone()
    }

    async fn call(&self, request: Request<Incoming>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let (feed, answer) = mpsc::channel(16);
        let mut requests = Deframed { body, deframer: Deframer::default(), status: None };
        match parts.uri.path() {
            "/openshell.v1.OpenShell/ConnectSupervisor" => {
                assert_eq!(parts.headers["authorization"], "Bearer token");
                let first = requests.next().await.and_then(|framed| framed.read::<SupervisorMessage>());
                let Some(supervisor_message::Payload::Hello(hello)) = first.and_then(|first| first.payload)
                else {
                    panic!("the first message is the Hello");
                };
                self.connect(hello, requests, feed).await;
            }
            "/openshell.v1.OpenShell/RelayStream" => {
                let init = requests.next().await.and_then(|framed| framed.read::<RelayFrame>());
                let Some(relay_frame::Payload::Init(init)) = init.and_then(|init| init.payload) else {
                    panic!("the first frame names the channel");
                };
                let mut inner = self.inner.lock().unwrap();
                let at = inner.pending.iter().position(|(channel, _)| *channel == init.channel_id);
                let (_, claim) =
                    at.and_then(|at| inner.pending.remove(at)).expect("a relay that was asked for");
                assert!(claim.send((requests, feed)).is_ok(), "whoever asked waits");
            }
            _ => {
                // Answers what it was asked.
                let asked = requests.next().await.expect("a request");
                feed.send(Ok(BodyFrame::data(asked.raw))).await.unwrap();
                let status = grpc::headers(&grpc::status(0, ""));
                feed.send(Ok(BodyFrame::trailers(status))).await.unwrap();
            }
        }
        let mut response = Response::new(StreamBody::new(ReceiverStream::new(answer)));
        response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/grpc"));
        response
    }

    async fn connect(&self, hello: SupervisorHello, mut requests: Deframed, feed: Feed) {
        let number = {
            let mut inner = self.inner.lock().unwrap();
            inner.count += 1;
            inner.session = Some((inner.count, feed.clone()));
            inner.seen.push(Seen::Connected(hello.instance_id));
            inner.count
        };
        let accepted = gateway_message::Payload::SessionAccepted(SessionAccepted {
            session_id: format!("session-{number}"),
            heartbeat_interval_secs: 15,
        });
        send(&feed, accepted).await;
        let pending: Vec<String> =
            self.inner.lock().unwrap().pending.iter().map(|(channel, _)| channel.clone()).collect();
        for channel_id in pending {
            send(&feed, open(channel_id)).await;
        }
        self.changed.send_modify(|sessions| *sessions += 1);
        let gateway = self.clone();
        tokio::spawn(async move {
            while let Some(said) = requests.next().await {
                let said = said.read::<SupervisorMessage>().and_then(|said| said.payload);
                if let Some(supervisor_message::Payload::RelayOpenResult(result)) = said
                    && !result.success
                {
                    let mut inner = gateway.inner.lock().unwrap();
                    inner.seen.push(Seen::Refused(result.channel_id, result.error));
                }
            }
            let mut inner = gateway.inner.lock().unwrap();
            if inner.session.as_ref().is_some_and(|(current, _)| *current == number) {
                inner.session = None;
                inner.seen.push(Seen::Disconnected);
            }
        });
    }

    /// Asks for a relay for a command and waits for its stream.
    pub async fn relay(&self, channel: &str) -> (Deframed, Feed) {
        let mut relay = self.relay_to(channel, None).await;
        let greeting = within("the greeting", relay.0.next()).await.expect("a server of commands greets");
        assert_eq!(greeting.raw, data(GREETING));
        relay
    }

    /// Asks for a relay to a port and waits for its stream.
    pub async fn forward(&self, channel: &str) -> (Deframed, Feed) {
        let target = TcpRelayTarget { host: "127.0.0.1".to_owned(), port: 80 };
        self.relay_to(channel, Some(relay_open::Target::Tcp(target))).await
    }

    async fn relay_to(&self, channel: &str, target: Option<relay_open::Target>) -> (Deframed, Feed) {
        let (claim, claimed) = tokio::sync::oneshot::channel();
        let feed = {
            let mut inner = self.inner.lock().unwrap();
            inner.pending.push_back((channel.to_owned(), claim));
            inner.session.as_ref().map(|(_, feed)| feed.clone()).expect("a session")
        };
        let open = RelayOpen { channel_id: channel.to_owned(), target, ..RelayOpen::default() };
        send(&feed, gateway_message::Payload::RelayOpen(open)).await;
        within("a relay's stream", claimed).await.unwrap()
    }

    pub async fn heartbeat(&self) {
        let feed =
            self.inner.lock().unwrap().session.as_ref().map(|(_, feed)| feed.clone()).expect("a session");
        send(&feed, gateway_message::Payload::Heartbeat(GatewayHeartbeat::default())).await;
    }
}

fn open(channel_id: String) -> gateway_message::Payload {
    gateway_message::Payload::RelayOpen(RelayOpen { channel_id, ..RelayOpen::default() })
}

async fn send(feed: &Feed, payload: gateway_message::Payload) {
    let framed = Framed::new(&GatewayMessage { payload: Some(payload) });
    feed.send(Ok(BodyFrame::data(framed.raw))).await.unwrap();
}

/// A sandbox: the shim, and a way in that can be cut.
pub struct Sandbox {
    pub supervisor_socket: PathBuf,
    socket: PathBuf,
    pub dir: tempfile::TempDir,
    gate: watch::Sender<(bool, u64)>,
    pub background: Arc<AtomicUsize>,
    pub held: Arc<AtomicUsize>,
    /// Cuts every connection after so many bytes; 0: not.
    pub cut_after: Arc<AtomicUsize>,
}

impl Sandbox {
    pub async fn start() -> Self {
        Self::with_shell("/bin/sh").await
    }

    /// Of an image with that as its shell, there or not.
    pub async fn with_shell(shell: &'static str) -> Self {
        let mux = Mux::opener();
        let of_hub = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let supervisor_socket = dir.path().join("session/gateway.sock");
        let of_supervisor = supervisor_side::bind(&supervisor_socket).unwrap();
        let hub_port = of_hub.local_addr().unwrap().port();
        let key = SessionKey::new(&SessionKey::derive(MASTER, UID));
        tokio::spawn(hub_side::serve(of_hub, key, mux.clone(), shell));
        tokio::spawn(supervisor_side::serve(of_supervisor, mux));
        let socket = dir.path().join("ingress.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let (gate, is_open) = watch::channel((false, 0));
        let sandbox = Self {
            supervisor_socket,
            socket,
            dir,
            gate,
            background: Arc::default(),
            held: Arc::default(),
            cut_after: Arc::default(),
        };
        let counts = (Arc::clone(&sandbox.background), Arc::clone(&sandbox.held));
        let cut_after = Arc::clone(&sandbox.cut_after);
        tokio::spawn(async move {
            loop {
                let (router, _) = listener.accept().await.unwrap();
                let counts = counts.clone();
                tokio::spawn(pass(
                    router,
                    hub_port,
                    is_open.clone(),
                    counts,
                    cut_after.load(Ordering::SeqCst),
                ));
            }
        });
        sandbox
    }

    /// Lets the hub in, as generation so and so.
    pub fn wake(&self, generation: u64) -> View {
        self.gate.send_replace((true, generation));
        View::Awake(Awake { generation, endpoint: format!("unix:{}", self.socket.display()) })
    }

    /// Cuts every connection and lets nobody in.
    pub fn sleep(&self) -> View {
        self.gate.send_modify(|(open, _)| *open = false);
        View::Asleep
    }
}

async fn pass(
    mut router: UnixStream,
    port: u16,
    mut gate: watch::Receiver<(bool, u64)>,
    (background, held): (Arc<AtomicUsize>, Arc<AtomicUsize>),
    cut_after: usize,
) {
    let length = router.read_u8().await.unwrap();
    let mut message = vec![0; usize::from(length)];
    router.read_exact(&mut message).await.unwrap();
    let ask = IngressOpen::decode(message.as_slice()).unwrap();
    let (open, generation) = *gate.borrow_and_update();
    let code = match (open, ask.generation == generation && ask.actor_uid == UID) {
        (_, false) => Code::Stale,
        (false, _) => Code::NotNow,
        (true, true) => Code::Ok,
    };
    let answer = IngressOpened { code: code.into(), ..IngressOpened::default() };
    if code != Code::Ok || ask.hold {
        router.write_all(&answer.encode_length_delimited_to_vec()).await.unwrap();
    }
    if code != Code::Ok {
        return;
    }
    if ask.hold {
        held.fetch_add(1, Ordering::SeqCst);
        let mut nowhere = tokio::io::sink();
        tokio::select! {
            _ = gate.changed() => {}
            _ = tokio::io::copy(&mut router, &mut nowhere) => {}
        }
        held.fetch_sub(1, Ordering::SeqCst);
        return;
    }
    assert!(ask.background);
    background.fetch_add(1, Ordering::SeqCst);
    // The hub gets a connection of its own to this copy.
    let between = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let lent = std::net::TcpStream::connect(between.local_addr().unwrap()).unwrap();
    let (mut hub, _) = between.accept().await.unwrap();
    let message = answer.encode_length_delimited_to_vec();
    let rights = [ControlMessage::ScmRights(&[lent.as_raw_fd()])];
    sendmsg::<()>(router.as_raw_fd(), &[IoSlice::new(&message)], &rights, MsgFlags::empty(), None).unwrap();
    drop(lent);
    let mut actor = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let copied = async {
        if cut_after == 0 {
            let _ = tokio::io::copy_bidirectional(&mut hub, &mut actor).await;
        } else {
            cut(&mut hub, &mut actor, cut_after).await;
        }
        false
    };
    let is_cut = tokio::select! {
        _ = gate.changed() => true,
        is_cut = copied => is_cut,
    };
    if is_cut {
        actor.set_zero_linger().unwrap();
    }
    background.fetch_sub(1, Ordering::SeqCst);
}

/// Copies so many bytes each way at most, then breaks both connections.
async fn cut(hub: &mut TcpStream, actor: &mut TcpStream, limit: usize) {
    let (mut from_hub, mut to_hub) = hub.split();
    let (mut from_actor, mut to_actor) = actor.split();
    let mut down = (&mut from_hub).take(limit as u64);
    let mut up = (&mut from_actor).take(limit as u64);
    tokio::select! {
        _ = tokio::io::copy(&mut down, &mut to_actor) => {}
        _ = tokio::io::copy(&mut up, &mut to_hub) => {}
    }
}

/// The hub, and how often it asked for the actor.
pub struct Hubbed {
    pub hub: Hub,
    pub wakes: Arc<AtomicUsize>,
    pub wanted: watch::Receiver<usize>,
    _end: tokio_util::sync::DropGuard,
}

pub fn hub(gateway: &Gateway, memory: &std::path::Path) -> Hubbed {
    let address = gateway.address;
    let wakes = Arc::new(AtomicUsize::new(0));
    let (sender, wanted) = watch::channel(0);
    let sender = Arc::new(sender);
    let count = Arc::clone(&wakes);
    let end = CancellationToken::new();
    let config = Config {
        master_key: MASTER.to_vec(),
        memory: memory.to_owned(),
        gateway: format!("http://{address}"),
        inspector: Arc::new(|_, answer| {
            let refused = answer.ends_with(b"refused");
            Box::pin(async move { if refused { Err("not understood".to_owned()) } else { Ok(()) } })
        }),
        witness: Arc::new(|_, shown| assert_eq!(shown, Shown::Accepted, "this gateway refuses nobody")),
        connector: Arc::new(move || {
            Box::pin(async move { Ok(Box::pin(TcpStream::connect(address).await?) as Pin<Box<dyn Carrier>>) })
        }),
        waker: Arc::new(move |uid| {
            assert_eq!(uid, UID);
            count.fetch_add(1, Ordering::SeqCst);
            sender.send_modify(|wanted| *wanted += 1);
            Box::pin(std::future::ready(Ok(())))
        }),
    };
    Hubbed { hub: Hub::new(config, end.clone()).unwrap(), wakes, wanted, _end: end.drop_guard() }
}

/// A supervisor: opens a session and answers each RelayOpen with a stream that echoes.
#[derive(Clone)]
pub struct Supervisor {
    requests: hyper::client::conn::http2::SendRequest<Body>,
    told: Arc<Mutex<Told>>,
}

/// What a supervisor was told of relays.
#[derive(Default)]
struct Told {
    opened: Vec<String>,
    /// Channel, last words and status.
    ended: Vec<(String, Vec<u8>, u32)>,
    with_spares: Spares,
}

/// What a supervisor does where it is asked for a relay in reserve.
#[derive(Default, Clone, Copy)]
pub enum Spares {
    #[default]
    Opens,
    Ignores,
    Refuses,
    /// Opens one whose server says nothing.
    Silent,
    /// Opens one and ends it.
    Ends,
}

impl Supervisor {
    pub async fn connect(socket: &std::path::Path) -> Self {
        let stream = UnixStream::connect(socket).await.unwrap();
        let (requests, driver) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(driver);
        Self { requests, told: Arc::default() }
    }

    /// The channels of the relays that it was asked for.
    pub fn asked_for(&self) -> Vec<String> {
        self.told.lock().unwrap().opened.clone()
    }

    /// How many of them were relays in reserve.
    pub fn spares(&self) -> usize {
        self.asked_for().iter().filter(|channel| is_spare(channel)).count()
    }

    /// Relays whose streams were ended: channel, last words and status.
    pub fn ended(&self) -> Vec<(String, Vec<u8>, u32)> {
        self.told.lock().unwrap().ended.clone()
    }

    pub fn with_spares(&self, does: Spares) {
        self.told.lock().unwrap().with_spares = does;
    }

    pub fn call(&self, method: &str) -> (Feed, impl Future<Output = Response<Incoming>> + use<>) {
        let (feed, body) = mpsc::channel(16);
        let request = Request::post(format!("http://shim/openshell.v1.OpenShell/{method}"))
            .header("authorization", "Bearer token")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(StreamBody::new(ReceiverStream::new(body)))
            .unwrap();
        let mut requests = self.requests.clone();
        (feed, async move { requests.send_request(request).await.unwrap() })
    }

    /// Sends one message and waits for the answer and its status.
    pub async fn ask(&self, message: Bytes) -> (Option<Bytes>, u32) {
        let (feed, answer) = self.call("GetSandboxConfig");
        feed.send(Ok(BodyFrame::data(data(&message)))).await.unwrap();
        drop(feed);
        let response = within("an answer", answer).await;
        if let Some((code, _)) = grpc::status_of(response.headers()) {
            return (None, code);
        }
        let body = within("the answer's body", response.into_body().collect()).await.unwrap();
        let (code, _) = grpc::status_of(body.trailers().unwrap()).unwrap();
        let mut deframer = Deframer::default();
        deframer.push(&body.to_bytes());
        let answer = deframer.take().unwrap().and_then(|framed| framed.read::<RelayFrame>());
        (answer.map(|frame| data_of(frame).into()), code)
    }

    /// Opens a session; gives back when it is accepted, and goes on until the stream ends, with its status. As a stock
    /// supervisor it says Hello again when its stream ends before: a hub that is new to the shim ends what was said
    /// before it came.
    pub async fn session(&self, instance: &str) -> (String, tokio::task::JoinHandle<u32>) {
        let (session_id, feed, mut messages) = within("the acceptance", async {
            loop {
                if let Some(accepted) = self.hello(instance).await {
                    return accepted;
                }
            }
        })
        .await;
        let supervisor = self.clone();
        let running = tokio::spawn(async move {
            while let Some(message) = messages.next().await {
                if let Some(gateway_message::Payload::RelayOpen(open)) =
                    message.read::<GatewayMessage>().and_then(|message| message.payload)
                {
                    supervisor.open(open, &feed).await;
                }
            }
            0
        });
        (session_id, running)
    }

    /// Says Hello; none when the stream ends before the acceptance.
    async fn hello(&self, instance: &str) -> Option<(String, Feed, Deframed)> {
        let (feed, answer) = self.call("ConnectSupervisor");
        let hello = SupervisorHello { sandbox_id: "sb-1".to_owned(), instance_id: instance.to_owned() };
        let hello = SupervisorMessage { payload: Some(supervisor_message::Payload::Hello(hello)) };
        feed.send(Ok(BodyFrame::data(Framed::new(&hello).raw))).await.unwrap();
        let mut messages =
            Deframed { body: answer.await.into_body(), deframer: Deframer::default(), status: None };
        let first = messages.next().await?.read::<GatewayMessage>().unwrap();
        let Some(gateway_message::Payload::SessionAccepted(accepted)) = first.payload else {
            panic!("the first message is the acceptance");
        };
        Some((accepted.session_id, feed, messages))
    }

    async fn open(&self, open: RelayOpen, session: &Feed) {
        let RelayOpen { channel_id, target, .. } = open;
        let runs_command = !matches!(target, Some(relay_open::Target::Tcp(_)));
        let does = {
            let mut told = self.told.lock().unwrap();
            told.opened.push(channel_id.clone());
            if is_spare(&channel_id) { told.with_spares } else { Spares::Opens }
        };
        let result = RelayOpenResult {
            channel_id: channel_id.clone(),
            success: !matches!(does, Spares::Refuses),
            error: String::new(),
        };
        let result =
            SupervisorMessage { payload: Some(supervisor_message::Payload::RelayOpenResult(result)) };
        session.send(Ok(BodyFrame::data(Framed::new(&result).raw))).await.unwrap();
        if !matches!(does, Spares::Ignores | Spares::Refuses) {
            tokio::spawn(self.clone().echo(channel_id, does, runs_command));
        }
    }

    async fn echo(self, channel_id: String, does: Spares, greets: bool) {
        let (feed, answer) = self.call("RelayStream");
        let init = RelayInit { channel_id: channel_id.clone() };
        let init = RelayFrame { payload: Some(relay_frame::Payload::Init(init)) };
        feed.send(Ok(BodyFrame::data(Framed::new(&init).raw))).await.unwrap();
        let mut messages =
            Deframed { body: answer.await.into_body(), deframer: Deframer::default(), status: None };
        match does {
            Spares::Ends => return,
            Spares::Opens if greets => feed.send(Ok(BodyFrame::data(data(GREETING)))).await.unwrap(),
            _ => {}
        }
        let mut last = Vec::new();
        while let Some(message) = messages.next().await {
            last = data_of(message.read().unwrap());
            if feed.send(Ok(BodyFrame::data(message.raw))).await.is_err() {
                break;
            }
        }
        if let Some(status) = messages.status {
            self.told.lock().unwrap().ended.push((channel_id, last, status));
        }
    }
}

/// What a server of commands says first.
const GREETING: &[u8] = b"SSH-2.0-test\r\n";

fn data(bytes: &[u8]) -> Bytes {
    Framed::new(&RelayFrame { payload: Some(relay_frame::Payload::Data(bytes.to_vec())) }).raw
}

/// Whether a relay's channel is one of the hub's own.
pub fn is_spare(channel: &str) -> bool {
    channel.starts_with("substrate-spare-")
}

pub fn data_of(frame: RelayFrame) -> Vec<u8> {
    match frame.payload {
        Some(relay_frame::Payload::Data(data)) => data,
        other => panic!("data was expected, not {other:?}"),
    }
}

/// Sends bytes over a relay and sees them come back.
pub async fn echo(relay: &mut (Deframed, Feed), bytes: &[u8]) {
    relay.1.send(Ok(BodyFrame::data(data(bytes)))).await.unwrap();
    let back = within("the echo", relay.0.next()).await.expect("the relay goes on");
    assert_eq!(data_of(back.read::<RelayFrame>().unwrap()), bytes);
}

/// Waits until a condition holds.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let mut turns =
        tokio_stream::wrappers::IntervalStream::new(tokio::time::interval(Duration::from_millis(2)));
    within(what, async {
        while !holds() {
            turns.next().await;
        }
    })
    .await;
}
