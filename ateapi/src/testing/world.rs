// SPDX-License-Identifier: Apache-2.0
//! A simulated world: one seed, from which everything that is left to chance is drawn in one order, because the tasks
//! of a simulation share one thread and one paused clock. Whatever happens goes into a trace, whose digest says whether
//! two runs were the same.
//!
//! It is also the oracle: it knows which requests every memory has taken and which were answered as kept, and looks at
//! each activation and each request served whether the promises hold.
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::hash::Hasher as _;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use substrate_proto::{atelet, types};

use super::stub::StubNode;
use crate::Clock;

/// Lines of the trace that a failure shows.
const SHOWN: usize = 6000;

struct Trace {
    digest: DefaultHasher,
    last: VecDeque<String>,
}

/// What was promised and seen of one actor.
#[derive(Default)]
struct Known {
    /// Requests answered as kept.
    promised: BTreeSet<u64>,
    /// Requests that a memory has taken.
    served: BTreeSet<u64>,
    /// Raised when someone asks for an older state on purpose.
    epoch: u64,
    /// The highest that was ever brought up.
    generation: u64,
    /// Whether an activation has brought up less than had been served: an event has to say so.
    regressed: bool,
}

/// See the module.
pub struct World {
    rng: Mutex<StdRng>,
    start: tokio::time::Instant,
    /// Nothing goes wrong any more.
    calm: AtomicBool,
    trace: Mutex<Trace>,
    known: Mutex<BTreeMap<String, Known>>,
    nodes: OnceLock<Vec<Weak<StubNode>>>,
    broken: Mutex<Option<String>>,
    /// `ATEAPI_TRACE` is set: everything is shown as it happens.
    is_loud: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            rng: Mutex::new(StdRng::seed_from_u64(seed)),
            start: tokio::time::Instant::now(),
            calm: AtomicBool::new(true),
            trace: Mutex::new(Trace { digest: DefaultHasher::new(), last: VecDeque::new() }),
            known: Mutex::default(),
            nodes: OnceLock::new(),
            broken: Mutex::default(),
            is_loud: std::env::var_os("ATEAPI_TRACE").is_some(),
        })
    }

    pub fn inhabit(&self, nodes: &[Arc<StubNode>]) {
        let _ = self.nodes.set(nodes.iter().map(Arc::downgrade).collect());
    }

    pub fn set_calm(&self, calm: bool) {
        self.calm.store(calm, Ordering::Relaxed);
        self.note(format_args!("calm: {calm}"));
    }

    pub fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    /// Whether something of this chance happens; never in calm weather.
    pub fn roll(&self, chance: f64) -> bool {
        !self.is_calm() && lock(&self.rng).random_bool(chance)
    }

    pub fn below(&self, end: usize) -> usize {
        lock(&self.rng).random_range(0..end)
    }

    pub fn ms(&self, from: u64, to: u64) -> Duration {
        Duration::from_millis(lock(&self.rng).random_range(from..to))
    }

    /// What a message takes: mostly nothing much, sometimes longer than anyone waits.
    pub fn delay(&self) -> Duration {
        if self.is_calm() {
            return Duration::from_millis(1);
        }
        match self.below(1_000) {
            0..850 => self.ms(0, 10),
            850..980 => self.ms(10, 400),
            980..997 => self.ms(400, 6_000),
            _ => self.ms(6_000, 50_000),
        }
    }

    /// What a stage of some work takes.
    pub fn work_time(&self) -> Duration {
        if self.is_calm() { Duration::from_millis(5) } else { self.ms(1, 400) }
    }

    /// Writes down what happens.
    pub fn note(&self, what: fmt::Arguments<'_>) {
        let line = format!("{:>9} ms  {what}", self.start.elapsed().as_millis());
        let mut trace = lock(&self.trace);
        trace.digest.write(line.as_bytes());
        if self.is_loud {
            eprintln!("{line}");
        }
        if trace.last.len() == SHOWN {
            trace.last.pop_front();
        }
        trace.last.push_back(line);
    }

    /// The digest of everything that happened.
    pub fn digest(&self) -> u64 {
        lock(&self.trace).digest.finish()
    }

    /// A promise is broken. The first one counts.
    pub fn broke(&self, what: &str) {
        self.note(format_args!("BROKEN: {what}"));
        lock(&self.broken).get_or_insert_with(|| format!("{what}\n{}", self.last()));
    }

    /// The end of the trace.
    pub fn last(&self) -> String {
        let trace = lock(&self.trace);
        let lines: Vec<_> = trace.last.iter().map(String::as_str).collect();
        lines.join("\n")
    }

    pub fn verdict(&self) -> Option<String> {
        lock(&self.broken).clone()
    }

    /// P1: looks at every node for copies that are not frozen.
    pub fn check_copies(&self) {
        let mut seen: BTreeMap<String, String> = BTreeMap::new();
        for node in self.nodes.get().into_iter().flatten().filter_map(Weak::upgrade) {
            for copy in node.copies() {
                let here = format!("{} (generation {})", node.name, copy.assignment.generation);
                if let Some(there) = seen.insert(copy.assignment.actor_uid.clone(), here.clone()) {
                    self.broke(&format!(
                        "P1: two live copies of {}: {there}, {here}",
                        copy.assignment.actor_uid
                    ));
                }
            }
        }
    }

    /// A node has brought a copy up.
    pub fn activated(
        &self,
        node: &str,
        assignment: &types::Assignment,
        request: &atelet::ActivateRequest,
        log: &[u64],
    ) {
        let uid = &assignment.actor_uid;
        let source = request.snapshot.as_ref().map_or("its image", |it| it.snapshot_id.as_str());
        self.note(format_args!("{node} runs {uid} generation {} from {source}", assignment.generation));
        let mut all = lock(&self.known);
        let known = all.entry(uid.clone()).or_default();
        if request.keep_volumes {
            // A reset gives memory up on purpose.
            known.give_up();
        }
        let log: BTreeSet<u64> = log.iter().copied().collect();
        if let Some(lost) = known.promised.difference(&log).next() {
            let what = format!("P2: request {lost} of {uid} was answered as kept, and is not in {source}");
            drop(all);
            return self.broke(&what);
        }
        known.regressed |= !known.served.is_subset(&log);
        known.served = log;
        known.generation = known.generation.max(assignment.generation);
    }

    /// Where an actor stands before a request: an answer counts only while nobody gives its state up.
    pub fn epoch(&self, uid: &str) -> u64 {
        lock(&self.known).get(uid).map_or(0, |known| known.epoch)
    }

    /// Someone asks for an older state.
    pub fn gives_up(&self, uid: &str) {
        lock(&self.known).entry(uid.to_owned()).or_default().give_up();
    }

    /// A copy has taken a request.
    pub fn served(&self, uid: &str, generation: u64, request: u64) {
        self.note(format_args!("{uid} generation {generation} took request {request}"));
        let mut all = lock(&self.known);
        let known = all.entry(uid.to_owned()).or_default();
        known.served.insert(request);
        let before = known.generation;
        drop(all);
        if before > generation {
            self.broke(&format!("P1: generation {generation} of {uid} served after generation {before} had"));
        }
    }

    /// A request was answered, kept by a committed snapshot.
    pub fn promised(&self, uid: &str, epoch: u64, request: u64) {
        self.note(format_args!("{uid} answered request {request}"));
        let mut all = lock(&self.known);
        let known = all.entry(uid.to_owned()).or_default();
        if known.epoch == epoch {
            known.promised.insert(request);
        }
    }

    /// Actors that came up with less than they had done.
    pub fn regressed(&self) -> Vec<String> {
        lock(&self.known).iter().filter(|(_, known)| known.regressed).map(|(uid, _)| uid.clone()).collect()
    }

    /// How many answers had to be kept.
    pub fn promises(&self) -> usize {
        lock(&self.known).values().map(|known| known.promised.len()).sum()
    }
}

