// SPDX-License-Identifier: Apache-2.0
//! The process around a slot: its start, what it finds of a dead predecessor, what it tells others, its end.
//!
//! An ateom outlives whoever started it. It has its own session and control group and no pipes to anyone; who comes
//! later finds it by `worker.json` (process id *and* its start time, so that a reused id is not mistaken for it) and
//! dials its socket. Only Terminate and Shutdown end actors; SIGTERM ends an ateom whose slot is empty.
//!
//! One ateom per worker: a lock on its directory is held for life. Whoever holds it may clear away what a dead
//! predecessor left: processes in the worker's control group, mounts and files under its directory.
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use substrate_proto::ateom::ateom_server::AteomServer;
use substrate_proto::seam::{MAX_SOCKET_PATH, Peers, listen};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::cgroup::{Cgroup, Hierarchy};
use crate::children::Children;
use crate::egress::Egress;
use crate::error::SlotError;
use crate::mounts;
use crate::network::{self, enter_worker_namespace, load_rules};
use crate::occupancy::Occupancy;
use crate::runtime::Runtime;
use crate::service::{Service, wait_for};
use crate::slot::{self, Slot};
use crate::{dns, endpoint, ingress, nflog};

/// The file that describes a running worker.
pub const RECORD: &str = "worker.json";
const SOCKET: &str = "ateom.sock";
const INGRESS_SOCKET: &str = "ingress.sock";
/// Group of the ateom itself below the worker's.
const OWN_GROUP: &str = "ateom";
const FENCE_LIMIT: Duration = Duration::from_secs(10);
/// How long clients may take to read what was answered before an ended worker's process goes.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// What a worker process is told on its command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Id of this worker, unique on the node.
    #[arg(long)]
    pub worker_id: String,
    /// Pool it belongs to; for the record only.
    #[arg(long, default_value = "default")]
    pub pool: String,
    /// Its state, which survives the process: worker.json, sandboxes' files.
    #[arg(long)]
    pub state_dir: PathBuf,
    /// Its sockets; may be emptied by a reboot.
    #[arg(long)]
    pub run_dir: PathBuf,
    /// Socket of the node's egress proxy.
    #[arg(long)]
    pub egress_socket: PathBuf,
    /// Control group of this worker, relative to the hierarchies' roots: "substrate/ID".
    #[arg(long)]
    pub cgroup: String,
}

/// Logs to standard error, as much as `SUBSTRATE_LOG` says.
pub fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("SUBSTRATE_LOG");
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_env_filter(filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")))
        .init();
}

/// `worker.json`: how to find a running worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerRecord {
    /// Id of the worker.
    pub worker_id: String,
    /// Its pool.
    pub pool: String,
    /// Process id.
    pub pid: i32,
    /// Start of the process in clock ticks after boot (proc_pid_stat(5), field 22).
    pub start_time: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// gRPC `ateom.v1.Ateom`.
    pub socket: PathBuf,
    /// `atenet.v1.IngressOpen`, then bytes.
    pub ingress_socket: PathBuf,
    /// "gvisor" or "microvm".
    pub sandbox_class: String,
    /// sha256 (hex) of the runtime binary.
    pub runtime_digest: String,
    /// Control group to fence.
    pub cgroup: String,
}

