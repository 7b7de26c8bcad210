// SPDX-License-Identifier: Apache-2.0
//! How far an image is, for everyone who waits for it.
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

use super::error::ImageError;
use super::store::Image;

/// What is going on with an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Finding out what the reference means and whether it may be had.
    Resolving,
    /// Layers are being pulled, and unpacked as they arrive.
    Pulling,
    /// All layers are here; some are still being unpacked.
    Extracting,
    /// The disk of a machine is being made of them.
    Building,
    /// Done.
    Ready,
}

impl Phase {
    /// As in `atelet.v1.EnsureImageProgress`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Resolving => "resolving",
            Self::Pulling => "pulling",
            Self::Extracting => "extracting",
            Self::Building => "building",
            Self::Ready => "ready",
        }
    }
}

/// How far it is; bytes are of compressed layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is going on.
    pub phase: Phase,
    /// Bytes of this phase that are done.
    pub bytes_done: u64,
    /// Bytes of this phase in all; 0 means not known.
    pub bytes_total: u64,
}

impl Progress {
    pub(super) const START: Self = Self { phase: Phase::Resolving, bytes_done: 0, bytes_total: 0 };
}

/// What the task of one image tells its callers.
#[derive(Debug, Clone)]
pub(super) struct JobState {
    pub progress: Progress,
    pub outcome: Option<Result<Image, ImageError>>,
}

/// Sums up what the layers of one image do, and tells those who follow.
#[derive(Debug)]
pub(super) struct Meter {
    pub sender: watch::Sender<JobState>,
    total: AtomicU64,
    pulled: AtomicU64,
    unpacked: AtomicU64,
}

impl Meter {
    pub fn new(sender: watch::Sender<JobState>) -> Self {
        let zero = || AtomicU64::new(0);
        Self { sender, total: zero(), pulled: zero(), unpacked: zero() }
    }

    pub fn begin(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
        self.tell();
    }

    pub fn pulled(&self, bytes: u64) {
        self.pulled.fetch_add(bytes, Ordering::Relaxed);
        self.tell();
    }

    pub fn unpacked(&self, bytes: u64) {
        self.unpacked.fetch_add(bytes, Ordering::Relaxed);
        self.tell();
    }

    /// A layer that is here already.
    pub fn skip(&self, bytes: u64) {
        self.unpacked.fetch_add(bytes, Ordering::Relaxed);
        self.pulled(bytes);
    }

    fn tell(&self) {
        let total = self.total.load(Ordering::Relaxed);
        let pulled = self.pulled.load(Ordering::Relaxed).min(total);
        let (phase, bytes_done) = if pulled < total {
            (Phase::Pulling, pulled)
        } else {
            (Phase::Extracting, self.unpacked.load(Ordering::Relaxed).min(total))
        };
        let next = Progress { phase, bytes_done, bytes_total: total };
        self.sender.send_if_modified(|state| {
            let step = (total / 200).max(1);
            // Layers report from several threads: never tell an older state after a newer one.
            let is_worth_telling = phase > state.progress.phase
                || phase == state.progress.phase && bytes_done >= state.progress.bytes_done + step;
            if is_worth_telling {
                state.progress = next;
            }
            is_worth_telling
        });
    }
}
