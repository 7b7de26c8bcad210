// SPDX-License-Identifier: Apache-2.0
//! Templates: validated, images resolved once on a node, then never changed.
use std::collections::BTreeMap;
use std::sync::Arc;

use prost::Message as _;
use sha2::{Digest as _, Sha256};
use substrate_proto::types;

use super::create::class_of;
use super::{CallError, Engine, NodeHandle, lock};
use crate::model::{Atespace, NodeName, Stored as _, Template, TemplateUid};
use crate::node::Fault;
use crate::schedule::DEFAULT_POOL;
use crate::store::{self, Check, Expect, Kind, StoreError, Tx};
use crate::workflow::steps;

/// sha256 of a spec's canonical form: its protobuf encoding, whose maps are ordered here.
fn digest(spec: &types::TemplateSpec) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(spec.encode_to_vec())))
}

impl Engine {
    /// Creates a template, or finds the one that was created from the same spec.
    pub(crate) async fn create_template(
        self: &Arc<Self>,
        atespace: &str,
        name: &str,
        spec: &types::TemplateSpec,
        labels: BTreeMap<String, String>,
        dry_run: bool,
    ) -> Result<Template, CallError> {
        if store::load::<Atespace>(&*self.store, atespace).await?.is_none() {
            return Err(CallError::NotFound { kind: "atespace", name: atespace.to_owned() });
        }
        let source_digest = digest(spec);
        let equal = |old: &Template| old.source_digest == source_digest || old.spec_digest == source_digest;
        let other = || {
            CallError::Exists(format!(
                "template {atespace}/{name} exists already with another content; templates do not change: choose \
                 another name"
            ))
        };
        if let Some(old) = store::find::<Template>(&*self.store, atespace, name).await? {
            return if equal(&old) { Ok(old) } else { Err(other()) };
        }
        let mut pinned = spec.clone();
        pinned.sandbox_class = class_of(spec);
        let (node, class) = (self.node_for(spec)?, pinned.sandbox_class.clone());
        let mut exposed = Vec::new();
        for (index, container) in pinned.containers.iter_mut().enumerate() {
            let image = steps::resolve_image(self, &node, atespace, &class, &container.image)
                .await
                .map_err(|fault| image_error(index, &container.image, fault))?;
            if !image.pinned_reference.is_empty() {
                container.image = image.pinned_reference;
            }
            if index == 0 {
                exposed = image.exposed_ports;
            }
            for mount in &mut container.image_mounts {
                let image = steps::resolve_image(self, &node, atespace, "", &mount.image)
                    .await
                    .map_err(|fault| image_error(index, &mount.image, fault))?;
                if !image.pinned_reference.is_empty() {
                    mount.image = image.pinned_reference;
                }
            }
        }
        let mut ports: Vec<u32> = pinned.containers.iter().flat_map(|it| it.ports.iter().copied()).collect();
        if ports.is_empty() {
            ports = exposed;
        }
        let template = Template {
            uid: TemplateUid::draw(&*self.clock),
            atespace: atespace.to_owned(),
            name: name.to_owned(),
            spec_digest: digest(&pinned),
            spec: pinned,
            labels,
            created_ms: self.clock.wall_ms(),
            source_digest: source_digest.clone(),
            ports,
            revision: 0,
        };
        if dry_run {
            return Ok(template);
        }
        let tx = Tx {
            checks: vec![Check::Exists(Kind::Atespace, atespace.to_owned())],
            puts: vec![(template.object(), Expect::Absent)],
            ..Tx::default()
        };
        match self.store.commit(tx).await {
            Ok(committed) => {
                self.want_golden(&template);
                Ok(Template { revision: committed.puts.first().copied().unwrap_or_default(), ..template })
            }
            Err(StoreError::Exists { .. }) => {
                let old: Option<Template> = store::find(&*self.store, atespace, name).await?;
                old.filter(equal).ok_or_else(other)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Removes a template that no actor uses. False: there was none.
    pub(crate) async fn delete_template(
        self: &Arc<Self>,
        atespace: &str,
        name: &str,
        request: Option<super::RequestKey>,
    ) -> Result<bool, CallError> {
        if self.recall(request.as_ref()).await?.is_some() {
            return Ok(true);
        }
        let Some(template) = store::find::<Template>(&*self.store, atespace, name).await? else {
            return Ok(false);
        };
        let tx = Tx {
            checks: vec![Check::TemplateUnused(template.uid.0.clone())],
            deletes: vec![(Kind::Template, template.uid.0.clone(), Expect::Revision(template.revision))],
            request: request.map(|key| self.led_to(key, template.uid.as_str())),
            ..Tx::default()
        };
        self.store.commit(tx).await?;
        self.forget_golden(&template.uid).await;
        Ok(true)
    }

    /// A connected node, best one with workers of the template's pool and class.
    fn node_for(&self, spec: &types::TemplateSpec) -> Result<Arc<NodeHandle>, CallError> {
        let pool_name = if spec.worker_pool.is_empty() { DEFAULT_POOL } else { &spec.worker_pool };
        let class = class_of(spec);
        let fitting: Option<NodeName> = lock(&self.pool)
            .iter()
            .find(|worker| {
                worker.record.alive && worker.record.pool == pool_name && worker.record.class == class
            })
            .map(|worker| worker.record.node.clone());
        fitting
            .and_then(|name| self.node(&name))
            .filter(|node| node.is_up())
            .or_else(|| self.nodes.values().find(|node| node.is_up()).cloned())
            .ok_or_else(|| {
                let names: Vec<_> = self.nodes.keys().map(NodeName::as_str).collect();
                CallError::NodeUnreachable(names.join(", "))
            })
    }
}

fn image_error(index: usize, reference: &str, fault: Fault) -> CallError {
    let what = format!("spec.containers[{index}].image: image {reference:?} cannot be used");
    let (code, message) = match fault {
        Fault::ForGood { reason, message } => {
            let unknown = reason.ends_with("NOT_FOUND");
            (if unknown { tonic::Code::NotFound } else { tonic::Code::InvalidArgument }, message)
        }
        Fault::Corrupt { message, .. } => (tonic::Code::DataLoss, message),
        Fault::Refused { message, .. } => (tonic::Code::FailedPrecondition, message),
        Fault::Again { reason, message } if reason == "RESOURCE_EXHAUSTED" => {
            (tonic::Code::ResourceExhausted, message)
        }
        Fault::Unknown { message, .. } | Fault::Stale(message) | Fault::Again { message, .. } => {
            (tonic::Code::Unavailable, message)
        }
        Fault::Exited(_) => (tonic::Code::Internal, "the node answered out of place".to_owned()),
    };
    CallError::Node { code, what, message }
}
