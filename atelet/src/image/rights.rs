// SPDX-License-Identifier: Apache-2.0
//! Which atespace was seen to have a right to which image, and when (P6).
//!
//! A check holds for a while ([`super::Config::right_ttl`]). After that it is made again; when the source cannot
//! answer, an older check still counts until [`super::Config::right_grace`] is over, so that a registry's outage does
//! not keep actors from waking up. A refusal ends the right at once. Checks survive a restart.
use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::reference::Digest;

/// What an earlier check is worth now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It holds.
    Fresh,
    /// It holds if it cannot be made again.
    Stale,
    /// There is none, or it is too old.
    None,
}

/// Checks by (atespace, source, digest), with the Unix time in seconds.
#[derive(Debug, Default)]
pub(super) struct Rights {
    checks: HashMap<String, u64>,
}

fn key(atespace: &str, source: &str, digest: &Digest) -> String {
    // Neither an atespace nor a source contains a line feed: references with control characters are refused.
    format!("{atespace}\n{source}\n{digest}")
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Rights {
    /// Reads what [`Rights::prune`] wrote. Unreadable is the same as empty: the checks are made again.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self { checks: serde_json::from_slice(bytes).unwrap_or_default() }
    }

    /// Forgets what is older than `grace` and gives the rest for the disk.
    pub fn prune(&mut self, grace: Duration, now: SystemTime) -> Vec<u8> {
        let now = seconds(now);
        self.checks.retain(|_, checked| now.saturating_sub(*checked) <= grace.as_secs());
        serde_json::to_vec(&self.checks).unwrap_or_default()
    }

    /// What is known of a right.
    pub fn standing(
        &self,
        (atespace, source, digest): (&str, &str, &Digest),
        ttl: Duration,
        grace: Duration,
        now: SystemTime,
    ) -> Standing {
        let Some(&checked) = self.checks.get(&key(atespace, source, digest)) else { return Standing::None };
        // A check in the future means that the clock was set: it proves nothing about when it was made.
        match seconds(now).checked_sub(checked).map(Duration::from_secs) {
            Some(age) if age < ttl => Standing::Fresh,
            Some(age) if age < grace => Standing::Stale,
            Some(_) => Standing::None,
            None => Standing::Stale,
        }
    }

    /// Notes a check that succeeded.
    pub fn grant(&mut self, (atespace, source, digest): (&str, &str, &Digest), now: SystemTime) {
        self.checks.insert(key(atespace, source, digest), seconds(now));
    }

    /// Notes a check that failed.
    pub fn revoke(&mut self, (atespace, source, digest): (&str, &str, &Digest)) {
        self.checks.remove(&key(atespace, source, digest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_ages_and_is_of_one_atespace_and_source() {
        let (ttl, grace) = (Duration::from_mins(1), Duration::from_mins(10));
        let start = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let digest = Digest::of(b"x");
        let mut rights = Rights::default();
        rights.grant(("a", "reg/repo", &digest), start);
        let mut rights = Rights::from_bytes(&rights.prune(grace, start));
        let standing = |rights: &Rights, who, source, after: u64| {
            rights.standing((who, source, &digest), ttl, grace, start + Duration::from_secs(after))
        };
        assert_eq!(standing(&rights, "a", "reg/repo", 59), Standing::Fresh);
        assert_eq!(standing(&rights, "a", "reg/repo", 60), Standing::Stale);
        assert_eq!(standing(&rights, "a", "reg/repo", 600), Standing::None);
        assert_eq!(standing(&rights, "b", "reg/repo", 1), Standing::None);
        assert_eq!(standing(&rights, "a", "evil/repo", 1), Standing::None);
        let before = start - Duration::from_secs(5);
        assert_eq!(rights.standing(("a", "reg/repo", &digest), ttl, grace, before), Standing::Stale);
        rights.revoke(("a", "reg/repo", &digest));
        assert_eq!(standing(&rights, "a", "reg/repo", 1), Standing::None);
        rights.grant(("a", "reg/repo", &digest), start);
        let later = rights.prune(grace, start + Duration::from_secs(601));
        assert_eq!(standing(&Rights::from_bytes(&later), "a", "reg/repo", 1), Standing::None);
    }
}
