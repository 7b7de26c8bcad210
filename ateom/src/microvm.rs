// SPDX-License-Identifier: Apache-2.0
//! The microVM class: a kernel of its own for each actor, under a VMM behind one trait.
//!
//! ```text
//! prepare    nothing that costs: the hardware follows from the actor
//! boot       memory, disks ─▶ VMM ─▶ agent: hello ─▶ boot (clock, entropy, containers) ─▶ link up
//! restore    VMM started on the snapshot's memory ─▶ devices ─▶ processors go on, the workload stands still
//!            ─▶ resume (clock, entropy, identity; then the workload) ─▶ link up
//! checkpoint [memory copied ahead ─▶] workload stands still ─▶ processors stop ─▶ devices, written memory [─▶ all goes on] ─▶ the rest, fsync
//! ```
//! The slot does the rest as for gVisor: names, leases (its freezer stops the VMM's process), gate, egress, readiness.
//! The link (a tap) lies in the worker's namespace and comes up last, so nothing passes before clock, entropy and
//! identity are new (P6).
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use ateom_guest::Renewal;
use sha2::{Digest as _, Sha256};
use substrate_proto::ateom::{ResolvedContainer, SandboxSpec, SnapshotFile};
use substrate_proto::types::{Compatibility, ExitStatus};
use tokio::sync::watch;

use crate::cgroup::blocking;
use crate::container;
use crate::error::SlotError;
use crate::launcher::{Launcher, Streams};
use crate::network::{LinkKind, open_link};
use crate::runtime::{
    Description, ExecProcess, ExecRequest, Place, Runtime, RuntimeError, Sandbox, Steps, file_error,
};
use crate::volume;

pub mod accelerator;
mod agent;
pub mod cloud_hypervisor;
pub mod firecracker;
mod initramfs;
pub mod jail;
mod memory;
mod process;
pub mod qemu;
mod qmp;
mod rest;
pub mod spec;
mod streams;
pub mod vmm;

use accelerator::{Finding, Probe, Wanted};
use agent::Agent;
use spec::Layout;
use vmm::{Capabilities, Home, Kernel, Saved, Vm, Vmm};

/// Where the host offers KVM.
const KVM: &str = "/dev/kvm";
/// The fact that says which version of the protocol a snapshot's agent speaks.
const AGENT: &str = "agent";
/// The class's name on the wire.
pub const CLASS: &str = "microvm";
/// How long a guest's kernel may take to our init. Under TCG on a busy machine it is many times that of a quiet one.
const KERNEL_LIMIT: Duration = Duration::from_secs(90);
/// How long the agent may take to start the containers.
const BOOT_LIMIT: Duration = Duration::from_mins(1);
/// How long the workload may take to stand still, and to go on.
const TURN_LIMIT: Duration = Duration::from_secs(30);
/// How long making a volume's file system may take.
const MKFS_LIMIT: Duration = Duration::from_mins(1);
/// How long a machine whose agent failed may take to be seen dead.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Bytes of fresh entropy.
const ENTROPY: usize = 64;

