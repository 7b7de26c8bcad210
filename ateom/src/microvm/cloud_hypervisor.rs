// SPDX-License-Identifier: Apache-2.0
//! cloud-hypervisor, by its REST interface. *Experimental*: no machine has booted Linux under it in our tests; what is
//! tested, where a binary is given, is this file's whole life cycle with a toy kernel.
//!
//! ```text
//! boot      start ─▶ vm.create ─▶ vm.boot
//! snapshot  [paused] vm.snapshot: config.json, state.json, memory-ranges
//! restore   start ─▶ vm.restore (on demand) ─▶ [paused]
//! ```
//! Paths in its configuration, which a snapshot holds, are relative to the machine's directory. The link is opened by its
//! name, as for Firecracker. A snapshot is restored by the same binary on a processor that has every feature of the one
//! that it was made on.
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use serde_json::json;
use substrate_proto::ateom::SnapshotFile;
use tokio::net::UnixStream;

use super::process::{self, Place, Process, Program};
use super::rest::{self, Rest};
use super::spec::Machine;
use super::vmm::{AGENT_ARGUMENT, AGENT_PORT, Capabilities, Home, Kernel, Saved, Vm, Vmm};
use crate::microvm::MicrovmError;
use crate::network::{ACTOR_MAC, WORKER_LINK};
use crate::runtime::{RuntimeError, Steps, file_error};

const WHO: &str = "cloud-hypervisor";
/// Names in the machine's directory.
const API: &str = "api.sock";
const AGENT: &str = "agent.sock";
const CONSOLE: &str = "console";
/// The oldest whose interface is the one used here.
const OLDEST: (u32, u32) = (50, 0);
/// Names in a snapshot, and whether they hold memory.
const FILES: [(&str, bool); 3] = [("config.json", false), ("state.json", false), ("memory-ranges", true)];

/// The backend for one binary and kernel (an ELF `vmlinux`).
#[derive(Debug)]
pub struct CloudHypervisor {
    binary: PathBuf,
    kernel: Kernel,
    capabilities: Capabilities,
}

impl CloudHypervisor {
    /// Looks at a binary. Runs it: call before children are reaped elsewhere.
    ///
    /// # Errors
    /// [`MicrovmError`] naming what it lacks.
    pub fn new(binary: &Path, digest: String, kernel: Kernel) -> Result<Self, MicrovmError> {
        let said = process::ask(binary, &["--version"])?;
        let version = said.lines().find_map(|line| line.strip_prefix("cloud-hypervisor v")).map(str::trim);
        let unsuitable = |lack: String| MicrovmError::Unsuitable { path: binary.to_owned(), lack };
        let version = version.ok_or_else(|| unsuitable("is no cloud-hypervisor".to_owned()))?;
        if super::vmm::parse_version(version).is_none_or(|found| found < OLDEST) {
            let oldest = OLDEST.0;
            return Err(unsuitable(format!("is version {version}, too old: {oldest} or newer is needed")));
        }
        let capabilities = Capabilities {
            name: "cloud-hypervisor",
            version: version.to_owned(),
            digest,
            experimental: true,
            pause: false,
            incremental: false,
            restore_requires: [("accel", "kvm"), ("cpu", "host"), ("devices", "virtio-net virtio-vsock")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            cpu_features: crate::gvisor::cpu_features(),
        };
        Ok(Self { binary: binary.to_owned(), kernel, capabilities })
    }

    async fn start(&self, home: Home) -> Result<CloudHypervisorVm, RuntimeError> {
        // Kept without its descriptor; it goes when the link is removed.
        crate::sys::keep_tap(&home.tap)
            .map_err(|error| RuntimeError::Failed(format!("cannot keep the actor's link: {error}")))?;
        let Home { directory, launcher, tap, .. } = home;
        drop(tap);
        let args = ["--api-socket", API].map(str::to_owned).to_vec();
        let program = Program { who: WHO, binary: &self.binary, files: &[], environment: &[], args };
        // The launcher's own: the worker's, where the link is.
        let namespace = Path::new("/proc/self/ns/net");
        let place = Place { directory: &directory, launcher: &launcher, network_namespace: namespace };
        let process = process::start(place, program, None, directory.join(CONSOLE)).await?;
        let rest = Rest::serve(WHO, &directory, API, &process).await?;
        Ok(CloudHypervisorVm { rest, process, directory, agent: Mutex::new(None) })
    }
}

#[async_trait]
impl Vmm for CloudHypervisor {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn boot(&self, home: Home, machine: &Machine, steps: &Steps) -> Result<Box<dyn Vm>, RuntimeError> {
        let disks: Vec<_> = rest::link_disks(&home.directory, machine)?
            .into_iter()
            .map(|(serial, path, read_only)| {
                json!({"path": path, "readonly": read_only, "serial": serial, "image_type": "Raw"})
            })
            .collect();
        let vm = steps.time("vmm_start", self.start(home)).await?;
        let mac = ACTOR_MAC.map(|byte| format!("{byte:02x}")).join(":");
        let config = json!({
            "cpus": {"boot_vcpus": machine.processors, "max_vcpus": machine.processors},
            "memory": {"size": machine.memory},
            "payload": {
                "kernel": self.kernel.image,
                "initramfs": self.kernel.initramfs,
                "cmdline": format!("console=ttyS0 quiet loglevel=4 panic=-1 {AGENT_ARGUMENT}={AGENT_PORT}"),
            },
            "disks": disks,
            "net": [{"tap": WORKER_LINK, "mac": mac}],
            "vsock": {"cid": 3, "socket": AGENT},
            "serial": {"mode": "File", "file": CONSOLE},
            "console": {"mode": "Off"},
        });
        vm.put("vm.create", &config).await?;
        vm.put("vm.boot", &json!({})).await?;
        vm.listen()?;
        Ok(Box::new(vm))
    }

