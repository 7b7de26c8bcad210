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
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http_body::Frame as BodyFrame;
use http_body_util::BodyExt as _;
use substrate_proto::session::Head;
use substrate_proto::session::stream_frame::Frame;
use substrate_proto::supervisor::{
    GatewayMessage, RelayOpenResult, SupervisorMessage, gateway_message, relay_open, supervisor_message,
};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::forward::forward;
use super::gateway::{Gateway, chain};
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
const QUEUE: usize = 64;
/// What who asks for a command is told where none can be run.
const NO_SHELL: &str = "no command can be run in this sandbox: its image has no /bin/bash, with which OpenShell's \
     supervisor runs every command; add bash to the image";

enum Event {
    FrontSaid(u64, Framed),
    FrontEnded(u64),
    LegSaid(u64, Framed),
    /// With the gateway's status.
    LegEnded(u64, u32, String),
    Claimed(String),
    RelayEnded,
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
        self.waiting.values().map(|waiting| waiting.until).chain(self.reopen_at).min()
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
        let untold = self.waiting.values_mut().filter(|waiting| !waiting.is_told);
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
                self.live += 1;
                let (claim, ended) = (self.events.clone(), self.events.clone());
                self.carry(
                    opened,
                    move |channel| {
                        // Only a hint: without it the wait ends by its limit.
                        if claim.try_send(Event::Claimed(channel)).is_err() {
                            tracing::debug!("too busy to note that a relay's stream has come");
                        }
                    },
                    async move {
                        // The session may be over.
                        let _ = ended.send(Event::RelayEnded).await;
                    },
                );
            }
            _ => self.carry(opened, |_| {}, std::future::ready(())),
        }
    }

    fn carry(
        &self,
        opened: Opened,
        claimed: impl FnOnce(String) + Send + 'static,
        after: impl Future<Output = ()> + Send + 'static,
    ) {
        let (session, end) = (Arc::clone(&self.session), self.end.clone());
        let claimed = (opened.head.path == RELAY_STREAM).then_some(claimed);
        let inspects = opened.head.path == GET_CONFIG;
        let refreshes = opened.head.path == token::REFRESH;
        let events = self.events.clone();
        tokio::spawn(async move {
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
            tokio::select! {
                () = end.cancelled() => {}
                () = forward(opened, &session.gateway, claimed, inspect) => {}
            }
            after.await;
        });
    }

    fn front_opened(&mut self, opened: Opened) {
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
            Event::Claimed(channel) => {
                if let Some(waiting) = self.waiting.remove(&channel) {
                    metrics::relay(waiting.from, Some(waiting.asked.elapsed()));
                }
            }
            Event::TokenRenewed => self.remember(),
            Event::RelayEnded => self.live = self.live.saturating_sub(1),
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
                let waiting = Waiting { open: message, asked, from, until, runs_command, is_told };
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

async fn leg(
    number: u64,
    session: Arc<Session>,
    head: Head,
    hello: Framed,
    from_front: mpsc::Receiver<Framed>,
    events: mpsc::Sender<Event>,
) {
    let (status, message) = converse(number, &session.gateway, &head, hello, from_front, &events).await;
    // The session may be over.
    let _ = events.send(Event::LegEnded(number, status, message)).await;
}

/// Opens the stream at the gateway and reads it to its end; the status it ended with.
async fn converse(
    number: u64,
    gateway: &Gateway,
    head: &Head,
    hello: Framed,
    mut from_front: mpsc::Receiver<Framed>,
    events: &mpsc::Sender<Event>,
) -> (u32, String) {
    let unavailable = |message: String| (code::UNAVAILABLE, message);
    let (upload, answer) = match gateway.call(head).await {
        Ok(call) => call,
        Err(error) => return unavailable(error.to_string()),
    };
    if upload.send(Ok(BodyFrame::data(hello.raw))).await.is_err() {
        return unavailable("the gateway closed the call before the greeting".to_owned());
    }
    let response = match answer.await {
        Ok(response) => response,
        Err(error) => return unavailable(error.to_string()),
    };
    if let Some(status) = grpc::status_of(response.headers()) {
        return status;
    }
    if response.status() != http::StatusCode::OK {
        return unavailable(format!("the gateway answered {}", response.status()));
    }
    let mut body = response.into_body();
    let mut deframer = Deframer::default();
    loop {
        tokio::select! {
            message = from_front.recv() => match message {
                Some(message) => if upload.send(Ok(BodyFrame::data(message.raw))).await.is_err() {
                    return unavailable("the gateway reads no more".to_owned());
                },
                None => return unavailable("given up".to_owned()),
            },
            frame = body.frame() => match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        deframer.push(&data);
                        loop {
                            match deframer.take() {
                                Ok(Some(message)) => if events.send(Event::LegSaid(number, message)).await.is_err() {
                                    return unavailable("given up".to_owned());
                                },
                                Ok(None) => break,
                                Err(error) => return unavailable(error.to_string()),
                            }
                        }
                    }
                    Err(frame) => {
                        let trailers = frame.into_trailers().unwrap_or_default();
                        return grpc::status_of(&trailers).unwrap_or((0, "it ended".to_owned()));
                    }
                },
                Some(Err(error)) => return unavailable(chain(&error)),
                None => return unavailable("it ended".to_owned()),
            },
        }
    }
}
