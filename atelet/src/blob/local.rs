// SPDX-License-Identifier: Apache-2.0
//! A blob store in a directory.
//!
//! An object is written to a hidden file beside its place, fsynced, linked to its name (link(2) fails where the name
//! exists: create-if-absent without a race), and the directory is fsynced. Hidden files of a killed process are
//! removed when the store is opened.
use std::fs::File;
use std::io::{self, ErrorKind, Write as _};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;

use super::{BlobError, BlobStore, ByteStream, Key, Listed};
use crate::durable;

/// Objects as files below a root.
#[derive(Debug, Clone)]
pub struct LocalStore {
    root: PathBuf,
}

impl LocalStore {
    /// Opens (and makes) the store. Only one process may have it open.
    ///
    /// # Errors
    /// [`BlobError::Unavailable`].
    pub fn open(root: &Path) -> Result<Self, BlobError> {
        let store = Self { root: root.to_owned() };
        durable::create_dir(root).and_then(|()| sweep(root)).map_err(store.failed(""))?;
        Ok(store)
    }

    /// Opens a store that another process may have open.
    ///
    /// # Errors
    /// [`BlobError::Unusable`] when there is none.
    pub fn beside(root: &Path) -> Result<Self, BlobError> {
        let store = Self { root: root.to_owned() };
        if root.is_dir() {
            return Ok(store);
        }
        Err(BlobError::Unusable { store: store.location(), reason: "there is no such directory".to_owned() })
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.root.join(key.as_str())
    }

    fn failed(&self, key: &str) -> impl FnOnce(io::Error) -> BlobError + use<> {
        let (key, store) = (key.to_owned(), self.location());
        move |source| BlobError::Unavailable { key, store, source }
    }

    fn not_found(&self, key: &Key) -> BlobError {
        BlobError::NotFound { key: key.clone(), store: self.location() }
    }
}

/// Removes hidden files of writers that were killed.
fn sweep(dir: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(dir).map_err(durable::at("list", dir))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sweep(&entry.path())?;
        } else if entry.file_name().as_encoded_bytes().starts_with(b".") {
            durable::remove_file(&entry.path())?;
        }
    }
    Ok(())
}

/// A file that goes away unless it is kept.
struct Temp {
    path: PathBuf,
}

