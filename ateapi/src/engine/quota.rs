// SPDX-License-Identifier: Apache-2.0
//! Quotas of atespaces: actors, running actors, snapshot bytes, starts per second.
//!
//! | Limit | Counted | Refused beyond it |
//! |---|---|---|
//! | actors | by the store, in the transaction that creates one | create, fork |
//! | running | workers booked, under the pool's lock | a start |
//! | snapshot bytes | by the store, with every commit that changes them | checkpoint, fork, create; never suspend or pause, which would lose something |
//! | starts per second | a bucket that holds one second's worth, in memory | a start |
//!
//! Limits are kept in memory beside the bucket, so that a wake-up asks no store for them.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::{CallError, Engine, lock};
use crate::model::{Atespace, Quota, Stored as _};
use crate::schedule::Pool;
use crate::store::{self, Check, Expect, StoreError, Tx, Usage};

/// One limit of an atespace that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("atespace {atespace} has reached its quota of {quota}: {used} of {limit}")]
#[allow(missing_docs)]
pub struct QuotaExceeded {
    pub atespace: String,
    /// The field of the quota.
    pub quota: &'static str,
    pub used: u64,
    pub limit: u64,
    /// After which time the same call makes sense again.
    pub retry_after: Duration,
}

/// What leads on.
impl QuotaExceeded {
    pub(crate) fn way_out(&self) -> &'static str {
        match self.quota {
            "actors" => "delete an actor, or ask an administrator for more",
            "running" => "suspend an actor, or ask an administrator for more",
            "snapshot_bytes" => "delete actors, tags or forks, or ask an administrator for more",
            _ => "call again",
        }
    }
}

/// The limits of one atespace and what is left of this second's starts.
#[derive(Debug)]
struct Limits {
    quota: Quota,
    starts: f64,
    at: Duration,
}

/// Atespaces that have limits.
#[derive(Debug, Default)]
pub(crate) struct Quotas(BTreeMap<String, Limits>);

impl Quotas {
    pub(super) fn set(&mut self, atespace: &str, quota: Quota, now: Duration) {
        if quota == Quota::default() {
            self.0.remove(atespace);
            return;
        }
        let starts = f64::from(quota.wakeups_per_s);
        self.0.insert(atespace.to_owned(), Limits { quota, starts, at: now });
    }

    fn of(&self, atespace: &str) -> Quota {
        self.0.get(atespace).map_or_else(Quota::default, |limits| limits.quota)
    }

    /// Takes one start out of the bucket, or says when there is one again.
    fn take_start(&mut self, atespace: &str, now: Duration) -> Result<(), QuotaExceeded> {
        let Some(limits) = self.0.get_mut(atespace).filter(|it| it.quota.wakeups_per_s > 0) else {
            return Ok(());
        };
        let rate = f64::from(limits.quota.wakeups_per_s);
        let passed = now.saturating_sub(limits.at).as_secs_f64();
        limits.starts = (limits.starts + passed * rate).min(rate);
        limits.at = now;
        if limits.starts >= 1.0 {
            limits.starts -= 1.0;
            return Ok(());
        }
        let limit = u64::from(limits.quota.wakeups_per_s);
        Err(QuotaExceeded {
            atespace: atespace.to_owned(),
            quota: "wakeups_per_s",
            used: limit,
            limit,
            retry_after: Duration::from_secs_f64((1.0 - limits.starts) / rate),
        })
    }
}

impl Engine {
    pub(super) fn quota_of(&self, atespace: &str) -> Quota {
        lock(&self.quotas).of(atespace)
    }

    /// The precondition under which another actor is recorded.
    pub(super) fn actor_quota(&self, atespace: &str) -> Option<Check> {
        let limit = self.quota_of(atespace).actors;
        (limit > 0).then(|| Check::ActorsBelow(atespace.to_owned(), u64::from(limit)))
    }

    /// What a commit that failed on a quota means.
    pub(super) fn refused_commit(error: StoreError) -> CallError {
        match error {
            StoreError::Check(Check::ActorsBelow(atespace, limit)) => {
                let retry_after = Duration::from_secs(5);
                QuotaExceeded { atespace, quota: "actors", used: limit, limit, retry_after }.into()
            }
            other => other.into(),
        }
    }

    /// Refuses what makes another snapshot that could as well not be made.
    pub(super) async fn snapshot_quota(&self, atespace: &str) -> Result<(), CallError> {
        let limit = self.quota_of(atespace).snapshot_bytes;
        if limit == 0 {
            return Ok(());
        }
        let used = self.store.usage(atespace).await?.bytes;
        if used < limit {
            return Ok(());
        }
        let (atespace, quota) = (atespace.to_owned(), "snapshot_bytes");
        Err(QuotaExceeded { atespace, quota, used, limit, retry_after: Duration::from_secs(30) }.into())
    }

    /// Under the pool's lock, so that two starts never pass on the same free place.
    pub(super) fn running_quota(&self, pool: &Pool, atespace: &str) -> Result<(), QuotaExceeded> {
        let limit = u64::from(self.quota_of(atespace).running);
        if limit == 0 {
            return Ok(());
        }
        let used = pool.held_by(atespace) as u64;
        if used < limit {
            return Ok(());
        }
        let (atespace, quota) = (atespace.to_owned(), "running");
        Err(QuotaExceeded { atespace, quota, used, limit, retry_after: Duration::from_secs(1) })
    }

    pub(super) fn take_start(&self, atespace: &str) -> Result<(), QuotaExceeded> {
        let now = self.clock.now();
        lock(&self.quotas).take_start(atespace, now)
    }

    /// Replaces the limits of an atespace.
    pub(crate) async fn set_quota(self: &Arc<Self>, name: &str, quota: Quota) -> Result<Atespace, CallError> {
        let old: Option<Atespace> = store::load(&*self.store, name).await?;
        let old = old.ok_or_else(|| CallError::NotFound { kind: "atespace", name: name.to_owned() })?;
        let revision = old.revision;
        let atespace = Atespace { quota, ..old };
        let tx = Tx { puts: vec![(atespace.object(), Expect::Revision(revision))], ..Tx::default() };
        let committed = self.store.commit(tx).await?;
        lock(&self.quotas).set(name, quota, self.clock.now());
        Ok(Atespace { revision: committed.puts.first().copied().unwrap_or_default(), ..atespace })
    }

    /// What an atespace uses now, and how many workers it holds.
    pub(crate) async fn usage_of(&self, atespace: &str) -> Result<(Usage, u64), CallError> {
        let used = self.store.usage(atespace).await?;
        Ok((used, lock(&self.pool).held_by(atespace) as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_are_let_in_at_their_rate_after_a_burst() {
        let mut quotas = Quotas::default();
        let at = |ms| Duration::from_millis(ms);
        quotas.set("a", Quota { wakeups_per_s: 4, ..Quota::default() }, at(0));
        for _ in 0..4 {
            quotas.take_start("a", at(0)).unwrap();
        }
        let refused = quotas.take_start("a", at(0)).unwrap_err();
        assert_eq!((refused.quota, refused.limit, refused.retry_after), ("wakeups_per_s", 4, at(250)));
        quotas.take_start("a", at(250)).unwrap();
        quotas.take_start("a", at(300)).unwrap_err();
        // Saved up for no longer than a second; others are not held up.
        for _ in 0..4 {
            quotas.take_start("a", at(60_000)).unwrap();
        }
        quotas.take_start("a", at(60_000)).unwrap_err();
        quotas.take_start("b", at(60_000)).unwrap();
    }
}
