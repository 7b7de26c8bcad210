// SPDX-License-Identifier: Apache-2.0
//! A real `substrate up` in a directory of its own, for tests: started as a user would start it, spoken to through its
//! sockets, killed and started again, and checked at the end to have left nothing on the machine.
//!
//! Needs root, the built binaries and runsc (`scripts/setup`); a test that lacks one fails and says so.
#![forbid(unsafe_code)]

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use substrate_proto::ateapi::control_client::ControlClient;
use substrate_proto::ateapi::{self, ActorRef};
use substrate_proto::types;
use tonic::transport::Channel;

/// How long anything here may take before the test fails; generous, because the machine may be busy.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// How long a test's machine may live.
const LIFETIME: Duration = Duration::from_mins(5);

/// The root of the source tree.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("tests/integration lies two deep")
        .to_owned()
}

/// A binary of this build.
///
/// # Errors
/// When it has not been built.
pub fn binary(name: &str) -> Result<PathBuf> {
    // …/target/debug/deps/test-hash → …/target/debug
    let exe = std::env::current_exe()?;
    let dir = exe.parent().and_then(Path::parent).context("test binary outside a target directory")?;
    let path = dir.join(name);
    ensure!(path.exists(), "{} is not built: run `cargo build --workspace --bins`", path.display());
    Ok(path)
}

/// The pinned runsc of `scripts/setup`, or the one that `SUBSTRATE_RUNSC` names.
///
/// # Errors
/// When there is none.
pub fn runsc() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SUBSTRATE_RUNSC") {
        return Ok(path.into());
    }
    let path = workspace().join("target/tools/runsc");
    ensure!(path.exists(), "no runsc: run scripts/setup or set SUBSTRATE_RUNSC");
    Ok(path)
}

/// The reference of an example image.
///
/// # Errors
/// When `scripts/build-image` has not made it.
pub fn image(name: &str) -> Result<String> {
    let path = workspace().join("target/images").join(name);
    ensure!(
        path.join("index.json").exists(),
        "no image {name}: run scripts/build-image {name} {}",
        path.display()
    );
    Ok(format!("oci:{}", path.display()))
}

/// A running `substrate up`.
pub struct Machine {
    /// `--dir`.
    pub dir: PathBuf,
    /// Of the router.
    pub ingress: SocketAddr,
    /// Control plane client.
    pub api: ControlClient<Channel>,
    args: Vec<String>,
    /// Of the machine and its command line.
    environment: Vec<(String, String)>,
    child: Option<Child>,
    root: Option<tempfile::TempDir>,
    /// Disarmed when it goes.
    watchdog: std::sync::mpsc::Sender<()>,
}

/// Ends the whole test process when a machine lives too long: a test that hangs is one that failed.
fn watchdog(dir: &Path, limit: Duration) -> std::sync::mpsc::Sender<()> {
    let (armed, gone) = std::sync::mpsc::channel();
    let dir = dir.to_owned();
    std::thread::spawn(move || {
        if gone.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            eprintln!("the test with its machine in {} hangs: ended after {limit:?}", dir.display());
            std::process::abort();
        }
    });
    armed
}

