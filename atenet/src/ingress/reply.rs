// SPDX-License-Identifier: Apache-2.0
//! Carrying a reply back, and what `checkpoint.onReply` does to its end.
//!
//! * no policy, `async`: the reply streams; `async` asks for a checkpoint when it is complete.
//! * `sync`, up to 64 KiB: held whole, so that the header `ate-durability` is right.
//! * `sync`, longer: streams one block behind; the last block and the end are held, `ate-durability` is a trailer.
//! * `sync`, `text/event-stream` or JSON by the line: events pass at once (each is useless late); only the end is held.
//!
//! A reply that must not be released is answered 502 when its head is still here, else the client's connection is
//! cut before its end.
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, TRAILER};
use http::response::Parts;
use http::{Response, Version};
use http_body::Body as _;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use substrate_proto::ateapi::{ActorRef, ActorState, CheckpointActorRequest, ReportFallbackRequest};
use substrate_proto::atenet::IngressOpen;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic_types::StatusExt as _;

use super::Body;
use super::address::Key;
use super::answer::Answer;
use super::hold::{Attempt, Hold, Next, Sight};
use super::routes::{LookUpError, Route, Routes};
use super::upstream::{self, OpenError, Upstream};
use crate::control::{Backoff, Control};

/// Replies up to this length are held whole, bytes.
const HELD_WHOLE: usize = 64 << 10;
/// Header or trailer that says whether a reply survives the loss of its worker: `sync` or `async`.
pub(crate) const DURABILITY: HeaderName = HeaderName::from_static("ate-durability");
const SYNC: HeaderValue = HeaderValue::from_static("sync");
const ASYNC: HeaderValue = HeaderValue::from_static("async");
/// Replies that fall back within this time are one event.
const TOLD_TOGETHER: Duration = Duration::from_secs(1);
/// tcpmux: never in use.
const PROBE_PORT: u32 = 1;
/// How long the worker may take to say whether it still holds the copy.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Checkpoints for replies.
pub(crate) struct Checkpoints {
    control: Control,
    routes: Arc<Routes>,
    /// Actors whose `async` checkpoint is under way, and whether another reply came meanwhile.
    running: Mutex<HashMap<String, bool>>,
    /// Actors of whom replies that fell back are yet to be told, and how many.
    fallbacks: Mutex<HashMap<String, u32>>,
}

impl Checkpoints {
    pub(crate) fn new(control: Control, routes: Arc<Routes>) -> Arc<Self> {
        Arc::new(Self { control, routes, running: Mutex::default(), fallbacks: Mutex::default() })
    }

    /// Tells the control plane of a reply that fell back; those within a moment are told together.
    fn fell_back(self: &Arc<Self>, hold: &Hold, reason: String) {
        let mut fallbacks = self.fallbacks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(replies) = fallbacks.get_mut(&hold.uid) {
            *replies += 1;
            return;
        }
        fallbacks.insert(hold.uid.clone(), 1);
        drop(fallbacks);
        let (this, actor_uid, generation) = (self.clone(), hold.uid.clone(), hold.generation);
        tokio::spawn(async move {
            tokio::time::sleep(TOLD_TOGETHER).await;
            let replies = this.fallbacks.lock().unwrap_or_else(PoisonError::into_inner).remove(&actor_uid);
            let request =
                ReportFallbackRequest { actor_uid, generation, reason, replies: replies.unwrap_or(1) };
            if let Err(error) = this.control.clone().report_fallback(request).await {
                tracing::warn!(%error, "cannot tell the control plane of replies that fell back to async");
            }
        });
    }

