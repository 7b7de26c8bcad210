// SPDX-License-Identifier: Apache-2.0
//! The S3 store over a real server (SeaweedFS, from scripts/setup), also through a proxy that breaks things.
use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_s3::config::{Credentials, SharedCredentialsProvider};
use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::s3::Patience;
use super::s3_server::Server;
use super::{BlobError, BlobStore, BlobUrl, Key, S3Store, S3Url, conformance, whole};

/// How long a test may take.
const LIMIT: Duration = Duration::from_secs(90);

/// Starts a server; `None`, loudly, where there is none.
fn serve() -> Option<Server> {
    Server::start(std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/tools/weed")))
}

fn sdk(key: &str, secret: &str) -> SdkConfig {
    SdkConfig::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new("us-east-1"))
        .credentials_provider(SharedCredentialsProvider::new(Credentials::new(
            key, secret, None, None, "test",
        )))
        .http_client(super::s3::http_client())
        .build()
}

fn url(address: SocketAddr, prefix: &str) -> S3Url {
    match format!("s3://bucket/{prefix}?endpoint=http://{address}").parse().unwrap() {
        BlobUrl::S3(url) => url,
        BlobUrl::Local(_) => unreachable!(),
    }
}

fn patience() -> Patience {
    Patience {
        attempts: 4,
        connect: Duration::from_secs(2),
        attempt: Duration::from_secs(30),
        answer: Duration::from_secs(10),
        backoff: Duration::from_millis(20),
    }
}

fn store(address: SocketAddr, prefix: &str) -> S3Store {
    S3Store::with(&url(address, prefix), &sdk("test", "secret"), patience())
}

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

/// What the proxy does to a request.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// Answers this status with this error code instead of asking.
    Status(u16, &'static str),
    /// Asks, then closes the connection instead of answering.
    LostAnswer,
    /// Never answers.
    Silence,
    /// Answers half of the body.
    Truncated,
}

/// Between store and server: takes faults off a queue, one for each request whose `METHOD path?query` contains a word.
#[derive(Clone, Default)]
struct Faults(Arc<Mutex<VecDeque<(&'static str, Fault)>>>);

impl Faults {
    fn push(&self, word: &'static str, faults: impl IntoIterator<Item = Fault>) {
        self.queue().extend(faults.into_iter().map(|fault| (word, fault)));
    }

    fn queue(&self) -> std::sync::MutexGuard<'_, VecDeque<(&'static str, Fault)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, request: &str) -> Option<Fault> {
        let mut queue = self.queue();
        let at = queue.iter().position(|(word, _)| request.contains(word))?;
        queue.remove(at).map(|(_, fault)| fault)
    }
}

type Forward =
    hyper_util::client::legacy::Client<hyper_util::client::legacy::connect::HttpConnector, Full<Bytes>>;
type Answer = Result<Response<BoxBody<Bytes, hyper::Error>>, &'static str>;

fn content(bytes: Bytes) -> BoxBody<Bytes, hyper::Error> {
    Full::new(bytes).map_err(|never: Infallible| match never {}).boxed()
}

async fn through(
    forward: Forward,
    server: SocketAddr,
    faults: Faults,
    request: Request<hyper::body::Incoming>,
) -> Answer {
    let (mut parts, body) = request.into_parts();
    let target = parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
    let fault = faults.take(&format!("{} {target}", parts.method));
    if fault == Some(Fault::Silence) {
        std::future::pending::<()>().await;
    }
    let body = body.collect().await.map_err(|_| "the request broke off")?.to_bytes();
    if let Some(Fault::Status(status, code)) = fault {
        let text = format!("<Error><Code>{code}</Code><Message>injected</Message></Error>");
        let mut answer = Response::new(content(text.into()));
        *answer.status_mut() = StatusCode::from_u16(status).unwrap();
        return Ok(answer);
    }
    parts.uri = format!("http://{server}{target}").parse().unwrap();
    let answer = forward
        .request(Request::from_parts(parts, Full::new(body)))
        .await
        .map_err(|_| "the server is gone")?;
    match fault {
        Some(Fault::LostAnswer) => Err("the answer is lost"),
        Some(Fault::Truncated) => {
            let (parts, body) = answer.into_parts();
            let whole = body.collect().await.map_err(|_| "the answer broke off")?.to_bytes();
            let half = whole.slice(..whole.len() / 2);
            // The length that was announced stays: the connection ends before it.
            let pieces = futures::stream::iter([Ok(hyper::body::Frame::data(half))]);
            Ok(Response::from_parts(parts, BodyExt::boxed(http_body_util::StreamBody::new(pieces))))
        }
        _ => Ok(answer.map(BodyExt::boxed)),
    }
}

