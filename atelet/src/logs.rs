// SPDX-License-Identifier: Apache-2.0
//! Logs of actors: rotated by size, read from the end, followed.
//!
//! A container's output goes straight into `<container>.log`: the sandbox holds the descriptor (opened with O_APPEND),
//! so the file cannot be replaced under it. Rotation therefore copies what is there to `<container>.log.1` and takes
//! exactly that off the front of the file: with `fallocate(FALLOC_FL_COLLAPSE_RANGE)` where the filesystem has it
//! (ext4, xfs), which loses nothing that is written meanwhile; elsewhere by truncating to zero, which loses what is
//! written between the last read and the truncation.
//!
//! A reader counts from the first byte that was ever in the file, as far as this process knows, so that a rotation under
//! it loses nothing: what is no longer in the file it reads from `<container>.log.1`. One that is slower than two
//! rotations goes on at the oldest byte there is. It holds the writer up in no way: the files are bounded instead.
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::FallocateFlags;
use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::durable;

/// Bytes of a chunk.
const CHUNK: usize = 64 << 10;
/// How far back `tail` looks, bytes.
const MAX_TAIL: u64 = 16 << 20;

/// Rotates the logs below a directory.
#[derive(Debug, Clone)]
pub struct Logs {
    root: PathBuf,
    max_bytes: u64,
    files: u32,
    removed: Removed,
}

/// Bytes that were taken off the front of each log by this process. Held while a log is switched, and while a piece of
/// one is read.
type Removed = Arc<Mutex<HashMap<PathBuf, u64>>>;

fn locked(removed: &Removed) -> MutexGuard<'_, HashMap<PathBuf, u64>> {
    removed.lock().unwrap_or_else(PoisonError::into_inner)
}

fn numbered(log: &Path, number: u32) -> PathBuf {
    log.with_extension(format!("log.{number}"))
}

impl Logs {
    /// For `DIR/logs/actors`.
    pub fn new(root: &Path, max_bytes: u64, files: u32) -> Self {
        let removed = Removed::default();
        Self { root: root.to_owned(), max_bytes: max_bytes.max(1 << 16), files: files.max(1), removed }
    }

    /// Rotates every log that is too large. Blocks. What fails is logged.
    pub fn rotate(&self) {
        let below = |dir: &Path| -> Vec<PathBuf> {
            std::fs::read_dir(dir)
                .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
                .unwrap_or_default()
        };
        for actor in below(&self.root).iter().flat_map(|atespace| below(atespace)) {
            for log in below(&actor) {
                let large = log.extension().is_some_and(|extension| extension == "log")
                    && std::fs::symlink_metadata(&log)
                        .is_ok_and(|meta| meta.is_file() && meta.len() > self.max_bytes);
                if large && let Err(error) = self.rotate_one(&log) {
                    tracing::warn!(log = %log.display(), %error, "cannot rotate");
                }
            }
        }
    }

