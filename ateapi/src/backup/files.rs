// SPDX-License-Identifier: Apache-2.0
//! The bytes of a backup: into a directory or an archive, each with its digest.
use std::collections::BTreeSet;
use std::fs::{DirBuilder, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::{BackupError, DATABASE, Entry, INDEX, Index, Objects, Target, at};

/// Where a file to be copied is.
pub(super) enum From {
    File(PathBuf),
    Object(Arc<dyn Objects>, String),
}

/// A file to be copied.
pub(super) struct Planned {
    pub(super) from: From,
    pub(super) path: String,
    pub(super) size: u64,
}

/// Content and its bytes.
type Opened = (Box<dyn Read>, u64);

impl Planned {
    /// Its content and size; none: it was an orphan and is gone.
    pub(super) fn open(&self) -> Result<Option<Opened>, BackupError> {
        match &self.from {
            From::File(path) => match File::open(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                other => {
                    let file = other.map_err(at("read", path))?;
                    let size = file.metadata().map_err(at("read", path))?.len();
                    Ok(Some((Box::new(file.take(size)), size)))
                }
            },
            From::Object(objects, key) => {
                let (objects, key, size) = (Arc::clone(objects), key.clone(), self.size);
                Ok(Some((
                    Box::new(ObjectReader { objects, key, at: 0, size, read: io::Cursor::new(Vec::new()) }),
                    size,
                )))
            }
        }
    }

    fn name(&self) -> PathBuf {
        match &self.from {
            From::File(path) => path.clone(),
            From::Object(_, key) => PathBuf::from(key),
        }
    }
}

/// Bytes of an object that are asked for at once.
const OBJECT_READ: u64 = 8 << 20;

/// An object from its beginning to its end.
struct ObjectReader {
    objects: Arc<dyn Objects>,
    key: String,
    at: u64,
    size: u64,
    read: io::Cursor<Vec<u8>>,
}

impl Read for ObjectReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.read.position() == self.read.get_ref().len() as u64 && self.at < self.size {
            let end = self.size.min(self.at + OBJECT_READ);
            self.read = io::Cursor::new(self.objects.read(&self.key, self.at..end)?);
            self.at = end;
        }
        self.read.read(buf)
    }
}

/// Those of the objects that there are.
pub(super) fn list_objects(
    objects: &Arc<dyn Objects>,
    places: &BTreeSet<&str>,
    name: &str,
    plan: &mut Vec<Planned>,
) -> Result<(), BackupError> {
    for place in places {
        if let Some(size) = objects.size(place).map_err(at("read", Path::new(place)))? {
            let from = From::Object(Arc::clone(objects), (*place).to_owned());
            plan.push(Planned { from, path: format!("{name}/{place}"), size });
        }
    }
    Ok(())
}

/// All files below a directory, in order of name; hidden ones are unfinished work of others.
pub(super) fn list(dir: &Path, name: &str, plan: &mut Vec<Planned>) -> Result<(), BackupError> {
    let entries = match std::fs::read_dir(dir) {
        // Nothing was ever written there.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(at("list", dir))?,
    };
    let mut entries: Vec<_> = entries.collect::<Result<_, _>>().map_err(at("list", dir))?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let from = entry.path();
        let file_name = entry.file_name();
        let Some(text) = file_name.to_str() else {
            let source = io::Error::other("its name is not UTF-8");
            return Err(BackupError::Io { doing: "back up", path: from, source });
        };
        if text.starts_with('.') {
            continue;
        }
        let path = format!("{name}/{text}");
        let meta = match entry.metadata() {
            // An orphan that was swept while we looked.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(at("read", &from))?,
        };
        if meta.is_dir() {
            list(&from, &path, plan)?;
        } else if meta.is_file() {
            plan.push(Planned { from: From::File(from), path, size: meta.len() });
        }
    }
    Ok(())
}

/// Counts and digests what passes.
struct Digesting<'a, R> {
    inner: R,
    digest: Sha256,
    size: u64,
    told: &'a mut dyn FnMut(u64),
}

impl<R: Read> Read for Digesting<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buf)?;
        self.digest.update(&buf[..count]);
        self.size += count as u64;
        (self.told)(count as u64);
        Ok(count)
    }
}

pub(super) fn make_dir(path: &Path) -> Result<(), BackupError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(at("make", path))
}

pub(super) fn sync_dir(path: &Path) -> Result<(), BackupError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(at("sync", path))
}

pub(super) fn create_file(path: &Path) -> Result<File, BackupError> {
    File::options().write(true).create_new(true).mode(0o600).open(path).map_err(at("create", path))
}

/// Whether something is there, or whether an existing directory holds anything.
pub(super) fn is_empty(path: &Path) -> Result<bool, BackupError> {
    match std::fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(false),
        other => Ok(other.map_err(at("list", path))?.next().is_none()),
    }
}

/// Copies until the end, with digest; the copy is on disk afterwards.
pub(super) fn copy(
    from: impl Read,
    path: &str,
    to: &Path,
    told: &mut dyn FnMut(u64),
) -> Result<Entry, BackupError> {
    if let Some(parent) = to.parent() {
        make_dir(parent)?;
    }
    let mut out = create_file(to)?;
    let mut reader = Digesting { inner: from, digest: Sha256::new(), size: 0, told };
    io::copy(&mut reader, &mut out).map_err(at("write", to))?;
    out.sync_all().map_err(at("write", to))?;
    Ok(Entry { path: path.to_owned(), size: reader.size, sha256: hex::encode(reader.digest.finalize()) })
}

