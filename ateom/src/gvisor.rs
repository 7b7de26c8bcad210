// SPDX-License-Identifier: Apache-2.0
//! The gVisor class: runsc, with a root container of our own and the workload beside it.
//!
//! ```text
//! prepare   create root (pause)                                       ahead of time
//! boot      start root ‖ create w00, w01 …  →  start w00, w01 …
//! restore   restore root ‖ create w00, w01 … →  restore w00, w01 …    none runs before the last is restored
//! checkpoint, kept       checkpoint --leave-running → fsync
//! checkpoint, stopped    pause → checkpoint --leave-running → fsync   → the slot kills the control group
//! ```
//! A checkpoint that is to stop the sandbox does not let runsc end it: a failure (a full disk, say) would destroy the
//! actor's memory. It stands still under `pause`, is saved, and only what is complete on the disk is killed; otherwise
//! it is resumed (promise P2; docs/runsc.md, "Suspend without risk").
//!
//! Nothing is deleted by runsc: a sandbox dies with its control group, and its `--root` is a directory of its own.
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::future::{try_join, try_join_all};
use sha2::{Digest as _, Sha256};
use substrate_proto::ateom::{ResolvedContainer, SandboxSpec, SnapshotFile};
use substrate_proto::types::{Compatibility, ExitStatus};
use tokio::io::unix::AsyncFd;

use crate::cgroup::blocking;
use crate::container;
use crate::error::SlotError;
use crate::launcher::Streams;
use crate::mounts;
use crate::network::Namespace;
use crate::runtime::{
    Description, ExecProcess, ExecRequest, Place, Runtime, RuntimeError, Sandbox, Steps, file_error,
};

mod bundle;
mod command;
mod exec;
mod pause;

use command::{Output, Runsc};

/// The class's name on the wire.
pub const CLASS: &str = "gvisor";

/// Limits of single commands. Large heaps take 1–2 s per GiB to save and restore.
const COMMAND_LIMIT: Duration = Duration::from_mins(1);
const USAGE_LIMIT: Duration = Duration::from_secs(5);
const IMAGE_LIMIT: Duration = Duration::from_mins(10);

/// Why runsc cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum GvisorError {
    /// It is not there, or not executable.
    #[error("cannot run {path}: {source}; scripts/setup builds the pinned runsc, --runsc PATH names another")]
    Missing {
        /// The path given.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It is not the pinned one.
    #[error("{path} has sha256 {found}, pinned is {wanted}: fetch it again or change the sandbox config")]
    Digest {
        /// The path given.
        path: PathBuf,
        /// Its digest.
        found: String,
        /// The pinned digest.
        wanted: String,
    },
    /// It lacks something.
    #[error("{path} ({version}) {lack}: use the pinned version (scripts/setup builds it)")]
    Unsuitable {
        /// The path given.
        path: PathBuf,
        /// What it calls itself.
        version: String,
        /// What it lacks.
        lack: String,
    },
    /// The pause container's files could not be written.
    #[error(transparent)]
    Files(#[from] RuntimeError),
    /// The gofers' network namespace could not be made.
    #[error(transparent)]
    Network(#[from] crate::network::NetworkError),
}

/// The class, for one runsc binary.
#[derive(Debug)]
pub struct Gvisor {
    binary: PathBuf,
    pause_rootfs: PathBuf,
    gofer_namespace: Namespace,
    description: Description,
}

impl Gvisor {
    /// Checks the binary and prepares what all sandboxes share. Runs processes: call before children are reaped
    /// elsewhere.
    ///
    /// # Errors
    /// See [`GvisorError`].
    pub fn new(binary: &Path, pinned: Option<&str>, directory: &Path) -> Result<Self, GvisorError> {
        let missing = |source| GvisorError::Missing { path: binary.to_owned(), source };
        let digest = sha256_file(binary).map_err(missing)?;
        if let Some(wanted) = pinned
            && !wanted.eq_ignore_ascii_case(&digest)
        {
            return Err(GvisorError::Digest {
                path: binary.to_owned(),
                found: digest,
                wanted: wanted.to_owned(),
            });
        }
        let run = |args: &[&str]| {
            let output = std::process::Command::new(binary).args(args).output().map_err(missing)?;
            let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.push_str(&String::from_utf8_lossy(&output.stderr));
            Ok::<_, GvisorError>((output.status.success(), text))
        };
        let (works, text) = run(&["--version"])?;
        let version = text.lines().next().unwrap_or_default().trim_start_matches("runsc version ").to_owned();
        let unsuitable = |lack: &str| GvisorError::Unsuitable {
            path: binary.to_owned(),
            version: version.clone(),
            lack: lack.to_owned(),
        };
        if !works {
            return Err(unsuitable("does not answer --version"));
        }
        if !run(&["help", "checkpoint"])?.1.contains("leave-running") {
            return Err(unsuitable("cannot checkpoint"));
        }
        if !run(&["flags"])?.1.contains("allow-live-tcp-migration") {
            return Err(unsuitable("is too old (2026-04 or newer is needed)"));
        }
        let pause_rootfs = directory.join("pause");
        pause::write_rootfs(&pause_rootfs)?;
        let facts = [
            ("platform", "systrap"),
            ("network", "sandbox"),
            ("overlay", "root:memory"),
            ("live_tcp_migration", "false"),
        ];
        let description = Description {
            sandbox_class: CLASS.to_owned(),
            digest,
            version,
            architecture: architecture().to_owned(),
            cpu_features: cpu_features(),
            facts: facts.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect::<BTreeMap<_, _>>(),
            checkpoint_keeps_running: true,
            incremental: false,
        };
        Ok(Self {
            binary: binary.to_owned(),
            pause_rootfs,
            gofer_namespace: Namespace::empty()?,
            description,
        })
    }
}

fn architecture() -> &'static str {
    if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" }
}

fn sha256_file(path: &Path) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut std::fs::File::open(path)?, &mut hasher)?;
    Ok(hex::encode(hasher.finalize()))
}

