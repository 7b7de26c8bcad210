// SPDX-License-Identifier: Apache-2.0
//! Where actors are: a table kept by the control plane's watch, filled on a miss by `GetActor`.
//!
//! Actors that hold a worker are always in it; of those that sleep only the latest asked or changed, so that its size
//! is bounded whatever number sleeps. A wrong entry costs a round trip, never a wrong delivery: the ateom checks uid
//! and generation (P1), and before an actor is called dead it is looked up.
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use substrate_proto::ateapi::{self, ActorRef, ActorState, GetActorRequest};
use substrate_proto::types::{CheckpointPolicy, Durability};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::address::Key;
use crate::control::{Change, Control, follow};

const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(10);

/// What the router needs of an actor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Route {
    pub(crate) key: Key,
    pub(crate) uid: String,
    pub(crate) state: ActorState,
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) generation: u64,
    pub(crate) endpoint: String,
    pub(crate) revision: u64,
    pub(crate) wake_on_traffic: bool,
    pub(crate) exit_code: Option<i32>,
    pub(crate) checkpoint: Option<OnReply>,
    pub(crate) last: Option<Last>,
}

/// `checkpoint.onReply` of an actor, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OnReply {
    pub(crate) sync: bool,
    pub(crate) durability: Durability,
    pub(crate) max_hold: Duration,
    /// Bytes.
    pub(crate) max_heap: u64,
}

/// The last snapshot, as far as the hold decision needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Last {
    pub(crate) generation: u64,
    pub(crate) durability: Durability,
    /// It ended its generation (a suspend or pause), so it holds everything that generation did.
    pub(crate) ended: bool,
}

impl Route {
    pub(crate) fn from_actor(actor: ateapi::Actor) -> Self {
        let state = actor.state();
        let last = actor.last_snapshot.as_ref().map(|snapshot| Last {
            generation: snapshot.generation,
            durability: snapshot.durability(),
            ended: matches!(snapshot.cause.as_str(), "suspend" | "pause"),
        });
        Self {
            key: Key { atespace: actor.atespace, name: actor.name },
            uid: actor.uid,
            state,
            reason: actor.reason,
            message: actor.message,
            generation: actor.generation,
            endpoint: actor.ingress_endpoint,
            revision: actor.revision,
            wake_on_traffic: actor.wake_on_traffic,
            exit_code: actor.exit.map(|exit| exit.code),
            checkpoint: actor.checkpoint.as_ref().and_then(on_reply),
            last,
        }
    }

    fn awake(&self) -> bool {
        matches!(
            self.state,
            ActorState::Running | ActorState::Resuming | ActorState::Suspending | ActorState::Pausing
        )
    }
}

fn on_reply(policy: &CheckpointPolicy) -> Option<OnReply> {
    let sync = match policy.on_reply.as_str() {
        "sync" => true,
        "async" => false,
        _ => return None,
    };
    Some(OnReply {
        sync,
        durability: if policy.durability == "node" { Durability::Node } else { Durability::Durable },
        max_hold: parse_duration(&policy.max_hold).unwrap_or(Duration::from_secs(2)),
        max_heap: parse_bytes(&policy.max_heap).unwrap_or(256 << 20),
    })
}

/// "500ms", "2s", "1m", "1h"; validated by the control plane, so anything else counts as unset.
fn parse_duration(text: &str) -> Option<Duration> {
    let unit = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let number: f64 = text[..unit].parse().ok()?;
    let seconds = match &text[unit..] {
        "ms" => number / 1000.0,
        "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(seconds).ok()
}

/// "256MiB", "1GiB", "500MB", "1024"; likewise.
fn parse_bytes(text: &str) -> Option<u64> {
    let unit = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..unit].parse().ok()?;
    let factor: u32 = match &text[unit..] {
        "" | "B" => 1,
        "KiB" | "Ki" => 1 << 10,
        "MiB" | "Mi" => 1 << 20,
        "GiB" | "Gi" => 1 << 30,
        "KB" | "k" => 1_000,
        "MB" | "M" => 1_000_000,
        "GB" | "G" => 1_000_000_000,
        _ => return None,
    };
    Some((number * f64::from(factor)) as u64)
}

