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

#[tokio::test]
async fn files_of_every_shape_come_back_and_holes_stay_holes() {
    let bed = Bed::new();
    let mib = PIECE;
    let block = u64::from(FileKind::Memory.block_size(0));
    let shapes: Vec<(&str, FileKind, Sparse)> = vec![
        ("empty", FileKind::State, (0, vec![])),
        ("one-byte", FileKind::State, (1, vec![(0, vec![7])])),
        ("all-hole", FileKind::Memory, (64 * mib + 17, vec![])),
        ("all-data", FileKind::Memory, (3 * mib, vec![(0, noise(1, 3 << 20))])),
        ("leading-hole", FileKind::Memory, (9 * mib, vec![(8 * mib + 5, noise(2, 100_000))])),
        ("trailing-hole", FileKind::Memory, (9 * mib + 1, vec![(0, noise(3, 100_000))])),
        (
            "islands",
            FileKind::Memory,
            (40 * mib, (0..20).map(|n| (n * 2 * mib + block - 3, noise(n, 7))).collect()),
        ),
        ("zeros-written", FileKind::Memory, (2 * mib, vec![(0, vec![0; 2 << 20])])),
        ("block-and-a-bit", FileKind::Memory, (block + 1, vec![(0, noise(9, block as usize + 1))])),
        ("data", FileKind::Volume, (mib, vec![(1000, b"text".repeat(1000))])),
    ];
    let made = bed.checkpoint("s1", 3, &shapes);
    let uploaded = bed.durable.upload(&made, "blue", &[]).await.unwrap();
    assert_eq!(uploaded.bytes, made.record.bytes());
    assert_eq!(uploaded.packs.len(), 1);
    assert!(uploaded.packs[0].starts_with("actors/u1/3-s1/packs/"), "{:?}", uploaded.packs);
    let on_disk = std::fs::metadata(bed.blob(&uploaded.packs[0])).unwrap().len()
        + std::fs::metadata(bed.blob("actors/u1/3-s1/manifest")).unwrap().len();
    assert_eq!(uploaded.stored_bytes, on_disk);

    for generation in [3, 0] {
        let node = bed.other_node();
        let wanted = Bed::wanted("s1", generation, &uploaded.manifest_digest);
        let fetched = bed.durable.fetch(&node, &wanted).await.unwrap();
        same_files(&made, &fetched);
        node.verify(&fetched, Some(&made.node_digest)).unwrap();
        let hole = fetched.record.files.iter().find(|file| file.name == "all-hole").unwrap();
        assert_eq!(std::fs::metadata(fetched.path(hole)).unwrap().blocks(), 0, "a hole was filled");
        node.drop_now("u1", "s1").unwrap();
    }
}

#[tokio::test]
async fn an_upload_is_idempotent_and_an_attempt_that_failed_leaves_nothing() {
    let bed = Bed::new();
    let made = bed.simple("s1", 1, 5);
    for faults in [
        Faults { cut_put_after: Some(1000), ..Faults::default() },
        Faults { fail: [("put", 1)].into(), ..Faults::default() },
        Faults { fail: [("head", 1)].into(), ..Faults::default() },
    ] {
        bed.store.set(faults.clone());
        assert!(bed.durable.upload(&made, "blue", &[]).await.is_err(), "{faults:?}");
        let left = bed.store.list(&Key::new("actors").unwrap()).await.unwrap();
        assert!(left.is_empty(), "{faults:?} left {left:?}");
    }
    let first = bed.durable.upload(&made, "blue", &[]).await.unwrap();
    let again = bed.durable.upload(&made, "blue", &[]).await.unwrap();
    assert_eq!((&again.manifest_digest, &again.packs), (&first.manifest_digest, &first.packs));
    assert_eq!(again.stored_bytes, 0);
    // Other content under the same id.
    bed.snapshots.drop_now("u1", "s1").unwrap();
    let other = bed.simple("s1", 1, 6);
    let error = bed.durable.upload(&other, "blue", &[]).await.unwrap_err();
    assert!(matches!(error, SnapshotError::Taken { .. }), "{error}");
}

#[tokio::test]
async fn a_manifest_whose_answer_was_lost_is_found_by_the_retry() {
    let bed = Bed::new();
    let made = bed.simple("s1", 1, 5);
    let first = bed.durable.upload(&made, "blue", &[]).await.unwrap();
    std::fs::remove_file(bed.blob("actors/u1/1-s1/manifest")).unwrap();
    std::fs::remove_file(bed.blob(&first.packs[0])).unwrap();
    // Both puts come through, the second one's answer does not: the first is consumed by the pack.
    bed.store.set(Faults { lose_put_answer: true, ..Faults::default() });
    assert!(bed.durable.upload(&made, "blue", &[]).await.is_err());
    let done = bed.durable.upload(&made, "blue", &[]).await.unwrap();
    let fetched =
        bed.durable.fetch(&bed.other_node(), &Bed::wanted("s1", 1, &done.manifest_digest)).await.unwrap();
    same_files(&made, &fetched);
}

