// SPDX-License-Identifier: Apache-2.0
//! Snapshots that earlier builds wrote (`tests/corpus/<name>/`): every build reads them, in the store and on a node.
//!
//! A corpus is never changed. A new version of the format, or a way of writing that readers could stumble over, gets a
//! corpus of its own: `SUBSTRATE_WRITE_CORPUS=<name> cargo test -p atelet --lib write_corpus`.
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::digest::sha256;
use super::node::NodeSnapshots;
use super::restore::{Durable, Wanted};
use super::{Checker, FileKeyStore, FileKind, KeyStore as _};
use crate::blob::LocalStore;

/// What a corpus holds.
#[derive(Debug, Serialize, Deserialize)]
struct Contents {
    /// Who wrote it.
    build: String,
    snapshots: Vec<Written>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Written {
    id: String,
    generation: u64,
    manifest_digest: String,
    node_digest: String,
    packs: Vec<String>,
    /// SHA-256 of each file, by its path below the snapshot's directory.
    files: BTreeMap<String, String>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus")
}

/// Copies a tree; keys become the owner's alone, which git does not keep.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), &target).unwrap();
            std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
    }
}

fn wanted(written: &Written) -> Wanted {
    Wanted {
        atespace: "blue".into(),
        actor_uid: "u1".into(),
        snapshot_id: written.id.clone(),
        generation: written.generation,
        manifest_digest: written.manifest_digest.clone(),
    }
}

fn open(dir: &Path) -> (NodeSnapshots, Durable) {
    let keys = Arc::new(FileKeyStore::open(&dir.join("keys")).unwrap());
    let store = Arc::new(LocalStore::open(&dir.join("blobs")).unwrap());
    (NodeSnapshots::open(&dir.join("node"), 2).unwrap(), Durable::new(store, keys, 2))
}

#[tokio::test]
async fn what_earlier_builds_wrote_is_read() {
    let mut read = 0;
    for corpus in std::fs::read_dir(root()).unwrap() {
        let dir = tempfile::tempdir().unwrap();
        copy(&corpus.unwrap().path(), dir.path());
        let text = std::fs::read(dir.path().join("contents.json")).unwrap();
        let contents: Contents = serde_json::from_slice(&text).unwrap();
        let (node, durable) = open(dir.path());
        let fresh = NodeSnapshots::open(&dir.path().join("fresh"), 2).unwrap();
        let mut checker = Checker::new(durable.clone(), false);
        for written in &contents.snapshots {
            let what = format!("{}, {}", contents.build, written.id);
            let fetched =
                durable.fetch(&fresh, &wanted(written)).await.unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(
                fetched.node_digest, written.node_digest,
                "{what}: the node's record would be another"
            );
            for file in &fetched.record.files {
                let content = std::fs::read(fetched.path(file)).unwrap();
                let path = format!("{}/{}", file.kind.directory(), file.name);
                assert_eq!(written.files[&path], hex::encode(sha256(&content)), "{what}: {path}");
            }
            assert_eq!(fetched.record.files.len(), written.files.len(), "{what}");
            let local =
                node.find("u1", &written.id).unwrap().unwrap_or_else(|| panic!("{what}: not on the node"));
            node.verify_anew(&local, Some(&written.node_digest)).unwrap_or_else(|e| panic!("{what}: {e}"));
            checker.durable(&wanted(written), &written.packs).await.unwrap();
            // An upload that was owed when the build changed: what a node fetches is still the node's copy.
            let elsewhere = tempfile::tempdir().unwrap();
            let store = Arc::new(LocalStore::open(elsewhere.path()).unwrap());
            let durable = Durable { store, ..durable.clone() };
            let manifest_digest = durable.upload(&local, "blue", &[]).await.unwrap().manifest_digest;
            fresh.drop_now("u1", &written.id).unwrap();
            let again = Wanted { manifest_digest, ..wanted(written) };
            let again = durable.fetch(&fresh, &again).await.unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(again.node_digest, written.node_digest, "{what}");
            read += 1;
        }
        assert_eq!(checker.finish().findings, Vec::<String>::new());
    }
    assert!(read >= 6, "the corpus is gone");
}

/// Writes a corpus: a first snapshot, one that refers to it, and one after a rotation of the keys.
#[tokio::test]
async fn write_corpus() {
    // Without the name of a new corpus there is nothing to do.
    let Ok(name) = std::env::var("SUBSTRATE_WRITE_CORPUS") else { return };
    let dir = root().join(name);
    assert!(!dir.exists(), "{} exists: a corpus is never changed", dir.display());
    let keys = Arc::new(FileKeyStore::open(&dir.join("keys")).unwrap());
    let (node, durable) = open(&dir);
    let durable = Durable { keys: Arc::clone(&keys) as _, ..durable };
    let mut contents = Contents { build: env!("CARGO_PKG_VERSION").to_owned(), snapshots: Vec::new() };
    let mut parents = Vec::new();
    for generation in 1..=3u64 {
        let id = format!("s{generation}");
        let staging = node.stage("u1", &id).unwrap();
        let mut memory = vec![0; 400_000];
        memory[..20_000].copy_from_slice(&super::tests::noise(1, 20_000));
        memory[131_072..150_000].copy_from_slice(&super::tests::noise(generation, 18_928));
        let files = [
            (FileKind::State, "checkpoint.img", b"state ".repeat(300 + generation as usize)),
            (FileKind::Memory, "pages.img", memory),
            (FileKind::State, "empty.img", Vec::new()),
            (FileKind::Volume, "data", super::tests::noise(9, 3_000)),
        ];
        let mut described = Vec::new();
        let mut digests = BTreeMap::new();
        for (kind, name, content) in files {
            let path = staging.path(kind, name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, &content).unwrap();
            described.push((kind, name.to_owned(), content.len() as u64));
            digests.insert(format!("{}/{name}", kind.directory()), hex::encode(sha256(&content)));
        }
        let made = node.commit(&staging, super::tests::draft(&id, generation), &described).unwrap();
        if generation == 3 {
            keys.rotate("blue").await.unwrap();
        }
        let uploaded = durable.upload(&made, "blue", &parents).await.unwrap();
        let written = Written {
            id,
            generation,
            manifest_digest: uploaded.manifest_digest,
            node_digest: made.node_digest.clone(),
            packs: uploaded.packs,
            files: digests,
        };
        parents = vec![durable.manifest(&wanted(&written)).await.unwrap()];
        contents.snapshots.push(written);
    }
    std::fs::write(dir.join("contents.json"), serde_json::to_vec_pretty(&contents).unwrap()).unwrap();
}
