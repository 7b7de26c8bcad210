// SPDX-License-Identifier: Apache-2.0
//! Workers: one process (`ateom`) for each slot, and one task here that owns it.
//!
//! ```text
//!            ┌── adopt: process.json names a live process ──┐
//!   begin ───┤                                              ├─▶ CONNECTING ─▶ UP ── Watch: status, stats, notices ─▶
//!            └── fence what is left, start, note, cgroup ───┘       │          │
//!                          ▲                                        ▼          ▼
//!                          └── back off ◀── news: lost ◀── FENCED ◀── process ended, or does not answer
//! ```
//!
//! **Fencing.** When an ateom has died or does not answer, its whole control group is killed and seen empty before
//! anything else happens: before `WorkerLost` is told, before a call that was under way returns, and before another
//! ateom is started. If the group cannot be emptied (a process stuck in the kernel), the worker stays down and it is
//! tried again.
//!
//! **Restart of this process.** Workers outlive it: they have sessions, control groups and log files of their own. The
//! next one finds them by their notes and connects to their sockets; what a slot holds is asked of the slot.
//!
//! **Another runtime.** A worker that is adopted and was started with another runtime, or other settings, than it would
//! be now (`runtime` beside its note) is ended as soon as its slot is empty, and started with the new one.
//!
//! **Calls** do not pass through the task: they use the connection that [`Worker::up`] hands out. A call that fails
//! because the worker died waits for the fence in [`Worker::fenced_since`].
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ateom::cgroup::{Cgroup, Hierarchy};
use substrate_proto::ateom::ateom_client::AteomClient;
use substrate_proto::ateom::slot_status::Phase;
use substrate_proto::ateom::{
    GetCapabilitiesRequest, GetCapabilitiesResponse, GetStatusRequest, Notice, ShutdownRequest, SlotStatus,
    Stats, WatchRequest, slot_event,
};
use substrate_proto::types::Assignment;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use crate::asset::{AssetStore, RuntimeConfig, RuntimeFiles};
use crate::config::{MicrovmConfig, WorkerClass, WorkerConfig};
use crate::error::NodeError;

pub mod process;

use process::{Launch, Process};

/// How long a control group may take to become empty before it is tried again.
const FENCE: Duration = Duration::from_secs(30);
/// How long a worker whose process lives may be unreachable before it is killed: it would not enforce its lease.
const SILENCE: Duration = Duration::from_secs(30);
/// How long a worker may take to answer whether it lives.
const PROBE: Duration = Duration::from_secs(2);
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// A connection to an ateom.
pub type Client = AteomClient<Channel>;

/// What all workers of a node share.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `DIR/node/workers`.
    pub state: PathBuf,
    /// `RUN/workers`.
    pub run: PathBuf,
    /// `DIR/logs/workers`.
    pub logs: PathBuf,
    /// The program.
    pub ateom: PathBuf,
    /// Handed on.
    pub runsc: PathBuf,
    /// Handed on.
    pub runsc_sha256: Option<String>,
    /// For workers of the microVM class.
    pub microvm: Option<MicrovmConfig>,
    /// Handed on.
    pub egress_socket: PathBuf,
    /// Runtimes of the sandbox config.
    pub assets: Arc<AssetStore>,
    /// Parent of the workers' control groups.
    pub cgroup: String,
    /// How long a new one may take to answer.
    pub start_limit: Duration,
}

