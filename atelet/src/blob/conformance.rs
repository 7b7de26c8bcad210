// SPDX-License-Identifier: Apache-2.0
//! What every blob store must do; run over each implementation, bare and behind faults.
use bytes::Bytes;
use futures::StreamExt as _;

use super::fault::{FaultStore, Faults};
use super::{BlobError, BlobStore, ByteStream, Key, LocalStore, whole};

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

fn pieces(count: usize, size: usize) -> ByteStream {
    futures::stream::iter((0..count).map(move |piece| Ok(Bytes::from(vec![piece as u8; size])))).boxed()
}

async fn names(store: &dyn BlobStore, directory: &str) -> Vec<Key> {
    store.list(&key(directory)).await.unwrap().into_iter().map(|listed| listed.key).collect()
}

/// The suite. `store` is empty.
pub(super) async fn run(store: &dyn BlobStore) {
    let (a, b) = (key("actors/u1/1-s/packs/p"), key("actors/u1/1-s/manifest"));
    assert_eq!(store.head(&a).await.unwrap(), None);
    assert!(matches!(store.get(&a, 0..1).await, Err(BlobError::NotFound { .. })));
    assert!(store.list(&key("actors")).await.unwrap().is_empty());

    assert_eq!(store.put(&a, pieces(40, 100_000)).await.unwrap(), 4_000_000);
    assert_eq!(store.head(&a).await.unwrap(), Some(4_000_000));
    let across = store.get(&a, 99_999..200_001).await.unwrap();
    assert_eq!((across.len(), across[0], across[1], across[100_001]), (100_002, 0, 1, 2));
    assert!(store.get(&a, 7..7).await.unwrap().is_empty());
    assert!(matches!(store.get(&a, 3_999_999..4_000_001).await, Err(BlobError::OutOfRange { .. })));

    // Never replaced, not even by concurrent writers.
    assert!(matches!(store.put(&a, whole("other")).await, Err(BlobError::Exists(_))));
    assert_eq!(store.head(&a).await.unwrap(), Some(4_000_000));
    let writers = futures::future::join_all((0..8u8).map(|n| store.put(&b, whole(vec![n; 1000])))).await;
    assert_eq!(writers.iter().filter(|outcome| outcome.is_ok()).count(), 1, "{writers:?}");
    let winner = store.get(&b, 0..1000).await.unwrap();
    assert!(winner.iter().all(|byte| *byte == winner[0]), "writers were mixed");

    // A failing source leaves nothing.
    let c = key("actors/u2/1-s/packs/p");
    let broken = pieces(3, 1000)
        .chain(futures::stream::once(async { Err(std::io::Error::other("the disk died")) }))
        .boxed();
    let error = store.put(&c, broken).await.unwrap_err();
    assert!(error.to_string().contains("the disk died"), "{error}");
    assert_eq!(store.head(&c).await.unwrap(), None);
    assert_eq!(store.put(&c, whole("")).await.unwrap(), 0);

    assert_eq!(names(store, "actors/u1").await, [b.clone(), a.clone()]);
    let all = store.list(&key("actors")).await.unwrap();
    assert_eq!(all.iter().map(|listed| listed.size).collect::<Vec<_>>(), [1000, 4_000_000, 0]);
    let age = |listed: &super::Listed| listed.written.elapsed().unwrap_or_default();
    assert!(all.iter().all(|listed| age(listed) < std::time::Duration::from_mins(5)), "{all:?}");
    // A directory is a whole component.
    assert!(store.list(&key("actors/u")).await.unwrap().is_empty());

    store.delete(&a).await.unwrap();
    store.delete(&a).await.unwrap();
    assert_eq!(store.head(&a).await.unwrap(), None);
    assert_eq!(names(store, "actors").await, [b.clone(), c.clone()]);
    // A deleted name may be written again.
    store.put(&a, whole("again")).await.unwrap();
    // Larger than any single request of a store that takes objects in parts.
    let big = key("actors/u3/1-s/packs/p");
    assert_eq!(store.put(&big, pieces(300, 100_000)).await.unwrap(), 30_000_000);
    assert_eq!(store.head(&big).await.unwrap(), Some(30_000_000));
    let end = store.get(&big, 29_899_999..30_000_000).await.unwrap();
    assert_eq!((end.len(), end[0], end[1]), (100_001, 298u16 as u8, 299u16 as u8));
    assert!(matches!(store.put(&big, pieces(300, 100_000)).await, Err(BlobError::Exists(_))));
    let cut = key("actors/u3/1-s/packs/cut");
    let broken = pieces(300, 100_000)
        .chain(futures::stream::once(async { Err(std::io::Error::other("the disk died")) }))
        .boxed();
    assert!(matches!(store.put(&cut, broken).await, Err(BlobError::Source { .. })));
    assert_eq!(names(store, "actors/u3").await, std::slice::from_ref(&big));

    store.check().await.unwrap();
    assert_eq!(store.abandon(std::time::Duration::ZERO, true).await.unwrap(), 0, "a put left parts behind");
    for key in [a, b, c, big] {
        store.delete(&key).await.unwrap();
    }
}

#[tokio::test]
async fn a_local_directory_conforms() {
    let dir = tempfile::tempdir().unwrap();
    run(&LocalStore::open(dir.path()).unwrap()).await;
}

#[tokio::test]
async fn the_fault_wrapper_conforms_without_faults() {
    let dir = tempfile::tempdir().unwrap();
    run(&FaultStore::new(LocalStore::open(dir.path()).unwrap())).await;
}

#[tokio::test]
async fn a_slow_store_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let store = FaultStore::new(LocalStore::open(dir.path()).unwrap());
    store.set(Faults { slow: std::time::Duration::from_millis(1), ..Faults::default() });
    run(&store).await;
}

#[tokio::test]
async fn faults_are_errors_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = FaultStore::new(LocalStore::open(dir.path()).unwrap());
    let a = key("a/b");
    store.set(Faults { fail: [("put", 2)].into(), ..Faults::default() });
    assert!(store.put(&a, whole("x")).await.is_err());
    assert!(store.put(&a, whole("x")).await.is_err());
    store.put(&a, whole("x")).await.unwrap();

    let cut = key("a/cut");
    store.set(Faults { cut_put_after: Some(2500), ..Faults::default() });
    assert!(store.put(&cut, pieces(4, 1000)).await.is_err());
    assert_eq!(store.inner().head(&cut).await.unwrap(), None);

    // The answer is lost, the object is there: a retry finds it.
    let lost = key("a/lost");
    store.set(Faults { lose_put_answer: true, ..Faults::default() });
    assert!(store.put(&lost, whole("x")).await.is_err());
    assert!(matches!(store.put(&lost, whole("x")).await, Err(BlobError::Exists(_))));

    store.set(Faults { stale_list: true, ..Faults::default() });
    store.put(&key("a/new"), whole("x")).await.unwrap();
    assert!(!names(&store, "a").await.contains(&key("a/new")));
}
