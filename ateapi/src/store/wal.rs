// SPDX-License-Identifier: Apache-2.0
//! Keeps SQLite's write-ahead log short without holding up commits.
//!
//! What is in the log is moved into the database by a connection of its own, while the writer goes on
//! (<https://www.sqlite.org/pragma.html#pragma_wal_checkpoint>, PASSIVE). Moved by a commit, as SQLite does by itself,
//! it would hold up whoever waits for that commit and all behind it. A log that was moved whole is written from its
//! beginning again; one that grows all the same, because there never was a moment to catch up, is emptied by the writer
//! between two groups.
use std::time::Duration;

use sqlx::sqlite::SqliteConnection;
use sqlx::{Connection as _, Row as _};
use tokio::sync::{mpsc, watch};

use super::write::Job;

/// Revisions after which the log is moved: about 4 MiB of it.
const MOVE_AFTER: u64 = 400;
/// Pages (4 KiB) in the log from which on the writer is asked to empty it.
const LOG_PAGES: i64 = 4_096;
/// Between attempts that fail (a full disk).
const MOVE_AGAIN: Duration = Duration::from_secs(1);

/// Moves the write-ahead log into the database as it grows, until the writer ends.
pub(super) async fn keep_short(
    mut connection: SqliteConnection,
    mut revisions: watch::Receiver<u64>,
    jobs: mpsc::WeakSender<Job>,
    path: String,
) {
    let mut moved = *revisions.borrow();
    while revisions.wait_for(|revision| *revision >= moved + MOVE_AFTER).await.is_ok() {
        let revision = *revisions.borrow();
        let outcome = sqlx::query("PRAGMA wal_checkpoint(PASSIVE)")
            .fetch_one(&mut connection)
            .await
            .and_then(|row| row.try_get(1));
        match outcome {
            Ok(pages) => {
                moved = revision;
                let pages: i64 = pages;
                if pages > LOG_PAGES
                    && let Some(jobs) = jobs.upgrade()
                    && jobs.send(Job::Truncate).await.is_err()
                {
                    break;
                }
            }
            Err(error) => {
                tracing::warn!(%error, database = path, "moving the write-ahead log failed; trying again");
                tokio::time::sleep(MOVE_AGAIN).await;
            }
        }
    }
    if let Err(error) = connection.close().await {
        tracing::warn!(%error, database = path, "closing the database failed");
    }
}
