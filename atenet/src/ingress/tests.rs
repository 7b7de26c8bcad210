// SPDX-License-Identifier: Apache-2.0
//! The router between real sockets: a stub control plane, stub workers, plain HTTP clients.
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::{Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Full, StreamBody};
use hyper::body::Frame;
use prost::Message as _;
use substrate_proto::ateapi::{Actor, ActorState, Snapshot};
use substrate_proto::atenet::{IngressOpen, IngressOpened, ingress_opened::Code};
use substrate_proto::types::{CheckpointPolicy, Durability};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, mpsc};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use super::*;
use crate::testing::{Stub, snapshot_answer};
use crate::token::{Grant, generate_key_pair, mint};

type Reply = Response<UnsyncBoxBody<Bytes, io::Error>>;

/// A worker's ingress socket with an HTTP server for an actor.
struct Worker {
    endpoint: String,
    open: Arc<AtomicUsize>,
    asked: Arc<AtomicUsize>,
    codes: Arc<Mutex<Vec<Code>>>,
    task: Option<AbortOnDropHandle<()>>,
}

impl Worker {
    /// Serves one generation of one actor; `answer` gives the actor's replies.
    fn start<F, R>(path: PathBuf, uid: &str, generation: u64, answer: F) -> Self
    where
        F: Fn(Request<Incoming>) -> R + Clone + Send + 'static,
        R: Future<Output = Reply> + Send + 'static,
    {
        let endpoint = format!("unix:{}", path.display());
        let listener = UnixListener::bind(path).unwrap();
        let (open, asked) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let codes = Arc::new(Mutex::new(Vec::new()));
        let (uid, opened, count, next) = (uid.to_owned(), open.clone(), asked.clone(), codes.clone());
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let ask = read_open(&mut stream).await;
                count.fetch_add(1, Ordering::SeqCst);
                let code = match next.lock().unwrap().pop() {
                    Some(code) => code,
                    None if ask.actor_uid != uid || ask.generation != generation => Code::Stale,
                    // What nobody listens on.
                    None if ask.port == 1 => Code::Refused,
                    None => Code::Ok,
                };
                let said = IngressOpened { code: code.into(), message: format!("{code:?}") };
                stream.write_all(&said.encode_length_delimited_to_vec()).await.unwrap();
                if code != Code::Ok {
                    continue;
                }
                let (answer, open) = (answer.clone(), opened.clone());
                open.fetch_add(1, Ordering::SeqCst);
                connections.spawn(async move {
                    let service = hyper::service::service_fn(move |request| {
                        let answer = answer.clone();
                        async move { Ok::<_, Infallible>(answer(request).await) }
                    });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .with_upgrades()
                        .await;
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { endpoint, open, asked, codes, task: Some(AbortOnDropHandle::new(task)) }
    }

    /// As `kill -9` does: every connection ends.
    fn kill(&mut self) {
        self.task = None;
    }
}

async fn read_open(stream: &mut UnixStream) -> IngressOpen {
    let len = stream.read_u8().await.unwrap();
    let mut bytes = vec![0; usize::from(len)];
    stream.read_exact(&mut bytes).await.unwrap();
    IngressOpen::decode(bytes.as_slice()).unwrap()
}

fn text(body: impl Into<Bytes>) -> Reply {
    Response::new(Full::new(body.into()).map_err(|never| match never {}).boxed_unsync())
}

struct Fixture {
    dir: tempfile::TempDir,
    stub: Arc<Stub>,
    address: SocketAddr,
    private_pem: String,
    token: String,
    shutdown: CancellationToken,
    _api: AbortOnDropHandle<()>,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Fixture {
    async fn new() -> Self {
        Self::with(Limits::default()).await
    }

    async fn with(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (stub, ateapi, api) = Stub::serve(dir.path());
        let pair = generate_key_pair().unwrap();
        let public_key = dir.path().join("ingress.pub");
        std::fs::write(&public_key, &pair.public_pem).unwrap();
        let mut config = Config::new(ateapi, public_key);
        config.listen = "127.0.0.1:0".parse().unwrap();
        config.limits = limits;
        let shutdown = CancellationToken::new();
        let (ready, address) = oneshot::channel();
        tokio::spawn(serve(config, ready, shutdown.clone()));
        let address = address.await.unwrap();
        stub.watched(1).await;
        let grant = Grant { atespace: "team".into(), actor: None };
        let token = mint(&pair.private_pem, &grant, None).unwrap();
        Self { dir, stub, address, private_pem: pair.private_pem, token, shutdown, _api: api }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn token(&self) -> &str {
        &self.token
    }

    fn actor(name: &str, state: ActorState) -> Actor {
        Actor {
            uid: format!("uid-{name}"),
            atespace: "team".into(),
            name: name.into(),
            state: state.into(),
            generation: 3,
            wake_on_traffic: true,
            ..Default::default()
        }
    }

    fn running(&self, name: &str, worker: &Worker) -> Actor {
        let actor = Self::actor(name, ActorState::Running);
        self.stub.put(Actor { ingress_endpoint: worker.endpoint.clone(), ..actor })
    }

    /// A running actor whose reply policy is `sync` with node durability.
    fn running_sync(&self, name: &str, worker: &Worker, max_hold: &str) -> Actor {
        let policy = CheckpointPolicy {
            on_reply: "sync".into(),
            durability: "node".into(),
            max_hold: max_hold.into(),
            ..Default::default()
        };
        let actor = Self::actor(name, ActorState::Running);
        let endpoint = worker.endpoint.clone();
        self.stub.put(Actor { ingress_endpoint: endpoint, checkpoint: Some(policy), ..actor })
    }

    fn to(&self, name: &str) -> http::request::Builder {
        Request::builder()
            .uri("/path?q=1")
            .header("host", format!("{name}.team.actors.localhost"))
            .header("ate-authorization", format!("Bearer {}", self.token()))
    }

    async fn send(&self, request: Request<UnsyncBoxBody<Bytes, io::Error>>) -> Response<Incoming> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await.unwrap()
    }

    async fn get(&self, name: &str) -> Response<Incoming> {
        self.send(self.to(name).body(none()).unwrap()).await
    }
}

fn none() -> UnsyncBoxBody<Bytes, io::Error> {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

async fn body(response: Response<Incoming>) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

async fn refusal(response: Response<Incoming>, status: u16, error: &str) -> serde_json::Value {
    assert_eq!(response.status().as_u16(), status);
    let json: serde_json::Value = serde_json::from_str(&body(response).await).unwrap();
    assert_eq!(json["error"], error, "{json}");
    json
}

fn durability(response: &Response<Incoming>) -> Option<&str> {
    response.headers().get("ate-durability").map(|value| value.to_str().unwrap())
}

#[tokio::test]
async fn nothing_happens_without_a_token_for_the_actor() {
    let fixture = Fixture::new().await;
    fixture.stub.put(Fixture::actor("alice", ActorState::Suspended));
    let ask = |authorization: Option<(&'static str, String)>| {
        let mut request = Request::builder().uri("/").header("host", "alice.team.actors.localhost");
        if let Some((name, value)) = authorization {
            request = request.header(name, value);
        }
        fixture.send(request.body(none()).unwrap())
    };
    let json = refusal(ask(None).await, 401, "unauthenticated").await;
    assert!(json["hint"].as_str().unwrap().contains("substrate token"));
    refusal(ask(Some(("authorization", "Bearer nonsense".into()))).await, 401, "unauthenticated").await;
    refusal(ask(Some(("authorization", "Basic eDp5".into()))).await, 401, "unauthenticated").await;
    let other = generate_key_pair().unwrap();
    let grant = |atespace: &str, actor: Option<&str>| Grant {
        atespace: atespace.into(),
        actor: actor.map(str::to_owned),
    };
    let forged = mint(&other.private_pem, &grant("team", None), None).unwrap();
    refusal(ask(Some(("ate-authorization", format!("Bearer {forged}")))).await, 401, "unauthenticated").await;
    for (atespace, actor) in [("other", None), ("team", Some("bob"))] {
        let token = mint(&fixture.private_pem, &grant(atespace, actor), None).unwrap();
        refusal(ask(Some(("ate-authorization", format!("Bearer {token}")))).await, 403, "forbidden").await;
    }
    assert_eq!(fixture.stub.resumes.load(Ordering::SeqCst), 0);
    assert_eq!(fixture.stub.gets.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_request_reaches_its_actor_and_only_what_should_pass_does() {
    let fixture = Fixture::new().await;
    let (seen, mut requests) = mpsc::unbounded_channel();
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, move |request| {
        seen.send((request.uri().clone(), request.headers().clone())).unwrap();
        async move {
            let (_, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            let mut response = text(body);
            response.headers_mut().insert("ate-durability", "sync".parse().unwrap());
            response.headers_mut().insert("x-own", "1".parse().unwrap());
            response
        }
    });
    fixture.running("alice", &worker);
    let big = Bytes::from(vec![b'x'; 1 << 20]);
    let request = fixture
        .to("alice")
        .method("POST")
        .header("authorization", "Bearer for-the-actor")
        .header("ate-spoofed", "1")
        .body(Full::new(big.clone()).map_err(|never| match never {}).boxed_unsync())
        .unwrap();
    let response = fixture.send(request).await;
    assert_eq!(response.status(), 200);
    assert_eq!(durability(&response), None, "an actor does not speak for the router");
    assert_eq!(response.headers()["x-own"], "1");
    assert_eq!(body(response).await.len(), big.len());
    let (uri, headers) = requests.recv().await.unwrap();
    assert_eq!(uri, "/path?q=1");
    assert_eq!(headers["host"], "alice.team.actors.localhost");
    assert_eq!(headers["authorization"], "Bearer for-the-actor");
    assert_eq!(headers["x-forwarded-for"], "127.0.0.1");
    assert!(!headers.keys().any(|name| name.as_str().starts_with("ate-")), "{headers:?}");

    // By header, with our own token in `authorization`, which the actor must not see.
    let request = Request::builder()
        .uri("/")
        .header("host", "anything")
        .header("ate-actor", "team/alice:8080")
        .header("authorization", format!("Bearer {}", fixture.token()))
        .body(none())
        .unwrap();
    assert_eq!(fixture.send(request).await.status(), 200);
    let (_, headers) = requests.recv().await.unwrap();
    assert!(!headers.contains_key("authorization"), "{headers:?}");

    refusal(fixture.get("nobody").await, 404, "no_such_actor").await;
    let request = Request::builder()
        .uri("/")
        .header("host", "localhost")
        .header("ate-authorization", format!("Bearer {}", fixture.token()));
    refusal(fixture.send(request.body(none()).unwrap()).await, 404, "no_actor_addressed").await;
    let health = Request::builder().uri("/healthz").header("host", "localhost").body(none()).unwrap();
    assert_eq!(fixture.send(health).await.status(), 200);
}

#[tokio::test]
async fn http2_clients_are_served() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |request| async move {
        text(format!("{:?} {}", request.version(), request.headers()["host"].to_str().unwrap()))
    });
    fixture.running("alice", &worker);
    let stream = TcpStream::connect(fixture.address).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = Request::builder()
        .uri("http://alice.team.actors.localhost/x")
        .header("ate-authorization", format!("Bearer {}", fixture.token()))
        .body(none())
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(body(response).await, "HTTP/1.1 alice.team.actors.localhost");
}

#[tokio::test]
async fn bodies_stream_in_both_directions() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |request| async move {
        // Echoes block by block: the first answer is there before the last question.
        Response::new(request.into_body().map_err(io::Error::other).boxed_unsync())
    });
    fixture.running("alice", &worker);
    let (send, receive) = mpsc::channel::<io::Result<Frame<Bytes>>>(1);
    let stream = StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(receive)).boxed_unsync();
    let request = fixture.to("alice").method("POST").body(stream).unwrap();
    send.send(Ok(Frame::data(Bytes::from_static(b"one")))).await.unwrap();
    let mut response = fixture.send(request).await;
    for word in ["one", "two", "three"] {
        let frame = response.body_mut().frame().await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), word);
        let next = if word == "one" { "two" } else { "three" };
        if word != "three" {
            send.send(Ok(Frame::data(Bytes::from_static(next.as_bytes())))).await.unwrap();
        }
    }
    drop(send);
    assert!(response.body_mut().frame().await.is_none());
}

