// SPDX-License-Identifier: Apache-2.0
//! The ateom's side of the egress socket, small: for tests, and for whoever needs a client.
use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use substrate_proto::atenet::egress_frame::Frame;
use substrate_proto::atenet::{DnsQuery, FlowOpen, FlowOwner, Hello, PacketDenied};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;

use super::packet::Packets;

#[derive(Default)]
struct Waiting {
    flows: HashMap<u64, oneshot::Sender<()>>,
    queries: HashMap<u64, oneshot::Sender<Vec<u8>>>,
    ended: bool,
}

/// A connection of one worker slot to the egress proxy.
pub struct Slot {
    packets: Arc<Packets>,
    next: AtomicU64,
    waiting: Arc<Mutex<Waiting>>,
    _reader: AbortOnDropHandle<()>,
}

impl Slot {
    /// Connects and says hello.
    ///
    /// # Errors
    /// When nobody listens.
    pub async fn connect(path: &Path, worker_id: &str) -> io::Result<Self> {
        let packets = Arc::new(Packets::connect(path)?);
        packets.send(Frame::Hello(Hello { worker_id: worker_id.to_owned() }), None).await?;
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let reader = tokio::spawn(read(packets.clone(), waiting.clone()));
        Ok(Self { packets, next: AtomicU64::new(1), waiting, _reader: AbortOnDropHandle::new(reader) })
    }

    /// Hands an accepted connection over; the receiver fires once the proxy is done with it.
    ///
    /// # Errors
    /// When the proxy has gone.
    pub async fn open(
        &self,
        owner: FlowOwner,
        original_destination: &str,
        socket: TcpStream,
    ) -> io::Result<oneshot::Receiver<()>> {
        let flow_id = self.next.fetch_add(1, Ordering::Relaxed);
        let (done, closed) = oneshot::channel();
        self.wait(|waiting| waiting.flows.insert(flow_id, done).is_none())?;
        let open =
            FlowOpen { flow_id, owner: Some(owner), original_destination: original_destination.to_owned() };
        let socket = socket.into_std()?;
        self.packets.send(Frame::Open(open), Some(socket.as_fd())).await?;
        Ok(closed)
    }

    /// Asks the resolver; the answer is empty when the query deserves none.
    ///
    /// # Errors
    /// When the proxy has gone.
    pub async fn dns(&self, owner: FlowOwner, message: Vec<u8>, tcp: bool) -> io::Result<Vec<u8>> {
        let query_id = self.next.fetch_add(1, Ordering::Relaxed);
        let (done, answer) = oneshot::channel();
        self.wait(|waiting| waiting.queries.insert(query_id, done).is_none())?;
        self.packets
            .send(Frame::DnsQuery(DnsQuery { query_id, owner: Some(owner), message, tcp }), None)
            .await?;
        answer.await.map_err(|_| gone())
    }

    /// Reports packets that the slot's own rules refused.
    ///
    /// # Errors
    /// When the proxy has gone.
    pub async fn denied(&self, denied: PacketDenied) -> io::Result<()> {
        self.packets.send(Frame::Denied(denied), None).await
    }

    fn wait(&self, enter: impl FnOnce(&mut Waiting) -> bool) -> io::Result<()> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.ended {
            return Err(gone());
        }
        enter(&mut waiting);
        Ok(())
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the egress proxy has closed the connection")
}

async fn read(packets: Arc<Packets>, waiting: Arc<Mutex<Waiting>>) {
    loop {
        let received = packets.receive().await;
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        match received {
            // A receiver that was dropped has lost interest.
            Ok(Some((Frame::Closed(closed), _))) => {
                if let Some(done) = waiting.flows.remove(&closed.flow_id) {
                    let _ = done.send(());
                }
            }
            Ok(Some((Frame::DnsAnswer(answer), _))) => {
                if let Some(done) = waiting.queries.remove(&answer.query_id) {
                    let _ = done.send(answer.message);
                }
            }
            Ok(Some((frame, _))) => tracing::warn!(?frame, "a frame that a proxy does not send"),
            Ok(None) | Err(_) => {
                *waiting = Waiting { ended: true, ..Waiting::default() };
                return;
            }
        }
    }
}
