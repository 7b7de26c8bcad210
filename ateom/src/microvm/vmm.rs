// SPDX-License-Identifier: Apache-2.0
//! What the class asks of a virtual machine monitor. A backend knows nothing of containers, snapshots' place or slots:
//! it makes one machine of given hardware, saves it and brings it back.
//!
//! A machine that was booted or restored is the caller's to let go on: [`Vm::resume`] after a restore. It dies with its
//! place's control group; no call has to be made for that.
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use substrate_proto::ateom::SnapshotFile;
use tokio::net::UnixStream;

use crate::launcher::Launcher;
use crate::microvm::memory::Rest;
use crate::microvm::spec::Machine;
use crate::runtime::{RuntimeError, Steps};

/// The guest's vsock port on which its agent listens, where there is no virtio-serial.
pub const AGENT_PORT: u32 = 1024;
/// The kernel's argument that names it.
pub const AGENT_ARGUMENT: &str = "ateom.vsock";

/// The kernel's arguments that a machine needs beyond those of every one, each after a space.
pub fn arguments(machine: &Machine) -> &'static str {
    if machine.network_modules { " ateom.network" } else { "" }
}

/// Major and minor of a version that begins a text.
pub fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(|letter: char| !letter.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// What a backend is and can do.
#[derive(Debug, Clone, Default)]
pub struct Capabilities {
    /// "qemu", "cloud-hypervisor" or "firecracker".
    pub name: &'static str,
    /// For people.
    pub version: String,
    /// sha256 (hex) of its binary.
    pub digest: String,
    /// No machine has booted Linux under it in our tests.
    pub experimental: bool,
    /// A checkpoint may keep the machine running.
    pub pause: bool,
    /// A snapshot can be made of only what changed.
    pub incremental: bool,
    /// What must be equal where a snapshot is restored, beside the digest.
    pub restore_requires: BTreeMap<String, String>,
    /// Processor features that the guest sees and that come from the host.
    pub cpu_features: Vec<String>,
}

/// Where a machine lives.
#[derive(Debug)]
pub struct Home {
    /// For its files; on a disk.
    pub directory: PathBuf,
    /// For its memory; a file system in memory.
    pub memory: PathBuf,
    /// Starts processes in the actor's control group.
    pub launcher: Launcher,
    /// Network namespace of its process: empty.
    pub network_namespace: PathBuf,
    /// Its link to the worker's namespace.
    pub tap: OwnedFd,
}

/// What every machine starts from.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// A bzImage or ELF.
    pub image: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
}

/// A machine monitor.
#[async_trait]
pub trait Vmm: std::fmt::Debug + Send + Sync + 'static {
    /// What it is.
    fn capabilities(&self) -> &Capabilities;

    /// Starts a machine from its kernel.
    async fn boot(&self, home: Home, machine: &Machine, steps: &Steps) -> Result<Box<dyn Vm>, RuntimeError>;

    /// Brings a machine up from a snapshot; its processors stand still.
    async fn restore(
        &self,
        home: Home,
        machine: &Machine,
        directory: &Path,
        steps: &Steps,
    ) -> Result<Box<dyn Vm>, RuntimeError>;
}

/// What a snapshot is made of.
#[derive(Debug)]
pub struct Saved {
    /// All of it.
    pub files: Vec<SnapshotFile>,
    /// What is still to be copied into it.
    pub rest: Option<Rest>,
}

/// A machine.
#[async_trait]
pub trait Vm: std::fmt::Debug + Send + Sync + 'static {
    /// The stream to the agent; to be taken once.
    fn agent(&self) -> Option<UnixStream>;

    /// Stops the processors.
    async fn pause(&self) -> Result<(), RuntimeError>;

    /// Lets them go on.
    async fn resume(&self) -> Result<(), RuntimeError>;

    /// Copies what can be copied of a running machine's memory before it stands still for a snapshot into this directory,
    /// after which it will go on.
    async fn copy_ahead(&self, _directory: &Path, _steps: &Steps) -> Result<(), RuntimeError> {
        Ok(())
    }

    /// Saves a machine that stands still into an empty directory. Not fsynced. What can wait until it goes on, or is
    /// dead, is in the answer; with `keep_running` it will go on before that is copied.
    async fn snapshot(
        &self,
        directory: &Path,
        keep_running: bool,
        steps: &Steps,
    ) -> Result<Saved, RuntimeError>;

    /// Returns, with a reason for people, when the machine is gone.
    async fn died(&self) -> String;
}