#[tokio::test]
async fn a_hundred_requests_wake_a_sleeping_actor_once() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 4, |_| async move { text("awake") });
    fixture.stub.put(Fixture::actor("alice", ActorState::Suspended));
    let go = Arc::new(Notify::new());
    let (endpoint, gate) = (worker.endpoint.clone(), go.clone());
    fixture.stub.on_resume(move |stub, ask| {
        let (endpoint, gate) = (endpoint.clone(), gate.clone());
        async move {
            assert_eq!(ask.cause, "traffic");
            gate.notified().await;
            Ok(stub.change("alice", |actor| {
                actor.state = ActorState::Running.into();
                actor.generation = 4;
                actor.ingress_endpoint = endpoint;
            }))
        }
    });
    let fixture = Arc::new(fixture);
    let mut requests = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let fixture = fixture.clone();
        requests.spawn(async move { body(fixture.get("alice").await).await });
    }
    while fixture.stub.resumes.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    go.notify_one();
    let replies = requests.join_all().await;
    assert!(replies.iter().all(|reply| reply == "awake"), "{replies:?}");
    assert_eq!(fixture.stub.resumes.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn waiting_is_bounded_and_says_when_to_come_back() {
    let fixture = Fixture::with(Limits { parked_per_actor: 1, ..Limits::default() }).await;
    fixture.stub.put(Fixture::actor("alice", ActorState::Paused));
    fixture.stub.on_resume(|_, _| std::future::pending());
    let first = fixture.get("alice");
    let mut first = std::pin::pin!(first);
    while fixture.stub.resumes.load(Ordering::SeqCst) == 0 {
        assert!(futures::poll!(first.as_mut()).is_pending());
        tokio::task::yield_now().await;
    }
    let second = fixture.get("alice").await;
    assert_eq!(second.headers()["retry-after"], "1");
    let json = refusal(second, 503, "too_many_waiting").await;
    assert_eq!((&json["retry"], &json["actor"]), (&true.into(), &"team/alice".into()));
}

#[tokio::test]
async fn refused_wakeups_are_explained() {
    let limits = Limits { wakeups_burst: 4, wakeups_per_second: 0.001, ..Limits::default() };
    let fixture = Fixture::with(limits).await;
    fixture.stub.put(Fixture::actor("alice", ActorState::Suspended));
    fixture.stub.on_resume(|_, _| async { Err(Status::resource_exhausted("no worker is free")) });
    let response = fixture.get("alice").await;
    assert_eq!(response.headers()["retry-after"], "5");
    refusal(response, 503, "no_capacity").await;
    // A worker that is being freed is waited for.
    let tries = Arc::new(AtomicUsize::new(0));
    let worker = Worker::start(fixture.path("w"), "uid-alice", 4, |_| async move { text("awake") });
    let endpoint = worker.endpoint.clone();
    fixture.stub.on_resume(move |stub, _| {
        use tonic_types::{ErrorDetails, StatusExt as _};
        let mut details = ErrorDetails::with_error_info("WORKER_POOL_FULL", "substrate", []);
        details.set_retry_info(Some(Duration::from_millis(5)));
        let busy = Status::with_error_details(tonic::Code::ResourceExhausted, "full", details);
        let (first, endpoint) = (tries.fetch_add(1, Ordering::SeqCst) == 0, endpoint.clone());
        async move {
            if first {
                return Err(busy);
            }
            Ok(stub.change("alice", |actor| {
                actor.state = ActorState::Running.into();
                actor.generation = 4;
                actor.ingress_endpoint = endpoint;
            }))
        }
    });
    assert_eq!(body(fixture.get("alice").await).await, "awake");
    drop(worker);
    fixture.stub.put(Fixture::actor("alice", ActorState::Suspended));
    fixture.stub.on_resume(|_, _| async { Err(Status::failed_precondition("the runtime is revoked")) });
    let json = refusal(fixture.get("alice").await, 503, "not_resumed").await;
    assert_eq!(json["message"], "the runtime is revoked");
    fixture.stub.on_resume(|_, _| async { Err(Status::not_found("gone")) });
    refusal(fixture.get("alice").await, 404, "no_such_actor").await;
    let limited = fixture.get("alice").await;
    assert!(limited.headers().contains_key("retry-after"));
    refusal(limited, 429, "woken_too_often").await;
}

#[tokio::test]
async fn states_that_cannot_be_woken_are_looked_up_and_explained() {
    let fixture = Fixture::new().await;
    let mut alice = Fixture::actor("alice", ActorState::Exited);
    alice.exit = Some(substrate_proto::types::ExitStatus { code: 7, ..Default::default() });
    fixture.stub.put(alice);
    let json = refusal(fixture.get("alice").await, 503, "exited").await;
    assert!(json["message"].as_str().unwrap().contains("code 7"), "{json}");
    assert!(json["hint"].as_str().unwrap().contains("substrate reset actor alice"), "{json}");
    fixture.stub.change("alice", |actor| {
        actor.state = ActorState::Crashed.into();
        actor.reason = "CHECKPOINT_FAILED".into();
    });
    let json = refusal(fixture.get("alice").await, 503, "crashed").await;
    assert!(json["message"].as_str().unwrap().contains("CHECKPOINT_FAILED"), "{json}");
    let asleep = Fixture::actor("bob", ActorState::Suspended);
    fixture.stub.put(Actor { wake_on_traffic: false, ..asleep });
    let json = refusal(fixture.get("bob").await, 503, "asleep").await;
    assert!(json["hint"].as_str().unwrap().contains("substrate resume actor bob"), "{json}");
    assert_eq!(fixture.stub.resumes.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_stale_route_is_looked_up_again_and_the_request_repeated() {
    let fixture = Fixture::new().await;
    let old = Worker::start(fixture.path("old"), "uid-alice", 3, |_| async move { text("old") });
    let new = Worker::start(fixture.path("new"), "uid-alice", 4, |request| async move {
        text(request.into_body().collect().await.unwrap().to_bytes())
    });
    fixture.running("alice", &old);
    assert_eq!(body(fixture.get("alice").await).await, "old");
    *old.codes.lock().unwrap() = vec![Code::Stale];
    // The move is committed, but the watch is not heard of it: the record is changed behind its back.
    {
        let mut actors = fixture.stub.actors.lock().unwrap();
        let actor = actors.get_mut(&("team".to_owned(), "alice".to_owned())).unwrap();
        actor.revision += 1;
        actor.generation = 4;
        actor.ingress_endpoint = new.endpoint.clone();
    }
    let body_ = Full::new(Bytes::from_static(b"once")).map_err(|never| match never {}).boxed_unsync();
    let response = fixture.send(fixture.to("alice").method("POST").body(body_).unwrap()).await;
    assert_eq!(body(response).await, "once");
    assert_eq!(old.asked.load(Ordering::SeqCst), 2);
    assert_eq!(new.asked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn not_now_waits_for_a_moment_and_goes_on() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |_| async move { text("ok") });
    *worker.codes.lock().unwrap() = vec![Code::NotNow; 3];
    fixture.running("alice", &worker);
    assert_eq!(fixture.get("alice").await.status(), 200);
    assert_eq!(worker.asked.load(Ordering::SeqCst), 4);
    *worker.codes.lock().unwrap() = vec![Code::Refused];
    let json = refusal(fixture.get("alice").await, 502, "nothing_listens").await;
    assert_eq!(json["retry"], false);
}

#[tokio::test]
async fn a_worker_that_is_gone_before_anything_was_sent_costs_only_time() {
    let fixture = Fixture::new().await;
    let mut old = Worker::start(fixture.path("old"), "uid-alice", 3, |_| async move { text("old") });
    let new = Worker::start(fixture.path("new"), "uid-alice", 4, |_| async move { text("new") });
    fixture.running("alice", &old);
    assert_eq!(body(fixture.get("alice").await).await, "old");
    old.kill();
    let (stub, endpoint) = (fixture.stub.clone(), new.endpoint.clone());
    let moving = tokio::spawn(async move {
        while stub.gets.load(Ordering::SeqCst) < 2 {
            tokio::task::yield_now().await;
        }
        stub.change("alice", |actor| {
            actor.generation = 4;
            actor.ingress_endpoint = endpoint;
        });
    });
    assert_eq!(body(fixture.get("alice").await).await, "new");
    moving.await.unwrap();
}

#[tokio::test]
async fn a_request_that_the_worker_took_with_it_is_502_and_may_be_repeated() {
    let fixture = Fixture::new().await;
    let (arrived, mut waiting) = mpsc::unbounded_channel();
    let mut worker = Worker::start(fixture.path("w"), "uid-alice", 3, move |_| {
        arrived.send(()).unwrap();
        std::future::pending()
    });
    fixture.running("alice", &worker);
    let request = fixture.get("alice");
    let killer = async {
        waiting.recv().await.unwrap();
        worker.kill();
    };
    let (response, ()) = tokio::join!(request, killer);
    let json = refusal(response, 502, "interrupted").await;
    assert_eq!((&json["retry"], &json["actor"]), (&true.into(), &"team/alice".into()));
}

#[tokio::test]
async fn upgrades_pass_through() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |mut request| async move {
        assert_eq!(request.headers()["upgrade"], "websocket");
        assert_eq!(request.headers()["sec-websocket-key"], "k");
        let upgraded = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut stream = TokioIo::new(upgraded.await.unwrap());
            let mut bytes = [0; 4];
            stream.read_exact(&mut bytes).await.unwrap();
            bytes.reverse();
            stream.write_all(&bytes).await.unwrap();
            stream.shutdown().await.unwrap();
        });
        let mut response = text("");
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert("connection", "Upgrade".parse().unwrap());
        response.headers_mut().insert("upgrade", "websocket".parse().unwrap());
        response.headers_mut().insert("sec-websocket-accept", "a".parse().unwrap());
        response
    });
    fixture.running_sync("alice", &worker, "2s");
    let request = fixture
        .to("alice")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-key", "k")
        .body(none())
        .unwrap();
    let response = fixture.send(request).await;
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(response.headers()["sec-websocket-accept"], "a");
    assert_eq!(response.headers()["upgrade"], "websocket");
    assert_eq!(durability(&response), Some("async"), "a stream is not covered by sync");
    let mut stream = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
    stream.write_all(b"ping").await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"gnip");
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_refused_declared_or_not() {
    let fixture = Fixture::with(Limits { request_body: 10, ..Limits::default() }).await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |request| async move {
        let read = request.into_body().collect().await;
        text(format!("{}", read.is_ok()))
    });
    fixture.running("alice", &worker);
    let long = || Bytes::from_static(b"more than ten bytes");
    let declared = Full::new(long()).map_err(|never| match never {}).boxed_unsync();
    refusal(
        fixture.send(fixture.to("alice").method("POST").body(declared).unwrap()).await,
        413,
        "body_too_large",
    )
    .await;
    let frames = futures::stream::iter([Ok(Frame::data(long()))]);
    let chunked = StreamBody::new(frames).boxed_unsync();
    refusal(
        fixture.send(fixture.to("alice").method("POST").body(chunked).unwrap()).await,
        413,
        "body_too_large",
    )
    .await;
}

