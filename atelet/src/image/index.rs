// SPDX-License-Identifier: Apache-2.0
//! What a node has on its disk, and what must stay there.
//!
//! ```text
//! lock                 held by the process that has the store (flock)
//! layers/<hex>/        a layer unpacked, by the digest of its uncompressed archive; immutable
//! layers/<hex>.json    its record: space, and which blobs of which sources turned out to be it
//! images/<hex>.json    an image's record, by the digest of its manifest; the file's time is its last use
//! attributes/<hex>/    an image's directories that its layers only imply (see overlay.rs)
//! mounts/<hex>/        an image's layers stacked, read-only
//! rights.json          which atespace was seen to have a right to what, and when
//! empty/               the bottom of every stack
//! tmp/                 of unfinished work; emptied when the store is opened
//! ```
//!
//! **Crash consistency.** Content is made durable in `tmp/`, renamed into place, and its record written last (new
//! file, fsync, rename, fsync of the directory). To remove, the record goes first. What has no record, and a record
//! that misses its content, is dropped when the store is opened.
//!
//! **Who keeps what.** An image keeps its layers. A pin keeps an image or a layer from collection while someone works
//! with it: whoever wants something first pins it, then looks whether it is there; the collector decides and removes
//! while it holds both locks, so no one can pin in between what is about to go.
//!
//! **Sources.** A record names the sources that delivered the bytes themselves. Only these may later vouch for it by
//! a mere "yes, it exists": anybody can run a registry that says so for someone else's private digest.
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::error::ImageError;
use super::overlay::{self, Lower};
use super::reference::Digest;
use super::spec::ImageConfig;

/// An image that is complete on this node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    /// Of the platform's manifest.
    pub digest: Digest,
    /// Digests of indexes that lead to it on this platform.
    pub aliases: BTreeSet<Digest>,
    /// Sources that delivered its manifest, configuration and all layers.
    pub sources: BTreeSet<String>,
    /// Uncompressed digests, bottom first.
    pub layers: Vec<Digest>,
    pub config: ImageConfig,
    /// Disk space of its layers, bytes.
    pub size: u64,
}

/// A layer that is complete on this node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct LayerRecord {
    pub diff_id: Digest,
    /// Disk space, bytes.
    pub bytes: u64,
    pub inodes: u64,
    /// See `tree.rs`; hex, because paths need not be text.
    pub implicit: Vec<String>,
    pub opaque_root: bool,
    /// Blobs that were seen to be this layer, and the sources that delivered them.
    pub blobs: BTreeMap<Digest, BTreeSet<String>>,
}

/// Space and counts of a store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Complete images.
    pub images: u64,
    /// Complete layers; each is counted once however many images share it.
    pub layers: u64,
    /// Disk space of the layers, bytes.
    pub bytes: u64,
    /// Their files, directories and links.
    pub inodes: u64,
    /// Layers unpacked since the store was opened.
    pub extractions: u64,
    /// Bytes pulled from registries since the store was opened.
    pub pulled_bytes: u64,
}

/// What a collection removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collected {
    /// Digests of images.
    pub images: Vec<Digest>,
    /// Digests of layers.
    pub layers: Vec<Digest>,
    /// Disk space, bytes.
    pub bytes: u64,
}

#[derive(Debug, Default)]
struct State {
    images: HashMap<Digest, (Arc<ImageRecord>, SystemTime)>,
    layers: HashMap<Digest, Arc<LayerRecord>>,
}

/// The index; every method may block on the disk except those of pins and look-ups.
#[derive(Debug)]
pub(super) struct Index {
    dir: PathBuf,
    state: Mutex<State>,
    pins: Mutex<HashMap<Digest, usize>>,
    next: AtomicU64,
    _lock: File,
}

/// Keeps one image or layer from collection until it is dropped.
#[derive(Debug)]
pub(super) struct Pin {
    index: Arc<Index>,
    digest: Digest,
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = locked(&self.index.pins);
        if let Some(count) = pins.get_mut(&self.digest) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.digest);
            }
        }
    }
}

/// A path in `tmp/` that is removed when dropped, unless what was there has been renamed away.
#[derive(Debug)]
pub(super) struct Temporary(PathBuf);

