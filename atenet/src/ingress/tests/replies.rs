// SPDX-License-Identifier: Apache-2.0
//! `checkpoint.onReply`, and the end of replies.
use super::*;

#[tokio::test]
async fn a_sync_reply_waits_for_its_checkpoint_with_its_connection_ended() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |_| async move { text("answer") });
    fixture.running_sync("alice", &worker, "10s");
    let go = Arc::new(Notify::new());
    let (asked, mut checkpoints) = mpsc::unbounded_channel();
    let (gate, open) = (go.clone(), worker.open.clone());
    fixture.stub.on_checkpoint(move |_, ask| {
        asked.send((ask.clone(), open.load(Ordering::SeqCst))).unwrap();
        let gate = gate.clone();
        async move {
            gate.notified().await;
            Ok(snapshot_answer(3, Durability::Node))
        }
    });
    let request = fixture.get("alice");
    let mut request = std::pin::pin!(request);
    let (ask, open) = tokio::select! {
        _ = request.as_mut() => panic!("released before the checkpoint"),
        asked = checkpoints.recv() => asked.unwrap(),
    };
    assert_eq!(open, 0, "the reply's own connection stands against a quiet moment");
    assert_eq!((ask.generation, ask.max_heap), (3, 256 << 20));
    assert_eq!(ask.durability(), Durability::Node);
    assert_eq!(ask.actor.unwrap().uid, "uid-alice");
    assert!(futures::poll!(request.as_mut()).is_pending());
    go.notify_one();
    let response = request.await;
    assert_eq!(durability(&response), Some("sync"));
    assert_eq!(body(response).await, "answer");
}

#[tokio::test]
async fn a_sync_reply_falls_back_to_async_and_says_so() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |_| async move { text("answer") });
    fixture.running_sync("alice", &worker, "50ms");
    fixture.stub.on_checkpoint(|_, _| std::future::pending());
    let response = fixture.get("alice").await;
    assert_eq!((durability(&response), response.status().as_u16()), (Some("async"), 200));
    fixture.running_sync("alice", &worker, "30s");
    for status in [Status::resource_exhausted("512 MiB"), Status::unimplemented("no checkpoint here")] {
        fixture.stub.on_checkpoint(move |_, _| std::future::ready(Err(status.clone())));
        let response = fixture.get("alice").await;
        assert_eq!(durability(&response), Some("async"));
        assert_eq!(body(response).await, "answer");
    }
    // All of a moment are one event.
    let told = async {
        loop {
            let told = std::mem::take(&mut *fixture.stub.fallbacks.lock().unwrap());
            if !told.is_empty() {
                break told;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let told = tokio::time::timeout(Duration::from_secs(10), told).await.unwrap();
    assert_eq!((told.len(), told[0].actor_uid.as_str(), told[0].generation), (1, "uid-alice", 3));
    assert!(told[0].replies >= 1 && !told[0].reason.is_empty());
    // Asked again while it may yet succeed.
    let tries = Arc::new(AtomicUsize::new(0));
    fixture.stub.on_checkpoint(move |_, _| {
        let first = tries.fetch_add(1, Ordering::SeqCst) < 2;
        async move {
            if first { Err(Status::aborted("busy")) } else { Ok(snapshot_answer(3, Durability::Node)) }
        }
    });
    assert_eq!(durability(&fixture.get("alice").await), Some("sync"));
}

#[tokio::test]
async fn a_held_reply_whose_worker_is_lost_is_never_released() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |_| async move { text("answer") });
    fixture.running_sync("alice", &worker, "30s");
    fixture.stub.on_checkpoint(|stub, _| async move {
        stub.change("alice", |actor| {
            actor.state = ActorState::Suspended.into();
            actor.reason = "WORKER_LOST".into();
        });
        Err(Status::aborted("worker lost"))
    });
    let json = refusal(fixture.get("alice").await, 502, "interrupted").await;
    assert_eq!(json["retry"], true);
    assert!(json["message"].as_str().unwrap().contains("withheld"), "{json}");
    fixture.stub.on_resume(|stub, _| async move { Ok(stub.actor("alice")) });
    // Even when the control plane names the snapshot that the actor fell back to.
    fixture.running_sync("alice", &worker, "30s");
    fixture.stub.on_checkpoint(|stub, _| async move {
        let mut answer = snapshot_answer(3, Durability::Durable);
        answer.actor = Some(stub.change("alice", |actor| {
            actor.state = ActorState::Suspended.into();
            actor.last_snapshot = answer.snapshot.clone();
        }));
        Ok(answer)
    });
    refusal(fixture.get("alice").await, 502, "interrupted").await;
    // Even when the checkpoint that is answered is another generation's.
    fixture.running_sync("alice", &worker, "30s");
    fixture.stub.on_checkpoint(|stub, _| async move {
        stub.change("alice", |actor| actor.generation = 5);
        Ok(snapshot_answer(5, Durability::Node))
    });
    refusal(fixture.get("alice").await, 502, "interrupted").await;
}