impl Known {
    fn give_up(&mut self) {
        self.epoch += 1;
        self.promised.clear();
    }
}

/// A machine's clocks: the monotonic one runs a little fast or slow, the wall clock may be set.
pub struct SimClock {
    world: Arc<World>,
    /// Parts per million.
    drift: i64,
    wall_ms: AtomicI64,
}

impl SimClock {
    pub fn new(world: &Arc<World>, drift: i64) -> Arc<Self> {
        Arc::new(Self { world: Arc::clone(world), drift, wall_ms: AtomicI64::new(1_000_000_000) })
    }

    /// Sets the wall clock forwards or backwards.
    pub fn jump(&self, ms: i64) {
        self.world.note(format_args!("a wall clock jumps by {ms} ms"));
        self.wall_ms.fetch_add(ms, Ordering::Relaxed);
    }

    fn elapsed(&self) -> Duration {
        let nanos = self.world.start.elapsed().as_nanos() as i64;
        Duration::from_nanos((nanos + nanos / 1_000_000 * self.drift) as u64)
    }
}

#[async_trait::async_trait]
impl Clock for SimClock {
    fn now(&self) -> Duration {
        self.elapsed() + Duration::from_secs(1_000)
    }

    fn wall_ms(&self) -> i64 {
        self.wall_ms.load(Ordering::Relaxed) + self.elapsed().as_millis() as i64
    }

    async fn sleep_until(&self, deadline: Duration) {
        loop {
            let left = deadline.saturating_sub(self.now());
            if left.is_zero() {
                return;
            }
            // Never past it, and always a little.
            tokio::time::sleep(left.max(Duration::from_millis(1))).await;
        }
    }

    fn draw(&self) -> u128 {
        lock(&self.world.rng).random()
    }
}
