// SPDX-License-Identifier: Apache-2.0
//! Where requests enter: `ingress.sock`, one connection per request (`atenet/v1/flow.proto`).
//!
//! The router says which copy of which actor it means; the gate decides ([`Occupancy::pass_ingress`]) before anything
//! reaches the actor, so `STALE` and `NOT_NOW` always mean that the request may be sent elsewhere. Then bytes pass
//! both ways until both sides are done, or until the actor's connections are cut.
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use prost::Message as _;
use substrate_proto::atenet::ingress_opened::Code;
use substrate_proto::atenet::{IngressOpen, IngressOpened};
use substrate_proto::seam::{ListenError, Peers, listen};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio_stream::StreamExt as _;

use crate::network::ACTOR_V4;
use crate::occupancy::{Occupancy, Pass};
use crate::seqpacket;

/// Connections at once; more wait to be accepted.
const MAX_CONNECTIONS: usize = 4096;
const MAX_OPEN: usize = 4096;
const OPEN_LIMIT: Duration = Duration::from_secs(5);
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Listens and serves until the process ends.
///
/// # Errors
/// When the socket cannot be opened.
pub fn serve(path: &Path, occupancy: Occupancy) -> Result<(), ListenError> {
    let mut connections = Box::pin(listen(path, Peers::default())?);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    tokio::spawn(async move {
        while let Some(connection) = connections.next().await {
            let stream = match connection {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a request");
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&slots).acquire_owned().await else { return };
            let occupancy = occupancy.clone();
            tokio::spawn(async move {
                if let Err(error) = serve_connection(stream, &occupancy).await {
                    tracing::debug!(%error, "a request's connection ended");
                }
                drop(permit);
            });
        }
    });
    Ok(())
}

async fn serve_connection(mut router: UnixStream, occupancy: &Occupancy) -> io::Result<()> {
    let open = tokio::time::timeout(OPEN_LIMIT, read_open(&mut router)).await??;
    let passed = if open.background {
        occupancy.pass_background(&open.actor_uid, open.generation)
    } else {
        occupancy.pass_ingress(&open.actor_uid, open.generation)
    };
    let pass = match passed {
        Ok(pass) => pass,
        Err(code) => return answer(&mut router, code, "").await,
    };
    if open.hold {
        answer(&mut router, Code::Ok, "").await?;
        return hold(router, &pass).await;
    }
    let port = if open.port == 0 { pass.default_port } else { open.port };
    let Some(port) = u16::try_from(port).ok().filter(|port| *port != 0) else {
        return answer(&mut router, Code::Refused, "the actor has no such port").await;
    };
    let address = SocketAddr::new(ACTOR_V4.into(), port);
    let connected = tokio::select! {
        () = pass.cut.cancelled() => return answer(&mut router, Code::NotNow, "it is going away").await,
        connected = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(address)) => connected,
    };
    let actor = match connected {
        Ok(Ok(actor)) => actor,
        Ok(Err(error)) => {
            let message = format!("nothing answers on the actor's port {port}: {error}");
            return answer(&mut router, Code::Refused, &message).await;
        }
        Err(_) => {
            let message = format!("the actor's port {port} does not answer in {} s", CONNECT_LIMIT.as_secs());
            return answer(&mut router, Code::Refused, &message).await;
        }
    };
    actor.set_nodelay(true)?;
    if open.background {
        return lend(router, &actor, &pass).await;
    }
    answer(&mut router, Code::Ok, "").await?;
    let mut actor = Counted { stream: actor, pass };
    let cut = actor.pass.cut.clone();
    tokio::select! {
        () = cut.cancelled() => {
            // What was in flight is lost with the actor; a reset says so, an orderly end would not.
            if let Err(error) = actor.stream.set_zero_linger() {
                tracing::debug!(%error, "cannot reset a connection");
            }
            Ok(())
        }
        copied = tokio::io::copy_bidirectional(&mut router, &mut actor) => copied.map(drop),
    }
}

/// Gives the connection itself to who asked, until they close the one they asked over.
async fn lend(mut router: UnixStream, actor: &TcpStream, pass: &Pass) -> io::Result<()> {
    let opened = IngressOpened { code: Code::Ok.into(), message: String::new() };
    let (message, fds) = (opened.encode_length_delimited_to_vec(), [actor.as_raw_fd()]);
    loop {
        router.writable().await?;
        match router.try_io(Interest::WRITABLE, || seqpacket::send(router.as_raw_fd(), &message, &fds)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            sent => break sent?,
        }
    }
    let mut nowhere = tokio::io::sink();
    tokio::select! {
        // Resets it, also where it was given to (connect(2), AF_UNSPEC).
        () = pass.cut.cancelled() => Ok(rustix::net::connect_unspec(actor)?),
        ended = tokio::io::copy(&mut router, &mut nowhere) => ended.map(drop),
    }
}

/// Keeps a connection that leads nowhere until it is closed or cut.
async fn hold(mut router: UnixStream, pass: &Pass) -> io::Result<()> {
    let mut nowhere = tokio::io::sink();
    tokio::select! {
        () = pass.cut.cancelled() => Ok(()),
        ended = tokio::io::copy(&mut router, &mut nowhere) => ended.map(drop),
    }
}

