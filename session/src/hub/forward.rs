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
use substrate_proto::supervisor::{RelayFrame, relay_frame::Payload};

use super::gateway::{Gateway, Upload, chain};
use crate::grpc::{self, Deframer, Framed};
use crate::mux::{Opened, Receiver, Said, Sender, code};

/// Carries a call to the gateway and its answer back. `claimed` is told the channel that a relay's stream names, `inspect`
/// is shown the answer's message before it is passed on, which it is not when that fails.
pub async fn forward(
    opened: Opened,
    gateway: &Gateway,
    claimed: Option<impl FnOnce(String)>,
    inspect: Option<impl FnOnce(Bytes) -> BoxFuture<'static, Result<(), String>>>,
) {
    let Opened { head, stream } = opened;
    let sender = stream.sender;
    let (upload, answer) = match gateway.call(&head).await {
        Ok(call) => call,
        Err(error) => return sender.reset(code::UNAVAILABLE, error.to_string()),
    };
    let up = carry_up(stream.receiver, upload, claimed);
    let down = async {
        match answer.await {
            Ok(response) => match inspect {
                None => carry_down(response, &sender).await,
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
async fn carry_up(mut receiver: Receiver, upload: Upload, claimed: Option<impl FnOnce(String)>) {
    let mut claim = claimed.map(|claimed| (claimed, Deframer::default()));
    let mut upload = Some(upload);
    while let Some(said) = receiver.next().await {
        match said {
            Said::Data(data) => {
                if let Some((claimed, mut deframer)) = claim.take() {
                    deframer.push(&data);
                    match deframer.take() {
                        Ok(None) => claim = Some((claimed, deframer)),
                        Ok(Some(framed)) => {
                            let first = framed.read::<RelayFrame>().and_then(|frame| frame.payload);
                            if let Some(Payload::Init(init)) = first {
                                claimed(init.channel_id);
                            } else {
                                tracing::debug!("a relay's stream does not begin with its channel");
                            }
                        }
                        Err(error) => tracing::debug!(%error, "a relay's stream begins oddly"),
                    }
                }
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

async fn carry_down(response: http::Response<Incoming>, sender: &Sender) {
    let (parts, mut body) = response.into_parts();
    let head = grpc::head("", &parts.headers);
    if parts.status != http::StatusCode::OK {
        return sender.reset(code::UNAVAILABLE, format!("the gateway answered {}", parts.status));
    }
    // An answer of nothing but a status.
    if parts.headers.contains_key("grpc-status") {
        return last(sender, head);
    }
    if sender.say(Frame::Headers(head)).is_err() {
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
