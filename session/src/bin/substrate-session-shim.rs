// SPDX-License-Identifier: Apache-2.0
//! `substrate-session-shim --key FILE -- SUPERVISOR [ARGUMENT…]`: see `substrate_session::shim`.
//! `substrate-session-shim stand-in` is what a probe of the runtime starts so.
#![forbid(unsafe_code)]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use substrate_session::mux::Mux;
use substrate_session::shim::{
    HUB_PORT, SHELL, STAND_IN, SUPERVISOR_SOCKET, hub_side, supervise, supervisor_side,
};
use substrate_session::wire::SessionKey;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, UnixStream};

const USAGE: &str = "usage: substrate-session-shim --key FILE [--supervisor-socket PATH] [--hub-port PORT] -- PROGRAM [ARGUMENT...]";

struct Arguments {
    key: String,
    supervisor_socket: PathBuf,
    hub_port: u16,
    program: String,
    rest: Vec<String>,
}

fn arguments() -> Result<Arguments, String> {
    let mut words = std::env::args().skip(1);
    let (mut key, mut supervisor_socket, mut hub_port) = (None, SUPERVISOR_SOCKET.into(), HUB_PORT);
    loop {
        let word = words.next().ok_or(USAGE)?;
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value; {USAGE}"));
        let port = |text: String| text.parse().map_err(|_| format!("{text:?} is no port; {USAGE}"));
        match word.as_str() {
            "--key" => key = Some(value()?),
            "--supervisor-socket" => supervisor_socket = value()?.into(),
            "--hub-port" => hub_port = port(value()?)?,
            "--" => break,
            other => return Err(format!("{other:?} is not known; {USAGE}")),
        }
    }
    let program = words.next().ok_or(USAGE)?;
    Ok(Arguments { key: key.ok_or(USAGE)?, supervisor_socket, hub_port, program, rest: words.collect() })
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("SUBSTRATE_SHIM_LOG")
                .unwrap_or_else(|_| "warn".into()),
        )
        .init();
    match run() {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("substrate-session-shim: {error}");
            ExitCode::from(125)
        }
    }
}

/// What a probe of the runtime runs in the supervisor's place (`driver/src/probe.rs`): a program like it, with a
/// connection like its own, that ends when that is lost.
async fn stand_in() -> Result<i32, String> {
    let failed = |error| format!("{SUPERVISOR_SOCKET}: {error}");
    let mut stream = UnixStream::connect(SUPERVISOR_SOCKET).await.map_err(failed)?;
    let mut bytes = [0; 64];
    while stream.read(&mut bytes).await.map_err(failed)? > 0 {}
    Err(format!("{SUPERVISOR_SOCKET} closed the connection"))
}

fn run() -> Result<i32, String> {
    if std::env::args().skip(1).eq([STAND_IN]) {
        let runtime = tokio::runtime::Runtime::new().map_err(|error| error.to_string())?;
        return runtime.block_on(stand_in());
    }
    let arguments = arguments()?;
    let key =
        std::fs::read(&arguments.key).map_err(|error| format!("cannot read {}: {error}", arguments.key))?;
    let key = SessionKey::new(&key);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the runtime: {error}"))?;
    let code = runtime.block_on(async {
        let mux = Mux::opener();
        let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, arguments.hub_port));
        let listener = TcpListener::bind(address).await.map_err(|error| {
            format!("cannot listen on {address}: {error}; is the port taken by the image?")
        })?;
        tokio::spawn(hub_side::serve(listener, key, mux.clone(), SHELL));
        let listener = supervisor_side::bind(&arguments.supervisor_socket)
            .map_err(|error| format!("cannot listen on {error}"))?;
        tokio::spawn(supervisor_side::serve(listener, mux));
        supervise::run(&arguments.program, &arguments.rest).await.map_err(|error| error.to_string())
    });
    // Streams of the supervisor are over with it; nothing is worth waiting for.
    runtime.shutdown_background();
    code
}
