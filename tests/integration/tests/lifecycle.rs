// SPDX-License-Identifier: Apache-2.0
//! One actor's life on a real machine: memory survives sleep, moves, the main process and its workers.
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use substrate_integration::{Machine, actor, processes_naming};
use substrate_proto::ateapi::{self, ActorState};
use substrate_proto::types::{CheckpointPolicy, Durability, IdlePolicy};

#[tokio::test]
async fn memory_survives_three_suspends_and_wakes_on_traffic() -> Result<()> {
    let mut machine = Machine::start(2, &[]).await?;
    machine.counter("life", |_| ()).await?;
    let (mut count, nonce) = machine.count("life").await?;
    for _ in 0..3 {
        let answer = machine.suspend("life").await?;
        let snapshot = answer.snapshot.context("no snapshot named")?;
        ensure!(snapshot.durability() == Durability::Durable, "not durable: {snapshot:?}");
        ensure!(machine.get("life").await?.state() == ActorState::Suspended);
        let (next, same) = machine.count("life").await?;
        ensure!(next == count + 1 && same == nonce, "count {count} → {next}, nonce {nonce} → {same}");
        count = next;
    }
    Ok(())
}

#[tokio::test]
async fn pause_promote_checkpoint_reset_and_delete() -> Result<()> {
    let mut machine = Machine::start(2, &[]).await?;
    machine.counter("verbs", |_| ()).await?;
    machine.count("verbs").await?;
    let paused = machine
        .api
        .pause_actor(ateapi::PauseActorRequest { actor: Some(actor("verbs")), ..Default::default() })
        .await?
        .into_inner();
    ensure!(paused.snapshot.context("no snapshot")?.durability() == Durability::Node);
    let promoted = machine
        .api
        .promote_actor(ateapi::PromoteActorRequest { actor: Some(actor("verbs")), ..Default::default() })
        .await?
        .into_inner();
    ensure!(promoted.snapshot.context("no snapshot")?.durability() == Durability::Durable);
    ensure!(machine.count("verbs").await?.0 == 2);
    let checkpoint = machine
        .api
        .checkpoint_actor(ateapi::CheckpointActorRequest {
            actor: Some(actor("verbs")),
            ..Default::default()
        })
        .await?
        .into_inner();
    ensure!(checkpoint.actor.context("no actor")?.state() == ActorState::Running);
    ensure!(machine.count("verbs").await?.0 == 3);
    let reset = || ateapi::ResetActorRequest { actor: Some(actor("verbs")), ..Default::default() };
    let running = machine.api.reset_actor(reset()).await;
    ensure!(running.is_err(), "reset of a running actor must be refused");
    machine.suspend("verbs").await?;
    machine.api.reset_actor(reset()).await?;
    ensure!(machine.count("verbs").await?.0 == 1, "reset did not boot afresh");
    let delete = || ateapi::DeleteActorRequest { actor: Some(actor("verbs")), ..Default::default() };
    ensure!(machine.api.delete_actor(delete()).await?.into_inner().deleted);
    ensure!(!machine.api.delete_actor(delete()).await?.into_inner().deleted, "deleted twice");
    ensure!(machine.http("verbs", "GET", "/", "").await?.0 == 404);
    Ok(())
}

#[tokio::test]
async fn a_killed_main_process_adopts_its_workers() -> Result<()> {
    let mut machine = Machine::start(2, &[]).await?;
    let before = machine.counter("adopted", |_| ()).await?;
    let (count, nonce) = machine.count("adopted").await?;
    machine.kill();
    machine.restart().await?;
    let after = machine.wait_for("adopted", ActorState::Running).await?;
    ensure!(after.generation == before.generation, "it was started again instead of adopted");
    ensure!(machine.count("adopted").await? == (count + 1, nonce));
    Ok(())
}

/// Whether a process is in a frozen control group, of either version.
fn is_frozen(pid: i32) -> bool {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    groups.lines().filter_map(|line| line.splitn(3, ':').nth(2)).any(|path| {
        let says =
            |file: String, word: &str| std::fs::read_to_string(file).is_ok_and(|text| text.contains(word));
        says(format!("/sys/fs/cgroup{path}/cgroup.events"), "frozen 1")
            || says(format!("/sys/fs/cgroup/unified{path}/cgroup.events"), "frozen 1")
            || says(format!("/sys/fs/cgroup/freezer{path}/freezer.state"), "FROZEN")
    })
}

