// SPDX-License-Identifier: Apache-2.0
//! Promise P7 on real gVisor: what leaves an actor's namespace, and what is said of what does not.
mod common;

use std::time::Duration;

use common::{Proxy, Worker};
use substrate_proto::atenet::egress_frame::Frame;
use substrate_proto::atenet::{DnsAnswer, FlowClosed};
use substrate_proto::ateom::*;
use substrate_proto::types::{Assignment, ExecStart};

/// Runs Python in the actor.
async fn python(worker: &mut Worker, who: &Assignment, code: &str) -> String {
    let start = ExecStart {
        command: ["/usr/bin/python3", "-S", "-c", code].map(str::to_owned).into(),
        ..ExecStart::default()
    };
    let (code, out, err) = worker.exec(who, start, b"").await;
    assert_eq!(code, 0, "{out}{err}");
    out
}

/// Tries destinations; for each the outcome and how long it took in ms.
const TRY: &str = r#"
import socket, time
def attempt(name, kind, family, address):
    s = socket.socket(family, kind)
    s.settimeout(5)
    before = time.monotonic()
    try:
        s.connect(address)
        if kind == socket.SOCK_DGRAM:
            s.send(b"x")
            s.recv(10)
        outcome = "connected"
    except Exception as error:
        outcome = type(error).__name__
    print(name, outcome, int((time.monotonic() - before) * 1000))
"#;

#[tokio::test]
async fn what_is_not_allowed_fails_quickly_and_is_recorded_with_the_actors_name() {
    let dir = tempfile::tempdir().unwrap();
    let listener = Proxy::listen(&dir.path().join("egress.sock"));
    let mut worker = Worker::start_in("denied", dir).await;
    let proxy = Proxy::accept(&listener);
    assert!(matches!(proxy.receive().0, Frame::Hello(hello) if hello.worker_id == worker.id));
    let who = worker.assignment("bob", 3);
    worker.run(&who, worker.counter()).await.unwrap();
    let script = format!(
        "{TRY}
tcp, udp, v4, v6 = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.AF_INET, socket.AF_INET6
attempt('raw', tcp, v4, ('1.1.1.1', 443))
attempt('metadata', tcp, v4, ('169.254.169.254', 80))
attempt('six', tcp, v6, ('2001:db8::1', 443))
attempt('dns', udp, v4, ('8.8.8.8', 53))
attempt('other-port', tcp, v4, ('169.254.17.1', 15001))
attempt('ssh', tcp, v4, ('169.254.17.1', 22))
"
    );
    let out = python(&mut worker, &who, &script).await;
    println!("{out}");
    for line in out.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        assert_ne!(fields[1], "connected", "{line}");
        assert_ne!(fields[1], "TimeoutError", "{line}");
        assert!(fields[2].parse::<u32>().unwrap() < 1000, "not quick: {line}");
    }
    assert_eq!(out.lines().count(), 6);
    let mut denied = std::collections::BTreeSet::new();
    while denied.len() < 6 {
        if let Frame::Denied(record) = proxy.receive().0 {
            let owner = record.owner.unwrap();
            assert_eq!((owner.actor_name.as_str(), owner.generation), ("name-of-bob", 3));
            assert!(record.count >= 1);
            denied.insert(format!("{} {}", record.protocol, record.destination));
        }
    }
    assert_eq!(
        denied.into_iter().collect::<Vec<_>>(),
        [
            "tcp 1.1.1.1:443",
            "tcp 169.254.169.254:80",
            "tcp 169.254.17.1:15001",
            "tcp 169.254.17.1:22",
            "tcp [2001:db8::1]:443",
            "udp 8.8.8.8:53",
        ]
    );
    worker.terminate(&who).await.unwrap();
    worker.shutdown().await;
}

