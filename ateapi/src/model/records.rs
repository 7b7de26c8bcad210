// SPDX-License-Identifier: Apache-2.0
//! What the store holds. Records are documents: one actor is one row, so that everything that must change together
//! changes in one compare-and-set.
use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use substrate_proto::{ateapi, types};

use super::{ActorUid, Generation, NodeName, SnapshotId, TemplateUid, WorkerId};
use crate::store::{Kind, Object};

/// A tenancy boundary.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Atespace {
    /// DNS-1123 label.
    pub name: String,
    /// For people and selectors.
    pub labels: BTreeMap<String, String>,
    /// Unix time, ms.
    pub created_ms: i64,
    /// What it may use.
    #[serde(default)]
    pub quota: Quota,
    /// Of its last change.
    #[serde(skip)]
    pub revision: u64,
}

/// Limits of an atespace; 0: none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quota {
    /// Actors, asleep or awake.
    pub actors: u32,
    /// Actors that hold a worker.
    pub running: u32,
    /// Bytes of all snapshots.
    pub snapshot_bytes: u64,
    /// Starts of actors per second.
    pub wakeups_per_s: u32,
}

/// What actors are made from; never changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Template {
    /// Drawn at creation.
    pub uid: TemplateUid,
    /// Whose it is.
    pub atespace: String,
    /// Unique in the atespace.
    pub name: String,
    /// With images pinned.
    pub spec: types::TemplateSpec,
    /// For people and selectors.
    pub labels: BTreeMap<String, String>,
    /// Unix time, ms.
    pub created_ms: i64,
    /// sha256 of the pinned spec.
    pub spec_digest: String,
    /// sha256 of the spec as it was asked for, so that asking again is recognised although a tag has moved.
    pub source_digest: String,
    /// Where ingress goes, first is default: the containers' ports or else what the image exposes.
    pub ports: Vec<u32>,
    /// Of its last change.
    #[serde(skip)]
    pub revision: u64,
}

/// The states of design section 5.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum State {
    New,
    Suspended,
    Resuming,
    Running,
    Suspending,
    Pausing,
    Paused,
    Exited,
    Crashed,
    Deleting,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::New,
        Self::Suspended,
        Self::Resuming,
        Self::Running,
        Self::Suspending,
        Self::Pausing,
        Self::Paused,
        Self::Exited,
        Self::Crashed,
        Self::Deleting,
    ];

    /// As the API names it.
    pub fn as_str(self) -> &'static str {
        self.to_proto().as_str_name()
    }

    /// As the API numbers it.
    pub fn to_proto(self) -> ateapi::ActorState {
        match self {
            Self::New => ateapi::ActorState::New,
            Self::Suspended => ateapi::ActorState::Suspended,
            Self::Resuming => ateapi::ActorState::Resuming,
            Self::Running => ateapi::ActorState::Running,
            Self::Suspending => ateapi::ActorState::Suspending,
            Self::Pausing => ateapi::ActorState::Pausing,
            Self::Paused => ateapi::ActorState::Paused,
            Self::Exited => ateapi::ActorState::Exited,
            Self::Crashed => ateapi::ActorState::Crashed,
            Self::Deleting => ateapi::ActorState::Deleting,
        }
    }

    /// From the API's number; none for 0 and unknown ones.
    pub fn from_proto(number: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.to_proto() as i32 == number)
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A worker that an actor holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The slot.
    pub worker: WorkerId,
    /// The slot's node.
    pub node: NodeName,
}

/// How a workload ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Which container.
    pub container: String,
    /// 0..255, or 128 + signal.
    pub code: i32,
    /// 0: by itself.
    pub signal: i32,
    /// Unix time, ms.
    pub time_ms: i64,
}

/// An upload that is owed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadWish {
    /// How often it failed.
    pub attempts: u32,
    /// Unix time, ms, before which it is not tried again.
    pub not_before_ms: i64,
    /// What the last failure said.
    pub error: String,
}

