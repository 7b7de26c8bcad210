// SPDX-License-Identifier: Apache-2.0
//! Logs of actors: rotated by size, read from the end, followed.
//!
//! A container's output goes straight into `<container>.log`: the sandbox holds the descriptor (opened with O_APPEND),
//! so the file cannot be replaced under it. Rotation therefore copies what is there to `<container>.log.1` and takes
//! exactly that off the front of the file: with `fallocate(FALLOC_FL_COLLAPSE_RANGE)` where the filesystem has it
//! (ext4, xfs), which loses nothing that is written meanwhile; elsewhere by truncating to zero, which loses what is
//! written between the last read and the truncation.
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

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
}

impl Logs {
    /// For `DIR/logs/actors`.
    pub fn new(root: &Path, max_bytes: u64, files: u32) -> Self {
        Self { root: root.to_owned(), max_bytes: max_bytes.max(1 << 16), files: files.max(1) }
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
        let numbered = |number: u32| log.with_extension(format!("log.{number}"));
        for number in (1..self.files).rev() {
            match std::fs::rename(numbered(number), numbered(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let file = File::options().read(true).write(true).open(log).map_err(durable::at("open", log))?;
        let meta = file.metadata()?;
        // Whole filesystem blocks can be taken off the front; the rest stays.
        let block = meta.blksize().max(4096);
        let whole = meta.len() / block * block;
        let copy = |length: u64| -> io::Result<()> {
            let temp = log.with_extension("log.rotating");
            let mut old = File::create(&temp)?;
            io::copy(&mut (&file).take(length), &mut old)?;
            old.flush()?;
            std::fs::rename(&temp, numbered(1))
        };
        copy(whole)?;
        if nix::fcntl::fallocate(&file, FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, 0, whole as i64).is_ok() {
            return Ok(());
        }
        // Everything that is there now, read as late as possible.
        let mut rest = vec![0; CHUNK];
        let mut at = whole;
        let mut old = File::options().append(true).open(numbered(1))?;
        loop {
            let read = file.read_at(&mut rest, at)?;
            if read == 0 {
                break;
            }
            old.write_all(&rest[..read])?;
            at += read as u64;
        }
        file.set_len(0)
    }
}

/// Reads a log: everything or its last `tail` lines, and with `follow` what is appended later.
///
/// # Errors
/// NOT_FOUND when there is no log yet and it is not followed.
pub fn read(
    path: PathBuf,
    tail: u32,
    follow: bool,
) -> Result<ReceiverStream<Result<Vec<u8>, Status>>, Status> {
    if !follow && !path.exists() {
        return Err(Status::not_found(format!("{} has written nothing yet", path.display())));
    }
    let (sender, chunks) = mpsc::channel(8);
    // Watched before it is read, so that nothing is missed.
    let watch = if follow { Some(Watch::new(&path).map_err(failed(&path))?) } else { None };
    tokio::spawn(async move {
        let outcome = tokio::select! {
            outcome = pump(&path, tail, watch, &sender) => outcome,
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
) -> io::Result<()> {
    let mut at = None;
    loop {
        let file = match File::open(path) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound && watch.is_some() => None,
            Err(error) => return Err(error),
        };
        if let Some(file) = file {
            let size = file.metadata()?.len();
            let mut position = match at {
                None => tail_start(&file, size, tail)?,
                // It was rotated: what is there is new.
                Some(position) if position > size => 0,
                Some(position) => position,
            };
            loop {
                let mut chunk = vec![0; CHUNK];
                let read = file.read_at(&mut chunk, position)?;
                if read == 0 {
                    break;
                }
                position += read as u64;
                chunk.truncate(read);
                if sender.send(Ok(chunk)).await.is_err() {
                    return Ok(());
                }
            }
            at = Some(position);
        } else {
            at = Some(0);
        }
        match &watch {
            None => return Ok(()),
            Some(watch) => watch.changed().await?,
        }
    }
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
        let chunks: Vec<_> = read(path.to_owned(), tail, false).unwrap().collect().await;
        chunks.into_iter().map(|chunk| String::from_utf8(chunk.unwrap()).unwrap()).collect()
    }

    #[tokio::test]
    async fn the_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("main.log");
        assert_eq!(read(path.clone(), 0, false).unwrap_err().code(), tonic::Code::NotFound);
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
        let mut chunks = read(path.clone(), 0, true).unwrap();
        let mut log = File::options().create(true).append(true).open(&path).unwrap();
        log.write_all(b"first\n").unwrap();
        assert_eq!(chunks.next().await.unwrap().unwrap(), b"first\n");
        log.write_all(b"second\n").unwrap();
        assert_eq!(chunks.next().await.unwrap().unwrap(), b"second\n");
        log.set_len(0).unwrap();
        log.write_all(b"3\n").unwrap();
        assert_eq!(chunks.next().await.unwrap().unwrap(), b"3\n");
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
