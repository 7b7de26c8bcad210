// SPDX-License-Identifier: Apache-2.0
//! Waking actors: one `ResumeActor` per actor at a time, however many requests wait for it, and bounds on all of it.
//!
//! A request that has to wait is *parked*: at most so many per actor and in all, the next one gets 503 with
//! `retry-after` (P8). A resume goes on when those who asked for it have left: the actor's state is paid for already.
//! How often one actor may be woken is limited by a token bucket.
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use substrate_proto::ateapi::{ActorRef, ActorState, ResumeActorRequest};
use tokio::time::Instant;
use tonic::Code;
use tonic_types::StatusExt as _;

use super::address::Key;
use super::routes::{Route, Routes};
use crate::control::{Backoff, Control};

/// Bounds of waking and waiting.
#[derive(Debug, Clone)]
pub(crate) struct Bounds {
    pub(crate) resume_timeout: Duration,
    pub(crate) parked_per_actor: usize,
    pub(crate) parked: usize,
    pub(crate) wakeups_burst: u32,
    pub(crate) wakeups_per_second: f64,
}

/// Why an actor was not woken.
#[derive(Debug, Clone)]
pub(crate) enum WakeError {
    /// There is no such actor.
    Unknown,
    /// No worker is free, or a quota is used up.
    Full { message: String, after: Duration },
    /// It was woken too often of late.
    TooOften { after: Duration },
    /// The control plane refuses, with its reason.
    Refused(String),
    /// It did not answer or failed, also when asked again.
    Failed(String),
}

type Flight = Shared<BoxFuture<'static, Result<Arc<Route>, WakeError>>>;

#[derive(Default)]
struct Inner {
    flights: HashMap<Key, Flight>,
    parked: HashMap<Key, usize>,
    parked_total: usize,
    buckets: HashMap<Key, Bucket>,
}

/// Full when not seen for long, so an entry that would be full again may be dropped.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn refilled(self, now: Instant, bounds: &Bounds) -> f64 {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * bounds.wakeups_per_second;
        (self.tokens + gained).min(f64::from(bounds.wakeups_burst))
    }

    /// Takes one token, or says how long until there is one.
    fn take(&mut self, now: Instant, bounds: &Bounds) -> Result<(), Duration> {
        self.tokens = self.refilled(now, bounds);
        self.at = now;
        if self.tokens >= 1.0 {
            self.tokens -= 1.0;
            return Ok(());
        }
        let missing = (1.0 - self.tokens) / bounds.wakeups_per_second.max(1e-6);
        Err(Duration::from_secs_f64(missing.min(3600.0)))
    }
}

/// How often a wake-up is tried that the control plane says has failed.
const TRIES: u32 = 3;
/// A hint to retry that is shorter than this means that what is missing is on its way.
const SOON: Duration = Duration::from_millis(500);
/// How long a worker that is being freed is waited for.
const FREED_WITHIN: Duration = Duration::from_secs(10);
/// Entries beyond which full buckets are dropped.
const BUCKETS: usize = 4096;

pub(crate) struct Waker {
    control: Control,
    routes: Arc<Routes>,
    bounds: Bounds,
    inner: Mutex<Inner>,
}

/// A parked request; leaves when dropped.
pub(crate) struct Parked {
    waker: Arc<Waker>,
    key: Key,
}

impl Drop for Parked {
    fn drop(&mut self) {
        let mut inner = self.waker.lock();
        inner.parked_total -= 1;
        if let Some(count) = inner.parked.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                inner.parked.remove(&self.key);
            }
        }
    }
}

/// Which bound a request met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Crowded {
    Actor(usize),
    Router(usize),
}