impl Machine {
    /// Starts one with this many workers in a fresh directory.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn start(workers: u32, more: &[&str]) -> Result<Self> {
        let root = tempfile::Builder::new().prefix("sub-").tempdir_in("/tmp")?;
        let dir = root.path().join("d");
        Self::start_in(dir, Some(root), workers, more).await
    }

    /// Starts one in a given directory (kept).
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn start_in(
        dir: PathBuf,
        root: Option<tempfile::TempDir>,
        workers: u32,
        more: &[&str],
    ) -> Result<Self> {
        Self::start_with(dir, root, workers, more, &[]).await
    }

    /// Starts one in a given directory (kept), with more in its environment.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn start_with(
        dir: PathBuf,
        root: Option<tempfile::TempDir>,
        workers: u32,
        more: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        let runsc = runsc()?;
        let more = [&["--runsc", runsc.to_str().context("runsc path")?][..], more].concat();
        Self::start_without_runsc(dir, root, workers, &more, environment).await
    }

    /// Starts one whose runsc is what `more` says.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn start_without_runsc(
        dir: PathBuf,
        root: Option<tempfile::TempDir>,
        workers: u32,
        more: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        let environment: Vec<(String, String)> =
            environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut args: Vec<String> = [
            "up",
            "--json",
            "--dir",
            dir.to_str().context("directory name")?,
            "--workers",
            &workers.to_string(),
            "--listen",
            "127.0.0.1:0",
        ]
        .map(String::from)
        .to_vec();
        args.extend(more.iter().map(ToString::to_string));
        let watchdog = watchdog(&dir, LIFETIME);
        let (child, ingress, api) = spawn(&args, &environment, &dir).await?;
        Ok(Self { watchdog, dir, ingress, api, args, environment, child: Some(child), root })
    }

    /// Processes of its sandboxes (sentries), those of one worker or of all.
    pub fn sandboxes(&self, worker: Option<&str>) -> Vec<i32> {
        let mark = worker.map_or("/workers/".to_owned(), |worker| format!("/workers/{worker}/"));
        let line = |pid: &i32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let is_sentry = |line: Vec<u8>| {
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            line.contains(&mark) && line.contains(" boot ")
        };
        processes_naming(&self.dir.to_string_lossy()).into_iter().filter(|pid| is_sentry(line(pid))).collect()
    }

    /// Lets this machine live longer than others may.
    pub fn allow(&mut self, time: Duration) {
        self.watchdog = watchdog(&self.dir, time);
    }

    /// Kills the main process with SIGKILL; its workers live on.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill -9 of our own child");
            child.wait().expect("wait for our own child");
        }
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// When it does not end in time or not with success.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        kill(pid, Signal::SIGTERM)?;
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::spawn(move || drop(send.send(child.wait())));
        if let Ok(status) = receive.recv_timeout(PATIENCE) {
            let status = status?;
            ensure!(status.success(), "substrate up ended with {status}");
            return Ok(());
        }
        kill(pid, Signal::SIGKILL)?;
        bail!("substrate up did not end within {PATIENCE:?} of SIGTERM")
    }

    /// Directory of an actor's latest snapshot on the node. The one before it may be going away.
    ///
    /// # Errors
    /// When there is none.
    pub fn latest_on_node(&self, uid: &str) -> Result<PathBuf> {
        let of_actor = self.dir.join("node/snapshots").join(uid);
        let entries = std::fs::read_dir(&of_actor).with_context(|| of_actor.display().to_string())?;
        let dirs = entries.flatten().map(|entry| entry.path());
        // Their ids sort by time; when a directory was modified also tells of its deletion.
        dirs.filter(|dir| dir.join("record.json").exists())
            .max()
            .with_context(|| format!("no snapshot in {}", of_actor.display()))
    }

    /// Starts it again on the same directory.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn restart(&mut self) -> Result<()> {
        let (child, ingress, api) = spawn(&self.args, &self.environment, &self.dir).await?;
        self.child = Some(child);
        self.ingress = ingress;
        self.api = api;
        Ok(())
    }

    /// Runs the command line against this machine.
    ///
    /// # Errors
    /// When it cannot be run at all.
    pub fn cli(&self, args: &[&str]) -> Result<Output> {
        Ok(Command::new(binary("substrate")?)
            .envs(self.environment.iter().cloned())
            .arg("--socket")
            .arg(self.dir.join("run/ateapi.sock"))
            .args(args)
            .stdin(Stdio::null())
            .output()?)
    }

    /// Creates the counter actor and waits until it runs.
    ///
    /// # Errors
    /// When a call is refused.
    pub async fn counter(
        &mut self,
        name: &str,
        change: impl FnOnce(&mut types::TemplateSpec),
    ) -> Result<ateapi::Actor> {
        let mut spec = counter_template(image("counter")?);
        change(&mut spec);
        self.ensure_atespace("default").await?;
        self.api
            .create_template(ateapi::CreateTemplateRequest {
                atespace: "default".into(),
                name: format!("{name}-template"),
                spec: Some(spec),
                ..Default::default()
            })
            .await?;
        self.api
            .create_actor(ateapi::CreateActorRequest {
                atespace: "default".into(),
                name: name.into(),
                spec: Some(types::ActorSpec { template: format!("{name}-template"), ..Default::default() }),
                start: false,
                ..Default::default()
            })
            .await?;
        self.resume(name).await
    }

    /// Makes sure an atespace exists.
    ///
    /// # Errors
    /// When the control plane refuses.
    pub async fn ensure_atespace(&mut self, name: &str) -> Result<()> {
        match self
            .api
            .create_atespace(ateapi::CreateAtespaceRequest { name: name.into(), ..Default::default() })
            .await
        {
            Ok(_) => Ok(()),
            Err(status) if status.code() == tonic::Code::AlreadyExists => Ok(()),
            Err(status) => Err(status.into()),
        }
    }

    /// Resumes an actor.
    ///
    /// # Errors
    /// When the control plane refuses.
    pub async fn resume(&mut self, name: &str) -> Result<ateapi::Actor> {
        let answer = self
            .api
            .resume_actor(ateapi::ResumeActorRequest { actor: Some(actor(name)), ..Default::default() })
            .await?;
        answer.into_inner().actor.context("answer without actor")
    }

    /// Suspends an actor.
    ///
    /// # Errors
    /// When the control plane refuses.
    pub async fn suspend(&mut self, name: &str) -> Result<ateapi::SnapshotAnswer> {
        Ok(self
            .api
            .suspend_actor(ateapi::SuspendActorRequest { actor: Some(actor(name)), ..Default::default() })
            .await?
            .into_inner())
    }

    /// Reads an actor.
    ///
    /// # Errors
    /// When there is none.
    pub async fn get(&mut self, name: &str) -> Result<ateapi::Actor> {
        Ok(self.api.get_actor(ateapi::GetActorRequest { actor: Some(actor(name)) }).await?.into_inner())
    }

    /// Waits until an actor is in a state.
    ///
    /// # Errors
    /// When it is not within [`PATIENCE`].
    pub async fn wait_for(&mut self, name: &str, state: ateapi::ActorState) -> Result<ateapi::Actor> {
        let mut stream = self
            .api
            .watch(ateapi::WatchRequest { kinds: vec!["actor".into()], ..Default::default() })
            .await?
            .into_inner();
        let mut last = "never seen".to_owned();
        let reached = tokio::time::timeout(PATIENCE, async {
            while let Some(change) = stream.message().await? {
                let Some(ateapi::watch_response::Change::Actor(actor)) = change.change else { continue };
                if actor.name == name {
                    if actor.state() == state {
                        return Ok(actor);
                    }
                    last = format!("{:?} {} {}", actor.state(), actor.reason, actor.message);
                }
            }
            bail!("the watch ended")
        })
        .await;
        reached.with_context(|| format!("actor {name} did not become {state:?}, it is {last}"))?
    }

    /// A client of an actor through the router.
    ///
    /// # Errors
    /// When there is no token.
    pub fn client(&self, name: &str) -> Result<Client> {
        let token = self.cli(&["token"])?;
        ensure!(token.status.success(), "substrate token: {}", String::from_utf8_lossy(&token.stderr));
        Ok(Client {
            http: hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build_http(),
            ingress: self.ingress,
            actor: format!("default/{name}"),
            bearer: format!("Bearer {}", String::from_utf8(token.stdout)?.trim()),
        })
    }

    /// One request to an actor through the router: status and body.
    ///
    /// # Errors
    /// When no complete answer arrives.
    pub async fn http(&self, name: &str, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
        let client = self.client(name)?;
        let answer =
            tokio::time::timeout(PATIENCE, client.send(method, path, body)).await.context("no answer")??;
        Ok((answer.status, answer.body))
    }

    /// Raises the counter of an actor: its count and nonce.
    ///
    /// # Errors
    /// When it does not answer 200.
    pub async fn count(&self, name: &str) -> Result<(u64, String)> {
        let (status, body) = self.http(name, "GET", "/", "").await?;
        ensure!(status == 200, "{name} answered {status}: {body}");
        let value: serde_json::Value = serde_json::from_str(&body)?;
        let nonce = value["nonce"].as_str().context("no nonce")?.to_owned();
        Ok((value["count"].as_u64().context("no count")?, nonce))
    }

    /// Events about an actor, oldest first, as (reason, message).
    ///
    /// # Errors
    /// When the control plane refuses.
    pub async fn events(&mut self, name: &str) -> Result<Vec<(String, String)>> {
        let answer = self
            .api
            .list_events(ateapi::ListEventsRequest { subject: name.into(), ..Default::default() })
            .await?;
        Ok(answer.into_inner().events.into_iter().map(|event| (event.reason, event.message)).collect())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.child.is_some()
            && let Err(error) = self.stop()
        {
            eprintln!("stopping the test's machine: {error:#}");
        }
        // A machine whose main process was killed has workers left: end those of this directory.
        let own = self.dir.to_string_lossy().into_owned();
        for pid in processes_naming(&own) {
            if let Err(error) = kill(Pid::from_raw(pid), Signal::SIGKILL) {
                eprintln!("ending process {pid} of the test: {error}");
            }
        }
        // What was killed unmounted nothing.
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for point in mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)).map(Path::new) {
            if point.starts_with(&self.dir)
                && let Err(error) = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH)
            {
                eprintln!("unmounting {}: {error}", point.display());
            }
        }
        if let Some(root) = self.root.take()
            && let Err(error) = root.close()
        {
            eprintln!("removing the test's directory: {error}");
        }
    }
}