    /// Asks for one without waiting; those asked for while one is under way become one more.
    fn request(self: &Arc<Self>, hold: Hold, key: Key) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(again) = running.get_mut(&hold.uid) {
            *again = true;
            return;
        }
        running.insert(hold.uid.clone(), false);
        drop(running);
        let this = self.clone();
        tokio::spawn(async move {
            loop {
                match this.attempt(&hold, Duration::from_mins(1)).await {
                    Attempt::Committed { .. } => {}
                    attempt => tracing::warn!(actor = %key, ?attempt, "checkpoint after a reply failed"),
                }
                let mut running = this.running.lock().unwrap_or_else(PoisonError::into_inner);
                if running.get(&hold.uid) != Some(&true) {
                    running.remove(&hold.uid);
                    return;
                }
                running.insert(hold.uid.clone(), false);
            }
        });
    }

    async fn attempt(&self, hold: &Hold, limit: Duration) -> Attempt {
        let actor = ActorRef { uid: hold.uid.clone(), ..Default::default() };
        let request = CheckpointActorRequest {
            actor: Some(actor),
            durability: hold.policy.durability.into(),
            generation: hold.generation,
            max_heap: hold.policy.max_heap,
            request_id: String::new(),
        };
        let mut control = self.control.clone();
        match tokio::time::timeout(limit, control.checkpoint_actor(request)).await {
            Err(_) => Attempt::TooSlow,
            Ok(Ok(response)) => {
                let answer = response.into_inner();
                let Some(snapshot) = answer.snapshot else {
                    return Attempt::Failed("the control plane's answer names no snapshot".into());
                };
                let lives = answer.actor.is_some_and(|actor| {
                    use ActorState::{Pausing, Running, Suspending};
                    matches!(actor.state(), Running | Suspending | Pausing)
                });
                let ended = matches!(snapshot.cause.as_str(), "suspend" | "pause");
                Attempt::Committed {
                    generation: snapshot.generation,
                    durability: snapshot.durability(),
                    certain: lives || ended,
                }
            }
            Ok(Err(status)) => {
                let message = status.message().to_owned();
                let info = status.get_details_error_info();
                match status.code() {
                    Code::ResourceExhausted if info.is_none_or(|info| info.reason == "HEAP_TOO_LARGE") => {
                        Attempt::TooLarge(message)
                    }
                    // What no other moment changes; all else, a refused checkpoint too, is tried again within maxHold.
                    Code::Unimplemented
                    | Code::InvalidArgument
                    | Code::NotFound
                    | Code::PermissionDenied
                    | Code::Unauthenticated => Attempt::Failed(message),
                    _ => Attempt::Transient(message),
                }
            }
        }
    }

    /// Holds a complete reply until it may go. `Ok(true)`: sync, `Ok(false)`: async, `Err`: never.
    async fn settle(self: &Arc<Self>, hold: &Hold, route: &Route) -> Result<bool, String> {
        let complete = Instant::now();
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(200));
        loop {
            let left = hold.policy.max_hold.saturating_sub(complete.elapsed());
            let attempt = self.attempt(hold, left).await;
            let mut next = hold.after_attempt(&attempt);
            if next == Next::Look {
                let sight = self.look(hold, route).await;
                next = hold.after_look(&attempt, &sight, complete.elapsed());
            }
            match next {
                Next::Release(Ok(())) => return Ok(true),
                Next::Release(Err(reason)) => {
                    tracing::warn!(
                        actor = %route.key, generation = hold.generation, %reason,
                        "checkpoint.onReply fell back to async"
                    );
                    self.fell_back(hold, reason.clone());
                    return Ok(false);
                }
                Next::Withhold(reason) => {
                    tracing::warn!(
                        actor = %route.key, generation = hold.generation, %reason, "withheld a reply"
                    );
                    return Err(reason);
                }
                Next::Again | Next::Look => {
                    let waiter = self.routes.waiter(&route.key);
                    let changed = waiter.notified();
                    let left = hold.policy.max_hold.saturating_sub(complete.elapsed());
                    let _ = tokio::time::timeout(backoff.step().min(left), changed).await;
                }
            }
        }
    }

    async fn look(&self, hold: &Hold, route: &Route) -> Sight {
        match self.routes.look_up(&route.key).await {
            Ok(now) => hold.sight(&now),
            Err(LookUpError::Unknown) => Sight::Gone("the actor was deleted".into()),
            Err(LookUpError::Unavailable(_)) => {
                let answered = probe(route).await;
                let worker_answers =
                    matches!(answered, Ok(()) | Err(OpenError::NotNow(_) | OpenError::Refused(_)));
                Sight::Unknown { worker_answers }
            }
        }
    }
}

/// Asks the worker whether it still holds this copy, through a port that nobody listens on.
async fn probe(route: &Route) -> Result<(), OpenError> {
    let ask = IngressOpen {
        actor_uid: route.uid.clone(),
        generation: route.generation,
        port: PROBE_PORT,
        ..IngressOpen::default()
    };
    upstream::open(&route.endpoint, ask, PROBE_TIMEOUT).await.map(drop)
}

/// The end of a reply without length or chunks is the end of its connection, which looks the same when the worker is
/// lost: believe it only while the copy is there.
async fn believe(route: &Route, close_delimited: bool) -> Result<(), String> {
    if !close_delimited {
        return Ok(());
    }
    match probe(route).await {
        Ok(()) | Err(OpenError::Refused(_)) => Ok(()),
        Err(error) => Err(format!("it may have ended early: {error}")),
    }
}

/// What happens at the end of a reply.
enum Ending {
    Nothing,
    Checkpoint(Hold),
    Hold(Hold),
}

