// SPDX-License-Identifier: Apache-2.0
//! Dialling the control plane and following its actors.
//!
//! [`follow`] delivers every change of an actor that the control plane commits, over any number of broken streams:
//! it resumes after the last revision it saw, and begins anew with [`Change::Restart`] when that one is too old.
use std::time::Duration;

use rand::Rng as _;
use substrate_proto::ateapi::control_client::ControlClient;
use substrate_proto::ateapi::{Actor, WatchRequest, watch_response};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

/// A client of the control plane; cheap to clone.
pub type Control = ControlClient<Channel>;

/// Longest answer of the control plane that is accepted, bytes.
const MAX_MESSAGE: usize = 16 << 20;
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(3);

/// The endpoint is none that can be dialled.
#[derive(Debug, thiserror::Error)]
#[error("cannot dial the control plane at {endpoint:?}: {source}; it is unix:/path or http://host:port")]
pub struct DialError {
    endpoint: String,
    source: tonic::transport::Error,
}

/// A client that connects at its first call and again whenever the control plane comes back.
///
/// # Errors
/// When the endpoint is malformed.
pub fn dial(endpoint: &str) -> Result<Control, DialError> {
    let channel = Endpoint::from_shared(endpoint.to_owned())
        .map_err(|source| DialError { endpoint: endpoint.to_owned(), source })?
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(10))
        .connect_lazy();
    Ok(ControlClient::new(channel).max_decoding_message_size(MAX_MESSAGE))
}

/// What happened to an actor.
#[derive(Debug)]
pub(crate) enum Change {
    /// Everything is sent again; what was known before may have been deleted meanwhile.
    Restart,
    /// It is new or has changed.
    Actor(Box<Actor>),
    /// It is gone.
    Deleted { uid: String, atespace: String, name: String },
}

/// Exponential backoff with full jitter.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
    longest: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Self { next: first, longest }
    }

    /// How long to wait this time.
    pub(crate) fn step(&mut self) -> Duration {
        let now = self.next;
        self.next = (self.next * 2).min(self.longest);
        now / 2 + now.mul_f64(rand::rng().random_range(0.0..0.5))
    }
}

/// Follows the actors until shutdown.
pub(crate) async fn follow(
    mut control: Control,
    shutdown: CancellationToken,
    mut on: impl FnMut(Change) + Send,
) {
    let mut revision = 0;
    let mut backoff = Backoff::new(FIRST_BACKOFF, LONGEST_BACKOFF);
    loop {
        let end = tokio::select! {
            () = shutdown.cancelled() => return,
            end = follow_once(&mut control, &mut revision, &mut backoff, &mut on) => end,
        };
        match end {
            Ok(()) => tracing::debug!("the control plane ended the watch"),
            Err(status) if status.code() == Code::OutOfRange => {
                tracing::info!(revision, "the watch is too far behind; reading everything again");
                revision = 0;
                continue;
            }
            Err(status) => tracing::debug!(%status, revision, "lost the control plane's watch"),
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(backoff.step()) => {}
        }
    }
}

async fn follow_once(
    control: &mut Control,
    revision: &mut u64,
    backoff: &mut Backoff,
    on: &mut (impl FnMut(Change) + Send),
) -> Result<(), tonic::Status> {
    let request =
        WatchRequest { from_revision: *revision, kinds: vec!["actor".into()], atespace: String::new() };
    let mut stream = control.watch(request).await?.into_inner();
    // An interrupted initial snapshot cannot be resumed: its revisions are the objects' own.
    let mut initial = *revision == 0;
    if initial {
        on(Change::Restart);
    }
    while let Some(response) = stream.message().await? {
        *backoff = Backoff::new(FIRST_BACKOFF, LONGEST_BACKOFF);
        match response.change {
            Some(watch_response::Change::Actor(actor)) => on(Change::Actor(Box::new(actor))),
            Some(watch_response::Change::Deleted(gone)) if gone.kind == "actor" => {
                on(Change::Deleted { uid: gone.uid, atespace: gone.atespace, name: gone.name });
            }
            Some(watch_response::Change::Bookmark(mark)) => initial &= !mark.initial_done,
            _ => {}
        }
        if !initial {
            *revision = (*revision).max(response.revision);
        }
    }
    Ok(())
}