impl Waker {
    pub(crate) fn new(control: Control, routes: Arc<Routes>, bounds: Bounds) -> Arc<Self> {
        Arc::new(Self { control, routes, bounds, inner: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters the wait for an actor.
    pub(crate) fn park(self: &Arc<Self>, key: &Key) -> Result<Parked, Crowded> {
        let mut inner = self.lock();
        if inner.parked_total >= self.bounds.parked {
            return Err(Crowded::Router(self.bounds.parked));
        }
        let count = inner.parked.entry(key.clone()).or_default();
        if *count >= self.bounds.parked_per_actor {
            return Err(Crowded::Actor(self.bounds.parked_per_actor));
        }
        *count += 1;
        inner.parked_total += 1;
        Ok(Parked { waker: self.clone(), key: key.clone() })
    }

    /// Joins the resume that is under way, or begins one.
    pub(crate) async fn wake(self: &Arc<Self>, route: &Route) -> Result<Arc<Route>, WakeError> {
        let flight = {
            let mut inner = self.lock();
            if let Some(flight) = inner.flights.get(&route.key) {
                flight.clone()
            } else if let Some(awake) = self.routes.get(&route.key).filter(|now| {
                // A flight that has just landed put its result there before it left.
                now.revision > route.revision && now.state == ActorState::Running
            }) {
                return Ok(awake);
            } else {
                self.charge(&mut inner, &route.key)?;
                let flight = self.clone().begin(route.key.clone(), route.uid.clone());
                inner.flights.insert(route.key.clone(), flight.clone());
                flight
            }
        };
        flight.await
    }

    /// In a task of its own: it goes on when those who asked have left.
    fn begin(self: Arc<Self>, key: Key, uid: String) -> Flight {
        let task = tokio::spawn(async move {
            let result = self.resume(&key, uid).await;
            self.lock().flights.remove(&key);
            result
        });
        task.map(|joined| {
            joined.unwrap_or_else(|error| Err(WakeError::Failed(format!("the wake-up task ended: {error}"))))
        })
        .boxed()
        .shared()
    }

    fn charge(&self, inner: &mut Inner, key: &Key) -> Result<(), WakeError> {
        let now = Instant::now();
        if inner.buckets.len() >= BUCKETS {
            let full = f64::from(self.bounds.wakeups_burst);
            inner.buckets.retain(|_, bucket| bucket.refilled(now, &self.bounds) < full);
        }
        let bucket = inner
            .buckets
            .entry(key.clone())
            .or_insert(Bucket { tokens: f64::from(self.bounds.wakeups_burst), at: now });
        bucket.take(now, &self.bounds).map_err(|after| WakeError::TooOften { after })
    }

    async fn resume(&self, key: &Key, uid: String) -> Result<Arc<Route>, WakeError> {
        let deadline = Instant::now() + self.bounds.resume_timeout;
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
        let start = Instant::now();
        let mut request_id = fresh_request_id();
        let mut failures = 0;
        loop {
            let actor = ActorRef { atespace: key.atespace.clone(), name: key.name.clone(), uid: uid.clone() };
            let request = ResumeActorRequest {
                actor: Some(actor),
                cause: "traffic".into(),
                request_id: request_id.clone(),
            };
            let mut control = self.control.clone();
            let status = match tokio::time::timeout_at(deadline, control.resume_actor(request)).await {
                Ok(Ok(response)) => {
                    let actor = response.into_inner().actor.ok_or_else(|| {
                        WakeError::Failed("the control plane's answer names no actor".into())
                    })?;
                    return Ok(self.routes.put(actor));
                }
                Ok(Err(status)) => status,
                Err(_) => {
                    return Err(WakeError::Failed(format!(
                        "it was not awake after {:?}",
                        self.bounds.resume_timeout
                    )));
                }
            };
            let after = retry_after(&status);
            let pause = match status.code() {
                Code::NotFound => return Err(WakeError::Unknown),
                // A worker is being freed at this moment.
                Code::ResourceExhausted
                    if after.is_some_and(|after| after <= SOON) && start.elapsed() < FREED_WITHIN =>
                {
                    after.unwrap_or(SOON)
                }
                Code::ResourceExhausted => {
                    let after = after.unwrap_or(Duration::from_secs(5));
                    return Err(WakeError::Full { message: status.message().to_owned(), after });
                }
                Code::Unavailable | Code::Aborted | Code::DeadlineExceeded | Code::Cancelled => {
                    // Details are the control plane's own: it tried and failed. Without, it was not there.
                    if status.get_details_error_info().is_some() {
                        failures += 1;
                        if failures >= TRIES {
                            return Err(WakeError::Failed(status.message().to_owned()));
                        }
                        request_id = fresh_request_id();
                    }
                    after.unwrap_or_else(|| backoff.step())
                }
                Code::Unknown | Code::Internal | Code::DataLoss => {
                    return Err(WakeError::Failed(status.message().to_owned()));
                }
                _ => return Err(WakeError::Refused(status.message().to_owned())),
            };
            if Instant::now() + pause >= deadline {
                return Err(WakeError::Failed(status.message().to_owned()));
            }
            tracing::debug!(actor = %key, %status, "asking for the wake-up again");
            tokio::time::sleep(pause).await;
        }
    }
}

fn fresh_request_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

fn retry_after(status: &tonic::Status) -> Option<Duration> {
    status.get_details_retry_info().and_then(|info| info.retry_delay)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds() -> Bounds {
        Bounds {
            resume_timeout: Duration::from_mins(1),
            parked_per_actor: 2,
            parked: 3,
            wakeups_burst: 3,
            wakeups_per_second: 0.5,
        }
    }

    fn waker() -> Arc<Waker> {
        let control = crate::control::dial("http://127.0.0.1:1").unwrap();
        Waker::new(control.clone(), Routes::new(control, 10), bounds())
    }

    fn key(name: &str) -> Key {
        Key { atespace: "team".into(), name: name.into() }
    }

    #[tokio::test]
    async fn parking_is_bounded_per_actor_and_in_all() {
        let waker = waker();
        let first = waker.park(&key("a")).ok().unwrap();
        let _second = waker.park(&key("a")).ok().unwrap();
        assert_eq!(waker.park(&key("a")).err(), Some(Crowded::Actor(2)));
        let _third = waker.park(&key("b")).ok().unwrap();
        assert_eq!(waker.park(&key("c")).err(), Some(Crowded::Router(3)));
        drop(first);
        assert!(waker.park(&key("a")).is_ok());
        assert_eq!(waker.lock().parked.len(), 2, "actors without parked requests are forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn wakeups_are_limited_per_actor_and_refill() {
        let waker = waker();
        let charge = |name: &str| waker.charge(&mut waker.lock(), &key(name));
        for _ in 0..3 {
            charge("a").unwrap();
        }
        let Err(WakeError::TooOften { after }) = charge("a") else { panic!("not limited") };
        assert_eq!(after, Duration::from_secs(2));
        charge("b").unwrap();
        tokio::time::advance(after).await;
        charge("a").unwrap();
        assert!(charge("a").is_err());
    }
}
