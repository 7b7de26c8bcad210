// SPDX-License-Identifier: Apache-2.0
//! The life-cycle verbs. Each returns when the control plane has committed the end state, and says what was committed.
use substrate_proto::ateapi as api;
use substrate_proto::types::Durability as ProtoDurability;

use crate::args::{
    Checkpoint, Delete, Durability, Fork, Global, Output, Revert, Suspend, Tag, Untag, Verb, Workers,
};
use crate::client::{actor_ref, connect, request_id};
use crate::cmd::{each, machine_text, names_after, print, print_done};
use crate::failure::{Exit, Failure};
use crate::progress::during;
use crate::quantity::bytes;
use crate::time::{age, now_ms};
use crate::view::{Actor, Snapshot, Worker};

const ACTOR: [&str; 2] = ["actor", "actors"];
const WORKER: [&str; 2] = ["worker", "workers"];

/// What a snapshot verb answered, for programs.
#[derive(serde::Serialize)]
struct Snapped {
    actor: Actor,
    snapshot: Snapshot,
    steps: Vec<Step>,
}

#[derive(serde::Serialize)]
struct Step {
    name: String,
    ms: f64,
}

fn steps(steps: Vec<api::Step>) -> Vec<Step> {
    steps.into_iter().map(|step| Step { name: step.name, ms: step.micros as f64 / 1000.0 }).collect()
}

fn print_snapshot(answer: api::SnapshotAnswer, verb: &str, global: &Global) -> Result<(), Failure> {
    let actor = Actor::from(answer.actor.unwrap_or_default());
    let snapshot = Snapshot::from(answer.snapshot.unwrap_or_default());
    if global.output.is_machine() {
        let snapped = Snapped { actor, snapshot, steps: steps(answer.steps) };
        return print(&machine_text(&snapped, global.output)?);
    }
    let line = format!(
        "actor/{} {verb}: snapshot {} is {}, {} ({} new in the store), {} old",
        actor.name,
        snapshot.id,
        snapshot.durability,
        bytes(snapshot.size_bytes),
        bytes(snapshot.stored_bytes),
        age(snapshot.time_ms, now_ms()),
    );
    print_done(&actor, &line, global.output)
}

fn print_actor(actor: api::Actor, verb: &str, global: &Global) -> Result<(), Failure> {
    let actor = Actor::from(actor);
    let on = actor.worker.as_ref().map_or_else(String::new, |worker| format!(" on {worker}"));
    let line = format!("actor/{} {verb} ({}{on})", actor.name, actor.state_text());
    print_done(&actor, &line, global.output)
}

/// `substrate suspend`.
pub async fn suspend(options: Suspend, global: &Global) -> Result<(), Failure> {
    let client = connect(global).await?;
    let drain_ms = options.drain.map(|drain| drain.as_millis() as u32);
    each(names_after(&options.words, &ACTOR), |name| {
        let mut client = client.clone();
        async move {
            let request = api::SuspendActorRequest {
                actor: Some(actor_ref(global, name)),
                cause: "user".into(),
                request_id: request_id(),
                only_if_idle: options.only_if_idle,
                drain_ms,
            };
            let answer = during(format!("suspending {name}"), client.suspend_actor(request)).await?;
            print_snapshot(answer.into_inner(), "suspended", global)
        }
    })
    .await
}

/// `substrate pause`.
pub async fn pause(options: Suspend, global: &Global) -> Result<(), Failure> {
    let client = connect(global).await?;
    let drain_ms = options.drain.map(|drain| drain.as_millis() as u32);
    each(names_after(&options.words, &ACTOR), |name| {
        let mut client = client.clone();
        async move {
            let request = api::PauseActorRequest {
                actor: Some(actor_ref(global, name)),
                request_id: request_id(),
                only_if_idle: options.only_if_idle,
                cause: "user".into(),
                drain_ms,
            };
            let answer = during(format!("pausing {name}"), client.pause_actor(request)).await?;
            print_snapshot(answer.into_inner(), "paused", global)
        }
    })
    .await
}

