// SPDX-License-Identifier: Apache-2.0
//! What `bench/snapshot` measures of the node agent: from a checkpoint's files to a committed manifest in a local blob
//! store, and back into files. One line of JSON on stdout for each command.
//!
//! ```text
//! snapshot_bench DIR save CHECKPOINT-DIR ID GENERATION [PARENT-ID PARENT-GENERATION PARENT-DIGEST]
//! snapshot_bench DIR load ID GENERATION DIGEST      into a node of its own; prints where the files are
//! snapshot_bench DIR hash CHECKPOINT-DIR            only the digests of the files
//! ```
//!
//! `cpu_s` is user and system time of all of it.
//!
//! `SNAPSHOT_BENCH_BLOCK`: bytes of a block of memory, to compare sizes.
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use atelet::blob::LocalStore;
use atelet::snapshot::digest::of_file;
use atelet::snapshot::node::{Draft, NodeSnapshots};
use atelet::snapshot::restore::{Durable, Wanted};
use atelet::snapshot::{FileKeyStore, FileKind};
use substrate_proto::types::Compatibility;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const ACTOR: &str = "bench";
const ATESPACE: &str = "bench";

fn wanted(id: &str, generation: &str, digest: &str) -> Outcome<Wanted> {
    Ok(Wanted {
        atespace: ATESPACE.into(),
        actor_uid: ACTOR.into(),
        snapshot_id: id.into(),
        generation: generation.parse()?,
        manifest_digest: digest.into(),
    })
}

async fn save(
    durable: &Durable,
    node: &NodeSnapshots,
    from: &Path,
    id: &str,
    generation: &str,
    parent: &[String],
) -> Outcome<serde_json::Value> {
    let staging = node.stage(ACTOR, id)?;
    let mut files = Vec::new();
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name().into_string().map_err(|_| "a file's name is not text")?;
        let kind = if name == "pages.img" { FileKind::Memory } else { FileKind::State };
        let path = staging.path(kind, &name);
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
        // Moved, as if the runtime had written it there.
        std::fs::rename(entry.path(), &path)?;
        files.push((kind, name, std::fs::metadata(&path)?.len()));
    }
    let draft = Draft {
        snapshot_id: id.into(),
        actor_uid: ACTOR.into(),
        generation: generation.parse()?,
        time_ms: 0,
        memory_bytes: 0,
        compatibility: Compatibility::default(),
    };
    let begun = Instant::now();
    let made = node.commit(&staging, draft, &files)?;
    let commit = begun.elapsed();
    let begun = Instant::now();
    let mut parents = Vec::new();
    if let [id, generation, digest] = parent {
        parents.push(durable.manifest(&wanted(id, generation, digest)?).await?);
    }
    let uploaded = durable.upload(&made, ATESPACE, &parents).await?;
    Ok(serde_json::json!({
        "commit_s": commit.as_secs_f64(), "upload_s": begun.elapsed().as_secs_f64(), "bytes": uploaded.bytes,
        "stored_bytes": uploaded.stored_bytes, "digest": uploaded.manifest_digest, "packs": uploaded.packs.len(),
    }))
}

async fn run() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (dir, args) = args.split_first().ok_or("a directory is missing")?;
    let dir = PathBuf::from(dir);
    let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let keys = Arc::new(FileKeyStore::open(&dir.join("keys"))?);
    let store = Arc::new(LocalStore::open(&dir.join("blobs"))?);
    let durable = Durable::new(store, keys, threads);
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let answer = match words.as_slice() {
        ["save", from, id, generation, ..] => {
            let mut node = NodeSnapshots::open(&dir.join("node"), threads)?;
            if let Ok(block) = std::env::var("SNAPSHOT_BENCH_BLOCK") {
                node = node.with_memory_block(block.parse()?);
            }
            save(&durable, &node, Path::new(from), id, generation, &args[4..]).await?
        }
        ["load", id, generation, digest] => {
            let node = NodeSnapshots::open(&dir.join("other"), threads)?;
            let begun = Instant::now();
            let fetched = durable.fetch(&node, &wanted(id, generation, digest)?).await?;
            serde_json::json!({"load_s": begun.elapsed().as_secs_f64(), "files": fetched.files_dir()})
        }
        ["hash", from] => {
            let begun = Instant::now();
            for entry in std::fs::read_dir(from)? {
                let file = std::fs::File::open(entry?.path())?;
                let size = file.metadata()?.len();
                of_file(&file, size, FileKind::Memory.block_size(size).into(), threads)?;
            }
            serde_json::json!({"hash_s": begun.elapsed().as_secs_f64()})
        }
        _ => return Err("see the top of snapshot_bench.rs".into()),
    };
    let mut answer = answer;
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF)?;
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    answer["cpu_s"] = (seconds(usage.user_time()) + seconds(usage.system_time())).into();
    println!("{answer}");
    Ok(())
}

#[tokio::main]
async fn main() {
    if let Err(error) = run().await {
        eprintln!("snapshot_bench: {error}");
        std::process::exit(1);
    }
}
