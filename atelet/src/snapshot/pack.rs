// SPDX-License-Identifier: Apache-2.0
//! Packs: the blocks that a snapshot adds to the blob store, and the upload that writes them. The format is specified
//! in `docs/snapshot-format.md`.
//!
//! ```text
//!  files ─▶ 1 MiB stretches ─▶ [zero? · known to a parent? · read · sha256 · zstd · seal]  on all cores, in order
//!        ─▶ offsets, manifest entries ─▶ a few stretches of buffer ─▶ put (streamed as it is made)
//! ```
//!
//! The digests of blocks are those that were computed when the snapshot was recorded: what a parent has is not even
//! read. What is new is digested again as it is read, so that no block is stored that is not the recorded one. Memory
//! is bounded by the stretches in flight and the list of blocks, which does not grow with files beyond 8 GiB. The upload is idempotent: a manifest
//! that is there already ends it; each attempt has its own data key and its own pack, and an attempt that lost leaves
//! at most a pack that no manifest names. The manifest is written last: before that the snapshot does not exist (P2).
use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use tokio_stream::wrappers::ReceiverStream;

use super::digest::{Sha, data_extent, is_zero, sha256};
use super::manifest::{self, Block, Body, Header, MAX_PACKS, Manifest, Pack, Wrapped};
use super::node::NodeSnapshot;
use super::restore::Durable;
use super::{DataKey, KeyError, SnapshotError, Source};
use crate::blob::{BlobError, Key, whole};
use crate::durable;

/// Bytes of an authentication tag.
pub const TAG: usize = 16;
/// Version of packs that this build writes and reads.
const PACK_VERSION: u32 = 1;
/// Of a pack with less than one part in so many still in use, the rest is written again, to let go of it.
const LIVE_PART: u64 = 4;
/// First bytes of a pack, followed by the version (u32, little endian).
pub const MAGIC: &[u8; 8] = b"SUBPACK\0";
/// Bytes before the first block.
pub const PACK_HEADER: u64 = 12;
/// Bytes that one task works on.
const STRETCH: u64 = 1 << 20;
const LEVEL: i32 = 1;

/// Seals and opens with one data key. *ring* and not the RustCrypto crate that wraps keys, because snapshots pass
/// through it whole: its assembly is as fast in a development build as in a release.
#[derive(Clone)]
pub(crate) struct Sealer(Arc<LessSafeKey>);

/// Sealing or opening failed; there is nothing more to say (ring::error::Unspecified).
pub(crate) struct Refused;

impl Sealer {
    pub(crate) fn new(key: &DataKey) -> Result<Self, Refused> {
        let key = UnboundKey::new(&CHACHA20_POLY1305, &key.0).map_err(|_| Refused)?;
        Ok(Self(Arc::new(LessSafeKey::new(key))))
    }

    /// What is sealed under a data key: its kind (0: block, 1: manifest body) and its index. Never twice the same.
    fn nonce(kind: u32, index: u64) -> Nonce {
        let mut nonce = [0; 12];
        nonce[..4].copy_from_slice(&kind.to_le_bytes());
        nonce[4..].copy_from_slice(&index.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }

    pub(crate) fn seal(
        &self,
        kind: u32,
        index: u64,
        aad: &[u8],
        content: &mut Vec<u8>,
    ) -> Result<(), Refused> {
        self.0
            .seal_in_place_append_tag(Self::nonce(kind, index), Aad::from(aad), content)
            .map_err(|_| Refused)
    }

    pub(crate) fn open(
        &self,
        kind: u32,
        index: u64,
        aad: &[u8],
        content: &mut Vec<u8>,
    ) -> Result<(), Refused> {
        let length = self
            .0
            .open_in_place(Self::nonce(kind, index), Aad::from(aad), content)
            .map_err(|_| Refused)?
            .len();
        content.truncate(length);
        Ok(())
    }
}

/// Seals and opens the blocks of one pack.
#[derive(Clone)]
pub struct BlockCipher {
    sealer: Sealer,
    context: Vec<u8>,
}

impl BlockCipher {
    /// For the pack that a snapshot wrote.
    ///
    /// # Errors
    /// [`KeyError::Random`] if the key is not taken, which no key of 32 bytes is.
    pub fn new(key: &DataKey, actor_uid: &str, snapshot_id: &str) -> Result<Self, KeyError> {
        let context = format!("substrate pack {PACK_VERSION}\0{actor_uid}\0{snapshot_id}\0").into_bytes();
        let sealer =
            Sealer::new(key).map_err(|Refused| KeyError::Random("a data key was not taken".to_owned()))?;
        Ok(Self { sealer, context })
    }

