// SPDX-License-Identifier: Apache-2.0
//! Replays the corpus of `fuzz/` for manifests of snapshots, and each input cut short and with single bits flipped.
#![forbid(unsafe_code)]

#[path = "../../fuzz/src/manifest.rs"]
mod manifest;

use std::path::Path;

use atelet::snapshot::DataKey;
use atelet::snapshot::manifest::{Block, Body, File, Header, Pack, Wrapped, encode};
use prost::Message as _;

/// A manifest as it lies in a blob store, and one before it is sealed. `WRITE_CORPUS=1` writes them anew.
fn seeds() -> [(&'static str, Vec<u8>); 2] {
    let wrapped = || Some(Wrapped { version: 1, sealed: vec![1; 72] });
    let pack = Pack {
        key: "actors/u-1/packs/p1".into(),
        actor_uid: "u-1".into(),
        snapshot_id: "s-1".into(),
        wrapped: wrapped(),
        length: 4_096,
    };
    let header = Header {
        atespace: "team".into(),
        actor_uid: "u-1".into(),
        snapshot_id: "s-1".into(),
        generation: 3,
        wrapped: wrapped(),
        packs: vec![pack],
    };
    let block =
        Block { number: 0, pack: 0, index: 0, offset: 0, stored: 100, raw: false, digest: vec![3; 32] };
    let file = File {
        name: "pages.img".into(),
        kind: 1,
        size: 65_536,
        digest: vec![4; 32],
        block_size: 65_536,
        blocks: vec![block],
    };
    let body = Body { time_ms: 1, memory_bytes: 2, files: vec![file], ..Default::default() };
    let head = header.encode_to_vec();
    let open = [vec![1, head.len() as u8], head, body.encode_to_vec()].concat();
    let stored = encode(&header, &body, &DataKey::random().unwrap()).unwrap();
    [("stored", [vec![0], stored].concat()), ("open", open)]
}

#[test]
fn the_corpus_and_its_mutations_are_survived() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/manifest");
    if std::env::var_os("WRITE_CORPUS").is_some() {
        for (name, bytes) in seeds() {
            std::fs::write(dir.join(name), bytes).unwrap();
        }
    }
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 2, "the corpus is gone: run with WRITE_CORPUS=1");
    for path in files {
        let input = std::fs::read(&path).unwrap();
        manifest::check(&input);
        for end in 0..input.len() {
            manifest::check(&input[..end]);
        }
        for bit in 0..input.len() * 8 {
            let mut flipped = input.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            manifest::check(&flipped);
        }
    }
}
