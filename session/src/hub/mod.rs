// SPDX-License-Identifier: Apache-2.0
//! The hub: one session per sandbox with a supervisor, beside the driver.
//!
//! All of it runs in one thread with a runtime of its own: each message passes several tasks here, and where these move
//! between threads, an exec pays for a wake-up of a processor at each (22 of them, seen with strace(1)).
//!
//! A session is a few tasks around the latest [`View`] of its actor, all ended when the actor is gone:
//!
//! * *connecting* dials the shim whenever the actor is awake and the link has no connection,
//! * *waking* asks the control plane for the actor while a relay waits and it sleeps, and for nothing else,
//! * *holding* keeps a connection that counts as a request in flight while a relay is live, so that the actor is not
//!   suspended as idle under it,
//! * [`control`] owns the conversation with the gateway that makes the sandbox Ready,
//! * [`token`] renews the sandbox's token when nobody in it does,
//! * [`spare`] keeps a relay ready for the next command,
//! * every other call of the supervisor is carried through by [`forward`].
pub mod control;
pub mod dial;
pub mod forward;
pub mod gateway;
mod leg;
pub mod memory;
mod metrics;
pub mod spare;
pub mod token;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::mux::Mux;
use crate::wire::SessionKey;
use gateway::{Connector, Gateway};
use memory::Memory;

/// Between attempts to reach a shim that should be there.
const REDIAL: [Duration; 6] = [
    Duration::from_millis(5),
    Duration::from_millis(20),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_secs(1),
];
/// Between attempts to wake an actor.
const REWAKE: Duration = Duration::from_millis(250);

/// Where an actor runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Awake {
    /// Of its assignment.
    pub generation: u64,
    /// The worker's ingress.
    pub endpoint: String,
}

/// What a session needs to know of its actor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum View {
    /// Boots for the first time, or after a stop.
    Starting,
    /// Runs.
    Awake(Awake),
    /// Sleeps by itself, is about to, or wakes up.
    Asleep,
    /// Stopped by its user: no session until it is started.
    Stopped,
    /// Ended or crashed.
    Ended,
}

/// Wakes the actor of that uid.
pub type Waker = Arc<dyn Fn(String) -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// Is shown what the gateway answers to `GetSandboxConfig` of the actor with that uid, before the supervisor is. The answer
/// is not passed on while this fails: the supervisor asks again.
pub type Inspector = Arc<dyn Fn(String, Bytes) -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// What the gateway has shown of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shown {
    /// It accepted a session.
    Accepted,
    /// It has no such sandbox.
    Unknown,
    /// It does not take the sandbox's token, with what it said.
    Refused(String),
}

/// Is told what the gateway has shown of the actor with that uid.
pub type Witness = Arc<dyn Fn(&str, Shown) + Send + Sync>;

/// What the hub is made with.
#[derive(Clone)]
pub struct Config {
    /// Every sandbox's key comes from this.
    pub master_key: Vec<u8>,
    /// Where what has to outlive the hub is kept.
    pub memory: PathBuf,
    /// The gateway: `http://host:port` or `https://host:port`.
    pub gateway: String,
    /// Connects to it.
    pub connector: Connector,
    /// Wakes actors.
    pub waker: Waker,
    /// Sees policies.
    pub inspector: Inspector,
    /// Hears what the gateway shows of sandboxes.
    pub witness: Witness,
}

/// A handle on the hub; cheap to clone.
#[derive(Clone)]
pub struct Hub {
    config: Arc<Config>,
    sessions: Arc<Mutex<HashMap<String, Entry>>>,
    shutdown: CancellationToken,
    runtime: Handle,
}

struct Entry {
    view: watch::Sender<View>,
    end: CancellationToken,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

/// What the tasks of one session share.
pub(crate) struct Session {
    pub(crate) uid: String,
    pub(crate) key: SessionKey,
    pub(crate) mux: Mux,
    pub(crate) gateway: Gateway,
    pub(crate) view: watch::Receiver<View>,
    /// Relays that wait for their stream or have one.
    pub(crate) relays: watch::Sender<usize>,
    pub(crate) memory: Memory,
    pub(crate) inspector: Inspector,
    pub(crate) witness: Witness,
    pub(crate) tokens: token::Tokens,
    /// The image has no shell, as far as the shim has said.
    pub(crate) lacks_shell: AtomicBool,
    waker: Waker,
}

impl Hub {
    /// No sessions yet; all of them, and the hub's thread, end with `shutdown`.
    ///
    /// # Errors
    /// When there is no thread or runtime to be had.
    pub fn new(config: Config, shutdown: CancellationToken) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let end = shutdown.clone();
        std::thread::Builder::new()
            .name("session-hub".to_owned())
            .spawn(move || runtime.block_on(end.cancelled_owned()))?;
        Ok(Self { config: Arc::new(config), sessions: Arc::default(), shutdown, runtime: handle })
    }

