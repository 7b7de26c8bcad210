// SPDX-License-Identifier: Apache-2.0
//! One request: authenticate, find the actor, wake it if it sleeps, pass the request on, carry the reply back.
//!
//! ```text
//! authenticate (401) ─▶ address (404, 400) ─▶ permitted? (403)
//!    ─▶ route ──RUNNING──▶ connect ──OK──▶ send ──▶ reply
//!         ▲ │                │ STALE, NOT_NOW, worker unreachable: look up again, after a moment
//!         │ └─asleep─▶ park ─▶ wake (once per actor) ─┐
//!         └───────────────────────────────────────────┘      all within `resume_timeout`
//! ```
//!
//! Nothing is woken and nothing is said about an actor before the token was checked (P6). Up to `OK` nothing has
//! reached the actor and every step may be repeated; after it, a request is repeated only if nothing of it was
//! written. A reply that breaks off is 502 with `"retry": true`, or a cut connection when its head is gone.
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::header::{AUTHORIZATION, COOKIE, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, TE};
use http::{Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use substrate_proto::ateapi::ActorState;
use substrate_proto::atenet::IngressOpen;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::address::{self, Key, NoTarget, Target};
use super::answer::Answer;
use super::body::{Fault, Guarded};
use super::reply::{self, Checkpoints, DURABILITY};
use super::routes::{LookUpError, Route, Routes};
use super::upstream::{self, OpenError, SendError, UpBody, Upstream};
use super::wake::{Crowded, WakeError, Waker};
use super::{Body, Limits};
use crate::control::Backoff;
use crate::token::{Grant, Verifier};
use crate::{hop, pipe};

const ATE_AUTHORIZATION: HeaderName = HeaderName::from_static("ate-authorization");
/// How long the worker may take to open a connection.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a request is tried that the actor's side closes its connection on before anything was sent.
const SEND_TRIES: u32 = 5;

pub(crate) struct Router {
    pub(crate) domain: String,
    pub(crate) limits: Limits,
    pub(crate) verifier: Verifier,
    pub(crate) routes: Arc<Routes>,
    pub(crate) waker: Arc<Waker>,
    pub(crate) checkpoints: Arc<Checkpoints>,
    pub(crate) requests: Arc<Semaphore>,
}

/// What is to be done with a request, by the state of its actor.
#[derive(Debug)]
enum Plan {
    Connect,
    Wake,
    /// Answer, after the record was looked up afresh.
    Refuse(Box<Answer>),
}

fn plan(route: &Route) -> Plan {
    let key = &route.key;
    let because = match (route.reason.as_str(), route.message.as_str()) {
        ("", "") => String::new(),
        ("", text) | (text, "") => format!(": {text}"),
        (reason, message) => format!(": {reason}, {message}"),
    };
    let refuse = |error, text: String, verb: &str| {
        let hint = format!("substrate {verb} actor {} --atespace {}", key.name, key.atespace);
        let answer = Answer::new(StatusCode::SERVICE_UNAVAILABLE, error, text);
        Plan::Refuse(Box::new(answer.hint(hint).about(key)))
    };
    match route.state {
        ActorState::Running if !route.endpoint.is_empty() => Plan::Connect,
        ActorState::Running | ActorState::Resuming => Plan::Wake,
        ActorState::New
        | ActorState::Suspended
        | ActorState::Suspending
        | ActorState::Pausing
        | ActorState::Paused => {
            if route.wake_on_traffic {
                Plan::Wake
            } else {
                refuse("asleep", format!("actor {key} sleeps and is not woken by traffic"), "resume")
            }
        }
        ActorState::Exited => {
            let code = route.exit_code.map(|code| format!(" with code {code}")).unwrap_or_default();
            refuse("exited", format!("the workload of actor {key} exited{code}{because}"), "reset")
        }
        ActorState::Crashed => refuse("crashed", format!("actor {key} has crashed{because}"), "reset"),
        ActorState::Deleting => Plan::Refuse(Box::new(unknown(key))),
        ActorState::Unspecified => refuse(
            "unknown_state",
            format!("actor {key} is in a state this router does not know"),
            "describe",
        ),
    }
}

fn unknown(key: &Key) -> Answer {
    Answer::new(StatusCode::NOT_FOUND, "no_such_actor", format!("there is no actor {key}"))
        .hint(format!("substrate get actors --atespace {}", key.atespace))
        .about(key)
}

fn not_found(key: &Key, error: LookUpError) -> Answer {
    match error {
        LookUpError::Unknown => unknown(key),
        LookUpError::Unavailable(message) => Answer::later(
            "control_plane_unavailable",
            format!("the control plane cannot be asked: {message}"),
            Duration::from_secs(1),
        )
        .about(key),
    }
}

impl Router {
    /// Answers one request of a client.
    pub(crate) async fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
        peer: SocketAddr,
    ) -> Response<Body> {
        if request.uri().path() == "/healthz"
            && address::target(request.uri(), request.headers(), &self.domain) == Err(NoTarget::Unaddressed)
        {
            return Response::new(Empty::new().map_err(|never| match never {}).boxed_unsync());
        }
        match self.try_handle(request, peer).await {
            Ok(response) => response,
            Err(answer) => {
                tracing::debug!(
                    error = answer.error, status = answer.status.as_u16(), message = %answer.message,
                    "answered by the router"
                );
                answer.into_response()
            }
        }
    }

    async fn try_handle(
        self: &Arc<Self>,
        mut request: Request<Incoming>,
        peer: SocketAddr,
    ) -> Result<Response<Body>, Answer> {
        let grant = self.authenticate(request.headers_mut())?;
        let target = address::target(request.uri(), request.headers(), &self.domain)
            .map_err(|none| self.no_target(none))?;
        let key = &target.key;
        if !grant.permits(&key.atespace, &key.name) {
            let scope = match &grant.actor {
                Some(actor) => format!("actor {}/{actor}", grant.atespace),
                None => format!("atespace {}", grant.atespace),
            };
            return Err(Answer::new(
                StatusCode::FORBIDDEN,
                "forbidden",
                format!("the token is for {scope}, the request for {key}"),
            )
            .hint(format!("substrate token --atespace {}", key.atespace))
            .about(key));
        }
        if request.method() == Method::CONNECT {
            return Err(Answer::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "connect_not_supported",
                "CONNECT is not supported; a WebSocket or other upgrade over HTTP/1.1 is",
            )
            .about(key));
        }
        let permit = self.requests.clone().try_acquire_owned().map_err(|_| {
            let text = format!("the router has {} requests in flight, its limit", self.limits.requests);
            Answer::later("router_busy", text, Duration::from_secs(1)).about(key)
        })?;
        self.forward(request, &target, peer.ip(), permit).await
    }

    /// Checks the token and removes it from the request.
    fn authenticate(&self, headers: &mut HeaderMap) -> Result<Grant, Answer> {
        let refuse = |message: String| {
            Answer::new(StatusCode::UNAUTHORIZED, "unauthenticated", message).hint(
                "send the header \"ate-authorization: Bearer TOKEN\" with a token from: substrate token --atespace ATESPACE",
            )
        };
        let name = if headers.contains_key(&ATE_AUTHORIZATION) { ATE_AUTHORIZATION } else { AUTHORIZATION };
        let mut values = headers.get_all(&name).iter();
        let value = match (values.next(), values.next()) {
            (Some(value), None) => value,
            (None, _) => return Err(refuse("the request carries no token".into())),
            (Some(_), Some(_)) => return Err(refuse(format!("the header {name} is there more than once"))),
        };
        let token = value
            .to_str()
            .ok()
            .and_then(|text| text.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim())
            .ok_or_else(|| refuse(format!("the header {name} is not \"Bearer TOKEN\"")))?;
        let grant = self.verifier.verify(token).map_err(|error| refuse(error.to_string()))?;
        headers.remove(name);
        Ok(grant)
    }

    fn no_target(&self, none: NoTarget) -> Answer {
        let hint = format!(
            "address an actor as http://ACTOR.ATESPACE.{0}/ (or PORT-ACTOR.ATESPACE.{0}), or with the header \"ate-actor: ATESPACE/ACTOR[:PORT]\"",
            self.domain
        );
        match none {
            NoTarget::Unaddressed => {
                Answer::new(StatusCode::NOT_FOUND, "no_actor_addressed", "the request names no actor")
                    .hint(hint)
            }
            NoTarget::Malformed(reason) => {
                Answer::new(StatusCode::BAD_REQUEST, "malformed_address", reason).hint(hint)
            }
        }
    }

    async fn forward(
        self: &Arc<Self>,
        mut request: Request<Incoming>,
        target: &Target,
        peer: IpAddr,
        permit: OwnedSemaphorePermit,
    ) -> Result<Response<Body>, Answer> {
        let key = &target.key;
        let declared = request
            .headers()
            .get(http::header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.parse::<u64>().ok());
        if declared.is_some_and(|len| len > self.limits.request_body) {
            return Err(self.too_large(key));
        }
        let upgrade =
            (request.version() == Version::HTTP_11).then(|| hop::upgrade(request.headers())).flatten();
        let client_upgrade = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
        let (mut head, body) = request.into_parts();
        rewrite(&mut head, peer, upgrade.as_ref());
        let (body, fault) = Guarded::new(body, self.limits.request_body, self.limits.idle);
        let mut outgoing: Request<UpBody> = Request::from_parts(head, body.boxed_unsync());

        let deadline = Instant::now() + self.limits.resume_timeout;
        let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(500));
        let mut tries = 0;
        let (route, upstream, response) = loop {
            tries += 1;
            let (route, stream) = self.connect(target, deadline, &mut backoff).await?;
            let mut upstream = Upstream::start(stream, self.limits.header_bytes)
                .await
                .map_err(|error| Answer::interrupted(error.to_string()).about(key))?;
            match tokio::time::timeout(self.limits.reply_head, upstream.send(outgoing)).await {
                Ok(Ok(response)) => break (route, upstream, response),
                Ok(Err(SendError { error, unsent: Some(request) }))
                    if tries < SEND_TRIES && Instant::now() < deadline =>
                {
                    tracing::debug!(actor = %key, %error, "nothing was sent, trying again");
                    outgoing = request;
                    tokio::time::sleep(backoff.step()).await;
                }
                Ok(Err(SendError { error, .. })) => return Err(self.not_answered(key, &fault, &error)),
                Err(_) => {
                    return Err(Answer::new(
                        StatusCode::GATEWAY_TIMEOUT,
                        "reply_timeout",
                        format!("actor {key} sent no reply within {:?}", self.limits.reply_head),
                    )
                    .about(key));
                }
            }
        };
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let Some(client) = client_upgrade else {
                return Err(Answer::interrupted("the actor changed protocols unasked").about(key));
            };
            return Ok(self.switch(route, client, upstream, response, permit));
        }
        let limits = reply::Limits { idle: self.limits.idle };
        reply::carry(&self.checkpoints, route, upstream, response, limits, permit).await
    }

    fn too_large(&self, key: &Key) -> Answer {
        Answer::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body_too_large",
            format!("the request's body is longer than {} bytes", self.limits.request_body),
        )
        .about(key)
    }

    fn not_answered(&self, key: &Key, fault: &Fault, error: &hyper::Error) -> Answer {
        if fault.too_large() {
            return self.too_large(key);
        }
        if fault.idle() {
            return Answer::new(
                StatusCode::REQUEST_TIMEOUT,
                "body_timeout",
                format!("nothing of the request's body came for {:?}", self.limits.idle),
            )
            .about(key);
        }
        Answer::interrupted(format!(
            "the connection to actor {key} broke before it answered ({error}); it is not known whether the request \
             took effect"
        ))
        .about(key)
    }

    /// Finds the actor awake and opens a connection to it.
    async fn connect(
        &self,
        target: &Target,
        deadline: Instant,
        backoff: &mut Backoff,
    ) -> Result<(Arc<Route>, tokio::net::UnixStream), Answer> {
        let key = &target.key;
        let mut parked = None;
        let mut route = self.routes.find(key).await.map_err(|error| not_found(key, error))?;
        let mut fresh = false;
        let mut waiting_for;
        loop {
            let waiter = self.routes.waiter(key);
            let mut changed = std::pin::pin!(waiter.notified());
            changed.as_mut().enable();
            match plan(&route) {
                Plan::Refuse(answer) if fresh => return Err(*answer),
                Plan::Refuse(_) => {
                    route = self.look_up(key).await?;
                    fresh = true;
                    continue;
                }
                Plan::Wake => {
                    self.park(key, &mut parked)?;
                    let woken = tokio::time::timeout_at(deadline, self.waker.wake(&route)).await;
                    route = woken
                        .map_err(|_| self.too_slow(key, "it is being woken"))?
                        .map_err(|error| not_woken(key, error))?;
                    fresh = true;
                    if matches!(plan(&route), Plan::Connect) {
                        continue;
                    }
                    waiting_for = "it is not running yet".to_owned();
                }
                Plan::Connect => {
                    let ask = IngressOpen {
                        actor_uid: route.uid.clone(),
                        generation: route.generation,
                        port: u32::from(target.port),
                        ..IngressOpen::default()
                    };
                    let error = match upstream::open(&route.endpoint, ask, OPEN_TIMEOUT).await {
                        Ok(stream) => return Ok((route, stream)),
                        Err(OpenError::Refused(message)) => {
                            return Err(nothing_listens(target, &message));
                        }
                        Err(error) => error,
                    };
                    tracing::debug!(actor = %key, generation = route.generation, %error, "looking the route up again");
                    self.park(key, &mut parked)?;
                    let later = self.look_up(key).await?;
                    fresh = true;
                    let moved = later.revision != route.revision
                        && (later.generation != route.generation || later.state != route.state);
                    route = later;
                    if moved && Instant::now() < deadline {
                        continue;
                    }
                    waiting_for = error.to_string();
                }
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(self.too_slow(key, &waiting_for));
            }
            let pause = backoff.step().min(deadline - now);
            if tokio::time::timeout(pause, changed).await.is_ok()
                && let Some(later) = self.routes.get(key)
            {
                route = later;
            } else {
                route = self.look_up(key).await?;
            }
        }
    }

    fn park(&self, key: &Key, parked: &mut Option<super::wake::Parked>) -> Result<(), Answer> {
        if parked.is_none() {
            *parked = Some(self.waker.park(key).map_err(|crowded| {
                let text = match crowded {
                    Crowded::Actor(limit) => format!("{limit} requests already wait for actor {key} to wake"),
                    Crowded::Router(limit) => format!("{limit} requests already wait for actors to wake"),
                };
                Answer::later("too_many_waiting", text, Duration::from_secs(1)).about(key)
            })?);
        }
        Ok(())
    }

    async fn look_up(&self, key: &Key) -> Result<Arc<Route>, Answer> {
        self.routes.look_up(key).await.map_err(|error| not_found(key, error))
    }

    fn too_slow(&self, key: &Key, waiting_for: &str) -> Answer {
        Answer::later(
            "not_awake_in_time",
            format!(
                "actor {key} could not be reached within {:?}: {waiting_for}",
                self.limits.resume_timeout
            ),
            Duration::from_secs(5),
        )
        .hint(format!("substrate describe actor {} --atespace {}", key.name, key.atespace))
        .about(key)
    }

    /// Passes 101 on and carries the bytes that follow.
    fn switch(
        &self,
        route: Arc<Route>,
        client: hyper::upgrade::OnUpgrade,
        upstream: Upstream,
        response: Response<Incoming>,
        permit: OwnedSemaphorePermit,
    ) -> Response<Body> {
        let protocol = hop::upgrade(response.headers());
        let (mut head, body) = response.into_parts();
        let actor = hyper::upgrade::on(Response::from_parts(head.clone(), body));
        hop::strip(&mut head.headers);
        reply::strip_ate(&mut head.headers);
        head.headers.insert(http::header::CONNECTION, HeaderValue::from_static("upgrade"));
        if let Some(protocol) = protocol {
            head.headers.insert(http::header::UPGRADE, protocol);
        }
        if route.checkpoint.is_some() {
            head.headers.insert(DURABILITY, HeaderValue::from_static("async"));
        }
        let idle = self.limits.idle;
        tokio::spawn(async move {
            let _permit = permit;
            let (client, actor) = match tokio::try_join!(client, actor) {
                Ok(both) => both,
                Err(error) => {
                    tracing::debug!(actor = %route.key, %error, "an upgrade broke off");
                    return;
                }
            };
            drop(upstream);
            let traffic = pipe::Traffic::new();
            let (mut client, mut actor) = (TokioIo::new(client), TokioIo::new(actor));
            let end = pipe::both_ways(&mut client, &mut actor, idle, &traffic, |_| Ok(())).await;
            tracing::debug!(
                actor = %route.key, ?end, sent = traffic.sent(), received = traffic.received(),
                "an upgraded connection ended"
            );
        });
        Response::from_parts(head, Empty::new().map_err(|never| match never {}).boxed_unsync())
    }
}

