// SPDX-License-Identifier: Apache-2.0
//! Pauses between attempts: doubling up to a longest one, each jittered by half, so that many who failed together do
//! not come back together.
use std::time::Duration;

use rand::Rng as _;

/// The pauses of one series of attempts.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    next: Duration,
    longest: Duration,
}

impl Backoff {
    /// Pauses from `first` to `longest`.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, next: first, longest }
    }

    /// The pause before the next attempt.
    pub fn pause(&mut self) -> Duration {
        let pause = self.next.mul_f64(rand::rng().random_range(0.5..1.5));
        self.next = (self.next * 2).min(self.longest);
        pause
    }

    /// The series begins anew.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_longest_and_start_over() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let pauses: Vec<u128> = (0..8).map(|_| backoff.pause().as_millis()).collect();
        assert!((50..=150).contains(&pauses[0]), "{pauses:?}");
        assert!(pauses[7] >= 500 && pauses.iter().all(|pause| *pause <= 1500), "{pauses:?}");
        backoff.reset();
        assert!(backoff.pause().as_millis() <= 150);
    }
}
