// SPDX-License-Identifier: Apache-2.0
//! Files that a gVisor workload writes outside its volumes live in the sandbox's memory and in every snapshot (design
//! §6): people are told when they hold more than a share of the limit.
//!
//! Asking the sandbox costs a process, so it is asked only when the actor's memory has grown since the last time: an
//! actor at rest is never asked.
use std::sync::Arc;

use substrate_proto::ateom::slot_event;
use tokio::sync::broadcast;

use super::notify;
use crate::runtime::Sandbox;

/// Shares of the limit (per cent) at which it is said.
const SHARES: [u64; 3] = [25, 50, 75];
/// Share of the limit (per cent) by which the memory has to grow before the sandbox is asked.
const STEP: u64 = 5;
/// Taken for the limit where there is none, bytes.
const NO_LIMIT: u64 = 1 << 30;
/// Smallest growth that is looked at, bytes.
const LEAST: u64 = 4 << 20;

/// What was seen of one activation. Pure.
#[derive(Debug, Default)]
pub(super) struct Growth {
    activation: u64,
    /// Memory when the sandbox was last asked, bytes.
    asked_at: u64,
    /// How many of [`SHARES`] were said.
    said: usize,
}

impl Growth {
    /// Whether the sandbox is to be asked now, with `memory` bytes in use.
    pub(super) fn is_worth_asking(&mut self, activation: u64, memory: u64, limit: u64) -> bool {
        if self.activation != activation {
            *self = Self { activation, ..Self::default() };
        }
        let step = (base(limit) * STEP / 100).max(LEAST);
        if self.said == SHARES.len() || memory < self.asked_at.saturating_add(step) {
            return false;
        }
        self.asked_at = memory;
        true
    }

    /// The share that is to be said, with `written` bytes of files; each once.
    fn crossed(&mut self, activation: u64, written: u64, limit: u64) -> Option<u64> {
        if self.activation != activation {
            return None;
        }
        let over = SHARES.iter().filter(|share| written >= base(limit) * **share / 100).count();
        if over <= self.said {
            return None;
        }
        self.said = over;
        Some(SHARES[over - 1])
    }
}

fn base(limit: u64) -> u64 {
    if limit == 0 { NO_LIMIT } else { limit }
}

/// Asks a sandbox, and tells watchers if a share was crossed.
pub(super) async fn look(
    growth: Arc<std::sync::Mutex<Growth>>,
    sandbox: Arc<dyn Sandbox>,
    activation: u64,
    limit: u64,
    events: broadcast::Sender<slot_event::Event>,
) {
    let Some(written) = sandbox.written_bytes().await else { return };
    let crossed =
        growth.lock().unwrap_or_else(std::sync::PoisonError::into_inner).crossed(activation, written, limit);
    let Some(share) = crossed else { return };
    let of = if limit == 0 {
        format!("{} MiB (no memory limit is set)", NO_LIMIT >> 20)
    } else {
        format!("its memory limit of {} MiB", limit >> 20)
    };
    let message = format!(
        "files written outside volumes hold {} MiB of memory, more than {share} % of {of}; they are in every snapshot, \
         and beyond the limit the actor is killed: put them in a volume, or delete them",
        written >> 20
    );
    notify(&events, "OverlayGrew", message);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asked_only_when_memory_grew_and_each_share_is_said_once() {
        const LIMIT: u64 = 1000 << 20;
        let mut growth = Growth::default();
        assert!(growth.is_worth_asking(1, 60 << 20, LIMIT));
        assert!(!growth.is_worth_asking(1, 100 << 20, LIMIT), "not by 5 %");
        assert_eq!(growth.crossed(1, 30 << 20, LIMIT), None);
        assert!(growth.is_worth_asking(1, 400 << 20, LIMIT));
        assert_eq!(growth.crossed(1, 260 << 20, LIMIT), Some(25));
        assert!(growth.is_worth_asking(1, 500 << 20, LIMIT));
        assert_eq!(growth.crossed(1, 270 << 20, LIMIT), None, "said already");
        assert_eq!(growth.crossed(1, 800 << 20, LIMIT), Some(75), "the highest of those crossed");
        assert!(!growth.is_worth_asking(1, 990 << 20, LIMIT), "nothing more to say");
        // The next activation begins anew.
        assert!(growth.is_worth_asking(2, 60 << 20, LIMIT));
        assert_eq!(growth.crossed(1, 900 << 20, LIMIT), None, "an answer of a past one");
        assert_eq!(growth.crossed(2, 500 << 20, LIMIT), Some(50));
        // Without a limit there is still a measure.
        assert!(Growth::default().is_worth_asking(1, 60 << 20, 0));
    }
}
