// SPDX-License-Identifier: Apache-2.0
//! Refusing: each message names the field and the way out, and a refusal leaves nothing behind. Pre-made templates.
use crate::stub::{Bench, sandbox, template, with_config};
use openshell_driver_substrate::driver_config::json_to_struct;
use openshell_driver_substrate::names;
use serde_json::json;
use substrate_proto::compute::{
    DriverResourceRequirements, DriverSandbox, GpuResourceRequirements, ResourceRequirements,
};
use substrate_proto::{ateapi, types};
use tonic::Code;

const ID: &str = "0198c0de-0000-7000-8000-000000000001";

fn changed(change: impl FnOnce(&mut DriverSandbox)) -> DriverSandbox {
    let mut it = sandbox(ID, "alice");
    change(&mut it);
    it
}

fn resources(cpu_request: &str, cpu_limit: &str, memory_limit: &str) -> DriverSandbox {
    changed(|it| {
        template(it).resources = Some(DriverResourceRequirements {
            cpu_request: cpu_request.to_owned(),
            cpu_limit: cpu_limit.to_owned(),
            memory_limit: memory_limit.to_owned(),
            ..Default::default()
        });
    })
}

fn platform(config: &serde_json::Value) -> DriverSandbox {
    changed(|it| template(it).platform_config = Some(json_to_struct(config)))
}

fn config(config: &serde_json::Value) -> DriverSandbox {
    with_config(sandbox(ID, "alice"), config)
}

