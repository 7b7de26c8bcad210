// SPDX-License-Identifier: Apache-2.0
//! `substrate fsck`: verifies all that is stored and names everything that is dangling or damaged. Changes nothing.
use std::fmt::Write as _;
use std::process::ExitCode;
use std::sync::Arc;

use ateapi::inventory::Fate;
use ateapi::model::State;
use atelet::blob::Key;
use atelet::snapshot::restore::{Durable, Wanted};
use atelet::snapshot::{Checker, SnapshotError};
use serde::Serialize;

use super::stored::{Stored, failed};
use super::{machine_text, print};
use crate::args::{Fsck, Global};
use crate::failure::{Exit, Failure};
use crate::quantity::bytes;

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    snapshots: u64,
    blocks: u64,
    bytes: u64,
    /// What is wrong.
    findings: Vec<String>,
    /// Objects that nothing names: harmless; `substrate gc` deletes them.
    orphans: Vec<String>,
}

/// Verifies. The exit code is 1 when something is wrong.
pub async fn run(options: Fsck, global: &Global) -> Result<ExitCode, Failure> {
    let stored = Stored::open(&options.place).await?;
    let keys = stored.keys()?;
    let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let durable = Durable::new(Arc::clone(&stored.store), Arc::new(keys), threads);
    let root = Key::new("actors").map_err(|error| failed(&error))?;
    let listed = stored.store.list(&root).await.map_err(|error| failed(&error))?;
    let inventory = stored.inventory().await?;
    let mut checker = Checker::new(durable, options.quick);
    for (actor, snapshot) in inventory.snapshots() {
        if let Some(digest) = &snapshot.manifest {
            let wanted = Wanted {
                atespace: actor.atespace.clone(),
                actor_uid: snapshot.origin.0.clone(),
                snapshot_id: snapshot.id.0.clone(),
                generation: snapshot.generation.0,
                manifest_digest: digest.clone(),
            };
            checker.durable(&wanted, &snapshot.packs).await.map_err(|error| match error {
                SnapshotError::Blob(error) => failed(&error),
                error => Failure::general(error.to_string()),
            })?;
        }
        if snapshot.node.as_ref().is_some_and(|node| node.0 == stored.node) {
            let (uid, id) = (&snapshot.origin.0, &snapshot.id.0);
            checker.node(&stored.local, uid, id, &snapshot.node_digest, !snapshot.is_durable()).await;
        }
    }
    let checked = checker.finish();
    let mut report = Report {
        snapshots: checked.snapshots,
        blocks: checked.blocks,
        bytes: checked.bytes,
        findings: inventory.contradictions(),
        orphans: listed
            .into_iter()
            .map(|object| object.key.to_string())
            .filter(|key| inventory.fate(key) == Fate::Orphan)
            .collect(),
    };
    let mut damages = checked.findings;
    // What was deleted or retired while this was looking is no finding.
    if !(report.findings.is_empty() && damages.is_empty()) {
        let later = stored.inventory().await?;
        let remains = |finding: &str, but: Option<State>| {
            inventory.snapshots().all(|(_, old)| {
                !finding.contains(old.id.as_str())
                    || later.snapshots().any(|(actor, new)| {
                        Some(actor.state) != but && new.id == old.id && new.manifest == old.manifest
                    })
            })
        };
        report.findings.retain(|contradiction| remains(contradiction, None));
        // Files of an actor that is being deleted go away before its records do.
        damages.retain(|damage| remains(damage, Some(State::Deleting)));
    }
    report.findings.extend(damages);
    if global.output.is_machine() {
        print(&machine_text(&report, global.output)?)?;
    } else {
        let mut text = String::new();
        for finding in &report.findings {
            let _ = writeln!(text, "{finding}");
        }
        for key in &report.orphans {
            let _ = writeln!(text, "note: nothing names {key} (substrate gc deletes it)");
        }
        let _ = writeln!(
            text,
            "{} snapshots, {} blocks ({} read): {}",
            report.snapshots,
            report.blocks,
            bytes(report.bytes),
            match report.findings.len() {
                0 => "all sound".to_owned(),
                count => format!("{count} findings"),
            }
        );
        print(&text)?;
    }
    Ok(if report.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(Exit::Failed as u8) })
}
