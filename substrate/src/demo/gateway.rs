// SPDX-License-Identifier: Apache-2.0
//! Who creates, stops and deletes the demo's sandboxes: the demo itself, on the driver's socket as OpenShell's gateway
//! uses it (one channel, one watch stream opened at the start, sandboxes known by their id), or a stock gateway.
use std::path::Path;
use std::time::Duration;

use openshell_driver_substrate::driver_config::json_to_struct;
use serde_json::{Value, json};
use substrate_proto::compute::compute_driver_client::ComputeDriverClient;
use substrate_proto::compute::watch_sandboxes_event::Payload;
use substrate_proto::compute::{
    CreateSandboxRequest, DeleteSandboxRequest, DriverSandbox, DriverSandboxSpec, DriverSandboxTemplate,
    GetCapabilitiesRequest, GetCapabilitiesResponse, GetSandboxRequest, ListSandboxesRequest,
    StartSandboxRequest, StopSandboxRequest, ValidateSandboxCreateRequest, WatchSandboxesEvent,
    WatchSandboxesRequest,
};
use tonic::Streaming;
use tonic::transport::Channel;

use super::report::{Miss, expect};
use super::stock::Stock;
use crate::client::connect_unix;
use crate::failure::{Doing as _, Failure};

/// The workspace of the demo, and so its atespace.
pub const WORKSPACE: &str = "demo";

/// What speaks to the driver.
pub enum Gateway {
    /// The demo.
    Double(Double),
    /// OpenShell's own.
    Stock(Stock),
}

impl Gateway {
    /// The stock gateway, where there is one.
    pub fn stock(&self) -> Option<&Stock> {
        match self {
            Self::Double(_) => None,
            Self::Stock(stock) => Some(stock),
        }
    }

    /// Who drives, and that the driver is driven as it wants to be.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn describe(&mut self) -> Result<String, Miss> {
        let capabilities = match self {
            Self::Double(double) => double.capabilities().await?,
            Self::Stock(stock) => return Ok(stock.describe().await?),
        };
        expect(!capabilities.gateway_manages_lifecycle, "gateway_manages_lifecycle false", "true")?;
        Ok(format!("{} {}", capabilities.driver_name, capabilities.driver_version))
    }

    /// Creates a sandbox and waits until it is ready.
    ///
    /// # Errors
    /// A refusal, an error phase, or no readiness in time.
    pub async fn create(&mut self, recipe: &Recipe, name: &str) -> Result<DriverSandbox, Miss> {
        match self {
            Self::Double(double) => {
                let wanted = recipe.sandbox(name);
                let ready = double.create(&wanted).await?;
                expect(ready.id == wanted.id, format!("the id {}", wanted.id), &ready.id)?;
                Ok(ready)
            }
            Self::Stock(stock) => stock.create(recipe, name).await,
        }
    }

    /// Waits until a sandbox is no more.
    ///
    /// # Errors
    /// When it stays.
    pub async fn until_deleted(&mut self, id: &str) -> Result<(), Miss> {
        match self {
            Self::Double(double) => double.until_deleted(id).await,
            Self::Stock(stock) => stock.until_deleted(id).await,
        }
    }

    /// All sandboxes.
    pub async fn list(&mut self) -> Result<Vec<DriverSandbox>, Failure> {
        match self {
            Self::Double(double) => double.list().await,
            Self::Stock(stock) => stock.list().await,
        }
    }

    /// One sandbox.
    pub async fn get(&mut self, sandbox: &DriverSandbox) -> Result<DriverSandbox, Failure> {
        match self {
            Self::Double(double) => double.get(sandbox).await,
            Self::Stock(stock) => stock.get(&sandbox.name).await,
        }
    }

    /// Stops one.
    ///
    /// # Errors
    /// When it is not stopped.
    pub async fn stop(&mut self, sandbox: &DriverSandbox) -> Result<(), Miss> {
        match self {
            Self::Double(double) => Ok(double.stop(sandbox).await?),
            Self::Stock(stock) => stock.stop(&sandbox.name).await,
        }
    }

    /// Starts one.
    ///
    /// # Errors
    /// When it is not started.
    pub async fn start(&mut self, sandbox: &DriverSandbox) -> Result<(), Miss> {
        match self {
            Self::Double(double) => Ok(double.start(sandbox).await?),
            Self::Stock(stock) => stock.start(&sandbox.name).await,
        }
    }

    /// Deletes one.
    ///
    /// # Errors
    /// When there was none.
    pub async fn delete(&mut self, sandbox: &DriverSandbox) -> Result<(), Miss> {
        match self {
            Self::Double(double) => {
                let deleted = double.delete(sandbox).await?;
                expect(deleted, "deleted=true", deleted)
            }
            Self::Stock(stock) => Ok(stock.delete(&sandbox.name).await?),
        }
    }
}

