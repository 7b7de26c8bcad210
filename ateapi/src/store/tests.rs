// SPDX-License-Identifier: Apache-2.0
//! The store's specification, held against both implementations.
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;

use super::*;
use crate::model::{Atespace, Quota, State, Stored as _};
use crate::testing::fixtures;

struct Bench {
    store: Arc<dyn Store>,
    _dir: tempfile::TempDir,
}

async fn both() -> Vec<Bench> {
    let dir = tempfile::tempdir().unwrap();
    let sqlite = SqliteStore::open(&dir.path().join("state.db")).await.unwrap();
    vec![
        Bench { store: Arc::new(MemoryStore::new()), _dir: tempfile::tempdir().unwrap() },
        Bench { store: Arc::new(sqlite), _dir: dir },
    ]
}

fn atespace(name: &str) -> Atespace {
    Atespace {
        name: name.into(),
        labels: BTreeMap::new(),
        created_ms: 0,
        quota: Quota::default(),
        revision: 0,
    }
}

fn put(object: Object, expect: Expect) -> Tx {
    Tx { puts: vec![(object, expect)], ..Tx::default() }
}

fn actor(name: &str, state: State) -> Object {
    let mut actor = fixtures::actor();
    actor.uid = format!("u-{name}").into();
    actor.name = name.into();
    actor.state = state;
    actor.object()
}

fn event(reason: &str) -> EventDraft {
    crate::state::draft(&fixtures::actor(), 1, reason, String::new(), false)
}

#[tokio::test]
async fn rows_are_compared_and_set() {
    for Bench { store, .. } in both().await {
        let made = store.commit(put(atespace("a").object(), Expect::Absent)).await.unwrap();
        assert_eq!(made, Committed { puts: vec![1], revision: 1 });
        let again = store.commit(put(atespace("a").object(), Expect::Absent)).await;
        assert!(matches!(again, Err(StoreError::Exists { .. })));
        let changed = store.commit(put(atespace("a").object(), Expect::Revision(1))).await.unwrap();
        assert_eq!(changed.puts, [2]);
        let stale = store.commit(put(atespace("a").object(), Expect::Revision(1))).await;
        assert!(matches!(stale, Err(StoreError::Conflict { .. })));
        let missing = store.commit(put(atespace("b").object(), Expect::Revision(1))).await;
        assert!(matches!(missing, Err(StoreError::Conflict { .. })));
        // A name is taken whatever the key.
        store.commit(put(actor("x", State::New), Expect::Absent)).await.unwrap();
        let mut other = actor("x", State::New);
        other.key = "another".into();
        for expect in [Expect::Absent, Expect::Any] {
            let taken = store.commit(put(other.clone(), expect)).await;
            assert!(matches!(taken, Err(StoreError::Exists { .. })));
        }
        let read: Atespace = load(&*store, "a").await.unwrap().unwrap();
        assert_eq!(read.revision, 2);
        assert_eq!(store.find(Kind::Actor, "space", "x").await.unwrap().unwrap().key, "u-x");
        assert!(store.get(Kind::Actor, "nobody").await.unwrap().is_none());
    }
}

#[tokio::test]
async fn a_transaction_is_all_or_nothing() {
    for Bench { store, .. } in both().await {
        store.commit(put(atespace("a").object(), Expect::Absent)).await.unwrap();
        let tx = Tx {
            puts: vec![
                (atespace("b").object(), Expect::Absent),
                (atespace("a").object(), Expect::Revision(9)),
            ],
            events: vec![event("Never")],
            seals: vec![("k".into(), Some(vec![1]))],
            garbage: vec![Garbage::Pack { key: "p".into() }],
            ..Tx::default()
        };
        assert!(store.commit(tx).await.is_err());
        assert!(store.get(Kind::Atespace, "b").await.unwrap().is_none());
        assert!(store.sealed("k").await.unwrap().is_none());
        assert!(store.garbage(9).await.unwrap().is_empty());
        assert_eq!(store.changes(0, 9).await.unwrap().len(), 1);
        assert_eq!(*store.revisions().borrow(), 1);
    }
}

