// SPDX-License-Identifier: Apache-2.0
//! Creating: what becomes of a request, that a retry finds the first attempt's work, and that nothing is left behind
//! whatever fails.
use crate::stub::{Bench, Fault, Stub, sandbox, template, with_config};
use openshell_driver_substrate::{names, supervisor};
use serde_json::json;
use substrate_proto::ateapi;
use tonic::Code;

const ID: &str = "0198c0de-0000-7000-8000-000000000001";
const OTHER: &str = "0198c0de-0000-7000-8000-000000000002";

#[tokio::test]
async fn a_sandbox_becomes_a_shared_template_and_an_actor_with_its_identity() {
    let mut bench = Bench::start().await;
    let mut alice = sandbox(ID, "alice");
    alice.spec.as_mut().unwrap().environment.insert("WHO".to_owned(), "alice".to_owned());
    template(&mut alice).environment.insert("WHO".to_owned(), "template".to_owned());
    alice
        .spec
        .as_mut()
        .unwrap()
        .environment
        .insert("OPENSHELL_SANDBOX_TOKEN".to_owned(), "forged".to_owned());
    bench.create(alice).await.unwrap();
    bench.create(sandbox(OTHER, "Bob Jr.")).await.unwrap();
    check_alice(&bench.stub);
    let bob = bench.get(OTHER).await.unwrap();
    assert_eq!((bob.name.as_str(), bob.workspace.as_str()), ("Bob Jr.", "team-a"), "echoed exactly");
}

fn check_alice(stub: &Stub) {
    let world = stub.world.lock().unwrap();
    assert_eq!(world.templates.len(), 1, "equal content, one template");
    let ((space, name), template) = world.templates.iter().next().unwrap();
    assert_eq!(space, "team-a");
    let spec = template.spec.as_ref().unwrap();
    assert!(name.starts_with("os-") && *name == names::template(spec));
    assert!(spec.containers[0].image.contains("@sha256:"), "pinned");
    assert!(spec.containers[0].env.is_empty(), "no environment in a template");
    let actor = &world.actors[ID];
    assert_eq!(actor.name, "alice");
    let spec = actor.spec.as_ref().unwrap();
    assert_eq!(spec.env["WHO"], "alice");
    assert_eq!(spec.env["OPENSHELL_SANDBOX_ID"], ID);
    assert!(!spec.env.contains_key("OPENSHELL_SANDBOX_TOKEN"));
    assert_eq!(spec.labels[names::SANDBOX_ID], ID);
    assert!(spec.annotations[names::CREATE].starts_with("made-"));
    let file = &world.files[ID][0];
    assert_eq!((file.path.as_str(), file.mode), (supervisor::TOKEN_PATH, 0o400));
    assert_eq!(file.content, b"header.e30.signature");
}

#[tokio::test]
async fn what_differs_gets_a_template_of_its_own() {
    let mut bench = Bench::start().await;
    let mut n = 0;
    for config in [
        json!({}),
        json!({"idle": {"suspendAfter": "20s"}}),
        json!({"egress": {"allow": [{"host": "api.example.com"}]}}),
        json!({"volumes": [{"name": "data", "path": "/data"}]}),
        json!({"sandboxClass": "microvm"}),
        json!({"substrate": {"ports": [8080]}}),
    ] {
        n += 1;
        bench.create(with_config(sandbox(&format!("s{n}"), &format!("s{n}")), &config)).await.unwrap();
    }
    assert_eq!(bench.stub.world.lock().unwrap().templates.len(), 6);
}

#[tokio::test]
async fn a_retry_is_idempotent_and_a_stranger_is_refused() {
    let mut bench = Bench::start().await;
    bench.create(sandbox(ID, "alice")).await.unwrap();
    let before = bench.stub.inventory();
    let mut again = sandbox(ID, "alice");
    again.spec.as_mut().unwrap().sandbox_token = "another.e30.token".to_owned();
    bench.create(again).await.unwrap();
    assert_eq!(bench.stub.inventory(), before);
    let stranger = bench.create(sandbox(ID, "mallory")).await.unwrap_err();
    assert_eq!(stranger.code(), Code::AlreadyExists);
    let namesake = bench.create(sandbox(OTHER, "alice")).await.unwrap_err();
    assert_eq!(namesake.code(), Code::AlreadyExists);
    assert!(namesake.message().contains("\"alice\""), "{namesake}");
    assert_eq!(bench.stub.inventory(), before);
}

