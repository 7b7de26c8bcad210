// SPDX-License-Identifier: Apache-2.0
//! Stopping, starting, deleting, looking; and what the gateway is told meanwhile.
use std::time::Duration;

use crate::stub::{Bench, Boot, Fault, Stub, phase, sandbox, template};
use openshell_driver_substrate::names;
use substrate_proto::ateapi::{Actor, ActorState};
use substrate_proto::compute;
use tonic::Code;

const ID: &str = "0198c0de-0000-7000-8000-000000000001";

async fn ready() -> Bench {
    let mut bench = Bench::start().await;
    bench.create(sandbox(ID, "alice")).await.unwrap();
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "ready");
    // The driver notes that somebody asked.
    bench.stub.until(|stub| stub.calls("update_actor") == 2).await;
    bench
}

#[tokio::test]
async fn stop_and_start_are_idempotent_and_only_a_stop_reads_as_stopped() {
    let mut bench = ready().await;
    bench.stop(ID).await.unwrap();
    bench.stop(ID).await.unwrap();
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "stopped");
    assert_eq!(bench.stub.calls("suspend_actor"), 1);
    assert_eq!(bench.list().await.unwrap().len(), 1, "a list includes the suspended");
    bench.start_sandbox(ID).await.unwrap();
    bench.start_sandbox(ID).await.unwrap();
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "ready");
    assert_eq!(bench.stub.calls("resume_actor"), 1);
    // After all that, going idle is no stop.
    bench.stub.sleep(ID, "idle");
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "ready");
}

#[tokio::test]
async fn a_sleeping_sandbox_stays_ready_through_sleep_and_waking_and_can_be_stopped_asleep() {
    let mut bench = ready().await;
    for by in ["idle", "drain", "evict", "shutdown", ""] {
        bench.stub.sleep(ID, by);
        assert_eq!(phase(&bench.get(ID).await.unwrap()), "ready", "asleep by {by:?}");
        bench.stub.wake(ID);
        assert_eq!(phase(&bench.get(ID).await.unwrap()), "ready");
    }
    bench.stub.sleep(ID, "idle");
    bench.stop(ID).await.unwrap();
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "stopped");
    assert_eq!(bench.stub.calls("suspend_actor"), 0, "it slept already");
}

#[tokio::test]
async fn a_sandbox_that_is_waking_is_stopped_once_it_is_up() {
    let mut bench = ready().await;
    bench.stub.sleep(ID, "idle");
    bench.stub.change(ID, |actor| {
        actor.state = ActorState::Resuming.into();
        actor.generation += 1;
    });
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "ready");
    bench.stop(ID).await.unwrap();
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "stopped");
}

#[tokio::test]
async fn a_paused_sandbox_is_stopped_even_when_its_snapshot_cannot_be_made_durable() {
    let mut bench = ready().await;
    bench.stub.sleep(ID, "idle");
    bench.stub.change(ID, |actor| actor.state = ActorState::Paused.into());
    bench.stub.fault("promote_actor", &[Fault::Before(Code::Internal)]);
    bench.stop(ID).await.unwrap();
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "stopped");
}

#[tokio::test]
async fn a_stop_that_fails_leaves_a_sandbox_that_reads_as_running() {
    let mut bench = ready().await;
    bench.stub.fault("suspend_actor", &[Fault::Before(Code::FailedPrecondition)]);
    let error = bench.stop(ID).await.unwrap_err();
    assert!(error.message().contains("injected"), "{error}");
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "ready");
    // One that took effect although its answer was lost is found to be done.
    bench.stub.fault("suspend_actor", &[Fault::After(Code::Unavailable)]);
    bench.stop(ID).await.unwrap();
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "stopped");
}

#[tokio::test]
async fn a_stop_cut_short_before_its_mark_is_completed_by_the_next() {
    let mut bench = ready().await;
    bench.stub.fault("update_actor", &[Fault::Before(Code::Internal)]);
    bench.stop(ID).await.unwrap_err();
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "ready", "asleep, not stopped");
    bench.stop(ID).await.unwrap();
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "stopped");
}

#[tokio::test]
async fn a_start_that_fails_leaves_it_stopped() {
    let mut bench = ready().await;
    bench.stop(ID).await.unwrap();
    bench.stub.boot(Boot::FailsFirst(5));
    let error = bench.start_sandbox(ID).await.unwrap_err();
    assert!(error.message().contains("workers of pool default are busy"), "{error}");
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "stopped");
}