    fn context(&self, index: u64, raw: bool) -> Vec<u8> {
        let mut context = self.context.clone();
        context.extend_from_slice(&index.to_le_bytes());
        context.push(u8::from(raw));
        context
    }

    /// Compresses (if that helps) and seals a block; says whether it is raw.
    ///
    /// # Errors
    /// Compression or sealing failed.
    pub fn seal(&self, index: u64, plain: &[u8]) -> io::Result<(Vec<u8>, bool)> {
        let mut out = Vec::with_capacity(zstd::zstd_safe::compress_bound(plain.len()) + TAG);
        out.resize(zstd::zstd_safe::compress_bound(plain.len()), 0);
        let compressed = zstd::bulk::compress_to_buffer(plain, &mut out, LEVEL)?;
        let raw = compressed >= plain.len();
        out.truncate(compressed);
        if raw {
            out.clear();
            out.extend_from_slice(plain);
        }
        self.sealer
            .seal(0, index, &self.context(index, raw), &mut out)
            .map_err(|Refused| io::Error::other("a block cannot be sealed"))?;
        Ok((out, raw))
    }

    /// Opens a block and checks its length and digest.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn open(
        &self,
        index: u64,
        raw: bool,
        stored: &[u8],
        plain_len: usize,
        digest: &[u8],
    ) -> Result<Vec<u8>, String> {
        let mut plain = stored.to_vec();
        self.sealer
            .open(0, index, &self.context(index, raw), &mut plain)
            .map_err(|Refused| "it does not open with its key".to_owned())?;
        if !raw {
            let mut out = vec![0; plain_len];
            let length = zstd::bulk::decompress_to_buffer(&plain, &mut out)
                .map_err(|error| format!("it cannot be decompressed: {error}"))?;
            out.truncate(length);
            plain = out;
        }
        if plain.len() != plain_len || sha256(&plain) != digest {
            return Err("its digest is not the manifest's".to_owned());
        }
        Ok(plain)
    }
}

/// What an upload did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uploaded {
    /// sha256 (hex) of the manifest.
    pub manifest_digest: String,
    /// Bytes of the snapshot's files.
    pub bytes: u64,
    /// Bytes written to the store by this call.
    pub stored_bytes: u64,
    /// Every pack the manifest names.
    pub packs: Vec<String>,
}

impl Uploaded {
    fn of(manifest: &Manifest, stored_bytes: u64) -> Self {
        Self {
            manifest_digest: manifest.digest.clone(),
            bytes: manifest.body.files.iter().map(|file| file.size).sum(),
            stored_bytes,
            packs: manifest.header.packs.iter().map(|pack| pack.key.clone()).collect(),
        }
    }
}

/// Where a block that a parent has is.
#[derive(Debug, Clone, Copy)]
struct Known {
    pack: u32,
    index: u64,
    offset: u64,
    stored: u32,
    raw: bool,
}

/// What became of one block.
enum Done {
    Known(u64, Known, Sha),
    New { number: u64, index: u64, raw: bool, sealed: Vec<u8>, digest: Sha },
}