async fn proxy(server: SocketAddr, faults: Faults) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let forward = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build_http();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let (forward, faults) = (forward.clone(), faults.clone());
            tokio::spawn(async move {
                let service = hyper::service::service_fn(move |request| {
                    through(forward.clone(), server, faults.clone(), request)
                });
                // Broken connections are what it is for.
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(connection), service)
                    .await;
            });
        }
    });
    address
}

fn pieces(count: usize, size: usize) -> super::ByteStream {
    futures::stream::iter((0..count).map(move |piece| Ok(Bytes::from(vec![piece as u8; size])))).boxed()
}

async fn limited(test: impl Future<Output = ()>) {
    tokio::time::timeout(LIMIT, test).await.expect("the test took too long");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_conforms_and_stands_a_bad_network() {
    let Some(server) = serve() else { return };
    limited(conformance::run(&store(server.address, "plain"))).await;
    limited(conformance::run(&store(server.address, ""))).await;
    let faults = Faults::default();
    let between = proxy(server.address, faults.clone()).await;
    limited(conformance::run(&store(between, "proxied"))).await;
    limited(every_fault_is_stood_or_said(server.address, between, &faults)).await;
    limited(Box::pin(what_is_set_up_wrongly_is_refused(server.address, between, &faults))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_ends_with_the_attempts_limit() {
    let Some(server) = serve() else { return };
    let faults = Faults::default();
    let between = proxy(server.address, faults.clone()).await;
    let direct = store(server.address, "faults");
    let two = key("actors/u/1-s/two");
    direct.put(&two, whole("x")).await.unwrap();
    // An attempt may take long, for the sake of slow uploads; silence may not.
    let hasty = Patience { attempts: 3, answer: Duration::from_secs(2), ..patience() };
    let hasty = S3Store::with(&url(between, "faults"), &sdk("test", "secret"), hasty);
    faults.push("GET", [Fault::Silence]);
    assert_eq!(hasty.get(&two, 0..1).await.unwrap(), "x");
    faults.push("GET", [Fault::Silence, Fault::Silence, Fault::Silence]);
    let error = hasty.get(&two, 0..1).await.unwrap_err();
    assert!(matches!(error, BlobError::Unavailable { .. }), "{error}");

    // What the bucket lost is missing, not unreachable.
    direct.delete(&two).await.unwrap();
    let answer = hasty.get(&two, 0..1).await;
    assert!(matches!(answer, Err(BlobError::NotFound { .. })), "{answer:?}");

    // Nor does a long outage of one store, or of this one through another client, use up the retries of the next.
    direct.put(&two, whole("x")).await.unwrap();
    let down = store(between, "faults");
    faults.push("GET", vec![Fault::Status(500, "InternalError"); 4 * 60]);
    let answers = futures::future::join_all((0..60).map(|_| down.get(&two, 0..1))).await;
    assert!(answers.iter().all(Result::is_err));
    faults.queue().clear();
    let other = store(between, "faults");
    faults.push("GET", [Fault::Status(500, "InternalError"), Fault::LostAnswer, Fault::Truncated]);
    assert_eq!(other.get(&two, 0..1).await.unwrap(), "x");
}

async fn every_fault_is_stood_or_said(server: SocketAddr, between: SocketAddr, faults: &Faults) {
    let (direct, store) = (store(server, "faults"), store(between, "faults"));
    let fail = Fault::Status(500, "InternalError");
    let slow = Fault::Status(503, "SlowDown");

    // A few failures are stood.
    let one = key("actors/u/1-s/one");
    faults.push("PUT", [fail, slow, Fault::LostAnswer]);
    assert_eq!(store.put(&one, whole("content")).await.unwrap(), 7);
    faults.push("GET", [fail, slow, Fault::LostAnswer]);
    assert_eq!(store.get(&one, 0..7).await.unwrap(), "content");
    faults.push("GET", [Fault::Truncated, Fault::Truncated]);
    assert_eq!(store.get(&one, 1..7).await.unwrap(), "ontent");
    faults.push("HEAD", [fail, slow]);
    assert_eq!(store.head(&one).await.unwrap(), Some(7));
    faults.push("GET", [fail, Fault::LostAnswer]);
    assert_eq!(store.list(&key("actors")).await.unwrap().len(), 1);
    faults.push("DELETE", [fail, Fault::LostAnswer]);
    store.delete(&one).await.unwrap();
    assert_eq!(direct.head(&one).await.unwrap(), None);

    // Parts too, wherever it fails: begin, part, completion; also with every answer to the completion lost.
    for (name, word, kinds) in [
        ("begin", "uploads", vec![fail, slow]),
        ("part", "partNumber=2", vec![fail, Fault::LostAnswer, slow]),
        ("complete", "POST /bucket/faults/actors/u/1-s/complete?uploadId", vec![slow, Fault::LostAnswer]),
        ("lost", "POST /bucket/faults/actors/u/1-s/lost?uploadId", vec![Fault::LostAnswer; 4]),
    ] {
        let parts = key(&format!("actors/u/1-s/{name}"));
        faults.push(word, kinds);
        assert_eq!(store.put(&parts, pieces(180, 100_000)).await.unwrap(), 18_000_000, "{name}");
        assert_eq!(direct.head(&parts).await.unwrap(), Some(18_000_000), "{name}");
        assert_eq!(direct.get(&parts, 17_899_999..17_900_001).await.unwrap().as_ref(), [178, 179], "{name}");
        assert!(faults.queue().is_empty(), "{name}: {:?} did not happen", faults.queue());
        direct.delete(&parts).await.unwrap();
    }

    // An outage is an error that says so; nothing is left, and a retry works.
    let two = key("actors/u/1-s/two");
    for (word, size) in [("PUT", 1), ("partNumber=1", 180)] {
        faults.push(word, vec![fail; 4]);
        let error = store.put(&two, pieces(size, 100_000)).await.unwrap_err();
        assert!(
            matches!(&error, BlobError::Unavailable { .. }) && error.to_string().contains("500"),
            "{error}"
        );
        faults.queue().clear();
        assert_eq!(direct.head(&two).await.unwrap(), None);
        assert_eq!(direct.abandon(Duration::ZERO, true).await.unwrap(), 0);
    }
    store.put(&two, whole("x")).await.unwrap();
    faults.push("GET", vec![fail; 4]);
    assert!(matches!(store.get(&two, 0..1).await, Err(BlobError::Unavailable { .. })));
    faults.push("GET", vec![Fault::Truncated; 4]);
    store.put(&key("actors/u/1-s/three"), whole("three")).await.unwrap();
    let error = store.get(&key("actors/u/1-s/three"), 0..5).await.unwrap_err();
    assert!(matches!(&error, BlobError::Unavailable { .. }), "{error}");

    // A clock that is wrong, and credentials that are: said at once, with the way out.
    for (status, code, words) in
        [(403, "RequestTimeTooSkewed", "clock is wrong"), (403, "AccessDenied", "s3:PutObject")]
    {
        faults.push("GET", vec![Fault::Status(status, code); 4]);
        let error = store.get(&two, 0..1).await.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        faults.queue().clear();
    }
}

async fn what_is_set_up_wrongly_is_refused(server: SocketAddr, between: SocketAddr, faults: &Faults) {
    let refused = |error: BlobError, words: &str| {
        assert!(matches!(&error, BlobError::Unusable { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    let mut nowhere = url(server, "x");
    nowhere.bucket = "no-such-bucket".to_owned();
    let nowhere = S3Store::with(&nowhere, &sdk("test", "secret"), patience());
    refused(nowhere.check().await.unwrap_err(), "no-such-bucket");
    let stranger = S3Store::with(&url(server, "x"), &sdk("test", "wrong"), patience());
    refused(stranger.check().await.unwrap_err(), "403");
    // Conditions that are not understood.
    faults.push("PUT", [Fault::Status(501, "NotImplemented"); 4]);
    let error = store(between, "x").check().await.unwrap_err();
    refused(error, "NotImplemented");
    faults.queue().clear();
    // Nobody there: not the setup's fault.
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    assert!(matches!(store(free, "x").check().await, Err(BlobError::Unavailable { .. })));
    // What a killed writer left is found, and goes.
    let store = store(server, "left");
    let begun = store.client().create_multipart_upload().bucket("bucket").key("left/actors/u/1-s/p").send();
    begun.await.unwrap();
    assert_eq!(store.abandon(Duration::from_hours(1), false).await.unwrap(), 0);
    assert_eq!(store.abandon(Duration::ZERO, true).await.unwrap(), 1);
    assert_eq!(store.abandon(Duration::ZERO, false).await.unwrap(), 1);
    assert_eq!(store.abandon(Duration::ZERO, true).await.unwrap(), 0);
}
