// SPDX-License-Identifier: Apache-2.0
//! A store with actors, secrets and blobs: there and back, whole, or not at all.
use std::os::unix::fs::PermissionsExt as _;

use substrate_proto::types;

use super::*;
use crate::model::Stored as _;
use crate::secrets::Sealer;
use crate::store::{self, Expect, RefChange, SqliteStore, Store as _, Tx};
use crate::testing::fixtures;

/// A directory as `substrate up` keeps it.
struct Machine {
    root: tempfile::TempDir,
    store: SqliteStore,
}

const MANIFEST: &str = "blobs/actors/u1/2-s1/manifest";
const PACK: &str = "blobs/actors/u1/packs/p1";

fn quiet(_: u64, _: u64) {}

impl Machine {
    async fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        let store = SqliteStore::open(&path("control/state.db")).await.unwrap();
        let sealer = Sealer::open(&path("keys")).unwrap();
        let file = types::File { path: "/t".into(), mode: 0o400, content: b"hunter2".to_vec() };
        let mut actor = fixtures::actor();
        actor.uid = "u1".into();
        let blobs = vec![
            Garbage::Manifest { actor: "u1".into(), directory: "2-s1".into() },
            Garbage::Pack { key: "actors/u1/packs/p1".into() },
        ];
        let tx = Tx {
            puts: vec![(actor.object(), Expect::Absent)],
            seals: vec![("u1".into(), Some(sealer.seal("u1", &[file]).unwrap()))],
            refs: vec![RefChange::Hold { holder: "u1/s1".into(), blobs }],
            ..Tx::default()
        };
        store.commit(tx).await.unwrap();
        for (name, text) in [(MANIFEST, "manifest"), (PACK, "pack"), ("blobs/actors/u1/packs/.put-x", "torn")]
        {
            std::fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            std::fs::write(path(name), text).unwrap();
        }
        Self { root, store }
    }

    fn source(&self) -> Source {
        let path = |name: &str| self.root.path().join(name);
        Source {
            database: path("control/state.db"),
            blobs: Blobs::Directory(path("blobs")),
            keys: Some(path("keys")),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }
}

