// SPDX-License-Identifier: Apache-2.0
//! Node snapshots: a snapshot's files on this node's disk.
//!
//! ```text
//! snapshots/<uid>/<snapshot>/record.json     what it is: ids, compatibility, files with sizes and digests
//!                           /local.json      what this node knows of it: stat of each file, uses; not durable
//!                           /digests         of every block, for the upload; not durable
//!                           /files/…         of ateom
//!                           /volumes/<name>  archives
//! snapshots/<uid>/.new-<snapshot>~<random>/  being made by a checkpoint
//! snapshots/<uid>/.get-…, .gone-…            being fetched, being removed
//! ```
//!
//! **Commit.** Everything is written and fsynced below `.new-…`, the record last; one rename makes it a snapshot and
//! an fsync of the parent makes that durable. So a snapshot is there completely or not at all, whenever the process or
//! the machine dies. A fetch ends the same way.
//!
//! **Trust.** The digest of the record is what the control plane remembers (`node_digest`); it does not depend on the
//! node, so a copy fetched from the blob store has the same. Before each restore every file is looked at: with the
//! size, inode, mtime and ctime that it had when it entered, it is trusted (the directory is root's); otherwise its
//! whole digest is compared. Anything else is refused before the runtime sees it (P3).
//!
//! **Unfinished checkpoints** are kept over a restart of this process, since the ateom may still be writing; the next
//! checkpoint of the actor, its purge, or a retry that starts anew removes them.
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use substrate_proto::types::Compatibility;
use substrate_proto::{atelet, ateom as ateom_proto};

use super::digest::{self, Sha, sha256};
use super::record::{RECORD_VERSION, Record, RecordFile};
use super::{FileKind, SnapshotError, Source, check_name, file_path, unix_ms};
use crate::durable::{self, crash};

/// Largest record that is read, bytes.
const MAX_RECORD: u64 = 4 << 20;
/// Kept beside a checkpoint in the making, so that a disk it filled still has room for its record.
const RESERVE: usize = 256 << 10;