#[tokio::test]
async fn the_second_snapshot_stores_what_changed() {
    let bed = Bed::new();
    let size = 16 << 20;
    let mut memory = noise(1, size);
    let state = |n: u8| ("checkpoint.img", FileKind::State, (4096, vec![(0, vec![n; 4096])]));
    let file = |memory: &[u8]| ("pages.img", FileKind::Memory, (size as u64, vec![(0, memory.to_vec())]));
    let first = bed.checkpoint("s1", 1, &[state(1), file(&memory)]);
    let first = bed.durable.upload(&first, "blue", &[]).await.unwrap();
    assert!(first.stored_bytes > size as u64);
    // 1 % in one stretch.
    memory[5 << 20..(5 << 20) + size / 100].copy_from_slice(&noise(2, size / 100));
    let second = bed.checkpoint("s2", 2, &[state(2), file(&memory)]);
    let parent = bed.manifest("s1", 1, &first.manifest_digest).await;
    let uploaded = bed.durable.upload(&second, "blue", std::slice::from_ref(&parent)).await.unwrap();
    assert!(uploaded.stored_bytes * 100 <= first.stored_bytes * 3, "{uploaded:?} of {first:?}");
    assert_eq!(uploaded.packs.len(), 2);
    let fetched =
        bed.durable.fetch(&bed.other_node(), &Bed::wanted("s2", 2, &uploaded.manifest_digest)).await.unwrap();
    same_files(&second, &fetched);
    // Unchanged: no pack at all, only a manifest.
    let third = bed.checkpoint("s3", 3, &[state(2), file(&memory)]);
    let parents = [parent, bed.manifest("s2", 2, &uploaded.manifest_digest).await];
    let uploaded = bed.durable.upload(&third, "blue", &parents).await.unwrap();
    assert!(uploaded.stored_bytes < 200_000, "{uploaded:?}");
    assert!(uploaded.packs.iter().all(|pack| !pack.contains("3-s3")), "{uploaded:?}");
    // Another atespace's blocks are never referenced: their keys would be lost on it.
    let uploaded = bed.durable.upload(&bed.simple("s4", 4, 1), "red", &parents).await.unwrap();
    assert_eq!(uploaded.packs.len(), 1);
}

#[tokio::test]
async fn chains_of_packs_stay_short() {
    let bed = Bed::new();
    let mut memory = noise(1, 2 << 20);
    let mut parents: Vec<Manifest> = Vec::new();
    for generation in 1..=12 {
        let at = ((generation as usize * 64) << 10) % memory.len();
        memory[at..at + 4096].copy_from_slice(&noise(100 + generation, 4096));
        let id = format!("s{generation}");
        let file = ("pages.img", FileKind::Memory, (memory.len() as u64, vec![(0, memory.clone())]));
        let made = bed.checkpoint(&id, generation, &[file]);
        let uploaded = bed.durable.upload(&made, "blue", &parents).await.unwrap();
        assert!(uploaded.packs.len() <= manifest::MAX_PACKS, "{}", uploaded.packs.len());
        parents = vec![bed.manifest(&id, generation, &uploaded.manifest_digest).await];
    }
}

/// Bytes of each pack that a manifest uses, beside the pack's length.
fn live(manifest: &Manifest) -> Vec<(u64, u64)> {
    let mut live: Vec<(u64, u64)> = manifest.header.packs.iter().map(|pack| (0, pack.length)).collect();
    for block in manifest.body.files.iter().flat_map(|file| &file.blocks) {
        live[block.pack as usize].0 += u64::from(block.stored);
    }
    live
}

#[tokio::test]
async fn packs_that_are_mostly_dead_are_let_go_of_and_reads_stay_few() {
    let bed = Bed::new();
    let blocks = 256;
    let mut memory = noise(1, blocks << 16);
    let mut parents: Vec<Manifest> = Vec::new();
    let mut written = 0;
    for generation in 1..=60_u64 {
        // 5 % of the blocks, at random.
        for draw in 0..13 {
            let block = noise(generation * 1000 + draw, 8)[3] as usize % blocks;
            memory[block << 16..(block + 1) << 16].copy_from_slice(&noise(generation * 77 + draw, 1 << 16));
        }
        let id = format!("s{generation}");
        let file = ("pages.img", FileKind::Memory, (memory.len() as u64, vec![(0, memory.clone())]));
        let made = bed.checkpoint(&id, generation, &[file]);
        let uploaded = bed.durable.upload(&made, "blue", &parents).await.unwrap();
        written += uploaded.stored_bytes;
        let manifest = bed.manifest(&id, generation, &uploaded.manifest_digest).await;
        for (live, length) in live(&manifest) {
            assert!(live * 5 >= length, "{id}: a pack of {length} bytes is kept for {live} of them");
        }
        let reads = super::restore::jobs(&manifest).len();
        assert!(reads <= (3 * memory.len()) >> 20, "{id}: restored by {reads} reads");
        bed.snapshots.drop_now("u1", &id).unwrap();
        parents = vec![manifest];
    }
    // What is written again costs no more than twice what had changed: after the first time, 5 % each time.
    assert!(written < 10 * memory.len() as u64, "{written} bytes were written");
}

