// SPDX-License-Identifier: Apache-2.0
//! What keeps snapshots: a store that is damaged, slow or gone loses no actor and brings none back wrongly (P2, P3);
//! collection and verification while everything goes on.
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use substrate_integration::{Machine, PATIENCE, actor, files_below, workspace};
use substrate_proto::ateapi::{self, ActorState};
use substrate_proto::types::Durability;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;

#[path = "../../../atelet/src/blob/s3_server.rs"]
mod s3_server;

/// Directories of an actor's snapshots in a blob store, oldest first.
fn snapshots(blobs: &Path, uid: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(blobs.join("actors").join(uid))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).context("name")?;
        let generation: u64 = name.split_once('-').context("no generation")?.0.parse()?;
        found.push((generation, path));
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

fn pack(snapshot: &Path) -> Result<PathBuf> {
    files_below(&snapshot.join("packs"))?.pop().context("no pack")
}

fn flipped(mut content: Vec<u8>) -> Vec<u8> {
    let middle = content.len() / 2;
    content[middle] ^= 1;
    content
}

type Change = Box<dyn Fn(Vec<u8>) -> Option<Vec<u8>>>;

/// Damages of stored files: what, which file, what becomes of it.
fn damages(own: &Path, older: &Path, other: &Path) -> Result<Vec<(&'static str, PathBuf, Change)>> {
    let (pack, manifest) = (pack(own)?, own.join("manifest"));
    let instead = |dir: &Path| -> Result<Change> {
        let content = std::fs::read(dir.join("manifest"))?;
        Ok(Box::new(move |_| Some(content.clone())))
    };
    Ok(vec![
        ("a flipped bit of a block", pack.clone(), Box::new(|content| Some(flipped(content)))),
        ("a truncated block", pack.clone(), Box::new(|content| Some(content[..content.len() - 1].to_vec()))),
        (
            "swapped blocks",
            pack.clone(),
            Box::new(|mut content| {
                let body = &mut content[12..];
                let half = body.len() / 2;
                body.rotate_left(half);
                Some(content)
            }),
        ),
        ("a missing pack", pack, Box::new(|_| None)),
        ("a flipped bit of the manifest", manifest.clone(), Box::new(|content| Some(flipped(content)))),
        (
            "a newer format",
            manifest.clone(),
            Box::new(|mut content| {
                content[8] = 9;
                Some(content)
            }),
        ),
        ("an older manifest", manifest.clone(), instead(older)?),
        ("another actor's manifest", manifest.clone(), instead(other)?),
        ("a missing manifest", manifest, Box::new(|_| None)),
    ])
}

