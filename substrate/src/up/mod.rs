// SPDX-License-Identifier: Apache-2.0
//! `substrate up`: the whole machine as one process (design, section 10).
//!
//! ```text
//!  settings ─▶ preflight ─▶ lock DIR ─▶ parts start ─▶ workers there ─▶ READY ─▶ wait
//!                                                                          │
//!      ┌──────────────── SIGINT, SIGTERM ──────────────┬── --leave-workers ┤
//!      ▼                                               ▼                   ▼ a part failed
//!  front ends (driver, ingress)                    all parts end       all parts end, exit 1:
//!  SuspendAll, progress shown                      workers live on     workers live on
//!  parts end, workers end, exit 0
//! ```
//!
//! Workers are processes of their own and adopted at the next start; so every way out but the orderly one leaves them
//! alone: a second signal, a failed part and kill -9 lose nothing.
pub mod config;
mod lock;
mod logging;
mod metrics;
mod parts;

pub use parts::CONTROL_KEYS;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use substrate_proto::ateapi as api;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::args::{Global, Up};
use crate::client::{Control, UP_FILE, UpInfo, connect_unix, control};
use crate::cmd::print;
use crate::doctor;
use crate::failure::{Doing as _, Exit, Failure};
use crate::progress::Spinner;
use config::Settings;
use parts::Parts;

/// How long the first worker may take to come up; without one nothing can run.
const FIRST_WORKER: Duration = Duration::from_mins(1);
/// How long the others may take after it before that is said and the start goes on without them.
const OTHER_WORKERS: Duration = Duration::from_secs(10);

/// `substrate up`.
pub async fn run(options: Up, global: &Global) -> Result<ExitCode, Failure> {
    let begun = Instant::now();
    let file = match &options.config {
        Some(path) => config::read(path)?,
        None => config::File::default(),
    };
    let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let cwd = std::env::current_dir().doing(|| "cannot tell the current directory".to_owned())?;
    let mut settings = Settings::resolve(&options, file, cores, &cwd)?;
    settings.read_sandbox(&cwd)?;
    let mut signals = Signals::listen()?;
    fetch_runtimes(&mut settings).await?;

    let facts = doctor::gather(
        &settings.dir,
        settings.runsc.as_deref(),
        settings.ateom.as_deref(),
        doctor::Named { qemu: settings.qemu.as_deref(), kernel: settings.kernel.as_deref() },
    )
    .await;
    let checks = doctor::check(&facts);
    doctor::preflight(&checks)?;
    let (Ok(runsc), Ok(ateom)) = (&facts.runsc, &facts.ateom) else {
        return Err(
            Failure::general("runsc or ateom-gvisor is missing").with_way_out("run `substrate doctor`")
        );
    };
    if settings.microvm_workers > 0 {
        let found = facts.microvm.as_ref().map_err(|why| {
            Failure::general(format!("no worker of the class microvm can run: {why}"))
                .with_way_out("run `substrate doctor`, or leave --microvm-workers out")
        })?;
        let accelerator = settings.accelerator;
        settings.microvm = Some(atelet::MicrovmConfig { accelerator, ..found.config.clone() });
    }
    make_dirs(&settings)?;
    let lock = lock::take(&settings.dir)?;
    check_port(settings.listen)?;
    let log = logging::start(&settings.dir, &settings.log, options.verbose)?;
    for check in &checks {
        tracing::info!(check = check.name, verdict = ?check.verdict, "{}", check.message);
    }
    if let Some(listen) = settings.file.metrics.listen {
        let address = metrics::serve(listen).await?;
        tracing::info!(%address, "metrics");
    }
    let runtime = doctor::runtime(runsc).await?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), dir = %settings.dir.display(), workers = settings.all_workers(),
        runsc = %runtime.path.display(), sha256 = runtime.sha256, "starting");

    let mut parts = Parts::new();
    let started = tokio::select! {
        started = start(&mut parts, &settings, &runtime, ateom.clone(), begun) => started,
        _ = signals.next() => Err(Failure::general("stopped while starting; workers are left for the next start")),
    };
    let (info, control) = match started {
        Ok(started) => started,
        Err(failure) => {
            parts.stop().await;
            let way_out = failure.way_out.clone().unwrap_or_else(|| format!("the log is {}", log.display()));
            return Err(failure.with_way_out(way_out));
        }
    };
    announce(&info, &settings, options.json || global.output.is_machine())?;
    let end = tokio::select! {
        failure = parts.failed() => Err(failure),
        name = signals.next() => Ok(name),
    };
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    let up_file = settings.run.join(UP_FILE);
    if let Err(error) = std::fs::remove_file(&up_file) {
        tracing::warn!(file = %up_file.display(), %error, "cannot remove it");
    }
    let result = match end {
        Err(failure) => {
            parts.stop().await;
            Err(failure.with_way_out(format!(
                "actors run on and are adopted by the next `substrate up`; the log is {}",
                log.display()
            )))
        }
        Ok(signal) if settings.leave_workers => {
            tracing::info!(signal, "ending, workers are left");
            note("substrate: ending; actors run on and are adopted by the next start");
            parts.stop().await;
            Ok(ExitCode::SUCCESS)
        }
        Ok(signal) => {
            tracing::info!(signal, "suspending everything");
            tokio::select! {
                result = wind_down(&mut parts, &settings, control, ateom.clone()) => result,
                _ = signals.next() => {
                    note("substrate: ended by a second signal; workers are left for the next start");
                    Ok(ExitCode::from(Exit::Failed as u8))
                }
            }
        }
    };
    tracing::info!("ended");
    drop(lock);
    result
}