#[tokio::test]
async fn a_start_reads_as_starting_until_it_runs() {
    let mut bench = ready().await;
    bench.stop(ID).await.unwrap();
    bench.stub.boot(Boot::Waits);
    bench.start_sandbox(ID).await.unwrap();
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "provisioning");
    bench.stub.change(ID, |actor| actor.state = ActorState::Running.into());
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "ready");
}

#[tokio::test]
async fn an_exit_is_an_error_with_its_code_and_neither_stops_nor_starts() {
    let mut bench = Bench::start().await;
    bench.stub.boot(Boot::Exits(3));
    bench.create(sandbox(ID, "alice")).await.unwrap();
    let observed = bench.get(ID).await.unwrap();
    assert_eq!(phase(&observed), "error");
    assert!(observed.status.unwrap().conditions[0].message.contains("code 3"));
    for error in [bench.stop(ID).await.unwrap_err(), bench.start_sandbox(ID).await.unwrap_err()] {
        assert_eq!(error.code(), Code::FailedPrecondition);
        assert!(error.message().contains("code 3") && error.message().contains("reset"), "{error}");
    }
    assert!(bench.delete(ID).await.unwrap());
}

#[tokio::test]
async fn a_boot_that_cannot_succeed_is_an_error_at_once() {
    let mut bench = Bench::start().await;
    bench.stub.boot(Boot::Crashes);
    bench.create(sandbox(ID, "alice")).await.unwrap();
    let observed = bench.get(ID).await.unwrap();
    assert_eq!(phase(&observed), "error");
    assert!(observed.status.unwrap().conditions[0].message.contains("no such program"));
    assert!(bench.delete(ID).await.unwrap());
}

#[tokio::test]
async fn delete_takes_the_last_user_s_template_and_says_so_of_what_is_missing() {
    let mut bench = ready().await;
    bench.create(sandbox("second", "bob")).await.unwrap();
    assert!(bench.delete(ID).await.unwrap());
    assert!(!bench.delete(ID).await.unwrap());
    assert_eq!(bench.get(ID).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(bench.stub.world.lock().unwrap().templates.len(), 1, "bob uses it");
    assert!(bench.delete("second").await.unwrap());
    assert_eq!(bench.stub.inventory(), ["atespace team-a"]);
    assert!(!bench.delete("never-was").await.unwrap());
}

#[tokio::test]
async fn a_template_that_could_not_be_reaped_with_its_sandbox_is_reaped_later() {
    let mut bench = ready().await;
    bench.stub.fault("delete_template", &[Fault::Before(Code::Internal)]);
    assert!(bench.delete(ID).await.unwrap());
    bench.stub.until(|stub| stub.world.lock().unwrap().templates.is_empty()).await;
}

#[tokio::test]
async fn lists_are_complete_over_pages_or_an_error_and_leave_strangers_out() {
    let mut bench = Bench::start().await;
    for index in 0..10 {
        bench.create(sandbox(&format!("s{index}"), &format!("s{index}"))).await.unwrap();
    }
    {
        let mut world = bench.stub.world.lock().unwrap();
        let mut golden = world.actors.values().next().unwrap().clone();
        golden.uid = "golden".to_owned();
        world.actors.insert("golden".to_owned(), golden);
        world.actors.insert("foreign".to_owned(), Actor { uid: "foreign".to_owned(), ..Default::default() });
    }
    let mut ids: Vec<String> = bench.list().await.unwrap().into_iter().map(|it| it.id).collect();
    ids.sort();
    assert_eq!(ids, (0..10).map(|index| format!("s{index}")).collect::<Vec<_>>());
    bench.stub.fault_nth("list_actors", 2, Fault::Before(Code::Internal));
    assert_eq!(bench.list().await.unwrap_err().code(), Code::Internal, "the third page failed");
    assert_eq!(bench.get("golden").await.unwrap_err().code(), Code::NotFound);
    assert!(!bench.delete("foreign").await.unwrap());
    assert!(bench.stub.world.lock().unwrap().actors.contains_key("foreign"));
}

#[tokio::test]
async fn a_full_pool_is_waited_out() {
    let mut bench = Bench::start().await;
    bench.stub.boot(Boot::FailsFirst(2));
    bench.create(sandbox(ID, "alice")).await.unwrap();
    let waiting = bench.get(ID).await.unwrap();
    assert_eq!(phase(&waiting), "provisioning");
    assert!(waiting.status.unwrap().conditions[0].message.contains("workers of pool default are busy"));
    bench.stub.until(|stub| stub.actor(ID).is_some_and(|it| it.state() == ActorState::Running)).await;
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "ready");
}

