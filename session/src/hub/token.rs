// SPDX-License-Identifier: Apache-2.0
//! The token of a sandbox outlives its life asleep.
//!
//! The gateway mints a sandbox's token; the supervisor holds it in memory and renews it at 80 % of its life, while it is
//! awake. The hub, which sees every call, renews it at 90 %: when nobody in the sandbox did. What the supervisor then
//! holds is old, so the hub puts the newest token in the place of any that *was* this sandbox's: one with which a session
//! was accepted, or that an answer to a renewal carried. A token that was never seen to be good is passed on as it is;
//! nothing in a sandbox gains a right by showing one, and only root in it can read one.
//!
//! What has been held is remembered as digests, with the session (`memory`), so that a hub that comes back still knows.
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http_body::Frame as BodyFrame;
use http_body_util::{BodyExt as _, Limited};
use prost::Message as _;
use ring::digest::{SHA256, digest};
use substrate_proto::session::{Head, Header};
use tokio::sync::Notify;

use super::gateway::Gateway;
use super::{Session, metrics};
use crate::grpc::{self, Deframer, Framed};

/// The call that renews.
pub(crate) const REFRESH: &str = "/openshell.v1.OpenShell/RefreshSandboxToken";
const AUTHORIZATION: &str = "authorization";
const SCHEME: &str = "Bearer ";
/// Header of a remembered head that lists what was held; it never leaves the hub.
const HELD: &str = "substrate-held";
/// Tokens a supervisor may come back with: its first, from the sandbox's file, and its latest.
const MAX_HELD: usize = 8;
/// Share of its life after which a token is renewed here.
const DUE: f64 = 0.9;
/// Between attempts to renew.
const AGAIN: Duration = Duration::from_secs(2);

/// `RefreshSandboxTokenRequest`: no extension services.
#[derive(Clone, PartialEq, prost::Message)]
struct Refresh {}

/// `RefreshSandboxTokenResponse` (proto/openshell.proto at 2f7fb655).
#[derive(Clone, PartialEq, prost::Message)]
struct Refreshed {
    #[prost(string, tag = "1")]
    token: String,
}

/// When a token was issued and expires, as it says itself, unix seconds. Its signature is the gateway's to check.
fn life(token: &str) -> Option<(i64, i64)> {
    let payload = token.split('.').nth(1)?;
    let payload = URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?;
    let claims: serde_json::Value = serde_json::from_slice(&payload).ok()?;
    // 0: it does not expire.
    let expires = claims.get("exp")?.as_i64().filter(|expires| *expires > 0)?;
    Some((claims.get("iat").and_then(serde_json::Value::as_i64).unwrap_or(expires), expires))
}

fn token_of(head: &Head) -> Option<&str> {
    let header = head.headers.iter().find(|header| header.name == AUTHORIZATION)?;
    std::str::from_utf8(&header.value).ok()?.strip_prefix(SCHEME)
}

fn fingerprint(token: &str) -> String {
    URL_SAFE_NO_PAD.encode(digest(&SHA256, token.as_bytes()))
}

/// What is known of one sandbox's tokens.
#[derive(Default)]
struct Known {
    held: Vec<String>,
    latest: Option<String>,
}

impl Known {
    /// A token that the gateway took or gave. `in_sandbox`: the supervisor has it.
    fn good(&mut self, token: &str, in_sandbox: bool) {
        let print = fingerprint(token);
        if in_sandbox && !self.held.contains(&print) {
            if self.held.len() == MAX_HELD {
                self.held.remove(1);
            }
            self.held.push(print);
        }
        let ends = |token: &str| life(token).map_or(i64::MAX, |(_, expires)| expires);
        if self.latest.as_deref().is_none_or(|latest| ends(token) > ends(latest)) {
            self.latest = Some(token.to_owned());
        }
    }

    /// Puts the newest token in the place of one that was this sandbox's.
    fn renew(&self, head: &mut Head) {
        let (Some(shown), Some(latest)) = (token_of(head), &self.latest) else { return };
        if shown != latest && self.held.contains(&fingerprint(shown)) {
            let value = format!("{SCHEME}{latest}").into_bytes();
            for header in head.headers.iter_mut().filter(|header| header.name == AUTHORIZATION) {
                header.value.clone_from(&value);
            }
        }
    }