#[tokio::test]
async fn allowed_connections_and_questions_reach_the_proxy_with_their_owner() {
    let dir = tempfile::tempdir().unwrap();
    let listener = Proxy::listen(&dir.path().join("egress.sock"));
    let mut worker = Worker::start_in("flows", dir).await;
    let proxy = Proxy::accept(&listener);
    proxy.receive();
    let who = worker.assignment("bob", 3);
    let mut spec = worker.counter();
    spec.egress_cidrs = vec![EgressCidr { cidr: "203.0.113.0/24".into(), ports: vec![5432] }];
    worker.run(&who, spec).await.unwrap();

    let serving = std::thread::spawn(move || {
        let mut destinations = Vec::new();
        while destinations.len() < 3 {
            match proxy.receive() {
                (Frame::Open(open), Some(socket)) => {
                    let owner = open.owner.unwrap();
                    assert_eq!((owner.actor_uid.as_str(), owner.generation), ("bob", 3));
                    destinations.push(open.original_destination);
                    let mut stream = std::net::TcpStream::from(socket);
                    std::io::Write::write_all(&mut stream, b"hello").unwrap();
                    drop(stream);
                    proxy.send(Frame::Closed(FlowClosed { flow_id: open.flow_id }));
                }
                (Frame::DnsQuery(query), None) => {
                    // NXDOMAIN, and one A record, are alike here: the bytes come back.
                    let mut message = query.message.clone();
                    message[2] |= 0x80;
                    message[3] = 3;
                    destinations.push(format!("dns tcp={}", query.tcp));
                    proxy.send(Frame::DnsAnswer(DnsAnswer { query_id: query.query_id, message }));
                }
                (frame, _) => println!("{frame:?}"),
            }
        }
        (destinations, proxy)
    });
    let script = r#"
import socket
for address in (("198.18.0.7", 443), ("203.0.113.9", 5432)):
    s = socket.create_connection(address, timeout=5)
    print(s.recv(10).decode(), s.recv(10))
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(5)
q = b"\xab\xcd\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03foo\x00\x00\x01\x00\x01"
s.sendto(q, ("169.254.17.1", 53))
print(s.recv(512)[:4].hex())
"#;
    let out = python(&mut worker, &who, script).await;
    assert_eq!(out, "hello b''\nhello b''\nabcd8103\n");
    let (destinations, proxy) = serving.join().unwrap();
    assert_eq!(destinations, ["198.18.0.7:443", "203.0.113.9:5432", "dns tcp=false"]);

    // What was allowed by address can be taken back.
    worker
        .client
        .set_egress(SetEgressRequest { assignment: Some(who.clone()), cidrs: vec![] })
        .await
        .unwrap();
    let script = format!("{TRY}\nattempt('gone', socket.SOCK_STREAM, socket.AF_INET, ('203.0.113.9', 5432))");
    let out = python(&mut worker, &who, &script).await;
    assert!(out.starts_with("gone ConnectionRefusedError"), "{out}");

    // Without a proxy everything fails at once.
    drop((proxy, listener));
    let script = format!(
        "{TRY}
attempt('flow', socket.SOCK_STREAM, socket.AF_INET, ('198.18.0.7', 443))
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.settimeout(5)
q = b'\\xab\\xcd\\x01\\x00\\x00\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x03foo\\x00\\x00\\x01\\x00\\x01'
s.sendto(q, ('fd17::1', 53))
print(s.recv(512)[:4].hex())
s = socket.create_connection(('169.254.17.1', 53), timeout=5)
s.send(len(q).to_bytes(2, 'big') + q)
print(s.recv(512)[2:6].hex())
"
    );
    let out = python(&mut worker, &who, &script).await;
    println!("{out}");
    assert!(out.ends_with("abcd8182\nabcd8182\n"), "{out}");
    worker.terminate(&who).await.unwrap();
    worker.shutdown().await;
}

#[tokio::test]
async fn the_endpoint_holds_and_names_and_statistics_show_it() {
    let mut worker = Worker::start("endpoint").await;
    let who = worker.assignment("bob", 3);
    worker.run(&who, worker.counter()).await.unwrap();
    let script = r#"
import http.client
def ask(method, path):
    c = http.client.HTTPConnection("169.254.17.1", timeout=5)
    c.request(method, path)
    r = c.getresponse()
    print(r.status, r.read().decode().strip())
ask("GET", "/v1/identity")
ask("PUT", "/v1/busy?for=30s")
"#;
    let out = python(&mut worker, &who, script).await;
    assert!(out.contains(r#""actor":"name-of-bob""#), "{out}");
    assert!(out.contains("200 {\"busyForMs\":30000}"), "{out}");
    let mut events = worker.client.watch(WatchRequest {}).await.unwrap().into_inner();
    let stats = tokio::time::timeout(Duration::from_secs(5), async {
        loop {
            if let Some(slot_event::Event::Stats(stats)) = events.message().await.unwrap().unwrap().event {
                return stats;
            }
        }
    })
    .await
    .unwrap();
    assert_eq!(stats.generation, 3);
    assert!(stats.busy_until_ns > stats.at_ns + 20_000_000_000);
    assert!(stats.memory_bytes > 5 << 20 && stats.cpu_usec > 10_000 && stats.processes > 3, "{stats:?}");
    assert!(stats.last_activity_ns > 0 && stats.last_activity_ns <= stats.at_ns);
    drop(events);
    worker.terminate(&who).await.unwrap();
    worker.shutdown().await;
}