impl WorkerRecord {
    /// Reads the record of the worker whose state is in a directory; `None`: there is none.
    ///
    /// # Errors
    /// When it cannot be read or is none.
    pub fn load(state_dir: &Path) -> io::Result<Option<Self>> {
        match std::fs::read(state_dir.join(RECORD)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the very process that wrote it still runs.
    pub fn is_alive(&self) -> bool {
        boot_id().is_ok_and(|id| id == self.boot_id)
            && process_start_time(self.pid).is_ok_and(|start| start == Some(self.start_time))
    }

    /// Writes it so that a reader sees all of it or nothing.
    fn store(&self, state_dir: &Path) -> io::Result<()> {
        let (path, temporary) = (state_dir.join(RECORD), state_dir.join(".worker.json.new"));
        let file = std::fs::File::create(&temporary)?;
        serde_json::to_writer_pretty(&file, self)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &path)?;
        std::fs::File::open(state_dir)?.sync_all()
    }
}

/// This boot's id.
///
/// # Errors
/// As reading the file.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// When a process started, in clock ticks after boot; `None`: there is no such process, or only its zombie.
///
/// # Errors
/// When /proc cannot be read.
pub fn process_start_time(pid: i32) -> io::Result<Option<u64>> {
    let text = match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(3) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    Ok(parse_start_time(&text))
}

fn parse_start_time(stat: &str) -> Option<u64> {
    // The second field is a name in parentheses that may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    // state is field 3, starttime field 22.
    (!matches!(state, "Z" | "X")).then(|| fields.nth(18)?.parse().ok())?
}

/// A worker that has claimed its directory and namespace, before it has threads.
#[derive(Debug)]
pub struct Claimed {
    config: Config,
    cgroup: Cgroup,
    _lock: Flock<std::fs::File>,
}

/// Claims the worker's directory, clears away what a dead predecessor left, joins the worker's control group and
/// enters its network namespace. Call before any thread exists.
///
/// # Errors
/// With the reason, for people.
pub fn claim(config: Config) -> anyhow::Result<Claimed> {
    let label = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_' || c == '.';
    anyhow::ensure!(
        !config.worker_id.is_empty() && config.worker_id.chars().all(label),
        "--worker-id {:?} must be letters, digits, '-', '_' and '.'",
        config.worker_id
    );
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "a worker needs root: it makes namespaces and cgroups");
    for socket in [SOCKET, INGRESS_SOCKET] {
        let path = config.run_dir.join(socket);
        anyhow::ensure!(
            path.as_os_str().len() <= MAX_SOCKET_PATH,
            "socket path {} is longer than {MAX_SOCKET_PATH} bytes: choose a shorter --run-dir",
            path.display()
        );
    }
    for directory in [&config.state_dir, &config.run_dir] {
        std::fs::create_dir_all(directory)
            .and_then(|()| {
                std::fs::set_permissions(directory, std::os::unix::fs::PermissionsExt::from_mode(0o700))
            })
            .with_context(|| format!("cannot create {}", directory.display()))?;
    }
    let path = config.state_dir.join("lock");
    let file = std::fs::File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        anyhow::anyhow!(
            "another ateom of worker {} runs (lock {}: {errno}): reach it by its socket, or stop it first",
            config.worker_id,
            path.display()
        )
    })?;
    let cgroup = Cgroup::at(&Hierarchy::detect()?, &config.cgroup);
    // Joined first: clearing kills every group that this process is not in.
    let own = cgroup.child(OWN_GROUP);
    own.ensure()?;
    own.add(0)?;
    clear_predecessor(&config, &cgroup)?;
    // Mount points are made with it, and every user of a container must reach them.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot read RLIMIT_NOFILE")?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("cannot raise RLIMIT_NOFILE")?;
    enter_worker_namespace()?;
    Ok(Claimed { config, cgroup, _lock: lock })
}

/// Kills and removes what is left of a worker that died: everything but the calling process.
fn clear_predecessor(config: &Config, cgroup: &Cgroup) -> anyhow::Result<()> {
    let me = std::process::id() as i32;
    for group in cgroup.children() {
        if !group.processes()?.contains(&me) {
            group.kill_and_wait_empty(FENCE_LIMIT)?;
            group.remove()?;
            continue;
        }
        // Whoever started this process may have put it here already.
        for pid in group.processes()?.into_iter().filter(|pid| *pid != me) {
            tracing::warn!(pid, group = group.name(), "killing what a predecessor left");
            if let Err(errno) = kill(Pid::from_raw(pid), Signal::SIGKILL) {
                tracing::warn!(pid, %errno, "it cannot be killed");
            }
        }
    }
    let sandboxes = sandboxes(config);
    match mounts::remove_tree(&sandboxes) {
        Ok(()) => tracing::info!(directory = %sandboxes.display(), "removed what a predecessor left"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(error).with_context(|| format!("cannot remove {}", sandboxes.display()));
        }
    }
    Ok(())
}

fn sandboxes(config: &Config) -> PathBuf {
    config.state_dir.join("sandboxes")
}