/// What a file looked like when it entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Stat {
    device: u64,
    inode: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Stat {
    fn of(meta: &std::fs::Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.len(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

/// The part of a record that every version has.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// `local.json`. Missing or unreadable costs a full check, nothing else.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Local {
    stats: BTreeMap<String, Stat>,
    /// Digest of the manifest it was uploaded as or fetched by.
    manifest_digest: Option<String>,
    /// The control plane does not need it here.
    droppable: bool,
    used_ms: i64,
}

/// A complete snapshot on this node.
#[derive(Debug, Clone)]
pub struct NodeSnapshot {
    dir: PathBuf,
    /// What it is.
    pub record: Record,
    /// sha256 (hex) of `record.json`.
    pub node_digest: String,
}

impl NodeSnapshot {
    /// The directory that ateom restores from.
    pub fn files_dir(&self) -> PathBuf {
        self.dir.join(FileKind::State.directory())
    }

    /// Path of one of its files.
    pub fn path(&self, file: &RecordFile) -> PathBuf {
        self.dir.join(file_path(file.kind, &file.name))
    }

    /// As the control plane sees it.
    pub fn to_proto(&self) -> atelet::NodeSnapshot {
        atelet::NodeSnapshot {
            snapshot_id: self.record.snapshot_id.clone(),
            actor_uid: self.record.actor_uid.clone(),
            generation: self.record.generation,
            node_digest: self.node_digest.clone(),
            bytes: self.record.bytes(),
            memory_bytes: self.record.memory_bytes,
            compatibility: Some(self.record.compatibility.clone()),
            time_ms: self.record.time_ms,
        }
    }

    fn local(&self) -> Local {
        std::fs::read(self.dir.join("local.json"))
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or_default()
    }

    fn set_local(&self, local: &Local) {
        let path = self.dir.join("local.json");
        let temp = self.dir.join(".local.json.tmp");
        let written = serde_json::to_vec(local)
            .map_err(io::Error::other)
            .and_then(|text| std::fs::write(&temp, text))
            .and_then(|()| std::fs::rename(&temp, &path));
        if let Err(error) = written {
            tracing::warn!(path = %path.display(), %error, "cannot note what is known of a node snapshot");
        }
    }

    /// Digests of the blocks of each file, as they were when it was recorded; `None` where that is not known. They are
    /// what the file's digest is over, so they need no trust of their own.
    pub fn block_digests(&self) -> Vec<Option<Vec<Sha>>> {
        let all = std::fs::read(self.dir.join("digests")).unwrap_or_default();
        let mut rest = all.as_slice();
        (self.record.files.iter())
            .map(|file| {
                let length = file.size.div_ceil(file.digest_block()) as usize * size_of::<Sha>();
                let (own, after) = rest.split_at_checked(length)?;
                rest = after;
                (file.block > 0 && hex::encode(sha256(own)) == file.digest)
                    .then(|| own.as_chunks().0.to_vec())
            })
            .collect()
    }

    fn set_block_digests(&self, digests: &[u8]) {
        if let Err(error) = std::fs::write(self.dir.join("digests"), digests) {
            tracing::warn!(dir = %self.dir.display(), %error, "the upload will hash a snapshot again");
        }
    }

    /// The manifest this node knows it by.
    pub fn manifest_digest(&self) -> Option<String> {
        self.local().manifest_digest
    }
}

/// What a checkpoint is recorded as.
#[derive(Debug, Clone)]
pub struct Draft {
    /// Id.
    pub snapshot_id: String,
    /// Whose.
    pub actor_uid: String,
    /// Of the assignment.
    pub generation: u64,
    /// When the memory was captured, Unix ms.
    pub time_ms: i64,
    /// Bytes in memory.
    pub memory_bytes: u64,
    /// What it needs.
    pub compatibility: Compatibility,
}

/// A snapshot in the making. Removed only by [`Staging::discard`], because it has to outlive this process.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
    snapshot_id: String,
}

impl Staging {
    /// The empty directory that ateom writes into.
    pub fn files_dir(&self) -> PathBuf {
        self.dir.join(FileKind::State.directory())
    }

    /// Path of a file of the snapshot.
    pub fn path(&self, kind: FileKind, name: &str) -> PathBuf {
        self.dir.join(file_path(kind, name))
    }

    /// Removes everything of it. What cannot be removed is logged and removed later.
    pub fn discard(self) {
        if let Err(error) = durable::remove_tree(&self.dir) {
            tracing::warn!(snapshot = self.snapshot_id, %error, "an unfinished snapshot stays behind");
        }
    }
}

/// Keeps a snapshot from being dropped while it is read.
#[derive(Debug)]
pub struct Pin {
    pins: Arc<Mutex<HashMap<PathBuf, u32>>>,
    dir: PathBuf,
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = pins.get_mut(&self.dir) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.dir);
            }
        }
    }
}

/// A file with the digests of its blocks.
type Digested = (RecordFile, Vec<Sha>);

/// All snapshots of a node. Its methods block.
#[derive(Debug, Clone)]
pub struct NodeSnapshots {
    root: PathBuf,
    threads: usize,
    /// Instead of [`FileKind::block_size`] for memory.
    memory_block: Option<u32>,
    pins: Arc<Mutex<HashMap<PathBuf, u32>>>,
}

impl NodeSnapshots {
    /// Opens a directory that another process may have open.
    pub fn beside(root: &Path, threads: usize) -> Self {
        Self { root: root.to_owned(), threads, memory_block: None, pins: Arc::default() }
    }

    /// Opens (and makes) the directory, and finishes removals and gives up fetches that a killed process left.
    ///
    /// # Errors
    /// The system's.
    pub fn open(root: &Path, threads: usize) -> io::Result<Self> {
        durable::create_dir(root)?;
        for actor in list(root)? {
            for entry in list(&actor)? {
                let name = entry.file_name().unwrap_or_default().as_encoded_bytes();
                if name.starts_with(b".get-") || name.starts_with(b".gone-") {
                    durable::remove_tree(&entry)?;
                }
            }
        }
        Ok(Self { root: root.to_owned(), threads, memory_block: None, pins: Arc::default() })
    }