#[tokio::test]
async fn what_a_parent_has_is_not_even_read() {
    let bed = Bed::new();
    let first = bed.simple("s1", 1, 5);
    let uploaded = bed.durable.upload(&first, "blue", &[]).await.unwrap();
    let parents = [bed.manifest("s1", 1, &uploaded.manifest_digest).await];
    let second = bed.simple("s2", 2, 5);
    assert!(second.block_digests().iter().all(Option::is_some));
    let pages = second.record.files.iter().find(|file| file.kind == FileKind::Memory).unwrap();
    let good = std::fs::read(second.path(pages)).unwrap();
    std::fs::remove_file(second.path(pages)).unwrap();
    File::create(second.path(pages)).unwrap();
    let unchanged = bed.durable.upload(&second, "blue", &parents).await.unwrap();
    assert!(unchanged.stored_bytes < 10_000, "{unchanged:?}");
    let fetched = bed
        .durable
        .fetch(&bed.other_node(), &Bed::wanted("s2", 2, &unchanged.manifest_digest))
        .await
        .unwrap();
    std::fs::write(second.path(pages), &good).unwrap();
    same_files(&second, &fetched);

    // What has to be written is looked at again: a disk that changed it does not reach the store.
    let third = bed.simple("s3", 3, 6);
    let pages = third.path(third.record.files.iter().find(|file| file.kind == FileKind::Memory).unwrap());
    let mut bad = std::fs::read(&pages).unwrap();
    bad[200_000] ^= 1;
    std::fs::write(&pages, &bad).unwrap();
    let error = bed.durable.upload(&third, "blue", &parents).await.unwrap_err();
    assert!(
        matches!(&error, SnapshotError::Corrupt { file, from: Source::Node, .. } if file == "pages.img"),
        "{error}"
    );
    assert!(!bed.blob("actors/u1/3-s3").exists(), "something of it is in the store");
    // Without what was noted of the blocks, or with something else there, they are hashed anew.
    for noted in [None, Some(vec![7; 32 * 6])] {
        let id = if noted.is_none() { "s4" } else { "s5" };
        let made = bed.simple(id, 4, 7);
        let path = made.files_dir().with_file_name("digests");
        match noted {
            None => std::fs::remove_file(path).unwrap(),
            Some(other) => std::fs::write(path, other).unwrap(),
        }
        let uploaded = bed.durable.upload(&made, "blue", &parents).await.unwrap();
        let wanted = Bed::wanted(id, 4, &uploaded.manifest_digest);
        same_files(&made, &bed.durable.fetch(&bed.other_node(), &wanted).await.unwrap());
    }
}

#[test]
fn the_list_of_blocks_stays_short_whatever_the_size() {
    let gib = 1u64 << 30;
    for (mib, block) in [(0, 4), (64, 4), (65, 8), (128, 8), (512, 32), (1024, 64), (8192, 64), (8193, 128)] {
        assert_eq!(FileKind::Memory.block_size(mib << 20), block << 10, "{mib}");
    }
    assert_eq!(FileKind::Volume.block_size(gib), 256 << 10);
    assert_eq!(FileKind::Volume.block_size(64 << 40), 4 << 20);
    for size in [gib, 100 * gib, 512 * gib] {
        assert!(size.div_ceil(FileKind::Memory.block_size(size).into()) <= 1 << 17);
    }
}

/// Offsets at which a byte is flipped: the beginning, the end, and a spread between.
fn spots(length: usize) -> impl Iterator<Item = usize> {
    (0..32).chain((32..length).step_by((length / 31).max(1))).chain(length.saturating_sub(20)..length)
}

