// SPDX-License-Identifier: Apache-2.0
//! A create whose answer the gateway never got: what the gateway shows later decides whether the sandbox stays.
use std::convert::Infallible;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{Stream, StreamExt as _, stream};
use openshell_driver_substrate::{Config, Supervisor, SupervisorMode, bundle, mirror, names};
use substrate_proto::compute::watch_sandboxes_event::Payload;
use substrate_proto::session::Head;
use substrate_proto::supervisor::{
    GatewayMessage, SessionAccepted, SupervisorHello, SupervisorMessage, gateway_message, supervisor_message,
};
use substrate_session::grpc::Framed;
use substrate_session::hub::memory::Memory;
use tokio::sync::Notify;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::stub::{Bench, Stub, sandbox};

const ID: &str = "0198c0de-0000-7000-8000-000000000001";

fn mark(stub: &Stub, id: &str) -> Option<String> {
    let marks = stub.actor(id)?.spec.unwrap_or_default().annotations;
    Some(marks[names::CREATE].split('-').next().unwrap_or_default().to_owned())
}

/// A gateway that accepts sessions, or answers otherwise: with NOT_FOUND where it has no such sandbox
/// (`handle_connect_supervisor`, `require_persisted_sandbox` in crates/openshell-server/src/supervisor_session.rs at
/// 2f7fb655), with UNAUTHENTICATED where it does not take the token (`validate_exp` in auth/sandbox_jwt.rs).
#[derive(Clone)]
struct Sessions {
    says: Arc<Mutex<Code>>,
    asked: Arc<AtomicUsize>,
    end: Arc<Notify>,
}

type Said = Pin<Box<dyn Stream<Item = Result<GatewayMessage, Status>> + Send>>;

impl Sessions {
    fn connect(&self) -> Result<Response<Said>, Status> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let says = *self.says.lock().unwrap();
        if says != Code::Ok {
            return Err(Status::new(says, "says the gateway"));
        }
        let accepted = SessionAccepted { session_id: "s".to_owned(), heartbeat_interval_secs: 15 };
        let payload = Some(gateway_message::Payload::SessionAccepted(accepted));
        let end = Arc::clone(&self.end);
        let rest = stream::once(async move {
            end.notified().await;
            Err(Status::unavailable("the gateway restarts"))
        });
        Ok(Response::new(Box::pin(stream::once(async { Ok(GatewayMessage { payload }) }).chain(rest))))
    }
}

impl tonic::server::NamedService for Sessions {
    const NAME: &str = "openshell.v1.OpenShell";
}

impl tower::Service<http::Request<tonic::body::Body>> for Sessions {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let sessions = self.clone();
        Box::pin(async move {
            let codec = tonic_prost::ProstCodec::<GatewayMessage, SupervisorMessage>::default();
            let service = tower::service_fn(move |_: Request<Streaming<SupervisorMessage>>| {
                std::future::ready(sessions.connect())
            });
            Ok(tonic::server::Grpc::new(codec).streaming(service, request).await)
        })
    }
}

async fn gateway(says: Code) -> (Sessions, String) {
    let sessions =
        Sessions { says: Arc::new(says.into()), asked: Arc::default(), end: Arc::new(Notify::new()) };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let serving =
        tonic::transport::Server::builder().add_service(sessions.clone()).serve_with_incoming(incoming);
    tokio::spawn(serving);
    (sessions, format!("http://{address}"))
}

/// A driver with sessions, whose hub knows the sandbox's Hello from before, as after a restart.
async fn driver(store: &Path, gateway: &str) -> Bench {
    let key = bundle::key(&store.join("session.key")).unwrap();
    let head = Head { path: "/openshell.v1.OpenShell/ConnectSupervisor".to_owned(), ..Head::default() };
    let hello = SupervisorHello { sandbox_id: ID.to_owned(), ..SupervisorHello::default() };
    let hello = SupervisorMessage { payload: Some(supervisor_message::Payload::Hello(hello)) };
    Memory::new(&store.join("sessions"), &key).keep(&names::uid(ID), &head, &Framed::new(&hello)).unwrap();
    let config = |config: &mut Config| {
        config.gateway_endpoint = Some(gateway.to_owned());
        config.supervisor = Supervisor {
            mode: SupervisorMode::Process,
            // Programs, as far as anyone looks.
            path: Some("/bin/true".into()),
            shim_path: "/bin/true".into(),
            store: store.to_owned(),
            ..Supervisor::default()
        };
    };
    Bench::with(Stub::new(), config).await
}

