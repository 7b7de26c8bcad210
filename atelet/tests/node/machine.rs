// SPDX-License-Identifier: Apache-2.0
//! A node agent over stub workers, and a control plane that grants leases.
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use atelet::{Config, WorkerConfig};
use ateom::cgroup::{Cgroup, Hierarchy};
use sha2::{Digest as _, Sha256};
use substrate_proto::atelet as api;
use substrate_proto::atelet::node_client::NodeClient;
use substrate_proto::atelet::{session_event, session_request};
use substrate_proto::types::{
    ActorSpec, Assignment, Container, ExecInput, ExecStart, File, TemplateSpec, exec_input, exec_output,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

pub const PATIENCE: Duration = Duration::from_secs(30);

/// What a whole test may take.
const LIMIT: Duration = Duration::from_mins(2);

/// Ends the test process when a test takes longer than [`LIMIT`], wherever it hangs: an await, a blocking call,
/// a runtime's end. The workers' processes end with the machine's groups, which a next run does not share.
struct Watchdog {
    _alive: std::sync::mpsc::Sender<()>,
}

impl Watchdog {
    fn start() -> Self {
        let (alive, ended) = std::sync::mpsc::channel::<()>();
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        std::thread::spawn(move || {
            if ended.recv_timeout(LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("{test} did not end within {LIMIT:?}: the test process is ended");
                std::process::abort();
            }
        });
        Self { _alive: alive }
    }
}

/// A machine's directories; what runs on it is killed when it goes.
pub struct Machine {
    pub dir: tempfile::TempDir,
    pub config: Config,
    /// Layout of the image that templates name.
    pub image: PathBuf,
    _watchdog: Watchdog,
}

impl Machine {
    /// `None`, loudly, where such tests cannot run.
    pub fn new(workers: usize) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: not root, cannot make cgroups and mounts");
            return None;
        }
        let watchdog = Watchdog::start();
        let dir = tempfile::tempdir().unwrap();
        let stub = std::env::current_exe().unwrap().parent().unwrap().join("../examples/stub-ateom");
        assert!(stub.exists(), "build it: cargo build -p atelet --example stub-ateom");
        let workers = (1..=workers)
            .map(|number| WorkerConfig {
                id: format!("w{number}"),
                pool: "default".into(),
                class: atelet::WorkerClass::Gvisor,
                runtime: None,
            })
            .collect();
        let run = dir.path().join("run");
        let mut config = Config::for_machine(
            "n1",
            dir.path(),
            &run,
            workers,
            stub.canonicalize().unwrap(),
            "/bin/true".into(),
        );
        config.cgroup = format!("substrate-test/atelet-{}", uuid::Uuid::new_v4().simple());
        config.min_free_bytes = 0;
        let layout = dir.path().join("image");
        image(&layout);
        Some(Self { image: layout, dir, config, _watchdog: watchdog })
    }

    /// Starts an agent in a runtime of its own, so that it can be killed with everything it does. Its control plane
    /// grants leases for `named`.
    pub async fn start(&self, named: &[&Assignment]) -> Running {
        let begun = std::time::Instant::now();
        let (runtime, shutdown, task) = loop {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            let (ready, is_ready) = oneshot::channel();
            let shutdown = CancellationToken::new();
            let task = runtime.spawn(atelet::serve(self.config.clone(), ready, shutdown.clone()));
            if is_ready.await.is_ok() {
                break (runtime, shutdown, task);
            }
            let outcome = task.await.unwrap();
            runtime.shutdown_background();
            // What was killed may take a moment to let go of its locks.
            let error = outcome.expect_err("the node agent ended at once").to_string();
            assert!(
                (error.contains("lock") || error.contains("in use")) && begun.elapsed() < PATIENCE,
                "the node agent did not come up: {error}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        let endpoint = Endpoint::from_shared(format!("unix:{}", self.config.socket.display())).unwrap();
        let channel = endpoint.connect().await.unwrap();
        let session = Session::open(NodeClient::new(channel.clone()), named).await;
        Running { client: NodeClient::new(channel), session, shutdown, task, runtime: Some(runtime) }
    }

    pub fn knob(&self, worker: &str, name: &str) -> PathBuf {
        self.config.dir.join("workers").join(worker).join(name)
    }

    pub fn template(&self) -> TemplateSpec {
        TemplateSpec {
            containers: vec![Container {
                name: "main".into(),
                image: format!("oci:{}", self.image.display()),
                args: vec!["serve".into()],
                ..Container::default()
            }],
            ..TemplateSpec::default()
        }
    }

    pub fn activate(&self, assignment: &Assignment) -> api::ActivateRequest {
        api::ActivateRequest {
            assignment: Some(assignment.clone()),
            template: Some(self.template()),
            actor: Some(ActorSpec {
                files: vec![File { path: "/run/token".into(), mode: 0o400, content: b"secret".to_vec() }],
                ..ActorSpec::default()
            }),
            lease_term_ms: 60_000,
            session: SESSION.into(),
            identity: [("name".to_owned(), b"alice".to_vec())].into(),
            ..api::ActivateRequest::default()
        }
    }

    /// Pid of a worker, as noted.
    pub fn pid(&self, worker: &str) -> i32 {
        let text = std::fs::read(self.knob(worker, "process.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&text).unwrap()["pid"].as_i64().unwrap() as i32
    }

    pub fn group(&self) -> Cgroup {
        Cgroup::at(&Hierarchy::detect().unwrap(), &self.config.cgroup)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let group = self.group();
        let ended = group.kill_and_wait_empty(PATIENCE).and_then(|()| group.remove());
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for point in mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)).map(Path::new) {
            if point.starts_with(self.dir.path()) {
                nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH).unwrap();
            }
        }
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

pub fn assignment(uid: &str, generation: u64, worker: &str) -> Assignment {
    Assignment {
        actor_uid: uid.into(),
        atespace: "blue".into(),
        actor_name: "alice".into(),
        generation,
        worker_id: worker.into(),
    }
}

/// A node agent that runs in this process.
pub struct Running {
    pub client: NodeClient<Channel>,
    pub session: Session,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), atelet::Error>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Also when a test fails: nothing of it may start workers again.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Running {
    /// Ends the agent as a shutdown does; workers stay.
    pub async fn stop(mut self) {
        self.shutdown.cancel();
        let ended = tokio::time::timeout(PATIENCE, &mut self.task).await;
        ended.expect("the node agent did not stop in time").unwrap().unwrap();
    }

    /// Ends it as a kill does.
    pub fn kill(self) {
        drop(self);
    }

    /// What the actor holds only in memory.
    pub async fn nonce(&mut self, assignment: &Assignment) -> String {
        self.exec(assignment, &["nonce"]).await.unwrap()
    }

    pub async fn exec(&mut self, assignment: &Assignment, command: &[&str]) -> Result<String, tonic::Status> {
        let start = ExecStart {
            assignment: Some(assignment.clone()),
            command: command.iter().map(ToString::to_string).collect(),
            ..ExecStart::default()
        };
        let input = ExecInput { input: Some(exec_input::Input::Start(start)) };
        let mut output = self.client.exec(futures::stream::iter([input])).await?.into_inner();
        let mut text = Vec::new();
        while let Some(message) = output.message().await? {
            if let Some(exec_output::Output::Stdout(bytes)) = message.output {
                text.extend(bytes);
            }
        }
        Ok(String::from_utf8(text).unwrap())
    }
}

/// What a session has told so far.
#[derive(Debug, Clone, Default)]
pub struct Told {
    pub workers: BTreeMap<String, api::Worker>,
    pub lost: Vec<api::WorkerLost>,
    pub exited: Vec<api::Exited>,
    /// What was told of the workers when it said that this was all.
    pub synced: Option<BTreeMap<String, api::Worker>>,
    pub grants: u64,
    pub ended: bool,
}

/// What every session of these tests calls itself.
pub const SESSION: &str = "test";

/// A control plane's session that grants what is in `named`.
pub struct Session {
    pub named: Arc<Mutex<Vec<Assignment>>>,
    /// Answer lease requests.
    pub granting: Arc<Mutex<bool>>,
    told: watch::Receiver<Told>,
}

impl Session {
    /// Opens one that grants leases for `named`.
    pub async fn open(mut client: NodeClient<Channel>, named: &[&Assignment]) -> Self {
        let (requests, stream) = mpsc::channel(8);
        let hello = session_request::Request::Hello(api::SessionHello { controller: SESSION.into() });
        requests.send(api::SessionRequest { request: Some(hello) }).await.unwrap();
        let mut events = client.session(ReceiverStream::new(stream)).await.unwrap().into_inner();
        let named: Arc<Mutex<Vec<Assignment>>> =
            Arc::new(Mutex::new(named.iter().map(|named| (*named).clone()).collect()));
        let granting = Arc::new(Mutex::new(true));
        let (sender, told) = watch::channel(Told::default());
        let (names, grants) = (Arc::clone(&named), Arc::clone(&granting));
        tokio::spawn(async move {
            while let Ok(Some(event)) = events.message().await {
                let Some(event) = event.event else { continue };
                if let session_event::Event::Lease(request) = &event
                    && *grants.lock().unwrap()
                {
                    let grant = api::LeaseGrant {
                        sequence: request.sequence,
                        term_ms: 60_000,
                        assignments: names.lock().unwrap().clone(),
                    };
                    let request =
                        api::SessionRequest { request: Some(session_request::Request::Grant(grant)) };
                    if requests.send(request).await.is_err() {
                        break;
                    }
                }
                sender.send_modify(|told| match event {
                    session_event::Event::Worker(worker) => {
                        told.workers.insert(worker.worker_id.clone(), worker);
                    }
                    session_event::Event::Lost(lost) => told.lost.push(lost),
                    session_event::Event::Exited(exited) => told.exited.push(exited),
                    session_event::Event::Synced(_) => told.synced = Some(told.workers.clone()),
                    session_event::Event::Lease(_) => told.grants += 1,
                    _ => {}
                });
            }
            sender.send_modify(|told| told.ended = true);
        });
        let session = Self { named, granting, told };
        session.until("synced", |told| told.synced.is_some()).await;
        session
    }

    pub fn name(&self, assignment: &Assignment) {
        self.named.lock().unwrap().push(assignment.clone());
    }

    pub async fn until(&self, what: &str, condition: impl FnMut(&Told) -> bool) -> Told {
        let mut told = self.told.clone();
        // Cloned at once: a guard that is kept while another is taken deadlocks with a writer in between.
        let waited = tokio::time::timeout(PATIENCE, told.wait_for(condition)).await;
        let waited = waited.map(|seen| seen.unwrap().clone());
        waited.unwrap_or_else(|_| panic!("never told: {what}; told was {:#?}", *self.told.borrow()))
    }

    pub async fn all_up(&self, workers: usize) -> Told {
        self.until("all workers up", |told| {
            told.workers.values().filter(|worker| worker.alive).count() == workers
        })
        .await
    }
}

/// An OCI layout with one layer of one file.
fn image(dir: &Path) {
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let blob = |content: &[u8]| {
        let digest = hex::encode(Sha256::digest(content));
        std::fs::write(blobs.join(&digest), content).unwrap();
        (format!("sha256:{digest}"), content.len())
    };
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(3);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    tar.append_data(&mut header, "agent", &b"bin"[..]).unwrap();
    let layer = tar.into_inner().unwrap();
    let (layer_digest, layer_size) = blob(&layer);
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let (config_digest, config_size) = blob(
        serde_json::json!({
            "os": "linux", "architecture": architecture,
            "config": {"Entrypoint": ["/agent"], "Cmd": ["idle"], "Env": ["A=1"]},
            "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
        })
        .to_string()
        .as_bytes(),
    );
    let (manifest_digest, manifest_size) = blob(
        serde_json::json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                       "digest": config_digest, "size": config_size},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar",
                        "digest": layer_digest, "size": layer_size}],
        })
        .to_string()
        .as_bytes(),
    );
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#).unwrap();
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json",
                       "digest": manifest_digest, "size": manifest_size}],
    });
    let mut file = std::fs::File::create(dir.join("index.json")).unwrap();
    file.write_all(index.to_string().as_bytes()).unwrap();
}