/// Makes the runtimes that new actors start on local: nothing starts without them. The others are the node agent's.
async fn fetch_runtimes(settings: &mut Settings) -> Result<(), Failure> {
    let Some((_, config)) = settings.sandbox.clone() else { return Ok(()) };
    let store = atelet::asset::AssetStore::open(&settings.dir.join("node/runtimes"))
        .doing(|| "cannot open the cache of runtimes".to_owned())?;
    let mut spinner = Spinner::new("fetching runtimes");
    spinner.show();
    for (wanted, class) in [(settings.workers, &config.gvisor), (settings.microvm_workers, &config.microvm)] {
        let Some(first) = class.runtimes.first().filter(|_| wanted > 0) else { continue };
        let files = store.runtime(first).await.doing(|| format!("no runtime {:?}", first.name))?;
        settings.runsc = files.runsc.map(|(path, _)| path).or(settings.runsc.take());
        settings.qemu = files.vmm.map(|vmm| vmm.path).or(settings.qemu.take());
        settings.kernel = files.kernel.or(settings.kernel.take());
    }
    Ok(())
}

/// A line on stderr; nobody may be reading any more.
fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// SIGINT and SIGTERM.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).doing(|| "cannot handle signals".to_owned());
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

fn make_dirs(settings: &Settings) -> Result<(), Failure> {
    use std::os::unix::fs::DirBuilderExt as _;
    let unfinished = settings.dir.join(ateapi::backup::STAGING);
    if unfinished.exists() {
        return Err(Failure::new(
            Exit::Refused,
            format!("{} was left by a restore that did not finish", unfinished.display()),
        )
        .with_way_out(format!("empty {} and restore again", settings.dir.display())));
    }
    for (dir, mode) in [
        (settings.dir.clone(), 0o755),
        (settings.run.clone(), 0o755),
        (settings.dir.join("logs"), 0o750),
        (settings.dir.join("keys"), 0o700),
        (settings.dir.join("control"), 0o700),
    ] {
        std::fs::DirBuilder::new().recursive(true).mode(mode).create(&dir).map_err(|error| {
            Failure::general(format!("cannot make {}: {error}", dir.display()))
                .with_way_out("choose another --dir")
        })?;
    }
    Ok(())
}

