// SPDX-License-Identifier: Apache-2.0
//! A driver on the stub and a client that asks as the gateway does.
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use openshell_driver_substrate::{Config, driver_config};
use substrate_proto::ateapi::control_server::ControlServer;
use substrate_proto::compute::compute_driver_client::ComputeDriverClient;
use substrate_proto::compute::{self, DriverSandbox, DriverSandboxSpec, DriverSandboxTemplate};
use substrate_proto::seam::{self, Peers};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::{Channel, Server};

use super::Stub;

/// A stub, a driver on it, and a client of the driver.
pub struct Bench {
    pub stub: Stub,
    pub config: Config,
    pub client: ComputeDriverClient<Channel>,
    _dir: tempfile::TempDir,
    api: Option<(CancellationToken, tokio::task::JoinHandle<()>)>,
    driver: Option<(CancellationToken, tokio::task::JoinHandle<()>)>,
    /// A driver that can be killed: its thread, as the kernel names it, and whether it still runs.
    mortal: Option<(PathBuf, Arc<AtomicBool>)>,
}

/// Ends a driver at once, in the middle of whatever it does.
pub struct Killer {
    kill: oneshot::Sender<()>,
    killed: std::sync::mpsc::Receiver<()>,
}

impl Killer {
    /// Returns when nothing of it is left.
    pub fn kill(self) {
        // It may have ended by itself.
        let _ = self.kill.send(());
        self.killed.recv_timeout(Duration::from_secs(20)).expect("the driver dies in time");
    }
}

impl Bench {
    pub async fn start() -> Self {
        Self::with(Stub::new(), |_| {}).await
    }

    pub async fn with(stub: Stub, change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config {
            socket_path: dir.path().join("driver/driver.sock"),
            api_endpoint: format!("unix:{}", dir.path().join("api/ateapi.sock").display()),
            ..Config::default()
        };
        change(&mut config);
        let client = connect(&config.socket_path);
        let mut bench = Self { stub, config, client, _dir: dir, api: None, driver: None, mortal: None };
        bench.start_api();
        bench.start_driver().await;
        bench
    }

    pub fn start_api(&mut self) {
        let incoming =
            seam::listen(Path::new(&self.config.api_endpoint["unix:".len()..]), Peers::default()).unwrap();
        let quit = CancellationToken::new();
        let server = Server::builder()
            .add_service(ControlServer::new(self.stub.clone()))
            .serve_with_incoming_shutdown(incoming, quit.clone().cancelled_owned());
        let task = tokio::spawn(async move { server.await.unwrap() });
        self.api = Some((quit, task));
    }

    pub async fn stop_api(&mut self) {
        let (quit, mut task) = self.api.take().unwrap();
        quit.cancel();
        // A watch that was opened in the last moment has to be cut as well before the server ends.
        loop {
            self.stub.cut_watches();
            if tokio::time::timeout(Duration::from_millis(20), &mut task).await.is_ok() {
                return;
            }
        }
    }

    pub async fn start_driver(&mut self) {
        let quit = CancellationToken::new();
        let (ready, is_ready) = oneshot::channel();
        let serving = openshell_driver_substrate::serve(self.config.clone(), ready, quit.clone());
        let task = tokio::spawn(async move { serving.await.unwrap() });
        is_ready.await.unwrap();
        self.driver = Some((quit, task));
    }