/// Where a backup goes.
pub(super) enum Sink {
    Directory { root: PathBuf },
    Archive { path: PathBuf, part: PathBuf, tar: tar::Builder<BufWriter<File>>, unfinished: Unfinished },
}

/// Files that go away unless the backup is finished.
#[derive(Default)]
pub(super) struct Unfinished(Vec<PathBuf>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        for path in &self.0 {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "an unfinished backup stays behind");
                }
                _ => {}
            }
        }
    }
}

fn hidden_beside(path: &Path, end: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    path.with_file_name(format!(".{name}.{end}"))
}

impl Sink {
    pub(super) fn create(target: &Target) -> Result<Self, BackupError> {
        let way_out = "choose another place, or remove what is there";
        match target {
            Target::Directory(root) => {
                if !is_empty(root)? {
                    return Err(BackupError::NotEmpty { path: root.clone(), way_out });
                }
                make_dir(root)?;
                Ok(Self::Directory { root: root.clone() })
            }
            Target::Archive(path) => {
                if path.exists() {
                    return Err(BackupError::NotEmpty { path: path.clone(), way_out });
                }
                let part = hidden_beside(path, "part");
                let tar = tar::Builder::new(BufWriter::with_capacity(1 << 20, create_file(&part)?));
                let unfinished = Unfinished(vec![part.clone()]);
                Ok(Self::Archive { path: path.clone(), part, tar, unfinished })
            }
        }
    }

    /// Where SQLite is to write its copy.
    pub(super) fn place_for_database(&mut self) -> Result<PathBuf, BackupError> {
        match self {
            Self::Directory { root } => {
                let place = root.join(DATABASE);
                make_dir(place.parent().unwrap_or(root))?;
                Ok(place)
            }
            Self::Archive { path, unfinished, .. } => {
                let place = hidden_beside(path, "db");
                unfinished.0.push(place.clone());
                if place.exists() {
                    std::fs::remove_file(&place).map_err(at("remove", &place))?;
                }
                Ok(place)
            }
        }
    }

    pub(super) fn add_database(
        &mut self,
        copy: &Path,
        told: &mut dyn FnMut(u64),
    ) -> Result<Entry, BackupError> {
        match self {
            Self::Directory { .. } => {
                let file = File::open(copy).map_err(at("read", copy))?;
                file.sync_all().map_err(at("write", copy))?;
                let mut reader = Digesting { inner: file, digest: Sha256::new(), size: 0, told };
                io::copy(&mut reader, &mut io::sink()).map_err(at("read", copy))?;
                Ok(Entry {
                    path: DATABASE.to_owned(),
                    size: reader.size,
                    sha256: hex::encode(reader.digest.finalize()),
                })
            }
            Self::Archive { .. } => {
                let size = std::fs::metadata(copy).map_err(at("read", copy))?.len();
                let planned = Planned { from: From::File(copy.to_owned()), path: DATABASE.to_owned(), size };
                let entry = self.add(&planned, told)?;
                entry.ok_or_else(|| BackupError::CutOff("the copy of the database vanished".to_owned()))
            }
        }
    }

    /// None: it was an orphan and is gone.
    pub(super) fn add(
        &mut self,
        planned: &Planned,
        told: &mut dyn FnMut(u64),
    ) -> Result<Option<Entry>, BackupError> {
        let Some((file, size)) = planned.open()? else { return Ok(None) };
        match self {
            Self::Directory { root } => copy(file, &planned.path, &root.join(&planned.path), told).map(Some),
            Self::Archive { tar, .. } => {
                let mut reader = Digesting { inner: file, digest: Sha256::new(), size: 0, told };
                let mut header = header(size);
                tar.append_data(&mut header, &planned.path, &mut reader)
                    .map_err(at("copy", &planned.name()))?;
                let sha256 = hex::encode(reader.digest.finalize());
                Ok(Some(Entry { path: planned.path.clone(), size, sha256 }))
            }
        }
    }

    /// The index, and everything on disk.
    pub(super) fn finish(self, index: &Index) -> Result<(), BackupError> {
        let text = serde_json::to_vec(index).map_err(|error| BackupError::CutOff(error.to_string()))?;
        match self {
            Self::Directory { root } => {
                sync_tree(&root)?;
                let part = root.join(format!(".{INDEX}"));
                let mut file = create_file(&part)?;
                file.write_all(&text).and_then(|()| file.sync_all()).map_err(at("write", &part))?;
                std::fs::rename(&part, root.join(INDEX)).map_err(at("write", &part))?;
                sync_dir(&root)
            }
            Self::Archive { path, part, mut tar, unfinished } => {
                let mut header = header(text.len() as u64);
                tar.append_data(&mut header, INDEX, text.as_slice()).map_err(at("write", &part))?;
                let out = tar.into_inner().map_err(at("write", &part))?;
                let file = out.into_inner().map_err(|error| at("write", &part)(error.into_error()))?;
                file.sync_all().map_err(at("write", &part))?;
                std::fs::rename(&part, &path).map_err(at("write", &path))?;
                drop(unfinished);
                match path.parent() {
                    Some(dir) if !dir.as_os_str().is_empty() => sync_dir(dir),
                    _ => sync_dir(Path::new(".")),
                }
            }
        }
    }
}

fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o600);
    header.set_entry_type(tar::EntryType::Regular);
    header
}

pub(super) fn sync_tree(dir: &Path) -> Result<(), BackupError> {
    for entry in std::fs::read_dir(dir).map_err(at("list", dir))? {
        let entry = entry.map_err(at("list", dir))?;
        if entry.file_type().map_err(at("list", dir))?.is_dir() {
            sync_tree(&entry.path())?;
        }
    }
    sync_dir(dir)
}
