// SPDX-License-Identifier: Apache-2.0
//! `substrate describe`: everything about one thing, with its snapshots and what happened to it.
use serde::Serialize;
use substrate_proto::ateapi as api;
use substrate_proto::types;

use crate::args::{Describe, DescribeKind, Global};
use crate::client::{actor_ref, connect};
use crate::cmd::get::{list_events, list_snapshots};
use crate::cmd::{columns, machine_text, print};
use crate::failure::{Exit, Failure};
use crate::quantity::bytes;
use crate::table::Facts;
use crate::time::{age, now_ms};
use crate::view::{Actor, Event, Snapshot, Template, View as _, Worker, pairs, short_digest, short_image};

/// Newest events shown.
const EVENTS: usize = 20;

/// `substrate describe`.
pub async fn run(options: Describe, global: &Global) -> Result<(), Failure> {
    let mut client = connect(global).await?;
    let name = &options.name;
    match options.kind {
        DescribeKind::Actor => {
            let reference = actor_ref(global, name);
            let actor = client.get_actor(api::GetActorRequest { actor: Some(reference) }).await?.into_inner();
            let by_uid = api::ActorRef { uid: actor.uid.clone(), ..api::ActorRef::default() };
            let snapshots = list_snapshots(&mut client, &actor.atespace, Some(by_uid)).await?;
            let events = list_events(&mut client, &actor.atespace, &actor.name, "").await?;
            let since = age(actor.state_since_ms, now_ms());
            let actor = Actor::from(actor);
            if global.output.is_machine() {
                #[derive(Serialize)]
                struct All {
                    actor: Actor,
                    snapshots: Vec<Snapshot>,
                    events: Vec<Event>,
                }
                return print(&machine_text(&All { actor, snapshots, events }, global.output)?);
            }
            print(&actor_text(&actor, &since, &snapshots, newest(&events), global))
        }
        DescribeKind::Worker => {
            let workers = client.list_workers(api::ListWorkersRequest {}).await?.into_inner().workers;
            let worker =
                workers.into_iter().find(|worker| worker.id == *name).map(Worker::from).ok_or_else(|| {
                    Failure::new(Exit::NotFound, format!("there is no worker {name:?}"))
                        .with_way_out("`substrate get workers` lists those there are")
                })?;
            let events = list_events(&mut client, "", name, "").await?;
            if global.output.is_machine() {
                #[derive(Serialize)]
                struct All {
                    worker: Worker,
                    events: Vec<Event>,
                }
                return print(&machine_text(&All { worker, events }, global.output)?);
            }
            print(&worker_text(&worker, newest(&events), global))
        }
        DescribeKind::Template => {
            let request = api::GetTemplateRequest { atespace: global.atespace.clone(), name: name.clone() };
            let template = Template::from(client.get_template(request).await?.into_inner());
            if global.output.is_machine() {
                return print(&machine_text(&template, global.output)?);
            }
            print(&template_text(&template)?)
        }
    }
}

fn newest(events: &[Event]) -> &[Event] {
    &events[events.len().saturating_sub(EVENTS)..]
}