#[tokio::test]
async fn everything_refusable_is_refused_in_validate_and_in_create_alike() {
    let mut bench = Bench::start().await;
    let gpu = ResourceRequirements { gpu: Some(GpuResourceRequirements { count: Some(1) }) };
    let rows: Vec<(DriverSandbox, &str, &str)> = vec![
        (changed(|it| it.spec = None), "spec", "missing"),
        (changed(|it| it.id.clear()), "id", "63 letters"),
        (changed(|it| it.id = "a/../b".to_owned()), "id", "63 letters"),
        (changed(|it| it.name.clear()), "name", "empty"),
        (changed(|it| it.name = "a\nb".to_owned()), "name", "control characters"),
        (changed(|it| template(it).image.clear()), "spec.template.image", "default_image"),
        (
            changed(|it| template(it).image = "registry.example/x".to_owned()),
            "spec.template.image",
            "@sha256",
        ),
        (changed(|it| template(it).image = "docker://x:1".to_owned()), "spec.template.image", "oci:/dir"),
        (
            changed(|it| template(it).agent_socket_path = "/run/a".to_owned()),
            "spec.template.agent_socket_path",
            "TCP port",
        ),
        (
            changed(|it| it.spec.as_mut().unwrap().command = vec![String::new()]),
            "spec.command[0]",
            "name a program",
        ),
        (changed(|it| it.spec.as_mut().unwrap().command.push("a\0".to_owned())), "spec.command[1]", "NUL"),
        (
            changed(|it| it.spec.as_mut().unwrap().resource_requirements = Some(gpu)),
            "spec.resource_requirements.gpu",
            "GPU",
        ),
        (
            changed(|it| drop(it.spec.as_mut().unwrap().environment.insert("A=B".to_owned(), String::new()))),
            "spec.environment",
            "A=B",
        ),
        (
            changed(|it| {
                drop(template(it).labels.insert("openshell.ai/managed".to_owned(), "no".to_owned()));
            }),
            "spec.template.labels",
            "reserved",
        ),
        (
            changed(|it| drop(template(it).labels.insert("a b".to_owned(), String::new()))),
            "spec.template.labels",
            "no key",
        ),
        (resources("", "two", ""), "spec.template.resources.cpu_limit", "500m"),
        (resources("", "", "lots"), "spec.template.resources.memory_limit", "512Mi"),
        (resources("2", "1", ""), "spec.template.resources.cpu_request", "larger than the limit"),
        (
            platform(&json!({"host_users": false})),
            "spec.template.platform_config.host_users",
            "user_namespaces",
        ),
        (
            platform(&json!({"runtime_class_name": "runc"})),
            "spec.template.platform_config.runtime_class_name",
            "gvisor",
        ),
        (
            platform(&json!({"resources_raw": {"limits": {"nvidia.com/gpu": 1}}})),
            "spec.template.platform_config.resources_raw",
            "leave the others out",
        ),
        (
            platform(&json!({"annotatoins": {}})),
            "spec.template.platform_config.annotatoins",
            "did you mean annotations",
        ),
        (
            platform(&json!({"annotations": {"substrate_template": "x"}})),
            "spec.template.platform_config.annotations.substrate_template",
            "substrate_actor_template",
        ),
        (
            platform(&json!({"annotations": {"openshell.ai/stopped": "1"}})),
            "spec.template.platform_config.annotations",
            "reserved",
        ),
        (
            platform(&json!({"substrate_actor_template": "Not A Name"})),
            "substrate_actor_template",
            "DNS-1123",
        ),
        (
            platform(&json!({"substrate_actor_template": "absent"})),
            "substrate_actor_template",
            "create it there first",
        ),
        (
            config(&json!({"sandboxClas": "gvisor"})),
            "spec.template.driver_config.substrate.sandboxClas",
            "did you mean `sandboxClass`",
        ),
        (
            config(&json!({"idle": {"suspendAfter": "soon"}})),
            "spec.template.driver_config.substrate.idle.suspendAfter",
            "60s",
        ),
        (
            config(&json!({"checkpoint": {"maxHeap": "much"}})),
            "spec.template.driver_config.substrate.checkpoint.maxHeap",
            "512Mi",
        ),
        (
            config(&json!({"volumes": [{"name": "D", "path": "/d"}]})),
            "spec.template.driver_config.substrate.volumes[0].name",
            "DNS-1123",
        ),
        (
            config(&json!({"volumes": [{"name": "d", "path": "/a/../b"}]})),
            "spec.template.driver_config.substrate.volumes[0].path",
            "absolute path",
        ),
        (
            config(&json!({"volumes": [{"name": "d", "path": "/d"}, {"name": "d", "path": "/e"}]})),
            "spec.template.driver_config.substrate.volumes[1]",
            "earlier volume",
        ),
        (
            config(&json!({"egress": {"allow": [{"host": "a.example", "cidr": "10.0.0.0/8"}]}})),
            "spec.template.driver_config.substrate.egress.allow[0]",
            "exactly one",
        ),
        (
            config(&json!({"egress": {"allow": [{"host": "10.0.0.1"}]}})),
            "spec.template.driver_config.substrate.egress.allow[0].host",
            "cidr",
        ),
        (
            config(&json!({"egress": {"allow": [{"cidr": "10.0.0.0/8"}]}})),
            "spec.template.driver_config.substrate.egress.allow[0].ports",
            "ports named",
        ),
        (
            config(&json!({"egress": {"allow": [{"cidr": "10.0.0.0/33", "ports": [1]}]}})),
            "spec.template.driver_config.substrate.egress.allow[0].cidr",
            "192.0.2.0/24",
        ),
        (
            config(&json!({"readiness": {"tcpPort": 1, "exec": ["x"]}})),
            "spec.template.driver_config.substrate.readiness",
            "more than one",
        ),
        (
            config(&json!({"hooks": {"afterRestore": {"command": []}}})),
            "spec.template.driver_config.substrate.hooks.afterRestore.command",
            "no program",
        ),
        (config(&json!({"ports": [80, 80]})), "spec.template.driver_config.substrate.ports[1]", "twice"),
        (
            config(&json!({"retention": {"keepLast": 0}})),
            "spec.template.driver_config.substrate.retention.keepLast",
            "at least one",
        ),
        (config(&json!({"workingDir": "x"})), "spec.template.driver_config.substrate.workingDir", "absolute"),
        (config(&json!({"template": "x"})), "substrate_actor_template", "create it there first"),
        (
            changed(|it| template(it).image = "registry.example/missing:1".to_owned()),
            "there is no image",
            "registry.example/missing:1",
        ),
    ];
    for (wanted, path, way_out) in rows {
        let error = bench.validate(wanted.clone()).await.expect_err(path);
        assert!(error.message().contains(path) && error.message().contains(way_out), "{path}: {error}");
        assert!(
            matches!(error.code(), Code::InvalidArgument | Code::FailedPrecondition | Code::NotFound),
            "{error}"
        );
        let refused = bench.create(wanted).await.expect_err(path);
        assert_eq!(refused.code(), Code::FailedPrecondition, "reaches the user through the gateway");
        assert_eq!(refused.message(), error.message());
        assert!(bench.stub.inventory().is_empty(), "{path} left {:?}", bench.stub.inventory());
    }
    assert_eq!(bench.stub.calls("create_actor"), 0);
}

#[tokio::test]
async fn several_faults_are_named_at_once_and_a_token_never() {
    let mut bench = Bench::start().await;
    let mut wanted = resources("", "two", "lots");
    wanted.spec.as_mut().unwrap().sandbox_token = "secret-token".to_owned();
    let error = bench.create(wanted.clone()).await.unwrap_err();
    assert!(error.message().contains("cpu_limit") && error.message().contains("memory_limit"), "{error}");
    let read = openshell_driver_substrate::validate::read(&sandbox(ID, "alice"), &bench.config).unwrap();
    assert!(!error.message().contains("secret-token") && !format!("{read:?}").contains("signature"));
}

