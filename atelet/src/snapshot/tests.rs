// SPDX-License-Identifier: Apache-2.0
//! Snapshots from checkpoint to restore: round trips, crashes, corruption, increments.
use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use substrate_proto::types::Compatibility;

use super::digest::PIECE;
use super::manifest::{self, Manifest};
use super::node::{Draft, NodeSnapshot, NodeSnapshots};
use super::restore::{Durable, Wanted};
use super::{Checker, DataKey, FileKeyStore, FileKind, KeyError, KeyStore, SnapshotError, Source};
use crate::blob::fault::{FaultStore, Faults};
use crate::blob::{BlobStore, Key, LocalStore, whole};
use crate::durable::crash::at_every_point;

mod increments;
mod refusals;
mod room;

struct Bed {
    dir: tempfile::TempDir,
    snapshots: NodeSnapshots,
    store: Arc<FaultStore<LocalStore>>,
    keys: Arc<FileKeyStore>,
    durable: Durable,
}

/// Not compressible, and the same for the same seed.
pub(super) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut content = vec![0; length];
    for word in content.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
    content
}

/// What is written where in a file of a length.
type Sparse = (u64, Vec<(u64, Vec<u8>)>);

pub(super) fn draft(id: &str, generation: u64) -> Draft {
    Draft {
        snapshot_id: id.into(),
        actor_uid: "u1".into(),
        generation,
        time_ms: 1234,
        memory_bytes: 77,
        compatibility: Compatibility {
            sandbox_class: "gvisor".into(),
            runtime_digest: "aa".into(),
            images: [("main".to_owned(), "sha256:1".to_owned())].into(),
            ..Compatibility::default()
        },
    }
}

impl Bed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(FaultStore::new(LocalStore::open(&dir.path().join("blobs")).unwrap()));
        let keys = Arc::new(FileKeyStore::open(&dir.path().join("keys")).unwrap());
        Self {
            snapshots: NodeSnapshots::open(&dir.path().join("node"), 2).unwrap(),
            durable: Durable::new(Arc::clone(&store) as _, Arc::clone(&keys) as _, 2),
            store,
            keys,
            dir,
        }
    }

    fn other_node(&self) -> NodeSnapshots {
        NodeSnapshots::open(&self.dir.path().join("other"), 2).unwrap()
    }

    fn checkpoint(&self, id: &str, generation: u64, files: &[(&str, FileKind, Sparse)]) -> NodeSnapshot {
        let staging = self.snapshots.stage("u1", id).unwrap();
        let mut described = Vec::new();
        for (name, kind, (size, parts)) in files {
            let path = staging.path(*kind, name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let file = File::create(path).unwrap();
            file.set_len(*size).unwrap();
            for (at, content) in parts {
                file.write_all_at(content, *at).unwrap();
            }
            described.push((*kind, (*name).to_owned(), *size));
        }
        self.snapshots.commit(&staging, draft(id, generation), &described).unwrap()
    }

    fn simple(&self, id: &str, generation: u64, seed: u64) -> NodeSnapshot {
        let memory = noise(seed, 300_000);
        self.checkpoint(
            id,
            generation,
            &[
                ("checkpoint.img", FileKind::State, (5000, vec![(0, b"state ".repeat(800))])),
                ("pages.img", FileKind::Memory, (memory.len() as u64, vec![(0, memory)])),
            ],
        )
    }

    fn wanted(id: &str, generation: u64, manifest_digest: &str) -> Wanted {
        Wanted {
            atespace: "blue".into(),
            actor_uid: "u1".into(),
            snapshot_id: id.into(),
            generation,
            manifest_digest: manifest_digest.into(),
        }
    }

    async fn manifest(&self, id: &str, generation: u64, digest: &str) -> Manifest {
        self.durable.manifest(&Self::wanted(id, generation, digest)).await.unwrap()
    }

    fn blob(&self, key: &str) -> PathBuf {
        self.dir.path().join("blobs").join(key)
    }
}

fn same_files(a: &NodeSnapshot, b: &NodeSnapshot) {
    assert_eq!(a.record, b.record);
    assert_eq!(a.node_digest, b.node_digest, "a fetched copy has the digest of the original");
    for file in &a.record.files {
        assert_eq!(
            std::fs::read(a.path(file)).unwrap(),
            std::fs::read(b.path(file)).unwrap(),
            "{}",
            file.name
        );
    }
}

fn list_all(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            found.extend(list_all(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found
}
