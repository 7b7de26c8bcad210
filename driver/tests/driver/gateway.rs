// SPDX-License-Identifier: Apache-2.0
//! The driver under a stand-in for OpenShell's gateway: its order of calls, its store of phases, its reconcile, and
//! nothing that it does not do (no retries, no compensating delete). Each rule cites what it models, from
//! `crates/openshell-server/src/compute/mod.rs` of OpenShell at 2f7fb655.
//!
//! Each scenario is written once and run against the double, always, and against the real gateway (`real`) where
//! `OPENSHELL_BIN_DIR` names its programs: they have to agree.
use std::collections::BTreeMap;
use std::time::Duration;

use crate::real::Real;
use crate::stub::{Bench, Boot, Fault, phase, sandbox};
use substrate_proto::compute::watch_sandboxes_event::Payload;
use substrate_proto::compute::{self, DriverSandbox};
use tonic::{Code, Status, Streaming};

/// What a scenario does to a gateway, and sees of it. Sandboxes are known by their names.
pub trait Gateway {
    /// The driver behind it, and its control plane.
    fn bench(&mut self) -> &mut Bench;
    /// Creates a sandbox of that image; the message of a refusal.
    async fn create(&mut self, name: &str, image: &str) -> Result<(), String>;
    /// Waits until a row has that phase, or is no more.
    async fn until(&mut self, name: &str, phase: Option<&str>);
    /// Phases of all rows.
    async fn phases(&mut self) -> BTreeMap<String, String>;
    /// Stops a sandbox.
    async fn stop(&mut self, name: &str) -> Result<(), String>;
    /// Starts one.
    async fn start(&mut self, name: &str) -> Result<(), String>;
    /// Deletes one.
    async fn delete(&mut self, name: &str);
    /// Takes the driver in again after it or the control plane was away.
    async fn resync(&mut self);
    /// Its id for a sandbox.
    async fn id(&mut self, name: &str) -> String;
}

/// The gateway's rows and its watch.
pub struct Double {
    bench: Bench,
    rows: BTreeMap<String, Row>,
    watching: Streaming<compute::WatchSandboxesEvent>,
}

#[derive(Debug, Clone, PartialEq)]
struct Row {
    name: String,
    phase: &'static str,
}