/// Why the class cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MicrovmError {
    /// The VMM is not there, or not executable.
    #[error("cannot run {path}: {source}; scripts/setup installs QEMU, --qemu PATH names another")]
    Missing {
        /// The path given.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It is not the pinned one.
    #[error("{path} has sha256 {found}, pinned is {wanted}: install it again or change the sandbox config")]
    Digest {
        /// The path given.
        path: PathBuf,
        /// Its digest.
        found: String,
        /// The pinned digest.
        wanted: String,
    },
    /// It lacks something.
    #[error("{path} {lack}")]
    Unsuitable {
        /// The path given.
        path: PathBuf,
        /// What it lacks.
        lack: String,
    },
    /// There is no kernel.
    #[error(
        "cannot read the guests' kernel {path}: {source}; scripts/setup fetches one, --kernel DIR names another"
    )]
    Kernel {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// No initramfs can be made.
    #[error(transparent)]
    Initramfs(#[from] initramfs::InitramfsError),
    /// A file of ours cannot be written.
    #[error(transparent)]
    Files(#[from] RuntimeError),
}

/// Which backend a binary is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Qemu,
    CloudHypervisor,
    Firecracker,
}

impl Kind {
    /// From what it says when it is asked for its version; QEMU's backend says of anything else that it is none.
    fn of(said: &str) -> Self {
        let is = |name: &str| said.lines().any(|line| line.starts_with(name));
        if is("Firecracker v") {
            Self::Firecracker
        } else if is("cloud-hypervisor v") {
            Self::CloudHypervisor
        } else {
            Self::Qemu
        }
    }
}

/// The class, for one VMM and kernel.
#[derive(Debug)]
pub struct Microvm {
    vmm: Arc<dyn Vmm>,
    description: Description,
}

/// By which a runtime is known to snapshots.
#[derive(Debug, Clone, Copy)]
pub enum Identity<'a> {
    /// The sha256 (hex) of its binary, whatever it is.
    Found,
    /// As before, and it must be this.
    Binary(&'a str),
    /// That of the archive it came in, which the node agent has verified.
    Archive(&'a str),
}

/// How the accelerator is chosen.
#[derive(Debug, Clone, Copy, Default)]
pub struct Choice<'a> {
    /// What is asked for.
    pub wanted: Wanted,
    /// Where findings are kept; see [`Probe::choose`].
    pub known: Option<&'a Path>,
}

/// Asks of a QEMU and a kernel whether guests run under KVM here, keeping nothing.
///
/// # Errors
/// See [`MicrovmError`].
pub fn probe(monitor: &Path, kernel: &Path) -> Result<Finding, MicrovmError> {
    let template = std::env::temp_dir().join("substrate-probe-XXXXXX");
    let directory =
        nix::unistd::mkdtemp(&template).map_err(|errno| file_error("create", &template)(errno.into()))?;
    let mut found = None;
    let done = (|| {
        let content = initramfs::build(&kernel.join("modules"), &[])?;
        let initramfs = directory.join("initramfs");
        std::fs::write(&initramfs, content).map_err(file_error("write", &initramfs))?;
        let kernel = Kernel { image: kernel.join("vmlinuz"), initramfs };
        qemu::Qemu::new(monitor, String::new(), kernel, PathBuf::new(), |machine, kernel| {
            let device = Path::new(KVM);
            let probe = Probe { binary: monitor, machine, kernel, directory: &directory, device };
            let finding = probe.choose(Wanted::Auto, "", None)?;
            let accelerator = finding.accelerator;
            found = Some(finding);
            Ok(accelerator)
        })
    })();
    if let Err(error) = std::fs::remove_dir_all(&directory) {
        tracing::warn!(directory = %directory.display(), %error, "the probe's files stay behind");
    }
    done.map(|_| found.unwrap_or(Finding::emulation()))
}

/// The boot of this host: a device that was there may be another after the next.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

fn sha256_file(path: &Path) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok(hex::encode(hasher.finalize()))
}

