// SPDX-License-Identifier: Apache-2.0
//! The task that writes to SQLite.
//!
//! It takes whatever transactions wait, evaluates and applies them one after the other inside one SQLite transaction, and
//! answers all of them after its commit: a group commit, so that many writers share one fsync. Preconditions are
//! evaluated before anything of a transaction is written, so a refused one leaves no trace in the group; an I/O error
//! fails the whole group and nothing of it is written.
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use sqlx::{Connection as _, QueryBuilder, Row as _};
use tokio::sync::{mpsc, oneshot, watch};

use super::sqlite::explain;
use super::{Change, Check, Committed, Expect, Kind, Object, RefChange, StoreError, Trim, Tx};

/// Transactions that share one commit at most.
const GROUP: usize = 64;
/// Rows of one statement; a connection keeps each length's statement prepared.
const ROWS: usize = 16;

/// A transaction and who waits for it.
type Waiting = (Box<Tx>, oneshot::Sender<Result<Committed, StoreError>>);

pub(super) enum Job {
    Commit(Waiting),
    /// Empty the write-ahead log.
    Truncate,
    Trim(Trim, oneshot::Sender<Result<(), StoreError>>),
    Close(oneshot::Sender<()>),
}

/// See the module.
pub(super) struct Writer {
    pub(super) connection: SqliteConnection,
    pub(super) revision: u64,
    pub(super) announce: watch::Sender<u64>,
    pub(super) path: String,
}

impl Writer {
    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Job>) {
        while let Some(job) = inbox.recv().await {
            let mut group = Vec::new();
            let mut after = None;
            let mut next = Some(job);
            while let Some(job) = next.take() {
                match job {
                    Job::Commit(waiting) => {
                        group.push(waiting);
                        if group.len() < GROUP {
                            next = inbox.try_recv().ok();
                        }
                    }
                    other => after = Some(other),
                }
            }
            if !group.is_empty() {
                self.commit(group).await;
            }
            match after {
                Some(Job::Trim(trim, reply)) => {
                    let outcome = self.trim(trim).await;
                    if outcome.is_err() {
                        roll_back(&mut self.connection).await;
                    }
                    let _ = reply.send(outcome.map_err(|error| explain(&self.path, "cannot trim", &error)));
                }
                Some(Job::Truncate) => {
                    let emptied =
                        sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(&mut self.connection).await;
                    if let Err(error) = emptied {
                        tracing::warn!(%error, database = self.path, "emptying the write-ahead log failed");
                    }
                }
                Some(Job::Close(reply)) => {
                    if let Err(error) = self.connection.close().await {
                        tracing::warn!(%error, database = self.path, "closing the database failed");
                    }
                    let _ = reply.send(());
                    return;
                }
                _ => {}
            }
        }
    }

    async fn commit(&mut self, group: Vec<Waiting>) {
        let (group, replies): (Vec<_>, Vec<_>) = group.into_iter().unzip();
        let mut answers = Vec::with_capacity(group.len());
        let mut revision = self.revision;
        let tx = &mut self.connection;
        let outcome: Result<(), sqlx::Error> = async {
            begin(tx).await?;
            for wanted in group {
                if let Err(refused) = verify(tx, &wanted).await? {
                    answers.push(Err(refused));
                    continue;
                }
                let puts = apply(tx, &mut revision, *wanted).await?;
                answers.push(Ok(Committed { puts, revision }));
            }
            sqlx::query("UPDATE meta SET value = ? WHERE key = 'revision'")
                .bind(revision as i64)
                .execute(&mut *tx)
                .await?;
            sqlx::query("COMMIT").execute(&mut *tx).await?;
            Ok(())
        }
        .await;
        match outcome {
            Ok(()) => {
                self.revision = revision;
                self.announce.send_replace(revision);
                for (reply, answer) in replies.into_iter().zip(answers) {
                    let _ = reply.send(answer);
                }
            }
            Err(error) => {
                roll_back(&mut self.connection).await;
                let error = explain(&self.path, "cannot commit", &error);
                tracing::error!(%error, "a commit failed");
                for reply in replies {
                    let _ = reply.send(Err(error.clone()));
                }
            }
        }
    }

    async fn trim(&mut self, trim: Trim) -> Result<(), sqlx::Error> {
        let tx = &mut self.connection;
        begin(tx).await?;
        let floor = self.revision.saturating_sub(trim.changelog_keep) as i64;
        sqlx::query("DELETE FROM changelog WHERE revision <= ?").bind(floor).execute(&mut *tx).await?;
        sqlx::query("UPDATE meta SET value = max(value, ?) WHERE key = 'floor'")
            .bind(floor)
            .execute(&mut *tx)
            .await?;
        sqlx::query(
            "DELETE FROM events WHERE revision <= \
             (SELECT revision FROM events ORDER BY revision DESC LIMIT 1 OFFSET ?)",
        )
        .bind(trim.events_keep as i64)
        .execute(&mut *tx)
        .await?;
        sqlx::query("DELETE FROM requests WHERE time_ms < ?")
            .bind(trim.requests_before_ms)
            .execute(&mut *tx)
            .await?;
        sqlx::query("COMMIT").execute(&mut *tx).await?;
        Ok(())
    }
}

