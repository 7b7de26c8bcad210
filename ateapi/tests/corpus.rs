// SPDX-License-Identifier: Apache-2.0
//! Replays the corpus of `fuzz/` for the API, and each input cut short and with single bits flipped.
#![forbid(unsafe_code)]

#[path = "../../fuzz/src/api.rs"]
mod api;

use std::path::Path;

use prost::Message as _;
use substrate_proto::{ateapi, types};

fn corpus() -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/api");
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// Seeds that reach deep: requests in which every field says something. `WRITE_CORPUS=1` writes them anew.
fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let with = |kind: u8, message: &dyn Fn() -> Vec<u8>| [vec![kind], message()].concat();
    let named =
        || Some(ateapi::ActorRef { atespace: "team".into(), name: "alice".into(), uid: String::new() });
    let spec = types::TemplateSpec {
        containers: vec![types::Container {
            name: "main".into(),
            image: "registry.example/app:1".into(),
            command: vec!["/app".into(), "run".into()],
            env: [("KEY".to_owned(), "value".to_owned())].into(),
            ports: vec![8080],
            readiness: Some(types::Readiness {
                http_get: Some(types::HttpGet { path: "/healthz".into(), port: 8080 }),
                ..Default::default()
            }),
            ..Default::default()
        }],
        idle: Some(types::IdlePolicy { suspend_after: "5m".into(), ..Default::default() }),
        checkpoint: Some(types::CheckpointPolicy {
            on_reply: "sync".into(),
            durability: "node".into(),
            max_hold: "2s".into(),
            max_heap: "256MiB".into(),
            interval: "5m".into(),
        }),
        ..Default::default()
    };
    let actor = types::ActorSpec {
        template: "t".into(),
        files: vec![types::File { path: "/run/key".into(), mode: 0o400, content: b"secret".to_vec() }],
        labels: [("app".to_owned(), "x".to_owned())].into(),
        ..Default::default()
    };
    let egress = types::EgressPolicy {
        allow: vec![types::EgressRule { host: "*.example.com".into(), ..Default::default() }],
    };
    vec![
        (
            "create-template",
            with(0, &|| {
                ateapi::CreateTemplateRequest {
                    atespace: "team".into(),
                    name: "t".into(),
                    spec: Some(spec.clone()),
                    request_id: "r-1".into(),
                    ..Default::default()
                }
                .encode_to_vec()
            }),
        ),
        ("template-spec", with(1, &|| spec.encode_to_vec())),
        (
            "create-actor",
            with(2, &|| {
                ateapi::CreateActorRequest {
                    atespace: "team".into(),
                    name: "alice".into(),
                    spec: Some(actor.clone()),
                    uid: "sandbox-1".into(),
                    ..Default::default()
                }
                .encode_to_vec()
            }),
        ),
        ("actor-spec", with(3, &|| actor.encode_to_vec())),
        (
            "update-actor",
            with(4, &|| {
                ateapi::UpdateActorRequest {
                    actor: named(),
                    egress: Some(egress.clone()),
                    ..Default::default()
                }
                .encode_to_vec()
            }),
        ),
        ("egress", with(5, &|| egress.encode_to_vec())),
        ("idle", with(6, &|| spec.idle.clone().unwrap_or_default().encode_to_vec())),
        ("checkpoint", with(7, &|| spec.checkpoint.clone().unwrap_or_default().encode_to_vec())),
        (
            "list-actors",
            with(8, &|| {
                ateapi::ListActorsRequest {
                    page_size: 5,
                    page_token: "dGVhbQBhbGljZQ".into(),
                    ..Default::default()
                }
                .encode_to_vec()
            }),
        ),
        (
            "tag",
            with(9, &|| {
                ateapi::TagSnapshotRequest { actor: named(), tag: "v1".into(), ..Default::default() }
                    .encode_to_vec()
            }),
        ),
        (
            "cordon",
            with(10, &|| ateapi::CordonWorkerRequest { id: "w1".into(), uncordon: false }.encode_to_vec()),
        ),
        (
            "other",
            with(11, &|| {
                ateapi::WatchRequest { kinds: vec!["actor".into()], ..Default::default() }.encode_to_vec()
            }),
        ),
    ]
}

#[test]
fn the_corpus_holds_the_seeds_and_every_input_and_its_mutations_are_survived() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/api");
    if std::env::var_os("WRITE_CORPUS").is_some() {
        for (name, bytes) in seeds() {
            std::fs::write(dir.join(name), bytes).unwrap();
        }
    }
    for (name, bytes) in seeds() {
        let kept = std::fs::read(dir.join(name)).unwrap_or_default();
        assert!(kept == bytes, "fuzz/corpus/api/{name} is not the seed any more: run with WRITE_CORPUS=1");
    }
    let corpus = corpus();
    assert!(corpus.len() >= seeds().len());
    for input in corpus {
        api::check(&input);
        for end in 0..input.len() {
            api::check(&input[..end]);
        }
        for bit in 0..input.len() * 8 {
            let mut flipped = input.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            api::check(&flipped);
        }
    }
}