impl Microvm {
    /// Checks VMM and kernel and builds the initramfs. `monitor` is a QEMU, or one of the experimental ones, told by what
    /// it says of itself. `kernel` holds `vmlinuz` (for QEMU) or `vmlinux` (for the others) and `modules/` (the kernel's
    /// `/lib/modules/VERSION`). Runs processes: call before children are reaped elsewhere.
    ///
    /// # Errors
    /// See [`MicrovmError`].
    pub fn new(
        monitor: &Path,
        identity: Identity<'_>,
        kernel: &Path,
        accelerator: Choice<'_>,
        directory: &Path,
    ) -> Result<Self, MicrovmError> {
        let missing = |source| MicrovmError::Missing { path: monitor.to_owned(), source };
        let found = sha256_file(monitor).map_err(missing)?;
        let digest = match identity {
            Identity::Archive(digest) => digest.to_ascii_lowercase(),
            Identity::Binary(wanted) if !wanted.eq_ignore_ascii_case(&found) => {
                let wanted = wanted.to_owned();
                return Err(MicrovmError::Digest { path: monitor.to_owned(), found, wanted });
            }
            Identity::Binary(_) | Identity::Found => found,
        };
        let kind = Kind::of(&process::ask(monitor, &["--version"])?);
        let (image, more) = match kind {
            Kind::Qemu => ("vmlinuz", &[][..]),
            Kind::CloudHypervisor => ("vmlinux", &["vmw_vsock_virtio_transport"][..]),
            Kind::Firecracker => ("vmlinux", &["virtio_mmio", "vmw_vsock_virtio_transport"][..]),
        };
        let image = kernel.join(image);
        let kernel_digest =
            sha256_file(&image).map_err(|source| MicrovmError::Kernel { path: image.clone(), source })?;
        let content = initramfs::build(&kernel.join("modules"), more)?;
        let initramfs_digest = hex::encode(Sha256::digest(&content));
        let initramfs = directory.join("initramfs");
        std::fs::write(&initramfs, content).map_err(file_error("write", &initramfs))?;
        let kernel = Kernel { image, initramfs };
        let vmm: Arc<dyn Vmm> = match kind {
            Kind::Qemu => {
                let preload = directory.join("private.so");
                std::fs::write(&preload, qemu::PRELOAD).map_err(file_error("write", &preload))?;
                let of =
                    [boot_id(), digest.clone(), kernel_digest.clone(), initramfs_digest.clone()].join(" ");
                Arc::new(qemu::Qemu::new(monitor, digest, kernel, preload, |machine, kernel| {
                    let device = Path::new(KVM);
                    let finding = Probe { binary: monitor, machine, kernel, directory, device }.choose(
                        accelerator.wanted,
                        &of,
                        accelerator.known,
                    )?;
                    let Finding { accelerator, why_not_kvm, boot_ms } = finding;
                    tracing::info!(accelerator = accelerator.name(), why_not_kvm, boot_ms, "runs guests");
                    Ok(accelerator)
                })?)
            }
            Kind::CloudHypervisor => {
                Arc::new(cloud_hypervisor::CloudHypervisor::new(monitor, digest, kernel)?)
            }
            Kind::Firecracker => Arc::new(firecracker::Firecracker::new(monitor, digest, kernel)?),
        };
        if vmm.capabilities().experimental {
            let (name, version) = (vmm.capabilities().name, &vmm.capabilities().version);
            tracing::warn!(
                name,
                version,
                "this machine monitor is experimental: nobody has seen Linux boot under it"
            );
        }
        let capabilities = vmm.capabilities();
        let mut facts: BTreeMap<String, String> = capabilities.restore_requires.clone();
        // Not the initramfs: what a restored guest had of it is in its memory, and its agent is known by what it speaks.
        let agent = ateom_guest::VERSION.to_string();
        for (name, value) in [("vmm", capabilities.name), ("kernel", &kernel_digest), (AGENT, &agent)] {
            facts.insert(name.to_owned(), value.to_owned());
        }
        let description = Description {
            sandbox_class: CLASS.to_owned(),
            digest: capabilities.digest.clone(),
            version: format!("{} {}", capabilities.name, capabilities.version),
            architecture: if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" }.to_owned(),
            cpu_features: capabilities.cpu_features.clone(),
            facts,
            checkpoint_keeps_running: capabilities.pause,
            incremental: capabilities.incremental,
        };
        Ok(Self { vmm, description })
    }
}

#[async_trait]
impl Runtime for Microvm {
    fn describe(&self) -> &Description {
        &self.description
    }

    fn link(&self) -> LinkKind {
        LinkKind::Tap
    }

    fn overhead_bytes(&self) -> u64 {
        // QEMU's own memory with its translation cache, and what the guest has beside the workload's share.
        spec::GUEST_OVERHEAD + (192 << 20)
    }

    fn validate(&self, spec: &SandboxSpec) -> Result<(), SlotError> {
        spec::validate(spec)
    }

