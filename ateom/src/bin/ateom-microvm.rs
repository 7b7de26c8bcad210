// SPDX-License-Identifier: Apache-2.0
//! One worker of the microVM class. Started by the node agent; not meant to be run by hand.
use std::path::PathBuf;
use std::sync::Arc;

use ateom::microvm::accelerator::{self, Wanted};
use ateom::microvm::{self, Choice, Identity, Microvm, jail};
use ateom::{launcher, worker};
use clap::Parser;

/// One worker slot that runs microVMs.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    worker: worker::Config,
    /// The QEMU binary, or that of an experimental monitor (cloud-hypervisor, Firecracker).
    #[arg(long)]
    qemu: PathBuf,
    /// sha256 (hex) that it must have.
    #[arg(long)]
    qemu_sha256: Option<String>,
    /// sha256 (hex) of the archive that it was unpacked from, with its firmware and modules: then that is the runtime's
    /// digest.
    #[arg(long, conflicts_with = "qemu_sha256")]
    archive_sha256: Option<String>,
    /// Directory of the guests' kernel: vmlinuz (for the experimental ones: vmlinux) and modules/.
    #[arg(long)]
    kernel: PathBuf,
    /// What runs the guests' processors.
    #[arg(long, value_enum, default_value_t)]
    accelerator: Wanted,
    /// File in which workers keep what was found of KVM.
    #[arg(long)]
    kvm_known: Option<PathBuf>,
}

/// Asks whether guests run under KVM here, and prints what was found as JSON.
#[derive(Debug, Parser)]
struct ProbeArguments {
    /// The QEMU binary.
    #[arg(long)]
    qemu: PathBuf,
    /// Directory of the guests' kernel.
    #[arg(long)]
    kernel: PathBuf,
}

fn main() -> anyhow::Result<()> {
    worker::log_to_stderr();
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some(launcher::ARGUMENT) => {
            if let Some(cgroup) = arguments.next() {
                return launcher::serve(&cgroup);
            }
        }
        Some(jail::ARGUMENT) => return jail::enter(arguments),
        Some("probe") => {
            let asked = ProbeArguments::parse_from(std::env::args().skip(1));
            return Ok(accelerator::print(&microvm::probe(&asked.qemu, &asked.kernel)?)?);
        }
        _ => {}
    }
    let arguments = Arguments::parse();
    // Single-threaded until here and through claim(): it changes the process's network namespace.
    let state_dir = arguments.worker.state_dir.clone();
    let claimed = worker::claim(arguments.worker)?;
    let choice = Choice { wanted: arguments.accelerator, known: arguments.kvm_known.as_deref() };
    let identity = match (&arguments.archive_sha256, &arguments.qemu_sha256) {
        (Some(archive), _) => Identity::Archive(archive),
        (None, Some(binary)) => Identity::Binary(binary),
        (None, None) => Identity::Found,
    };
    let microvm = Microvm::new(&arguments.qemu, identity, &arguments.kernel, choice, &state_dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build()?;
    runtime.block_on(claimed.serve(Arc::new(microvm)))
}