/// A complete snapshot of an actor. It exists because this record is committed (P2).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Unique over all actors.
    pub id: SnapshotId,
    /// Under whose directory and keys its bytes are: another actor's for a fork.
    pub origin: ActorUid,
    /// Of the assignment that made it.
    pub generation: Generation,
    /// When memory was captured, unix ms.
    pub time_ms: i64,
    /// All files.
    pub bytes: u64,
    /// Newly written to the blob store.
    pub stored_bytes: u64,
    /// Node with a complete, fsynced copy, as far as is known.
    pub node: Option<NodeName>,
    /// Digest of the node's record of it.
    pub node_digest: String,
    /// Digest of the committed manifest; none: not durable.
    pub manifest: Option<String>,
    /// Packs the manifest names.
    pub packs: Vec<String>,
    /// What it needs of the place that restores it.
    pub compatibility: types::Compatibility,
    /// "suspend", "pause", "checkpoint".
    pub cause: String,
    /// Names that keep it.
    pub tags: BTreeSet<String>,
    /// Set while its upload is owed.
    pub upload: Option<UploadWish>,
}

impl Snapshot {
    /// Whether it is in the blob store.
    pub fn is_durable(&self) -> bool {
        self.manifest.is_some()
    }

    /// Whether nothing of its generation's life is missing: the sandbox ended with it.
    pub fn is_final(&self) -> bool {
        self.cause != "checkpoint"
    }
}

/// Suspend or pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopKind {
    /// Into the durable store.
    Suspend,
    /// Kept on the node.
    Pause,
}

impl StopKind {
    /// The snapshot's cause.
    pub fn cause(self) -> &'static str {
        match self {
            Self::Suspend => "suspend",
            Self::Pause => "pause",
        }
    }
}

/// The work in progress, persisted with the state that it belongs to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Work {
    /// RESUMING.
    Resume(ResumeWork),
    /// SUSPENDING and PAUSING.
    Stop(StopWork),
    /// RUNNING: a checkpoint that keeps it running.
    Checkpoint(CheckpointWork),
}

/// A resume or reset.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResumeWork {
    /// Restored from; none: cold boot.
    pub source: Option<SnapshotId>,
    /// A cold boot with what is in the volumes (reset).
    pub keep_volumes: bool,
    /// The state it was taken out of.
    pub came_from: State,
    /// Who asked.
    pub cause: String,
}

/// A suspend or pause.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopWork {
    /// Which.
    pub kind: StopKind,
    /// Chosen before, so that a retry finds it.
    pub snapshot: SnapshotId,
    /// "user", "idle", "drain", "evict", "shutdown".
    pub by: String,
    /// Refuse when a connection, exec or busy hold is live.
    pub only_if_idle: bool,
    /// How long requests in flight may end, ms.
    pub drain_ms: u32,
    /// A pause is promoted after this much more, ms; 0: never.
    pub promote_after_ms: u64,
    /// The node snapshot is complete: memory has ended.
    pub taken: bool,
}

/// A checkpoint of a running actor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointWork {
    /// Chosen before, so that a retry finds it.
    pub snapshot: SnapshotId,
    /// Whether it is uploaded as well.
    pub durable: bool,
}

/// An actor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Actor {
    /// Outlives every machine it runs on.
    pub uid: ActorUid,
    /// Whose it is.
    pub atespace: String,
    /// Unique in the atespace.
    pub name: String,
    /// As asked for; contents of files are sealed elsewhere.
    pub spec: types::ActorSpec,
    /// The template's uid.
    pub template_uid: TemplateUid,
    /// From the template.
    pub class: String,
    /// From the template.
    pub pool: String,
    /// From the template.
    pub ports: Vec<u32>,
    /// From the template.
    pub checkpoint: types::CheckpointPolicy,
    /// From the template.
    pub keep_last: u32,
    /// From the template: no fork.
    pub holds_identity: bool,
    /// The template's, or the actor's own when it was updated.
    pub idle: types::IdlePolicy,
    /// The actor's own policy; none: the template's.
    pub egress: Option<types::EgressPolicy>,
    /// Raised with each change of the policy.
    pub egress_revision: u64,
    /// Stable synthetic addresses, by index.
    pub egress_names: BTreeMap<String, u32>,
    /// Where it stands.
    pub state: State,
    /// Why, UPPER_SNAKE.
    pub reason: String,
    /// Why, for people.
    pub message: String,
    /// Unix time, ms.
    pub state_since_ms: i64,
    /// Unix time, ms.
    pub created_ms: i64,
    /// Of its latest assignment.
    pub generation: Generation,
    /// The worker it holds.
    pub placement: Option<Placement>,
    /// Where the router enters while it runs.
    pub ingress_endpoint: String,
    /// Oldest first.
    pub snapshots: Vec<Snapshot>,
    /// The latest: what a resume brings up.
    pub last: Option<SnapshotId>,
    /// How the workload ended.
    pub exit: Option<Exit>,
    /// Who asked for the present sleep.
    pub suspended_by: String,
    /// Progress of a boot.
    pub progress_step: String,
    /// 0..100.
    pub progress_percent: u32,
    /// In progress.
    pub work: Option<Work>,
    /// Nodes that may hold something of it.
    pub nodes: BTreeSet<NodeName>,
    /// Unix time, ms, at which a pause is promoted; 0: never.
    pub promote_at_ms: i64,
    /// Its next activation is from another actor's state.
    pub clone: bool,
    /// It exists to make a template's golden snapshot: kept as `Kind::Golden`, which no tenant sees.
    #[serde(default)]
    pub golden: Option<GoldenMaker>,
    /// The golden snapshot could not be restored: its first start is from its image.
    #[serde(default)]
    pub boots_cold: bool,
    /// Of its last change.
    #[serde(skip)]
    pub revision: u64,
}