fn actor_text(
    actor: &Actor,
    since: &str,
    snapshots: &[Snapshot],
    events: &[Event],
    global: &Global,
) -> String {
    let mut facts = Facts::default();
    facts.add("Name", &actor.name);
    facts.add("Atespace", &actor.atespace);
    facts.add("Uid", &actor.uid);
    facts.add("State", format!("{} for {since}", actor.state_text()));
    facts.add("Reason", &actor.reason);
    facts.add("Message", &actor.message);
    if let Some(progress) = &actor.progress {
        facts.add("Progress", format!("{} {}%", progress.step.replace('_', " "), progress.percent));
    }
    facts.add("Suspended by", actor.suspended_by.clone().unwrap_or_default());
    if let Some(exit) = &actor.exit {
        let signal = if exit.signal == 0 { String::new() } else { format!(", signal {}", exit.signal) };
        let at = exit.at.clone().unwrap_or_default();
        facts.add(
            "Exit",
            format!("code {}{signal}, container {} {at}", exit.code, exit.container).trim().to_owned(),
        );
    }
    facts.add("Template", &actor.template);
    facts.add("Sandbox class", &actor.sandbox_class);
    facts.add("Generation", actor.generation.to_string());
    facts.add("Worker", actor.worker.clone().unwrap_or_else(|| "none".to_owned()));
    facts.add("Node", actor.node.clone().unwrap_or_default());
    facts.add("Ports", actor.ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
    facts.add("Wakes on traffic", if actor.wake_on_traffic { "yes" } else { "no" });
    facts.add("Memory", bytes(actor.memory_bytes));
    facts.add("Disk", bytes(actor.disk_bytes));
    facts.add("Created", actor.created_at.clone().unwrap_or_default());
    facts.add("Labels", pairs(&actor.labels));
    facts.add("Annotations", pairs(&actor.annotations));
    let mut text = facts.render();
    section(&mut text, "Snapshots", snapshots.is_empty(), || {
        Snapshot::table(snapshots, columns(global.output, false)).render()
    });
    events_section(&mut text, events, global);
    text
}

fn worker_text(worker: &Worker, events: &[Event], global: &Global) -> String {
    let mut facts = Facts::default();
    facts.add("Id", &worker.id);
    facts.add("State", worker.state);
    facts.add("Phase", &worker.phase);
    facts.add("Cordoned", if worker.cordoned { "yes" } else { "no" });
    if let Some(actor) = &worker.actor {
        let atespace = worker.atespace.clone().unwrap_or_default();
        facts.add("Actor", format!("{atespace}/{actor}, generation {}", worker.generation));
    }
    facts.add("Node", &worker.node);
    facts.add("Pool", &worker.pool);
    facts.add("Sandbox class", &worker.sandbox_class);
    facts.add("Runtime", format!("{} sha256:{}", worker.runtime_version, worker.runtime_digest));
    facts.add("Pid", worker.pid.to_string());
    facts.add("Processes", worker.processes.to_string());
    facts.add("Memory", bytes(worker.memory_bytes));
    let mut text = facts.render();
    events_section(&mut text, events, global);
    text
}

fn template_text(template: &Template) -> Result<String, Failure> {
    let mut facts = Facts::default();
    facts.add("Name", &template.name);
    facts.add("Atespace", &template.atespace);
    facts.add("Uid", &template.uid);
    facts.add("Digest", short_digest(&template.spec_digest));
    facts.add("Created", template.created_at.clone().unwrap_or_default());
    facts.add("Labels", pairs(&template.labels));
    facts.add("Sandbox class", template.class());
    for container in &template.spec.containers {
        container_facts(&mut facts, container);
    }
    let spec = machine_text(&template.spec, crate::args::Output::Yaml)?;
    Ok(format!("{}\nSpec:\n{}", facts.render(), indent(&spec)))
}

fn container_facts(facts: &mut Facts, container: &types::Container) {
    facts.heading(&format!("Container {}", container.name));
    facts.sub("Image", short_image(&container.image));
    facts.sub("Command", container.command.join(" "));
    facts.sub("Arguments", container.args.join(" "));
    facts.sub("Ports", container.ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
}

fn indent(text: &str) -> String {
    let mut indented = String::new();
    for line in text.lines() {
        indented.extend(["  ", line, "\n"]);
    }
    indented
}

fn section(text: &mut String, title: &str, is_empty: bool, body: impl FnOnce() -> String) {
    if is_empty {
        text.extend(["\n", title, ": none\n"]);
    } else {
        text.extend(["\n", title, ":\n", &indent(&body())]);
    }
}

fn events_section(text: &mut String, events: &[Event], global: &Global) {
    section(text, "Events", events.is_empty(), || {
        Event::table(events, columns(global.output, false)).render()
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_has_facts_snapshots_and_events() {
        let actor = Actor::from(api::Actor {
            name: "alice".into(),
            atespace: "default".into(),
            uid: "u1".into(),
            state: api::ActorState::Crashed as i32,
            reason: "SNAPSHOT_CORRUPT".into(),
            message: "pages.img: digest differs".into(),
            ..Default::default()
        });
        let events = [Event::from(api::Event {
            kind: "actor".into(),
            subject: "alice".into(),
            reason: "Crashed".into(),
            warning: true,
            ..Default::default()
        })];
        let global = Global {
            atespace: "default".into(),
            socket: "/s".into(),
            remote: crate::args::Remote::default(),
            output: crate::args::Output::Table,
        };
        let text = actor_text(&actor, "5s", &[], &events, &global);
        assert!(text.contains("State:             CRASHED for 5s\n"), "{text}");
        assert!(text.contains("Worker:            none\n"), "{text}");
        assert!(text.contains("\nSnapshots: none\n"), "{text}");
        assert!(text.contains("\nEvents:\n  AGE   TYPE      REASON    SUBJECT       MESSAGE\n"), "{text}");
        assert!(!text.contains("Annotations"), "{text}");
    }
}
