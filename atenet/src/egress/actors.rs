// SPDX-License-Identifier: Apache-2.0
//! The policies and names of the actors of this node, cached per (uid, generation).
//!
//! A generation lower than one seen, or refused by the control plane, gets nothing (P1); its flows end when a higher
//! one appears or the actor leaves its worker. The control plane's watch keeps the policies: after any change of an
//! actor its policy is read again, and flows that it no longer allows end. While the control plane is away, actors
//! that are known keep what they had, others get nothing.
use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use substrate_proto::ateapi::{ActorState, BindEgressNameRequest, EgressName, GetEgressRequest};
use substrate_proto::atenet::FlowOwner;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::dns;
use super::policy::Policy;
use crate::control::{Change, Control, follow};

const CALL_TIMEOUT: Duration = Duration::from_secs(5);
const STRIPES: usize = 64;

/// Why there is no policy or name to go by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Missing {
    /// Another generation took over, or the actor is gone.
    Stale(String),
    /// The control plane refuses the name.
    Denied(String),
    /// It cannot be asked.
    Unavailable(String),
}

impl Missing {
    fn from_status(status: &tonic::Status) -> Self {
        let message = status.message().to_owned();
        match status.code() {
            Code::NotFound | Code::FailedPrecondition | Code::Aborted | Code::OutOfRange => {
                Self::Stale(message)
            }
            Code::PermissionDenied | Code::InvalidArgument | Code::ResourceExhausted => Self::Denied(message),
            _ => Self::Unavailable(message),
        }
    }
}

#[derive(Debug, Default)]
struct Names {
    by_name: HashMap<String, (Ipv4Addr, Ipv6Addr)>,
    by_address: HashMap<IpAddr, String>,
}

impl Names {
    fn add(&mut self, name: &EgressName) -> Option<(Ipv4Addr, Ipv6Addr)> {
        let Some((v4, v6)) = dns::addresses(&name.ipv4, &name.ipv6) else {
            tracing::error!(?name, "the control plane gave a name an address that is not synthetic");
            return None;
        };
        self.by_address.insert(IpAddr::V4(v4), name.name.clone());
        self.by_address.insert(IpAddr::V6(v6), name.name.clone());
        self.by_name.insert(name.name.clone(), (v4, v6));
        Some((v4, v6))
    }
}

/// One copy of one actor.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) owner: FlowOwner,
    /// Cancelled when this copy is no more.
    pub(crate) over: CancellationToken,
    /// One permit per flow.
    pub(crate) flows: Arc<Semaphore>,
    policy: watch::Sender<Arc<Policy>>,
    revision: AtomicU64,
    names: Mutex<Names>,
    refreshing: AtomicBool,
    used: AtomicU64,
}

impl Entry {
    pub(crate) fn policy(&self) -> Arc<Policy> {
        self.policy.borrow().clone()
    }

    pub(crate) fn policy_changes(&self) -> watch::Receiver<Arc<Policy>> {
        self.policy.subscribe()
    }

    pub(crate) fn name_of(&self, address: IpAddr) -> Option<String> {
        self.names().by_address.get(&address).cloned()
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bounds of the cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) actors: usize,
    pub(crate) flows_per_actor: usize,
    pub(crate) names_per_actor: usize,
}

pub(crate) struct Actors {
    control: Control,
    bounds: Bounds,
    entries: Mutex<HashMap<String, Arc<Entry>>>,
    /// Held while the policy of an actor is read for the first time, so that it is read once.
    stripes: Vec<tokio::sync::Mutex<()>>,
    hasher: RandomState,
    clock: AtomicU64,
}

