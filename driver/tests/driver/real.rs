// SPDX-License-Identifier: Apache-2.0
//! OpenShell's own gateway in the double's place: its programs, on the same driver and the same control plane in memory.
//!
//! A sandbox is Ready to it only while a supervisor holds a session, so the tests hold one for each sandbox that runs,
//! with the token that the driver was given: that is all a supervisor is to a gateway's phases.
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use openshell_driver_substrate::names;
use openshell_driver_substrate::supervisor::TOKEN_PATH;
use substrate_proto::ateapi::ActorState;
use substrate_proto::supervisor::{
    GatewayMessage, SupervisorHello, SupervisorMessage, gateway_message, supervisor_message,
};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;

use crate::gateway::Gateway;
use crate::stub::{Bench, Boot, Stub};

const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(50);

/// A running gateway.
pub struct Real {
    bench: Bench,
    bins: PathBuf,
    root: tempfile::TempDir,
    endpoint: String,
    sessions: BTreeMap<String, AbortOnDropHandle<()>>,
    _gateway: Child,
}

impl Real {
    pub async fn start(bench: Bench) -> Self {
        let bins = std::env::var_os("OPENSHELL_BIN_DIR").map(PathBuf::from);
        let bins = bins.expect("OPENSHELL_BIN_DIR names the directory of openshell-gateway and openshell");
        let root = tempfile::tempdir().unwrap();
        let certificates = root.path().join("certs");
        let made = std::process::Command::new(bins.join("openshell-gateway"))
            .args(["generate-certs", "--server-san", "host.openshell.internal", "--output-dir"])
            .arg(&certificates)
            .output()
            .unwrap();
        assert!(made.status.success(), "generate-certs: {made:?}");
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let jwt = certificates.join("jwt");
        let config = root.path().join("gateway.toml");
        let toml = format!(
            "[openshell.gateway]\ncompute_drivers = [\"substrate\"]\ndisable_tls = true\n\
             bind_address = \"127.0.0.1:{port}\"\n\
             [openshell.gateway.auth]\nallow_unauthenticated_users = true\n\
             [openshell.gateway.gateway_jwt]\nsigning_key_path = \"{}\"\npublic_key_path = \"{}\"\nkid_path = \"{}\"\n\
             gateway_id = \"test\"\nttl_secs = 0\n\
             [openshell.drivers.substrate]\nsocket_path = \"{}\"\n",
            jwt.join("signing.pem").display(),
            jwt.join("public.pem").display(),
            jwt.join("kid").display(),
            bench.config.socket_path.display(),
        );
        std::fs::write(&config, toml).unwrap();
        let log = std::fs::File::create(root.path().join("gateway.log")).unwrap();
        let gateway = Command::new(bins.join("openshell-gateway"))
            .arg("--config")
            .arg(&config)
            .env("XDG_STATE_HOME", root.path())
            .env("XDG_CONFIG_HOME", root.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let endpoint = format!("http://127.0.0.1:{port}");
        let real = Self { bench, bins, root, endpoint, sessions: BTreeMap::new(), _gateway: gateway };
        let began = Instant::now();
        while !real.openshell(&["sandbox", "list"]).await.status.success() {
            assert!(began.elapsed() < PATIENCE, "the gateway does not answer: {}", real.log());
            tokio::time::sleep(PAUSE).await;
        }
        real
    }

    fn log(&self) -> String {
        let text = std::fs::read_to_string(self.root.path().join("gateway.log")).unwrap_or_default();
        // Not what these tests themselves ask all the time.
        let lines: Vec<&str> = text.lines().filter(|line| !line.contains("ListSandboxes")).collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.bins.join("openshell"));
        command
            .args(arguments)
            .env("OPENSHELL_GATEWAY_ENDPOINT", &self.endpoint)
            .env("XDG_STATE_HOME", self.root.path())
            .env("XDG_CONFIG_HOME", self.root.path())
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    async fn openshell(&self, arguments: &[&str]) -> Output {
        tokio::time::timeout(PATIENCE, self.command(arguments).output())
            .await
            .unwrap_or_else(|_| panic!("openshell {arguments:?} does not end: {}", self.log()))
            .unwrap()
    }

    async fn say(&self, arguments: &[&str]) -> Result<(), String> {
        let output = self.openshell(arguments).await;
        // Lines are wrapped and marked for people.
        let said = String::from_utf8_lossy(&output.stderr);
        let said: Vec<&str> = said.split_whitespace().filter(|word| *word != "│").collect();
        if output.status.success() { Ok(()) } else { Err(said.join(" ")) }
    }

    async fn rows(&self) -> Vec<serde_json::Value> {
        let output = self.openshell(&["sandbox", "list", "-o", "json"]).await;
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    async fn row(&self, name: &str) -> Option<serde_json::Value> {
        self.rows().await.into_iter().find(|row| row["name"] == name)
    }

    /// Holds a session for a sandbox whenever it runs.
    fn supervise(&mut self, name: &str, id: &str) {
        let task = tokio::spawn(supervise(self.bench.stub.clone(), self.endpoint.clone(), id.to_owned()));
        self.sessions.insert(name.to_owned(), AbortOnDropHandle::new(task));
    }
}

/// Opens a session when the actor runs; it ends when the gateway ends it, as after a stop.
async fn supervise(stub: Stub, endpoint: String, id: String) {
    loop {
        let uid = names::uid(&id);
        let runs = stub.actor(&id).is_some_and(|actor| actor.state() == ActorState::Running);
        let token = {
            let world = stub.world.lock().unwrap();
            let files = world.files.get(&uid).map(Vec::as_slice).unwrap_or_default();
            let file = files.iter().find(|file| file.path == TOKEN_PATH);
            file.map(|file| String::from_utf8_lossy(&file.content).into_owned())
        };
        if let Some(token) = token.filter(|_| runs) {
            // Refused or ended: tried again while it runs.
            let _ = session(&endpoint, &id, &token).await;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn session(endpoint: &str, id: &str, token: &str) -> Result<(), Box<dyn std::error::Error>> {
    let channel = tonic::transport::Endpoint::from_shared(endpoint.to_owned())?.connect().await?;
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await?;
    // Kept: the stream ends with it.
    let (said, messages) = mpsc::channel(4);
    let hello = SupervisorHello { sandbox_id: id.to_owned(), instance_id: "test".to_owned() };
    said.send(SupervisorMessage { payload: Some(supervisor_message::Payload::Hello(hello)) }).await?;
    let mut request = tonic::Request::new(ReceiverStream::new(messages));
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
    let path = http::uri::PathAndQuery::from_static("/openshell.v1.OpenShell/ConnectSupervisor");
    let codec = tonic_prost::ProstCodec::<SupervisorMessage, GatewayMessage>::default();
    let mut answers = client.streaming(request, path, codec).await?.into_inner();
    while let Some(message) = answers.message().await? {
        if let Some(gateway_message::Payload::SessionRejected(_)) = message.payload {
            break;
        }
    }
    Ok(())
}

impl Gateway for Real {
    fn bench(&mut self) -> &mut Bench {
        &mut self.bench
    }

    async fn create(&mut self, name: &str, image: &str) -> Result<(), String> {
        let arguments =
            ["sandbox", "create", "--name", name, "--from", image, "--detach", "--", "/bin/agent"];
        // It waits until the sandbox is ready, which it is once it has its session.
        let mut child = self.command(&arguments);
        child.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut creating = Box::pin(child.spawn().unwrap().wait_with_output());
        let began = Instant::now();
        loop {
            assert!(began.elapsed() < PATIENCE, "{name} is not created: {}", self.log());
            let row = self.row(name).await;
            if let Some(id) = row.as_ref().and_then(|row| row["id"].as_str())
                && self.bench.stub.actor(id).is_some()
            {
                let id = id.to_owned();
                self.supervise(name, &id);
                break;
            }
            tokio::select! {
                output = &mut creating => {
                    let output = output.unwrap();
                    let said = String::from_utf8_lossy(&output.stderr).into_owned();
                    let said: Vec<&str> = said.split_whitespace().filter(|word| *word != "│").collect();
                    if output.status.success() {
                        continue;
                    }
                    return Err(said.join(" "));
                }
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
        // Its end says no more than the phase does, which tests wait for.
        let _ = tokio::time::timeout(PATIENCE, creating).await;
        Ok(())
    }

    async fn until(&mut self, name: &str, phase: Option<&str>) {
        let began = Instant::now();
        loop {
            let seen = self.phases().await.remove(name);
            if seen.as_deref() == phase {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{name} is {seen:?}, not {phase:?}: {}", self.log());
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn phases(&mut self) -> BTreeMap<String, String> {
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let rows = self.rows().await;
        rows.iter().map(|row| (text(&row["name"]), text(&row["phase"]).to_ascii_lowercase())).collect()
    }

    async fn stop(&mut self, name: &str) -> Result<(), String> {
        self.say(&["sandbox", "stop", name]).await
    }

    async fn start(&mut self, name: &str) -> Result<(), String> {
        self.say(&["sandbox", "start", name]).await
    }

    async fn delete(&mut self, name: &str) {
        self.say(&["sandbox", "delete", name]).await.unwrap();
    }

    async fn resync(&mut self) {
        // It opens its watch again by itself, 2 s later (`watch_loop`), and only then hears of an exit; a deletion that it
        // misses meanwhile is only found by its reconcile.
        self.bench.stub.boot(Boot::Exits(1));
        self.create("witness", "registry.example/agent:1").await.unwrap();
        self.until("witness", Some("error")).await;
        self.bench.stub.boot(Boot::Runs);
        self.delete("witness").await;
        self.until("witness", None).await;
    }

    async fn id(&mut self, name: &str) -> String {
        let row = self.row(name).await.unwrap();
        row["id"].as_str().unwrap().to_owned()
    }
}