impl Settings {
    /// The program of a worker.
    fn launch(&self, id: &str, pool: &str, class: WorkerClass, files: RuntimeFiles) -> Launch {
        let path = |path: &Path| path.display().to_string();
        let mut args = vec![
            "--worker-id".to_owned(),
            id.to_owned(),
            "--pool".to_owned(),
            pool.to_owned(),
            "--state-dir".to_owned(),
            path(&self.state.join(id)),
            "--run-dir".to_owned(),
            path(&self.run.join(id)),
            "--egress-socket".to_owned(),
            path(&self.egress_socket),
            "--cgroup".to_owned(),
            format!("{}/{id}", self.cgroup),
        ];
        let program = match &self.microvm {
            Some(microvm) if class == WorkerClass::Microvm => {
                let (qemu, digest, is_packed) = match files.vmm {
                    Some(vmm) => (vmm.path, Some(vmm.sha256), vmm.is_packed),
                    None => (microvm.qemu.clone(), microvm.qemu_sha256.clone(), false),
                };
                args.extend(["--qemu".to_owned(), path(&qemu)]);
                args.extend(["--kernel".to_owned(), path(files.kernel.as_ref().unwrap_or(&microvm.kernel))]);
                args.extend(["--accelerator", microvm.accelerator.name(), "--kvm-known"].map(str::to_owned));
                args.push(path(&self.state.join("kvm.json")));
                let name = if is_packed { "--archive-sha256" } else { "--qemu-sha256" };
                args.extend(digest.iter().flat_map(|digest| [name.to_owned(), digest.clone()]));
                &microvm.ateom_binary
            }
            // A class without its settings is refused with the configuration.
            _ => {
                let (runsc, digest) = match files.runsc {
                    Some((runsc, digest)) => (runsc, Some(digest)),
                    None => (self.runsc.clone(), self.runsc_sha256.clone()),
                };
                args.extend(["--runsc".to_owned(), path(&runsc)]);
                args.extend(digest.iter().flat_map(|digest| ["--runsc-sha256".to_owned(), digest.clone()]));
                &self.ateom
            }
        };
        Launch { program: program.clone(), args, log: self.log(id), note: self.note(id) }
    }

    /// What a worker says.
    pub fn log(&self, id: &str) -> PathBuf {
        self.logs.join(format!("{id}.log"))
    }

    /// Where the process of a worker is noted.
    pub fn note(&self, id: &str) -> PathBuf {
        self.state.join(id).join("process.json")
    }

    /// Where it is noted what a worker was started with.
    fn runtime_note(&self, id: &str) -> PathBuf {
        self.state.join(id).join("runtime")
    }

    /// The worker's socket.
    pub fn socket(&self, id: &str) -> PathBuf {
        self.run.join(id).join("ateom.sock")
    }

    /// The worker's whole control group.
    pub fn group(&self, hierarchy: &Arc<Hierarchy>, id: &str) -> Cgroup {
        Cgroup::at(hierarchy, &format!("{}/{id}", self.cgroup))
    }
}

/// What a worker's task tells.
#[derive(Debug, Clone)]
pub enum News {
    /// Its view has changed.
    Changed,
    /// There was no process to adopt, and what an earlier one may have left was fenced.
    Vacant,
    /// It was fenced.
    Lost {
        /// What was in it as far as its last status said.
        assignment: Option<Assignment>,
        /// Why.
        reason: String,
    },
    /// Fresh figures.
    Stats(Option<Assignment>, Stats),
    /// For people.
    Notice(Option<Assignment>, Notice),
}

/// Takes news of worker `id`. Called from the worker's task: must not block.
pub type Listener = Arc<dyn Fn(&str, News) + Send + Sync>;

/// A worker as others see it.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// Raised by each fence: two views with the same number are of the same process.
    pub fences: u64,
    /// Its control group was seen empty, and no process that could have been given an actor came up since.
    pub vacant: bool,
    /// Set while it answers.
    pub up: Option<Up>,
    /// The last status; kept while it is down, for what was in it.
    pub slot: Option<SlotStatus>,
    /// The last figures.
    pub stats: Option<Stats>,
    /// What it is doing while it is not up.
    pub trouble: String,
}

/// A worker that answers.
#[derive(Debug, Clone)]
pub struct Up {
    /// Its connection.
    pub client: Client,
    /// What it can do.
    pub capabilities: GetCapabilitiesResponse,
}

