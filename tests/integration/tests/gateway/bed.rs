// SPDX-License-Identifier: Apache-2.0
//! A stock OpenShell gateway in front of a machine: its own binaries, keys made for the test, and its command line.
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use http::uri::PathAndQuery;
use substrate_integration::{Machine, PATIENCE, image, workspace};
use substrate_proto::ateapi::{self, ActorRef, SuspendActorRequest};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};

/// Where OpenShell's programs are.
///
/// # Errors
/// When nothing says so: these tests are run where they are given, and fail where they are asked for without.
pub fn bin_dir() -> Result<PathBuf> {
    std::env::var_os("OPENSHELL_BIN_DIR").map(PathBuf::from).context(
        "OPENSHELL_BIN_DIR names no directory with openshell-gateway, openshell and openshell-sandbox",
    )
}

/// Machine and gateway.
pub struct Bed {
    pub machine: Machine,
    gateway: Child,
    bins: PathBuf,
    root: tempfile::TempDir,
    endpoint: String,
    metrics: u16,
    /// How long anything may take.
    patience: Duration,
}

/// What a bed is made of.
pub struct Setting {
    /// gVisor workers.
    pub workers: u32,
    /// Life of a token, seconds; 0: for good.
    pub token_ttl_secs: u64,
    /// The driver's `supervisor.mode`.
    pub mode: &'static str,
    /// Its default image.
    pub image: String,
    /// Workers for microVMs, which are what sandboxes are then.
    pub microvm_workers: u32,
    /// More lines of `substrate up`'s configuration.
    pub up: String,
}

/// `driver_config` of a sandbox that sleeps only when it is told to.
pub const SLEEPLESS: &str = r#"{"substrate":{"idle":{"suspendAfter":"never"}}}"#;

impl Bed {
    /// Starts both; the gateway is ready.
    pub async fn start(bins: &Path, workers: u32) -> Result<Self> {
        Self::start_with(bins, workers, 0).await
    }

    /// Starts both, with tokens that live this many seconds (0: for good).
    pub async fn start_with(bins: &Path, workers: u32, token_ttl_secs: u64) -> Result<Self> {
        Self::start_mode(bins, workers, token_ttl_secs, "process").await
    }

    /// Starts both, with that mode of the supervisor.
    pub async fn start_mode(
        bins: &Path,
        workers: u32,
        token_ttl_secs: u64,
        mode: &'static str,
    ) -> Result<Self> {
        let (image, up) = (image("helpdesk")?, String::new());
        Self::of(bins, Setting { workers, token_ttl_secs, mode, image, microvm_workers: 0, up }).await
    }

    /// Starts both as they are wanted.
    pub async fn of(bins: &Path, setting: Setting) -> Result<Self> {
        let Setting { workers, token_ttl_secs, mode, image, microvm_workers, up } = setting;
        // A question takes an emulated guest a second.
        let (class, poll) = if microvm_workers > 0 { ("microvm", 30) } else { ("gvisor", 1) };
        let root = tempfile::Builder::new().prefix("gw-").tempdir_in("/tmp")?;
        let bins = bins.to_owned();
        let certificates = root.path().join("certs");
        let made = std::process::Command::new(bins.join("openshell-gateway"))
            .args(["generate-certs", "--server-san", "host.openshell.internal", "--output-dir"])
            .arg(&certificates)
            .output()
            .context("openshell-gateway generate-certs")?;
        ensure!(made.status.success(), "generate-certs: {}", String::from_utf8_lossy(&made.stderr));
        let (port, metrics) = (free_port()?, free_port()?);
        let dir = root.path().join("d");
        let jwt = certificates.join("jwt");
        let toml = format!(
            "[openshell.gateway]\ncompute_drivers = [\"substrate\"]\ndisable_tls = true\n\
             bind_address = \"127.0.0.1:{port}\"\nmetrics_bind_address = \"127.0.0.1:{metrics}\"\n\
             [openshell.gateway.auth]\nallow_unauthenticated_users = true\n\
             [openshell.gateway.gateway_jwt]\nsigning_key_path = \"{}\"\npublic_key_path = \"{}\"\nkid_path = \"{}\"\n\
             gateway_id = \"test\"\nttl_secs = {token_ttl_secs}\n\
             [openshell.drivers.substrate]\nsocket_path = \"{}\"\ngateway_endpoint = \"http://127.0.0.1:{port}\"\n\
             default_image = {image:?}\ndefault_sandbox_class = \"{class}\"\n\
             [openshell.drivers.substrate.supervisor]\nmode = \"{mode}\"\nsettings_poll_secs = {poll}\npath = \"{}\"\n",
            jwt.join("signing.pem").display(),
            jwt.join("public.pem").display(),
            jwt.join("kid").display(),
            dir.join("run/driver/driver.sock").display(),
            bins.join("openshell-sandbox").display(),
        );
        let config = root.path().join("gateway.toml");
        std::fs::write(&config, toml)?;
        let file = root.path().join("up.toml");
        std::fs::write(&file, format!("[driver]\ngateway_config = \"{}\"\n{up}", config.display()))?;
        let (machines, kernel) = (microvm_workers.to_string(), workspace().join("target/tools/microvm"));
        let kernel = kernel.to_str().context("a path in UTF-8")?;
        let mut more = vec!["--config", file.to_str().context("a path in UTF-8")?];
        let mut patience = PATIENCE;
        if microvm_workers > 0 {
            more.extend(["--microvm-workers", &machines, "--kernel", kernel]);
            // Emulated, on a machine that may be busy.
            patience *= 8;
        }
        let mut machine = Machine::start_in(dir, None, workers, &more).await?;
        if microvm_workers > 0 {
            machine.allow(patience * 4);
        }
        let gateway = spawn_gateway(&bins, root.path(), &config)?;
        let endpoint = format!("http://127.0.0.1:{port}");
        let bed = Self { machine, gateway, bins, root, endpoint, metrics, patience };
        bed.until_it_answers().await?;
        Ok(bed)
    }