#[tokio::test]
async fn a_sandbox_that_its_gateway_does_not_know_is_taken_back() {
    let store = tempfile::tempdir().unwrap();
    let (_sessions, endpoint) = gateway(Code::NotFound).await;
    let mut bench = driver(store.path(), &endpoint).await;
    bench.create(sandbox(ID, "alice")).await.unwrap();
    bench.stub.until(|stub| !stub.inventory().iter().any(|thing| !thing.starts_with("atespace"))).await;
    bench.create(sandbox("other", "alice")).await.unwrap();
}

#[tokio::test]
async fn a_sandbox_that_its_gateway_has_known_stays_when_the_gateway_forgets_it() {
    let store = tempfile::tempdir().unwrap();
    let (sessions, endpoint) = gateway(Code::Ok).await;
    let mut bench = driver(store.path(), &endpoint).await;
    bench.create(sandbox(ID, "alice")).await.unwrap();
    bench.stub.until(|stub| mark(stub, ID).as_deref() == Some("done")).await;
    // It lost its database.
    *sessions.says.lock().unwrap() = Code::NotFound;
    let looked = bench.stub.calls("get_actor");
    sessions.end.notify_one();
    bench.stub.until(|stub| stub.calls("get_actor") > looked).await;
    assert_eq!(sessions.asked.load(Ordering::SeqCst), 2);
    // Whatever was to follow that look.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(bench.list().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_token_that_is_refused_is_told_also_to_a_gateway_that_watches_later() {
    let store = tempfile::tempdir().unwrap();
    let (sessions, endpoint) = gateway(Code::Unauthenticated).await;
    let mut bench = driver(store.path(), &endpoint).await;
    bench.create(sandbox(ID, "alice")).await.unwrap();
    bench.stub.until(|_| sessions.asked.load(Ordering::SeqCst) == 1).await;
    // Its word is passed on beside the calls.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut watching = bench.watch().await.unwrap();
    loop {
        let event = tokio::time::timeout(Duration::from_secs(20), watching.message()).await;
        let event = event.expect("an event in time").unwrap().expect("the watch goes on");
        if let Some(Payload::PlatformEvent(told)) = event.payload
            && let Some(told) = told.event.filter(|told| told.reason == "TokenRefused")
        {
            for part in ["says the gateway", "only a new sandbox gets one", "substrate exec alice"] {
                assert!(told.message.contains(part), "{}", told.message);
            }
            break;
        }
    }
    assert_eq!(bench.list().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_name_is_free_again_when_nobody_asked_for_what_has_it() {
    let mut bench = Bench::start().await;
    bench.create(sandbox(ID, "alice")).await.unwrap();
    assert_eq!(mark(&bench.stub, ID).as_deref(), Some("made"));
    let error = bench.create(sandbox("second", "alice")).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "its gateway may be about to ask: {error}");
    let age = |stub: &Stub, id: &str| {
        stub.world.lock().unwrap().actors.get_mut(&names::uid(id)).unwrap().created_ms =
            mirror::now_ms() - 200_000;
    };
    age(&bench.stub, ID);
    bench.create(sandbox("second", "alice")).await.unwrap();
    assert!(bench.stub.actor(ID).is_none());
    // A gateway has this one.
    bench.get("second").await.unwrap();
    bench.stub.until(|stub| mark(stub, "second").as_deref() == Some("done")).await;
    age(&bench.stub, "second");
    let error = bench.create(sandbox("third", "alice")).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "{error}");
    assert!(bench.stub.actor("second").is_some());
}
