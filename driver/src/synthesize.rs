// SPDX-License-Identifier: Apache-2.0
//! A sandbox request as a template and an actor.
//!
//! The template holds what runs: image, command, class, resources, volumes and policies. It is keyed on exactly that
//! ([`names::template`], after its images were pinned), so sandboxes that run the same share it. Who the sandbox is
//! (environment, token, labels) goes into the actor and never into the template. Fields that nobody set stay unset:
//! their defaults are the control plane's. A pre-made template is used as it is, or refused where it would not do what
//! the caller asked.
use std::collections::BTreeMap;

use substrate_proto::types::{
    ActorSpec, CheckpointPolicy, Container, EgressPolicy, EgressRule, Hook, Hooks, HttpGet, IdlePolicy,
    Readiness, Resources, RetentionPolicy, SecurityContext, TemplateSpec, Volume, VolumeMount,
};

use crate::config::Config;
use crate::driver_config::{self, DriverConfig, Durability, OnReply, Protocol};
use crate::failure::Violation;
use crate::validate::{GATEWAY_DEFAULT_COMMAND, Wanted};
use crate::{image, names, quantity};

/// Name of the only container of a synthesized template.
pub const CONTAINER: &str = "main";

/// The template of a request, images as given.
pub fn template(wanted: &Wanted, config: &Config) -> TemplateSpec {
    let asked = &wanted.config;
    let class = wanted.class.unwrap_or(config.default_sandbox_class);
    let container = Container {
        name: CONTAINER.to_owned(),
        image: wanted.image.clone(),
        command: wanted.command.clone(),
        args: asked.args.clone().unwrap_or_default(),
        working_dir: asked.working_dir.clone().unwrap_or_default(),
        security_context: security_context(asked, &config.request_capabilities),
        readiness: asked.readiness.as_ref().map(readiness),
        ports: asked.ports.iter().map(|port| u32::from(*port)).collect(),
        volume_mounts: asked
            .volumes
            .iter()
            .map(|volume| VolumeMount {
                volume: volume.name.clone(),
                path: volume.path.clone(),
                read_only: volume.read_only,
            })
            .collect(),
        tty: wanted.tty,
        read_only_root: asked.read_only_root,
        ..Default::default()
    };
    TemplateSpec {
        sandbox_class: class.as_str().to_owned(),
        containers: vec![container],
        resources: resources(wanted),
        volumes: asked
            .volumes
            .iter()
            .map(|volume| Volume { name: volume.name.clone(), size: volume.size.clone().unwrap_or_default() })
            .collect(),
        idle: asked.idle.as_ref().map(|idle| IdlePolicy {
            suspend_after: idle.suspend_after.clone().unwrap_or_default(),
            pause_first: idle.pause_first.clone().unwrap_or_default(),
        }),
        checkpoint: asked.checkpoint.as_ref().map(checkpoint),
        egress: asked.egress.as_ref().map(egress),
        hooks: asked.hooks.as_ref().map(|hooks| Hooks {
            before_snapshot: hooks.before_snapshot.as_ref().map(hook),
            after_restore: hooks.after_restore.as_ref().map(hook),
        }),
        retention: asked
            .retention
            .as_ref()
            .map(|retention| RetentionPolicy { keep_last: retention.keep_last.unwrap_or_default() }),
        worker_pool: asked.worker_pool.clone().unwrap_or_else(|| config.default_worker_pool.clone()),
        holds_identity: false,
        golden: false,
    }
}

/// The actor of a request, without what the supervisor's mode adds.
pub fn actor(wanted: &Wanted, template: &str, create_mark: &str) -> ActorSpec {
    let mut labels = wanted.labels.clone();
    labels.insert(names::MANAGED.to_owned(), "true".to_owned());
    labels.insert(names::SANDBOX_ID.to_owned(), wanted.id.clone());
    let mut annotations = wanted.annotations.clone();
    for (key, value) in [
        (names::SANDBOX_NAME, wanted.name.as_str()),
        (names::WORKSPACE, &wanted.workspace),
        (names::REQUEST_DIGEST, &wanted.digest),
        (names::CREATE, create_mark),
    ] {
        annotations.insert(key.to_owned(), value.to_owned());
    }
    ActorSpec {
        template: template.to_owned(),
        env: wanted.env.clone(),
        files: Vec::new(),
        labels,
        annotations,
        wake_on_traffic_disabled: wanted.config.wake_on_traffic == Some(false),
    }
}

