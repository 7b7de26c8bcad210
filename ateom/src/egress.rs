// SPDX-License-Identifier: Apache-2.0
//! The slot's side of the egress seam (`atenet/v1/flow.proto`).
//!
//! ```text
//!  actor ──TCP──▶ nft redirect ──▶ listener here ──FlowOpen + socket──▶ egress proxy of the node
//!        ──DNS──▶ dns.rs ────────── DnsQuery ─────────────────────────▶
//!        ──else─▶ nft log ── nflog.rs ── PacketDenied ────────────────▶
//! ```
//! The worker's namespace has no way out: a socket that is not handed over leads nowhere. One task owns the connection
//! to the proxy and dials it again, with growing pauses, when it is gone. While it is gone connections are reset and
//! questions fail at once, which programs understand better than silence; refused packets wait (a bounded number),
//! because they belong into the audit log.
//!
//! A duplicate of each socket stays here until the proxy says that the flow is over, so that the end of an activation
//! can shut its flows down; a flow of a past actor must not linger in the proxy.
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Shutdown};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use prost::Message as _;
use substrate_proto::atenet::egress_frame::Frame;
use substrate_proto::atenet::{DnsQuery, EgressFrame, FlowOpen, Hello, PacketDenied};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};

use crate::network::{EGRESS_PORT, WORKER_V4, WORKER_V6};
use crate::occupancy::{Occupancy, Pass};
use crate::seqpacket::SeqPacket;
use crate::sockets::{self, bind_tcp, original_destination};

/// Messages that wait for the connection's task.
const QUEUE: usize = 256;
/// Refused packets that wait for the proxy's return.
const MAX_BACKLOG: usize = 256;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

enum Outgoing {
    Open { frame: FlowOpen, socket: TcpStream, pass: Pass },
    Dns { query: DnsQuery, reply: oneshot::Sender<Vec<u8>> },
    Denied(PacketDenied),
}

/// Handle of the connection's task; cheap to clone.
#[derive(Clone)]
pub struct Egress {
    outgoing: mpsc::Sender<Outgoing>,
    occupancy: Occupancy,
}

impl std::fmt::Debug for Egress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Egress").finish_non_exhaustive()
    }
}

impl Egress {
    /// Begins to listen for redirected connections and to keep a connection to the proxy at `path`.
    ///
    /// # Errors
    /// When the listener's addresses cannot be bound.
    pub fn serve(path: PathBuf, worker_id: String, occupancy: Occupancy) -> io::Result<Self> {
        let (outgoing, queue) = mpsc::channel(QUEUE);
        let egress = Self { outgoing, occupancy };
        for address in [IpAddr::V4(WORKER_V4), IpAddr::V6(WORKER_V6)] {
            tokio::spawn(take_over(bind_tcp(address, EGRESS_PORT)?, egress.clone()));
        }
        tokio::spawn(Link { path, worker_id, queue, backlog: VecDeque::new() }.run());
        Ok(egress)
    }

    /// Asks the proxy a DNS question; `None` when there is no proxy or no actor.
    pub async fn resolve(&self, message: Vec<u8>, tcp: bool) -> Option<Vec<u8>> {
        let owner = self.occupancy.owner()?;
        let (reply, answer) = oneshot::channel();
        let query = DnsQuery { query_id: 0, owner: Some(owner), message, tcp };
        self.outgoing.try_send(Outgoing::Dns { query, reply }).ok()?;
        answer.await.ok()
    }

    /// Tells of refused packets.
    pub fn denied(&self, record: PacketDenied) {
        if self.outgoing.try_send(Outgoing::Denied(record)).is_err() {
            tracing::warn!("the egress proxy does not keep up; a record of a refused packet is lost");
        }
    }
}

async fn take_over(listener: TcpListener, egress: Egress) {
    loop {
        let socket = sockets::accept(&listener).await;
        let destination = original_destination(&socket);
        let (Some((pass, owner)), Ok(destination)) = (egress.occupancy.pass_egress(), destination) else {
            reset(&socket);
            continue;
        };
        let frame =
            FlowOpen { flow_id: 0, owner: Some(owner), original_destination: destination.to_string() };
        if let Err(error) = egress.outgoing.try_send(Outgoing::Open { frame, socket, pass }) {
            let (mpsc::error::TrySendError::Full(message) | mpsc::error::TrySendError::Closed(message)) =
                error;
            if let Outgoing::Open { socket, .. } = message {
                reset(&socket);
            }
        }
    }
}

