// SPDX-License-Identifier: Apache-2.0
//! Verification of what is stored, without restoring it: every manifest, every pack, every block.
//!
//! A block that several snapshots name is read once. All that is wrong is named, not only the first thing.
use std::collections::BTreeSet;
use std::sync::Arc;

use futures::StreamExt as _;

use super::SnapshotError;
use super::manifest::Manifest;
use super::node::NodeSnapshots;
use super::restore::{Durable, Job, Wanted, jobs};
use crate::blob::Key;

/// What a check looked at and found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checked {
    /// Snapshots.
    pub snapshots: u64,
    /// Blocks that were read, decrypted and digested.
    pub blocks: u64,
    /// Bytes that were read from the store.
    pub bytes: u64,
    /// What is wrong: the thing and why.
    pub findings: Vec<String>,
}

/// Verifies snapshots of a store.
#[derive(Debug)]
pub struct Checker {
    durable: Durable,
    /// Only what needs no reading of packs.
    quick: bool,
    /// Blocks that were found good or named already: pack and offset.
    seen: BTreeSet<(String, u64)>,
    /// Packs whose size was looked at.
    packs: BTreeSet<String>,
    checked: Checked,
}

impl Checker {
    /// `quick`: manifests and the sizes of packs only.
    pub fn new(durable: Durable, quick: bool) -> Self {
        Self { durable, quick, seen: BTreeSet::new(), packs: BTreeSet::new(), checked: Checked::default() }
    }

    /// What was found.
    pub fn finish(self) -> Checked {
        self.checked
    }

    fn found(&mut self, thing: &str, what: impl std::fmt::Display) {
        self.checked.findings.push(format!("{thing}: {what}"));
    }

    /// Verifies a durable snapshot. `counted`: the packs that the control plane counts for it.
    ///
    /// # Errors
    /// [`SnapshotError::Blob`] when the store does not answer, or the keys cannot be read: nothing is known then.
    pub async fn durable(&mut self, wanted: &Wanted, counted: &[String]) -> Result<(), SnapshotError> {
        let name = format!("snapshot {} of actor {}", wanted.snapshot_id, wanted.actor_uid);
        self.checked.snapshots += 1;
        let manifest = match self.durable.manifest(wanted).await {
            Ok(manifest) => manifest,
            Err(error) if says_nothing(&error) => return Err(error),
            Err(error) => {
                self.found(&name, error);
                return Ok(());
            }
        };
        for pack in &manifest.header.packs {
            if !counted.contains(&pack.key) {
                self.found(
                    &name,
                    format!("its manifest names {}, which is not counted: it may be deleted", pack.key),
                );
            }
        }
        let gone = self.pack_sizes(&manifest, &name).await?;
        if !self.quick {
            self.blocks(&manifest, &name, &gone).await?;
        }
        Ok(())
    }

    /// Looks at the packs as objects; answers those that need not be read.
    async fn pack_sizes(&mut self, manifest: &Manifest, name: &str) -> Result<Vec<bool>, SnapshotError> {
        let mut gone = Vec::new();
        for pack in &manifest.header.packs {
            let size = self.durable.store.head(&Key::new(pack.key.as_str())?).await?;
            let problem = match size {
                None => Some("is not in the blob store".to_owned()),
                Some(size) if size != pack.length => {
                    Some(format!("has {size} bytes, {} were written", pack.length))
                }
                Some(_) => None,
            };
            gone.push(size.is_none());
            if let Some(problem) = problem
                && self.packs.insert(pack.key.clone())
            {
                self.found(name, format!("pack {} {problem}", pack.key));
            }
        }
        Ok(gone)
    }

