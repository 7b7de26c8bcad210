// SPDX-License-Identifier: Apache-2.0
//! A blob store that fails on purpose; for tests of everything that must stand a bad store.
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;

use super::{BlobError, BlobStore, ByteStream, Key, Listed};

/// What a faulty store does next.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// This many operations of a kind ("put", "get", "head", "delete", "list") fail before one succeeds.
    pub fail: BTreeMap<&'static str, u32>,
    /// The next put's content ends with an error after this many bytes.
    pub cut_put_after: Option<u64>,
    /// The next put succeeds, but its answer is lost.
    pub lose_put_answer: bool,
    /// The next read of an object answers one byte less than asked.
    pub short_get: bool,
    /// The next read has this byte flipped.
    pub flip_get: Option<usize>,
    /// Listings do not show what was put since.
    pub stale_list: bool,
    /// Every operation, and every piece of a put's content, takes this much longer.
    pub slow: Duration,
}

/// Wraps a store and injects [`Faults`].
#[derive(Debug)]
pub struct FaultStore<S> {
    inner: S,
    faults: Mutex<Faults>,
    hidden: Mutex<Vec<Key>>,
}

impl<S: BlobStore> FaultStore<S> {
    /// Without faults at first.
    pub fn new(inner: S) -> Self {
        Self { inner, faults: Mutex::default(), hidden: Mutex::default() }
    }

    /// Replaces the faults to come.
    pub fn set(&self, faults: Faults) {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner) = faults;
    }

    /// The store behind.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    fn with<T>(&self, change: impl FnOnce(&mut Faults) -> T) -> T {
        change(&mut self.faults.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn unavailable(&self, key: &Key) -> BlobError {
        BlobError::Unavailable {
            key: key.to_string(),
            store: self.location(),
            source: io::Error::new(io::ErrorKind::ConnectionReset, "injected fault"),
        }
    }

    async fn fails(&self, operation: &'static str, key: &Key) -> Result<(), BlobError> {
        tokio::time::sleep(self.with(|faults| faults.slow)).await;
        let fails = self.with(|faults| match faults.fail.get_mut(operation) {
            Some(left) if *left > 0 => {
                *left -= 1;
                true
            }
            _ => false,
        });
        if fails { Err(self.unavailable(key)) } else { Ok(()) }
    }
}

#[async_trait]
impl<S: BlobStore> BlobStore for FaultStore<S> {
    fn location(&self) -> String {
        format!("{} with faults", self.inner.location())
    }

    async fn put(&self, key: &Key, content: ByteStream) -> Result<u64, BlobError> {
        self.fails("put", key).await?;
        let content = match self.with(|faults| faults.cut_put_after.take()) {
            None => content,
            Some(limit) => {
                let mut seen = 0;
                content
                    .map(move |piece| {
                        let piece = piece?;
                        seen += piece.len() as u64;
                        if seen > limit {
                            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "injected fault"));
                        }
                        Ok(piece)
                    })
                    .boxed()
            }
        };
        let slow = self.with(|faults| faults.slow);
        let content = content.then(move |piece| async move {
            tokio::time::sleep(slow).await;
            piece
        });
        let size = self.inner.put(key, content.boxed()).await?;
        if self.with(|faults| faults.stale_list) {
            self.hidden.lock().unwrap_or_else(PoisonError::into_inner).push(key.clone());
        }
        if self.with(|faults| std::mem::take(&mut faults.lose_put_answer)) {
            return Err(self.unavailable(key));
        }
        Ok(size)
    }

    async fn get(&self, key: &Key, range: Range<u64>) -> Result<Bytes, BlobError> {
        self.fails("get", key).await?;
        let mut content = self.inner.get(key, range).await?;
        if self.with(|faults| std::mem::take(&mut faults.short_get)) {
            content.truncate(content.len().saturating_sub(1));
        }
        if let Some(at) = self.with(|faults| faults.flip_get.take()) {
            let mut changed = content.to_vec();
            if let Some(byte) = changed.get_mut(at) {
                *byte ^= 1;
            }
            content = changed.into();
        }
        Ok(content)
    }

    async fn head(&self, key: &Key) -> Result<Option<u64>, BlobError> {
        self.fails("head", key).await?;
        self.inner.head(key).await
    }

    async fn delete(&self, key: &Key) -> Result<(), BlobError> {
        self.fails("delete", key).await?;
        self.inner.delete(key).await
    }

    async fn list(&self, directory: &Key) -> Result<Vec<Listed>, BlobError> {
        self.fails("list", directory).await?;
        let mut listed = self.inner.list(directory).await?;
        let hidden = self.hidden.lock().unwrap_or_else(PoisonError::into_inner);
        if self.with(|faults| faults.stale_list) {
            listed.retain(|listed| !hidden.contains(&listed.key));
        }
        Ok(listed)
    }

    async fn check(&self) -> Result<(), BlobError> {
        self.inner.check().await
    }

    async fn abandon(&self, older_than: Duration, dry_run: bool) -> Result<u64, BlobError> {
        self.inner.abandon(older_than, dry_run).await
    }
}
