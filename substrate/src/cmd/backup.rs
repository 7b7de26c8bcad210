// SPDX-License-Identifier: Apache-2.0
//! `substrate backup` and `restore`: database, keys and blob store of a machine as one unit (`ateapi::backup`).
use std::io::{self, IsTerminal as _, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ateapi::backup::{BackupError, Blobs, Index, Objects, Source, Target};
use atelet::blob::{self, BlobStore, BlobUrl, Key};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::args::{Backup, Global, Restore, Up};
use crate::cmd::stored::failed;
use crate::cmd::{machine_text, print};
use crate::failure::{Doing as _, Exit, Failure};
use crate::up::config::{self, Settings};

/// A blob store that is no directory, read for a backup.
#[derive(Debug)]
struct Bucket {
    store: Arc<dyn BlobStore>,
    runtime: tokio::runtime::Handle,
}

impl Objects for Bucket {
    fn size(&self, key: &str) -> io::Result<Option<u64>> {
        let key = Key::new(key).map_err(io::Error::other)?;
        self.runtime.block_on(self.store.head(&key)).map_err(io::Error::other)
    }

    fn read(&self, key: &str, range: Range<u64>) -> io::Result<Vec<u8>> {
        let key = Key::new(key).map_err(io::Error::other)?;
        self.runtime.block_on(self.store.get(&key, range)).map(Into::into).map_err(io::Error::other)
    }
}

/// `substrate backup`.
pub async fn backup(options: &Backup, global: &Global) -> Result<(), Failure> {
    let file = match &options.place.config {
        Some(path) => config::read(path)?,
        None => config::File::default(),
    };
    let cwd = std::env::current_dir().doing(|| "cannot tell the working directory".to_owned())?;
    let up = Up { dir: options.place.dir.clone(), ..Up::default() };
    let Settings { dir, file, .. } = Settings::resolve(&up, file, 1, &cwd)?;
    let dir = dir.as_path();
    let is_bucket = matches!(file.node.blobs, Some(BlobUrl::S3(_)));
    let blobs = match file.node.blobs {
        None => Blobs::Directory(dir.join("blobs")),
        Some(BlobUrl::Local(path)) => Blobs::Directory(path),
        Some(url) => {
            let store = blob::open(&url, false).await.map_err(|error| failed(&error))?;
            Blobs::Objects(Arc::new(Bucket { store, runtime: tokio::runtime::Handle::current() }))
        }
    };
    let source = Source {
        database: dir.join("control/state.db"),
        blobs,
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
    let way_out = if is_bucket {
        "the backup holds everything else; revert or reset the actors concerned"
    } else {
        "the backup holds everything else; revert or reset the actors concerned. Where snapshots are kept elsewhere \
         (node.blobs), name the configuration file with --config"
    };
    Err(Failure::general(format!(
        "the blob store lacks {} of what the records name: {}",
        files(index.missing.len()),
        index.missing.iter().take(5).cloned().collect::<Vec<_>>().join(", ")
    ))
    .with_way_out(way_out))
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