/// The demo in the gateway's place.
pub struct Double {
    client: ComputeDriverClient<Channel>,
    watch: Streaming<WatchSandboxesEvent>,
}

impl Double {
    /// Connects and opens the watch, as the gateway does at its start.
    ///
    /// # Errors
    /// When the driver does not answer.
    pub async fn connect(socket: &Path) -> Result<Self, Failure> {
        let channel = connect_unix(socket)
            .await
            .doing(|| format!("cannot connect to the driver at {}", socket.display()))?;
        let mut client = ComputeDriverClient::new(channel);
        let watch = client.watch_sandboxes(WatchSandboxesRequest {}).await?.into_inner();
        Ok(Self { client, watch })
    }

    /// GetCapabilities.
    pub async fn capabilities(&mut self) -> Result<GetCapabilitiesResponse, Failure> {
        Ok(self.client.get_capabilities(GetCapabilitiesRequest {}).await?.into_inner())
    }

    /// ValidateSandboxCreate, CreateSandbox, and the watch until it is ready.
    ///
    /// # Errors
    /// A refusal, an error phase, or no readiness in time.
    pub async fn create(&mut self, sandbox: &DriverSandbox) -> Result<DriverSandbox, Miss> {
        let request = ValidateSandboxCreateRequest { sandbox: Some(sandbox.clone()) };
        self.client.validate_sandbox_create(request).await?;
        self.client.create_sandbox(CreateSandboxRequest { sandbox: Some(sandbox.clone()) }).await?;
        self.until_ready(&sandbox.id).await
    }

    async fn until_ready(&mut self, id: &str) -> Result<DriverSandbox, Miss> {
        // Transient reasons of the gateway's own list; any other Ready=False is an error for good.
        const TRANSIENT: [&str; 8] = [
            "ReconcilerError",
            "DependenciesNotReady",
            "SupervisorNotConnected",
            "Starting",
            "ContainerStarting",
            "ContainerCreated",
            "HealthCheckStarting",
            "InspectFailed",
        ];
        loop {
            match self.watch.message().await?.and_then(|event| event.payload) {
                Some(Payload::Sandbox(event)) => {
                    let Some(sandbox) = event.sandbox.filter(|sandbox| sandbox.id == id) else { continue };
                    let (status, reason, message) = condition(&sandbox, "Ready");
                    if status == "True" {
                        return Ok(sandbox);
                    }
                    let transient = status.is_empty() || TRANSIENT.contains(&reason.as_str());
                    expect(transient, "Ready", format!("Ready={status}, {reason}: {message}"))?;
                }
                Some(_) => {}
                None => return Err(Failure::general("the driver closed the watch").into()),
            }
        }
    }

    /// Follows the watch until a sandbox is reported deleted.
    ///
    /// # Errors
    /// When the stream ends.
    pub async fn until_deleted(&mut self, id: &str) -> Result<(), Miss> {
        loop {
            match self.watch.message().await?.and_then(|event| event.payload) {
                Some(Payload::Deleted(event)) if event.sandbox_id == id => return Ok(()),
                Some(_) => {}
                None => return Err(Failure::general("the driver closed the watch").into()),
            }
        }
    }

    /// ListSandboxes.
    pub async fn list(&mut self) -> Result<Vec<DriverSandbox>, Failure> {
        Ok(self.client.list_sandboxes(ListSandboxesRequest {}).await?.into_inner().sandboxes)
    }