#[tokio::test]
async fn a_reply_that_an_orderly_stop_captured_is_sync() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |_| async move { text("answer") });
    fixture.running_sync("alice", &worker, "30s");
    fixture.stub.on_checkpoint(|stub, _| async move {
        stub.change("alice", |actor| {
            actor.state = ActorState::Suspended.into();
            actor.last_snapshot = Some(Snapshot {
                generation: 3,
                cause: "suspend".into(),
                durability: Durability::Durable.into(),
                ..Default::default()
            });
        });
        Err(Status::failed_precondition("it is suspended"))
    });
    assert_eq!(durability(&fixture.get("alice").await), Some("sync"));
}

#[tokio::test]
async fn without_a_control_plane_the_worker_itself_is_asked() {
    let fixture = Fixture::new().await;
    let worker =
        Arc::new(Mutex::new(Worker::start(
            fixture.path("w"),
            "uid-alice",
            3,
            |_| async move { text("answer") },
        )));
    {
        let worker = worker.lock().unwrap();
        fixture.running_sync("alice", &worker, "100ms");
    }
    fixture.stub.on_checkpoint(|stub, _| async move {
        stub.away.store(true, Ordering::SeqCst);
        Err(Status::unavailable("going away"))
    });
    assert_eq!(durability(&fixture.get("alice").await), Some("async"));
    fixture.stub.away.store(false, Ordering::SeqCst);
    let killed = worker.clone();
    fixture.stub.on_checkpoint(move |stub, _| {
        let killed = killed.clone();
        async move {
            stub.away.store(true, Ordering::SeqCst);
            killed.lock().unwrap().kill();
            Err(Status::unavailable("going away"))
        }
    });
    refusal(fixture.get("alice").await, 502, "interrupted").await;
}

/// A reply of 100 KiB in blocks of 10 KiB.
fn long_reply() -> Reply {
    let blocks = (0..10).map(|n| Ok(Frame::data(Bytes::from(vec![b'0' + n; 10 << 10]))));
    Response::new(StreamBody::new(futures::stream::iter(blocks.collect::<Vec<_>>())).boxed_unsync())
}

#[tokio::test]
async fn a_long_sync_reply_streams_and_holds_its_end() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |_| async move { long_reply() });
    fixture.running_sync("alice", &worker, "30s");
    let go = Arc::new(Notify::new());
    let gate = go.clone();
    fixture.stub.on_checkpoint(move |_, _| {
        let gate = gate.clone();
        async move {
            gate.notified().await;
            Ok(snapshot_answer(3, Durability::Node))
        }
    });
    let mut response = fixture.send(fixture.to("alice").header("te", "trailers").body(none()).unwrap()).await;
    assert_eq!(durability(&response), None, "it is not known yet");
    let mut got = 0;
    // Everything but the last block comes before the checkpoint.
    while got <= 80 << 10 {
        got += response.body_mut().frame().await.unwrap().unwrap().into_data().unwrap().len();
    }
    while fixture.stub.checkpoints.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    while let Some(frame) =
        tokio::time::timeout(Duration::from_millis(50), response.body_mut().frame()).await.ok().flatten()
    {
        got += frame.unwrap().into_data().unwrap().len();
    }
    assert!(got < 100 << 10, "the end was not held");
    go.notify_one();
    let rest = response.into_body().collect().await.unwrap();
    assert_eq!(rest.trailers().unwrap()["ate-durability"], "sync");
    assert_eq!(got + rest.to_bytes().len(), 100 << 10);

    // Lost while held: the client sees that it is not complete.
    fixture.stub.on_checkpoint(|stub, _| async move {
        stub.change("alice", |actor| actor.generation = 9);
        Err(Status::aborted("worker lost"))
    });
    let response = fixture.get("alice").await;
    assert_eq!(response.status(), 200);
    assert!(response.into_body().collect().await.is_err());
}

