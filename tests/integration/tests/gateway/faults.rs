// SPDX-License-Identifier: Apache-2.0
//! What goes wrong around sessions: a gateway that goes and comes back, two of them, an image that is no more.
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use substrate_integration::{PATIENCE, image};
use substrate_proto::ateapi::ActorState;

use crate::bed::{Bed, SLEEPLESS, bin_dir};

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn a_gateway_that_was_killed_finds_its_sandboxes_as_they_were() -> Result<()> {
    let mut bed = Bed::start(&bin_dir()?, 2).await?;
    let asleep = bed.create("asleep", &["sleep", "100000"]).await?;
    bed.create("awake", &["sleep", "100000"]).await?;
    bed.exec("awake", "echo kept > /dev/shm/kept").await?;
    bed.fall_asleep(&asleep).await?;
    bed.kill_gateway().await?;
    bed.start_gateway().await?;
    for name in ["asleep", "awake"] {
        bed.until_phase(name, "Ready").await?;
    }
    let actor = bed.actor(&asleep).await?;
    ensure!(actor.state() == ActorState::Suspended, "woken for nothing: {:?}", actor.state());
    ensure!(bed.exec("awake", "cat /dev/shm/kept").await? == "kept");
    ensure!(bed.exec("asleep", "echo here").await? == "here");
    bed.stop().await
}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn two_gateways_on_one_driver_keep_to_their_own_sandboxes() -> Result<()> {
    let bins = bin_dir()?;
    let bed = Bed::start(&bins, 2).await?;
    bed.create("alice", &["sleep", "100000"]).await?;
    // The second one's supervisors would go to the first: substrate has one gateway for sessions. What it does to the
    // driver is all the same as the first's, and does the first's sandboxes nothing.
    let other = bed.second_gateway().await?;
    let listed = other.list().await?;
    ensure!(listed.is_empty(), "it takes the other's for its own: {listed:?}");
    let taken = other.create("alice").await?;
    ensure!(!taken.status.success(), "two sandboxes of one name in one workspace");
    let said = String::from_utf8_lossy(&taken.stderr);
    ensure!(said.contains("already exists"), "the refusal does not say why: {said}");
    ensure!(bed.phase("alice").await? == "Ready");
    ensure!(bed.exec("alice", "echo mine").await? == "mine");
    drop(other);
    bed.stop().await
}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn a_sandbox_whose_image_vanished_still_wakes() -> Result<()> {
    let mut bed = Bed::start(&bin_dir()?, 2).await?;
    let source = image("helpdesk")?;
    let source = source.strip_prefix("oci:").context("a layout")?;
    let layout = tempfile::tempdir()?;
    let copied =
        std::process::Command::new("cp").args(["-a", &format!("{source}/.")]).arg(layout.path()).status()?;
    ensure!(copied.success(), "cp: {copied}");
    let reference = format!("oci:{}", layout.path().display());
    let options = ["--from", &reference, "--driver-config-json", SLEEPLESS];
    let uid = bed.create_with("alice", &options, &["sleep", "100000"]).await?;
    bed.exec("alice", "echo kept > /dev/shm/kept").await?;
    let from = bed.leave_worker(&uid).await?;
    layout.close()?;
    ensure!(bed.exec("alice", "cat /dev/shm/kept").await? == "kept");
    bed.until_elsewhere(&uid, &from).await?;
    // A new one cannot be made of it, and is told why.
    let refused = bed
        .cli(&["sandbox", "create", "--name", "bob", "--detach", "--from", &reference, "--", "sleep", "1"])
        .await?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success(), "a sandbox of nothing");
    let path = layout_name(&reference);
    ensure!(said.replace(['\n', ' ', '│'], "").contains(&path), "the refusal does not name {path}: {said}");
    bed.stop().await
}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn an_exec_in_a_sandbox_without_bash_is_refused_with_the_reason() -> Result<()> {
    let mut bed = Bed::start(&bin_dir()?, 2).await?;
    let uid = bed.create("alice", &["sleep", "100000"]).await?;
    bed.as_root("alice", "mv /bin/bash /bin/not-bash")?;
    bed.fall_asleep(&uid).await?;
    let exec = ["sandbox", "exec", "--name", "alice", "--no-tty", "--", "true"];
    // The first one wakes it, and is told as soon as the shim has been asked.
    for asked in ["asleep", "awake"] {
        let began = tokio::time::Instant::now();
        let refused = bed.cli(&exec).await?;
        let took = began.elapsed();
        let said = String::from_utf8_lossy(&refused.stderr).replace(['\n', ' ', '│'], "");
        ensure!(!refused.status.success(), "{asked}: without bash");
        ensure!(said.contains("/bin/bash"), "{asked}: the refusal does not say why: {said}");
        ensure!(took < Duration::from_secs(10), "{asked}: refused after {took:?}");
    }
    // Once it is there again it is used again.
    bed.as_root("alice", "mv /bin/not-bash /bin/bash")?;
    bed.fall_asleep(&uid).await?;
    bed.until("an exec works again", async |bed| Ok(bed.cli(&exec).await?.status.success())).await?;
    bed.stop().await
}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn a_hub_killed_under_an_exec_ends_it_and_the_next_one_works() -> Result<()> {
    let mut bed = Bed::start(&bin_dir()?, 2).await?;
    bed.create("alice", &["sleep", "100000"]).await?;
    let mut exec = bed
        .command()
        .args([
            "sandbox",
            "exec",
            "--name",
            "alice",
            "--no-tty",
            "--",
            "sh",
            "-c",
            "echo > /dev/shm/runs; sleep 1000",
        ])
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()?;
    bed.until("the exec runs", async |bed| Ok(bed.as_root("alice", "test -e /dev/shm/runs").is_ok())).await?;
    bed.machine.kill();
    let ended =
        tokio::time::timeout(PATIENCE, exec.wait()).await.context("an exec hangs without its hub")??;
    ensure!(!ended.success(), "it cannot have ended well");
    bed.machine.restart().await?;
    bed.until("the next one works", async |bed| {
        let said = bed.cli(&["sandbox", "exec", "--name", "alice", "--no-tty", "--", "echo", "here"]).await?;
        Ok(said.stdout == b"here\n")
    })
    .await?;
    bed.stop().await
}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn a_token_that_expired_while_the_hub_was_away_is_said_and_costs_no_state() -> Result<()> {
    const TTL: u64 = 5;
    /// How long the gateway still takes a token after its end (`SANDBOX_JWT_EXP_LEEWAY_SECS`,
    /// crates/openshell-server/src/auth/sandbox_jwt.rs at 2f7fb655).
    const LEEWAY: u64 = 60;
    let mut bed = Bed::start_with(&bin_dir()?, 2, TTL).await?;
    let uid = bed.create("alice", &["sleep", "100000"]).await?;
    bed.exec("alice", "echo kept > /tmp/kept").await?;
    bed.fall_asleep(&uid).await?;
    bed.machine.kill();
    // Nothing to see from outside: every call with the token would be the hub's.
    tokio::time::sleep(Duration::from_secs(TTL + LEEWAY + 2)).await;
    bed.machine.restart().await?;
    bed.until_told(&uid, "only a new sandbox gets one").await?;
    ensure!(bed.phase("alice").await? != "Ready");
    // Others go on, and what it holds can be had.
    bed.create("bob", &["sleep", "100000"]).await?;
    ensure!(bed.exec("bob", "echo here").await? == "here");
    ensure!(bed.as_root("alice", "cat /tmp/kept")? == "kept");
    bed.say(&["sandbox", "delete", "alice"]).await?;
    bed.until_phase("alice", "gone").await?;
    bed.stop().await
}

/// The last part of a layout's path.
fn layout_name(reference: &str) -> String {
    reference.rsplit('/').next().unwrap_or_default().to_owned()
}
