// SPDX-License-Identifier: Apache-2.0
//! The store in SQLite.
//!
//! One task owns the writing connection. It takes whatever transactions wait, evaluates and applies them one after
//! the other inside one SQLite transaction, and answers all of them after its commit: a group commit, so that many
//! writers share one fsync (journal_mode=WAL, synchronous=FULL: <https://www.sqlite.org/wal.html>). Preconditions are
//! evaluated before anything of a transaction is written, so a refused one leaves no trace in the group; an I/O error
//! fails the whole group and nothing of it is written. Readers have connections of their own and see only committed
//! groups. The write-ahead log is the business of [`super::wal`].
use std::fs::File;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow,
    SqliteSynchronous,
};
use sqlx::{ConnectOptions as _, Connection as _, QueryBuilder, Row as _, Sqlite};
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    Change, Check, Committed, DeletionPermit, EventQuery, Expect, Garbage, Kind, Object, Query, RefChange,
    RequestRecord, Store, StoreError, Trim, Tx, Usage, wal,
};
use crate::model::EventDraft;

/// Transactions that share one commit at most.
const GROUP: usize = 64;
/// Transactions that may wait.
const BACKLOG: usize = 4_096;
const READERS: u32 = 4;
/// Rows of one statement; a connection keeps each length's statement prepared.
const ROWS: usize = 16;

pub(super) static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("./migrations");

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
pub struct SqliteStore {
    readers: SqlitePool,
    jobs: mpsc::Sender<Job>,
    revisions: watch::Receiver<u64>,
    // Held for as long as the store lives: a second control plane on the file is refused.
    lock: Mutex<Option<nix::fcntl::Flock<File>>>,
    mover: Mutex<Option<tokio::task::JoinHandle<()>>>,
    file: PathBuf,
    path: String,
}

pub(super) fn explain(path: &str, doing: &str, error: &sqlx::Error) -> StoreError {
    let code = match error {
        sqlx::Error::Database(database) => database.code().and_then(|code| code.parse::<i32>().ok()),
        _ => None,
    };
    // Primary result codes are the low byte: https://www.sqlite.org/rescode.html
    match code.map(|code| code & 0xff) {
        Some(8) => StoreError::Unusable(format!(
            "{doing}: database {path} is read-only: make the file and its directory writable for this user"
        )),
        Some(11 | 26) => StoreError::Unusable(format!(
            "{doing}: database {path} is damaged or no SQLite database ({error}): move it away and restore a backup"
        )),
        Some(13) => {
            StoreError::Io(format!("{doing}: the disk of database {path} is full: free space and try again"))
        }
        Some(14) => StoreError::Unusable(format!(
            "{doing}: database {path} cannot be opened ({error}): check that its directory exists and is accessible"
        )),
        _ => StoreError::Io(format!("{doing}: database {path}: {error}")),
    }
}

