// SPDX-License-Identifier: Apache-2.0
//! The words of the control plane: typed ids, records, quantities, and the rules every request is held to.
pub(crate) mod ids;
pub mod names;
pub mod quantity;
mod records;
mod validate;
mod validate_template;

pub use ids::{ActorUid, Generation, NodeName, SnapshotId, TemplateUid, WorkerId};
pub use records::{
    Actor, Atespace, CheckpointWork, EventDraft, Exit, GoldenMaker, NodeRecord, Placement, Quota, ResumeWork,
    Snapshot, SnapshotNote, State, StopKind, StopWork, Stored, Template, UploadWish, Work, WorkerRecord,
};
pub use validate::{
    ActorKey, Invalid, Page, actor_key, annotations, atespace_name, call_id, checkpoint_policy, egress,
    files, idle, labels, page, request_id, resource_name, snapshot_ref, spec_of_actor, tag, uid,
};
pub use validate_template::{egress_policy, template_spec};
