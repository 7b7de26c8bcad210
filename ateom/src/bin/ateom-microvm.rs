// SPDX-License-Identifier: Apache-2.0
//! One worker of the microVM class. Started by the node agent; not meant to be run by hand.
use std::path::PathBuf;
use std::sync::Arc;

use ateom::microvm::{Microvm, jail};
use ateom::{launcher, worker};
use clap::Parser;

/// One worker slot that runs microVMs.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Id of this worker, unique on the node.
    #[arg(long)]
    worker_id: String,
    /// Pool it belongs to.
    #[arg(long, default_value = "default")]
    pool: String,
    /// Its state: worker.json, sandboxes' files.
    #[arg(long)]
    state_dir: PathBuf,
    /// Its sockets.
    #[arg(long)]
    run_dir: PathBuf,
    /// The QEMU binary.
    #[arg(long)]
    qemu: PathBuf,
    /// sha256 (hex) that it must have.
    #[arg(long)]
    qemu_sha256: Option<String>,
    /// Directory of the guests' kernel: vmlinuz and modules/.
    #[arg(long)]
    kernel: PathBuf,
    /// Socket of the node's egress proxy.
    #[arg(long)]
    egress_socket: PathBuf,
    /// Control group of this worker, relative to the hierarchies' roots.
    #[arg(long)]
    cgroup: String,
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("SUBSTRATE_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .init();
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some(launcher::ARGUMENT) => {
            if let Some(cgroup) = arguments.next() {
                return launcher::serve(&cgroup);
            }
        }
        Some(jail::ARGUMENT) => return jail::enter(arguments),
        _ => {}
    }
    let arguments = Arguments::parse();
    // Single-threaded until here and through claim(): it changes the process's network namespace.
    let claimed = worker::claim(worker::Config {
        worker_id: arguments.worker_id,
        pool: arguments.pool,
        state_dir: arguments.state_dir.clone(),
        run_dir: arguments.run_dir,
        egress_socket: arguments.egress_socket,
        cgroup: arguments.cgroup,
    })?;
    let microvm = Microvm::new(
        &arguments.qemu,
        arguments.qemu_sha256.as_deref(),
        &arguments.kernel,
        &arguments.state_dir,
    )?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build()?;
    runtime.block_on(claimed.serve(Arc::new(microvm)))
}