    /// Cuts memory into blocks of this many bytes, a power of two of 4 KiB to 4 MiB; for measurements.
    #[must_use]
    pub fn with_memory_block(self, bytes: u32) -> Self {
        Self { memory_block: Some(bytes), ..self }
    }

    fn dir(&self, uid: &str, snapshot: &str) -> Result<PathBuf, SnapshotError> {
        Ok(self.root.join(check_name("actor uid", uid)?).join(check_name("snapshot id", snapshot)?))
    }

    /// Begins a checkpoint: an empty directory, without what an earlier attempt left.
    ///
    /// # Errors
    /// [`SnapshotError::Io`]; nothing is left.
    pub fn stage(&self, uid: &str, snapshot: &str) -> Result<Staging, SnapshotError> {
        // Never the directory of an earlier attempt: an ateom that is asked for the same one again answers what it
        // wrote there before.
        self.staging(uid, snapshot, &format!(".new-{snapshot}~{}", uuid::Uuid::new_v4().simple()))
    }

    /// Begins a fetch from the blob store.
    ///
    /// # Errors
    /// As [`NodeSnapshots::stage`].
    pub fn stage_fetch(&self, uid: &str, snapshot: &str) -> Result<Staging, SnapshotError> {
        self.staging(uid, snapshot, &format!(".get-{snapshot}"))
    }

    fn staging(&self, uid: &str, snapshot: &str, name: &str) -> Result<Staging, SnapshotError> {
        let dir = self.dir(uid, snapshot)?.with_file_name(name);
        let staging = Staging { dir, snapshot_id: snapshot.to_owned() };
        let made = durable::remove_tree(&staging.dir)
            // Not fsynced here: the commit fsyncs every directory once, when all is in it.
            .and_then(|()| std::fs::DirBuilder::new().recursive(true).mode(0o700).create(staging.files_dir()))
            .and_then(|()| std::fs::write(staging.dir.join("reserve"), vec![1; RESERVE]));
        if let Err(error) = made {
            staging.discard();
            return Err(SnapshotError::io(snapshot)(error));
        }
        Ok(staging)
    }

