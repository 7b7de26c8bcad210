// SPDX-License-Identifier: Apache-2.0
//! What the gateway is told of an actor: a pure function from the control plane's record to a sandbox observation.
//!
//! The gateway turns an observation into a phase: `deleting` first, then `Suspended=True` (Stopped), then `Ready`,
//! where False is an error for good unless its reason is one of a few transient ones. Hence:
//!
//! | actor | told |
//! |---|---|
//! | NEW; RESUMING for the first time or after StartSandbox | `Ready=False Starting` |
//! | NEW whose boot was given up | `Ready=False ContainerDead` (an error) with the last reason |
//! | RUNNING, SUSPENDING, PAUSING | `Ready=True` |
//! | SUSPENDED, PAUSED, stopped by StopSandbox | `Suspended=True`, `Ready=False DependenciesNotReady` |
//! | SUSPENDED, PAUSED for any other reason (idle, drain, eviction, worker lost) | `Ready=True`: it wakes by itself |
//! | RESUMING from such a sleep | `Ready=True` |
//! | EXITED | `Ready=False ContainerExited` (an error) with the exit code |
//! | CRASHED | `Ready=False ContainerDead` (an error) with the reason |
//! | DELETING | `deleting` |
//!
//! *Stopped by StopSandbox* is an annotation with the generation at which the stop was complete. The generation rises
//! with every assignment, so the mark goes stale by itself in the very observation that shows the actor waking, and a
//! resume at exactly the next generation is the one that follows the stop.
use substrate_proto::ateapi::{Actor, ActorState};
use substrate_proto::compute::{DriverCondition, DriverSandbox, DriverSandboxStatus};

use crate::names;

/// Reason of a Ready=True condition.
pub const BACKEND_READY: &str = "BackendReady";
/// Transient: the first boot, or a start after a stop.
pub const STARTING: &str = "Starting";
/// Transient: nothing runs because the user stopped it.
pub const DEPENDENCIES_NOT_READY: &str = "DependenciesNotReady";
/// Terminal: the workload ended by itself.
pub const CONTAINER_EXITED: &str = "ContainerExited";
/// Terminal: it cannot run.
pub const CONTAINER_DEAD: &str = "ContainerDead";

/// What the gateway is to think of an actor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Boots for the first time, or starts after a stop.
    Starting,
    /// Runs, or sleeps and wakes by itself.
    Ready,
    /// Stopped by its user.
    Stopped,
    /// The workload ended.
    Exited,
    /// Cannot run.
    Dead,
    /// Goes away.
    Deleting,
}

/// The standing of an actor.
pub fn standing(actor: &Actor) -> Standing {
    let stopped = stopped_at(actor);
    match actor.state() {
        ActorState::New if annotation(actor, names::BOOT_FAILED).is_some() => Standing::Dead,
        ActorState::New | ActorState::Unspecified => Standing::Starting,
        ActorState::Resuming => {
            let first = actor.last_snapshot.is_none();
            let after_stop = stopped.is_some_and(|generation| actor.generation == generation + 1);
            if first || after_stop { Standing::Starting } else { Standing::Ready }
        }
        ActorState::Suspended | ActorState::Paused if stopped == Some(actor.generation) => Standing::Stopped,
        ActorState::Suspended
        | ActorState::Paused
        | ActorState::Running
        | ActorState::Suspending
        | ActorState::Pausing => Standing::Ready,
        ActorState::Exited => Standing::Exited,
        ActorState::Crashed => Standing::Dead,
        ActorState::Deleting => Standing::Deleting,
    }
}

/// The observation of an actor; none when it is no sandbox of the gateway's (foreign, golden, a fork).
pub fn sandbox(actor: &Actor) -> Option<DriverSandbox> {
    let id = sandbox_id(actor)?;
    Some(DriverSandbox {
        id: id.to_owned(),
        name: annotation(actor, names::SANDBOX_NAME).unwrap_or(&actor.name).to_owned(),
        namespace: String::new(),
        spec: None,
        status: Some(status(actor)),
        workspace: annotation(actor, names::WORKSPACE).unwrap_or(&actor.atespace).to_owned(),
    })
}

/// The gateway's id of an actor that is a sandbox.
pub fn sandbox_id(actor: &Actor) -> Option<&str> {
    let labels = &actor.spec.as_ref()?.labels;
    let id = labels.get(names::SANDBOX_ID)?;
    // A fork keeps its parent's labels but has a uid of its own.
    (labels.get(names::MANAGED).is_some_and(|value| value == "true") && names::uid(id) == actor.uid)
        .then_some(id.as_str())
}

/// An annotation of an actor.
pub fn annotation<'a>(actor: &'a Actor, key: &str) -> Option<&'a str> {
    actor.spec.as_ref()?.annotations.get(key).map(String::as_str).filter(|value| !value.is_empty())
}

/// The generation at which StopSandbox found the actor stopped.
pub fn stopped_at(actor: &Actor) -> Option<u64> {
    annotation(actor, names::STOPPED)?.parse().ok()
}

