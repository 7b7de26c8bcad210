// SPDX-License-Identifier: Apache-2.0
//! What the hub counts (docs/metrics.md). Whoever runs it installs a recorder; without one this costs nothing. No label
//! names a tenant.
use std::time::Duration;

use metrics::{counter, gauge, histogram};

fn result(ok: bool) -> &'static str {
    if ok { "ok" } else { "failed" }
}

/// Sandboxes that are followed.
pub(crate) fn sessions(count: usize) {
    gauge!("substrate_sessions").set(count as f64);
}

/// A session that is open at the gateway, for as long as it is kept.
pub(crate) struct Open(());

impl Open {
    /// It began.
    pub(crate) fn begin() -> Self {
        leg("opened");
        gauge!("substrate_sessions_open").increment(1.0);
        Self(())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        gauge!("substrate_sessions_open").decrement(1.0);
    }
}

/// A session at the gateway changed: `opened`, `lost`, `refused`, `closed` with its sandbox, or `failed` to open.
pub(crate) fn leg(change: &'static str) {
    counter!("substrate_session_changes_total", "change" => change).increment(1);
}

/// A relay's stream came after so long; or never. `from`: `awake` or `asleep`.
pub(crate) fn relay(from: &'static str, took: Option<Duration>) {
    match took {
        Some(took) => histogram!("substrate_session_relay_seconds", "from" => from).record(took),
        None => counter!("substrate_session_relays_expired_total", "from" => from).increment(1),
    }
}

/// An actor was asked for because of a relay.
pub(crate) fn wake(ok: bool) {
    counter!("substrate_session_wakes_total", "result" => result(ok)).increment(1);
}

/// A link to a shim: `fresh`, or `resumed` where it was.
pub(crate) fn link(fresh: bool) {
    let kind = if fresh { "fresh" } else { "resumed" };
    counter!("substrate_session_links_total", "kind" => kind).increment(1);
}

/// A token was to be renewed.
pub(crate) fn token(ok: bool) {
    counter!("substrate_session_tokens_total", "result" => result(ok)).increment(1);
}
