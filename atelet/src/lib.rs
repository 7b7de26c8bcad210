// SPDX-License-Identifier: Apache-2.0
//! The node agent (`atelet.v1.Node`): everything of a machine that is not one worker's own.
//!
//! ```text
//!   control plane ──Session, Activate, Checkpoint, Upload, …──▶ node ──▶ worker task ──▶ ateom process (one per slot)
//!                                                                │
//!                        images · spec resolution · leases ◀─────┼─────▶ node snapshots ──pack + manifest──▶ blobs
//! ```
//!
//! It owns the workers' processes ([`worker`]), what is local to this machine of each actor ([`actor`]), the images
//! ([`image`]), the binaries that sandboxes run on ([`asset`]), the snapshots on its disk and their way to and from the blob store ([`snapshot`], [`blob`]). It
//! decides nothing about actors: what runs where is the control plane's word, and its lease ([`lease`]) is handed to
//! every ateom, which enforces it alone. A restart of this process loses nothing: workers outlive it and are adopted
//! ([`worker`]), and every call is a task of its own that a retry joins ([`flight`]).
#![deny(unsafe_code)]

pub mod actor;
pub mod asset;
pub mod blob;
mod config;
pub mod disk;
pub mod durable;
mod error;
pub mod flight;
pub mod image;
pub mod lease;
pub mod logs;
mod metrics;
mod node;
pub mod snapshot;
mod sys;
pub mod worker;

pub use config::{Accelerator, Config, ImageLimits, MicrovmConfig, Remote, WorkerClass, WorkerConfig};
pub use error::{Error, NodeError};
pub use node::{serve, stop_workers};

/// Runs blocking work on a thread of its own; a panic goes on in the caller.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is being shut down: nobody waits for the answer.
            Err(_) => std::future::pending().await,
        },
    }
}
