// SPDX-License-Identifier: Apache-2.0
//! The part of the demo's internet that is not Python: a DNS server that knows the demo's names and TCP listeners that
//! greet. Runs inside the network namespace that stands for the internet (`substrate demo-internet`, hidden).
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{RData, Record, RecordType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

use crate::args::DemoInternet;
use crate::cmd::print;
use crate::failure::{Doing as _, Failure};

/// How long an answer may be remembered, seconds.
const TTL: u32 = 5;

/// Names in lower case without the last dot.
type Names = Arc<HashMap<String, Vec<IpAddr>>>;

/// Serves until killed. The first line on stdout says that everything listens.
pub async fn serve(options: DemoInternet) -> Result<(), Failure> {
    let mut names: HashMap<String, Vec<IpAddr>> = HashMap::new();
    for (name, address) in &options.names {
        let address = address.parse().doing(|| format!("--name {name}: {address}"))?;
        names.entry(name.trim_end_matches('.').to_ascii_lowercase()).or_default().push(address);
    }
    let names: Names = Arc::new(names);
    let mut tasks = JoinSet::new();
    for address in &options.dns {
        let udp = UdpSocket::bind(address).await.doing(|| format!("cannot serve DNS on {address}"))?;
        let tcp = TcpListener::bind(address).await.doing(|| format!("cannot serve DNS on {address}"))?;
        tasks.spawn(serve_udp(udp, Arc::clone(&names)));
        tasks.spawn(serve_tcp(tcp, Arc::clone(&names)));
    }
    for address in &options.tcp {
        let listener = TcpListener::bind(address).await.doing(|| format!("cannot listen on {address}"))?;
        tasks.spawn(greet(listener));
    }
    print("{\"listening\": true}\n")?;
    match tasks.join_next().await {
        Some(Ok(Err(error))) => Err(Failure::general(format!("serving the demo's internet: {error}"))),
        _ => Ok(()),
    }
}

async fn serve_udp(socket: UdpSocket, names: Names) -> std::io::Result<()> {
    let mut buffer = [0; 1500];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).await?;
        if let Some(reply) = answer(&buffer[..length], &names) {
            socket.send_to(&reply, from).await?;
        }
    }
}

async fn serve_tcp(listener: TcpListener, names: Names) -> std::io::Result<()> {
    loop {
        let (mut stream, _) = listener.accept().await?;
        let names = Arc::clone(&names);
        tokio::spawn(async move {
            // One query a connection: a client that wants more comes again.
            let Ok(length) = stream.read_u16().await else { return };
            let mut query = vec![0; usize::from(length)];
            if stream.read_exact(&mut query).await.is_err() {
                return;
            }
            if let Some(reply) = answer(&query, &names) {
                let mut framed = (reply.len() as u16).to_be_bytes().to_vec();
                framed.extend(reply);
                let _ = stream.write_all(&framed).await;
            }
        });
    }
}

async fn greet(listener: TcpListener) -> std::io::Result<()> {
    loop {
        let (mut stream, _): (TcpStream, SocketAddr) = listener.accept().await?;
        tokio::spawn(async move {
            let _ = stream.write_all(b"hello from the demo's internet\n").await;
        });
    }
}

/// The answer to a query, or nothing for what is none (RFC 1035).
fn answer(query: &[u8], names: &HashMap<String, Vec<IpAddr>>) -> Option<Vec<u8>> {
    let query = Message::from_vec(query).ok()?;
    if query.metadata.message_type != MessageType::Query {
        return None;
    }
    let mut reply = Message::response(query.metadata.id, OpCode::Query);
    reply.metadata.recursion_desired = query.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    let [question] = query.queries.as_slice() else {
        reply.metadata.response_code = ResponseCode::FormErr;
        return reply.to_vec().ok();
    };
    reply.add_query(question.clone());
    let name = question.name().to_ascii().trim_end_matches('.').to_ascii_lowercase();
    match names.get(&name) {
        None => reply.metadata.response_code = ResponseCode::NXDomain,
        Some(addresses) => {
            for address in addresses {
                let data = match (question.query_type(), address) {
                    (RecordType::A, IpAddr::V4(ip)) => RData::A(A(*ip)),
                    (RecordType::AAAA, IpAddr::V6(ip)) => RData::AAAA(AAAA(*ip)),
                    _ => continue,
                };
                reply.add_answer(Record::from_rdata(question.name().clone(), TTL, data));
            }
        }
    }
    reply.to_vec().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::Query;
    use hickory_proto::rr::Name;

    fn ask(name: &str, kind: RecordType) -> Message {
        let names =
            HashMap::from([("model.helpdesk.test".to_owned(), vec![IpAddr::from([203, 0, 113, 10])])]);
        let mut query = Message::query();
        query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        Message::from_vec(&answer(&query.to_vec().unwrap(), &names).unwrap()).unwrap()
    }

    #[test]
    fn known_names_have_their_address_and_others_do_not_exist() {
        let reply = ask("Model.Helpdesk.Test.", RecordType::A);
        assert_eq!(reply.answers.len(), 1);
        assert_eq!(reply.answers[0].data, RData::A(A([203, 0, 113, 10].into())));
        assert!(ask("model.helpdesk.test.", RecordType::AAAA).answers.is_empty());
        assert_eq!(ask("other.test.", RecordType::A).metadata.response_code, ResponseCode::NXDomain);
    }

    #[test]
    fn noise_is_not_answered() {
        assert!(answer(b"noise", &HashMap::new()).is_none());
    }
}
