// SPDX-License-Identifier: Apache-2.0
//! Looks after first boots that failed but are worth trying again (a full pool, a registry that is down).
//!
//! Such an actor is back in NEW with the reason. The gateway takes "starting" for as long as it is told so, so the
//! driver tries again with growing pauses until the sandbox is as old as `template_ready_timeout_secs`, then writes
//! the last reason on the actor, which turns the observation into an error. Nothing but the actor is remembered: a
//! restarted driver takes up where its predecessor left.
use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use substrate_proto::ateapi::{Actor, ActorState};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::condition::{self, Standing};
use crate::driver::Driver;
use crate::failure::Failure;
use crate::{create, mirror, names};

const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// Takes up the uids it is sent until the driver stops.
pub async fn run(
    driver: Arc<Driver>,
    mut failed: mpsc::UnboundedReceiver<String>,
    shutdown: CancellationToken,
) {
    let busy = Arc::new(Mutex::new(HashSet::new()));
    loop {
        let uid = tokio::select! {
            () = shutdown.cancelled() => return,
            uid = failed.recv() => match uid {
                Some(uid) => uid,
                None => return,
            },
        };
        if !busy.lock().unwrap_or_else(PoisonError::into_inner).insert(uid.clone()) {
            continue;
        }
        let (task_driver, task_busy, task_shutdown) =
            (Arc::clone(&driver), Arc::clone(&busy), shutdown.clone());
        driver.tasks.spawn(async move {
            tokio::select! {
                () = task_shutdown.cancelled() => {}
                () = task_driver.boot_again(&uid) => {}
            }
            task_busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&uid);
        });
    }
}

impl Driver {
    async fn boot_again(&self, uid: &str) {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        loop {
            tokio::time::sleep(backoff.pause()).await;
            match self.boot_step(uid).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(failure) => {
                    tracing::warn!(actor = uid, error = %failure, "cannot look after a boot; tried again");
                }
            }
        }
    }

    /// One attempt; true when there is nothing more to do.
    async fn boot_step(&self, uid: &str) -> Result<bool, Failure> {
        let Some(actor) = self.control.get_actor(uid).await? else {
            return Ok(true);
        };
        if actor.state() != ActorState::New || condition::standing(&actor) != Standing::Starting {
            return Ok(true);
        }
        // A create under way is not known to succeed yet.
        if create::pending(&actor).is_some() {
            return Ok(false);
        }
        let age = mirror::now_ms().saturating_sub(actor.created_ms);
        let limit = i64::try_from(self.config.template_ready_timeout.as_millis()).unwrap_or(i64::MAX);
        if age >= limit && !actor.reason.is_empty() {
            self.give_up(&actor).await?;
            return Ok(true);
        }
        let left = Duration::from_millis(u64::try_from(limit - age).unwrap_or_default());
        match self.control.resume(uid, left.max(Duration::from_secs(5))).await {
            Ok(_) => Ok(true),
            Err(failure) => {
                tracing::info!(actor = uid, error = %failure, "a first boot failed and is tried again");
                Ok(false)
            }
        }
    }

    async fn give_up(&self, actor: &Actor) -> Result<(), Failure> {
        let why = if actor.message.is_empty() { &actor.reason } else { &actor.message };
        let message = format!(
            "not started within {} s (template_ready_timeout_secs): {why}",
            self.config.template_ready_timeout.as_secs()
        );
        self.annotate(&actor.uid, BTreeMap::from([(names::BOOT_FAILED, message.clone())])).await?;
        if let Some(id) = condition::sandbox_id(actor) {
            let event = mirror::warning(mirror::now_ms(), "ProvisioningFailed", message);
            self.hub.tell(mirror::platform_event(id, event)).await;
        }
        Ok(())
    }
}
