// SPDX-License-Identifier: Apache-2.0
//! Moving a snapshot takes a bounded amount of memory, whatever its size. A test process of its own, because the peak
//! is the process's: `VmHWM` of proc(5), which `/proc/self/clear_refs` resets.
//!
//! `SUBSTRATE_MEMORY_MIB` makes the snapshot larger than the usual 512 MiB (scripts/nightly).
#![forbid(unsafe_code)]

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use atelet::blob::LocalStore;
use atelet::snapshot::manifest::Manifest;
use atelet::snapshot::node::{Draft, NodeSnapshot, NodeSnapshots};
use atelet::snapshot::restore::{Durable, Wanted};
use atelet::snapshot::{FileKeyStore, FileKind};
use substrate_proto::types::Compatibility;

/// What moving may take beyond what the process held before, bytes.
const LIMIT: u64 = 64 << 20;
/// A page with content in each block, so that every block is stored and files are quickly made.
const PAGE: usize = 4096;

fn status(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Runs `work` and answers by how much the process's memory rose at most.
async fn peak<T>(work: impl Future<Output = T>) -> (T, u64) {
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS");
    let value = work.await;
    (value, status("VmHWM").saturating_sub(before))
}

fn noise(state: &mut u64, content: &mut [u8]) {
    for word in content.chunks_exact_mut(8) {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}

/// A checkpoint's memory: `dense` bytes without a gap, then a page in each block up to `size`.
fn write_memory(path: &Path, size: u64, dense: u64, seed: u64) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(size).unwrap();
    let mut state = seed * 2 + 1;
    let mut content = vec![0; 1 << 20];
    for at in (0..dense).step_by(content.len()) {
        noise(&mut state, &mut content);
        file.write_all_at(&content, at).unwrap();
    }
    for at in (dense..size).step_by(64 << 10) {
        noise(&mut state, &mut content[..PAGE]);
        file.write_all_at(&content[..PAGE], at).unwrap();
    }
}

/// Takes a snapshot of one file of `size` bytes that `write` writes.
fn staged(node: &NodeSnapshots, id: &str, size: u64, write: impl FnOnce(&Path)) -> NodeSnapshot {
    let staging = node.stage("u1", id).unwrap();
    write(&staging.path(FileKind::Memory, "pages.img"));
    let draft = Draft {
        snapshot_id: id.into(),
        actor_uid: "u1".into(),
        generation: 1,
        time_ms: 1,
        memory_bytes: size,
        compatibility: Compatibility::default(),
    };
    node.commit(&staging, draft, &[(FileKind::Memory, "pages.img".into(), size)]).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn moving_a_snapshot_takes_little_memory_whatever_its_size() {
    let mib: u64 = std::env::var("SUBSTRATE_MEMORY_MIB").map_or(512, |text| text.parse().unwrap());
    let (size, dense) = (mib << 20, 96 << 20);
    let dir = tempfile::tempdir().unwrap();
    let node = NodeSnapshots::open(&dir.path().join("node"), 4).unwrap();
    let other = NodeSnapshots::open(&dir.path().join("other"), 4).unwrap();
    let keys = Arc::new(FileKeyStore::open(&dir.path().join("keys")).unwrap());
    let store = Arc::new(LocalStore::open(&dir.path().join("blobs")).unwrap());
    let durable = Durable::new(store, keys, 4);
    let wanted = |id: &str, digest: &str| Wanted {
        atespace: "blue".into(),
        actor_uid: "u1".into(),
        snapshot_id: id.into(),
        generation: 1,
        manifest_digest: digest.into(),
    };

    let (first, took) =
        peak(async { staged(&node, "s1", size, |path| write_memory(path, size, dense, 1)) }).await;
    assert!(took < LIMIT, "recording {mib} MiB took {took} bytes");
    let (uploaded, took) = peak(durable.upload(&first, "blue", &[])).await;
    assert!(took < LIMIT, "uploading {mib} MiB took {took} bytes");
    let uploaded = uploaded.unwrap();
    assert!(uploaded.stored_bytes > dense);
    eprintln!("the first upload took {took} bytes");

    // Another one, of which the dense part is new and the rest is the parent's.
    let second = staged(&node, "s2", size, |path| {
        std::fs::copy(first.path(&first.record.files[0]), path).unwrap();
        let mut content = vec![0; 16 << 20];
        noise(&mut 99, &mut content);
        std::fs::File::options().write(true).open(path).unwrap().write_all_at(&content, 32 << 20).unwrap();
    });
    let (again, took) = peak(async {
        let parent: Manifest = durable.manifest(&wanted("s1", &uploaded.manifest_digest)).await.unwrap();
        durable.upload(&second, "blue", &[parent]).await.unwrap()
    })
    .await;
    assert!(took < LIMIT, "uploading what changed of {mib} MiB took {took} bytes");
    assert!(again.stored_bytes < 32 << 20, "{again:?}");
    eprintln!("the second upload took {took} bytes");
    node.drop_now("u1", "s1").unwrap();

    let (fetched, took) = peak(durable.fetch(&other, &wanted("s2", &again.manifest_digest))).await;
    assert!(took < LIMIT, "fetching {mib} MiB took {took} bytes");
    eprintln!("the fetch took {took} bytes");
    assert_eq!(fetched.unwrap().node_digest, second.node_digest);
}