/// Features of the processor, sorted; the flags of /proc/cpuinfo.
pub(crate) fn cpu_features() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"));
    let mut features: Vec<String> = line
        .and_then(|line| line.split_once(':'))
        .map(|(_, flags)| flags.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default();
    features.sort();
    features
}

#[async_trait]
impl Runtime for Gvisor {
    fn describe(&self) -> &Description {
        &self.description
    }

    fn overhead_bytes(&self) -> u64 {
        // Sentry, gofers, this crate's launcher.
        96 << 20
    }

    fn validate(&self, spec: &SandboxSpec) -> Result<(), SlotError> {
        bundle::validate(spec)
    }

    fn compatibility(&self, spec: &SandboxSpec) -> Compatibility {
        let of = &self.description;
        Compatibility {
            sandbox_class: of.sandbox_class.clone(),
            runtime_digest: of.digest.clone(),
            architecture: of.architecture.clone(),
            cpu_features: of.cpu_features.clone(),
            facts: of.facts.clone().into_iter().collect(),
            spec_digest: bundle::spec_digest(spec),
            images: spec
                .containers
                .iter()
                .map(|container| (container.name.clone(), container.image_digest.clone()))
                .collect(),
        }
    }

    async fn prepare(&self, place: Place) -> Result<Box<dyn Sandbox>, RuntimeError> {
        let runsc = Runsc::new(&self.binary, &place.directory, &self.gofer_namespace.path(), place.launcher)?;
        let root = place.directory.join("bundle-root");
        bundle::write(&root, &bundle::root_spec(&self.pause_rootfs, &place.network_namespace))?;
        let pid_file = place.directory.join("sandbox.pid");
        let args = [
            "create",
            "--bundle",
            &root.display().to_string(),
            "--pid-file",
            &pid_file.display().to_string(),
            bundle::ROOT,
        ];
        runsc.run(&args, Output::Own, COMMAND_LIMIT).await?;
        let text = std::fs::read_to_string(&pid_file).map_err(file_error("read", &pid_file))?;
        let pid: i32 = text.trim().parse().map_err(|_| {
            RuntimeError::Failed(format!("runsc wrote {:?} as the sandbox's pid", text.trim()))
        })?;
        let sandbox = crate::sys::pidfd_open(pid).and_then(crate::sys::watched).map_err(|source| {
            RuntimeError::Failed(format!("the sandbox died as it was created: {source}"))
        })?;
        Ok(Box::new(GvisorSandbox {
            runsc: Arc::new(runsc),
            directory: place.directory,
            network_namespace: place.network_namespace,
            sandbox,
            containers: Mutex::default(),
        }))
    }
}

/// One sandbox of this class.
#[derive(Debug)]
struct GvisorSandbox {
    runsc: Arc<Runsc>,
    directory: PathBuf,
    network_namespace: PathBuf,
    /// pidfd of the sandbox process.
    sandbox: AsyncFd<OwnedFd>,
    /// Known from boot or restore on.
    containers: Mutex<Vec<ResolvedContainer>>,
}