#[tokio::test]
async fn every_flipped_or_missing_byte_of_a_durable_snapshot_is_refused() {
    let bed = Bed::new();
    let made = bed.simple("s1", 1, 5);
    let uploaded = bed.durable.upload(&made, "blue", &[]).await.unwrap();
    let wanted = Bed::wanted("s1", 1, &uploaded.manifest_digest);
    let node = bed.other_node();
    for object in ["actors/u1/1-s1/manifest", &uploaded.packs[0]] {
        let path = bed.blob(object);
        let good = std::fs::read(&path).unwrap();
        // The header of a pack holds nothing that is used; every byte after it is authenticated.
        let first = if object.contains("packs") { super::pack::PACK_HEADER as usize } else { 0 };
        for at in spots(good.len()).filter(|at| *at >= first) {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            std::fs::write(&path, &bad).unwrap();
            let error = bed.durable.fetch(&node, &wanted).await.unwrap_err();
            assert!(
                matches!(error, SnapshotError::Corrupt { from: Source::Durable, .. }),
                "{object} at {at}: {error}"
            );
        }
        for length in [0, 7, 12, good.len() / 2, good.len() - 1] {
            std::fs::write(&path, &good[..length]).unwrap();
            let error = bed.durable.fetch(&node, &wanted).await.unwrap_err();
            assert_eq!(error.code_and_reason().0, tonic::Code::DataLoss, "{object}, {length} bytes: {error}");
        }
        std::fs::remove_file(&path).unwrap();
        let error = bed.durable.fetch(&node, &wanted).await.unwrap_err();
        assert_eq!(error.code_and_reason().0, tonic::Code::DataLoss, "{object} gone: {error}");
        std::fs::write(&path, &good).unwrap();
        assert!(node.find("u1", "s1").unwrap().is_none(), "a refused snapshot became visible");
        assert!(list_all(&bed.dir.path().join("other")).is_empty(), "something was left behind");
    }
    bed.durable.fetch(&node, &wanted).await.unwrap();
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

type Change = fn(&mut Manifest);

/// A manifest with a change, sealed anew: what someone with the key but without the control plane could write.
async fn forged(bed: &Bed, original: &Manifest, change: impl FnOnce(&mut Manifest)) -> Manifest {
    let mut forged = original.clone();
    change(&mut forged);
    let context = manifest::key_context("blue", "u1", &original.header.snapshot_id);
    let wrapped = original.header.wrapped.as_ref().unwrap().to_key();
    let key = bed.keys.unwrap("blue", &context, &wrapped).await.unwrap();
    let content = manifest::encode(&forged.header, &forged.body, &key).unwrap();
    let place =
        manifest::manifest_key("u1", original.header.generation, &original.header.snapshot_id).unwrap();
    bed.store.delete(&place).await.unwrap();
    forged.digest = hex::encode(super::digest::sha256(&content));
    bed.store.put(&place, whole(content)).await.unwrap();
    forged
}

#[tokio::test]
async fn even_a_well_formed_manifest_cannot_lead_elsewhere() {
    let bed = Bed::new();
    let made = bed.simple("s1", 1, 5);
    let uploaded = bed.durable.upload(&made, "blue", &[]).await.unwrap();
    let original = bed.manifest("s1", 1, &uploaded.manifest_digest).await;
    let cases: [(&str, Change); 16] = [
        ("../ in a name", |m| m.body.files[0].name = "../../x".into()),
        ("an absolute name", |m| m.body.files[0].name = "/etc/x".into()),
        ("the same name twice", |m| m.body.files[1].name = m.body.files[0].name.clone()),
        ("an unknown kind", |m| m.body.files[0].kind = 9),
        ("an enormous file", |m| m.body.files[0].size = u64::MAX),
        ("a block size of 0", |m| m.body.files[0].block_size = 0),
        ("an odd block size", |m| m.body.files[0].block_size = 100_000),
        ("a block beyond the end", |m| m.body.files[0].blocks[0].number = 1 << 40),
        ("blocks out of order", |m| m.body.files[1].blocks.swap(0, 1)),
        ("a block twice", |m| m.body.files[1].blocks[1].number = 0),
        ("beyond its pack", |m| m.body.files[1].blocks[0].offset = u64::MAX - 3),
        ("an unknown pack", |m| m.body.files[1].blocks[0].pack = 7),
        ("a huge stored size", |m| m.body.files[1].blocks[0].stored = u32::MAX),
        ("a short digest", |m| m.body.files[1].blocks[0].digest.truncate(31)),
        ("content swapped between blocks", |m| {
            let (a, b) = (m.body.files[1].blocks[0].clone(), m.body.files[1].blocks[1].clone());
            let blocks = &mut m.body.files[1].blocks;
            (blocks[0].offset, blocks[0].index) = (b.offset, b.index);
            (blocks[1].offset, blocks[1].index) = (a.offset, a.index);
        }),
        ("another snapshot's pack", |m| m.header.packs[0].snapshot_id = "s9".into()),
    ];
    for (what, change) in cases {
        let forged = forged(&bed, &original, change).await;
        let error =
            bed.durable.fetch(&bed.other_node(), &Bed::wanted("s1", 1, &forged.digest)).await.unwrap_err();
        let refused =
            matches!(error, SnapshotError::Corrupt { .. } | SnapshotError::Key(KeyError::Mismatch { .. }));
        assert!(refused, "{what}: {error}");
        assert!(list_all(&bed.dir.path().join("other")).is_empty(), "{what} left something behind");
    }
}

#[tokio::test]
async fn another_actors_older_or_newer_manifest_and_another_key_are_refused() {
    let bed = Bed::new();
    let first = bed.durable.upload(&bed.simple("s1", 1, 5), "blue", &[]).await.unwrap();
    let second = bed.durable.upload(&bed.simple("s2", 2, 6), "blue", &[]).await.unwrap();
    let node = bed.other_node();
    let refused = |wanted: Wanted| {
        let (durable, node) = (bed.durable.clone(), node.clone());
        async move { durable.fetch(&node, &wanted).await.unwrap_err() }
    };
    // Older: what is under the name is s1's, the record says s2's.
    std::fs::copy(bed.blob("actors/u1/1-s1/manifest"), bed.blob("actors/u1/2-s2/manifest")).unwrap();
    let error = refused(Bed::wanted("s2", 2, &second.manifest_digest)).await;
    assert!(matches!(error, SnapshotError::Corrupt { .. }), "{error}");
    // With the digest of what is there, it is still not s2.
    let error = refused(Bed::wanted("s2", 2, &first.manifest_digest)).await;
    assert!(matches!(error, SnapshotError::Foreign { .. }), "{error}");
    // Another actor's.
    std::fs::create_dir_all(bed.blob("actors/u2/1-s1")).unwrap();
    std::fs::copy(bed.blob("actors/u1/1-s1/manifest"), bed.blob("actors/u2/1-s1/manifest")).unwrap();
    let error =
        refused(Wanted { actor_uid: "u2".into(), ..Bed::wanted("s1", 1, &first.manifest_digest) }).await;
    assert!(matches!(error, SnapshotError::Foreign { .. }), "{error}");
    // Another atespace's.
    let error =
        refused(Wanted { atespace: "red".into(), ..Bed::wanted("s1", 1, &first.manifest_digest) }).await;
    assert!(matches!(error, SnapshotError::Foreign { .. }), "{error}");
    // A newer format.
    let path = bed.blob("actors/u1/1-s1/manifest");
    let mut content = std::fs::read(&path).unwrap();
    content[8] = 3;
    std::fs::write(&path, &content).unwrap();
    let digest = hex::encode(super::digest::sha256(&content));
    let error = refused(Bed::wanted("s1", 1, &digest)).await;
    assert!(matches!(error, SnapshotError::Version { found: 3, .. }), "{error}");
    content[8] = 2;
    std::fs::write(&path, &content).unwrap();
    // Another machine's keys.
    let keys = Arc::new(FileKeyStore::open(&bed.dir.path().join("other-keys")).unwrap());
    let durable = Durable::new(Arc::clone(&bed.store) as _, Arc::clone(&keys) as _, 2);
    let error = durable.fetch(&node, &Bed::wanted("s1", 1, &first.manifest_digest)).await.unwrap_err();
    assert!(matches!(error, SnapshotError::Key(KeyError::NoVersion { .. })), "{error}");
    keys.wrap("blue", "x", &DataKey::random().unwrap()).await.unwrap();
    let error = durable.fetch(&node, &Bed::wanted("s1", 1, &first.manifest_digest)).await.unwrap_err();
    assert!(matches!(error, SnapshotError::Key(KeyError::Mismatch { .. })), "{error}");
    // Not there at all, and a traversal.
    let error = refused(Bed::wanted("s9", 0, &first.manifest_digest)).await;
    assert!(matches!(error, SnapshotError::Missing { from: Source::Durable, .. }), "{error}");
    let error = refused(Bed::wanted("../u2", 1, &first.manifest_digest)).await;
    assert!(matches!(error, SnapshotError::BadName { .. }), "{error}");
    bed.durable.fetch(&node, &Bed::wanted("s1", 1, &first.manifest_digest)).await.unwrap();
}

#[tokio::test]
async fn a_bad_store_is_an_error_and_leaves_nothing() {
    let bed = Bed::new();
    let made = bed.simple("s1", 1, 5);
    let uploaded = bed.durable.upload(&made, "blue", &[]).await.unwrap();
    let wanted = Bed::wanted("s1", 1, &uploaded.manifest_digest);
    let node = bed.other_node();
    for faults in [
        Faults { fail: [("get", 1)].into(), ..Faults::default() },
        Faults { fail: [("head", 1)].into(), ..Faults::default() },
        Faults { short_get: true, ..Faults::default() },
        Faults { flip_get: Some(300), ..Faults::default() },
    ] {
        bed.store.set(faults.clone());
        assert!(bed.durable.fetch(&node, &wanted).await.is_err(), "{faults:?}");
        assert!(list_all(&bed.dir.path().join("other")).is_empty(), "{faults:?} left something behind");
    }
    bed.store.set(Faults::default());
    same_files(&made, &bed.durable.fetch(&node, &wanted).await.unwrap());
}

#[test]
fn the_plain_content_is_nowhere_in_the_store() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let bed = Bed::new();
    let secret = b"the-secret-in-memory";
    let made = bed.checkpoint(
        "s1",
        1,
        &[("secret-file-name.img", FileKind::Memory, (9000, vec![(100, secret.to_vec())]))],
    );
    runtime.block_on(bed.durable.upload(&made, "blue", &[])).unwrap();
    let digest = super::digest::sha256(&std::fs::read(made.path(&made.record.files[0])).unwrap());
    for path in list_all(&bed.dir.path().join("blobs")) {
        let content = std::fs::read(&path).unwrap();
        for hidden in [&secret[..], b"secret-file-name", &digest] {
            assert!(!content.windows(hidden.len()).any(|part| part == hidden), "{}", path.display());
        }
    }
}

