// SPDX-License-Identifier: Apache-2.0
//! What the driver has seen of the gateway's sandboxes, and what each change means to the gateway: the pure half of
//! [`crate::hub`].
//!
//! The control plane's watch begins with a snapshot of everything, ended by a bookmark, then tells every change. A
//! change becomes a sandbox observation when it shows (the same observation is not sent twice), progress of a boot
//! becomes a platform event with the metadata the gateway's clients understand, the control plane's own events of an
//! actor become platform events too. After a reconnect the snapshot comes again: what it no longer holds was deleted
//! meanwhile.
use std::collections::{BTreeMap, BTreeSet};

use substrate_proto::ateapi::{Actor, ActorState, Event, WatchResponse, watch_response::Change};
use substrate_proto::compute::{
    DriverPlatformEvent, DriverSandbox, WatchSandboxesDeletedEvent, WatchSandboxesEvent,
    WatchSandboxesPlatformEvent, WatchSandboxesSandboxEvent, watch_sandboxes_event::Payload,
};

use crate::condition::{self, Standing};

/// Metadata keys and steps by which the gateway's clients show progress.
pub mod progress {
    /// A step that is done.
    pub const COMPLETE_STEP: &str = "openshell.progress.complete_step";
    /// What to say about it.
    pub const COMPLETE_LABEL: &str = "openshell.progress.complete_label";
    /// The step under way.
    pub const ACTIVE_STEP: &str = "openshell.progress.active_step";
    /// Detail of the step under way; each one keeps the client waiting.
    pub const ACTIVE_DETAIL: &str = "openshell.progress.active_detail";
    /// The request was accepted.
    pub const REQUESTING: &str = "requesting_sandbox";
    /// The image is fetched.
    pub const PULLING: &str = "pulling_image";
    /// The sandbox boots.
    pub const STARTING: &str = "starting_sandbox";
}

/// What the mirror has of one sandbox.
#[derive(Debug, Clone)]
struct Seen {
    observed: DriverSandbox,
    standing: Standing,
    step: String,
    percent: u32,
}

/// What a change means.
#[derive(Debug, Default, PartialEq)]
pub struct Outcome {
    /// For the gateway, in order.
    pub events: Vec<WatchSandboxesEvent>,
    /// Uid of an actor whose first boot failed and has to be tried again.
    pub boot_failed: Option<String>,
    /// The snapshot is complete: the mirror shows everything.
    pub complete: bool,
}

/// All sandboxes by uid.
#[derive(Debug, Default)]
pub struct Mirror {
    sandboxes: BTreeMap<String, Seen>,
    // While a snapshot arrives: the uids it held so far.
    arriving: Option<BTreeSet<String>>,
}

impl Mirror {
    /// A snapshot begins.
    pub fn begin_snapshot(&mut self) {
        self.arriving = Some(BTreeSet::new());
    }

    /// Every sandbox, as a new subscriber sees it first.
    pub fn snapshot(&self) -> Vec<WatchSandboxesEvent> {
        self.sandboxes.values().map(|seen| observation(seen.observed.clone())).collect()
    }

    /// Takes a change in.
    pub fn apply(&mut self, response: WatchResponse) -> Outcome {
        match response.change {
            Some(Change::Actor(actor)) => self.actor(&actor),
            Some(Change::Deleted(deleted)) if deleted.kind == "actor" => {
                Outcome { events: self.remove(&deleted.uid).into_iter().collect(), ..Outcome::default() }
            }
            Some(Change::Event(event)) if self.arriving.is_none() => {
                Outcome { events: self.event(event).into_iter().collect(), ..Outcome::default() }
            }
            Some(Change::Bookmark(bookmark)) if bookmark.initial_done => self.end_snapshot(),
            _ => Outcome::default(),
        }
    }

    /// Forgets a sandbox that is known to be gone; the event that says so, unless it was sent before.
    pub fn remove(&mut self, uid: &str) -> Option<WatchSandboxesEvent> {
        self.sandboxes.remove(uid).map(|seen| deleted(seen.observed.id))
    }

