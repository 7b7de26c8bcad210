// SPDX-License-Identifier: Apache-2.0
//! Moments at which something of an actor is due without anyone asking: one per actor, on the monotonic clock, so that
//! setting the wall clock neither wakes everyone nor puts anyone to sleep. Actors with nothing due cost nothing.
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use super::{Command, Engine, lock};
use crate::model::{Actor, ActorUid};
use crate::workflow;

/// When what is due but cannot be done (its node is away) is looked at again.
const AGAIN: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    by_time: BTreeSet<(Duration, ActorUid)>,
    of: HashMap<ActorUid, Duration>,
}

impl Timers {
    /// Replaces an actor's moment.
    fn set(&mut self, uid: &ActorUid, at: Option<Duration>) {
        if let Some(old) = self.of.remove(uid) {
            self.by_time.remove(&(old, uid.clone()));
        }
        if let Some(at) = at {
            self.of.insert(uid.clone(), at);
            self.by_time.insert((at, uid.clone()));
        }
    }

    /// Takes out whom a moment has come for.
    fn take_due(&mut self, now: Duration) -> Vec<ActorUid> {
        let mut due = Vec::new();
        while let Some((_, uid)) = self.by_time.first().filter(|(at, _)| *at <= now).cloned() {
            self.set(&uid, None);
            due.push(uid);
        }
        due
    }

    fn next(&self) -> Option<Duration> {
        self.by_time.first().map(|(at, _)| *at)
    }
}

impl Engine {
    /// Files the next moment at which something of an actor is due.
    pub(crate) fn note_timer(&self, actor: &Actor) {
        self.file_timer(actor, Duration::ZERO);
    }

    /// The same after it was woken for what may still not be possible.
    pub(super) fn note_timer_again(&self, actor: &Actor) {
        self.file_timer(actor, AGAIN);
    }

    fn file_timer(&self, actor: &Actor, least: Duration) {
        let wait = workflow::wake_in(actor, self.clock.wall_ms());
        let at = wait.map(|wait| self.clock.now() + wait.max(least));
        lock(&self.timers).set(&actor.uid, at);
        if at.is_some() {
            self.timers_changed.notify_one();
        }
    }

    /// Wakes drivers when something of their actor is due.
    pub(super) async fn run_timers(self: Arc<Self>) {
        loop {
            let now = self.clock.now();
            let (due, next) = {
                let mut timers = lock(&self.timers);
                (timers.take_due(now), timers.next())
            };
            for uid in due {
                self.tell(&uid, Command::Wake);
            }
            tokio::select! {
                biased;
                () = self.timers_changed.notified() => {}
                () = self.clock.sleep_until(next.unwrap_or(now + Duration::from_hours(1))) => {}
            }
        }
    }
}
