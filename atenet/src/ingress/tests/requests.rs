// SPDX-License-Identifier: Apache-2.0
//! Authentication, routing, waking, retrying, limits.
use super::*;

#[tokio::test]
async fn nothing_happens_without_a_token_for_the_actor() {
    let fixture = Fixture::new().await;
    fixture.stub.put(Fixture::actor("alice", ActorState::Suspended));
    let ask = |authorization: Option<(&'static str, String)>| {
        let mut request = Request::builder().uri("/").header("host", "alice.team.actors.localhost");
        if let Some((name, value)) = authorization {
            request = request.header(name, value);
        }
        fixture.send(request.body(none()).unwrap())
    };
    let json = refusal(ask(None).await, 401, "unauthenticated").await;
    assert!(json["hint"].as_str().unwrap().contains("substrate token"));
    refusal(ask(Some(("authorization", "Bearer nonsense".into()))).await, 401, "unauthenticated").await;
    refusal(ask(Some(("authorization", "Basic eDp5".into()))).await, 401, "unauthenticated").await;
    let other = generate_key_pair().unwrap();
    let grant = |atespace: &str, actor: Option<&str>| Grant {
        atespace: atespace.into(),
        actor: actor.map(str::to_owned),
    };
    let forged = mint(&other.private_pem, &grant("team", None), None).unwrap();
    refusal(ask(Some(("ate-authorization", format!("Bearer {forged}")))).await, 401, "unauthenticated").await;
    for (atespace, actor) in [("other", None), ("team", Some("bob"))] {
        let token = mint(&fixture.private_pem, &grant(atespace, actor), None).unwrap();
        refusal(ask(Some(("ate-authorization", format!("Bearer {token}")))).await, 403, "forbidden").await;
    }
    assert_eq!(fixture.stub.resumes.load(Ordering::SeqCst), 0);
    assert_eq!(fixture.stub.gets.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_request_reaches_its_actor_and_only_what_should_pass_does() {
    let fixture = Fixture::new().await;
    let (seen, mut requests) = mpsc::unbounded_channel();
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, move |request| {
        seen.send((request.uri().clone(), request.headers().clone())).unwrap();
        async move {
            let (_, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            let mut response = text(body);
            response.headers_mut().insert("ate-durability", "sync".parse().unwrap());
            response.headers_mut().insert("x-own", "1".parse().unwrap());
            response
        }
    });
    fixture.running("alice", &worker);
    let big = Bytes::from(vec![b'x'; 1 << 20]);
    let request = fixture
        .to("alice")
        .method("POST")
        .header("authorization", "Bearer for-the-actor")
        .header("ate-spoofed", "1")
        .body(Full::new(big.clone()).map_err(|never| match never {}).boxed_unsync())
        .unwrap();
    let response = fixture.send(request).await;
    assert_eq!(response.status(), 200);
    assert_eq!(durability(&response), None, "an actor does not speak for the router");
    assert_eq!(response.headers()["x-own"], "1");
    assert_eq!(body(response).await.len(), big.len());
    let (uri, headers) = requests.recv().await.unwrap();
    assert_eq!(uri, "/path?q=1");
    assert_eq!(headers["host"], "alice.team.actors.localhost");
    assert_eq!(headers["authorization"], "Bearer for-the-actor");
    assert_eq!(headers["x-forwarded-for"], "127.0.0.1");
    assert!(!headers.keys().any(|name| name.as_str().starts_with("ate-")), "{headers:?}");

    // By header, with our own token in `authorization`, which the actor must not see.
    let request = Request::builder()
        .uri("/")
        .header("host", "anything")
        .header("ate-actor", "team/alice:8080")
        .header("authorization", format!("Bearer {}", fixture.token()))
        .body(none())
        .unwrap();
    assert_eq!(fixture.send(request).await.status(), 200);
    let (_, headers) = requests.recv().await.unwrap();
    assert!(!headers.contains_key("authorization"), "{headers:?}");

    refusal(fixture.get("nobody").await, 404, "no_such_actor").await;
    let request = Request::builder()
        .uri("/")
        .header("host", "localhost")
        .header("ate-authorization", format!("Bearer {}", fixture.token()));
    refusal(fixture.send(request.body(none()).unwrap()).await, 404, "no_actor_addressed").await;
    let health = Request::builder().uri("/healthz").header("host", "localhost").body(none()).unwrap();
    assert_eq!(fixture.send(health).await.status(), 200);
}

#[tokio::test]
async fn http2_clients_are_served() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |request| async move {
        text(format!("{:?} {}", request.version(), request.headers()["host"].to_str().unwrap()))
    });
    fixture.running("alice", &worker);
    let stream = TcpStream::connect(fixture.address).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = Request::builder()
        .uri("http://alice.team.actors.localhost/x")
        .header("ate-authorization", format!("Bearer {}", fixture.token()))
        .body(none())
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(body(response).await, "HTTP/1.1 alice.team.actors.localhost");
}

