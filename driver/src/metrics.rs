// SPDX-License-Identifier: Apache-2.0
//! What the gateway's calls cost (docs/metrics.md), and how much of that is the driver's own.
//!
//! A call's own share is the time it took without what it waited for the control plane. [`of_call`] opens an account
//! for a call, [`waited`] is charged to it by the client of the control plane wherever below it that is used, in the
//! same task. Waits that overlap are charged each: a call that asks two things at once owns too little, never too much.
use std::cell::Cell;
use std::time::{Duration, Instant};

use metrics::histogram;

tokio::task_local! {
    static WAITED: Cell<Duration>;
}

/// Runs a call of the gateway's (or its part in this task) and records what it took and what of it is ours.
pub fn of_call<T>(call: &'static str, work: impl Future<Output = T>) -> impl Future<Output = T> {
    // Calls are large, and would be kept once more by everything around them.
    let work = Box::pin(work);
    async move {
        let begun = Instant::now();
        let (answer, waited) = account(work).await;
        let took = begun.elapsed();
        histogram!("substrate_driver_call_seconds", "call" => call).record(took);
        histogram!("substrate_driver_own_seconds", "call" => call).record(took.saturating_sub(waited));
        answer
    }
}

/// What work was charged for.
async fn account<T>(work: impl Future<Output = T>) -> (T, Duration) {
    WAITED
        .scope(Cell::new(Duration::ZERO), async {
            let answer = work.await;
            (answer, WAITED.with(Cell::get))
        })
        .await
}

/// Waits for the control plane; whoever has an account is charged for it.
pub async fn waited<T>(work: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let answer = work.await;
    let took = begun.elapsed();
    // Work that no call of the gateway's asked for has no account.
    let _ = WAITED.try_with(|waited| waited.set(waited.get() + took));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_was_waited_for_the_control_plane_is_charged() {
        let ((), charged) = account(async {
            waited(tokio::time::sleep(Duration::from_millis(30))).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        })
        .await;
        assert!(charged >= Duration::from_millis(30) && charged < Duration::from_millis(300), "{charged:?}");
        // Without an account nothing is charged, and nothing breaks.
        waited(std::future::ready(())).await;
    }
}
