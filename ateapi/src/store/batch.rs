// SPDX-License-Identifier: Apache-2.0
//! The statements of one transaction, sent to SQLite together.
//!
//! A connection lives on a thread of its own, and a hop there and back costs more than most statements. Like
//! transactions give like texts, whose statements the connection keeps prepared; long ones are cut into pieces.
use sqlx::sqlite::{SqliteArguments, SqliteConnection};
use sqlx::{Arguments as _, AssertSqlSafe, Encode, Sqlite, Type};

use super::rows::{Row, Rows};
use super::{Change, Kind, Note, Object, RefChange, Tx};

/// Statements of a piece.
const PIECE: usize = 16;
/// Rows of one insert.
const ROWS: usize = 16;

/// See the module.
#[derive(Default)]
pub(super) struct Batch {
    sql: String,
    args: SqliteArguments,
    statements: usize,
    pieces: Vec<(String, SqliteArguments)>,
    failed: Option<sqlx::Error>,
}

impl Batch {
    /// Begins a statement; its values follow by [`Batch::bind`].
    pub(super) fn add(&mut self, sql: &str) -> &mut Self {
        if self.statements == PIECE {
            self.cut();
        }
        if self.statements > 0 {
            self.sql.push_str("; ");
        }
        self.statements += 1;
        self.sql.push_str(sql);
        self
    }

    pub(super) fn bind<'t, T: Encode<'t, Sqlite> + Type<Sqlite>>(&mut self, value: T) -> &mut Self {
        if let Err(error) = self.args.add(value) {
            self.failed = Some(sqlx::Error::Encode(error));
        }
        self
    }

    fn cut(&mut self) {
        self.statements = 0;
        self.pieces.push((std::mem::take(&mut self.sql), std::mem::take(&mut self.args)));
    }

    pub(super) async fn execute(mut self, connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        self.cut();
        if let Some(error) = self.failed {
            return Err(error);
        }
        for (sql, args) in self.pieces.into_iter().filter(|(sql, _)| !sql.is_empty()) {
            // The text is put together from constants.
            sqlx::query_with(AssertSqlSafe(sql), args).execute(&mut *connection).await?;
        }
        Ok(())
    }

    /// Writes a transaction whose preconditions hold: the revision of each put.
    pub(super) fn apply(&mut self, rows: &mut Rows, revision: &mut u64, wanted: Tx) -> Vec<u64> {
        let mut next = || {
            *revision += 1;
            *revision
        };
        let mut puts = Vec::with_capacity(wanted.puts.len());
        let mut changes = Vec::new();
        for (object, _) in wanted.puts {
            let revision = next();
            puts.push(revision);
            self.add(
                "INSERT INTO objects (kind, key, atespace, name, state, template, busy, revision, doc) \
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (kind, key) DO UPDATE SET state = excluded.state, \
                 template = excluded.template, busy = excluded.busy, revision = excluded.revision, doc = excluded.doc",
            )
            .bind(object.kind as i64)
            .bind(object.key.as_str())
            .bind(object.atespace.as_str())
            .bind(object.name.as_str())
            .bind(object.state)
            .bind(object.template.as_str())
            .bind(i64::from(object.busy))
            .bind(revision as i64)
            .bind(object.doc.as_str());
            let Object { kind, key, atespace, name, doc, .. } = object;
            rows.put(kind, &key, Row { revision, atespace: atespace.clone(), name: name.clone() });
            changes.push(Change { revision, kind, key, atespace, name, deleted: false, doc });
        }
        for (kind, key, _) in wanted.deletes {
            if let Some(Row { atespace, name, .. }) = rows.remove(kind, &key) {
                self.add("DELETE FROM objects WHERE kind = ? AND key = ?")
                    .bind(kind as i64)
                    .bind(key.as_str());
                let doc = String::new();
                changes.push(Change { revision: next(), kind, key, atespace, name, deleted: true, doc });
            }
        }
        for note in wanted.notes {
            let Note { kind, key, atespace, name, deleted, doc } = note;
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
            self.add("INSERT INTO events (revision, atespace, subject, reason, doc) VALUES (?, ?, ?, ?, ?)")
                .bind(change.revision as i64)
                .bind(change.atespace.as_str())
                .bind(change.name.as_str())
                .bind(event.reason)
                .bind(change.doc.as_str());
            changes.push(change);
        }
        self.log(&changes);
        if let Some(request) = wanted.request {
            self.add(
                "INSERT OR REPLACE INTO requests (id, fingerprint, outcome, time_ms) VALUES (?, ?, ?, ?)",
            )
            .bind(request.id)
            .bind(request.fingerprint)
            .bind(request.outcome)
            .bind(request.time_ms);
        }
        for (key, value) in wanted.seals {
            match value {
                Some(value) => {
                    self.add("INSERT OR REPLACE INTO sealed (key, value) VALUES (?, ?)").bind(key).bind(value)
                }
                None => self.add("DELETE FROM sealed WHERE key = ?").bind(key),
            };
        }
        for change in wanted.refs {
            match change {
                RefChange::Hold { holder, blobs } => {
                    for blob in blobs {
                        self.add("INSERT OR IGNORE INTO refs (holder, blob) VALUES (?, ?)")
                            .bind(holder.as_str())
                            .bind(serde_json::to_string(&blob).unwrap_or_default());
                    }
                }
                RefChange::Drop { holder } => {
                    self.add(
                        "INSERT INTO garbage (holder, item) SELECT holder, blob FROM refs AS its WHERE holder = ? \
                         AND NOT EXISTS (SELECT 1 FROM refs AS other \
                                         WHERE other.blob = its.blob AND other.holder <> its.holder)",
                    )
                    .bind(holder.as_str())
                    .add("DELETE FROM refs WHERE holder = ?")
                    .bind(holder.as_str());
                }
            }
        }
        for item in wanted.garbage {
            self.add("INSERT INTO garbage (holder, item) VALUES ('', ?)")
                .bind(serde_json::to_string(&item).unwrap_or_default());
        }
        for change in wanted.usage {
            self.add(
                "INSERT INTO usage (atespace, actors, bytes) VALUES (?, ?, ?) ON CONFLICT (atespace) DO UPDATE SET \
                 actors = actors + excluded.actors, bytes = bytes + excluded.bytes",
            )
            .bind(change.atespace)
            .bind(change.actors)
            .bind(change.bytes);
        }
        for id in wanted.garbage_done {
            self.add("DELETE FROM garbage WHERE id = ?").bind(id);
        }
        puts
    }

    fn log(&mut self, changes: &[Change]) {
        // Nobody watches nodes.
        let changes: Vec<&Change> = changes.iter().filter(|change| change.kind != Kind::Node).collect();
        for changes in changes.chunks(ROWS) {
            let places = vec!["(?, ?, ?, ?, ?, ?, ?)"; changes.len()].join(", ");
            self.add("INSERT INTO changelog (revision, kind, key, atespace, name, deleted, doc) VALUES ");
            self.sql.push_str(&places);
            for change in changes {
                self.bind(change.revision as i64)
                    .bind(change.kind as i64)
                    .bind(change.key.as_str())
                    .bind(change.atespace.as_str())
                    .bind(change.name.as_str())
                    .bind(i64::from(change.deleted))
                    .bind(change.doc.as_str());
            }
        }
    }
}
