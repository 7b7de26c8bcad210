// SPDX-License-Identifier: Apache-2.0
//! The resolver's address inside a slot: takes the actor's DNS questions and relays them to the node's egress proxy,
//! which alone knows the policy (P7: DNS is an egress action). Nothing is resolved or cached here.
//!
//! A question that cannot be relayed is answered SERVFAIL at once: software that gets no answer hangs for seconds.
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use crate::egress::Egress;
use crate::network::{WORKER_V4, WORKER_V6};
use crate::sockets::{self, bind_tcp, bind_udp};

/// How long the proxy may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long a TCP client may stay silent.
const IDLE_LIMIT: Duration = Duration::from_secs(10);
/// Questions under way at once; more are answered SERVFAIL.
const MAX_QUESTIONS: usize = 256;
/// TCP clients at once.
const MAX_CLIENTS: usize = 64;
/// Length of a DNS header (RFC 1035, 4.1.1).
const HEADER: usize = 12;

/// Listens on the resolver's addresses and serves until the process ends.
///
/// # Errors
/// When an address cannot be bound.
pub fn serve(egress: &Egress) -> std::io::Result<()> {
    let questions = Arc::new(Semaphore::new(MAX_QUESTIONS));
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    for address in [IpAddr::V4(WORKER_V4), IpAddr::V6(WORKER_V6)] {
        let socket = Arc::new(bind_udp(address, 53)?);
        tokio::spawn(serve_udp(socket, egress.clone(), Arc::clone(&questions)));
        let listener = bind_tcp(address, 53)?;
        tokio::spawn(serve_tcp(listener, egress.clone(), Arc::clone(&clients)));
    }
    Ok(())
}

async fn serve_udp(socket: Arc<UdpSocket>, egress: Egress, questions: Arc<Semaphore>) {
    let mut buffer = vec![0; 4096];
    loop {
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // An ICMP error of an earlier answer; the socket itself is fine.
            Err(error) => {
                tracing::debug!(%error, "DNS socket");
                continue;
            }
        };
        let question = buffer[..length].to_vec();
        let Ok(permit) = Arc::clone(&questions).try_acquire_owned() else {
            if let Some(answer) = servfail(&question) {
                drop(socket.try_send_to(&answer, from));
            }
            continue;
        };
        let (socket, egress) = (Arc::clone(&socket), egress.clone());
        tokio::spawn(async move {
            if let Some(answer) = resolve(&egress, question, false).await
                && let Err(error) = socket.send_to(&answer, from).await
            {
                tracing::debug!(%error, "cannot answer a DNS question");
            }
            drop(permit);
        });
    }
}

async fn serve_tcp(listener: TcpListener, egress: Egress, clients: Arc<Semaphore>) {
    loop {
        let stream = sockets::accept(&listener).await;
        let Ok(permit) = Arc::clone(&clients).try_acquire_owned() else { continue };
        let egress = egress.clone();
        tokio::spawn(async move {
            if let Err(error) = serve_client(stream, &egress).await {
                tracing::debug!(%error, "DNS over TCP");
            }
            drop(permit);
        });
    }
}

async fn serve_client(mut stream: TcpStream, egress: &Egress) -> std::io::Result<()> {
    loop {
        let Ok(length) = tokio::time::timeout(IDLE_LIMIT, stream.read_u16()).await else { return Ok(()) };
        let mut question = vec![0; usize::from(length?)];
        tokio::time::timeout(IDLE_LIMIT, stream.read_exact(&mut question)).await??;
        let Some(answer) = resolve(egress, question, true).await else { return Ok(()) };
        let Ok(length) = u16::try_from(answer.len()) else { return Ok(()) };
        let mut message = length.to_be_bytes().to_vec();
        message.extend_from_slice(&answer);
        stream.write_all(&message).await?;
    }
}

/// The proxy's answer, or SERVFAIL; `None` for what is no question.
async fn resolve(egress: &Egress, question: Vec<u8>, tcp: bool) -> Option<Vec<u8>> {
    let refusal = servfail(&question)?;
    match tokio::time::timeout(ANSWER_LIMIT, egress.resolve(question, tcp)).await {
        Ok(Some(answer)) => Some(answer),
        _ => Some(refusal),
    }
}

/// An answer to the question that says "server failure" (RFC 1035, 4.1.1: RCODE 2); `None` for what is no question.
pub fn servfail(question: &[u8]) -> Option<Vec<u8>> {
    const RESPONSE: u8 = 0x80;
    const KEPT_OF_QUERY: u8 = 0x79;
    const RECURSION_AVAILABLE: u8 = 0x80;
    const SERVER_FAILURE: u8 = 2;
    let header = question.first_chunk::<HEADER>()?;
    if header[2] & RESPONSE != 0 || header[4..6] != [0, 1] {
        return None;
    }
    // The name ends with an empty label; type and class follow.
    let mut end = HEADER;
    loop {
        let length = usize::from(*question.get(end)?);
        // Compression cannot occur in a question.
        if length > 63 {
            return None;
        }
        end += 1 + length;
        if length == 0 {
            break;
        }
    }
    let mut answer = question.get(..end + 4)?.to_vec();
    answer[2] = RESPONSE | (header[2] & KEPT_OF_QUERY);
    answer[3] = RECURSION_AVAILABLE | SERVER_FAILURE;
    // No records, also not the question's EDNS one.
    answer[6..HEADER].fill(0);
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question() -> Vec<u8> {
        let mut bytes = vec![0xab, 0xcd, 0x01, 0x20, 0, 1, 0, 0, 0, 0, 0, 1];
        bytes.extend_from_slice(b"\x07example\x03com\x00\x00\x01\x00\x01");
        // An EDNS record.
        bytes.extend_from_slice(&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
        bytes
    }

    #[test]
    fn a_refusal_repeats_id_and_question_and_nothing_else() {
        let answer = servfail(&question()).unwrap();
        assert_eq!(answer[..4], [0xab, 0xcd, 0x81, 0x82]);
        assert_eq!(answer[4..12], [0, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&answer[12..], b"\x07example\x03com\x00\x00\x01\x00\x01");
    }

    #[test]
    fn what_is_no_question_gets_no_answer() {
        assert_eq!(servfail(b"short"), None);
        let mut response = question();
        response[2] |= 0x80;
        assert_eq!(servfail(&response), None);
        assert_eq!(servfail(&question()[..20]), None);
        let mut pointer = question();
        pointer[12] = 0xc0;
        assert_eq!(servfail(&pointer), None);
    }
}
