// SPDX-License-Identifier: Apache-2.0
//! Our stream to the gateway, from its Hello to its end; [`super::control`] decides when there is one.
use std::sync::Arc;

use http_body::Frame as BodyFrame;
use http_body_util::BodyExt as _;
use substrate_proto::session::Head;
use tokio::sync::mpsc;

use super::Session;
use super::control::Event;
use super::gateway::{Gateway, chain};
use crate::grpc::{self, Deframer, Framed};
use crate::mux::code;

/// Opens it with `hello`, tells what the gateway says, and at last how it ended.
pub(super) async fn leg(
    number: u64,
    session: Arc<Session>,
    head: Head,
    hello: Framed,
    from_front: mpsc::Receiver<Framed>,
    events: mpsc::Sender<Event>,
) {
    let (status, message) = converse(number, &session.gateway, &head, hello, from_front, &events).await;
    // The session may be over.
    let _ = events.send(Event::LegEnded(number, status, message)).await;
}

/// Opens the stream at the gateway and reads it to its end; the status it ended with.
async fn converse(
    number: u64,
    gateway: &Gateway,
    head: &Head,
    hello: Framed,
    mut from_front: mpsc::Receiver<Framed>,
    events: &mpsc::Sender<Event>,
) -> (u32, String) {
    let unavailable = |message: String| (code::UNAVAILABLE, message);
    let (upload, answer) = match gateway.call(head).await {
        Ok(call) => call,
        Err(error) => return unavailable(error.to_string()),
    };
    if upload.send(Ok(BodyFrame::data(hello.raw))).await.is_err() {
        return unavailable("the gateway closed the call before the greeting".to_owned());
    }
    let response = match answer.await {
        Ok(response) => response,
        Err(error) => return unavailable(error.to_string()),
    };
    if let Some(status) = grpc::status_of(response.headers()) {
        return status;
    }
    if response.status() != http::StatusCode::OK {
        return unavailable(format!("the gateway answered {}", response.status()));
    }
    let mut body = response.into_body();
    let mut deframer = Deframer::default();
    loop {
        tokio::select! {
            message = from_front.recv() => match message {
                Some(message) => if upload.send(Ok(BodyFrame::data(message.raw))).await.is_err() {
                    return unavailable("the gateway reads no more".to_owned());
                },
                None => return unavailable("given up".to_owned()),
            },
            frame = body.frame() => match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        deframer.push(&data);
                        loop {
                            match deframer.take() {
                                Ok(Some(message)) => if events.send(Event::LegSaid(number, message)).await.is_err() {
                                    return unavailable("given up".to_owned());
                                },
                                Ok(None) => break,
                                Err(error) => return unavailable(error.to_string()),
                            }
                        }
                    }
                    Err(frame) => {
                        let trailers = frame.into_trailers().unwrap_or_default();
                        return grpc::status_of(&trailers).unwrap_or((0, "it ended".to_owned()));
                    }
                },
                Some(Err(error)) => return unavailable(chain(&error)),
                None => return unavailable("it ended".to_owned()),
            },
        }
    }
}
