// SPDX-License-Identifier: Apache-2.0
//! Calls that pass through: heads and bytes as they are.
use std::io;

use bytes::Bytes;
use futures::future::BoxFuture;
use http_body::Frame as BodyFrame;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use substrate_proto::session::Head;
use substrate_proto::session::stream_frame::Frame;

use super::gateway::{Gateway, Upload, chain};
use crate::grpc::{self, Deframer, Framed};
use crate::mux::{Opened, Receiver, Said, Sender, code};

/// What has passed of a call before it is carried.
#[derive(Default)]
pub struct Begun {
    /// What the gateway is to hear first.
    pub first: Vec<Bytes>,
    /// The supervisor has the beginning of an answer.
    pub is_answered: bool,
}

/// Carries a call to the gateway and its answer back. `inspect` is shown the answer's message before it is passed on,
/// which it is not when that fails.
pub async fn forward(
    opened: Opened,
    begun: Begun,
    gateway: &Gateway,
    inspect: Option<impl FnOnce(Bytes) -> BoxFuture<'static, Result<(), String>>>,
) {
    let Opened { head, stream } = opened;
    let sender = stream.sender;
    let (upload, answer) = match gateway.call(&head).await {
        Ok(call) => call,
        Err(error) => return sender.reset(code::UNAVAILABLE, error.to_string()),
    };
    let up = carry_up(begun.first, stream.receiver, upload);
    let down = async {
        match answer.await {
            Ok(response) => match inspect {
                None => carry_down(response, &sender, begun.is_answered).await,
                Some(inspect) => {
                    if let Err((code, reason)) = carry_inspected(response, &sender, inspect).await {
                        sender.reset(code, reason);
                    }
                }
            },
            Err(error) => sender.reset(code::UNAVAILABLE, error.to_string()),
        }
    };
    tokio::pin!(up, down);
    // The first is the call's end: the supervisor gave it up, or it was answered.
    tokio::select! {
        () = &mut up => {}
        () = &mut down => {}
    }
}

/// Ends when the call is over.
async fn carry_up(first: Vec<Bytes>, mut receiver: Receiver, upload: Upload) {
    let mut upload = Some(upload);
    let mut first = first.into_iter().map(Said::Data);
    loop {
        let said = match first.next() {
            Some(said) => said,
            None => match receiver.next().await {
                Some(said) => said,
                None => return,
            },
        };
        match said {
            Said::Data(data) => {
                if let Some(open) = &upload
                    && open.send(Ok(BodyFrame::data(data))).await.is_err()
                {
                    // The gateway has heard enough; its answer says why.
                    upload = None;
                }
            }
            Said::End => upload = None,
            Said::Reset(reset) => {
                if let Some(open) = &upload {
                    // Gone already: nothing to reset.
                    let _ = open.send(Err(io::Error::other(reset.message))).await;
                }
                return;
            }
            Said::Headers(_) | Said::Trailers(_) => {}
        }
    }
}

/// Carries an answer of one message that is looked at first.
async fn carry_inspected(
    response: http::Response<Incoming>,
    sender: &Sender,
    inspect: impl FnOnce(Bytes) -> BoxFuture<'static, Result<(), String>>,
) -> Result<(), (u32, String)> {
    let (parts, body) = response.into_parts();
    let head = grpc::head("", &parts.headers);
    if parts.headers.contains_key("grpc-status") {
        last(sender, head);
        return Ok(());
    }
    let unreadable =
        |reason: String| (code::UNAVAILABLE, format!("the gateway's answer cannot be read: {reason}"));
    let body = http_body_util::Limited::new(body, grpc::MAX_MESSAGE)
        .collect()
        .await
        .map_err(|error| unreadable(error.to_string()))?;
    let trailers = body.trailers().cloned().unwrap_or_default();
    let bytes = body.to_bytes();
    if grpc::status_of(&trailers).is_some_and(|(status, _)| status == 0) {
        let mut deframer = Deframer::default();
        deframer.push(&bytes);
        let message = deframer.take().map_err(|error| unreadable(error.to_string()))?;
        let content = message.as_ref().and_then(Framed::content);
        let content = content.ok_or_else(|| unreadable("it is compressed, or no message".to_owned()))?;
        inspect(content).await.map_err(|reason| (code::UNAVAILABLE, reason))?;
    }
    // Over already: nobody to tell.
    let _ = sender.say(Frame::Headers(head));
    if sender.data(bytes).await.is_ok() {
        last(sender, grpc::head("", &trailers));
    }
    Ok(())
}

async fn carry_down(response: http::Response<Incoming>, sender: &Sender, is_answered: bool) {
    let (parts, mut body) = response.into_parts();
    let head = grpc::head("", &parts.headers);
    if parts.status != http::StatusCode::OK {
        return sender.reset(code::UNAVAILABLE, format!("the gateway answered {}", parts.status));
    }
    // An answer of nothing but a status.
    if parts.headers.contains_key("grpc-status") {
        return last(sender, head);
    }
    if !is_answered && sender.say(Frame::Headers(head)).is_err() {
        return;
    }
    while let Some(frame) = body.frame().await {
        let frame = match frame {
            Ok(frame) => frame,
            Err(error) => {
                return sender
                    .reset(code::UNAVAILABLE, format!("the gateway's answer broke off: {}", chain(&error)));
            }
        };
        match frame.into_data() {
            Ok(data) => {
                if sender.data(data).await.is_err() {
                    return;
                }
            }
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    return last(sender, grpc::head("", &trailers));
                }
            }
        }
    }
    sender.reset(code::INTERNAL, "the gateway's answer ended without a status");
}

fn last(sender: &Sender, head: Head) {
    // Over already: nobody to tell.
    let _ = sender.say(Frame::Trailers(head));
}