#[tokio::test]
async fn events_of_a_stream_pass_at_once_and_only_its_end_is_held() {
    let fixture = Fixture::new().await;
    let (send, receive) = mpsc::channel::<io::Result<Frame<Bytes>>>(1);
    let receive = Arc::new(Mutex::new(Some(receive)));
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, move |_| {
        let receive = receive.lock().unwrap().take().unwrap();
        async move {
            let stream = StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(receive));
            let mut response = Response::new(stream.boxed_unsync());
            response.headers_mut().insert("content-type", "text/event-stream".parse().unwrap());
            response
        }
    });
    fixture.running_sync("alice", &worker, "30s");
    fixture.stub.on_checkpoint(|_, _| async { Ok(snapshot_answer(3, Durability::Node)) });
    let mut response = fixture.get("alice").await;
    for event in ["data: 1\n\n", "data: 2\n\n"] {
        send.send(Ok(Frame::data(Bytes::from_static(event.as_bytes())))).await.unwrap();
        let frame = response.body_mut().frame().await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), event);
    }
    assert_eq!(fixture.stub.checkpoints.load(Ordering::SeqCst), 0);
    drop(send);
    assert!(response.body_mut().frame().await.is_none());
    assert_eq!(fixture.stub.checkpoints.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_async_reply_goes_at_once_and_checkpoints_are_coalesced() {
    let fixture = Fixture::new().await;
    let worker = Worker::start(fixture.path("w"), "uid-alice", 3, |_| async move { text("answer") });
    let policy = CheckpointPolicy { on_reply: "async".into(), ..Default::default() };
    let actor = Fixture::actor("alice", ActorState::Running);
    fixture.stub.put(Actor { ingress_endpoint: worker.endpoint.clone(), checkpoint: Some(policy), ..actor });
    let go = Arc::new(Notify::new());
    let gate = go.clone();
    fixture.stub.on_checkpoint(move |_, _| {
        let gate = gate.clone();
        async move {
            gate.notified().await;
            Ok(snapshot_answer(3, Durability::Durable))
        }
    });
    for _ in 0..10 {
        let response = fixture.get("alice").await;
        assert_eq!(durability(&response), Some("async"));
        assert_eq!(body(response).await, "answer");
    }
    while worker.open.load(Ordering::SeqCst) > 0 || fixture.stub.checkpoints.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(fixture.stub.checkpoints.load(Ordering::SeqCst), 1);
    go.notify_one();
    while fixture.stub.checkpoints.load(Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
    go.notify_one();
}

#[tokio::test]
async fn the_end_of_a_connection_is_not_taken_for_the_end_of_a_reply_once_the_worker_is_lost() {
    let fixture = Fixture::new().await;
    // An HTTP/1.0 server: its reply ends with the connection.
    let serve_raw = |path: PathBuf, alive: bool| async move {
        let listener = UnixListener::bind(path).unwrap();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let ask = read_open(&mut stream).await;
            let code = match (ask.port, alive) {
                (1, true) => Code::Refused,
                (1, false) => Code::Stale,
                _ => Code::Ok,
            };
            let said = IngressOpened { code: code.into(), message: String::new() };
            stream.write_all(&said.encode_length_delimited_to_vec()).await.unwrap();
            if code == Code::Ok {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(stream.read_u8().await.unwrap());
                }
                stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nhalf of it").await.unwrap();
            }
        }
    };
    for (name, alive) in [("alive", true), ("lost", false)] {
        let _server = AbortOnDropHandle::new(tokio::spawn(serve_raw(fixture.path(name), alive)));
        let actor = Fixture::actor(name, ActorState::Running);
        let endpoint = format!("unix:{}", fixture.path(name).display());
        fixture.stub.put(Actor { ingress_endpoint: endpoint, ..actor });
        while !fixture.path(name).exists() {
            tokio::task::yield_now().await;
        }
        let collected = fixture.get(name).await.into_body().collect().await;
        assert_eq!(collected.is_ok(), alive, "{name}");
    }
}
