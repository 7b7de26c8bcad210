// SPDX-License-Identifier: Apache-2.0
//! The proxy between real sockets: an in-process worker slot, a stub control plane, a DNS server and upstream
//! servers on loopback, which is exempt from the address filter only where a test says so.
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use substrate_proto::ateapi::{Actor, ActorState};
use substrate_proto::types::EgressRule;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio_util::task::AbortOnDropHandle;

use super::slot::Slot;
use super::sniff::tests::{hello, sni};
use super::*;
use crate::testing::Stub;

struct Fixture {
    dir: tempfile::TempDir,
    stub: Arc<Stub>,
    slot: Slot,
    shutdown: CancellationToken,
    served: Option<tokio::task::JoinHandle<Result<(), Error>>>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// A DNS server that knows these names, and nothing else.
async fn resolver(names: &'static [(&'static str, Ipv4Addr)]) -> (SocketAddr, AbortOnDropHandle<()>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let mut buffer = [0; 1500];
        loop {
            let (len, from) = socket.recv_from(&mut buffer).await.unwrap();
            let query = Message::from_vec(&buffer[..len]).unwrap();
            let mut reply = Message::new(query.metadata.id, MessageType::Response, OpCode::Query);
            reply.metadata.recursion_desired = true;
            reply.metadata.recursion_available = true;
            let question = query.queries[0].clone();
            let asked = question.name().to_ascii().trim_end_matches('.').to_ascii_lowercase();
            let found = names.iter().find(|(name, _)| *name == asked);
            match found {
                None => reply.metadata.response_code = ResponseCode::NXDomain,
                Some((_, ip)) if question.query_type() == RecordType::A => {
                    reply.answers.push(Record::from_rdata(question.name().clone(), 60, RData::A(A(*ip))));
                }
                Some(_) => {}
            }
            reply.queries.push(question);
            socket.send_to(&reply.to_vec().unwrap(), from).await.unwrap();
        }
    });
    (address, AbortOnDropHandle::new(task))
}

/// Answers every block with itself, and counts connections.
async fn echo() -> (u16, Arc<AtomicUsize>, AbortOnDropHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let count = Arc::new(AtomicUsize::new(0));
    let seen = count.clone();
    let task = tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            seen.fetch_add(1, Ordering::SeqCst);
            connections.spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
    (port, count, AbortOnDropHandle::new(task))
}

const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;
const NAMES: &[(&str, Ipv4Addr)] =
    &[("api.test", LOOPBACK), ("other.test", LOOPBACK), ("metadata.test", Ipv4Addr::new(169, 254, 169, 254))];

fn owner(generation: u64) -> FlowOwner {
    FlowOwner {
        worker_id: "w1".into(),
        actor_uid: "uid-bob".into(),
        atespace: "team".into(),
        actor_name: "bob".into(),
        generation,
    }
}

fn rule(host: &str, port: u16, protocol: &str) -> EgressRule {
    EgressRule {
        host: host.into(),
        ports: vec![port.into()],
        protocol: protocol.into(),
        ..Default::default()
    }
}

impl Fixture {
    /// With loopback exempt from the filter, and bob in generation 3 with these rules.
    async fn new(allow: Vec<EgressRule>) -> Self {
        Self::with(allow, vec!["127.0.0.1/32".parse().unwrap()], |_| {}).await
    }

    async fn with(allow: Vec<EgressRule>, exempt: Vec<IpNet>, change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (stub, ateapi, api) = Stub::serve(dir.path());
        let (server, dns) = resolver(NAMES).await;
        stub.policy("uid-bob", 3, allow);
        stub.put(Self::bob(3, ActorState::Running));
        let socket = dir.path().join("egress.sock");
        let mut config = Config::new(&socket, ateapi, dir.path().join("audit.jsonl"));
        config.resolver = Some(server);
        change(&mut config);
        let shutdown = CancellationToken::new();
        let (ready, is_ready) = oneshot::channel();
        let node: filter::NodeAddresses = Arc::new(|| Ok(vec!["192.0.2.7".parse().unwrap()]));
        let served = tokio::spawn(serve_with(config, node, exempt, ready, shutdown.clone()));
        is_ready.await.unwrap();
        stub.watched(1).await;
        let slot = Slot::connect(&socket, "w1").await.unwrap();
        Self { dir, stub, slot, shutdown, served: Some(served), _tasks: vec![api, dns] }
    }

