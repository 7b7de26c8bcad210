// SPDX-License-Identifier: Apache-2.0
//! Where durable snapshots live, behind one small trait.
//!
//! Specification, checked for every implementation by the [`conformance`] suite:
//! * An object is immutable: [`BlobStore::put`] creates it if it is absent and never replaces it.
//! * It appears whole or not at all, and OK means durable: a put whose stream fails, or that runs out of space, or
//!   whose process dies, leaves no object.
//! * Keys are paths of plain components ([`Key`]); they carry the actor's uid and generation:
//!   `actors/<uid>/<generation>-<snapshot id>/manifest` and `…/packs/<random>`.
//! * A listing may lag behind; nothing but collection and a look-up without generation rests on one.
//!
//! [`open`] opens what a [`BlobUrl`] names: a directory ([`LocalStore`]) or a bucket ([`S3Store`]).
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use tonic::Code;

#[cfg(test)]
mod conformance;
pub mod fault;
mod local;
mod s3;
#[cfg(test)]
mod s3_server;
#[cfg(test)]
mod s3_tests;
mod url;

pub use local::LocalStore;
pub use s3::S3Store;
pub use url::{BlobUrl, S3Url};

/// Content on its way into the store. An error in it ends the put.
pub type ByteStream = BoxStream<'static, std::io::Result<Bytes>>;

/// Longest key in bytes (S3's limit).
const MAX_KEY: usize = 1024;

/// Name of an object: components of `A-Z a-z 0-9 . _ -`, not beginning with a dot, joined by `/`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(String);

impl Key {
    /// Checks a key.
    ///
    /// # Errors
    /// [`BlobError::BadKey`].
    pub fn new(key: impl Into<String>) -> Result<Self, BlobError> {
        let key = key.into();
        let plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        };
        if key.len() > MAX_KEY || !key.split('/').all(plain) {
            return Err(BlobError::BadKey(key.chars().take(80).collect()));
        }
        Ok(Self(key))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An object in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub key: Key,
    /// Bytes.
    pub size: u64,
    /// When it was written, by the store's clock.
    pub written: SystemTime,
}

/// What went wrong with a blob store.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// Not a key.
    #[error(
        "{0:?} is not a key of a blob store: components of letters, digits, '.', '_' and '-' joined by '/'"
    )]
    BadKey(String),
    /// The object is there already.
    #[error("{0} exists in the blob store already")]
    Exists(Key),
    /// There is no such object.
    #[error("{key} is not in the blob store {store}")]
    NotFound {
        /// Which.
        key: Key,
        /// Where.
        store: String,
    },
    /// The range is not inside the object.
    #[error("{key} in the blob store has {size} bytes, {range:?} were asked for: it is truncated")]
    OutOfRange {
        /// Which.
        key: Key,
        /// Its size.
        size: u64,
        /// Asked for.
        range: Range<u64>,
    },
    /// The store is full.
    #[error("the blob store {store} is full while writing {key}: free space there; nothing of it was kept")]
    Full {
        /// Which.
        key: Key,
        /// Where.
        store: String,
    },
    /// What was to be written could not be read or made.
    #[error("what was to be written to {key} failed: {source}")]
    Source {
        /// Which.
        key: Key,
        /// Why.
        source: std::io::Error,
    },
    /// Nothing can be kept there, now or later: it is set up wrongly.
    #[error("the blob store {store} cannot be used: {reason}")]
    Unusable {
        /// Where.
        store: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// Not the name of a blob store.
    #[error(
        "{url:?} names no blob store ({reason}): write /absolute/path, file:/absolute/path or \
         s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME&path_style=true]"
    )]
    BadUrl {
        /// As given, shortened.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// The store cannot be reached or failed.
    #[error("the blob store {store} failed for {key}: {source}")]
    Unavailable {
        /// Which object or prefix.
        key: String,
        /// Where.
        store: String,
        /// Why.
        source: std::io::Error,
    },
}