/// The table without its input and output.
#[derive(Debug)]
struct Table {
    awake: HashMap<Key, Arc<Route>>,
    asleep: HashMap<Key, (Arc<Route>, u64)>,
    /// Sleepers in order of entry; an item whose number is no longer its entry's is skipped.
    order: VecDeque<(u64, Key)>,
    next: u64,
    sleepers: usize,
}

impl Table {
    fn new(sleepers: usize) -> Self {
        Self { awake: HashMap::new(), asleep: HashMap::new(), order: VecDeque::new(), next: 0, sleepers }
    }

    fn get(&self, key: &Key) -> Option<&Arc<Route>> {
        self.awake.get(key).or_else(|| self.asleep.get(key).map(|(route, _)| route))
    }

    /// Takes a route over unless a later one of the same actor is there already; answers the one that holds.
    fn put(&mut self, route: Arc<Route>) -> Arc<Route> {
        if let Some(known) = self.get(&route.key).filter(|known| known.revision > route.revision) {
            return known.clone();
        }
        let key = route.key.clone();
        if route.awake() {
            self.asleep.remove(&key);
            self.awake.insert(key, route.clone());
        } else {
            self.awake.remove(&key);
            self.next += 1;
            self.asleep.insert(key.clone(), (route.clone(), self.next));
            self.order.push_back((self.next, key));
            self.evict();
        }
        route
    }

    fn evict(&mut self) {
        if self.order.len() > 2 * self.sleepers + 16 {
            let asleep = &self.asleep;
            self.order.retain(|(number, key)| asleep.get(key).is_some_and(|(_, current)| current == number));
        }
        while self.asleep.len() > self.sleepers {
            let Some((number, key)) = self.order.pop_front() else { return };
            if self.asleep.get(&key).is_some_and(|(_, current)| *current == number) {
                self.asleep.remove(&key);
            }
        }
    }

    fn remove(&mut self, key: &Key, uid: &str) {
        if self.get(key).is_some_and(|known| known.uid == uid) {
            self.awake.remove(key);
            self.asleep.remove(key);
        }
    }
}

/// The actor is not known, or the control plane cannot be asked.
#[derive(Debug, Clone)]
pub(crate) enum LookUpError {
    Unknown,
    Unavailable(String),
}

/// The shared table.
pub(crate) struct Routes {
    control: Control,
    table: Mutex<Table>,
    waiters: Mutex<HashMap<Key, Weak<Notify>>>,
    misses: [tokio::sync::Mutex<()>; 64],
    hasher: RandomState,
}

impl Routes {
    pub(crate) fn new(control: Control, sleepers: usize) -> Arc<Self> {
        Arc::new(Self {
            control,
            table: Mutex::new(Table::new(sleepers)),
            waiters: Mutex::new(HashMap::new()),
            misses: std::array::from_fn(|_| tokio::sync::Mutex::new(())),
            hasher: RandomState::new(),
        })
    }

    /// Keeps the table until shutdown.
    pub(crate) async fn keep(self: Arc<Self>, shutdown: CancellationToken) {
        follow(self.control.clone(), shutdown, |change| match change {
            Change::Restart => {}
            Change::Actor(actor) => {
                self.put(*actor);
            }
            Change::Deleted { uid, atespace, name } => self.forget(&Key { atespace, name }, &uid),
        })
        .await;
    }

    pub(crate) fn get(&self, key: &Key) -> Option<Arc<Route>> {
        self.table().get(key).cloned()
    }

    /// Takes an actor's record over and wakes those who wait for a change of it.
    pub(crate) fn put(&self, actor: ateapi::Actor) -> Arc<Route> {
        let route = self.table().put(Arc::new(Route::from_actor(actor)));
        self.notify(&route.key);
        route
    }

    fn forget(&self, key: &Key, uid: &str) {
        self.table().remove(key, uid);
        self.notify(key);
    }

    /// The route as it is known, else as the control plane says: it is asked once for all who miss it.
    pub(crate) async fn find(&self, key: &Key) -> Result<Arc<Route>, LookUpError> {
        if let Some(route) = self.get(key) {
            return Ok(route);
        }
        let stripe = self.hasher.hash_one(key) as usize % self.misses.len();
        let _one = self.misses[stripe].lock().await;
        match self.get(key) {
            Some(route) => Ok(route),
            None => self.look_up(key).await,
        }
    }