async fn is_whole(dir: &Path) {
    assert_eq!(std::fs::read_to_string(dir.join(PACK)).unwrap(), "pack");
    assert!(!dir.join("blobs/actors/u1/packs/.put-x").exists());
    assert!(!dir.join(STAGING).exists());
    let mode = |name: &str| std::fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("keys"), mode("keys/at-rest.key"), mode("control")), (0o700, 0o600, 0o700));
    let store = SqliteStore::open(&dir.join("control/state.db")).await.unwrap();
    let actor: Option<crate::model::Actor> = store::load(&store, "u1").await.unwrap();
    assert_eq!(actor.unwrap().uid.as_str(), "u1");
    // Revisions of the other history mean nothing here.
    assert!(matches!(store.changes(1, 1).await, Err(store::StoreError::Compacted { .. })));
    assert!(*store.revisions().borrow() > 1_000_000_000);
    let sealed = store.sealed("u1").await.unwrap().unwrap();
    let files = Sealer::open(&dir.join("keys")).unwrap().unseal("u1", &sealed).unwrap();
    assert_eq!(files[0].content, b"hunter2");
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn there_and_back_while_it_is_in_use_as_a_directory_and_as_an_archive() {
    let machine = Machine::new().await;
    let archive = machine.path("backup.tar");
    let seen = std::sync::atomic::AtomicU64::new(0);
    let progress = |done: u64, total: u64| {
        assert!(done <= total);
        seen.fetch_max(done, std::sync::atomic::Ordering::Relaxed);
    };
    for (target, from) in [
        (Target::Directory(machine.path("b")), machine.path("b")),
        (Target::Archive(archive.clone()), archive.clone()),
    ] {
        let index = create(&machine.source(), &target, &progress).await.unwrap();
        assert_eq!((index.actors, index.has_keys, index.missing.len()), (1, true, 0));
        assert!(seen.swap(0, std::sync::atomic::Ordering::Relaxed) >= index.bytes());
        let to = machine.path("r").join(from.file_name().unwrap());
        restore(&from, &to, None, &progress).await.unwrap();
        is_whole(&to).await;
        let again = restore(&from, &to, None, &quiet).await.unwrap_err();
        assert!(again.to_string().contains("is not empty"), "{again}");
        let again = create(&machine.source(), &target, &quiet).await.unwrap_err();
        assert!(matches!(again, BackupError::NotEmpty { .. }), "{again}");
    }
    let left: Vec<_> = std::fs::read_dir(machine.root.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.'))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// A bucket: a directory behind the trait, which answers only as far as it is asked.
#[derive(Debug)]
struct Bucket(PathBuf);

impl Objects for Bucket {
    fn size(&self, key: &str) -> io::Result<Option<u64>> {
        match std::fs::metadata(self.0.join(key)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(|meta| Some(meta.len())),
        }
    }

    fn read(&self, key: &str, range: std::ops::Range<u64>) -> io::Result<Vec<u8>> {
        let content = std::fs::read(self.0.join(key))?;
        let part = content.get(range.start as usize..range.end as usize);
        part.map(<[u8]>::to_vec).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_bucket_what_records_name_is_copied_and_what_it_lost_is_named() {
    let machine = Machine::new().await;
    let blobs = Blobs::Objects(Arc::new(Bucket(machine.path("blobs"))));
    let source = Source { blobs, ..machine.source() };
    std::fs::write(machine.path("blobs/actors/u1/packs/orphan"), "nobody's").unwrap();
    for (target, from) in [
        (Target::Directory(machine.path("b")), machine.path("b")),
        (Target::Archive(machine.path("b.tar")), machine.path("b.tar")),
    ] {
        let index = create(&source, &target, &quiet).await.unwrap();
        assert!(index.missing.is_empty(), "{:?}", index.missing);
        let blobs: Vec<&str> = index
            .files
            .iter()
            .map(|file| file.path.as_str())
            .filter(|path| path.starts_with("blobs/"))
            .collect();
        assert_eq!(blobs, [MANIFEST, PACK]);
        let to = machine.path("r").join(from.file_name().unwrap());
        restore(&from, &to, None, &quiet).await.unwrap();
        is_whole(&to).await;
    }
    std::fs::remove_file(machine.path(PACK)).unwrap();
    let index = create(&source, &Target::Directory(machine.path("c")), &quiet).await.unwrap();
    assert!(index.missing.len() == 1 && index.missing[0].contains("packs/p1"), "{:?}", index.missing);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_can_be_kept_elsewhere_and_have_to_be_the_right_ones() {
    let machine = Machine::new().await;
    let source = Source { keys: None, ..machine.source() };
    let target = machine.path("b");
    create(&source, &Target::Directory(target.clone()), &quiet).await.unwrap();
    assert!(!target.join("keys").exists());
    let to = machine.path("r");
    assert!(matches!(restore(&target, &to, None, &quiet).await, Err(BackupError::NoKeys)));
    assert!(!to.exists(), "nothing was begun");
    Sealer::open(&machine.path("others")).unwrap();
    let wrong = restore(&target, &to, Some(&machine.path("others")), &quiet).await.unwrap_err();
    assert!(matches!(wrong, BackupError::WrongKeys(_)), "{wrong}");
    assert!(!to.join("control").exists());
    std::fs::remove_dir_all(&to).unwrap();
    restore(&target, &to, Some(&machine.path("keys")), &quiet).await.unwrap();
    is_whole(&to).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_torn_or_newer_is_refused_before_a_database_is_there() {
    let machine = Machine::new().await;
    let target = machine.path("b");
    create(&machine.source(), &Target::Directory(target.clone()), &quiet).await.unwrap();
    let archive = machine.path("backup.tar");
    create(&machine.source(), &Target::Archive(archive.clone()), &quiet).await.unwrap();
    let mut number = 0;
    let mut refused = async |from: &Path, part: &str| {
        number += 1;
        let to = machine.path(&format!("r{number}"));
        let error = restore(from, &to, None, &quiet).await.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert!(!to.join("control").exists());
    };
    let index = target.join(INDEX);
    let whole = std::fs::read_to_string(&index).unwrap();
    std::fs::write(target.join(PACK), "pick").unwrap();
    refused(&target, "SHA-256").await;
    std::fs::write(target.join(PACK), "packs").unwrap();
    refused(&target, "5 bytes, not 4").await;
    std::fs::remove_file(target.join(PACK)).unwrap();
    refused(&target, PACK).await;
    std::fs::write(target.join(PACK), "pack").unwrap();
    let schema = crate::store::known_schema();
    std::fs::write(&index, whole.replace(&format!("\"schema\":{schema}"), "\"schema\":999")).unwrap();
    refused(&target, "newer substrate").await;
    std::fs::write(&index, whole.replace(MANIFEST, "blobs/../../x")).unwrap();
    refused(&target, "no place of a backup").await;
    std::fs::remove_file(&index).unwrap();
    refused(&target, "written last").await;
    let bytes = std::fs::read(&archive).unwrap();
    let short = machine.path("short.tar");
    for cut in [bytes.len() / 2, 600, 0] {
        std::fs::write(&short, &bytes[..cut]).unwrap();
        refused(&short, "no complete backup").await;
    }
    let mut flipped = bytes.clone();
    // The content, not a name: it begins a block.
    let at = (0..flipped.len()).step_by(512).find(|at| flipped[*at..].starts_with(b"pack\0")).unwrap();
    flipped[at] ^= 1;
    std::fs::write(&short, &flipped).unwrap();
    let to = machine.path("flipped");
    assert!(restore(&short, &to, None, &quiet).await.is_err());
    assert!(!to.join("control").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_deleted_while_a_backup_runs_and_a_missing_object_is_named() {
    let machine = Machine::new().await;
    let permit = machine.store.deletion_permit().unwrap();
    let source = machine.source();
    let target = Target::Directory(machine.path("b"));
    let waiting = tokio::spawn(async move { create(&source, &target, &quiet).await });
    // It waits for the collector; then the collector waits for it.
    assert!(!machine.path("b").exists());
    drop(permit);
    waiting.await.unwrap().unwrap();
    let held = hold_collection(&machine.source().database).await.unwrap();
    assert!(machine.store.deletion_permit().is_none());
    drop(held);
    assert!(machine.store.deletion_permit().is_some());
    std::fs::remove_file(machine.path(PACK)).unwrap();
    let index = create(&machine.source(), &Target::Directory(machine.path("c")), &quiet).await.unwrap();
    assert_eq!(index.missing, ["actors/u1/packs/p1 (of u1/s1)"]);
}
