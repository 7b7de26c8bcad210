// SPDX-License-Identifier: Apache-2.0
//! An ateom without a runtime: a real process that serves `ateom.v1` on its socket. Its actor is a `sleep` in the
//! worker's control group, whose memory is a nonce drawn at the first start. Tests steer it by files in `--state-dir`:
//!
//! | File | Effect |
//! |---|---|
//! | `run-fails` | Run and Restore answer INTERNAL |
//! | `run-hangs` | Run and Restore answer only once it is removed |
//! | `checkpoint-hangs` | so does Checkpoint, after it wrote its files |
//! | `checkpoint-refused` | Checkpoint answers FAILED_PRECONDITION, reason NOT_IDLE |
//!
//! and read `leases`: a line for each SetLease.
use std::collections::HashMap;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use ateom::cgroup::{Cgroup, Hierarchy};
use futures::StreamExt as _;
use substrate_proto::ateom as api;
use substrate_proto::ateom::ateom_server::{Ateom, AteomServer};
use substrate_proto::ateom::checkpoint_request::Mode;
use substrate_proto::ateom::slot_status::Phase;
use substrate_proto::seam;
use substrate_proto::types::{Assignment, Compatibility, ExecInput, ExecOutput, ExitStatus, exec_output};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt as _};

struct Actor {
    assignment: Assignment,
    nonce: String,
    child: Child,
}

struct Stub {
    id: String,
    state: PathBuf,
    ingress: String,
    group: Cgroup,
    actor: Mutex<Option<Actor>>,
    /// The last checkpoint that succeeded, by directory.
    past: Mutex<Option<(String, api::CheckpointResponse)>>,
    status: watch::Sender<api::SlotStatus>,
    ended: watch::Sender<bool>,
}

/// The service; `Arc` itself is not ours to implement it on.
struct Served(Arc<Stub>);

impl std::ops::Deref for Served {
    type Target = Stub;

    fn deref(&self) -> &Stub {
        &self.0
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

fn refused(code: Code, reason: &str, message: &str) -> Status {
    Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, "stub", HashMap::new()))
}

impl Stub {
    fn set(&self, phase: Phase, exit: Option<ExitStatus>) {
        self.status.send_modify(|status| {
            status.set_phase(phase);
            status.assignment = lock(&self.actor).as_ref().map(|actor| actor.assignment.clone());
            status.exit = exit;
        });
    }

    async fn while_there(&self, knob: &str) {
        while self.state.join(knob).exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn begin(&self, assignment: Option<Assignment>, nonce: String) -> Result<(), Status> {
        let assignment = assignment.unwrap_or_default();
        if let Some(actor) = lock(&self.actor).as_ref()
            && actor.assignment != assignment
        {
            return Err(refused(Code::FailedPrecondition, "OCCUPIED", "the slot is taken"));
        }
        let group = self.group.child("actor-1");
        group.ensure().map_err(|error| Status::internal(error.to_string()))?;
        let child = Command::new("/bin/sleep").arg("3600").spawn()?;
        group.add(child.id()).map_err(|error| Status::internal(error.to_string()))?;
        *lock(&self.actor) = Some(Actor { assignment, nonce, child });
        if self.state.join("dies-unseen").exists() {
            // Its answer goes out, its status does not.
            tokio::spawn(async {
                tokio::time::sleep(Duration::from_millis(100)).await;
                std::process::exit(1);
            });
            return Ok(());
        }
        self.set(Phase::Starting, None);
        self.while_there("run-hangs").await;
        if self.state.join("run-fails").exists() {
            self.end();
            return Err(Status::internal("it does not start"));
        }
        if lock(&self.actor).is_none() {
            return Err(refused(Code::Aborted, "TERMINATED", "terminated meanwhile"));
        }
        self.set(Phase::Running, None);
        Ok(())
    }

    fn end(&self) {
        if let Some(mut actor) = lock(&self.actor).take() {
            actor.child.kill().unwrap();
            actor.child.wait().unwrap();
        }
        self.set(Phase::Empty, None);
    }

    fn check(&self, assignment: &Assignment) -> Result<String, Status> {
        lock(&self.actor)
            .as_ref()
            .filter(|actor| actor.assignment == *assignment)
            .map(|actor| actor.nonce.clone())
            .ok_or_else(|| refused(Code::FailedPrecondition, "NOT_HERE", "not in this slot"))
    }
}

#[tonic::async_trait]
impl Ateom for Served {
    async fn get_capabilities(
        &self,
        _: Request<api::GetCapabilitiesRequest>,
    ) -> Result<Response<api::GetCapabilitiesResponse>, Status> {
        Ok(Response::new(api::GetCapabilitiesResponse {
            worker_id: self.id.clone(),
            sandbox_class: "gvisor".into(),
            runtime_digest: "stub".into(),
            architecture: "amd64".into(),
            memory_snapshot: true,
            ..api::GetCapabilitiesResponse::default()
        }))
    }