    /// How long until the newest is to be renewed; none when it does not expire.
    fn due_in(&self, now_secs: f64) -> Option<Duration> {
        let (issued, expires) = life(self.latest.as_deref()?)?;
        let at = issued as f64 + (expires - issued) as f64 * DUE;
        Some(Duration::from_secs_f64((at - now_secs).max(0.0)))
    }
}

/// The tokens of one sandbox.
#[derive(Clone, Default)]
pub(crate) struct Tokens {
    known: Arc<Mutex<Known>>,
    changed: Arc<Notify>,
}

impl Tokens {
    fn with<T>(&self, act: impl FnOnce(&mut Known) -> T) -> T {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let latest = known.latest.clone();
        let result = act(&mut known);
        if known.latest != latest {
            self.changed.notify_one();
        }
        result
    }

    /// The gateway took a call with that head.
    pub(crate) fn accepted(&self, head: &Head) {
        if let Some(token) = token_of(head) {
            // A token of ours was never in the sandbox.
            self.with(|known| {
                let ours = known.latest.as_deref() == Some(token);
                known.good(token, !ours);
            });
        }
    }

    /// An answer to the supervisor's own renewal, which it has read once this returns.
    pub(crate) fn answered(&self, message: &Bytes) {
        if let Ok(refreshed) = Refreshed::decode(message.clone())
            && !refreshed.token.is_empty()
        {
            self.with(|known| known.good(&refreshed.token, true));
        }
    }

    /// The newest token in the place of an old one.
    pub(crate) fn renew(&self, mut head: Head) -> Head {
        self.with(|known| known.renew(&mut head));
        head
    }

    /// A head to be remembered, with what was held.
    pub(crate) fn remembered(&self, head: &Head) -> Head {
        let mut head = self.renew(head.clone());
        let held = self.with(|known| known.held.join(" "));
        head.headers.push(Header { name: HELD.to_owned(), value: held.into_bytes() });
        head
    }

    /// Takes a remembered head in; what is left of it is as it came.
    pub(crate) fn recalled(&self, mut head: Head) -> Head {
        let held = head.headers.iter().position(|header| header.name == HELD);
        let held = held.map(|at| head.headers.remove(at).value).unwrap_or_default();
        self.with(|known| {
            known.held = String::from_utf8_lossy(&held).split_whitespace().map(str::to_owned).collect();
            if let Some(token) = token_of(&head) {
                known.good(token, false);
            }
        });
        head
    }
}