#[tokio::test]
async fn what_is_fine_passes() {
    let mut bench = Bench::start().await;
    for wanted in [
        sandbox(ID, "alice"),
        resources("250m", "500m", "512Mi"),
        platform(&json!({"runtime_class_name": "gvisor", "annotations": {"team.example/owner": "ops"}})),
        config(&json!({"substrate": {"sandboxClass": "microvm", "idle": {"suspendAfter": "never"}}})),
        changed(|it| it.spec.as_mut().unwrap().command.clear()),
        changed(|it| it.workspace.clear()),
        changed(|it| template(it).image = "oci:/images/helpdesk:latest".to_owned()),
    ] {
        bench.validate(wanted).await.unwrap();
    }
}

fn premade(stub: &crate::stub::Stub) {
    let mut world = stub.world.lock().unwrap();
    world
        .atespaces
        .insert("team-a".to_owned(), ateapi::Atespace { name: "team-a".to_owned(), ..Default::default() });
    let image = format!("registry.example/agent@sha256:{}", "a".repeat(64));
    world.templates.insert(
        ("team-a".to_owned(), "agent".to_owned()),
        ateapi::Template {
            atespace: "team-a".to_owned(),
            name: "agent".to_owned(),
            spec: Some(types::TemplateSpec {
                sandbox_class: "gvisor".to_owned(),
                containers: vec![types::Container {
                    image,
                    command: vec!["/bin/agent".to_owned()],
                    ports: vec![8080],
                    ..Default::default()
                }],
                resources: Some(types::Resources { memory: "512MiB".to_owned(), ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        },
    );
}

#[tokio::test]
async fn a_premade_template_is_used_and_never_reaped() {
    let mut bench = Bench::start().await;
    premade(&bench.stub);
    for (index, named) in [
        platform(&json!({"substrate_actor_template": "agent"})),
        platform(&json!({"annotations": {"substrate_actor_template": "agent"}})),
        config(&json!({"template": "agent", "ports": [8080], "resources": {"memory": "512Mi"}})),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("p{index}");
        bench.create(DriverSandbox { id: id.clone(), ..named }).await.unwrap();
        let template = bench.stub.actor(&id).unwrap().spec.unwrap().template;
        assert_eq!(template, "agent");
        assert!(bench.delete(&id).await.unwrap());
    }
    assert_eq!(bench.stub.inventory(), ["atespace team-a", "template team-a/agent"]);
}

#[tokio::test]
async fn a_premade_template_that_would_not_do_as_asked_is_refused() {
    let mut bench = Bench::start().await;
    premade(&bench.stub);
    let with = |more: serde_json::Value| {
        let mut all = json!({"template": "agent"});
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config(&all)
    };
    let mut other_image = with(json!({}));
    template(&mut other_image).image = format!("registry.example/agent@sha256:{}", "b".repeat(64));
    let mut other_command = with(json!({}));
    other_command.spec.as_mut().unwrap().command = vec!["/bin/other".to_owned()];
    for (wanted, path) in [
        (other_image, "spec.template.image"),
        (other_command, "spec.command"),
        (with(json!({"sandboxClass": "microvm"})), "sandboxClass"),
        (with(json!({"resources": {"memory": "1GiB"}})), "resources.memory_limit"),
        (with(json!({"ports": [9090]})), "ports"),
        (with(json!({"idle": {"suspendAfter": "5s"}})), "idle"),
        (with(json!({"egress": {"allow": []}})), "egress"),
        (with(json!({"volumes": [{"name": "d", "path": "/d"}]})), "volumes"),
    ] {
        let error = bench.validate(wanted).await.expect_err(path);
        assert!(error.message().contains(path) && error.message().contains("\"agent\""), "{path}: {error}");
    }
    // What the gateway fills in by itself is not taken for a wish.
    let mut shell = with(json!({}));
    shell.spec.as_mut().unwrap().command = vec!["/bin/bash".to_owned(), "-l".to_owned()];
    shell.spec.as_mut().unwrap().tty = true;
    bench.validate(shell).await.unwrap();
}

#[tokio::test]
async fn advisories_reach_the_user_as_platform_events() {
    use substrate_proto::compute::watch_sandboxes_event::Payload;
    let mut bench = Bench::start().await;
    let mut watching = bench.watch().await.unwrap();
    let mut wanted = resources("250m", "500m", "");
    wanted.spec.as_mut().unwrap().sandbox_token = {
        use base64::Engine as _;
        let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(r#"{"exp":4102444800}"#);
        format!("h.{claims}.s")
    };
    bench.create(wanted).await.unwrap();
    let mut warned = Vec::new();
    while warned.len() < 2 {
        if let Some(Payload::PlatformEvent(event)) = watching.message().await.unwrap().unwrap().payload {
            let event = event.event.unwrap();
            if event.r#type == "Warning" {
                warned.push(event.message);
            }
        }
    }
    assert!(warned[0].starts_with("resources:") && warned[1].contains("ttl_secs"), "{warned:?}");
    assert_eq!(names::uid(ID), ID);
}
