// SPDX-License-Identifier: Apache-2.0
//! Reading durable snapshots: manifests, and bringing a snapshot onto this node.
//!
//! ```text
//!  manifest ─ digest = the control plane's? ─ actor, snapshot, format? ─ key opens? ─ body sound?
//!     ─▶ range reads of about 1 MiB, several at once ─▶ [open · decompress · digest · write at its place] on all cores
//!     ─▶ fsync files ─▶ record ─▶ rename (see node)
//! ```
//!
//! Files are created at their full length and only blocks with content are written, so holes stay holes. Nothing is
//! visible under the snapshot's name before every block of it was verified.
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _};

use super::manifest::{self, MAX_MANIFEST, Manifest};
use super::node::{NodeSnapshot, NodeSnapshots, Staging};
use super::pack::BlockCipher;
use super::{KeyStore, SnapshotError, Source};
use crate::blob::{BlobError, BlobStore, Key};
use crate::durable;

/// Bytes of a range read.
const READ: u64 = 1 << 20;
/// A gap up to this is read over, bytes: some blocks that changed since, which cost less than another request.
const GAP: u64 = 256 << 10;

/// The durable side of snapshots.
#[derive(Debug, Clone)]
pub struct Durable {
    pub(crate) store: Arc<dyn BlobStore>,
    pub(crate) keys: Arc<dyn KeyStore>,
    pub(crate) threads: usize,
}

/// Which snapshot, as the control plane names it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Whose keys.
    pub atespace: String,
    /// Whose directory.
    pub actor_uid: String,
    /// Its id.
    pub snapshot_id: String,
    /// Of the assignment that made it; 0: found by listing.
    pub generation: u64,
    /// sha256 (hex) of its manifest.
    pub manifest_digest: String,
}

/// A block and where it goes.
pub(super) struct Target {
    file: usize,
    at: u64,
    pub(super) plain_len: usize,
    pub(super) block: manifest::Block,
}

/// One range read and what is in it.
pub(super) struct Job {
    pub(super) pack: u32,
    pub(super) range: Range<u64>,
    pub(super) targets: Vec<Target>,
}

impl Durable {
    /// Over a store and keys, working on `threads` cores.
    pub fn new(store: Arc<dyn BlobStore>, keys: Arc<dyn KeyStore>, threads: usize) -> Self {
        Self { store, keys, threads: threads.max(1) }
    }

    /// The blob store.
    pub fn store(&self) -> &dyn BlobStore {
        &*self.store
    }

