// SPDX-License-Identifier: Apache-2.0
//! The arithmetic of leases (P1), without clocks and channels.
//!
//! The node notes CLOCK_BOOTTIME as it *sends* a request; the grant's term counts from there, so that no delay on the
//! way can make the node believe in a longer lease than the control plane does. A grant names the assignments it
//! holds for: each gets the new deadline, everything else that was activated before the request was sent is of the
//! past and is fenced. An Activate that arrived after the sending is younger than the grant may know and is left
//! alone: the next grant decides about it.
use std::collections::BTreeMap;
use std::time::Duration;

use substrate_proto::types::Assignment;

/// Requests of which the answer is still awaited; older ones are forgotten.
const MAX_PENDING: usize = 64;

/// A grant that was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// Of the request.
    pub sequence: u64,
    /// CLOCK_BOOTTIME when the request was sent, ns.
    pub sent_ns: i64,
    /// ms from then.
    pub term_ms: u64,
}

impl Granted {
    /// CLOCK_BOOTTIME at which the lease ends, ns.
    pub fn deadline_ns(&self) -> i64 {
        self.deadline_for(self.term_ms)
    }

    /// Deadline of a start under this grant for which the control plane named `term_ms` (counted by it from a moment
    /// not before it granted): never beyond what was granted.
    pub fn deadline_for(&self, term_ms: u64) -> i64 {
        let term = term_ms.min(self.term_ms).saturating_mul(1_000_000);
        self.sent_ns.saturating_add(i64::try_from(term).unwrap_or(i64::MAX))
    }

    /// How long after the sending of a request the next one is due: a third of the term, so that two may be lost.
    pub fn renew_after(&self) -> Duration {
        Duration::from_millis((self.term_ms / 3).clamp(100, 20_000))
    }
}

/// The node's side of the lease.
#[derive(Debug, Default)]
pub struct Lease {
    last: u64,
    pending: BTreeMap<u64, i64>,
    granted: Option<Granted>,
}

impl Lease {
    /// Notes a request that is sent now and returns its sequence.
    pub fn request(&mut self, now_ns: i64) -> u64 {
        self.last += 1;
        self.pending.insert(self.last, now_ns);
        if self.pending.len() > MAX_PENDING {
            self.pending.pop_first();
        }
        self.last
    }

    /// Sequence of the last request that was sent.
    pub fn last_sequence(&self) -> u64 {
        self.last
    }

    /// A new session answers no requests of the one before.
    pub fn new_session(&mut self) {
        self.pending.clear();
    }

    /// Takes an answer. `None`: of a request that was never sent, was answered already, or is older than one that was
    /// (a deadline never moves back).
    pub fn grant(&mut self, sequence: u64, term_ms: u64) -> Option<Granted> {
        let sent_ns = self.pending.remove(&sequence)?;
        self.pending.retain(|pending, _| *pending > sequence);
        let granted = Granted { sequence, sent_ns, term_ms };
        if self.granted.is_some_and(|last| last.sequence > sequence) {
            return None;
        }
        self.granted = Some(granted);
        Some(granted)
    }
}

/// An assignment that is on this node.
#[derive(Debug, Clone, PartialEq)]
pub struct Local {
    /// Which.
    pub assignment: Assignment,
    /// [`Lease::last_sequence`] when its Activate arrived; 0 for one that was adopted.
    pub since: u64,
}

/// What a grant means for one assignment.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// Hand it the deadline.
    Extend(Assignment),
    /// It is of the past: end it.
    Fence(Assignment),
    /// Younger than the request, or of a generation that the grant does not know yet: its own deadline stands.
    Leave(Assignment),
}

/// Decides about every local assignment under a grant that answers request `sequence` and names `named`.
pub fn decide(local: &[Local], named: &[Assignment], sequence: u64) -> Vec<Verdict> {
    local
        .iter()
        .map(|Local { assignment, since }| {
            let own = named.iter().find(|name| name.actor_uid == assignment.actor_uid);
            match own {
                Some(name)
                    if name.generation == assignment.generation && name.worker_id == assignment.worker_id =>
                {
                    Verdict::Extend(assignment.clone())
                }
                // A generation above the one named was committed after the grant was computed.
                Some(name) if name.generation < assignment.generation => Verdict::Leave(assignment.clone()),
                // `since` is the last request sent before the Activate arrived: that request, and those before, were
                // sent without knowing it.
                None if *since >= sequence && *since > 0 => Verdict::Leave(assignment.clone()),
                _ => Verdict::Fence(assignment.clone()),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assignment(uid: &str, generation: u64) -> Assignment {
        Assignment { actor_uid: uid.into(), generation, worker_id: "w1".into(), ..Assignment::default() }
    }

    #[test]
    fn a_term_counts_from_the_sending_whenever_the_answer_arrives() {
        let mut lease = Lease::default();
        let first = lease.request(1_000_000_000);
        let granted = lease.grant(first, 60_000).unwrap();
        assert_eq!(granted.deadline_ns(), 61_000_000_000);
        assert_eq!(granted.renew_after(), Duration::from_secs(20));
        // A start never gets more than the grant it runs under.
        assert_eq!(granted.deadline_for(90_000), granted.deadline_ns());
        assert_eq!(granted.deadline_for(30_000), 31_000_000_000);
    }

    #[test]
    fn answers_are_taken_once_and_never_move_a_deadline_back() {
        let mut lease = Lease::default();
        let (first, second) = (lease.request(1), lease.request(2));
        assert!(lease.grant(7, 1).is_none(), "an answer to no request");
        assert!(lease.grant(second, 1).is_some());
        assert!(lease.grant(second, 1).is_none(), "twice");
        assert!(lease.grant(first, u64::MAX).is_none(), "an older one after a newer");
        let third = lease.request(3);
        lease.new_session();
        assert!(lease.grant(third, 1).is_none(), "of a session before");
        assert!(lease.last_sequence() == 3 && lease.request(4) == 4);
    }

    #[test]
    fn an_absurd_term_does_not_overflow() {
        let granted = Granted { sequence: 1, sent_ns: i64::MAX - 5, term_ms: u64::MAX };
        assert_eq!(granted.deadline_ns(), i64::MAX);
    }

    #[test]
    fn requests_that_are_never_answered_do_not_pile_up() {
        let mut lease = Lease::default();
        for now in 0..1000 {
            lease.request(now);
        }
        assert_eq!(lease.pending.len(), MAX_PENDING);
    }

    #[test]
    fn verdicts() {
        use Verdict::{Extend, Fence, Leave};
        let a = assignment("a", 2);
        let moved = Assignment { worker_id: "w2".into(), ..a.clone() };
        for (name, since, named, sequence, expected) in [
            ("named", 1, vec![a.clone()], 5, Extend(a.clone())),
            ("not named", 1, vec![], 5, Fence(a.clone())),
            ("not named, adopted", 0, vec![], 1, Fence(a.clone())),
            ("not named, activated before the sending", 4, vec![], 5, Fence(a.clone())),
            ("not named, activated after the sending", 5, vec![], 5, Leave(a.clone())),
            ("a higher generation is named", 9, vec![assignment("a", 3)], 5, Fence(a.clone())),
            ("a lower generation is named", 1, vec![assignment("a", 1)], 5, Leave(a.clone())),
            ("named on another worker", 1, vec![moved], 5, Fence(a.clone())),
            ("another actor is named", 1, vec![assignment("b", 2)], 5, Fence(a.clone())),
        ] {
            let local = [Local { assignment: a.clone(), since }];
            assert_eq!(decide(&local, &named, sequence), [expected], "{name}");
        }
    }
}