/// Sends requests to one actor.
pub struct Client {
    http: hyper_util::client::legacy::Client<HttpConnector, Full<Bytes>>,
    ingress: SocketAddr,
    actor: String,
    bearer: String,
}

/// A complete answer.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The header `ate-durability`.
    pub durability: Option<String>,
    /// All of it.
    pub body: String,
}

impl Client {
    async fn request(&self, method: &str, path: &str, body: &str) -> Result<http::Response<Incoming>> {
        let request = http::Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.ingress))
            .header("ate-actor", &self.actor)
            .header("ate-authorization", &self.bearer)
            .body(Full::new(Bytes::from(body.to_owned())))?;
        Ok(self.http.request(request).await?)
    }

    /// Sends a request and reads its whole answer.
    ///
    /// # Errors
    /// When the answer does not arrive or not to its end.
    pub async fn send(&self, method: &str, path: &str, body: &str) -> Result<Answer> {
        let answer = self.request(method, path, body).await?;
        let status = answer.status().as_u16();
        let durability = answer.headers().get("ate-durability").and_then(|value| value.to_str().ok());
        let durability = durability.map(str::to_owned);
        let body = answer.into_body().collect().await?.to_bytes();
        Ok(Answer { status, durability, body: String::from_utf8_lossy(&body).into_owned() })
    }

    /// Opens an answer to be read as it comes.
    ///
    /// # Errors
    /// When it is not 200.
    pub async fn stream(&self, path: &str) -> Result<Stream> {
        let answer = tokio::time::timeout(PATIENCE, self.request("GET", path, "")).await??;
        ensure!(answer.status() == 200, "{path} answered {}", answer.status());
        Ok(Stream(answer.into_body()))
    }
}

