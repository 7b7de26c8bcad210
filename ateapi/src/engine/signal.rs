// SPDX-License-Identifier: Apache-2.0
//! A value that several tasks wait for. They are woken in the order in which they began to wait; tokio's watch channel
//! draws that order at random, and a simulation would not replay.
use std::sync::Mutex;

use tokio::sync::Notify;

use super::lock;

/// See the module.
#[derive(Debug)]
pub(crate) struct Signal<T> {
    value: Mutex<T>,
    changed: Notify,
}

impl<T> Signal<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: Mutex::new(value), changed: Notify::new() }
    }

    pub(crate) fn read<R>(&self, read: impl FnOnce(&T) -> R) -> R {
        read(&lock(&self.value))
    }

    /// Sets it and wakes whoever waits.
    pub(crate) fn set(&self, value: T) {
        *lock(&self.value) = value;
        self.changed.notify_waiters();
    }

    /// Waits until it says something.
    pub(crate) async fn wait_for<R>(&self, mut says: impl FnMut(&T) -> Option<R>) -> R {
        loop {
            // Hears of every change from here on, also before it is polled.
            let changed = self.changed.notified();
            if let Some(said) = self.read(&mut says) {
                return said;
            }
            changed.await;
        }
    }
}