/// Bounds of one reply.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Longest silence of either side.
    pub(crate) idle: Duration,
}

/// Turns an actor's reply into the router's. `held` lives until the reply has ended (permits, counts).
pub(crate) async fn carry(
    checkpoints: &Arc<Checkpoints>,
    route: Arc<Route>,
    upstream: Upstream,
    response: Response<Incoming>,
    limits: Limits,
    held: impl Send + 'static,
) -> Result<Response<Body>, Answer> {
    let (mut head, body) = response.into_parts();
    let close_delimited = !body.is_end_stream()
        && body.size_hint().exact().is_none()
        && !head.headers.contains_key(http::header::TRANSFER_ENCODING);
    sanitize(&mut head);
    let ending = match &route.checkpoint {
        None => Ending::Nothing,
        Some(policy) => {
            let hold = Hold { uid: route.uid.clone(), generation: route.generation, policy: policy.clone() };
            if policy.sync { Ending::Hold(hold) } else { Ending::Checkpoint(hold) }
        }
    };
    let mut start = Vec::new();
    let mut body = body;
    match &ending {
        Ending::Nothing => {}
        Ending::Checkpoint(_) => {
            head.headers.insert(DURABILITY, ASYNC);
        }
        Ending::Hold(hold) => {
            if !is_event_stream(&head.headers) {
                let collected = match collect(&mut body, limits.idle).await {
                    Ok(whole @ Collected::Whole(..)) => {
                        believe(&route, close_delimited).await.map(|()| whole)
                    }
                    other => other,
                };
                match collected {
                    Ok(Collected::Whole(bytes, trailers)) => {
                        upstream.close().await;
                        let sync = checkpoints
                            .settle(hold, &route)
                            .await
                            .map_err(|reason| withheld(&route.key, &reason))?;
                        head.headers.insert(DURABILITY, if sync { SYNC } else { ASYNC });
                        return Ok(Response::from_parts(head, whole(bytes, trailers)));
                    }
                    Ok(Collected::Longer(frames)) => start = frames,
                    Err(reason) => {
                        return Err(Answer::interrupted(format!(
                            "the actor's reply broke off: {reason}; it is not known whether the request took effect"
                        ))
                        .about(&route.key));
                    }
                }
            }
            if !head.headers.contains_key(CONTENT_LENGTH) {
                head.headers.append(TRAILER, HeaderValue::from_static("ate-durability"));
            }
        }
    }
    let (send, receive) = mpsc::channel(1);
    let behind = !is_event_stream(&head.headers);
    let mut pump = Pump { out: send, idle: limits.idle, last: None, behind };
    let checkpoints = checkpoints.clone();
    tokio::spawn(async move {
        let _held = held;
        let streamed = match pump.stream(start, body, &ending).await {
            Ok(trailers) => believe(&route, close_delimited).await.map(|()| trailers).map_err(Broken::Reply),
            broken => broken,
        };
        match streamed {
            Ok(trailers) => {
                upstream.close().await;
                pump.finish(trailers, ending, &checkpoints, &route).await;
            }
            Err(Broken::Client) => {}
            Err(Broken::Reply(reason)) => {
                tracing::debug!(actor = %route.key, %reason, "a reply broke off");
                pump.cut(&reason).await;
            }
        }
    });
    let body = StreamBody::new(ReceiverStream::new(receive)).boxed_unsync();
    Ok(Response::from_parts(head, body))
}

fn withheld(key: &Key, reason: &str) -> Answer {
    Answer::interrupted(format!(
        "the actor answered, but its worker was lost before the answer's effects were saved ({reason}); the answer \
         is withheld, ask again"
    ))
    .about(key)
}

fn sanitize(head: &mut Parts) {
    crate::hop::strip(&mut head.headers);
    strip_ate(&mut head.headers);
    head.version = Version::HTTP_11;
}

/// `ate-*` is the router's own namespace in both directions.
pub(crate) fn strip_ate(headers: &mut HeaderMap) {
    let ours: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with("ate-")).cloned().collect();
    for name in ours {
        headers.remove(name);
    }
}

/// Types whose readers act on each part as it comes: server-sent events, and JSON by the line (model servers).
const EVENT_STREAMS: [&str; 5] = [
    "text/event-stream",
    "application/x-ndjson",
    "application/ndjson",
    "application/jsonl",
    "application/json-seq",
];

fn is_event_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    EVENT_STREAMS.iter().any(|known| essence.eq_ignore_ascii_case(known))
}

