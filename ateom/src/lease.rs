// SPDX-License-Identifier: Apache-2.0
//! The lease of the actor in a slot (promise P1): pure arithmetic on CLOCK_BOOTTIME, and the timer that wakes it.
//!
//! The node agent hands over a deadline. Past it the slot freezes its actor by itself, whoever else is dead; a later
//! deadline of the same generation thaws it. A deadline never moves backwards: grants may overtake each other.
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::io::unix::AsyncFd;

use crate::sys::watched;

/// What a change of the lease or of the time asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseChange {
    /// Nothing.
    Nothing,
    /// Stop the actor where it stands.
    Freeze,
    /// Let it go on.
    Thaw,
}

/// The deadline of what is in the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lease {
    /// CLOCK_BOOTTIME, ns; 0: none granted, which is as good as expired.
    deadline_ns: i64,
    frozen: bool,
}

impl Lease {
    /// A lease that begins now with a deadline.
    pub fn new(deadline_ns: i64) -> Self {
        Self { deadline_ns, frozen: false }
    }

    /// CLOCK_BOOTTIME, ns.
    pub fn deadline_ns(self) -> i64 {
        self.deadline_ns
    }

    /// Whether the actor is stopped because of it.
    pub fn frozen(self) -> bool {
        self.frozen
    }

    /// Whether it holds.
    pub fn valid(self, now_ns: i64) -> bool {
        now_ns < self.deadline_ns
    }

    /// A new deadline was granted.
    pub fn renew(&mut self, deadline_ns: i64, now_ns: i64) -> LeaseChange {
        self.deadline_ns = self.deadline_ns.max(deadline_ns);
        self.tick(now_ns)
    }

    /// Time has passed.
    pub fn tick(&mut self, now_ns: i64) -> LeaseChange {
        match (self.valid(now_ns), self.frozen) {
            (false, false) => {
                self.frozen = true;
                LeaseChange::Freeze
            }
            (true, true) => {
                self.frozen = false;
                LeaseChange::Thaw
            }
            _ => LeaseChange::Nothing,
        }
    }
}

/// Wakes at a moment of CLOCK_BOOTTIME, also across a sleep of the machine, which the runtime's own timers do not
/// count.
#[derive(Debug)]
pub struct BoottimeTimer {
    timer: TimerFd,
    /// A duplicate: both are the same timer.
    fired: AsyncFd<OwnedFd>,
}

impl BoottimeTimer {
    /// A timer that is not set.
    ///
    /// # Errors
    /// As timerfd_create(2).
    pub fn new() -> io::Result<Self> {
        let timer =
            TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
        let fired = watched(timer.as_fd().try_clone_to_owned()?)?;
        Ok(Self { timer, fired })
    }

    /// Sets or, with `None`, unsets it. A moment in the past fires at once.
    ///
    /// # Errors
    /// As timerfd_settime(2).
    pub fn set(&self, at_ns: Option<i64>) -> io::Result<()> {
        match at_ns {
            Some(at_ns) => {
                // 0 would unset it.
                let at = TimeSpec::from_duration(Duration::from_nanos(at_ns.max(1) as u64));
                self.timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
            }
            None => self.timer.unset()?,
        }
        Ok(())
    }

    /// Returns when it has fired. Safe to drop and call again.
    ///
    /// # Errors
    /// As read(2) on a timerfd.
    pub async fn fired(&self) -> io::Result<()> {
        loop {
            let mut ready = self.fired.readable().await?;
            let result = ready.try_io(|fired| {
                let mut count = [0; 8];
                Ok(nix::unistd::read(fired.get_ref(), &mut count)?)
            });
            match result {
                Ok(result) => return result.map(drop),
                Err(_would_block) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_freezes_once_at_the_deadline_and_thaws_on_a_later_one() {
        let mut lease = Lease::new(100);
        assert_eq!(lease.tick(99), LeaseChange::Nothing);
        assert_eq!(lease.tick(100), LeaseChange::Freeze);
        assert_eq!(lease.tick(101), LeaseChange::Nothing);
        assert!(lease.frozen());
        // A grant that is itself too late changes nothing.
        assert_eq!(lease.renew(150, 160), LeaseChange::Nothing);
        assert!(lease.frozen());
        assert_eq!(lease.renew(300, 170), LeaseChange::Thaw);
        assert!(!lease.frozen());
    }

    #[test]
    fn an_overtaken_grant_does_not_shorten_it() {
        let mut lease = Lease::new(500);
        assert_eq!(lease.renew(300, 250), LeaseChange::Nothing);
        assert_eq!(lease.deadline_ns(), 500);
        assert_eq!(lease.tick(400), LeaseChange::Nothing);
    }

    #[test]
    fn without_a_grant_nothing_runs() {
        assert_eq!(Lease::new(0).tick(1), LeaseChange::Freeze);
    }

    #[tokio::test]
    async fn the_timer_fires_at_its_moment_and_at_once_when_that_is_past() {
        let timer = BoottimeTimer::new().unwrap();
        let at = crate::boottime_ns() + 20_000_000;
        timer.set(Some(at)).unwrap();
        timer.fired().await.unwrap();
        assert!(crate::boottime_ns() >= at);
        timer.set(Some(1)).unwrap();
        timer.fired().await.unwrap();
    }
}
