// SPDX-License-Identifier: Apache-2.0
//! A control plane for tests: actors in a map, a watch over them, and answers that a test sets.
use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use futures::{Stream, StreamExt as _};
use substrate_proto::ateapi::control_server::{Control, ControlServer};
use substrate_proto::ateapi::*;
use substrate_proto::types;
use tokio::sync::broadcast;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, Streaming};

type Answering<Q, A> =
    Box<dyn Fn(Arc<Stub>, Q) -> Pin<Box<dyn Future<Output = Result<A, Status>> + Send>> + Send + Sync>;
type Stored<Q, A> = Mutex<Option<Arc<Answering<Q, A>>>>;

pub(crate) struct Stub {
    pub(crate) actors: Mutex<HashMap<(String, String), Actor>>,
    revision: AtomicU64,
    changes: broadcast::Sender<WatchResponse>,
    pub(crate) gets: AtomicUsize,
    pub(crate) resumes: AtomicUsize,
    pub(crate) checkpoints: AtomicUsize,
    resume: Stored<ResumeActorRequest, Actor>,
    checkpoint: Stored<CheckpointActorRequest, SnapshotAnswer>,
    /// Policies by uid, with the generation they are for.
    pub(crate) egress: Mutex<HashMap<String, (u64, types::EgressPolicy)>>,
    names: Mutex<Vec<String>>,
    pub(crate) denials: Mutex<Vec<Denial>>,
    pub(crate) fallbacks: Mutex<Vec<ReportFallbackRequest>>,
    /// Every call fails as if the control plane were away.
    pub(crate) away: AtomicBool,
    watching: tokio::sync::watch::Sender<usize>,
}

