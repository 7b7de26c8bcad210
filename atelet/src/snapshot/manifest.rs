// SPDX-License-Identifier: Apache-2.0
//! Manifests: which blocks of which packs make a snapshot. The format is specified in `docs/snapshot-format.md`.
//!
//! ```text
//! "SUBMANIF" | version u32 | header length u32 | header (protobuf) | body (protobuf, zstd, sealed)
//! ```
//!
//! The header is readable without keys, for collection and checks: whose snapshot it is, which packs it names, the
//! wrapped data keys. The body (file names, digests of plain blocks) is sealed with the snapshot's data key, the header
//! being authenticated with it. A manifest is used only when the sha256 of all of it is what the control plane passes.
//!
//! One meaning has one encoding: what is read is encoded again and must be equal, so unknown fields and other
//! spellings are refused; any addition to the messages is a new version.
use std::collections::BTreeSet;
use std::io::Read as _;

use prost::Message;
use substrate_proto::types::Compatibility;

use super::digest::sha256;
use super::pack::{Sealer, TAG};
use super::record::{RECORD_VERSION, Record, RecordFile};
use super::{DataKey, FileKind, MAX_BLOCK, MIN_BLOCK, SnapshotError, Source, WrappedKey, check_name};
use crate::blob::Key;

/// Version of manifests that this build writes; it reads all up to it. A manifest of version 2 holds a record of
/// version 2 (the digest of a file is over the blocks of the manifest), one of version 1 a record of version 1.
pub const FORMAT_VERSION: u32 = RECORD_VERSION;
/// Largest manifest that is read, bytes.
pub const MAX_MANIFEST: u64 = 256 << 20;
/// Packs that one manifest may name.
pub const MAX_PACKS: usize = 8;
const MAGIC: &[u8; 8] = b"SUBMANIF";
const MAX_FILES: usize = 4096;
const MAX_BODY: u64 = 1 << 30;

/// A data key as it is stored.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Wrapped {
    /// Version of the atespace's key.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Nonce and sealed key.
    #[prost(bytes = "vec", tag = "2")]
    pub sealed: Vec<u8>,
}

impl Wrapped {
    /// For [`super::KeyStore::unwrap`].
    pub fn to_key(&self) -> WrappedKey {
        WrappedKey { version: self.version, sealed: self.sealed.clone() }
    }
}

/// A pack that holds blocks of the snapshot.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Pack {
    /// In the blob store.
    #[prost(string, tag = "1")]
    pub key: String,
    /// Of the snapshot that wrote it.
    #[prost(string, tag = "2")]
    pub actor_uid: String,
    /// Likewise.
    #[prost(string, tag = "3")]
    pub snapshot_id: String,
    /// Its data key.
    #[prost(message, optional, tag = "4")]
    pub wrapped: Option<Wrapped>,
    /// Bytes.
    #[prost(uint64, tag = "5")]
    pub length: u64,
}

/// The part that is readable without keys.
#[derive(Clone, PartialEq, Message)]
pub struct Header {
    /// Whose keys wrap the data keys.
    #[prost(string, tag = "1")]
    pub atespace: String,
    /// Whose snapshot.
    #[prost(string, tag = "2")]
    pub actor_uid: String,
    /// Its id.
    #[prost(string, tag = "3")]
    pub snapshot_id: String,
    /// Of the assignment that made it.
    #[prost(uint64, tag = "4")]
    pub generation: u64,
    /// The snapshot's data key, which seals the body and its own pack.
    #[prost(message, optional, tag = "5")]
    pub wrapped: Option<Wrapped>,
    /// Every pack that the body names.
    #[prost(message, repeated, tag = "6")]
    pub packs: Vec<Pack>,
}

