// SPDX-License-Identifier: Apache-2.0
//! Tests against a running control plane, through a driver of their own.
//!
//! They are ignored by default (`cargo test -p substrate-live -- --ignored` runs them) and configured by variables; one
//! that lacks a variable fails and names it, it never passes. The driver is configured by the text of a `gateway.toml`
//! made from the variables, so its keys are tested along the way.
//!
//! | Variable `SUBSTRATE_LIVE_…` | Key or meaning |
//! |---|---|
//! | `API_ENDPOINT` | `api_endpoint` |
//! | `NAMESPACE` | `default_namespace`, and the workspace of the tests |
//! | `CA_PATH`, `TLS_SERVER_NAME`, `BEARER_TOKEN_PATH` | `api_tls_ca_path`, `api_tls_server_name`, `api_bearer_token_path` |
//! | `WORKER_POOL` | `default_worker_pool` |
//! | `TEST_IMAGE` | an image whose own command keeps running |
//! | `TEMPLATE_NAME` | a pre-made template in the namespace |
//! | `SNAPSHOTS_LOCATION`, `PAUSE_IMAGE`, `RUNSC_AMD64_SHA`, `RUNSC_AMD64_URL` | keys that only have to be accepted |
#![forbid(unsafe_code)]

use std::time::Duration;

use openshell_driver_substrate::Config;
use substrate_proto::compute::compute_driver_client::ComputeDriverClient;
use substrate_proto::compute::{self, DriverSandbox, DriverSandboxSpec, DriverSandboxTemplate};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

/// How long anything here may take before the test fails.
pub const PATIENCE: Duration = Duration::from_mins(5);
const PREFIX: &str = "SUBSTRATE_LIVE_";
/// Variables and the keys of the driver's table that they become.
pub const KEYS: [(&str, &str); 10] = [
    ("API_ENDPOINT", "api_endpoint"),
    ("NAMESPACE", "default_namespace"),
    ("CA_PATH", "api_tls_ca_path"),
    ("TLS_SERVER_NAME", "api_tls_server_name"),
    ("BEARER_TOKEN_PATH", "api_bearer_token_path"),
    ("WORKER_POOL", "default_worker_pool"),
    ("SNAPSHOTS_LOCATION", "snapshots_location"),
    ("PAUSE_IMAGE", "pause_image"),
    ("RUNSC_AMD64_SHA", "runsc_amd64_sha256"),
    ("RUNSC_AMD64_URL", "runsc_amd64_url"),
];

/// A variable, without its prefix; panics with its name when it is missing, so that the test fails.
pub fn variable(name: &str) -> String {
    require(name, |name| std::env::var(name).ok()).unwrap_or_else(|missing| panic!("{missing}"))
}

fn require(name: &str, lookup: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let name = format!("{PREFIX}{name}");
    lookup(&name).filter(|value| !value.is_empty()).ok_or_else(|| {
        format!("{name} is not set: a live test needs a running installation, see the table in tests/live/src/lib.rs")
    })
}

/// The driver's configuration from these variables, all of which must be set, and from those of the connection's
/// security that are set.
pub fn config(needed: &[&str]) -> Config {
    let security = ["CA_PATH", "TLS_SERVER_NAME", "BEARER_TOKEN_PATH"];
    let mut lines = String::from("[openshell.drivers.substrate]\n");
    for (name, key) in KEYS {
        let value = if needed.contains(&name) {
            variable(name)
        } else if security.contains(&name)
            && let Ok(value) = std::env::var(format!("{PREFIX}{name}"))
        {
            value
        } else {
            continue;
        };
        lines.extend([key, " = ", &format!("{value:?}"), "\n"]);
    }
    let (config, _) = Config::from_toml(&lines).unwrap_or_else(|error| panic!("{lines}{error}"));
    config
}

