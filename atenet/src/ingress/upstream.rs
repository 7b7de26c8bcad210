// SPDX-License-Identifier: Apache-2.0
//! One connection to one actor for one request: `IngressOpen`, `IngressOpened`, then HTTP/1.1.
//!
//! Until `OK` nothing has reached the actor, so every failure up to there may be retried. The connection ends with
//! its reply (`connection: close`), because an open one counts as a request in flight and would stand against a
//! checkpoint's quiet moment.
use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use prost::Message as _;
use substrate_proto::atenet::{IngressOpen, IngressOpened, ingress_opened::Code};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio_util::task::AbortOnDropHandle;

/// Longest `IngressOpened` that is read, bytes.
const MAX_OPENED: usize = 64 << 10;
/// How long the actor's side may take to close after its reply.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// A request's body on its way to the actor.
pub(crate) type UpBody = UnsyncBoxBody<Bytes, io::Error>;

/// Why a connection to the actor was not opened. Nothing has reached the actor.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// Another actor or generation is there.
    #[error("the worker holds another actor or generation: {0}")]
    Stale(String),
    /// It is being suspended, frozen or not ready.
    #[error("not ready: {0}")]
    NotNow(String),
    /// Nothing listens on the port.
    #[error("nothing listens on the port: {0}")]
    Refused(String),
    /// The worker does not answer.
    #[error("the worker cannot be reached: {0}")]
    Unreachable(#[from] io::Error),
    /// It does not speak the protocol.
    #[error("the worker's answer is not understood: {0}")]
    Protocol(String),
}

/// Opens a connection through the ateom's ingress socket.
pub(crate) async fn open(
    endpoint: &str,
    ask: IngressOpen,
    timeout: Duration,
) -> Result<UnixStream, OpenError> {
    let path = endpoint
        .strip_prefix("unix:")
        .ok_or_else(|| OpenError::Protocol(format!("endpoint {endpoint:?} is not unix:/path")))?;
    let exchange = async {
        let mut stream = UnixStream::connect(path).await?;
        stream.write_all(&ask.encode_length_delimited_to_vec()).await?;
        let opened = read_opened(&mut stream).await?;
        match opened.code() {
            Code::Ok => Ok(stream),
            Code::Stale => Err(OpenError::Stale(opened.message)),
            Code::NotNow => Err(OpenError::NotNow(opened.message)),
            Code::Refused => Err(OpenError::Refused(opened.message)),
            Code::Unspecified => Err(OpenError::Protocol("no code".into())),
        }
    };
    tokio::time::timeout(timeout, exchange).await.unwrap_or_else(|_| {
        Err(OpenError::Unreachable(io::Error::new(io::ErrorKind::TimedOut, "no answer in time")))
    })
}

/// Reads exactly one length-delimited message: what follows belongs to the actor.
async fn read_opened(stream: &mut UnixStream) -> Result<IngressOpened, OpenError> {
    let mut len = 0_usize;
    for shift in (0..).step_by(7) {
        let byte = stream.read_u8().await?;
        if shift > 21 {
            return Err(OpenError::Protocol("length too long".into()));
        }
        len |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            break;
        }
    }
    if len > MAX_OPENED {
        return Err(OpenError::Protocol(format!("an answer of {len} bytes")));
    }
    let mut message = vec![0; len];
    stream.read_exact(&mut message).await?;
    IngressOpened::decode(message.as_slice()).map_err(|error| OpenError::Protocol(error.to_string()))
}

/// HTTP over an opened connection.
pub(crate) struct Upstream {
    sender: SendRequest<UpBody>,
    connection: AbortOnDropHandle<hyper::Result<()>>,
}

/// The request failed; `unsent` when nothing of it was written.
pub(crate) struct SendError {
    pub(crate) error: hyper::Error,
    pub(crate) unsent: Option<Request<UpBody>>,
}

impl Upstream {
    pub(crate) async fn start(stream: UnixStream, max_header: usize) -> hyper::Result<Self> {
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(max_header.max(8 << 10))
            .handshake(TokioIo::new(stream))
            .await?;
        let connection = AbortOnDropHandle::new(tokio::spawn(connection.with_upgrades()));
        Ok(Self { sender, connection })
    }

    pub(crate) async fn send(&mut self, request: Request<UpBody>) -> Result<Response<Incoming>, SendError> {
        self.sender.try_send_request(request).await.map_err(|mut failed| {
            let unsent = failed.take_message();
            SendError { error: failed.into_error(), unsent }
        })
    }

    /// Ends the connection and waits until it has ended, so that it counts no longer as in flight.
    pub(crate) async fn close(self) {
        drop(self.sender);
        // Aborted by its drop when the actor does not close in time.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, self.connection).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    async fn answered_with(bytes: Vec<u8>) -> Result<Vec<u8>, OpenError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let len = stream.read_u8().await.unwrap();
            let mut message = vec![0; usize::from(len)];
            stream.read_exact(&mut message).await.unwrap();
            let open = IngressOpen::decode(message.as_slice()).unwrap();
            assert_eq!((open.actor_uid.as_str(), open.generation, open.port), ("u", 3, 80));
            stream.write_all(&bytes).await.unwrap();
        });
        let ask = IngressOpen { actor_uid: "u".into(), generation: 3, port: 80, ..IngressOpen::default() };
        let opened = open(&format!("unix:{}", path.display()), ask, Duration::from_secs(5)).await;
        server.await.unwrap();
        let mut rest = Vec::new();
        opened?.read_to_end(&mut rest).await?;
        Ok(rest)
    }

    fn opened(code: Code, message: &str) -> Vec<u8> {
        IngressOpened { code: code.into(), message: message.into() }.encode_length_delimited_to_vec()
    }

    #[tokio::test]
    async fn bytes_after_the_answer_belong_to_the_actor() {
        let mut bytes = opened(Code::Ok, &"x".repeat(300));
        bytes.extend_from_slice(b"HELLO");
        assert_eq!(answered_with(bytes).await.unwrap(), b"HELLO");
    }

    #[tokio::test]
    async fn every_answer_has_its_error() {
        assert!(matches!(answered_with(opened(Code::Stale, "g")).await, Err(OpenError::Stale(_))));
        assert!(matches!(answered_with(opened(Code::NotNow, "g")).await, Err(OpenError::NotNow(_))));
        assert!(matches!(answered_with(opened(Code::Refused, "g")).await, Err(OpenError::Refused(_))));
        assert!(matches!(answered_with(opened(Code::Unspecified, "")).await, Err(OpenError::Protocol(_))));
        assert!(matches!(answered_with(vec![0xff; 8]).await, Err(OpenError::Protocol(_))));
        assert!(matches!(answered_with(vec![0xff, 0xff, 0x7f]).await, Err(OpenError::Protocol(_))));
        assert!(matches!(answered_with(vec![]).await, Err(OpenError::Unreachable(_))));
        let ask = IngressOpen::default();
        let gone = open("unix:/nonexistent/sock", ask.clone(), Duration::from_secs(1)).await;
        assert!(matches!(gone, Err(OpenError::Unreachable(_))));
        assert!(matches!(open("http://x", ask, Duration::from_secs(1)).await, Err(OpenError::Protocol(_))));
    }
}
