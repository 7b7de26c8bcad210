// SPDX-License-Identifier: Apache-2.0
//! The driver under a stand-in for OpenShell's gateway: its order of calls, its store of phases, its reconcile, and
//! nothing that it does not do (no retries, no compensating delete). Each rule cites what it models, from
//! `crates/openshell-server/src/compute/mod.rs` of OpenShell at 2f7fb655.
use std::collections::BTreeMap;
use std::time::Duration;

use crate::stub::{Bench, Boot, Fault, phase, sandbox};
use substrate_proto::compute::watch_sandboxes_event::Payload;
use substrate_proto::compute::{self, DriverSandbox};
use tonic::{Code, Status, Streaming};

/// The gateway's rows and its watch.
struct Gateway {
    bench: Bench,
    rows: BTreeMap<String, Row>,
    watching: Streaming<compute::WatchSandboxesEvent>,
}

#[derive(Debug, Clone, PartialEq)]
struct Row {
    name: String,
    phase: &'static str,
}

impl Gateway {
    /// Start order: `GetCapabilities` (fatal), listener requirements, then watch and reconcile loops.
    async fn start(mut bench: Bench) -> Self {
        let capabilities =
            bench.client.get_capabilities(compute::GetCapabilitiesRequest {}).await.unwrap().into_inner();
        assert!(!capabilities.gateway_manages_lifecycle);
        let request = compute::GetGatewayListenerRequirementsRequest {};
        bench.client.get_gateway_listener_requirements(request).await.unwrap();
        let watching = bench.watch().await.unwrap();
        let mut gateway = Self { bench, rows: BTreeMap::new(), watching };
        gateway.reconcile().await;
        gateway
    }

    /// `create_sandbox`: the row first, then validate's sibling; on error the row goes and only two codes keep their
    /// message.
    async fn create(&mut self, wanted: DriverSandbox) -> Result<(), Status> {
        let mut unminted = wanted.clone();
        unminted.spec.as_mut().unwrap().sandbox_token.clear();
        self.bench.validate(unminted).await?;
        let row = Row { name: wanted.name.clone(), phase: "provisioning" };
        self.rows.insert(wanted.id.clone(), row);
        let id = wanted.id.clone();
        self.bench.create(wanted).await.map_err(|status| {
            self.rows.remove(&id);
            match status.code() {
                Code::AlreadyExists | Code::FailedPrecondition => status,
                _ => Status::internal(format!("create sandbox failed: {}", status.message())),
            }
        })
    }

    /// `apply_driver_snapshot`, with a supervisor session that is always connected once the backend is ready (there is
    /// none in mode `none`): Error is terminal, Stopped sticky, Starting leaves only for Ready or Error.
    fn apply(&mut self, incoming: &DriverSandbox) {
        // Unknown snapshots are ignored: the store is authoritative.
        let Some(row) = self.rows.get_mut(&incoming.id) else { return };
        if matches!(row.phase, "error" | "deleting") {
            return;
        }
        row.name.clone_from(&incoming.name);
        let observed = phase(incoming);
        row.phase = match row.phase {
            "stopped" => "stopped",
            "stopping" if observed == "stopped" => "stopped",
            "stopping" if observed != "error" => "stopping",
            "starting" if !matches!(observed, "ready" | "error") => "starting",
            _ => observed,
        };
    }

    async fn event(&mut self) {
        let event = tokio::time::timeout(Duration::from_secs(20), self.watching.message())
            .await
            .expect("an event in time")
            .unwrap()
            .expect("the watch goes on");
        match event.payload.unwrap() {
            Payload::Sandbox(update) => self.apply(&update.sandbox.unwrap()),
            Payload::Deleted(deleted) => drop(self.rows.remove(&deleted.sandbox_id)),
            Payload::PlatformEvent(_) => {}
        }
    }

    async fn until(&mut self, id: &str, wanted: Option<&str>) {
        while self.rows.get(id).map(|row| row.phase) != wanted {
            self.event().await;
        }
    }

    /// `reconcile_store_with_backend`: list, then get of each known one; what the list lacks is pruned when get says
    /// NotFound (its age of 300 s is taken as reached).
    async fn reconcile(&mut self) {
        let Ok(listed) = self.bench.list().await else { return };
        for snapshot in &listed {
            if self.rows.contains_key(&snapshot.id)
                && let Ok(current) = self.bench.get(&snapshot.id).await
            {
                assert_eq!(current.id, snapshot.id, "the returned id is the asked one");
                self.apply(&current);
            }
        }
        let missing: Vec<String> =
            self.rows.keys().filter(|id| listed.iter().all(|it| it.id != **id)).cloned().collect();
        for id in missing {
            match self.bench.get(&id).await {
                Ok(current) => self.apply(&current),
                Err(status) if status.code() == Code::NotFound => {
                    let row = self.rows.get_mut(&id).unwrap();
                    if matches!(row.phase, "stopping" | "stopped" | "starting") {
                        row.phase = "error";
                    } else {
                        self.rows.remove(&id);
                    }
                }
                Err(_) => {}
            }
        }
    }

