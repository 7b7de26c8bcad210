// SPDX-License-Identifier: Apache-2.0
//! A relay in reserve, so that a command does not wait until the sandbox has opened one.
//!
//! Before a command begins, the supervisor hears of a relay, connects to its own server of commands, and opens a stream
//! that names the relay. Commands come in rows; so after one the hub asks for such a stream ahead, under a name of its
//! own, and keeps it. The next command gets it at once: to the gateway the hub names the relay that it asked for.
//!
//! ```text
//!  none ──a command ended──▶ asked ──the server greets──▶ standing ──a command──▶ a relay as any other
//!   ▲                          │                             │
//!   │                          └───┬─────────────────────────┘
//!   ├──── asleep, elsewhere, another supervisor; unused for long
//!   └──── refused, silent, late: not again for a while
//! ```
//!
//! It is no relay while nobody has it: it wakes nothing, holds nothing, and the gateway does not know of it.
use std::time::Duration;

use bytes::Bytes;
use substrate_proto::session::stream_frame::Frame;
use substrate_proto::supervisor::{
    GatewayMessage, RelayFrame, RelayInit, RelayOpen, gateway_message, relay_frame, relay_open,
};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::grpc::{self, Deframer, Framed};
use crate::mux::{Opened, Said, code};

/// What the channels of spares begin with; a gateway's are UUIDs.
const PREFIX: &str = "substrate-spare-";
/// How long a command may wait for one that was asked for, rather than ask for its own.
const LATE: Duration = Duration::from_secs(1);
/// How long one is kept that nobody wants. The supervisor's server of commands gives up on a silent client after 10 min
/// (`inactivity_timeout` of russh).
const KEPT: Duration = Duration::from_mins(8);
/// What a relay's stream may say before its channel is known, and a spare's before it is used (a server's greeting), bytes.
const MAX_HEARD: usize = 4096;
/// The identification that a server of commands waits for (RFC 4253, 4.2): without it a connection that ends is an attack
/// in its log.
const FAREWELL: &[u8] = b"SSH-2.0-substrate\r\n";

/// What a command asks for, whatever its channel: none for other relays, and for what a later version says that would
/// be lost here.
pub(super) fn command(message: &Framed, open: &RelayOpen) -> Option<RelayOpen> {
    let is_command = !matches!(open.target, Some(relay_open::Target::Tcp(_)));
    let is_understood = asking(open.clone()) == *message;
    (is_command && is_understood).then(|| RelayOpen { channel_id: String::new(), ..open.clone() })
}

fn asking(open: RelayOpen) -> Framed {
    Framed::new(&GatewayMessage { payload: Some(gateway_message::Payload::RelayOpen(open)) })
}

/// Whether a relay's channel is one of a spare, of this hub or an earlier one.
pub(super) fn is_spare(channel: &str) -> bool {
    channel.starts_with(PREFIX)
}

/// One that was asked for, or stands.
pub(super) struct Spare {
    /// As the supervisor knows it.
    pub(super) channel: String,
    like: RelayOpen,
    /// Of the assignment of the actor: in another one it may be as old as its snapshot.
    generation: u64,
    state: State,
}

enum State {
    Asked {
        until: Instant,
    },
    /// Its stream came; the server of commands has not said anything.
    Silent {
        until: Instant,
        claim: oneshot::Sender<String>,
    },
    Standing {
        claim: oneshot::Sender<String>,
    },
}

impl Spare {
    /// To be asked for with the message.
    pub(super) fn ask(number: u64, like: RelayOpen, generation: u64) -> (Self, Framed) {
        let channel = format!("{PREFIX}{number}");
        let message = asking(RelayOpen { channel_id: channel.clone(), ..like.clone() });
        let state = State::Asked { until: Instant::now() + LATE };
        (Self { channel, like, generation, state }, message)
    }

    /// Whether it is that one.
    pub(super) fn is(&self, channel: &str) -> bool {
        self.channel == channel
    }

    /// Whether it was made for the actor where it is now.
    pub(super) fn is_of(&self, generation: Option<u64>) -> bool {
        Some(self.generation) == generation
    }

    /// When it will have been asked for in vain.
    pub(super) fn until(&self) -> Option<Instant> {
        match self.state {
            State::Asked { until } | State::Silent { until, .. } => Some(until),
            State::Standing { .. } => None,
        }
    }

