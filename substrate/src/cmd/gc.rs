// SPDX-License-Identifier: Apache-2.0
//! `substrate gc`: what nothing names. What is deleted in the course of things, the control plane deletes by itself;
//! here go the traces of uploads that died, and what this machine holds of actors that are no more. The decision is
//! [`ateapi::inventory`]'s; the order (list, then read the database) makes it safe while substrate runs.
use std::fmt::Write as _;
use std::time::Duration;

use ateapi::inventory::Fate;
use atelet::actor::place;
use atelet::blob::Key;
use serde::Serialize;

use super::stored::{Stored, failed};
use super::{machine_text, print};
use crate::args::{Gc, Global};
use crate::failure::{Doing as _, Failure};
use crate::quantity::bytes;

/// Parts of uploads that were begun this long ago are nobody's any more.
const ABANDONED: Duration = Duration::from_hours(24);

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    dry_run: bool,
    /// Objects nothing names.
    orphans: Vec<String>,
    orphan_bytes: u64,
    /// Objects in use, and those that the control plane is about to delete.
    live: u64,
    live_bytes: u64,
    doomed: u64,
    /// Of uploads that are not recorded yet.
    pending: u64,
    /// Not substrate's; left alone.
    foreign: u64,
    /// Uploads that ended without an object.
    abandoned_uploads: u64,
    /// Actors that are no more, of which this machine still held snapshots.
    purged: Vec<String>,
    /// Actors that are no more, of which this machine still held volumes and other files.
    bundles: Vec<String>,
    /// Runtime assets that neither a snapshot, nor the sandbox config, nor a worker names.
    runtimes: Vec<String>,
    runtime_bytes: u64,
}

/// Collects.
pub async fn run(options: Gc, global: &Global) -> Result<(), Failure> {
    let stored = Stored::open(&options.place).await?;
    let mut report = Report { dry_run: options.dry_run, ..Report::default() };
    // Both listings come before the database is read.
    let root = Key::new("actors").map_err(|error| failed(&error))?;
    let listed = stored.store.list(&root).await.map_err(|error| failed(&error))?;
    let here = stored.local.actors().doing(|| "cannot list the snapshots of this machine".to_owned())?;
    let bundles = stored.bundles()?;
    let inventory = stored.inventory().await?;
    for object in listed {
        match inventory.fate(object.key.as_str()) {
            Fate::Live => {
                report.live += 1;
                report.live_bytes += object.size;
            }
            Fate::Doomed => report.doomed += 1,
            Fate::Pending => report.pending += 1,
            Fate::Foreign => report.foreign += 1,
            Fate::Orphan => {
                if !options.dry_run {
                    stored.store.delete(&object.key).await.map_err(|error| failed(&error))?;
                }
                report.orphan_bytes += object.size;
                report.orphans.push(object.key.to_string());
            }
        }
    }
    report.abandoned_uploads =
        stored.store.abandon(ABANDONED, options.dry_run).await.map_err(|error| failed(&error))?;
    for uid in here {
        if inventory.knows(&uid) {
            continue;
        }
        if !options.dry_run {
            stored.local.purge(&uid).doing(|| format!("cannot remove the snapshots of actor {uid}"))?;
        }
        report.purged.push(uid);
    }
    for (uid, dir) in bundles {
        if inventory.knows(&uid) {
            continue;
        }
        if !options.dry_run {
            place::remove_bundle(&dir).doing(|| format!("cannot remove {}", dir.display()))?;
        }
        report.bundles.push(uid);
    }
    for (digest, bytes) in stored.collect_runtimes(&inventory, options.dry_run)? {
        report.runtimes.push(digest);
        report.runtime_bytes += bytes;
    }
    if global.output.is_machine() {
        return print(&machine_text(&report, global.output)?);
    }
    let verb = if options.dry_run { "would delete" } else { "deleted" };
    let mut text = String::new();
    for key in &report.orphans {
        let _ = writeln!(text, "{verb} {key}");
    }
    for uid in &report.purged {
        let _ = writeln!(text, "{verb} the snapshots on this machine of actor {uid}, which is no more");
    }
    for uid in &report.bundles {
        let _ =
            writeln!(text, "{verb} the volumes and files on this machine of actor {uid}, which is no more");
    }
    for digest in &report.runtimes {
        let _ = writeln!(text, "{verb} runtime {digest}");
    }
    let _ = writeln!(
        text,
        "{verb} {} objects ({}), ended {} abandoned uploads; in use: {} objects ({}); about to be deleted by the \
         control plane: {}; of uploads under way: {}; not substrate's: {}",
        report.orphans.len(),
        bytes(report.orphan_bytes),
        report.abandoned_uploads,
        report.live,
        bytes(report.live_bytes),
        report.doomed,
        report.pending,
        report.foreign
    );
    print(&text)
}