#[tokio::test]
async fn a_sync_reply_waits_for_its_checkpoint_with_its_connection_ended() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |_| async move { text("answer") });
    fixture.running_sync("alice", &worker, "10s");
    let go = Arc::new(Notify::new());
    let (asked, mut checkpoints) = mpsc::unbounded_channel();
    let (gate, open) = (go.clone(), worker.open.clone());
    fixture.stub.on_checkpoint(move |_, ask| {
        asked.send((ask.clone(), open.load(Ordering::SeqCst))).unwrap();
        let gate = gate.clone();
        async move {
            gate.notified().await;
            Ok(snapshot_answer(3, Durability::Node))
        }
    });
    let request = fixture.get("alice");
    let mut request = std::pin::pin!(request);
    let (ask, open) = tokio::select! {
        _ = request.as_mut() => panic!("released before the checkpoint"),
        asked = checkpoints.recv() => asked.unwrap(),
    };
    assert_eq!(open, 0, "the reply's own connection stands against a quiet moment");
    assert_eq!((ask.generation, ask.max_heap), (3, 256 << 20));
    assert_eq!(ask.durability(), Durability::Node);
    assert_eq!(ask.actor.unwrap().uid, "uid-alice");
    assert!(futures::poll!(request.as_mut()).is_pending());
    go.notify_one();
    let response = request.await;
    assert_eq!(durability(&response), Some("sync"));
    assert_eq!(body(response).await, "answer");
}