/// Labels of a synthesized template.
pub fn template_labels() -> BTreeMap<String, String> {
    [names::MANAGED, names::SYNTHESIZED].map(|key| (key.to_owned(), "true".to_owned())).into()
}

/// What a pre-made template would not do although the caller asked for it. `pinned_image` is the caller's image with
/// its tag resolved, where that was done.
pub fn unmet(
    wanted: &Wanted,
    config: &Config,
    premade: &TemplateSpec,
    pinned_image: Option<&str>,
) -> Vec<Violation> {
    let asked = &wanted.config;
    let ours = template(wanted, config);
    let empty = Container::default();
    let theirs = premade.containers.first().unwrap_or(&empty);
    let own = ours.containers.first().unwrap_or(&empty);
    let name = wanted.premade.as_deref().unwrap_or_default();
    let mut violations = Vec::new();
    let mut differs = |path: &str, has: String| {
        violations.push(Violation::new(
            path,
            format!("differs from the pre-made template {name:?}, which has {has}: leave it out or use another template"),
        ));
    };
    let class = if premade.sandbox_class.is_empty() { "gvisor" } else { &premade.sandbox_class };
    if wanted.class.is_some_and(|asked| asked.as_str() != class) {
        differs(&config_path("sandboxClass"), class.to_owned());
    }
    // The gateway fills in the default image where the user names none.
    let image_asked = !wanted.image.is_empty() && wanted.image != config.default_image;
    if image_asked && !same_image(pinned_image.unwrap_or(&wanted.image), &theirs.image) {
        differs("spec.template.image", theirs.image.clone());
    }
    // Likewise the gateway's shell stands for no command at all.
    let given = !wanted.command.is_empty() && wanted.command != GATEWAY_DEFAULT_COMMAND;
    if given && wanted.command != [theirs.command.clone(), theirs.args.clone()].concat() {
        differs("spec.command", format!("{:?}", theirs.command));
    }
    if given && wanted.tty && !theirs.tty {
        differs("spec.tty", "no terminal".to_owned());
    }
    let limits = premade.resources.clone().unwrap_or_default();
    if wanted.millicores.is_some() && wanted.millicores != quantity::millicores(&limits.cpu).ok() {
        differs("spec.template.resources.cpu_limit", format!("{:?}", limits.cpu));
    }
    if wanted.memory.is_some() && wanted.memory != quantity::bytes(&limits.memory).ok() {
        differs("spec.template.resources.memory_limit", format!("{:?}", limits.memory));
    }
    let pids = asked.resources.as_ref().and_then(|resources| resources.pids);
    if pids.is_some_and(|pids| pids != limits.pids) {
        differs(&config_path("resources.pids"), limits.pids.to_string());
    }
    let parts = [
        ("idle", asked.idle.is_some(), ours.idle == premade.idle),
        ("checkpoint", asked.checkpoint.is_some(), ours.checkpoint == premade.checkpoint),
        ("egress", asked.egress.is_some(), ours.egress == premade.egress),
        ("hooks", asked.hooks.is_some(), ours.hooks == premade.hooks),
        ("retention", asked.retention.is_some(), ours.retention == premade.retention),
        ("workerPool", asked.worker_pool.is_some(), ours.worker_pool == premade.worker_pool),
        ("readiness", asked.readiness.is_some(), own.readiness == theirs.readiness),
        ("ports", !asked.ports.is_empty(), own.ports == theirs.ports),
        ("args", asked.args.is_some(), own.args == theirs.args),
        ("workingDir", asked.working_dir.is_some(), own.working_dir == theirs.working_dir),
        ("readOnlyRoot", asked.read_only_root, theirs.read_only_root),
        (
            "securityContext",
            asked.security_context.is_some(),
            security_context(asked, &[]) == theirs.security_context,
        ),
        (
            "volumes",
            !asked.volumes.is_empty(),
            ours.volumes == premade.volumes && own.volume_mounts == theirs.volume_mounts,
        ),
    ];
    for (field, asked, same) in parts {
        if asked && !same {
            differs(&config_path(field), "other settings".to_owned());
        }
    }
    violations
}

