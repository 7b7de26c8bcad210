// SPDX-License-Identifier: Apache-2.0
//! Who is in the slot, whether requests may reach it, and how busy it is.
//!
//! One monitor that the network parts share. What must be one step is one critical section: a request passes the gate
//! only if actor, generation and gate agree, and is counted as it passes; a checkpoint that is only wanted when idle
//! looks at every count and closes the gate under the same lock, so no request can slip in between (design section 5).
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use substrate_proto::atenet::FlowOwner;
use substrate_proto::atenet::ingress_opened::Code;
use substrate_proto::types::Assignment;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::boottime_ns;

#[derive(Debug, Default)]
struct Inner {
    owner: Option<Assignment>,
    default_port: u32,
    /// Open: requests may pass. Closed also while frozen.
    open: bool,
    ingress: u32,
    egress: u32,
    execs: u32,
    busy_until_ns: i64,
    last_activity_ns: i64,
    /// Ends every connection of the present occupant.
    cut: CancellationToken,
    /// Counts occupants, so that a connection of a past one cannot be counted off the present one.
    epoch: u64,
}

/// The monitor; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Occupancy {
    inner: Arc<Mutex<Inner>>,
    changed: Arc<Notify>,
    worker_id: Arc<str>,
}

/// A figure of [`Occupancy::usage`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Requests in flight.
    pub ingress: u32,
    /// Connections out.
    pub egress: u32,
    /// Processes started by exec.
    pub execs: u32,
    /// CLOCK_BOOTTIME, ns; 0: no hold.
    pub busy_until_ns: i64,
    /// CLOCK_BOOTTIME, ns.
    pub last_activity_ns: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ingress,
    Egress,
    Exec,
    /// Counted nowhere and no activity.
    Background,
}

/// A counted connection or process; counted off when dropped.
#[derive(Debug)]
pub struct Pass {
    occupancy: Occupancy,
    kind: Kind,
    epoch: u64,
    /// Cancelled when the occupant's connections are cut.
    pub cut: CancellationToken,
    /// The port to use when the request names none.
    pub default_port: u32,
}

impl Pass {
    /// Bytes went through.
    pub fn touch(&self) {
        if self.kind == Kind::Background {
            return;
        }
        let mut inner = self.occupancy.lock();
        if inner.epoch == self.epoch {
            inner.last_activity_ns = boottime_ns();
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if self.kind == Kind::Background {
            return;
        }
        {
            let mut inner = self.occupancy.lock();
            if inner.epoch == self.epoch {
                let count = match self.kind {
                    Kind::Ingress => &mut inner.ingress,
                    Kind::Egress => &mut inner.egress,
                    Kind::Exec => &mut inner.execs,
                    Kind::Background => return,
                };
                *count = count.saturating_sub(1);
                inner.last_activity_ns = boottime_ns();
            }
        }
        self.occupancy.changed.notify_waiters();
    }
}

impl Occupancy {
    /// Nobody is in the slot.
    pub fn new(worker_id: &str) -> Self {
        Self { worker_id: worker_id.into(), ..Self::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An actor moves in; its gate is closed.
    pub fn enter(&self, owner: Assignment, default_port: u32) {
        let mut inner = self.lock();
        inner.cut.cancel();
        *inner = Inner {
            owner: Some(owner),
            default_port,
            last_activity_ns: boottime_ns(),
            epoch: inner.epoch + 1,
            ..Inner::default()
        };
    }

    /// The actor is gone: connections are cut, nothing passes.
    pub fn leave(&self) {
        let mut inner = self.lock();
        inner.cut.cancel();
        *inner = Inner { epoch: inner.epoch + 1, ..Inner::default() };
        drop(inner);
        self.changed.notify_waiters();
    }

    /// Opens or closes the gate; open connections go on.
    pub fn set_gate(&self, open: bool) {
        self.lock().open = open;
    }

    /// Closes the gate if nothing is live, in one step.
    ///
    /// # Errors
    /// What is live, for people.
    pub fn close_if_idle(&self) -> Result<(), String> {
        let mut inner = self.lock();
        let mut live = Vec::new();
        for (count, what) in
            [(inner.ingress, "requests in flight"), (inner.egress, "connections out"), (inner.execs, "execs")]
        {
            if count > 0 {
                live.push(format!("{count} {what}"));
            }
        }
        let left_ms = (inner.busy_until_ns - boottime_ns()) / 1_000_000;
        if left_ms > 0 {
            live.push(format!("a busy hold for {left_ms} ms more"));
        }
        if live.is_empty() {
            inner.open = false;
            Ok(())
        } else {
            Err(live.join(", "))
        }
    }

    /// Ends all connections and execs of the present occupant.
    pub fn cut(&self) {
        // A fresh token: if the actor goes on after all, new connections must not be cut too.
        std::mem::take(&mut self.lock().cut).cancel();
    }

    /// Returns when no request is in flight any more; `false` after `limit`.
    pub async fn drained(&self, limit: Duration) -> bool {
        tokio::time::timeout(limit, async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                // Registered before looking, so that no change is missed.
                changed.as_mut().enable();
                if self.lock().ingress == 0 {
                    return;
                }
                changed.await;
            }
        })
        .await
        .is_ok()
    }

