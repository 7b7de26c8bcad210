// SPDX-License-Identifier: Apache-2.0
//! An answered request survives whatever ends its worker (`checkpoint.onReply: sync`, P2).
//!
//! Eight clients count up in one actor, a ninth reads a stream of it, and its worker is killed again and again at random
//! moments: the ateom alone, its whole control group, or the sandbox. The oracle is the count: a request sent after
//! an answer of N must be answered with more than N, under the nonce of the first boot; an answer that a kill undid
//! would be given again. What is in flight at a kill may fail, but only with an answer that says so or a cut connection.
//!
//! `SUBSTRATE_KILLS` (default 100) says how many kills, `SUBSTRATE_SEED` which ones.
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ateom::cgroup::{Cgroup, Hierarchy};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use substrate_integration::{Client, Machine, PATIENCE};
use substrate_proto::ateapi;
use substrate_proto::types::CheckpointPolicy;

const CLIENTS: usize = 8;

/// What all clients know.
struct Oracle {
    client: Client,
    nonce: String,
    /// The largest count that was answered.
    answered: AtomicU64,
    /// Each count that was answered, and how often.
    counts: Mutex<BTreeMap<u64, u32>>,
    /// Failures by what they said.
    failed: Mutex<BTreeMap<String, u32>>,
    over: AtomicBool,
}

impl Oracle {
    fn fail(&self, why: String) {
        *self.failed.lock().unwrap().entry(why).or_default() += 1;
    }

