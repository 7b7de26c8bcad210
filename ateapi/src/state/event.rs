// SPDX-License-Identifier: Apache-2.0
//! What can happen to an actor, and what follows from it.
use crate::model::{
    EventDraft, Exit, Generation, NodeName, Placement, Snapshot, SnapshotId, State, StopKind, WorkerId,
};

/// How an activation failed. Whatever failed, nothing runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// Worth another try.
    Again,
    /// It will not work as it is.
    ForGood,
    /// The node's copy of the snapshot is missing or corrupt.
    NodeCopy,
}

/// Why an activation failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What it means.
    pub kind: FailureKind,
    /// UPPER_SNAKE.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// A snapshot's durable half.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Its digest.
    pub digest: String,
    /// Packs it names.
    pub packs: Vec<String>,
    /// Bytes of the snapshot.
    pub bytes: u64,
    /// Newly written bytes.
    pub stored_bytes: u64,
}

/// What happens to an actor.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A worker was found to bring its latest state up on.
    Resume {
        /// The worker.
        placement: Placement,
        /// Who asked.
        cause: String,
    },
    /// A worker was found to start a new actor on from its template's golden snapshot.
    Clone {
        /// The worker.
        placement: Placement,
        /// Who asked.
        cause: String,
        /// The snapshot.
        golden: Box<Snapshot>,
    },
    /// A worker was found to boot it afresh on, volumes kept.
    Reset {
        /// The worker.
        placement: Placement,
    },
    /// It runs and answers.
    Activated {
        /// Of the assignment.
        generation: Generation,
        /// Where the router enters.
        ingress_endpoint: String,
    },
    /// It does not, and nothing of it runs.
    ActivateFailed {
        /// Of the assignment.
        generation: Generation,
        /// Why.
        failure: Failure,
    },
    /// Suspend or pause.
    Stop {
        /// Which.
        kind: StopKind,
        /// Id of the snapshot to be made.
        snapshot: SnapshotId,
        /// Who asked.
        by: String,
        /// Refuse when it is busy.
        only_if_idle: bool,
        /// Grace of requests in flight, ms.
        drain_ms: u32,
        /// A pause is promoted after this much more, ms; 0: never.
        promote_after_ms: u64,
    },
    /// A checkpoint that keeps it running.
    Checkpoint {
        /// Id of the snapshot to be made.
        snapshot: SnapshotId,
        /// Whether it is uploaded.
        durable: bool,
    },
    /// The node snapshot is complete and fsynced.
    Snapshotted {
        /// Of the assignment.
        generation: Generation,
        /// The snapshot.
        snapshot: Box<Snapshot>,
    },
    /// Refused before the sandbox was touched.
    CheckpointRefused {
        /// Of the assignment.
        generation: Generation,
        /// UPPER_SNAKE.
        reason: String,
        /// For people.
        message: String,
    },
    /// There is no snapshot and the sandbox is gone.
    CheckpointFailed {
        /// Of the assignment.
        generation: Generation,
        /// For people.
        message: String,
    },
    /// A checkpoint of a running actor failed and it runs on.
    CheckpointAbandoned {
        /// Of the assignment.
        generation: Generation,
        /// For people.
        message: String,
    },
    /// The worker is free: its cgroup is empty.
    Released {
        /// Of the assignment.
        generation: Generation,
    },
    /// Pack and manifest are durable.
    Uploaded {
        /// Which.
        snapshot: SnapshotId,
        /// The manifest.
        manifest: Manifest,
    },
    /// They are not; it is tried again.
    UploadFailed {
        /// Which.
        snapshot: SnapshotId,
        /// For people.
        message: String,
        /// Unix time, ms, before which it is not tried again.
        not_before_ms: i64,
    },
    /// A pause becomes durable.
    Promote,
    /// An earlier snapshot becomes the latest.
    Revert {
        /// Which.
        snapshot: SnapshotId,
    },
    /// The worker died and is fenced, or its lease ran out with the margin.
    WorkerLost {
        /// Of the assignment.
        generation: Generation,
        /// For people.
        message: String,
    },
    /// The workload ended by itself; the slot is free.
    Exited {
        /// Of the assignment.
        generation: Generation,
        /// How.
        exit: Exit,
    },
    /// A node's copy of a snapshot is gone.
    NodeCopyLost {
        /// Which.
        snapshot: SnapshotId,
        /// For people.
        message: String,
    },
    /// Remove it.
    Delete,
    /// Nothing of it is left.
    Deleted,
}

/// What has to be done besides writing the new record.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Record an event.
    Record(EventDraft),
    /// The worker's assignment ended: nothing of this generation runs there.
    Free {
        /// The slot.
        worker: WorkerId,
        /// Its node.
        node: NodeName,
        /// The generation that ended.
        generation: Generation,
    },
    /// Remove the record.
    Remove,
}

/// An event that its state does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// UPPER_SNAKE.
    pub reason: &'static str,
    /// The state that refused.
    pub state: State,
    /// For people.
    pub message: String,
    /// What leads on.
    pub way_out: &'static str,
}