#[tokio::test]
async fn a_sync_reply_falls_back_to_async_and_says_so() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |_| async move { text("answer") });
    fixture.running_sync("alice", &worker, "50ms");
    fixture.stub.on_checkpoint(|_, _| std::future::pending());
    let response = fixture.get("alice").await;
    assert_eq!((durability(&response), response.status().as_u16()), (Some("async"), 200));
    fixture.running_sync("alice", &worker, "30s");
    for status in [Status::resource_exhausted("512 MiB"), Status::unimplemented("no checkpoint here")] {
        fixture.stub.on_checkpoint(move |_, _| std::future::ready(Err(status.clone())));
        let response = fixture.get("alice").await;
        assert_eq!(durability(&response), Some("async"));
        assert_eq!(body(response).await, "answer");
    }
    // Asked again while it may yet succeed.
    let tries = Arc::new(AtomicUsize::new(0));
    fixture.stub.on_checkpoint(move |_, _| {
        let first = tries.fetch_add(1, Ordering::SeqCst) < 2;
        async move {
            if first { Err(Status::aborted("busy")) } else { Ok(snapshot_answer(3, Durability::Node)) }
        }
    });
    assert_eq!(durability(&fixture.get("alice").await), Some("sync"));
}

#[tokio::test]
async fn a_held_reply_whose_worker_is_lost_is_never_released() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |_| async move { text("answer") });
    fixture.running_sync("alice", &worker, "30s");
    fixture.stub.on_checkpoint(|stub, _| async move {
        stub.change("alice", |actor| {
            actor.state = ActorState::Suspended.into();
            actor.reason = "WORKER_LOST".into();
        });
        Err(Status::aborted("worker lost"))
    });
    let json = refusal(fixture.get("alice").await, 502, "interrupted").await;
    assert_eq!(json["retry"], true);
    assert!(json["message"].as_str().unwrap().contains("withheld"), "{json}");
    fixture.stub.on_resume(|stub, _| async move { Ok(stub.actor("alice")) });
    // Even when the control plane names the snapshot that the actor fell back to.
    fixture.running_sync("alice", &worker, "30s");
    fixture.stub.on_checkpoint(|stub, _| async move {
        let mut answer = snapshot_answer(3, Durability::Durable);
        answer.actor = Some(stub.change("alice", |actor| {
            actor.state = ActorState::Suspended.into();
            actor.last_snapshot = answer.snapshot.clone();
        }));
        Ok(answer)
    });
    refusal(fixture.get("alice").await, 502, "interrupted").await;
    // Even when the checkpoint that is answered is another generation's.
    fixture.running_sync("alice", &worker, "30s");
    fixture.stub.on_checkpoint(|stub, _| async move {
        stub.change("alice", |actor| actor.generation = 5);
        Ok(snapshot_answer(5, Durability::Node))
    });
    refusal(fixture.get("alice").await, 502, "interrupted").await;
}