/// Makes closing the socket a reset, so that the actor's program knows at once.
fn reset(socket: &TcpStream) {
    if let Err(error) = socket.set_zero_linger() {
        tracing::debug!(%error, "cannot reset a connection");
    }
}

struct Link {
    path: PathBuf,
    worker_id: String,
    queue: mpsc::Receiver<Outgoing>,
    backlog: VecDeque<PacketDenied>,
}

impl Link {
    async fn run(mut self) {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.dial().await {
                Ok(socket) => {
                    pause = FIRST_PAUSE;
                    if let Err(error) = self.serve(&socket).await {
                        tracing::warn!(%error, "lost the egress proxy");
                    }
                }
                Err(error) => tracing::trace!(%error, path = %self.path.display(), "no egress proxy"),
            }
            let over = tokio::time::sleep(pause);
            tokio::pin!(over);
            pause = (pause * 2).min(LONGEST_PAUSE);
            loop {
                tokio::select! {
                    () = &mut over => break,
                    message = self.queue.recv() => match message {
                        Some(message) => self.refuse(message),
                        None => return,
                    },
                }
            }
        }
    }

    async fn dial(&self) -> io::Result<SeqPacket> {
        let socket = SeqPacket::connect(&self.path)?;
        let hello = Frame::Hello(Hello { worker_id: self.worker_id.clone() });
        socket.send(&encode(hello), &[]).await?;
        Ok(socket)
    }

    /// There is no proxy.
    fn refuse(&mut self, message: Outgoing) {
        match message {
            Outgoing::Open { socket, .. } => reset(&socket),
            // Dropping the reply says it.
            Outgoing::Dns { .. } => {}
            Outgoing::Denied(record) => {
                if self.backlog.len() >= MAX_BACKLOG {
                    self.backlog.pop_front();
                    tracing::warn!("no egress proxy for long; a record of a refused packet is lost");
                }
                self.backlog.push_back(record);
            }
        }
    }

    /// Until the proxy closes or the connection fails. Flows and questions end with the connection.
    async fn serve(&mut self, socket: &SeqPacket) -> io::Result<()> {
        let mut next_id: u64 = 0;
        let mut questions: HashMap<u64, oneshot::Sender<Vec<u8>>> = HashMap::new();
        let mut flows: HashMap<u64, tokio::task::AbortHandle> = HashMap::new();
        while let Some(record) = self.backlog.pop_front() {
            socket.send(&encode(Frame::Denied(record)), &[]).await?;
        }
        let result = loop {
            tokio::select! {
                message = self.queue.recv() => {
                    let Some(message) = message else { break Ok(()) };
                    next_id += 1;
                    let sent = match message {
                        Outgoing::Open { mut frame, socket: flow, pass } => {
                            frame.flow_id = next_id;
                            match flow.into_std() {
                                Ok(flow) => {
                                    let fd = OwnedFd::from(flow);
                                    let sent = socket.send(&encode(Frame::Open(frame)), &[fd.as_raw_fd()]).await;
                                    if sent.is_ok() {
                                        flows.insert(next_id, tokio::spawn(watch_flow(fd, pass)).abort_handle());
                                    }
                                    sent
                                }
                                Err(error) => Err(error),
                            }
                        }
                        Outgoing::Dns { mut query, reply } => {
                            query.query_id = next_id;
                            // Whoever has given up needs no answer.
                            questions.retain(|_, reply| !reply.is_closed());
                            questions.insert(next_id, reply);
                            socket.send(&encode(Frame::DnsQuery(query)), &[]).await
                        }
                        Outgoing::Denied(record) => socket.send(&encode(Frame::Denied(record)), &[]).await,
                    };
                    if let Err(error) = sent {
                        break Err(error);
                    }
                }
                received = socket.receive() => match received {
                    Ok(Some((message, _))) => match EgressFrame::decode(message.as_slice()).map(|frame| frame.frame) {
                        Ok(Some(Frame::DnsAnswer(answer))) => {
                            if let Some(reply) = questions.remove(&answer.query_id) {
                                // The asker may have given up.
                                drop(reply.send(answer.message));
                            }
                        }
                        Ok(Some(Frame::Closed(closed))) => {
                            if let Some(flow) = flows.remove(&closed.flow_id) {
                                flow.abort();
                            }
                        }
                        Ok(_) => {}
                        Err(error) => tracing::warn!(%error, "unreadable frame of the egress proxy"),
                    },
                    Ok(None) => break Ok(()),
                    Err(error) => break Err(error),
                },
            }
        };
        for flow in flows.into_values() {
            flow.abort();
        }
        result
    }
}

