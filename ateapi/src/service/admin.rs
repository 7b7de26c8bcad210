// SPDX-License-Identifier: Apache-2.0
//! `ateapi.v1.Admin` over the engine, for callers of the Unix socket alone; each call has its line in the audit log.
use std::sync::Arc;

use substrate_proto::ateapi;
use substrate_proto::ateapi::admin_server::Admin;
use tonic::{Request, Response, Status};

use super::{convert, invalid};
use crate::access::Access;
use crate::engine::{CallError, Engine};
use crate::model::{self, Atespace, NodeName, Quota};

/// The service.
#[derive(Clone)]
pub(crate) struct AdminService {
    engine: Arc<Engine>,
    access: Arc<Access>,
}

impl AdminService {
    pub(crate) fn new(engine: Arc<Engine>, access: Arc<Access>) -> Self {
        Self { engine, access }
    }
}

/// An atespace with what it uses.
pub(super) async fn with_usage(engine: &Engine, atespace: Atespace) -> Result<ateapi::Atespace, CallError> {
    let (used, running) = engine.usage_of(&atespace.name).await?;
    let usage = ateapi::Usage { actors: used.actors, running, snapshot_bytes: used.bytes };
    Ok(ateapi::Atespace { usage: Some(usage), ..convert::atespace(atespace) })
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn set_quota(
        &self,
        request: Request<ateapi::SetQuotaRequest>,
    ) -> Result<Response<ateapi::Atespace>, Status> {
        self.access.local_only("SetQuota", &request.get_ref().atespace, &request)?;
        let request = request.into_inner();
        model::atespace_name("atespace", &request.atespace).map_err(invalid)?;
        let asked = request.quota.unwrap_or_default();
        let quota = Quota {
            actors: asked.actors,
            running: asked.running,
            snapshot_bytes: asked.snapshot_bytes,
            wakeups_per_s: asked.wakeups_per_s,
        };
        let atespace = self.engine.set_quota(&request.atespace, quota).await?;
        Ok(Response::new(with_usage(&self.engine, atespace).await?))
    }

    async fn declare_node_lost(
        &self,
        request: Request<ateapi::DeclareNodeLostRequest>,
    ) -> Result<Response<ateapi::DeclareNodeLostResponse>, Status> {
        self.access.local_only("DeclareNodeLost", "", &request)?;
        let name = request.into_inner().node;
        model::resource_name("node", &name).map_err(invalid)?;
        let (ended, snapshots_lost) = self.engine.declare_node_lost(&NodeName(name)).await?;
        Ok(Response::new(ateapi::DeclareNodeLostResponse { ended, snapshots_lost }))
    }
}
