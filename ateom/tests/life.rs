// SPDX-License-Identifier: Apache-2.0
//! The life of an actor in a slot, on real gVisor.
mod common;

use std::time::{Duration, Instant};

use common::{Worker, sh};
use substrate_proto::atenet::ingress_opened::Code;
use substrate_proto::ateom::checkpoint_request::Mode;
use substrate_proto::ateom::slot_status::Phase;
use substrate_proto::ateom::*;

fn steps(steps: &[StepTime]) -> String {
    steps.iter().map(|s| format!("{}={:.1}", s.name, s.micros as f64 / 1000.0)).collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn a_counter_goes_on_in_another_slot_under_the_same_nonce() {
    let mut first = Worker::start("life-a").await;
    let mut second = Worker::start("life-b").await;
    first.wait_prepared().await;
    second.wait_prepared().await;
    let who = first.assignment("alice", 1);

    let spec = first.counter();
    let before = Instant::now();
    let booted = first.run(&who, spec).await.unwrap();
    println!("boot {:.1} ms: {}", before.elapsed().as_secs_f64() * 1e3, steps(&booted.steps));
    // A retry finds it done.
    first.run(&who, first.counter()).await.unwrap();
    let (count, nonce) = first.count(&who);
    assert_eq!(count, 1);
    assert_eq!(first.count(&who), (2, nonce.clone()));
    first.get(&who, "/peek");
    let (code, out, _) =
        first.exec(&who, sh("cat /run/ate/name /etc/hostname /proc/sys/kernel/hostname"), b"").await;
    assert_eq!((code, out.as_str()), (0, "first\ncounter\nactor\n"));

    // Saved and gone.
    let image = first.dir.path().join("image");
    let before = Instant::now();
    let saved = first.checkpoint(&who, &image, Mode::Stop).await.unwrap();
    println!("suspend {:.1} ms: {}", before.elapsed().as_secs_f64() * 1e3, steps(&saved.steps));
    assert_eq!(
        saved.files.iter().map(|f| (f.name.as_str(), f.memory)).collect::<Vec<_>>(),
        [("checkpoint.img", false), ("pages.img", true), ("pages_meta.img", false)]
    );
    assert!(saved.files.iter().all(|f| f.size == std::fs::metadata(image.join(&f.name)).unwrap().len()));
    assert!(saved.memory_bytes > 1 << 20);
    // A retry after a lost answer finds the same.
    assert_eq!(first.checkpoint(&who, &image, Mode::Stop).await.unwrap().files, saved.files);
    first.wait_phase(Phase::Empty).await;
    first.terminate(&who).await.unwrap();
    assert_eq!(first.dial(&who, 0).unwrap_err().0, Code::Stale);
    first.wait_prepared().await;
    assert_eq!(first.cgroup.children().len(), 2, "the ateom and the next, no more");

    // Elsewhere, with other late-bound content.
    let who = second.assignment("alice", 2);
    let compatibility = saved.compatibility.unwrap();
    let spec = second.counter();
    std::fs::write(second.dir.path().join("ate/name"), "second\n").unwrap();
    let before = Instant::now();
    let restored = second.restore(&who, spec, &image, &compatibility).await.unwrap();
    println!("wake {:.1} ms: {}", before.elapsed().as_secs_f64() * 1e3, steps(&restored.steps));
    assert_eq!(second.count(&who), (3, nonce));
    let (code, out, _) = second.exec(&who, sh("cat /run/ate/name"), b"").await;
    assert_eq!((code, out.as_str()), (0, "second\n"));

    second.terminate(&who).await.unwrap();
    second.terminate(&who).await.unwrap();
    first.shutdown().await;
    second.shutdown().await;
}

#[tokio::test]
async fn a_checkpoint_while_serving_resets_nothing() {
    let mut worker = Worker::start("keep").await;
    let who = worker.assignment("alice", 1);
    worker.run(&who, worker.counter()).await.unwrap();
    let (_, nonce) = worker.count(&who);
    // A connection is open across it, with a request half sent.
    let mut open = worker.dial(&who, 0).unwrap();
    std::io::Write::write_all(&mut open, b"GET / HT").unwrap();
    let image = worker.dir.path().join("image");
    let idle = CheckpointRequest {
        assignment: Some(who.clone()),
        directory: image.display().to_string(),
        mode: Mode::KeepRunning.into(),
        only_if_idle: true,
        drain_ms: 0,
    };
    std::fs::create_dir_all(&image).unwrap();
    let refused = worker.client.checkpoint(idle).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(refused.message().contains("1 requests in flight"), "{refused}");
    let saved = worker.checkpoint(&who, &image, Mode::KeepRunning).await.unwrap();
    println!("keep: {}", steps(&saved.steps));
    std::io::Write::write_all(&mut open, b"TP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut open, &mut answer).unwrap();
    assert!(answer.contains("\"count\": 2"), "{answer}");
    assert_eq!(worker.count(&who), (3, nonce.clone()));

    // The image is of the moment it was taken; the later count is lost with the copy.
    worker.terminate(&who).await.unwrap();
    let who = worker.assignment("alice", 2);
    worker.restore(&who, worker.counter(), &image, &saved.compatibility.unwrap()).await.unwrap();
    assert_eq!(worker.count(&who), (2, nonce));
    worker.terminate(&who).await.unwrap();
    worker.shutdown().await;
}

#[tokio::test]
async fn processes_in_the_actor_have_streams_users_codes_and_a_terminal() {
    let mut worker = Worker::start("exec").await;
    let who = worker.assignment("alice", 1);
    worker.run(&who, worker.counter()).await.unwrap();
    let (code, out, err) = worker.exec(&who, sh("cat; echo oops >&2; id -u; exit 7"), b"hello\n").await;
    assert_eq!((code, out.as_str(), err.as_str()), (7, "hello\n1000\n", "oops\n"));
    let mut start = sh("echo $X; pwd; id -u; id -g; kill -9 $$");
    start.env.insert("X".into(), "y".into());
    start.user = "5:6".into();
    start.working_dir = "/tmp".into();
    let (code, out, _) = worker.exec(&who, start, b"").await;
    assert_eq!((code, out.as_str()), (137, "y\n/tmp\n5\n6\n"));
    let nothing = substrate_proto::types::ExecStart {
        command: vec!["/bin/does-not-exist".into()],
        ..Default::default()
    };
    assert_eq!(worker.exec(&who, nothing, b"").await.0, 127);
    let mut terminal = sh("stty size; tty -s && echo tty");
    terminal.tty = true;
    terminal.size = Some(substrate_proto::types::TerminalSize { rows: 10, columns: 44 });
    let (code, out, _) = worker.exec(&who, terminal, b"").await;
    assert_eq!((code, out.replace('\r', "").as_str()), (0, "10 44\ntty\n"));
    let big = "x".repeat(300_000);
    let (code, out, _) = worker.exec(&who, sh("cat"), big.as_bytes()).await;
    assert_eq!((code, out.len()), (0, big.len()));

    // One whose client goes away is killed.
    let start = substrate_proto::types::ExecStart {
        assignment: Some(who.clone()),
        command: ["/bin/sleep", "1000"].map(str::to_owned).into(),
        ..Default::default()
    };
    // A stream that is still open: its end alone would only be the end of the process's input.
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let input = Some(substrate_proto::types::exec_input::Input::Start(start));
    sender.send(substrate_proto::types::ExecInput { input }).await.unwrap();
    let input = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut output = worker.client.exec(input).await.unwrap().into_inner();
    assert!(matches!(
        output.message().await.unwrap().unwrap().output,
        Some(substrate_proto::types::exec_output::Output::Started(true))
    ));
    drop((output, sender));
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let (_, out, _) = worker.exec(&who, sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '"), b"").await;
        if !out.contains("sleep 1000") {
            break;
        }
        assert!(Instant::now() < deadline, "it still runs: {out}");
    }
    worker.terminate(&who).await.unwrap();
    worker.shutdown().await;
}

#[tokio::test]
async fn a_workload_that_ends_leaves_its_code_and_its_log() {
    let mut worker = Worker::start("exit").await;
    let who = worker.assignment("alice", 1);
    // Ready when it runs: the answer may be either, the outcome is the same.
    drop(worker.run(&who, worker.program(&["/bin/sh", "-c", "echo said; exit 42"])).await);
    let status = worker.wait_phase(Phase::Exited).await;
    let exit = status.exit.unwrap();
    assert_eq!((exit.code, exit.signal, exit.container.as_str()), (42, 0, "counter"));
    assert!(exit.time_ms > 1_600_000_000_000);
    let log = std::fs::read_to_string(worker.dir.path().join("logs/counter.log")).unwrap();
    assert_eq!(log, "said\n");
    let refused = worker.checkpoint(&who, &worker.dir.path().join("i"), Mode::Stop).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Aborted, "{refused}");
    worker.terminate(&who).await.unwrap();
    worker.wait_phase(Phase::Empty).await;

    // A command that is not there.
    let who = worker.assignment("alice", 2);
    let refused = worker.run(&who, worker.program(&["/bin/nope"])).await.unwrap_err();
    assert!(refused.message().contains("not in the image"), "{refused}");
    worker.wait_phase(Phase::Empty).await;

    // One that is never ready, within its own time.
    let who = worker.assignment("alice", 3);
    let mut spec = worker.counter();
    spec.containers[0].readiness.as_mut().unwrap().timeout = "1s".into();
    spec.containers[0].readiness.as_mut().unwrap().http_get.as_mut().unwrap().path = "/no".into();
    let refused = worker.run(&who, spec).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::DeadlineExceeded);
    assert!(refused.message().contains("404"), "{refused}");
    worker.wait_phase(Phase::Empty).await;
    worker.shutdown().await;
}