    /// Reads a manifest and opens it; `None` when there is none.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub(crate) async fn read_manifest(
        &self,
        key: &Key,
        digest: Option<&str>,
        atespace: &str,
        snapshot_id: &str,
    ) -> Result<Option<Manifest>, SnapshotError> {
        let Some(size) = self.store.head(key).await? else { return Ok(None) };
        if size > MAX_MANIFEST {
            return Err(SnapshotError::TooLarge {
                snapshot: snapshot_id.to_owned(),
                reason: format!("its manifest has {size} bytes, at most {MAX_MANIFEST} are read"),
            });
        }
        let content = self.store.get(key, 0..size).await?;
        let sealed = manifest::read(&content, digest, snapshot_id)?;
        let foreign = |reason: String| SnapshotError::Foreign { snapshot: snapshot_id.to_owned(), reason };
        let header = &sealed.header;
        let own = manifest::manifest_key(&header.actor_uid, header.generation, &header.snapshot_id)?;
        if own != *key || header.snapshot_id != snapshot_id {
            return Err(foreign(format!("the manifest under {key} is that of {own}")));
        }
        if header.atespace != atespace {
            return Err(foreign(format!("it is of atespace {}, not of {atespace}", header.atespace)));
        }
        let Some(wrapped) = &header.wrapped else { return Err(foreign("it has no data key".to_owned())) };
        let context = manifest::key_context(atespace, &header.actor_uid, &header.snapshot_id);
        let key = self.keys.unwrap(atespace, &context, &wrapped.to_key()).await?;
        sealed.open(&key).map(Some)
    }

    /// The manifest that the control plane names.
    ///
    /// # Errors
    /// [`SnapshotError::Missing`] when it is not there, and everything that is wrong with it.
    pub async fn manifest(&self, wanted: &Wanted) -> Result<Manifest, SnapshotError> {
        let missing = || SnapshotError::Missing {
            snapshot: wanted.snapshot_id.clone(),
            place: format!("in the blob store {}", self.store.location()),
            from: Source::Durable,
        };
        let key = if wanted.generation > 0 {
            manifest::manifest_key(&wanted.actor_uid, wanted.generation, &wanted.snapshot_id)?
        } else {
            let directory = manifest::directory(&wanted.actor_uid, 0, &wanted.snapshot_id)?;
            let Some((actor, name)) = directory.rsplit_once('/') else { return Err(missing()) };
            let tail = format!("{}/manifest", &name[1..]);
            let listed = self.store.list(&Key::new(actor)?).await?;
            listed
                .into_iter()
                .map(|listed| listed.key)
                .find(|key| {
                    key.as_str()[actor.len() + 1..].strip_suffix(&tail).is_some_and(|rest| {
                        !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit())
                    })
                })
                .ok_or_else(missing)?
        };
        self.read_manifest(&key, Some(&wanted.manifest_digest), &wanted.atespace, &wanted.snapshot_id)
            .await?
            .ok_or_else(missing)
    }

    /// Brings a durable snapshot onto this node.
    ///
    /// # Errors
    /// [`SnapshotError`]; nothing is left of it.
    pub async fn fetch(
        &self,
        snapshots: &NodeSnapshots,
        wanted: &Wanted,
    ) -> Result<NodeSnapshot, SnapshotError> {
        let manifest = self.manifest(wanted).await?;
        let (local, uid, id) = (snapshots.clone(), wanted.actor_uid.clone(), wanted.snapshot_id.clone());
        let staging = crate::blocking(move || local.stage_fetch(&uid, &id)).await?;
        if let Err(error) = self.write_files(&manifest, &staging).await {
            crate::blocking(move || staging.discard()).await;
            return Err(error);
        }
        let local = snapshots.clone();
        crate::blocking(move || local.commit_fetched(staging, manifest.record(), &manifest.digest)).await
    }

    async fn write_files(&self, manifest: &Manifest, staging: &Staging) -> Result<(), SnapshotError> {
        let snapshot = &manifest.header.snapshot_id;
        let ciphers = self.ciphers(manifest).await?;
        let files = Arc::new(create_files(manifest, staging).map_err(SnapshotError::io(snapshot))?);
        let jobs = jobs(manifest).into_iter().map(|job| {
            let pack = &manifest.header.packs[job.pack as usize];
            let cipher = ciphers[job.pack as usize].clone();
            let files = Arc::clone(&files);
            async move {
                let key = Key::new(pack.key.as_str())?;
                let content = self.store.get(&key, job.range.clone()).await?;
                let corrupt = |reason: String| SnapshotError::Corrupt {
                    snapshot: snapshot.clone(),
                    file: pack.key.clone(),
                    reason,
                    from: Source::Durable,
                };
                if content.len() as u64 != job.range.end - job.range.start {
                    return Err(corrupt("the store answered fewer bytes than it has".to_owned()));
                }
                let outcome = crate::blocking(move || {
                    for target in &job.targets {
                        let block = &target.block;
                        let start = (block.offset - job.range.start) as usize;
                        let stored = &content[start..start + block.stored as usize];
                        let plain = cipher
                            .open(block.index, block.raw, stored, target.plain_len, &block.digest)
                            .map_err(|reason| {
                                Err(format!(
                                    "the block at {} ({} bytes): {reason}",
                                    block.offset, block.stored
                                ))
                            })?;
                        files[target.file].write_all_at(&plain, target.at).map_err(Ok)?;
                    }
                    Ok::<(), Result<io::Error, String>>(())
                })
                .await;
                outcome.map_err(|error| match error {
                    Ok(error) => SnapshotError::io(snapshot)(error),
                    Err(reason) => corrupt(reason),
                })
            }
        });
        let mut writing = futures::stream::iter(jobs).buffer_unordered(self.threads * 2);
        while writing.try_next().await?.is_some() {}
        drop(writing);
        crate::blocking(move || files.iter().try_for_each(fs::File::sync_all))
            .await
            .map_err(SnapshotError::io(snapshot))
    }

    pub(super) async fn ciphers(&self, manifest: &Manifest) -> Result<Vec<BlockCipher>, SnapshotError> {
        let atespace = &manifest.header.atespace;
        let mut ciphers = Vec::new();
        for pack in &manifest.header.packs {
            let Some(wrapped) = &pack.wrapped else {
                return Err(SnapshotError::Foreign {
                    snapshot: manifest.header.snapshot_id.clone(),
                    reason: format!("pack {} has no key", pack.key),
                });
            };
            let context = manifest::key_context(atespace, &pack.actor_uid, &pack.snapshot_id);
            let key = self.keys.unwrap(atespace, &context, &wrapped.to_key()).await?;
            ciphers.push(BlockCipher::new(&key, &pack.actor_uid, &pack.snapshot_id)?);
        }
        Ok(ciphers)
    }

    /// Deletes manifests (by directory, `<generation>-<snapshot id>`) of an actor, then packs by key. Packs go last:
    /// a manifest never names what is gone.
    ///
    /// # Errors
    /// [`SnapshotError::Blob`]; the same call may be sent again.
    pub async fn delete(
        &self,
        actor_uid: &str,
        manifests: &[String],
        packs: &[String],
    ) -> Result<(), SnapshotError> {
        super::check_name("actor uid", actor_uid)?;
        let mut keys = Vec::new();
        for directory in manifests {
            super::check_name("manifest", directory)?;
            keys.push(Key::new(format!("actors/{actor_uid}/{directory}/manifest"))?);
        }
        for pack in packs {
            let key = Key::new(pack.as_str())?;
            if !(pack.starts_with("actors/") && pack.contains("/packs/")) {
                return Err(BlobError::BadKey(pack.clone()).into());
            }
            keys.push(key);
        }
        for key in keys {
            self.store.delete(&key).await?;
        }
        Ok(())
    }
}