fn config_path(field: &str) -> String {
    format!("spec.template.driver_config.substrate.{field}")
}

fn same_image(asked: &str, has: &str) -> bool {
    asked == has || image::digest(asked).is_some_and(|digest| image::digest(has) == Some(digest))
}

fn security_context(asked: &DriverConfig, extra: &[String]) -> Option<SecurityContext> {
    let given = asked.security_context.clone();
    if given.is_none() && extra.is_empty() {
        return None;
    }
    let given = given.unwrap_or_default();
    let mut added = given.add_capabilities;
    added.extend(extra.iter().cloned());
    added.sort();
    added.dedup();
    Some(SecurityContext {
        run_as: given.run_as.unwrap_or_default(),
        add_capabilities: added,
        drop_capabilities: given.drop_capabilities,
        no_new_privileges: given.no_new_privileges,
        seccomp: None,
    })
}

fn resources(wanted: &Wanted) -> Option<Resources> {
    let resources = Resources {
        cpu: wanted.millicores.map(quantity::show_millicores).unwrap_or_default(),
        memory: wanted.memory.map(quantity::show_bytes).unwrap_or_default(),
        pids: wanted.config.resources.as_ref().and_then(|resources| resources.pids).unwrap_or_default(),
    };
    (resources != Resources::default()).then_some(resources)
}

fn readiness(asked: &driver_config::Readiness) -> Readiness {
    Readiness {
        http_get: asked
            .http_get
            .as_ref()
            .map(|get| HttpGet { path: get.path.clone(), port: u32::from(get.port) }),
        tcp_port: asked.tcp_port.map(u32::from).unwrap_or_default(),
        exec: asked.exec.clone().unwrap_or_default(),
        timeout: asked.timeout.clone().unwrap_or_default(),
        period: asked.period.clone().unwrap_or_default(),
    }
}

fn checkpoint(asked: &driver_config::Checkpoint) -> CheckpointPolicy {
    CheckpointPolicy {
        on_reply: match asked.on_reply {
            None => "",
            Some(OnReply::Async) => "async",
            Some(OnReply::Sync) => "sync",
        }
        .to_owned(),
        durability: match asked.durability {
            None => "",
            Some(Durability::Node) => "node",
            Some(Durability::Durable) => "durable",
        }
        .to_owned(),
        max_hold: asked.max_hold.clone().unwrap_or_default(),
        max_heap: asked.max_heap.clone().unwrap_or_default(),
        interval: asked.interval.clone().unwrap_or_default(),
    }
}

fn egress(asked: &driver_config::Egress) -> EgressPolicy {
    let rule = |rule: &driver_config::EgressRule| EgressRule {
        host: rule.host.clone().unwrap_or_default(),
        cidr: rule.cidr.clone().unwrap_or_default(),
        ports: rule.ports.iter().map(|port| u32::from(*port)).collect(),
        protocol: match rule.protocol {
            None => "",
            Some(Protocol::Tls) => "tls",
            Some(Protocol::Http) => "http",
            Some(Protocol::Tcp) => "tcp",
        }
        .to_owned(),
    };
    EgressPolicy { allow: asked.allow.iter().map(rule).collect() }
}

fn hook(asked: &driver_config::Hook) -> Hook {
    Hook { container: CONTAINER.to_owned(), command: asked.command.clone() }
}