    /// `stop_sandbox`: only from Ready; on error the driver is asked what is true.
    async fn stop(&mut self, id: &str) -> Result<(), Status> {
        assert_eq!(self.rows[id].phase, "ready", "the gateway stops only what is ready");
        self.rows.get_mut(id).unwrap().phase = "stopping";
        match self.bench.stop(id).await {
            Ok(()) => {
                self.rows.get_mut(id).unwrap().phase = "stopped";
                Ok(())
            }
            Err(status) => {
                let observed = self.bench.get(id).await.map(|it| phase(&it));
                match observed {
                    Ok("stopped") => self.rows.get_mut(id).unwrap().phase = "stopped",
                    Ok("error") => self.rows.get_mut(id).unwrap().phase = "error",
                    Ok(_) => self.rows.get_mut(id).unwrap().phase = "ready",
                    Err(_) => {}
                }
                Err(status)
            }
        }
    }

    async fn start_sandbox(&mut self, id: &str) -> Result<(), Status> {
        assert!(matches!(self.rows[id].phase, "stopped" | "starting"));
        self.rows.get_mut(id).unwrap().phase = "starting";
        self.bench.start_sandbox(id).await
    }

    /// `delete_sandbox`: with deleted=true the row waits for the event, with false it goes at once.
    async fn delete(&mut self, id: &str) {
        self.rows.get_mut(id).unwrap().phase = "deleting";
        if !self.bench.delete(id).await.unwrap() {
            self.rows.remove(id);
        }
    }
}

#[tokio::test]
async fn a_sandboxs_whole_life() {
    let mut gateway = Gateway::start(Bench::start().await).await;
    gateway.create(sandbox("a", "Alice")).await.unwrap();
    gateway.until("a", Some("ready")).await;
    assert_eq!(gateway.rows["a"].name, "Alice", "the driver's name overwrites the row's: it is echoed");
    // Sleeps and wakes by itself: never anything but ready.
    for _ in 0..5 {
        gateway.bench.stub.sleep("a", "idle");
        gateway.reconcile().await;
        assert_eq!(gateway.rows["a"].phase, "ready");
        gateway.bench.stub.wake("a");
    }
    gateway.stop("a").await.unwrap();
    gateway.reconcile().await;
    assert_eq!(gateway.rows["a"].phase, "stopped");
    gateway.start_sandbox("a").await.unwrap();
    gateway.until("a", Some("ready")).await;
    gateway.delete("a").await;
    gateway.until("a", None).await;
    assert_eq!(gateway.bench.stub.inventory(), ["atespace team-a"]);
}

#[tokio::test]
async fn a_refused_or_failed_create_leaves_no_row_and_no_actor() {
    let mut gateway = Gateway::start(Bench::start().await).await;
    let mut bad = sandbox("a", "alice");
    crate::stub::template(&mut bad).image = "registry.example/missing:1".to_owned();
    let refused = gateway.create(bad).await.unwrap_err();
    assert!(refused.message().contains("missing"), "{refused}");
    gateway.bench.stub.fault("create_actor", &[Fault::Before(Code::ResourceExhausted)]);
    let failed = gateway.create(sandbox("b", "bob")).await.unwrap_err();
    assert_eq!(failed.code(), Code::FailedPrecondition, "the user sees why: {failed}");
    assert!(gateway.rows.is_empty());
    gateway.reconcile().await;
    assert!(gateway.bench.list().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_driver_restart_changes_no_phase() {
    let mut gateway = Gateway::start(Bench::start().await).await;
    for id in ["asleep", "stopped", "running"] {
        gateway.create(sandbox(id, id)).await.unwrap();
        gateway.until(id, Some("ready")).await;
    }
    gateway.bench.stub.sleep("asleep", "idle");
    gateway.stop("stopped").await.unwrap();
    let before = gateway.rows.clone();
    gateway.bench.stop_driver().await;
    // List and Get fail meanwhile: nothing is pruned.
    gateway.reconcile().await;
    assert_eq!(gateway.rows, before);
    gateway.bench.start_driver().await;
    gateway.watching = gateway.bench.watch().await.unwrap();
    for _ in 0..3 {
        gateway.event().await;
    }
    gateway.reconcile().await;
    assert_eq!(gateway.rows, before);
}

#[tokio::test]
async fn a_control_plane_outage_changes_no_phase() {
    let mut gateway = Gateway::start(Bench::start().await).await;
    gateway.create(sandbox("a", "alice")).await.unwrap();
    gateway.until("a", Some("ready")).await;
    let before = gateway.rows.clone();
    gateway.bench.stop_api().await;
    gateway.reconcile().await;
    assert!(gateway.stop("a").await.is_err());
    gateway.rows.get_mut("a").unwrap().phase = "ready";
    assert_eq!(gateway.rows, before);
    gateway.bench.start_api();
    gateway.reconcile().await;
    assert_eq!(gateway.rows, before);
    gateway.stop("a").await.unwrap();
}

#[tokio::test]
async fn an_exit_ends_in_error_and_only_a_delete_leaves_it() {
    let bench = Bench::start().await;
    bench.stub.boot(Boot::Exits(7));
    let mut gateway = Gateway::start(bench).await;
    gateway.create(sandbox("a", "alice")).await.unwrap();
    gateway.until("a", Some("error")).await;
    gateway.delete("a").await;
    gateway.until("a", None).await;
}

#[tokio::test]
async fn an_actor_deleted_behind_the_gateways_back_leaves_its_rows() {
    let mut gateway = Gateway::start(Bench::start().await).await;
    gateway.create(sandbox("a", "alice")).await.unwrap();
    gateway.until("a", Some("ready")).await;
    gateway.bench.stub.remove_actor(&openshell_driver_substrate::names::uid("a"));
    gateway.until("a", None).await;
    gateway.create(sandbox("b", "bob")).await.unwrap();
    gateway.until("b", Some("ready")).await;
    gateway.delete("b").await;
    gateway.until("b", None).await;
}