/// One block that is not all zeros.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Block {
    /// Position in the file, in blocks.
    #[prost(uint64, tag = "1")]
    pub number: u64,
    /// Index into the header's packs.
    #[prost(uint32, tag = "2")]
    pub pack: u32,
    /// The block's index in its pack: its nonce.
    #[prost(uint64, tag = "3")]
    pub index: u64,
    /// Where it begins in the pack, bytes.
    #[prost(uint64, tag = "4")]
    pub offset: u64,
    /// Bytes in the pack, with the tag.
    #[prost(uint32, tag = "5")]
    pub stored: u32,
    /// Not compressed.
    #[prost(bool, tag = "6")]
    pub raw: bool,
    /// SHA-256 of the plain block.
    #[prost(bytes = "vec", tag = "7")]
    pub digest: Vec<u8>,
}

/// One file.
#[derive(Clone, PartialEq, Message)]
pub struct File {
    /// Plain name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// 0 state, 1 memory, 2 volume.
    #[prost(uint32, tag = "2")]
    pub kind: u32,
    /// Bytes.
    #[prost(uint64, tag = "3")]
    pub size: u64,
    /// Of the whole file, see [`super::digest`].
    #[prost(bytes = "vec", tag = "4")]
    pub digest: Vec<u8>,
    /// Bytes; the last block may be shorter.
    #[prost(uint32, tag = "5")]
    pub block_size: u32,
    /// Sorted by number; what is not named is zeros.
    #[prost(message, repeated, tag = "6")]
    pub blocks: Vec<Block>,
}

impl File {
    /// What it holds; decoding has checked the number.
    pub fn file_kind(&self) -> FileKind {
        match self.kind {
            1 => FileKind::Memory,
            2 => FileKind::Volume,
            _ => FileKind::State,
        }
    }

    /// The number of a kind.
    pub fn kind_number(kind: FileKind) -> u32 {
        match kind {
            FileKind::State => 0,
            FileKind::Memory => 1,
            FileKind::Volume => 2,
        }
    }

    /// Plain bytes of a block of this file.
    pub fn plain_len(&self, number: u64) -> u32 {
        let start = number * u64::from(self.block_size);
        u64::from(self.block_size).min(self.size.saturating_sub(start)) as u32
    }
}

/// The part that is sealed.
#[derive(Clone, PartialEq, Message)]
pub struct Body {
    /// What a restore needs.
    #[prost(message, optional, tag = "1")]
    pub compatibility: Option<Compatibility>,
    /// When the memory was captured, Unix ms.
    #[prost(int64, tag = "2")]
    pub time_ms: i64,
    /// Bytes the actor held in memory.
    #[prost(uint64, tag = "3")]
    pub memory_bytes: u64,
    /// Snapshots whose blocks were offered for reference, for people.
    #[prost(string, repeated, tag = "4")]
    pub parents: Vec<String>,
    /// The files.
    #[prost(message, repeated, tag = "5")]
    pub files: Vec<File>,
}

/// A manifest that was read, verified and opened.
#[derive(Debug, Clone)]
pub struct Manifest {
    /// Of the format.
    pub version: u32,
    /// Readable part.
    pub header: Header,
    /// Sealed part.
    pub body: Body,
    /// sha256 (hex) of the whole.
    pub digest: String,
}

impl Manifest {
    /// The record of a node snapshot with this content.
    pub fn record(&self) -> Record {
        Record {
            version: self.version,
            snapshot_id: self.header.snapshot_id.clone(),
            actor_uid: self.header.actor_uid.clone(),
            generation: self.header.generation,
            time_ms: self.body.time_ms,
            memory_bytes: self.body.memory_bytes,
            compatibility: self.body.compatibility.clone().unwrap_or_default(),
            files: self
                .body
                .files
                .iter()
                .map(|file| RecordFile {
                    name: file.name.clone(),
                    kind: file.file_kind(),
                    size: file.size,
                    block: if self.version == 1 { 0 } else { file.block_size },
                    digest: hex::encode(&file.digest),
                })
                .collect(),
        }
    }
}

/// Directory of a snapshot in the blob store.
pub fn directory(actor_uid: &str, generation: u64, snapshot_id: &str) -> Result<String, SnapshotError> {
    check_name("actor uid", actor_uid)?;
    check_name("snapshot id", snapshot_id)?;
    Ok(format!("actors/{actor_uid}/{generation}-{snapshot_id}"))
}

