// SPDX-License-Identifier: Apache-2.0
//! Round trips, and what a snapshot shares with its parent.
use super::*;

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
        let reads = crate::snapshot::restore::jobs(&manifest).len();
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