    fn end_snapshot(&mut self) -> Outcome {
        let mut outcome = Outcome { complete: true, ..Outcome::default() };
        if let Some(arrived) = self.arriving.take() {
            let gone: Vec<String> =
                self.sandboxes.keys().filter(|uid| !arrived.contains(*uid)).cloned().collect();
            outcome.events = gone.iter().filter_map(|uid| self.remove(uid)).collect();
        }
        outcome
    }

    fn actor(&mut self, actor: &Actor) -> Outcome {
        let Some(observed) = condition::sandbox(actor) else {
            return Outcome::default();
        };
        if let Some(arriving) = &mut self.arriving {
            arriving.insert(actor.uid.clone());
        }
        let seen = Seen {
            observed,
            standing: condition::standing(actor),
            step: actor.progress_step.clone(),
            percent: actor.progress_percent.min(100),
        };
        let before = self.sandboxes.insert(actor.uid.clone(), seen.clone());
        let mut outcome = Outcome::default();
        if let Some(event) = boot_progress(before.as_ref(), &seen) {
            outcome.events.push(platform_event(&seen.observed.id, event));
        }
        if before.is_none_or(|before| before.observed != seen.observed) {
            outcome.events.push(observation(seen.observed));
        }
        let waits = actor.state() == ActorState::New && seen.standing == Standing::Starting;
        // In a snapshot any unstarted actor counts: whoever was to start it may be gone.
        if waits && (!actor.reason.is_empty() || self.arriving.is_some()) {
            outcome.boot_failed = Some(actor.uid.clone());
        }
        outcome
    }

    fn event(&self, event: Event) -> Option<WatchSandboxesEvent> {
        let seen = self.sandboxes.get(&event.subject_uid)?;
        Some(platform_event(
            &seen.observed.id,
            DriverPlatformEvent {
                timestamp_ms: event.time_ms,
                source: SOURCE.to_owned(),
                r#type: if event.warning { "Warning" } else { "Normal" }.to_owned(),
                reason: event.reason,
                message: event.message,
                metadata: event
                    .metadata
                    .into_iter()
                    .filter(|(key, _)| !key.starts_with("openshell.progress."))
                    .collect(),
            },
        ))
    }
}

const SOURCE: &str = "substrate";

/// The platform event of an accepted create.
pub fn scheduled(now_ms: i64, image: &str) -> DriverPlatformEvent {
    let detail = if image.is_empty() { "pre-made template" } else { image };
    progress_event(
        now_ms,
        "Scheduled",
        format!("sandbox accepted ({detail})"),
        &[
            (progress::COMPLETE_STEP, progress::REQUESTING),
            (progress::COMPLETE_LABEL, "Sandbox allocated"),
            (progress::ACTIVE_STEP, progress::PULLING),
            (progress::ACTIVE_DETAIL, detail),
        ],
    )
}

