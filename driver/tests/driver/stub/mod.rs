// SPDX-License-Identifier: Apache-2.0
//! A control plane in memory, for the driver's tests: enough of `ateapi.v1.Control` to carry sandboxes through their
//! life, with a fault at any call.
#![allow(clippy::assigning_clones)]

mod bench;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{Stream, StreamExt as _, stream};
use openshell_driver_substrate::names;
use substrate_proto::ateapi::control_server::Control;
use substrate_proto::ateapi::watch_response::Change;
use substrate_proto::ateapi::{self, Actor, ActorState, Snapshot};
use substrate_proto::types;
use tokio::sync::{broadcast, watch};
use tokio_stream::wrappers::BroadcastStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};

pub use bench::{Bench, phase, sandbox, template, with_config};

/// What a call does instead of its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Refuses before anything happened.
    Before(Code),
    /// Does its work and then fails: the caller cannot know.
    After(Code),
}

/// How a boot ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    Runs,
    /// Back in NEW, this many times.
    FailsFirst(u32),
    Exits(i32),
    Crashes,
    /// Stays in RESUMING until somebody resumes it.
    Waits,
}

#[derive(Default)]
pub struct World {
    pub atespaces: BTreeMap<String, ateapi::Atespace>,
    pub templates: BTreeMap<(String, String), ateapi::Template>,
    pub actors: BTreeMap<String, Actor>,
    pub files: BTreeMap<String, Vec<types::File>>,
    pub calls: Vec<&'static str>,
    pub boots: HashMap<String, u32>,
    answers: HashMap<String, Actor>,
    faults: HashMap<&'static str, VecDeque<Fault>>,
    nth: HashMap<&'static str, (usize, Fault)>,
    reap_template: bool,
    /// Digest of the workers' runtime.
    pub runtime: String,
    revision: u64,
    /// At the call after so many more, with its effect or without: the driver dies.
    kill: Option<(usize, bool)>,
    killer: Option<bench::Killer>,
}

/// Handle on the stub's inside.
#[derive(Clone)]
pub struct Stub {
    pub world: Arc<Mutex<World>>,
    changes: broadcast::Sender<ateapi::WatchResponse>,
    pub boot: Arc<Mutex<Boot>>,
    cut: Arc<Mutex<CancellationToken>>,
    served: watch::Sender<u64>,
}

impl Stub {
    pub fn new() -> Self {
        Self {
            world: Arc::default(),
            changes: broadcast::channel(1024).0,
            boot: Arc::new(Mutex::new(Boot::Runs)),
            cut: Arc::default(),
            served: watch::Sender::new(0),
        }
    }

    /// The next calls of that method go wrong.
    pub fn fault(&self, method: &'static str, faults: &[Fault]) {
        self.world.lock().unwrap().faults.entry(method).or_default().extend(faults);
    }

    /// Only the call of that method after `nth` more goes wrong.
    pub fn fault_nth(&self, method: &'static str, nth: usize, fault: Fault) {
        let mut world = self.world.lock().unwrap();
        world.nth.insert(method, (nth, fault));
    }

    /// The driver dies in the call after `nth` more, before it has its effect or after.
    pub fn kill_at(&self, nth: usize, works: bool) {
        self.world.lock().unwrap().kill = Some((nth, works));
    }

    /// All calls so far.
    pub fn all_calls(&self) -> usize {
        self.world.lock().unwrap().calls.len()
    }

    /// Whether that fault has not come up yet.
    pub fn fault_is_pending(&self, method: &str) -> bool {
        self.world.lock().unwrap().nth.contains_key(method)
    }

    /// Deletes the template that the next actor wants, just before it.
    pub fn reap_before_next_actor(&self) {
        self.world.lock().unwrap().reap_template = true;
    }

    pub fn boot(&self, boot: Boot) {
        *self.boot.lock().unwrap() = boot;
    }

    pub fn calls(&self, method: &str) -> usize {
        self.world.lock().unwrap().calls.iter().filter(|call| **call == method).count()
    }

