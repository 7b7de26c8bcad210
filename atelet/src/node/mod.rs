// SPDX-License-Identifier: Apache-2.0
//! The node: what holds the parts together.
//!
//! | Module | What |
//! |---|---|
//! | [`serve`] | start, shutdown, upkeep |
//! | `service` | the gRPC service, thin |
//! | `session` | news upwards, leases |
//! | `activate` | Activate, Release: putting actors on workers and taking them off |
//! | `preserve` | Checkpoint, Upload, and what becomes of snapshots |
//! | `answers` | what an ateom's answers mean in this node's contract |
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use substrate_proto::atelet;
use substrate_proto::types::Assignment;
use tokio::sync::{Semaphore, watch};
use tonic::Status;

use crate::Config;
use crate::actor::ledger::Ledger;
use crate::actor::place::ActorPlaces;
use crate::asset::Policy;
use crate::disk::Disk;
use crate::error::NodeError;
use crate::flight::Flights;
use crate::image::{ErofsImages, Image, ImageStore};
use crate::lease::{Granted, Lease};
use crate::logs::Logs;
use crate::snapshot::node::NodeSnapshots;
use crate::snapshot::restore::Durable;
use crate::worker::Worker;

mod activate;
mod answers;
mod preserve;
mod serve;
mod service;
mod session;

pub use serve::{serve, stop_workers};

/// An actor's uid and a generation.
type Life = (String, u64);
/// An actor's uid and a snapshot's id.
type SnapshotKey = (String, String);

/// Everything of a node.
pub(crate) struct Node {
    config: Config,
    boot_id: String,
    images: ImageStore,
    erofs: ErofsImages,
    /// What may be started, if there is a sandbox config.
    sandbox: Option<Policy>,
    snapshots: NodeSnapshots,
    durable: Durable,
    places: ActorPlaces,
    ledger: Ledger,
    logs: Logs,
    disk: Disk,
    workers: BTreeMap<String, Worker>,
    hub: Arc<session::Hub>,
    /// What the session that stands calls itself; empty between sessions.
    session: Mutex<String>,
    lease: Mutex<Lease>,
    granted: watch::Sender<Option<Granted>>,
    /// Woken to ask for a lease at once.
    lease_wanted: tokio::sync::Notify,
    /// Activations under way: the grant must not take them for things of the past.
    starting: Mutex<HashMap<String, Assignment>>,
    /// Images of what runs; held, so that they are not collected.
    held: Mutex<HashMap<String, (u64, Vec<Image>)>>,
    activations: Flights<Life, atelet::ActivateResponse>,
    checkpoints: Flights<SnapshotKey, atelet::CheckpointResponse>,
    /// Refused checkpoints, newest last: a duplicate that was under way all the while is refused as well, so that it
    /// ends nothing that the control plane takes for running.
    refused: Mutex<VecDeque<(SnapshotKey, Status)>>,
    uploads: Flights<SnapshotKey, atelet::UploadResponse>,
    fetches: Flights<SnapshotKey, ()>,
    releases: Flights<Life, ()>,
    /// Restores are CPU bound: as many at a time as there are cores.
    restores: Arc<Semaphore>,
    /// Boots mostly wait for their workload to become ready.
    boots: Arc<Semaphore>,
    fetch_slots: Arc<Semaphore>,
    upload_slots: Arc<Semaphore>,
}

impl Node {
    fn worker(&self, id: &str) -> Result<&Worker, NodeError> {
        self.workers.get(id).ok_or_else(|| NodeError::NoSuchWorker {
            worker: id.to_owned(),
            known: self.workers.keys().cloned().collect::<Vec<_>>().join(", "),
        })
    }

    /// Workers on which something of an actor is, with what.
    fn holding(&self, uid: &str) -> Vec<(&Worker, Assignment)> {
        self.workers
            .values()
            .filter_map(|worker| {
                let held = worker.view().assignment().filter(|held| held.actor_uid == uid).cloned();
                held.map(|held| (worker, held))
            })
            .collect()
    }

    fn hold_images(&self, assignment: &Assignment, images: Vec<Image>) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.insert(assignment.actor_uid.clone(), (assignment.generation, images));
    }

    fn release_images(&self, assignment: &Assignment) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.get(&assignment.actor_uid).is_some_and(|(generation, _)| *generation <= assignment.generation)
        {
            held.remove(&assignment.actor_uid);
        }
    }

    /// What a worker looks like upwards.
    fn worker_message(worker: &Worker) -> atelet::Worker {
        let view = worker.view();
        atelet::Worker {
            worker_id: worker.id.clone(),
            pool: worker.pool.clone(),
            capabilities: view.up.as_ref().map(|up| up.capabilities.clone()),
            slot: view.slot,
            alive: view.up.is_some(),
            restores_only: worker.restores_only,
        }
    }
}