    /// The unfinished checkpoint of this id that an earlier process left, if there is one.
    pub fn unfinished(&self, uid: &str, snapshot: &str) -> Option<Staging> {
        let actor = self.dir(uid, snapshot).ok()?.parent()?.to_owned();
        let prefix = format!(".new-{snapshot}~");
        let dir = list(&actor).ok()?.into_iter().find(|path| {
            path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(prefix.as_bytes()))
        })?;
        Some(Staging { dir, snapshot_id: snapshot.to_owned() })
    }

    /// Digests, fsyncs and records what is in `staging`, and makes it a snapshot. `described` is what ateom and the
    /// volume archives said; anything else in the directory is removed. After a failure it can be tried again, or
    /// discarded.
    ///
    /// # Errors
    /// [`SnapshotError::Described`] where the directory does not hold what was described, [`SnapshotError::Io`].
    pub fn commit(
        &self,
        staging: &Staging,
        draft: Draft,
        described: &[(FileKind, String, u64)],
    ) -> Result<NodeSnapshot, SnapshotError> {
        let (files, digests) = self.digests(staging, described)?;
        let record = Record {
            version: RECORD_VERSION,
            snapshot_id: draft.snapshot_id,
            actor_uid: draft.actor_uid,
            generation: draft.generation,
            time_ms: draft.time_ms,
            memory_bytes: draft.memory_bytes,
            compatibility: draft.compatibility,
            files,
        };
        let made = self.finish(staging, record, Local { used_ms: unix_ms(), ..Local::default() })?;
        made.set_block_digests(&digests);
        Ok(made)
    }

    /// Makes a fetched copy a snapshot; its files were verified as they were written and are fsynced.
    ///
    /// # Errors
    /// [`SnapshotError::Io`]; nothing is left.
    pub fn commit_fetched(
        &self,
        staging: Staging,
        record: Record,
        manifest_digest: &str,
    ) -> Result<NodeSnapshot, SnapshotError> {
        let local = Local {
            manifest_digest: Some(manifest_digest.to_owned()),
            // The durable copy is committed, so this one is a cache.
            droppable: true,
            used_ms: unix_ms(),
            ..Local::default()
        };
        let result = self.finish(&staging, record, local);
        if result.is_err() {
            staging.discard();
        }
        result
    }

    /// The files in the order of a record, and the digests of their blocks.
    fn digests(
        &self,
        staging: &Staging,
        described: &[(FileKind, String, u64)],
    ) -> Result<(Vec<RecordFile>, Vec<u8>), SnapshotError> {
        let wrong =
            |reason: String| SnapshotError::Described { snapshot: staging.snapshot_id.clone(), reason };
        let io = SnapshotError::io(&staging.snapshot_id);
        let mut files = Vec::new();
        for (kind, name, size) in described {
            check_name("file", name)?;
            if files.iter().any(|(other, _): &Digested| {
                other.name == *name && other.kind.directory() == kind.directory()
            }) {
                return Err(wrong(format!("{name} is described twice")));
            }
            let path = staging.path(*kind, name);
            let file = open_plain(&path).map_err(|error| wrong(format!("{name}: {error}")))?;
            let found = file.metadata().map_err(|error| wrong(format!("{name}: {error}")))?.len();
            if found != *size {
                return Err(wrong(format!("{name} has {found} bytes, described are {size}")));
            }
            let block = match kind {
                FileKind::Memory => self.memory_block.unwrap_or_else(|| kind.block_size(*size)),
                _ => kind.block_size(*size),
            };
            // Hashed while it is written to the disk.
            let digests = std::thread::scope(|scope| {
                let syncing = scope.spawn(|| file.sync_all());
                let digests = digest::of_file(&file, *size, block.into(), self.threads);
                let synced = syncing.join().unwrap_or_else(|_| Err(io::Error::other("the fsync panicked")));
                synced.and(digests)
            })
            .map_err(durable::at("digest", &path))
            .map_err(SnapshotError::io(&staging.snapshot_id))?;
            let digest = hex::encode(digests.whole);
            files.push((
                RecordFile { name: name.clone(), kind: *kind, size: *size, block, digest },
                digests.blocks,
            ));
        }
        files.sort_by(|(a, _), (b, _)| (a.kind.directory(), &a.name).cmp(&(b.kind.directory(), &b.name)));
        let (files, digests): (Vec<_>, Vec<_>) = files.into_iter().unzip();
        remove_others(&staging.dir, &files).map_err(io)?;
        Ok((files, digests.iter().flat_map(|blocks| blocks.as_flattened()).copied().collect()))
    }

    fn finish(
        &self,
        staging: &Staging,
        record: Record,
        mut local: Local,
    ) -> Result<NodeSnapshot, SnapshotError> {
        let dir = self.dir(&record.actor_uid, &record.snapshot_id)?;
        let text = serde_json::to_vec(&record)
            .map_err(io::Error::other)
            .map_err(SnapshotError::io(&record.snapshot_id))?;
        let node_digest = hex::encode(sha256(&text));
        let done = (|| {
            crash::point();
            durable::remove_file(&staging.dir.join("reserve"))?;
            let path = staging.dir.join("record.json");
            durable::remove_file(&path)?;
            let mut file = File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .map_err(durable::at("create", &path))?;
            file.write_all(&text).and_then(|()| file.sync_all()).map_err(durable::at("write", &path))?;
            crash::point();
            for below in list(&staging.dir)?.iter().filter(|below| below.is_dir()) {
                durable::sync_dir(below)?;
            }
            durable::sync_dir(&staging.dir)?;
            crash::point();
            // An earlier copy is replaced only by a fetch, after it was found corrupt.
            Self::remove(&dir)?;
            std::fs::rename(&staging.dir, &dir).map_err(durable::at("rename to", &dir))?;
            crash::point();
            dir.parent().map_or(Ok(()), durable::sync_dir)?;
            // The actor's directory may be new too.
            durable::sync_dir(&self.root)
        })();
        done.map_err(SnapshotError::io(&record.snapshot_id))?;
        let snapshot = NodeSnapshot { dir, record, node_digest };
        for file in &snapshot.record.files {
            if let Ok(meta) = std::fs::symlink_metadata(snapshot.path(file)) {
                local.stats.insert(stat_key(file), Stat::of(&meta));
            }
        }
        snapshot.set_local(&local);
        Ok(snapshot)
    }

    /// The snapshot of this id, `None` when this node has none.
    ///
    /// # Errors
    /// [`SnapshotError::Corrupt`] when its record cannot be read as one of this id.
    pub fn find(&self, uid: &str, snapshot: &str) -> Result<Option<NodeSnapshot>, SnapshotError> {
        let dir = self.dir(uid, snapshot)?;
        let corrupt = |reason: String| SnapshotError::Corrupt {
            snapshot: snapshot.to_owned(),
            file: "record".to_owned(),
            reason,
            from: Source::Node,
        };
        let path = dir.join("record.json");
        let text = match std::fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.exists() => return Ok(None),
            Ok(meta) if meta.len() > MAX_RECORD => return Err(corrupt(format!("{} bytes", meta.len()))),
            _ => std::fs::read(&path).map_err(|error| corrupt(error.to_string()))?,
        };
        let Version { version } =
            serde_json::from_slice(&text).map_err(|error| corrupt(error.to_string()))?;
        if !(1..=RECORD_VERSION).contains(&version) {
            return Err(SnapshotError::Version {
                snapshot: snapshot.to_owned(),
                found: version,
                known: RECORD_VERSION,
            });
        }
        let record: Record = serde_json::from_slice(&text).map_err(|error| corrupt(error.to_string()))?;
        if record.actor_uid != uid || record.snapshot_id != snapshot {
            return Err(corrupt(format!(
                "it is of snapshot {} of actor {}",
                record.snapshot_id, record.actor_uid
            )));
        }
        for file in &record.files {
            check_name("file", &file.name)?;
            file.check(version).map_err(corrupt)?;
        }
        Ok(Some(NodeSnapshot { dir, record, node_digest: hex::encode(sha256(&text)) }))
    }

    /// Checks that a snapshot is what the control plane remembers and that every file is what was recorded.
    ///
    /// # Errors
    /// [`SnapshotError::Corrupt`] naming the first file that is not.
    pub fn verify(&self, snapshot: &NodeSnapshot, node_digest: Option<&str>) -> Result<(), SnapshotError> {
        let mut local = snapshot.local();
        self.check(snapshot, node_digest, &mut local)?;
        local.used_ms = unix_ms();
        snapshot.set_local(&local);
        Ok(())
    }

    /// Like [`NodeSnapshots::verify`], but digests every file and changes nothing.
    ///
    /// # Errors
    /// [`SnapshotError::Corrupt`] naming the first file that is not.
    pub fn verify_anew(
        &self,
        snapshot: &NodeSnapshot,
        node_digest: Option<&str>,
    ) -> Result<(), SnapshotError> {
        self.check(snapshot, node_digest, &mut Local::default())
    }

    fn check(
        &self,
        snapshot: &NodeSnapshot,
        node_digest: Option<&str>,
        local: &mut Local,
    ) -> Result<(), SnapshotError> {
        let corrupt = |file: &str, reason: String| SnapshotError::Corrupt {
            snapshot: snapshot.record.snapshot_id.clone(),
            file: file.to_owned(),
            reason,
            from: Source::Node,
        };
        if let Some(expected) = node_digest.filter(|expected| *expected != snapshot.node_digest) {
            return Err(corrupt(
                "record",
                format!("its digest is {}, expected is {expected}", snapshot.node_digest),
            ));
        }
        for file in &snapshot.record.files {
            let path = snapshot.path(file);
            let opened = open_plain(&path).map_err(|error| corrupt(&file.name, error.to_string()))?;
            let meta = opened.metadata().map_err(|error| corrupt(&file.name, error.to_string()))?;
            if meta.len() != file.size {
                return Err(corrupt(
                    &file.name,
                    format!("it has {} bytes, {} were recorded", meta.len(), file.size),
                ));
            }
            let stat = Stat::of(&meta);
            if local.stats.get(&stat_key(file)) == Some(&stat) {
                continue;
            }
            let digests = digest::of_file(&opened, file.size, file.digest_block(), self.threads)
                .map_err(|error| corrupt(&file.name, error.to_string()))?;
            if hex::encode(digests.whole) != file.digest {
                return Err(corrupt(&file.name, "its digest is not the one that was recorded".to_owned()));
            }
            local.stats.insert(stat_key(file), stat);
        }
        Ok(())
    }

    /// Ids of the actors that have something here, unfinished checkpoints included.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn actors(&self) -> io::Result<Vec<String>> {
        let mut uids: Vec<String> = list(&self.root)?
            .into_iter()
            .filter_map(|dir| dir.file_name().and_then(|name| name.to_str()).map(str::to_owned))
            .filter(|name| check_name("actor uid", name).is_ok())
            .collect();
        uids.sort();
        Ok(uids)
    }

    /// Notes the manifest of an upload.
    pub fn set_uploaded(&self, snapshot: &NodeSnapshot, manifest_digest: &str) {
        let mut local = snapshot.local();
        local.manifest_digest = Some(manifest_digest.to_owned());
        snapshot.set_local(&local);
    }

    /// Keeps a snapshot while the pin lives.
    pub fn pin(&self, snapshot: &NodeSnapshot) -> Pin {
        let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        *pins.entry(snapshot.dir.clone()).or_default() += 1;
        Pin { pins: Arc::clone(&self.pins), dir: snapshot.dir.clone() }
    }

    /// Complete snapshots of an actor; corrupt ones are logged and left out.
    ///
    /// # Errors
    /// [`SnapshotError::BadName`], [`SnapshotError::Io`].
    pub fn list(&self, uid: &str) -> Result<Vec<NodeSnapshot>, SnapshotError> {
        let actor = self.root.join(check_name("actor uid", uid)?);
        let mut found = Vec::new();
        for path in list(&actor).map_err(SnapshotError::io("*"))? {
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            if name.starts_with('.') {
                continue;
            }
            match self.find(uid, name) {
                Ok(snapshot) => found.extend(snapshot),
                Err(error) => {
                    tracing::warn!(actor_uid = uid, snapshot = name, %error, "unusable node snapshot");
                }
            }
        }
        Ok(found)
    }

    /// Removes unfinished checkpoints of an actor.
    ///
    /// # Errors
    /// [`SnapshotError::Io`].
    pub fn discard_unfinished(&self, uid: &str) -> Result<(), SnapshotError> {
        let actor = self.root.join(check_name("actor uid", uid)?);
        for path in list(&actor).map_err(SnapshotError::io("*"))? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(".new-") {
                durable::remove_tree(&path).map_err(SnapshotError::io("*"))?;
            }
        }
        Ok(())
    }

    /// The control plane does not need this copy any more; it becomes cache.
    ///
    /// # Errors
    /// As [`NodeSnapshots::find`].
    pub fn allow_drop(&self, uid: &str, snapshot: &str) -> Result<(), SnapshotError> {
        match self.find(uid, snapshot) {
            Ok(None) => Ok(()),
            // Only a copy that was uploaded, or fetched, can be asked for again.
            Ok(Some(found)) if found.local().manifest_digest.is_some() => {
                let mut local = found.local();
                local.droppable = true;
                found.set_local(&local);
                Ok(())
            }
            Ok(Some(_)) | Err(SnapshotError::Corrupt { .. } | SnapshotError::Version { .. }) => {
                let dir = self.dir(uid, snapshot)?;
                if self.is_pinned(&dir) {
                    tracing::warn!(actor_uid = uid, snapshot, "dropped while it is in use; it stays for now");
                    return Ok(());
                }
                Self::remove(&dir).map_err(SnapshotError::io(snapshot))
            }
            Err(error) => Err(error),
        }
    }

    /// Removes a snapshot at once, e.g. one found corrupt.
    ///
    /// # Errors
    /// [`SnapshotError::Io`].
    pub fn drop_now(&self, uid: &str, snapshot: &str) -> Result<(), SnapshotError> {
        Self::remove(&self.dir(uid, snapshot)?).map_err(SnapshotError::io(snapshot))
    }

    /// Removes everything of an actor.
    ///
    /// # Errors
    /// [`SnapshotError::Io`].
    pub fn purge(&self, uid: &str) -> Result<(), SnapshotError> {
        durable::remove_tree(&self.root.join(check_name("actor uid", uid)?)).map_err(SnapshotError::io("*"))
    }

    /// Removes the least recently used of the droppable snapshots until they hold at most `limit` bytes of disk.
    /// Returns bytes freed.
    ///
    /// # Errors
    /// The system's.
    pub fn evict(&self, limit: u64) -> io::Result<u64> {
        let mut cached = Vec::new();
        for actor in list(&self.root)? {
            let uid = actor.file_name().unwrap_or_default().to_string_lossy().into_owned();
            for snapshot in self.list(&uid).map_err(io::Error::other)? {
                let local = snapshot.local();
                if local.droppable {
                    cached.push((local.used_ms, allocated(&snapshot), snapshot.dir));
                }
            }
        }
        cached.sort();
        let mut held: u64 = cached.iter().map(|(_, bytes, _)| bytes).sum();
        let mut freed = 0;
        for (_, bytes, dir) in cached {
            if held <= limit {
                break;
            }
            if self.is_pinned(&dir) {
                continue;
            }
            Self::remove(&dir)?;
            held -= bytes;
            freed += bytes;
        }
        Ok(freed)
    }

    fn is_pinned(&self, dir: &Path) -> bool {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner).contains_key(dir)
    }

    /// Takes a snapshot away in one step, then removes its files.
    fn remove(dir: &Path) -> io::Result<()> {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let gone = dir.with_file_name(format!(".gone-{name}-{}", uuid::Uuid::new_v4()));
        match std::fs::rename(dir, &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(durable::at("remove", dir)(error)),
            Ok(()) => durable::remove_tree(&gone),
        }
    }
}

