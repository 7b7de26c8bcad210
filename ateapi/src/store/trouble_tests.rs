// SPDX-License-Identifier: Apache-2.0
//! A database that is full or read-only: one clear error, and nothing is written in part.
use std::collections::BTreeMap;
use std::path::Path;

use futures::future::join_all;
use sqlx::Connection as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};

use super::*;
use crate::model::{Atespace, Quota, Stored as _};
use crate::testing::fixtures;

fn put(name: &str, padding: usize) -> Tx {
    let labels = BTreeMap::from([("padding".to_owned(), "x".repeat(padding))]);
    let atespace =
        Atespace { name: name.into(), labels, created_ms: 0, quota: Quota::default(), revision: 0 };
    Tx { puts: vec![(atespace.object(), Expect::Absent)], ..Tx::default() }
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new().filename(path)
}

#[tokio::test]
async fn a_full_disk_fails_the_whole_group_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    SqliteStore::open(&path).await.unwrap().close().await;
    // As a full disk: SQLITE_FULL (https://www.sqlite.org/rescode.html#full).
    let full = options(&path).pragma("max_page_count", "40");
    let store = SqliteStore::open_with(&path, full).await.unwrap();
    store.commit(put("before", 10)).await.unwrap();
    let before = *store.revisions().borrow();
    // Neither what does not fit nor what shares its group is there afterwards; everyone is told.
    let commits = [("small", 10), ("large", 400_000), ("small-too", 10)];
    let outcomes = join_all(commits.map(|(name, padding)| store.commit(put(name, padding)))).await;
    assert!(outcomes.iter().any(Result::is_err));
    for ((name, _), outcome) in commits.iter().zip(&outcomes) {
        let found = store.get(Kind::Atespace, name).await.unwrap().is_some();
        assert_eq!(found, outcome.is_ok(), "{name}: {outcome:?}");
        if let Err(error) = outcome {
            assert!(
                matches!(error, StoreError::Io(message) if message.contains("full: free space")),
                "{error}"
            );
        }
    }
    let written = outcomes.iter().filter(|outcome| outcome.is_ok()).count() as u64;
    assert_eq!(store.changes(before, 10).await.unwrap().len() as u64, written);
    // There is room again for what is small.
    let committed = store.commit(put("after", 10)).await.unwrap();
    assert_eq!(committed.revision, before + written + 1);
}

#[tokio::test]
async fn a_read_only_database_is_refused_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let store = SqliteStore::open(&path).await.unwrap();
    store.commit(put("a", 1)).await.unwrap();
    store.close().await;
    match SqliteStore::open_with(&path, options(&path).read_only(true)).await {
        Err(StoreError::Unusable(message)) => assert!(message.contains("is read-only"), "{message}"),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("it was opened"),
    }
    let store = SqliteStore::open(&path).await.unwrap();
    assert!(store.get(Kind::Atespace, "a").await.unwrap().is_some());
}

#[tokio::test]
async fn what_atespaces_use_is_counted_when_the_schema_is_brought_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let store = SqliteStore::open(&path).await.unwrap();
    let mut actor = fixtures::actor();
    actor.snapshots = vec![fixtures::snapshot("s-1", true), fixtures::snapshot("s-2", false)];
    store.commit(Tx { puts: vec![(actor.object(), Expect::Absent)], ..Tx::default() }).await.unwrap();
    store.close().await;
    let mut connection = SqliteConnection::connect_with(&options(&path)).await.unwrap();
    sqlx::raw_sql("DROP TABLE usage; DELETE FROM _sqlx_migrations WHERE version = 2")
        .execute(&mut connection)
        .await
        .unwrap();
    connection.close().await.unwrap();
    let store = SqliteStore::open(&path).await.unwrap();
    let used = store.usage(&actor.atespace).await.unwrap();
    assert_eq!((used.actors, used.bytes), (1, actor.snapshot_bytes()));
}

#[tokio::test]
async fn usage_follows_the_commits_and_bounds_them() {
    let dir = tempfile::tempdir().unwrap();
    let sqlite = SqliteStore::open(&dir.path().join("state.db")).await.unwrap();
    let stores: [Box<dyn Store>; 2] = [Box::new(MemoryStore::new()), Box::new(sqlite)];
    for store in stores {
        let change = |actors, bytes| Tx {
            checks: vec![Check::ActorsBelow("a".into(), 2)],
            usage: vec![UsageChange { atespace: "a".into(), actors, bytes }],
            ..Tx::default()
        };
        store.commit(change(1, 5)).await.unwrap();
        store.commit(change(1, 7)).await.unwrap();
        let refused = store.commit(change(1, 100)).await.unwrap_err();
        assert!(matches!(refused, StoreError::Check(Check::ActorsBelow(..))), "{refused}");
        assert_eq!(store.usage("a").await.unwrap(), Usage { actors: 2, bytes: 12 });
        let freed = UsageChange { atespace: "a".into(), actors: -1, bytes: -12 };
        store.commit(Tx { usage: vec![freed], ..Tx::default() }).await.unwrap();
        store.commit(change(1, 1)).await.unwrap();
        assert_eq!(store.usage("b").await.unwrap(), Usage::default());
    }
}