#[tokio::test]
async fn checks_hold_at_the_commit() {
    for Bench { store, .. } in both().await {
        let check = |check| Tx { checks: vec![check], ..Tx::default() };
        let exists = || check(Check::Exists(Kind::Atespace, "space".into()));
        assert!(matches!(store.commit(exists()).await, Err(StoreError::Check(_))));
        store.commit(put(atespace("space").object(), Expect::Absent)).await.unwrap();
        store.commit(exists()).await.unwrap();
        store.commit(check(Check::AtespaceEmpty("space".into()))).await.unwrap();
        store.commit(check(Check::TemplateUnused("t-1".into()))).await.unwrap();
        store.commit(put(actor("x", State::New), Expect::Absent)).await.unwrap();
        assert!(store.commit(check(Check::AtespaceEmpty("space".into()))).await.is_err());
        assert!(store.commit(check(Check::TemplateUnused("t-1".into()))).await.is_err());
        let gone = Tx { deletes: vec![(Kind::Actor, "u-x".into(), Expect::Any)], ..Tx::default() };
        store.commit(gone).await.unwrap();
        store.commit(check(Check::AtespaceEmpty("space".into()))).await.unwrap();
    }
}

#[tokio::test]
async fn lists_are_ordered_paged_and_filtered() {
    for Bench { store, .. } in both().await {
        for i in 0..30 {
            let state = [State::Suspended, State::Running, State::Paused][i % 3];
            let mut object = actor(&format!("a{i:02}"), state);
            if i >= 20 {
                object.atespace = "other".into();
                object.template = "t-2".into();
            }
            object.busy = state == State::Running;
            store.commit(put(object, Expect::Absent)).await.unwrap();
        }
        let names = |rows: Vec<Object>| rows.into_iter().map(|row| row.name).collect::<Vec<_>>();
        let mut query = Query::all(Kind::Actor);
        query.limit = 7;
        let mut seen = Vec::new();
        loop {
            let page = store.list(&query).await.unwrap();
            let Some(last) = page.last() else { break };
            query.after = Some((last.atespace.clone(), last.name.clone()));
            seen.extend(page.into_iter().map(|row| (row.atespace, row.name)));
        }
        assert_eq!(seen.len(), 30);
        assert!(seen.is_sorted());
        let mut query = Query::all(Kind::Actor);
        query.atespace = Some("other".into());
        assert_eq!(store.list(&query).await.unwrap().len(), 10);
        query.states = vec![State::Running.to_proto() as i64, State::Paused.to_proto() as i64];
        query.limit = 3;
        assert_eq!(names(store.list(&query).await.unwrap()), ["a20", "a22", "a23"]);
        query.after = Some(("other".into(), "a23".into()));
        assert_eq!(names(store.list(&query).await.unwrap()), ["a25", "a26", "a28"]);
        let mut query = Query::all(Kind::Actor);
        query.template = Some("t-2".into());
        assert_eq!(store.list(&query).await.unwrap().len(), 10);
        query.states = vec![State::Running.to_proto() as i64];
        assert_eq!(store.list(&query).await.unwrap().len(), 3);
        let mut query = Query::all(Kind::Actor);
        query.busy = true;
        assert_eq!(store.list(&query).await.unwrap().len(), 10);
    }
}

