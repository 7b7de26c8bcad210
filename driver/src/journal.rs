// SPDX-License-Identifier: Apache-2.0
//! The sweep: undoes what interrupted creates and deletes left behind.
//!
//! It runs when the driver starts, and again whenever somebody could not clean up after themselves, until it has gone
//! through without an error. It deletes
//!
//! * actors whose create is still marked pending ([`crate::create`]): no such create was ever answered with success,
//!   and one under way owns the creation gate, which the sweep takes first; and the debts of this process's own
//!   failed creates;
//! * synthesized templates that no actor uses;
//! * implicit atespaces that hold nothing and are younger than [`LEFTOVER`]: an older one has been in use, and goes with
//!   its workspace.
//!
//! A call that timed out may come through after the sweep has looked, so a sweep asked for by a failure is repeated
//! once after [`LATE`].
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::driver::Driver;
use crate::failure::Failure;
use crate::gates::Key;
use crate::{atespace, create, mirror, names};

/// How long after its deadline a call may still have its effect.
pub const LATE: Duration = Duration::from_mins(1);
/// Age up to which an empty atespace is taken for what an interrupted create left.
pub const LEFTOVER: Duration = Duration::from_mins(10);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Sweeps at the start and whenever asked to, until the driver stops.
pub async fn run(driver: Arc<Driver>, shutdown: CancellationToken) {
    let work = async {
        sweep_until_clean(&driver).await;
        loop {
            driver.sweep.notified().await;
            sweep_until_clean(&driver).await;
            let due = driver.debts.lock().unwrap_or_else(PoisonError::into_inner).len();
            tokio::time::sleep(LATE).await;
            sweep_until_clean(&driver).await;
            // Nothing of these can appear any more.
            driver.debts.lock().unwrap_or_else(PoisonError::into_inner).drain(..due);
        }
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = work => {}
    }
}

async fn sweep_until_clean(driver: &Driver) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    while let Err(failure) = driver.sweep_once().await {
        tracing::debug!(error = %failure, "the sweep is tried again");
        tokio::time::sleep(backoff.pause()).await;
    }
}

impl Driver {
    /// Goes once through everything; an error means that something was left.
    pub async fn sweep_once(&self) -> Result<(), Failure> {
        let managed = BTreeMap::from([(names::MANAGED.to_owned(), "true".to_owned())]);
        let mut used = BTreeSet::new();
        let mut first_failure = Ok(());
        let debts = self.debts.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (uid, nonce) in &debts {
            let _creation = self.gates.own(Key::Creation(uid.clone())).await;
            keep_first(&mut first_failure, self.delete_made(uid, nonce).await);
        }
        for actor in self.control.list_actors("", "", managed).await? {
            let template = actor.spec.as_ref().map(|spec| spec.template.clone()).unwrap_or_default();
            let Some(nonce) = create::pending(&actor) else {
                used.insert((actor.atespace, template));
                continue;
            };
            let _creation = self.gates.own(Key::Creation(actor.uid.clone())).await;
            tracing::info!(actor = actor.uid, "taking back what an interrupted create left");
            keep_first(&mut first_failure, self.delete_made(&actor.uid, nonce).await);
        }
        for space in self.control.list_atespaces().await? {
            for template in self.control.list_templates(&space.name).await? {
                let ours = template.labels.contains_key(names::SYNTHESIZED);
                if ours && !used.contains(&(space.name.clone(), template.name.clone())) {
                    keep_first(&mut first_failure, self.reap_template(&space.name, &template.name).await);
                }
            }
            let age = mirror::now_ms().saturating_sub(space.created_ms);
            let young = age < i64::try_from(LEFTOVER.as_millis()).unwrap_or(i64::MAX);
            if young && atespace::is_ours(&space) && space.labels.contains_key(names::IMPLICIT) {
                keep_first(&mut first_failure, self.reap_atespace(&space.name).await);
            }
        }
        first_failure
    }
}

fn keep_first(first: &mut Result<(), Failure>, next: Result<(), Failure>) {
    if let Err(failure) = next {
        tracing::warn!(error = %failure, "the sweep could not clean up");
        if first.is_ok() {
            *first = Err(failure);
        }
    }
}