#[tokio::test]
async fn several_containers_share_one_sandbox_and_come_back_together() {
    let mut worker = Worker::start("multi").await;
    let who = worker.assignment("alice", 1);
    let mut spec = worker.counter();
    let mut side = spec.containers[0].clone();
    side.name = "side".into();
    side.env = ["PATH=/usr/bin:/bin", "PORT=9090"].map(str::to_owned).into();
    side.readiness.as_mut().unwrap().http_get.as_mut().unwrap().port = 9090;
    spec.containers.push(side);
    worker.run(&who, spec.clone()).await.unwrap();
    worker.dial(&who, 9090).unwrap();
    assert_eq!(worker.dial(&who, 9091).unwrap_err().0, Code::Refused);
    worker.count(&who);
    let image = worker.dir.path().join("image");
    let saved = worker.checkpoint(&who, &image, Mode::Stop).await.unwrap();
    let who = worker.assignment("alice", 2);
    let restored = worker.restore(&who, spec, &image, saved.compatibility.as_ref().unwrap()).await.unwrap();
    println!("wake 2: {}", steps(&restored.steps));
    assert_eq!(worker.count(&who).0, 2);
    worker.dial(&who, 9090).unwrap();

    // The end of one that is not the main container is told, and not the actor's.
    let mut events = worker.client.watch(WatchRequest {}).await.unwrap().into_inner();
    let end = substrate_proto::types::ExecStart { container: "side".into(), ..sh("kill -9 1") };
    worker.exec(&who, end, b"").await;
    let told = tokio::time::timeout(Duration::from_secs(10), async {
        loop {
            if let Some(slot_event::Event::Notice(notice)) = events.message().await.unwrap().unwrap().event {
                return notice;
            }
        }
    });
    let notice = told.await.unwrap();
    assert!(notice.reason == "CONTAINER_EXITED" && notice.message.contains("side"), "{notice:?}");
    drop(events);
    assert_eq!(worker.count(&who).0, 3);
    worker.terminate(&who).await.unwrap();
    worker.shutdown().await;
}

