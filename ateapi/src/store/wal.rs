// SPDX-License-Identifier: Apache-2.0
//! Keeps SQLite's write-ahead log short without holding up commits.
//!
//! What is in the log is moved into the database by a connection of its own, while the writer goes on
//! (<https://www.sqlite.org/pragma.html#pragma_wal_checkpoint>, PASSIVE). Moved by a commit, as SQLite does by itself,
//! it would hold up whoever waits for that commit and all behind it. Only a log that was moved whole is written from its
//! beginning again, and under steady writing the mover never has all of it; so once little is left the writer moves the
//! rest between two groups. Neither waits for a reader: one that holds on to an old state lets the log grow until it
//! ends. The file keeps its length, so that a commit writes over what is allocated already and its fdatasync(2) has no
//! metadata to write.
use std::time::Duration;

use sqlx::sqlite::SqliteConnection;
use sqlx::{Connection as _, Row as _};
use tokio::sync::{mpsc, oneshot, watch};

use super::write::Job;

/// Revisions after which the log is moved: about 1 MiB of it. More at once holds up the commits that write beside it to
/// the same disk (measured with `bench/control`: 4 MiB add 3 ms to their 99th percentile).
const MOVE_AFTER: u64 = 100;
/// Pages (4 KiB) in the log from which on the writer is asked to move what the mover left.
const LOG_PAGES: i64 = 4_096;
/// Pages that the writer moves at once, and how often the mover tries to leave no more.
const LEFT_PAGES: i64 = 64;
const TRIES: usize = 3;
/// Between attempts that fail (a full disk).
const MOVE_AGAIN: Duration = Duration::from_secs(1);

/// What a move found: pages in the log, and those of them that are in the database.
struct Moved {
    log: i64,
    done: i64,
}

async fn advance(connection: &mut SqliteConnection) -> Result<Moved, sqlx::Error> {
    let row = sqlx::query("PRAGMA wal_checkpoint(PASSIVE)").fetch_one(connection).await?;
    Ok(Moved { log: row.try_get(1)?, done: row.try_get(2)? })
}

/// The writer's part: moves what is left.
pub(super) async fn finish(connection: &mut SqliteConnection, path: &str) {
    if let Err(error) = advance(connection).await {
        tracing::warn!(%error, database = path, "moving the write-ahead log failed; it is tried again");
    }
}

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
        let mut outcome = advance(&mut connection).await;
        for _ in 1..TRIES {
            match &outcome {
                Ok(it) if it.log > LOG_PAGES && it.log - it.done > LEFT_PAGES => {
                    outcome = advance(&mut connection).await;
                }
                _ => break,
            }
        }
        match outcome {
            Ok(it) => {
                moved = revision;
                if it.log > LOG_PAGES
                    && let Some(jobs) = jobs.upgrade()
                {
                    let (reply, finished) = oneshot::channel();
                    if jobs.send(Job::Finish(reply)).await.is_err() || finished.await.is_err() {
                        break;
                    }
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