impl SqliteStore {
    /// Opens or creates a database and brings its schema up to date.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(Duration::from_secs(5))
            .foreign_keys(false)
            .pragma("wal_autocheckpoint", "0")
            .disable_statement_logging();
        Self::open_with(path, options).await
    }

    pub(super) async fn open_with(path: &Path, options: SqliteConnectOptions) -> Result<Self, StoreError> {
        let shown = path.display().to_string();
        let unusable = |what: &str, error: &dyn std::fmt::Display| {
            StoreError::Unusable(format!("{what} of database {shown}: {error}"))
        };
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty() && !dir.exists()) {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(|error| unusable("cannot create the directory", &error))?;
        }
        let lock_path = path.with_extension("lock");
        let lock = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(|error| unusable("cannot open the lock file", &error))?;
        let lock =
            nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusiveNonblock).map_err(|_| {
                StoreError::Unusable(format!(
                    "database {shown} is in use by another control plane: stop it or choose another directory"
                ))
            })?;
        let mut writer = SqliteConnection::connect_with(&options)
            .await
            .map_err(|error| explain(&shown, "cannot open the control plane's state", &error))?;
        let verdict: String = sqlx::query_scalar("PRAGMA quick_check(1)")
            .fetch_one(&mut writer)
            .await
            .map_err(|error| explain(&shown, "cannot check the control plane's state", &error))?;
        if verdict != "ok" {
            return Err(StoreError::Unusable(format!(
                "database {shown} is damaged ({verdict}): move it away and restore a backup"
            )));
        }
        MIGRATIONS.run_direct(None, &mut writer, false).await.map_err(|error| match error {
            sqlx::migrate::MigrateError::VersionMissing(version) => StoreError::Unusable(format!(
                "database {shown} has schema {version}, which this version does not know: it was written by a newer \
                 substrate; start that one, or restore a backup made before the upgrade"
            )),
            sqlx::migrate::MigrateError::Execute(error)
            | sqlx::migrate::MigrateError::ExecuteMigration(error, _) => {
                explain(&shown, "cannot bring the schema up to date", &error)
            }
            other => StoreError::Unusable(format!(
                "cannot bring the schema of database {shown} up to date: {other}"
            )),
        })?;
        // What cannot be written is said at the start, not at the first commit. BEGIN IMMEDIATE alone does not tell.
        sqlx::raw_sql("BEGIN IMMEDIATE; UPDATE meta SET value = value; ROLLBACK")
            .execute(&mut writer)
            .await
            .map_err(|error| explain(&shown, "cannot write the control plane's state", &error))?;
        let revision: i64 = sqlx::query_scalar("SELECT value FROM meta WHERE key = 'revision'")
            .fetch_one(&mut writer)
            .await
            .map_err(|error| explain(&shown, "cannot read the revision", &error))?;
        let mover = SqliteConnection::connect_with(&options)
            .await
            .map_err(|error| explain(&shown, "cannot open the control plane's state", &error))?;
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .connect_with(options.read_only(true).create_if_missing(false))
            .await
            .map_err(|error| explain(&shown, "cannot open the control plane's state", &error))?;
        let (announce, revisions) = watch::channel(revision as u64);
        let (jobs, inbox) = mpsc::channel(BACKLOG);
        let task = Writer { connection: writer, revision: revision as u64, announce, path: shown.clone() };
        tokio::spawn(task.run(inbox));
        let mover = tokio::spawn(wal::keep_short(mover, revisions.clone(), jobs.downgrade(), shown.clone()));
        Ok(Self {
            readers,
            jobs,
            revisions,
            lock: Mutex::new(Some(lock)),
            mover: Mutex::new(Some(mover)),
            file: path.to_owned(),
            path: shown,
        })
    }

    fn io(&self, doing: &str) -> impl Fn(sqlx::Error) -> StoreError {
        let path = self.path.clone();
        let doing = doing.to_owned();
        move |error| explain(&path, &doing, &error)
    }
}

fn closed() -> StoreError {
    StoreError::Io("the store is closed".to_owned())
}

struct Writer {
    connection: SqliteConnection,
    revision: u64,
    announce: watch::Sender<u64>,
    path: String,
}