    fn compatibility(&self, spec: &SandboxSpec) -> Compatibility {
        let of = &self.description;
        let Layout { machine, mounted, .. } = spec::layout(spec);
        let mut facts: BTreeMap<String, String> = of.facts.clone();
        facts.insert("memory_mib".to_owned(), (machine.memory >> 20).to_string());
        facts.insert("processors".to_owned(), machine.processors.to_string());
        facts.insert(
            "disks".to_owned(),
            machine.disks.iter().map(|disk| disk.serial.as_str()).collect::<Vec<_>>().join(" "),
        );
        // The guest's page cache is of these very files, wherever they were made.
        let digest_of = |file: &str| {
            std::fs::read_to_string(format!("{file}.sha256")).unwrap_or_default().trim().to_owned()
        };
        for container in &spec.containers {
            facts.insert(format!("rootfs.{}", container.name), digest_of(&container.rootfs));
        }
        for (disk, file) in mounted {
            facts.insert(format!("mounted.{disk}"), digest_of(&file.display().to_string()));
        }
        Compatibility {
            sandbox_class: of.sandbox_class.clone(),
            runtime_digest: of.digest.clone(),
            architecture: of.architecture.clone(),
            cpu_features: of.cpu_features.clone(),
            facts: facts.into_iter().collect(),
            spec_digest: spec::digest(spec),
            images: (spec.containers.iter())
                .map(|container| (container.name.clone(), container.image_digest.clone()))
                .collect(),
        }
    }

    fn in_own_words(&self, needed: &Compatibility) -> Compatibility {
        let mut needed = needed.clone();
        // Snapshots of the first builds name the initramfs that held their agent, of the first version each.
        if needed.facts.remove("initramfs").is_some() {
            needed.facts.entry(AGENT.to_owned()).or_insert_with(|| "1".to_owned());
        }
        needed
    }

    async fn prepare(&self, place: Place) -> Result<Box<dyn Sandbox>, RuntimeError> {
        let tap = place.tap.ok_or_else(|| RuntimeError::Failed("the slot made no tap".to_owned()))?;
        let (up, _) = watch::channel(false);
        Ok(Box::new(MicrovmSandbox {
            vmm: Arc::clone(&self.vmm),
            directory: place.directory,
            launcher: place.launcher,
            network_namespace: place.network_namespace,
            tap: Mutex::new(Some(tap)),
            running: OnceLock::new(),
            up,
        }))
    }
}

/// A machine with its agent.
#[derive(Debug)]
struct Running {
    vm: Box<dyn Vm>,
    agent: OnceLock<Agent>,
    containers: Vec<ResolvedContainer>,
    /// Disks of volumes.
    volumes: Vec<PathBuf>,
}

impl Running {
    /// Sets the space of volumes aside again: to the guest's standing still belongs that it gives back what its files do
    /// not need.
    fn reserve_volumes(&self) {
        for disk in &self.volumes {
            if let Err(error) = reserve(disk) {
                // Until the actor's next start the watermarks have to do.
                tracing::warn!(%error, "a volume may run out of space");
            }
        }
    }

    fn agent(&self) -> Result<&Agent, RuntimeError> {
        self.agent.get().ok_or_else(|| RuntimeError::Failed("the guest's agent is not connected".to_owned()))
    }

    /// Something that the agent is to do; a machine that dies meanwhile says why.
    async fn with_agent<T>(
        &self,
        work: impl Future<Output = Result<T, RuntimeError>>,
    ) -> Result<T, RuntimeError> {
        let ended = |why: String| RuntimeError::Failed(format!("the machine ended: {why}"));
        tokio::select! {
            biased;
            done = work => match done {
                Ok(value) => Ok(value),
                // The stream's end comes before that of the machine, which says more.
                Err(error) => match tokio::time::timeout(LAST_WORDS, self.vm.died()).await {
                    Ok(why) => Err(ended(why)),
                    Err(_) => Err(error),
                },
            },
            why = self.vm.died() => Err(ended(why)),
        }
    }
}

