// SPDX-License-Identifier: Apache-2.0
//! `ateom.v1.Ateom`: requests checked and handed to the slot; nothing is decided here.
use std::path::PathBuf;
use std::pin::Pin;

use substrate_proto::ateom as api;
use substrate_proto::ateom::ateom_server::Ateom;
use substrate_proto::ateom::{checkpoint_request, slot_event};
use substrate_proto::types::{Assignment, ExecInput, ExecOutput, exec_input};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::error::SlotError;
use crate::exec;
use crate::slot::{Slot, SnapshotRequest, StartRequest};

/// Events that a slow watcher may be behind.
const WATCH_QUEUE: usize = 64;

/// The service of one slot.
#[derive(Clone)]
pub struct Service {
    slot: Slot,
    /// Set when the process should end.
    ended: watch::Sender<bool>,
}

impl Service {
    /// Serves a slot; `ended` is set by Shutdown.
    pub fn new(slot: Slot, ended: watch::Sender<bool>) -> Self {
        Self { slot, ended }
    }

    fn assignment(&self, assignment: Option<Assignment>) -> Result<Assignment, SlotError> {
        let assignment = assignment.ok_or_else(|| SlotError::Invalid("assignment is missing".to_owned()))?;
        if assignment.actor_uid.is_empty() || assignment.generation == 0 {
            return Err(SlotError::Invalid("assignment needs actor_uid and generation".to_owned()));
        }
        if !assignment.worker_id.is_empty() && assignment.worker_id != self.slot.worker_id() {
            return Err(SlotError::Refused {
                reason: "WRONG_WORKER",
                message: format!(
                    "the assignment is for worker {}, this is {}",
                    assignment.worker_id,
                    self.slot.worker_id()
                ),
            });
        }
        Ok(assignment)
    }
}

