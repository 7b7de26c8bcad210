// SPDX-License-Identifier: Apache-2.0
//! What a wake-up costs the control plane (design, section 11): the real engine and SQLite store on a real disk, over a
//! node that answers at once.
//!
//! Rounds of three are interleaved, so that a busy machine slows all alike: durable one-row transactions of the bare
//! store (the floor), wake-ups of actors among 1,000, wake-ups among many. As many callers as writers. The actors that
//! were woken are put to sleep again between the rounds, which is not counted. Then wake-ups at half the rate that was
//! reached, each timed from the moment it was due.
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use substrate_proto::types;

use super::stub::{Blobs, Stub, StubNode};
use crate::engine::{Engine, Settings, Verb, lock};
use crate::model::{Actor, ActorUid, NodeName, SnapshotId, State, Stored as _};
use crate::node::SharedNode;
use crate::schedule::Need;
use crate::secrets::Sealer;
use crate::store::{self, Expect, Kind, Query, SharedStore, SqliteStore, Tx};
use crate::workflow::NoFaults;
use crate::{Clock, SystemClock};

type Failed = Box<dyn std::error::Error + Send + Sync>;

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Interleaved rounds.
    pub rounds: usize,
    /// Callers, and writers of the floor.
    pub writers: usize,
    /// Wake-ups and transactions of a round; as many workers.
    pub wave: usize,
    /// Actors of the large control plane.
    pub many: usize,
}

/// A control plane with sleeping actors.
struct Plane {
    engine: Arc<Engine>,
    store: SharedStore,
    /// Those that are woken, spread over all.
    chosen: Vec<ActorUid>,
}

fn settings() -> Settings {
    let directory = "/nonexistent";
    let config = crate::Config::new(directory, directory, directory, Vec::new());
    // Nothing happens by itself.
    Settings { idle_suspend_after: None, evict_after: None, ..Settings::from(&config) }
}

async fn start(store: &SharedStore, node: &Arc<StubNode>) -> Result<Arc<Engine>, Failed> {
    let clients = vec![(NodeName(node.name.clone()), Arc::new(Stub(Arc::clone(node))) as SharedNode)];
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let sealer = Sealer::with_key([7; 32]);
    Ok(Engine::start(Arc::clone(store), clock, sealer, settings(), clients, Arc::new(NoFaults)).await?)
}

