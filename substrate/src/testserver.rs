// SPDX-License-Identifier: Apache-2.0
//! A control plane for tests: answers the verbs of the command line from a small map, records what it was asked, and
//! refuses as told.
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use substrate_proto::ateapi as api;
use substrate_proto::ateapi::control_server::{Control, ControlServer};
use substrate_proto::seam::{Peers, listen};
use substrate_proto::types::{self, ExecInput, ExecOutput, exec_input, exec_output};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::args::{Global, Output};

/// What the server holds.
#[derive(Default)]
pub struct State {
    /// Actors by name.
    pub actors: BTreeMap<String, api::Actor>,
    /// Templates by name.
    pub templates: BTreeMap<String, api::Template>,
    /// Names of calls that are refused, with the status.
    pub refuse: HashMap<&'static str, Status>,
    /// Calls in order, as `verb name`.
    pub calls: Vec<String>,
    /// What exec is fed, and what it answers for a first word.
    pub stdin: Vec<u8>,
}

/// A running server, gone when dropped.
pub struct TestServer {
    /// What it holds.
    pub state: Arc<Mutex<State>>,
    /// Options that lead to it.
    pub global: Global,
    _dir: tempfile::TempDir,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl TestServer {
    /// Starts one.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket: PathBuf = dir.path().join("run/ateapi.sock");
        let incoming = listen(&socket, Peers::default()).unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let service = Service { state: Arc::clone(&state) };
        let task = tokio::spawn(async move {
            let server = tonic::transport::Server::builder().add_service(ControlServer::new(service));
            server.serve_with_incoming(incoming).await.unwrap();
        });
        let global = Global {
            atespace: "default".into(),
            socket,
            remote: crate::args::Remote::default(),
            output: Output::Table,
        };
        Self { state, global, _dir: dir, task }
    }

    /// Refuses a call from now on.
    pub fn refuse(&self, call: &'static str, code: Code, message: &str, way_out: &str) {
        let metadata = HashMap::from([("way_out".to_owned(), way_out.to_owned())]);
        let details = ErrorDetails::with_error_info("REFUSED", "substrate", metadata);
        let status = Status::with_error_details(code, message, details);
        self.state.lock().unwrap().refuse.insert(call, status);
    }

    /// The calls so far.
    pub fn calls(&self) -> Vec<String> {
        self.state.lock().unwrap().calls.clone()
    }
}

struct Service {
    state: Arc<Mutex<State>>,
}

impl Service {
    fn called(&self, call: &'static str, what: &str) -> Result<(), Status> {
        let mut state = self.state.lock().unwrap();
        state.calls.push(format!("{call} {what}").trim_end().to_owned());
        match state.refuse.get(call) {
            Some(status) => Err(status.clone()),
            None => Ok(()),
        }
    }

    fn actor(&self, reference: Option<api::ActorRef>) -> Result<api::Actor, Status> {
        let name = reference.unwrap_or_default().name;
        let state = self.state.lock().unwrap();
        state
            .actors
            .get(&name)
            .cloned()
            .ok_or_else(|| Status::not_found(format!("there is no actor {name:?}")))
    }

    fn snapped(&self, reference: Option<api::ActorRef>) -> Result<Response<api::SnapshotAnswer>, Status> {
        let actor = self.actor(reference)?;
        let snapshot = api::Snapshot { id: "s1".into(), durability: 2, ..Default::default() };
        Ok(Response::new(api::SnapshotAnswer { actor: Some(actor), snapshot: Some(snapshot), steps: vec![] }))
    }
}

type Answer<T> = Result<Response<T>, Status>;

/// The rest of the service: calls that no test here makes.
/// Written out as `async_trait` would, which does not look into macros.
macro_rules! unused {
    ($($name:ident($request:ty) -> $answer:ty;)*) => {
        $(fn $name<'a, 'async_trait>(
            &'a self,
            _: Request<$request>,
        ) -> Pin<Box<dyn Future<Output = Answer<$answer>> + Send + 'async_trait>>
        where
            'a: 'async_trait,
            Self: 'async_trait,
        {
            Box::pin(async { Err(Status::unimplemented(stringify!($name))) })
        })*
    };
}

