// SPDX-License-Identifier: Apache-2.0
//! The store in SQLite.
//!
//! One task owns the writing connection ([`super::write`]); another keeps the write-ahead log short ([`super::wal`]).
//! Readers have connections of their own and see only what is committed. journal_mode=WAL, synchronous=FULL
//! (<https://www.sqlite.org/wal.html>).
use std::fs::File;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow,
    SqliteSynchronous,
};
use sqlx::{ConnectOptions as _, Connection as _, Row as _, Sqlite};
use tokio::sync::{mpsc, oneshot, watch};

use super::write::{Job, Writer};
use super::{
    Change, Committed, DeletionPermit, EventQuery, Garbage, Kind, Object, Query, RequestRecord, Store,
    StoreError, Trim, Tx, Usage, wal,
};
use crate::model::EventDraft;

/// Transactions that may wait.
const BACKLOG: usize = 4_096;
const READERS: u32 = 4;

pub(super) static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("./migrations");

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
            // What a burst left of the log's file is given back.
            .pragma("journal_size_limit", "67108864")
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