#[tokio::test]
async fn bodies_stream_in_both_directions() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |request| async move {
        // Echoes block by block: the first answer is there before the last question.
        Response::new(request.into_body().map_err(io::Error::other).boxed_unsync())
    });
    fixture.running("alice", &worker);
    let (send, receive) = mpsc::channel::<io::Result<Frame<Bytes>>>(1);
    let stream = StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(receive)).boxed_unsync();
    let request = fixture.to("alice").method("POST").body(stream).unwrap();
    send.send(Ok(Frame::data(Bytes::from_static(b"one")))).await.unwrap();
    let mut response = fixture.send(request).await;
    for word in ["one", "two", "three"] {
        let frame = response.body_mut().frame().await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), word);
        let next = if word == "one" { "two" } else { "three" };
        if word != "three" {
            send.send(Ok(Frame::data(Bytes::from_static(next.as_bytes())))).await.unwrap();
        }
    }
    drop(send);
    assert!(response.body_mut().frame().await.is_none());
}

#[tokio::test]
async fn a_hundred_requests_wake_a_sleeping_actor_once() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 4, |_| async move { text("awake") });
    fixture.stub.put(Fixture::actor("alice", ActorState::Suspended));
    let go = Arc::new(Notify::new());
    let (endpoint, gate) = (worker.endpoint.clone(), go.clone());
    fixture.stub.on_resume(move |stub, ask| {
        let (endpoint, gate) = (endpoint.clone(), gate.clone());
        async move {
            assert_eq!(ask.cause, "traffic");
            gate.notified().await;
            Ok(stub.change("alice", |actor| {
                actor.state = ActorState::Running.into();
                actor.generation = 4;
                actor.ingress_endpoint = endpoint;
            }))
        }
    });
    let fixture = Arc::new(fixture);
    let mut requests = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let fixture = fixture.clone();
        requests.spawn(async move { body(fixture.get("alice").await).await });
    }
    while fixture.stub.resumes.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    go.notify_one();
    let replies = requests.join_all().await;
    assert!(replies.iter().all(|reply| reply == "awake"), "{replies:?}");
    assert_eq!(fixture.stub.resumes.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn waiting_is_bounded_and_says_when_to_come_back() {
    let fixture = Fixture::with(Limits { parked_per_actor: 1, ..Limits::default() }).await;
    fixture.stub.put(Fixture::actor("alice", ActorState::Paused));
    fixture.stub.on_resume(|_, _| std::future::pending());
    let first = fixture.get("alice");
    let mut first = std::pin::pin!(first);
    while fixture.stub.resumes.load(Ordering::SeqCst) == 0 {
        assert!(futures::poll!(first.as_mut()).is_pending());
        tokio::task::yield_now().await;
    }
    let second = fixture.get("alice").await;
    assert_eq!(second.headers()["retry-after"], "1");
    let json = refusal(second, 503, "too_many_waiting").await;
    assert_eq!((&json["retry"], &json["actor"]), (&true.into(), &"team/alice".into()));
}

#[tokio::test]
async fn refused_wakeups_are_explained() {
    let limits = Limits { wakeups_burst: 4, wakeups_per_second: 0.001, ..Limits::default() };
    let fixture = Fixture::with(limits).await;
    fixture.stub.put(Fixture::actor("alice", ActorState::Suspended));
    fixture.stub.on_resume(|_, _| async { Err(Status::resource_exhausted("no worker is free")) });
    let response = fixture.get("alice").await;
    assert_eq!(response.headers()["retry-after"], "5");
    refusal(response, 503, "no_capacity").await;
    // A worker that is being freed is waited for.
    let tries = Arc::new(AtomicUsize::new(0));
    let worker = Worker::start(fixture.path("w"), "uid-alice", 4, |_| async move { text("awake") });
    let endpoint = worker.endpoint.clone();
    fixture.stub.on_resume(move |stub, _| {
        use tonic_types::{ErrorDetails, StatusExt as _};
        let mut details = ErrorDetails::with_error_info("WORKER_POOL_FULL", "substrate", []);
        details.set_retry_info(Some(Duration::from_millis(5)));
        let busy = Status::with_error_details(tonic::Code::ResourceExhausted, "full", details);
        let (first, endpoint) = (tries.fetch_add(1, Ordering::SeqCst) == 0, endpoint.clone());
        async move {
            if first {
                return Err(busy);
            }
            Ok(stub.change("alice", |actor| {
                actor.state = ActorState::Running.into();
                actor.generation = 4;
                actor.ingress_endpoint = endpoint;
            }))
        }
    });
    assert_eq!(body(fixture.get("alice").await).await, "awake");
    drop(worker);
    fixture.stub.put(Fixture::actor("alice", ActorState::Suspended));
    fixture.stub.on_resume(|_, _| async { Err(Status::failed_precondition("the runtime is revoked")) });
    let json = refusal(fixture.get("alice").await, 503, "not_resumed").await;
    assert_eq!(json["message"], "the runtime is revoked");
    fixture.stub.on_resume(|_, _| async { Err(Status::not_found("gone")) });
    refusal(fixture.get("alice").await, 404, "no_such_actor").await;
    let limited = fixture.get("alice").await;
    assert!(limited.headers().contains_key("retry-after"));
    refusal(limited, 429, "woken_too_often").await;
}

#[tokio::test]
async fn states_that_cannot_be_woken_are_looked_up_and_explained() {
    let fixture = Fixture::new().await;
    let mut alice = Fixture::actor("alice", ActorState::Exited);
    alice.exit = Some(substrate_proto::types::ExitStatus { code: 7, ..Default::default() });
    fixture.stub.put(alice);
    let json = refusal(fixture.get("alice").await, 503, "exited").await;
    assert!(json["message"].as_str().unwrap().contains("code 7"), "{json}");
    assert!(json["hint"].as_str().unwrap().contains("substrate reset actor alice"), "{json}");
    fixture.stub.change("alice", |actor| {
        actor.state = ActorState::Crashed.into();
        actor.reason = "CHECKPOINT_FAILED".into();
    });
    let json = refusal(fixture.get("alice").await, 503, "crashed").await;
    assert!(json["message"].as_str().unwrap().contains("CHECKPOINT_FAILED"), "{json}");
    let asleep = Fixture::actor("bob", ActorState::Suspended);
    fixture.stub.put(Actor { wake_on_traffic: false, ..asleep });
    let json = refusal(fixture.get("bob").await, 503, "asleep").await;
    assert!(json["hint"].as_str().unwrap().contains("substrate resume actor bob"), "{json}");
    assert_eq!(fixture.stub.resumes.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_stale_route_is_looked_up_again_and_the_request_repeated() {
    let fixture = Fixture::new().await;
    let old = Worker::start(fixture.path("old"), "uid-alice", 3, |_| async move { text("old") });
    let new = Worker::start(fixture.path("new"), "uid-alice", 4, |request| async move {
        text(request.into_body().collect().await.unwrap().to_bytes())
    });
    fixture.running("alice", &old);
    assert_eq!(body(fixture.get("alice").await).await, "old");
    *old.codes.lock().unwrap() = vec![Code::Stale];
    // The move is committed, but the watch is not heard of it: the record is changed behind its back.
    {
        let mut actors = fixture.stub.actors.lock().unwrap();
        let actor = actors.get_mut(&("team".to_owned(), "alice".to_owned())).unwrap();
        actor.revision += 1;
        actor.generation = 4;
        actor.ingress_endpoint = new.endpoint.clone();
    }
    let body_ = Full::new(Bytes::from_static(b"once")).map_err(|never| match never {}).boxed_unsync();
    let response = fixture.send(fixture.to("alice").method("POST").body(body_).unwrap()).await;
    assert_eq!(body(response).await, "once");
    assert_eq!(old.asked.load(Ordering::SeqCst), 2);
    assert_eq!(new.asked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn not_now_waits_for_a_moment_and_goes_on() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |_| async move { text("ok") });
    *worker.codes.lock().unwrap() = vec![Code::NotNow; 3];
    fixture.running("alice", &worker);
    assert_eq!(fixture.get("alice").await.status(), 200);
    assert_eq!(worker.asked.load(Ordering::SeqCst), 4);
    *worker.codes.lock().unwrap() = vec![Code::Refused];
    let json = refusal(fixture.get("alice").await, 502, "nothing_listens").await;
    assert_eq!(json["retry"], false);
}

#[tokio::test]
async fn a_worker_that_is_gone_before_anything_was_sent_costs_only_time() {
    let fixture = Fixture::new().await;
    let mut old = Worker::start(fixture.path("old"), "uid-alice", 3, |_| async move { text("old") });
    let new = Worker::start(fixture.path("new"), "uid-alice", 4, |_| async move { text("new") });
    fixture.running("alice", &old);
    assert_eq!(body(fixture.get("alice").await).await, "old");
    old.kill();
    let (stub, endpoint) = (fixture.stub.clone(), new.endpoint.clone());
    let moving = tokio::spawn(async move {
        while stub.gets.load(Ordering::SeqCst) < 2 {
            tokio::task::yield_now().await;
        }
        stub.change("alice", |actor| {
            actor.generation = 4;
            actor.ingress_endpoint = endpoint;
        });
    });
    assert_eq!(body(fixture.get("alice").await).await, "new");
    moving.await.unwrap();
}

#[tokio::test]
async fn a_request_that_the_worker_took_with_it_is_502_and_may_be_repeated() {
    let fixture = Fixture::new().await;
    let (arrived, mut waiting) = mpsc::unbounded_channel();
    let mut worker = Worker::start(fixture.path("w"), "uid-alice", 3, move |_| {
        arrived.send(()).unwrap();
        std::future::pending()
    });
    fixture.running("alice", &worker);
    let request = fixture.get("alice");
    let killer = async {
        waiting.recv().await.unwrap();
        worker.kill();
    };
    let (response, ()) = tokio::join!(request, killer);
    let json = refusal(response, 502, "interrupted").await;
    assert_eq!((&json["retry"], &json["actor"]), (&true.into(), &"team/alice".into()));
}

#[tokio::test]
async fn upgrades_pass_through() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |mut request| async move {
        assert_eq!(request.headers()["upgrade"], "websocket");
        assert_eq!(request.headers()["sec-websocket-key"], "k");
        let upgraded = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut stream = TokioIo::new(upgraded.await.unwrap());
            let mut bytes = [0; 4];
            stream.read_exact(&mut bytes).await.unwrap();
            bytes.reverse();
            stream.write_all(&bytes).await.unwrap();
            stream.shutdown().await.unwrap();
        });
        let mut response = text("");
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert("connection", "Upgrade".parse().unwrap());
        response.headers_mut().insert("upgrade", "websocket".parse().unwrap());
        response.headers_mut().insert("sec-websocket-accept", "a".parse().unwrap());
        response
    });
    fixture.running_sync("alice", &worker, "2s");
    let request = fixture
        .to("alice")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-key", "k")
        .body(none())
        .unwrap();
    let response = fixture.send(request).await;
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(response.headers()["sec-websocket-accept"], "a");
    assert_eq!(response.headers()["upgrade"], "websocket");
    assert_eq!(durability(&response), Some("async"), "a stream is not covered by sync");
    let mut stream = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
    stream.write_all(b"ping").await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"gnip");
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_refused_declared_or_not() {
    let fixture = Fixture::with(Limits { request_body: 10, ..Limits::default() }).await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |request| async move {
        let read = request.into_body().collect().await;
        text(format!("{}", read.is_ok()))
    });
    fixture.running("alice", &worker);
    let long = || Bytes::from_static(b"more than ten bytes");
    let declared = Full::new(long()).map_err(|never| match never {}).boxed_unsync();
    refusal(
        fixture.send(fixture.to("alice").method("POST").body(declared).unwrap()).await,
        413,
        "body_too_large",
    )
    .await;
    let frames = futures::stream::iter([Ok(Frame::data(long()))]);
    let chunked = StreamBody::new(frames).boxed_unsync();
    refusal(
        fixture.send(fixture.to("alice").method("POST").body(chunked).unwrap()).await,
        413,
        "body_too_large",
    )
    .await;
}