impl Done {
    fn number(&self) -> u64 {
        match self {
            Self::Known(number, ..) | Self::New { number, .. } => *number,
        }
    }
}

/// The blocks that may be referenced, and the packs they are in.
#[derive(Default)]
struct Parents {
    packs: Vec<Pack>,
    blocks: HashMap<Sha, Known>,
    names: Vec<String>,
}

impl Parents {
    /// Collects what committed manifests of the same atespace hold. Of more packs than a manifest may name (with the
    /// new one), those with the fewest live bytes are left out, and so is a pack that is mostly dead: their blocks are
    /// written again, which bounds the length of chains, the number of places a restore reads from, and what a
    /// snapshot keeps in the store to a multiple of its own size.
    fn new(parents: &[Manifest], atespace: &str) -> Self {
        let parents: Vec<&Manifest> =
            parents.iter().filter(|parent| parent.header.atespace == atespace).collect();
        let mut live: HashMap<&str, (u64, &Pack)> = HashMap::new();
        for parent in &parents {
            let mut bytes = vec![0; parent.header.packs.len()];
            for block in parent.body.files.iter().flat_map(|file| &file.blocks) {
                bytes[block.pack as usize] += u64::from(block.stored);
            }
            for (pack, bytes) in parent.header.packs.iter().zip(bytes) {
                let most = &mut live.entry(&pack.key).or_insert((0, pack)).0;
                *most = bytes.max(*most);
            }
        }
        let mut kept: Vec<(u64, &Pack)> =
            live.into_values().filter(|(bytes, pack)| bytes * LIVE_PART >= pack.length).collect();
        kept.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.key.cmp(&b.1.key)));
        kept.truncate(MAX_PACKS - 1);
        let packs: Vec<Pack> = kept.into_iter().map(|(_, pack)| pack.clone()).collect();
        let mut blocks = HashMap::new();
        for parent in &parents {
            let places: Vec<Option<u32>> = (parent.header.packs.iter())
                .map(|pack| packs.iter().position(|kept| kept.key == pack.key).map(|at| at as u32))
                .collect();
            for block in parent.body.files.iter().flat_map(|file| &file.blocks) {
                if let (Some(pack), Ok(digest)) =
                    (places[block.pack as usize], Sha::try_from(block.digest.as_slice()))
                {
                    let Block { index, offset, stored, raw, .. } = *block;
                    blocks.insert(digest, Known { pack, index, offset, stored, raw });
                }
            }
        }
        let names = parents.iter().map(|parent| parent.header.snapshot_id.clone()).collect();
        Self { packs, blocks, names }
    }
}

/// A file that is cut into blocks.
struct Cut {
    name: String,
    file: fs::File,
    size: u64,
    block: u64,
    /// Index of its first block in the pack.
    first: u64,
    /// Of its blocks, as they were recorded.
    digests: Option<Vec<Sha>>,
    /// Digest of a whole block of zeros.
    zero: Sha,
}

