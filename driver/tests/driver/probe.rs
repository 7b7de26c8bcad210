// SPDX-License-Identifier: Apache-2.0
//! `supervisor.mode = "auto"`: decided by what a probe sandbox shows, once per runtime, and never by hope.
use std::path::Path;

use crate::stub::{Bench, Boot, Fault, Stub, sandbox, with_config};
use openshell_driver_substrate::probe::{self, SLEEPS};
use openshell_driver_substrate::{Config, Supervisor, SupervisorMode};
use tonic::Code;

const ID: &str = "0198c0de-0000-7000-8000-000000000001";

fn auto(config: &mut Config, store: &Path) {
    config.gateway_endpoint = Some("http://127.0.0.1:1".to_owned());
    config.supervisor = Supervisor {
        mode: SupervisorMode::Process,
        auto: true,
        // Programs, as far as anyone looks.
        path: Some("/bin/true".into()),
        shim_path: "/bin/true".into(),
        store: store.to_owned(),
        ..Supervisor::default()
    };
}

#[tokio::test]
async fn a_runtime_is_probed_once_and_the_reason_is_told() {
    let store = tempfile::tempdir().unwrap();
    let mut bench = Bench::with(Stub::new(), |config| auto(config, store.path())).await;
    let mut watching = bench.watch().await.unwrap();
    bench.validate(sandbox(ID, "alice")).await.unwrap();
    assert_eq!(bench.stub.calls("suspend_actor"), SLEEPS as usize);
    bench.create(sandbox(ID, "alice")).await.unwrap();
    let mut told = String::new();
    while !told.contains("auto") {
        let event = tokio::time::timeout(std::time::Duration::from_secs(20), watching.message()).await;
        told = format!("{:?}", event.expect("an event in time").unwrap().expect("the watch goes on"));
    }
    assert!(told.contains("process") && told.contains("slept and woke 3 times"), "{told}");
    // Nothing is left of it, nobody was told of it, and nobody probes again: not even another driver.
    let left = bench.stub.inventory();
    assert!(!left.iter().any(|thing| thing.contains("probe")), "{left:?}");
    assert_eq!(bench.list().await.unwrap().len(), 1);
    bench.stop_driver().await;
    bench.start_driver().await;
    bench.validate(sandbox("other", "bob")).await.unwrap();
    assert_eq!(bench.stub.calls("suspend_actor"), SLEEPS as usize);
    // Another runtime is another question.
    "other-runsc".clone_into(&mut bench.stub.world.lock().unwrap().runtime);
    bench.validate(sandbox("other", "bob")).await.unwrap();
    assert_eq!(bench.stub.calls("suspend_actor"), 2 * SLEEPS as usize);
    assert_eq!(probe::verdicts(&store.path().join(probe::FILE)).unwrap().len(), 2);
}

#[tokio::test]
async fn each_class_is_probed_for_a_mode_of_its_own() {
    let store = tempfile::tempdir().unwrap();
    let mut bench = Bench::with(Stub::new(), |config| auto(config, store.path())).await;
    let mut watching = bench.watch().await.unwrap();
    let machine = with_config(sandbox(ID, "alice"), &serde_json::json!({"sandboxClass": "microvm"}));
    bench.create(machine).await.unwrap();
    let mut told = String::new();
    while !told.contains("auto chose strict mode: on microvm") {
        let event = tokio::time::timeout(std::time::Duration::from_secs(20), watching.message()).await;
        told = format!("{:?}", event.expect("an event in time").unwrap().expect("the watch goes on"));
    }
    let verdicts = probe::verdicts(&store.path().join(probe::FILE)).unwrap();
    assert_eq!(verdicts["test-qemu"].sandbox_class, "microvm");
}

#[tokio::test]
async fn a_runtime_that_does_not_wake_a_supervisor_gets_none() {
    let store = tempfile::tempdir().unwrap();
    let stub = Stub::new();
    // The boot, one wake-up, and then none.
    stub.fault_nth("resume_actor", 2, Fault::Before(Code::Internal));
    let mut bench = Bench::with(stub, |config| auto(config, store.path())).await;
    for _ in 0..2 {
        let refused = bench.validate(sandbox(ID, "alice")).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        for part in ["after 2 sleeps", "injected", "supervisor.mode", probe::FILE, "test-runsc"] {
            assert!(refused.message().contains(part), "{part}: {refused}");
        }
    }
    assert_eq!(bench.stub.calls("suspend_actor"), 2, "it is remembered");
    assert!(!bench.stub.inventory().iter().any(|thing| thing.contains("probe")));
}

#[tokio::test]
async fn what_says_nothing_about_the_runtime_is_not_remembered() {
    let store = tempfile::tempdir().unwrap();
    let stub = Stub::new();
    stub.boot(Boot::FailsFirst(u32::MAX));
    let mut bench = Bench::with(stub, |config| auto(config, store.path())).await;
    let refused = bench.validate(sandbox(ID, "alice")).await.unwrap_err();
    assert!(refused.message().contains("could not be probed yet"), "{refused}");
    assert!(refused.message().contains("pool default are busy"), "{refused}");
    bench.stub.boot(Boot::Runs);
    bench.validate(sandbox(ID, "alice")).await.unwrap();
}