impl GvisorSandbox {
    /// Writes the bundles; returns each container's id with its bundle's path.
    fn write_bundles(&self, spec: &SandboxSpec) -> Result<Vec<(String, String)>, RuntimeError> {
        let hostname = if spec.hostname.is_empty() { bundle::HOSTNAME } else { &spec.hostname };
        let etc = bundle::write_etc(&self.directory, hostname)?;
        let scaffold = mounts::scaffold(&self.directory).map_err(file_error("mount", &self.directory))?;
        let mut bundles = Vec::new();
        for (index, container) in spec.containers.iter().enumerate() {
            let id = bundle::container_id(index, &container.name);
            let lower = Path::new(&container.rootfs);
            let rootfs = mounts::root(&scaffold, &id, lower).map_err(file_error("mount", lower))?;
            let container = &ResolvedContainer { rootfs: rootfs.display().to_string(), ..container.clone() };
            let path = self.directory.join(format!("bundle-{id}"));
            let value = bundle::workload_spec(container, &etc, &self.network_namespace);
            bundle::write(&path, &value)?;
            bundles.push((id, path.display().to_string()));
        }
        spec.containers.clone_into(&mut self.containers.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(bundles)
    }

    async fn create_all(&self, bundles: &[(String, String)], steps: &Steps) -> Result<(), RuntimeError> {
        let creates = bundles.iter().map(async |(id, path)| {
            let args = ["create", "--bundle", path, id];
            steps.time("subcontainer_create", self.runsc.run(&args, Output::Own, COMMAND_LIMIT)).await
        });
        try_join_all(creates).await.map(drop)
    }

    /// A container by name (empty: the first) with its index.
    fn container(&self, name: &str) -> Result<(usize, ResolvedContainer), RuntimeError> {
        let containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        container::find(&containers, name).map(|(index, container)| (index, container.clone()))
    }

    async fn root(&self, args: &[&str], limit: Duration) -> Result<(), RuntimeError> {
        self.runsc.run(args, Output::Own, limit).await
    }
}

/// A container's log as its streams. The descriptor goes to the sandbox, which keeps it: no pipe of this process stands
/// in between, and its death loses no line.
fn workload_streams(container: &ResolvedContainer) -> Result<Streams, RuntimeError> {
    let file = container::open_log(container)?;
    Streams::output(file.into()).map_err(file_error("open", Path::new("/dev/null")))
}

#[async_trait]
impl Sandbox for GvisorSandbox {
    async fn boot(&self, spec: &SandboxSpec, steps: &Steps) -> Result<(), RuntimeError> {
        let bundles = self.write_bundles(spec)?;
        let root = steps.time("start_root", self.root(&["start", bundle::ROOT], COMMAND_LIMIT));
        try_join(root, self.create_all(&bundles, steps)).await?;
        for ((id, _), container) in bundles.iter().zip(&spec.containers) {
            let streams = workload_streams(container)?;
            let args = ["start", id];
            let start = self.runsc.run(&args, Output::Workload(streams), COMMAND_LIMIT);
            steps.time("start_workload", start).await?;
        }
        Ok(())
    }

    async fn restore(&self, spec: &SandboxSpec, directory: &Path, steps: &Steps) -> Result<(), RuntimeError> {
        let bundles = self.write_bundles(spec)?;
        let image = directory.display().to_string();
        let args = ["restore", "--image-path", &image, "--detach", bundle::ROOT];
        let root = steps.time("restore_root", self.root(&args, IMAGE_LIMIT));
        try_join(root, self.create_all(&bundles, steps)).await?;
        for ((id, path), container) in bundles.iter().zip(&spec.containers) {
            let streams = workload_streams(container)?;
            let args = ["restore", "--bundle", path, "--image-path", &image, "--detach", id];
            let restore = self.runsc.run(&args, Output::Workload(streams), IMAGE_LIMIT);
            steps.time("restore_workload", restore).await?;
        }
        Ok(())
    }

