// SPDX-License-Identifier: Apache-2.0
//! The task that writes to SQLite.
//!
//! It takes whatever transactions wait, evaluates and applies them one after the other inside one SQLite transaction, and
//! answers all of them after its commit: a group commit, so that many writers share one fsync. Preconditions are
//! evaluated before anything of a transaction is written, so a refused one leaves no trace in the group; an I/O error
//! fails the whole group and nothing of it is written.
use sqlx::Connection as _;
use sqlx::sqlite::SqliteConnection;
use tokio::sync::{mpsc, oneshot, watch};

use super::batch::Batch;
use super::rows::Rows;
use super::sqlite::explain;
use super::{Check, Committed, Expect, Kind, StoreError, Trim, Tx};

/// Transactions that share one commit at most.
const GROUP: usize = 64;

/// A transaction and who waits for it.
type Waiting = (Box<Tx>, oneshot::Sender<Result<Committed, StoreError>>);

pub(super) enum Job {
    Commit(Waiting),
    /// Move what is left in the write-ahead log ([`super::wal`]).
    Finish(oneshot::Sender<()>),
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
                Some(Job::Finish(reply)) => {
                    super::wal::finish(&mut self.connection, &self.path).await;
                    let _ = reply.send(());
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
            let mut rows = Rows::read(tx, group.iter().map(|tx| &**tx)).await?;
            for wanted in group {
                if let Err(refused) = verify(tx, &rows, &wanted).await? {
                    answers.push(Err(refused));
                    continue;
                }
                let mut batch = Batch::default();
                let puts = batch.apply(&mut rows, &mut revision, *wanted);
                batch.execute(tx).await?;
                answers.push(Ok(Committed { puts, revision }));
            }
            sqlx::query("UPDATE meta SET value = ? WHERE key = 'revision'; COMMIT")
                .bind(revision as i64)
                .execute(&mut *tx)
                .await?;
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

async fn exists(tx: &mut SqliteConnection, kind: Kind, key: &str) -> Result<bool, sqlx::Error> {
    let found: Option<i64> = sqlx::query_scalar("SELECT 1 FROM objects WHERE kind = ? AND key = ?")
        .bind(kind as i64)
        .bind(key)
        .fetch_optional(&mut *tx)
        .await?;
    Ok(found.is_some())
}

async fn verify(
    tx: &mut SqliteConnection,
    rows: &Rows,
    wanted: &Tx,
) -> Result<Result<(), StoreError>, sqlx::Error> {
    for check in &wanted.checks {
        let holds = match check {
            Check::Exists(kind, key) => exists(tx, *kind, key).await?,
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
        let old = rows.revision(object.kind, &object.key);
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
    Ok(rows.verify_deletes(wanted))
}
