// SPDX-License-Identifier: Apache-2.0
//! `openshell.compute.v1.ComputeDriver`: each call of the gateway handed to the part that carries it out.
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt as _};
use substrate_proto::compute::{self, compute_driver_server::ComputeDriver};
use tonic::{Request, Response, Status};

use crate::driver::Driver;
use crate::failure::{Failure, Violation};
use crate::{condition, metrics, names, supervisor};

/// Name under which the gateway knows the driver.
pub const DRIVER_NAME: &str = "substrate";

/// The service.
pub struct Service {
    driver: Arc<Driver>,
}

impl Service {
    /// Serves that driver.
    pub fn new(driver: Arc<Driver>) -> Self {
        Self { driver }
    }
}

fn required(sandbox: Option<compute::DriverSandbox>) -> Result<compute::DriverSandbox, Failure> {
    sandbox.ok_or_else(|| Failure::Invalid(vec![Violation::new("sandbox", "is missing")]))
}

#[tonic::async_trait]
impl ComputeDriver for Service {
    async fn get_capabilities(
        &self,
        _: Request<compute::GetCapabilitiesRequest>,
    ) -> Result<Response<compute::GetCapabilitiesResponse>, Status> {
        Ok(Response::new(compute::GetCapabilitiesResponse {
            driver_name: DRIVER_NAME.to_owned(),
            driver_version: env!("CARGO_PKG_VERSION").to_owned(),
            default_image: self.driver.config.default_image.clone(),
            // Actors survive the gateway: it must not stop them when it goes down.
            gateway_manages_lifecycle: false,
        }))
    }

    async fn get_gateway_listener_requirements(
        &self,
        _: Request<compute::GetGatewayListenerRequirementsRequest>,
    ) -> Result<Response<compute::GetGatewayListenerRequirementsResponse>, Status> {
        let requirements = supervisor::listener_requirements(&self.driver.config);
        Ok(Response::new(compute::GetGatewayListenerRequirementsResponse { requirements }))
    }

    async fn validate_sandbox_create(
        &self,
        request: Request<compute::ValidateSandboxCreateRequest>,
    ) -> Result<Response<compute::ValidateSandboxCreateResponse>, Status> {
        let sandbox = required(request.into_inner().sandbox)?;
        metrics::of_call("validate", self.driver.plan(&sandbox)).await?;
        Ok(Response::new(compute::ValidateSandboxCreateResponse {}))
    }

    async fn get_sandbox(
        &self,
        request: Request<compute::GetSandboxRequest>,
    ) -> Result<Response<compute::GetSandboxResponse>, Status> {
        let request = request.into_inner();
        let actor = self.driver.sandbox(&request.sandbox_id).await?;
        self.driver.claimed(&actor);
        Ok(Response::new(compute::GetSandboxResponse { sandbox: condition::sandbox(&actor) }))
    }

    async fn list_sandboxes(
        &self,
        _: Request<compute::ListSandboxesRequest>,
    ) -> Result<Response<compute::ListSandboxesResponse>, Status> {
        let managed = BTreeMap::from([(names::MANAGED.to_owned(), "true".to_owned())]);
        let actors = self.driver.control.list_actors("", "", managed).await?;
        let sandboxes = actors.iter().filter_map(condition::sandbox).collect();
        Ok(Response::new(compute::ListSandboxesResponse { sandboxes }))
    }

    async fn create_sandbox(
        &self,
        request: Request<compute::CreateSandboxRequest>,
    ) -> Result<Response<compute::CreateSandboxResponse>, Status> {
        let sandbox = required(request.into_inner().sandbox).map_err(Failure::for_create)?;
        Arc::clone(&self.driver).create(sandbox).await.map_err(Failure::for_create)?;
        Ok(Response::new(compute::CreateSandboxResponse {}))
    }

    async fn stop_sandbox(
        &self,
        request: Request<compute::StopSandboxRequest>,
    ) -> Result<Response<compute::StopSandboxResponse>, Status> {
        metrics::of_call("stop", self.driver.stop(&request.into_inner().sandbox_id)).await?;
        Ok(Response::new(compute::StopSandboxResponse {}))
    }

    async fn start_sandbox(
        &self,
        request: Request<compute::StartSandboxRequest>,
    ) -> Result<Response<compute::StartSandboxResponse>, Status> {
        metrics::of_call("start", self.driver.start(&request.into_inner().sandbox_id)).await?;
        Ok(Response::new(compute::StartSandboxResponse {}))
    }

    async fn delete_sandbox(
        &self,
        request: Request<compute::DeleteSandboxRequest>,
    ) -> Result<Response<compute::DeleteSandboxResponse>, Status> {
        let sandbox_id = request.into_inner().sandbox_id;
        let deleted = metrics::of_call("delete", self.driver.delete(&sandbox_id)).await?;
        Ok(Response::new(compute::DeleteSandboxResponse { deleted }))
    }

    type WatchSandboxesStream =
        Pin<Box<dyn Stream<Item = Result<compute::WatchSandboxesEvent, Status>> + Send>>;

    async fn watch_sandboxes(
        &self,
        _: Request<compute::WatchSandboxesRequest>,
    ) -> Result<Response<Self::WatchSandboxesStream>, Status> {
        let events = self.driver.hub.subscribe().await?;
        Ok(Response::new(Box::pin(events.map(Ok))))
    }

    async fn ensure_workspace(
        &self,
        request: Request<compute::EnsureWorkspaceRequest>,
    ) -> Result<Response<compute::EnsureWorkspaceResponse>, Status> {
        let workspace = request.into_inner().workspace;
        let tenant = if workspace.is_empty() { &self.driver.config.default_namespace } else { &workspace };
        self.driver.ensure_atespace(tenant, false).await?;
        Ok(Response::new(compute::EnsureWorkspaceResponse {}))
    }

    async fn delete_workspace(
        &self,
        request: Request<compute::DeleteWorkspaceRequest>,
    ) -> Result<Response<compute::DeleteWorkspaceResponse>, Status> {
        self.driver.delete_workspace(&request.into_inner().workspace).await?;
        Ok(Response::new(compute::DeleteWorkspaceResponse {}))
    }
}