    fn bob(generation: u64, state: ActorState) -> Actor {
        Actor {
            uid: "uid-bob".into(),
            atespace: "team".into(),
            name: "bob".into(),
            generation,
            state: state.into(),
            ..Default::default()
        }
    }

    /// A connection of bob's: his end, and what says that the proxy is done with it.
    async fn dial(&self, destination: &str) -> (TcpStream, oneshot::Receiver<()>) {
        self.dial_as(owner(3), destination).await
    }

    async fn dial_as(&self, owner: FlowOwner, destination: &str) -> (TcpStream, oneshot::Receiver<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (ours, accepted) =
            tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let closed = self.slot.open(owner, destination, accepted.unwrap().0).await.unwrap();
        (ours.unwrap(), closed)
    }

    async fn ask(&self, name: &str, kind: RecordType) -> Message {
        let mut query = Message::new(9, MessageType::Query, OpCode::Query);
        query.queries.push(Query::query(Name::from_ascii(name).unwrap(), kind));
        let answer = self.slot.dns(owner(3), query.to_vec().unwrap(), false).await.unwrap();
        Message::from_vec(&answer).unwrap()
    }

    /// The synthetic address of a name, with this port.
    async fn at(&self, name: &str, port: u16) -> String {
        match &self.ask(name, RecordType::A).await.answers[0].data {
            RData::A(A(ip)) => format!("{ip}:{port}"),
            other => panic!("{other:?}"),
        }
    }

