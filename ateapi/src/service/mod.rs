// SPDX-License-Identifier: Apache-2.0
//! `ateapi.v1.Control` over the engine: validate, ask, convert. No decision is made here.
pub(crate) mod admin;
mod convert;
mod status;
mod streams;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::BTreeMap;
use std::sync::Arc;

use prost::Message;
use sha2::{Digest as _, Sha256};
use substrate_proto::ateapi::control_server::Control;
use substrate_proto::{ateapi, types};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::engine::{
    Answer, CallError, DEFAULT_DRAIN_MS, Engine, RequestKey, Update, Verb, has_labels, lock,
};
use crate::model::{self, Actor, ActorKey, Atespace, EventDraft, Invalid, Page, State, Template, WorkerId};
use crate::store::{self, EventQuery, Kind, Query, Tx};

/// Pages read at most to fill one page of a list with selectors; what is beyond needs the next call.
const PAGES_PER_LIST: usize = 20;
/// Longest reason of a report that becomes part of an event, characters.
const MAX_REASON: usize = 500;
/// Denials taken in one call: what the egress proxy sends at most.
const MAX_DENIALS: usize = 256;
/// Longest text that is taken of a denial, bytes; a name and a port have room.
const MAX_DENIAL_TEXT: usize = 300;

/// The service.
#[derive(Clone)]
pub(crate) struct ControlService {
    engine: Arc<Engine>,
}

type Answered<T> = Result<Response<T>, Status>;

fn invalid(error: Invalid) -> Status {
    CallError::from(error).into()
}

/// The key of a request id: the method's, and a digest of what was asked without the id itself.
fn request_key(method: &str, id: &str, asked: &impl Message) -> Result<Option<RequestKey>, Invalid> {
    model::request_id(id)?;
    Ok((!id.is_empty()).then(|| RequestKey {
        id: format!("{method}/{id}"),
        fingerprint: hex::encode(Sha256::digest(asked.encode_to_vec())),
    }))
}

fn cause_or(cause: &str, default: &str) -> Result<String, Invalid> {
    if cause.is_empty() {
        return Ok(default.to_owned());
    }
    model::resource_name("cause", cause)?;
    Ok(cause.to_owned())
}

const MAX_DRAIN_MS: u32 = 600_000;

fn drain_ms(asked: Option<u32>) -> Result<u32, Invalid> {
    let ms = asked.unwrap_or(DEFAULT_DRAIN_MS);
    if ms > MAX_DRAIN_MS {
        return Err(Invalid {
            field: "drain_ms".to_owned(),
            message: format!("is {ms}, at most {MAX_DRAIN_MS} is allowed"),
        });
    }
    Ok(ms)
}

