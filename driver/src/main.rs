// SPDX-License-Identifier: Apache-2.0
//! `openshell-driver-substrate`: the driver as a process of its own.
#![forbid(unsafe_code)]

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use openshell_driver_substrate::Config;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// OpenShell compute driver for substrate.
///
/// Serves openshell.compute.v1 on a Unix socket for a gateway with `compute_drivers = ["substrate"]`, as a client of
/// substrate's control plane.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The gateway's configuration; only its table [openshell.drivers.substrate] is read.
    #[arg(long, value_name = "gateway.toml", env = "OPENSHELL_GATEWAY_CONFIG")]
    config: Option<PathBuf>,
    /// Unix socket to serve on, in place of socket_path.
    #[arg(long, value_name = "PATH", env = "OPENSHELL_COMPUTE_DRIVER_SOCKET")]
    socket: Option<PathBuf>,
    /// Control plane to use, in place of api_endpoint.
    #[arg(long, value_name = "ENDPOINT")]
    api_endpoint: Option<String>,
    /// Read and check the configuration, print its warnings, and exit.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .init();
    let (mut config, warnings) = match &arguments.config {
        Some(path) => Config::load(path).with_context(|| format!("configuration {}", path.display()))?,
        None => (Config::default(), Vec::new()),
    };
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    if let Some(socket) = arguments.socket {
        config.socket_path = std::path::absolute(&socket).context("--socket")?;
    }
    if let Some(endpoint) = arguments.api_endpoint {
        config.api_endpoint = endpoint;
    }
    config.check()?;
    if arguments.check {
        println!("the configuration is valid");
        return Ok(());
    }
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(serve(config))
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let shutdown = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let on_signal = shutdown.clone();
    let watcher = tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            result = tokio::signal::ctrl_c() => if let Err(error) = result {
                tracing::warn!(%error, "cannot catch SIGINT");
            },
        }
        on_signal.cancel();
    });
    let socket = config.socket_path.display().to_string();
    let (ready, is_ready) = tokio::sync::oneshot::channel();
    let announce = tokio::spawn(async move {
        if is_ready.await.is_ok() {
            println!("ready: {socket}");
        }
    });
    let served = openshell_driver_substrate::serve(config, ready, shutdown).await;
    watcher.abort();
    announce.abort();
    served.map_err(anyhow::Error::from)
}