    /// A request wants in.
    ///
    /// # Errors
    /// `STALE` when it is for another copy, `NOT_NOW` while the gate is closed.
    pub fn pass_ingress(&self, actor_uid: &str, generation: u64) -> Result<Pass, Code> {
        self.pass_gate(actor_uid, generation, Kind::Ingress)
    }

    /// A leg of our own wants in: it stands against no suspend and is no activity.
    ///
    /// # Errors
    /// As [`Occupancy::pass_ingress`].
    pub fn pass_background(&self, actor_uid: &str, generation: u64) -> Result<Pass, Code> {
        self.pass_gate(actor_uid, generation, Kind::Background)
    }

    fn pass_gate(&self, actor_uid: &str, generation: u64, kind: Kind) -> Result<Pass, Code> {
        let mut inner = self.lock();
        match &inner.owner {
            Some(owner) if owner.actor_uid == actor_uid && owner.generation == generation => {}
            _ => return Err(Code::Stale),
        }
        if !inner.open {
            return Err(Code::NotNow);
        }
        if kind == Kind::Ingress {
            inner.ingress += 1;
        }
        Ok(self.pass(&mut inner, kind))
    }

    /// The actor opened a connection; `None` when nobody is in the slot.
    pub fn pass_egress(&self) -> Option<(Pass, FlowOwner)> {
        let mut inner = self.lock();
        let owner = self.flow_owner(&inner)?;
        inner.egress += 1;
        Some((self.pass(&mut inner, Kind::Egress), owner))
    }

    /// A process is started in the actor; `None` when nobody is in the slot.
    pub fn pass_exec(&self) -> Option<Pass> {
        let mut inner = self.lock();
        inner.owner.as_ref()?;
        inner.execs += 1;
        Some(self.pass(&mut inner, Kind::Exec))
    }

    fn pass(&self, inner: &mut MutexGuard<'_, Inner>, kind: Kind) -> Pass {
        if kind != Kind::Background {
            inner.last_activity_ns = boottime_ns();
        }
        Pass {
            occupancy: self.clone(),
            kind,
            epoch: inner.epoch,
            cut: inner.cut.clone(),
            default_port: inner.default_port,
        }
    }

    fn flow_owner(&self, inner: &Inner) -> Option<FlowOwner> {
        let owner = inner.owner.as_ref()?;
        Some(FlowOwner {
            worker_id: self.worker_id.to_string(),
            actor_uid: owner.actor_uid.clone(),
            atespace: owner.atespace.clone(),
            actor_name: owner.actor_name.clone(),
            generation: owner.generation,
        })
    }

    /// Labels of the present occupant's traffic.
    pub fn owner(&self) -> Option<FlowOwner> {
        self.flow_owner(&self.lock())
    }

    /// The workload asks to be kept for a while (0: no longer).
    pub fn hold_busy(&self, hold: Duration) {
        let mut inner = self.lock();
        let now = boottime_ns();
        inner.busy_until_ns = if hold.is_zero() { 0 } else { now + hold.as_nanos() as i64 };
        inner.last_activity_ns = now;
    }

