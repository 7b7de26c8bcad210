// SPDX-License-Identifier: Apache-2.0
//! The service: what callers see, and once over a real socket with a real node server behind it.
use futures::StreamExt as _;
use substrate_proto::ateapi::control_client::ControlClient;
use substrate_proto::ateapi::watch_response::Change;
use substrate_proto::atelet::node_server::{Node, NodeServer};
use substrate_proto::{atelet, ateom};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Streaming};
use tonic_types::StatusExt as _;

use super::*;
use crate::node::NodeClient as _;
use crate::store::Store as _;
use crate::testing::Harness;
use crate::testing::stub::{Blobs, Stub, StubNode};

fn service(h: &Harness) -> ControlService {
    ControlService::new(Arc::clone(&h.engine))
}

fn named(name: &str) -> ateapi::ActorRef {
    ateapi::ActorRef { atespace: "space".into(), name: name.into(), uid: String::new() }
}

async fn next(
    stream: &mut (impl futures::Stream<Item = Result<ateapi::WatchResponse, Status>> + Unpin),
) -> ateapi::WatchResponse {
    stream.next().await.unwrap().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_watch_shows_what_is_there_then_every_change_and_resumes() {
    let h = Harness::new(&[1]).await;
    let uid = h.create("alice").await;
    h.engine.flush_workers().await;
    let service = service(&h);
    let watch = |from_revision, kinds: &[&str]| {
        let kinds = kinds.iter().map(ToString::to_string).collect();
        service.watch(Request::new(ateapi::WatchRequest { from_revision, kinds, atespace: String::new() }))
    };
    let mut all = watch(0, &["actor", "atespace", "template"]).await.unwrap().into_inner();
    let mut kinds = Vec::new();
    let began = loop {
        let response = next(&mut all).await;
        match response.change.unwrap() {
            Change::Bookmark(bookmark) => {
                assert!(bookmark.initial_done);
                break response.revision;
            }
            Change::Actor(actor) => kinds.push(actor.name),
            Change::Atespace(atespace) => kinds.push(atespace.name),
            Change::Template(template) => kinds.push(template.name),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(kinds, ["space", "t", "alice"]);
    h.resume(&uid).await.unwrap();
    h.suspend(&uid).await.unwrap();
    let mut states = Vec::new();
    let mut last = began;
    while states.last() != Some(&ateapi::ActorState::Suspended) {
        let response = next(&mut all).await;
        assert!(response.revision > last);
        last = response.revision;
        if let Some(Change::Actor(actor)) = response.change {
            states.push(actor.state());
        }
    }
    states.dedup();
    let names: Vec<_> = states.iter().map(ateapi::ActorState::as_str_name).collect();
    assert_eq!(names, ["RESUMING", "RUNNING", "SUSPENDING", "SUSPENDED"]);
    // A client that comes back with its revision gets the rest, once.
    let mut again = watch(began, &["actor", "snapshot", "event"]).await.unwrap().into_inner();
    let (mut snapshots, mut events) = (0, Vec::new());
    loop {
        match next(&mut again).await.change.unwrap() {
            Change::Snapshot(snapshot) => {
                snapshots += 1;
                assert_eq!(snapshot.actor_name, "alice");
            }
            Change::Event(event) => {
                events.push(event.reason.clone());
                if event.reason == "Suspended" {
                    break;
                }
            }
            Change::Actor(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((snapshots, events), (2, vec!["Started".to_owned(), "Suspended".to_owned()]));
    let mut deleted = watch(last, &["actor"]).await.unwrap().into_inner();
    h.delete(&uid).await.unwrap();
    loop {
        if let Change::Deleted(gone) = next(&mut deleted).await.change.unwrap() {
            assert_eq!((gone.kind.as_str(), gone.name.as_str(), gone.uid), ("actor", "alice", uid.0.clone()));
            break;
        }
    }
    h.store
        .trim(crate::store::Trim { changelog_keep: 1, events_keep: 9, requests_before_ms: 0 })
        .await
        .unwrap();
    let mut old = watch(began, &[]).await.unwrap().into_inner();
    assert_eq!(old.next().await.unwrap().unwrap_err().code(), Code::OutOfRange);
    assert_eq!(watch(0, &["pod"]).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn lists_are_paged_and_filtered() {
    let h = Harness::new(&[1]).await;
    for i in 0..25 {
        let mut spec = types::ActorSpec { template: "t".into(), ..Default::default() };
        if i % 5 == 0 {
            spec.labels.insert("five".into(), "yes".into());
        }
        h.engine.create_actor("space", &format!("a{i:02}"), spec, None, false, None).await.unwrap();
    }
    let service = service(&h);
    let list = |request| service.list_actors(Request::new(request));
    let mut token = String::new();
    let mut names = Vec::new();
    loop {
        let request = ateapi::ListActorsRequest { page_size: 10, page_token: token, ..Default::default() };
        let page = list(request).await.unwrap().into_inner();
        names.extend(page.actors.into_iter().map(|actor| actor.name));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(names.len(), 25);
    assert!(names.is_sorted());
    let labels = BTreeMap::from([("five".to_owned(), "yes".to_owned())]);
    let request = ateapi::ListActorsRequest { labels: labels.clone(), page_size: 3, ..Default::default() };
    let page = list(request).await.unwrap().into_inner();
    assert_eq!(page.actors.len(), 3);
    let rest = ateapi::ListActorsRequest { labels, page_token: page.next_page_token, ..Default::default() };
    assert_eq!(list(rest).await.unwrap().into_inner().actors.len(), 2);
    let template = |name: &str| ateapi::ListActorsRequest {
        atespace: "space".into(),
        template: name.into(),
        states: vec![ateapi::ActorState::New as i32],
        ..Default::default()
    };
    assert_eq!(list(template("t")).await.unwrap().into_inner().actors.len(), 25);
    assert!(list(template("other")).await.unwrap().into_inner().actors.is_empty());
    let bad = ateapi::ListActorsRequest { states: vec![99], ..Default::default() };
    assert_eq!(list(bad).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn a_retried_deletion_finds_its_success_and_spares_the_next_of_that_name() {
    let h = Harness::new(&[1]).await;
    let first = h.create("alice").await;
    let service = service(&h);
    let delete = |id: &str| {
        let request = ateapi::DeleteActorRequest { actor: Some(named("alice")), request_id: id.into() };
        service.delete_actor(Request::new(request))
    };
    assert!(delete("d-1").await.unwrap().into_inner().deleted);
    assert!(delete("d-1").await.unwrap().into_inner().deleted, "the first attempt's success");
    assert!(!delete("d-2").await.unwrap().into_inner().deleted, "another call finds nothing");
    let spec = types::ActorSpec { template: "t".into(), ..Default::default() };
    let next = h.engine.create_actor("space", "alice", spec, None, false, None).await.unwrap();
    assert_ne!(next.uid, first);
    assert!(delete("d-1").await.unwrap().into_inner().deleted);
    assert_eq!(h.actor(&next.uid).await.name, "alice");
    let forget = |id: &str| {
        let request = ateapi::DeleteAtespaceRequest { name: "empty".into(), request_id: id.into() };
        service.delete_atespace(Request::new(request))
    };
    h.engine.create_atespace("empty", BTreeMap::new()).await.unwrap();
    assert!(forget("a-1").await.unwrap().into_inner().deleted);
    h.engine.create_atespace("empty", BTreeMap::new()).await.unwrap();
    assert!(forget("a-1").await.unwrap().into_inner().deleted);
    assert!(forget("a-2").await.unwrap().into_inner().deleted, "it was still there");
    assert_eq!(forget("a b").await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn a_revision_of_another_history_is_refused_and_events_are_read_on_without_a_gap() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    let service = service(&h);
    let request = ateapi::WatchRequest { from_revision: 1 << 40, ..Default::default() };
    let mut stream = service.watch(Request::new(request)).await.unwrap().into_inner();
    let status = stream.next().await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
    assert_eq!(status.get_details_error_info().unwrap().reason, "REVISION_UNKNOWN");
    for _ in 0..3 {
        h.suspend(&uid).await.unwrap();
        h.resume(&uid).await.unwrap();
    }
    let page = async |after_revision, limit| {
        let request = ateapi::ListEventsRequest { after_revision, limit, ..Default::default() };
        service.list_events(Request::new(request)).await.unwrap().into_inner().events
    };
    let all = page(0, 1_000).await;
    let mut read: Vec<_> = all[..1].to_vec();
    while let Some(last) = read.last().map(|it| it.revision) {
        let more = page(last, 2).await;
        if more.is_empty() {
            break;
        }
        read.extend(more);
    }
    assert_eq!(read, all);
    assert_eq!(page(0, 2).await, all[all.len() - 2..]);
}

#[tokio::test(start_paused = true)]
async fn errors_carry_reason_and_way_out() {
    let h = Harness::new(&[1]).await;
    h.create("alice").await;
    let service = service(&h);
    let suspend = ateapi::SuspendActorRequest { actor: Some(named("alice")), ..Default::default() };
    let status = service.suspend_actor(Request::new(suspend)).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let details = status.get_error_details();
    let info = details.error_info().unwrap();
    assert_eq!((info.reason.as_str(), info.metadata["state"].as_str()), ("WRONG_STATE", "NEW"));
    assert!(info.metadata["way_out"].contains("resume"));
    let get = ateapi::GetActorRequest { actor: Some(named("nobody")) };
    let status = service.get_actor(Request::new(get)).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("space/nobody"));
    let gone = ateapi::DeleteActorRequest { actor: Some(named("nobody")), request_id: String::new() };
    assert!(!service.delete_actor(Request::new(gone)).await.unwrap().into_inner().deleted);
    let create = ateapi::CreateActorRequest {
        atespace: "space".into(),
        name: "Not DNS".into(),
        spec: Some(types::ActorSpec { template: "t".into(), ..Default::default() }),
        ..Default::default()
    };
    let status = service.create_actor(Request::new(create)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("name: \"Not DNS\""), "{}", status.message());
}

#[tokio::test(start_paused = true)]
async fn denials_are_events_of_their_actor() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    let denial = ateapi::Denial {
        actor_uid: uid.0.clone(),
        generation: 1,
        protocol: "tls".into(),
        destination: "evil.example.com:443".into(),
        reason: "not in the policy".into(),
        ..Default::default()
    };
    let unknown = ateapi::Denial { actor_uid: "gone".into(), ..denial.clone() };
    let request = ateapi::ReportDenialsRequest { denials: vec![unknown, denial] };
    service(&h).report_denials(Request::new(request)).await.unwrap();
    let events = h.events("EgressDenied").await;
    assert_eq!(events.len(), 1);
    assert_eq!((events[0].subject.as_str(), events[0].kind.as_str()), ("alice", "egress"));
    assert_eq!(events[0].metadata["destination"], "evil.example.com:443");
}

#[tokio::test(start_paused = true)]
async fn replies_without_their_checkpoint_are_an_event_of_their_actor() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    let report = ateapi::ReportFallbackRequest {
        actor_uid: uid.0.clone(),
        generation: 1,
        reason: "no checkpoint within 2s".into(),
        replies: 3,
    };
    service(&h).report_fallback(Request::new(report.clone())).await.unwrap();
    let events = h.events("DurabilityFellBack").await;
    assert_eq!((events.len(), events[0].subject.as_str(), events[0].warning), (1, "alice", true));
    assert!(events[0].message.contains("3 replies") && events[0].message.contains("within 2s"));
    let gone = ateapi::ReportFallbackRequest { actor_uid: "gone".into(), ..report };
    let status = service(&h).report_fallback(Request::new(gone)).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
}

/// `atelet.v1.Node` over the stub.
struct Served(Stub);

type Streamed<T> = Answered<futures::stream::BoxStream<'static, Result<T, Status>>>;

#[tonic::async_trait]
impl Node for Served {
    async fn get_node(&self, _: Request<atelet::GetNodeRequest>) -> Answered<atelet::GetNodeResponse> {
        self.0.get_node().await.map(Response::new)
    }

    type SessionStream = futures::stream::BoxStream<'static, Result<atelet::SessionEvent, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<atelet::SessionRequest>>,
    ) -> Streamed<atelet::SessionEvent> {
        let (to, requests) = tokio::sync::mpsc::channel(8);
        let mut inputs = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(input)) = inputs.message().await {
                if to.send(input).await.is_err() {
                    return;
                }
            }
        });
        self.0.session(requests).await.map(Response::new)
    }

    type EnsureImageStream = futures::stream::BoxStream<'static, Result<atelet::EnsureImageProgress, Status>>;

    async fn ensure_image(
        &self,
        request: Request<atelet::EnsureImageRequest>,
    ) -> Streamed<atelet::EnsureImageProgress> {
        self.0.ensure_image(request.into_inner()).await.map(Response::new)
    }

    async fn activate(
        &self,
        request: Request<atelet::ActivateRequest>,
    ) -> Answered<atelet::ActivateResponse> {
        self.0.activate(request.into_inner()).await.map(Response::new)
    }

    async fn checkpoint(
        &self,
        request: Request<atelet::CheckpointRequest>,
    ) -> Answered<atelet::CheckpointResponse> {
        self.0.checkpoint(request.into_inner()).await.map(Response::new)
    }

    async fn upload(&self, request: Request<atelet::UploadRequest>) -> Answered<atelet::UploadResponse> {
        self.0.upload(request.into_inner()).await.map(Response::new)
    }

    async fn release(&self, request: Request<atelet::ReleaseRequest>) -> Answered<atelet::ReleaseResponse> {
        self.0.release(request.into_inner()).await.map(|()| Response::new(atelet::ReleaseResponse {}))
    }

    async fn list_snapshots(
        &self,
        _: Request<atelet::ListSnapshotsRequest>,
    ) -> Answered<atelet::ListSnapshotsResponse> {
        Ok(Response::new(atelet::ListSnapshotsResponse::default()))
    }

    async fn drop_snapshot(
        &self,
        request: Request<atelet::DropSnapshotRequest>,
    ) -> Answered<atelet::DropSnapshotResponse> {
        self.0
            .drop_snapshot(request.into_inner())
            .await
            .map(|()| Response::new(atelet::DropSnapshotResponse {}))
    }

    async fn delete_blobs(
        &self,
        request: Request<atelet::DeleteBlobsRequest>,
    ) -> Answered<atelet::DeleteBlobsResponse> {
        self.0
            .delete_blobs(request.into_inner())
            .await
            .map(|()| Response::new(atelet::DeleteBlobsResponse {}))
    }

    async fn purge(&self, request: Request<atelet::PurgeRequest>) -> Answered<atelet::PurgeResponse> {
        self.0.purge(request.into_inner()).await.map(|()| Response::new(atelet::PurgeResponse {}))
    }

    async fn set_egress(
        &self,
        request: Request<atelet::SetEgressRequest>,
    ) -> Answered<atelet::SetEgressResponse> {
        self.0.set_egress(request.into_inner()).await.map(|()| Response::new(atelet::SetEgressResponse {}))
    }

    type ExecStream = futures::stream::BoxStream<'static, Result<types::ExecOutput, Status>>;

    async fn exec(&self, request: Request<Streaming<types::ExecInput>>) -> Streamed<types::ExecOutput> {
        let (to, inputs) = tokio::sync::mpsc::channel(8);
        let mut stream = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(input)) = stream.message().await {
                if to.send(input).await.is_err() {
                    return;
                }
            }
        });
        self.0.exec(inputs).await.map(Response::new)
    }

    type LogsStream = futures::stream::BoxStream<'static, Result<atelet::LogsChunk, Status>>;

    async fn logs(&self, request: Request<atelet::LogsRequest>) -> Streamed<atelet::LogsChunk> {
        self.0.logs(request.into_inner()).await.map(Response::new)
    }
}

#[tokio::test]
async fn over_real_sockets_with_a_real_database() {
    let dir = tempfile::tempdir().unwrap();
    let node = StubNode::new("n0", 2, Arc::new(Blobs::default()), Arc::new(crate::SystemClock));
    let node_socket = dir.path().join("node/atelet.sock");
    let incoming =
        substrate_proto::seam::listen(&node_socket, substrate_proto::seam::Peers::default()).unwrap();
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(NodeServer::new(Served(Stub(Arc::clone(&node)))))
            .serve_with_incoming(incoming),
    );
    let socket = dir.path().join("run/ateapi.sock");
    let endpoint = crate::NodeEndpoint {
        name: "n0".into(),
        endpoint: format!("unix:{}", node_socket.display()),
        tls: None,
    };
    let config = crate::Config::new(
        dir.path().join("control/state.db"),
        dir.path().join("keys"),
        socket.clone(),
        vec![endpoint],
    );
    let shutdown = CancellationToken::new();
    let (ready, is_ready) = tokio::sync::oneshot::channel();
    let served = tokio::spawn(crate::serve(config.clone(), ready, shutdown.clone()));
    is_ready.await.unwrap();
    // A second one on the same directory is refused with the cause.
    let (ready, _unused) = tokio::sync::oneshot::channel();
    let second = crate::serve(config, ready, CancellationToken::new()).await.unwrap_err();
    assert!(second.to_string().contains("in use"), "{second}");

    let mut client = ControlClient::connect(format!("unix:{}", socket.display())).await.unwrap();
    client
        .create_atespace(ateapi::CreateAtespaceRequest { name: "space".into(), ..Default::default() })
        .await
        .unwrap();
    let template = ateapi::CreateTemplateRequest {
        atespace: "space".into(),
        name: "t".into(),
        spec: Some(types::TemplateSpec {
            containers: vec![types::Container {
                name: "main".into(),
                image: "oci:/images/counter".into(),
                ..Default::default()
            }],
            ..Default::default()
        }),
        ..Default::default()
    };
    // The node's session opens by itself: until then the answer asks for a retry.
    while let Err(status) = client.create_template(template.clone()).await {
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let create = ateapi::CreateActorRequest {
        atespace: "space".into(),
        name: "alice".into(),
        spec: Some(types::ActorSpec {
            template: "t".into(),
            files: vec![types::File { path: "/t".into(), mode: 0o400, content: b"hunter2".to_vec() }],
            ..Default::default()
        }),
        uid: "sandbox-1".into(),
        ..Default::default()
    };
    let actor = client.create_actor(create.clone()).await.unwrap().into_inner();
    assert!(actor.spec.unwrap().files[0].content.is_empty());
    assert_eq!(client.create_actor(create).await.unwrap().into_inner().uid, "sandbox-1");
    let resume = ateapi::ResumeActorRequest { actor: Some(named("alice")), ..Default::default() };
    let resumed = client.resume_actor(resume).await.unwrap().into_inner().actor.unwrap();
    assert_eq!(resumed.state(), ateapi::ActorState::Running);
    assert_eq!(node.copy_of("sandbox-1").unwrap().files[0].content, b"hunter2");

    let start = types::ExecStart {
        atespace: "space".into(),
        actor: "alice".into(),
        command: vec!["echo".into(), "hi".into()],
        ..Default::default()
    };
    let inputs = vec![types::ExecInput { input: Some(types::exec_input::Input::Start(start.clone())) }];
    let suspend = ateapi::SuspendActorRequest { actor: Some(named("alice")), ..Default::default() };
    let answer = client.suspend_actor(suspend.clone()).await.unwrap().into_inner();
    assert_eq!(answer.snapshot.unwrap().durability(), types::Durability::Durable);
    // An exec wakes it.
    let outputs = client.exec_actor(tokio_stream::iter(inputs)).await.unwrap().into_inner();
    let outputs: Vec<_> = outputs.map(|output| output.unwrap().output.unwrap()).collect().await;
    assert_eq!(outputs[0], types::exec_output::Output::Stdout(b"echo hi".to_vec()));
    client.suspend_actor(suspend).await.unwrap();
    let asleep = types::ExecStart { no_wake: true, ..start };
    let inputs = vec![types::ExecInput { input: Some(types::exec_input::Input::Start(asleep)) }];
    let status = client.exec_actor(tokio_stream::iter(inputs)).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let logs = ateapi::ActorLogsRequest { actor: Some(named("alice")), ..Default::default() };
    let chunk = client.actor_logs(logs).await.unwrap().into_inner().message().await.unwrap().unwrap();
    assert_eq!(chunk.data, b"log of sandbox-1");
    let workers = client.list_workers(ateapi::ListWorkersRequest {}).await.unwrap().into_inner().workers;
    assert_eq!(workers.len(), 2);
    assert!(
        workers.iter().all(|it| it.alive && it.phase == "empty" && it.sandbox_class == "gvisor"),
        "{workers:?}"
    );
    assert_eq!(workers[0].phase, ateom::slot_status::Phase::Empty.as_str_name().to_lowercase());
    // The secret is nowhere on disk in clear.
    drop(client);
    shutdown.cancel();
    served.await.unwrap().unwrap();
    for entry in std::fs::read_dir(dir.path().join("control")).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        assert!(!bytes.windows(7).any(|window| window == b"hunter2"));
    }
}