impl Double {
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
    async fn create_sandbox(&mut self, wanted: DriverSandbox) -> Result<(), Status> {
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

    async fn until_row(&mut self, id: &str, wanted: Option<&str>) {
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
    async fn stop_sandbox(&mut self, id: &str) -> Result<(), Status> {
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
    async fn delete_sandbox(&mut self, id: &str) {
        self.rows.get_mut(id).unwrap().phase = "deleting";
        if !self.bench.delete(id).await.unwrap() {
            self.rows.remove(id);
        }
    }
}

impl Gateway for Double {
    fn bench(&mut self) -> &mut Bench {
        &mut self.bench
    }

    async fn create(&mut self, name: &str, image: &str) -> Result<(), String> {
        let mut wanted = sandbox(name, name);
        image.clone_into(&mut crate::stub::template(&mut wanted).image);
        self.create_sandbox(wanted).await.map_err(|status| status.message().to_owned())
    }

    async fn until(&mut self, name: &str, phase: Option<&str>) {
        self.until_row(name, phase).await;
    }

    async fn phases(&mut self) -> BTreeMap<String, String> {
        // What the real one does each 60 s.
        self.reconcile().await;
        self.rows.iter().map(|(id, row)| (id.clone(), row.phase.to_owned())).collect()
    }

    async fn stop(&mut self, name: &str) -> Result<(), String> {
        self.stop_sandbox(name).await.map_err(|status| status.message().to_owned())
    }

    async fn start(&mut self, name: &str) -> Result<(), String> {
        self.start_sandbox(name).await.map_err(|status| status.message().to_owned())
    }

    async fn delete(&mut self, name: &str) {
        self.delete_sandbox(name).await;
    }

    async fn resync(&mut self) {
        self.watching = self.bench.watch().await.unwrap();
        for _ in 0..self.rows.len() {
            self.event().await;
        }
    }

    async fn id(&mut self, name: &str) -> String {
        name.to_owned()
    }
}

const IMAGE: &str = "registry.example/agent:1";

/// Runs a scenario against the double, and against the real gateway.
macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {$(
        mod $name {
            #[tokio::test]
            async fn with_the_double() {
                super::$name(super::Double::start(super::Bench::start().await).await).await;
            }

            #[tokio::test]
            #[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
            async fn with_the_real_gateway() {
                let real = super::Real::start(super::Bench::start().await).await;
                super::$name(real).await;
            }
        }
    )*};
}

scenarios!(
    a_sandboxs_whole_life,
    a_refused_or_failed_create_leaves_no_row_and_no_actor,
    a_driver_restart_changes_no_phase,
    a_control_plane_outage_changes_no_phase,
    an_exit_ends_in_error_and_only_a_delete_leaves_it,
    an_actor_deleted_behind_the_gateways_back_leaves_its_rows,
);

async fn a_sandboxs_whole_life(mut gateway: impl Gateway) {
    gateway.create("alice", IMAGE).await.unwrap();
    gateway.until("alice", Some("ready")).await;
    let id = gateway.id("alice").await;
    // Sleeps and wakes by itself: never anything but ready.
    for _ in 0..5 {
        gateway.bench().stub.sleep(&id, "idle");
        assert_eq!(gateway.phases().await["alice"], "ready");
        gateway.bench().stub.wake(&id);
    }
    gateway.stop("alice").await.unwrap();
    assert_eq!(gateway.phases().await["alice"], "stopped");
    gateway.start("alice").await.unwrap();
    gateway.until("alice", Some("ready")).await;
    gateway.delete("alice").await;
    gateway.until("alice", None).await;
    let left = gateway.bench().stub.inventory();
    assert!(left.iter().all(|thing| thing.starts_with("atespace ")), "{left:?}");
}

async fn a_refused_or_failed_create_leaves_no_row_and_no_actor(mut gateway: impl Gateway) {
    let refused = gateway.create("bad", "registry.example/missing:1").await.unwrap_err();
    assert!(refused.contains("missing"), "{refused}");
    gateway.bench().stub.fault("create_actor", &[Fault::Before(Code::ResourceExhausted)]);
    let failed = gateway.create("bob", IMAGE).await.unwrap_err();
    assert!(!failed.contains("create sandbox failed"), "the user sees why: {failed}");
    assert!(gateway.phases().await.is_empty());
    assert!(gateway.bench().list().await.unwrap().is_empty());
}

async fn a_driver_restart_changes_no_phase(mut gateway: impl Gateway) {
    for name in ["asleep", "stopped", "running"] {
        gateway.create(name, IMAGE).await.unwrap();
        gateway.until(name, Some("ready")).await;
    }
    let id = gateway.id("asleep").await;
    gateway.bench().stub.sleep(&id, "idle");
    gateway.stop("stopped").await.unwrap();
    let before = gateway.phases().await;
    gateway.bench().stop_driver().await;
    // List and Get fail meanwhile: nothing is pruned.
    assert_eq!(gateway.phases().await, before);
    gateway.bench().start_driver().await;
    gateway.resync().await;
    assert_eq!(gateway.phases().await, before);
}

async fn a_control_plane_outage_changes_no_phase(mut gateway: impl Gateway) {
    gateway.create("alice", IMAGE).await.unwrap();
    gateway.until("alice", Some("ready")).await;
    let before = gateway.phases().await;
    gateway.bench().stop_api().await;
    assert_eq!(gateway.phases().await, before);
    gateway.bench().start_api();
    assert_eq!(gateway.phases().await, before);
    gateway.stop("alice").await.unwrap();
    assert_eq!(gateway.phases().await["alice"], "stopped");
}

/// The real gateway's phase after this hangs on who asked meanwhile: this one is the double's alone.
#[tokio::test]
async fn a_stop_that_fails_leaves_the_sandbox_where_it_is() {
    let mut gateway = Double::start(Bench::start().await).await;
    gateway.create("alice", IMAGE).await.unwrap();
    gateway.until("alice", Some("ready")).await;
    gateway.bench.stop_api().await;
    let failed = gateway.stop("alice").await.unwrap_err();
    assert!(failed.contains("ateapi.sock"), "the message names the control plane: {failed}");
    gateway.bench.start_api();
    assert_eq!(gateway.bench.list().await.unwrap().len(), 1);
}

async fn an_exit_ends_in_error_and_only_a_delete_leaves_it(mut gateway: impl Gateway) {
    gateway.bench().stub.boot(Boot::Exits(7));
    gateway.create("alice", IMAGE).await.unwrap();
    gateway.until("alice", Some("error")).await;
    gateway.delete("alice").await;
    gateway.until("alice", None).await;
}

async fn an_actor_deleted_behind_the_gateways_back_leaves_its_rows(mut gateway: impl Gateway) {
    gateway.create("alice", IMAGE).await.unwrap();
    gateway.until("alice", Some("ready")).await;
    let id = gateway.id("alice").await;
    gateway.bench().stub.remove_actor(&openshell_driver_substrate::names::uid(&id));
    gateway.until("alice", None).await;
    gateway.create("bob", IMAGE).await.unwrap();
    gateway.until("bob", Some("ready")).await;
    gateway.delete("bob").await;
    gateway.until("bob", None).await;
}