    async fn blocks(&mut self, manifest: &Manifest, name: &str, gone: &[bool]) -> Result<(), SnapshotError> {
        let ciphers = match self.durable.ciphers(manifest).await {
            Ok(ciphers) => ciphers,
            Err(error) if says_nothing(&error) => return Err(error),
            Err(error) => {
                self.found(name, error);
                return Ok(());
            }
        };
        let mut wanted = Vec::new();
        for mut job in jobs(manifest) {
            let pack = &manifest.header.packs[job.pack as usize].key;
            if gone[job.pack as usize] {
                continue;
            }
            job.targets.retain(|target| self.seen.insert((pack.clone(), target.block.offset)));
            if !job.targets.is_empty() {
                wanted.push(job);
            }
        }
        let store = Arc::clone(&self.durable.store);
        let reads = wanted.into_iter().map(|job: Job| {
            let key = manifest.header.packs[job.pack as usize].key.clone();
            let (store, cipher) = (Arc::clone(&store), ciphers[job.pack as usize].clone());
            async move {
                let content = match store.get(&Key::new(key.as_str())?, job.range.clone()).await {
                    Ok(content) => content,
                    Err(error) => {
                        let error = SnapshotError::from(error);
                        return if says_nothing(&error) {
                            Err(error)
                        } else {
                            Ok((0, 0, vec![error.to_string()]))
                        };
                    }
                };
                let (blocks, bytes) = (job.targets.len() as u64, content.len() as u64);
                let findings = crate::blocking(move || {
                    job.targets
                        .iter()
                        .filter_map(|target| {
                            let block = &target.block;
                            let start = (block.offset - job.range.start) as usize;
                            let stored = content.get(start..start + block.stored as usize);
                            let opened = stored
                                .ok_or_else(|| "the store answered less than it has".to_owned())
                                .and_then(|stored| {
                                    cipher.open(
                                        block.index,
                                        block.raw,
                                        stored,
                                        target.plain_len,
                                        &block.digest,
                                    )
                                });
                            let reason = opened.err()?;
                            Some(format!(
                                "{key}: the block at {} ({} bytes): {reason}",
                                block.offset, block.stored
                            ))
                        })
                        .collect()
                })
                .await;
                Ok((blocks, bytes, findings))
            }
        });
        let mut reading = futures::stream::iter(reads).buffer_unordered(self.durable.threads * 2);
        let mut findings = Vec::new();
        while let Some(read) = reading.next().await {
            let (blocks, bytes, found) = read?;
            self.checked.blocks += blocks;
            self.checked.bytes += bytes;
            findings.extend(found);
        }
        drop(reading);
        findings.sort();
        for finding in findings {
            self.found(name, finding);
        }
        Ok(())
    }

    /// Verifies a node's copy: its record and the whole digest of every file. One that may be evicted may be gone.
    pub async fn node(
        &mut self,
        snapshots: &NodeSnapshots,
        uid: &str,
        snapshot: &str,
        node_digest: &str,
        is_last_copy: bool,
    ) {
        let name = format!("node copy of snapshot {snapshot} of actor {uid}");
        let (local, owner, id, digest) =
            (snapshots.clone(), uid.to_owned(), snapshot.to_owned(), node_digest.to_owned());
        let quick = self.quick;
        let look = move || match local.find(&owner, &id)? {
            None => Ok(false),
            Some(found) => {
                let digest = Some(digest.as_str()).filter(|digest| !digest.is_empty());
                if quick { local.verify(&found, digest) } else { local.verify_anew(&found, digest) }
                    .map(|()| true)
            }
        };
        // One that went away while it was read is not there the second time.
        let outcome = crate::blocking(move || look().or_else(|_: SnapshotError| look())).await;
        match outcome {
            Ok(true) => self.checked.snapshots += 1,
            // A cache may be evicted at any time.
            Ok(false) if !is_last_copy => {}
            Ok(false) => self.found(&name, "it is gone, and there is no durable one"),
            Err(error) => self.found(&name, error),
        }
    }
}

/// Whether an error says nothing about the snapshot itself.
fn says_nothing(error: &SnapshotError) -> bool {
    match error {
        SnapshotError::Blob(error) => error.code_and_reason().1 != "BLOB_MISSING",
        SnapshotError::Key(error) => {
            !matches!(error, super::KeyError::Mismatch { .. } | super::KeyError::NoVersion { .. })
        }
        _ => false,
    }
}