#[tokio::test(flavor = "multi_thread")]
async fn every_damage_is_refused_before_a_guest_runs_and_a_verb_leads_on() -> Result<()> {
    let mut machine = Machine::start(2, &[]).await?;
    machine.counter("other", |_| ()).await?;
    machine.suspend("other").await?;
    machine.counter("one", |_| ()).await?;
    machine.count("one").await?;
    machine.suspend("one").await?;
    let (count, nonce) = machine.count("one").await?;
    let snapshot = machine.suspend("one").await?.snapshot.context("no snapshot")?;
    let (uid, other) = (machine.get("one").await?.uid, machine.get("other").await?.uid);
    let (blobs, node) = (machine.dir.join("blobs"), machine.dir.join("node/snapshots").join(&uid));
    let mut own = snapshots(&blobs, &uid)?;
    let (latest, older) = (own.pop().context("no snapshot")?, own.pop().context("no older snapshot")?);
    let others = snapshots(&blobs, &other)?.pop().context("no snapshot of the other")?;
    let prepared = settled(&machine).await?;

    let refused = async |machine: &mut Machine, what: &str| -> Result<()> {
        // The durable copy is what is left.
        if node.exists() {
            std::fs::remove_dir_all(&node)?;
        }
        let error = machine.resume("one").await.err().with_context(|| format!("{what} was not noticed"))?;
        let text = format!("{error:#}");
        ensure!(text.contains(&snapshot.id) || text.contains("key"), "{what}: unclear: {text}");
        // A restore would have used up one of the sandboxes that are prepared.
        ensure!(settled(machine).await? == prepared, "{what}: a sandbox was touched");
        let now = machine.get("one").await?;
        match now.state() {
            ActorState::Suspended => {}
            ActorState::Crashed => {
                let request = ateapi::RevertActorRequest {
                    actor: Some(actor("one")),
                    snapshot: snapshot.id.clone(),
                    ..Default::default()
                };
                machine.api.revert_actor(request).await?;
                ensure!(machine.get("one").await?.state() == ActorState::Suspended, "{what}: reverted");
            }
            state => bail!("{what}: it is {state:?}: {text}"),
        }
        Ok(())
    };
    for (what, path, change) in damages(&latest, &older, &others)? {
        let good = std::fs::read(&path)?;
        match change(good.clone()) {
            Some(bad) => std::fs::write(&path, bad)?,
            None => std::fs::remove_file(&path)?,
        }
        let told = machine.cli(&["fsck", "--dir", machine.dir.to_str().context("path")?])?;
        let told = (told.status.code(), String::from_utf8_lossy(&told.stdout).into_owned());
        ensure!(told.0 == Some(1) && told.1.contains(&snapshot.id), "{what}: fsck said {told:?}");
        let outcome = refused(&mut machine, what).await;
        std::fs::write(&path, good)?;
        outcome?;
    }
    // The key: lost, and another one in its place.
    let (key, aside) = (machine.dir.join("keys/atespaces/default.key"), machine.dir.join("aside.key"));
    std::fs::rename(&key, &aside)?;
    refused(&mut machine, "a lost key").await?;
    let rotated = machine.cli(&["rotate-key", "--dir", machine.dir.to_str().context("path")?])?;
    ensure!(rotated.status.success(), "{rotated:?}");
    refused(&mut machine, "a wrong key").await?;
    std::fs::rename(&aside, &key)?;
    ensure!(machine.count("one").await? == (count + 1, nonce.clone()), "it is not what it was");

    // The only copy of what was paused, on the node: refused and named; revert leads on, to what is durable.
    machine
        .api
        .pause_actor(ateapi::PauseActorRequest { actor: Some(actor("one")), ..Default::default() })
        .await?;
    let pages = machine.latest_on_node(&uid)?.join("files/pages.img");
    std::fs::write(&pages, flipped(std::fs::read(&pages)?))?;
    let error = machine.resume("one").await.err().context("damaged memory was restored")?;
    ensure!(format!("{error:#}").contains("pages.img"), "{error:#}");
    ensure!(machine.get("one").await?.state() == ActorState::Crashed);
    let request = ateapi::RevertActorRequest {
        actor: Some(actor("one")),
        snapshot: snapshot.id.clone(),
        ..Default::default()
    };
    machine.api.revert_actor(request).await?;
    ensure!(machine.count("one").await? == (count + 1, nonce), "it did not go back to what is durable");
    let events = machine.events("one").await?;
    ensure!(events.iter().any(|(reason, _)| reason == "Reverted"), "nothing was said: {events:?}");
    machine.stop()
}

/// The processes of prepared sandboxes, once there are as many as workers.
async fn settled(machine: &Machine) -> Result<Vec<i32>> {
    let mut last = Vec::new();
    for _ in 0..600 {
        let mut now = machine.sandboxes(None);
        now.sort_unstable();
        if now.len() == 2 && now == last {
            return Ok(now);
        }
        last = now;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("no two sandboxes: {last:?}")
}

/// Between a machine and its bucket: holds requests back while it is shut.
struct Gate {
    address: SocketAddr,
    open: watch::Sender<bool>,
    held: Arc<AtomicUsize>,
}

impl Gate {
    async fn before(server: SocketAddr) -> Result<Self> {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (open, _) = watch::channel(true);
        let held = Arc::new(AtomicUsize::new(0));
        let (state, counter) = (open.clone(), Arc::clone(&held));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (mut opened, held) = (state.subscribe(), Arc::clone(&counter));
                tokio::spawn(async move {
                    let Ok(server) = tokio::net::TcpStream::connect(server).await else { return };
                    let (mut from_client, mut to_client) = client.into_split();
                    let (mut from_server, mut to_server) = server.into_split();
                    tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
                    let mut piece = vec![0; 64 << 10];
                    while let Ok(length @ 1..) = from_client.read(&mut piece).await {
                        if !*opened.borrow() {
                            held.fetch_add(1, Ordering::SeqCst);
                        }
                        if opened.wait_for(|open| *open).await.is_err()
                            || to_server.write_all(&piece[..length]).await.is_err()
                        {
                            return;
                        }
                    }
                });
            }
        });
        Ok(Self { address, open, held })
    }

    fn shut(&self) {
        self.held.store(0, Ordering::SeqCst);
        self.open.send_replace(false);
    }
}