impl Actor {
    /// A NEW actor with nothing behind it and no wishes of its own: what its maker knows goes on top.
    pub fn fresh(uid: ActorUid, template_uid: TemplateUid, now_ms: i64) -> Self {
        Self {
            uid,
            atespace: String::new(),
            name: String::new(),
            spec: types::ActorSpec::default(),
            template_uid,
            class: String::new(),
            pool: String::new(),
            ports: Vec::new(),
            checkpoint: types::CheckpointPolicy::default(),
            keep_last: crate::retention::DEFAULT_KEEP_LAST,
            holds_identity: false,
            idle: types::IdlePolicy::default(),
            egress: None,
            egress_revision: 1,
            egress_names: BTreeMap::new(),
            state: State::New,
            reason: String::new(),
            message: String::new(),
            state_since_ms: now_ms,
            created_ms: now_ms,
            generation: Generation(0),
            placement: None,
            ingress_endpoint: String::new(),
            snapshots: Vec::new(),
            last: None,
            exit: None,
            suspended_by: String::new(),
            progress_step: String::new(),
            progress_percent: 0,
            work: None,
            nodes: BTreeSet::new(),
            promote_at_ms: 0,
            clone: false,
            golden: None,
            boots_cold: false,
            revision: 0,
        }
    }
}

impl Actor {
    /// A snapshot by id.
    pub fn snapshot(&self, id: &SnapshotId) -> Option<&Snapshot> {
        self.snapshots.iter().find(|snapshot| snapshot.id == *id)
    }

    /// A snapshot by id, to change it.
    pub fn snapshot_mut(&mut self, id: &SnapshotId) -> Option<&mut Snapshot> {
        self.snapshots.iter_mut().find(|snapshot| snapshot.id == *id)
    }

    /// A snapshot by id or tag.
    pub fn find_snapshot(&self, id_or_tag: &str) -> Option<&Snapshot> {
        self.snapshots
            .iter()
            .find(|snapshot| snapshot.id.as_str() == id_or_tag || snapshot.tags.contains(id_or_tag))
    }

    /// The latest snapshot.
    pub fn last_snapshot(&self) -> Option<&Snapshot> {
        self.last.as_ref().and_then(|id| self.snapshot(id))
    }

    /// Its current assignment, if it holds a worker.
    pub fn assignment(&self) -> Option<types::Assignment> {
        self.placement.as_ref().map(|placement| types::Assignment {
            actor_uid: self.uid.0.clone(),
            atespace: self.atespace.clone(),
            actor_name: self.name.clone(),
            generation: self.generation.0,
            worker_id: placement.worker.0.clone(),
        })
    }

    /// Bytes of its snapshots: what each newly stored, or all of it while it is only on a node.
    pub fn snapshot_bytes(&self) -> u64 {
        self.snapshots.iter().map(|it| if it.is_durable() { it.stored_bytes } else { it.bytes }).sum()
    }

    /// The newest snapshot whose upload is owed.
    pub fn owed_upload(&self) -> Option<&Snapshot> {
        self.snapshots.iter().rev().find(|snapshot| snapshot.upload.is_some())
    }

    /// Whether a start of the control plane has to look at it.
    pub fn is_unsettled(&self) -> bool {
        matches!(
            self.state,
            State::Resuming | State::Running | State::Suspending | State::Pausing | State::Deleting
        ) || self.owed_upload().is_some()
            || self.promote_at_ms != 0
    }
}

/// What a golden snapshot is made for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoldenMaker {
    /// Runtime that can restore it.
    pub runtime_digest: String,
}