    /// GetSandbox.
    pub async fn get(&mut self, sandbox: &DriverSandbox) -> Result<DriverSandbox, Failure> {
        let request =
            GetSandboxRequest { sandbox_id: sandbox.id.clone(), sandbox_name: sandbox.name.clone() };
        let answer = self.client.get_sandbox(request).await?.into_inner();
        answer.sandbox.ok_or_else(|| Failure::general("GetSandbox answered without a sandbox"))
    }

    /// StopSandbox.
    pub async fn stop(&mut self, sandbox: &DriverSandbox) -> Result<(), Failure> {
        let request =
            StopSandboxRequest { sandbox_id: sandbox.id.clone(), sandbox_name: sandbox.name.clone() };
        self.client.stop_sandbox(request).await?;
        Ok(())
    }

    /// StartSandbox.
    pub async fn start(&mut self, sandbox: &DriverSandbox) -> Result<(), Failure> {
        let request =
            StartSandboxRequest { sandbox_id: sandbox.id.clone(), sandbox_name: sandbox.name.clone() };
        self.client.start_sandbox(request).await?;
        Ok(())
    }

    /// DeleteSandbox.
    pub async fn delete(&mut self, sandbox: &DriverSandbox) -> Result<bool, Failure> {
        let request =
            DeleteSandboxRequest { sandbox_id: sandbox.id.clone(), sandbox_name: sandbox.name.clone() };
        Ok(self.client.delete_sandbox(request).await?.into_inner().deleted)
    }
}

/// Status, reason and message of a condition; empty where it is not there.
pub fn condition(sandbox: &DriverSandbox, kind: &str) -> (String, String, String) {
    let conditions = sandbox.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    match conditions.iter().find(|condition| condition.r#type == kind) {
        Some(condition) => (condition.status.clone(), condition.reason.clone(), condition.message.clone()),
        None => (String::new(), String::new(), String::new()),
    }
}

/// What the demo's sandboxes have in common.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// Image of the agent.
    pub image: String,
    /// Sandbox class.
    pub class: String,
    /// Environment of the agent.
    pub environment: Vec<(String, String)>,
    /// Egress rules, as `driver_config` has them.
    pub allow: Vec<Value>,
    /// Whether OpenShell's supervisor runs the agent.
    pub has_supervisor: bool,
}

impl Recipe {
    /// What substrate is told beyond OpenShell's own words.
    pub fn driver_config(&self) -> Value {
        let mut substrate = json!({
            "sandboxClass": self.class,
            "ports": [8080],
            "idle": {"suspendAfter": "never"},
            "checkpoint": {"onReply": "sync", "durability": "node", "maxHold": "10s"},
            "egress": {"allow": self.allow},
            "hooks": {"afterRestore": {"command": ["/app/after-restore"]}},
        });
        // Behind a supervisor its session is what counts.
        if !self.has_supervisor {
            substrate["readiness"] = json!({"httpGet": {"path": "/healthz", "port": 8080}});
        }
        substrate
    }

    /// The request of one sandbox.
    pub fn sandbox(&self, name: &str) -> DriverSandbox {
        DriverSandbox {
            id: uuid::Uuid::new_v4().to_string(),
            name: name.to_owned(),
            workspace: WORKSPACE.to_owned(),
            spec: Some(DriverSandboxSpec {
                environment: self.environment.iter().cloned().collect(),
                template: Some(DriverSandboxTemplate {
                    image: self.image.clone(),
                    driver_config: Some(json_to_struct(&self.driver_config())),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

/// Bounds a step of the demo.
///
/// # Errors
/// A ✗ when the time is over.
pub async fn within<T>(
    limit: Duration,
    what: &str,
    step: impl Future<Output = Result<T, Miss>>,
) -> Result<T, Miss> {
    match tokio::time::timeout(limit, step).await {
        Ok(result) => result,
        Err(_) => Err(Miss {
            expected: format!("{what} within {} s", limit.as_secs()),
            seen: "it took longer".to_owned(),
        }),
    }
}