#[tonic::async_trait]
impl Control for Service {
    type ExecActorStream = ReceiverStream<Result<ExecOutput, Status>>;
    type ActorLogsStream = ReceiverStream<Result<api::ActorLogsChunk, Status>>;
    type WatchStream = ReceiverStream<Result<api::WatchResponse, Status>>;

    async fn create_atespace(&self, request: Request<api::CreateAtespaceRequest>) -> Answer<api::Atespace> {
        let name = request.into_inner().name;
        self.called("create_atespace", &name)?;
        Ok(Response::new(api::Atespace { name, ..Default::default() }))
    }

    async fn create_template(&self, request: Request<api::CreateTemplateRequest>) -> Answer<api::Template> {
        let request = request.into_inner();
        self.called("create_template", &request.name)?;
        let template = api::Template {
            uid: format!("uid-{}", request.name),
            name: request.name.clone(),
            spec: request.spec,
            ..Default::default()
        };
        if !request.dry_run {
            self.state.lock().unwrap().templates.insert(request.name, template.clone());
        }
        Ok(Response::new(template))
    }

    async fn get_template(&self, request: Request<api::GetTemplateRequest>) -> Answer<api::Template> {
        let name = request.into_inner().name;
        let state = self.state.lock().unwrap();
        let template = state.templates.get(&name).cloned();
        template.map(Response::new).ok_or_else(|| Status::not_found(format!("there is no template {name:?}")))
    }

    async fn delete_template(
        &self,
        request: Request<api::DeleteTemplateRequest>,
    ) -> Answer<api::DeleteTemplateResponse> {
        let name = request.into_inner().name;
        self.called("delete_template", &name)?;
        let deleted = self.state.lock().unwrap().templates.remove(&name).is_some();
        Ok(Response::new(api::DeleteTemplateResponse { deleted }))
    }

    async fn create_actor(&self, request: Request<api::CreateActorRequest>) -> Answer<api::Actor> {
        let request = request.into_inner();
        self.called("create_actor", &request.name)?;
        let state = if request.start { api::ActorState::Running } else { api::ActorState::New };
        let actor = api::Actor {
            uid: format!("uid-{}", request.name),
            atespace: request.atespace,
            name: request.name.clone(),
            spec: request.spec,
            state: state as i32,
            ..Default::default()
        };
        self.state.lock().unwrap().actors.insert(request.name, actor.clone());
        Ok(Response::new(actor))
    }

    async fn get_actor(&self, request: Request<api::GetActorRequest>) -> Answer<api::Actor> {
        self.actor(request.into_inner().actor).map(Response::new)
    }

    async fn list_actors(&self, request: Request<api::ListActorsRequest>) -> Answer<api::ListActorsResponse> {
        // Two pages, so that paging is exercised.
        let all: Vec<api::Actor> = self.state.lock().unwrap().actors.values().cloned().collect();
        let half = all.len().div_ceil(2);
        let first = request.into_inner().page_token.is_empty();
        let (actors, token) = if first && half < all.len() {
            (all[..half].to_vec(), "more".to_owned())
        } else if first {
            (all, String::new())
        } else {
            (all[half..].to_vec(), String::new())
        };
        Ok(Response::new(api::ListActorsResponse { actors, next_page_token: token, revision: 1 }))
    }

    async fn update_actor(&self, request: Request<api::UpdateActorRequest>) -> Answer<api::Actor> {
        let request = request.into_inner();
        let mut actor = self.actor(request.actor)?;
        self.called("update_actor", &actor.name)?;
        actor.spec.get_or_insert_default().labels = request.labels.unwrap_or_default().entries;
        self.state.lock().unwrap().actors.insert(actor.name.clone(), actor.clone());
        Ok(Response::new(actor))
    }

    async fn suspend_actor(&self, request: Request<api::SuspendActorRequest>) -> Answer<api::SnapshotAnswer> {
        let request = request.into_inner();
        self.called("suspend_actor", &request.actor.clone().unwrap_or_default().name)?;
        self.snapped(request.actor)
    }