#[cfg(test)]
#[test]
fn streams_of_events_are_told_by_their_type_alone() {
    for (kind, streams) in [
        ("text/event-stream", true),
        ("Text/Event-Stream; charset=utf-8", true),
        ("application/x-ndjson", true),
        ("application/json", false),
        ("text/event-streams", false),
    ] {
        let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(kind))]);
        assert_eq!(is_event_stream(&headers), streams, "{kind}");
    }
}

enum Collected {
    Whole(Bytes, Option<HeaderMap>),
    Longer(Vec<Bytes>),
}

async fn collect(body: &mut Incoming, idle: Duration) -> Result<Collected, String> {
    let mut frames = Vec::new();
    let mut len = 0;
    let mut trailers = None;
    while let Some(frame) = next_frame(body, idle).await? {
        match frame.into_data() {
            Ok(data) => {
                len += data.len();
                frames.push(data);
                if len > HELD_WHOLE {
                    return Ok(Collected::Longer(frames));
                }
            }
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    let mut whole = BytesMut::with_capacity(len);
    for data in frames {
        whole.extend_from_slice(&data);
    }
    Ok(Collected::Whole(whole.freeze(), trailers))
}

async fn next_frame(body: &mut Incoming, idle: Duration) -> Result<Option<Frame<Bytes>>, String> {
    match tokio::time::timeout(idle, body.frame()).await {
        Err(_) => Err(format!("the actor sent nothing for {idle:?}")),
        Ok(None) => Ok(None),
        Ok(Some(Ok(frame))) => Ok(Some(frame)),
        Ok(Some(Err(error))) => Err(error.to_string()),
    }
}

fn whole(bytes: Bytes, trailers: Option<HeaderMap>) -> Body {
    let body = Full::new(bytes).map_err(|never| match never {});
    match trailers {
        None => body.boxed_unsync(),
        Some(trailers) => body.with_trailers(std::future::ready(Some(Ok(trailers)))).boxed_unsync(),
    }
}

enum Broken {
    /// The client left or reads too slowly.
    Client,
    /// The actor's side broke off.
    Reply(String),
}

struct Pump {
    out: mpsc::Sender<io::Result<Frame<Bytes>>>,
    idle: Duration,
    /// The block that is held back.
    last: Option<Bytes>,
    behind: bool,
}

impl Pump {
    async fn stream(
        &mut self,
        start: Vec<Bytes>,
        mut body: Incoming,
        ending: &Ending,
    ) -> Result<Option<HeaderMap>, Broken> {
        let behind = self.behind && matches!(ending, Ending::Hold(_));
        for data in start {
            self.data(data, behind).await?;
        }
        let mut trailers = None;
        while !body.is_end_stream() {
            let out = self.out.clone();
            let frame = tokio::select! {
                frame = next_frame(&mut body, self.idle) => frame.map_err(Broken::Reply)?,
                () = out.closed() => return Err(Broken::Client),
            };
            let Some(frame) = frame else { break };
            match frame.into_data() {
                Ok(data) => self.data(data, behind).await?,
                Err(frame) => trailers = frame.into_trailers().ok(),
            }
        }
        Ok(trailers)
    }

    async fn data(&mut self, data: Bytes, behind: bool) -> Result<(), Broken> {
        let ready = if behind { self.last.replace(data) } else { Some(data) };
        match ready {
            Some(data) => self.send(Ok(Frame::data(data))).await,
            None => Ok(()),
        }
    }

    async fn send(&self, frame: io::Result<Frame<Bytes>>) -> Result<(), Broken> {
        match tokio::time::timeout(self.idle, self.out.send(frame)).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Broken::Client),
        }
    }

    async fn finish(
        &mut self,
        trailers: Option<HeaderMap>,
        ending: Ending,
        checkpoints: &Arc<Checkpoints>,
        route: &Route,
    ) {
        let mut trailers = trailers;
        match ending {
            Ending::Nothing => {}
            Ending::Checkpoint(hold) => checkpoints.request(hold, route.key.clone()),
            Ending::Hold(hold) => match checkpoints.settle(&hold, route).await {
                Ok(sync) => {
                    trailers.get_or_insert_default().insert(DURABILITY, if sync { SYNC } else { ASYNC });
                }
                Err(reason) => return self.cut(&reason).await,
            },
        }
        if let Some(last) = self.last.take()
            && self.send(Ok(Frame::data(last))).await.is_err()
        {
            return;
        }
        if let Some(trailers) = trailers {
            // Lost when the client did not ask for trailers or has left.
            let _ = self.send(Ok(Frame::trailers(trailers))).await;
        }
    }

    /// Ends the client's connection so that the reply cannot be taken for complete.
    async fn cut(&self, reason: &str) {
        let _ = self.send(Err(io::Error::other(reason.to_owned()))).await;
    }
}
