// SPDX-License-Identifier: Apache-2.0
//! The idle decision: a function of a policy and of what a worker slot counted.
//!
//! Idle is: no connection in or out, no exec, no busy hold, and CPU below 2 % of a core, for `suspendAfter`. Housekeeping
//! comes in bursts (a supervisor polls its settings every few seconds), so what is not used of these 2 % is saved up, to
//! [`BURST_USEC`] at most, and only CPU beyond that counts. All times are the node's CLOCK_BOOTTIME, so that neither clock skew nor the control plane's own pauses count as quiet. The
//! decision is only a wish: the slot checks again, in one step with closing its gate (`only_if_idle`).
use std::time::Duration;

use substrate_proto::{ateom, types};

use crate::model::quantity;

/// Below this share of one core an actor is quiet.
const QUIET_CPU: f64 = 0.02;
/// CPU that may be used at once without counting as work, µs.
const BURST_USEC: f64 = 100_000.0;

/// A policy with its quantities read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Quiet time until it sleeps; none: never.
    pub suspend_after: Option<Duration>,
    /// Pause first, and promote after this much more.
    pub pause_first: Option<Duration>,
}

impl Policy {
    /// Reads a validated policy; what it leaves open comes from the default.
    pub fn read(policy: &types::IdlePolicy, default_after: Option<Duration>) -> Self {
        let suspend_after = match policy.suspend_after.as_str() {
            "" => default_after,
            "never" => None,
            text => quantity::duration(text).ok(),
        };
        Self { suspend_after, pause_first: quantity::duration(&policy.pause_first).ok() }
    }
}

/// What to do with a quiet actor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Nothing yet.
    Stay,
    /// Suspend if it is still idle.
    Suspend,
    /// Pause if it is still idle, and promote after this much more.
    Pause {
        /// Until the pause is promoted.
        promote_after: Duration,
    },
}

/// How long one copy of an actor has been quiet.
#[derive(Debug, Clone)]
pub struct Tracker {
    /// CLOCK_BOOTTIME of the node, ns.
    quiet_since_ns: i64,
    cpu_usec: u64,
    at_ns: i64,
    /// CPU that may be used now without counting as work, µs.
    allowance_usec: f64,
    /// The latest count.
    pub stats: ateom::Stats,
    now_ns: i64,
}

impl Tracker {
    /// Begins with a copy's first count: what was before is not known, so it is not quiet yet.
    pub fn new(stats: ateom::Stats, now_ns: i64) -> Self {
        Self {
            quiet_since_ns: stats.at_ns.max(stats.last_activity_ns),
            cpu_usec: stats.cpu_usec,
            at_ns: stats.at_ns,
            allowance_usec: BURST_USEC,
            stats,
            now_ns,
        }
    }

    /// Takes a count in. A count older than the last one is ignored.
    pub fn observe(&mut self, stats: ateom::Stats, now_ns: i64) {
        if stats.at_ns < self.at_ns {
            return;
        }
        let elapsed_usec = (stats.at_ns - self.at_ns) as f64 / 1e3;
        let used = stats.cpu_usec.saturating_sub(self.cpu_usec) as f64;
        // Two counts at the same moment say nothing about CPU.
        let mut computes = false;
        if elapsed_usec > 0.0 {
            let left = (self.allowance_usec + elapsed_usec * QUIET_CPU).min(BURST_USEC) - used;
            computes = left < 0.0;
            self.allowance_usec = left.max(0.0);
        }
        if computes || is_held(&stats, now_ns) {
            self.quiet_since_ns = self.quiet_since_ns.max(stats.at_ns);
        }
        self.quiet_since_ns = self.quiet_since_ns.max(stats.last_activity_ns);
        if elapsed_usec > 0.0 {
            self.cpu_usec = stats.cpu_usec;
            self.at_ns = stats.at_ns;
        }
        self.stats = stats;
        self.now_ns = self.now_ns.max(now_ns);
    }

    /// Begins anew, after a refusal.
    pub fn disturb(&mut self) {
        self.quiet_since_ns = self.quiet_since_ns.max(self.now_ns);
    }

    /// Quiet time so far; zero while something holds it.
    pub fn quiet_for(&self) -> Duration {
        if is_held(&self.stats, self.now_ns) {
            return Duration::ZERO;
        }
        Duration::from_nanos((self.now_ns - self.quiet_since_ns).max(0) as u64)
    }