    /// Whether it does for a command.
    pub(super) fn is_for(&self, command: &RelayOpen) -> bool {
        self.like == *command
    }

    /// Its stream came; what [`Relay::stand`] is to wait for.
    pub(super) fn came(&mut self) -> Option<oneshot::Receiver<String>> {
        let State::Asked { until } = self.state else { return None };
        let (claim, claimed) = oneshot::channel();
        self.state = State::Silent { until, claim };
        Some(claimed)
    }

    /// The server of commands greets.
    pub(super) fn greets(self) -> Self {
        let state = match self.state {
            State::Silent { claim, .. } => State::Standing { claim },
            state => state,
        };
        Self { state, ..self }
    }

    /// Whether it can be used.
    pub(super) fn stands(&self) -> bool {
        matches!(self.state, State::Standing { .. })
    }

    /// Uses it for the gateway's relay of that channel; false when it is gone.
    pub(super) fn use_for(self, channel: String) -> bool {
        match self.state {
            State::Standing { claim } => claim.send(channel).is_ok(),
            State::Asked { .. } | State::Silent { .. } => false,
        }
    }
}

/// A relay's stream from the sandbox, and what it is for.
pub(super) struct Relay {
    pub(super) channel: String,
    pub(super) opened: Opened,
    /// What came after its channel.
    pub(super) heard: Vec<Bytes>,
}

impl Relay {
    /// Reads which relay a stream is for. What is none is refused.
    pub(super) async fn read(mut opened: Opened) -> Option<Self> {
        let mut deframer = Deframer::default();
        let mut length = 0;
        while let Some(Said::Data(data)) = opened.stream.receiver.next().await {
            length += data.len();
            deframer.push(&data);
            match deframer.take() {
                Ok(None) if length < MAX_HEARD => {}
                Ok(Some(first)) => {
                    let said = first.read::<RelayFrame>().and_then(|frame| frame.payload);
                    let Some(relay_frame::Payload::Init(init)) = said else { break };
                    let rest = Some(deframer.rest()).filter(|rest| !rest.is_empty());
                    return Some(Self {
                        channel: init.channel_id,
                        opened,
                        heard: rest.into_iter().collect(),
                    });
                }
                _ => break,
            }
        }
        opened
            .stream
            .sender
            .reset(code::INVALID_ARGUMENT, "a relay's stream does not begin with its channel");
        None
    }

    /// What the gateway is to hear of it first.
    pub(super) fn begin(&mut self) -> Vec<Bytes> {
        let init = RelayInit { channel_id: self.channel.clone() };
        let init = Framed::new(&RelayFrame { payload: Some(relay_frame::Payload::Init(init)) });
        let mut first = vec![init.raw];
        first.append(&mut self.heard);
        first
    }

    /// Keeps it, answered, until it is claimed for a channel of the gateway's; none when it ended, which it does when it
    /// is not wanted any more. `greets` is called once the server of commands says something.
    pub(super) async fn stand(
        mut self,
        mut claim: oneshot::Receiver<String>,
        greets: impl AsyncFnOnce(),
    ) -> Option<Self> {
        let sender = &self.opened.stream.sender;
        sender.say(Frame::Headers(grpc::answer_head())).ok()?;
        let unused = tokio::time::sleep(KEPT);
        tokio::pin!(unused);
        let mut length = 0;
        let mut greets = Some(greets);
        let claimed = loop {
            if !self.heard.is_empty()
                && let Some(greets) = greets.take()
            {
                greets().await;
            }
            tokio::select! {
                claimed = &mut claim => break claimed.ok(),
                said = self.opened.stream.receiver.next() => match said {
                    Some(Said::Data(data)) if length < MAX_HEARD => {
                        length += data.len();
                        self.heard.push(data);
                    }
                    _ => break None,
                },
                () = &mut unused => break None,
            }
        };
        claim.close();
        if let Some(channel) = claimed.or_else(|| claim.try_recv().ok()) {
            self.channel = channel;
            return Some(self);
        }
        let farewell = RelayFrame { payload: Some(relay_frame::Payload::Data(FAREWELL.to_vec())) };
        if sender.data(Framed::new(&farewell).raw).await.is_ok() {
            // Over already: nobody to tell.
            let _ = sender.say(Frame::Trailers(grpc::status(code::OK, "")));
        }
        None
    }
}
