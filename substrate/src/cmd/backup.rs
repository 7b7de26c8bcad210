// SPDX-License-Identifier: Apache-2.0
//! `substrate backup` and `restore`: database, keys and blob store of a machine as one unit (`ateapi::backup`).
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};

use ateapi::backup::{BackupError, Index, Source, Target};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::args::{Backup, Global, Restore};
use crate::cmd::{machine_text, print};
use crate::failure::{Exit, Failure};

/// `substrate backup`.
pub async fn backup(options: &Backup, global: &Global) -> Result<(), Failure> {
    let dir = &options.dir;
    let source = Source {
        database: dir.join("control/state.db"),
        blobs: dir.join("blobs"),
        keys: (!options.without_keys).then(|| dir.join("keys")),
    };
    let is_archive = options.to.extension().is_some_and(|end| end == "tar") && !options.to.is_dir();
    let target =
        if is_archive { Target::Archive(options.to.clone()) } else { Target::Directory(options.to.clone()) };
    let bar = Bar::new("backing up");
    let index = ateapi::backup::create(&source, &target, &|done, total| bar.at(done, total)).await;
    bar.finish();
    let index = index.map_err(|error| failure(&error, dir))?;
    if options.without_keys {
        warn(&format!(
            "the keys are not in this backup: without a copy of {} nothing in it can be opened",
            dir.join("keys").display()
        ));
    }
    warn_of(&index.awake, "were awake and are in it as of their last snapshot");
    warn_of(
        &index.without_snapshot,
        "have no durable snapshot: their memory is not in it (suspend or promote them)",
    );
    report(&index, &options.to, "backed up", global)?;
    if index.missing.is_empty() {
        return Ok(());
    }
    Err(Failure::general(format!(
        "the blob store lacks {} of what the records name: {}",
        files(index.missing.len()),
        index.missing.iter().take(5).cloned().collect::<Vec<_>>().join(", ")
    ))
    .with_way_out("the backup holds everything else; revert or reset the actors concerned"))
}

/// `substrate restore`.
pub async fn restore(options: &Restore, global: &Global) -> Result<(), Failure> {
    let bar = Bar::new("restoring");
    let progress = |done: u64, total: u64| bar.at(done, total);
    let index =
        ateapi::backup::restore(&options.from, &options.dir, options.keys.as_deref(), &progress).await;
    bar.finish();
    let index = index.map_err(|error| failure(&error, &options.dir))?;
    report(&index, &options.dir, "restored", global)?;
    if !global.output.is_machine() {
        warn(
            "never run this and the machine it was taken from at the same time: its actors would live twice",
        );
    }
    Ok(())
}

fn failure(error: &BackupError, dir: &Path) -> Failure {
    let failure = Failure::general(error.to_string());
    match error {
        BackupError::NotEmpty { .. } => Failure { exit: Exit::Refused, ..failure },
        BackupError::NoDatabase(_) => Failure { exit: Exit::NotFound, ..failure }
            .with_way_out("name the directory of `substrate up` with --dir"),
        BackupError::NoKeys | BackupError::WrongKeys(_) => Failure { exit: Exit::Usage, ..failure }
            .with_way_out("--keys DIR, a copy of the old machine's DIR/keys"),
        BackupError::Collecting(_) => Failure { exit: Exit::Unavailable, ..failure },
        BackupError::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
            failure.with_way_out("run this as the user that runs `substrate up`, usually root")
        }
        BackupError::Damaged { .. } => {
            failure.with_way_out(format!("remove {}, where nothing was put in place", staging(dir).display()))
        }
        _ => failure,
    }
}

fn staging(dir: &Path) -> PathBuf {
    dir.join(ateapi::backup::STAGING)
}

fn files(count: usize) -> String {
    if count == 1 { "1 file".to_owned() } else { format!("{count} files") }
}

fn warn(text: &str) {
    // Nobody may be reading any more.
    let _ = writeln!(std::io::stderr(), "substrate: {text}");
}

fn warn_of(actors: &[String], what: &str) {
    if !actors.is_empty() {
        let shown: Vec<&str> = actors.iter().take(5).map(String::as_str).collect();
        let more = if actors.len() > shown.len() { ", …" } else { "" };
        warn(&format!("{} actors {what}: {}{more}", actors.len(), shown.join(", ")));
    }
}

fn report(index: &Index, place: &Path, what: &str, global: &Global) -> Result<(), Failure> {
    if global.output.is_machine() {
        let value = serde_json::json!({
            "place": place,
            "createdMs": index.created_ms,
            "version": index.version,
            "schema": index.schema,
            "actors": index.actors,
            "files": index.files.len(),
            "bytes": index.bytes(),
            "hasKeys": index.has_keys,
            "runtimes": index.runtimes,
            "awake": index.awake,
            "withoutSnapshot": index.without_snapshot,
            "missing": index.missing,
        });
        return print(&machine_text(&value, global.output)?);
    }
    let runtimes = match index.runtimes.len() {
        0 => String::new(),
        _ => format!(
            "; its snapshots need the runtime of sha256 {}",
            index
                .runtimes
                .iter()
                .map(|digest| &digest[..digest.len().min(12)])
                .collect::<Vec<_>>()
                .join(", ")
        ),
    };
    print(&format!(
        "{what} {} actors, {}, {:.1} MiB: {}{runtimes}\n",
        index.actors,
        files(index.files.len()),
        index.bytes() as f64 / 1_048_576.0,
        place.display()
    ))
}

/// Bytes done, on stderr where a person looks at it.
struct Bar(Option<ProgressBar>);

impl Bar {
    fn new(doing: &'static str) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self(None);
        }
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} ({eta})") {
            bar.set_style(style);
        }
        bar.set_message(doing);
        Self(Some(bar))
    }

    fn at(&self, done: u64, total: u64) {
        if let Some(bar) = &self.0 {
            bar.set_length(total);
            bar.set_position(done);
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