#[tokio::test]
async fn a_watcher_sees_every_change_once_and_in_order_under_concurrent_writers() {
    for Bench { store, .. } in both().await {
        const WRITERS: usize = 8;
        const EACH: usize = 40;
        let watcher = {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let mut revisions = store.revisions();
                let (mut cursor, mut seen) = (0, Vec::new());
                while seen.len() < WRITERS * EACH * 3 {
                    let page = store.changes(cursor, 17).await.unwrap();
                    if page.is_empty() {
                        if *revisions.borrow_and_update() <= cursor {
                            revisions.changed().await.unwrap();
                        }
                        continue;
                    }
                    for change in page {
                        assert_eq!(change.revision, cursor + 1, "a gap or a step back");
                        cursor = change.revision;
                        seen.push(change);
                    }
                }
                seen
            })
        };
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let store = Arc::clone(&store);
                tokio::spawn(async move {
                    for i in 0..EACH {
                        let tx = Tx {
                            puts: vec![
                                (atespace(&format!("w{writer}")).object(), Expect::Any),
                                (atespace(&format!("w{writer}-{i}")).object(), Expect::Absent),
                            ],
                            events: vec![event("Tick")],
                            ..Tx::default()
                        };
                        let committed = store.commit(tx).await.unwrap();
                        // Read your own write.
                        assert!(*store.revisions().borrow() >= committed.revision);
                        assert!(
                            store.get(Kind::Atespace, &format!("w{writer}-{i}")).await.unwrap().is_some()
                        );
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.await.unwrap();
        }
        let seen = watcher.await.unwrap();
        let distinct: std::collections::BTreeSet<_> = seen.iter().map(|change| change.revision).collect();
        assert_eq!(distinct.len(), WRITERS * EACH * 3);
        // The changes of one transaction are together.
        for chunk in seen.chunks(3) {
            assert_eq!(chunk[2].kind, Kind::Event);
            assert!(chunk[1].key.starts_with(&format!("{}-", chunk[0].key)));
        }
    }
}

#[tokio::test]
async fn resuming_from_a_revision_and_from_one_that_is_too_old() {
    for Bench { store, .. } in both().await {
        for i in 0..10 {
            store.commit(put(atespace(&format!("a{i}")).object(), Expect::Absent)).await.unwrap();
        }
        let tx = Tx { deletes: vec![(Kind::Atespace, "a0".into(), Expect::Any)], ..Tx::default() };
        store.commit(tx).await.unwrap();
        let rest = store.changes(9, 100).await.unwrap();
        assert_eq!(
            rest.iter().map(|it| (it.revision, it.deleted)).collect::<Vec<_>>(),
            [(10, false), (11, true)]
        );
        store.trim(Trim { changelog_keep: 3, events_keep: 0, requests_before_ms: 0 }).await.unwrap();
        assert!(matches!(store.changes(7, 100).await, Err(StoreError::Compacted { oldest: 8 })));
        assert_eq!(store.changes(8, 100).await.unwrap().len(), 3);
        // What is there stays there.
        assert!(store.get(Kind::Atespace, "a1").await.unwrap().is_some());
    }
}

#[tokio::test]
async fn events_requests_and_secrets() {
    for Bench { store, .. } in both().await {
        for i in 0..5 {
            let request = RequestRecord {
                id: format!("m/{i}"),
                fingerprint: "f".into(),
                outcome: format!("o{i}"),
                time_ms: i,
            };
            let tx = Tx {
                events: vec![event(if i % 2 == 0 { "Even" } else { "Odd" })],
                request: Some(request),
                seals: vec![(format!("k{i}"), Some(vec![i as u8]))],
                ..Tx::default()
            };
            store.commit(tx).await.unwrap();
        }
        let query = |reason: Option<&str>, after, limit| EventQuery {
            atespace: Some("space".into()),
            subject: None,
            reason: reason.map(Into::into),
            after,
            limit,
        };
        let revisions =
            |events: Vec<(u64, EventDraft)>| events.into_iter().map(|(r, _)| r).collect::<Vec<_>>();
        assert_eq!(revisions(store.events(&query(None, 0, 10)).await.unwrap()), [1, 2, 3, 4, 5]);
        assert_eq!(revisions(store.events(&query(None, 0, 2)).await.unwrap()), [4, 5]);
        assert_eq!(revisions(store.events(&query(Some("Odd"), 2, 10)).await.unwrap()), [4]);
        assert_eq!(store.request("m/3").await.unwrap().unwrap().outcome, "o3");
        assert_eq!(store.sealed("k2").await.unwrap(), Some(vec![2]));
        store.commit(Tx { seals: vec![("k2".into(), None)], ..Tx::default() }).await.unwrap();
        assert_eq!(store.sealed("k2").await.unwrap(), None);
        store.trim(Trim { changelog_keep: 99, events_keep: 3, requests_before_ms: 3 }).await.unwrap();
        assert_eq!(revisions(store.events(&query(None, 0, 10)).await.unwrap()), [3, 4, 5]);
        assert!(store.request("m/2").await.unwrap().is_none());
        assert!(store.request("m/3").await.unwrap().is_some());
    }
}

