// SPDX-License-Identifier: Apache-2.0
//! Records as the API shows them.
use substrate_proto::{ateapi, types};

use crate::engine::Engine;
use crate::model::{Actor, Atespace, EventDraft, Exit, Quota, Snapshot, SnapshotNote, State, Template};
use crate::schedule::Worker;

pub(super) fn atespace(it: Atespace) -> ateapi::Atespace {
    let quota = ateapi::Quota {
        actors: it.quota.actors,
        running: it.quota.running,
        snapshot_bytes: it.quota.snapshot_bytes,
        wakeups_per_s: it.quota.wakeups_per_s,
    };
    ateapi::Atespace {
        name: it.name,
        labels: it.labels,
        created_ms: it.created_ms,
        revision: it.revision,
        quota: Some(quota).filter(|_| it.quota != Quota::default()),
        usage: None,
    }
}

pub(super) fn template(it: Template) -> ateapi::Template {
    ateapi::Template {
        atespace: it.atespace,
        name: it.name,
        uid: it.uid.0,
        spec: Some(it.spec),
        labels: it.labels,
        created_ms: it.created_ms,
        revision: it.revision,
        spec_digest: it.spec_digest,
        golden: Vec::new(),
    }
}

fn exit(it: Exit) -> types::ExitStatus {
    types::ExitStatus { container: it.container, code: it.code, signal: it.signal, time_ms: it.time_ms }
}

pub(super) fn actor(engine: &Engine, it: Actor) -> ateapi::Actor {
    let last_snapshot = it.last_snapshot().map(|snapshot| self::snapshot(&it, snapshot));
    let memory_bytes = engine.counted(&it.uid).map_or(0, |(memory, _)| memory);
    let disk_bytes = it.snapshot_bytes();
    let running = it.state == State::Running;
    ateapi::Actor {
        state: it.state.to_proto() as i32,
        last_snapshot,
        memory_bytes,
        disk_bytes,
        uid: it.uid.0,
        atespace: it.atespace,
        name: it.name,
        wake_on_traffic: !it.spec.wake_on_traffic_disabled,
        spec: Some(it.spec),
        reason: it.reason,
        message: it.message,
        generation: it.generation.0,
        worker_id: it.placement.as_ref().map(|placement| placement.worker.0.clone()).unwrap_or_default(),
        node: it.placement.map(|placement| placement.node.0).unwrap_or_default(),
        ingress_endpoint: if running { it.ingress_endpoint } else { String::new() },
        exit: it.exit.map(exit),
        created_ms: it.created_ms,
        state_since_ms: it.state_since_ms,
        revision: it.revision,
        template_uid: it.template_uid.0,
        suspended_by: it.suspended_by,
        progress_step: it.progress_step,
        progress_percent: it.progress_percent,
        checkpoint: Some(it.checkpoint),
        ports: it.ports,
        sandbox_class: it.class,
    }
}

pub(super) fn snapshot(of: &Actor, it: &Snapshot) -> ateapi::Snapshot {
    let note = SnapshotNote {
        actor_uid: of.uid.clone(),
        atespace: of.atespace.clone(),
        actor_name: of.name.clone(),
        snapshot: it.clone(),
    };
    noted_snapshot(note)
}

pub(super) fn noted_snapshot(note: SnapshotNote) -> ateapi::Snapshot {
    let it = note.snapshot;
    let durability = if it.is_durable() { types::Durability::Durable } else { types::Durability::Node };
    ateapi::Snapshot {
        id: it.id.0,
        actor_uid: note.actor_uid.0,
        generation: it.generation.0,
        durability: durability as i32,
        time_ms: it.time_ms,
        bytes: it.bytes,
        stored_bytes: it.stored_bytes,
        tags: it.tags.into_iter().collect(),
        node: it.node.map(|node| node.0).unwrap_or_default(),
        manifest_digest: it.manifest.unwrap_or_default(),
        runtime_digest: it.compatibility.runtime_digest,
        cause: it.cause,
        atespace: note.atespace,
        actor_name: note.actor_name,
    }
}

pub(super) fn worker(engine: &Engine, it: Worker) -> ateapi::Worker {
    let phase = it.phase.as_str_name().to_lowercase();
    let counted = it.record.actor.as_ref().and_then(|(uid, _)| engine.counted(uid));
    let (memory_bytes, processes) = counted.unwrap_or_default();
    let (actor_uid, generation) =
        it.record.actor.map(|(uid, generation)| (uid.0, generation.0)).unwrap_or_default();
    ateapi::Worker {
        id: it.record.id.0,
        node: it.record.node.0,
        pool: it.record.pool,
        sandbox_class: it.record.class,
        runtime_digest: it.record.runtime_digest,
        runtime_version: it.record.runtime_version,
        alive: it.record.alive,
        cordoned: it.record.cordoned,
        actor_uid,
        atespace: it.record.atespace,
        actor_name: it.record.actor_name,
        generation,
        phase: if phase == "phase_unspecified" { String::new() } else { phase },
        revision: it.record.revision,
        memory_bytes,
        processes,
        pid: it.pid,
    }
}

pub(super) fn event(revision: u64, it: EventDraft) -> ateapi::Event {
    ateapi::Event {
        revision,
        time_ms: it.time_ms,
        kind: it.kind,
        atespace: it.atespace,
        subject: it.subject,
        subject_uid: it.subject_uid,
        reason: it.reason,
        message: it.message,
        warning: it.warning,
        metadata: it.metadata,
    }
}
