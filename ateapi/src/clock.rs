// SPDX-License-Identifier: Apache-2.0
//! The seam to time and chance: a simulation replaces both, so that a seed replays.
//!
//! Deadlines are arithmetic on a monotonic clock that also counts a suspended machine (CLOCK_BOOTTIME, clock_gettime(2)),
//! as the node agents and worker slots use it. Wall-clock time is only written into records for people.
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Where time and the randomness of ids come from.
#[async_trait::async_trait]
pub trait Clock: Send + Sync + 'static {
    /// Monotonic time since an arbitrary moment.
    fn now(&self) -> Duration;
    /// Unix time, ms.
    fn wall_ms(&self) -> i64;
    /// Returns once `now()` is at least `deadline`.
    async fn sleep_until(&self, deadline: Duration);
    /// Random bits, for ids; keys and nonces are drawn elsewhere.
    fn draw(&self) -> u128 {
        rand::random()
    }
}

/// The machine's clocks.
#[derive(Debug, Default, Clone, Copy)]
pub struct SystemClock;

#[async_trait::async_trait]
impl Clock for SystemClock {
    fn now(&self) -> Duration {
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
            .map_or_else(|_| Duration::ZERO, Duration::from)
    }

    fn wall_ms(&self) -> i64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
    }

    async fn sleep_until(&self, deadline: Duration) {
        // tokio's timers stand still while the machine is suspended, so the remainder is looked at again.
        loop {
            let left = deadline.saturating_sub(self.now());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(Duration::from_secs(10))).await;
        }
    }
}

/// tokio's clock, which tests may pause: with `tokio::time::pause` time moves only when every task waits.
#[derive(Debug, Clone, Copy)]
pub struct TokioClock {
    start: tokio::time::Instant,
    wall_start_ms: i64,
}

impl TokioClock {
    /// Starts at this unix time, ms.
    pub fn new(wall_start_ms: i64) -> Self {
        Self { start: tokio::time::Instant::now(), wall_start_ms }
    }
}

#[async_trait::async_trait]
impl Clock for TokioClock {
    fn now(&self) -> Duration {
        // Not from zero, so that "some time ago" can be said at the start.
        self.start.elapsed() + Duration::from_secs(1_000)
    }

    fn wall_ms(&self) -> i64 {
        self.wall_start_ms + self.start.elapsed().as_millis() as i64
    }

    async fn sleep_until(&self, deadline: Duration) {
        let now = self.now();
        tokio::time::sleep(deadline.saturating_sub(now)).await;
    }
}
