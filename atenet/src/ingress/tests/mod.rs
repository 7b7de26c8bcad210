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

mod replies;
mod requests;

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