    /// The last line of the audit log about a destination, once it is written.
    async fn line_about(&self, destination: &str) -> serde_json::Value {
        let path = self.dir.path().join("audit.jsonl");
        let written = async {
            loop {
                let found = read_log(&path).into_iter().rfind(|line| line["destination"] == destination);
                match found {
                    Some(line) => return line,
                    None => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), written).await.unwrap()
    }

    /// Ends the proxy and reads its audit log.
    async fn audit(mut self) -> Vec<serde_json::Value> {
        self.shutdown.cancel();
        self.served.take().unwrap().await.unwrap().unwrap();
        read_log(&self.dir.path().join("audit.jsonl"))
    }
}

fn read_log(path: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap();
    // The last line may be half written while the proxy runs.
    text.split_inclusive('\n')
        .filter(|line| line.ends_with('\n'))
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Expects the connection to be reset, not closed in order.
async fn expect_reset(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let end = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await;
    let error = end.expect("it was not reset").expect_err("it ended in order");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

fn only(records: &[serde_json::Value], verdict: &str) -> serde_json::Value {
    let found: Vec<_> = records.iter().filter(|record| record["verdict"] == verdict).collect();
    assert_eq!(found.len(), 1, "{records:#?}");
    assert_eq!((&found[0]["actor"], &found[0]["atespace"]), (&"bob".into(), &"team".into()));
    found[0].clone()
}

#[tokio::test]
async fn names_have_stable_addresses_and_others_do_not_exist() {
    let fixture = Fixture::new(vec![rule("api.test", 443, ""), rule("*.wild.test", 443, "")]).await;
    let first = fixture.at("API.test.", 1).await;
    assert_eq!(fixture.at("api.test.", 1).await, first);
    assert_ne!(fixture.at("a.wild.test.", 1).await, first);
    let v6 = fixture.ask("api.test.", RecordType::AAAA).await;
    assert!(matches!(&v6.answers[0].data, RData::AAAA(ip) if ip.0.to_string() == "fd17:5a::1"));
    let none = fixture.ask("api.test.", RecordType::HTTPS).await;
    assert_eq!((none.metadata.response_code, none.answers.len()), (ResponseCode::NoError, 0));
    for name in ["evil.test.", "a.b.wild.test.", "wild.test.", "localhost."] {
        let denied = fixture.ask(name, RecordType::A).await;
        assert_eq!(denied.metadata.response_code, ResponseCode::NXDomain, "{name}");
    }
    let quiet = fixture.ask("2.17.254.169.in-addr.arpa.", RecordType::PTR).await;
    assert_eq!(quiet.metadata.response_code, ResponseCode::NXDomain);
    let stub = fixture.stub.clone();
    while stub.denials.lock().unwrap().len() < 4 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(stub.denials.lock().unwrap().iter().all(|denial| denial.actor_uid == "uid-bob"));
    let denied: Vec<_> =
        fixture.audit().await.into_iter().filter(|line| line["verdict"] == "denied").collect();
    assert_eq!(denied.len(), 4);
    assert_eq!(denied[0]["destination"], "evil.test");
    assert!(denied.iter().all(|line| line["actor"] == "bob" && line["protocol"] == "dns"), "{denied:?}");
}

#[tokio::test]
async fn an_open_rule_carries_bytes_and_counts_them() {
    let (port, _, _server) = echo().await;
    let fixture = Fixture::new(vec![rule("api.test", port, "tcp")]).await;
    let (mut stream, closed) = fixture.dial(&fixture.at("api.test.", port).await).await;
    stream.write_all(b"question").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"question");
    closed.await.unwrap();
    let line = only(&fixture.audit().await, "allowed");
    assert_eq!((&line["sent"], &line["received"]), (&8.into(), &8.into()));
    assert_eq!((&line["name"], &line["upstream"]), (&"api.test".into(), &format!("127.0.0.1:{port}").into()));
    assert_eq!((&line["generation"], &line["worker"]), (&3.into(), &"w1".into()));
}

#[tokio::test]
async fn tls_goes_only_where_its_sni_says() {
    let (port, connections, _server) = echo().await;
    let fixture = Fixture::new(vec![rule("api.test", port, "tls"), rule("other.test", port, "tls")]).await;
    let destination = fixture.at("api.test.", port).await;
    let good = hello(&[sni("api.test")], 40);
    let (mut stream, _closed) = fixture.dial(&destination).await;
    for part in good.chunks(11) {
        stream.write_all(part).await.unwrap();
    }
    let mut back = vec![0; good.len()];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(back, good, "the hello arrives as it was sent");
    // A second hello for another name, as after a HelloRetryRequest.
    stream.write_all(&hello(&[sni("other.test")], 400)).await.unwrap();
    expect_reset(&mut stream).await;
    for (bytes, _why) in [
        (hello(&[sni("other.test")], 400), "an allowed name, but not this one"),
        (hello(&[], 400), "no name"),
        (hello(&[sni("api.test"), (0xfe0d, vec![0; 8])], 400), "ECH"),
        (b"GET / HTTP/1.1\r\nhost: api.test\r\n\r\n".to_vec(), "not TLS"),
    ] {
        let (mut stream, closed) = fixture.dial(&destination).await;
        stream.write_all(&bytes).await.unwrap();
        expect_reset(&mut stream).await;
        closed.await.unwrap();
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1, "nothing refused reaches a server");
    let lines = fixture.audit().await;
    let denied: Vec<_> = lines.iter().filter(|line| line["verdict"] == "denied").collect();
    assert_eq!(denied.len(), 5);
    assert!(denied.iter().all(|line| line["protocol"] == "tls" && line["name"] == "api.test"), "{denied:#?}");
}

/// An HTTP server that answers with the Host it got, or changes to an echo when asked.
async fn http_server() -> (u16, AbortOnDropHandle<()>) {
    use http_body_util::Full;
    use hyper_util::rt::TokioIo;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let task = tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service =
                hyper::service::service_fn(|mut request: http::Request<hyper::body::Incoming>| async move {
                    let host = request.headers()["host"].to_str().unwrap().to_owned();
                    let mut response = http::Response::new(Full::new(bytes::Bytes::from(host)));
                    if request.headers().contains_key("upgrade") {
                        *response.status_mut() = http::StatusCode::SWITCHING_PROTOCOLS;
                        response.headers_mut().insert("connection", "upgrade".parse().unwrap());
                        response.headers_mut().insert("upgrade", "echo".parse().unwrap());
                        let upgraded = hyper::upgrade::on(&mut request);
                        tokio::spawn(async move {
                            let stream = TokioIo::new(upgraded.await.unwrap());
                            let (mut read, mut write) = tokio::io::split(stream);
                            let _ = tokio::io::copy(&mut read, &mut write).await;
                        });
                    }
                    Ok::<_, std::convert::Infallible>(response)
                });
            connections.spawn(async move {
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .with_upgrades()
                    .await;
            });
        }
    });
    (port, AbortOnDropHandle::new(task))
}