impl Actors {
    pub(crate) fn new(control: Control, bounds: Bounds) -> Arc<Self> {
        Arc::new(Self {
            control,
            bounds,
            entries: Mutex::default(),
            stripes: (0..STRIPES).map(|_| tokio::sync::Mutex::new(())).collect(),
            hasher: RandomState::new(),
            clock: AtomicU64::new(0),
        })
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<String, Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The copy's entry, read from the control plane when it is new.
    pub(crate) async fn get(&self, owner: &FlowOwner) -> Result<Arc<Entry>, Missing> {
        if let Some(found) = self.find(owner) {
            return found;
        }
        let stripe = self.hasher.hash_one(&owner.actor_uid) as usize % STRIPES;
        let _one = self.stripes[stripe].lock().await;
        if let Some(found) = self.find(owner) {
            return found;
        }
        let (policy, names, revision) = self.read(&owner.actor_uid, owner.generation).await?;
        let entry = Arc::new(Entry {
            owner: owner.clone(),
            over: CancellationToken::new(),
            flows: Arc::new(Semaphore::new(self.bounds.flows_per_actor)),
            policy: watch::Sender::new(policy),
            revision: AtomicU64::new(revision),
            names: Mutex::new(names),
            refreshing: AtomicBool::new(false),
            used: AtomicU64::new(self.clock.fetch_add(1, Ordering::Relaxed)),
        });
        let mut entries = self.entries();
        if entries.len() >= self.bounds.actors {
            let idle = entries
                .iter()
                .filter(|(_, entry)| entry.flows.available_permits() == self.bounds.flows_per_actor)
                .min_by_key(|(_, entry)| entry.used.load(Ordering::Relaxed))
                .map(|(uid, _)| uid.clone());
            match idle {
                Some(uid) => drop(entries.remove(&uid)),
                None => return Err(Missing::Unavailable("the proxy serves too many actors".into())),
            }
        }
        if let Some(before) = entries.insert(owner.actor_uid.clone(), entry.clone()) {
            before.over.cancel();
        }
        Ok(entry)
    }

    fn find(&self, owner: &FlowOwner) -> Option<Result<Arc<Entry>, Missing>> {
        let entries = self.entries();
        let entry = entries.get(&owner.actor_uid)?;
        if entry.owner.generation > owner.generation {
            return Some(Err(Missing::Stale(format!(
                "generation {} is over, {} is current",
                owner.generation, entry.owner.generation
            ))));
        }
        (entry.owner.generation == owner.generation).then(|| {
            entry.used.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
            Ok(entry.clone())
        })
    }

    async fn read(&self, uid: &str, generation: u64) -> Result<(Arc<Policy>, Names, u64), Missing> {
        let mut control = self.control.clone();
        let request = control.get_egress(GetEgressRequest { actor_uid: uid.to_owned(), generation });
        let response = tokio::time::timeout(CALL_TIMEOUT, request)
            .await
            .map_err(|_| Missing::Unavailable("the control plane does not answer".into()))?
            .map_err(|status| Missing::from_status(&status))?
            .into_inner();
        let (policy, problems) = Policy::normalize(&response.policy.unwrap_or_default());
        for problem in problems {
            tracing::warn!(uid, %problem, "an egress rule cannot be enforced and allows nothing");
        }
        let mut names = Names::default();
        for name in &response.names {
            names.add(name);
        }
        Ok((Arc::new(policy), names, response.revision))
    }

    /// Reads an entry again; ends it when the control plane says that it is stale.
    pub(crate) async fn refresh(&self, entry: &Arc<Entry>) {
        match self.read(&entry.owner.actor_uid, entry.owner.generation).await {
            Ok((policy, names, revision)) => {
                // Names are only ever added: one bound meanwhile must not be lost.
                let mut known = entry.names();
                known.by_name.extend(names.by_name);
                known.by_address.extend(names.by_address);
                drop(known);
                let before = entry.revision.swap(revision, Ordering::Relaxed);
                if before != revision || *entry.policy.borrow() != policy {
                    entry.policy.send_replace(policy);
                }
            }
            Err(Missing::Stale(reason) | Missing::Denied(reason)) => self.end(entry, &reason),
            Err(Missing::Unavailable(reason)) => {
                tracing::debug!(uid = entry.owner.actor_uid, %reason, "kept an egress policy as it was");
            }
        }
    }

    /// The synthetic addresses of a name that the policy allows.
    pub(crate) async fn bind(&self, entry: &Entry, name: &str) -> Result<(Ipv4Addr, Ipv6Addr), Missing> {
        {
            let names = entry.names();
            if let Some(found) = names.by_name.get(name) {
                return Ok(*found);
            }
            if names.by_name.len() >= self.bounds.names_per_actor {
                return Err(Missing::Denied(format!(
                    "it has asked for {} names already, its limit",
                    self.bounds.names_per_actor
                )));
            }
        }
        let mut control = self.control.clone();
        let request = control.bind_egress_name(BindEgressNameRequest {
            actor_uid: entry.owner.actor_uid.clone(),
            generation: entry.owner.generation,
            name: name.to_owned(),
        });
        let bound = tokio::time::timeout(CALL_TIMEOUT, request)
            .await
            .map_err(|_| Missing::Unavailable("the control plane does not answer".into()))?
            .map_err(|status| Missing::from_status(&status))?
            .into_inner();
        let bound = EgressName { name: name.to_owned(), ..bound };
        entry
            .names()
            .add(&bound)
            .ok_or_else(|| Missing::Unavailable("the control plane gave no synthetic address".into()))
    }

    fn end(&self, entry: &Arc<Entry>, reason: &str) {
        tracing::debug!(
            uid = entry.owner.actor_uid,
            generation = entry.owner.generation,
            reason,
            "egress ended"
        );
        entry.over.cancel();
        let mut entries = self.entries();
        if entries.get(&entry.owner.actor_uid).is_some_and(|current| Arc::ptr_eq(current, entry)) {
            entries.remove(&entry.owner.actor_uid);
        }
    }

    /// Keeps the cache until shutdown.
    pub(crate) async fn keep(self: Arc<Self>, shutdown: CancellationToken) {
        follow(self.control.clone(), shutdown, |change| self.apply(&change)).await;
    }

    fn apply(self: &Arc<Self>, change: &Change) {
        match change {
            Change::Restart => {
                let all: Vec<_> = self.entries().values().cloned().collect();
                for entry in all {
                    self.refresh_soon(entry);
                }
            }
            Change::Deleted { uid, .. } => {
                let entry = self.entries().get(uid).cloned();
                if let Some(entry) = entry {
                    self.end(&entry, "the actor was deleted");
                }
            }
            Change::Actor(actor) => {
                let Some(entry) = self.entries().get(&actor.uid).cloned() else { return };
                let known = entry.owner.generation;
                let left = matches!(
                    actor.state(),
                    ActorState::New
                        | ActorState::Suspended
                        | ActorState::Paused
                        | ActorState::Exited
                        | ActorState::Crashed
                        | ActorState::Deleting
                );
                if actor.generation > known || (actor.generation == known && left) {
                    self.end(&entry, "the actor left its worker");
                } else if actor.generation == known {
                    self.refresh_soon(entry);
                }
            }
        }
    }

    fn refresh_soon(self: &Arc<Self>, entry: Arc<Entry>) {
        if entry.refreshing.swap(true, Ordering::AcqRel) {
            return;
        }
        let this = self.clone();
        tokio::spawn(async move {
            // A change that comes from here on asks for another one.
            entry.refreshing.store(false, Ordering::Release);
            this.refresh(&entry).await;
        });
    }
}