impl View {
    /// Whether what its slot holds is known.
    pub fn is_settled(&self) -> bool {
        self.up.is_some() || self.vacant
    }

    /// Its phase; `EMPTY` before the first status.
    pub fn phase(&self) -> Phase {
        self.slot.as_ref().map_or(Phase::Empty, SlotStatus::phase)
    }

    /// What is in the slot.
    pub fn assignment(&self) -> Option<&Assignment> {
        let slot = self.slot.as_ref()?;
        slot.assignment.as_ref().filter(|_| slot.phase() != Phase::Empty)
    }
}

/// A handle to a worker.
#[derive(Debug, Clone)]
pub struct Worker {
    /// Unique on the node.
    pub id: String,
    /// Pool it belongs to.
    pub pool: String,
    /// What it runs.
    pub class: WorkerClass,
    /// It is there for the snapshots of an older runtime.
    pub restores_only: bool,
    socket: PathBuf,
    view: watch::Receiver<View>,
}

/// A runtime that a worker's settings name.
#[derive(Debug, Clone)]
pub struct OwnRuntime {
    /// What it is.
    pub config: RuntimeConfig,
    /// It is not the one that new actors start on.
    pub is_older: bool,
}

impl Worker {
    /// Starts the worker's task.
    pub fn supervise(
        settings: Arc<Settings>,
        hierarchy: &Arc<Hierarchy>,
        worker: &WorkerConfig,
        runtime: Option<OwnRuntime>,
        listener: Listener,
        stop: CancellationToken,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let (sender, view) =
            watch::channel(View { trouble: "it is being started".into(), ..View::default() });
        let socket = settings.socket(&worker.id);
        let restores_only = runtime.as_ref().is_some_and(|runtime| runtime.is_older);
        let task = Task {
            group: settings.group(hierarchy, &worker.id),
            settings,
            id: worker.id.clone(),
            pool: worker.pool.clone(),
            class: worker.class,
            runtime: runtime.map(|runtime| runtime.config),
            view: sender,
            listener,
            stop,
        };
        let handle = tokio::spawn(task.run());
        let (id, pool) = (worker.id.clone(), worker.pool.clone());
        (Self { id, pool, class: worker.class, restores_only, socket, view }, handle)
    }

    /// Now.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Waits until it answers, at most `limit`.
    ///
    /// # Errors
    /// [`NodeError::WorkerDown`].
    pub async fn up(&self, limit: Duration) -> Result<(View, Client), NodeError> {
        let mut watching = self.view.clone();
        let waited = timeout(limit, watching.wait_for(|view| view.up.is_some())).await;
        if let Ok(Ok(view)) = waited
            && let Some(up) = &view.up
        {
            return Ok((view.clone(), up.client.clone()));
        }
        Err(NodeError::WorkerDown { worker: self.id.clone(), reason: self.view().trouble })
    }

    /// Waits until what its slot holds is known: it answers, or was seen empty. A worker that cannot be fenced never is.
    pub async fn settled(&self) {
        // An error means that its task has ended, and with it this process.
        let _ = self.view.clone().wait_for(View::is_settled).await;
    }

    /// Waits until a condition holds, at most `limit`.
    pub async fn wait_for(&self, limit: Duration, condition: impl FnMut(&View) -> bool) -> bool {
        matches!(timeout(limit, self.view.clone().wait_for(condition)).await, Ok(Ok(_)))
    }

