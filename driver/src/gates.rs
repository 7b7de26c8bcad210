// SPDX-License-Identifier: Apache-2.0
//! Keyed locks: who may touch what at the same time within this driver.
//!
//! * a sandbox's *creation* is exclusive with its rollback and its deletion;
//! * a sandbox's *stops and starts* are exclusive with each other (a deletion waits for neither);
//! * writes of an actor's *annotations* take turns;
//! * a template or atespace is *held* by the creates that are about to use it and *reaped* only when nobody holds it.
//!
//! A task takes them in the order creation, atespace, template, so no two wait for each other.
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

/// What a lock is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Key {
    /// Making or unmaking the sandbox of that uid.
    Creation(String),
    /// Stopping and starting the sandbox of that uid.
    Lifecycle(String),
    /// Reading and then writing the annotations of the actor of that uid.
    Annotations(String),
    /// An atespace.
    Atespace(String),
    /// A template: atespace and name.
    Template(String, String),
}

/// All locks; a lock exists while somebody has or wants it.
#[derive(Debug, Default)]
pub struct Gates {
    locks: Mutex<HashMap<Key, Weak<RwLock<()>>>>,
}

/// Shared possession.
pub type Hold = OwnedRwLockReadGuard<()>;
/// Exclusive possession.
pub type Own = OwnedRwLockWriteGuard<()>;

impl Gates {
    fn lock(&self, key: Key) -> Arc<RwLock<()>> {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        if locks.len() > 64 && locks.len().is_power_of_two() {
            locks.retain(|_, lock| lock.strong_count() > 0);
        }
        if let Some(lock) = locks.get(&key).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(RwLock::new(()));
        locks.insert(key, Arc::downgrade(&lock));
        lock
    }

    /// Holds it together with others.
    pub async fn hold(&self, key: Key) -> Hold {
        self.lock(key).read_owned().await
    }

    /// Has it alone.
    pub async fn own(&self, key: Key) -> Own {
        self.lock(key).write_owned().await
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn holders_share_and_an_owner_waits_for_them() {
        let gates = Gates::default();
        let key = || Key::Template("a".to_owned(), "t".to_owned());
        let first = gates.hold(key()).await;
        let second = gates.hold(key()).await;
        let mut own = Box::pin(gates.own(key()));
        assert!((&mut own).now_or_never().is_none());
        drop((first, second));
        drop(own.await);
        assert!(gates.own(Key::Atespace("a".to_owned())).now_or_never().is_some());
    }

    #[tokio::test]
    async fn locks_of_the_past_are_forgotten() {
        let gates = Gates::default();
        for index in 0..10_000 {
            drop(gates.own(Key::Creation(index.to_string())).await);
        }
        assert!(gates.locks.lock().unwrap().len() <= 256);
    }
}
