// SPDX-License-Identifier: Apache-2.0
//! Crashes, bad stores and full disks leave nothing half done; what goes when room is needed.
use super::*;

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
