// SPDX-License-Identifier: Apache-2.0
//! Where the supervisor's HTTP/2 ends: each of its calls becomes a stream to the hub.
use std::convert::Infallible;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use http::{Request, Response};
use http_body::Frame as BodyFrame;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use substrate_proto::session::stream_frame::Frame;
use tokio::net::UnixListener;

use crate::grpc;
use crate::mux::{MAX_STREAMS, Mux, Over, Receiver, Said, Sender, code};

type Answer = Response<http_body_util::combinators::UnsyncBoxBody<Bytes, Infallible>>;

/// Makes the socket and its directory, which is root's alone, and takes the place of what is left of an earlier shim.
///
/// # Errors
/// The system's, with the path.
pub fn bind(socket: &Path) -> io::Result<UnixListener> {
    let at =
        |path: &Path, error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    if let Some(dir) = socket.parent() {
        std::fs::create_dir_all(dir).map_err(|error| at(dir, error))?;
        std::fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(|error| at(dir, error))?;
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(socket, error)),
        _ => {}
    }
    UnixListener::bind(socket).map_err(|error| at(socket, error))
}

/// Serves the supervisor for ever.
pub async fn serve(listener: UnixListener, mux: Mux) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept the supervisor");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let mux = mux.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let mux = mux.clone();
                async move { Ok::<_, Infallible>(call(request, &mux).await) }
            });
            let served = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .max_concurrent_streams(MAX_STREAMS as u32)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "a connection of the supervisor ended");
            }
        });
    }
}

async fn call(request: Request<Incoming>, mux: &Mux) -> Answer {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let Ok(opened) = mux.open(grpc::head(path, &parts.headers)).await else {
        return refusal(code::RESOURCE_EXHAUSTED, "too many calls at once");
    };
    tokio::spawn(upload(body, opened.sender));
    let mut receiver = opened.receiver;
    match receiver.next().await {
        Some(Said::Headers(head)) => {
            let body = StreamBody::new(stream::unfold(Some(receiver), download));
            let mut answer = Response::new(body.boxed_unsync());
            *answer.headers_mut() = grpc::headers(&head);
            answer
        }
        // An answer of nothing but a status.
        Some(Said::Trailers(head)) => {
            let mut answer = Response::new(http_body_util::Empty::new().boxed_unsync());
            *answer.headers_mut() = grpc::headers(&head);
            answer
                .headers_mut()
                .entry("content-type")
                .or_insert(http::HeaderValue::from_static("application/grpc"));
            answer
        }
        Some(Said::Reset(reset)) => refusal(reset.code, &reset.message),
        Some(Said::Data(_) | Said::End) | None => {
            refusal(code::UNAVAILABLE, "the session hub gave the call up")
        }
    }
}

/// Sends the body of a call.
async fn upload(mut body: Incoming, sender: Sender) {
    let sent: Result<(), Over> = async {
        while let Some(frame) = body.frame().await {
            match frame.map(BodyFrame::into_data) {
                Ok(Ok(data)) => sender.data(data).await?,
                // Trailers of a request have no meaning in gRPC.
                Ok(Err(_)) => {}
                Err(error) => {
                    sender.reset(code::CANCELLED, format!("the supervisor gave the call up: {error}"));
                    return Err(Over);
                }
            }
        }
        sender.say(Frame::End(true))
    }
    .await;
    if sent.is_err() {
        tracing::debug!("the rest of a call is not sent: it is over");
    }
}

async fn download(
    receiver: Option<Receiver>,
) -> Option<(Result<BodyFrame<Bytes>, Infallible>, Option<Receiver>)> {
    let mut receiver = receiver?;
    let (frame, rest) = loop {
        match receiver.next().await {
            Some(Said::Data(data)) => break (BodyFrame::data(data), Some(receiver)),
            Some(Said::Trailers(head)) => break (BodyFrame::trailers(grpc::headers(&head)), None),
            Some(Said::Reset(reset)) => {
                let status = grpc::status(reset.code, &reset.message);
                break (BodyFrame::trailers(grpc::headers(&status)), None);
            }
            Some(Said::Headers(_) | Said::End) => {}
            None => {
                let status = grpc::status(code::UNAVAILABLE, "the session hub gave the call up");
                break (BodyFrame::trailers(grpc::headers(&status)), None);
            }
        }
    };
    Some((Ok(frame), rest))
}

fn refusal(code: u32, message: &str) -> Answer {
    let mut answer = Response::new(http_body_util::Empty::new().boxed_unsync());
    *answer.headers_mut() = grpc::headers(&grpc::status(code, message));
    answer.headers_mut().insert("content-type", http::HeaderValue::from_static("application/grpc"));
    answer
}