/// What ateom described, as [`NodeSnapshots::commit`] takes it.
pub fn described(files: &[ateom_proto::SnapshotFile]) -> Vec<(FileKind, String, u64)> {
    files
        .iter()
        .map(|file| {
            let kind = if file.memory { FileKind::Memory } else { FileKind::State };
            (kind, file.name.clone(), file.size)
        })
        .collect()
}

fn stat_key(file: &RecordFile) -> String {
    format!("{}/{}", file.kind.directory(), file.name)
}

fn allocated(snapshot: &NodeSnapshot) -> u64 {
    snapshot
        .record
        .files
        .iter()
        .filter_map(|file| std::fs::metadata(snapshot.path(file)).ok())
        .map(|meta| meta.blocks() * 512)
        .sum()
}

/// Opens a regular file without following a link at its end.
fn open_plain(path: &Path) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK)
        .open(path)
        .map_err(durable::at("open", path))?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other(format!("{} is not a regular file", path.display())))
    }
}

/// Entries of a directory; none if it does not exist.
fn list(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match std::fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path())).collect(),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(Vec::new())
        }
        Err(error) => Err(durable::at("list", dir)(error)),
    }
}

fn remove_others(dir: &Path, files: &[RecordFile]) -> io::Result<()> {
    for kind in [FileKind::State, FileKind::Volume] {
        for path in list(&dir.join(kind.directory()))? {
            let known = files.iter().any(|file| dir.join(file_path(file.kind, &file.name)) == path);
            if !known {
                if path.is_dir() { durable::remove_tree(&path) } else { durable::remove_file(&path) }?;
            }
        }
    }
    Ok(())
}