fn missing_spec() -> SlotError {
    SlotError::Invalid("spec is missing".to_owned())
}

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Ateom for Service {
    type ExecStream = Events<ExecOutput>;
    type WatchStream = Events<api::SlotEvent>;

    async fn get_capabilities(
        &self,
        _request: Request<api::GetCapabilitiesRequest>,
    ) -> Result<Response<api::GetCapabilitiesResponse>, Status> {
        let of = self.slot.runtime().describe();
        Ok(Response::new(api::GetCapabilitiesResponse {
            worker_id: self.slot.worker_id().to_owned(),
            sandbox_class: of.sandbox_class.clone(),
            runtime_digest: of.digest.clone(),
            runtime_version: of.version.clone(),
            architecture: of.architecture.clone(),
            cpu_features: of.cpu_features.clone(),
            facts: of.facts.clone(),
            local_pause: true,
            incremental: of.incremental,
            memory_snapshot: true,
            checkpoint_keeps_running: of.checkpoint_keeps_running,
        }))
    }

    async fn get_status(
        &self,
        _request: Request<api::GetStatusRequest>,
    ) -> Result<Response<api::SlotStatus>, Status> {
        let status = self.slot.status().borrow().clone();
        Ok(Response::new(status))
    }

    async fn run(&self, request: Request<api::RunRequest>) -> Result<Response<api::RunResponse>, Status> {
        let request = request.into_inner();
        let steps = self
            .slot
            .start_actor(StartRequest {
                assignment: self.assignment(request.assignment)?,
                spec: request.spec.ok_or_else(missing_spec)?,
                lease_deadline_ns: request.lease_deadline_ns,
                snapshot: None,
            })
            .await?;
        Ok(Response::new(api::RunResponse { steps }))
    }

    async fn restore(
        &self,
        request: Request<api::RestoreRequest>,
    ) -> Result<Response<api::RestoreResponse>, Status> {
        let request = request.into_inner();
        let directory = PathBuf::from(&request.directory);
        if !directory.is_absolute() || !directory.is_dir() {
            return Err(SlotError::Invalid(format!(
                "snapshot directory {:?} is not an absolute path to a directory on this node",
                request.directory
            ))
            .into());
        }
        let steps = self
            .slot
            .start_actor(StartRequest {
                assignment: self.assignment(request.assignment)?,
                spec: request.spec.ok_or_else(missing_spec)?,
                lease_deadline_ns: request.lease_deadline_ns,
                snapshot: Some(SnapshotRequest {
                    directory,
                    compatibility: request.compatibility.ok_or_else(|| {
                        SlotError::Invalid("compatibility of the snapshot is missing".to_owned())
                    })?,
                    clone: request.clone,
                }),
            })
            .await?;
        Ok(Response::new(api::RestoreResponse { steps }))
    }

    async fn checkpoint(
        &self,
        request: Request<api::CheckpointRequest>,
    ) -> Result<Response<api::CheckpointResponse>, Status> {
        let mut request = request.into_inner();
        request.assignment = Some(self.assignment(request.assignment)?);
        if request.mode() == checkpoint_request::Mode::Unspecified {
            return Err(SlotError::Invalid("mode must be STOP or KEEP_RUNNING".to_owned()).into());
        }
        Ok(Response::new(self.slot.checkpoint(request).await?))
    }

    async fn terminate(
        &self,
        request: Request<api::TerminateRequest>,
    ) -> Result<Response<api::TerminateResponse>, Status> {
        self.slot.terminate(self.assignment(request.into_inner().assignment)?).await?;
        Ok(Response::new(api::TerminateResponse {}))
    }

    async fn set_lease(
        &self,
        request: Request<api::SetLeaseRequest>,
    ) -> Result<Response<api::SetLeaseResponse>, Status> {
        self.slot.set_lease(request.into_inner()).await?;
        Ok(Response::new(api::SetLeaseResponse {}))
    }

    async fn set_egress(
        &self,
        request: Request<api::SetEgressRequest>,
    ) -> Result<Response<api::SetEgressResponse>, Status> {
        let request = request.into_inner();
        self.slot.set_egress(self.assignment(request.assignment)?, request.cidrs).await?;
        Ok(Response::new(api::SetEgressResponse {}))
    }

    async fn exec(
        &self,
        request: Request<Streaming<ExecInput>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        let mut input = request.into_inner();
        let Some(exec_input::Input::Start(start)) = input.message().await?.and_then(|first| first.input)
        else {
            return Err(SlotError::Invalid("the first message of an exec must be start".to_owned()).into());
        };
        let (sandbox, pass) = self.slot.enter(self.assignment(start.assignment.clone())?).await?;
        let output = exec::run(&*sandbox, pass, &start, input).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(output))))
    }

    async fn watch(
        &self,
        _request: Request<api::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (mut status, mut events) = (self.slot.status(), self.slot.events());
        let (sender, receiver) = mpsc::channel(WATCH_QUEUE);
        tokio::spawn(async move {
            status.mark_changed();
            loop {
                let event = tokio::select! {
                    biased;
                    () = sender.closed() => return,
                    changed = status.changed() => match changed {
                        Ok(()) => slot_event::Event::Status(status.borrow_and_update().clone()),
                        Err(_) => return,
                    },
                    event = events.recv() => match event {
                        Ok(event) => event,
                        // Statistics and notices only; every state is told by the other channel.
                        Err(RecvError::Lagged(_)) => continue,
                        Err(RecvError::Closed) => return,
                    },
                };
                if sender.send(Ok(api::SlotEvent { event: Some(event) })).await.is_err() {
                    return;
                }
            }
        });
        let ended = self.ended.subscribe();
        // An open watch must not keep a process that was told to end.
        let events = futures::StreamExt::take_until(ReceiverStream::new(receiver), wait_for(ended));
        Ok(Response::new(Box::pin(events)))
    }

    async fn shutdown(
        &self,
        _request: Request<api::ShutdownRequest>,
    ) -> Result<Response<api::ShutdownResponse>, Status> {
        self.slot.shutdown().await?;
        self.ended.send_replace(true);
        Ok(Response::new(api::ShutdownResponse {}))
    }
}

/// Returns when the process is to end.
pub(crate) async fn wait_for(mut ended: watch::Receiver<bool>) {
    // An error means that the sender is gone, and with it the process.
    drop(ended.wait_for(|ended| *ended).await);
}