    async fn restore(
        &self,
        home: Home,
        machine: &Machine,
        directory: &Path,
        steps: &Steps,
    ) -> Result<Box<dyn Vm>, RuntimeError> {
        rest::link_disks(&home.directory, machine)?;
        let vm = steps.time("vmm_start", self.start(home)).await?;
        let source = json!({
            "source_url": format!("file://{}", directory.display()),
            "memory_restore_mode": "OnDemand",
            "resume": false,
        });
        steps.time("devices", vm.put("vm.restore", &source)).await?;
        vm.listen()?;
        Ok(Box::new(vm))
    }
}

/// A machine.
#[derive(Debug)]
struct CloudHypervisorVm {
    rest: Rest,
    process: Process,
    directory: PathBuf,
    agent: Mutex<Option<UnixStream>>,
}

impl CloudHypervisorVm {
    fn listen(&self) -> Result<(), RuntimeError> {
        let stream = rest::vsock(&self.directory, AGENT, AGENT_PORT, &self.process);
        let stream =
            stream.map_err(|error| RuntimeError::Failed(format!("no stream to the agent: {error}")))?;
        *self.agent.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
        Ok(())
    }

    async fn put(&self, verb: &str, body: &serde_json::Value) -> Result<(), RuntimeError> {
        match self.rest.call("PUT", &format!("/api/v1/{verb}"), body).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.process.because(error).await),
        }
    }
}

#[async_trait]
impl Vm for CloudHypervisorVm {
    fn agent(&self) -> Option<UnixStream> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    async fn pause(&self) -> Result<(), RuntimeError> {
        self.put("vm.pause", &json!({})).await
    }

    async fn resume(&self) -> Result<(), RuntimeError> {
        self.put("vm.resume", &json!({})).await
    }

    async fn snapshot(
        &self,
        directory: &Path,
        _keep_running: bool,
        steps: &Steps,
    ) -> Result<Saved, RuntimeError> {
        let to = json!({"destination_url": format!("file://{}", directory.display())});
        steps.time("memory", self.put("vm.snapshot", &to)).await?;
        let file = |(name, memory): (&str, bool)| {
            let path = directory.join(name);
            let size = std::fs::metadata(&path).map_err(file_error("look at", &path))?.len();
            Ok(SnapshotFile { name: name.to_owned(), size, memory })
        };
        let files = FILES.into_iter().map(file).collect::<Result<_, RuntimeError>>()?;
        Ok(Saved { files, rest: None })
    }

    async fn died(&self) -> String {
        self.process.end().await
    }
}