#[tokio::test]
async fn a_reply_that_an_orderly_stop_captured_is_sync() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |_| async move { text("answer") });
    fixture.running_sync("alice", &worker, "30s");
    fixture.stub.on_checkpoint(|stub, _| async move {
        stub.change("alice", |actor| {
            actor.state = ActorState::Suspended.into();
            actor.last_snapshot = Some(Snapshot {
                generation: 3,
                cause: "suspend".into(),
                durability: Durability::Durable.into(),
                ..Default::default()
            });
        });
        Err(Status::failed_precondition("it is suspended"))
    });
    assert_eq!(durability(&fixture.get("alice").await), Some("sync"));
}

#[tokio::test]
async fn without_a_control_plane_the_worker_itself_is_asked() {
    let fixture = Fixture::new().await;
    let worker =
        Arc::new(Mutex::new(Worker::start(
            fixture.path("w"),
            "uid-alice",
            3,
            |_| async move { text("answer") },
        )));
    {
        let worker = worker.lock().unwrap();
        fixture.running_sync("alice", &worker, "100ms");
    }
    fixture.stub.on_checkpoint(|stub, _| async move {
        stub.away.store(true, Ordering::SeqCst);
        Err(Status::unavailable("going away"))
    });
    assert_eq!(durability(&fixture.get("alice").await), Some("async"));
    fixture.stub.away.store(false, Ordering::SeqCst);
    let killed = worker.clone();
    fixture.stub.on_checkpoint(move |stub, _| {
        let killed = killed.clone();
        async move {
            stub.away.store(true, Ordering::SeqCst);
            killed.lock().unwrap().kill();
            Err(Status::unavailable("going away"))
        }
    });
    refusal(fixture.get("alice").await, 502, "interrupted").await;
}