/// P1: without a control plane the worker stops its actor at the lease's end by itself, keeps its memory, and lets it go
/// on when the lease of the same generation returns.
#[tokio::test]
async fn an_outage_of_two_lease_terms_costs_no_memory() -> Result<()> {
    const TERM: Duration = Duration::from_secs(3);
    let root = tempfile::Builder::new().prefix("sub-").tempdir_in("/tmp")?;
    let config = root.path().join("substrate.toml");
    std::fs::write(&config, format!("[control]\nlease_term_ms = {}\n", TERM.as_millis()))?;
    let config = config.to_str().context("path")?.to_owned();
    let dir = root.path().join("d");
    let mut machine = Machine::start_in(dir, Some(root), 2, &["--config", &config]).await?;
    let before = machine.counter("outage", |_| ()).await?;
    let (count, nonce) = machine.count("outage").await?;
    machine.kill();
    let down = Instant::now();
    let frozen = loop {
        let frozen: Vec<i32> =
            machine.sandboxes(Some(&before.worker_id)).into_iter().filter(|pid| is_frozen(*pid)).collect();
        if !frozen.is_empty() {
            break frozen;
        }
        ensure!(down.elapsed() < TERM * 3, "nothing stopped the actor when its lease was over");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    tokio::time::sleep((TERM * 2).saturating_sub(down.elapsed())).await;
    machine.restart().await?;
    let after = machine.wait_for("outage", ActorState::Running).await?;
    ensure!(after.generation == before.generation, "it was started again: {after:?}");
    ensure!(machine.count("outage").await? == (count + 1, nonce), "its memory is another");
    ensure!(!frozen.into_iter().any(is_frozen), "it answers and is frozen");
    Ok(())
}

#[tokio::test]
async fn a_drained_worker_loses_nothing_and_takes_nobody() -> Result<()> {
    let mut machine = Machine::start(2, &[]).await?;
    machine.counter("moved", |_| ()).await?;
    let (count, nonce) = machine.count("moved").await?;
    let worker = machine.get("moved").await?.worker_id;
    let drain = ateapi::DrainWorkerRequest { id: worker.clone() };
    machine.api.drain_worker(drain).await?;
    let actor = machine.wait_for("moved", ActorState::Suspended).await?;
    ensure!(actor.suspended_by == "drain", "suspended by {:?}", actor.suspended_by);
    ensure!(machine.count("moved").await? == (count + 1, nonce), "it did not go on");
    ensure!(machine.get("moved").await?.worker_id != worker, "it woke on the drained worker");
    Ok(())
}

#[tokio::test]
async fn sigterm_suspends_and_the_next_start_wakes_on_traffic() -> Result<()> {
    let mut machine = Machine::start(2, &[]).await?;
    machine.counter("term", |_| ()).await?;
    let (count, nonce) = machine.count("term").await?;
    machine.stop()?;
    let left = processes_naming(&machine.dir.to_string_lossy());
    ensure!(left.is_empty(), "processes left after SIGTERM: {left:?}");
    machine.restart().await?;
    ensure!(machine.get("term").await?.state() == ActorState::Suspended);
    ensure!(machine.count("term").await? == (count + 1, nonce));
    Ok(())
}

#[tokio::test]
async fn an_answered_request_survives_the_death_of_its_worker() -> Result<()> {
    let mut machine = Machine::start(3, &[]).await?;
    machine
        .counter("sync", |spec| {
            spec.checkpoint = Some(CheckpointPolicy {
                on_reply: "sync".into(),
                durability: "node".into(),
                ..Default::default()
            });
        })
        .await?;
    let (mut count, nonce) = machine.count("sync").await?;
    for round in 0..3 {
        let worker = machine.get("sync").await?.worker_id;
        let workers = machine.api.list_workers(ateapi::ListWorkersRequest {}).await?.into_inner().workers;
        let pid = workers.iter().find(|one| one.id == worker).context("worker not listed")?.pid;
        kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
        let (next, same) = machine.count("sync").await.with_context(|| format!("round {round}"))?;
        ensure!(next == count + 1 && same == nonce, "round {round}: {count} → {next}, {nonce} → {same}");
        count = next;
    }
    let events = machine.events("sync").await?;
    ensure!(
        events.iter().any(|(reason, _)| reason == "RolledBack"),
        "no event says what was lost: {events:?}"
    );
    Ok(())
}

#[tokio::test]
async fn an_idle_actor_falls_asleep_by_itself() -> Result<()> {
    let mut machine = Machine::start(2, &[]).await?;
    machine
        .counter("idle", |spec| {
            spec.idle = Some(IdlePolicy { suspend_after: "2s".into(), ..Default::default() });
        })
        .await?;
    let (count, nonce) = machine.count("idle").await?;
    let asleep = machine.wait_for("idle", ActorState::Suspended).await?;
    ensure!(asleep.suspended_by == "idle", "suspended by {:?}", asleep.suspended_by);
    ensure!(machine.count("idle").await? == (count + 1, nonce));
    Ok(())
}