/// Begins a transaction. Not sqlx's own: SQLite ends a transaction by itself when the disk is full
/// (<https://www.sqlite.org/lang_transaction.html>), and sqlx would count it as open for ever.
async fn begin(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    sqlx::query("BEGIN IMMEDIATE").execute(connection).await.map(drop)
}

/// Ends a transaction that failed.
async fn roll_back(connection: &mut SqliteConnection) {
    if let Err(error) = sqlx::query("ROLLBACK").execute(connection).await {
        tracing::debug!(%error, "no transaction was open any more");
    }
}

async fn row_revision(tx: &mut SqliteConnection, kind: Kind, key: &str) -> Result<Option<u64>, sqlx::Error> {
    let revision: Option<i64> = sqlx::query_scalar("SELECT revision FROM objects WHERE kind = ? AND key = ?")
        .bind(kind as i64)
        .bind(key)
        .fetch_optional(&mut *tx)
        .await?;
    Ok(revision.map(|revision| revision as u64))
}

async fn verify(tx: &mut SqliteConnection, wanted: &Tx) -> Result<Result<(), StoreError>, sqlx::Error> {
    for check in &wanted.checks {
        let holds = match check {
            Check::Exists(kind, key) => row_revision(tx, *kind, key).await?.is_some(),
            Check::TemplateUnused(uid) => sqlx::query_scalar::<_, i64>(
                "SELECT 1 FROM objects WHERE kind = ? AND template = ? AND template <> '' LIMIT 1",
            )
            .bind(Kind::Actor as i64)
            .bind(uid)
            .fetch_optional(&mut *tx)
            .await?
            .is_none(),
            Check::ActorsBelow(name, limit) => {
                sqlx::query_scalar::<_, i64>("SELECT 1 FROM usage WHERE atespace = ? AND actors >= ?")
                    .bind(name)
                    .bind(*limit as i64)
                    .fetch_optional(&mut *tx)
                    .await?
                    .is_none()
            }
            Check::AtespaceEmpty(name) => sqlx::query_scalar::<_, i64>(
                "SELECT 1 FROM objects WHERE kind IN (?, ?) AND atespace = ? LIMIT 1",
            )
            .bind(Kind::Actor as i64)
            .bind(Kind::Template as i64)
            .bind(name)
            .fetch_optional(&mut *tx)
            .await?
            .is_none(),
        };
        if !holds {
            return Ok(Err(StoreError::Check(check.clone())));
        }
    }
    for (object, expect) in &wanted.puts {
        let old = row_revision(tx, object.kind, &object.key).await?;
        // A row keeps its name, so its own revision is all there is to check.
        match expect {
            Expect::Revision(revision) if old != Some(*revision) => {
                return Ok(Err(StoreError::Conflict { kind: object.kind, key: object.key.clone() }));
            }
            Expect::Any if old.is_none() => {}
            Expect::Absent => {}
            Expect::Revision(_) | Expect::Any => continue,
        }
        let holder: Option<String> =
            sqlx::query_scalar("SELECT key FROM objects WHERE kind = ? AND atespace = ? AND name = ?")
                .bind(object.kind as i64)
                .bind(&object.atespace)
                .bind(&object.name)
                .fetch_optional(&mut *tx)
                .await?;
        if (*expect == Expect::Absent && old.is_some()) || holder.is_some_and(|key| key != object.key) {
            return Ok(Err(StoreError::Exists {
                kind: object.kind,
                atespace: object.atespace.clone(),
                name: object.name.clone(),
            }));
        }
    }
    for (kind, key, expect) in &wanted.deletes {
        let old = row_revision(tx, *kind, key).await?;
        let fits = match expect {
            Expect::Any => true,
            Expect::Absent => old.is_none(),
            Expect::Revision(revision) => old == Some(*revision),
        };
        if !fits {
            return Ok(Err(StoreError::Conflict { kind: *kind, key: key.clone() }));
        }
    }
    Ok(Ok(()))
}

/// Writes changes of one transaction with few statements: each is a hop to the connection's thread and back.
async fn log(tx: &mut SqliteConnection, changes: &[Change]) -> Result<(), sqlx::Error> {
    // Nobody watches nodes.
    let changes: Vec<&Change> = changes.iter().filter(|change| change.kind != Kind::Node).collect();
    for changes in changes.chunks(ROWS) {
        let mut insert =
            QueryBuilder::new("INSERT INTO changelog (revision, kind, key, atespace, name, deleted, doc) ");
        insert.push_values(changes, |mut row, change| {
            row.push_bind(change.revision as i64)
                .push_bind(change.kind as i64)
                .push_bind(&change.key)
                .push_bind(&change.atespace)
                .push_bind(&change.name)
                .push_bind(i64::from(change.deleted))
                .push_bind(&change.doc);
        });
        insert.build().execute(&mut *tx).await?;
    }
    Ok(())
}