#[tokio::test]
async fn a_boot_that_never_succeeds_becomes_an_error_with_the_reason() {
    let mut bench =
        Bench::with(Stub::new(), |config| config.template_ready_timeout = Duration::from_millis(900)).await;
    bench.stub.boot(Boot::FailsFirst(u32::MAX));
    bench.create(sandbox(ID, "alice")).await.unwrap();
    let given_up = |stub: &Stub| {
        let spec = stub.actor(ID).and_then(|actor| actor.spec);
        spec.is_some_and(|spec| spec.annotations.contains_key(names::BOOT_FAILED))
    };
    bench.stub.until(given_up).await;
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "error");
    let message = bench.get(ID).await.unwrap().status.unwrap().conditions[0].message.clone();
    assert!(message.contains("template_ready_timeout_secs") && message.contains("pool default"), "{message}");
}

#[tokio::test]
async fn a_restarted_driver_takes_a_failed_boot_up_again() {
    let mut bench = Bench::start().await;
    bench.stub.boot(Boot::FailsFirst(1));
    bench.create(sandbox(ID, "alice")).await.unwrap();
    bench.stop_driver().await;
    bench.start_driver().await;
    bench.stub.until(|stub| stub.actor(ID).is_some_and(|it| it.state() == ActorState::Running)).await;
    assert_eq!(phase(&bench.get(ID).await.unwrap()), "ready");
}

#[tokio::test]
async fn workspaces_come_and_go() {
    let mut bench = Bench::start().await;
    let ensure = |workspace: &str| compute::EnsureWorkspaceRequest { workspace: workspace.to_owned() };
    let delete = |workspace: &str| compute::DeleteWorkspaceRequest { workspace: workspace.to_owned() };
    for _ in 0..2 {
        bench.client.ensure_workspace(ensure("Team A")).await.unwrap();
    }
    assert_eq!(bench.stub.inventory(), [format!("atespace {}", names::atespace("Team A"))]);
    bench.create(sandbox(ID, "alice")).await.unwrap();
    let busy = bench.client.delete_workspace(delete("team-a")).await.unwrap_err();
    assert_eq!(busy.code(), Code::FailedPrecondition, "{busy}");
    assert!(bench.delete(ID).await.unwrap());
    for workspace in ["team-a", "Team A", "Team A", "never-was"] {
        bench.client.delete_workspace(delete(workspace)).await.unwrap();
    }
    assert!(bench.stub.inventory().is_empty());
    // An atespace that an operator made stays.
    bench.stub.world.lock().unwrap().atespaces.insert(
        "ops".to_owned(),
        substrate_proto::ateapi::Atespace { name: "ops".to_owned(), ..Default::default() },
    );
    bench.client.ensure_workspace(ensure("ops")).await.unwrap();
    bench.client.delete_workspace(delete("ops")).await.unwrap();
    assert_eq!(bench.stub.inventory(), ["atespace ops"]);
}

#[tokio::test]
async fn capabilities_and_listeners_are_those_of_the_configuration() {
    let mut bench =
        Bench::with(Stub::new(), |config| config.default_image = "registry.example/base:1".to_owned()).await;
    let answer =
        bench.client.get_capabilities(compute::GetCapabilitiesRequest {}).await.unwrap().into_inner();
    assert_eq!(
        (answer.driver_name.as_str(), answer.default_image.as_str()),
        ("substrate", "registry.example/base:1")
    );
    assert!(!answer.gateway_manages_lifecycle && !answer.driver_version.is_empty());
    let request = compute::GetGatewayListenerRequirementsRequest {};
    let answer = bench.client.get_gateway_listener_requirements(request).await.unwrap().into_inner();
    assert!(answer.requirements.is_empty());
    let mut plain = sandbox(ID, "alice");
    template(&mut plain).image.clear();
    bench.create(plain).await.unwrap();
}
