// SPDX-License-Identifier: Apache-2.0
//! One worker of the gVisor class. Started by the node agent; not meant to be run by hand.
use std::path::PathBuf;
use std::sync::Arc;

use ateom::gvisor::Gvisor;
use ateom::{launcher, worker};
use clap::Parser;

/// One worker slot that runs gVisor sandboxes.
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
    /// The runsc binary.
    #[arg(long)]
    runsc: PathBuf,
    /// sha256 (hex) that the binary must have.
    #[arg(long)]
    runsc_sha256: Option<String>,
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
    if arguments.next().as_deref() == Some(launcher::ARGUMENT)
        && let Some(cgroup) = arguments.next()
    {
        return launcher::serve(&cgroup);
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
    let gvisor = Gvisor::new(&arguments.runsc, arguments.runsc_sha256.as_deref(), &arguments.state_dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build()?;
    runtime.block_on(claimed.serve(Arc::new(gvisor)))
}