fn status(actor: &Actor) -> DriverSandboxStatus {
    let standing = standing(actor);
    let since = timestamp(actor.state_since_ms);
    let condition = |kind: &str, truth: bool, reason: &str, message: String| DriverCondition {
        r#type: kind.to_owned(),
        status: if truth { "True" } else { "False" }.to_owned(),
        reason: reason.to_owned(),
        message,
        last_transition_time: since.clone(),
    };
    let conditions = match standing {
        Standing::Ready => vec![condition("Ready", true, BACKEND_READY, ready_message(actor))],
        Standing::Starting | Standing::Deleting => {
            vec![condition("Ready", false, STARTING, starting_message(actor))]
        }
        Standing::Stopped => vec![
            condition("Suspended", true, "Stopped", "stopped; its state is kept".to_owned()),
            condition("Ready", false, DEPENDENCIES_NOT_READY, "stopped".to_owned()),
        ],
        Standing::Exited => vec![condition("Ready", false, CONTAINER_EXITED, exit_message(actor))],
        Standing::Dead => {
            let gave_up = annotation(actor, names::BOOT_FAILED).map(str::to_owned);
            vec![condition("Ready", false, CONTAINER_DEAD, gave_up.unwrap_or_else(|| crash_message(actor)))]
        }
    };
    DriverSandboxStatus {
        sandbox_name: actor.name.clone(),
        instance_id: actor.uid.clone(),
        conditions,
        deleting: standing == Standing::Deleting,
        ..Default::default()
    }
}

fn ready_message(actor: &Actor) -> String {
    let why = match actor.suspended_by.as_str() {
        "" => String::new(),
        by => format!(" ({by})"),
    };
    match actor.state() {
        ActorState::Suspended | ActorState::Paused => {
            with_reason(actor, &format!("asleep{why}; it wakes when it is used"))
        }
        ActorState::Resuming => "waking up".to_owned(),
        ActorState::Suspending | ActorState::Pausing => format!("going to sleep{why}"),
        _ => "running".to_owned(),
    }
}

fn starting_message(actor: &Actor) -> String {
    match actor.progress_step.as_str() {
        "pulling_image" => format!("pulling the image, {} %", actor.progress_percent.min(100)),
        _ if actor.state() == ActorState::New => with_reason(actor, "waiting to be started"),
        _ => "starting".to_owned(),
    }
}

/// How the workload ended, in a user's words.
pub fn exit_message(actor: &Actor) -> String {
    match &actor.exit {
        Some(exit) if exit.signal != 0 => {
            format!("the workload was ended by signal {} (exit code {})", exit.signal, exit.code)
        }
        Some(exit) => format!("the workload exited with code {}", exit.code),
        None => with_reason(actor, "the workload exited"),
    }
}

fn crash_message(actor: &Actor) -> String {
    with_reason(actor, "the actor crashed")
}

fn with_reason(actor: &Actor, text: &str) -> String {
    match (actor.message.as_str(), actor.reason.as_str()) {
        ("", "") => text.to_owned(),
        ("", reason) => format!("{text}: {reason}"),
        (message, _) => format!("{text}: {message}"),
    }
}