    /// After a call failed: why, if the worker was lost since `before` was seen, once it is fenced. `None` when the same
    /// process answers.
    pub async fn fenced_since(&self, before: &View) -> Option<String> {
        let mut watching = self.view.clone();
        let deadline = Instant::now() + SILENCE + FENCE;
        loop {
            let now = watching.borrow_and_update().clone();
            if now.fences != before.fences {
                return Some(now.trouble);
            }
            // What the view says may be older than the failure: the process itself is asked. Its socket answers only
            // while it lives, and no other is started before the fence.
            if timeout(PROBE, probe(&self.socket)).await.is_ok_and(|answered| answered) {
                return None;
            }
            if Instant::now() >= deadline {
                return Some("it does not answer and could not be fenced yet".to_owned());
            }
            // A change of the view comes with the fence; the limit is for a connection that only broke.
            let _ = timeout(PROBE, watching.changed()).await;
        }
    }
}

/// Owns one worker.
struct Task {
    settings: Arc<Settings>,
    group: Cgroup,
    id: String,
    pool: String,
    class: WorkerClass,
    /// Of the sandbox config, for snapshots that were made with it; none: the class's own.
    runtime: Option<RuntimeConfig>,
    view: watch::Sender<View>,
    listener: Listener,
    stop: CancellationToken,
}

/// Why a process is no longer served.
enum End {
    /// It has to be fenced.
    Dead(String),
    /// Empty, it was ended because another runtime is configured for it.
    Outdated,
    /// This process ends; the worker goes on.
    Stopped,
}

impl Task {
    async fn run(self) {
        let mut backoff = BACKOFF.0;
        loop {
            let begun = Instant::now();
            let end = match self.obtain().await {
                Ok((mut process, is_outdated)) => {
                    let pid = process.identity.pid;
                    let end = tokio::select! {
                        biased;
                        end = self.serve(pid, is_outdated) => end,
                        reason = process.ended() => End::Dead(reason),
                        () = self.stop.cancelled() => End::Stopped,
                    };
                    if !matches!(end, End::Stopped) {
                        process.kill();
                        // Reaps it if it is our child: a group with a zombie in it is not removed.
                        let _ = timeout(FENCE, process.ended()).await;
                    }
                    end
                }
                Err(reason) => End::Dead(reason),
            };
            let reason = match end {
                End::Stopped => return,
                End::Outdated => {
                    let reason = "it ran another runtime than is configured now".to_owned();
                    tracing::info!(worker = self.id, reason, "worker ended");
                    reason
                }
                End::Dead(mut reason) => {
                    if let Some(words) = last_words(&self.settings.log(&self.id)) {
                        reason = format!("{reason}; its log ends with: {words}");
                    }
                    tracing::warn!(worker = self.id, reason, "worker lost");
                    reason
                }
            };
            self.view.send_modify(|view| {
                view.up = None;
                view.trouble = format!("{reason}; it is being fenced");
            });
            self.listener_changed();
            if !self.fence().await {
                return;
            }
            let assignment = self.view.borrow().assignment().cloned();
            self.view.send_modify(|view| {
                view.fences += 1;
                view.vacant = true;
                view.slot = None;
                view.stats = None;
                view.trouble = format!("{reason}; it is being started again");
            });
            (self.listener)(&self.id, News::Lost { assignment, reason });
            // Only one that cannot stay up is held back.
            if begun.elapsed() > backoff * 10 {
                backoff = BACKOFF.0;
            }
            tokio::select! {
                () = tokio::time::sleep(backoff) => {}
                () = self.stop.cancelled() => return,
            }
            backoff = (backoff * 2).min(BACKOFF.1);
        }
    }

    fn listener_changed(&self) {
        (self.listener)(&self.id, News::Changed);
    }

    /// Kills everything of the worker and sees it empty. `false`: we are to stop.
    async fn fence(&self) -> bool {
        loop {
            match self.group.fence(FENCE).await {
                Ok(()) => return true,
                Err(error) => tracing::error!(worker = self.id, %error, "cannot fence; trying again"),
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
                () = self.stop.cancelled() => return false,
            }
        }
    }

