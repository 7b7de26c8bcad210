// SPDX-License-Identifier: Apache-2.0
//! Everything that the demo runs on: a `substrate up` of its own in a fresh directory, the internet in a namespace,
//! and the clients. What is started here is ended here.
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use hyper::header::{CONTENT_TYPE, HOST};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use substrate_proto::ateapi as api;
use substrate_proto::compute::DriverSandbox;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use super::gateway::{Double, Gateway, Recipe, WORKSPACE};
use super::model::Model;
use super::network::{DOCS, Internet, MODEL};
use super::report::{Miss, expect};
use super::stock::Prepared;
use crate::args::Demo;
use crate::client::{Control, UpInfo, connect_unix, control};
use crate::cmd::request::sign;
use crate::failure::{Doing as _, Failure};
use crate::http::Answer;

/// Worker slots of the demo.
pub const WORKERS: usize = 4;
/// How long `up` may take to become ready, and to end.
const UP_PATIENCE: Duration = Duration::from_mins(2);
/// How long one request may take, waking included.
pub const REQUEST_PATIENCE: Duration = Duration::from_secs(90);

/// How long an agent may take to listen.
const AGENT_PATIENCE: Duration = Duration::from_secs(20);

/// The running demo.
pub struct World {
    /// What `up` said when it was ready.
    pub info: UpInfo,
    /// The control plane.
    pub control: Control,
    /// The driver, as the gateway uses it.
    pub gateway: Gateway,
    /// What its sandboxes have in common.
    pub recipe: Recipe,
    /// The internet.
    pub internet: Internet,
    /// Which model answers.
    pub model: Model,
    /// Sandboxes by name.
    pub sandboxes: BTreeMap<String, DriverSandbox>,
    /// Facts kept from beat to beat.
    pub memory: Memory,
    up: Child,
    scratch: Option<tempfile::TempDir>,
    token: String,
}

/// What later beats compare with.
#[derive(Debug, Default)]
pub struct Memory {
    /// Alice's nonce.
    pub alice_nonce: String,
    /// The worker alice was last seen on.
    pub alice_worker: String,
    /// Alice's answered turns.
    pub alice_turns: u64,
    /// The template both share.
    pub template: String,
}

impl World {
    /// Starts it.
    ///
    /// # Errors
    /// What could not be started; nothing is left then.
    pub async fn start(options: &Demo) -> Result<Self, Failure> {
        let exe = std::env::current_exe().doing(|| "cannot tell this program's path".to_owned())?;
        let places = Places::find(options, &exe)?;
        // Short, because sockets live below it.
        let scratch = tempfile::Builder::new()
            .prefix("sbd-")
            .tempdir_in("/tmp")
            .doing(|| "cannot make a directory in /tmp".to_owned())?;
        let model = Model::from_environment().await?;
        let prepared = match &options.gateway {
            Some(bins) => Some(Prepared::make(scratch.path(), &places.examples, bins).await?),
            None => None,
        };
        let mut internet = Internet::start(scratch.path(), &places.examples, &model.names).await?;
        let started = start_up(options, &exe, scratch.path(), &internet, &model, prepared.as_ref()).await;
        let (mut up, info) = match started {
            Ok(started) => started,
            Err(failure) => {
                internet.stop().await;
                return Err(failure);
            }
        };
        match connect(&info, prepared).await {
            Ok((control, gateway, token)) => Ok(Self {
                recipe: recipe(options, &places.image, &model),
                info,
                control,
                gateway,
                internet,
                model,
                sandboxes: BTreeMap::new(),
                memory: Memory::default(),
                up,
                scratch: Some(scratch),
                token,
            }),
            Err(failure) => {
                end_up(&mut up, &info.dir).await;
                internet.stop().await;
                Err(failure)
            }
        }
    }

    /// The actor behind a sandbox.
    pub async fn actor(&mut self, name: &str) -> Result<api::Actor, Miss> {
        let reference = api::ActorRef { atespace: WORKSPACE.into(), name: name.into(), uid: String::new() };
        let answer = self.control.get_actor(api::GetActorRequest { actor: Some(reference) }).await?;
        Ok(answer.into_inner())
    }

    /// A sandbox that an earlier beat created.
    pub fn sandbox(&self, name: &str) -> Result<DriverSandbox, Miss> {
        self.sandboxes
            .get(name)
            .cloned()
            .ok_or_else(|| Failure::general(format!("{name} was never created")).into())
    }

    /// All workers.
    pub async fn workers(&mut self) -> Result<Vec<api::Worker>, Miss> {
        Ok(self.control.list_workers(api::ListWorkersRequest {}).await?.into_inner().workers)
    }