/// One sandbox of this class.
#[derive(Debug)]
struct MicrovmSandbox {
    vmm: Arc<dyn Vmm>,
    directory: PathBuf,
    launcher: Launcher,
    network_namespace: PathBuf,
    tap: Mutex<Option<OwnedFd>>,
    running: OnceLock<Running>,
    /// Whether `running` is set.
    up: watch::Sender<bool>,
}

/// What is new whenever a guest begins to run.
fn renewal(layout: &Layout) -> Result<Renewal, RuntimeError> {
    use std::io::Read as _;
    let mut entropy = vec![0; ENTROPY];
    let random = Path::new("/dev/urandom");
    File::open(random)
        .and_then(|mut file| file.read_exact(&mut entropy))
        .map_err(file_error("read", random))?;
    Ok(Renewal { time_ns: 0, entropy, delivered: spec::deliveries(layout)? })
}

/// The time, as late as can be.
fn now(renewal: Renewal) -> Renewal {
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Renewal { time_ns: time.as_nanos() as i64, ..renewal }
}

impl MicrovmSandbox {
    fn home(&self, layout: &Layout) -> Result<Home, RuntimeError> {
        let tap = self.tap.lock().unwrap_or_else(PoisonError::into_inner).take();
        let memory = memory::mount_memory(&self.directory, layout.machine.memory)
            .map_err(file_error("mount memory below", &self.directory))?;
        Ok(Home {
            directory: self.directory.clone(),
            memory,
            launcher: self.launcher.clone(),
            network_namespace: self.network_namespace.clone(),
            tap: tap.ok_or_else(|| RuntimeError::Failed("this sandbox was started before".to_owned()))?,
        })
    }

    fn set_running(
        &self,
        vm: Box<dyn Vm>,
        spec: &SandboxSpec,
        layout: &Layout,
    ) -> Result<&Running, RuntimeError> {
        let volumes = layout.volumes.iter().map(spec::Volume::disk).collect();
        let containers = spec.containers.clone();
        let running = Running { vm, agent: OnceLock::new(), containers, volumes };
        if self.running.set(running).is_err() {
            return Err(RuntimeError::Failed("this sandbox was started before".to_owned()));
        }
        self.up.send_replace(true);
        self.running()
    }

    fn running(&self) -> Result<&Running, RuntimeError> {
        self.running
            .get()
            .ok_or_else(|| RuntimeError::Failed("no machine was started in this sandbox".to_owned()))
    }

    fn connect(running: &Running, quiet: bool) -> Result<&Agent, RuntimeError> {
        let stream = running.vm.agent();
        let stream =
            stream.ok_or_else(|| RuntimeError::Failed("the agent's stream was taken before".to_owned()))?;
        let names = running.containers.iter().map(|container| container.name.clone()).collect();
        let logs = running.containers.iter().map(container::open_log).collect::<Result<_, _>>()?;
        Ok(running.agent.get_or_init(|| Agent::new(stream, quiet, names, logs)))
    }

    /// Makes the disks of volumes that have none, and reserves their space; returns which were made.
    async fn make_volumes(&self, layout: &Layout) -> Result<Vec<bool>, RuntimeError> {
        let mut fresh = Vec::new();
        for volume in &layout.volumes {
            let disk = volume.disk();
            let is_new = !disk.exists();
            fresh.push(is_new);
            if is_new {
                self.make_volume(&disk, volume::reserved(volume.size)).await?;
            }
            reserve(&disk)?;
        }
        Ok(fresh)
    }

