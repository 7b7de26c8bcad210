// SPDX-License-Identifier: Apache-2.0
//! What others hold of a slot: requests as messages, status and events as channels.
use std::path::PathBuf;
use std::sync::Arc;

use substrate_proto::ateom::{
    CheckpointRequest, CheckpointResponse, EgressCidr, SandboxSpec, SetLeaseRequest, SlotStatus, StepTime,
    slot_event,
};
use substrate_proto::types::{Assignment, Compatibility};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::{Command, EVENTS, QUEUE, Reply, Task};
use crate::cgroup::Cgroup;
use crate::children::Children;
use crate::error::SlotError;
use crate::occupancy::{Occupancy, Pass};
use crate::runtime::{Runtime, Sandbox};

/// What a slot is made of.
#[derive(Clone)]
pub struct Config {
    /// Id of the worker.
    pub worker_id: String,
    /// The sandbox class.
    pub runtime: Arc<dyn Runtime>,
    /// Shared with the network parts.
    pub occupancy: Occupancy,
    /// Reaps.
    pub children: Children,
    /// The worker's control group.
    pub cgroup: Cgroup,
    /// Where sandboxes have their files.
    pub directory: PathBuf,
    /// For the status: "unix:/path".
    pub ingress_endpoint: String,
}

/// What is started.
#[derive(Debug, Clone)]
pub struct StartRequest {
    /// Whose copy.
    pub assignment: Assignment,
    /// Of what.
    pub spec: SandboxSpec,
    /// CLOCK_BOOTTIME, ns.
    pub lease_deadline_ns: i64,
    /// From where; `None`: a cold boot.
    pub snapshot: Option<SnapshotRequest>,
}

/// A snapshot to be restored.
#[derive(Debug, Clone)]
pub struct SnapshotRequest {
    /// Its directory.
    pub directory: PathBuf,
    /// What it needs.
    pub compatibility: Compatibility,
    /// Of another actor: its identity must be redrawn.
    pub clone: bool,
}

/// Handle of the slot's task; cheap to clone.
#[derive(Clone)]
pub struct Slot {
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<SlotStatus>,
    events: broadcast::Sender<slot_event::Event>,
    runtime: Arc<dyn Runtime>,
    worker_id: String,
}

impl Slot {
    /// Starts the task, which begins by preparing a sandbox.
    ///
    /// # Errors
    /// When no timer can be made.
    pub fn start(config: Config) -> std::io::Result<Self> {
        let (commands, command_queue) = mpsc::channel(QUEUE);
        let (status_sender, status) = watch::channel(SlotStatus::default());
        let (events, _) = broadcast::channel(EVENTS);
        let slot = Self {
            commands,
            status,
            events: events.clone(),
            runtime: Arc::clone(&config.runtime),
            worker_id: config.worker_id.clone(),
        };
        Task::spawn(config, command_queue, status_sender, events)?;
        Ok(slot)
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, SlotError> {
        let gone = || SlotError::Broken("the slot's task has ended".to_owned());
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Run or Restore.
    pub async fn start_actor(&self, request: StartRequest) -> Result<Vec<StepTime>, SlotError> {
        self.ask(|reply| Command::Start(Box::new(request), reply)).await
    }

    /// Checkpoint.
    pub async fn checkpoint(&self, request: CheckpointRequest) -> Result<CheckpointResponse, SlotError> {
        self.ask(|reply| Command::Checkpoint(request, reply)).await
    }

    /// Terminate; returns when the control group is empty.
    pub async fn terminate(&self, assignment: Assignment) -> Result<(), SlotError> {
        self.ask(|reply| Command::Terminate(assignment, reply)).await
    }

    /// SetLease.
    pub async fn set_lease(&self, request: SetLeaseRequest) -> Result<(), SlotError> {
        self.ask(|reply| Command::SetLease(request, reply)).await
    }

    /// SetEgress.
    pub async fn set_egress(&self, assignment: Assignment, cidrs: Vec<EgressCidr>) -> Result<(), SlotError> {
        self.ask(|reply| Command::SetEgress(assignment, cidrs, reply)).await
    }

    /// The sandbox to start a process in, and the pass that counts it.
    pub async fn enter(&self, assignment: Assignment) -> Result<(Arc<dyn Sandbox>, Pass), SlotError> {
        self.ask(|reply| Command::Exec(assignment, reply)).await
    }

    /// Ends the task of an empty slot and removes what it prepared.
    pub async fn shutdown(&self) -> Result<(), SlotError> {
        self.ask(Command::Shutdown).await
    }

    /// The status now, and its changes.
    pub fn status(&self) -> watch::Receiver<SlotStatus> {
        self.status.clone()
    }

    /// Statistics and notices from now on.
    pub fn events(&self) -> broadcast::Receiver<slot_event::Event> {
        self.events.subscribe()
    }

    /// The sandbox class.
    pub fn runtime(&self) -> &dyn Runtime {
        &*self.runtime
    }

    /// Id of the worker.
    pub fn worker_id(&self) -> &str {
        &self.worker_id
    }
}