impl Claimed {
    /// Serves until Shutdown, or SIGTERM with an empty slot.
    ///
    /// # Errors
    /// With the reason, for people.
    pub async fn serve(self, runtime: Arc<dyn Runtime>) -> anyhow::Result<()> {
        let Self { config, cgroup, _lock } = self;
        let children = Children::reap().context("cannot watch child processes")?;
        load_rules(&children, network::ruleset()).await?;
        let occupancy = Occupancy::new(&config.worker_id);
        let egress =
            Egress::serve(config.egress_socket.clone(), config.worker_id.clone(), occupancy.clone())?;
        dns::serve(&egress)?;
        endpoint::serve(&occupancy)?;
        nflog::serve(occupancy.clone(), egress)?;
        let ingress_socket = config.run_dir.join(INGRESS_SOCKET);
        ingress::serve(&ingress_socket, occupancy.clone())?;
        let description = runtime.describe();
        let socket = config.run_dir.join(SOCKET);
        let record = WorkerRecord {
            worker_id: config.worker_id.clone(),
            pool: config.pool.clone(),
            pid: std::process::id() as i32,
            start_time: process_start_time(std::process::id() as i32)?
                .context("no start time of this process")?,
            boot_id: boot_id()?,
            socket: socket.clone(),
            ingress_socket: ingress_socket.clone(),
            sandbox_class: description.sandbox_class.clone(),
            runtime_digest: description.digest.clone(),
            cgroup: config.cgroup.clone(),
        };
        let directory = sandboxes(&config);
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let slot = Slot::start(slot::Config {
            worker_id: config.worker_id.clone(),
            runtime,
            occupancy,
            children,
            cgroup: cgroup.clone(),
            directory,
            ingress_endpoint: format!("unix:{}", ingress_socket.display()),
        })?;
        let (ended_sender, ended) = watch::channel(false);
        let connections = listen(&socket, Peers::default())?;
        record.store(&config.state_dir).context("cannot write worker.json")?;
        tracing::info!(worker = config.worker_id, socket = %socket.display(), "serving");
        let signals = tokio::spawn(end_when_told(slot.clone(), ended_sender.clone()));
        let server = tonic::transport::Server::builder()
            .add_service(AteomServer::new(Service::new(slot, ended_sender)))
            .serve_with_incoming_shutdown(connections, wait_for(ended.clone()));
        // Answers under way are sent, but no client can hold an ended worker up.
        let overdue = async {
            wait_for(ended).await;
            tokio::time::sleep(LAST_ANSWERS).await;
        };
        tokio::select! {
            served = server => served.context("the gRPC server failed")?,
            () = overdue => {}
        }
        signals.abort();
        for path in [&socket, &ingress_socket, &config.state_dir.join(RECORD)] {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(%error, path = %path.display(), "cannot remove a file");
            }
        }
        leave_group(&cgroup);
        tracing::info!(worker = config.worker_id, "ended");
        Ok(())
    }
}

/// A group with a process in it cannot be removed, so this process moves to the root first, where it may. Otherwise
/// the group stays for whoever started this worker to remove.
fn leave_group(cgroup: &Cgroup) {
    let left = Hierarchy::detect().and_then(|all| Cgroup::at(&all, "").add(0)).and_then(|()| cgroup.remove());
    if let Err(error) = left {
        tracing::warn!(%error, "the worker's control group stays");
    }
}

/// SIGTERM and SIGINT end an empty slot; an actor is not killed by them.
async fn end_when_told(slot: Slot, ended: watch::Sender<bool>) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("cannot watch signals");
        return;
    };
    loop {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        match slot.shutdown().await {
            Ok(()) => {
                ended.send_replace(true);
                return;
            }
            Err(error @ SlotError::Occupied { .. }) => {
                tracing::warn!(%error, "told to end, but an actor runs: suspend or terminate it first");
            }
            Err(error) => tracing::error!(%error, "cannot end cleanly"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> WorkerRecord {
        WorkerRecord {
            worker_id: "w1".into(),
            pool: "default".into(),
            pid: std::process::id() as i32,
            start_time: process_start_time(std::process::id() as i32).unwrap().unwrap(),
            boot_id: boot_id().unwrap(),
            socket: "/run/w1/ateom.sock".into(),
            ingress_socket: "/run/w1/ingress.sock".into(),
            sandbox_class: "gvisor".into(),
            runtime_digest: "d".into(),
            cgroup: "substrate/w1".into(),
        }
    }

    #[test]
    fn a_record_is_of_one_process_of_one_boot() {
        let directory = tempfile::tempdir().unwrap();
        assert!(WorkerRecord::load(directory.path()).unwrap().is_none());
        record().store(directory.path()).unwrap();
        let loaded = WorkerRecord::load(directory.path()).unwrap().unwrap();
        assert_eq!(loaded, record());
        assert!(loaded.is_alive());
        assert!(!WorkerRecord { start_time: loaded.start_time + 1, ..record() }.is_alive(), "reused pid");
        assert!(!WorkerRecord { boot_id: "other".into(), ..record() }.is_alive(), "other boot");
        assert!(!WorkerRecord { pid: i32::MAX, ..record() }.is_alive(), "no process");
    }

    #[test]
    fn start_times_are_read_past_any_name_and_not_of_zombies() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20";
        assert_eq!(parse_start_time(&format!("5 (a) b) {fields}")), Some(777));
        assert_eq!(parse_start_time(&format!("5 (a) Z{}", &fields[1..])), None);
        assert_eq!(parse_start_time("5 (a"), None);
    }
}