impl Plane {
    /// Makes one actor in earnest, and the others in its image.
    async fn with(dir: &Path, actors: usize, wave: usize) -> Result<Self, Failed> {
        let store: SharedStore = Arc::new(SqliteStore::open(&dir.join("state.db")).await?);
        let blobs = Arc::new(Blobs::default());
        let node = StubNode::new("n0", wave, Arc::clone(&blobs), Arc::new(SystemClock));
        let engine = start(&store, &node).await?;
        engine.create_atespace("space", BTreeMap::new()).await?;
        let container = types::Container {
            name: "main".into(),
            image: "oci:/images/counter".into(),
            ..Default::default()
        };
        let spec = types::TemplateSpec { containers: vec![container], ..Default::default() };
        // The node may just be connecting.
        for _ in 0..200 {
            match engine.create_template("space", "t", &spec, BTreeMap::new(), false).await {
                Ok(_) => break,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
        let spec = types::ActorSpec { template: "t".into(), ..Default::default() };
        let uid = engine.create_actor("space", "first", spec, None, false, None).await?.uid;
        engine.ask(&uid, Verb::Resume { cause: "user".into() }, None).await?;
        suspend(&engine, &uid).await?;
        engine.stop().await;
        let first: Actor = store::load(&*store, uid.as_str()).await?.ok_or("the first actor is gone")?;
        let mut chosen = Vec::new();
        let spread = (actors / wave).max(1);
        for begin in (0..actors).step_by(500) {
            let mut tx = Tx::default();
            for number in begin..actors.min(begin + 500) {
                let mut actor = first.clone();
                actor.uid = ActorUid(uuid::Uuid::new_v4().to_string());
                actor.name = format!("actor-{number}");
                for snapshot in &mut actor.snapshots {
                    snapshot.id = SnapshotId::draw(&SystemClock);
                    snapshot.origin = actor.uid.clone();
                }
                actor.last = actor.snapshots.last().map(|it| it.id.clone());
                if number % spread == 0 && chosen.len() < wave {
                    chosen.push(actor.uid.clone());
                    for it in &actor.snapshots {
                        blobs.insert(format!("{}/{}-{}", actor.uid, it.generation.0, it.id));
                    }
                }
                tx.puts.push((actor.object(), Expect::Absent));
            }
            store.commit(tx).await?;
        }
        let engine = start(&store, &node).await?;
        let plane = Self { engine, store, chosen };
        // The first round after a start is another thing: the session opens, workers are reported.
        for _ in 0..2 {
            plane.wake(8).await?;
            plane.put_to_sleep().await?;
        }
        Ok(plane)
    }

    /// Wakes the chosen: how long it took.
    async fn wake(&self, callers: usize) -> Result<Duration, Failed> {
        let begun = Instant::now();
        let mut calls = futures::stream::iter(self.chosen.clone())
            .map(|uid| {
                let engine = Arc::clone(&self.engine);
                async move { tokio::spawn(async move { wake(&engine, &uid).await }).await }
            })
            .buffer_unordered(callers);
        while let Some(answer) = calls.next().await {
            answer??;
        }
        // What the wake-ups left to be written later is theirs.
        self.engine.flush_workers().await;
        Ok(begun.elapsed())
    }

    async fn put_to_sleep(&self) -> Result<(), Failed> {
        let mut calls = futures::stream::iter(self.chosen.clone())
            .map(|uid| {
                let engine = Arc::clone(&self.engine);
                async move { suspend(&engine, &uid).await }
            })
            .buffer_unordered(32);
        while let Some(answer) = calls.next().await {
            answer?;
        }
        drop(calls);
        self.engine.flush_workers().await;
        // Collection of what was superseded is over too.
        self.engine.collect(Duration::from_secs(10)).await;
        Ok(())
    }

    /// Wakes the chosen at a rate: ms of each.
    async fn wake_paced(&self, per_second: f64) -> Result<Vec<f64>, Failed> {
        let calls = self.chosen.iter().cloned().map(|uid| {
            let engine = Arc::clone(&self.engine);
            async move { wake(&engine, &uid).await }
        });
        Ok(paced(per_second, calls).await?.into_iter().map(|(ms, ())| ms).collect())
    }

    /// A page of 100 of the sleeping, from anywhere; and the choice of a worker: ms of each try.
    async fn look(&self, tries: usize) -> Result<(Vec<f64>, Vec<f64>), Failed> {
        let (mut pages, mut picks) = (Vec::new(), Vec::new());
        for number in 0..tries {
            let mut query = Query::all(Kind::Actor);
            query.limit = 100;
            query.states = vec![State::Suspended.to_proto() as i64];
            query.after = Some(("space".into(), format!("actor-{number}")));
            let begun = Instant::now();
            let page: Vec<Actor> = store::list(&*self.store, &query).await?;
            pages.push(begun.elapsed().as_secs_f64() * 1_000.0);
            if page.len() != 100 {
                return Err(format!("a page has {} actors", page.len()).into());
            }
            let need = Need { pool: "default", class: "gvisor", snapshot: None, only: None, prefer: &[] };
            let begun = Instant::now();
            lock(&self.engine.pool).pick(&need)?;
            picks.push(begun.elapsed().as_secs_f64() * 1_000.0);
        }
        Ok((pages, picks))
    }

    async fn end(self) {
        self.engine.stop().await;
        self.store.close().await;
    }
}

/// Begins calls at a rate: how long each took, ms, from when it was due (the timer's own coarseness, 1 ms, excepted).
async fn paced<T: Send + 'static>(
    per_second: f64,
    calls: impl Iterator<Item = impl Future<Output = Result<T, Failed>> + Send + 'static>,
) -> Result<Vec<(f64, T)>, Failed> {
    let begun = tokio::time::Instant::now();
    let begin = |(number, call): (usize, _)| {
        let due = begun + Duration::from_secs_f64(number as f64 / per_second);
        tokio::spawn(async move {
            tokio::time::sleep_until(due).await;
            let due = Instant::now();
            let done = call.await?;
            Ok::<_, Failed>((due.elapsed().as_secs_f64() * 1_000.0, done))
        })
    };
    let begun: Vec<_> = calls.enumerate().map(begin).collect();
    let mut took = Vec::new();
    for call in begun {
        took.push(call.await??);
    }
    Ok(took)
}

async fn wake(engine: &Arc<Engine>, uid: &ActorUid) -> Result<(), Failed> {
    Ok(engine.ask(uid, Verb::Resume { cause: "traffic".into() }, None).await.map(drop)?)
}

async fn suspend(engine: &Arc<Engine>, uid: &ActorUid) -> Result<(), Failed> {
    let verb = Verb::Suspend { by: "user".into(), only_if_idle: false, drain_ms: 0 };
    Ok(engine.ask(uid, verb, None).await.map(drop)?)
}

/// The bare store with as many writers, each on rows of its own.
struct Floor {
    store: SharedStore,
    rows: Vec<Actor>,
}

impl Floor {
    async fn new(dir: &Path, like: &Actor, wave: usize) -> Result<Self, Failed> {
        let store: SharedStore = Arc::new(SqliteStore::open(&dir.join("state.db")).await?);
        let mut rows = Vec::new();
        for number in 0..wave {
            let mut row = like.clone();
            row.uid = ActorUid(uuid::Uuid::new_v4().to_string());
            row.name = format!("row-{number}");
            let tx = Tx { puts: vec![(row.object(), Expect::Absent)], ..Tx::default() };
            row.revision = store.commit(tx).await?.revision;
            rows.push(row);
        }
        Ok(Self { store, rows })
    }