    fn rotate_one(&self, log: &Path) -> io::Result<()> {
        let file = File::options().read(true).write(true).open(log).map_err(durable::at("open", log))?;
        let meta = file.metadata()?;
        // Whole filesystem blocks can be taken off the front; the rest stays.
        let block = meta.blksize().max(4096);
        let whole = meta.len() / block * block;
        let temp = log.with_extension("log.rotating");
        let mut old = File::create(&temp)?;
        io::copy(&mut (&file).take(whole), &mut old)?;
        old.flush()?;
        let mut removed = locked(&self.removed);
        for number in (1..self.files).rev() {
            match std::fs::rename(numbered(log, number), numbered(log, number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        std::fs::rename(&temp, numbered(log, 1))?;
        let so_far = removed.entry(log.to_owned()).or_default();
        if nix::fcntl::fallocate(&file, FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, 0, whole as i64).is_ok() {
            *so_far += whole;
            return Ok(());
        }
        // Everything that is there now, read as late as possible.
        let mut rest = vec![0; CHUNK];
        let mut at = whole;
        let mut old = File::options().append(true).open(numbered(log, 1))?;
        loop {
            let read = file.read_at(&mut rest, at)?;
            if read == 0 {
                break;
            }
            old.write_all(&rest[..read])?;
            at += read as u64;
        }
        *so_far += at;
        file.set_len(0)
    }

    /// Forgets what was rotated of logs that are gone.
    pub fn forget(&self, dir: &Path) {
        locked(&self.removed).retain(|log, _| !log.starts_with(dir));
    }

    /// Reads a log: everything or its last `tail` lines, and with `follow` what is appended later.
    ///
    /// # Errors
    /// NOT_FOUND when there is no log yet and it is not followed.
    pub fn read(
        &self,
        path: PathBuf,
        tail: u32,
        follow: bool,
    ) -> Result<ReceiverStream<Result<Vec<u8>, Status>>, Status> {
        read(path, tail, follow, Arc::clone(&self.removed))
    }
}

fn read(
    path: PathBuf,
    tail: u32,
    follow: bool,
    removed: Removed,
) -> Result<ReceiverStream<Result<Vec<u8>, Status>>, Status> {
    if !follow && !path.exists() {
        return Err(Status::not_found(format!("{} has written nothing yet", path.display())));
    }
    let (sender, chunks) = mpsc::channel(8);
    // Watched before it is read, so that nothing is missed.
    let watch = if follow { Some(Watch::new(&path).map_err(failed(&path))?) } else { None };
    tokio::spawn(async move {
        let outcome = tokio::select! {
            outcome = pump(&path, tail, watch, &sender, &removed) => outcome,
            () = sender.closed() => Ok(()),
        };
        if let Err(error) = outcome {
            // The reader may be gone.
            let _ = sender.send(Err(failed(&path)(error))).await;
        }
    });
    Ok(ReceiverStream::new(chunks))
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Status {
    let text = format!("reading {}", path.display());
    move |error| Status::internal(format!("{text}: {error}"))
}

async fn pump(
    path: &Path,
    tail: u32,
    watch: Option<Watch>,
    sender: &mpsc::Sender<Result<Vec<u8>, Status>>,
    removed: &Removed,
) -> io::Result<()> {
    let mut at = None;
    loop {
        loop {
            let chunk = match piece(path, tail, &mut at, removed) {
                // Nothing was written yet: all of it will be new.
                Err(error) if error.kind() == io::ErrorKind::NotFound && watch.is_some() => {
                    at = Some(at.unwrap_or(0));
                    break;
                }
                chunk => chunk?,
            };
            if chunk.is_empty() {
                break;
            }
            if sender.send(Ok(chunk)).await.is_err() {
                return Ok(());
            }
        }
        match &watch {
            None => return Ok(()),
            Some(watch) => watch.changed().await?,
        }
    }
}

/// The next piece, from the log or from the one that was rotated last; empty at the end. `at` counts from the first byte
/// ever.
fn piece(path: &Path, tail: u32, at: &mut Option<u64>, removed: &Removed) -> io::Result<Vec<u8>> {
    let removed = locked(removed);
    let gone = removed.get(path).copied().unwrap_or(0);
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut position = match *at {
        None => gone + tail_start(&file, size, tail)?,
        // It was emptied by somebody else: what is there is new.
        Some(position) if position > gone + size => gone,
        Some(position) => position,
    };
    let mut chunk = vec![0; CHUNK];
    let mut read = 0;
    if position < gone
        && let Ok(older) = File::open(numbered(path, 1))
    {
        let oldest = gone.saturating_sub(older.metadata()?.len());
        position = position.max(oldest);
        read = older.read_at(&mut chunk, position - oldest)?;
    }
    if read == 0 {
        position = position.max(gone);
        read = file.read_at(&mut chunk, position - gone)?;
    }
    *at = Some(position + read as u64);
    chunk.truncate(read);
    Ok(chunk)
}

/// Where the last `lines` lines begin; 0 lines means everything.
fn tail_start(file: &File, size: u64, lines: u32) -> io::Result<u64> {
    if lines == 0 {
        return Ok(0);
    }
    let (mut end, mut left) = (size, lines);
    let floor = size.saturating_sub(MAX_TAIL);
    while end > floor {
        let start = end.saturating_sub(CHUNK as u64).max(floor);
        let mut chunk = vec![0; (end - start) as usize];
        file.read_exact_at(&mut chunk, start)?;
        for (index, byte) in chunk.iter().enumerate().rev() {
            let position = start + index as u64;
            // The newline that ends the last line begins none.
            if *byte == b'\n' && position + 1 != size {
                left -= 1;
                if left == 0 {
                    return Ok(position + 1);
                }
            }
        }
        end = start;
    }
    Ok(floor)
}

/// Tells when something in a file's directory is written.
struct Watch {
    fd: AsyncFd<std::os::fd::OwnedFd>,
}

impl Watch {
    fn new(path: &Path) -> io::Result<Self> {
        let dir = path.parent().unwrap_or(Path::new("/"));
        durable::create_dir(dir)?;
        let fd = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
        inotify::add_watch(
            &fd,
            dir,
            inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO,
        )?;
        Ok(Self { fd: crate::sys::readable(fd)? })
    }

    async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.fd.readable().await?;
            let mut buffer = [0_u8; 4096];
            let read = ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut buffer[..])?));
            if let Ok(read) = read {
                return read.map(drop);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;

    use super::*;

    async fn all(path: &Path, tail: u32) -> String {
        let chunks: Vec<_> = read(path.to_owned(), tail, false, Removed::default()).unwrap().collect().await;
        chunks.into_iter().map(|chunk| String::from_utf8(chunk.unwrap()).unwrap()).collect()
    }

    #[tokio::test]
    async fn the_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("main.log");
        let early = read(path.clone(), 0, false, Removed::default());
        assert_eq!(early.unwrap_err().code(), tonic::Code::NotFound);
        let text: String =
            (0..20_000).flat_map(|line| ["line ".to_owned(), line.to_string(), "\n".to_owned()]).collect();
        std::fs::write(&path, &text).unwrap();
        assert_eq!(all(&path, 0).await, text);
        assert_eq!(all(&path, 2).await, "line 19998\nline 19999\n");
        assert_eq!(all(&path, 30_000).await, text);
        std::fs::write(&path, "a\nb\nunfinished").unwrap();
        assert_eq!(all(&path, 2).await, "b\nunfinished");
    }

    #[tokio::test]
    async fn followed_from_before_the_first_line_and_across_a_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blue/alice/main.log");
        let mut chunks = read(path.clone(), 0, true, Removed::default()).unwrap();
        let mut log = File::options().create(true).append(true).open(&path).unwrap();
        log.write_all(b"first\n").unwrap();
        assert_eq!(chunks.next().await.unwrap().unwrap(), b"first\n");
        log.write_all(b"second\n").unwrap();
        assert_eq!(chunks.next().await.unwrap().unwrap(), b"second\n");
        log.set_len(0).unwrap();
        log.write_all(b"3\n").unwrap();
        assert_eq!(chunks.next().await.unwrap().unwrap(), b"3\n");
    }