/// Key of a snapshot's manifest.
///
/// # Errors
/// [`SnapshotError::BadName`].
pub fn manifest_key(actor_uid: &str, generation: u64, snapshot_id: &str) -> Result<Key, SnapshotError> {
    Ok(Key::new(format!("{}/manifest", directory(actor_uid, generation, snapshot_id)?))?)
}

/// What a data key is wrapped for.
pub fn key_context(atespace: &str, actor_uid: &str, snapshot_id: &str) -> String {
    format!("substrate snapshot 1\0{atespace}\0{actor_uid}\0{snapshot_id}")
}

/// Encodes and seals a manifest of the newest version.
///
/// # Errors
/// [`SnapshotError::TooLarge`].
pub fn encode(header: &Header, body: &Body, key: &DataKey) -> Result<Vec<u8>, SnapshotError> {
    encode_as(FORMAT_VERSION, header, body, key)
}

/// Encodes and seals a manifest of the version of the record that it holds.
pub(crate) fn encode_as(
    version: u32,
    header: &Header,
    body: &Body,
    key: &DataKey,
) -> Result<Vec<u8>, SnapshotError> {
    let too_large = |reason: String| SnapshotError::TooLarge { snapshot: header.snapshot_id.clone(), reason };
    let head = header.encode_to_vec();
    let mut out = Vec::with_capacity(head.len() + 16);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&version.to_le_bytes());
    out.extend_from_slice(&(head.len() as u32).to_le_bytes());
    out.extend_from_slice(&head);
    let plain =
        zstd::bulk::compress(&body.encode_to_vec(), 3).map_err(|error| too_large(error.to_string()))?;
    let mut sealed = plain;
    Sealer::new(key)
        .and_then(|sealer| sealer.seal(1, 0, &out, &mut sealed))
        .map_err(|_| too_large("its manifest cannot be sealed".to_owned()))?;
    out.extend_from_slice(&sealed);
    if out.len() as u64 > MAX_MANIFEST {
        return Err(too_large(format!(
            "its manifest would have {} bytes, at most {MAX_MANIFEST}",
            out.len()
        )));
    }
    Ok(out)
}

/// A manifest whose body is still sealed.
#[derive(Debug)]
pub struct Sealed<'a> {
    version: u32,
    /// Readable part.
    pub header: Header,
    authenticated: &'a [u8],
    body: &'a [u8],
    digest: String,
}

fn corrupt(snapshot: &str, reason: impl Into<String>) -> SnapshotError {
    SnapshotError::Corrupt {
        snapshot: snapshot.to_owned(),
        file: "manifest".to_owned(),
        reason: reason.into(),
        from: Source::Durable,
    }
}

/// Reads the readable part. `digest`, if given, must be the sha256 (hex) of all of it. `name` is for messages.
///
/// # Errors
/// [`SnapshotError::Corrupt`], [`SnapshotError::Version`].
pub fn read<'a>(content: &'a [u8], digest: Option<&str>, name: &str) -> Result<Sealed<'a>, SnapshotError> {
    let found = hex::encode(sha256(content));
    if let Some(expected) = digest.filter(|expected| *expected != found) {
        return Err(corrupt(name, format!("its digest is {found}, expected is {expected}")));
    }
    let short = || corrupt(name, "it is too short");
    let rest = content.strip_prefix(MAGIC).ok_or_else(|| corrupt(name, "it does not begin as one"))?;
    let (version, rest) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    let version = u32::from_le_bytes(*version);
    if !(1..=FORMAT_VERSION).contains(&version) {
        return Err(SnapshotError::Version {
            snapshot: name.to_owned(),
            found: version,
            known: FORMAT_VERSION,
        });
    }
    let (length, rest) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    let (head, body) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(short)?;
    let header = Header::decode(head).map_err(|error| corrupt(name, error.to_string()))?;
    if header.encode_to_vec() != head {
        return Err(corrupt(name, "its header is not in the canonical form"));
    }
    check_header(&header).map_err(|reason| corrupt(name, reason))?;
    Ok(Sealed { version, header, authenticated: &content[..content.len() - body.len()], body, digest: found })
}

