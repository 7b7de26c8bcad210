// SPDX-License-Identifier: Apache-2.0
//! One watch of the control plane for all watchers of the driver.
//!
//! A single task owns the [`Mirror`], the control plane's watch and the subscribers. Because it alone changes them, a
//! subscriber gets the snapshot and every change after it with no gap between: it is registered in the same step in
//! which the snapshot is taken. Subscribers wait until the mirror is complete; while the control plane is away they
//! stay connected and are healed by the snapshot that follows the reconnect. There is no polling.
//!
//! ```text
//! Opening ──ok──▶ Live (snapshot arrives ─bookmark─▶ complete) ──end or error──▶ Waiting ──timer──▶ Opening
//! ```
//!
//! A subscriber that does not read is cut off once its queue is full, and finds everything again when it reconnects;
//! platform events are dropped before that. Warnings that nobody was there for are kept for the next one.
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{Stream, StreamExt as _, stream};
use substrate_proto::ateapi::WatchResponse;
use substrate_proto::compute::{WatchSandboxesEvent, watch_sandboxes_event::Payload};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Sleep;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::control::Control;
use crate::failure::Failure;
use crate::mirror::Mirror;
use crate::session::Sessions;

const QUEUE: usize = 8192;
/// Places in a queue that platform events may not take.
const KEPT_FOR_STATE: usize = 4096;
/// Warnings kept while nobody watches.
const KEPT_WARNINGS: usize = 256;
const SUBSCRIBE_WAIT: Duration = Duration::from_secs(5);

/// Events for one watcher: a full snapshot, then changes.
pub type Events = Pin<Box<dyn Stream<Item = WatchSandboxesEvent> + Send>>;

enum Command {
    Subscribe(oneshot::Sender<Events>),
    Tell(Box<WatchSandboxesEvent>),
    Gone { uid: String, sandbox_id: String },
}

/// A handle on the task.
#[derive(Clone)]
pub struct Hub {
    commands: mpsc::Sender<Command>,
    trouble: watch::Receiver<Option<Arc<str>>>,
    endpoint: Arc<str>,
}

impl Hub {
    /// Makes the handle and the task to be spawned. Uids whose first boot failed go to `boots`, what
    /// sessions have to know to `sessions`.
    pub fn new(
        control: Control,
        boots: mpsc::UnboundedSender<String>,
        sessions: Option<Sessions>,
        shutdown: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (commands, received) = mpsc::channel(256);
        let (trouble_sender, trouble) = watch::channel(None);
        let hub = Self { commands, trouble, endpoint: control.endpoint().into() };
        let task = Task {
            upstream: Upstream::open(&control),
            control,
            boots,
            sessions,
            mirror: Mirror::default(),
            complete: false,
            subscribers: Vec::new(),
            waiting: Vec::new(),
            unheard: VecDeque::new(),
            backoff: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
            trouble: trouble_sender,
        };
        (hub, task.run(received, shutdown))
    }

    /// Everything known now, then every change.
    pub async fn subscribe(&self) -> Result<Events, Failure> {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.commands.send(Command::Subscribe(reply)).await.ok()?;
            answer.await.ok()
        };
        match tokio::time::timeout(SUBSCRIBE_WAIT, asked).await {
            Ok(Some(events)) => Ok(events),
            Ok(None) => Err(Failure::Precondition("the driver is shutting down".to_owned())),
            Err(_) => Err(Failure::Unreachable {
                doing: "watch sandboxes".to_owned(),
                endpoint: self.endpoint.to_string(),
                cause: self
                    .trouble
                    .borrow()
                    .as_deref()
                    .unwrap_or("its first answer is not complete yet")
                    .to_owned(),
            }),
        }
    }

    /// Sends an event to every watcher.
    pub async fn tell(&self, event: WatchSandboxesEvent) {
        self.command(Command::Tell(Box::new(event))).await;
    }

    /// Tells every watcher that a sandbox is gone, without waiting for the control plane's word.
    pub async fn gone(&self, uid: &str, sandbox_id: &str) {
        self.command(Command::Gone { uid: uid.to_owned(), sandbox_id: sandbox_id.to_owned() }).await;
    }

    async fn command(&self, command: Command) {
        if self.commands.send(command).await.is_err() {
            tracing::debug!("an event found no hub: the driver is shutting down");
        }
    }
}

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

enum Upstream {
    Opening(BoxFuture<'static, Result<tonic::Streaming<WatchResponse>, Failure>>),
    Live(Box<tonic::Streaming<WatchResponse>>),
    Waiting(Pin<Box<Sleep>>),
}

enum Signal {
    Opened(Box<tonic::Streaming<WatchResponse>>),
    Change(Box<WatchResponse>),
    Lost(String),
    Retry,
}

impl Upstream {
    fn open(control: &Control) -> Self {
        let control = control.clone();
        Self::Opening(Box::pin(async move { control.watch().await }))
    }