/// A platform event that warns.
pub fn warning(now_ms: i64, reason: &str, message: String) -> DriverPlatformEvent {
    DriverPlatformEvent { r#type: "Warning".to_owned(), ..progress_event(now_ms, reason, message, &[]) }
}

/// Wraps a platform event of a sandbox.
pub fn platform_event(sandbox_id: &str, event: DriverPlatformEvent) -> WatchSandboxesEvent {
    WatchSandboxesEvent {
        payload: Some(Payload::PlatformEvent(WatchSandboxesPlatformEvent {
            sandbox_id: sandbox_id.to_owned(),
            event: Some(event),
        })),
    }
}

/// The event that a sandbox is gone.
pub fn deleted(sandbox_id: String) -> WatchSandboxesEvent {
    WatchSandboxesEvent { payload: Some(Payload::Deleted(WatchSandboxesDeletedEvent { sandbox_id })) }
}

fn observation(sandbox: DriverSandbox) -> WatchSandboxesEvent {
    WatchSandboxesEvent {
        payload: Some(Payload::Sandbox(WatchSandboxesSandboxEvent { sandbox: Some(sandbox) })),
    }
}

fn progress_event(
    now_ms: i64,
    reason: &str,
    message: String,
    metadata: &[(&str, &str)],
) -> DriverPlatformEvent {
    DriverPlatformEvent {
        timestamp_ms: now_ms,
        source: SOURCE.to_owned(),
        r#type: "Normal".to_owned(),
        reason: reason.to_owned(),
        message,
        metadata: metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
    }
}

/// What a change of a booting sandbox shows of its progress; nothing for one that wakes from sleep.
fn boot_progress(before: Option<&Seen>, now: &Seen) -> Option<DriverPlatformEvent> {
    let time = now_ms();
    let was_starting = before.is_some_and(|before| before.standing == Standing::Starting);
    let before_step = before.map_or("", |before| before.step.as_str());
    if was_starting && now.standing == Standing::Ready {
        return Some(progress_event(
            time,
            "Started",
            "sandbox started".to_owned(),
            &[(progress::COMPLETE_STEP, progress::STARTING), (progress::COMPLETE_LABEL, "Sandbox started")],
        ));
    }
    if now.standing != Standing::Starting {
        return None;
    }
    match now.step.as_str() {
        "pulling_image" => {
            let same = before_step == now.step && before.is_some_and(|before| before.percent == now.percent);
            let detail = format!("{} %", now.percent);
            (!same).then(|| {
                progress_event(
                    time,
                    "Pulling",
                    format!("pulling the image, {detail}"),
                    &[(progress::ACTIVE_STEP, progress::PULLING), (progress::ACTIVE_DETAIL, &detail)],
                )
            })
        }
        "starting_sandbox" | "restoring" if before_step != now.step => {
            let pulled = if before_step == "pulling_image" { "Image pulled" } else { "Image present" };
            let detail = if now.step == "restoring" { "Restoring its state" } else { "Booting" };
            Some(progress_event(
                time,
                "Starting",
                "starting the sandbox".to_owned(),
                &[
                    (progress::COMPLETE_STEP, progress::PULLING),
                    (progress::COMPLETE_LABEL, pulled),
                    (progress::ACTIVE_STEP, progress::STARTING),
                    (progress::ACTIVE_DETAIL, detail),
                ],
            ))
        }
        _ => None,
    }
}

/// Unix time in milliseconds.
pub fn now_ms() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map(|since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use substrate_proto::ateapi::{Bookmark, Deleted, Snapshot};
    use substrate_proto::types::ActorSpec;

    use super::*;
    use crate::names;

    fn actor(id: &str, state: ActorState) -> Actor {
        Actor {
            uid: names::uid(id),
            name: id.to_owned(),
            state: state.into(),
            spec: Some(ActorSpec {
                labels: [
                    (names::MANAGED.to_owned(), "true".to_owned()),
                    (names::SANDBOX_ID.to_owned(), id.to_owned()),
                ]
                .into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn change(change: Change) -> WatchResponse {
        WatchResponse { revision: 1, change: Some(change) }
    }

    fn show(event: &WatchSandboxesEvent) -> String {
        match event.payload.as_ref().unwrap() {
            Payload::Sandbox(event) => format!("sandbox {}", event.sandbox.as_ref().unwrap().id),
            Payload::Deleted(event) => format!("deleted {}", event.sandbox_id),
            Payload::PlatformEvent(event) => {
                format!("{} {}", event.event.as_ref().unwrap().reason, event.sandbox_id)
            }
        }
    }

    fn apply(mirror: &mut Mirror, next: Change) -> Vec<String> {
        mirror.apply(change(next)).events.iter().map(show).collect()
    }

    const DONE: Change = Change::Bookmark(Bookmark { initial_done: true });

    #[test]
    fn a_second_snapshot_shows_what_went_missing_and_repeats_nothing() {
        let mut mirror = Mirror::default();
        mirror.begin_snapshot();
        assert_eq!(apply(&mut mirror, Change::Actor(actor("a", ActorState::Running))), ["sandbox a"]);
        assert_eq!(apply(&mut mirror, Change::Actor(actor("b", ActorState::Running))), ["sandbox b"]);
        assert!(mirror.apply(change(DONE)).complete);
        mirror.begin_snapshot();
        assert!(apply(&mut mirror, Change::Actor(actor("b", ActorState::Running))).is_empty());
        assert_eq!(apply(&mut mirror, DONE), ["deleted a"]);
        assert_eq!(mirror.snapshot().len(), 1);
    }

    #[test]
    fn deletions_are_told_once_and_foreign_actors_never() {
        let mut mirror = Mirror::default();
        mirror.begin_snapshot();
        apply(&mut mirror, Change::Actor(actor("a", ActorState::Running)));
        mirror.apply(change(DONE));
        let gone = |id: &str| {
            Change::Deleted(Deleted { kind: "actor".to_owned(), uid: names::uid(id), ..Default::default() })
        };
        assert_eq!(apply(&mut mirror, gone("a")), ["deleted a"]);
        assert!(apply(&mut mirror, gone("a")).is_empty());
        let mut foreign = actor("x", ActorState::Running);
        foreign.spec = None;
        assert!(apply(&mut mirror, Change::Actor(foreign)).is_empty());
        assert!(apply(&mut mirror, gone("x")).is_empty());
    }

    #[test]
    fn a_first_boot_shows_its_progress_and_a_waking_does_not() {
        let mut mirror = Mirror::default();
        let mut booting = actor("a", ActorState::Resuming);
        booting.progress_step = "pulling_image".to_owned();
        booting.progress_percent = 10;
        assert_eq!(apply(&mut mirror, Change::Actor(booting.clone())), ["Pulling a", "sandbox a"]);
        assert!(apply(&mut mirror, Change::Actor(booting.clone())).is_empty());
        booting.progress_percent = 60;
        let outcome = mirror.apply(change(Change::Actor(booting.clone())));
        let Some(Payload::PlatformEvent(event)) = &outcome.events[0].payload else { panic!() };
        let metadata = &event.event.as_ref().unwrap().metadata;
        assert_eq!(metadata[progress::ACTIVE_STEP], "pulling_image");
        assert_eq!(metadata[progress::ACTIVE_DETAIL], "60 %");
        booting.progress_step = "starting_sandbox".to_owned();
        assert!(apply(&mut mirror, Change::Actor(booting.clone())).contains(&"Starting a".to_owned()));
        let mut running = actor("a", ActorState::Running);
        running.last_snapshot = Some(Snapshot::default());
        assert!(apply(&mut mirror, Change::Actor(running.clone())).contains(&"Started a".to_owned()));
        let mut waking = running;
        waking.state = ActorState::Resuming.into();
        waking.progress_step = "restoring".to_owned();
        assert_eq!(apply(&mut mirror, Change::Actor(waking)), ["sandbox a"]);
    }

    #[test]
    fn a_failed_boot_is_handed_on_but_not_one_that_is_under_way() {
        let mut mirror = Mirror::default();
        let mut new = actor("a", ActorState::New);
        assert_eq!(mirror.apply(change(Change::Actor(new.clone()))).boot_failed, None);
        new.reason = "NO_FREE_WORKER".to_owned();
        assert_eq!(mirror.apply(change(Change::Actor(new.clone()))).boot_failed, Some(names::uid("a")));
        mirror.begin_snapshot();
        new.reason.clear();
        assert!(mirror.apply(change(Change::Actor(new))).boot_failed.is_some());
    }

    #[test]
    fn events_of_a_sandbox_are_passed_on_and_old_ones_are_not() {
        let mut mirror = Mirror::default();
        mirror.begin_snapshot();
        apply(&mut mirror, Change::Actor(actor("a", ActorState::Running)));
        let event = |id: &str| {
            Change::Event(Event {
                subject_uid: names::uid(id),
                reason: "WorkerLost".to_owned(),
                warning: true,
                ..Default::default()
            })
        };
        assert!(apply(&mut mirror, event("a")).is_empty(), "told before the snapshot was complete");
        mirror.apply(change(DONE));
        assert_eq!(apply(&mut mirror, event("a")), ["WorkerLost a"]);
        assert!(apply(&mut mirror, event("other")).is_empty());
    }
}
