// SPDX-License-Identifier: Apache-2.0
//! What was changed, moved or forged is refused, on a node as in the store.
use super::*;

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
        let first = if object.contains("packs") { crate::snapshot::pack::PACK_HEADER as usize } else { 0 };
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
    forged.digest = hex::encode(crate::snapshot::digest::sha256(&content));
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
    let digest = hex::encode(crate::snapshot::digest::sha256(&content));
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
    let digest = crate::snapshot::digest::sha256(&std::fs::read(made.path(&made.record.files[0])).unwrap());
    for path in list_all(&bed.dir.path().join("blobs")) {
        let content = std::fs::read(&path).unwrap();
        for hidden in [&secret[..], b"secret-file-name", &digest] {
            assert!(!content.windows(hidden.len()).any(|part| part == hidden), "{}", path.display());
        }
    }
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