#[test]
fn a_node_snapshot_is_there_completely_or_not_at_all_whenever_the_process_dies() {
    let bed = Bed::new();
    let made = at_every_point(
        || bed.simple("s1", 1, 5),
        |deaths| {
            // What the next process of ours sees.
            let next = NodeSnapshots::open(&bed.dir.path().join("node"), 2).unwrap();
            match next.find("u1", "s1").unwrap() {
                None => assert!(next.list("u1").unwrap().is_empty(), "after {deaths}"),
                Some(found) => next.verify(&found, None).unwrap(),
            }
        },
    );
    bed.snapshots.verify(&made, Some(&made.node_digest)).unwrap();
    bed.snapshots.discard_unfinished("u1").unwrap();
    let names: Vec<_> = std::fs::read_dir(bed.dir.path().join("node/u1"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["s1"]);
}

#[test]
fn a_changed_file_of_a_node_snapshot_is_refused() {
    let bed = Bed::new();
    let made = bed.simple("s1", 1, 5);
    let verify = || {
        let found = bed.snapshots.find("u1", "s1")?.unwrap();
        bed.snapshots.verify(&found, Some(&made.node_digest))
    };
    verify().unwrap();
    for file in &made.record.files {
        let path = made.path(file);
        let good = std::fs::read(&path).unwrap();
        for at in [0, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            let error = verify().unwrap_err();
            assert!(
                matches!(&error, SnapshotError::Corrupt { file: named, from: Source::Node, .. } if *named == file.name),
                "{error}"
            );
        }
        std::fs::write(&path, &good[1..]).unwrap();
        assert!(verify().unwrap_err().to_string().contains("bytes"));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(verify(), Err(SnapshotError::Corrupt { .. })));
        std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
        assert!(matches!(verify(), Err(SnapshotError::Corrupt { .. })));
        std::fs::remove_file(&path).unwrap();
        // Restored from elsewhere: another inode, the same content, is good after a full check.
        std::fs::write(&path, &good).unwrap();
        verify().unwrap();
    }
    let error = bed.snapshots.verify(&made, Some("00")).unwrap_err();
    assert!(matches!(&error, SnapshotError::Corrupt { file, .. } if file == "record"), "{error}");
    // The record of another snapshot.
    let other = bed.simple("s2", 2, 6);
    let records = [&made, &other].map(|one| one.files_dir().with_file_name("record.json"));
    std::fs::copy(&records[1], &records[0]).unwrap();
    assert!(matches!(bed.snapshots.find("u1", "s1"), Err(SnapshotError::Corrupt { .. })));
    std::fs::write(&records[1], br#"{"version": 3, "what": "ever"}"#).unwrap();
    assert!(matches!(bed.snapshots.find("u1", "s2"), Err(SnapshotError::Version { found: 3, .. })));
    assert!(bed.snapshots.list("u1").unwrap().is_empty());
}

#[test]
fn what_is_described_must_be_there() {
    let bed = Bed::new();
    for (name, size) in [("a", 2), ("b", 1), ("../a", 1)] {
        let staging = bed.snapshots.stage("u1", "s1").unwrap();
        std::fs::write(staging.files_dir().join("a"), b"x").unwrap();
        let described = [(FileKind::State, name.to_owned(), size)];
        assert!(bed.snapshots.commit(&staging, draft("s1", 1), &described).is_err(), "{name} {size}");
        staging.discard();
        assert!(list_all(&bed.dir.path().join("node")).is_empty(), "a discarded one left something behind");
    }
    // What is not described is not kept.
    let staging = bed.snapshots.stage("u1", "s1").unwrap();
    std::fs::write(staging.files_dir().join("a"), b"x").unwrap();
    std::fs::write(staging.files_dir().join("scratch"), b"x").unwrap();
    let described = [(FileKind::State, "a".to_owned(), 1)];
    let made = bed.snapshots.commit(&staging, draft("s1", 1), &described).unwrap();
    assert!(!made.files_dir().join("scratch").exists());
}

#[test]
fn a_full_disk_leaves_nothing() {
    let Some(disk) = SmallDisk::new("size=2m") else { return };
    let dir = &disk.0;
    let snapshots = NodeSnapshots::open(&dir.path().join("node"), 2).unwrap();
    // Files that fill the disk to its last block still become a snapshot: room for the record was kept.
    let staging = snapshots.stage("u1", "s1").unwrap();
    let path = staging.files_dir().join("a");
    let file = File::create(&path).unwrap();
    let mut size = 0;
    while file.write_all_at(&[7; 4096], size).is_ok() {
        size += 4096;
    }
    file.set_len(size).unwrap();
    let made = snapshots.commit(&staging, draft("s1", 1), &[(FileKind::State, "a".into(), size)]);
    // With it there, nothing else fits.
    let second = snapshots.stage("u1", "s2").map(drop);
    let left = std::fs::read_dir(dir.path().join("node/u1")).unwrap().count();
    assert!(made.is_ok(), "{made:?}");
    assert!(matches!(second, Err(SnapshotError::Io { .. })), "{second:?}");
    assert_eq!(left, 1);
}

/// A small disk of its own; `None`, loudly, where none can be mounted.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(size: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: not root, cannot mount a small tmpfs");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let flags = nix::mount::MsFlags::empty();
        if let Err(error) = nix::mount::mount(Some("tmpfs"), dir.path(), Some("tmpfs"), flags, Some(size)) {
            eprintln!("skipped: cannot mount a tmpfs: {error}");
            return None;
        }
        Some(Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(error) = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH) {
            eprintln!("unmounting the test's disk: {error}");
        }
    }
}