/// `substrate resume`.
pub async fn resume(options: Verb, global: &Global) -> Result<(), Failure> {
    let client = connect(global).await?;
    each(names_after(&options.words, &ACTOR), |name| {
        let mut client = client.clone();
        async move {
            let request = api::ResumeActorRequest {
                actor: Some(actor_ref(global, name)),
                cause: "user".into(),
                request_id: request_id(),
            };
            let answer = during(format!("resuming {name}"), client.resume_actor(request)).await?.into_inner();
            let actor = answer.actor.unwrap_or_default();
            if global.output.is_machine() {
                #[derive(serde::Serialize)]
                #[serde(rename_all = "camelCase")]
                struct Resumed {
                    actor: Actor,
                    steps: Vec<Step>,
                    was_running: bool,
                }
                let resumed = Resumed {
                    actor: actor.into(),
                    steps: steps(answer.steps),
                    was_running: answer.was_running,
                };
                return print(&machine_text(&resumed, global.output)?);
            }
            print_actor(actor, if answer.was_running { "already runs" } else { "resumed" }, global)
        }
    })
    .await
}

/// `substrate checkpoint`.
pub async fn checkpoint(options: Checkpoint, global: &Global) -> Result<(), Failure> {
    let client = connect(global).await?;
    let durability = match options.durability {
        None => ProtoDurability::Unspecified,
        Some(Durability::Node) => ProtoDurability::Node,
        Some(Durability::Durable) => ProtoDurability::Durable,
    };
    each(names_after(&options.words, &ACTOR), |name| {
        let mut client = client.clone();
        async move {
            let request = api::CheckpointActorRequest {
                actor: Some(actor_ref(global, name)),
                durability: durability as i32,
                request_id: request_id(),
                ..Default::default()
            };
            let answer = during(format!("checkpointing {name}"), client.checkpoint_actor(request)).await?;
            print_snapshot(answer.into_inner(), "checkpointed", global)
        }
    })
    .await
}

/// `substrate promote`.
pub async fn promote(options: Verb, global: &Global) -> Result<(), Failure> {
    let client = connect(global).await?;
    each(names_after(&options.words, &ACTOR), |name| {
        let mut client = client.clone();
        async move {
            let request =
                api::PromoteActorRequest { actor: Some(actor_ref(global, name)), request_id: request_id() };
            let answer = during(format!("promoting {name}"), client.promote_actor(request)).await?;
            print_snapshot(answer.into_inner(), "promoted", global)
        }
    })
    .await
}

/// `substrate reset`.
pub async fn reset(options: Verb, global: &Global) -> Result<(), Failure> {
    let client = connect(global).await?;
    each(names_after(&options.words, &ACTOR), |name| {
        let mut client = client.clone();
        async move {
            let request =
                api::ResetActorRequest { actor: Some(actor_ref(global, name)), request_id: request_id() };
            let answer = during(format!("resetting {name}"), client.reset_actor(request)).await?;
            print_actor(answer.into_inner(), "reset", global)
        }
    })
    .await
}

/// `substrate revert`.
pub async fn revert(options: Revert, global: &Global) -> Result<(), Failure> {
    let [name] = names_after(&options.words, &ACTOR) else {
        return Err(Failure::usage("revert takes one actor: its snapshots are its own"));
    };
    let mut client = connect(global).await?;
    let request = api::RevertActorRequest {
        actor: Some(actor_ref(global, name)),
        snapshot: options.to,
        request_id: request_id(),
    };
    let answer = during(format!("reverting {name}"), client.revert_actor(request)).await?;
    print_actor(answer.into_inner(), "reverted", global)
}

/// `substrate fork`.
pub async fn fork(options: Fork, global: &Global) -> Result<(), Failure> {
    let mut client = connect(global).await?;
    let doing = format!("forking {}", options.name);
    let request = api::ForkActorRequest {
        actor: Some(actor_ref(global, &options.name)),
        new_name: options.new_name,
        snapshot: options.from.unwrap_or_default(),
        request_id: request_id(),
    };
    let answer = during(doing, client.fork_actor(request)).await?;
    print_actor(answer.into_inner(), "forked", global)
}

/// `substrate tag`.
pub async fn tag(options: Tag, global: &Global) -> Result<(), Failure> {
    let mut client = connect(global).await?;
    let actor = Some(actor_ref(global, &options.name));
    let snapshot = if let Some(snapshot) = options.snapshot {
        snapshot
    } else {
        let actor = client.get_actor(api::GetActorRequest { actor: actor.clone() }).await?.into_inner();
        actor.last_snapshot.map(|snapshot| snapshot.id).filter(|id| !id.is_empty()).ok_or_else(|| {
            Failure::new(Exit::Refused, format!("actor {} has no snapshot to tag", options.name))
                .with_way_out(format!("make one with `substrate checkpoint {}`", options.name))
        })?
    };
    let request = api::TagSnapshotRequest { actor, snapshot, tag: options.tag, request_id: request_id() };
    let snapshot = Snapshot::from(client.tag_snapshot(request).await?.into_inner());
    let line = format!("snapshot/{} tags: {}", snapshot.id, snapshot.tags.join(", "));
    print_done(&snapshot, &line, global.output)
}