/// What became of a stretch that could not be made.
enum Trouble {
    Io(io::Error),
    /// A block is not the one that was recorded.
    Changed(u64),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Cut {
    /// Makes some of its blocks; zero blocks and holes give none.
    fn stretch(
        &self,
        numbers: std::ops::Range<u64>,
        parents: &Parents,
        cipher: &BlockCipher,
    ) -> Result<Vec<Done>, Trouble> {
        let mut done = Vec::new();
        let mut unread = Vec::new();
        for number in numbers {
            let digest = self.digests.as_ref().map(|all| all[number as usize]);
            match (digest, digest.and_then(|digest| parents.blocks.get(&digest))) {
                (Some(digest), _) if digest == self.zero => {}
                (Some(digest), Some(known)) => done.push(Done::Known(number, *known, digest)),
                _ => unread.push((number, digest)),
            }
        }
        let (Some((first, _)), Some((last, _))) = (unread.first(), unread.last()) else { return Ok(done) };
        let (start, end) = (first * self.block, self.size.min((last + 1) * self.block));
        if self.digests.is_none() && data_extent(&self.file, start, end)?.is_none() {
            return Ok(done);
        }
        let mut content = vec![0; (end - start) as usize];
        self.file.read_exact_at(&mut content, start)?;
        for (number, recorded) in unread {
            let at = (number * self.block - start) as usize;
            let plain = &content[at..content.len().min(at + self.block as usize)];
            if recorded.is_none() && is_zero(plain) {
                continue;
            }
            let digest = sha256(plain);
            if recorded.is_some_and(|recorded| recorded != digest) {
                return Err(Trouble::Changed(number));
            }
            // The last one, when it is short.
            if is_zero(plain) {
                continue;
            }
            done.push(if let Some(known) = parents.blocks.get(&digest) {
                Done::Known(number, *known, digest)
            } else {
                let index = self.first + number;
                let (sealed, raw) = cipher.seal(index, plain)?;
                Done::New { number, index, raw, sealed, digest }
            });
        }
        done.sort_by_key(Done::number);
        Ok(done)
    }
}

impl Durable {
    /// Uploads a verified node snapshot: its pack, then its manifest.
    ///
    /// # Errors
    /// [`SnapshotError`]; what was written of the pack is removed, or left for collection when the store fails there
    /// too.
    pub async fn upload(
        &self,
        snapshot: &NodeSnapshot,
        atespace: &str,
        parents: &[Manifest],
    ) -> Result<Uploaded, SnapshotError> {
        let record = &snapshot.record;
        let manifest_key = manifest::manifest_key(&record.actor_uid, record.generation, &record.snapshot_id)?;
        if let Some(found) = self.existing(snapshot, atespace, &manifest_key).await? {
            return Ok(found);
        }
        let key = DataKey::random()?;
        let context = manifest::key_context(atespace, &record.actor_uid, &record.snapshot_id);
        let wrapped = self.keys.wrap(atespace, &context, &key).await?;
        let wrapped = Some(Wrapped { version: wrapped.version, sealed: wrapped.sealed });
        let pack_key = Key::new(format!(
            "{}/packs/{}",
            manifest::directory(&record.actor_uid, record.generation, &record.snapshot_id)?,
            uuid::Uuid::new_v4().simple()
        ))?;
        let parents = Arc::new(Parents::new(parents, atespace));
        let own = parents.packs.len() as u32;
        let (files, pack_bytes) =
            self.write_pack(snapshot, &key, Arc::clone(&parents), own, &pack_key).await?;
        let mut packs = parents.packs.clone();
        if pack_bytes > 0 {
            packs.push(Pack {
                key: pack_key.to_string(),
                actor_uid: record.actor_uid.clone(),
                snapshot_id: record.snapshot_id.clone(),
                wrapped: wrapped.clone(),
                length: pack_bytes,
            });
        }
        let mut header = Header {
            atespace: atespace.to_owned(),
            actor_uid: record.actor_uid.clone(),
            snapshot_id: record.snapshot_id.clone(),
            generation: record.generation,
            wrapped,
            packs,
        };
        let mut body = Body {
            compatibility: Some(record.compatibility.clone()),
            time_ms: record.time_ms,
            memory_bytes: record.memory_bytes,
            parents: parents.names.clone(),
            files,
        };
        drop_unused_packs(&mut header, &mut body);
        let written = async {
            let content = manifest::encode_as(record.version, &header, &body, &key)?;
            let digest = hex::encode(sha256(&content));
            let size = content.len() as u64;
            self.store.put(&manifest_key, whole(content)).await?;
            let manifest = Manifest { version: record.version, header, body, digest };
            Ok::<_, SnapshotError>(Uploaded::of(&manifest, pack_bytes + size))
        }
        .await;
        match written {
            Ok(uploaded) => Ok(uploaded),
            Err(error) => {
                if pack_bytes > 0 && !matches!(&error, SnapshotError::Blob(BlobError::Unavailable { .. })) {
                    // Certainly not named by any manifest. After a lost answer it may be.
                    self.discard(&pack_key).await;
                }
                match error {
                    SnapshotError::Blob(BlobError::Exists(_)) => self
                        .existing(snapshot, atespace, &manifest_key)
                        .await?
                        .ok_or_else(|| SnapshotError::Foreign {
                            snapshot: record.snapshot_id.clone(),
                            reason: "its manifest came and went during the upload".to_owned(),
                        }),
                    error => Err(error),
                }
            }
        }
    }

