// SPDX-License-Identifier: Apache-2.0
//! What an operator sees and does: figures, and a restart of the node agent that nobody notices.
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioExecutor;
use substrate_integration::Machine;
use substrate_proto::ateapi::ActorState;

/// Figures by name with labels.
async fn metrics(address: &str) -> Result<Vec<(String, f64)>> {
    let client =
        hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build_http::<Full<bytes::Bytes>>();
    let answer = client.get(format!("http://{address}/metrics").parse()?).await?;
    ensure!(answer.status() == 200, "{}", answer.status());
    let text = String::from_utf8(answer.into_body().collect().await?.to_bytes().to_vec())?;
    text.lines()
        .filter(|line| !line.starts_with('#') && !line.trim().is_empty())
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').context("a line without a value")?;
            Ok((name.to_owned(), value.parse()?))
        })
        .collect()
}

fn figure(all: &[(String, f64)], name: &str, labels: &[&str]) -> Option<f64> {
    let fits = |found: &str| {
        found.split('{').next() == Some(name) && labels.iter().all(|label| found.contains(label))
    };
    all.iter().find(|(found, _)| fits(found)).map(|(_, value)| *value)
}

#[tokio::test]
async fn figures_for_a_fleet_are_served() -> Result<()> {
    let root = tempfile::Builder::new().prefix("sub-").tempdir_in("/tmp")?;
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let address = format!("127.0.0.1:{port}");
    let config = root.path().join("substrate.toml");
    std::fs::write(&config, format!("[metrics]\nlisten = \"{address}\"\n"))?;
    let config = config.to_str().context("path")?.to_owned();
    let dir = root.path().join("d");
    let mut machine = Machine::start_in(dir, Some(root), 1, &["--config", &config]).await?;
    machine.counter("seen", |_| ()).await?;
    machine.suspend("seen").await?;
    machine.resume("seen").await?;
    let wanted: [(&str, &[&str], f64); 10] = [
        ("substrate_actors", &["state=\"running\""], 1.0),
        ("substrate_actor_state_seconds_count", &["state=\"resuming\"", "next=\"running\""], 2.0),
        ("substrate_actor_state_seconds_count", &["state=\"suspending\"", "next=\"suspended\""], 1.0),
        ("substrate_workers", &["state=\"taken\"", "class=\"gvisor\""], 1.0),
        ("substrate_node_up", &["node=\"local\""], 1.0),
        ("substrate_node_activation_seconds_count", &["from=\"image\"", "result=\"ok\""], 1.0),
        ("substrate_node_activation_seconds_count", &["from=\"node\"", "result=\"ok\""], 1.0),
        ("substrate_node_upload_seconds_count", &["result=\"ok\""], 1.0),
        ("substrate_node_images", &[], 1.0),
        ("substrate_node_workers", &["state=\"up\""], 1.0),
    ];
    let deadline = tokio::time::Instant::now() + Duration::from_secs(40);
    loop {
        let all = metrics(&address).await?;
        let missing: Vec<_> = wanted
            .iter()
            .filter(|(name, labels, value)| figure(&all, name, labels) != Some(*value))
            .map(|(name, labels, value)| {
                format!("{name}{labels:?} {value} ({:?})", figure(&all, name, labels))
            })
            .collect();
        if missing.is_empty() {
            for name in [
                "substrate_node_disk_free_bytes",
                "substrate_node_stored_bytes_total",
                "substrate_node_lease_seconds",
            ] {
                ensure!(figure(&all, name, &[]).is_some_and(|value| value > 0.0), "{name} is missing");
            }
            ensure!(!all.iter().any(|(name, _)| name.contains("seen")), "a label names an actor");
            return Ok(());
        }
        ensure!(tokio::time::Instant::now() < deadline, "{missing:#?}");
        // Some are read every ten seconds.
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// The workload writes a line every 10 ms, whoever is killed: workers write to files and have no pipe to the agent.
#[tokio::test]
async fn a_kill_of_the_agent_is_not_noticed_by_a_busy_actor() -> Result<()> {
    const TICKS: &str = "i=0; while :; do i=$((i+1)); echo $i $(date +%s%N); sleep 0.01; done";
    let mut machine = Machine::start(1, &[]).await?;
    let before = machine
        .counter("busy", |spec| {
            let main = &mut spec.containers[0];
            main.command = ["/bin/sh", "-c", TICKS].map(str::to_owned).into();
            (main.readiness, main.ports) = (None, Vec::new());
        })
        .await?;
    let sandboxes = machine.sandboxes(None);
    machine.kill();
    machine.restart().await?;
    let after = machine.wait_for("busy", ActorState::Running).await?;
    ensure!(after.generation == before.generation, "it was started again");
    ensure!(machine.sandboxes(None) == sandboxes, "its sandbox is another");
    let log = machine.dir.join("logs/actors/default/busy");
    let ticks = || -> Result<Vec<(u64, u64)>> {
        let text = std::fs::read_to_string(log.join("main.log"))?;
        let ticks = text.lines().filter_map(|line| line.split_once(' '));
        Ok(ticks.filter_map(|(number, time)| Some((number.parse().ok()?, time.parse().ok()?))).collect())
    };
    let adopted = ticks()?.len();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while ticks()?.len() < adopted + 5 {
        ensure!(tokio::time::Instant::now() < deadline, "it writes nothing more after {adopted} lines");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let ticks = ticks()?;
    let mut longest = 0;
    for pair in ticks.windows(2) {
        ensure!(pair[1].0 == pair[0].0 + 1, "lines are missing between {:?} and {:?}", pair[0], pair[1]);
        longest = longest.max(pair[1].1.saturating_sub(pair[0].1) / 1_000_000);
    }
    eprintln!("{} lines, longest pause {longest} ms", ticks.len());
    ensure!(longest < 3_000, "it stood still for {longest} ms");
    let labels: serde_json::Value = serde_json::from_slice(&std::fs::read(log.join("labels.json"))?)?;
    ensure!(labels["ate.dev/actor"] == "busy" && labels["ate.dev/uid"] == before.uid.as_str(), "{labels}");
    Ok(())
}