impl BlobError {
    pub(crate) fn code_and_reason(&self) -> (Code, &'static str) {
        match self {
            Self::BadKey(_) => (Code::InvalidArgument, "BLOB_KEY"),
            Self::Exists(_) => (Code::AlreadyExists, "BLOB_EXISTS"),
            Self::NotFound { .. } | Self::OutOfRange { .. } => (Code::DataLoss, "BLOB_MISSING"),
            Self::Full { .. } => (Code::ResourceExhausted, "STORE_FULL"),
            Self::Source { .. } => (Code::Internal, "BLOB_SOURCE"),
            Self::Unavailable { .. } => (Code::Unavailable, "STORE_UNAVAILABLE"),
            Self::Unusable { .. } | Self::BadUrl { .. } => (Code::FailedPrecondition, "STORE_UNUSABLE"),
        }
    }
}

/// A store of immutable objects.
#[async_trait]
pub trait BlobStore: Send + Sync + fmt::Debug {
    /// Where it is, for messages; no credentials.
    fn location(&self) -> String;

    /// Writes an object if there is none of this key, and returns its size in bytes. OK means durable.
    ///
    /// # Errors
    /// [`BlobError::Exists`], [`BlobError::Full`], [`BlobError::Source`], [`BlobError::Unavailable`]; nothing is left.
    async fn put(&self, key: &Key, content: ByteStream) -> Result<u64, BlobError>;

    /// Reads exactly a range.
    ///
    /// # Errors
    /// [`BlobError::NotFound`], [`BlobError::OutOfRange`], [`BlobError::Unavailable`].
    async fn get(&self, key: &Key, range: Range<u64>) -> Result<Bytes, BlobError>;

    /// Size of an object in bytes, `None` when there is none.
    ///
    /// # Errors
    /// [`BlobError::Unavailable`].
    async fn head(&self, key: &Key) -> Result<Option<u64>, BlobError>;

    /// Deletes an object; one that is not there is no error.
    ///
    /// # Errors
    /// [`BlobError::Unavailable`].
    async fn delete(&self, key: &Key) -> Result<(), BlobError>;

    /// Objects below a directory (`actors/<uid>`), sorted by key.
    ///
    /// # Errors
    /// [`BlobError::Unavailable`].
    async fn list(&self, directory: &Key) -> Result<Vec<Listed>, BlobError>;

    /// Proves that the store keeps the promises above, as far as a few small requests can.
    ///
    /// # Errors
    /// [`BlobError::Unusable`] when it is set up wrongly, [`BlobError::Unavailable`] when it cannot be asked.
    async fn check(&self) -> Result<(), BlobError>;

    /// Ends puts that were begun this long ago and whose writer is gone; their bytes are in no listing. Answers how
    /// many there are; `dry_run` only counts.
    ///
    /// # Errors
    /// [`BlobError::Unavailable`].
    async fn abandon(&self, older_than: Duration, dry_run: bool) -> Result<u64, BlobError>;
}

/// Opens what a URL names. `exclusive`: no other process has it open, and what a killed one left half-written goes.
///
/// # Errors
/// [`BlobError::Unavailable`], [`BlobError::Unusable`].
pub async fn open(url: &BlobUrl, exclusive: bool) -> Result<Arc<dyn BlobStore>, BlobError> {
    Ok(match url {
        BlobUrl::Local(path) if exclusive => {
            let path = path.clone();
            Arc::new(crate::blocking(move || LocalStore::open(&path)).await?)
        }
        BlobUrl::Local(path) => Arc::new(LocalStore::beside(path)?),
        BlobUrl::S3(url) => Arc::new(S3Store::open(url).await),
    })
}

/// A stream of one piece.
pub fn whole(content: impl Into<Bytes>) -> ByteStream {
    Box::pin(futures::stream::once(std::future::ready(Ok(content.into()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_leave_their_store_are_refused() {
        for good in ["a", "actors/u-1/3-s.x/manifest"] {
            assert!(Key::new(good).is_ok(), "{good}");
        }
        for bad in ["", "/", "/a", "a/", "a//b", "..", "a/../b", ".hidden", "a/.tmp", "a b", "a\0", "é"] {
            assert!(Key::new(bad).is_err(), "{bad}");
        }
        assert!(Key::new("x".repeat(MAX_KEY + 1)).is_err());
    }
}
