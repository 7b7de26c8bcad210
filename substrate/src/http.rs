// SPDX-License-Identifier: Apache-2.0
//! One HTTP/1.1 request over a connection of its own: what `substrate request` and the demo need, and no more.
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{HeaderMap, HeaderValue};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::failure::{Exit, Failure};

/// Largest answer that is read, bytes.
const MAX_BODY: usize = 256 << 20;

/// A complete answer.
#[derive(Debug)]
pub struct Answer {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap<HeaderValue>,
    /// Body.
    pub body: Bytes,
}

impl Answer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Sends a request and reads the whole answer.
///
/// # Errors
/// Code 5 when nobody listens or no complete answer arrives in time.
pub async fn send(to: SocketAddr, request: Request<Full<Bytes>>, limit: Duration) -> Result<Answer, Failure> {
    let what = format!("{} {}", request.method(), request.uri());
    let unavailable = |why: String| Failure::new(Exit::Unavailable, format!("{what} at {to}: {why}"));
    tokio::time::timeout(limit, exchange(to, request))
        .await
        .map_err(|_| unavailable(format!("no complete answer within {} s", limit.as_secs())))?
        .map_err(|error| unavailable(error.to_string()))
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

async fn exchange(to: SocketAddr, request: Request<Full<Bytes>>) -> Result<Answer, BoxError> {
    let stream = TcpStream::connect(to).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let response = sender.send_request(request).await?;
    let (parts, body) = response.into_parts();
    let body = Limited::new(body, MAX_BODY).collect().await?.to_bytes();
    drop(sender);
    driver.abort();
    Ok(Answer { status: parts.status, headers: parts.headers, body })
}