/// Renews a sandbox's token for as long as it has a session; `renewed` is told each time.
pub(crate) async fn renewing(session: Arc<Session>, renewed: impl Fn()) {
    let tokens = &session.tokens;
    loop {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let (due, latest) = tokens.with(|known| (known.due_in(now), known.latest.clone()));
        let (Some(due), Some(latest)) = (due, latest) else {
            tokens.changed.notified().await;
            continue;
        };
        tokio::select! {
            () = tokio::time::sleep(due) => {}
            // The supervisor was first.
            () = tokens.changed.notified() => continue,
        }
        match refresh(&session.gateway, &latest).await {
            Ok(token) => {
                metrics::token(true);
                tracing::debug!(actor = session.uid, "renewed the token of a sandbox");
                tokens.with(|known| known.good(&token, false));
                renewed();
            }
            Err(reason) => {
                metrics::token(false);
                let left = life(&latest).map_or(0, |(_, expires)| expires - now as i64);
                tracing::warn!(actor = session.uid, reason, left, "cannot renew the token of a sandbox");
                if left <= 0 {
                    // Nothing will renew it; one that the supervisor gets may.
                    tokens.changed.notified().await;
                } else {
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }
}

/// Asks the gateway for a fresh token.
async fn refresh(gateway: &Gateway, token: &str) -> Result<String, String> {
    let header = |name: &str, value: String| Header { name: name.to_owned(), value: value.into_bytes() };
    let head = Head {
        path: REFRESH.to_owned(),
        headers: vec![
            header("content-type", "application/grpc".to_owned()),
            header("te", "trailers".to_owned()),
            header(AUTHORIZATION, format!("{SCHEME}{token}")),
        ],
    };
    let (upload, answer) = gateway.call(&head).await.map_err(|error| error.to_string())?;
    let asked = upload.send(Ok(BodyFrame::data(Framed::new(&Refresh {}).raw))).await;
    asked.map_err(|_| "the gateway closed the call".to_owned())?;
    drop(upload);
    let response = answer.await.map_err(|error| error.to_string())?;
    let (parts, body) = response.into_parts();
    let body = Limited::new(body, grpc::MAX_MESSAGE).collect().await.map_err(|error| error.to_string())?;
    let status = body.trailers().and_then(grpc::status_of).or_else(|| grpc::status_of(&parts.headers));
    match status {
        Some((0, _)) => {}
        Some((code, message)) => return Err(format!("status {code}: {message}")),
        None => return Err(format!("no status, HTTP {}", parts.status)),
    }
    let mut deframer = Deframer::default();
    deframer.push(&body.to_bytes());
    let message = deframer.take().map_err(|error| error.to_string())?;
    let token = message.and_then(|message| message.read::<Refreshed>()).unwrap_or_default().token;
    if token.is_empty() { Err("the answer holds no token".to_owned()) } else { Ok(token) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jwt(issued: i64, expires: i64) -> String {
        format!("h.{}.s", URL_SAFE_NO_PAD.encode(format!(r#"{{"iat":{issued},"exp":{expires}}}"#)))
    }

    fn showing(token: &str) -> Head {
        let value = format!("{SCHEME}{token}").into_bytes();
        Head { path: "/x".to_owned(), headers: vec![Header { name: AUTHORIZATION.to_owned(), value }] }
    }

    #[test]
    fn only_a_token_that_was_good_is_replaced_by_the_newest() {
        let tokens = Tokens::default();
        let (first, second, forged) = (jwt(100, 200), jwt(190, 300), jwt(1, 9000));
        // Nothing is known yet, and what is only shown is not believed.
        assert_eq!(tokens.renew(showing(&forged)), showing(&forged));
        tokens.accepted(&showing(&first));
        tokens.with(|known| known.good(&second, false));
        assert_eq!(tokens.renew(showing(&first)), showing(&second));
        assert_eq!(
            tokens.renew(showing(&forged)),
            showing(&forged),
            "one never seen to be good gains nothing"
        );
        // What a supervisor renewed by itself is good too, and newer.
        let third = jwt(290, 400);
        tokens.answered(&Refreshed { token: third.clone() }.encode_to_vec().into());
        assert_eq!(tokens.renew(showing(&first)), showing(&third));
        assert_eq!(tokens.renew(showing(&third)), showing(&third));
    }

    #[test]
    fn what_was_held_is_known_after_a_restart() {
        let tokens = Tokens::default();
        let (first, second) = (jwt(100, 200), jwt(190, 300));
        tokens.accepted(&showing(&first));
        tokens.with(|known| known.good(&second, false));
        let kept = tokens.remembered(&showing(&first));
        assert!(
            !String::from_utf8_lossy(&kept.encode_to_vec()).contains(&first),
            "digests only, of old ones"
        );
        let later = Tokens::default();
        assert_eq!(later.recalled(kept), showing(&second));
        assert_eq!(later.renew(showing(&first)), showing(&second));
    }

    #[test]
    fn a_token_is_due_at_nine_tenths_of_its_life_and_an_endless_one_never() {
        let mut known = Known::default();
        assert_eq!(known.due_in(0.0), None);
        known.good(&jwt(100, 200), true);
        assert_eq!(known.due_in(100.0), Some(Duration::from_secs(90)));
        assert_eq!(known.due_in(500.0), Some(Duration::ZERO));
        for endless in ["opaque".to_owned(), jwt(0, 0)] {
            known = Known::default();
            known.good(&endless, true);
            assert_eq!(known.due_in(0.0), None, "{endless}");
        }
    }

    #[test]
    fn the_first_token_is_never_forgotten() {
        let mut known = Known::default();
        let tokens: Vec<String> = (1..20).map(|at| jwt(at, at + 100)).collect();
        for token in &tokens {
            known.good(token, true);
        }
        assert_eq!(known.held.len(), MAX_HELD);
        for token in [&tokens[0], &tokens[18]] {
            assert!(known.held.contains(&fingerprint(token)));
        }
    }
}
