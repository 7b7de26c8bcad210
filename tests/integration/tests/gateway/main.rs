// SPDX-License-Identifier: Apache-2.0
//! OpenShell's own gateway, command line and supervisor on a real machine.
//!
//! Ignored unless asked for: `OPENSHELL_BIN_DIR` names the directory of `openshell-gateway`, `openshell` and
//! `openshell-sandbox`, and `cargo test -p substrate-integration --test gateway -- --ignored` runs them (`scripts/test` does
//! when it is set). `SUBSTRATE_SLEEP_CYCLES` says how often a sandbox sleeps and wakes under
//! load (default 20).
mod bed;
mod faults;
mod features;
mod moves;
mod strict;

use anyhow::{Context as _, Result, ensure};
use bed::{Bed, bin_dir, free_port, get};
use substrate_proto::ateapi::{ActorState, CordonWorkerRequest};

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn a_sandbox_is_created_used_stopped_started_and_deleted() -> Result<()> {
    let bins = bin_dir()?;
    let mut bed = Bed::start(&bins, 2).await?;
    let uid = bed.create("alice", &["sleep", "100000"]).await?;
    // Output, exit code, standard input, whom it runs as.
    ensure!(bed.exec("alice", "id -u; echo $0").await? == "10001\nsh");
    let exec = ["sandbox", "exec", "--name", "alice", "--no-tty", "--"];
    let failed = bed.cli(&[&exec[..], &["sh", "-c", "echo out; echo err >&2; exit 3"]].concat()).await?;
    ensure!(failed.status.code() == Some(3), "{failed:?}");
    ensure!(failed.stdout == b"out\n" && failed.stderr.ends_with(b"err\n"), "{failed:?}");
    let echoed = bed.cli_with(&[&exec[..], &["cat"]].concat(), b"through and back\n").await?;
    ensure!(echoed.stdout == b"through and back\n", "{echoed:?}");
    // Its memory survives a stop, and so do its files.
    bed.exec("alice", "echo kept > /dev/shm/kept").await?;
    bed.say(&["sandbox", "stop", "alice"]).await?;
    bed.until_phase("alice", "Stopped").await?;
    ensure!(bed.actor(&uid).await?.state() == ActorState::Suspended);
    bed.say(&["sandbox", "start", "alice"]).await?;
    bed.until_phase("alice", "Ready").await?;
    ensure!(bed.exec("alice", "cat /dev/shm/kept").await? == "kept");
    bed.say(&["sandbox", "delete", "alice"]).await?;
    bed.until_phase("alice", "gone").await?;
    ensure!(bed.actor(&uid).await.is_err(), "the actor is still there");
    bed.stop().await
}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn a_sleeping_sandbox_stays_ready_and_wakes_for_an_exec() -> Result<()> {
    let bins = bin_dir()?;
    let mut bed = Bed::start(&bins, 2).await?;
    let uid = bed.create("alice", &["sleep", "100000"]).await?;
    bed.exec("alice", "echo 0 > /dev/shm/count; echo $$ > /dev/shm/nonce").await?;
    let nonce = bed.exec("alice", "cat /dev/shm/nonce").await?;
    let mut workers = std::collections::BTreeSet::new();
    let mut cordoned: Option<String> = None;
    for cycle in 1..=4_u64 {
        let worker = bed.actor(&uid).await?.worker_id;
        bed.fall_asleep(&uid).await?;
        ensure!(bed.phase("alice").await? == "Ready", "cycle {cycle}: asleep");
        // The next wake-up goes to the other worker.
        for (id, uncordon) in
            cordoned.take().map(|id| (id, true)).into_iter().chain([(worker.clone(), false)])
        {
            bed.machine.api.cordon_worker(CordonWorkerRequest { id, uncordon }).await?;
        }
        workers.insert(worker.clone());
        cordoned = Some(worker);
        let said = bed
            .exec(
                "alice",
                "n=$(cat /dev/shm/count); n=$((n+1)); echo $n > /dev/shm/count; echo $n; cat /dev/shm/nonce",
            )
            .await
            .with_context(|| format!("cycle {cycle}"))?;
        ensure!(said == format!("{cycle}\n{nonce}"), "cycle {cycle}: {said:?}");
        ensure!(bed.phase("alice").await? == "Ready", "cycle {cycle}: awake");
    }
    ensure!(workers.len() == 2, "only {workers:?}");
    let disconnects = bed.gateway_log().matches("supervisor session: ended").count();
    ensure!(disconnects == 0, "the gateway lost the session {disconnects} times");
    bed.stop().await
}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn a_command_that_ends_is_an_error_with_its_code() -> Result<()> {
    let bins = bin_dir()?;
    let bed = Bed::start(&bins, 1).await?;
    bed.create(
        "brief",
        &["sh", "-c", "read line < /dev/shm/go || until [ -e /dev/shm/go ]; do sleep 0.2; done; exit 7"],
    )
    .await?;
    bed.exec("brief", "echo > /dev/shm/go").await?;
    bed.until_phase("brief", "Error").await?;
    bed.say(&["sandbox", "delete", "brief"]).await?;
    bed.stop().await
}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn terminals_and_port_forwards_reach_a_sleeping_sandbox() -> Result<()> {
    let bins = bin_dir()?;
    let mut bed = Bed::start(&bins, 2).await?;
    let uid = bed.create("alice", &["/usr/bin/python3", "-S", "/app/helpdesk.py"]).await?;
    let port = free_port()?;
    let _forward = bed.forward("alice", 8080, port)?;
    bed.until("the forward answers", async |_| Ok(get(port, "/status").await.is_ok())).await?;
    for round in 0..3 {
        bed.fall_asleep(&uid).await?;
        get(port, "/status").await.with_context(|| format!("round {round}"))?;
        bed.fall_asleep(&uid).await?;
        let exec = ["sandbox", "exec", "--name", "alice", "--tty", "--", "sh", "-c", "tty; exit 4"];
        let said = bed.cli(&exec).await?;
        ensure!(said.status.code() == Some(4), "round {round}: {said:?}");
        ensure!(String::from_utf8_lossy(&said.stdout).contains("/dev/pts/"), "round {round}: {said:?}");
    }
    bed.stop().await
}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn a_killed_machine_comes_back_with_its_sessions() -> Result<()> {
    let bins = bin_dir()?;
    let mut bed = Bed::start(&bins, 2).await?;
    let uid = bed.create("alice", &["sleep", "100000"]).await?;
    bed.exec("alice", "echo kept > /dev/shm/kept").await?;
    bed.fall_asleep(&uid).await?;
    // Driver, hub and control plane at once, while the sandbox sleeps.
    bed.machine.kill();
    bed.machine.restart().await?;
    bed.until_phase("alice", "Ready").await?;
    ensure!(bed.actor(&uid).await?.state() == ActorState::Suspended, "it was woken for nothing");
    // And while it runs.
    ensure!(bed.exec("alice", "cat /dev/shm/kept").await? == "kept");
    bed.machine.kill();
    bed.machine.restart().await?;
    bed.until("alice can be used", async |bed| {
        let said = bed
            .cli(&["sandbox", "exec", "--name", "alice", "--no-tty", "--", "cat", "/dev/shm/kept"])
            .await?;
        Ok(said.stdout == b"kept\n")
    })
    .await?;
    bed.stop().await
}
