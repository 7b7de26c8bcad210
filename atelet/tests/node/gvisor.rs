// SPDX-License-Identifier: Apache-2.0
//! The node agent over real workers, real runsc and the counter image. Skipped, loudly, where one of them is missing:
//! `SUBSTRATE_RUNSC` (default: `target/tools/runsc`), `ateom-gvisor` beside the tests, `target/images/counter`.
use std::path::{Path, PathBuf};

use prost::Message as _;
use substrate_proto::atelet as api;
use substrate_proto::atenet::{IngressOpen, IngressOpened, ingress_opened};
use substrate_proto::ateom::checkpoint_request::Mode;
use substrate_proto::types::{Assignment, Container, HttpGet, Readiness, TemplateSpec, Volume, VolumeMount};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use crate::machine::{Machine, Running, assignment};
use crate::{checkpoint, release, source, upload};

fn real_machine(workers: usize) -> Option<Machine> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    let runsc = std::env::var_os("SUBSTRATE_RUNSC")
        .map_or_else(|| workspace.join("target/tools/runsc"), PathBuf::from);
    let ateom = std::env::current_exe().ok()?.parent()?.join("../ateom-gvisor");
    let image = workspace.join("target/images/counter");
    for (what, path) in [("runsc", &runsc), ("ateom-gvisor", &ateom), ("the counter image", &image)] {
        if !path.exists() {
            eprintln!("skipped: no {what} at {}", path.display());
            return None;
        }
    }
    let mut machine = Machine::new(workers)?;
    machine.config.ateom_binary = ateom.canonicalize().ok()?;
    machine.config.runsc = runsc.canonicalize().ok()?;
    machine.image = image;
    Some(machine)
}

fn template(machine: &Machine) -> TemplateSpec {
    TemplateSpec {
        containers: vec![Container {
            name: "main".into(),
            image: format!("oci:{}", machine.image.display()),
            ports: vec![8080],
            readiness: Some(Readiness {
                http_get: Some(HttpGet { path: "/healthz".into(), port: 8080 }),
                ..Readiness::default()
            }),
            volume_mounts: vec![VolumeMount {
                volume: "data".into(),
                path: "/data".into(),
                read_only: false,
            }],
            ..Container::default()
        }],
        volumes: vec![Volume { name: "data".into(), size: String::new() }],
        ..TemplateSpec::default()
    }
}