/// Every call that a create makes of the control plane.
const CALLS: [&str; 7] = [
    "get_atespace",
    "create_atespace",
    "dry_run",
    "create_template",
    "get_actor",
    "create_actor",
    "update_actor",
];

#[tokio::test]
async fn a_failure_at_any_call_leaves_nothing_behind() {
    let codes = [Code::Internal, Code::DeadlineExceeded, Code::ResourceExhausted];
    for method in CALLS {
        for code in codes {
            for fault in [Fault::Before(code), Fault::After(code)] {
                for nth in 0..3 {
                    let mut bench = Bench::start().await;
                    // The sweep of the start makes calls too; let it pass.
                    bench.stub.until(|stub| stub.calls("list_atespaces") > 0).await;
                    // Only one call of the method fails: the ones before it pass.
                    bench.stub.fault_nth(method, nth, fault);
                    let result = bench.create(sandbox(ID, "alice")).await;
                    // A fault may not come up, or not matter: then the sandbox is whole.
                    let Err(error) = result else {
                        assert!(
                            bench.stub.fault_is_pending(method) || survivable(method, fault),
                            "{method} {fault:?} {nth}"
                        );
                        assert_eq!(bench.stub.inventory().len(), 3);
                        assert_eq!(bench.list().await.unwrap().len(), 1);
                        continue;
                    };
                    assert!(error.message().contains("injected"), "{method}: {error}");
                    assert_eq!(bench.stub.inventory(), Vec::<String>::new(), "{method} {fault:?} {nth}");
                }
            }
        }
    }
}

/// Work that was done and is found done although its answer was lost.
fn survivable(method: &str, fault: Fault) -> bool {
    method == "update_actor" && matches!(fault, Fault::After(_))
}

#[tokio::test]
async fn a_failure_spares_the_template_that_another_sandbox_uses() {
    let mut bench = Bench::start().await;
    bench.create(sandbox(ID, "alice")).await.unwrap();
    let before = bench.stub.inventory();
    bench.stub.fault("create_actor", &[Fault::Before(Code::ResourceExhausted)]);
    let error = bench.create(sandbox(OTHER, "bob")).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "passes the gateway with its message");
    assert_eq!(bench.stub.inventory(), before);
}

#[tokio::test]
async fn what_could_not_be_taken_back_at_once_is_taken_back_later() {
    let mut bench = Bench::start().await;
    bench.stub.fault("update_actor", &[Fault::Before(Code::Internal)]);
    bench.stub.fault("delete_actor", &[Fault::Before(Code::Internal), Fault::Before(Code::Internal)]);
    bench.create(sandbox(ID, "alice")).await.unwrap_err();
    bench.stub.until(|stub| stub.inventory().is_empty()).await;
    assert!(bench.stub.calls("delete_actor") >= 3);
}