/// A reply of 100 KiB in blocks of 10 KiB.
fn long_reply() -> Reply {
    let blocks = (0..10).map(|n| Ok(Frame::data(Bytes::from(vec![b'0' + n; 10 << 10]))));
    Response::new(StreamBody::new(futures::stream::iter(blocks.collect::<Vec<_>>())).boxed_unsync())
}

#[tokio::test]
async fn a_long_sync_reply_streams_and_holds_its_end() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |_| async move { long_reply() });
    fixture.running_sync("alice", &worker, "30s");
    let go = Arc::new(Notify::new());
    let gate = go.clone();
    fixture.stub.on_checkpoint(move |_, _| {
        let gate = gate.clone();
        async move {
            gate.notified().await;
            Ok(snapshot_answer(3, Durability::Node))
        }
    });
    let mut response = fixture.send(fixture.to("alice").header("te", "trailers").body(none()).unwrap()).await;
    assert_eq!(durability(&response), None, "it is not known yet");
    let mut got = 0;
    // Everything but the last block comes before the checkpoint.
    while got <= 80 << 10 {
        got += response.body_mut().frame().await.unwrap().unwrap().into_data().unwrap().len();
    }
    while fixture.stub.checkpoints.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    while let Some(frame) =
        tokio::time::timeout(Duration::from_millis(50), response.body_mut().frame()).await.ok().flatten()
    {
        got += frame.unwrap().into_data().unwrap().len();
    }
    assert!(got < 100 << 10, "the end was not held");
    go.notify_one();
    let rest = response.into_body().collect().await.unwrap();
    assert_eq!(rest.trailers().unwrap()["ate-durability"], "sync");
    assert_eq!(got + rest.to_bytes().len(), 100 << 10);

    // Lost while held: the client sees that it is not complete.
    fixture.stub.on_checkpoint(|stub, _| async move {
        stub.change("alice", |actor| actor.generation = 9);
        Err(Status::aborted("worker lost"))
    });
    let response = fixture.get("alice").await;
    assert_eq!(response.status(), 200);
    assert!(response.into_body().collect().await.is_err());
}

