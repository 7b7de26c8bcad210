// SPDX-License-Identifier: Apache-2.0
//! A stock OpenShell gateway in front of a machine: its own binaries, keys made for the test, and its command line.
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use substrate_integration::{Machine, PATIENCE, image};
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
}

impl Bed {
    /// Starts both; the gateway is ready.
    pub async fn start(bins: &Path, workers: u32) -> Result<Self> {
        let root = tempfile::Builder::new().prefix("gw-").tempdir_in("/tmp")?;
        let bins = bins.to_owned();
        let certificates = root.path().join("certs");
        let made = std::process::Command::new(bins.join("openshell-gateway"))
            .args(["generate-certs", "--server-san", "host.openshell.internal", "--output-dir"])
            .arg(&certificates)
            .output()
            .context("openshell-gateway generate-certs")?;
        ensure!(made.status.success(), "generate-certs: {}", String::from_utf8_lossy(&made.stderr));
        let port = free_port()?;
        let dir = root.path().join("d");
        let jwt = certificates.join("jwt");
        let toml = format!(
            "[openshell.gateway]\ncompute_drivers = [\"substrate\"]\ndisable_tls = true\n\
             bind_address = \"127.0.0.1:{port}\"\n\
             [openshell.gateway.auth]\nallow_unauthenticated_users = true\n\
             [openshell.gateway.gateway_jwt]\nsigning_key_path = \"{}\"\npublic_key_path = \"{}\"\nkid_path = \"{}\"\n\
             gateway_id = \"test\"\nttl_secs = 0\n\
             [openshell.drivers.substrate]\nsocket_path = \"{}\"\ngateway_endpoint = \"http://127.0.0.1:{port}\"\n\
             default_image = {:?}\n\
             [openshell.drivers.substrate.supervisor]\nmode = \"process\"\npath = \"{}\"\n",
            jwt.join("signing.pem").display(),
            jwt.join("public.pem").display(),
            jwt.join("kid").display(),
            dir.join("run/driver/driver.sock").display(),
            image("helpdesk")?,
            bins.join("openshell-sandbox").display(),
        );
        let config = root.path().join("gateway.toml");
        std::fs::write(&config, toml)?;
        let up = root.path().join("up.toml");
        std::fs::write(&up, format!("[driver]\ngateway_config = \"{}\"\n", config.display()))?;
        let machine =
            Machine::start_in(dir, None, workers, &["--config", up.to_str().context("a path in UTF-8")?])
                .await?;
        let log = std::fs::File::create(root.path().join("gateway.log"))?;
        let gateway = Command::new(bins.join("openshell-gateway"))
            .arg("--config")
            .arg(&config)
            .env("XDG_STATE_HOME", root.path())
            .env("XDG_CONFIG_HOME", root.path())
            .stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log))
            .kill_on_drop(true)
            .spawn()
            .context("openshell-gateway")?;
        let bed = Self { machine, gateway, bins, root, endpoint: format!("http://127.0.0.1:{port}") };
        bed.until("the gateway answers", async |bed| {
            Ok(bed.cli(&["sandbox", "list"]).await?.status.success())
        })
        .await?;
        Ok(bed)
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
        let output = tokio::time::timeout(PATIENCE, child.wait_with_output())
            .await
            .with_context(|| format!("openshell {arguments:?} does not end"))??;
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

    fn command(&self) -> Command {
        let mut command = Command::new(self.bins.join("openshell"));
        command
            .env("OPENSHELL_GATEWAY_ENDPOINT", &self.endpoint)
            .env("XDG_STATE_HOME", self.root.path())
            .env("XDG_CONFIG_HOME", self.root.path())
            .env("NO_COLOR", "1")
            .kill_on_drop(true);
        command
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
        let config = r#"{"substrate":{"idle":{"suspendAfter":"never"}}}"#;
        let fixed = ["sandbox", "create", "--name", name, "--detach", "--driver-config-json", config, "--"];
        self.say(&[&fixed, command].concat()).await?;
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
        while began.elapsed() < PATIENCE {
            if holds(self).await? {
                return Ok(());
            }
            // Asked by command: there is nothing to wait on.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("not within {PATIENCE:?}: {what}\n{}\n{}", self.gateway_log(), self.sandbox_logs())
    }

    /// Suspends an actor the way substrate does by itself.
    pub async fn fall_asleep(&mut self, uid: &str) -> Result<()> {
        let actor = Some(ActorRef { uid: uid.to_owned(), ..ActorRef::default() });
        let request =
            SuspendActorRequest { actor, cause: "idle".to_owned(), ..SuspendActorRequest::default() };
        tokio::time::timeout(PATIENCE, self.machine.api.suspend_actor(request)).await??;
        Ok(())
    }

    /// The actor of a sandbox.
    pub async fn actor(&mut self, uid: &str) -> Result<ateapi::Actor> {
        let actor = Some(ActorRef { uid: uid.to_owned(), ..ActorRef::default() });
        Ok(self.machine.api.get_actor(ateapi::GetActorRequest { actor }).await?.into_inner())
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