async fn read_reply(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n\r\n") {
        text.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(text).unwrap().to_ascii_lowercase()
}

#[tokio::test]
async fn every_http_request_of_a_connection_is_checked() {
    let (port, _server) = http_server().await;
    let fixture = Fixture::new(vec![rule("api.test", port, "http")]).await;
    let destination = fixture.at("api.test.", port).await;
    let (mut stream, closed) = fixture.dial(&destination).await;
    for _ in 0..2 {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: api.test\r\n\r\n").await.unwrap();
        let head = read_reply(&mut stream).await;
        assert!(head.starts_with("http/1.1 200"), "{head}");
        let mut name = [0; 8];
        stream.read_exact(&mut name).await.unwrap();
        assert_eq!(&name, b"api.test");
    }
    stream.write_all(b"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n").await.unwrap();
    expect_reset(&mut stream).await;
    closed.await.unwrap();
    for request in [
        "GET / HTTP/1.1\r\n\r\n",
        "CONNECT evil.test:443 HTTP/1.1\r\nHost: api.test\r\n\r\n",
        "GET http://evil.test/ HTTP/1.1\r\nHost: api.test\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: api.test\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "\x16\x03\x01",
    ] {
        let (mut stream, _closed) = fixture.dial(&destination).await;
        stream.write_all(request.as_bytes()).await.unwrap();
        // hyper may say 400 first; what matters is that it does not end in order.
        let mut said = Vec::new();
        let end = stream.read_to_end(&mut said).await;
        assert!(end.is_err() || said.starts_with(b"HTTP/1.1 400"), "{request:?}: {end:?} {said:?}");
    }
    let lines = fixture.audit().await;
    assert!(lines.iter().filter(|line| line["verdict"] == "denied").count() >= 6, "{lines:#?}");
}

#[tokio::test]
async fn http_upgrades_pass() {
    let (port, _server) = http_server().await;
    let fixture = Fixture::new(vec![rule("api.test", port, "")]).await;
    let (mut stream, _closed) = fixture.dial(&fixture.at("api.test.", port).await).await;
    let request =
        format!("GET / HTTP/1.1\r\nHost: api.test:{port}\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let head = read_reply(&mut stream).await;
    assert!(head.starts_with("http/1.1 101") && head.contains("upgrade: echo"), "{head}");
    stream.write_all(b"ping").await.unwrap();
    let mut back = [0; 4];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"ping");
}