/// An answer that is still coming.
pub struct Stream(Incoming);

impl Stream {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// When the connection broke.
    pub async fn next(&mut self) -> Result<Option<String>> {
        let Some(frame) = self.0.frame().await else { return Ok(None) };
        let data = frame?.into_data().unwrap_or_default();
        Ok(Some(String::from_utf8_lossy(&data).into_owned()))
    }
}

/// A reference to an actor of the default atespace.
pub fn actor(name: &str) -> ActorRef {
    ActorRef { atespace: "default".into(), name: name.into(), uid: String::new() }
}

/// A template of the counter in an image that has it: ready when it answers, never put to sleep.
pub fn counter_template(image: String) -> types::TemplateSpec {
    types::TemplateSpec {
        containers: vec![types::Container {
            name: "main".into(),
            image,
            ports: vec![8080],
            readiness: Some(types::Readiness {
                http_get: Some(types::HttpGet { path: "/healthz".into(), port: 8080 }),
                ..Default::default()
            }),
            ..Default::default()
        }],
        idle: Some(types::IdlePolicy { suspend_after: "never".into(), ..Default::default() }),
        ..Default::default()
    }
}

/// Files below a directory, without those that go away meanwhile.
///
/// # Errors
/// When it cannot be read.
pub fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    fn collect(dir: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            if !path.is_dir() {
                found.push(path);
                continue;
            }
            match collect(&path, found) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                collected => collected?,
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    collect(dir, &mut found).with_context(|| dir.display().to_string())?;
    Ok(found)
}

/// Processes whose command line mentions a text.
pub fn processes_naming(text: &str) -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let own = std::process::id();
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| u32::try_from(*pid) != Ok(own))
        .filter(|pid| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(text))
        })
        .collect()
}

async fn spawn(
    args: &[String],
    environment: &[(String, String)],
    dir: &Path,
) -> Result<(Child, SocketAddr, ControlClient<Channel>)> {
    let mut child = Command::new(binary("substrate")?)
        .envs(environment.iter().cloned())
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdout = child.stdout.take().context("no stdout")?;
    let (send, receive) = tokio::sync::oneshot::channel();
    // Reads on after the ready line, so that the child never blocks on a full pipe.
    std::thread::spawn(move || {
        let mut lines = BufReader::new(stdout).lines();
        let first = lines.next();
        drop(send.send(first));
        for _ in lines {}
    });
    let line = tokio::time::timeout(PATIENCE, receive).await.context("no ready line")??;
    let Some(line) = line else {
        let output = child.wait_with_output()?;
        bail!("substrate up ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    };
    if let Some(stderr) = child.stderr.take() {
        std::thread::spawn(move || for _ in BufReader::new(stderr).lines() {});
    }
    let ready: serde_json::Value = serde_json::from_str(&line?).context("the ready line is not JSON")?;
    let ingress = ready["ingress"].as_str().context("no ingress in the ready line")?.parse()?;
    let endpoint = format!("unix:{}", dir.join("run/ateapi.sock").display());
    let channel = tonic::transport::Endpoint::from_shared(endpoint)?.connect().await?;
    Ok((child, ingress, ControlClient::new(channel)))
}