    /// One client: asks until it is over.
    async fn ask(self: Arc<Self>) -> Result<()> {
        while !self.over.load(Ordering::SeqCst) {
            let floor = self.answered.load(Ordering::SeqCst);
            let answer = match tokio::time::timeout(PATIENCE, self.client.send("GET", "/", "")).await {
                Err(_) => anyhow::bail!("no answer within {PATIENCE:?}"),
                Ok(Err(error)) => {
                    self.fail(format!("cut off: {error:#}"));
                    continue;
                }
                Ok(Ok(answer)) => answer,
            };
            if answer.status != 200 {
                ensure!(
                    matches!(answer.status, 502 | 503) && answer.body.contains("message"),
                    "an unclear failure: {} {}",
                    answer.status,
                    answer.body
                );
                self.fail(answer.status.to_string());
                continue;
            }
            ensure!(
                answer.durability.as_deref() == Some("sync"),
                "answered with durability {:?}",
                answer.durability
            );
            let value: serde_json::Value = serde_json::from_str(&answer.body)?;
            let count = value["count"].as_u64().context("no count")?;
            ensure!(value["nonce"] == self.nonce.as_str(), "it was booted afresh: {value}");
            ensure!(count > floor, "an answered request was lost: {count} after {floor}");
            let again =
                *self.counts.lock().unwrap().entry(count).and_modify(|times| *times += 1).or_insert(1);
            ensure!(again == 1, "{count} was answered twice: the first answer was undone");
            self.answered.fetch_max(count, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Reads a stream of the actor, opening it again whenever it breaks; how often it was open.
    async fn listen(self: Arc<Self>) -> Result<u32> {
        let mut opened = 0;
        while !self.over.load(Ordering::SeqCst) {
            let Ok(mut stream) = self.client.stream("/watch").await else { continue };
            opened += 1;
            while let Ok(Ok(Some(text))) = tokio::time::timeout(Duration::from_secs(5), stream.next()).await {
                ensure!(
                    !text.contains("nonce") || text.contains(&self.nonce),
                    "a stream of another boot: {text}"
                );
                if self.over.load(Ordering::SeqCst) {
                    break;
                }
            }
        }
        Ok(opened)
    }

    /// Waits for an answer beyond a count.
    async fn progress(&self, beyond: u64) -> Result<()> {
        tokio::time::timeout(PATIENCE, async {
            while self.answered.load(Ordering::SeqCst) <= beyond {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .with_context(|| {
            format!("nothing was answered beyond {beyond}; failures {:?}", self.failed.lock().unwrap())
        })
    }
}

/// Ends the worker of the actor in one of the ways a worker ends; which.
async fn end_worker(machine: &mut Machine, draw: &mut StdRng) -> Result<&'static str> {
    let worker = machine.get("sync").await?.worker_id;
    let workers = machine.api.list_workers(ateapi::ListWorkersRequest {}).await?.into_inner().workers;
    let Some(pid) = workers.iter().find(|one| one.id == worker).map(|one| one.pid).filter(|pid| *pid > 0)
    else {
        return Ok("none");
    };
    let pid = Pid::from_raw(i32::try_from(pid)?);
    match draw.random_range(0..3) {
        0 => {
            let _ = kill(pid, Signal::SIGKILL);
            Ok("ateom")
        }
        1 => {
            let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            let end = format!("/{worker}");
            let name = groups.lines().find_map(|line| {
                let path = line.splitn(3, ':').nth(2)?;
                Some(path[1..path.find(&end)? + end.len()].to_owned())
            });
            // It may be gone already.
            let Some(name) = name else { return Ok("none") };
            Cgroup::at(&Hierarchy::detect()?, &name).kill()?;
            Ok("group")
        }
        _ => {
            for pid in machine.sandboxes(Some(&worker)) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            Ok("sandbox")
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_kill_undoes_an_answer() -> Result<()> {
    let number = |name: &str, default: u64| {
        std::env::var(name)
            .map_or(Ok(default), |text| text.parse().with_context(|| format!("{name} is no number")))
    };
    let kills = number("SUBSTRATE_KILLS", 100)?;
    let seed = number("SUBSTRATE_SEED", 1)?;
    let mut draw = StdRng::seed_from_u64(seed);
    let mut machine = Machine::start(4, &[]).await?;
    machine.allow(Duration::from_secs(120 + 20 * kills));
    machine
        .counter("sync", |spec| {
            spec.checkpoint = Some(CheckpointPolicy {
                on_reply: "sync".into(),
                durability: "node".into(),
                max_hold: "30s".into(),
                ..Default::default()
            });
        })
        .await?;
    let (count, nonce) = machine.count("sync").await?;
    let oracle = Arc::new(Oracle {
        client: machine.client("sync")?,
        nonce,
        answered: AtomicU64::new(count),
        counts: Mutex::default(),
        failed: Mutex::default(),
        over: AtomicBool::new(false),
    });
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(Arc::clone(&oracle).ask());
    }
    let stream = tokio::spawn(Arc::clone(&oracle).listen());
    let mut victims: BTreeMap<&str, u32> = BTreeMap::new();
    for round in 0..kills {
        let before = oracle.answered.load(Ordering::SeqCst);
        // It serves again; then a moment of any length.
        tokio::select! {
            progress = oracle.progress(before) => progress.with_context(|| format!("seed {seed}, kill {round}"))?,
            Some(ended) = clients.join_next() => {
                let ended = ended?.err().map_or("without an error".to_owned(), |error| format!("{error:#}"));
                // What is told of it may still be on its way.
                tokio::time::sleep(Duration::from_secs(2)).await;
                let events = machine.events("sync").await?;
                anyhow::bail!("a client ended ({ended}) with seed {seed} before kill {round}: {events:#?}");
            }
        }
        tokio::time::sleep(Duration::from_millis(draw.random_range(0..600))).await;
        *victims.entry(end_worker(&mut machine, &mut draw).await?).or_default() += 1;
    }
    let before = oracle.answered.load(Ordering::SeqCst);
    oracle.progress(before).await?;
    oracle.over.store(true, Ordering::SeqCst);
    while let Some(ended) = clients.join_next().await {
        ended??;
    }
    let opened = stream.await??;
    let answered = oracle.counts.lock().unwrap().len();
    eprintln!(
        "seed {seed}: {kills} kills {victims:?}, {answered} answers, {opened} streams, failures {:?}",
        oracle.failed.lock().unwrap()
    );
    ensure!(opened > 0, "the stream was never open");
    ensure!(victims.get("none").copied().unwrap_or_default() < u32::try_from(kills)?, "nothing was killed");
    Ok(())
}