    async fn checkpoint(
        &self,
        directory: &Path,
        keep_running: bool,
        steps: &Steps,
    ) -> Result<Vec<SnapshotFile>, RuntimeError> {
        if !keep_running {
            let paused = steps.time("pause", self.root(&["pause", bundle::ROOT], COMMAND_LIMIT)).await;
            if let Err(error) = paused {
                return Err(self.go_on(error, true).await);
            }
        }
        let image = directory.display().to_string();
        let args =
            ["checkpoint", "--image-path", &image, "--compression=none", "--leave-running", bundle::ROOT];
        let saved = steps.time("checkpoint", self.root(&args, IMAGE_LIMIT)).await;
        let durable = match saved {
            Ok(()) => {
                let directory = directory.to_owned();
                steps.time("fsync", blocking(move || fsync_image(&directory))).await
            }
            Err(error) => Err(error),
        };
        match durable {
            Ok(files) => Ok(files),
            Err(error) => Err(self.go_on(error, !keep_running).await),
        }
    }

    async fn exec(&self, request: ExecRequest, streams: Streams) -> Result<ExecProcess, RuntimeError> {
        self.start_process(request, streams).await
    }

    async fn exited(&self, container: &str) -> Result<ExitStatus, RuntimeError> {
        let (index, container) = self.container(container)?;
        self.wait_container(&bundle::container_id(index, &container.name), &container.name).await
    }

    async fn written_bytes(&self) -> Option<u64> {
        #[derive(serde::Deserialize)]
        struct Usage {
            #[serde(rename = "Tmpfs")]
            tmpfs: u64,
        }
        // Of the whole sandbox. The upper layers of the containers' roots are tmpfs to the sentry, as is what the
        // workload itself mounted.
        let said = self.runsc.ask(&["usage", "-full", bundle::ROOT], Output::Own, USAGE_LIMIT).await;
        let parsed = said.map(|text| serde_json::from_str::<Usage>(&text));
        match parsed {
            Ok(Ok(usage)) => Some(usage.tmpfs),
            Ok(Err(error)) => {
                tracing::debug!(%error, "runsc usage said something else");
                None
            }
            Err(error) => {
                tracing::debug!(%error, "the sandbox does not say what it uses");
                None
            }
        }
    }

    async fn died(&self) -> String {
        tokio::select! {
            biased;
            // A pidfd is readable from the end of its process on.
            ended = self.sandbox.readable() => match ended {
                Ok(_) => "the sandbox process (sentry) died".to_owned(),
                Err(error) => format!("cannot watch the sandbox process: {error}"),
            },
            () = self.runsc.gone() => "the launcher in the actor's cgroup died".to_owned(),
        }
    }
}

impl GvisorSandbox {
    /// After a failed checkpoint: lets the actor go on, and says whether it does.
    async fn go_on(&self, error: RuntimeError, paused: bool) -> RuntimeError {
        if paused && let Err(worse) = self.root(&["resume", bundle::ROOT], COMMAND_LIMIT).await {
            return RuntimeError::Failed(format!("{error}; and it could not be resumed: {worse}"));
        }
        match error {
            // Still being written, or the sandbox is gone: nobody can say that it goes on.
            error @ (RuntimeError::Timeout { .. } | RuntimeError::Launch(_)) => error,
            // A sentry that is being killed hangs up before its pidfd tells: only its own answer shows that it lives.
            error => match self.root(&["ps", bundle::ROOT], COMMAND_LIMIT).await {
                Ok(()) => RuntimeError::CheckpointRefused(error.to_string()),
                Err(silent) => {
                    RuntimeError::Failed(format!("{error}; and the sandbox does not answer: {silent}"))
                }
            },
        }
    }
}

/// Makes an image durable and lists it. The directory's own entry is the caller's to make durable.
fn fsync_image(directory: &Path) -> Result<Vec<SnapshotFile>, RuntimeError> {
    let before = Instant::now();
    let entries = std::fs::read_dir(directory).map_err(file_error("list", directory))?;
    let mut files = Vec::new();
    let mut threads = Vec::new();
    for entry in entries {
        let path = entry.map_err(file_error("list", directory))?.path();
        let file = std::fs::File::open(&path).map_err(file_error("open", &path))?;
        let meta = file.metadata().map_err(file_error("stat", &path))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        files.push(SnapshotFile { memory: name == "pages.img", name, size: meta.len() });
        // One wait for the disk instead of three.
        threads.push(std::thread::spawn(move || file.sync_all().map_err(file_error("fsync", &path))));
    }
    for thread in threads {
        match thread.join() {
            Ok(result) => result?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    std::fs::File::open(directory)
        .and_then(|file| file.sync_all())
        .map_err(file_error("fsync", directory))?;
    files.sort_by(|a, b| a.name.cmp(&b.name));
    tracing::debug!(ms = before.elapsed().as_millis(), "image is durable");
    Ok(files)
}