#[tokio::test]
async fn a_restarted_driver_takes_back_what_a_crash_left() {
    let stub = Stub::new();
    {
        let mut world = stub.world.lock().unwrap();
        let label = |key: &str| (key.to_owned(), "true".to_owned());
        let now = openshell_driver_substrate::mirror::now_ms();
        for (name, created_ms) in [("team-a", now), ("left", now), ("old", now - 3_600_000)] {
            world.atespaces.insert(
                name.to_owned(),
                ateapi::Atespace {
                    name: name.to_owned(),
                    labels: [label(names::MANAGED), label(names::IMPLICIT)].into(),
                    created_ms,
                    ..Default::default()
                },
            );
        }
        for (name, ours) in [("os-crashed", true), ("premade", false)] {
            let labels =
                if ours { [label(names::MANAGED), label(names::SYNTHESIZED)].into() } else { [].into() };
            world.templates.insert(
                ("team-a".to_owned(), name.to_owned()),
                ateapi::Template {
                    atespace: "team-a".to_owned(),
                    name: name.to_owned(),
                    labels,
                    ..Default::default()
                },
            );
        }
        let mut actor = ateapi::Actor {
            uid: ID.to_owned(),
            atespace: "team-a".to_owned(),
            name: "alice".to_owned(),
            state: ateapi::ActorState::Running.into(),
            spec: Some(substrate_proto::types::ActorSpec {
                template: "os-crashed".to_owned(),
                labels: [label(names::MANAGED), (names::SANDBOX_ID.to_owned(), ID.to_owned())].into(),
                annotations: [(names::CREATE.to_owned(), "pending-x".to_owned())].into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        world.actors.insert(ID.to_owned(), actor.clone());
        // A foreign actor that merely has the annotation.
        actor.uid = "foreign".to_owned();
        actor.name = "foreign".to_owned();
        let spec = actor.spec.as_mut().unwrap();
        spec.labels.clear();
        spec.template = "premade".to_owned();
        world.actors.insert("foreign".to_owned(), actor);
    }
    let bench = Bench::with(stub, |_| {}).await;
    let expected = ["atespace old", "atespace team-a", "template team-a/premade", "actor team-a/foreign"];
    bench.stub.until(|stub| stub.inventory() == expected).await;
}

#[tokio::test]
async fn a_gateway_that_hangs_up_does_not_interrupt_a_create() {
    let mut bench = Bench::start().await;
    let mut client = bench.client.clone();
    let request = substrate_proto::compute::CreateSandboxRequest { sandbox: Some(sandbox(ID, "alice")) };
    let call = tokio::spawn(async move { client.create_sandbox(request).await });
    bench.stub.until(|stub| stub.calls("get_atespace") > 0).await;
    call.abort();
    let settled = |stub: &Stub| {
        let actor = stub.actor(ID).and_then(|actor| actor.spec);
        actor.is_some_and(|spec| spec.annotations[names::CREATE].starts_with("made-"))
    };
    bench.stub.until(settled).await;
    assert_eq!(bench.list().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_template_reaped_by_another_driver_is_made_again() {
    let mut bench = Bench::start().await;
    bench.stub.reap_before_next_actor();
    bench.create(sandbox(ID, "alice")).await.unwrap();
    assert_eq!(bench.stub.calls("create_template"), 2);
}

#[tokio::test]
async fn creates_and_deletes_of_one_template_do_not_trip_each_other() {
    let bench = Bench::start().await;
    let mut tasks = Vec::new();
    for index in 0..24 {
        let mut client = bench.client.clone();
        tasks.push(tokio::spawn(async move {
            let id = format!("s{index}");
            let request = substrate_proto::compute::CreateSandboxRequest { sandbox: Some(sandbox(&id, &id)) };
            client.create_sandbox(request).await.unwrap();
            let request =
                substrate_proto::compute::DeleteSandboxRequest { sandbox_id: id, ..Default::default() };
            assert!(client.delete_sandbox(request).await.unwrap().into_inner().deleted);
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(bench.stub.inventory(), ["atespace team-a"]);
}

#[tokio::test]
async fn an_atespace_of_another_workspace_is_never_used() {
    let mut bench = Bench::start().await;
    bench.stub.world.lock().unwrap().atespaces.insert(
        "team-a".to_owned(),
        ateapi::Atespace {
            name: "team-a".to_owned(),
            labels: [(names::WORKSPACE_LABEL.to_owned(), "other".to_owned())].into(),
            ..Default::default()
        },
    );
    for error in [
        bench.validate(sandbox(ID, "alice")).await.unwrap_err(),
        bench.create(sandbox(ID, "alice")).await.unwrap_err(),
    ] {
        assert_eq!(error.code(), Code::FailedPrecondition);
        assert!(error.message().contains("workspace \"other\""), "{error}");
    }
}

#[tokio::test]
async fn an_unreachable_control_plane_is_named() {
    let mut bench = Bench::start().await;
    bench.stop_api().await;
    let endpoint = bench.config.api_endpoint.clone();
    for error in [
        bench.validate(sandbox(ID, "alice")).await.unwrap_err(),
        bench.create(sandbox(ID, "alice")).await.unwrap_err(),
        bench.list().await.unwrap_err(),
        bench.get(ID).await.unwrap_err(),
        bench.delete(ID).await.unwrap_err(),
    ] {
        assert_eq!(error.code(), Code::Unavailable, "{error}");
        assert!(error.message().contains(&endpoint), "{error}");
    }
    bench.start_api();
    bench.create(sandbox(ID, "alice")).await.unwrap();
}