impl Sealed<'_> {
    /// Opens the body with the snapshot's data key and checks all of it.
    ///
    /// # Errors
    /// [`SnapshotError::Corrupt`].
    pub fn open(self, key: &DataKey) -> Result<Manifest, SnapshotError> {
        let name = self.header.snapshot_id.clone();
        let mut plain = self.body.to_vec();
        Sealer::new(key)
            .and_then(|sealer| sealer.open(1, 0, self.authenticated, &mut plain))
            .map_err(|_| corrupt(&name, "its body does not open with its key"))?;
        let mut encoded = Vec::new();
        zstd::stream::read::Decoder::new(plain.as_slice())
            .and_then(|decoder| decoder.take(MAX_BODY + 1).read_to_end(&mut encoded))
            .map_err(|error| corrupt(&name, format!("its body cannot be decompressed: {error}")))?;
        if encoded.len() as u64 > MAX_BODY {
            return Err(corrupt(&name, "its body is too large"));
        }
        let body = Body::decode(encoded.as_slice()).map_err(|error| corrupt(&name, error.to_string()))?;
        if body.encode_to_vec() != encoded {
            return Err(corrupt(&name, "its body is not in the canonical form"));
        }
        check_body(&self.header, &body).map_err(|reason| corrupt(&name, reason))?;
        Ok(Manifest { version: self.version, header: self.header, body, digest: self.digest })
    }
}

fn check_header(header: &Header) -> Result<(), String> {
    for (what, value) in [("actor uid", &header.actor_uid), ("snapshot id", &header.snapshot_id)] {
        check_name(what, value).map_err(|error| error.to_string())?;
    }
    if header.wrapped.is_none() {
        return Err("it has no data key".to_owned());
    }
    if header.packs.len() > MAX_PACKS {
        return Err(format!("it names {} packs, at most {MAX_PACKS}", header.packs.len()));
    }
    let mut keys = BTreeSet::new();
    for pack in &header.packs {
        Key::new(pack.key.as_str()).map_err(|error| error.to_string())?;
        if !keys.insert(&pack.key) || pack.wrapped.is_none() {
            return Err(format!("pack {} is named twice or has no key", pack.key));
        }
    }
    Ok(())
}

fn check_body(header: &Header, body: &Body) -> Result<(), String> {
    if body.files.len() > MAX_FILES {
        return Err(format!("it has {} files, at most {MAX_FILES}", body.files.len()));
    }
    let mut names = BTreeSet::new();
    for file in &body.files {
        check_name("file", &file.name).map_err(|error| error.to_string())?;
        if file.kind > 2 || !names.insert((file.file_kind().directory(), &file.name)) {
            return Err(format!("file {} is of unknown kind or named twice", file.name));
        }
        if !file.block_size.is_power_of_two() || !(MIN_BLOCK..=MAX_BLOCK).contains(&file.block_size) {
            return Err(format!("file {} has blocks of {} bytes", file.name, file.block_size));
        }
        if file.size > 1 << 46 || file.digest.len() != 32 {
            return Err(format!("file {} has {} bytes or no digest", file.name, file.size));
        }
        let count = file.size.div_ceil(u64::from(file.block_size));
        let mut next = 0;
        for block in &file.blocks {
            let at = || format!("block {} of {}", block.number, file.name);
            if block.number < next || block.number >= count {
                return Err(format!("{} is out of order or beyond the end", at()));
            }
            next = block.number + 1;
            let pack = header.packs.get(block.pack as usize);
            let inside = pack.is_some_and(|pack| {
                block.offset.checked_add(u64::from(block.stored)).is_some_and(|end| end <= pack.length)
            });
            if !inside || block.digest.len() != 32 {
                return Err(format!("{} is not inside a pack or has no digest", at()));
            }
            // What is not smaller is stored raw, so nothing is ever larger than plain and tag.
            let most = file.plain_len(block.number) + TAG as u32;
            if block.stored > most || (block.raw && block.stored != most) || block.stored <= TAG as u32 {
                return Err(format!("{} has {} stored bytes", at(), block.stored));
            }
        }
    }
    Ok(())
}