#[tokio::test]
async fn events_of_a_stream_pass_at_once_and_only_its_end_is_held() {
    let fixture = Fixture::new().await;
    let (send, receive) = mpsc::channel::<io::Result<Frame<Bytes>>>(1);
    let receive = Arc::new(Mutex::new(Some(receive)));
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, move |_| {
        let receive = receive.lock().unwrap().take().unwrap();
        async move {
            let stream = StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(receive));
            let mut response = Response::new(stream.boxed_unsync());
            response.headers_mut().insert("content-type", "text/event-stream".parse().unwrap());
            response
        }
    });
    fixture.running_sync("alice", &worker, "30s");
    fixture.stub.on_checkpoint(|_, _| async { Ok(snapshot_answer(3, Durability::Node)) });
    let mut response = fixture.get("alice").await;
    for event in ["data: 1\n\n", "data: 2\n\n"] {
        send.send(Ok(Frame::data(Bytes::from_static(event.as_bytes())))).await.unwrap();
        let frame = response.body_mut().frame().await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), event);
    }
    assert_eq!(fixture.stub.checkpoints.load(Ordering::SeqCst), 0);
    drop(send);
    assert!(response.body_mut().frame().await.is_none());
    assert_eq!(fixture.stub.checkpoints.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_async_reply_goes_at_once_and_checkpoints_are_coalesced() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |_| async move { text("answer") });
    let policy = CheckpointPolicy { on_reply: "async".into(), ..Default::default() };
    let actor = Fixture::actor("alice", ActorState::Running);
    fixture.stub.put(Actor { ingress_endpoint: worker.endpoint.clone(), checkpoint: Some(policy), ..actor });
    let go = Arc::new(Notify::new());
    let gate = go.clone();
    fixture.stub.on_checkpoint(move |_, _| {
        let gate = gate.clone();
        async move {
            gate.notified().await;
            Ok(snapshot_answer(3, Durability::Durable))
        }
    });
    for _ in 0..10 {
        let response = fixture.get("alice").await;
        assert_eq!(durability(&response), Some("async"));
        assert_eq!(body(response).await, "answer");
    }
    while worker.open.load(Ordering::SeqCst) > 0 || fixture.stub.checkpoints.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(fixture.stub.checkpoints.load(Ordering::SeqCst), 1);
    go.notify_one();
    while fixture.stub.checkpoints.load(Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
    go.notify_one();
}