#[tokio::test]
async fn a_blob_is_garbage_when_its_last_holder_lets_go() {
    for Bench { store, .. } in both().await {
        let pack = |key: &str| Garbage::Pack { key: key.into() };
        let hold = |holder: &str, blobs: Vec<Garbage>| Tx {
            refs: vec![RefChange::Hold { holder: holder.into(), blobs }],
            ..Tx::default()
        };
        let drop =
            |holder: &str| Tx { refs: vec![RefChange::Drop { holder: holder.into() }], ..Tx::default() };
        store.commit(hold("a/1", vec![pack("p1"), pack("p2")])).await.unwrap();
        store.commit(hold("a/2", vec![pack("p2"), pack("p3")])).await.unwrap();
        store.commit(drop("a/1")).await.unwrap();
        let items =
            |all: Vec<(i64, String, Garbage)>| all.into_iter().map(|(_, _, item)| item).collect::<Vec<_>>();
        assert_eq!(items(store.garbage(9).await.unwrap()), [pack("p1")]);
        store.commit(drop("a/2")).await.unwrap();
        store.commit(drop("a/2")).await.unwrap();
        let mut all = items(store.garbage(9).await.unwrap());
        all.sort();
        assert_eq!(all, [pack("p1"), pack("p2"), pack("p3")]);
        let done = store.garbage(9).await.unwrap().into_iter().map(|(id, ..)| id).collect();
        store.commit(Tx { garbage_done: done, ..Tx::default() }).await.unwrap();
        assert!(store.garbage(9).await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn what_was_committed_is_there_after_a_start() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control/state.db");
    let store = SqliteStore::open(&path).await.unwrap();
    assert!(matches!(SqliteStore::open(&path).await, Err(StoreError::Unusable(m)) if m.contains("in use")));
    store.commit(put(atespace("a").object(), Expect::Absent)).await.unwrap();
    store.close().await;
    assert!(store.commit(Tx::default()).await.is_err());
    let store = SqliteStore::open(&path).await.unwrap();
    assert_eq!(*store.revisions().borrow(), 1);
    assert!(store.get(Kind::Atespace, "a").await.unwrap().is_some());
    let committed = store.commit(put(atespace("b").object(), Expect::Absent)).await.unwrap();
    assert_eq!(committed.revision, 2);
}

#[tokio::test]
async fn the_write_ahead_log_stays_short_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let store = Arc::new(SqliteStore::open(&path).await.unwrap());
    let long = "x".repeat(20_000);
    // 60 MB with the change log; the log holds a tenth of that when it is moved in time.
    let mut longest = 0;
    for batch in 0..25 {
        let writes = (0..60).map(|number| {
            let (store, mut object) = (Arc::clone(&store), atespace(&format!("a-{batch}-{number}")).object());
            object.doc.clone_from(&long);
            async move { store.commit(put(object, Expect::Absent)).await.unwrap() }
        });
        futures::future::join_all(writes).await;
        longest = longest.max(std::fs::metadata(dir.path().join("state.db-wal")).unwrap().len());
    }
    assert!(longest < 48 << 20, "the log grew to {longest} bytes");
    store.close().await;
    let left = std::fs::metadata(dir.path().join("state.db-wal")).map_or(0, |meta| meta.len());
    assert_eq!(left, 0, "the log is not in the database");
    let store = SqliteStore::open(&path).await.unwrap();
    assert!(store.get(Kind::Atespace, "a-24-59").await.unwrap().is_some());
}

#[tokio::test]
async fn an_unusable_database_gives_one_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let refused = async |path: &std::path::Path, word: &str| match SqliteStore::open(path).await {
        Err(StoreError::Unusable(message)) => assert!(message.contains(word), "{message}"),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("it was opened"),
    };
    let path = dir.path().join("garbage.db");
    std::fs::write(&path, b"this is no database, and longer than a header of sqlite would be at all......")
        .unwrap();
    refused(&path, "damaged").await;

    let path = dir.path().join("cut.db");
    let store = SqliteStore::open(&path).await.unwrap();
    for i in 0..200 {
        store.commit(put(atespace(&format!("a{i}")).object(), Expect::Absent)).await.unwrap();
    }
    store.close().await;
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    refused(&path, "damaged").await;

    let path = dir.path().join("newer.db");
    let store = SqliteStore::open(&path).await.unwrap();
    store.close().await;
    let url = format!("sqlite:{}", path.display());
    let mut connection = <sqlx::SqliteConnection as sqlx::Connection>::connect(&url).await.unwrap();
    sqlx::query(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
         VALUES (9999, 'later', 1, x'00', 0)",
    )
    .execute(&mut connection)
    .await
    .unwrap();
    sqlx::Connection::close(connection).await.unwrap();
    refused(&path, "newer").await;

    // Root may write whatever the mode says, so the message is shown by what SQLite answers.
    if !nix::unistd::geteuid().is_root() {
        let path = dir.path().join("read-only.db");
        SqliteStore::open(&path).await.unwrap().close().await;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
        refused(&path, "read-only").await;
    }
}