impl Stub {
    /// Serves on `DIR/ateapi.sock`; ends with the handle.
    pub(crate) fn serve(dir: &Path) -> (Arc<Self>, String, AbortOnDropHandle<()>) {
        let stub = Arc::new(Self {
            actors: Mutex::default(),
            revision: AtomicU64::new(1),
            changes: broadcast::channel(1024).0,
            gets: AtomicUsize::new(0),
            resumes: AtomicUsize::new(0),
            checkpoints: AtomicUsize::new(0),
            resume: Mutex::default(),
            checkpoint: Mutex::default(),
            egress: Mutex::default(),
            names: Mutex::default(),
            denials: Mutex::default(),
            fallbacks: Mutex::default(),
            away: AtomicBool::new(false),
            watching: tokio::sync::watch::Sender::new(0),
        });
        let path: PathBuf = dir.join("ateapi.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let incoming = tokio_stream::wrappers::UnixListenerStream::new(listener);
        let server = tonic::transport::Server::builder()
            .add_service(ControlServer::new(Shared(stub.clone())))
            .serve_with_incoming(incoming);
        let task = tokio::spawn(async move { server.await.unwrap() });
        (stub, format!("unix:{}", path.display()), AbortOnDropHandle::new(task))
    }

    /// Waits until so many watches have got everything there is.
    pub(crate) async fn watched(&self, by: usize) {
        self.watching.subscribe().wait_for(|count| *count >= by).await.unwrap();
    }

    pub(crate) fn put(&self, mut actor: Actor) -> Actor {
        actor.revision = self.revision.fetch_add(1, Ordering::SeqCst) + 1;
        let key = (actor.atespace.clone(), actor.name.clone());
        self.actors.lock().unwrap().insert(key, actor.clone());
        let change = watch_response::Change::Actor(actor.clone());
        let _ = self.changes.send(WatchResponse { revision: actor.revision, change: Some(change) });
        actor
    }

    pub(crate) fn actor(&self, name: &str) -> Actor {
        self.actors.lock().unwrap()[&("team".to_owned(), name.to_owned())].clone()
    }

    pub(crate) fn change(&self, name: &str, change: impl FnOnce(&mut Actor)) -> Actor {
        let mut actor = self.actor(name);
        change(&mut actor);
        self.put(actor)
    }

    pub(crate) fn on_resume<F, R>(&self, answer: F)
    where
        F: Fn(Arc<Stub>, ResumeActorRequest) -> R + Send + Sync + 'static,
        R: Future<Output = Result<Actor, Status>> + Send + 'static,
    {
        *self.resume.lock().unwrap() = Some(Arc::new(Box::new(move |stub, ask| Box::pin(answer(stub, ask)))));
    }

    pub(crate) fn on_checkpoint<F, R>(&self, answer: F)
    where
        F: Fn(Arc<Stub>, CheckpointActorRequest) -> R + Send + Sync + 'static,
        R: Future<Output = Result<SnapshotAnswer, Status>> + Send + 'static,
    {
        *self.checkpoint.lock().unwrap() =
            Some(Arc::new(Box::new(move |stub, ask| Box::pin(answer(stub, ask)))));
    }

    pub(crate) fn policy(&self, uid: &str, generation: u64, allow: Vec<types::EgressRule>) {
        let policy = types::EgressPolicy { allow };
        self.egress.lock().unwrap().insert(uid.to_owned(), (generation, policy));
    }

    fn here(&self) -> Result<(), Status> {
        if self.away.load(Ordering::SeqCst) { Err(Status::unavailable("away")) } else { Ok(()) }
    }

    fn find(&self, actor: Option<ActorRef>) -> Result<Actor, Status> {
        let wanted = actor.unwrap_or_default();
        let actors = self.actors.lock().unwrap();
        let found = actors.values().find(|actor| {
            (!wanted.uid.is_empty() && actor.uid == wanted.uid)
                || (actor.atespace == wanted.atespace && actor.name == wanted.name)
        });
        found.cloned().ok_or_else(|| Status::not_found("no such actor"))
    }

    fn bound(&self, name: &str) -> EgressName {
        let mut names = self.names.lock().unwrap();
        let at = names.iter().position(|known| known == name).unwrap_or_else(|| {
            names.push(name.to_owned());
            names.len() - 1
        });
        EgressName {
            name: name.into(),
            ipv4: format!("198.18.0.{}", at + 1),
            ipv6: format!("fd17:5a::{}", at + 1),
        }
    }

    fn policy_of(&self, uid: &str, generation: u64) -> Result<types::EgressPolicy, Status> {
        match self.egress.lock().unwrap().get(uid) {
            Some((current, policy)) if *current == generation => Ok(policy.clone()),
            Some((current, _)) => {
                Err(Status::failed_precondition(format!("generation {current} is current")))
            }
            None => Err(Status::not_found("no such actor")),
        }
    }
}

pub(crate) fn snapshot_answer(generation: u64, durability: types::Durability) -> SnapshotAnswer {
    let snapshot = Snapshot {
        generation,
        durability: durability.into(),
        cause: "checkpoint".into(),
        ..Default::default()
    };
    let actor = Actor { state: ActorState::Running.into(), generation, ..Default::default() };
    SnapshotAnswer { snapshot: Some(snapshot), actor: Some(actor), ..Default::default() }
}

/// The trait is foreign and so is `Arc`.
struct Shared(Arc<Stub>);

macro_rules! unused {
    ($($name:ident($request:ty) -> $response:ty;)*) => {
        #[tonic::async_trait]
        impl Control for Shared {
            $(async fn $name(&self, _: Request<$request>) -> Result<Response<$response>, Status> {
                Err(Status::unimplemented(stringify!($name)))
            })*

            type ExecActorStream = futures::stream::Empty<Result<types::ExecOutput, Status>>;
            type ActorLogsStream = futures::stream::Empty<Result<ActorLogsChunk, Status>>;
            type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

            async fn get_actor(&self, request: Request<GetActorRequest>) -> Result<Response<Actor>, Status> {
                self.0.gets.fetch_add(1, Ordering::SeqCst);
                self.0.here()?;
                self.0.find(request.into_inner().actor).map(Response::new)
            }

            async fn resume_actor(
                &self,
                request: Request<ResumeActorRequest>,
            ) -> Result<Response<ResumeActorResponse>, Status> {
                self.0.resumes.fetch_add(1, Ordering::SeqCst);
                self.0.here()?;
                let answer = self.0.resume.lock().unwrap().clone().expect("a resume was not expected");
                let actor = answer(self.0.clone(), request.into_inner()).await?;
                Ok(Response::new(ResumeActorResponse { actor: Some(actor), ..Default::default() }))
            }

            async fn checkpoint_actor(
                &self,
                request: Request<CheckpointActorRequest>,
            ) -> Result<Response<SnapshotAnswer>, Status> {
                self.0.checkpoints.fetch_add(1, Ordering::SeqCst);
                self.0.here()?;
                let answer = self.0.checkpoint.lock().unwrap().clone().expect("a checkpoint was not expected");
                answer(self.0.clone(), request.into_inner()).await.map(Response::new)
            }

            async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
                self.0.here()?;
                let changes = self.0.changes.subscribe();
                let known: Vec<_> = self.0.actors.lock().unwrap().values().cloned().collect();
                let revision = self.0.revision.load(Ordering::SeqCst);
                let mark = watch_response::Change::Bookmark(Bookmark { initial_done: true });
                let initial = known
                    .into_iter()
                    .map(|actor| WatchResponse {
                        revision: actor.revision,
                        change: Some(watch_response::Change::Actor(actor)),
                    })
                    .chain([WatchResponse { revision, change: Some(mark) }])
                    .map(Ok);
                let later = tokio_stream::wrappers::BroadcastStream::new(changes)
                    .map(|change| change.map_err(|error| Status::out_of_range(error.to_string())));
                self.0.watching.send_modify(|count| *count += 1);
                Ok(Response::new(Box::pin(futures::stream::iter(initial).chain(later))))
            }

            async fn get_egress(
                &self,
                request: Request<GetEgressRequest>,
            ) -> Result<Response<GetEgressResponse>, Status> {
                self.0.here()?;
                let ask = request.into_inner();
                let policy = self.0.policy_of(&ask.actor_uid, ask.generation)?;
                let known = self.0.names.lock().unwrap().clone();
                let names = known.iter().map(|name| self.0.bound(name)).collect();
                let revision = self.0.revision.load(Ordering::SeqCst);
                Ok(Response::new(GetEgressResponse { policy: Some(policy), names, revision }))
            }

            async fn bind_egress_name(
                &self,
                request: Request<BindEgressNameRequest>,
            ) -> Result<Response<EgressName>, Status> {
                self.0.here()?;
                let ask = request.into_inner();
                self.0.policy_of(&ask.actor_uid, ask.generation)?;
                Ok(Response::new(self.0.bound(&ask.name)))
            }

            async fn report_denials(
                &self,
                request: Request<ReportDenialsRequest>,
            ) -> Result<Response<ReportDenialsResponse>, Status> {
                self.0.here()?;
                self.0.denials.lock().unwrap().extend(request.into_inner().denials);
                Ok(Response::new(ReportDenialsResponse {}))
            }

            async fn report_fallback(
                &self,
                request: Request<ReportFallbackRequest>,
            ) -> Result<Response<ReportFallbackResponse>, Status> {
                self.0.here()?;
                self.0.fallbacks.lock().unwrap().push(request.into_inner());
                Ok(Response::new(ReportFallbackResponse {}))
            }

            async fn exec_actor(
                &self,
                _: Request<Streaming<types::ExecInput>>,
            ) -> Result<Response<Self::ExecActorStream>, Status> {
                Err(Status::unimplemented("exec"))
            }

            async fn actor_logs(
                &self,
                _: Request<ActorLogsRequest>,
            ) -> Result<Response<Self::ActorLogsStream>, Status> {
                Err(Status::unimplemented("logs"))
            }
        }
    };
}