/// Tried before anything is started: by the time ingress binds it, a lot has been done.
fn check_port(listen: SocketAddr) -> Result<(), Failure> {
    match std::net::TcpListener::bind(listen) {
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::general(format!("cannot listen on {listen} for ingress: {error}"))
            .with_way_out(
                "choose another address with --listen (port 0 takes a free one), or stop who has it",
            )),
    }
}

async fn start(
    parts: &mut Parts,
    settings: &Settings,
    runtime: &doctor::Runtime,
    ateom: PathBuf,
    begun: Instant,
) -> Result<(UpInfo, Control), Failure> {
    let (ingress, api) = parts.start(settings, runtime, ateom).await?;
    let api_socket = settings.run.join("ateapi.sock");
    let channel = connect_unix(&api_socket)
        .await
        .doing(|| format!("cannot connect to the control plane at {}", api_socket.display()))?;
    let mut control = control(channel);
    tokio::select! {
        alive = workers_alive(control.clone(), settings.all_workers()) => {
            let alive = alive?;
            let logs = settings.dir.join("logs/workers");
            if alive == 0 {
                return Err(Failure::general(format!("no worker came up within {} s", FIRST_WORKER.as_secs()))
                    .with_way_out(format!("see why in {}", logs.display())));
            }
            let wanted = settings.all_workers();
            if alive < wanted {
                tracing::warn!(alive, wanted, "not all workers are there yet; going on");
                note(&format!("substrate: {alive} of {wanted} workers are there so far; see {}", logs.display()));
            }
        }
        failure = parts.failed() => return Err(failure),
    }
    let running = api::ListActorsRequest {
        states: vec![api::ActorState::Running as i32],
        page_size: 1000,
        ..Default::default()
    };
    let running_actors = control.list_actors(running).await?.into_inner().actors.len() as u32;
    let info = UpInfo {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        dir: settings.dir.clone(),
        api_socket,
        driver_socket: settings.driver_socket.clone(),
        ingress,
        api,
        workers: settings.all_workers(),
        runsc: runtime.path.clone(),
        runsc_sha256: runtime.sha256.clone(),
        runsc_version: runtime.version.clone(),
        running_actors,
        start_ms: begun.elapsed().as_millis() as u64,
    };
    Ok((info, control))
}

/// Follows the workers until all are alive, or their time is over; how many are.
async fn workers_alive(mut control: Control, wanted: u32) -> Result<u32, Failure> {
    let request =
        api::WatchRequest { from_revision: 0, kinds: vec!["worker".into()], atespace: String::new() };
    let mut stream = control.watch(request).await?.into_inner();
    let mut alive = std::collections::HashSet::new();
    let mut spinner = Spinner::new("starting workers");
    let give_up = tokio::time::sleep(FIRST_WORKER);
    tokio::pin!(give_up);
    spinner.show();
    while (alive.len() as u32) < wanted {
        let message = tokio::select! {
            message = stream.message() => message?,
            () = &mut give_up => break,
        };
        match message.and_then(|message| message.change) {
            Some(api::watch_response::Change::Worker(worker)) => {
                if worker.alive {
                    if alive.is_empty() {
                        give_up.as_mut().reset(tokio::time::Instant::now() + OTHER_WORKERS);
                    }
                    alive.insert(worker.id);
                } else {
                    alive.remove(&worker.id);
                }
                spinner.say(format!("starting workers: {} of {wanted}", alive.len()));
            }
            Some(_) => {}
            None => {
                return Err(Failure::general(
                    "the control plane closed its watch while workers were starting",
                ));
            }
        }
    }
    Ok(alive.len() as u32)
}