    /// The manifest of this very snapshot, if an earlier upload wrote it.
    async fn existing(
        &self,
        snapshot: &NodeSnapshot,
        atespace: &str,
        key: &Key,
    ) -> Result<Option<Uploaded>, SnapshotError> {
        let Some(manifest) = self.read_manifest(key, None, atespace, &snapshot.record.snapshot_id).await?
        else {
            return Ok(None);
        };
        if manifest.record() != snapshot.record {
            return Err(SnapshotError::Taken {
                snapshot: snapshot.record.snapshot_id.clone(),
                found: format!("other content under {key} in the blob store"),
            });
        }
        Ok(Some(Uploaded::of(&manifest, 0)))
    }

    async fn discard(&self, key: &Key) {
        if let Err(error) = self.store.delete(key).await {
            tracing::warn!(%key, %error, "a pack that nothing names stays behind until it is collected");
        }
    }

    /// Streams all blocks that no parent has into one pack. Answers the files with their blocks and the pack's size
    /// in bytes, 0 when there was nothing to write.
    async fn write_pack(
        &self,
        snapshot: &NodeSnapshot,
        key: &DataKey,
        parents: Arc<Parents>,
        own: u32,
        pack_key: &Key,
    ) -> Result<(Vec<manifest::File>, u64), SnapshotError> {
        let record = &snapshot.record;
        let (sender, mut receiver) = tokio::sync::mpsc::channel::<io::Result<Bytes>>(4);
        let blocks_out = sender.clone();
        let put = async {
            // A pack begins with its first block: a snapshot that is all references has none.
            let Some(first) = receiver.recv().await else { return Ok(0) };
            let content = futures::stream::once(async { first }).chain(ReceiverStream::new(receiver));
            self.store.put(pack_key, content.boxed()).await
        };
        let cipher = BlockCipher::new(key, &record.actor_uid, &record.snapshot_id)?;
        let failed = |error: io::Error| SnapshotError::io(&record.snapshot_id)(error);
        let blocks = async move {
            let mut files = Vec::new();
            let mut offset = PACK_HEADER;
            let mut first = 0;
            let mut begun = false;
            for (file, digests) in record.files.iter().zip(snapshot.block_digests()) {
                let block_size = if file.block > 0 { file.block } else { file.kind.block_size(file.size) };
                let block = u64::from(block_size);
                let path = snapshot.path(file);
                let cut = Arc::new(Cut {
                    name: file.name.clone(),
                    file: fs::File::open(&path).map_err(durable::at("open", &path)).map_err(failed)?,
                    size: file.size,
                    block,
                    first,
                    digests,
                    zero: sha256(&vec![0; block as usize]),
                });
                let count = file.size.div_ceil(block);
                first += count;
                let mut blocks = Vec::new();
                let at_once = (STRETCH / block).max(1);
                let stretches = (0..count).step_by(at_once as usize).map(|start| {
                    let numbers = start..count.min(start + at_once);
                    let (cut, parents, cipher) = (Arc::clone(&cut), Arc::clone(&parents), cipher.clone());
                    async move {
                        let made = tokio::task::spawn_blocking(move || {
                            let made = cut.stretch(numbers, &parents, &cipher);
                            made.map_err(|trouble| (trouble, cut.name.clone()))
                        });
                        match made.await {
                            Ok(made) => made.map_err(|(trouble, name)| match trouble {
                                Trouble::Io(error) => failed(error),
                                Trouble::Changed(number) => SnapshotError::Corrupt {
                                    snapshot: record.snapshot_id.clone(),
                                    file: name,
                                    reason: format!("block {number} is not the one that was recorded"),
                                    from: Source::Node,
                                },
                            }),
                            Err(error) => Err(failed(io::Error::other(error))),
                        }
                    }
                });
                let mut made = futures::stream::iter(stretches).buffered(self.threads + 1);
                while let Some(done) = made.try_next().await? {
                    let mut content = Vec::new();
                    if !begun && done.iter().any(|done| matches!(done, Done::New { .. })) {
                        begun = true;
                        content.extend_from_slice(MAGIC);
                        content.extend_from_slice(&PACK_VERSION.to_le_bytes());
                    }
                    for block in done {
                        blocks.push(match block {
                            Done::Known(number, known, digest) => Block {
                                number,
                                pack: known.pack,
                                index: known.index,
                                offset: known.offset,
                                stored: known.stored,
                                raw: known.raw,
                                digest: digest.to_vec(),
                            },
                            Done::New { number, index, raw, sealed, digest } => {
                                let stored = sealed.len() as u32;
                                let block = Block {
                                    number,
                                    pack: own,
                                    index,
                                    offset,
                                    stored,
                                    raw,
                                    digest: digest.to_vec(),
                                };
                                offset += u64::from(stored);
                                content.extend_from_slice(&sealed);
                                block
                            }
                        });
                    }
                    if !content.is_empty() && blocks_out.send(Ok(content.into())).await.is_err() {
                        // The put has ended with an error of its own.
                        return Err(failed(io::Error::other("the blob store gave up")));
                    }
                }
                files.push(manifest::File {
                    name: file.name.clone(),
                    kind: manifest::File::kind_number(file.kind),
                    size: file.size,
                    digest: hex::decode(&file.digest).unwrap_or_default(),
                    block_size,
                    blocks,
                });
            }
            Ok((files, if begun { offset } else { 0 }))
        };
        let make = async move {
            let made: Result<_, SnapshotError> = blocks.await;
            if let Err(error) = &made {
                // Ends the put: without it a truncated pack would be taken for a whole one.
                let _ = sender.send(Err(io::Error::other(error.to_string()))).await;
            }
            drop(sender);
            made
        };
        let (put, made) = tokio::join!(put, make);
        let written = match (put, made) {
            (Ok(size), Ok((files, expected))) if size == expected => return Ok((files, size)),
            (Ok(size), Ok((_, expected))) => Err(SnapshotError::Corrupt {
                snapshot: record.snapshot_id.clone(),
                file: "pack".to_owned(),
                reason: format!("the store took {size} of {expected} bytes"),
                from: Source::Durable,
            }),
            // Ours comes back by the put.
            (Err(BlobError::Source { .. }) | Ok(_), Err(error)) => Err(error),
            (Err(error), _) => Err(error.into()),
        };
        self.discard(pack_key).await;
        written
    }
}

/// Leaves out packs that no block is in, so that they can be deleted with their snapshots.
fn drop_unused_packs(header: &mut Header, body: &mut Body) {
    let mut used = vec![false; header.packs.len()];
    for block in body.files.iter().flat_map(|file| &file.blocks) {
        used[block.pack as usize] = true;
    }
    let mut next = 0;
    let places: Vec<u32> = used
        .iter()
        .map(|used| {
            let place = next;
            next += u32::from(*used);
            place
        })
        .collect();
    for block in body.files.iter_mut().flat_map(|file| &mut file.blocks) {
        block.pack = places[block.pack as usize];
    }
    let mut used = used.into_iter();
    header.packs.retain(|_| used.next().unwrap_or(false));
}
