// SPDX-License-Identifier: Apache-2.0
//! The actor endpoint: what a workload may ask of its slot by HTTP at `http://169.254.17.1`.
//!
//! | Request | Effect |
//! |---|---|
//! | `PUT /v1/busy?for=60s` | not suspended as idle for so long (at most 1h; asking again replaces it) |
//! | `DELETE /v1/busy` | the hold is over |
//! | `GET /v1/identity` | `{"actor", "atespace", "uid", "generation"}` |
//!
//! It never offers life-cycle verbs, and who asks is known by the slot, not by what is said.
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::network::{WORKER_V4, WORKER_V6};
use crate::occupancy::Occupancy;
use crate::readiness::parse_duration;
use crate::sockets::{self, bind_tcp};

/// Longest busy hold.
pub const LONGEST_HOLD: Duration = Duration::from_hours(1);
const MAX_CONNECTIONS: usize = 32;
const HEADER_LIMIT: Duration = Duration::from_secs(5);

/// Listens on the endpoint's addresses and serves until the process ends.
///
/// # Errors
/// When an address cannot be bound.
pub fn serve(occupancy: &Occupancy) -> std::io::Result<()> {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    for address in [IpAddr::V4(WORKER_V4), IpAddr::V6(WORKER_V6)] {
        tokio::spawn(accept(bind_tcp(address, 80)?, occupancy.clone(), Arc::clone(&slots)));
    }
    Ok(())
}

async fn accept(listener: TcpListener, occupancy: Occupancy, slots: Arc<Semaphore>) {
    loop {
        let Ok(permit) = Arc::clone(&slots).acquire_owned().await else { return };
        let stream = sockets::accept(&listener).await;
        let occupancy = occupancy.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let answer = respond(&request, &occupancy);
                async move { Ok::<_, Infallible>(answer) }
            });
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_LIMIT)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "actor endpoint");
            }
            drop(permit);
        });
    }
}

fn respond<B>(request: &Request<B>, occupancy: &Occupancy) -> Response<Full<Bytes>> {
    let (status, body) = decide(request.method(), request.uri().path(), request.uri().query(), occupancy);
    let mut response = Response::new(Full::new(Bytes::from(body.to_string() + "\n")));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
    response
}

fn decide(
    method: &Method,
    path: &str,
    query: Option<&str>,
    occupancy: &Occupancy,
) -> (StatusCode, serde_json::Value) {
    let refuse = |status, message: String| (status, serde_json::json!({ "error": message }));
    match (method, path) {
        (&Method::PUT, "/v1/busy") => {
            let text = query
                .unwrap_or_default()
                .split('&')
                .find_map(|pair| pair.strip_prefix("for="))
                .unwrap_or_default();
            match parse_duration(text) {
                Some(hold) if hold <= LONGEST_HOLD => {
                    occupancy.hold_busy(hold);
                    (StatusCode::OK, serde_json::json!({ "busyForMs": hold.as_millis() as u64 }))
                }
                _ => refuse(
                    StatusCode::BAD_REQUEST,
                    format!("for={text:?} is not a time up to 1h, e.g. PUT /v1/busy?for=60s"),
                ),
            }
        }
        (&Method::DELETE, "/v1/busy") => {
            occupancy.hold_busy(Duration::ZERO);
            (StatusCode::OK, serde_json::json!({ "busyForMs": 0 }))
        }
        (&Method::GET, "/v1/identity") => match occupancy.owner() {
            Some(owner) => (
                StatusCode::OK,
                serde_json::json!({
                    "actor": owner.actor_name,
                    "atespace": owner.atespace,
                    "uid": owner.actor_uid,
                    "generation": owner.generation,
                }),
            ),
            None => refuse(StatusCode::SERVICE_UNAVAILABLE, "no actor is in this slot".to_owned()),
        },
        (_, "/v1/busy" | "/v1/identity") => {
            refuse(StatusCode::METHOD_NOT_ALLOWED, format!("{method} is not a verb of {path}"))
        }
        _ => refuse(
            StatusCode::NOT_FOUND,
            format!("no {path} here; there are PUT and DELETE /v1/busy and GET /v1/identity"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_are_bounded_and_can_be_given_back() {
        let occupancy = Occupancy::new("w1");
        let put = |query| decide(&Method::PUT, "/v1/busy", query, &occupancy).0;
        assert_eq!(put(Some("for=60s")), StatusCode::OK);
        assert!(occupancy.usage().busy_until_ns > crate::boottime_ns() + 50_000_000_000);
        for bad in [None, Some("for="), Some("for=2h"), Some("for=-1s"), Some("until=60s")] {
            assert_eq!(put(bad), StatusCode::BAD_REQUEST, "{bad:?}");
        }
        assert_eq!(decide(&Method::DELETE, "/v1/busy", None, &occupancy).0, StatusCode::OK);
        assert_eq!(occupancy.usage().busy_until_ns, 0);
    }

    #[test]
    fn identity_is_the_slots_knowledge() {
        let occupancy = Occupancy::new("w1");
        let ask = || decide(&Method::GET, "/v1/identity", None, &occupancy);
        assert_eq!(ask().0, StatusCode::SERVICE_UNAVAILABLE);
        let owner = substrate_proto::types::Assignment {
            actor_uid: "u".into(),
            actor_name: "alice".into(),
            atespace: "default".into(),
            generation: 9,
            ..Default::default()
        };
        occupancy.enter(owner, 80);
        assert_eq!(
            ask().1,
            serde_json::json!({"actor": "alice", "atespace": "default", "uid": "u", "generation": 9})
        );
        assert_eq!(decide(&Method::POST, "/v1/identity", None, &occupancy).0, StatusCode::METHOD_NOT_ALLOWED);
    }
}