    /// Puts a driver that can be killed in the place of the one there is: in a thread and a runtime of its own.
    pub async fn make_mortal(&mut self) {
        self.stop_driver().await;
        let (kill, is_killed) = oneshot::channel();
        let (dead, killed) = std::sync::mpsc::channel();
        let (named, name) = oneshot::channel();
        let (ready, is_ready) = oneshot::channel();
        let (config, lives) = (self.config.clone(), Arc::new(AtomicBool::new(true)));
        let alive = Arc::clone(&lives);
        std::thread::spawn(move || {
            drop(named.send(std::fs::read_link("/proc/thread-self").unwrap()));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::select! {
                    served = openshell_driver_substrate::serve(config, ready, CancellationToken::new()) => served.unwrap(),
                    // Dropped unsent with the bench: the end as well.
                    _ = is_killed => {}
                }
            });
            // Every task of it ends here, wherever it is.
            drop(runtime);
            alive.store(false, Ordering::SeqCst);
            let _ = dead.send(());
        });
        is_ready.await.unwrap();
        let thread = std::path::Path::new("/proc").join(name.await.unwrap());
        self.mortal = Some((thread, lives));
        self.stub.world.lock().unwrap().killer = Some(Killer { kill, killed });
        self.stub.until(|stub| stub.calls("list_atespaces") > 1).await;
        self.until_it_answers().await;
    }

    /// The client may still hold the connection to a driver that is no more.
    pub async fn until_it_answers(&mut self) {
        for _ in 0..100 {
            if self.client.get_capabilities(compute::GetCapabilitiesRequest {}).await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the driver does not answer");
    }

    /// Whether the mortal driver was killed.
    pub fn is_dead(&self) -> bool {
        self.mortal.as_ref().is_some_and(|(_, lives)| !lives.load(Ordering::SeqCst))
    }

    /// CPU time of the mortal driver's thread.
    pub fn driver_cpu(&self) -> Duration {
        let (thread, _) = self.mortal.as_ref().unwrap();
        let spent = std::fs::read_to_string(thread.join("schedstat")).unwrap();
        Duration::from_nanos(spent.split_whitespace().next().unwrap().parse().unwrap())
    }

    pub async fn stop_driver(&mut self) {
        let (quit, task) = self.driver.take().unwrap();
        quit.cancel();
        task.await.unwrap();
    }

    pub async fn create(&mut self, sandbox: DriverSandbox) -> Result<(), Status> {
        let request = compute::CreateSandboxRequest { sandbox: Some(sandbox) };
        self.client.create_sandbox(request).await.map(drop)
    }

    pub async fn validate(&mut self, sandbox: DriverSandbox) -> Result<(), Status> {
        let request = compute::ValidateSandboxCreateRequest { sandbox: Some(sandbox) };
        self.client.validate_sandbox_create(request).await.map(drop)
    }

    pub async fn get(&mut self, id: &str) -> Result<DriverSandbox, Status> {
        let request = compute::GetSandboxRequest { sandbox_id: id.to_owned(), ..Default::default() };
        self.client.get_sandbox(request).await.map(|answer| answer.into_inner().sandbox.unwrap())
    }

    pub async fn list(&mut self) -> Result<Vec<DriverSandbox>, Status> {
        let answer = self.client.list_sandboxes(compute::ListSandboxesRequest {}).await?;
        Ok(answer.into_inner().sandboxes)
    }

    pub async fn stop(&mut self, id: &str) -> Result<(), Status> {
        let request = compute::StopSandboxRequest { sandbox_id: id.to_owned(), ..Default::default() };
        self.client.stop_sandbox(request).await.map(drop)
    }

    pub async fn start_sandbox(&mut self, id: &str) -> Result<(), Status> {
        let request = compute::StartSandboxRequest { sandbox_id: id.to_owned(), ..Default::default() };
        self.client.start_sandbox(request).await.map(drop)
    }

    pub async fn delete(&mut self, id: &str) -> Result<bool, Status> {
        let request = compute::DeleteSandboxRequest { sandbox_id: id.to_owned(), ..Default::default() };
        self.client.delete_sandbox(request).await.map(|answer| answer.into_inner().deleted)
    }

    pub async fn watch(&mut self) -> Result<tonic::Streaming<compute::WatchSandboxesEvent>, Status> {
        let answer = self.client.watch_sandboxes(compute::WatchSandboxesRequest {}).await?;
        Ok(answer.into_inner())
    }
}

pub fn connect(socket: &Path) -> ComputeDriverClient<Channel> {
    let socket: PathBuf = socket.to_owned();
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
    });
    let channel =
        tonic::transport::Endpoint::from_static("http://driver").connect_with_connector_lazy(connector);
    ComputeDriverClient::new(channel)
}

/// A sandbox as the gateway would ask for it.
pub fn sandbox(id: &str, name: &str) -> DriverSandbox {
    DriverSandbox {
        id: id.to_owned(),
        name: name.to_owned(),
        workspace: "team-a".to_owned(),
        spec: Some(DriverSandboxSpec {
            command: vec!["/bin/agent".to_owned()],
            sandbox_token: "header.e30.signature".to_owned(),
            template: Some(DriverSandboxTemplate {
                image: "registry.example/agent:1".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

pub fn template(sandbox: &mut DriverSandbox) -> &mut DriverSandboxTemplate {
    sandbox.spec.as_mut().unwrap().template.as_mut().unwrap()
}

pub fn with_config(mut sandbox: DriverSandbox, config: &serde_json::Value) -> DriverSandbox {
    template(&mut sandbox).driver_config = Some(driver_config::json_to_struct(config));
    sandbox
}

/// The phase the gateway would derive (`derive_phase` of its compute module).
pub fn phase(sandbox: &DriverSandbox) -> &'static str {
    const TRANSIENT: [&str; 8] = [
        "reconcilererror",
        "dependenciesnotready",
        "supervisornotconnected",
        "starting",
        "containerstarting",
        "containercreated",
        "healthcheckstarting",
        "inspectfailed",
    ];
    let Some(status) = &sandbox.status else { return "unknown" };
    if status.deleting {
        return "deleting";
    }
    let is_true = |kind: &str| {
        status
            .conditions
            .iter()
            .any(|it| it.r#type.eq_ignore_ascii_case(kind) && it.status.eq_ignore_ascii_case("true"))
    };
    if is_true("Suspended") {
        return "stopped";
    }
    let Some(ready) = status.conditions.iter().find(|it| it.r#type == "Ready") else {
        return "provisioning";
    };
    match ready.status.to_ascii_lowercase().as_str() {
        "true" => "ready",
        "false" if !TRANSIENT.contains(&ready.reason.to_ascii_lowercase().as_str()) => "error",
        _ => "provisioning",
    }
}