#[tokio::test]
async fn ten_thousand_sleeping_actors_cost_a_page_what_three_hundred_cost() {
    async fn fill(dir: &std::path::Path, count: usize) -> SqliteStore {
        let store = SqliteStore::open(&dir.join(format!("{count}.db"))).await.unwrap();
        for chunk in 0..count / 100 {
            let puts = (0..100)
                .map(|i| (actor(&format!("a{:05}", chunk * 100 + i), State::Suspended), Expect::Absent))
                .collect();
            store.commit(Tx { puts, ..Tx::default() }).await.unwrap();
        }
        store
    }
    async fn page(store: &SqliteStore, after: &str) -> std::time::Duration {
        let mut query = Query::all(Kind::Actor);
        query.limit = 100;
        query.after = Some(("space".into(), after.into()));
        let began = std::time::Instant::now();
        let page: Vec<crate::model::Actor> = list(store, &query).await.unwrap();
        assert_eq!(page.len(), 100);
        began.elapsed()
    }
    let dir = tempfile::tempdir().unwrap();
    let (many, few) = (fill(dir.path(), 10_000).await, fill(dir.path(), 300).await);
    let (mut of_many, mut of_few) = (std::time::Duration::MAX, std::time::Duration::MAX);
    // Interleaved, and the best of each: what it takes, not what else the machine does.
    for _ in 0..40 {
        of_many = of_many.min(page(&many, "a09000").await);
        of_few = of_few.min(page(&few, "a00100").await);
    }
    assert!(of_many < of_few * 2, "{of_many:?} against {of_few:?}");
    // SQLite and serde are not optimized in a debug build.
    let bound_ms = if cfg!(debug_assertions) { 50 } else { 5 };
    assert!(of_many.as_millis() < bound_ms, "a page took {of_many:?}");
    let mut query = Query::all(Kind::Actor);
    query.states = vec![State::Running.to_proto() as i64];
    assert!(many.list(&query).await.unwrap().is_empty());
}
