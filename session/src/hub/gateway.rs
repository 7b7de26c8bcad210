// SPDX-License-Identifier: Apache-2.0
//! The connection to the gateway: one HTTP/2 connection per sandbox, made when it is needed and again when it broke.
//! Pings of the gateway are answered by it, whether the sandbox sleeps or not.
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Method, Request, Response, Uri, Version};
use http_body::Frame as BodyFrame;
use http_body_util::StreamBody;
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use substrate_proto::session::Head;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Mutex, mpsc};
use tokio_stream::wrappers::ReceiverStream;

use crate::grpc;

const KEEP_ALIVE: Duration = Duration::from_secs(20);
const KEEP_ALIVE_LIMIT: Duration = Duration::from_secs(10);
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// What carries a connection.
pub trait Carrier: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Carrier for T {}

/// Makes connections, with TLS where the gateway wants it.
pub type Connector = Arc<dyn Fn() -> BoxFuture<'static, io::Result<Pin<Box<dyn Carrier>>>> + Send + Sync>;

type UpBody = StreamBody<ReceiverStream<Result<BodyFrame<Bytes>, io::Error>>>;

/// Feeds the body of a call. Dropped: the body ends. An error resets the call.
pub type Upload = mpsc::Sender<Result<BodyFrame<Bytes>, io::Error>>;

/// Why a call was not made.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The gateway is not there.
    #[error("the gateway at {endpoint} cannot be reached: {cause}")]
    Unreachable {
        /// Where.
        endpoint: String,
        /// Why.
        cause: String,
    },
    /// The call cannot be written as HTTP.
    #[error("the call is not understood: {0}")]
    Malformed(#[from] http::Error),
}

/// The gateway, for one sandbox.
pub struct Gateway {
    connector: Connector,
    /// `http://authority`, as shown in requests.
    endpoint: String,
    connection: Mutex<Option<SendRequest<UpBody>>>,
}

impl Gateway {
    /// Not connected yet. `endpoint` is `http://host:port` or `https://host:port`.
    pub fn new(connector: Connector, endpoint: String) -> Self {
        Self { connector, endpoint, connection: Mutex::new(None) }
    }

    /// Makes a call; the answer's head is waited for, its body comes with it.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn call(
        &self,
        head: &Head,
    ) -> Result<(Upload, BoxFuture<'static, Result<Response<Incoming>, CallError>>), CallError> {
        let uri: Uri = format!("{}{}", self.endpoint, head.path).parse().map_err(http::Error::from)?;
        let (upload, body) = mpsc::channel(8);
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(uri)
            .version(Version::HTTP_2)
            .body(StreamBody::new(ReceiverStream::new(body)))?;
        *request.headers_mut() = grpc::headers(head);
        let mut sender = self.connected().await?;
        let answer = sender.send_request(request);
        let endpoint = self.endpoint.clone();
        let answer = Box::pin(async move {
            answer.await.map_err(|error| CallError::Unreachable { endpoint, cause: chain(&error) })
        });
        Ok((upload, answer))
    }

    async fn connected(&self) -> Result<SendRequest<UpBody>, CallError> {
        let mut connection = self.connection.lock().await;
        if let Some(sender) = connection.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let unreachable = |cause: String| CallError::Unreachable { endpoint: self.endpoint.clone(), cause };
        let connecting = async {
            let carrier = (self.connector)().await.map_err(|error| error.to_string())?;
            http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .keep_alive_interval(KEEP_ALIVE)
                .keep_alive_timeout(KEEP_ALIVE_LIMIT)
                .keep_alive_while_idle(true)
                .handshake(TokioIo::new(carrier))
                .await
                .map_err(|error| chain(&error))
        };
        let (sender, driver) = tokio::time::timeout(CONNECT_LIMIT, connecting)
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {} s", CONNECT_LIMIT.as_secs())))
            .map_err(unreachable)?;
        // Ends with its last sender and call.
        tokio::spawn(async move {
            if let Err(error) = driver.await {
                tracing::debug!(error = chain(&error), "a connection to the gateway ended");
            }
        });
        *connection = Some(sender.clone());
        Ok(sender)
    }
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}