impl Drop for Temp {
    fn drop(&mut self) {
        if let Err(error) = durable::remove_file(&self.path) {
            tracing::warn!(%error, "an unfinished object stays behind until the store is opened anew");
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

#[async_trait]
impl BlobStore for LocalStore {
    fn location(&self) -> String {
        self.root.display().to_string()
    }

    async fn put(&self, key: &Key, mut content: ByteStream) -> Result<u64, BlobError> {
        let path = self.path(key);
        let parent = path.parent().unwrap_or(&self.root).to_owned();
        let temp = Temp { path: parent.join(format!(".put-{}", uuid::Uuid::new_v4())) };
        let write_failed = |source: io::Error| match source.kind() {
            ErrorKind::AlreadyExists => BlobError::Exists(key.clone()),
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                BlobError::Full { key: key.clone(), store: self.location() }
            }
            _ => self.failed(key.as_str())(source),
        };
        let name = temp.path.clone();
        let mut file = blocking(move || {
            durable::create_dir(&parent)?;
            File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&name)
                .map_err(durable::at("create", &name))
        })
        .await
        .map_err(write_failed)?;
        let mut size = 0;
        while let Some(piece) = content.next().await {
            let piece = piece.map_err(|source| BlobError::Source { key: key.clone(), source })?;
            size += piece.len() as u64;
            file = blocking(move || file.write_all(&piece).map(|()| file)).await.map_err(write_failed)?;
        }
        let name = temp.path.clone();
        blocking(move || {
            file.sync_all()?;
            std::fs::hard_link(&name, &path)?;
            // The name must be durable before anyone refers to it.
            path.parent().map_or(Ok(()), durable::sync_dir)
        })
        .await
        .map_err(write_failed)?;
        Ok(size)
    }

    async fn get(&self, key: &Key, range: Range<u64>) -> Result<Bytes, BlobError> {
        let path = self.path(key);
        let wanted = range.clone();
        let read = blocking(move || {
            let file = File::open(&path)?;
            let size = file.metadata()?.len();
            if wanted.start > wanted.end || wanted.end > size {
                return Ok(Err(size));
            }
            let mut content = vec![0; (wanted.end - wanted.start) as usize];
            file.read_exact_at(&mut content, wanted.start)?;
            Ok(Ok(Bytes::from(content)))
        })
        .await;
        match read {
            Ok(Ok(content)) => Ok(content),
            Ok(Err(size)) => Err(BlobError::OutOfRange { key: key.clone(), size, range }),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(self.not_found(key)),
            Err(error) => Err(self.failed(key.as_str())(error)),
        }
    }

    async fn head(&self, key: &Key) -> Result<Option<u64>, BlobError> {
        match tokio::fs::metadata(self.path(key)).await {
            Ok(meta) if meta.is_file() => Ok(Some(meta.len())),
            Ok(_) => Ok(None),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
            Err(error) => Err(self.failed(key.as_str())(error)),
        }
    }

    async fn delete(&self, key: &Key) -> Result<(), BlobError> {
        let (path, root) = (self.path(key), self.root.clone());
        blocking(move || {
            durable::remove_file(&path)?;
            // Directories are not objects: those that became empty go too. One that another writer fills meanwhile is
            // not empty, or made again by it.
            let mut dir = path.parent();
            while let Some(empty) = dir.filter(|dir| *dir != root && std::fs::remove_dir(dir).is_ok()) {
                dir = empty.parent();
            }
            Ok(())
        })
        .await
        .map_err(self.failed(key.as_str()))
    }

    async fn list(&self, directory: &Key) -> Result<Vec<Listed>, BlobError> {
        fn collect(root: &Path, dir: &Path, found: &mut Vec<Listed>) -> io::Result<()> {
            let gone =
                |error: &io::Error| matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory);
            let entries = match std::fs::read_dir(dir) {
                Err(error) if gone(&error) => return Ok(()),
                other => other?,
            };
            for entry in entries {
                let entry = entry?;
                let path = entry.path();
                if entry.file_type()?.is_dir() {
                    collect(root, &path, found)?;
                } else if let Some(key) = path.strip_prefix(root).ok().and_then(Path::to_str)
                    && let Ok(key) = Key::new(key)
                {
                    match entry.metadata() {
                        Ok(meta) => found.push(Listed { key, size: meta.len(), written: meta.modified()? }),
                        // Deleted meanwhile.
                        Err(error) if gone(&error) => {}
                        Err(error) => return Err(error),
                    }
                }
            }
            Ok(())
        }
        let (root, dir) = (self.root.clone(), self.path(directory));
        let mut found = blocking(move || {
            let mut found = Vec::new();
            collect(&root, &dir, &mut found).map(|()| found)
        })
        .await
        .map_err(self.failed(directory.as_str()))?;
        found.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(found)
    }

    async fn check(&self) -> Result<(), BlobError> {
        Ok(())
    }

    async fn abandon(&self, _: Duration, _: bool) -> Result<u64, BlobError> {
        // Hidden files of killed writers go when the store is opened.
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::whole;

    #[tokio::test]
    async fn a_writer_that_was_killed_leaves_nothing_once_the_store_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::fs::write(dir.path().join("a/b/.put-1"), b"half").unwrap();
        let store = LocalStore::open(dir.path()).unwrap();
        assert!(!dir.path().join("a/b/.put-1").exists());
        let key = Key::new("a/b/c").unwrap();
        store.put(&key, whole("x")).await.unwrap();
        store.delete(&key).await.unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "empty directories stay behind");
    }

    #[tokio::test]
    async fn a_full_disk_is_said_so_and_leaves_nothing() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: not root, cannot mount a small tmpfs");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let mounted = nix::mount::mount(
            Some("tmpfs"),
            dir.path(),
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some("size=1m"),
        );
        if let Err(error) = mounted {
            eprintln!("skipped: cannot mount a tmpfs: {error}");
            return;
        }
        let store = LocalStore::open(dir.path()).unwrap();
        let key = Key::new("a/big").unwrap();
        let outcome = store.put(&key, whole(vec![1; 2 << 20])).await;
        let left = std::fs::read_dir(dir.path().join("a")).unwrap().count();
        drop(store);
        nix::mount::umount(dir.path()).unwrap();
        assert!(matches!(outcome, Err(BlobError::Full { .. })), "{outcome:?}");
        assert_eq!(left, 0);
    }
}