#[tokio::test]
async fn addresses_are_filtered_before_any_rule() {
    let (port, connections, _server) = echo().await;
    let all = EgressRule { cidr: "0.0.0.0/0".into(), ports: vec![80, port.into()], ..Default::default() };
    let names = vec![rule("api.test", port, "tcp"), rule("metadata.test", 80, "tcp"), all.clone()];
    let refuse = |config: &mut Config| config.refuse = vec!["10.96.0.0/12".parse().unwrap()];
    // Loopback is not exempt here.
    let fixture = Fixture::with(names, vec![], refuse).await;
    for (destination, why) in [
        (format!("127.0.0.1:{port}"), "loopback"),
        ("169.254.169.254:80".into(), "metadata"),
        ("192.0.2.7:80".into(), "node"),
        ("10.96.0.1:80".into(), "administrator"),
        (fixture.at("api.test.", port).await, "resolves to 127.0.0.1"),
        (fixture.at("metadata.test.", 80).await, "resolves to 169.254.169.254"),
        ("198.18.77.77:80".into(), "no name"),
        ("203.0.113.9:81".into(), "no rule"),
        ("nonsense".into(), "not an address"),
    ] {
        let (mut stream, closed) = fixture.dial(&destination).await;
        expect_reset(&mut stream).await;
        closed.await.unwrap();
        let line = fixture.line_about(&destination).await;
        assert_eq!(line["verdict"], "denied", "{line}");
        assert!(line["reason"].as_str().unwrap().contains(why), "{why}: {line}");
    }
    assert_eq!(connections.load(Ordering::SeqCst), 0);
    drop(fixture);

    let fixture = Fixture::new(vec![all]).await;
    let (mut stream, _closed) = fixture.dial(&format!("127.0.0.1:{port}")).await;
    stream.write_all(b"hi").await.unwrap();
    stream.read_exact(&mut [0; 2]).await.unwrap();
    assert_eq!(connections.load(Ordering::SeqCst), 1, "allowed by cidr, dialled directly");
}

