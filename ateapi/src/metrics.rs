// SPDX-License-Identifier: Apache-2.0
//! What the control plane counts. Names and meaning are in docs/metrics.md. Whoever runs it installs a recorder (the
//! `metrics` crate); without one all of this costs nothing. No label names a tenant.
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use metrics::{counter, gauge, histogram};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions as _, Connection as _};

use crate::engine::{Engine, lock};
use crate::model::State;
use crate::store::Kind;

/// How often figures that are not counted as they happen are read.
const EVERY: Duration = Duration::from_secs(10);

fn name(state: State) -> String {
    format!("{state:?}").to_lowercase()
}

/// A record with another state was committed, `ms` after the one before.
pub(crate) fn moved(from: State, to: State, ms: i64) {
    if from != to {
        histogram!("substrate_actor_state_seconds", "state" => name(from), "next" => name(to))
            .record(Duration::from_millis(ms.max(0) as u64));
    }
}

/// Events were committed.
pub(crate) fn events<'a>(reasons: impl IntoIterator<Item = &'a str>) {
    for reason in reasons {
        counter!("substrate_events_total", "reason" => reason.to_owned()).increment(1);
    }
}

/// Reads what stands, for ever. The database is read beside the store: a count by an index, whatever is in it.
pub(crate) async fn watch(engine: Arc<Engine>, database: PathBuf) {
    let mut known: BTreeMap<i64, String> =
        State::ALL.into_iter().map(|state| (state.to_proto() as i64, name(state))).collect();
    known.insert(-1, "unknown".to_owned());
    loop {
        match count(&database).await {
            Ok(counts) => {
                for (code, name) in &known {
                    let count = counts.get(code).copied().unwrap_or(0);
                    gauge!("substrate_actors", "state" => name.clone()).set(count as f64);
                }
            }
            Err(error) => tracing::debug!(%error, "cannot count the actors"),
        }
        let mut workers: BTreeMap<(String, String, &str), u64> = BTreeMap::new();
        for worker in lock(&engine.pool).iter() {
            let record = &worker.record;
            let state = match (record.alive, record.actor.is_some(), record.cordoned) {
                (false, ..) => "down",
                (_, true, _) => "taken",
                (_, _, true) => "cordoned",
                _ => "free",
            };
            for each in ["down", "taken", "cordoned", "free"] {
                let count = workers.entry((record.pool.clone(), record.class.clone(), each)).or_default();
                *count += u64::from(each == state);
            }
        }
        for ((pool, class, state), count) in workers {
            gauge!("substrate_workers", "pool" => pool, "class" => class, "state" => state).set(count as f64);
        }
        for node in engine.nodes.values() {
            let left = node.lease_until().saturating_sub(engine.clock.now()).as_secs_f64();
            gauge!("substrate_node_granted_seconds", "node" => node.name.to_string()).set(left);
            gauge!("substrate_node_up", "node" => node.name.to_string())
                .set(f64::from(u8::from(node.is_up())));
        }
        engine.pause(EVERY).await;
    }
}

async fn count(database: &std::path::Path) -> Result<BTreeMap<i64, i64>, sqlx::Error> {
    let options = SqliteConnectOptions::new().filename(database).read_only(true).disable_statement_logging();
    let mut connection = SqliteConnection::connect_with(&options).await?;
    let rows: Vec<(i64, i64)> =
        sqlx::query_as("SELECT state, COUNT(*) FROM objects WHERE kind = ? GROUP BY state")
            .bind(Kind::Actor as i64)
            .fetch_all(&mut connection)
            .await?;
    connection.close().await?;
    Ok(rows.into_iter().collect())
}