impl Temporary {
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

/// Removes a file or tree; a failure is logged, the next opening of the store tries again.
fn remove(path: &Path) {
    let result = match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "cannot remove temporary files of the image store");
        }
        _ => {}
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Index {
    /// Opens the store, drops what a crash left unfinished, tries what the file system can do and mounts the images
    /// that are not mounted.
    pub fn open(dir: &Path) -> Result<Arc<Self>, ImageError> {
        let io =
            |what: &str, error: io::Error| ImageError::io(format!("{what} {}", dir.display()), dir, error);
        let private = |path: &Path| std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
        private(dir).map_err(|error| io("create", error))?;
        let dir = &dir.canonicalize().map_err(|error| io("open", error))?;
        // Files in layers may be setuid: nobody but root gets near them.
        std::fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .map_err(|error| io("set the mode of", error))?;
        let lock = File::create(dir.join("lock")).map_err(|error| io("lock", error))?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(ImageError::InUse { dir: dir.clone() }),
            Err(error) => return Err(io("lock", error.into())),
        }
        // A crash in the middle of the probe leaves a mount here.
        unmount_beneath(&dir.join("tmp"), |_| false).map_err(|error| io("clean", error))?;
        let old = dir.join("tmp");
        if old.exists() {
            let trash = dir.join(format!("trash-{}", uuid::Uuid::new_v4()));
            std::fs::rename(&old, trash).map_err(|error| io("clean", error))?;
        }
        for name in ["layers", "images", "attributes", "mounts", "empty", "tmp"] {
            private(&dir.join(name)).map_err(|error| io("create", error))?;
        }
        sweep_trash(dir).map_err(|error| io("clean", error))?;
        let index = Self {
            dir: dir.clone(),
            state: Mutex::default(),
            pins: Mutex::default(),
            next: AtomicU64::new(0),
            _lock: lock,
        };
        let scratch = index.temporary();
        std::fs::create_dir(scratch.path()).map_err(|error| io("create", error))?;
        overlay::probe(scratch.path())
            .map_err(|reason| ImageError::Unsuitable { dir: dir.clone(), reason })?;
        drop(scratch);
        index.load().map_err(|error| io("read", error))?;
        let index = Arc::new(index);
        index.remount().map_err(|error| io("mount the images of", error))?;
        Ok(index)
    }

    /// A new name in `tmp/`; nothing is there yet.
    pub fn temporary(&self) -> Temporary {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        Temporary(self.dir.join("tmp").join(number.to_string()))
    }

    /// Pins a digest; see the module.
    pub fn pin(self: &Arc<Self>, digest: &Digest) -> Pin {
        *locked(&self.pins).entry(digest.clone()).or_default() += 1;
        Pin { index: Arc::clone(self), digest: digest.clone() }
    }

    /// The image with this digest, also by that of an index.
    pub fn image(&self, digest: &Digest) -> Option<Arc<ImageRecord>> {
        let state = locked(&self.state);
        if let Some((record, _)) = state.images.get(digest) {
            return Some(Arc::clone(record));
        }
        state
            .images
            .values()
            .find(|(record, _)| record.aliases.contains(digest))
            .map(|(record, _)| Arc::clone(record))
    }

    pub fn layer(&self, diff_id: &Digest) -> Option<Arc<LayerRecord>> {
        locked(&self.state).layers.get(diff_id).cloned()
    }

    /// Puts a durable tree in place and records it.
    pub fn add_layer(&self, tree: &Temporary, record: LayerRecord) -> io::Result<()> {
        let mut state = locked(&self.state);
        let target = self.layer_dir(&record.diff_id);
        if target.exists() {
            // Without a record, or it would have been found: left by a removal that failed half-way.
            self.discard(&target)?;
        }
        std::fs::rename(tree.path(), &target)?;
        sync_dir(&self.dir.join("layers"))?;
        self.write("layers", &record.diff_id, &record)?;
        state.layers.insert(record.diff_id.clone(), Arc::new(record));
        Ok(())
    }

    /// Notes that `source` delivered `blob`, and that it is this layer.
    pub fn add_blob(&self, diff_id: &Digest, blob: &Digest, source: &str) -> io::Result<()> {
        let mut state = locked(&self.state);
        let Some(record) = state.layers.get(diff_id) else { return Ok(()) };
        let mut record = LayerRecord::clone(record);
        if record.blobs.entry(blob.clone()).or_default().insert(source.to_owned()) {
            self.write("layers", diff_id, &record)?;
            state.layers.insert(diff_id.clone(), Arc::new(record));
        }
        Ok(())
    }

    /// Records an image whose layers are all there; one that is known learns its new names.
    pub fn add_image(&self, mut record: ImageRecord) -> io::Result<Arc<ImageRecord>> {
        let mut state = locked(&self.state);
        if let Some((known, _)) = state.images.get(&record.digest) {
            record.aliases.extend(known.aliases.iter().cloned());
            record.sources.extend(known.sources.iter().cloned());
        }
        let distinct: HashSet<_> = record.layers.iter().collect();
        record.size =
            distinct.iter().filter_map(|layer| state.layers.get(*layer)).map(|layer| layer.bytes).sum();
        self.write("images", &record.digest, &record)?;
        let record = Arc::new(record);
        state.images.insert(record.digest.clone(), (Arc::clone(&record), SystemTime::now()));
        Ok(record)
    }

    /// Makes an image the most recently used.
    pub fn touch(&self, digest: &Digest) {
        let now = SystemTime::now();
        let mut state = locked(&self.state);
        let Some((_, used)) = state.images.get_mut(digest) else { return };
        *used = now;
        let result = File::open(self.record_path("images", digest)).and_then(|file| file.set_modified(now));
        if let Err(error) = result {
            tracing::warn!(image = %digest, %error, "cannot note the last use of an image");
        }
    }

    /// Where an image is or will be mounted.
    pub fn mount_point(&self, digest: &Digest) -> PathBuf {
        self.dir.join("mounts").join(digest.hex())
    }

    /// Mounts an image unless it is mounted. The caller holds a pin and is the only one to mount this image now.
    pub fn mount(&self, record: &ImageRecord) -> io::Result<PathBuf> {
        let target = self.mount_point(&record.digest);
        if overlay::is_mounted(&target)? {
            return Ok(target);
        }
        match std::fs::create_dir(&target) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let mut lowers = Vec::new();
        let mut seen = HashSet::new();
        // Topmost first. A layer that occurs twice has its effect where it is on top.
        for diff_id in record.layers.iter().rev().filter(|diff_id| seen.insert(*diff_id)) {
            let layer = self.layer(diff_id).ok_or_else(|| {
                io::Error::new(io::ErrorKind::NotFound, format!("layer {diff_id} is not there"))
            })?;
            let implicit = layer.implicit.iter().filter_map(|path| hex::decode(path).ok()).collect();
            let opaque_root = layer.opaque_root;
            lowers.push(Lower { dir: self.layer_dir(diff_id), implicit, opaque_root });
            if opaque_root {
                break;
            }
        }
        let mut dirs = Vec::new();
        dirs.extend(self.attributes(&record.digest, &lowers)?);
        dirs.extend(lowers.into_iter().map(|lower| lower.dir));
        dirs.push(self.dir.join("empty"));
        if dirs.len() == 1 {
            // An image without layers: overlayfs wants two.
            let second = self.dir.join("tmp").join("empty");
            std::fs::DirBuilder::new().recursive(true).mode(0o755).create(&second)?;
            dirs.push(second);
        }
        overlay::mount(&dirs, &target, &format!("substrate-{}", &record.digest.hex()[..12]))?;
        Ok(target)
    }

    /// The layer with the attributes of implicit directories, if the image needs one.
    fn attributes(&self, digest: &Digest, lowers: &[Lower]) -> io::Result<Option<PathBuf>> {
        if lowers.iter().all(|lower| lower.implicit.is_empty()) {
            return Ok(None);
        }
        let target = self.dir.join("attributes").join(digest.hex());
        if target.exists() {
            return Ok(Some(target));
        }
        let made = self.temporary();
        std::fs::create_dir(made.path())?;
        if !overlay::write_attributes(lowers, made.path())? {
            return Ok(None);
        }
        std::fs::rename(made.path(), &target)?;
        sync_dir(&self.dir.join("attributes"))?;
        Ok(Some(target))
    }

    /// The images there are.
    pub fn digests(&self) -> HashSet<Digest> {
        locked(&self.state).images.keys().cloned().collect()
    }

    /// Counts what is there.
    pub fn usage(&self) -> Usage {
        let state = locked(&self.state);
        Usage {
            images: state.images.len() as u64,
            layers: state.layers.len() as u64,
            bytes: state.layers.values().map(|layer| layer.bytes).sum(),
            inodes: state.layers.values().map(|layer| layer.inodes).sum(),
            ..Usage::default()
        }
    }

    /// Removes layers that no image has, then the least recently used images, until at most `limit` bytes are left.
    /// What is pinned or in `in_use`, and what is still mounted somewhere here, stays. With `dry_run` nothing changes.
    pub fn collect(&self, in_use: &HashSet<Digest>, limit: u64, dry_run: bool) -> io::Result<Collected> {
        let mut collected = Collected::default();
        let mut doomed = Vec::new();
        {
            let mut state = locked(&self.state);
            let pins = locked(&self.pins);
            let kept = |digest: &Digest| pins.contains_key(digest);
            let mut images = state.images.clone();
            let mut layers = state.layers.clone();
            let mut bytes: u64 = layers.values().map(|layer| layer.bytes).sum();
            let mut candidates: Vec<_> = images
                .iter()
                .filter(|(digest, (record, _))| {
                    !kept(digest)
                        && !in_use.contains(*digest)
                        && record.aliases.is_disjoint(&in_use.iter().cloned().collect())
                })
                .map(|(digest, (_, used))| (*used, digest.clone()))
                .collect();
            candidates.sort();
            let mut candidates = candidates.into_iter();
            while bytes > limit {
                let wanted: HashSet<_> =
                    images.values().flat_map(|(record, _)| record.layers.clone()).collect();
                let unused: Vec<_> =
                    layers.keys().filter(|layer| !wanted.contains(*layer) && !kept(layer)).cloned().collect();
                if !unused.is_empty() {
                    for diff_id in unused {
                        let freed = layers.remove(&diff_id).map_or(0, |layer| layer.bytes);
                        bytes -= freed;
                        collected.bytes += freed;
                        collected.layers.push(diff_id.clone());
                        if !dry_run {
                            doomed.push(self.drop_layer(&mut state, &diff_id)?);
                        }
                    }
                    continue;
                }
                let Some((_, digest)) = candidates.next() else { break };
                if !dry_run && !self.drop_image(&mut state, &digest, &mut doomed)? {
                    continue;
                }
                images.remove(&digest);
                collected.images.push(digest);
            }
        }
        // Deleting many files takes long: outside of the locks.
        drop(doomed);
        Ok(collected)
    }

    /// Removes an image's mount and record; `false` where it is in use here.
    fn drop_image(
        &self,
        state: &mut State,
        digest: &Digest,
        doomed: &mut Vec<Temporary>,
    ) -> io::Result<bool> {
        let target = self.mount_point(digest);
        if !overlay::unmount(&target)? {
            tracing::warn!(image = %digest, "an image that nobody is known to use is busy, kept");
            return Ok(false);
        }
        match std::fs::remove_dir(&target) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::fs::remove_file(self.record_path("images", digest))?;
        sync_dir(&self.dir.join("images"))?;
        state.images.remove(digest);
        let attributes = self.dir.join("attributes").join(digest.hex());
        if attributes.exists() {
            doomed.push(self.take(&attributes)?);
        }
        Ok(true)
    }

    fn drop_layer(&self, state: &mut State, diff_id: &Digest) -> io::Result<Temporary> {
        std::fs::remove_file(self.record_path("layers", diff_id))?;
        sync_dir(&self.dir.join("layers"))?;
        state.layers.remove(diff_id);
        self.take(&self.layer_dir(diff_id))
    }

    /// Moves a tree to where it is removed when the answer is dropped.
    fn take(&self, path: &Path) -> io::Result<Temporary> {
        let target = self.temporary();
        std::fs::rename(path, target.path())?;
        Ok(target)
    }

    fn discard(&self, path: &Path) -> io::Result<()> {
        self.take(path).map(drop)
    }

    fn layer_dir(&self, diff_id: &Digest) -> PathBuf {
        self.dir.join("layers").join(diff_id.hex())
    }

    fn record_path(&self, kind: &str, digest: &Digest) -> PathBuf {
        self.dir.join(kind).join(format!("{}.json", digest.hex()))
    }

    fn write(&self, kind: &str, digest: &Digest, record: &impl Serialize) -> io::Result<()> {
        let temporary = self.temporary();
        let mut file = File::create_new(temporary.path())?;
        file.write_all(&serde_json::to_vec(record)?)?;
        file.sync_all()?;
        std::fs::rename(temporary.path(), self.record_path(kind, digest))?;
        sync_dir(&self.dir.join(kind))
    }

    /// Reads a small file of the store; none if it is not there.
    pub fn read_file(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match std::fs::read(self.dir.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Replaces a small file of the store. Not fsynced: for what may be lost in a crash, but not torn.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let temporary = self.temporary();
        std::fs::write(temporary.path(), bytes)?;
        std::fs::rename(temporary.path(), self.dir.join(name))
    }

    fn load(&self) -> io::Result<()> {
        let mut state = locked(&self.state);
        let (layers, dirs) = self.records::<LayerRecord>("layers")?;
        for (hex, record, _) in layers {
            if record.diff_id.hex() == hex && dirs.contains(&hex) {
                state.layers.insert(record.diff_id.clone(), Arc::new(record));
            } else {
                self.drop_record("layers", &hex)?;
            }
        }
        for hex in dirs {
            if !state.layers.keys().any(|diff_id| diff_id.hex() == hex) {
                self.discard(&self.dir.join("layers").join(&hex))?;
            }
        }
        for (hex, record, used) in self.records::<ImageRecord>("images")?.0 {
            let complete = record.layers.iter().all(|layer| state.layers.contains_key(layer));
            if record.digest.hex() == hex && complete {
                state.images.insert(record.digest.clone(), (Arc::new(record), used));
            } else {
                self.drop_record("images", &hex)?;
            }
        }
        Ok(())
    }

    fn drop_record(&self, kind: &str, hex: &str) -> io::Result<()> {
        tracing::warn!(kind, digest = hex, "record without its content, dropped");
        std::fs::remove_file(self.dir.join(kind).join(format!("{hex}.json")))
    }

    /// All records of a kind that can be read (file name, record, file time), and the names of other entries.
    #[allow(clippy::type_complexity)]
    fn records<T: serde::de::DeserializeOwned>(
        &self,
        kind: &str,
    ) -> io::Result<(Vec<(String, T, SystemTime)>, HashSet<String>)> {
        let (mut records, mut others) = (Vec::new(), HashSet::new());
        for entry in std::fs::read_dir(self.dir.join(kind))? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let Some(hex) = name.strip_suffix(".json") else {
                others.insert(name);
                continue;
            };
            match serde_json::from_slice(&std::fs::read(entry.path())?) {
                Ok(record) => records.push((hex.to_owned(), record, entry.metadata()?.modified()?)),
                Err(error) => {
                    tracing::warn!(kind, digest = hex, %error, "unreadable record, dropped");
                    std::fs::remove_file(entry.path())?;
                }
            }
        }
        Ok((records, others))
    }

    /// After a restart of the process mounts are still there, after one of the machine they are not.
    fn remount(&self) -> io::Result<()> {
        let images: Vec<_> =
            locked(&self.state).images.values().map(|(record, _)| Arc::clone(record)).collect();
        let known: HashSet<PathBuf> = images.iter().map(|record| self.mount_point(&record.digest)).collect();
        unmount_beneath(&self.dir.join("mounts"), |path| known.contains(path))?;
        for record in images {
            if let Err(error) = self.mount(&record) {
                // It is tried again when the image is asked for, and then the caller is told.
                tracing::warn!(image = %record.digest, %error, "cannot mount an image");
            }
        }
        for kind in ["mounts", "attributes"] {
            for entry in std::fs::read_dir(self.dir.join(kind))? {
                let path = entry?.path();
                let is_known =
                    path.file_name().is_some_and(|name| known.contains(&self.dir.join("mounts").join(name)));
                if !is_known {
                    self.discard(&path)?;
                }
            }
        }
        Ok(())
    }
}

/// Unmounts all images of the store in `dir`, which no process uses any more; the next opening mounts what it needs.
///
/// # Errors
/// With the mount that is busy.
pub fn unmount_all(dir: &Path) -> io::Result<()> {
    unmount_beneath(dir, |_| false)
}

/// Unmounts everything beneath `dir` that is not to be kept, deepest first.
fn unmount_beneath(dir: &Path, keep: impl Fn(&Path) -> bool) -> io::Result<()> {
    let mut points = overlay::mounts_beneath(dir)?;
    points.sort_by_key(|point| std::cmp::Reverse(point.as_os_str().len()));
    for point in points.iter().filter(|point| !keep(point)) {
        if !overlay::unmount(point)? {
            return Err(io::Error::other(format!("{} is mounted and busy", point.display())));
        }
    }
    Ok(())
}

/// Removes what earlier openings moved aside, without keeping anyone waiting.
fn sweep_trash(dir: &Path) -> io::Result<()> {
    let mut trash = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b"trash-") {
            trash.push(entry.path());
        }
    }
    if !trash.is_empty() {
        std::thread::Builder::new()
            .name("image-sweep".into())
            .spawn(move || trash.iter().for_each(|path| remove(path)))?;
    }
    Ok(())
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