    async fn delete_actor(
        &self,
        request: Request<api::DeleteActorRequest>,
    ) -> Answer<api::DeleteActorResponse> {
        let name = request.into_inner().actor.unwrap_or_default().name;
        self.called("delete_actor", &name)?;
        let deleted = self.state.lock().unwrap().actors.remove(&name).is_some();
        Ok(Response::new(api::DeleteActorResponse { deleted }))
    }

    async fn exec_actor(&self, request: Request<Streaming<ExecInput>>) -> Answer<Self::ExecActorStream> {
        self.called("exec_actor", "")?;
        let mut input = request.into_inner();
        let (send, receive) = tokio::sync::mpsc::channel(16);
        let state = Arc::clone(&self.state);
        tokio::spawn(async move {
            let output = |output| Ok(ExecOutput { output: Some(output) });
            let Ok(Some(first)) = input.message().await else { return };
            let Some(exec_input::Input::Start(start)) = first.input else { return };
            state.lock().unwrap().calls.push(format!("exec {}", start.command.join(" ")));
            let mut stdin = Vec::new();
            while let Ok(Some(message)) = input.message().await {
                match message.input {
                    Some(exec_input::Input::Stdin(data)) => stdin.extend(data),
                    Some(exec_input::Input::CloseStdin(_)) => break,
                    _ => {}
                }
            }
            let code = match start.command[0].as_str() {
                "tar" => 127,
                "cat" => {
                    let _ = send.send(output(exec_output::Output::Stdout(b"content".to_vec()))).await;
                    0
                }
                "test" => 1,
                _ => 42,
            };
            state.lock().unwrap().stdin = stdin;
            let exit = types::ExitStatus { code, ..Default::default() };
            let _ = send.send(output(exec_output::Output::Exit(exit))).await;
        });
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    async fn actor_logs(&self, _: Request<api::ActorLogsRequest>) -> Answer<Self::ActorLogsStream> {
        Err(Status::unimplemented("actor_logs"))
    }

    async fn watch(&self, request: Request<api::WatchRequest>) -> Answer<Self::WatchStream> {
        let kinds = request.into_inner().kinds;
        let (send, receive) = tokio::sync::mpsc::channel(64);
        let actors: Vec<api::Actor> = self.state.lock().unwrap().actors.values().cloned().collect();
        tokio::spawn(async move {
            let change = |change| Ok(api::WatchResponse { revision: 1, change: Some(change) });
            for actor in actors.into_iter().filter(|_| kinds.iter().any(|kind| kind == "actor")) {
                let _ = send.send(change(api::watch_response::Change::Actor(actor))).await;
            }
            let done = api::Bookmark { initial_done: true };
            let _ = send.send(change(api::watch_response::Change::Bookmark(done))).await;
        });
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    unused! {
        get_atespace(api::GetAtespaceRequest) -> api::Atespace;
        list_atespaces(api::ListAtespacesRequest) -> api::ListAtespacesResponse;
        delete_atespace(api::DeleteAtespaceRequest) -> api::DeleteAtespaceResponse;
        list_templates(api::ListTemplatesRequest) -> api::ListTemplatesResponse;
        resume_actor(api::ResumeActorRequest) -> api::ResumeActorResponse;
        pause_actor(api::PauseActorRequest) -> api::SnapshotAnswer;
        promote_actor(api::PromoteActorRequest) -> api::SnapshotAnswer;
        checkpoint_actor(api::CheckpointActorRequest) -> api::SnapshotAnswer;
        revert_actor(api::RevertActorRequest) -> api::Actor;
        reset_actor(api::ResetActorRequest) -> api::Actor;
        fork_actor(api::ForkActorRequest) -> api::Actor;
        list_snapshots(api::ListSnapshotsRequest) -> api::ListSnapshotsResponse;
        tag_snapshot(api::TagSnapshotRequest) -> api::Snapshot;
        untag_snapshot(api::UntagSnapshotRequest) -> api::Snapshot;
        list_workers(api::ListWorkersRequest) -> api::ListWorkersResponse;
        cordon_worker(api::CordonWorkerRequest) -> api::Worker;
        drain_worker(api::DrainWorkerRequest) -> api::Worker;
        list_events(api::ListEventsRequest) -> api::ListEventsResponse;
        get_egress(api::GetEgressRequest) -> api::GetEgressResponse;
        bind_egress_name(api::BindEgressNameRequest) -> api::EgressName;
        report_denials(api::ReportDenialsRequest) -> api::ReportDenialsResponse;
        report_fallback(api::ReportFallbackRequest) -> api::ReportFallbackResponse;
        suspend_all(api::SuspendAllRequest) -> api::SuspendAllResponse;
    }
}

mod commands {
    use super::*;
    use crate::args::{Args, Command};
    use crate::failure::{Exit, Failure};
    use clap::Parser as _;

    /// Runs a command line against a server.
    async fn run(server: &TestServer, line: &[&str]) -> Result<(), Failure> {
        let args = Args::try_parse_from(["substrate"].iter().chain(line)).unwrap();
        let global = Global { output: args.global.output, ..server.global.clone() };
        match args.command {
            Command::Create(options) => crate::cmd::create::run(options, &global).await,
            Command::Suspend(options) => crate::cmd::verbs::suspend(options, &global).await,
            Command::Delete(options) => crate::cmd::verbs::delete(options, &global).await,
            Command::Apply(options) => crate::cmd::apply::run(options, &global).await,
            Command::Cp(options) => crate::cmd::cp::run(options, &global).await,
            Command::Get(options) => crate::cmd::get::run(options, &global).await,
            other => panic!("not for this test: {other:?}"),
        }
    }

    #[tokio::test]
    async fn nothing_there_is_code_5_with_the_way_out() {
        let global = Global {
            atespace: "default".into(),
            socket: "/nonexistent/s".into(),
            remote: crate::args::Remote::default(),
            output: Output::Table,
        };
        let failure = crate::client::connect(&global).await.unwrap_err();
        assert_eq!(failure.exit, Exit::Unavailable);
        assert!(failure.way_out.unwrap().contains("substrate up"));
    }

    #[tokio::test]
    async fn an_image_makes_one_template_however_often_it_is_used() {
        let server = TestServer::start();
        for name in ["a", "b"] {
            run(&server, &["create", "actor", name, "--image", "oci:/i", "-p", "80", "--wait"])
                .await
                .unwrap();
        }
        let calls = server.calls();
        let made: Vec<&String> = calls.iter().filter(|call| call.starts_with("create_template")).collect();
        assert_eq!(made.len(), 1, "{calls:?}");
        let state = server.state.lock().unwrap();
        let template = state.templates.values().next().unwrap();
        for actor in state.actors.values() {
            assert_eq!(actor.spec.as_ref().unwrap().template, template.name);
        }
    }

    #[tokio::test]
    async fn a_refused_actor_leaves_no_template_behind() {
        let server = TestServer::start();
        server.refuse(
            "create_actor",
            Code::AlreadyExists,
            "there is an actor \"a\" already",
            "choose another name",
        );
        let failure = run(&server, &["create", "actor", "a", "--image", "oci:/i"]).await.unwrap_err();
        assert_eq!(failure.exit, Exit::Refused);
        assert_eq!(failure.text(), "substrate: there is an actor \"a\" already\n  → choose another name");
        assert!(server.state.lock().unwrap().templates.is_empty());
    }

    #[tokio::test]
    async fn a_bad_name_is_refused_before_anything_is_asked() {
        let server = TestServer::start();
        let failure = run(&server, &["create", "actor", "Not_DNS", "--image", "oci:/i"]).await.unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.message.contains("Not_DNS") && server.calls().is_empty());
    }

    #[tokio::test]
    async fn the_last_failure_of_several_names_is_the_exit_code() {
        let server = TestServer::start();
        run(&server, &["create", "actor", "b", "--template", "t"]).await.unwrap();
        let failure = run(&server, &["suspend", "actor", "a", "b", "c"]).await.unwrap_err();
        assert_eq!(failure.exit, Exit::NotFound);
        assert!(failure.message.contains("\"c\""), "{}", failure.message);
        assert!(server.calls().contains(&"suspend_actor b".to_owned()));
    }

    #[tokio::test]
    async fn deleting_what_is_not_there_is_not_found_unless_that_is_fine() {
        let server = TestServer::start();
        assert_eq!(run(&server, &["delete", "ghost"]).await.unwrap_err().exit, Exit::NotFound);
        run(&server, &["delete", "ghost", "--ignore-not-found"]).await.unwrap();
        run(&server, &["delete", "template", "t"]).await.unwrap_err();
        assert!(server.calls().contains(&"delete_template t".to_owned()));
    }

    #[tokio::test]
    async fn apply_is_ordered_and_the_second_time_changes_nothing() {
        let server = TestServer::start();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        let text = "kind: Actor\nname: alice\nlabels: {a: b}\nspec: {template: t}\n---\nkind: ActorTemplate\nname: t\n\
                    spec: {containers: [{name: main, image: \"oci:/i\"}]}\n";
        std::fs::write(&file, text).unwrap();
        let line = ["apply", "-f", file.to_str().unwrap()];
        run(&server, &line).await.unwrap();
        assert_eq!(server.calls(), ["create_atespace default", "create_template t", "create_actor alice"]);
        run(&server, &line).await.unwrap();
        assert!(!server.calls().iter().any(|call| call.starts_with("update_actor")));
        std::fs::write(&file, text.replace("a: b", "a: c")).unwrap();
        run(&server, &line).await.unwrap();
        assert_eq!(server.calls().last().unwrap(), "update_actor alice");
    }

    #[tokio::test]
    async fn a_wrong_document_stops_apply_before_the_first_call() {
        let server = TestServer::start();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        std::fs::write(
            &file,
            "kind: Atespace\nname: ok\n---\nkind: ActorTemplate\nname: t\nspec: {nonsense: 1}\n",
        )
        .unwrap();
        let failure = run(&server, &["apply", "-f", file.to_str().unwrap()]).await.unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(
            failure.message.contains("a.yaml:6:") && failure.message.contains("nonsense"),
            "{}",
            failure.message
        );
        assert!(server.calls().is_empty());
    }

    #[tokio::test]
    async fn exec_ends_with_the_code_of_its_command() {
        let server = TestServer::start();
        let mut client = crate::client::connect(&server.global).await.unwrap();
        let (code, _, _) =
            crate::cmd::exec::collect(&mut client, &server.global, "a", None, &["anything"], 100)
                .await
                .unwrap();
        assert_eq!(code, 42);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_image_without_tar_still_gives_and_takes_single_files() {
        let server = TestServer::start();
        let dir = tempfile::tempdir().unwrap();
        let local = dir.path().join("file");
        run(&server, &["cp", "a:/etc/x", local.to_str().unwrap()]).await.unwrap();
        assert_eq!(std::fs::read(&local).unwrap(), b"content");
        // Up: `sh` is what the test server does not know, so the copy says what failed.
        let failure = run(&server, &["cp", local.to_str().unwrap(), "a:/etc/y"]).await.unwrap_err();
        assert!(failure.message.contains("no tar"), "{}", failure.message);
        assert_eq!(server.state.lock().unwrap().stdin, b"content");
        let failure = run(&server, &["cp", dir.path().to_str().unwrap(), "a:/etc/y"]).await.unwrap_err();
        assert!(failure.way_out.unwrap().contains("add tar to the image"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "staging was left");
    }

    #[tokio::test]
    async fn lists_are_read_to_their_last_page() {
        let server = TestServer::start();
        for name in ["a", "b", "c"] {
            run(&server, &["create", "actor", name, "--template", "t"]).await.unwrap();
        }
        run(&server, &["get", "actors"]).await.unwrap();
        let failure = run(&server, &["get", "actors", "ghost", "-o", "json"]).await.unwrap_err();
        assert_eq!(failure.exit, Exit::NotFound);
    }
}
