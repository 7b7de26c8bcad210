// SPDX-License-Identifier: Apache-2.0
//! Work that outlives the call that asked for it (P5).
//!
//! A long call is a task of its own under a key (an assignment, a snapshot). The caller waits for it; when its
//! connection or its deadline ends, the task goes on, and a retry with the same key joins it. A task is cancelled
//! only by [`Flights::cancel`], which returns when it has ended.
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use futures::future::{BoxFuture, FutureExt as _, Shared};
use tokio_util::sync::CancellationToken;
use tonic::Status;

type Outcome<T> = Shared<BoxFuture<'static, Result<T, Status>>>;

struct Flight<T> {
    outcome: Outcome<T>,
    cancel: CancellationToken,
}

/// The tasks under way, by key.
pub struct Flights<K, T> {
    flights: Arc<Mutex<HashMap<K, Flight<T>>>>,
}

impl<K, T> Default for Flights<K, T> {
    fn default() -> Self {
        Self { flights: Arc::default() }
    }
}

impl<K, T> std::fmt::Debug for Flights<K, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flights").finish_non_exhaustive()
    }
}

impl<K, T> Flights<K, T>
where
    K: Eq + Hash + Clone + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// Joins the task of `key`, or starts `work`, which is handed its cancellation.
    ///
    /// # Errors
    /// What the work answered; `INTERNAL` when it panicked.
    pub async fn run<F>(&self, key: K, work: impl FnOnce(CancellationToken) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let outcome = {
            let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(flight) = flights.get(&key) {
                flight.outcome.clone()
            } else {
                let cancel = CancellationToken::new();
                let work = work(cancel.clone());
                let all = Arc::clone(&self.flights);
                let own = key.clone();
                // The entry is removed by the task itself, so it is there exactly while the work goes on. It waits
                // for the lock held here, hence never removes before the insertion below.
                let task = tokio::spawn(async move {
                    let outcome = std::panic::AssertUnwindSafe(work).catch_unwind().await;
                    all.lock().unwrap_or_else(PoisonError::into_inner).remove(&own);
                    outcome.unwrap_or_else(|_| Err(Status::internal("the task panicked; see the node's log")))
                });
                let outcome = async move {
                    task.await.unwrap_or_else(|_| Err(Status::unavailable("the node agent is stopping")))
                }
                .boxed()
                .shared();
                flights.insert(key, Flight { outcome: outcome.clone(), cancel });
                outcome
            }
        };
        outcome.await
    }

    /// Cancels the tasks whose key `matches` and returns when they have ended.
    pub async fn cancel(&self, matches: impl Fn(&K) -> bool) {
        let ending: Vec<_> = {
            let flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
            flights
                .iter()
                .filter(|(key, _)| matches(key))
                .map(|(_, flight)| {
                    flight.cancel.cancel();
                    flight.outcome.clone()
                })
                .collect()
        };
        for outcome in ending {
            // Its caller gets the outcome.
            let _ = outcome.await;
        }
    }

    /// Waits for the tasks whose key `matches`, without cancelling them.
    pub async fn settle(&self, matches: impl Fn(&K) -> bool) {
        let waiting: Vec<_> = {
            let flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
            flights.iter().filter(|(key, _)| matches(key)).map(|(_, flight)| flight.outcome.clone()).collect()
        };
        for outcome in waiting {
            let _ = outcome.await;
        }
    }

    /// Whether a task whose key `matches` is under way.
    pub fn any(&self, matches: impl Fn(&K) -> bool) -> bool {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner).keys().any(matches)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn work_goes_on_without_its_caller_and_is_joined() {
        let flights = Arc::new(Flights::<&str, u32>::default());
        let runs = Arc::new(AtomicU32::new(0));
        let (release, gate) = tokio::sync::oneshot::channel::<()>();
        let counted = Arc::clone(&runs);
        let first = flights.run("a", move |_| async move {
            counted.fetch_add(1, Ordering::SeqCst);
            gate.await.ok();
            Ok(7)
        });
        // The first caller gives up after the task began.
        assert!(futures::poll!(Box::pin(first)).is_pending());
        let counted = Arc::clone(&runs);
        let second = flights.run("a", move |_| async move {
            counted.fetch_add(1, Ordering::SeqCst);
            Ok(8)
        });
        release.send(()).unwrap();
        assert_eq!(second.await.unwrap(), 7);
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        assert!(!flights.any(|_| true));
        assert_eq!(flights.run("a", |_| async { Ok(9) }).await.unwrap(), 9);
    }

    #[tokio::test]
    async fn cancelling_waits_for_the_end_and_a_panic_is_an_error() {
        let flights = Flights::<u32, ()>::default();
        let ended = Arc::new(AtomicU32::new(0));
        let seen = Arc::clone(&ended);
        let call = flights.run(1, move |cancel| async move {
            cancel.cancelled().await;
            seen.store(1, Ordering::SeqCst);
            Err(Status::aborted("x"))
        });
        let mut call = Box::pin(call);
        assert!(futures::poll!(&mut call).is_pending());
        flights.cancel(|key| *key == 1).await;
        assert_eq!(ended.load(Ordering::SeqCst), 1);
        assert_eq!(call.await.unwrap_err().code(), tonic::Code::Aborted);
        let error = flights.run(2, |_| async { panic!("a bug") }).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::Internal);
    }
}
