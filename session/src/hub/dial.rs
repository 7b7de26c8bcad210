// SPDX-License-Identifier: Apache-2.0
//! Connections from the hub to a shim: through the worker's ingress socket, then the handshake of
//! `proto/session/v1/session.proto`.
use std::io;
use std::time::Duration;

use prost::Message as _;
use substrate_proto::atenet::{IngressOpen, IngressOpened, ingress_opened::Code};
use substrate_proto::session::{Attach, Attached, Challenge, Proof};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

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

/// Opens a connection and gives it to the link. `lacks_shell` is told before that what the shim says of its sandbox.
///
/// # Errors
/// [`DialError`]; nothing was changed.
pub async fn attach(
    uid: &str,
    awake: &Awake,
    key: &SessionKey,
    mux: &Mux,
    lacks_shell: impl FnOnce(bool),
) -> Result<(), DialError> {
    tokio::time::timeout(LIMIT, async {
        let mut stream = open(uid, awake, Way::Background).await?;
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
            Ok(())
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
    tokio::time::timeout(LIMIT, open(uid, awake, Way::Hold)).await.unwrap_or(Err(DialError::Late))
}

async fn meet(stream: &mut UnixStream, key: &SessionKey) -> Result<(Challenge, Proof), DialError> {
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

async fn open(uid: &str, awake: &Awake, way: Way) -> Result<UnixStream, DialError> {
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
    let opened = read_opened(&mut stream).await?;
    match opened.code() {
        Code::Ok => Ok(stream),
        code => Err(DialError::Refused(format!("{} {}", code.as_str_name(), opened.message))),
    }
}

/// Reads exactly one length-delimited message: what follows is the shim's.
async fn read_opened(stream: &mut UnixStream) -> io::Result<IngressOpened> {
    let mut length = 0_usize;
    for shift in [0, 7, 14] {
        let byte = stream.read_u8().await?;
        length |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            break;
        }
    }
    if length > MAX_OPENED {
        return Err(io::Error::other(format!("an answer of {length} bytes")));
    }
    let mut message = vec![0; length];
    stream.read_exact(&mut message).await?;
    IngressOpened::decode(message.as_slice()).map_err(io::Error::other)
}