    async fn until_it_answers(&self) -> Result<()> {
        let answers = async |bed: &Self| Ok(bed.cli(&["sandbox", "list"]).await?.status.success());
        self.until("the gateway answers", answers).await
    }

    /// Kills the gateway.
    pub async fn kill_gateway(&mut self) -> Result<()> {
        Ok(self.gateway.kill().await?)
    }

    /// Starts it again, as it was.
    pub async fn start_gateway(&mut self) -> Result<()> {
        self.gateway = spawn_gateway(&self.bins, self.root.path(), &self.root.path().join("gateway.toml"))?;
        self.until_it_answers().await
    }

    /// Another gateway on the same driver, with a store and a port of its own.
    pub async fn second_gateway(&self) -> Result<Second> {
        let root = tempfile::Builder::new().prefix("gw2-").tempdir_in("/tmp")?;
        let (port, metrics) = (free_port()?, free_port()?);
        let text = std::fs::read_to_string(self.root.path().join("gateway.toml"))?
            .replace(&format!("127.0.0.1:{}", self.port()), &format!("127.0.0.1:{port}"))
            .replace(&format!("127.0.0.1:{}", self.metrics), &format!("127.0.0.1:{metrics}"));
        let config = root.path().join("gateway.toml");
        std::fs::write(&config, text)?;
        let gateway = spawn_gateway(&self.bins, root.path(), &config)?;
        let second = Second {
            openshell: self.bins.join("openshell"),
            endpoint: format!("http://127.0.0.1:{port}"),
            root,
            _gateway: gateway,
        };
        let began = tokio::time::Instant::now();
        while second.list().await.is_err() {
            ensure!(began.elapsed() < PATIENCE, "{}", tail(&second.root.path().join("gateway.log")));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(second)
    }

    /// Runs `openshell`.
    pub async fn cli(&self, arguments: &[&str]) -> Result<Output> {
        self.cli_with(arguments, b"").await
    }

    /// Runs `openshell` with something on its standard input.
    pub async fn cli_with(&self, arguments: &[&str], input: &[u8]) -> Result<Output> {
        let mut child = self
            .command()
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("openshell")?;
        let mut stdin = child.stdin.take().context("stdin")?;
        let input = input.to_owned();
        let feeding = tokio::spawn(async move { stdin.write_all(&input).await });
        let output = tokio::time::timeout(self.patience, child.wait_with_output())
            .await
            .with_context(|| format!("openshell {arguments:?} does not end\n{}", self.sandbox_logs()))??;
        // A program that reads no input closes it.
        let _ = feeding.await?;
        Ok(output)
    }

    /// Forwards a local port to one in a sandbox, until the guard is dropped.
    pub fn forward(&self, name: &str, target: u16, local: u16) -> Result<Child> {
        let log = std::fs::File::create(self.root.path().join("forward.log"))?;
        self.command()
            .args(["forward", "service", name, "--target-port", &target.to_string()])
            .args(["--local", &format!("127.0.0.1:{local}")])
            .stdin(Stdio::null())
            .stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log))
            .spawn()
            .context("openshell forward")
    }

    /// `openshell`, not started yet.
    pub fn command(&self) -> Command {
        self.program()()
    }

    /// Makes commands where the bed itself cannot be had.
    pub fn program(&self) -> impl Fn() -> Command + Send + Sync + 'static {
        let (program, endpoint, home) =
            (self.bins.join("openshell"), self.endpoint.clone(), self.root.path().to_owned());
        move || {
            let mut command = Command::new(&program);
            command
                .env("OPENSHELL_GATEWAY_ENDPOINT", &endpoint)
                .env("XDG_STATE_HOME", &home)
                .env("XDG_CONFIG_HOME", &home)
                .env("NO_COLOR", "1")
                .kill_on_drop(true);
            command
        }
    }

    /// Runs `openshell`, which must succeed; its output.
    pub async fn say(&self, arguments: &[&str]) -> Result<String> {
        let output = self.cli(arguments).await?;
        ensure!(
            output.status.success(),
            "openshell {arguments:?}: {}\n{}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.gateway_log(),
            self.sandbox_logs(),
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Creates a sandbox that is ready when this returns; its id.
    pub async fn create(&self, name: &str, command: &[&str]) -> Result<String> {
        self.create_with(name, &["--driver-config-json", SLEEPLESS], command).await
    }

    /// Creates a sandbox with options of its own.
    pub async fn create_with(&self, name: &str, options: &[&str], command: &[&str]) -> Result<String> {
        let fixed = ["sandbox", "create", "--name", name, "--detach"];
        self.say(&[&fixed, options, &["--"], command].concat()).await?;
        self.until_phase(name, "Ready").await?;
        let found = self.listed(name).await?;
        found
            .and_then(|sandbox| sandbox["id"].as_str().map(str::to_owned))
            .with_context(|| format!("{name} has no id"))
    }

    async fn listed(&self, name: &str) -> Result<Option<serde_json::Value>> {
        let listed: Vec<serde_json::Value> =
            serde_json::from_str(&self.say(&["sandbox", "list", "-o", "json"]).await?)?;
        Ok(listed.into_iter().find(|sandbox| sandbox["name"] == name))
    }

    /// What `exec` prints; it must succeed.
    pub async fn exec(&self, name: &str, script: &str) -> Result<String> {
        let said =
            self.say(&["sandbox", "exec", "--name", name, "--no-tty", "--", "sh", "-c", script]).await?;
        Ok(said.trim_end().to_owned())
    }

    /// The phase as users see it.
    pub async fn phase(&self, name: &str) -> Result<String> {
        let found = self.listed(name).await?;
        let phase = found.and_then(|sandbox| sandbox["phase"].as_str().map(str::to_owned));
        Ok(phase.unwrap_or_else(|| "gone".to_owned()))
    }

    /// Waits for a phase.
    pub async fn until_phase(&self, name: &str, phase: &str) -> Result<()> {
        self.until(&format!("{name} is {phase}"), async |bed| Ok(bed.phase(name).await? == phase)).await
    }

    /// Asks until something holds.
    pub async fn until(&self, what: &str, holds: impl AsyncFn(&Self) -> Result<bool>) -> Result<()> {
        let began = tokio::time::Instant::now();
        while began.elapsed() < self.patience {
            if holds(self).await? {
                return Ok(());
            }
            // Asked by command: there is nothing to wait on.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("not within {:?}: {what}\n{}\n{}", self.patience, self.gateway_log(), self.sandbox_logs())
    }

    /// Suspends an actor the way substrate does by itself.
    pub async fn fall_asleep(&mut self, uid: &str) -> Result<()> {
        let actor = Some(ActorRef { uid: uid.to_owned(), ..ActorRef::default() });
        let request =
            SuspendActorRequest { actor, cause: "idle".to_owned(), ..SuspendActorRequest::default() };
        tokio::time::timeout(self.patience, self.machine.api.suspend_actor(request)).await??;
        Ok(())
    }

    /// The actor of a sandbox.
    pub async fn actor(&mut self, uid: &str) -> Result<ateapi::Actor> {
        let actor = Some(ActorRef { uid: uid.to_owned(), ..ActorRef::default() });
        Ok(self.machine.api.get_actor(ateapi::GetActorRequest { actor }).await?.into_inner())
    }

    /// Puts an actor on another worker, as a drain would: suspends it with its worker cordoned. What uses it wakes it.
    pub async fn leave_worker(&mut self, uid: &str) -> Result<String> {
        let from = self.actor(uid).await?.worker_id;
        let workers =
            self.machine.api.list_workers(ateapi::ListWorkersRequest {}).await?.into_inner().workers;
        for worker in workers {
            let request = ateapi::CordonWorkerRequest { uncordon: worker.id != from, id: worker.id };
            self.machine.api.cordon_worker(request).await?;
        }
        self.fall_asleep(uid).await?;
        Ok(from)
    }

    /// Waits until an actor runs on another worker than this.
    pub async fn until_elsewhere(&mut self, uid: &str, from: &str) -> Result<ateapi::Actor> {
        let began = tokio::time::Instant::now();
        while began.elapsed() < PATIENCE {
            let actor = self.actor(uid).await?;
            if actor.state() == ateapi::ActorState::Running && actor.worker_id != from {
                return Ok(actor);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bail!("{uid} does not run elsewhere than on {from}\n{}", self.sandbox_logs())
    }

    /// What a command prints as root of the sandbox, by substrate's own exec: the gateway knows nothing of it.
    pub fn as_root(&self, name: &str, script: &str) -> Result<String> {
        let output = self.machine.cli(&["exec", name, "--", "sh", "-c", script])?;
        ensure!(output.status.success(), "substrate exec {name}: {output:?}");
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    }

    /// Calls that the gateway has answered, by method.
    pub async fn calls(&self) -> Result<BTreeMap<String, u64>> {
        let text = get(self.metrics, "/metrics").await?;
        let mut calls = BTreeMap::new();
        for line in text.lines() {
            let Some(rest) = line.strip_prefix("openshell_server_grpc_requests_total{") else { continue };
            let method = rest.split("method=\"").nth(1).and_then(|rest| rest.split('"').next());
            let count = rest.rsplit(' ').next().and_then(|count| count.parse::<u64>().ok());
            if let Some((method, count)) = method.zip(count) {
                *calls.entry(method.to_owned()).or_default() += count;
            }
        }
        Ok(calls)
    }

    /// Asks the gateway as a sandbox would, with a token; `request` is in the wire's form.
    pub async fn call<
        Request: prost::Message + Default + 'static,
        Answer: prost::Message + Default + 'static,
    >(
        &self,
        method: &'static str,
        token: &str,
        request: Request,
    ) -> Result<std::result::Result<Answer, tonic::Status>> {
        let channel = tonic::transport::Endpoint::from_shared(self.endpoint.clone())?
            .timeout(PATIENCE)
            .connect()
            .await?;
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await?;
        let mut request = tonic::Request::new(tokio_stream::once(request));
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
        let codec = tonic_prost::ProstCodec::<Request, Answer>::default();
        let answer = client.client_streaming(request, PathAndQuery::from_static(method), codec).await;
        Ok(answer.map(tonic::Response::into_inner))
    }

    /// What a sandbox is let out to now.
    pub async fn egress(&mut self, uid: &str) -> Result<Vec<String>> {
        let generation = self.actor(uid).await?.generation;
        let request = ateapi::GetEgressRequest { actor_uid: uid.to_owned(), generation };
        let policy = self.machine.api.get_egress(request).await?.into_inner().policy.unwrap_or_default();
        Ok(policy.allow.iter().map(|rule| format!("{}:{:?}", rule.host, rule.ports)).collect())
    }

    /// The gateway's port, on loopback.
    pub fn port(&self) -> u16 {
        self.endpoint.rsplit(':').next().and_then(|port| port.parse().ok()).unwrap_or_default()
    }

    /// Waits until the gateway shows its users an event of a sandbox that says this.
    pub async fn until_told(&self, id: &str, text: &str) -> Result<()> {
        let channel = tonic::transport::Endpoint::from_shared(self.endpoint.clone())?.connect().await?;
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await?;
        let request = Watch { id: id.to_owned(), follow_events: true, event_tail: 100 };
        let path = PathAndQuery::from_static("/openshell.v1.OpenShell/WatchSandbox");
        let codec = tonic_prost::ProstCodec::<Watch, Told>::default();
        let mut told = client.server_streaming(tonic::Request::new(request), path, codec).await?.into_inner();
        let mut heard = Vec::new();
        let listening = async {
            while let Some(event) = told.message().await? {
                let Some(event) = event.event else { continue };
                heard.push(format!("{}: {}", event.reason, event.message));
                if event.message.contains(text) {
                    return Ok(());
                }
            }
            bail!("the watch ended")
        };
        match tokio::time::timeout(PATIENCE, listening).await {
            Ok(result) => result,
            Err(_) => bail!("nothing of {id} is told about {text:?}, only {heard:#?}"),
        }
    }

    /// Ends both in order.
    pub async fn stop(mut self) -> Result<()> {
        self.gateway.kill().await?;
        self.machine.stop()
    }

    /// What the gateway wrote.
    pub fn gateway_log(&self) -> String {
        tail(&self.root.path().join("gateway.log"))
    }

    fn sandbox_logs(&self) -> String {
        tail(&self.machine.dir.join("logs/substrate.log"))
    }
}

fn spawn_gateway(bins: &Path, root: &Path, config: &Path) -> Result<Child> {
    let log = std::fs::File::options().append(true).create(true).open(root.join("gateway.log"))?;
    Command::new(bins.join("openshell-gateway"))
        .arg("--config")
        .arg(config)
        .env("XDG_STATE_HOME", root)
        .env("XDG_CONFIG_HOME", root)
        .stdout(Stdio::from(log.try_clone()?))
        .stderr(Stdio::from(log))
        .kill_on_drop(true)
        .spawn()
        .context("openshell-gateway")
}

/// Another gateway.
pub struct Second {
    openshell: PathBuf,
    endpoint: String,
    root: tempfile::TempDir,
    _gateway: Child,
}

impl Second {
    async fn openshell(&self, arguments: &[&str]) -> Result<Output> {
        let run = Command::new(&self.openshell)
            .args(arguments)
            .env("OPENSHELL_GATEWAY_ENDPOINT", &self.endpoint)
            .env("XDG_STATE_HOME", self.root.path())
            .env("XDG_CONFIG_HOME", self.root.path())
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        tokio::time::timeout(PATIENCE, run).await.context("openshell does not end")?.context("openshell")
    }

    /// Its sandboxes.
    pub async fn list(&self) -> Result<Vec<serde_json::Value>> {
        let output = self.openshell(&["sandbox", "list", "-o", "json"]).await?;
        ensure!(output.status.success(), "{output:?}");
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Tries to create a sandbox.
    pub async fn create(&self, name: &str) -> Result<Output> {
        self.openshell(&["sandbox", "create", "--name", name, "--detach", "--", "sleep", "1"]).await
    }
}

/// `WatchSandboxRequest`, `SandboxStreamEvent` and `PlatformEvent` (proto/openshell.proto at 2f7fb655), as far as
/// they are used.
#[derive(Clone, PartialEq, prost::Message)]
struct Watch {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(bool, tag = "4")]
    follow_events: bool,
    #[prost(uint32, tag = "6")]
    event_tail: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Told {
    #[prost(message, optional, tag = "3")]
    event: Option<PlatformEvent>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PlatformEvent {
    #[prost(string, tag = "4")]
    reason: String,
    #[prost(string, tag = "5")]
    message: String,
}

/// A port that is free now: OpenShell's programs are told one.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// The body of an HTTP answer.
pub async fn get(port: u16, path: &str) -> Result<String> {
    let exchange = async {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\nhost: localhost\r\n\r\n").as_bytes()).await?;
        let mut answer = Vec::new();
        // Not to the end: a forward need not close when its target does.
        let (head, body) = loop {
            ensure!(stream.read_buf(&mut answer).await? > 0, "the answer broke off");
            let text = String::from_utf8_lossy(&answer);
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let lower = head.to_ascii_lowercase();
            let length =
                lower.split("content-length: ").nth(1).and_then(|rest| rest.split_whitespace().next());
            if length.and_then(|length| length.parse().ok()).is_some_and(|length: usize| body.len() >= length)
            {
                break (head.to_owned(), body.to_owned());
            }
        };
        ensure!(head.contains(" 200 "), "{head}");
        Ok(body)
    };
    tokio::time::timeout(PATIENCE, exchange).await?
}

fn tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}