    async fn make_volume(&self, disk: &Path, size: u64) -> Result<(), RuntimeError> {
        let unfinished = disk.with_extension("new");
        match std::fs::remove_file(&unfinished) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(file_error("remove", &unfinished)(error));
            }
            _ => {}
        }
        drop(memory::create(&unfinished, size).map_err(file_error("create", &unfinished))?);
        let log = self.directory.join("mkfs.log");
        let file = File::create(&log).map_err(file_error("create", &log))?;
        let streams = Streams::output(file.into()).map_err(file_error("open", Path::new("/dev/null")))?;
        let argv = ["mkfs.ext4", "-q", "-F", "-m", "0", &unfinished.display().to_string()].map(str::to_owned);
        let mut job = self.launcher.spawn(argv.to_vec(), streams, false).await?;
        match tokio::time::timeout(MKFS_LIMIT, job.wait()).await {
            Ok(Ok(exit)) if exit.success() => {}
            Ok(Ok(exit)) => {
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                return Err(RuntimeError::Failed(format!(
                    "mkfs.ext4 of volume {} ended with code {}: {}",
                    disk.display(),
                    exit.code,
                    said.trim()
                )));
            }
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => {
                let what = format!("mkfs.ext4 of {}", disk.display());
                return Err(RuntimeError::Timeout { what, seconds: MKFS_LIMIT.as_secs() });
            }
        }
        std::fs::rename(&unfinished, disk).map_err(file_error("rename", &unfinished))
    }

    async fn save(
        &self,
        running: &Running,
        directory: &Path,
        keep_running: bool,
        steps: &Steps,
    ) -> Result<Saved, RuntimeError> {
        steps.time("stop", running.vm.pause()).await?;
        running.vm.snapshot(directory, keep_running, steps).await
    }

    /// After a failed checkpoint: lets the actor go on, and says whether it does.
    async fn go_on(&self, running: &Running, error: RuntimeError) -> RuntimeError {
        running.reserve_volumes();
        let again = async {
            running.vm.resume().await?;
            running.agent()?.resume(now(Renewal::default()), TURN_LIMIT).await
        };
        match running.with_agent(again).await {
            Ok(()) => RuntimeError::CheckpointRefused(error.to_string()),
            Err(worse) => RuntimeError::Failed(format!("{error}; and it could not go on: {worse}")),
        }
    }
}

/// Sets the whole space of a volume's disk aside.
fn reserve(disk: &Path) -> Result<(), RuntimeError> {
    File::options()
        .write(true)
        .open(disk)
        .and_then(|file| volume::reserve(&file))
        .map_err(file_error("reserve the space of", disk))
}

async fn link_up(steps: &Steps) -> Result<(), RuntimeError> {
    let opened = steps.time("link", open_link()).await;
    opened.map_err(|error| RuntimeError::Failed(format!("cannot bring the actor's link up: {error}")))
}

#[async_trait]
impl Sandbox for MicrovmSandbox {
    async fn boot(&self, spec: &SandboxSpec, steps: &Steps) -> Result<(), RuntimeError> {
        let layout = spec::layout(spec);
        let fresh = self.make_volumes(&layout).await?;
        let vm = self.vmm.boot(self.home(&layout)?, &layout.machine, steps).await?;
        let running = self.set_running(vm, spec, &layout)?;
        let agent = Self::connect(running, false)?;
        let renewal = renewal(&layout)?;
        steps.time("kernel", running.with_agent(agent.greeted(KERNEL_LIMIT))).await?;
        let boot = ateom_guest::Boot { renewal: now(renewal), ..spec::boot(spec, &layout, &fresh) };
        steps.time("containers", running.with_agent(agent.boot(boot, BOOT_LIMIT))).await?;
        link_up(steps).await
    }

    async fn restore(&self, spec: &SandboxSpec, directory: &Path, steps: &Steps) -> Result<(), RuntimeError> {
        let layout = spec::layout(spec);
        for volume in &layout.volumes {
            let disk = volume.disk();
            if !disk.exists() {
                return Err(RuntimeError::Failed(format!("the volume's disk {} is missing", disk.display())));
            }
            reserve(&disk)?;
        }
        let renewal = renewal(&layout)?;
        let vm = self.vmm.restore(self.home(&layout)?, &layout.machine, directory, steps).await?;
        let running = self.set_running(vm, spec, &layout)?;
        let agent = Self::connect(running, true)?;
        steps.time("continue", running.vm.resume()).await?;
        steps.time("renew", running.with_agent(agent.resume(now(renewal), TURN_LIMIT))).await?;
        link_up(steps).await
    }