/// RFC 3339 in UTC, whole seconds; empty for 0.
pub fn timestamp(unix_ms: i64) -> String {
    if unix_ms <= 0 {
        return String::new();
    }
    let seconds = unix_ms / 1000;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days to a civil date in the proleptic Gregorian calendar, with years that begin in March.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use substrate_proto::ateapi::Snapshot;
    use substrate_proto::types::{ActorSpec, ExitStatus};

    use super::*;

    const STATES: [ActorState; 10] = [
        ActorState::New,
        ActorState::Suspended,
        ActorState::Resuming,
        ActorState::Running,
        ActorState::Suspending,
        ActorState::Pausing,
        ActorState::Paused,
        ActorState::Exited,
        ActorState::Crashed,
        ActorState::Deleting,
    ];
    const SLEEPS: [&str; 6] = ["", "user", "idle", "drain", "evict", "shutdown"];

    fn actor(state: ActorState, suspended_by: &str) -> Actor {
        let labels = [(names::MANAGED, "true"), (names::SANDBOX_ID, "sbx-1")];
        let annotations = [(names::SANDBOX_NAME, "Alice"), (names::WORKSPACE, "Team A")];
        let owned = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        Actor {
            uid: names::uid("sbx-1"),
            name: names::actor("Alice"),
            atespace: names::atespace("Team A"),
            state: state.into(),
            generation: 4,
            suspended_by: suspended_by.to_owned(),
            last_snapshot: Some(Snapshot::default()),
            spec: Some(ActorSpec {
                labels: owned(&labels),
                annotations: owned(&annotations),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn stopped(mut actor: Actor, at: u64) -> Actor {
        let spec = actor.spec.as_mut().unwrap();
        spec.annotations.insert(names::STOPPED.to_owned(), at.to_string());
        actor
    }

    /// The phase rule of the gateway (`derive_phase` and its list of transient reasons).
    fn gateway_phase(sandbox: &DriverSandbox) -> &'static str {
        let status = sandbox.status.as_ref().unwrap();
        if status.deleting {
            return "deleting";
        }
        if status.conditions.iter().any(|c| c.r#type == "Suspended" && c.status == "True") {
            return "stopped";
        }
        let ready = status.conditions.iter().find(|c| c.r#type == "Ready").unwrap();
        let transient = [
            "reconcilererror",
            "dependenciesnotready",
            "supervisornotconnected",
            "starting",
            "containerstarting",
            "containercreated",
            "healthcheckstarting",
            "inspectfailed",
        ];
        match ready.status.as_str() {
            "True" => "ready",
            _ if transient.contains(&ready.reason.to_ascii_lowercase().as_str()) => "provisioning",
            _ => "error",
        }
    }

    #[test]
    fn every_state_and_cause_of_sleep_has_the_phase_of_the_table() {
        for state in STATES {
            for by in SLEEPS {
                let expected = match state {
                    ActorState::New => "provisioning",
                    ActorState::Exited | ActorState::Crashed => "error",
                    ActorState::Deleting => "deleting",
                    _ => "ready",
                };
                let observed = sandbox(&actor(state, by)).unwrap();
                assert_eq!(gateway_phase(&observed), expected, "{state:?} suspended by {by:?}");
                assert_eq!((observed.name.as_str(), observed.workspace.as_str()), ("Alice", "Team A"));
                assert_eq!(observed.id, "sbx-1");
            }
        }
    }

    #[test]
    fn stopped_holds_for_the_generation_that_was_stopped_and_no_other() {
        for state in STATES {
            for by in SLEEPS {
                let phase = |at| gateway_phase(&sandbox(&stopped(actor(state, by), at)).unwrap());
                let sleeping = matches!(state, ActorState::Suspended | ActorState::Paused);
                let expected = match state {
                    ActorState::New => "provisioning",
                    ActorState::Exited | ActorState::Crashed => "error",
                    ActorState::Deleting => "deleting",
                    _ if sleeping => "stopped",
                    _ => "ready",
                };
                assert_eq!(phase(4), expected, "{state:?} by {by:?}, stopped at this generation");
                // The first resume after the stop is a start; whatever sleeps later sleeps by itself.
                let expected = if state == ActorState::Resuming { "provisioning" } else { expected };
                let expected = if sleeping { "ready" } else { expected };
                assert_eq!(phase(3), expected, "{state:?} by {by:?}, stopped one generation ago");
                let expected = if state == ActorState::Resuming { "ready" } else { expected };
                assert_eq!(phase(1), expected, "{state:?} by {by:?}, stopped long ago");
            }
        }
    }

    #[test]
    fn the_first_boot_is_starting_and_shows_its_progress() {
        let mut first = actor(ActorState::Resuming, "");
        first.last_snapshot = None;
        first.progress_step = "pulling_image".to_owned();
        first.progress_percent = 40;
        let observed = sandbox(&first).unwrap();
        assert_eq!(gateway_phase(&observed), "provisioning");
        assert_eq!(observed.status.unwrap().conditions[0].message, "pulling the image, 40 %");
    }

    #[test]
    fn a_boot_that_was_given_up_is_an_error_with_its_reason() {
        let mut new = actor(ActorState::New, "");
        new.spec
            .as_mut()
            .unwrap()
            .annotations
            .insert(names::BOOT_FAILED.to_owned(), "not ready in time".to_owned());
        let observed = sandbox(&new).unwrap();
        assert_eq!(gateway_phase(&observed), "error");
        assert_eq!(observed.status.unwrap().conditions[0].message, "not ready in time");
    }

    #[test]
    fn an_exit_tells_its_code() {
        let mut exited = actor(ActorState::Exited, "");
        exited.exit = Some(ExitStatus { code: 3, ..Default::default() });
        exited.state_since_ms = 1_700_000_000_123;
        let condition = sandbox(&exited).unwrap().status.unwrap().conditions.remove(0);
        assert_eq!(condition.reason, CONTAINER_EXITED);
        assert_eq!(condition.message, "the workload exited with code 3");
        assert_eq!(condition.last_transition_time, "2023-11-14T22:13:20Z");
        exited.exit = Some(ExitStatus { code: 137, signal: 9, ..Default::default() });
        assert!(exit_message(&exited).contains("signal 9"));
    }

    #[test]
    fn foreign_golden_and_forked_actors_are_no_sandboxes() {
        let mut foreign = actor(ActorState::Running, "");
        foreign.spec.as_mut().unwrap().labels.clear();
        assert!(sandbox(&foreign).is_none());
        let mut fork = actor(ActorState::Running, "");
        fork.uid = names::uid("another");
        assert!(sandbox(&fork).is_none());
        assert!(sandbox(&Actor::default()).is_none());
    }

    #[test]
    fn timestamps_are_rfc_3339() {
        assert_eq!(timestamp(0), "");
        assert_eq!(timestamp(951_782_400_000), "2000-02-29T00:00:00Z");
        assert_eq!(timestamp(1_767_225_599_999), "2025-12-31T23:59:59Z");
    }
}