    /// One worker.
    pub async fn worker(&mut self, id: &str) -> Result<api::Worker, Miss> {
        let found = self.workers().await?.into_iter().find(|worker| worker.id == id);
        found.ok_or_else(|| Miss { expected: format!("worker {id}"), seen: "it is not listed".to_owned() })
    }

    /// A request through the router.
    pub fn request(
        &self,
        actor: &str,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Request<Full<Bytes>>, Failure> {
        let content = body.map(ToString::to_string).unwrap_or_default();
        Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, self.info.ingress.to_string())
            .header(CONTENT_TYPE, "application/json")
            .header("ate-actor", format!("{WORKSPACE}/{actor}"))
            .header("ate-authorization", format!("Bearer {}", self.token))
            .body(Full::new(Bytes::from(content)))
            .doing(|| format!("{method} {path} is no request"))
    }

    /// One request through the router, whatever its status.
    pub async fn http(
        &self,
        actor: &str,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Answer, Miss> {
        let request = self.request(actor, method, path, body)?;
        Ok(crate::http::send(self.info.ingress, request, REQUEST_PATIENCE).await?)
    }

    /// One request that has to be answered with 200 and JSON.
    pub async fn json(
        &self,
        actor: &str,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, Miss> {
        let answer = self.http(actor, method, path, body).await?;
        Self::checked_json(actor, method, path, &answer)
    }

    /// The JSON of an answer that has to be a 200.
    pub fn checked_json(actor: &str, method: &str, path: &str, answer: &Answer) -> Result<Value, Miss> {
        let what = format!("{method} {path} at {actor} answered with 200 and JSON");
        expect(answer.status == 200, what.clone(), format!("{}: {}", answer.status, answer.text().trim()))?;
        serde_json::from_slice(&answer.body)
            .map_err(|error| Miss { expected: what, seen: format!("{error}: {}", answer.text().trim()) })
    }

    /// Waits until the agent answers: behind a supervisor it starts after the sandbox is ready.
    pub async fn until_answers(&self, actor: &str) -> Result<(), Miss> {
        let began = std::time::Instant::now();
        loop {
            let answer = self.http(actor, "GET", "/healthz", None).await?;
            if answer.status == 200 {
                return Ok(());
            }
            let waits = began.elapsed() < AGENT_PATIENCE;
            expect(
                waits,
                format!("{actor} to answer /healthz"),
                format!("{}: {}", answer.status, answer.text()),
            )?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The agent's `/status`.
    pub async fn status(&self, actor: &str) -> Result<Value, Miss> {
        self.json(actor, "GET", "/status", None).await
    }

    /// The agent's `/chat`; the answer must not have fallen back to `async`.
    pub async fn chat(&self, actor: &str, message: &str) -> Result<Value, Miss> {
        let body = json!({"message": message});
        let answer = self.http(actor, "POST", "/chat", Some(&body)).await?;
        let durability = answer.headers.get("ate-durability").and_then(|value| value.to_str().ok());
        expect(
            durability != Some("async"),
            "a reply held until its checkpoint",
            "ate-durability: async: it fell back, see the events of the actor",
        )?;
        Self::checked_json(actor, "POST", "/chat", &answer)
    }

    /// Events of an actor, oldest first.
    pub async fn events(&mut self, actor: &str) -> Result<Vec<api::Event>, Miss> {
        let request = api::ListEventsRequest {
            atespace: WORKSPACE.into(),
            subject: actor.into(),
            limit: 1000,
            ..Default::default()
        };
        Ok(self.control.list_events(request).await?.into_inner().events)
    }

    /// Lines of the egress audit log from a byte offset on, and the offset after them.
    pub fn audit(&self, from: u64) -> Result<(Vec<Value>, u64), Failure> {
        let path = self.info.dir.join("logs/egress-audit.jsonl");
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Failure::general(format!("cannot read {}: {error}", path.display()))),
        };
        let new = text.get(from as usize..).unwrap_or_default();
        // The last line may be half written.
        let whole = new.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let lines = new[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let records = lines.filter_map(|line| serde_json::from_slice(line).ok()).collect();
        Ok((records, from + whole as u64))
    }

    /// The newest lines of the machine's log, for a demo that failed.
    pub fn last_log_lines(&self, count: usize) -> String {
        let text = std::fs::read_to_string(self.info.dir.join("logs/substrate.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let own = lines[lines.len().saturating_sub(count)..].join("\n");
        match self.gateway.stock() {
            Some(stock) => format!("{own}\nthe gateway's:\n{}", stock.last_log_lines(count)),
            None => own,
        }
    }

    /// Ends everything and removes it.
    pub async fn stop(mut self) {
        if let Gateway::Stock(stock) = self.gateway {
            stock.end().await;
        }
        end_up(&mut self.up, &self.info.dir).await;
        self.internet.stop().await;
        if let Some(scratch) = self.scratch.take() {
            let path = scratch.path().to_owned();
            unmount_below(&path);
            if let Err(error) = scratch.close() {
                eprintln!("substrate: cannot remove {}: {error}", path.display());
            }
        }
    }

    /// Leaves everything running and says how to use and end it.
    pub fn keep(mut self) -> String {
        let path = self.scratch.take().map(tempfile::TempDir::keep).unwrap_or_default();
        let pid = self.info.pid;
        let socket = self.info.api_socket.display().to_string();
        let gateway = match self.gateway {
            Gateway::Double(_) => String::new(),
            Gateway::Stock(stock) => stock.keep(),
        };
        let text = format!(
            "{gateway}kept: substrate --socket {socket} -a {WORKSPACE} get actors\n\
             end:  kill {pid}; ip netns pids {0} | xargs kill; ip netns del {0}; rm -r {1}",
            self.internet.name(),
            path.display()
        );
        // Their handles would end them.
        std::mem::forget(self.up);
        self.internet.keep();
        text
    }
}

/// What the demo needs of the checkout.
struct Places {
    image: String,
    examples: PathBuf,
}

impl Places {
    fn find(options: &Demo, exe: &Path) -> Result<Self, Failure> {
        let here = std::env::current_dir().unwrap_or_default();
        let roots: Vec<PathBuf> = crate::doctor::workspace(exe)
            .into_iter()
            .chain(crate::doctor::workspace(&here.join("x")))
            .collect();
        let examples = match &options.examples {
            Some(dir) => dir.clone(),
            None => find(&roots, "examples/helpdesk", "responder.py").ok_or_else(|| {
                Failure::general("examples/helpdesk was not found")
                    .with_way_out("name it with --examples, or run it in the checkout")
            })?,
        };
        let image = if let Some(image) = &options.image {
            crate::cmd::create::absolute_image(image)?
        } else {
            let layout = find(&roots, "target/images/helpdesk", "index.json").ok_or_else(|| {
                Failure::general("the image target/images/helpdesk was not found")
                    .with_way_out("build it with `scripts/build-image helpdesk`, or name one with --image")
            })?;
            format!("oci:{}", layout.display())
        };
        Ok(Self { image, examples })
    }
}

fn find(roots: &[PathBuf], dir: &str, file: &str) -> Option<PathBuf> {
    roots.iter().map(|root| root.join(dir)).find(|path| path.join(file).exists())
}

fn recipe(options: &Demo, image: &str, model: &Model) -> Recipe {
    let has_supervisor = options.gateway.is_some();
    let mut allow = vec![json!({"host": DOCS, "ports": [443]})];
    // With a gateway the sandbox's policy has the rule for the model.
    if !has_supervisor {
        allow.push(json!({"host": MODEL, "ports": [80], "protocol": "http"}));
    }
    allow.extend(model.rule.clone());
    Recipe {
        image: image.to_owned(),
        class: options.class.clone(),
        environment: model.environment.clone(),
        allow,
        has_supervisor,
    }
}

async fn start_up(
    options: &Demo,
    exe: &Path,
    scratch: &Path,
    internet: &Internet,
    model: &Model,
    gateway: Option<&Prepared>,
) -> Result<(Child, UpInfo), Failure> {
    let config = scratch.join("up.toml");
    let dir = gateway.map_or_else(|| scratch.join("d"), Prepared::state);
    // A table of its own, so it comes last.
    let text = model.config.clone() + &gateway.map(Prepared::config).unwrap_or_default();
    std::fs::write(&config, text).doing(|| format!("cannot write {}", config.display()))?;
    let mut command = Command::new(exe);
    command
        .arg("up")
        .arg("--json")
        .args(workers_of(&options.class))
        .args(["--listen", "127.0.0.1:0", "--log", "debug"])
        .args(["--egress-resolver", &internet.addresses.dns().to_string()])
        .arg("--dir")
        .arg(&dir)
        .arg("--config")
        .arg(&config);
    for (option, path) in [("--runsc", &options.runsc), ("--ateom", &options.ateom)] {
        if let Some(path) = path {
            command.arg(option).arg(path);
        }
    }
    let complaints = scratch.join("up.err");
    let mut up = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // A file, not a pipe: it may outlive us.
        .stderr(
            std::fs::File::create(&complaints).doing(|| format!("cannot write {}", complaints.display()))?,
        )
        // Ctrl-C is the demo's: it ends its machine in order.
        .process_group(0)
        .spawn()
        .doing(|| format!("cannot start {}", exe.display()))?;
    let Some(stdout) = up.stdout.take() else { return Err(Failure::general("substrate up has no output")) };
    let mut line = String::new();
    let read = tokio::time::timeout(UP_PATIENCE, BufReader::new(stdout).read_line(&mut line)).await;
    match read {
        Ok(Ok(count)) if count > 0 => {
            let info =
                serde_json::from_str(&line).doing(|| format!("the ready line {line:?} is not understood"))?;
            Ok((up, info))
        }
        Ok(_) => {
            let text = std::fs::read_to_string(&complaints).unwrap_or_default();
            Err(Failure::general(format!("substrate up did not start:\n{}", text.trim())))
        }
        Err(_) => {
            end_up(&mut up, &dir).await;
            Err(Failure::general(format!("substrate up was not ready within {} s", UP_PATIENCE.as_secs())))
        }
    }
}

/// All workers are of the demo's class.
fn workers_of(class: &str) -> [String; 4] {
    let (gvisor, microvm) = if class == "microvm" { (0, WORKERS) } else { (WORKERS, 0) };
    ["--workers".to_owned(), gvisor.to_string(), "--microvm-workers".to_owned(), microvm.to_string()]
}

async fn connect(info: &UpInfo, prepared: Option<Prepared>) -> Result<(Control, Gateway, String), Failure> {
    let channel = connect_unix(&info.api_socket)
        .await
        .doing(|| format!("cannot connect to the control plane at {}", info.api_socket.display()))?;
    let gateway = match prepared {
        Some(prepared) => Gateway::Stock(prepared.start().await?),
        None => Gateway::Double(Double::connect(&info.driver_socket).await?),
    };
    let token = sign(&info.dir, WORKSPACE, None, Duration::from_hours(1))?;
    Ok((control(channel), gateway, token))
}

/// SIGTERM, then SIGKILL; and whatever of its directory still runs after that is ended, and said.
async fn end_up(up: &mut Child, dir: &Path) {
    if let Some(pid) = up.id() {
        if let Err(error) = kill(Pid::from_raw(pid as i32), Signal::SIGTERM) {
            eprintln!("substrate: cannot end the demo's machine: {error}");
        }
        match tokio::time::timeout(UP_PATIENCE, up.wait()).await {
            Ok(Ok(status)) if status.success() => {}
            Ok(Ok(status)) => eprintln!("substrate: the demo's machine ended with {status}"),
            _ => {
                eprintln!("substrate: the demo's machine did not end in time: it is killed");
                let _ = up.kill().await;
            }
        }
    }
    let left = processes_of(dir);
    for (pid, command) in &left {
        eprintln!("substrate: ending what is left of the demo: {pid} {command}");
        if let Err(error) = kill(Pid::from_raw(*pid), Signal::SIGKILL) {
            eprintln!("substrate: cannot end it: {error}");
        }
    }
}

/// What a machine that did not end in order left mounted.
fn unmount_below(dir: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let below = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .filter(|place| Path::new(place).starts_with(dir));
    for place in below.collect::<Vec<_>>().into_iter().rev() {
        if let Err(error) = nix::mount::umount2(place, nix::mount::MntFlags::MNT_DETACH) {
            eprintln!("substrate: cannot unmount {place}: {error}");
        }
    }
}

/// Processes whose command line names a directory of the demo's own.
fn processes_of(dir: &Path) -> Vec<(i32, String)> {
    let text = dir.to_string_lossy().into_owned();
    let own = std::process::id() as i32;
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != own)
        .filter_map(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            line.contains(&text).then(|| (pid, line.chars().take(100).collect()))
        })
        .collect()
}

/// A listener of this machine, for showing that an actor does not reach it although others do.
pub async fn listen_on(address: SocketAddr) -> Result<(SocketAddr, tokio::task::JoinHandle<()>), Failure> {
    let listener =
        tokio::net::TcpListener::bind(address).await.doing(|| format!("cannot listen on {address}"))?;
    let address = listener.local_addr().doing(|| "cannot tell the address".to_owned())?;
    let task = tokio::spawn(async move { while listener.accept().await.is_ok() {} });
    Ok((address, task))
}