fn announce(info: &UpInfo, settings: &Settings, json: bool) -> Result<(), Failure> {
    let text = serde_json::to_string(info).doing(|| "cannot write JSON".to_owned())?;
    write_whole(&settings.run.join(UP_FILE), text.as_bytes())?;
    tracing::info!(ingress = %info.ingress, start_ms = info.start_ms, running_actors = info.running_actors, "ready");
    let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status("ready")]);
    if json {
        return print(&(text + "\n"));
    }
    let adopted = match info.running_actors {
        0 => String::new(),
        1 => ", 1 actor runs on".to_owned(),
        many => format!(", {many} actors run on"),
    };
    print(&format!(
        "substrate is ready: {} workers{adopted}; requests to http://{}, driver at {}, state in {} ({:.1} s)\n",
        info.workers,
        info.ingress,
        info.driver_socket.display(),
        info.dir.display(),
        info.start_ms as f64 / 1000.0,
    ))
}

fn write_whole(path: &Path, content: &[u8]) -> Result<(), Failure> {
    let part = path.with_extension("part");
    std::fs::write(&part, content)
        .and_then(|()| std::fs::rename(&part, path))
        .doing(|| format!("cannot write {}", path.display()))
}

/// Front down, actors suspended, back down, workers ended. What cannot be suspended keeps its worker, and so its memory.
async fn wind_down(
    parts: &mut Parts,
    settings: &Settings,
    mut control: Control,
    ateom: PathBuf,
) -> Result<ExitCode, Failure> {
    let mut spinner = Spinner::new("ending requests");
    spinner.show();
    parts.stop_front().await;
    let watch = tokio::spawn(follow_suspends(control.clone(), spinner));
    let answer = tokio::select! {
        answer = control.suspend_all(api::SuspendAllRequest { cause: "shutdown".into() }) => answer,
        failure = parts.failed() => {
            watch.abort();
            parts.stop().await;
            return Err(failure.with_way_out("actors run on and are adopted by the next `substrate up`"));
        }
    };
    watch.abort();
    let answer = match answer {
        Ok(answer) => answer.into_inner(),
        Err(status) => {
            parts.stop().await;
            return Err(Failure::from(status)
                .context("cannot suspend everything")
                .with_way_out("actors run on and are adopted by the next `substrate up`"));
        }
    };
    if answer.suspended > 0 {
        note(&format!("substrate: suspended {}", actors(answer.suspended as usize)));
    }
    if !answer.failed.is_empty() {
        parts.stop().await;
        return Err(Failure::general(format!(
            "{} could not be suspended: {}",
            actors(answer.failed.len()),
            answer.failed.join("; ")
        ))
        .with_way_out("they run on and are adopted by the next `substrate up`"));
    }
    parts.stop().await;
    parts::stop_workers(settings, ateom).await?;
    Ok(ExitCode::SUCCESS)
}

fn actors(count: usize) -> String {
    if count == 1 { "1 actor".to_owned() } else { format!("{count} actors") }
}

/// Shows how many actors still hold a worker.
async fn follow_suspends(mut control: Control, mut spinner: Spinner) {
    let request =
        api::WatchRequest { from_revision: 0, kinds: vec!["actor".into()], atespace: String::new() };
    let Ok(answer) = control.watch(request).await else { return };
    let mut stream = answer.into_inner();
    let mut awake = std::collections::HashSet::new();
    while let Ok(Some(message)) = stream.message().await {
        match message.change {
            Some(api::watch_response::Change::Actor(actor)) => {
                if actor.worker_id.is_empty() {
                    awake.remove(&actor.uid);
                } else {
                    awake.insert(actor.uid);
                }
            }
            Some(api::watch_response::Change::Deleted(deleted)) => {
                awake.remove(&deleted.uid);
            }
            _ => {}
        }
        spinner.say(format!("suspending: {} still awake", actors(awake.len())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_named_with_the_way_out() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let failure = check_port(address).unwrap_err();
        assert!(failure.message.contains(&address.to_string()), "{}", failure.message);
        assert!(failure.way_out.unwrap().contains("--listen"));
        drop(taken);
        check_port(address).unwrap();
    }
}
