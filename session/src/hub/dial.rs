// SPDX-License-Identifier: Apache-2.0
//! Connections from the hub to a shim: through the worker's ingress socket, then the handshake of
//! `proto/session/v1/session.proto`.
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::time::Duration;

use prost::Message as _;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use substrate_proto::atenet::{IngressOpen, IngressOpened, ingress_opened::Code};
use substrate_proto::session::{Attach, Attached, Challenge, Proof};
use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::net::{TcpStream, UnixStream};

use super::Awake;
use crate::mux::Mux;
use crate::shim::HUB_PORT;
use crate::wire::{self, NONCE, SessionKey};

const MAX_OPENED: usize = 64 << 10;
/// How long a handshake may take, with the connection before it.
const LIMIT: Duration = Duration::from_secs(5);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The slot let nothing through: another copy is there, it is going away, or nothing listens.
    #[error("the worker refused: {0}")]
    Refused(String),
    /// What answered is not this sandbox's shim.
    #[error("what answered is not the sandbox's shim: {0}")]
    Stranger(&'static str),
    /// The connection failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Not in time.
    #[error("no answer within {} s", LIMIT.as_secs())]
    Late,
}

/// Opens a connection and gives it to the link. `lacks_shell` is told before that what the shim says of its sandbox. The
/// connection is the worker's, lent until what is returned is dropped: that ends when the worker does.
///
/// # Errors
/// [`DialError`]; nothing was changed.
pub async fn attach(
    uid: &str,
    awake: &Awake,
    key: &SessionKey,
    mux: &Mux,
    lacks_shell: impl FnOnce(bool),
) -> Result<UnixStream, DialError> {
    tokio::time::timeout(LIMIT, async {
        let (lease, lent) = open(uid, awake, Way::Background).await?;
        let mut stream = lent.ok_or(DialError::Stranger("the worker gave no connection"))?;
        let (challenge, proof) = meet(&mut stream, key).await?;
        lacks_shell(proof.lacks_shell);
        let over = |_| DialError::Stranger("the session is over");
        let ours = mux.stand().await.map_err(over)?;
        let theirs = proof.position.clone().unwrap_or_default();
        let continues = mux.accepts(theirs.clone()).await.map_err(over)?;
        let fresh_link = u64::from_be_bytes(wire::random()?).max(1);
        let attach = Attach {
            mac: key.prove("hub", &challenge.nonce, &proof.nonce),
            position: Some(ours.clone()),
            continues,
            fresh_link,
        };
        wire::greet(&mut stream, &attach).await?;
        let attached: Attached = wire::greeted(&mut stream).await?;
        let fresh = (!(continues && attached.continues)).then_some(fresh_link);
        if fresh.is_some() {
            tracing::info!(
                actor = uid,
                generation = awake.generation,
                "a fresh link with the sandbox's shim"
            );
        }
        if mux.attach(ours, theirs, fresh, stream).await.map_err(over)? {
            super::metrics::link(fresh.is_some());
            Ok(lease)
        } else {
            Err(DialError::Stranger("the link moved on meanwhile"))
        }
    })
    .await
    .unwrap_or(Err(DialError::Late))
}

/// Opens a connection that counts as a request in flight while it is kept. It ends at the worker.
///
/// # Errors
/// [`DialError`].
pub async fn hold(uid: &str, awake: &Awake) -> Result<UnixStream, DialError> {
    let opened = tokio::time::timeout(LIMIT, open(uid, awake, Way::Hold)).await;
    opened.unwrap_or(Err(DialError::Late)).map(|(held, _)| held)
}

async fn meet(stream: &mut TcpStream, key: &SessionKey) -> Result<(Challenge, Proof), DialError> {
    let nonce: [u8; NONCE] = wire::random()?;
    let challenge = Challenge { version: wire::VERSION, nonce: nonce.to_vec() };
    wire::greet(stream, &challenge).await?;
    let proof: Proof = wire::greeted(stream).await?;
    if !key.verifies("shim", &challenge.nonce, &proof.nonce, &proof.mac) {
        return Err(DialError::Stranger("it does not know the session key"));
    }
    Ok((challenge, proof))
}

/// What a connection is to the worker (`atenet.v1.IngressOpen`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Background,
    Hold,
}

/// Asks the worker; the connection to it, and the one to the actor that came with its answer.
async fn open(uid: &str, awake: &Awake, way: Way) -> Result<(UnixStream, Option<TcpStream>), DialError> {
    let path = awake
        .endpoint
        .strip_prefix("unix:")
        .ok_or_else(|| DialError::Refused(format!("endpoint {:?} is not unix:/path", awake.endpoint)))?;
    let mut stream = UnixStream::connect(path).await?;
    let ask = IngressOpen {
        actor_uid: uid.to_owned(),
        generation: awake.generation,
        port: u32::from(HUB_PORT),
        background: way == Way::Background,
        hold: way == Way::Hold,
    };
    stream.write_all(&ask.encode_length_delimited_to_vec()).await?;
    let (opened, lent) = read_opened(&stream).await?;
    match opened.code() {
        Code::Ok => Ok((stream, lent)),
        code => Err(DialError::Refused(format!("{} {}", code.as_str_name(), opened.message))),
    }
}

/// Reads the one message that the worker answers with, and what is attached to it.
async fn read_opened(stream: &UnixStream) -> io::Result<(IngressOpened, Option<TcpStream>)> {
    let (mut answer, mut lent) = (Vec::new(), None);
    loop {
        stream.readable().await?;
        let received = stream.try_io(Interest::READABLE, || receive(stream, &mut answer, &mut lent));
        match received {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            received => received?,
        };
        if answer.len() > MAX_OPENED {
            return Err(io::Error::other(format!("an answer of more than {MAX_OPENED} bytes")));
        }
        let mut rest = answer.as_slice();
        // Not complete as long as its length is not, or fewer bytes follow than that.
        let complete =
            prost::encoding::decode_varint(&mut rest).is_ok_and(|length| length <= rest.len() as u64);
        if complete {
            let opened =
                IngressOpened::decode_length_delimited(answer.as_slice()).map_err(io::Error::other)?;
            let lent = lent.map(|fd: OwnedFd| {
                let connection = std::net::TcpStream::from(fd);
                connection.set_nonblocking(true)?;
                TcpStream::from_std(connection)
            });
            return Ok((opened, lent.transpose()?));
        }
    }
}

/// Receives some of an answer, and a descriptor with it; how many bytes.
fn receive(stream: &UnixStream, answer: &mut Vec<u8>, lent: &mut Option<OwnedFd>) -> io::Result<usize> {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [io::IoSliceMut::new(&mut bytes)];
    let received = recvmsg(stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            *lent = fds.last();
        }
    }
    answer.extend_from_slice(&bytes[..received.bytes]);
    Ok(received.bytes)
}
