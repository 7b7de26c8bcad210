// SPDX-License-Identifier: Apache-2.0
//! What a group of transactions has to know of the rows it writes: read at once, and followed through the group.
use std::collections::HashMap;

use sqlx::Row as _;
use sqlx::sqlite::SqliteConnection;

use super::{Kind, StoreError, Tx};

/// What is known of a row.
pub(super) struct Row {
    pub(super) revision: u64,
    pub(super) atespace: String,
    pub(super) name: String,
}

/// See the module. A key that is absent here has no row.
#[derive(Default)]
pub(super) struct Rows(HashMap<(i64, String), Row>);

impl Rows {
    /// Reads the rows that these transactions write.
    pub(super) async fn read<'a>(
        connection: &mut SqliteConnection,
        group: impl Iterator<Item = &'a Tx>,
    ) -> Result<Self, sqlx::Error> {
        let keys: Vec<(i64, &str)> = group
            .flat_map(|tx| {
                let puts = tx.puts.iter().map(|(object, _)| (object.kind as i64, object.key.as_str()));
                puts.chain(tx.deletes.iter().map(|(kind, key, _)| (*kind as i64, key.as_str())))
            })
            .collect();
        if keys.is_empty() {
            return Ok(Self::default());
        }
        let found = sqlx::query(
            "SELECT row.kind, row.key, row.revision, row.atespace, row.name \
             FROM json_each(?) AS wanted CROSS JOIN objects AS row \
             ON row.kind = wanted.value ->> 0 AND row.key = wanted.value ->> 1",
        )
        .bind(serde_json::to_string(&keys).unwrap_or_default())
        .fetch_all(connection)
        .await?;
        let mut rows = Self::default();
        for row in found {
            let known = Row {
                revision: row.try_get::<i64, _>(2)? as u64,
                atespace: row.try_get(3)?,
                name: row.try_get(4)?,
            };
            rows.0.insert((row.try_get(0)?, row.try_get(1)?), known);
        }
        Ok(rows)
    }

    pub(super) fn revision(&self, kind: Kind, key: &str) -> Option<u64> {
        self.0.get(&(kind as i64, key.to_owned())).map(|row| row.revision)
    }

    pub(super) fn put(&mut self, kind: Kind, key: &str, row: Row) {
        self.0.insert((kind as i64, key.to_owned()), row);
    }

    pub(super) fn remove(&mut self, kind: Kind, key: &str) -> Option<Row> {
        self.0.remove(&(kind as i64, key.to_owned()))
    }

    /// Whether what a transaction expects of the rows it deletes, and of their revisions, holds.
    pub(super) fn verify_deletes(&self, wanted: &Tx) -> Result<(), StoreError> {
        for (kind, key, expect) in &wanted.deletes {
            if !expect.fits(self.revision(*kind, key)) {
                return Err(StoreError::Conflict { kind: *kind, key: key.clone() });
            }
        }
        Ok(())
    }
}
