// SPDX-License-Identifier: Apache-2.0
//! Copies of the SQLite database, for backup and restore.
use std::path::Path;
use std::time::Duration;

use futures::TryStreamExt as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions as _, Connection as _, Row as _};

use super::sqlite::{MIGRATIONS, explain};
use super::{Garbage, Kind, StoreError};
use crate::model::Actor;

async fn open(path: &Path) -> Result<SqliteConnection, StoreError> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .read_only(true)
        .busy_timeout(Duration::from_secs(10))
        .disable_statement_logging();
    SqliteConnection::connect_with(&options).await.map_err(failed(path, "cannot open it"))
}

fn failed(path: &Path, doing: &str) -> impl FnOnce(sqlx::Error) -> StoreError {
    let (path, doing) = (path.display().to_string(), doing.to_owned());
    move |error| explain(&path, &doing, &error)
}

async fn close(path: &Path, connection: SqliteConnection) -> Result<(), StoreError> {
    connection.close().await.map_err(failed(path, "cannot close it"))
}

/// Copies a database that may be in use to a new file, as one transaction sees it
/// (<https://www.sqlite.org/lang_vacuum.html#vacuuminto>). The copy has no write-ahead log.
pub(crate) async fn copy_database(from: &Path, to: &Path) -> Result<(), StoreError> {
    let mut connection = open(from).await?;
    sqlx::query("VACUUM INTO ?")
        .bind(to.to_string_lossy().into_owned())
        .execute(&mut connection)
        .await
        .map_err(failed(from, "cannot copy it"))?;
    close(from, connection).await
}

/// The newest schema that this version knows.
pub(crate) fn known_schema() -> i64 {
    MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or_default()
}

/// The schema of a copy.
pub(crate) async fn schema_of(path: &Path) -> Result<i64, StoreError> {
    let mut connection = open(path).await?;
    let version: i64 = sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations")
        .fetch_one(&mut connection)
        .await
        .map_err(failed(path, "cannot read its schema"))?;
    close(path, connection).await?;
    Ok(version)
}

/// Every page, row and index of a copy.
pub(crate) async fn check_copy(path: &Path) -> Result<(), StoreError> {
    let mut connection = open(path).await?;
    let verdict: String = sqlx::query_scalar("PRAGMA integrity_check(1)")
        .fetch_one(&mut connection)
        .await
        .map_err(failed(path, "cannot check it"))?;
    close(path, connection).await?;
    if verdict == "ok" {
        Ok(())
    } else {
        Err(StoreError::Unusable(format!("database {} is damaged ({verdict})", path.display())))
    }
}

/// What is read of a copy.
pub(crate) enum Copied {
    Actor(Box<Actor>),
    /// An object of the blob store and who names it.
    Blob {
        holder: String,
        blob: Garbage,
    },
}

/// Every actor of a copy, and every object of the blob store that it names.
pub(crate) async fn read_copy(
    path: &Path,
    on_record: &mut (dyn FnMut(Copied) + Send),
) -> Result<(), StoreError> {
    let unreadable = |error: serde_json::Error| {
        StoreError::Unusable(format!("a record of database {} cannot be read: {error}", path.display()))
    };
    let mut connection = open(path).await?;
    {
        let mut rows = sqlx::query("SELECT doc FROM objects WHERE kind = ?")
            .bind(Kind::Actor as i64)
            .fetch(&mut connection);
        while let Some(row) = rows.try_next().await.map_err(failed(path, "cannot read its actors"))? {
            let doc: String = row.try_get(0).map_err(failed(path, "cannot read its actors"))?;
            on_record(Copied::Actor(serde_json::from_str(&doc).map_err(unreadable)?));
        }
    }
    {
        let mut rows = sqlx::query("SELECT holder, blob FROM refs").fetch(&mut connection);
        while let Some(row) = rows.try_next().await.map_err(failed(path, "cannot read what it names"))? {
            let holder: String = row.try_get(0).map_err(failed(path, "cannot read what it names"))?;
            let blob: String = row.try_get(1).map_err(failed(path, "cannot read what it names"))?;
            let blob = serde_json::from_str(&blob).map_err(unreadable)?;
            on_record(Copied::Blob { holder, blob });
        }
    }
    close(path, connection).await
}

/// Has a restored database count its revisions from far beyond any that the original gave out since, and forget its
/// changelog: a watch that resumes with a revision of that other history is told so instead of missing changes.
pub(crate) async fn begin_new_history(path: &Path) -> Result<(), StoreError> {
    let options =
        SqliteConnectOptions::new().filename(path).create_if_missing(false).disable_statement_logging();
    let mut connection =
        SqliteConnection::connect_with(&options).await.map_err(failed(path, "cannot open it"))?;
    let doing = "cannot renumber it";
    let mut tx = connection.begin().await.map_err(failed(path, doing))?;
    for statement in [
        "UPDATE meta SET value = value + 1000000000 WHERE key = 'revision'",
        "UPDATE meta SET value = (SELECT value FROM meta WHERE key = 'revision') WHERE key = 'floor'",
        "DELETE FROM changelog",
    ] {
        sqlx::query(statement).execute(&mut *tx).await.map_err(failed(path, doing))?;
    }
    tx.commit().await.map_err(failed(path, doing))?;
    close(path, connection).await
}

/// One sealed secret of a copy, with its owner.
pub(crate) async fn any_sealed(path: &Path) -> Result<Option<(String, Vec<u8>)>, StoreError> {
    let mut connection = open(path).await?;
    let row: Option<(String, Vec<u8>)> = sqlx::query_as("SELECT key, value FROM sealed LIMIT 1")
        .fetch_optional(&mut connection)
        .await
        .map_err(failed(path, "cannot read it"))?;
    close(path, connection).await?;
    Ok(row)
}
