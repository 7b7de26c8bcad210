// SPDX-License-Identifier: Apache-2.0
//! `record.json`: what a node snapshot is (docs/snapshot-format.md).
use serde::{Deserialize, Serialize};
use substrate_proto::types::Compatibility;

use super::{FileKind, MAX_BLOCK, MIN_BLOCK, digest};

/// Version of `record.json` that this build writes; it reads all up to it.
pub(crate) const RECORD_VERSION: u32 = 2;

/// One file of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordFile {
    /// Plain name; unique among files of its directory.
    pub name: String,
    /// What it holds.
    pub kind: FileKind,
    /// Bytes.
    pub size: u64,
    /// Bytes of the blocks that its digest is over; absent in version 1, whose blocks are of 1 MiB.
    #[serde(default, skip_serializing_if = "is_absent")]
    pub block: u32,
    /// Hex of [`digest::of_file`].
    pub digest: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_absent(block: &u32) -> bool {
    *block == 0
}

impl RecordFile {
    /// Bytes of the blocks that its digest is over.
    pub fn digest_block(&self) -> u64 {
        if self.block == 0 { digest::PIECE } else { u64::from(self.block) }
    }

    /// Whether its fields are possible in a record of this version.
    pub(super) fn check(&self, version: u32) -> Result<(), String> {
        let sound = match version {
            1 => self.block == 0,
            _ => self.block.is_power_of_two() && (MIN_BLOCK..=MAX_BLOCK).contains(&self.block),
        };
        if sound { Ok(()) } else { Err(format!("{} has blocks of {} bytes", self.name, self.block)) }
    }
}

/// `record.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Of the format: 1 or 2.
    pub version: u32,
    /// Id, chosen by the control plane.
    pub snapshot_id: String,
    /// Whose.
    pub actor_uid: String,
    /// Of the assignment that made it.
    pub generation: u64,
    /// When the memory was captured, Unix ms.
    pub time_ms: i64,
    /// Bytes the actor held in memory.
    pub memory_bytes: u64,
    /// What it needs to be restored.
    pub compatibility: Compatibility,
    /// Sorted by directory and name.
    pub files: Vec<RecordFile>,
}

impl Record {
    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    /// Names of the volumes it holds.
    pub fn volumes(&self) -> impl Iterator<Item = &str> {
        self.files.iter().filter(|file| file.kind == FileKind::Volume).map(|file| file.name.as_str())
    }
}
