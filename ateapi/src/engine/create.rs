// SPDX-License-Identifier: Apache-2.0
//! What begins and ends without a driver: atespaces and actors' first records. Templates are next door.
use std::collections::BTreeMap;
use std::sync::Arc;

use substrate_proto::types;

use super::{CallError, Engine, RequestKey, Verb};
use crate::model::{Actor, ActorUid, Atespace, Quota, Stored as _, Template};
use crate::retention::DEFAULT_KEEP_LAST;
use crate::state;
use crate::store::{self, Check, Expect, Kind, RequestRecord, StoreError, Tx, UsageChange};

impl Engine {
    /// Creates an atespace; again with the same labels is the same.
    pub(crate) async fn create_atespace(
        &self,
        name: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Atespace, CallError> {
        let atespace = Atespace {
            name: name.to_owned(),
            labels,
            created_ms: self.clock.wall_ms(),
            quota: Quota::default(),
            revision: 0,
        };
        let tx = Tx { puts: vec![(atespace.object(), Expect::Absent)], ..Tx::default() };
        match self.store.commit(tx).await {
            Ok(committed) => {
                Ok(Atespace { revision: committed.puts.first().copied().unwrap_or_default(), ..atespace })
            }
            Err(StoreError::Exists { .. }) => {
                let old: Option<Atespace> = store::load(&*self.store, name).await?;
                old.filter(|old| old.labels == atespace.labels).ok_or_else(|| {
                    CallError::Exists(format!("atespace {name} exists already with other labels"))
                })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Removes an empty atespace. False: there was none.
    pub(crate) async fn delete_atespace(
        &self,
        name: &str,
        request: Option<RequestKey>,
    ) -> Result<bool, CallError> {
        // Another of that name may have been made since.
        if self.recall(request.as_ref()).await?.is_some() {
            return Ok(true);
        }
        let Some(atespace) = store::load::<Atespace>(&*self.store, name).await? else { return Ok(false) };
        let tx = Tx {
            checks: vec![Check::AtespaceEmpty(name.to_owned())],
            deletes: vec![(Kind::Atespace, name.to_owned(), Expect::Revision(atespace.revision))],
            request: request.map(|key| self.led_to(key, name)),
            ..Tx::default()
        };
        self.store.commit(tx).await?;
        super::lock(&self.quotas).set(name, Quota::default(), self.clock.now());
        Ok(true)
    }

    /// The record of a request that is committed with what it led to.
    pub(crate) fn led_to(&self, key: RequestKey, outcome: &str) -> RequestRecord {
        let RequestKey { id, fingerprint } = key;
        RequestRecord { id, fingerprint, outcome: outcome.to_owned(), time_ms: self.clock.wall_ms() }
    }

    /// What an earlier call with this id led to.
    pub(crate) async fn recall(&self, request: Option<&RequestKey>) -> Result<Option<String>, CallError> {
        let Some(key) = request else { return Ok(None) };
        match self.store.request(&key.id).await? {
            None => Ok(None),
            Some(record) if record.fingerprint == key.fingerprint => Ok(Some(record.outcome)),
            Some(_) => {
                Err(CallError::RequestReused(key.id.rsplit('/').next().unwrap_or_default().to_owned()))
            }
        }
    }

    /// Records an actor in NEW; boots it in the background when `start` is set.
    pub(crate) async fn create_actor(
        self: &Arc<Self>,
        atespace: &str,
        name: &str,
        spec: types::ActorSpec,
        uid: Option<ActorUid>,
        start: bool,
        request: Option<RequestKey>,
    ) -> Result<Actor, CallError> {
        if let Some(outcome) = self.recall(request.as_ref()).await? {
            let found: Option<Actor> = store::load(&*self.store, &outcome).await?;
            return found
                .ok_or_else(|| CallError::NotFound { kind: "actor", name: format!("{atespace}/{name}") });
        }
        if store::load::<Atespace>(&*self.store, atespace).await?.is_none() {
            return Err(CallError::NotFound { kind: "atespace", name: atespace.to_owned() });
        }
        let template: Template =
            store::find(&*self.store, atespace, &spec.template).await?.ok_or_else(|| {
                CallError::NotFound { kind: "template", name: format!("{atespace}/{}", spec.template) }
            })?;
        self.snapshot_quota(atespace).await?;
        let now = self.clock.wall_ms();
        let asked_uid = uid.clone();
        let uid = uid.unwrap_or_else(|| ActorUid::draw(&*self.clock));
        let mut shown = spec.clone();
        for file in &mut shown.files {
            file.content.clear();
        }
        let actor = Actor {
            atespace: atespace.to_owned(),
            name: name.to_owned(),
            spec: shown,
            class: class_of(&template.spec),
            pool: template.spec.worker_pool.clone(),
            ports: template.ports.clone(),
            checkpoint: template.spec.checkpoint.clone().unwrap_or_default(),
            keep_last: template
                .spec
                .retention
                .as_ref()
                .map(|retention| retention.keep_last)
                .filter(|keep| *keep > 0)
                .unwrap_or(DEFAULT_KEEP_LAST),
            holds_identity: template.spec.holds_identity,
            idle: template.spec.idle.clone().unwrap_or_default(),
            ..Actor::fresh(uid.clone(), template.uid.clone(), now)
        };
        let mut tx = Tx {
            checks: vec![
                Check::Exists(Kind::Atespace, atespace.to_owned()),
                Check::Exists(Kind::Template, template.uid.0.clone()),
            ],
            puts: vec![(actor.object(), Expect::Absent)],
            events: vec![state::draft(
                &actor,
                now,
                "Created",
                format!("from template {}", template.name),
                false,
            )],
            usage: vec![UsageChange { atespace: atespace.to_owned(), actors: 1, bytes: 0 }],
            ..Tx::default()
        };
        tx.checks.extend(self.actor_quota(atespace));
        if !spec.files.is_empty() {
            tx.seals.push((uid.0.clone(), Some(self.sealer.seal(uid.as_str(), &spec.files)?)));
        }
        tx.request = request.map(|key| RequestRecord {
            id: key.id,
            fingerprint: key.fingerprint,
            outcome: uid.0.clone(),
            time_ms: now,
        });
        let actor = match self.store.commit(tx).await {
            Ok(committed) => Actor { revision: committed.puts.first().copied().unwrap_or_default(), ..actor },
            Err(StoreError::Exists { .. }) => {
                // A caller that chose the uid finds its own actor again.
                let old: Option<Actor> = store::find(&*self.store, atespace, name).await?;
                let same = old.filter(|old| asked_uid.as_ref() == Some(&old.uid) && old.spec == actor.spec);
                return same.ok_or_else(|| {
                    CallError::Exists(format!("actor {atespace}/{name} or its uid {uid} exists already"))
                });
            }
            Err(error) => return Err(Self::refused_commit(error)),
        };
        if start {
            self.ask_quietly(&actor.uid, Verb::Resume { cause: "create".to_owned() });
        }
        Ok(actor)
    }
}

/// The class of a template's actors.
pub(super) fn class_of(spec: &types::TemplateSpec) -> String {
    if spec.sandbox_class.is_empty() { "gvisor".to_owned() } else { spec.sandbox_class.clone() }
}