#[tokio::test]
async fn a_store_or_a_node_that_is_full_says_so_and_keeps_nothing_of_it() {
    let Some(disk) = SmallDisk::new("size=2m") else { return };
    let bed = Bed::new();
    let memory = noise(1, 4 << 20);
    let made =
        bed.checkpoint("s1", 1, &[("pages.img", FileKind::Memory, (memory.len() as u64, vec![(0, memory)]))]);
    // The store fills up in the middle of the pack: the copy on the node stays, and can be uploaded elsewhere.
    let small = LocalStore::open(&disk.0.path().join("blobs")).unwrap();
    let full = Durable::new(Arc::new(small.clone()), Arc::clone(&bed.keys) as _, 2);
    let error = full.upload(&made, "blue", &[]).await.unwrap_err();
    assert_eq!(error.code_and_reason(), (tonic::Code::ResourceExhausted, "STORE_FULL"), "{error}");
    assert!(error.to_string().contains("free space"), "{error}");
    assert!(list_all(&disk.0.path().join("blobs")).is_empty());
    bed.snapshots.verify_anew(&made, Some(&made.node_digest)).unwrap();
    let uploaded = bed.durable.upload(&made, "blue", &[]).await.unwrap();
    // The node it is to be restored on is full.
    let node = NodeSnapshots::open(&disk.0.path().join("node"), 2).unwrap();
    let wanted = Bed::wanted("s1", 1, &uploaded.manifest_digest);
    let error = bed.durable.fetch(&node, &wanted).await.unwrap_err();
    assert_eq!(error.code_and_reason(), (tonic::Code::ResourceExhausted, "DISK_FULL"), "{error}");
    assert!(list_all(&disk.0.path().join("node")).is_empty());
    assert!(node.find("u1", "s1").unwrap().is_none());
    same_files(&made, &bed.durable.fetch(&bed.other_node(), &wanted).await.unwrap());
    // Room for the pack and not for the manifest: the pack goes again.
    let ballast = std::fs::File::create(disk.0.path().join("ballast")).unwrap();
    let little =
        bed.checkpoint("s2", 2, &[("pages.img", FileKind::Memory, (300_000, vec![(0, noise(3, 300_000))]))]);
    let mut refused = 0;
    for room in [0, 250_000, 290_000, 302_000, 304_000, 308_000, 320_000u64] {
        ballast.set_len(0).unwrap();
        let stat = nix::sys::statvfs::statvfs(disk.0.path()).unwrap();
        let free = stat.blocks_available() * stat.fragment_size();
        nix::fcntl::fallocate(&ballast, nix::fcntl::FallocateFlags::empty(), 0, (free - room) as i64)
            .unwrap();
        match full.upload(&little, "blue", &[]).await {
            Ok(_) => small.delete(&Key::new("actors/u1/2-s2/manifest").unwrap()).await.unwrap(),
            Err(error) => {
                refused += 1;
                assert_eq!(error.code_and_reason().1, "STORE_FULL", "{error}");
                assert!(list_all(&disk.0.path().join("blobs")).is_empty(), "with room for {room} bytes");
            }
        }
        std::fs::remove_dir_all(disk.0.path().join("blobs/actors")).ok();
    }
    assert!((3..7).contains(&refused), "{refused} of 7 were refused: the sizes miss the point");
}

