// SPDX-License-Identifier: Apache-2.0
//! `substrate demo helpdesk`: three acts, ten beats, each asserted, on real sandboxes.
//!
//! ```text
//!  world: own `substrate up` (4 workers, fresh directory) · internet in a namespace · clients
//!    │
//!    ├ beats   1 create alice · 2 create bob · 3 list · 4 cold ask · 5 stop · 6 cost · 7 wake elsewhere · 10 delete
//!    ├ hygiene 8 what bob cannot reach, and that it was written down
//!    └ faults  9 a worker killed right after an answer, twice
//! ```
//!
//! Sandboxes are created, listed, stopped and deleted through the driver's socket, as OpenShell's gateway would do it
//! (`gateway`), or with `--gateway DIR` by a stock gateway and the `openshell` command line on real supervisors
//! (`stock`); everything else is what a person has: the control plane's socket and HTTP through the router. The
//! first ✗ ends it with exit code 1; everything that was started is ended and removed, unless `--keep`.
mod beats;
mod faults;
mod gateway;
mod hygiene;
pub mod internet;
mod model;
mod network;
mod processes;
mod report;
mod stock;
mod world;

use std::process::ExitCode;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use crate::args::Demo;
use crate::failure::{Doing as _, Exit, Failure};
use crate::progress::during;
use gateway::within;
use report::{Miss, Report};
use world::World;

const PROVISIONING: &str = "Act I: two agents";
const LIFE: &str = "Act II: one agent's life";
const HYGIENE: &str = "Act III: hygiene";
/// No beat takes longer.
const BEAT_PATIENCE: Duration = Duration::from_mins(3);

/// Runs the demo.
///
/// # Errors
/// When its machine could not be started; a beat that failed is exit code 1.
pub async fn run(options: Demo) -> Result<ExitCode, Failure> {
    let mut interrupt = signal(SignalKind::interrupt()).doing(|| "cannot handle signals".to_owned())?;
    let mut terminate = signal(SignalKind::terminate()).doing(|| "cannot handle signals".to_owned())?;
    let mut report = Report::new(options.json);
    let mut world = during("starting the demo's machine and internet", World::start(&options)).await?;
    let played = tokio::select! {
        played = play(&mut world, &mut report) => played,
        _ = interrupt.recv() => Err(Failure::general("interrupted")),
        _ = terminate.recv() => Err(Failure::general("interrupted")),
    };
    if !matches!(played, Ok(true)) {
        eprintln!("\nthe last lines of the machine's log:\n{}", world.last_log_lines(20));
    }
    if options.keep {
        eprintln!("{}", world.keep());
    } else {
        during("cleaning up", world.stop()).await;
    }
    if played? { Ok(ExitCode::SUCCESS) } else { Ok(ExitCode::from(Exit::Failed as u8)) }
}

/// Plays every beat; false at the first ✗, which is printed.
async fn play(world: &mut World, report: &mut Report) -> Result<bool, Failure> {
    report.say(&format!(
        "helpdesk on substrate: {} workers, class {}, {} ({}…)",
        world::WORKERS,
        world.recipe.class,
        world.info.runsc_version,
        &world.info.runsc_sha256[..12.min(world.info.runsc_sha256.len())],
    ))?;
    report.say(&format!("model: {}", world.model.description))?;
    report.say(&format!("state: {}; requests to http://{}", world.info.dir.display(), world.info.ingress))?;
    let ok = ten_beats(world, report).await;
    match ok {
        Ok(()) => {
            report.say("\n✓ ten beats")?;
            Ok(true)
        }
        Err(End::Miss(miss)) => {
            report.miss(&miss)?;
            Ok(false)
        }
        Err(End::Output(failure)) => Err(failure),
    }
}

/// Why the demo ends early.
enum End {
    /// A ✗.
    Miss(Miss),
    /// Its own output could not be written.
    Output(Failure),
}

impl From<Failure> for End {
    fn from(failure: Failure) -> Self {
        Self::Output(failure)
    }
}

macro_rules! beat {
    ($world:ident, $report:ident, $act:expr, $number:literal, $title:literal, $play:path) => {{
        $report.begin($act, $number, $title)?;
        let (summary, facts) =
            within(BEAT_PATIENCE, "the beat", $play($world, $report)).await.map_err(End::Miss)?;
        $report.hit(&summary, facts)?;
    }};
}

async fn ten_beats(world: &mut World, report: &mut Report) -> Result<(), End> {
    beat!(world, report, PROVISIONING, 1, "Create alice", beats::create_alice);
    beat!(world, report, PROVISIONING, 2, "Create bob", beats::create_bob);
    beat!(world, report, PROVISIONING, 3, "List: exactly the two", beats::list);
    beat!(world, report, LIFE, 4, "Ask alice, through the router", beats::first_question);
    beat!(world, report, LIFE, 5, "Stop alice: memory becomes a snapshot", beats::stop);
    beat!(world, report, LIFE, 6, "Idle: what alice costs now", beats::cost);
    beat!(world, report, LIFE, 7, "Ask again: alice wakes on another worker", beats::second_question);
    beat!(world, report, HYGIENE, 8, "What bob cannot reach", hygiene::play);
    beat!(world, report, HYGIENE, 9, "Kill alice's worker right after her answer, twice", faults::play);
    beat!(world, report, HYGIENE, 10, "Delete alice; bob stays", beats::delete);
    Ok(())
}