impl Writer {
    async fn run(mut self, mut inbox: mpsc::Receiver<Job>) {
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

fn kind_of(row: &SqliteRow, column: &str) -> Result<Kind, sqlx::Error> {
    let number: i64 = row.try_get(column)?;
    Kind::from_i64(number).ok_or_else(|| sqlx::Error::Decode(format!("unknown kind {number}").into()))
}

fn object(row: &SqliteRow) -> Result<Object, sqlx::Error> {
    Ok(Object {
        kind: kind_of(row, "kind")?,
        key: row.try_get("key")?,
        atespace: row.try_get("atespace")?,
        name: row.try_get("name")?,
        state: row.try_get("state")?,
        template: row.try_get("template")?,
        busy: row.try_get::<i64, _>("busy")? != 0,
        revision: row.try_get::<i64, _>("revision")? as u64,
        doc: row.try_get("doc")?,
    })
}

impl SqliteStore {
    /// One ordered walk along one index; a list over several states merges one walk per state.
    async fn walk(&self, query: &Query, state: Option<i64>) -> Result<Vec<Object>, sqlx::Error> {
        let mut sql = sqlx::QueryBuilder::<Sqlite>::new("SELECT * FROM objects");
        // Named, because SQLite would otherwise weigh them by statistics that it does not have.
        sql.push(match (state, &query.template, query.busy) {
            (_, _, true) => " INDEXED BY objects_busy WHERE busy = 1 AND kind = ",
            (_, Some(_), _) => " INDEXED BY objects_template WHERE template <> '' AND kind = ",
            (Some(_), ..) => " INDEXED BY objects_state WHERE kind = ",
            _ => " INDEXED BY objects_name WHERE kind = ",
        });
        sql.push_bind(query.kind as i64);
        if let Some(state) = state {
            sql.push(" AND state = ").push_bind(state);
        }
        if let Some(template) = &query.template {
            sql.push(" AND template = ").push_bind(template.clone());
        }
        if let Some(atespace) = &query.atespace {
            sql.push(" AND atespace = ").push_bind(atespace.clone());
        }
        if let Some((atespace, name)) = &query.after {
            sql.push(" AND (atespace, name) > (").push_bind(atespace.clone());
            sql.push(", ").push_bind(name.clone()).push(")");
        }
        sql.push(" ORDER BY atespace, name LIMIT ").push_bind(query.limit as i64);
        sql.build().fetch_all(&self.readers).await?.iter().map(object).collect()
    }
}

#[async_trait::async_trait]
impl Store for SqliteStore {
    async fn commit(&self, tx: Tx) -> Result<Committed, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.jobs.send(Job::Commit((Box::new(tx), reply))).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }

    async fn get(&self, kind: Kind, key: &str) -> Result<Option<Object>, StoreError> {
        let row = sqlx::query("SELECT * FROM objects WHERE kind = ? AND key = ?")
            .bind(kind as i64)
            .bind(key)
            .fetch_optional(&self.readers)
            .await
            .map_err(self.io("cannot read"))?;
        row.as_ref().map(object).transpose().map_err(self.io("cannot read"))
    }

    async fn find(&self, kind: Kind, atespace: &str, name: &str) -> Result<Option<Object>, StoreError> {
        let row = sqlx::query("SELECT * FROM objects WHERE kind = ? AND atespace = ? AND name = ?")
            .bind(kind as i64)
            .bind(atespace)
            .bind(name)
            .fetch_optional(&self.readers)
            .await
            .map_err(self.io("cannot read"))?;
        row.as_ref().map(object).transpose().map_err(self.io("cannot read"))
    }

    async fn list(&self, query: &Query) -> Result<Vec<Object>, StoreError> {
        let fail = self.io("cannot list");
        if query.states.is_empty() {
            return self.walk(query, None).await.map_err(fail);
        }
        let mut merged = Vec::new();
        for state in &query.states {
            merged.extend(self.walk(query, Some(*state)).await.map_err(&fail)?);
        }
        merged.sort_by(|a, b| (&a.atespace, &a.name).cmp(&(&b.atespace, &b.name)));
        merged.dedup_by(|a, b| a.key == b.key);
        merged.truncate(query.limit);
        Ok(merged)
    }

    async fn changes(&self, after: u64, limit: usize) -> Result<Vec<Change>, StoreError> {
        let fail = self.io("cannot read changes");
        let mut tx = self.readers.begin().await.map_err(&fail)?;
        let floor: i64 = sqlx::query_scalar("SELECT value FROM meta WHERE key = 'floor'")
            .fetch_one(&mut *tx)
            .await
            .map_err(&fail)?;
        if after < floor as u64 {
            return Err(StoreError::Compacted { oldest: floor as u64 });
        }
        let rows = sqlx::query("SELECT * FROM changelog WHERE revision > ? ORDER BY revision LIMIT ?")
            .bind(after as i64)
            .bind(limit as i64)
            .fetch_all(&mut *tx)
            .await
            .map_err(&fail)?;
        rows.iter()
            .map(|row| {
                Ok(Change {
                    revision: row.try_get::<i64, _>("revision")? as u64,
                    kind: kind_of(row, "kind")?,
                    key: row.try_get("key")?,
                    atespace: row.try_get("atespace")?,
                    name: row.try_get("name")?,
                    deleted: row.try_get::<i64, _>("deleted")? != 0,
                    doc: row.try_get("doc")?,
                })
            })
            .collect::<Result<_, _>>()
            .map_err(fail)
    }

    async fn events(&self, query: &EventQuery) -> Result<Vec<(u64, EventDraft)>, StoreError> {
        let mut sql = sqlx::QueryBuilder::<Sqlite>::new("SELECT revision, doc FROM events WHERE revision > ");
        sql.push_bind(query.after as i64);
        for (column, value) in [
            (" AND atespace = ", &query.atespace),
            (" AND subject = ", &query.subject),
            (" AND reason = ", &query.reason),
        ] {
            if let Some(value) = value {
                sql.push(column).push_bind(value.clone());
            }
        }
        sql.push(if query.after > 0 {
            " ORDER BY revision LIMIT "
        } else {
            " ORDER BY revision DESC LIMIT "
        });
        sql.push_bind(query.limit as i64);
        let fail = self.io("cannot read events");
        let mut rows = sql.build().fetch_all(&self.readers).await.map_err(&fail)?;
        if query.after == 0 {
            rows.reverse();
        }
        rows.iter()
            .map(|row| {
                let doc: String = row.try_get("doc")?;
                let event =
                    serde_json::from_str(&doc).map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
                Ok((row.try_get::<i64, _>("revision")? as u64, event))
            })
            .collect::<Result<_, _>>()
            .map_err(fail)
    }

    async fn request(&self, id: &str) -> Result<Option<RequestRecord>, StoreError> {
        let fail = self.io("cannot read");
        let row = sqlx::query("SELECT * FROM requests WHERE id = ?")
            .bind(id)
            .fetch_optional(&self.readers)
            .await
            .map_err(&fail)?;
        row.map(|row| {
            Ok(RequestRecord {
                id: row.try_get("id")?,
                fingerprint: row.try_get("fingerprint")?,
                outcome: row.try_get("outcome")?,
                time_ms: row.try_get("time_ms")?,
            })
        })
        .transpose()
        .map_err(fail)
    }

    async fn sealed(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        sqlx::query_scalar("SELECT value FROM sealed WHERE key = ?")
            .bind(key)
            .fetch_optional(&self.readers)
            .await
            .map_err(self.io("cannot read"))
    }

    async fn garbage(&self, limit: usize) -> Result<Vec<(i64, String, Garbage)>, StoreError> {
        let fail = self.io("cannot read garbage");
        let rows = sqlx::query("SELECT id, holder, item FROM garbage ORDER BY id LIMIT ?")
            .bind(limit as i64)
            .fetch_all(&self.readers)
            .await
            .map_err(&fail)?;
        rows.iter()
            .map(|row| {
                let item: String = row.try_get("item")?;
                let item =
                    serde_json::from_str(&item).map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
                Ok((row.try_get("id")?, row.try_get("holder")?, item))
            })
            .collect::<Result<_, _>>()
            .map_err(fail)
    }

    async fn usage(&self, atespace: &str) -> Result<Usage, StoreError> {
        let row: Option<(i64, i64)> = sqlx::query_as("SELECT actors, bytes FROM usage WHERE atespace = ?")
            .bind(atespace)
            .fetch_optional(&self.readers)
            .await
            .map_err(self.io("cannot read"))?;
        let (actors, bytes) = row.unwrap_or_default();
        Ok(Usage { actors: actors.max(0) as u64, bytes: bytes.max(0) as u64 })
    }

    fn revisions(&self) -> watch::Receiver<u64> {
        self.revisions.clone()
    }

    fn deletion_permit(&self) -> Option<DeletionPermit> {
        let file = match crate::backup::open_lock(&self.file) {
            Ok(file) => file,
            Err(error) => {
                tracing::warn!(database = self.path, %error, "no blobs are deleted: the lock beside it cannot be opened");
                return None;
            }
        };
        let lock = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock);
        lock.ok().map(|lock| DeletionPermit(Some(lock)))
    }

    async fn trim(&self, trim: Trim) -> Result<(), StoreError> {
        let (reply, answer) = oneshot::channel();
        self.jobs.send(Job::Trim(trim, reply)).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }

    async fn close(&self) {
        self.readers.close().await;
        let (reply, answer) = oneshot::channel();
        if self.jobs.send(Job::Close(reply)).await.is_ok() {
            let _ = answer.await;
        }
        // It ends with the writer; the last connection that is closed leaves everything in the database's one file.
        let mover = self.mover.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(mover) = mover
            && let Err(error) = mover.await
        {
            tracing::error!(%error, database = self.path, "the task of the write-ahead log ended badly");
        }
        self.lock.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    }
}