#[tokio::test]
async fn dropped_snapshots_stay_as_cache_until_room_is_needed() {
    let bed = Bed::new();
    let (first, second) = (bed.simple("s1", 1, 1), bed.simple("s2", 2, 2));
    bed.snapshots.allow_drop("u1", "none").unwrap();
    // Never uploaded: a dropped one is of no use.
    bed.simple("s3", 3, 3);
    bed.snapshots.allow_drop("u1", "s3").unwrap();
    assert!(bed.snapshots.find("u1", "s3").unwrap().is_none());
    for made in [&first, &second] {
        let uploaded = bed.durable.upload(made, "blue", &[]).await.unwrap();
        bed.snapshots.set_uploaded(made, &uploaded.manifest_digest);
    }
    assert_eq!(bed.snapshots.evict(0).unwrap(), 0, "what is needed was evicted");
    bed.snapshots.allow_drop("u1", "s1").unwrap();
    bed.snapshots.allow_drop("u1", "s2").unwrap();
    assert_eq!(bed.snapshots.list("u1").unwrap().len(), 2);
    bed.snapshots.verify(&first, None).unwrap();
    let pin = bed.snapshots.pin(&second);
    assert!(bed.snapshots.evict(400_000).unwrap() > 0);
    assert!(bed.snapshots.find("u1", "s2").unwrap().is_some(), "in use");
    assert!(bed.snapshots.find("u1", "s1").unwrap().is_none());
    drop(pin);
    bed.snapshots.evict(0).unwrap();
    assert!(list_all(&bed.dir.path().join("node")).is_empty());
}