    /// What the policy says now.
    pub fn decide(&self, policy: Policy) -> Decision {
        match policy.suspend_after {
            Some(after) if self.quiet_for() >= after && !is_held(&self.stats, self.now_ns) => {
                match policy.pause_first {
                    Some(promote_after) => Decision::Pause { promote_after },
                    None => Decision::Suspend,
                }
            }
            _ => Decision::Stay,
        }
    }
}

fn is_held(stats: &ateom::Stats, now_ns: i64) -> bool {
    stats.ingress_connections > 0
        || stats.egress_connections > 0
        || stats.execs > 0
        || stats.busy_until_ns > now_ns
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: i64 = 1_000_000_000;

    fn quiet(at_s: i64) -> ateom::Stats {
        ateom::Stats { at_ns: at_s * S, cpu_usec: 1_000, ..Default::default() }
    }

    fn after(seconds: u64) -> Policy {
        Policy { suspend_after: Some(Duration::from_secs(seconds)), pause_first: None }
    }

    /// A quiet minute from second 100, with one sample changed.
    fn minute_with(change: impl Fn(i64, &mut ateom::Stats)) -> Decision {
        let mut tracker = Tracker::new(quiet(100), 100 * S);
        for at in 101..=160 {
            let mut stats = quiet(at);
            change(at, &mut stats);
            tracker.observe(stats, at * S);
        }
        tracker.decide(after(60))
    }

    type Change = fn(i64, &mut ateom::Stats);

    #[test]
    fn what_counts_as_idle() {
        let table: [(&str, Change, Decision); 13] = [
            ("nothing at all", |_, _| {}, Decision::Suspend),
            ("a connection in", |at, s| s.ingress_connections = u32::from(at == 130), Decision::Stay),
            ("a connection out", |at, s| s.egress_connections = u32::from(at == 130), Decision::Stay),
            ("an exec", |at, s| s.execs = u32::from(at == 160), Decision::Stay),
            ("a busy hold that lasts", |_, s| s.busy_until_ns = 500 * S, Decision::Stay),
            ("a busy hold that has ended before", |_, s| s.busy_until_ns = 99 * S, Decision::Suspend),
            ("activity between samples", |_, s| s.last_activity_ns = 110 * S + 1, Decision::Stay),
            ("activity before the minute", |_, s| s.last_activity_ns = 50 * S, Decision::Suspend),
            // 80 ms of CPU in one second is 8 %, but seldom.
            ("housekeeping", |at, s| s.cpu_usec += (at as u64 - 100) / 10 * 80_000, Decision::Suspend),
            ("a burst of CPU", |at, s| s.cpu_usec += if at >= 130 { 130_000 } else { 0 }, Decision::Stay),
            // 3 % of a core all along.
            ("steady CPU", |at, s| s.cpu_usec += (at as u64 - 100) * 30_000, Decision::Stay),
            // 1 % of a core all along.
            ("little CPU", |at, s| s.cpu_usec += (at as u64 - 100) * 10_000, Decision::Suspend),
            ("memory only", |_, s| s.memory_bytes = 1 << 40, Decision::Suspend),
        ];
        for (name, change, expected) in table {
            assert_eq!(minute_with(change), expected, "{name}");
        }
    }

    #[test]
    fn quiet_begins_with_the_first_count_and_again_after_a_refusal() {
        let mut tracker = Tracker::new(quiet(100), 100 * S);
        tracker.observe(quiet(159), 159 * S);
        assert_eq!(tracker.decide(after(60)), Decision::Stay);
        tracker.observe(quiet(160), 160 * S);
        assert_eq!(tracker.decide(after(60)), Decision::Suspend);
        tracker.disturb();
        assert_eq!(tracker.decide(after(60)), Decision::Stay);
    }

    #[test]
    fn policies() {
        let read = |after: &str, pause: &str| {
            let policy = types::IdlePolicy { suspend_after: after.into(), pause_first: pause.into() };
            Policy::read(&policy, Some(Duration::from_mins(1)))
        };
        assert_eq!(read("", ""), after(60));
        assert_eq!(read("5s", ""), after(5));
        assert_eq!(read("never", "").suspend_after, None);
        let mut tracker = Tracker::new(quiet(0), 0);
        tracker.observe(quiet(10), 10 * S);
        assert_eq!(
            tracker.decide(read("5s", "30s")),
            Decision::Pause { promote_after: Duration::from_secs(30) }
        );
        assert_eq!(tracker.decide(read("never", "")), Decision::Stay);
    }

    #[test]
    fn an_old_count_is_ignored() {
        let mut tracker = Tracker::new(quiet(100), 100 * S);
        let mut late = quiet(50);
        late.execs = 1;
        tracker.observe(late, 50 * S);
        assert_eq!(tracker.stats.execs, 0);
    }
}