    /// Waits until that is so; looked at after each call that was served.
    pub async fn until(&self, so: impl Fn(&Self) -> bool) {
        let mut served = self.served.subscribe();
        while !so(self) {
            let more = tokio::time::timeout(Duration::from_mins(1), served.changed()).await;
            more.expect("it becomes so in time").expect("the stub lives");
        }
    }

    /// Ends all watches, as a restart of the control plane would.
    pub fn cut_watches(&self) {
        let mut cut = self.cut.lock().unwrap();
        cut.cancel();
        *cut = CancellationToken::new();
    }

    /// Everything there is, for comparing before and after.
    pub fn inventory(&self) -> Vec<String> {
        let world = self.world.lock().unwrap();
        let mut all: Vec<String> = world.atespaces.keys().map(|name| format!("atespace {name}")).collect();
        all.extend(world.templates.keys().map(|(space, name)| format!("template {space}/{name}")));
        all.extend(world.actors.values().map(|actor| format!("actor {}/{}", actor.atespace, actor.name)));
        all
    }

    pub fn actor(&self, sandbox_id: &str) -> Option<Actor> {
        self.world.lock().unwrap().actors.get(&names::uid(sandbox_id)).cloned()
    }

    /// Changes an actor and tells the watchers.
    pub fn change(&self, uid: &str, change: impl FnOnce(&mut Actor)) -> Option<Actor> {
        let mut world = self.world.lock().unwrap();
        world.revision += 1;
        let revision = world.revision;
        let actor = world.actors.get_mut(uid)?;
        change(actor);
        actor.revision = revision;
        actor.state_since_ms = 1_700_000_000_000;
        let actor = actor.clone();
        self.tell(revision, Change::Actor(actor.clone()));
        Some(actor)
    }

    /// As substrate itself would put an actor to sleep.
    pub fn sleep(&self, sandbox_id: &str, by: &str) {
        self.change(&names::uid(sandbox_id), |actor| {
            actor.state = ActorState::Suspended.into();
            actor.suspended_by = by.to_owned();
            actor.last_snapshot = Some(Snapshot::default());
        });
    }

    /// As traffic would wake it.
    pub fn wake(&self, sandbox_id: &str) {
        let uid = names::uid(sandbox_id);
        self.change(&uid, |actor| {
            actor.state = ActorState::Resuming.into();
            actor.generation += 1;
        });
        self.change(&uid, |actor| {
            actor.state = ActorState::Running.into();
            actor.suspended_by.clear();
        });
    }

    pub fn remove_actor(&self, uid: &str) -> bool {
        let mut world = self.world.lock().unwrap();
        let Some(actor) = world.actors.remove(uid) else { return false };
        world.revision += 1;
        let deleted = ateapi::Deleted {
            kind: "actor".to_owned(),
            atespace: actor.atespace,
            name: actor.name,
            uid: uid.to_owned(),
        };
        self.tell(world.revision, Change::Deleted(deleted));
        true
    }

    pub fn event(&self, sandbox_id: &str, reason: &str) {
        let event = ateapi::Event {
            kind: "actor".to_owned(),
            subject_uid: names::uid(sandbox_id),
            reason: reason.to_owned(),
            warning: true,
            ..Default::default()
        };
        self.tell(0, Change::Event(event));
    }

    fn tell(&self, revision: u64, change: Change) {
        // Without watchers there is nobody to tell.
        drop(self.changes.send(ateapi::WatchResponse { revision, change: Some(change) }));
    }