async fn read_open(router: &mut UnixStream) -> io::Result<IngressOpen> {
    let mut length: usize = 0;
    for shift in (0..).step_by(7) {
        let byte = router.read_u8().await?;
        length |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            break;
        }
        // Two bytes hold more than MAX_OPEN.
        if shift >= 7 {
            length = usize::MAX;
            break;
        }
    }
    if length > MAX_OPEN {
        return Err(io::Error::other("an IngressOpen is never this long"));
    }
    let mut message = vec![0; length];
    router.read_exact(&mut message).await?;
    IngressOpen::decode(message.as_slice()).map_err(io::Error::other)
}

async fn answer(router: &mut UnixStream, code: Code, message: &str) -> io::Result<()> {
    let opened = IngressOpened { code: code.into(), message: message.to_owned() };
    router.write_all(&opened.encode_length_delimited_to_vec()).await
}

/// The actor's side of a request; notes when bytes pass.
struct Counted {
    stream: TcpStream,
    pass: Pass,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_read(context, buffer);
        if result.is_ready() {
            self.pass.touch();
        }
        result
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(context, bytes);
        if result.is_ready() {
            self.pass.touch();
        }
        result
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use substrate_proto::types::Assignment;

    use super::*;

    async fn ask(bytes: &[u8], occupancy: &Occupancy) -> Option<IngressOpened> {
        let (mut router, ours) = UnixStream::pair().unwrap();
        let served = tokio::spawn({
            let occupancy = occupancy.clone();
            async move { serve_connection(ours, &occupancy).await }
        });
        router.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        // Bytes that were not read make the close a reset, after the answer.
        drop(router.read_to_end(&mut answer).await);
        // The outcome of the connection is what was answered.
        drop(served.await.unwrap());
        IngressOpened::decode_length_delimited(answer.as_slice()).ok()
    }

    #[tokio::test]
    async fn requests_for_nobody_are_stale_and_garbage_is_closed() {
        let occupancy = Occupancy::new("w1");
        let open = IngressOpen { actor_uid: "u".repeat(200), generation: 1, ..IngressOpen::default() };
        let answer = ask(&open.encode_length_delimited_to_vec(), &occupancy).await.unwrap();
        assert_eq!(answer.code(), Code::Stale);
        assert!(ask(&[0xff, 0xff, 0xff, 0xff], &occupancy).await.is_none());
    }

    #[tokio::test]
    async fn a_lent_connection_is_reset_when_it_is_cut_and_ends_with_its_lease() {
        let occupancy = Occupancy::new("w1");
        let owner = Assignment { actor_uid: "a".into(), generation: 3, ..Assignment::default() };
        occupancy.enter(owner, 8080);
        occupancy.set_gate(true);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        for cut in [true, false] {
            let to_actor = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (mut actor, _) = listener.accept().await.unwrap();
            let (hub, ours) = UnixStream::pair().unwrap();
            let pass = occupancy.pass_background("a", 3).unwrap();
            let served = tokio::spawn(async move { lend(ours, &to_actor, &pass).await });
            hub.readable().await.unwrap();
            let (message, mut fds) = seqpacket::receive(hub.as_raw_fd()).unwrap().unwrap();
            assert_eq!(IngressOpened::decode_length_delimited(message.as_slice()).unwrap().code(), Code::Ok);
            let lent = std::net::TcpStream::from(fds.remove(0));
            lent.set_nonblocking(true).unwrap();
            let mut lent = TcpStream::from_std(lent).unwrap();
            lent.write_all(b"there").await.unwrap();
            let mut heard = [0; 5];
            actor.read_exact(&mut heard).await.unwrap();
            assert_eq!(&heard, b"there");
            occupancy.close_if_idle().unwrap();
            occupancy.set_gate(true);
            if cut {
                occupancy.cut();
                served.await.unwrap().unwrap();
                let kind = |read: io::Result<u8>| read.unwrap_err().kind();
                assert_eq!(kind(actor.read_u8().await), io::ErrorKind::ConnectionReset);
                assert_eq!(kind(lent.read_u8().await), io::ErrorKind::ConnectionReset);
            } else {
                drop((hub, lent));
                served.await.unwrap().unwrap();
                assert_eq!(actor.read(&mut heard).await.unwrap(), 0);
            }
        }
    }

    #[tokio::test]
    async fn a_hold_keeps_the_actor_in_use_until_it_is_closed_or_cut() {
        let occupancy = Occupancy::new("w1");
        let owner = Assignment { actor_uid: "a".into(), generation: 3, ..Assignment::default() };
        occupancy.enter(owner, 8080);
        occupancy.set_gate(true);
        let open = IngressOpen { actor_uid: "a".into(), generation: 3, hold: true, ..IngressOpen::default() };
        let open = open.encode_length_delimited_to_vec();
        for closes in [true, false] {
            let (mut hub, ours) = UnixStream::pair().unwrap();
            let served = tokio::spawn({
                let occupancy = occupancy.clone();
                async move { serve_connection(ours, &occupancy).await }
            });
            hub.write_all(&open).await.unwrap();
            let expected = IngressOpened { code: Code::Ok.into(), message: String::new() };
            let mut answer = vec![0; expected.encode_length_delimited_to_vec().len()];
            hub.read_exact(&mut answer).await.unwrap();
            assert_eq!(IngressOpened::decode_length_delimited(answer.as_slice()).unwrap(), expected);
            assert!(occupancy.close_if_idle().unwrap_err().contains("1 requests in flight"));
            if closes {
                drop(hub);
            } else {
                occupancy.cut();
            }
            served.await.unwrap().unwrap();
            assert_eq!(occupancy.usage().ingress, 0);
        }
        occupancy.close_if_idle().unwrap();
    }
}