fn not_woken(key: &Key, error: WakeError) -> Answer {
    match error {
        WakeError::Unknown => unknown(key),
        WakeError::Full { message, after } => {
            Answer::later("no_capacity", message, after).hint("substrate get workers").about(key)
        }
        WakeError::TooOften { after } => Answer {
            status: StatusCode::TOO_MANY_REQUESTS,
            ..Answer::later("woken_too_often", format!("actor {key} was woken too often of late"), after)
        }
        .about(key),
        WakeError::Refused(message) => Answer::new(StatusCode::SERVICE_UNAVAILABLE, "not_resumed", message)
            .hint(format!("substrate describe actor {} --atespace {}", key.name, key.atespace))
            .about(key),
        WakeError::Failed(message) => Answer::later("not_resumed", message, Duration::from_secs(2))
            .hint(format!("substrate describe actor {} --atespace {}", key.name, key.atespace))
            .about(key),
    }
}

fn nothing_listens(target: &Target, message: &str) -> Answer {
    let key = &target.key;
    let port = match target.port {
        0 => "its default port".to_owned(),
        port => format!("port {port}"),
    };
    let detail = if message.is_empty() { String::new() } else { format!(" ({message})") };
    Answer::new(
        StatusCode::BAD_GATEWAY,
        "nothing_listens",
        format!("actor {key} runs, but nothing in it listens on {port}{detail}"),
    )
    .hint(format!("substrate logs {} --atespace {}", key.name, key.atespace))
    .about(key)
}