    /// Asks the control plane.
    pub(crate) async fn look_up(&self, key: &Key) -> Result<Arc<Route>, LookUpError> {
        let actor = ActorRef { atespace: key.atespace.clone(), name: key.name.clone(), uid: String::new() };
        let mut control = self.control.clone();
        let request = control.get_actor(GetActorRequest { actor: Some(actor) });
        match tokio::time::timeout(LOOK_UP_TIMEOUT, request).await {
            Ok(Ok(response)) => Ok(self.put(response.into_inner())),
            Ok(Err(status)) if status.code() == Code::NotFound => {
                let mut table = self.table();
                table.awake.remove(key);
                table.asleep.remove(key);
                Err(LookUpError::Unknown)
            }
            Ok(Err(status)) => Err(LookUpError::Unavailable(status.message().to_owned())),
            Err(_) => Err(LookUpError::Unavailable("it did not answer in time".into())),
        }
    }

    /// Fires at the next change of the actor after the call of `notified().enable()`.
    pub(crate) fn waiter(&self, key: &Key) -> Arc<Notify> {
        let mut waiters = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waiter) = waiters.get(key).and_then(Weak::upgrade) {
            return waiter;
        }
        waiters.retain(|_, waiter| waiter.strong_count() > 0);
        let waiter = Arc::new(Notify::new());
        waiters.insert(key.clone(), Arc::downgrade(&waiter));
        waiter
    }

    fn notify(&self, key: &Key) {
        let waiters = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waiter) = waiters.get(key).and_then(Weak::upgrade) {
            waiter.notify_waiters();
        }
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(name: &str, state: ActorState, revision: u64) -> Arc<Route> {
        Arc::new(Route::from_actor(ateapi::Actor {
            uid: format!("uid-{name}"),
            atespace: "team".into(),
            name: name.into(),
            state: state.into(),
            revision,
            ..Default::default()
        }))
    }

    fn key(name: &str) -> Key {
        Key { atespace: "team".into(), name: name.into() }
    }

    #[test]
    fn sleepers_are_bounded_and_the_awake_never_evicted() {
        let mut table = Table::new(3);
        for n in 0..20 {
            table.put(route(&format!("run-{n}"), ActorState::Running, n));
            table.put(route(&format!("sleep-{n}"), ActorState::Suspended, n));
        }
        assert_eq!((table.awake.len(), table.asleep.len()), (20, 3));
        assert!(table.get(&key("sleep-19")).is_some() && table.get(&key("sleep-1")).is_none());
        for revision in 100..500 {
            table.put(route("sleep-19", ActorState::Suspended, revision));
        }
        assert!(table.order.len() <= 22 && table.asleep.len() == 3);
        table.put(route("sleep-19", ActorState::Running, 501));
        assert!(table.awake.contains_key(&key("sleep-19")) && !table.asleep.contains_key(&key("sleep-19")));
    }

    #[test]
    fn an_older_record_never_replaces_a_later_one_and_a_deletion_only_its_own() {
        let mut table = Table::new(3);
        table.put(route("a", ActorState::Running, 7));
        assert_eq!(table.put(route("a", ActorState::Suspended, 5)).revision, 7);
        assert_eq!(table.get(&key("a")).unwrap().state, ActorState::Running);
        table.remove(&key("a"), "uid-of-an-earlier-actor");
        assert!(table.get(&key("a")).is_some());
        table.remove(&key("a"), "uid-a");
        assert!(table.get(&key("a")).is_none());
    }

    #[test]
    fn the_policy_is_parsed_with_its_defaults() {
        let policy = |on_reply: &str, max_hold: &str, max_heap: &str| CheckpointPolicy {
            on_reply: on_reply.into(),
            max_hold: max_hold.into(),
            max_heap: max_heap.into(),
            ..Default::default()
        };
        assert_eq!(on_reply(&policy("", "", "")), None);
        let sync = on_reply(&policy("sync", "", "")).unwrap();
        assert_eq!((sync.max_hold, sync.max_heap), (Duration::from_secs(2), 256 << 20));
        assert_eq!(sync.durability, Durability::Durable);
        let set = on_reply(&policy("async", "1500ms", "1.5GiB")).unwrap();
        assert!(!set.sync);
        assert_eq!((set.max_hold, set.max_heap), (Duration::from_millis(1500), 3 << 29));
        assert_eq!(parse_bytes("12XB"), None);
        assert_eq!(parse_duration("12"), None);
    }
}
