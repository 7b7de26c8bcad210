// SPDX-License-Identifier: Apache-2.0
//! The conversation that makes a sandbox Ready, `ConnectSupervisor`, ends in the hub on both sides.
//!
//! The *front* is the supervisor's stream, the *leg* is ours to the gateway. The leg lives as long as the gateway is to
//! see a session: from the first Hello of a supervisor until the sandbox is stopped or ends, whether the supervisor is
//! connected, asleep, moving, or dialling again.
//!
//! ```text
//!              Hello of another instance
//!          ┌──────────────────────────────┐
//!          ▼                              │
//! none ─Hello─▶ opening ─accepted─▶ open ─┴─ same Hello: the front is told what the leg was told
//!                 ▲  │                │
//!                 │  └─refused─▶ front ends, none
//!                 └────lost, after a pause (the front does not notice)
//! stopped or ended: the leg is dropped; started again: opening, with the last Hello
//! ```
//!
//! Messages pass as the bytes they came as. Of the gateway's, heartbeats go no further while the sandbox is not
//! connected, and a RelayOpen makes the session wake its actor and hold it until the relay's stream has come and gone.
//! A command may find its stream there already ([`super::spare`]).
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use substrate_proto::session::Head;
use substrate_proto::session::stream_frame::Frame;
use substrate_proto::supervisor::{
    GatewayMessage, RelayOpen, RelayOpenResult, SupervisorMessage, gateway_message, relay_open,
    supervisor_message,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::forward::{Begun, forward};
use super::leg::leg;
use super::spare::{self, Relay, Spare};
use super::{Session, Shown, View, metrics, token};
use crate::grpc::{self, Deframer, Framed};
use crate::mux::{Opened, Receiver, Said, Sender, code};

const CONNECT_SUPERVISOR: &str = "/openshell.v1.OpenShell/ConnectSupervisor";
const RELAY_STREAM: &str = "/openshell.v1.OpenShell/RelayStream";
/// How long a relay may wait for its stream: the gateway's own limit (10 s) and some more.
const RELAY_LIMIT: Duration = Duration::from_secs(15);
const GET_CONFIG: &str = "/openshell.v1.OpenShell/GetSandboxConfig";
const REOPEN: [Duration; 5] = [
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
];
/// Statuses with which the gateway says that this session is not to be (unauthenticated, denied, unknown, invalid).
const REFUSALS: [u32; 5] = [3, 5, 7, 12, 16];
/// How long nothing else has to go on before a relay is made ready for the next command: not while the last one's end is
/// on its way.
const QUIET: Duration = Duration::from_millis(20);
/// How long a supervisor that gave none when it was asked is not asked again: a command may have waited for it.
const NO_SPARE: Duration = Duration::from_mins(10);
const QUEUE: usize = 64;
/// What who asks for a command is told where none can be run.
const NO_SHELL: &str = "no command can be run in this sandbox: its image has no /bin/bash, with which OpenShell's \
     supervisor runs every command; add bash to the image";

/// What looks at an answer; for calls where nothing does.
type Inspect = fn(Bytes) -> BoxFuture<'static, Result<(), String>>;

pub(super) enum Event {
    FrontSaid(u64, Framed),
    FrontEnded(u64),
    LegSaid(u64, Framed),
    /// With the gateway's status.
    LegEnded(u64, u32, String),
    /// The supervisor opened a relay's stream.
    RelayCame(Relay),
    RelayEnded,
    SpareGreets(String),
    /// Unused.
    SpareEnded(String),
    /// The sandbox's token was renewed, there or here.
    TokenRenewed,
}

struct Front {
    number: u64,
    sender: Sender,
    /// The supervisor's metadata, with its token.
    head: Head,
    accepted: bool,
    _reading: AbortOnDropHandle<()>,
}

struct Leg {
    number: u64,
    head: Head,
    hello: Framed,
    accepted: Option<Framed>,
    open: Option<metrics::Open>,
    to_gateway: mpsc::Sender<Framed>,
    _task: AbortOnDropHandle<()>,
}

struct Waiting {
    open: Framed,
    asked: Instant,
    from: &'static str,
    until: Instant,
    /// It is for the supervisor's own server of commands.
    runs_command: bool,
    /// What a spare has to be asked for to do for it.
    command: Option<RelayOpen>,
    /// The supervisor knows.
    is_told: bool,
}

struct Control {
    session: Arc<Session>,
    events: mpsc::Sender<Event>,
    end: CancellationToken,
    count: u64,
    front: Option<Front>,
    leg: Option<Leg>,
    /// The last Hello, and the metadata it came with.
    hello: Option<(Head, Framed)>,
    failures: usize,
    reopen_at: Option<Instant>,
    /// Relays whose stream has not come yet, by channel.
    waiting: BTreeMap<String, Waiting>,
    /// Streams of relays.
    live: usize,
    spare: Option<Spare>,
    /// When to ask for one.
    spare_at: Option<Instant>,
    /// This supervisor was asked for one in vain; when to try again.
    no_spare_before: Option<Instant>,
    /// What the last command asked for.
    last_command: Option<RelayOpen>,
}

/// Runs a session's conversation until the actor is gone.
pub(crate) async fn run(
    session: Arc<Session>,
    mut opened: mpsc::UnboundedReceiver<Opened>,
    end: CancellationToken,
) {
    let (events, mut received) = mpsc::channel(QUEUE);
    let mut view = session.view.clone();
    let mut connected = session.mux.connected();
    let hello = session.memory.recall(&session.uid).unwrap_or_else(|error| {
        tracing::warn!(actor = session.uid, %error, "cannot read what was kept of a session; it begins anew");
        None
    });
    let hello = hello.map(|(head, hello)| (session.tokens.recalled(head), hello));
    let renewed = events.clone();
    let renewing = token::renewing(Arc::clone(&session), move || {
        // Only for remembering it: the next renewal will do too.
        if renewed.try_send(Event::TokenRenewed).is_err() {
            tracing::debug!("too busy to note that a token was renewed");
        }
    });
    let _renewing = AbortOnDropHandle::new(tokio::spawn(renewing));
    let mut control = Control {
        session,
        events,
        end,
        count: 0,
        front: None,
        leg: None,
        hello,
        failures: 0,
        reopen_at: None,
        waiting: BTreeMap::new(),
        live: 0,
        spare: None,
        spare_at: None,
        no_spare_before: None,
        last_command: None,
    };
    loop {
        control.settle();
        let timer = control.next_time();
        tokio::select! {
            stream = opened.recv() => match stream {
                Some(stream) => control.opened(stream),
                None => return,
            },
            event = received.recv() => if let Some(event) = event { control.event(event) },
            changed = view.changed() => if changed.is_err() { return },
            changed = connected.changed() => if changed.is_err() { return },
            () = sleep_until(timer) => {}
        }
    }
}

async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

impl Control {
    /// Whether the gateway is to see a session.
    fn is_wanted(&self) -> bool {
        let view = self.session.view.borrow().clone();
        self.hello.is_some() && matches!(view, View::Awake(_) | View::Asleep)
    }

    fn next_time(&self) -> Option<Instant> {
        let spare = self.spare.as_ref().and_then(Spare::until);
        self.waiting
            .values()
            .map(|waiting| waiting.until)
            .chain(self.reopen_at)
            .chain(spare)
            .chain(self.spare_at)
            .min()
    }

    /// Brings leg and relays in line with what is wanted now.
    fn settle(&mut self) {
        let now = Instant::now();
        self.waiting.retain(|channel, waiting| {
            let keep = waiting.until > now;
            if !keep {
                metrics::relay(waiting.from, None);
                tracing::info!(channel, "a relay's stream did not come in time");
            }
            keep
        });
        let generation = self.generation();
        self.spare.take_if(|spare| !spare.is_of(generation));
        if self.spare.take_if(|spare| spare.until().is_some_and(|until| until <= now)).is_some() {
            self.no_spare_before = Some(now + NO_SPARE);
        }
        if self.is_wanted() {
            self.tell_of_relays();
            if self.leg.is_none() && self.reopen_at.is_none_or(|at| at <= now) {
                self.reopen_at = None;
                self.open_leg();
            }
        } else {
            if self.leg.take().is_some_and(|leg| leg.open.is_some()) {
                metrics::leg("closed");
                tracing::debug!(actor = self.session.uid, "the session ends with its sandbox");
            }
            self.reopen_at = None;
            self.failures = 0;
            self.waiting.clear();
        }
        if self.spare_at.take_if(|at| *at <= now).is_some() {
            self.ask_for_spare();
        }
        self.count_relays();
    }

    /// Tells the supervisor of relays that wait. Not before its shim is there, which says whether commands can be run
    /// at all.
    fn tell_of_relays(&mut self) {
        if !*self.session.mux.connected().borrow() {
            return;
        }
        if self.session.lacks_shell.load(Ordering::Relaxed) {
            self.refuse_commands();
        }
        if !self.front.as_ref().is_some_and(|front| front.accepted) {
            return;
        }
        let spared = self.use_spare();
        let untold = self.waiting.iter_mut().filter(|(channel, _)| Some(*channel) != spared.as_ref());
        let untold = untold.map(|(_, waiting)| waiting).filter(|waiting| !waiting.is_told);
        let opens: Vec<Framed> = untold
            .map(|waiting| {
                waiting.is_told = true;
                waiting.open.clone()
            })
            .collect();
        for open in opens {
            self.tell_front(&open);
        }
    }

    /// Of the assignment of the actor, while it is awake.
    fn generation(&self) -> Option<u64> {
        match &*self.session.view.borrow() {
            View::Awake(awake) => Some(awake.generation),
            _ => None,
        }
    }

    /// Gives the spare to the command that waits longest, or has that wait for it: its channel then.
    fn use_spare(&mut self) -> Option<String> {
        let spare = self.spare.as_ref()?;
        let untold = self.waiting.iter().filter(|(_, waiting)| !waiting.is_told);
        let fit =
            untold.filter(|(_, waiting)| waiting.command.as_ref().is_some_and(|like| spare.is_for(like)));
        let channel = fit.min_by_key(|(_, waiting)| waiting.asked)?.0.clone();
        if !spare.stands() {
            return Some(channel);
        }
        let spare = self.spare.take()?;
        let known_as = spare.channel.clone();
        if spare.use_for(channel.clone()) {
            tracing::debug!(
                actor = self.session.uid,
                channel,
                known_as,
                "a command gets the relay in reserve"
            );
            self.relay_opened(&channel, "spare");
            let result = RelayOpenResult { channel_id: channel, success: true, error: String::new() };
            self.to_gateway(Framed::new(&SupervisorMessage {
                payload: Some(supervisor_message::Payload::RelayOpenResult(result)),
            }));
        }
        None
    }

    /// Has a relay ready for the next command, once nothing else goes on.
    fn ask_for_spare(&mut self) {
        let is_quiet = self.waiting.is_empty() && self.live == 0;
        let is_there = self.front.as_ref().is_some_and(|front| front.accepted)
            && *self.session.mux.connected().borrow()
            && !self.session.lacks_shell.load(Ordering::Relaxed);
        let (Some(like), Some(generation)) = (&self.last_command, self.generation()) else { return };
        let may_come = self.no_spare_before.is_none_or(|time| time <= Instant::now());
        if is_quiet && is_there && may_come && self.spare.is_none() {
            self.count += 1;
            let (spare, message) = Spare::ask(self.count, like.clone(), generation);
            self.spare = Some(spare);
            self.tell_front(&message);
        }
    }

    fn spare_ended(&mut self, channel: &str) {
        if let Some(spare) = self.spare.take_if(|spare| spare.is(channel))
            && !spare.stands()
        {
            self.no_spare_before = Some(Instant::now() + NO_SPARE);
        }
    }

    fn relay_opened(&mut self, channel: &str, from: &'static str) {
        self.live += 1;
        if let Some(waiting) = self.waiting.remove(channel) {
            metrics::relay(from, Some(waiting.asked.elapsed()));
        }
    }

    /// Answers who waits for a command at once: the supervisor would leave them waiting.
    fn refuse_commands(&mut self) {
        let commands = self.waiting.extract_if(.., |_, waiting| waiting.runs_command);
        let refused: Vec<String> = commands.map(|(channel, _)| channel).collect();
        for channel_id in refused {
            tracing::info!(
                actor = self.session.uid,
                channel_id,
                "a command is refused: the image has no shell"
            );
            let result = RelayOpenResult { channel_id, success: false, error: NO_SHELL.to_owned() };
            let payload = Some(supervisor_message::Payload::RelayOpenResult(result));
            self.to_gateway(Framed::new(&SupervisorMessage { payload }));
        }
    }

    fn count_relays(&self) {
        let relays = self.waiting.len() + self.live;
        self.session.relays.send_if_modified(|now| std::mem::replace(now, relays) != relays);
    }

    fn opened(&mut self, mut opened: Opened) {
        opened.head = self.session.tokens.renew(opened.head);
        match opened.head.path.as_str() {
            CONNECT_SUPERVISOR => self.front_opened(opened),
            RELAY_STREAM => {
                let events = self.events.clone();
                self.spawn(async move {
                    if let Some(relay) = Relay::read(opened).await {
                        // The session may be over.
                        let _ = events.send(Event::RelayCame(relay)).await;
                    }
                });
            }
            _ => self.carry(opened),
        }
    }

    fn relay_came(&mut self, mut relay: Relay) {
        let (session, ended) = (Arc::clone(&self.session), self.events.clone());
        if !spare::is_spare(&relay.channel) {
            let from = self.waiting.get(&relay.channel).map_or("awake", |waiting| waiting.from);
            self.relay_opened(&relay.channel, from);
            return self.spawn(async move {
                let begun = Begun { first: relay.begin(), is_answered: false };
                forward(relay.opened, begun, &session.gateway, None::<Inspect>).await;
                // The session may be over.
                let _ = ended.send(Event::RelayEnded).await;
            });
        }
        let spare = self.spare.as_mut().filter(|spare| spare.is(&relay.channel));
        // One that is not wanted any more finds its claim given up.
        let claim = spare.and_then(Spare::came).unwrap_or_else(|| oneshot::channel().1);
        self.spawn(async move {
            let channel = relay.channel.clone();
            let greets = async || {
                // The session may be over.
                let _ = ended.send(Event::SpareGreets(channel.clone())).await;
            };
            let event = match relay.stand(claim, greets).await {
                Some(mut relay) => {
                    relay.opened.head = session.tokens.renew(relay.opened.head);
                    let begun = Begun { first: relay.begin(), is_answered: true };
                    forward(relay.opened, begun, &session.gateway, None::<Inspect>).await;
                    Event::RelayEnded
                }
                None => Event::SpareEnded(channel),
            };
            // The session may be over.
            let _ = ended.send(event).await;
        });
    }

    /// Runs until it or the session ends.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let end = self.end.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = end.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// Carries a call that is no part of the conversation.
    fn carry(&self, opened: Opened) {
        let (session, events) = (Arc::clone(&self.session), self.events.clone());
        let inspects = opened.head.path == GET_CONFIG;
        let refreshes = opened.head.path == token::REFRESH;
        self.spawn(async move {
            let inspect = (inspects || refreshes).then(|| {
                let session = Arc::clone(&session);
                move |answer: Bytes| {
                    if inspects {
                        return (session.inspector)(session.uid.clone(), answer);
                    }
                    session.tokens.answered(&answer);
                    let told = async move {
                        // The session may be over.
                        let _ = events.send(Event::TokenRenewed).await;
                        Ok(())
                    };
                    Box::pin(told) as BoxFuture<'static, Result<(), String>>
                }
            });
            forward(opened, Begun::default(), &session.gateway, inspect).await;
        });
    }

    fn front_opened(&mut self, opened: Opened) {
        (self.spare, self.spare_at, self.no_spare_before) = (None, None, None);
        self.count += 1;
        let number = self.count;
        let reading = read_front(number, opened.stream.receiver, self.events.clone());
        self.front = Some(Front {
            number,
            sender: opened.stream.sender,
            head: opened.head,
            accepted: false,
            _reading: AbortOnDropHandle::new(tokio::spawn(reading)),
        });
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::FrontSaid(number, message) => {
                if self.front.as_ref().is_some_and(|front| front.number == number) {
                    self.front_said(message);
                }
            }
            Event::FrontEnded(number) => {
                if self.front.as_ref().is_some_and(|front| front.number == number) {
                    self.front = None;
                }
            }
            Event::LegSaid(number, message) => {
                if self.leg.as_ref().is_some_and(|leg| leg.number == number) {
                    self.leg_said(message);
                }
            }
            Event::LegEnded(number, status, message) => {
                if self.leg.as_ref().is_some_and(|leg| leg.number == number) {
                    self.leg_ended(status, &message);
                }
            }
            Event::RelayCame(relay) => self.relay_came(relay),
            Event::TokenRenewed => self.remember(),
            Event::RelayEnded => {
                self.live = self.live.saturating_sub(1);
                self.spare_at = Some(Instant::now() + QUIET);
            }
            Event::SpareGreets(channel) => {
                self.spare =
                    self.spare.take().map(|spare| if spare.is(&channel) { spare.greets() } else { spare });
            }
            Event::SpareEnded(channel) => self.spare_ended(&channel),
        }
    }

    fn front_said(&mut self, message: Framed) {
        let read = message.read::<SupervisorMessage>().and_then(|message| message.payload);
        match read {
            Some(supervisor_message::Payload::Hello(_)) => {
                let Some(front) = &self.front else { return };
                let hello = (front.head.clone(), message.clone());
                if self.hello.as_ref() != Some(&hello) {
                    self.hello = Some(hello);
                    self.remember();
                }
                if self.leg.as_ref().is_some_and(|leg| leg.hello != message) {
                    tracing::debug!(actor = self.session.uid, "another instance of the supervisor is there");
                    self.leg = None;
                }
                self.reopen_at = None;
                self.accept_front();
            }
            Some(supervisor_message::Payload::RelayOpenResult(result)) => {
                if spare::is_spare(&result.channel_id) {
                    if !result.success {
                        self.spare_ended(&result.channel_id);
                    }
                    return;
                }
                if !result.success {
                    self.waiting.remove(&result.channel_id);
                }
                self.to_gateway(message);
            }
            _ => self.to_gateway(message),
        }
    }

    /// Keeps the session over a restart of the hub.
    fn remember(&self) {
        let Some((head, hello)) = &self.hello else { return };
        let head = self.session.tokens.remembered(head);
        if let Err(error) = self.session.memory.keep(&self.session.uid, &head, hello) {
            tracing::warn!(actor = self.session.uid, %error, "cannot keep a session over a restart of the hub");
        }
    }

    /// What the supervisor says beside its Hello is about the session as it is now; without one it has no meaning.
    fn to_gateway(&self, message: Framed) {
        if let Some(leg) = &self.leg
            && leg.to_gateway.try_send(message).is_err()
        {
            tracing::debug!(
                actor = self.session.uid,
                "the gateway does not read; a message of the supervisor is left out"
            );
        }
    }

    /// Tells the front what the leg was told.
    fn accept_front(&mut self) {
        let Some(accepted) = self.leg.as_ref().and_then(|leg| leg.accepted.clone()) else { return };
        let Some(front) = self.front.as_mut().filter(|front| !front.accepted) else { return };
        front.accepted = true;
        let said = front.sender.say(Frame::Headers(grpc::answer_head()));
        if said.is_err() || front.sender.offer(&accepted.raw).is_err() {
            self.give_front_up();
        }
        // A supervisor that is new here knows of none.
        for waiting in self.waiting.values_mut() {
            waiting.is_told = false;
        }
    }

    fn tell_front(&mut self, message: &Framed) {
        if let Some(front) = self.front.as_ref().filter(|front| front.accepted)
            && front.sender.offer(&message.raw).is_err()
        {
            self.give_front_up();
        }
    }

    /// The supervisor does not read, or is gone: it says Hello again.
    fn give_front_up(&mut self) {
        if let Some(front) = self.front.take() {
            front.sender.reset(code::UNAVAILABLE, "the session's messages were not read");
        }
    }

    fn leg_said(&mut self, message: Framed) {
        use gateway_message::Payload;
        match message.read::<GatewayMessage>().and_then(|message| message.payload) {
            Some(Payload::SessionAccepted(_)) => {
                if let Some(leg) = &mut self.leg {
                    leg.accepted = Some(message);
                    leg.open.get_or_insert_with(metrics::Open::begin);
                    self.session.tokens.accepted(&leg.head);
                }
                self.remember();
                self.failures = 0;
                tracing::info!(actor = self.session.uid, "the gateway has a session with the sandbox");
                (self.session.witness)(&self.session.uid, Shown::Accepted);
                self.accept_front();
            }
            Some(Payload::SessionRejected(rejected)) => self.leg_ended(REFUSALS[2], &rejected.reason),
            Some(Payload::Heartbeat(_)) => {
                if *self.session.mux.connected().borrow() {
                    self.tell_front(&message);
                }
            }
            Some(Payload::RelayOpen(open)) => {
                tracing::debug!(actor = self.session.uid, channel = open.channel_id, "a relay is asked for");
                let asked = Instant::now();
                let until = asked + RELAY_LIMIT;
                let asleep = *self.session.view.borrow() == View::Asleep;
                let from = if asleep { "asleep" } else { "awake" };
                // Without a target it is a command.
                let runs_command = !matches!(open.target, Some(relay_open::Target::Tcp(_)));
                let is_told = false;
                let command = spare::command(&message, &open);
                self.last_command = command.clone().or(self.last_command.take());
                let waiting = Waiting { open: message, asked, from, until, runs_command, command, is_told };
                // The gateway repeats what waits to each new session; the supervisor hears it once.
                self.waiting.entry(open.channel_id).or_insert(waiting);
            }
            Some(Payload::RelayClose(close)) => {
                self.waiting.remove(&close.channel_id);
                self.tell_front(&message);
            }
            // Of a later version.
            None => self.tell_front(&message),
        }
    }

    fn leg_ended(&mut self, status: u32, message: &str) {
        let was_open = self.leg.take().is_some_and(|leg| leg.open.is_some());
        let refused = REFUSALS.contains(&status);
        metrics::leg(match (refused, was_open) {
            (true, _) => "refused",
            (false, true) => "lost",
            (false, false) => "failed",
        });
        if refused {
            tracing::warn!(
                actor = self.session.uid,
                status,
                message,
                "the gateway refuses a session with the sandbox"
            );
            let shown = match status {
                code::NOT_FOUND => Some(Shown::Unknown),
                code::UNAUTHENTICATED => Some(Shown::Refused(message.to_owned())),
                _ => None,
            };
            if let Some(shown) = shown {
                (self.session.witness)(&self.session.uid, shown);
            }
            self.hello = None;
            self.session.memory.forget(&self.session.uid);
            if let Some(front) = self.front.take() {
                // Gone already: it will ask again.
                let _ = front.sender.say(Frame::Trailers(grpc::status(status, message)));
            }
            return;
        }
        let pause = REOPEN[self.failures.min(REOPEN.len() - 1)];
        if self.failures == 0 {
            tracing::info!(
                actor = self.session.uid,
                status,
                message,
                "the session at the gateway ended; opening it again"
            );
        }
        self.failures += 1;
        self.reopen_at = Some(Instant::now() + pause);
    }

    fn open_leg(&mut self) {
        let Some((head, hello)) = self.hello.clone() else { return };
        let head = self.session.tokens.renew(head);
        self.count += 1;
        let number = self.count;
        let (to_gateway, from_front) = mpsc::channel(QUEUE);
        let task = leg(
            number,
            Arc::clone(&self.session),
            head.clone(),
            hello.clone(),
            from_front,
            self.events.clone(),
        );
        self.leg = Some(Leg {
            number,
            head,
            hello,
            accepted: None,
            open: None,
            to_gateway,
            _task: AbortOnDropHandle::new(tokio::spawn(task)),
        });
    }
}

async fn read_front(number: u64, mut receiver: Receiver, events: mpsc::Sender<Event>) {
    let mut deframer = Deframer::default();
    'stream: while let Some(said) = receiver.next().await {
        let Said::Data(data) = said else { break };
        deframer.push(&data);
        loop {
            match deframer.take() {
                Ok(Some(message)) => {
                    if events.send(Event::FrontSaid(number, message)).await.is_err() {
                        return;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "the supervisor's session is not understood");
                    break 'stream;
                }
            }
        }
    }
    // The session may be over.
    let _ = events.send(Event::FrontEnded(number)).await;
}