fn create_files(manifest: &Manifest, staging: &Staging) -> io::Result<Vec<fs::File>> {
    manifest
        .body
        .files
        .iter()
        .map(|file| {
            let path = staging.path(file.file_kind(), &file.name);
            path.parent().map_or(Ok(()), durable::create_dir)?;
            let created = fs::File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .map_err(durable::at("create", &path))?;
            created.set_len(file.size).map_err(durable::at("extend", &path))?;
            Ok(created)
        })
        .collect()
}

/// Cuts the blocks of a manifest into range reads: in the order of each pack, near ones together.
pub(super) fn jobs(manifest: &Manifest) -> Vec<Job> {
    let mut by_pack: BTreeMap<u32, Vec<Target>> = BTreeMap::new();
    for (at, file) in manifest.body.files.iter().enumerate() {
        for block in &file.blocks {
            by_pack.entry(block.pack).or_default().push(Target {
                file: at,
                at: block.number * u64::from(file.block_size),
                plain_len: file.plain_len(block.number) as usize,
                block: block.clone(),
            });
        }
    }
    let mut jobs: Vec<Job> = Vec::new();
    for (pack, mut targets) in by_pack {
        targets.sort_by_key(|target| target.block.offset);
        for target in targets {
            let start = target.block.offset;
            let end = start + u64::from(target.block.stored);
            match jobs.last_mut() {
                Some(job)
                    if job.pack == pack
                        && start <= job.range.end + GAP
                        && end.max(job.range.end) - job.range.start <= READ =>
                {
                    job.range.end = job.range.end.max(end);
                    job.targets.push(target);
                }
                _ => jobs.push(Job { pack, range: start..end, targets: vec![target] }),
            }
        }
    }
    jobs
}
