// SPDX-License-Identifier: Apache-2.0
//! Receipts: whether the gateway got the answer of a create.
//!
//! A driver that is killed, or loses its connection, between finishing a create and the answer's arrival leaves a
//! sandbox that nobody knows of: the gateway takes the call for failed, drops its row, and asks no more. The answer
//! itself cannot be confirmed, so what happens next is the proof:
//!
//! ```text
//! made ──the gateway asks for the sandbox, or accepts its session──▶ done
//!   ├──the gateway says that there is no such sandbox (NOT_FOUND for its session)──▶ deleted
//!   └──a create of the same name, UNCLAIMED later──▶ deleted, its name is free
//! ```
//!
//! A gateway stores its row before it asks for the sandbox and drops it on an error, so it answers NOT_FOUND only where
//! it was told of an error, or after a delete. What is done is never deleted because a gateway does not know it: it may
//! have lost its database.
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use substrate_proto::ateapi::Actor;
use substrate_session::hub::Shown;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::driver::Driver;
use crate::failure::Failure;
use crate::gates::Key;
use crate::validate::Wanted;
use crate::{condition, create, mirror, names};

/// Age from which a sandbox that no gateway has asked for stands in the way of no other: a gateway asks for each of its
/// sandboxes every 60 s (`reconcile_loop`, crates/openshell-server/src/compute/mod.rs at 2f7fb655).
const UNCLAIMED: Duration = Duration::from_secs(150);

/// What a gateway has shown of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// The actor's.
    pub uid: String,
    /// What.
    pub shown: Shown,
}

/// Settles receipts until the driver stops.
pub async fn run(
    driver: Arc<Driver>,
    mut receipts: mpsc::UnboundedReceiver<Receipt>,
    shutdown: CancellationToken,
) {
    let work = async {
        // Of whom it was said that their token is refused: supervisors ask again and again.
        let mut refused = HashSet::new();
        while let Some(receipt) = receipts.recv().await {
            let is_news = match receipt.shown {
                Shown::Refused(_) => refused.insert(receipt.uid.clone()),
                Shown::Accepted | Shown::Unknown => {
                    refused.remove(&receipt.uid);
                    true
                }
            };
            if !is_news {
                continue;
            }
            let (at, quit) = (Arc::clone(&driver), shutdown.clone());
            // Each by itself: one waits for its sandbox's create, if that is under way.
            driver.tasks.spawn(async move {
                tokio::select! {
                    () = quit.cancelled() => {}
                    settled = at.settle_receipt(&receipt) => if let Err(failure) = settled {
                        // The gateway shows it again: it asks every minute, and its session is opened again.
                        tracing::warn!(actor = receipt.uid, error = %failure, "cannot note what the gateway knows of a sandbox");
                    }
                }
            });
        }
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = work => {}
    }
}

impl Driver {
    /// The gateway has asked for that sandbox.
    pub fn claimed(&self, actor: &Actor) {
        let receipt = Receipt { uid: actor.uid.clone(), shown: Shown::Accepted };
        if create::made(actor).is_some() && self.receipts.send(receipt).is_err() {
            tracing::debug!("nobody takes receipts: the driver is shutting down");
        }
    }

    async fn settle_receipt(&self, receipt: &Receipt) -> Result<(), Failure> {
        // After the create, if it is still under way.
        let _creation = self.gates.own(Key::Creation(receipt.uid.clone())).await;
        let Some(actor) = self.control.get_actor(&receipt.uid).await? else { return Ok(()) };
        match (&receipt.shown, create::made(&actor), condition::sandbox_id(&actor)) {
            (Shown::Accepted, Some(nonce), _) => {
                let done = create::done(nonce);
                self.annotate(&actor.uid, BTreeMap::from([(names::CREATE, done)])).await
            }
            (Shown::Unknown, Some(nonce), _) => {
                tracing::info!(
                    actor = actor.uid,
                    "the gateway never got the answer of this create; taking it back"
                );
                self.take_back_unclaimed(&actor, nonce).await
            }
            (Shown::Refused(why), _, Some(id)) => {
                let message = format!(
                    "the gateway does not take the sandbox's token ({why}). A token that expired while the driver was \
                     away cannot be renewed: only a new sandbox gets one. Nothing of this one is lost: `substrate exec \
                     {}` still reaches its files",
                    actor.name
                );
                self.hub
                    .tell(mirror::platform_event(
                        id,
                        mirror::warning(mirror::now_ms(), "TokenRefused", message),
                    ))
                    .await;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Makes room for a create of the same name, if what has it was never asked for; whether it did.
    pub async fn replace_unclaimed(&self, wanted: &Wanted) -> Result<bool, Failure> {
        let managed = BTreeMap::from([(names::MANAGED.to_owned(), "true".to_owned())]);
        let actors = self.control.list_actors(&wanted.atespace, "", managed).await?;
        let Some(actor) = actors.iter().find(|actor| actor.name == wanted.actor_name) else {
            return Ok(false);
        };
        let age = mirror::now_ms().saturating_sub(actor.created_ms);
        let unclaimed = age > i64::try_from(UNCLAIMED.as_millis()).unwrap_or(i64::MAX);
        let Some(nonce) = create::made(actor).filter(|_| unclaimed) else { return Ok(false) };
        tracing::info!(actor = actor.uid, "no gateway has asked for this sandbox; its name is wanted");
        self.take_back_unclaimed(actor, nonce).await.map(|()| true)
    }

    async fn take_back_unclaimed(&self, actor: &Actor, nonce: &str) -> Result<(), Failure> {
        self.delete_made(&actor.uid, nonce).await?;
        if let Some(id) = condition::sandbox_id(actor) {
            self.hub.gone(&actor.uid, id).await;
        }
        // Its template, which nobody may use now.
        self.sweep.notify_one();
        Ok(())
    }
}
