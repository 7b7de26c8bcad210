// SPDX-License-Identifier: Apache-2.0
//! What goes wrong around sessions: a gateway that goes and comes back, two of them, an image that is no more.
use anyhow::{Context as _, Result, ensure};
use substrate_integration::image;
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

/// The last part of a layout's path.
fn layout_name(reference: &str) -> String {
    reference.rsplit('/').next().unwrap_or_default().to_owned()
}