/// Makes the client's request one to the actor: origin form, `host`, forwarding headers, nothing of this hop.
fn rewrite(head: &mut http::request::Parts, peer: IpAddr, upgrade: Option<&HeaderValue>) {
    let host = head
        .uri
        .authority()
        .and_then(|authority| HeaderValue::from_str(authority.as_str()).ok())
        .or_else(|| head.headers.get(HOST).cloned());
    let path = head.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    head.uri = path.parse().unwrap_or_else(|_| Uri::from_static("/"));
    head.version = Version::HTTP_11;
    let trailers = head.headers.get(TE).is_some_and(|value| {
        value
            .to_str()
            .is_ok_and(|list| list.split(',').any(|item| item.trim().eq_ignore_ascii_case("trailers")))
    });
    hop::strip(&mut head.headers);
    reply::strip_ate(&mut head.headers);
    join_cookies(&mut head.headers);
    // The router itself says "100 Continue" when the actor's side begins to read the body.
    head.headers.remove(EXPECT);
    if trailers {
        head.headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    let chain = match head.headers.get("x-forwarded-for").and_then(|value| value.to_str().ok()) {
        Some(before) => format!("{before}, {peer}"),
        None => peer.to_string(),
    };
    head.headers.remove("x-forwarded-for");
    if let Ok(chain) = HeaderValue::from_str(&chain) {
        head.headers.insert("x-forwarded-for", chain);
    }
    head.headers.insert("x-forwarded-proto", HeaderValue::from_static("http"));
    head.headers.remove("x-forwarded-host");
    if let Some(host) = host {
        head.headers.insert("x-forwarded-host", host.clone());
        head.headers.insert(HOST, host);
    }
    match upgrade {
        Some(protocol) => {
            head.headers.insert(http::header::CONNECTION, HeaderValue::from_static("upgrade"));
            head.headers.insert(http::header::UPGRADE, protocol.clone());
        }
        // One request per connection: it must not stay open after its reply.
        None => {
            head.headers.insert(http::header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

/// HTTP/2 may split cookies over several headers, HTTP/1.1 may not (RFC 9113 section 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let crumbs: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if crumbs.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..]))
    {
        headers.insert(COOKIE, joined);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(request: Request<()>, upgrade: Option<&str>) -> http::request::Parts {
        let (mut head, ()) = request.into_parts();
        let upgrade = upgrade.map(|value| HeaderValue::from_str(value).unwrap());
        rewrite(&mut head, "10.0.0.9".parse().unwrap(), upgrade.as_ref());
        head
    }

    #[test]
    fn a_request_is_made_one_to_the_actor() {
        let request = Request::builder()
            .version(Version::HTTP_2)
            .uri("http://a.t.actors.localhost:8480/x?y=1")
            .header("ate-actor", "t/b")
            .header("ate-anything", "1")
            .header("cookie", "a=1")
            .header("cookie", "b=2")
            .header("te", "gzip, trailers")
            .header("x-forwarded-for", "1.2.3.4")
            .header("x-forwarded-proto", "https")
            .header("x-forwarded-host", "spoofed")
            .body(())
            .unwrap();
        let head = rewritten(request, None);
        assert_eq!(head.uri, "/x?y=1");
        assert_eq!(head.version, Version::HTTP_11);
        let get = |name: &str| {
            let all: Vec<_> =
                head.headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect();
            all.join(" | ")
        };
        assert_eq!(get("host"), "a.t.actors.localhost:8480");
        assert_eq!(get("x-forwarded-host"), "a.t.actors.localhost:8480");
        assert_eq!(get("x-forwarded-for"), "1.2.3.4, 10.0.0.9");
        assert_eq!(get("x-forwarded-proto"), "http");
        assert_eq!(
            (get("cookie"), get("te"), get("connection")),
            ("a=1; b=2".into(), "trailers".into(), "close".into())
        );
        assert!(!head.headers.keys().any(|name| name.as_str().starts_with("ate-")));
    }

    #[test]
    fn an_upgrade_keeps_its_two_headers() {
        let request = Request::builder()
            .uri("/ws")
            .header("host", "h")
            .header("connection", "Upgrade")
            .header("upgrade", "websocket")
            .body(())
            .unwrap();
        let head = rewritten(request, Some("websocket"));
        assert_eq!(head.headers["connection"], "upgrade");
        assert_eq!(head.headers["upgrade"], "websocket");
    }

    #[test]
    fn every_state_has_its_plan() {
        use ActorState as S;
        let route = |state: ActorState, wake: bool, endpoint: &str| {
            Route::from_actor(substrate_proto::ateapi::Actor {
                state: state.into(),
                wake_on_traffic: wake,
                ingress_endpoint: endpoint.into(),
                ..Default::default()
            })
        };
        let of = |state, wake, endpoint| match plan(&route(state, wake, endpoint)) {
            Plan::Connect => "connect",
            Plan::Wake => "wake",
            Plan::Refuse(answer) => answer.error,
        };
        assert_eq!(of(S::Running, false, "unix:/x"), "connect");
        assert_eq!(of(S::Running, false, ""), "wake");
        assert_eq!(of(S::Resuming, false, ""), "wake");
        for state in [S::New, S::Suspended, S::Suspending, S::Paused, S::Pausing] {
            assert_eq!(of(state, true, "unix:/x"), "wake", "{state:?}");
            assert_eq!(of(state, false, ""), "asleep", "{state:?}");
        }
        assert_eq!(of(S::Exited, true, ""), "exited");
        assert_eq!(of(S::Crashed, true, ""), "crashed");
        assert_eq!(of(S::Deleting, true, ""), "no_such_actor");
        assert_eq!(of(S::Unspecified, true, ""), "unknown_state");
    }
}
