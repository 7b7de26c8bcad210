// SPDX-License-Identifier: Apache-2.0
//! Backup of a live machine, restored into another directory: the same memory goes on there.
use anyhow::{Context as _, Result, ensure};
use substrate_integration::Machine;
use substrate_proto::ateapi::ActorState;

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_restored_from_a_backup_goes_on_with_the_memory_it_had() -> Result<()> {
    let mut machine = Machine::start(2, &[]).await?;
    machine.counter("asleep", |_| {}).await?;
    machine.counter("awake", |_| {}).await?;
    let (one, nonce) = machine.count("asleep").await?;
    machine.suspend("asleep").await?;
    let (_, awake_nonce) = machine.count("awake").await?;
    machine.suspend("awake").await?;
    let (awake_count, _) = machine.count("awake").await?;
    let dir = machine.dir.to_str().context("directory name")?.to_owned();
    let root = tempfile::Builder::new().prefix("sub-").tempdir_in("/tmp")?;
    let path = |name: &str| root.path().join(name).to_string_lossy().into_owned();
    let run = |args: &[&str]| -> Result<String> {
        let output = machine.cli(args)?;
        ensure!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    // While it runs, both ways.
    run(&["backup", "--dir", &dir, "--to", &path("b")])?;
    let told = run(&["-o", "json", "backup", "--dir", &dir, "--to", &path("b.tar")])?;
    let told: serde_json::Value = serde_json::from_str(&told)?;
    ensure!(told["awake"] == serde_json::json!(["default/awake"]), "{told}");
    ensure!(told["missing"] == serde_json::json!([]) && told["actors"] == 2, "{told}");
    run(&["restore", "--from", &path("b.tar"), "--dir", &path("d")])?;
    let again = machine.cli(&["restore", "--from", &path("b"), "--dir", &path("d")])?;
    ensure!(again.status.code() == Some(4), "a second restore into it: {again:?}");
    // What happens afterwards is not in it.
    machine.count("asleep").await?;
    machine.stop()?;

    let mut restored = Machine::start_in(root.path().join("d"), None, 2, &[]).await?;
    ensure!(restored.get("asleep").await?.state() == ActorState::Suspended);
    ensure!(restored.count("asleep").await? == (one + 1, nonce));
    // It ran when the backup was taken: back at its snapshot, and said so.
    restored.wait_for("awake", ActorState::Suspended).await?;
    ensure!(restored.count("awake").await? == (awake_count, awake_nonce));
    let events = restored.events("awake").await?;
    ensure!(events.iter().any(|(reason, _)| reason == "WorkerLost" || reason == "RolledBack"), "{events:?}");
    restored.stop()
}