    async fn get_status(
        &self,
        _: Request<api::GetStatusRequest>,
    ) -> Result<Response<api::SlotStatus>, Status> {
        Ok(Response::new(self.status.borrow().clone()))
    }

    async fn run(&self, request: Request<api::RunRequest>) -> Result<Response<api::RunResponse>, Status> {
        let request = request.into_inner();
        let spec = serde_json::json!({
            "args": request.spec.as_ref().map(|spec| spec.containers[0].args.clone()),
            "mounts": request.spec.as_ref().map(|spec| {
                spec.containers[0].mounts.iter().map(|mount| mount.source.clone()).collect::<Vec<_>>()
            }),
            "rootfs": request.spec.as_ref().map(|spec| spec.containers[0].rootfs.clone()),
        });
        std::fs::write(self.state.join("spec"), spec.to_string())?;
        self.begin(request.assignment, uuid::Uuid::new_v4().to_string()).await?;
        Ok(Response::new(api::RunResponse { steps: Vec::new() }))
    }

    async fn restore(
        &self,
        request: Request<api::RestoreRequest>,
    ) -> Result<Response<api::RestoreResponse>, Status> {
        let request = request.into_inner();
        let nonce = std::fs::read_to_string(Path::new(&request.directory).join("checkpoint.img"))?;
        self.begin(request.assignment, nonce).await?;
        Ok(Response::new(api::RestoreResponse { steps: Vec::new() }))
    }

    async fn checkpoint(
        &self,
        request: Request<api::CheckpointRequest>,
    ) -> Result<Response<api::CheckpointResponse>, Status> {
        let request = request.into_inner();
        // Looked at first: an actor that has just ended left its answer before.
        let here = self.check(request.assignment.as_ref().unwrap_or(&Assignment::default()));
        if let Some((directory, response)) = lock(&self.past).as_ref()
            && *directory == request.directory
        {
            return Ok(Response::new(response.clone()));
        }
        let nonce = here?;
        if self.state.join("checkpoint-refused").exists() {
            return Err(refused(Code::FailedPrecondition, "NOT_IDLE", "a connection is live"));
        }
        self.set(Phase::Checkpointing, None);
        // Goes on when its caller is gone.
        let stub = Arc::clone(&self.0);
        let work = async move {
            let directory = PathBuf::from(&request.directory);
            std::fs::write(directory.join("checkpoint.img"), &nonce)?;
            let pages = std::fs::File::create(directory.join("pages.img"))?;
            pages.set_len(8 << 20)?;
            pages.write_all_at(&vec![7; 100_000], 3 << 20)?;
            stub.while_there("checkpoint-hangs").await;
            let file = |name: &str, size, memory| api::SnapshotFile { name: name.into(), size, memory };
            let response = api::CheckpointResponse {
                files: vec![
                    file("checkpoint.img", nonce.len() as u64, false),
                    file("pages.img", 8 << 20, true),
                ],
                compatibility: Some(Compatibility {
                    sandbox_class: "gvisor".into(),
                    runtime_digest: "stub".into(),
                    architecture: "amd64".into(),
                    ..Compatibility::default()
                }),
                steps: Vec::new(),
                memory_bytes: 100_000,
            };
            let stop = request.mode() == Mode::Stop;
            // First, so that a repeated call never finds neither.
            *lock(&stub.past) = Some((request.directory, response.clone()));
            if stop {
                stub.end();
            } else {
                stub.set(Phase::Running, None);
            }
            Ok::<_, std::io::Error>(response)
        };
        let response = tokio::spawn(work).await.map_err(|error| Status::internal(error.to_string()))??;
        Ok(Response::new(response))
    }

