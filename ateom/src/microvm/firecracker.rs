// SPDX-License-Identifier: Apache-2.0
//! Firecracker, by its REST interface. *Experimental*: no machine has booted Linux under it in our tests; what is tested,
//! where a binary is given, is this file's whole life cycle with a toy kernel.
//!
//! ```text
//! boot      start ─▶ machine, boot source, drives, link, vsock ─▶ InstanceStart
//! snapshot  [paused] /snapshot/create Full: device file, memory file
//! restore   start ─▶ /snapshot/load (memory mapped privately: shared by clones) ─▶ [paused]
//! ```
//! It has no way to name another drive at a restore, so drives have names relative to the machine's directory. It takes
//! no descriptor for its link: the tap is kept and opened again by its name, for which the process has to be in the
//! worker's network namespace. It runs behind its own system call filter, as root; its jailer is not used.
//!
//! A snapshot is restored by the same binary on a processor that has every feature of the one that it was made on.
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde_json::json;
use tokio::net::UnixStream;

use super::rest::{self, AGENT, API, RestVm};
use super::spec::Machine;
use super::vmm::{AGENT_PORT, Capabilities, Home, Kernel, Saved, Vm, Vmm};
use crate::microvm::MicrovmError;
use crate::network::{ACTOR_MAC, WORKER_LINK};
use crate::runtime::{RuntimeError, Steps, file_error};

const WHO: &str = "Firecracker";
/// The oldest that boots a kernel by its PVH note.
const OLDEST: (u32, u32) = (1, 12);
/// Names in a snapshot.
const DEVICES: &str = "devices";
const MEMORY: &str = "memory";

/// The backend for one binary and kernel (an ELF `vmlinux`).
#[derive(Debug)]
pub struct Firecracker {
    binary: PathBuf,
    kernel: Kernel,
    capabilities: Capabilities,
}

impl Firecracker {
    /// Looks at a binary. Runs it: call before children are reaped elsewhere.
    ///
    /// # Errors
    /// [`MicrovmError`] naming what it lacks.
    pub fn new(binary: &Path, digest: String, kernel: Kernel) -> Result<Self, MicrovmError> {
        let capabilities = rest::look(binary, digest, (WHO, "firecracker", "Firecracker v"), OLDEST)?;
        Ok(Self { binary: binary.to_owned(), kernel, capabilities })
    }

    async fn start(&self, home: Home) -> Result<FirecrackerVm, RuntimeError> {
        let args = ["--api-sock", API, "--level", "Warning"];
        RestVm::start(WHO, &self.binary, &args, home).await.map(FirecrackerVm)
    }
}

#[async_trait]
impl Vmm for Firecracker {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn boot(&self, home: Home, machine: &Machine, steps: &Steps) -> Result<Box<dyn Vm>, RuntimeError> {
        let disks = rest::link_disks(&home.directory, machine)?;
        let vm = steps.time("vmm_start", self.start(home)).await?;
        let put = async |path: &str, body| vm.0.call("PUT", path, &body).await;
        let memory = machine.memory >> 20;
        put("/machine-config", json!({"vcpu_count": machine.processors, "mem_size_mib": memory})).await?;
        let boot_args = format!(
            "console=ttyS0 quiet loglevel=4 reboot=k panic=-1 8250.nr_uarts=1 i8042.noaux i8042.nokbd {}={AGENT_PORT}{}",
            super::vmm::AGENT_ARGUMENT,
            super::vmm::arguments(machine)
        );
        let boot = json!({
            "kernel_image_path": self.kernel.image,
            "initrd_path": self.kernel.initramfs,
            "boot_args": boot_args,
        });
        put("/boot-source", boot).await?;
        for (serial, path, read_only) in disks {
            let drive = json!({
                "drive_id": serial, "path_on_host": path, "is_root_device": false, "is_read_only": read_only,
            });
            put(&format!("/drives/{serial}"), drive).await?;
        }
        let mac = ACTOR_MAC.map(|byte| format!("{byte:02x}")).join(":");
        let link = json!({"iface_id": "eth0", "guest_mac": mac, "host_dev_name": WORKER_LINK});
        put("/network-interfaces/eth0", link).await?;
        put("/vsock", json!({"guest_cid": 3, "uds_path": AGENT})).await?;
        put("/actions", json!({"action_type": "InstanceStart"})).await?;
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
        let memory = directory.join(MEMORY);
        let length = std::fs::metadata(&memory).map_err(file_error("look at", &memory))?.len();
        if length != machine.memory {
            return Err(RuntimeError::Failed(format!(
                "{} has {length} bytes, the machine has {} of memory: the snapshot is damaged",
                memory.display(),
                machine.memory
            )));
        }
        rest::link_disks(&home.directory, machine)?;
        let vm = steps.time("vmm_start", self.start(home)).await?;
        let load = json!({
            "snapshot_path": directory.join(DEVICES),
            "mem_backend": {"backend_type": "File", "backend_path": memory},
            "resume_vm": false,
        });
        steps.time("devices", vm.0.call("PUT", "/snapshot/load", &load)).await?;
        vm.0.listen()?;
        Ok(Box::new(vm))
    }
}

/// A machine.
#[derive(Debug)]
struct FirecrackerVm(RestVm);

impl FirecrackerVm {
    async fn turn(&self, state: &str) -> Result<(), RuntimeError> {
        self.0.call("PATCH", "/vm", &json!({"state": state})).await
    }
}

#[async_trait]
impl Vm for FirecrackerVm {
    fn agent(&self) -> Option<UnixStream> {
        self.0.agent()
    }

    async fn pause(&self) -> Result<(), RuntimeError> {
        self.turn("Paused").await
    }

    async fn resume(&self) -> Result<(), RuntimeError> {
        self.turn("Resumed").await
    }

    async fn snapshot(
        &self,
        directory: &Path,
        _keep_running: bool,
        steps: &Steps,
    ) -> Result<Saved, RuntimeError> {
        let (devices, memory) = (directory.join(DEVICES), directory.join(MEMORY));
        let create = json!({
            "snapshot_type": "Full", "snapshot_path": devices, "mem_file_path": memory,
        });
        steps.time("memory", self.0.call("PUT", "/snapshot/create", &create)).await?;
        rest::saved(directory, &[(DEVICES, false), (MEMORY, true)])
    }

    async fn died(&self) -> String {
        self.0.died().await
    }
}