    async fn checkpoint(
        &self,
        directory: &Path,
        keep_running: bool,
        steps: &Steps,
    ) -> Result<Vec<SnapshotFile>, RuntimeError> {
        let running = self.running()?;
        let agent = running.agent()?;
        let Capabilities { name, pause, .. } = self.vmm.capabilities();
        if keep_running && !pause {
            let why =
                format!("{name} cannot let a machine go on after a snapshot; suspend or pause the actor");
            return Err(RuntimeError::CheckpointRefused(why));
        }
        if keep_running {
            let copied = running.vm.copy_ahead(directory, steps).await;
            copied.map_err(|error| RuntimeError::CheckpointRefused(error.to_string()))?;
        }
        if let Err(error) = steps.time("quiesce", running.with_agent(agent.quiesce(TURN_LIMIT))).await {
            return Err(self.go_on(running, error).await);
        }
        let Saved { files, rest } = match self.save(running, directory, keep_running, steps).await {
            Ok(saved) => saved,
            Err(error) => return Err(self.go_on(running, error).await),
        };
        if keep_running {
            running.reserve_volumes();
            steps.time("continue", running.vm.resume()).await?;
            steps
                .time("renew", running.with_agent(agent.resume(now(Renewal::default()), TURN_LIMIT)))
                .await?;
        }
        let place = directory.to_owned();
        let names: Vec<String> = files.iter().map(|file| file.name.clone()).collect();
        let copy = || async {
            let Some(rest) = rest else { return Ok(()) };
            let copied = steps.time("rest", blocking(move || rest.copy())).await;
            copied.map(drop).map_err(file_error("copy memory into", directory))
        };
        let durable = match copy().await {
            Ok(()) => steps.time("fsync", blocking(move || fsync(&place, &names))).await,
            Err(error) => Err(error),
        };
        match durable {
            Ok(()) => Ok(files),
            Err(error) if keep_running => Err(RuntimeError::CheckpointRefused(error.to_string())),
            Err(error) => Err(self.go_on(running, error).await),
        }
    }

    async fn exec(&self, request: ExecRequest, streams: Streams) -> Result<ExecProcess, RuntimeError> {
        let running = self.running()?;
        let (number, container) = container::find(&running.containers, &request.container)?;
        let container = container::for_exec(container, &request);
        let process = spec::process(&container, request.args);
        running.agent()?.exec(number, process, streams, request.terminal).await
    }

    async fn exited(&self, container: &str) -> Result<ExitStatus, RuntimeError> {
        let running = self.running()?;
        let (number, _) = container::find(&running.containers, container)?;
        running.agent()?.ended(number).await
    }

    async fn died(&self) -> String {
        let mut up = self.up.subscribe();
        tokio::select! {
            biased;
            () = self.launcher.gone() => return "the launcher in the actor's cgroup died".to_owned(),
            // The sender is this sandbox's.
            _ = up.wait_for(|up| *up) => {}
        }
        match self.running() {
            Ok(running) => running.vm.died().await,
            Err(error) => error.to_string(),
        }
    }
}

/// Makes a snapshot's files durable. The directory's own entry is the caller's to make durable.
fn fsync(directory: &Path, names: &[String]) -> Result<(), RuntimeError> {
    for name in names {
        let path = directory.join(name);
        File::open(&path).and_then(|file| file.sync_all()).map_err(file_error("fsync", &path))?;
    }
    File::open(directory).and_then(|file| file.sync_all()).map_err(file_error("fsync", directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitor_is_told_by_what_it_says() {
        assert_eq!(Kind::of("QEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright\n"), Kind::Qemu);
        assert_eq!(Kind::of("cloud-hypervisor v54.0.0\n"), Kind::CloudHypervisor);
        assert_eq!(Kind::of("Firecracker v1.12.1\n\n[main] exiting\n"), Kind::Firecracker);
        assert_eq!(Kind::of("something else"), Kind::Qemu);
    }
}