/// Waits for something about an actor.
async fn until(machine: &mut Machine, name: &str, fits: impl Fn(&ateapi::Actor) -> bool) -> Result<()> {
    let begun = Instant::now();
    loop {
        let now = machine.get(name).await?;
        if fits(&now) {
            return Ok(());
        }
        ensure!(begun.elapsed() < PATIENCE, "it did not come to that: {now:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn is_durable(actor: &ateapi::Actor) -> bool {
    actor.last_snapshot.as_ref().is_some_and(|snapshot| snapshot.durability() == Durability::Durable)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_is_slow_delays_no_wake_up_and_one_that_loses_an_object_is_told() -> Result<()> {
    let Some(server) = s3_server::Server::start(&workspace().join("target/tools/weed")) else {
        return Ok(());
    };
    let gate = Gate::before(server.address).await?;
    let root = tempfile::Builder::new().prefix("sub-").tempdir_in("/tmp")?;
    let path = |name: &str| root.path().join(name).to_string_lossy().into_owned();
    std::fs::write(
        path("substrate.toml"),
        format!("[node]\nblobs = \"s3://bucket/m?endpoint=http://{}\"\n", gate.address),
    )?;
    let environment = [("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "secret")];
    let config = ["--config", &path("substrate.toml")];
    let mut machine = Machine::start_with(path("d").into(), None, 2, &config, &environment).await?;
    machine.counter("quick", |_| ()).await?;
    let (count, nonce) = machine.count("quick").await?;

    // The upload hangs; whoever wants the actor does not wait for it.
    gate.shut();
    let mut api = machine.api.clone();
    let suspend = tokio::spawn(async move {
        api.suspend_actor(ateapi::SuspendActorRequest { actor: Some(actor("quick")), ..Default::default() })
            .await
    });
    until(&mut machine, "quick", |now| now.state() == ActorState::Suspending && now.last_snapshot.is_some())
        .await?;
    let begun = Instant::now();
    while gate.held.load(Ordering::SeqCst) == 0 {
        ensure!(begun.elapsed() < PATIENCE, "the upload did not begin");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let begun = Instant::now();
    ensure!(machine.count("quick").await? == (count + 1, nonce.clone()), "not the memory it had");
    eprintln!("awake {:?} after the request, the store still silent", begun.elapsed());
    ensure!(!is_durable(&machine.get("quick").await?), "the gate leaks: this shows nothing");
    let answer = suspend.await??.into_inner();
    ensure!(answer.snapshot.context("no snapshot")?.durability() == Durability::Node);
    gate.open.send_replace(true);
    until(&mut machine, "quick", is_durable).await?;
    let (count, nonce) = machine.count("quick").await?;
    let snapshot = machine.suspend("quick").await?.snapshot.context("no snapshot")?;
    ensure!(snapshot.durability() == Durability::Durable, "{snapshot:?}");

    // All of it, verified from the bucket alone; and a copy of it elsewhere.
    let dir = path("d");
    let run = |machine: &Machine, args: &[&str]| -> Result<(Option<i32>, String)> {
        let output = machine.cli(&[args, &["--dir", &dir], &config].concat())?;
        Ok((
            output.status.code(),
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
        ))
    };
    let (code, text) = run(&machine, &["fsck"])?;
    ensure!(code == Some(0) && text.contains("all sound"), "{code:?} {text}");
    let (code, text) = run(&machine, &["backup", "--to", &path("b")])?;
    ensure!(code == Some(0), "{code:?} {text}");
    let (code, text) = run(&machine, &["gc", "--dry-run"])?;
    ensure!(code == Some(0) && text.contains("would delete 0 objects"), "{code:?} {text}");
    // Without the configuration a backup cannot know of the bucket: it says what it lacks, and why that may be.
    let output = machine.cli(&["backup", "--dir", &dir, "--to", &path("b2")])?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && text.contains("--config"), "{text}");

    // The bucket loses an object.
    let uid = machine.get("quick").await?.uid;
    let latest = snapshots(&Path::new(&path("b")).join("blobs"), &uid)?.pop().context("no snapshot")?;
    let lost = pack(&latest)?;
    let lost = lost.strip_prefix(Path::new(&path("b")).join("blobs"))?.to_str().context("name")?;
    server.lose(&format!("m/{lost}"));
    let (code, text) = run(&machine, &["fsck", "--quick"])?;
    ensure!(
        code == Some(1) && text.contains(lost) && text.contains("is not in the blob store"),
        "{code:?} {text}"
    );
    std::fs::remove_dir_all(machine.dir.join("node/snapshots").join(&uid))?;
    let error = machine.resume("quick").await.err().context("it was restored from nothing")?;
    ensure!(format!("{error:#}").contains(&snapshot.id), "{error:#}");
    machine
        .api
        .reset_actor(ateapi::ResetActorRequest { actor: Some(actor("quick")), ..Default::default() })
        .await?;
    ensure!(machine.count("quick").await?.0 == 1);
    machine.stop()?;

    // The backup holds what the bucket lost; a machine restored from it goes on without the bucket.
    let output = machine.cli(&["restore", "--from", &path("b"), "--dir", &path("r")])?;
    ensure!(output.status.success(), "{output:?}");
    let mut restored = Machine::start_in(path("r").into(), None, 2, &[]).await?;
    ensure!(restored.count("quick").await? == (count + 1, nonce));
    restored.stop()
}

#[tokio::test(flavor = "multi_thread")]
async fn collection_in_a_loop_takes_nothing_that_is_needed() -> Result<()> {
    let mut machine = Machine::start(3, &[]).await?;
    machine.counter("origin", |_| ()).await?;
    let (mut count, nonce) = machine.count("origin").await?;
    machine.suspend("origin").await?;
    // What uploads and actors that are no more left behind.
    let dir = machine.dir.clone();
    let stray = dir.join("blobs/actors/gone/1-s/packs/p");
    let bundle = dir.join("node/actors/gone/volumes/v");
    let snapshot = dir.join("node/snapshots/gone/s");
    std::fs::create_dir_all(stray.parent().context("parent")?)?;
    std::fs::write(&stray, "of an upload that died")?;
    std::fs::create_dir_all(&bundle)?;
    std::fs::create_dir_all(&snapshot)?;
    let said = machine.cli(&["gc", "--dry-run", "--dir", dir.to_str().context("path")?])?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    for what in ["would delete actors/gone/1-s/packs/p", "actor gone"] {
        ensure!(said.contains(what), "gc --dry-run does not say {what:?}: {said}");
    }
    ensure!(stray.exists() && bundle.exists() && snapshot.exists(), "a dry run deleted something");

    let over = Arc::new(AtomicBool::new(false));
    let sweeps = {
        let (over, program) = (Arc::clone(&over), substrate_integration::binary("substrate")?);
        let dir = dir.clone();
        tokio::task::spawn_blocking(move || -> Result<u32> {
            let mut sweeps = 0;
            while !over.load(Ordering::SeqCst) {
                for verb in ["gc", "fsck"] {
                    let output =
                        std::process::Command::new(&program).args([verb, "--dir"]).arg(&dir).output()?;
                    ensure!(output.status.success(), "{verb}: {output:?}");
                }
                sweeps += 1;
            }
            Ok(sweeps)
        })
    };
    let worked: Result<()> = async {
        for round in 0..5 {
            // Each fork goes on from the origin's memory, by itself.
            let name = format!("fork{round}");
            machine
                .api
                .fork_actor(ateapi::ForkActorRequest {
                    actor: Some(actor("origin")),
                    new_name: name.clone(),
                    ..Default::default()
                })
                .await?;
            ensure!(
                machine.count(&name).await? == (count + 1, nonce.clone()),
                "{name} is not what was forked"
            );
            machine.suspend(&name).await?;
            ensure!(machine.count("origin").await? == (count + 1, nonce.clone()), "round {round}");
            count += 1;
            machine.suspend("origin").await?;
            ensure!(machine.count(&name).await? == (count + 1, nonce.clone()), "{name} after a sweep");
            machine.suspend(&name).await?;
            if round % 2 == 0 {
                let delete = ateapi::DeleteActorRequest { actor: Some(actor(&name)), ..Default::default() };
                machine.api.delete_actor(delete).await?;
            }
        }
        Ok(())
    }
    .await;
    over.store(true, Ordering::SeqCst);
    let sweeps = sweeps.await??;
    worked.with_context(|| format!("after {sweeps} sweeps"))?;
    ensure!(sweeps > 1, "it was hardly swept");
    eprintln!("{sweeps} sweeps");
    ensure!(!stray.exists() && !bundle.exists() && !snapshot.exists(), "garbage is left");
    // Everything that is left can be restored, from the store alone.
    machine.stop()?;
    std::fs::remove_dir_all(dir.join("node/snapshots"))?;
    machine.restart().await?;
    ensure!(machine.count("origin").await? == (count + 1, nonce.clone()));
    ensure!(machine.count("fork1").await?.1 == nonce && machine.count("fork3").await?.1 == nonce);
    machine.stop()
}