/// A GET through the worker's ingress.
async fn get(endpoint: &str, actor: &Assignment, path: &str) -> serde_json::Value {
    let mut stream = UnixStream::connect(endpoint.strip_prefix("unix:").unwrap()).await.unwrap();
    let open = IngressOpen {
        actor_uid: actor.actor_uid.clone(),
        generation: actor.generation,
        ..IngressOpen::default()
    };
    stream.write_all(&open.encode_length_delimited_to_vec()).await.unwrap();
    let length = stream.read_u8().await.unwrap();
    let mut opened = vec![0; length.into()];
    stream.read_exact(&mut opened).await.unwrap();
    let opened = IngressOpened::decode(opened.as_slice()).unwrap();
    assert_eq!(opened.code(), ingress_opened::Code::Ok, "{opened:?}");
    let request = format!("GET {path} HTTP/1.1\r\nHost: counter\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}

async fn start(node: &mut Running, request: api::ActivateRequest) -> api::ActivateResponse {
    let begun = std::time::Instant::now();
    let response = node.client.activate(request).await.unwrap().into_inner();
    let steps: Vec<_> = response.steps.iter().map(|step| format!("{} {}", step.name, step.micros)).collect();
    eprintln!("activate took {:?}: {}", begun.elapsed(), steps.join(", "));
    response
}

#[tokio::test(flavor = "multi_thread")]
async fn a_counter_goes_on_counting_across_workers_restarts_and_the_store() {
    let Some(machine) = real_machine(2) else { return };
    let mut node = machine.start(&[]).await;
    node.session.all_up(2).await;
    let mut actor = assignment("u1", 1, "w1");
    node.session.name(&actor);
    let request = |actor: &Assignment| api::ActivateRequest {
        template: Some(template(&machine)),
        ..machine.activate(actor)
    };
    let endpoint = start(&mut node, request(&actor)).await.ingress_endpoint;
    let first = get(&endpoint, &actor, "/").await;
    assert_eq!(first["count"], 1);
    let text = node
        .exec(&actor, &["/bin/sh", "-c", "cat /run/ate/name /run/token; echo kept > /data/f; id -u"])
        .await;
    // The file belongs to root and is 0400; the actor is not root.
    assert_eq!(text.unwrap(), "alice1000\n");

    // The agent is killed and started again: the actor goes on.
    node.kill();
    let mut node = machine.start(&[&actor]).await;
    node.session.all_up(2).await;
    assert_eq!(get(&endpoint, &actor, "/").await["count"], 2);

    // A checkpoint of an actor with volumes needs a stop.
    let error = node.client.checkpoint(checkpoint(&actor, "s0", Mode::KeepRunning)).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error}");

    let mut manifest = String::new();
    for (generation, worker, durable) in [(2, "w2", false), (3, "w1", true), (4, "w1", false)] {
        let id = format!("s{generation}");
        let begun = std::time::Instant::now();
        let made = node.client.checkpoint(checkpoint(&actor, &id, Mode::Stop)).await.unwrap().into_inner();
        let steps: Vec<_> = made.steps.iter().map(|step| format!("{} {}", step.name, step.micros)).collect();
        eprintln!("checkpoint took {:?}: {}", begun.elapsed(), steps.join(", "));
        let snapshot = made.snapshot.unwrap();
        node.client.release(release(&actor)).await.unwrap();
        if durable {
            let begun = std::time::Instant::now();
            let uploaded = node.client.upload(upload(&snapshot)).await.unwrap().into_inner();
            eprintln!(
                "upload of {} bytes as {} took {:?}",
                uploaded.bytes,
                uploaded.stored_bytes,
                begun.elapsed()
            );
            manifest = uploaded.manifest_digest;
            std::fs::remove_dir_all(machine.config.dir.join(format!("snapshots/u1/{id}"))).unwrap();
        }
        // Each life was asked once.
        let count = generation + 1;
        actor = assignment("u1", generation, worker);
        node.session.name(&actor);
        let mut restore = request(&actor);
        restore.snapshot = Some(source(
            &snapshot,
            if durable { &manifest } else { "" },
            if durable { "" } else { &snapshot.node_digest },
        ));
        let started = start(&mut node, restore).await;
        assert_eq!(started.restored_from, if durable { "durable" } else { "node" });
        let now = get(&started.ingress_endpoint, &actor, "/").await;
        assert_eq!((&now["count"], &now["nonce"]), (&serde_json::json!(count), &first["nonce"]));
        let text = node.exec(&actor, &["/bin/sh", "-c", "cat /data/f"]).await.unwrap();
        assert_eq!(text, "kept\n");
    }
    let mut logs = node
        .client
        .logs(api::LogsRequest { actor_uid: "u1".into(), ..api::LogsRequest::default() })
        .await
        .unwrap()
        .into_inner();
    let mut text = String::new();
    while let Some(chunk) = logs.message().await.unwrap() {
        text.push_str(&String::from_utf8(chunk.data).unwrap());
    }
    assert!(text.contains(first["nonce"].as_str().unwrap()), "{text}");

    // A bit flipped where runsc itself would not see it.
    let made = node.client.checkpoint(checkpoint(&actor, "s9", Mode::Stop)).await.unwrap().into_inner();
    let snapshot = made.snapshot.unwrap();
    let pages = machine.config.dir.join("snapshots/u1/s9/files/pages.img");
    let mut content = std::fs::read(&pages).unwrap();
    let middle = content.len() / 2;
    content[middle] ^= 1;
    std::fs::write(&pages, content).unwrap();
    let next = assignment("u1", 5, "w2");
    node.session.name(&next);
    let mut restore = request(&next);
    restore.snapshot = Some(source(&snapshot, "", &snapshot.node_digest));
    let error = node.client.activate(restore).await.unwrap_err();
    assert!(error.code() == tonic::Code::DataLoss && error.message().contains("pages.img"), "{error}");

    // A command that ends at once is an exit, not a failure of the node.
    let last = assignment("u2", 1, "w1");
    node.session.name(&last);
    let mut ends = request(&last);
    ends.template.as_mut().unwrap().containers[0].command =
        vec!["/bin/sh".into(), "-c".into(), "exit 7".into()];
    let error = node.client.activate(ends).await.unwrap_err();
    let info = tonic_types::StatusExt::get_details_error_info(&error).unwrap();
    assert_eq!((info.reason.as_str(), info.metadata["code"].as_str()), ("EXITED", "7"), "{error}");
    node.client.release(release(&last)).await.unwrap();
    node.stop().await;
    atelet::stop_workers(&machine.config).await.unwrap();
    assert!(!machine.group().is_populated().unwrap());
}