    /// One durable transaction on each row.
    async fn write(&mut self, writers: usize) -> Result<Duration, Failed> {
        let begun = Instant::now();
        let rows = std::mem::take(&mut self.rows);
        let mut writes = futures::stream::iter(rows)
            .map(|row| {
                let store = Arc::clone(&self.store);
                async move { tokio::spawn(write(store, row)).await }
            })
            .buffer_unordered(writers);
        let mut rows = Vec::new();
        while let Some(row) = writes.next().await {
            rows.push(row??);
        }
        drop(writes);
        self.rows = rows;
        Ok(begun.elapsed())
    }

    /// Two durable transactions on each row, one after the other, as a wake-up has; begun at a rate: ms of each pair.
    async fn write_pairs_paced(&mut self, per_second: f64) -> Result<Vec<f64>, Failed> {
        let calls = std::mem::take(&mut self.rows).into_iter().map(|row| {
            let store = Arc::clone(&self.store);
            async move { write(Arc::clone(&store), write(store, row).await?).await }
        });
        let (took, rows) = paced(per_second, calls).await?.into_iter().unzip();
        self.rows = rows;
        Ok(took)
    }
}

async fn write(store: SharedStore, mut row: Actor) -> Result<Actor, Failed> {
    let puts = vec![(row.object(), Expect::Revision(row.revision))];
    row.revision = store.commit(Tx { puts, ..Tx::default() }).await?.puts[0];
    Ok(row)
}

fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = ((sorted.len() as f64 - 1.0) * part).round() as usize;
    sorted.get(at).copied().unwrap_or_default()
}

/// CPU time of this process, all threads.
fn cpu() -> f64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID)
        .map_or(0.0, |time| Duration::from(time).as_secs_f64())
}

/// Resident memory, MiB (proc_pid_status(5)).
fn resident() -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<f64>().ok()).unwrap_or_default() / 1024.0
}

/// Measures; the figures as one JSON object.
pub async fn run(dir: &Path, options: Options) -> Result<serde_json::Value, Failed> {
    let Options { rounds, writers, wave, many } = options;
    let path = |name: &str| dir.join(name);
    let few = Plane::with(&path("few"), 1_000, wave).await?;
    let before = resident();
    let large = Plane::with(&path("many"), many, wave).await?;
    let grown = resident() - before;
    let like: Actor = store::load(&*few.store, few.chosen[0].as_str()).await?.ok_or("no actor")?;
    let mut floor = Floor::new(&path("floor"), &like, wave).await?;
    floor.write(writers).await?;

    let (mut ratios, mut costs, mut wakes, mut writes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let write = floor.write(writers).await?.as_secs_f64();
        let at = cpu();
        let wake = few.wake(writers).await?.as_secs_f64();
        let cost = cpu() - at;
        let write_again = floor.write(writers).await?.as_secs_f64();
        let at = cpu();
        large.wake(writers).await?;
        let cost_of_many = cpu() - at;
        few.put_to_sleep().await?;
        large.put_to_sleep().await?;
        let write = f64::midpoint(write, write_again);
        ratios.push(write / wake);
        costs.push(cost_of_many / cost);
        wakes.push(wave as f64 / wake);
        writes.push(wave as f64 / write);
    }
    let per_second = median(&wakes);
    // Each wave by itself, and the middle one told: a stall of the machine's disk is of one wave.
    let (mut own, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..4 * rounds {
        own.push(few.wake_paced(per_second / 2.0).await?);
        bare.push(floor.write_pairs_paced(per_second / 2.0).await?);
        few.put_to_sleep().await?;
    }
    let of_waves =
        |waves: &[Vec<f64>], part| median(&waves.iter().map(|wave| quantile(wave, part)).collect::<Vec<_>>());
    let (pages, picks) = large.look(500).await?;
    few.end().await;
    large.end().await;
    floor.store.close().await;
    Ok(serde_json::json!({
        "wakeups_per_s": per_second.round(),
        "store_tx_per_s": median(&writes).round(),
        "wakeups_ratio": median(&ratios),
        "own_p99_ms": of_waves(&own, 0.99),
        "own_p50_ms": of_waves(&own, 0.5),
        "own_p99_of_all_ms": quantile(&own.concat(), 0.99),
        "own_floor_p99_ms": of_waves(&bare, 0.99),
        "own_floor_p50_ms": of_waves(&bare, 0.5),
        "own_floor_p99_of_all_ms": quantile(&bare.concat(), 0.99),
        "cost_ratio_100k": median(&costs),
        "list_p99_ms": quantile(&pages, 0.99),
        "pick_p99_ms": quantile(&picks, 0.99),
        "memory_of_100k_mib": grown,
        "actors": many,
        "writers": writers,
        "rounds": rounds,
    }))
}