    #[tokio::test]
    async fn a_reader_that_is_behind_loses_nothing_by_a_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blue/alice/main.log");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let logs = Logs::new(dir.path(), 1 << 16, 2);
        let mut log = File::options().create(true).append(true).open(&path).unwrap();
        // More than the reader's queue holds.
        let expected: Vec<u8> = (0..150_000).flat_map(|line: u32| format!("{line}\n").into_bytes()).collect();
        log.write_all(&expected).unwrap();
        let mut chunks = logs.read(path.clone(), 0, true).unwrap();
        let mut found = chunks.next().await.unwrap().unwrap();
        logs.rotate();
        assert!(std::fs::metadata(&path).unwrap().len() < 1 << 16, "it was not rotated");
        let all = async {
            while found.len() < expected.len() {
                found.extend(chunks.next().await.unwrap().unwrap());
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), all).await.expect("lines are missing");
        assert!(found == expected, "lines are missing or came twice");
        log.write_all(b"last\n").unwrap();
        assert_eq!(chunks.next().await.unwrap().unwrap(), b"last\n");
    }

    #[test]
    fn rotation_loses_no_line_of_a_file_that_is_held_open() {
        let dir = tempfile::tempdir().unwrap();
        let actor = dir.path().join("blue/alice");
        std::fs::create_dir_all(&actor).unwrap();
        let path = actor.join("main.log");
        let mut log = File::options().create(true).append(true).open(&path).unwrap();
        let logs = Logs::new(dir.path(), 1 << 16, 2);
        let mut expected = String::new();
        for round in 0..3 {
            for line in 0..10_000 {
                let line = format!("{round} {line}\n");
                log.write_all(line.as_bytes()).unwrap();
                expected.push_str(&line);
            }
            logs.rotate();
            assert!(std::fs::metadata(&path).unwrap().len() < 1 << 16);
        }
        let read = |name: &str| std::fs::read_to_string(actor.join(name)).unwrap_or_default();
        let found = read("main.log.2") + &read("main.log.1") + &read("main.log");
        assert!(found.len() > 100_000 && expected.ends_with(&found), "lines are missing");
        assert!(!actor.join("main.log.3").exists());
    }
}