/// A driver of this test, on a socket of its own.
pub struct Driver {
    /// Its client.
    pub client: ComputeDriverClient<Channel>,
    quit: CancellationToken,
    serving: tokio::task::JoinHandle<Result<(), openshell_driver_substrate::Error>>,
    _dir: tempfile::TempDir,
}

impl Driver {
    /// Starts one and connects to it.
    pub async fn start(mut config: Config) -> Self {
        let dir = tempfile::tempdir().expect("a directory for the socket");
        config.socket_path = dir.path().join("run/driver.sock");
        let endpoint = format!("unix:{}", config.socket_path.display());
        let quit = CancellationToken::new();
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let serving = tokio::spawn(openshell_driver_substrate::serve(config, ready, quit.clone()));
        is_ready.await.expect("the driver listens");
        let channel = Endpoint::from_shared(endpoint)
            .expect("an endpoint")
            .connect()
            .await
            .expect("the driver answers");
        Self { client: ComputeDriverClient::new(channel), quit, serving, _dir: dir }
    }

    /// Stops it.
    pub async fn stop(self) {
        drop(self.client);
        self.quit.cancel();
        self.serving.await.expect("the driver does not panic").expect("the driver ends well");
    }

    /// All sandboxes.
    pub async fn list(&mut self) -> Result<Vec<DriverSandbox>, Status> {
        Ok(self.client.list_sandboxes(compute::ListSandboxesRequest {}).await?.into_inner().sandboxes)
    }

    /// The sandbox of that id.
    pub async fn get(&mut self, id: &str) -> Result<DriverSandbox, Status> {
        let request = compute::GetSandboxRequest { sandbox_id: id.to_owned(), ..Default::default() };
        Ok(self.client.get_sandbox(request).await?.into_inner().sandbox.unwrap_or_default())
    }

    /// Opens the watch.
    pub async fn watch(&mut self) -> Streaming<compute::WatchSandboxesEvent> {
        let request = compute::WatchSandboxesRequest {};
        self.client.watch_sandboxes(request).await.expect("a watch").into_inner()
    }

    /// Validates and creates.
    pub async fn create(&mut self, sandbox: &DriverSandbox) -> Result<(), Status> {
        let sandbox = Some(sandbox.clone());
        let request = compute::ValidateSandboxCreateRequest { sandbox: sandbox.clone() };
        self.client.validate_sandbox_create(request).await?;
        self.client.create_sandbox(compute::CreateSandboxRequest { sandbox }).await?;
        Ok(())
    }

    /// Deletes; whether there was one.
    pub async fn delete(&mut self, id: &str) -> Result<bool, Status> {
        let request = compute::DeleteSandboxRequest { sandbox_id: id.to_owned(), ..Default::default() };
        Ok(self.client.delete_sandbox(request).await?.into_inner().deleted)
    }
}

/// A request with a fresh id and name.
pub fn sandbox(workspace: &str, image: &str) -> DriverSandbox {
    let id = uuid::Uuid::new_v4().to_string();
    DriverSandbox {
        name: format!("live-{}", &id[..8]),
        id,
        workspace: workspace.to_owned(),
        spec: Some(DriverSandboxSpec {
            template: Some(DriverSandboxTemplate { image: image.to_owned(), ..Default::default() }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Status and message of a condition.
pub fn condition(sandbox: &DriverSandbox, kind: &str) -> (String, String) {
    let conditions = sandbox.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    conditions
        .iter()
        .find(|condition| condition.r#type == kind)
        .map(|condition| (condition.status.clone(), format!("{}: {}", condition.reason, condition.message)))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_variable_fails_and_is_named() {
        for value in [None, Some(String::new())] {
            let missing = require("API_ENDPOINT", |_| value.clone()).unwrap_err();
            assert!(missing.contains("SUBSTRATE_LIVE_API_ENDPOINT"), "{missing}");
        }
        assert_eq!(require("X", |name| Some(name.to_owned())), Ok("SUBSTRATE_LIVE_X".to_owned()));
    }
}
