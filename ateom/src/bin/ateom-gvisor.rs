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
    #[command(flatten)]
    worker: worker::Config,
    /// The runsc binary.
    #[arg(long)]
    runsc: PathBuf,
    /// sha256 (hex) that the binary must have.
    #[arg(long)]
    runsc_sha256: Option<String>,
}

fn main() -> anyhow::Result<()> {
    worker::log_to_stderr();
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(launcher::ARGUMENT)
        && let Some(cgroup) = arguments.next()
    {
        return launcher::serve(&cgroup);
    }
    let arguments = Arguments::parse();
    // Single-threaded until here and through claim(): it changes the process's network namespace.
    let state_dir = arguments.worker.state_dir.clone();
    let claimed = worker::claim(arguments.worker)?;
    let gvisor = Gvisor::new(&arguments.runsc, arguments.runsc_sha256.as_deref(), &state_dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build()?;
    runtime.block_on(claimed.serve(Arc::new(gvisor)))
}