async fn apply(tx: &mut SqliteConnection, revision: &mut u64, wanted: Tx) -> Result<Vec<u64>, sqlx::Error> {
    let mut next = || {
        *revision += 1;
        *revision
    };
    let mut puts = Vec::with_capacity(wanted.puts.len());
    let mut changes = Vec::new();
    for (object, _) in wanted.puts {
        let revision = next();
        puts.push(revision);
        sqlx::query(
            "INSERT INTO objects (kind, key, atespace, name, state, template, busy, revision, doc) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (kind, key) DO UPDATE SET state = excluded.state, \
             template = excluded.template, busy = excluded.busy, revision = excluded.revision, doc = excluded.doc",
        )
        .bind(object.kind as i64)
        .bind(&object.key)
        .bind(&object.atespace)
        .bind(&object.name)
        .bind(object.state)
        .bind(&object.template)
        .bind(i64::from(object.busy))
        .bind(revision as i64)
        .bind(&object.doc)
        .execute(&mut *tx)
        .await?;
        let Object { kind, key, atespace, name, doc, .. } = object;
        changes.push(Change { revision, kind, key, atespace, name, deleted: false, doc });
    }
    for (kind, key, _) in wanted.deletes {
        let old: Option<SqliteRow> =
            sqlx::query("DELETE FROM objects WHERE kind = ? AND key = ? RETURNING atespace, name")
                .bind(kind as i64)
                .bind(&key)
                .fetch_optional(&mut *tx)
                .await?;
        if let Some(old) = old {
            let (atespace, name) = (old.try_get(0)?, old.try_get(1)?);
            let doc = String::new();
            changes.push(Change { revision: next(), kind, key, atespace, name, deleted: true, doc });
        }
    }
    for note in wanted.notes {
        let super::Note { kind, key, atespace, name, deleted, doc } = note;
        changes.push(Change { revision: next(), kind, key, atespace, name, deleted, doc });
    }
    for event in wanted.events {
        let doc = serde_json::to_string(&event).unwrap_or_default();
        let change = Change {
            revision: next(),
            kind: Kind::Event,
            key: String::new(),
            atespace: event.atespace,
            name: event.subject,
            deleted: false,
            doc,
        };
        sqlx::query("INSERT INTO events (revision, atespace, subject, reason, doc) VALUES (?, ?, ?, ?, ?)")
            .bind(change.revision as i64)
            .bind(&change.atespace)
            .bind(&change.name)
            .bind(event.reason)
            .bind(&change.doc)
            .execute(&mut *tx)
            .await?;
        changes.push(change);
    }
    log(tx, &changes).await?;
    if let Some(request) = wanted.request {
        sqlx::query(
            "INSERT OR REPLACE INTO requests (id, fingerprint, outcome, time_ms) VALUES (?, ?, ?, ?)",
        )
        .bind(request.id)
        .bind(request.fingerprint)
        .bind(request.outcome)
        .bind(request.time_ms)
        .execute(&mut *tx)
        .await?;
    }
    for (key, value) in wanted.seals {
        match value {
            Some(value) => {
                sqlx::query("INSERT OR REPLACE INTO sealed (key, value) VALUES (?, ?)")
                    .bind(key)
                    .bind(value)
                    .execute(&mut *tx)
                    .await?
            }
            None => sqlx::query("DELETE FROM sealed WHERE key = ?").bind(key).execute(&mut *tx).await?,
        };
    }
    for change in wanted.refs {
        match change {
            RefChange::Hold { holder, blobs } => {
                for blob in blobs {
                    sqlx::query("INSERT OR IGNORE INTO refs (holder, blob) VALUES (?, ?)")
                        .bind(&holder)
                        .bind(serde_json::to_string(&blob).unwrap_or_default())
                        .execute(&mut *tx)
                        .await?;
                }
            }
            RefChange::Drop { holder } => {
                let blobs: Vec<String> =
                    sqlx::query_scalar("DELETE FROM refs WHERE holder = ? RETURNING blob")
                        .bind(&holder)
                        .fetch_all(&mut *tx)
                        .await?;
                for blob in blobs {
                    sqlx::query(
                        "INSERT INTO garbage (holder, item) SELECT ?1, ?2 \
                         WHERE NOT EXISTS (SELECT 1 FROM refs WHERE blob = ?2)",
                    )
                    .bind(&holder)
                    .bind(&blob)
                    .execute(&mut *tx)
                    .await?;
                }
            }
        }
    }
    for item in wanted.garbage {
        sqlx::query("INSERT INTO garbage (holder, item) VALUES ('', ?)")
            .bind(serde_json::to_string(&item).unwrap_or_default())
            .execute(&mut *tx)
            .await?;
    }
    for change in wanted.usage {
        sqlx::query(
            "INSERT INTO usage (atespace, actors, bytes) VALUES (?, ?, ?) ON CONFLICT (atespace) DO UPDATE SET \
             actors = actors + excluded.actors, bytes = bytes + excluded.bytes",
        )
        .bind(change.atespace)
        .bind(change.actors)
        .bind(change.bytes)
        .execute(&mut *tx)
        .await?;
    }
    for id in wanted.garbage_done {
        sqlx::query("DELETE FROM garbage WHERE id = ?").bind(id).execute(&mut *tx).await?;
    }
    Ok(puts)
}