#[tokio::test]
async fn a_published_service_is_reached_by_name_only_and_only_by_rule() {
    let (port, connections, _server) = echo().await;
    let service = |atespaces: &[&str]| Published {
        name: "model.internal".into(),
        port: 80,
        target: SocketAddr::new(IpAddr::V4(LOOPBACK), port),
        atespaces: atespaces.iter().map(|name| (*name).to_owned()).collect(),
    };
    let allow = vec![rule("model.internal", 80, "tcp")];
    let publish = service(&[]);
    let fixture = Fixture::with(allow.clone(), vec![], |config| config.publish = vec![publish]).await;
    let (mut stream, _closed) = fixture.dial(&fixture.at("model.internal.", 80).await).await;
    stream.write_all(b"hi").await.unwrap();
    stream.read_exact(&mut [0; 2]).await.unwrap();
    let (mut stream, _closed) = fixture.dial(&format!("127.0.0.1:{port}")).await;
    expect_reset(&mut stream).await;
    drop(fixture);

    let publish = service(&["elsewhere"]);
    let fixture = Fixture::with(allow, vec![], |config| config.publish = vec![publish]).await;
    let (mut stream, _closed) = fixture.dial(&fixture.at("model.internal.", 80).await).await;
    expect_reset(&mut stream).await;
    drop(fixture);

    let publish = service(&[]);
    let fixture = Fixture::with(vec![], vec![], |config| config.publish = vec![publish]).await;
    let denied = fixture.ask("model.internal.", RecordType::A).await;
    assert_eq!(denied.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn generations_fence_flows() {
    let (port, _, _server) = echo().await;
    let allow = vec![rule("api.test", port, "tcp")];
    let fixture = Fixture::new(allow.clone()).await;
    let destination = fixture.at("api.test.", port).await;
    let talk = async |stream: &mut TcpStream| {
        stream.write_all(b"hi").await.unwrap();
        stream.read_exact(&mut [0; 2]).await.unwrap();
    };
    let (mut old, _closed) = fixture.dial(&destination).await;
    talk(&mut old).await;
    // The actor moved on: a flow of the new generation ends those of the old.
    fixture.stub.policy("uid-bob", 4, allow);
    let (mut new, _closed_new) = fixture.dial_as(owner(4), &destination).await;
    talk(&mut new).await;
    expect_reset(&mut old).await;
    let (mut stale, _closed_stale) = fixture.dial(&destination).await;
    expect_reset(&mut stale).await;
    let refused = fixture.ask("api.test.", RecordType::A).await;
    assert_eq!(refused.metadata.response_code, ResponseCode::NXDomain);
    // And so does its leaving the worker.
    fixture.stub.put(Fixture::bob(4, ActorState::Suspended));
    expect_reset(&mut new).await;
    let lines = fixture.audit().await;
    let stale =
        only(&lines.iter().filter(|line| line["protocol"] != "dns").cloned().collect::<Vec<_>>(), "denied");
    assert!(stale["reason"].as_str().unwrap().contains("stale generation"), "{stale}");
}

#[tokio::test]
async fn a_changed_policy_ends_what_it_forbids_and_nothing_else() {
    let (port, _, _server) = echo().await;
    let (both, one) = (rule("api.test", port, "tcp"), rule("other.test", port, "tcp"));
    let fixture = Fixture::new(vec![both, one.clone()]).await;
    let (mut forbidden, _closed) = fixture.dial(&fixture.at("api.test.", port).await).await;
    let (mut kept, _closed_kept) = fixture.dial(&fixture.at("other.test.", port).await).await;
    for stream in [&mut forbidden, &mut kept] {
        stream.write_all(b"hi").await.unwrap();
        stream.read_exact(&mut [0; 2]).await.unwrap();
    }
    fixture.stub.policy("uid-bob", 3, vec![one]);
    fixture.stub.put(Fixture::bob(3, ActorState::Running));
    expect_reset(&mut forbidden).await;
    kept.write_all(b"hi").await.unwrap();
    kept.read_exact(&mut [0; 2]).await.unwrap();
    let denied = fixture.ask("api.test.", RecordType::A).await;
    assert_eq!(denied.metadata.response_code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn an_unreachable_server_is_told_from_a_denial() {
    let closed_port = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().port()
    };
    let allow = vec![rule("api.test", closed_port, "tcp"), rule("missing.test", closed_port, "tcp")];
    let fixture = Fixture::new(allow).await;
    for (name, why) in [("api.test.", "refused"), ("missing.test.", "does not exist")] {
        let destination = fixture.at(name, closed_port).await;
        let (mut stream, closed) = fixture.dial(&destination).await;
        expect_reset(&mut stream).await;
        closed.await.unwrap();
        let line = fixture.line_about(&destination).await;
        assert_eq!(line["verdict"], "failed", "{line}");
        assert!(line["reason"].as_str().unwrap().to_lowercase().contains(why), "{line}");
    }
}

#[tokio::test]
async fn without_a_control_plane_known_actors_go_on_and_others_get_nothing() {
    let (port, _, _server) = echo().await;
    let fixture = Fixture::new(vec![rule("api.test", port, "tcp")]).await;
    let destination = fixture.at("api.test.", port).await;
    fixture.stub.away.store(true, Ordering::SeqCst);
    let (mut stream, _closed) = fixture.dial(&destination).await;
    stream.write_all(b"hi").await.unwrap();
    stream.read_exact(&mut [0; 2]).await.unwrap();
    let eve = FlowOwner { actor_uid: "uid-eve".into(), actor_name: "eve".into(), ..owner(1) };
    let (mut stream, _closed) = fixture.dial_as(eve.clone(), &destination).await;
    expect_reset(&mut stream).await;
    let mut query = Message::new(9, MessageType::Query, OpCode::Query);
    query.queries.push(Query::query(Name::from_ascii("api.test.").unwrap(), RecordType::A));
    let answer = fixture.slot.dns(eve, query.to_vec().unwrap(), true).await.unwrap();
    let answer = Message::from_vec(&answer).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail, "not NXDOMAIN: it may be allowed");
}

#[tokio::test]
async fn flows_per_actor_are_bounded_and_refused_packets_are_recorded() {
    let (port, _, _server) = echo().await;
    let allow = vec![rule("api.test", port, "tcp")];
    let exempt = vec!["127.0.0.1/32".parse().unwrap()];
    let fixture = Fixture::with(allow, exempt, |config| config.limits.flows_per_actor = 1).await;
    let destination = fixture.at("api.test.", port).await;
    let (mut first, closed_first) = fixture.dial(&destination).await;
    first.write_all(b"hi").await.unwrap();
    first.read_exact(&mut [0; 2]).await.unwrap();
    let (mut second, _closed) = fixture.dial(&destination).await;
    expect_reset(&mut second).await;
    drop(first);
    closed_first.await.unwrap();
    let (mut third, _closed) = fixture.dial(&destination).await;
    third.write_all(b"hi").await.unwrap();
    third.read_exact(&mut [0; 2]).await.unwrap();
    let packet = PacketDenied {
        owner: Some(owner(3)),
        protocol: "udp".into(),
        destination: "8.8.8.8:53".into(),
        count: 4,
    };
    fixture.slot.denied(packet).await.unwrap();
    // Frames are handled in order.
    fixture.ask("api.test.", RecordType::A).await;
    let lines = fixture.audit().await;
    let packet = lines.iter().find(|line| line["protocol"] == "udp").unwrap();
    assert_eq!((&packet["destination"], &packet["count"]), (&"8.8.8.8:53".into(), &4.into()));
    assert_eq!(packet["actor"], "bob");
    assert!(lines.iter().any(|line| line["reason"].as_str().is_some_and(|why| why.contains("too many"))));
}

#[tokio::test]
async fn the_end_of_a_workers_connection_ends_its_flows() {
    let (port, _, _server) = echo().await;
    let fixture = Fixture::new(vec![rule("api.test", port, "tcp")]).await;
    let destination = fixture.at("api.test.", port).await;
    let another = Slot::connect(&fixture.dir.path().join("egress.sock"), "w2").await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (ours, accepted) =
        tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let _closed = another.open(owner(3), &destination, accepted.unwrap().0).await.unwrap();
    let mut ours = ours.unwrap();
    ours.write_all(b"hi").await.unwrap();
    ours.read_exact(&mut [0; 2]).await.unwrap();
    drop(another);
    expect_reset(&mut ours).await;
    let (mut stream, _closed) = fixture.dial(&destination).await;
    stream.write_all(b"hi").await.unwrap();
    stream.read_exact(&mut [0; 2]).await.unwrap();
}

#[tokio::test]
async fn the_filter_that_runs_by_default_knows_this_machine() {
    let dir = tempfile::tempdir().unwrap();
    let (stub, ateapi, _api) = Stub::serve(dir.path());
    let all = EgressRule { cidr: "0.0.0.0/0".into(), ports: vec![80], ..Default::default() };
    stub.policy("uid-bob", 3, vec![all]);
    let socket = dir.path().join("egress.sock");
    let (ready, is_ready) = oneshot::channel();
    let shutdown = CancellationToken::new();
    let served = tokio::spawn(serve(
        Config::new(&socket, ateapi, dir.path().join("audit.jsonl")),
        ready,
        shutdown.clone(),
    ));
    is_ready.await.unwrap();
    let slot = Slot::connect(&socket, "w1").await.unwrap();
    let addresses = Mutex::new(filter::interface_addresses().unwrap());
    let own: Vec<IpAddr> = addresses.into_inner().unwrap().into_iter().filter(IpAddr::is_ipv4).collect();
    assert!(!own.is_empty());
    for ip in own {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (ours, accepted) =
            tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let closed = slot.open(owner(3), &format!("{ip}:80"), accepted.unwrap().0).await.unwrap();
        expect_reset(&mut ours.unwrap()).await;
        closed.await.unwrap();
    }
    shutdown.cancel();
    served.await.unwrap().unwrap();
    assert!(!socket.exists(), "the socket is removed");
    let lines = read_log(&dir.path().join("audit.jsonl"));
    assert!(lines.iter().all(|line| line["verdict"] == "denied"), "{lines:?}");
}
