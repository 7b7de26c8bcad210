// SPDX-License-Identifier: Apache-2.0
//! cloud-hypervisor, by its REST interface. *Experimental*: no machine has booted Linux under it in our tests; what is
//! tested, where a binary is given, is this file's whole life cycle with a toy kernel (seen with version 53).
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
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::net::UnixStream;

use super::rest::{self, AGENT, API, CONSOLE, RestVm};
use super::spec::Machine;
use super::vmm::{AGENT_ARGUMENT, AGENT_PORT, Capabilities, Home, Kernel, Saved, Vm, Vmm};
use crate::microvm::MicrovmError;
use crate::network::{ACTOR_MAC, WORKER_LINK};
use crate::runtime::{RuntimeError, Steps};

const WHO: &str = "cloud-hypervisor";
/// The oldest whose interface is the one used here.
const OLDEST: (u32, u32) = (50, 0);
/// What it says of a snapshot that is asked for before all memory of the last one was read (`VmError::VmRestoring`,
/// vmm/src/vm.rs of version 53).
const RESTORING: &str = "on-demand memory restore is still in progress";
/// How long that may take, and the pause between attempts.
const RESTORE_LIMIT: Duration = Duration::from_mins(1);
const AGAIN: Duration = Duration::from_millis(10);
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
        let is = (WHO, "cloud-hypervisor", "cloud-hypervisor v");
        let capabilities = rest::look(binary, digest, is, OLDEST)?;
        Ok(Self { binary: binary.to_owned(), kernel, capabilities })
    }

    async fn start(&self, home: Home) -> Result<CloudHypervisorVm, RuntimeError> {
        RestVm::start(WHO, &self.binary, &["--api-socket", API], home).await.map(CloudHypervisorVm)
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
                "cmdline": format!(
                    "console=ttyS0 quiet loglevel=4 panic=-1 {AGENT_ARGUMENT}={AGENT_PORT}{}",
                    super::vmm::arguments(machine)
                ),
            },
            "disks": disks,
            "net": [{"tap": WORKER_LINK, "mac": mac}],
            "vsock": {"cid": 3, "socket": AGENT},
            "serial": {"mode": "File", "file": CONSOLE},
            "console": {"mode": "Off"},
        });
        vm.put("vm.create", &config).await?;
        vm.put("vm.boot", &Value::Null).await?;
        vm.0.listen()?;
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
        vm.0.listen()?;
        Ok(Box::new(vm))
    }
}

/// A machine.
#[derive(Debug)]
struct CloudHypervisorVm(RestVm);

impl CloudHypervisorVm {
    async fn put(&self, verb: &str, body: &Value) -> Result<(), RuntimeError> {
        self.0.call("PUT", &format!("/api/v1/{verb}"), body).await
    }
}

#[async_trait]
impl Vm for CloudHypervisorVm {
    fn agent(&self) -> Option<UnixStream> {
        self.0.agent()
    }

    async fn pause(&self) -> Result<(), RuntimeError> {
        self.put("vm.pause", &Value::Null).await
    }

    async fn resume(&self) -> Result<(), RuntimeError> {
        self.put("vm.resume", &Value::Null).await
    }

    async fn snapshot(
        &self,
        directory: &Path,
        _keep_running: bool,
        steps: &Steps,
    ) -> Result<Saved, RuntimeError> {
        let to = json!({"destination_url": format!("file://{}", directory.display())});
        let snapshot = async {
            let begun = Instant::now();
            loop {
                match self.put("vm.snapshot", &to).await {
                    // It reads the rest of its memory by itself.
                    Err(error)
                        if error.to_string().contains(RESTORING) && begun.elapsed() < RESTORE_LIMIT =>
                    {
                        tokio::time::sleep(AGAIN).await;
                    }
                    done => return done,
                }
            }
        };
        steps.time("memory", snapshot).await?;
        rest::saved(directory, &FILES)
    }

    async fn died(&self) -> String {
        self.0.died().await
    }
}