    /// One call: logged, then its fault or its work.
    fn call<T>(
        &self,
        method: &'static str,
        work: impl FnOnce(&Self) -> Result<T, Status>,
    ) -> Result<Response<T>, Status> {
        let dies = {
            let mut world = self.world.lock().unwrap();
            match world.kill {
                Some((0, works)) => {
                    world.kill = None;
                    world.killer.take().map(|killer| (killer, works))
                }
                Some((left, works)) => {
                    world.kill = Some((left - 1, works));
                    None
                }
                None => None,
            }
        };
        if let Some((killer, works)) = dies {
            if works {
                drop(work(self));
            }
            killer.kill();
            return Err(Status::unavailable("nobody hears this"));
        }
        let fault = {
            let mut world = self.world.lock().unwrap();
            world.calls.push(method);
            let counted = match world.nth.get_mut(method) {
                Some((0, fault)) => {
                    let fault = *fault;
                    world.nth.remove(method);
                    Some(fault)
                }
                Some((left, _)) => {
                    *left -= 1;
                    None
                }
                None => None,
            };
            counted.or_else(|| world.faults.get_mut(method).and_then(VecDeque::pop_front))
        };
        let answer = match fault {
            Some(Fault::Before(code)) => Err(Status::new(code, format!("injected before {method}"))),
            Some(Fault::After(code)) => {
                drop(work(self));
                Err(Status::new(code, format!("injected after {method}")))
            }
            None => work(self).map(Response::new),
        };
        self.served.send_modify(|served| *served += 1);
        answer
    }

    fn start(&self, uid: &str) -> Result<Actor, Status> {
        let boot = *self.boot.lock().unwrap();
        let boots = {
            let mut world = self.world.lock().unwrap();
            let boots = world.boots.entry(uid.to_owned()).or_default();
            *boots += 1;
            *boots
        };
        self.change(uid, |actor| {
            actor.state = ActorState::Resuming.into();
            actor.generation += 1;
            actor.reason.clear();
            actor.progress_step = "pulling_image".to_owned();
            actor.progress_percent = 50;
        });
        self.change(uid, |actor| actor.progress_step = "starting_sandbox".to_owned());
        let end = |change: &dyn Fn(&mut Actor)| {
            self.change(uid, |actor| change(actor)).ok_or_else(|| Status::not_found("no actor"))
        };
        match boot {
            Boot::Waits => end(&|_| {}),
            Boot::Runs => end(&|actor| {
                actor.state = ActorState::Running.into();
                actor.suspended_by.clear();
            }),
            Boot::FailsFirst(times) if boots <= times => {
                end(&|actor| {
                    actor.state = if actor.last_snapshot.is_some() {
                        ActorState::Suspended.into()
                    } else {
                        ActorState::New.into()
                    };
                    actor.reason = "NO_FREE_WORKER".to_owned();
                    actor.message = "all 4 workers of pool default are busy".to_owned();
                })?;
                Err(Status::resource_exhausted("all 4 workers of pool default are busy"))
            }
            Boot::FailsFirst(_) => end(&|actor| actor.state = ActorState::Running.into()),
            Boot::Exits(code) => end(&|actor| {
                actor.state = ActorState::Exited.into();
                actor.exit = Some(types::ExitStatus { code, ..Default::default() });
            }),
            Boot::Crashes => end(&|actor| {
                actor.state = ActorState::Crashed.into();
                actor.message = "the image has no such program".to_owned();
            }),
        }
    }

    fn find(&self, reference: Option<ateapi::ActorRef>) -> Result<Actor, Status> {
        let uid = reference.unwrap_or_default().uid;
        let world = self.world.lock().unwrap();
        world.actors.get(&uid).cloned().ok_or_else(|| Status::not_found(format!("no actor {uid}")))
    }
}

const DIGEST: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

fn unused<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not part of the stub"))
}