/// Keeps a flow counted until it is aborted, and shuts it down when its actor goes.
async fn watch_flow(socket: OwnedFd, pass: Pass) {
    pass.cut.cancelled().await;
    let stream = std::net::TcpStream::from(socket);
    // ENOTCONN: it is over already.
    drop(stream.shutdown(Shutdown::Both));
    drop(pass);
}

fn encode(frame: Frame) -> Vec<u8> {
    EgressFrame { frame: Some(frame) }.encode_to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_a_proxy_questions_fail_at_once_and_records_wait_for_it() {
        use nix::sys::socket::{
            AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, listen, socket,
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("egress.sock");
        let occupancy = Occupancy::new("w1");
        occupancy.enter(
            substrate_proto::types::Assignment {
                actor_uid: "a".into(),
                actor_name: "alice".into(),
                generation: 4,
                ..Default::default()
            },
            80,
        );
        let (outgoing, queue) = mpsc::channel(QUEUE);
        let egress = Egress { outgoing, occupancy };
        let link = Link { path: path.clone(), worker_id: "w1".into(), queue, backlog: VecDeque::new() };
        tokio::spawn(link.run());
        assert_eq!(egress.resolve(b"question".to_vec(), false).await, None);
        egress.denied(PacketDenied { destination: "1.1.1.1:53".into(), ..PacketDenied::default() });
        assert_eq!(egress.resolve(b"question".to_vec(), false).await, None);

        let listener =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&listener, Backlog::new(4).unwrap()).unwrap();
        let accepted = tokio::task::spawn_blocking(move || {
            let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).unwrap();
            crate::sys::received(&[fd]).pop().unwrap()
        });
        let proxy = SeqPacket::new(accepted.await.unwrap()).unwrap();
        let mut frames = Vec::new();
        for _ in 0..2 {
            let (message, _) = proxy.receive().await.unwrap().unwrap();
            frames.push(EgressFrame::decode(message.as_slice()).unwrap().frame.unwrap());
        }
        assert!(matches!(&frames[0], Frame::Hello(hello) if hello.worker_id == "w1"));
        assert!(matches!(&frames[1], Frame::Denied(record) if record.destination == "1.1.1.1:53"));

        let asking = tokio::spawn({
            let egress = egress.clone();
            async move { egress.resolve(b"question".to_vec(), true).await }
        });
        let (message, _) = proxy.receive().await.unwrap().unwrap();
        let Some(Frame::DnsQuery(query)) = EgressFrame::decode(message.as_slice()).unwrap().frame else {
            panic!("no question");
        };
        let owner = query.owner.unwrap();
        assert_eq!((owner.actor_name.as_str(), owner.generation, query.tcp), ("alice", 4, true));
        let answer =
            substrate_proto::atenet::DnsAnswer { query_id: query.query_id, message: b"answer".to_vec() };
        proxy.send(&encode(Frame::DnsAnswer(answer)), &[]).await.unwrap();
        assert_eq!(asking.await.unwrap().as_deref(), Some(&b"answer"[..]));

        // The proxy dies with a question open.
        let asking = tokio::spawn(async move { egress.resolve(b"question".to_vec(), true).await });
        proxy.receive().await.unwrap().unwrap();
        drop(proxy);
        assert_eq!(asking.await.unwrap(), None);
    }
}