    /// Counts now.
    pub fn usage(&self) -> Usage {
        let inner = self.lock();
        Usage {
            ingress: inner.ingress,
            egress: inner.egress,
            execs: inner.execs,
            busy_until_ns: inner.busy_until_ns,
            last_activity_ns: inner.last_activity_ns,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn occupied() -> Occupancy {
        let occupancy = Occupancy::new("w1");
        let owner = Assignment { actor_uid: "a".into(), generation: 3, ..Assignment::default() };
        occupancy.enter(owner, 8080);
        occupancy
    }

    #[test]
    fn only_the_right_copy_passes_and_only_through_an_open_gate() {
        let occupancy = occupied();
        assert_eq!(occupancy.pass_ingress("a", 3).unwrap_err(), Code::NotNow);
        occupancy.set_gate(true);
        assert_eq!(occupancy.pass_ingress("a", 2).unwrap_err(), Code::Stale);
        assert_eq!(occupancy.pass_ingress("b", 3).unwrap_err(), Code::Stale);
        assert_eq!(occupancy.pass_ingress("a", 3).unwrap().default_port, 8080);
        occupancy.leave();
        assert_eq!(occupancy.pass_ingress("a", 3).unwrap_err(), Code::Stale);
    }

    #[test]
    fn the_gate_closes_only_when_idle_and_stays_open_otherwise() {
        let occupancy = occupied();
        occupancy.set_gate(true);
        let pass = occupancy.pass_ingress("a", 3).unwrap();
        assert!(occupancy.close_if_idle().unwrap_err().contains("1 requests"));
        drop(pass);
        occupancy.hold_busy(Duration::from_mins(1));
        assert!(occupancy.close_if_idle().unwrap_err().contains("busy hold"));
        let still_open = occupancy.pass_ingress("a", 3).unwrap();
        occupancy.hold_busy(Duration::ZERO);
        drop(still_open);
        occupancy.close_if_idle().unwrap();
        assert_eq!(occupancy.pass_ingress("a", 3).unwrap_err(), Code::NotNow);
    }

    #[tokio::test]
    async fn draining_waits_for_the_last_request() {
        let occupancy = occupied();
        occupancy.set_gate(true);
        let pass = occupancy.pass_ingress("a", 3).unwrap();
        assert!(!occupancy.drained(Duration::from_millis(5)).await);
        let waiting = tokio::spawn({
            let occupancy = occupancy.clone();
            async move { occupancy.drained(Duration::from_secs(10)).await }
        });
        drop(pass);
        assert!(waiting.await.unwrap());
    }

    #[test]
    fn a_cut_ends_what_is_there_and_not_what_comes_after() {
        let occupancy = occupied();
        occupancy.set_gate(true);
        let before = occupancy.pass_ingress("a", 3).unwrap();
        occupancy.cut();
        assert!(before.cut.is_cancelled());
        assert!(!occupancy.pass_ingress("a", 3).unwrap().cut.is_cancelled());
        drop(before);
        assert_eq!(occupancy.usage().ingress, 0);
    }

    #[test]
    fn a_leg_of_our_own_passes_the_gate_and_counts_as_nothing() {
        let occupancy = occupied();
        assert_eq!(occupancy.pass_background("a", 3).unwrap_err(), Code::NotNow);
        occupancy.set_gate(true);
        assert_eq!(occupancy.pass_background("a", 2).unwrap_err(), Code::Stale);
        let before = occupancy.usage();
        let leg = occupancy.pass_background("a", 3).unwrap();
        leg.touch();
        assert_eq!(occupancy.usage(), before);
        occupancy.close_if_idle().unwrap();
        occupancy.cut();
        assert!(leg.cut.is_cancelled());
        drop(leg);
        assert_eq!(occupancy.usage(), before);
    }

    #[test]
    fn connections_of_a_past_occupant_do_not_count_off_the_present_one() {
        let occupancy = occupied();
        let (old, owner) = occupancy.pass_egress().unwrap();
        assert_eq!((owner.actor_uid.as_str(), owner.generation), ("a", 3));
        occupancy.enter(Assignment { actor_uid: "b".into(), generation: 1, ..Assignment::default() }, 80);
        assert!(old.cut.is_cancelled());
        let _new = occupancy.pass_egress().unwrap();
        drop(old);
        assert_eq!(occupancy.usage().egress, 1);
    }
}