#[tokio::test]
async fn deletion_takes_what_it_is_told_and_nothing_else() {
    let bed = Bed::new();
    let first = bed.durable.upload(&bed.simple("s1", 1, 5), "blue", &[]).await.unwrap();
    let second = bed.durable.upload(&bed.simple("s2", 2, 6), "blue", &[]).await.unwrap();
    for (manifests, packs) in
        [(vec!["../u2/1-s1".to_owned()], vec![]), (vec![], vec!["actors/u1/2-s2/manifest".to_owned()])]
    {
        assert!(bed.durable.delete("u1", &manifests, &packs).await.is_err(), "{manifests:?} {packs:?}");
    }
    for _ in 0..2 {
        bed.durable.delete("u1", &["1-s1".to_owned()], &first.packs).await.unwrap();
    }
    let left = bed.store.list(&Key::new("actors").unwrap()).await.unwrap();
    assert_eq!(left.len(), 2);
    bed.durable.fetch(&bed.other_node(), &Bed::wanted("s2", 2, &second.manifest_digest)).await.unwrap();
}

#[tokio::test]
async fn a_check_names_everything_that_is_wrong_and_reads_shared_blocks_once() {
    let bed = Bed::new();
    let one = bed.simple("s1", 1, 5);
    let first = bed.durable.upload(&one, "blue", &[]).await.unwrap();
    let parent = bed.manifest("s1", 1, &first.manifest_digest).await;
    let two = bed.simple("s2", 2, 5);
    let second = bed.durable.upload(&two, "blue", std::slice::from_ref(&parent)).await.unwrap();
    let all = [
        (Bed::wanted("s1", 1, &first.manifest_digest), first.packs.clone()),
        (Bed::wanted("s2", 2, &second.manifest_digest), second.packs.clone()),
    ];
    let check = async |quick: bool| {
        let mut checker = Checker::new(bed.durable.clone(), quick);
        for (wanted, packs) in &all {
            checker.durable(wanted, packs).await?;
        }
        checker.node(&bed.snapshots, "u1", "s1", &one.node_digest, true).await;
        Ok::<_, SnapshotError>(checker.finish())
    };
    let sound = check(false).await.unwrap();
    assert_eq!((sound.snapshots, sound.findings), (3, Vec::<String>::new()));
    let blocks: usize = parent.body.files.iter().map(|file| file.blocks.len()).sum();
    assert_eq!(sound.blocks, blocks as u64, "the second is all references");

    // A flipped byte: found by reading, once for both; not by a quick look.
    let pack = bed.blob(&first.packs[0]);
    let good = std::fs::read(&pack).unwrap();
    let mut bent = good.clone();
    *bent.last_mut().unwrap() ^= 1;
    std::fs::write(&pack, &bent).unwrap();
    assert_eq!(check(true).await.unwrap().findings, Vec::<String>::new());
    let found = check(false).await.unwrap().findings;
    assert!(found.len() == 1 && found[0].contains(&first.packs[0]), "{found:?}");
    // Truncated, missing, not counted, a damaged manifest, a changed file on the node.
    std::fs::write(&pack, &good[..good.len() - 1]).unwrap();
    assert!(check(true).await.unwrap().findings[0].contains("bytes"));
    std::fs::remove_file(&pack).unwrap();
    let found = check(false).await.unwrap().findings;
    assert!(found.len() == 1 && found[0].contains("is not in the blob store"), "{found:?}");
    std::fs::write(&pack, &good).unwrap();
    let mut checker = Checker::new(bed.durable.clone(), true);
    checker.durable(&all[1].0, &[]).await.unwrap();
    assert!(checker.finish().findings[0].contains("not counted"));
    std::fs::remove_file(bed.blob("actors/u1/2-s2/manifest")).unwrap();
    let file = &one.record.files[0];
    std::fs::write(one.path(file), vec![0; file.size as usize]).unwrap();
    let found = check(false).await.unwrap().findings;
    assert!(found.len() == 2 && found[0].contains("s2") && found[1].contains(&file.name), "{found:?}");
    bed.snapshots.drop_now("u1", "s1").unwrap();
    assert!(check(true).await.unwrap().findings[1].contains("no durable one"));
    // A store that does not answer is no finding.
    bed.store.set(Faults { fail: [("head", 1)].into(), ..Faults::default() });
    assert!(check(true).await.is_err());
}

#[test]
fn keys_of_snapshots_differ() {
    let (a, b) = (DataKey::random().unwrap(), DataKey::random().unwrap());
    assert_ne!(a.0, b.0);
    assert!(!format!("{a:?}").contains(&format!("{}", a.0[0])) || format!("{a:?}") == "DataKey(…)");
}