impl ControlService {
    pub(crate) fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }

    async fn ask(
        &self,
        reference: Option<&ateapi::ActorRef>,
        verb: Verb,
        request: Option<RequestKey>,
    ) -> Result<Answer, Status> {
        let key = model::actor_key(reference).map_err(invalid)?;
        let uid = self.engine.resolve(&key).await?;
        Ok(self.engine.ask(&uid, verb, request).await?)
    }

    fn snapshot_answer(&self, answer: Answer) -> ateapi::SnapshotAnswer {
        let snapshot = answer.snapshot.as_ref().map(|it| convert::snapshot(&answer.actor, it));
        ateapi::SnapshotAnswer {
            actor: Some(convert::actor(&self.engine, answer.actor)),
            snapshot,
            steps: answer.steps,
        }
    }

    fn actor_answer(&self, answer: Answer) -> ateapi::Actor {
        convert::actor(&self.engine, answer.actor)
    }

    fn tagged(answer: &Answer) -> Response<ateapi::Snapshot> {
        let snapshot = answer.snapshot.as_ref().map(|it| convert::snapshot(&answer.actor, it));
        Response::new(snapshot.unwrap_or_default())
    }

    /// One page of actors that match; the token leads on even when a page is not full.
    async fn page_of_actors(
        &self,
        mut query: Query,
        page: Page,
        labels: &BTreeMap<String, String>,
    ) -> Result<(Vec<Actor>, String), CallError> {
        let mut found: Vec<Actor> = Vec::new();
        query.after = page.after;
        query.limit = page.size + 1;
        for _ in 0..PAGES_PER_LIST {
            let rows: Vec<Actor> = store::list(&*self.engine.store, &query).await?;
            let exhausted = rows.len() < query.limit;
            for actor in rows {
                if found.len() == page.size {
                    let token = found.last().map(|it| Page::token(&it.atespace, &it.name));
                    return Ok((found, token.unwrap_or_default()));
                }
                query.after = Some((actor.atespace.clone(), actor.name.clone()));
                if has_labels(&actor, labels) {
                    found.push(actor);
                }
            }
            if exhausted {
                return Ok((found, String::new()));
            }
        }
        let token = query.after.map(|(atespace, name)| Page::token(&atespace, &name));
        Ok((found, token.unwrap_or_default()))
    }

    /// Runs a command; the first message names the actor.
    pub(crate) async fn exec(
        &self,
        first: Option<types::ExecInput>,
        rest: tonic::Streaming<types::ExecInput>,
    ) -> Answered<streams::ExecStream> {
        streams::exec(&self.engine, first, rest).await
    }

    /// The atespace of an actor, if there is such an actor.
    pub(crate) async fn atespace_of(&self, uid: &model::ActorUid) -> Result<Option<String>, Status> {
        let found: Option<Actor> =
            store::load(&*self.engine.store, uid.as_str()).await.map_err(CallError::from)?;
        Ok(found.map(|actor| actor.atespace))
    }

    async fn stale_check(&self, uid: &str, generation: u64) -> Result<Actor, Status> {
        model::uid("actor_uid", uid).map_err(invalid)?;
        let actor = self.engine.lookup(&ActorKey::Uid(uid.into())).await?;
        if actor.generation.0 != generation {
            let error = CallError::StaleGeneration {
                actor: format!("{}/{}", actor.atespace, actor.name),
                asked: generation,
                present: actor.generation.0,
            };
            return Err(error.into());
        }
        Ok(actor)
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn create_atespace(
        &self,
        request: Request<ateapi::CreateAtespaceRequest>,
    ) -> Answered<ateapi::Atespace> {
        let request = request.into_inner();
        model::atespace_name("name", &request.name).map_err(invalid)?;
        model::labels("labels", &request.labels).map_err(invalid)?;
        model::request_id(&request.request_id).map_err(invalid)?;
        let atespace = self.engine.create_atespace(&request.name, request.labels).await?;
        Ok(Response::new(convert::atespace(atespace)))
    }

    async fn get_atespace(&self, request: Request<ateapi::GetAtespaceRequest>) -> Answered<ateapi::Atespace> {
        let name = request.into_inner().name;
        model::atespace_name("name", &name).map_err(invalid)?;
        let found: Option<Atespace> =
            store::load(&*self.engine.store, &name).await.map_err(CallError::from)?;
        let found = found.ok_or(CallError::NotFound { kind: "atespace", name })?;
        Ok(Response::new(admin::with_usage(&self.engine, found).await?))
    }

    async fn list_atespaces(
        &self,
        request: Request<ateapi::ListAtespacesRequest>,
    ) -> Answered<ateapi::ListAtespacesResponse> {
        let request = request.into_inner();
        let page = model::page(request.page_size, &request.page_token).map_err(invalid)?;
        let mut query = Query::all(Kind::Atespace);
        (query.limit, query.after) = (page.size + 1, page.after);
        let mut rows: Vec<Atespace> =
            store::list(&*self.engine.store, &query).await.map_err(CallError::from)?;
        let more = rows.len() > page.size;
        rows.truncate(page.size);
        let next_page_token = match rows.last() {
            Some(last) if more => Page::token(&last.name, &last.name),
            _ => String::new(),
        };
        let atespaces = rows.into_iter().map(convert::atespace).collect();
        Ok(Response::new(ateapi::ListAtespacesResponse { atespaces, next_page_token }))
    }

    async fn delete_atespace(
        &self,
        request: Request<ateapi::DeleteAtespaceRequest>,
    ) -> Answered<ateapi::DeleteAtespaceResponse> {
        let request = request.into_inner();
        model::atespace_name("name", &request.name).map_err(invalid)?;
        let key = request_key("DeleteAtespace", &request.request_id, &request).map_err(invalid)?;
        let deleted = self.engine.delete_atespace(&request.name, key).await?;
        Ok(Response::new(ateapi::DeleteAtespaceResponse { deleted }))
    }

    async fn create_template(
        &self,
        request: Request<ateapi::CreateTemplateRequest>,
    ) -> Answered<ateapi::Template> {
        let request = request.into_inner();
        model::atespace_name("atespace", &request.atespace).map_err(invalid)?;
        model::resource_name("name", &request.name).map_err(invalid)?;
        model::labels("labels", &request.labels).map_err(invalid)?;
        model::request_id(&request.request_id).map_err(invalid)?;
        let spec = model::template_spec("spec", request.spec.as_ref()).map_err(invalid)?;
        let template = self
            .engine
            .create_template(&request.atespace, &request.name, spec, request.labels, request.dry_run)
            .await?;
        Ok(Response::new(convert::template(template)))
    }

    async fn get_template(&self, request: Request<ateapi::GetTemplateRequest>) -> Answered<ateapi::Template> {
        let request = request.into_inner();
        model::atespace_name("atespace", &request.atespace).map_err(invalid)?;
        model::resource_name("name", &request.name).map_err(invalid)?;
        let found: Option<Template> = store::find(&*self.engine.store, &request.atespace, &request.name)
            .await
            .map_err(CallError::from)?;
        let name = format!("{}/{}", request.atespace, request.name);
        let found = found.ok_or(CallError::NotFound { kind: "template", name })?;
        let golden = self.engine.golden_status(&found.uid);
        Ok(Response::new(ateapi::Template { golden, ..convert::template(found) }))
    }

    async fn list_templates(
        &self,
        request: Request<ateapi::ListTemplatesRequest>,
    ) -> Answered<ateapi::ListTemplatesResponse> {
        let request = request.into_inner();
        let page = model::page(request.page_size, &request.page_token).map_err(invalid)?;
        let mut query = Query::all(Kind::Template);
        if !request.atespace.is_empty() {
            model::atespace_name("atespace", &request.atespace).map_err(invalid)?;
            query.atespace = Some(request.atespace);
        }
        (query.limit, query.after) = (page.size + 1, page.after);
        let mut rows: Vec<Template> =
            store::list(&*self.engine.store, &query).await.map_err(CallError::from)?;
        let more = rows.len() > page.size;
        rows.truncate(page.size);
        let next_page_token = match rows.last() {
            Some(last) if more => Page::token(&last.atespace, &last.name),
            _ => String::new(),
        };
        let templates = rows.into_iter().map(convert::template).collect();
        Ok(Response::new(ateapi::ListTemplatesResponse { templates, next_page_token }))
    }

    async fn delete_template(
        &self,
        request: Request<ateapi::DeleteTemplateRequest>,
    ) -> Answered<ateapi::DeleteTemplateResponse> {
        let request = request.into_inner();
        model::atespace_name("atespace", &request.atespace).map_err(invalid)?;
        model::resource_name("name", &request.name).map_err(invalid)?;
        let key = request_key("DeleteTemplate", &request.request_id, &request).map_err(invalid)?;
        let deleted = self.engine.delete_template(&request.atespace, &request.name, key).await?;
        Ok(Response::new(ateapi::DeleteTemplateResponse { deleted }))
    }

    async fn create_actor(&self, request: Request<ateapi::CreateActorRequest>) -> Answered<ateapi::Actor> {
        let request = request.into_inner();
        model::atespace_name("atespace", &request.atespace).map_err(invalid)?;
        model::resource_name("name", &request.name).map_err(invalid)?;
        model::spec_of_actor(request.spec.as_ref()).map_err(invalid)?;
        if !request.uid.is_empty() {
            model::uid("uid", &request.uid).map_err(invalid)?;
        }
        let key = request_key("CreateActor", &request.request_id, &request).map_err(invalid)?;
        let uid = Some(request.uid).filter(|uid| !uid.is_empty()).map(Into::into);
        let spec = request.spec.unwrap_or_default();
        let actor =
            self.engine.create_actor(&request.atespace, &request.name, spec, uid, request.start, key).await?;
        Ok(Response::new(convert::actor(&self.engine, actor)))
    }

    async fn get_actor(&self, request: Request<ateapi::GetActorRequest>) -> Answered<ateapi::Actor> {
        let key = model::actor_key(request.into_inner().actor.as_ref()).map_err(invalid)?;
        let actor = self.engine.lookup(&key).await?;
        Ok(Response::new(convert::actor(&self.engine, actor)))
    }

    async fn list_actors(
        &self,
        request: Request<ateapi::ListActorsRequest>,
    ) -> Answered<ateapi::ListActorsResponse> {
        let request = request.into_inner();
        let page = model::page(request.page_size, &request.page_token).map_err(invalid)?;
        model::labels("labels", &request.labels).map_err(invalid)?;
        let mut query = Query::all(Kind::Actor);
        if !request.atespace.is_empty() {
            model::atespace_name("atespace", &request.atespace).map_err(invalid)?;
            query.atespace = Some(request.atespace.clone());
        }
        for (index, number) in request.states.iter().enumerate() {
            let state = State::from_proto(*number).ok_or_else(|| {
                invalid(Invalid {
                    field: format!("states[{index}]"),
                    message: format!("{number} is no state"),
                })
            })?;
            query.states.push(state.to_proto() as i64);
        }
        let revision = *self.engine.store.revisions().borrow();
        if !request.template.is_empty() {
            model::resource_name("template", &request.template).map_err(invalid)?;
            model::atespace_name("atespace", &request.atespace).map_err(invalid)?;
            let template: Option<Template> =
                store::find(&*self.engine.store, &request.atespace, &request.template)
                    .await
                    .map_err(CallError::from)?;
            let Some(template) = template else {
                return Ok(Response::new(ateapi::ListActorsResponse { revision, ..Default::default() }));
            };
            query.template = Some(template.uid.0);
        }
        let (actors, next_page_token) = self.page_of_actors(query, page, &request.labels).await?;
        let actors = actors.into_iter().map(|actor| convert::actor(&self.engine, actor)).collect();
        Ok(Response::new(ateapi::ListActorsResponse { actors, next_page_token, revision }))
    }

    async fn update_actor(&self, request: Request<ateapi::UpdateActorRequest>) -> Answered<ateapi::Actor> {
        let request = request.into_inner();
        let key = request_key("UpdateActor", &request.request_id, &request).map_err(invalid)?;
        if let Some(labels) = &request.labels {
            model::labels("labels", &labels.entries).map_err(invalid)?;
        }
        if let Some(annotations) = &request.annotations {
            model::annotations("annotations", &annotations.entries).map_err(invalid)?;
        }
        if let Some(idle) = &request.idle {
            model::idle("idle", idle).map_err(invalid)?;
        }
        if let Some(egress) = &request.egress {
            model::egress("egress", egress).map_err(invalid)?;
        }
        let update = Update {
            labels: request.labels.map(|set| set.entries),
            annotations: request.annotations.map(|set| set.entries),
            idle: request.idle,
            egress: request.egress,
        };
        let answer = self.ask(request.actor.as_ref(), Verb::Update(Box::new(update)), key).await?;
        Ok(Response::new(self.actor_answer(answer)))
    }

    async fn resume_actor(
        &self,
        request: Request<ateapi::ResumeActorRequest>,
    ) -> Answered<ateapi::ResumeActorResponse> {
        let request = request.into_inner();
        let key = request_key("ResumeActor", &request.request_id, &request).map_err(invalid)?;
        let cause = cause_or(&request.cause, "user").map_err(invalid)?;
        let answer = self.ask(request.actor.as_ref(), Verb::Resume { cause }, key).await?;
        Ok(Response::new(ateapi::ResumeActorResponse {
            steps: answer.steps.clone(),
            was_running: answer.was_running,
            actor: Some(self.actor_answer(answer)),
        }))
    }

    async fn suspend_actor(
        &self,
        request: Request<ateapi::SuspendActorRequest>,
    ) -> Answered<ateapi::SnapshotAnswer> {
        let request = request.into_inner();
        let key = request_key("SuspendActor", &request.request_id, &request).map_err(invalid)?;
        let verb = Verb::Suspend {
            by: cause_or(&request.cause, "user").map_err(invalid)?,
            only_if_idle: request.only_if_idle,
            drain_ms: drain_ms(request.drain_ms).map_err(invalid)?,
        };
        let answer = self.ask(request.actor.as_ref(), verb, key).await?;
        Ok(Response::new(self.snapshot_answer(answer)))
    }

    async fn pause_actor(
        &self,
        request: Request<ateapi::PauseActorRequest>,
    ) -> Answered<ateapi::SnapshotAnswer> {
        let request = request.into_inner();
        let key = request_key("PauseActor", &request.request_id, &request).map_err(invalid)?;
        let verb = Verb::Pause {
            by: cause_or(&request.cause, "user").map_err(invalid)?,
            only_if_idle: request.only_if_idle,
            drain_ms: drain_ms(request.drain_ms).map_err(invalid)?,
            promote_after: None,
        };
        let answer = self.ask(request.actor.as_ref(), verb, key).await?;
        Ok(Response::new(self.snapshot_answer(answer)))
    }

    async fn promote_actor(
        &self,
        request: Request<ateapi::PromoteActorRequest>,
    ) -> Answered<ateapi::SnapshotAnswer> {
        let request = request.into_inner();
        let key = request_key("PromoteActor", &request.request_id, &request).map_err(invalid)?;
        let answer = self.ask(request.actor.as_ref(), Verb::Promote, key).await?;
        Ok(Response::new(self.snapshot_answer(answer)))
    }

    async fn checkpoint_actor(
        &self,
        request: Request<ateapi::CheckpointActorRequest>,
    ) -> Answered<ateapi::SnapshotAnswer> {
        let request = request.into_inner();
        let key = request_key("CheckpointActor", &request.request_id, &request).map_err(invalid)?;
        let durable = match request.durability() {
            types::Durability::Durable => true,
            types::Durability::Node => false,
            types::Durability::Unspecified => {
                let actor = model::actor_key(request.actor.as_ref()).map_err(invalid)?;
                self.engine.lookup(&actor).await?.checkpoint.durability != "node"
            }
        };
        let verb = Verb::Checkpoint { durable, generation: request.generation, max_heap: request.max_heap };
        let answer = self.ask(request.actor.as_ref(), verb, key).await?;
        Ok(Response::new(self.snapshot_answer(answer)))
    }

    async fn revert_actor(&self, request: Request<ateapi::RevertActorRequest>) -> Answered<ateapi::Actor> {
        let request = request.into_inner();
        model::snapshot_ref("snapshot", &request.snapshot, false).map_err(invalid)?;
        let key = request_key("RevertActor", &request.request_id, &request).map_err(invalid)?;
        let verb = Verb::Revert { snapshot: request.snapshot };
        let answer = self.ask(request.actor.as_ref(), verb, key).await?;
        Ok(Response::new(self.actor_answer(answer)))
    }

    async fn reset_actor(&self, request: Request<ateapi::ResetActorRequest>) -> Answered<ateapi::Actor> {
        let request = request.into_inner();
        let key = request_key("ResetActor", &request.request_id, &request).map_err(invalid)?;
        let answer = self.ask(request.actor.as_ref(), Verb::Reset, key).await?;
        Ok(Response::new(self.actor_answer(answer)))
    }

    async fn fork_actor(&self, request: Request<ateapi::ForkActorRequest>) -> Answered<ateapi::Actor> {
        let request = request.into_inner();
        model::resource_name("new_name", &request.new_name).map_err(invalid)?;
        model::snapshot_ref("snapshot", &request.snapshot, true).map_err(invalid)?;
        let key = request_key("ForkActor", &request.request_id, &request).map_err(invalid)?;
        let verb = Verb::Fork { name: request.new_name, snapshot: request.snapshot };
        let answer = self.ask(request.actor.as_ref(), verb, key).await?;
        Ok(Response::new(self.actor_answer(answer)))
    }

    async fn delete_actor(
        &self,
        request: Request<ateapi::DeleteActorRequest>,
    ) -> Answered<ateapi::DeleteActorResponse> {
        let request = request.into_inner();
        let request_key = request_key("DeleteActor", &request.request_id, &request).map_err(invalid)?;
        let key = model::actor_key(request.actor.as_ref()).map_err(invalid)?;
        // A retry means the actor of the first attempt, also where another has its name by now.
        let first = self.engine.recall(request_key.as_ref()).await?;
        let was_asked = first.is_some();
        let key = first.map_or(key, |uid| ActorKey::Uid(uid.into()));
        let gone = |error: &CallError| matches!(error, CallError::NotFound { kind: "actor", .. });
        let uid = match self.engine.resolve(&key).await {
            Ok(uid) => uid,
            Err(error) if gone(&error) => {
                return Ok(Response::new(ateapi::DeleteActorResponse { deleted: was_asked }));
            }
            Err(error) => return Err(error.into()),
        };
        match self.engine.ask(&uid, Verb::Delete, request_key).await {
            Ok(_) => Ok(Response::new(ateapi::DeleteActorResponse { deleted: true })),
            Err(error) if gone(&error) => {
                Ok(Response::new(ateapi::DeleteActorResponse { deleted: was_asked }))
            }
            Err(error) => Err(error.into()),
        }
    }

    type ExecActorStream = streams::ExecStream;

    async fn exec_actor(
        &self,
        request: Request<tonic::Streaming<types::ExecInput>>,
    ) -> Answered<Self::ExecActorStream> {
        let mut inputs = request.into_inner();
        let first = inputs.message().await?;
        self.exec(first, inputs).await
    }

    type ActorLogsStream = streams::LogStream;

    async fn actor_logs(
        &self,
        request: Request<ateapi::ActorLogsRequest>,
    ) -> Answered<Self::ActorLogsStream> {
        streams::logs(&self.engine, request.into_inner()).await
    }

    async fn list_snapshots(
        &self,
        request: Request<ateapi::ListSnapshotsRequest>,
    ) -> Answered<ateapi::ListSnapshotsResponse> {
        let request = request.into_inner();
        let page = model::page(request.page_size, &request.page_token).map_err(invalid)?;
        let show = |actor: &Actor| -> Vec<_> {
            actor.snapshots.iter().map(|it| convert::snapshot(actor, it)).collect()
        };
        if request.actor.is_some() {
            let key = model::actor_key(request.actor.as_ref()).map_err(invalid)?;
            let snapshots = show(&self.engine.lookup(&key).await?);
            return Ok(Response::new(ateapi::ListSnapshotsResponse { snapshots, ..Default::default() }));
        }
        let mut query = Query::all(Kind::Actor);
        if !request.atespace.is_empty() {
            model::atespace_name("atespace", &request.atespace).map_err(invalid)?;
            query.atespace = Some(request.atespace);
        }
        // A page ends between actors, so it may be a little longer than asked for.
        let (actors, next_page_token) = self.page_of_actors(query, page, &BTreeMap::new()).await?;
        let snapshots = actors.iter().flat_map(show).collect();
        Ok(Response::new(ateapi::ListSnapshotsResponse { snapshots, next_page_token }))
    }

    async fn tag_snapshot(&self, request: Request<ateapi::TagSnapshotRequest>) -> Answered<ateapi::Snapshot> {
        let request = request.into_inner();
        let key = request_key("TagSnapshot", &request.request_id, &request).map_err(invalid)?;
        model::tag("tag", &request.tag).map_err(invalid)?;
        model::snapshot_ref("snapshot", &request.snapshot, true).map_err(invalid)?;
        let verb = Verb::Tag { snapshot: request.snapshot, tag: request.tag };
        let answer = self.ask(request.actor.as_ref(), verb, key).await?;
        Ok(Self::tagged(&answer))
    }

    async fn untag_snapshot(
        &self,
        request: Request<ateapi::UntagSnapshotRequest>,
    ) -> Answered<ateapi::Snapshot> {
        let request = request.into_inner();
        let key = request_key("UntagSnapshot", &request.request_id, &request).map_err(invalid)?;
        model::tag("tag", &request.tag).map_err(invalid)?;
        let answer = self.ask(request.actor.as_ref(), Verb::Untag { tag: request.tag }, key).await?;
        Ok(Self::tagged(&answer))
    }

    async fn list_workers(
        &self,
        _: Request<ateapi::ListWorkersRequest>,
    ) -> Answered<ateapi::ListWorkersResponse> {
        let workers: Vec<_> = lock(&self.engine.pool).iter().cloned().collect();
        let workers = workers.into_iter().map(|it| convert::worker(&self.engine, it)).collect();
        Ok(Response::new(ateapi::ListWorkersResponse { workers }))
    }

    async fn cordon_worker(&self, request: Request<ateapi::CordonWorkerRequest>) -> Answered<ateapi::Worker> {
        let request = request.into_inner();
        model::call_id("id", &request.id).map_err(invalid)?;
        let worker = self.engine.cordon(&WorkerId(request.id), !request.uncordon).await?;
        Ok(Response::new(convert::worker(&self.engine, worker)))
    }

    async fn drain_worker(&self, request: Request<ateapi::DrainWorkerRequest>) -> Answered<ateapi::Worker> {
        let request = request.into_inner();
        model::call_id("id", &request.id).map_err(invalid)?;
        let worker = self.engine.drain(&WorkerId(request.id)).await?;
        Ok(Response::new(convert::worker(&self.engine, worker)))
    }

    async fn list_events(
        &self,
        request: Request<ateapi::ListEventsRequest>,
    ) -> Answered<ateapi::ListEventsResponse> {
        let request = request.into_inner();
        let some = |text: String| Some(text).filter(|text| !text.is_empty());
        let query = EventQuery {
            atespace: some(request.atespace),
            subject: some(request.subject),
            reason: some(request.reason),
            after: request.after_revision,
            limit: if request.limit == 0 { 100 } else { request.limit.min(1_000) } as usize,
        };
        let events = self.engine.store.events(&query).await.map_err(CallError::from)?;
        let events = events.into_iter().map(|(revision, event)| convert::event(revision, event)).collect();
        Ok(Response::new(ateapi::ListEventsResponse { events }))
    }

    type WatchStream = ReceiverStream<Result<ateapi::WatchResponse, Status>>;

    async fn watch(&self, request: Request<ateapi::WatchRequest>) -> Answered<Self::WatchStream> {
        let request = request.into_inner();
        if !request.atespace.is_empty() {
            model::atespace_name("atespace", &request.atespace).map_err(invalid)?;
        }
        let watcher = watch::Watcher {
            engine: Arc::clone(&self.engine),
            kinds: watch::kinds(&request.kinds).map_err(invalid)?,
            atespace: request.atespace,
            from: request.from_revision,
        };
        let (to, stream) = tokio::sync::mpsc::channel(64);
        self.engine.spawn(watcher.run(to));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn get_egress(
        &self,
        request: Request<ateapi::GetEgressRequest>,
    ) -> Answered<ateapi::GetEgressResponse> {
        let request = request.into_inner();
        let actor = self.stale_check(&request.actor_uid, request.generation).await?;
        let policy = self.engine.egress_of(&actor).await?;
        let names = actor
            .egress_names
            .iter()
            .filter(|(name, _)| crate::egress::allows(&policy, name))
            .map(|(name, index)| crate::egress::bound(name, *index))
            .collect();
        Ok(Response::new(ateapi::GetEgressResponse {
            policy: Some(policy),
            names,
            revision: actor.egress_revision,
        }))
    }

    async fn bind_egress_name(
        &self,
        request: Request<ateapi::BindEgressNameRequest>,
    ) -> Answered<ateapi::EgressName> {
        let request = request.into_inner();
        let uid = request.actor_uid.clone();
        model::uid("actor_uid", &uid).map_err(invalid)?;
        let verb = Verb::Bind { generation: request.generation, name: request.name };
        let answer = self.engine.ask(&uid.into(), verb, None).await?;
        answer.name.map(Response::new).ok_or_else(|| Status::internal("the name has no address"))
    }

    async fn report_denials(
        &self,
        request: Request<ateapi::ReportDenialsRequest>,
    ) -> Answered<ateapi::ReportDenialsResponse> {
        let mut tx = Tx::default();
        let denials = request.into_inner().denials;
        if denials.len() > MAX_DENIALS {
            return Err(invalid(Invalid {
                field: "denials".to_owned(),
                message: format!(
                    "has {} entries, at most {MAX_DENIALS} are taken in one call",
                    denials.len()
                ),
            }));
        }
        for mut denial in denials {
            for text in [&mut denial.protocol, &mut denial.destination, &mut denial.reason] {
                text.truncate(text.floor_char_boundary(MAX_DENIAL_TEXT));
            }
            // A late report of an actor that is gone is not worth an error.
            let Ok(actor) = self.engine.lookup(&ActorKey::Uid(denial.actor_uid.as_str().into())).await else {
                continue;
            };
            tx.events.push(EventDraft {
                kind: "egress".to_owned(),
                atespace: actor.atespace,
                subject: actor.name,
                subject_uid: actor.uid.0,
                reason: "EgressDenied".to_owned(),
                message: format!(
                    "{} to {} was denied: {}",
                    denial.protocol, denial.destination, denial.reason
                ),
                warning: true,
                metadata: BTreeMap::from([
                    ("protocol".to_owned(), denial.protocol),
                    ("destination".to_owned(), denial.destination),
                    ("reason".to_owned(), denial.reason),
                    ("count".to_owned(), denial.count.max(1).to_string()),
                    ("generation".to_owned(), denial.generation.to_string()),
                ]),
                time_ms: denial.time_ms,
            });
        }
        if !tx.events.is_empty() {
            self.engine.store.commit(tx).await.map_err(CallError::from)?;
        }
        Ok(Response::new(ateapi::ReportDenialsResponse {}))
    }

    async fn report_fallback(
        &self,
        request: Request<ateapi::ReportFallbackRequest>,
    ) -> Answered<ateapi::ReportFallbackResponse> {
        let report = request.into_inner();
        model::uid("actor_uid", &report.actor_uid).map_err(invalid)?;
        let actor = self.engine.lookup(&ActorKey::Uid(report.actor_uid.into())).await?;
        let replies = report.replies.max(1);
        let reason: String = report.reason.chars().take(MAX_REASON).collect();
        let tx = Tx {
            events: vec![EventDraft {
                kind: "actor".to_owned(),
                atespace: actor.atespace,
                subject: actor.name,
                subject_uid: actor.uid.0,
                reason: "DurabilityFellBack".to_owned(),
                message: format!(
                    "{replies} replies went out before their checkpoint (ate-durability: async): {reason}"
                ),
                warning: true,
                metadata: BTreeMap::from([
                    ("replies".to_owned(), replies.to_string()),
                    ("generation".to_owned(), report.generation.to_string()),
                ]),
                time_ms: self.engine.clock.wall_ms(),
            }],
            ..Tx::default()
        };
        self.engine.store.commit(tx).await.map_err(CallError::from)?;
        Ok(Response::new(ateapi::ReportFallbackResponse {}))
    }

    async fn suspend_all(
        &self,
        request: Request<ateapi::SuspendAllRequest>,
    ) -> Answered<ateapi::SuspendAllResponse> {
        let cause = cause_or(&request.into_inner().cause, "shutdown").map_err(invalid)?;
        let (suspended, failed) = self.engine.suspend_all(&cause).await?;
        Ok(Response::new(ateapi::SuspendAllResponse { suspended, failed }))
    }
}