unused! {
    create_atespace(CreateAtespaceRequest) -> Atespace;
    get_atespace(GetAtespaceRequest) -> Atespace;
    list_atespaces(ListAtespacesRequest) -> ListAtespacesResponse;
    delete_atespace(DeleteAtespaceRequest) -> DeleteAtespaceResponse;
    create_template(CreateTemplateRequest) -> Template;
    get_template(GetTemplateRequest) -> Template;
    list_templates(ListTemplatesRequest) -> ListTemplatesResponse;
    delete_template(DeleteTemplateRequest) -> DeleteTemplateResponse;
    create_actor(CreateActorRequest) -> Actor;
    list_actors(ListActorsRequest) -> ListActorsResponse;
    update_actor(UpdateActorRequest) -> Actor;
    suspend_actor(SuspendActorRequest) -> SnapshotAnswer;
    pause_actor(PauseActorRequest) -> SnapshotAnswer;
    promote_actor(PromoteActorRequest) -> SnapshotAnswer;
    revert_actor(RevertActorRequest) -> Actor;
    reset_actor(ResetActorRequest) -> Actor;
    fork_actor(ForkActorRequest) -> Actor;
    delete_actor(DeleteActorRequest) -> DeleteActorResponse;
    list_snapshots(ListSnapshotsRequest) -> ListSnapshotsResponse;
    tag_snapshot(TagSnapshotRequest) -> Snapshot;
    untag_snapshot(UntagSnapshotRequest) -> Snapshot;
    list_workers(ListWorkersRequest) -> ListWorkersResponse;
    cordon_worker(CordonWorkerRequest) -> Worker;
    drain_worker(DrainWorkerRequest) -> Worker;
    list_events(ListEventsRequest) -> ListEventsResponse;
    suspend_all(SuspendAllRequest) -> SuspendAllResponse;
}