/// `substrate untag`.
pub async fn untag(options: Untag, global: &Global) -> Result<(), Failure> {
    let mut client = connect(global).await?;
    let request = api::UntagSnapshotRequest {
        actor: Some(actor_ref(global, &options.name)),
        tag: options.tag,
        request_id: request_id(),
    };
    let snapshot = Snapshot::from(client.untag_snapshot(request).await?.into_inner());
    let line = format!("snapshot/{} tags: {}", snapshot.id, snapshot.tags.join(", "));
    print_done(&snapshot, &line, global.output)
}

/// `substrate delete`.
pub async fn delete(options: Delete, global: &Global) -> Result<(), Failure> {
    let (kind, names) = match options.words.split_first() {
        Some((kind, rest)) if !rest.is_empty() => match kind.as_str() {
            "actor" | "actors" => ("actor", rest),
            "template" | "templates" => ("template", rest),
            "atespace" | "atespaces" => ("atespace", rest),
            _ => ("actor", &options.words[..]),
        },
        _ => ("actor", &options.words[..]),
    };
    let client = connect(global).await?;
    each(names, |name| {
        let mut client = client.clone();
        async move {
            let doing = format!("deleting {kind} {name}");
            let deleted = during(doing, async {
                match kind {
                    "template" => {
                        let request = api::DeleteTemplateRequest {
                            atespace: global.atespace.clone(),
                            name: name.clone(),
                            request_id: request_id(),
                        };
                        client.delete_template(request).await.map(|answer| answer.into_inner().deleted)
                    }
                    "atespace" => {
                        let request =
                            api::DeleteAtespaceRequest { name: name.clone(), request_id: request_id() };
                        client.delete_atespace(request).await.map(|answer| answer.into_inner().deleted)
                    }
                    _ => {
                        let request = api::DeleteActorRequest {
                            actor: Some(actor_ref(global, name)),
                            request_id: request_id(),
                        };
                        client.delete_actor(request).await.map(|answer| answer.into_inner().deleted)
                    }
                }
            })
            .await;
            let deleted = match deleted {
                Err(status) if status.code() == tonic::Code::NotFound => false,
                other => other?,
            };
            if !deleted && !options.ignore_not_found {
                return Err(Failure::new(Exit::NotFound, format!("there is no {kind} {name:?}"))
                    .with_way_out(format!("`substrate get {kind}s` lists those there are")));
            }
            match global.output {
                output if output.is_machine() => {
                    let value = serde_json::json!({"kind": kind, "name": name, "deleted": deleted});
                    print(&machine_text(&value, output)?)
                }
                Output::Name => print(&format!("{kind}/{name}\n")),
                _ if deleted => print(&format!("{kind}/{name} deleted\n")),
                _ => print(&format!("{kind}/{name} was not there\n")),
            }
        }
    })
    .await
}

/// `substrate cordon` and `uncordon`.
pub async fn cordon(options: Workers, global: &Global, uncordon: bool) -> Result<(), Failure> {
    let client = connect(global).await?;
    each(names_after(&options.words, &WORKER), |id| {
        let mut client = client.clone();
        async move {
            let request = api::CordonWorkerRequest { id: id.clone(), uncordon };
            let worker = Worker::from(client.cordon_worker(request).await?.into_inner());
            let line = format!("worker/{id} {}", if uncordon { "uncordoned" } else { "cordoned" });
            print_done(&worker, &line, global.output)
        }
    })
    .await
}

/// `substrate drain`.
pub async fn drain(options: Workers, global: &Global) -> Result<(), Failure> {
    let client = connect(global).await?;
    each(names_after(&options.words, &WORKER), |id| {
        let mut client = client.clone();
        async move {
            let request = api::DrainWorkerRequest { id: id.clone() };
            let answer = during(format!("draining {id}"), client.drain_worker(request)).await?;
            let worker = Worker::from(answer.into_inner());
            print_done(&worker, &format!("worker/{id} drained"), global.output)
        }
    })
    .await
}