    /// What a worker of ours is started with, as far as that is known before anything is fetched: each part of its
    /// runtime, and the settings.
    fn runtime_name(&self) -> String {
        let own = self.runtime.iter().flat_map(RuntimeConfig::parts);
        let parts = own.filter_map(|(name, part)| Some(format!("{name} {}", part.here()?.sha256)));
        let settings = self.settings.launch(&self.id, &self.pool, self.class, RuntimeFiles::default());
        parts.chain(settings.args).collect::<Vec<_>>().join("\n")
    }

    /// The worker's process: the noted one, or a new one after whatever is left was fenced. And whether it was started
    /// with another runtime than is configured now.
    async fn obtain(&self) -> Result<(Process, bool), String> {
        let (runtime, runtime_note) = (self.runtime_name(), self.settings.runtime_note(&self.id));
        if let Some(process) = Process::adopt(&self.settings.note(&self.id)) {
            tracing::info!(worker = self.id, pid = process.identity.pid, "adopted");
            let is_outdated = !std::fs::read_to_string(&runtime_note).is_ok_and(|noted| noted == runtime);
            return Ok((process, is_outdated));
        }
        if !self.fence().await {
            return Err("the node agent is stopping".to_owned());
        }
        self.view.send_modify(|view| view.vacant = true);
        if self.view.borrow().fences == 0 {
            (self.listener)(&self.id, News::Vacant);
        }
        let files = match &self.runtime {
            None => RuntimeFiles::default(),
            Some(runtime) => {
                self.settings.assets.runtime(runtime).await.map_err(|error| error.to_string())?
            }
        };
        let launch = self.settings.launch(&self.id, &self.pool, self.class, files);
        let socket = self.settings.socket(&self.id);
        let group = self.group.child("ateom");
        let dirs = [self.settings.state.join(&self.id), self.settings.run.join(&self.id)];
        let process = crate::blocking(move || {
            for dir in &dirs {
                crate::durable::create_dir(dir).map_err(|error| error.to_string())?;
            }
            // A socket of a dead process would only refuse connections; without it the wait is clear.
            crate::durable::remove_file(&socket).map_err(|error| error.to_string())?;
            group.ensure().map_err(|error| error.to_string())?;
            std::fs::write(&runtime_note, runtime)
                .map_err(|error| crate::durable::at("write", &runtime_note)(error).to_string())?;
            let mut process = Process::start(&launch).map_err(|error| error.to_string())?;
            if let Err(error) = group.add(process.identity.pid as u32) {
                // One that has ended already cannot be moved, and says more by how it ended.
                let reason = process.has_ended().unwrap_or_else(|| error.to_string());
                process.kill();
                return Err(reason);
            }
            Ok(process)
        })
        .await?;
        tracing::info!(worker = self.id, pid = process.identity.pid, "started");
        Ok((process, false))
    }

    /// Connects and relays until the worker no longer answers. One that is outdated is ended as soon as it is empty.
    async fn serve(&self, pid: i32, is_outdated: bool) -> End {
        let mut deadline = Instant::now() + self.settings.start_limit;
        loop {
            let (client, capabilities, mut events) = match self.connect(deadline).await {
                Ok(connected) => connected,
                Err(error) => {
                    return End::Dead(format!(
                        "it does not answer (pid {}): {error}; see {}",
                        pid,
                        self.settings.log(&self.id).display()
                    ));
                }
            };
            let mut ending = is_outdated.then(|| client.clone());
            let mut up = Some(Up { client, capabilities });
            let broken = loop {
                match events.message().await {
                    Ok(Some(event)) => match event.event {
                        Some(slot_event::Event::Status(status)) => {
                            if let Some(client) = ending.as_mut().filter(|_| status.phase() == Phase::Empty) {
                                match client.shutdown(ShutdownRequest {}).await {
                                    Ok(_) => return End::Outdated,
                                    // A start was faster: next time.
                                    Err(status) => tracing::info!(worker = self.id, %status, "not ended yet"),
                                }
                            }
                            self.view.send_modify(|view| {
                                view.slot = Some(status);
                                view.vacant = false;
                                // It is up once its slot is known.
                                if let Some(up) = up.take() {
                                    view.up = Some(up);
                                    view.trouble.clear();
                                }
                            });
                            self.listener_changed();
                        }
                        Some(slot_event::Event::Stats(stats)) => {
                            let assignment = self.view.borrow().assignment().cloned();
                            self.view.send_if_modified(|view| {
                                view.stats = Some(stats);
                                // Nobody waits for figures.
                                false
                            });
                            (self.listener)(&self.id, News::Stats(assignment, stats));
                        }
                        Some(slot_event::Event::Notice(notice)) => {
                            let assignment = self.view.borrow().assignment().cloned();
                            (self.listener)(&self.id, News::Notice(assignment, notice));
                        }
                        None => {}
                    },
                    Ok(None) => break "its stream ended".to_owned(),
                    Err(status) => break status.message().to_owned(),
                }
            };
            tracing::warn!(worker = self.id, reason = broken, "connection lost; connecting again");
            self.view.send_modify(|view| {
                view.up = None;
                view.trouble = format!("its connection broke ({broken}); connecting again");
            });
            self.listener_changed();
            deadline = Instant::now() + SILENCE;
        }
    }