type Watching<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Control for Stub {
    async fn create_atespace(
        &self,
        request: Request<ateapi::CreateAtespaceRequest>,
    ) -> Result<Response<ateapi::Atespace>, Status> {
        let request = request.into_inner();
        self.call("create_atespace", |stub| {
            let mut world = stub.world.lock().unwrap();
            if let Some(there) = world.atespaces.get(&request.name) {
                // A retry of the same request finds its own.
                return if there.labels == request.labels {
                    Ok(there.clone())
                } else {
                    Err(Status::already_exists("atespace exists"))
                };
            }
            let atespace = ateapi::Atespace {
                name: request.name.clone(),
                labels: request.labels,
                created_ms: openshell_driver_substrate::mirror::now_ms(),
                ..Default::default()
            };
            world.atespaces.insert(request.name, atespace.clone());
            Ok(atespace)
        })
    }

    async fn get_atespace(
        &self,
        request: Request<ateapi::GetAtespaceRequest>,
    ) -> Result<Response<ateapi::Atespace>, Status> {
        let name = request.into_inner().name;
        self.call("get_atespace", |stub| {
            let world = stub.world.lock().unwrap();
            world.atespaces.get(&name).cloned().ok_or_else(|| Status::not_found("no atespace"))
        })
    }

    async fn list_atespaces(
        &self,
        _: Request<ateapi::ListAtespacesRequest>,
    ) -> Result<Response<ateapi::ListAtespacesResponse>, Status> {
        self.call("list_atespaces", |stub| {
            let atespaces = stub.world.lock().unwrap().atespaces.values().cloned().collect();
            Ok(ateapi::ListAtespacesResponse { atespaces, ..Default::default() })
        })
    }

    async fn delete_atespace(
        &self,
        request: Request<ateapi::DeleteAtespaceRequest>,
    ) -> Result<Response<ateapi::DeleteAtespaceResponse>, Status> {
        let name = request.into_inner().name;
        self.call("delete_atespace", |stub| {
            let mut world = stub.world.lock().unwrap();
            if world.actors.values().any(|actor| actor.atespace == name) {
                return Err(Status::failed_precondition("it holds actors"));
            }
            Ok(ateapi::DeleteAtespaceResponse { deleted: world.atespaces.remove(&name).is_some() })
        })
    }

    async fn create_template(
        &self,
        request: Request<ateapi::CreateTemplateRequest>,
    ) -> Result<Response<ateapi::Template>, Status> {
        let request = request.into_inner();
        let method = if request.dry_run { "dry_run" } else { "create_template" };
        self.call(method, |stub| {
            let mut world = stub.world.lock().unwrap();
            let mut spec = request.spec.clone().unwrap_or_default();
            if !world.atespaces.contains_key(&request.atespace) {
                return Err(Status::not_found(format!("no atespace {}", request.atespace)));
            }
            for container in &mut spec.containers {
                if container.image.contains("missing") {
                    return Err(Status::not_found(format!("there is no image {}", container.image)));
                }
                if !container.image.contains('@') {
                    let repository = container.image.rsplit_once(':').map_or("", |(name, _)| name).to_owned();
                    container.image = format!("{repository}@{DIGEST}");
                }
            }
            let template = ateapi::Template {
                atespace: request.atespace.clone(),
                name: request.name.clone(),
                spec: Some(spec),
                labels: request.labels.clone(),
                ..Default::default()
            };
            if request.dry_run {
                return Ok(template);
            }
            let key = (request.atespace, request.name);
            match world.templates.get(&key) {
                Some(there) if there.spec == template.spec => Ok(there.clone()),
                Some(_) => Err(Status::already_exists("another template has that name")),
                None => {
                    world.templates.insert(key, template.clone());
                    Ok(template)
                }
            }
        })
    }

    async fn get_template(
        &self,
        request: Request<ateapi::GetTemplateRequest>,
    ) -> Result<Response<ateapi::Template>, Status> {
        let request = request.into_inner();
        self.call("get_template", |stub| {
            let world = stub.world.lock().unwrap();
            let key = (request.atespace, request.name);
            world.templates.get(&key).cloned().ok_or_else(|| Status::not_found("no template"))
        })
    }

    async fn list_templates(
        &self,
        request: Request<ateapi::ListTemplatesRequest>,
    ) -> Result<Response<ateapi::ListTemplatesResponse>, Status> {
        let atespace = request.into_inner().atespace;
        self.call("list_templates", |stub| {
            let world = stub.world.lock().unwrap();
            let templates = world.templates.values().filter(|it| it.atespace == atespace).cloned().collect();
            Ok(ateapi::ListTemplatesResponse { templates, ..Default::default() })
        })
    }

    async fn delete_template(
        &self,
        request: Request<ateapi::DeleteTemplateRequest>,
    ) -> Result<Response<ateapi::DeleteTemplateResponse>, Status> {
        let request = request.into_inner();
        self.call("delete_template", |stub| {
            let mut world = stub.world.lock().unwrap();
            let used = world.actors.values().any(|actor| {
                actor.atespace == request.atespace
                    && actor.spec.as_ref().is_some_and(|spec| spec.template == request.name)
            });
            if used {
                return Err(Status::failed_precondition("actors use it"));
            }
            let deleted = world.templates.remove(&(request.atespace, request.name)).is_some();
            Ok(ateapi::DeleteTemplateResponse { deleted })
        })
    }

    async fn create_actor(
        &self,
        request: Request<ateapi::CreateActorRequest>,
    ) -> Result<Response<Actor>, Status> {
        let request = request.into_inner();
        self.call("create_actor", |stub| {
            let uid = request.uid.clone();
            let actor = {
                let mut world = stub.world.lock().unwrap();
                if let Some(answer) = world.answers.get(&request.request_id) {
                    return Ok(answer.clone());
                }
                let mut spec = request.spec.clone().unwrap_or_default();
                if std::mem::take(&mut world.reap_template) {
                    world.templates.clear();
                }
                if !world.templates.contains_key(&(request.atespace.clone(), spec.template.clone())) {
                    return Err(Status::not_found("no template"));
                }
                let taken = world.actors.values().any(|actor| {
                    actor.uid == uid || (actor.atespace == request.atespace && actor.name == request.name)
                });
                if taken {
                    return Err(Status::already_exists("name or uid in use"));
                }
                world.files.insert(uid.clone(), std::mem::take(&mut spec.files));
                let actor = Actor {
                    uid: uid.clone(),
                    atespace: request.atespace,
                    name: request.name,
                    spec: Some(spec),
                    state: ActorState::New.into(),
                    created_ms: openshell_driver_substrate::mirror::now_ms(),
                    ..Default::default()
                };
                world.actors.insert(uid.clone(), actor.clone());
                world.answers.insert(request.request_id, actor.clone());
                actor
            };
            stub.change(&uid, |_| {});
            if request.start {
                // In the background, as far as the caller can tell: a boot that fails is no failed create.
                drop(stub.start(&uid));
            }
            Ok(actor)
        })
    }

    async fn get_actor(&self, request: Request<ateapi::GetActorRequest>) -> Result<Response<Actor>, Status> {
        self.call("get_actor", |stub| stub.find(request.into_inner().actor))
    }

    async fn list_actors(
        &self,
        request: Request<ateapi::ListActorsRequest>,
    ) -> Result<Response<ateapi::ListActorsResponse>, Status> {
        const PAGE: usize = 3;
        let request = request.into_inner();
        self.call("list_actors", |stub| {
            let world = stub.world.lock().unwrap();
            let matching = world.actors.values().filter(|actor| {
                let spec = actor.spec.clone().unwrap_or_default();
                (request.atespace.is_empty() || actor.atespace == request.atespace)
                    && (request.template.is_empty() || spec.template == request.template)
                    && request.labels.iter().all(|(key, value)| spec.labels.get(key) == Some(value))
                    && actor.uid.as_str() > request.page_token.as_str()
            });
            let mut actors: Vec<Actor> = matching.take(PAGE + 1).cloned().collect();
            let more = actors.len() > PAGE;
            actors.truncate(PAGE);
            let next = if more { actors.last().map(|last| last.uid.clone()) } else { None };
            Ok(ateapi::ListActorsResponse {
                actors,
                next_page_token: next.unwrap_or_default(),
                revision: world.revision,
            })
        })
    }

    async fn update_actor(
        &self,
        request: Request<ateapi::UpdateActorRequest>,
    ) -> Result<Response<Actor>, Status> {
        let request = request.into_inner();
        self.call("update_actor", |stub| {
            let uid = stub.find(request.actor)?.uid;
            let changed = stub.change(&uid, |actor| {
                if let (Some(spec), Some(set)) = (&mut actor.spec, request.annotations) {
                    spec.annotations = set.entries;
                }
            });
            changed.ok_or_else(|| Status::not_found("gone"))
        })
    }

    async fn resume_actor(
        &self,
        request: Request<ateapi::ResumeActorRequest>,
    ) -> Result<Response<ateapi::ResumeActorResponse>, Status> {
        let request = request.into_inner();
        self.call("resume_actor", |stub| {
            let actor = stub.find(request.actor)?;
            let was_running = actor.state() == ActorState::Running;
            let actor = match actor.state() {
                ActorState::Running => actor,
                ActorState::New | ActorState::Suspended | ActorState::Paused => stub.start(&actor.uid)?,
                ActorState::Resuming => stub
                    .change(&actor.uid, |actor| actor.state = ActorState::Running.into())
                    .ok_or_else(|| Status::not_found("gone"))?,
                state => {
                    return Err(Status::failed_precondition(format!("it is {}", state.as_str_name())));
                }
            };
            Ok(ateapi::ResumeActorResponse { actor: Some(actor), was_running, ..Default::default() })
        })
    }

    async fn suspend_actor(
        &self,
        request: Request<ateapi::SuspendActorRequest>,
    ) -> Result<Response<ateapi::SnapshotAnswer>, Status> {
        let request = request.into_inner();
        self.call("suspend_actor", |stub| {
            let actor = stub.find(request.actor)?;
            match actor.state() {
                ActorState::Running | ActorState::Suspending | ActorState::Pausing => {}
                state => {
                    return Err(Status::failed_precondition(format!("it is {}", state.as_str_name())));
                }
            }
            stub.change(&actor.uid, |actor| actor.state = ActorState::Suspending.into());
            let actor = stub.change(&actor.uid, |actor| {
                actor.state = ActorState::Suspended.into();
                actor.suspended_by = request.cause;
                actor.last_snapshot = Some(Snapshot::default());
            });
            Ok(ateapi::SnapshotAnswer { actor, ..Default::default() })
        })
    }

    async fn promote_actor(
        &self,
        request: Request<ateapi::PromoteActorRequest>,
    ) -> Result<Response<ateapi::SnapshotAnswer>, Status> {
        let request = request.into_inner();
        self.call("promote_actor", |stub| {
            let uid = stub.find(request.actor)?.uid;
            let actor = stub.change(&uid, |actor| actor.state = ActorState::Suspended.into());
            Ok(ateapi::SnapshotAnswer { actor, ..Default::default() })
        })
    }

    async fn delete_actor(
        &self,
        request: Request<ateapi::DeleteActorRequest>,
    ) -> Result<Response<ateapi::DeleteActorResponse>, Status> {
        let uid = request.into_inner().actor.unwrap_or_default().uid;
        self.call("delete_actor", |stub| {
            stub.change(&uid, |actor| actor.state = ActorState::Deleting.into());
            Ok(ateapi::DeleteActorResponse { deleted: stub.remove_actor(&uid) })
        })
    }

    type WatchStream = Watching<ateapi::WatchResponse>;

    async fn watch(&self, _: Request<ateapi::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.call("watch", |stub| {
            let world = stub.world.lock().unwrap();
            let changes = BroadcastStream::new(stub.changes.subscribe());
            let at = world.revision;
            let response = |change| ateapi::WatchResponse { revision: at, change: Some(change) };
            let mut first: Vec<_> =
                world.actors.values().cloned().map(|actor| response(Change::Actor(actor))).collect();
            first.push(response(Change::Bookmark(ateapi::Bookmark { initial_done: true })));
            let cut = stub.cut.lock().unwrap().clone();
            let changes = changes.filter_map(|change| async move { change.ok() });
            let all = stream::iter(first).chain(changes).map(Ok);
            Ok(Box::pin(all.take_until(cut.cancelled_owned())) as Self::WatchStream)
        })
    }

    type ExecActorStream = Watching<types::ExecOutput>;
    type ActorLogsStream = Watching<ateapi::ActorLogsChunk>;

    async fn pause_actor(
        &self,
        _: Request<ateapi::PauseActorRequest>,
    ) -> Result<Response<ateapi::SnapshotAnswer>, Status> {
        unused()
    }
    async fn checkpoint_actor(
        &self,
        _: Request<ateapi::CheckpointActorRequest>,
    ) -> Result<Response<ateapi::SnapshotAnswer>, Status> {
        unused()
    }
    async fn revert_actor(&self, _: Request<ateapi::RevertActorRequest>) -> Result<Response<Actor>, Status> {
        unused()
    }
    async fn reset_actor(&self, _: Request<ateapi::ResetActorRequest>) -> Result<Response<Actor>, Status> {
        unused()
    }
    async fn fork_actor(&self, _: Request<ateapi::ForkActorRequest>) -> Result<Response<Actor>, Status> {
        unused()
    }
    async fn exec_actor(
        &self,
        _: Request<tonic::Streaming<types::ExecInput>>,
    ) -> Result<Response<Self::ExecActorStream>, Status> {
        unused()
    }
    async fn actor_logs(
        &self,
        _: Request<ateapi::ActorLogsRequest>,
    ) -> Result<Response<Self::ActorLogsStream>, Status> {
        unused()
    }
    async fn list_snapshots(
        &self,
        _: Request<ateapi::ListSnapshotsRequest>,
    ) -> Result<Response<ateapi::ListSnapshotsResponse>, Status> {
        unused()
    }
    async fn tag_snapshot(
        &self,
        _: Request<ateapi::TagSnapshotRequest>,
    ) -> Result<Response<Snapshot>, Status> {
        unused()
    }
    async fn untag_snapshot(
        &self,
        _: Request<ateapi::UntagSnapshotRequest>,
    ) -> Result<Response<Snapshot>, Status> {
        unused()
    }
    async fn list_workers(
        &self,
        _: Request<ateapi::ListWorkersRequest>,
    ) -> Result<Response<ateapi::ListWorkersResponse>, Status> {
        self.call("list_workers", |stub| {
            let runtime = stub.world.lock().unwrap().runtime.clone();
            let worker = ateapi::Worker {
                id: "w1".to_owned(),
                sandbox_class: "gvisor".to_owned(),
                runtime_digest: if runtime.is_empty() { "test-runsc".to_owned() } else { runtime },
                alive: true,
                ..Default::default()
            };
            let machine = ateapi::Worker {
                id: "m1".to_owned(),
                sandbox_class: "microvm".to_owned(),
                runtime_digest: "test-qemu".to_owned(),
                alive: true,
                ..Default::default()
            };
            Ok(ateapi::ListWorkersResponse { workers: vec![worker, machine] })
        })
    }
    async fn cordon_worker(
        &self,
        _: Request<ateapi::CordonWorkerRequest>,
    ) -> Result<Response<ateapi::Worker>, Status> {
        unused()
    }
    async fn drain_worker(
        &self,
        _: Request<ateapi::DrainWorkerRequest>,
    ) -> Result<Response<ateapi::Worker>, Status> {
        unused()
    }
    async fn list_events(
        &self,
        _: Request<ateapi::ListEventsRequest>,
    ) -> Result<Response<ateapi::ListEventsResponse>, Status> {
        unused()
    }
    async fn get_egress(
        &self,
        _: Request<ateapi::GetEgressRequest>,
    ) -> Result<Response<ateapi::GetEgressResponse>, Status> {
        unused()
    }
    async fn bind_egress_name(
        &self,
        _: Request<ateapi::BindEgressNameRequest>,
    ) -> Result<Response<ateapi::EgressName>, Status> {
        unused()
    }
    async fn report_denials(
        &self,
        _: Request<ateapi::ReportDenialsRequest>,
    ) -> Result<Response<ateapi::ReportDenialsResponse>, Status> {
        unused()
    }
    async fn report_fallback(
        &self,
        _: Request<ateapi::ReportFallbackRequest>,
    ) -> Result<Response<ateapi::ReportFallbackResponse>, Status> {
        unused()
    }
    async fn suspend_all(
        &self,
        _: Request<ateapi::SuspendAllRequest>,
    ) -> Result<Response<ateapi::SuspendAllResponse>, Status> {
        unused()
    }
}