/// What is remembered of a worker: what people asked for and what watchers were told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerRecord {
    /// The slot.
    pub id: WorkerId,
    /// Its node.
    pub node: NodeName,
    /// Its pool.
    pub pool: String,
    /// "gvisor" or "microvm".
    pub class: String,
    /// sha256 of the runtime binary.
    pub runtime_digest: String,
    /// For people.
    pub runtime_version: String,
    /// Its process runs and answers.
    pub alive: bool,
    /// Gets nothing new.
    pub cordoned: bool,
    /// Who holds it.
    pub actor: Option<(ActorUid, Generation)>,
    /// For people.
    pub atespace: String,
    /// For people.
    pub actor_name: String,
    /// Of its last change.
    #[serde(skip)]
    pub revision: u64,
}

/// What is remembered of a node: what its lease rests on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its name.
    pub name: NodeName,
    /// Another one means that everything that ran is gone.
    pub boot_id: String,
    /// Term of the last grants, ms: a control plane that starts assumes that one was given just before.
    pub term_ms: u64,
    /// Unix time, ms, at which the last grant ends.
    pub lease_until_ms: i64,
    /// Of its last change.
    #[serde(skip)]
    pub revision: u64,
}

/// A snapshot as watchers are told of it: with whose it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SnapshotNote {
    /// Whose.
    pub actor_uid: ActorUid,
    /// The actor's atespace.
    pub atespace: String,
    /// The actor's name.
    pub actor_name: String,
    /// The snapshot.
    pub snapshot: Snapshot,
}

/// An event to be recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventDraft {
    /// "actor", "worker", "template", "egress".
    pub kind: String,
    /// Whose.
    pub atespace: String,
    /// Name.
    pub subject: String,
    /// Uid.
    pub subject_uid: String,
    /// CamelCase.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Whether someone should look.
    pub warning: bool,
    /// Machine-readable details.
    pub metadata: BTreeMap<String, String>,
    /// Unix time, ms.
    pub time_ms: i64,
}

/// A record that the store can hold.
pub trait Stored: Sized + Serialize + for<'de> Deserialize<'de> {
    /// Its table.
    const KIND: Kind;
    /// Its table, where records of one type have several.
    fn kind(&self) -> Kind {
        Self::KIND
    }
    /// Its unique key.
    fn key(&self) -> String;
    /// The row to write.
    fn object(&self) -> Object;
    /// Revision of the row it was read from.
    fn revision(&self) -> u64;
    /// Sets it.
    fn set_revision(&mut self, revision: u64);
}

macro_rules! stored {
    ($type:ident, $kind:ident, |$this:ident| $key:expr, $atespace:expr, $name:expr, $state:expr, $template:expr, $busy:expr $(, $row:expr)?) => {
        impl Stored for $type {
            const KIND: Kind = Kind::$kind;

            $(fn kind(&self) -> Kind {
                let $this = self;
                $row
            })?

            fn key(&self) -> String {
                let $this = self;
                $key
            }

            fn object(&self) -> Object {
                let $this = self;
                Object {
                    kind: self.kind(),
                    key: $key,
                    atespace: $atespace,
                    name: $name,
                    state: $state,
                    template: $template,
                    busy: $busy,
                    revision: self.revision,
                    // A record of plain maps and strings always serializes.
                    doc: serde_json::to_string(self).unwrap_or_default(),
                }
            }

            fn revision(&self) -> u64 {
                self.revision
            }

            fn set_revision(&mut self, revision: u64) {
                self.revision = revision;
            }
        }
    };
}

stored!(Atespace, Atespace, |it| it.name.clone(), it.name.clone(), it.name.clone(), 0, String::new(), false);
stored!(
    Template,
    Template,
    |it| it.uid.0.clone(),
    it.atespace.clone(),
    it.name.clone(),
    i64::from(it.spec.golden),
    String::new(),
    false
);
stored!(
    Actor,
    Actor,
    |it| it.uid.0.clone(),
    it.atespace.clone(),
    it.name.clone(),
    it.state.to_proto() as i64,
    if it.golden.is_some() { String::new() } else { it.template_uid.0.clone() },
    it.is_unsettled(),
    if it.golden.is_some() { Kind::Golden } else { Kind::Actor }
);
stored!(WorkerRecord, Worker, |it| it.id.0.clone(), String::new(), it.id.0.clone(), 0, String::new(), false);
stored!(NodeRecord, Node, |it| it.name.0.clone(), String::new(), it.name.0.clone(), 0, String::new(), false);