    async fn connect(
        &self,
        deadline: Instant,
    ) -> Result<(Client, GetCapabilitiesResponse, Streaming<substrate_proto::ateom::SlotEvent>), String> {
        let mut pause = Duration::from_millis(5);
        loop {
            let outcome = match timeout_at(deadline, connect(&self.settings.socket(&self.id))).await {
                Ok(Ok(connected)) => return Ok(connected),
                Ok(Err(error)) => error,
                Err(_) => "no answer in time".to_owned(),
            };
            if Instant::now() >= deadline {
                return Err(outcome);
            }
            // A socket that is not there yet makes no event; its process's end is watched meanwhile.
            tokio::time::sleep_until(deadline.min(Instant::now() + pause)).await;
            pause = (pause * 2).min(Duration::from_millis(200));
        }
    }
}

/// Whether an ateom answers on a socket.
async fn probe(socket: &Path) -> bool {
    let Ok(mut client) = dial(socket).await else { return false };
    client.get_status(GetStatusRequest {}).await.is_ok()
}

/// The last line of a log, shortened.
fn last_words(log: &Path) -> Option<String> {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::open(log).ok()?;
    let size = file.metadata().ok()?.len();
    let length = size.min(4096);
    let mut tail = vec![0; length as usize];
    file.read_exact_at(&mut tail, size - length).ok()?;
    let text = String::from_utf8_lossy(&tail);
    let line = text.lines().map(str::trim).rfind(|line| !line.is_empty())?;
    Some(line.chars().take(300).collect())
}

/// Connects to an ateom and begins to watch it.
async fn connect(
    socket: &Path,
) -> Result<(Client, GetCapabilitiesResponse, Streaming<substrate_proto::ateom::SlotEvent>), String> {
    let mut client = dial(socket).await?;
    let capabilities = client
        .get_capabilities(GetCapabilitiesRequest {})
        .await
        .map_err(|status| message(&status))?
        .into_inner();
    let events = client.watch(WatchRequest {}).await.map_err(|status| message(&status))?.into_inner();
    Ok((client, capabilities, events))
}

fn message(status: &tonic::Status) -> String {
    status.message().to_owned()
}

/// Connects to an ateom's socket. Keep-alives end the connection to one that hangs.
pub(crate) async fn dial(socket: &Path) -> Result<Client, String> {
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display()))
        .map_err(|error| error.to_string())?
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(20))
        .keep_alive_while_idle(true);
    let channel = endpoint.connect().await.map_err(|error| {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(inner) = source {
            text = format!("{text}: {inner}");
            source = inner.source();
        }
        text
    })?;
    Ok(AteomClient::new(channel))
}