    /// An actor with a supervisor is seen like this now.
    pub fn update(&self, uid: &str, view: View) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = sessions.get(uid) {
            entry.view.send_if_modified(|now| {
                let changed = *now != view;
                *now = view;
                changed
            });
            return;
        }
        let (sender, receiver) = watch::channel(view);
        let end = self.shutdown.child_token();
        self.start(uid, receiver, &end);
        sessions.insert(uid.to_owned(), Entry { view: sender, end });
        metrics::sessions(sessions.len());
    }

    fn memory(&self) -> Memory {
        Memory::new(&self.config.memory, &self.config.master_key)
    }

    /// An actor is gone.
    pub fn gone(&self, uid: &str) {
        self.memory().forget(uid);
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.remove(uid);
        metrics::sessions(sessions.len());
    }

    /// How many sessions there are.
    pub fn len(&self) -> usize {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn start(&self, uid: &str, view: watch::Receiver<View>, end: &CancellationToken) {
        let config = &self.config;
        let _within = self.runtime.enter();
        let (mux, opened) = Mux::answerer();
        let session = Arc::new(Session {
            uid: uid.to_owned(),
            key: SessionKey::new(&SessionKey::derive(&config.master_key, uid)),
            mux,
            gateway: Gateway::new(Arc::clone(&config.connector), config.gateway.clone()),
            view,
            relays: watch::channel(0).0,
            memory: self.memory(),
            inspector: Arc::clone(&config.inspector),
            witness: Arc::clone(&config.witness),
            tokens: token::Tokens::default(),
            lacks_shell: AtomicBool::new(false),
            waker: Arc::clone(&config.waker),
        });
        let spawn = |task: BoxFuture<'static, ()>| {
            let end = end.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = end.cancelled() => {}
                    () = task => {}
                }
            });
        };
        spawn(Box::pin(connecting(Arc::clone(&session))));
        spawn(Box::pin(waking(Arc::clone(&session))));
        spawn(Box::pin(holding(Arc::clone(&session))));
        spawn(Box::pin(control::run(session, opened, end.clone())));
    }
}

/// Waits until the actor is awake; none when it is gone.
async fn awake(view: &mut watch::Receiver<View>) -> Option<Awake> {
    let found = view.wait_for(|view| matches!(view, View::Awake(_))).await.ok()?;
    match &*found {
        View::Awake(awake) => Some(awake.clone()),
        _ => None,
    }
}

async fn connecting(session: Arc<Session>) {
    let mut view = session.view.clone();
    let mut connected = session.mux.connected();
    let mut failures = 0;
    while let Some(target) = awake(&mut view).await {
        session.mux.detach();
        let lacks_shell = |lacks: bool| session.lacks_shell.store(lacks, Ordering::Relaxed);
        match dial::attach(&session.uid, &target, &session.key, &session.mux, lacks_shell).await {
            Ok(mut lease) => {
                failures = 0;
                tracing::debug!(actor = session.uid, generation = target.generation, "connected to the shim");
                // A connection whose actor went elsewhere ends by itself: the slot cuts it.
                tokio::select! {
                    lost = connected.wait_for(|connected| !connected) => if lost.is_err() { return },
                    // Says nothing; ends with the worker.
                    _ = tokio::io::AsyncReadExt::read_u8(&mut lease) => session.mux.detach(),
                }
            }
            Err(error) => {
                let pause = REDIAL[failures.min(REDIAL.len() - 1)];
                if failures == REDIAL.len() {
                    tracing::warn!(actor = session.uid, generation = target.generation, %error, "cannot reach the sandbox's shim");
                }
                failures += 1;
                tracing::debug!(actor = session.uid, generation = target.generation, %error, "dialling again");
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    changed = view.changed() => if changed.is_err() { return } else { failures = 0 },
                }
            }
        }
    }
}

async fn waking(session: Arc<Session>) {
    let mut view = session.view.clone();
    let mut relays = session.relays.subscribe();
    loop {
        if relays.wait_for(|relays| *relays > 0).await.is_err() {
            return;
        }
        if *view.borrow_and_update() != View::Asleep {
            tokio::select! {
                changed = view.changed() => if changed.is_err() { return },
                changed = relays.changed() => if changed.is_err() { return },
            }
            continue;
        }
        match (session.waker)(session.uid.clone()).await {
            // The watch may be a moment behind.
            Ok(()) => {
                metrics::wake(true);
                let up = view.wait_for(|view| *view != View::Asleep);
                if matches!(tokio::time::timeout(REWAKE, up).await, Ok(Err(_))) {
                    return;
                }
            }
            Err(error) => {
                metrics::wake(false);
                tracing::warn!(actor = session.uid, error, "cannot wake a sandbox that is asked for");
                tokio::time::sleep(REWAKE).await;
            }
        }
    }
}

async fn holding(session: Arc<Session>) {
    let mut view = session.view.clone();
    let mut relays = session.relays.subscribe();
    loop {
        if relays.wait_for(|relays| *relays > 0).await.is_err() {
            return;
        }
        let Some(target) = awake(&mut view).await else { return };
        match dial::hold(&session.uid, &target).await {
            Ok(mut held) => {
                tokio::select! {
                    done = relays.wait_for(|relays| *relays == 0) => if done.is_err() { return },
                    // Says nothing; ends when the actor's connections are cut.
                    _ = tokio::io::AsyncReadExt::read_u8(&mut held) => {}
                }
            }
            Err(error) => {
                tracing::debug!(actor = session.uid, %error, "cannot hold the actor awake yet");
                tokio::time::sleep(REDIAL[3]).await;
            }
        }
    }
}