    /// The next thing that happens; may be dropped before it does.
    async fn next(&mut self) -> Signal {
        match self {
            Self::Opening(opening) => match opening.await {
                Ok(stream) => Signal::Opened(Box::new(stream)),
                Err(Failure::Unreachable { cause, .. }) => Signal::Lost(cause),
                Err(failure) => Signal::Lost(failure.to_string()),
            },
            Self::Live(stream) => match stream.message().await {
                Ok(Some(change)) => Signal::Change(Box::new(change)),
                Ok(None) => Signal::Lost("the control plane ended the watch".to_owned()),
                Err(status) => Signal::Lost(status.message().to_owned()),
            },
            Self::Waiting(timer) => {
                timer.await;
                Signal::Retry
            }
        }
    }
}

struct Task {
    control: Control,
    boots: mpsc::UnboundedSender<String>,
    sessions: Option<Sessions>,
    upstream: Upstream,
    mirror: Mirror,
    complete: bool,
    subscribers: Vec<mpsc::Sender<WatchSandboxesEvent>>,
    waiting: Vec<oneshot::Sender<Events>>,
    /// Warnings that nobody was there for.
    unheard: VecDeque<WatchSandboxesEvent>,
    backoff: Backoff,
    trouble: watch::Sender<Option<Arc<str>>>,
}

impl Task {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                command = commands.recv() => match command {
                    Some(command) => self.command(command),
                    None => return,
                },
                signal = self.upstream.next() => self.signal(signal),
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Subscribe(reply) => {
                self.waiting.retain(|waiting| !waiting.is_closed());
                self.waiting.push(reply);
                self.admit();
                // Somebody waits: no need to sit the pause out.
                if matches!(self.upstream, Upstream::Waiting(_)) {
                    self.upstream = Upstream::open(&self.control);
                }
            }
            Command::Tell(event) => self.send(&event),
            Command::Gone { uid, sandbox_id } => {
                self.mirror.remove(&uid);
                self.send(&crate::mirror::deleted(sandbox_id));
            }
        }
    }

    fn signal(&mut self, signal: Signal) {
        match signal {
            Signal::Opened(stream) => {
                self.mirror.begin_snapshot();
                self.upstream = Upstream::Live(stream);
            }
            Signal::Retry => self.upstream = Upstream::open(&self.control),
            Signal::Lost(reason) => {
                tracing::warn!(endpoint = self.control.endpoint(), %reason, "the watch of the control plane is interrupted");
                self.trouble.send_replace(Some(reason.into()));
                self.complete = false;
                self.upstream = Upstream::Waiting(Box::pin(tokio::time::sleep(self.backoff.pause())));
            }
            Signal::Change(change) => {
                if let Some(sessions) = &self.sessions {
                    sessions.observe(&change);
                }
                let outcome = self.mirror.apply(*change);
                for event in &outcome.events {
                    self.send(event);
                }
                if let Some(uid) = outcome.boot_failed
                    && self.boots.send(uid).is_err()
                {
                    tracing::debug!("nobody looks after boots: the driver is shutting down");
                }
                if outcome.complete {
                    self.complete = true;
                    self.backoff.reset();
                    self.trouble.send_replace(None);
                    self.admit();
                }
            }
        }
    }

    /// Gives those who wait the snapshot and a place among the subscribers, in one step.
    fn admit(&mut self) {
        if !self.complete {
            return;
        }
        for waiting in self.waiting.drain(..) {
            let (sender, changes) = mpsc::channel(QUEUE);
            let mut first = self.mirror.snapshot();
            first.extend(self.unheard.iter().cloned());
            let events: Events = Box::pin(stream::iter(first).chain(ReceiverStream::new(changes)));
            if waiting.send(events).is_ok() {
                self.subscribers.push(sender);
                self.unheard.clear();
            }
        }
    }

    fn send(&mut self, event: &WatchSandboxesEvent) {
        if let Some(sessions) = &self.sessions {
            sessions.follow(event);
        }
        let minor = matches!(event.payload, Some(Payload::PlatformEvent(_)));
        let warns = matches!(&event.payload, Some(Payload::PlatformEvent(told))
            if told.event.as_ref().is_some_and(|event| event.r#type == "Warning"));
        self.subscribers.retain(|subscriber| {
            if minor && subscriber.capacity() < KEPT_FOR_STATE {
                return !subscriber.is_closed();
            }
            match subscriber.try_send(event.clone()) {
                Ok(()) => true,
                Err(mpsc::error::TrySendError::Closed(_)) => false,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    tracing::warn!("a watcher does not read its events and is cut off");
                    false
                }
            }
        });
        if warns && self.subscribers.is_empty() {
            if self.unheard.len() == KEPT_WARNINGS {
                self.unheard.pop_front();
            }
            self.unheard.push_back(event.clone());
        }
    }
}
