// SPDX-License-Identifier: Apache-2.0
//! Calls that pass through: heads and bytes as they are.
use std::io;

use http_body::Frame as BodyFrame;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use substrate_proto::session::Head;
use substrate_proto::session::stream_frame::Frame;
use substrate_proto::supervisor::{RelayFrame, relay_frame::Payload};

use super::gateway::{Gateway, Upload, chain};
use crate::grpc::{self, Deframer};
use crate::mux::{Opened, Receiver, Said, Sender, code};

/// Carries a call to the gateway and its answer back. `claimed` is told the channel that a relay's stream names.
pub async fn forward(opened: Opened, gateway: &Gateway, claimed: Option<impl FnOnce(String)>) {
    let Opened { head, stream } = opened;
    let sender = stream.sender;
    let (upload, answer) = match gateway.call(&head).await {
        Ok(call) => call,
        Err(error) => return sender.reset(code::UNAVAILABLE, error.to_string()),
    };
    let up = carry_up(stream.receiver, upload, claimed);
    let down = async {
        match answer.await {
            Ok(response) => carry_down(response, &sender).await,
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