#[tokio::test]
async fn the_end_of_a_connection_is_not_taken_for_the_end_of_a_reply_once_the_worker_is_lost() {
    let fixture = Fixture::new().await;
    // An HTTP/1.0 server: its reply ends with the connection.
    let serve_raw = |path: PathBuf, alive: bool| async move {
        let listener = UnixListener::bind(path).unwrap();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let ask = read_open(&mut stream).await;
            let code = match (ask.port, alive) {
                (1, true) => Code::Refused,
                (1, false) => Code::Stale,
                _ => Code::Ok,
            };
            let said = IngressOpened { code: code.into(), message: String::new() };
            stream.write_all(&said.encode_length_delimited_to_vec()).await.unwrap();
            if code == Code::Ok {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(stream.read_u8().await.unwrap());
                }
                stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nhalf of it").await.unwrap();
            }
        }
    };
    for (name, alive) in [("alive", true), ("lost", false)] {
        let _server = AbortOnDropHandle::new(tokio::spawn(serve_raw(fixture.path(name), alive)));
        let actor = Fixture::actor(name, ActorState::Running);
        let endpoint = format!("unix:{}", fixture.path(name).display());
        fixture.stub.put(Actor { ingress_endpoint: endpoint, ..actor });
        while !fixture.path(name).exists() {
            tokio::task::yield_now().await;
        }
        let collected = fixture.get(name).await.into_body().collect().await;
        assert_eq!(collected.is_ok(), alive, "{name}");
    }
}