#[tokio::test]
async fn snapshots_that_do_not_fit_are_refused_before_anything_runs() {
    let mut worker = Worker::start("compat").await;
    let who = worker.assignment("alice", 1);
    worker.run(&who, worker.counter()).await.unwrap();
    let image = worker.dir.path().join("image");
    let saved = worker.checkpoint(&who, &image, Mode::Stop).await.unwrap();
    let good = saved.compatibility.unwrap();
    let who = worker.assignment("alice", 2);
    let mut other = worker.counter();
    other.containers[0].working_dir = "/".into();
    let refused = worker.restore(&who, other, &image, &good).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(refused.message().contains("spec_digest"), "{refused}");
    let mut wrong = good.clone();
    wrong.runtime_digest = "0".repeat(64);
    let refused = worker.restore(&who, worker.counter(), &image, &wrong).await.unwrap_err();
    assert!(refused.message().contains("runtime_digest"), "{refused}");
    assert_eq!(worker.status().await.phase(), Phase::Empty);

    // Truncated: runsc says so, and the slot is free again.
    let pages = std::fs::OpenOptions::new().write(true).open(image.join("pages.img")).unwrap();
    let length = pages.metadata().unwrap().len();
    pages.set_len(length / 2).unwrap();
    let refused = worker.restore(&who, worker.counter(), &image, &good).await.unwrap_err();
    assert!(refused.message().contains("damaged"), "{refused}");
    worker.wait_phase(Phase::Empty).await;
    worker.wait_prepared().await;
    worker.shutdown().await;
}