    async fn terminate(
        &self,
        request: Request<api::TerminateRequest>,
    ) -> Result<Response<api::TerminateResponse>, Status> {
        let asked = request.into_inner().assignment.unwrap_or_default();
        let here = lock(&self.actor).as_ref().is_some_and(|actor| {
            actor.assignment.actor_uid == asked.actor_uid && actor.assignment.generation <= asked.generation
        });
        if here {
            self.end();
        }
        Ok(Response::new(api::TerminateResponse {}))
    }

    async fn set_lease(
        &self,
        request: Request<api::SetLeaseRequest>,
    ) -> Result<Response<api::SetLeaseResponse>, Status> {
        let request = request.into_inner();
        let mut file = std::fs::File::options().create(true).append(true).open(self.state.join("leases"))?;
        writeln!(file, "{} {} {}", request.actor_uid, request.generation, request.deadline_ns)?;
        Ok(Response::new(api::SetLeaseResponse {}))
    }

    async fn set_egress(
        &self,
        _: Request<api::SetEgressRequest>,
    ) -> Result<Response<api::SetEgressResponse>, Status> {
        Ok(Response::new(api::SetEgressResponse {}))
    }

    type ExecStream = futures::stream::BoxStream<'static, Result<ExecOutput, Status>>;

    /// `nonce` prints the nonce, `exit N` ends the workload with N.
    async fn exec(
        &self,
        request: Request<Streaming<ExecInput>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        let mut input = request.into_inner();
        let Some(substrate_proto::types::exec_input::Input::Start(start)) =
            input.message().await?.and_then(|message| message.input)
        else {
            return Err(Status::invalid_argument("no start"));
        };
        let nonce = self.check(start.assignment.as_ref().unwrap_or(&Assignment::default()))?;
        if start.command[0] == "exit" {
            let code = start.command[1].parse().unwrap_or(1);
            let exit = ExitStatus { container: "main".into(), code, signal: 0, time_ms: 1 };
            self.set(Phase::Exited, Some(exit));
        }
        let output = |output| Ok(ExecOutput { output: Some(output) });
        let outputs = [
            output(exec_output::Output::Stdout(nonce.into_bytes())),
            output(exec_output::Output::Exit(ExitStatus::default())),
        ];
        Ok(Response::new(futures::stream::iter(outputs).boxed()))
    }

    type WatchStream = futures::stream::BoxStream<'static, Result<api::SlotEvent, Status>>;

    async fn watch(&self, _: Request<api::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let events = WatchStream::new(self.status.subscribe())
            .map(|status| Ok(api::SlotEvent { event: Some(api::slot_event::Event::Status(status)) }));
        Ok(Response::new(events.boxed()))
    }

    async fn shutdown(
        &self,
        _: Request<api::ShutdownRequest>,
    ) -> Result<Response<api::ShutdownResponse>, Status> {
        self.ended.send_replace(true);
        Ok(Response::new(api::ShutdownResponse {}))
    }
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let flags: HashMap<&str, &str> = arguments
        .chunks(2)
        .filter(|pair| pair.len() == 2)
        .map(|pair| (pair[0].as_str(), pair[1].as_str()))
        .collect();
    let run = PathBuf::from(flags["--run-dir"]);
    let (ended, mut until) = watch::channel(false);
    let ingress = format!("unix:{}", run.join("ingress.sock").display());
    let stub = Arc::new(Stub {
        id: flags["--worker-id"].to_owned(),
        state: PathBuf::from(flags["--state-dir"]),
        group: Cgroup::at(&Hierarchy::detect().unwrap(), flags["--cgroup"]),
        actor: Mutex::default(),
        past: Mutex::default(),
        status: watch::Sender::new(api::SlotStatus {
            phase: Phase::Empty as i32,
            ingress_endpoint: ingress.clone(),
            pid: std::process::id(),
            ..api::SlotStatus::default()
        }),
        ingress,
        ended,
    });
    println!("stub {} serves {}", stub.id, stub.ingress);
    let incoming = seam::listen(&run.join("ateom.sock"), seam::Peers::default()).unwrap();
    tonic::transport::Server::builder()
        .add_service(AteomServer::new(Served(stub)))
        .serve_with_incoming_shutdown(incoming, async move {
            until.wait_for(|ended| *ended).await.unwrap();
        })
        .await
        .unwrap();
}
