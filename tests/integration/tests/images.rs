// SPDX-License-Identifier: Apache-2.0
//! Large images: once per node, so that the second actor of one is ready as fast as one of a small one, and as good as
//! any in a microVM.
//!
//! `SUBSTRATE_IMAGE_FILES` and `SUBSTRATE_IMAGE_MIB` set the large one's size (scripts/nightly: 100,000 files and 3 GiB,
//! gate 1.2; here 3,000 and 48 MiB, gate 1.5, because a debug build beside other tests is not a place to measure).
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use substrate_integration::{Machine, actor, counter_template, image, workspace};
use substrate_proto::{ateapi, types};

/// What is measured here is not measured beside the other.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
/// A file of the large image.
const SAMPLE: &str = "large/d7/f7";

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The counter image with a layer of that many files more, made by umoci; and what is in [`SAMPLE`].
fn enlarge(into: &Path, files: u64, mebibytes: u64) -> Result<(String, Vec<u8>)> {
    let small = image("counter")?;
    let small = small.trim_start_matches("oci:");
    let run = |program: &str, args: &[&str]| -> Result<()> {
        let output = Command::new(program)
            .args(args)
            .output()
            .with_context(|| format!("{program}: run scripts/setup"))?;
        ensure!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    let layout = into.join("large");
    let place = layout.to_str().context("path")?;
    run("cp", &["-a", small, place])?;
    let index: serde_json::Value = serde_json::from_slice(&std::fs::read(layout.join("index.json"))?)?;
    let tag = index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"]
        .as_str()
        .unwrap_or("latest");
    let tree = into.join("tree");
    let size = usize::try_from((mebibytes << 20) / files)?;
    // Not compressible, but made quickly: the same noise, turned.
    let noise: Vec<u8> = (0..size + 4096).map(|at| ((at * at) >> 7) as u8 ^ rand::random::<u8>()).collect();
    for number in 0..files {
        let dir = tree.join(format!("d{}", number % 200));
        if number < 200 {
            std::fs::create_dir_all(&dir)?;
        }
        let from = usize::try_from(number % 4096)?;
        std::fs::write(dir.join(format!("f{number}")), &noise[from..from + size])?;
    }
    run(
        "umoci",
        &["insert", "--image", &format!("{place}:{tag}"), tree.to_str().context("path")?, "/large"],
    )?;
    let sample = std::fs::read(tree.join("d7/f7"))?;
    std::fs::remove_dir_all(&tree)?;
    Ok((format!("oci:{place}:{tag}"), sample))
}

async fn template(machine: &mut Machine, name: &str, image: String) -> Result<()> {
    let spec = counter_template(image);
    let (atespace, name) = ("default".to_owned(), name.to_owned());
    machine
        .api
        .create_template(ateapi::CreateTemplateRequest {
            atespace,
            name,
            spec: Some(spec),
            ..Default::default()
        })
        .await?;
    Ok(())
}

/// From the request until the actor is ready.
async fn boot(machine: &mut Machine, template: &str) -> Result<Duration> {
    let name = format!("of-{template}");
    machine
        .api
        .create_actor(ateapi::CreateActorRequest {
            atespace: "default".into(),
            name: name.clone(),
            spec: Some(types::ActorSpec { template: template.into(), ..Default::default() }),
            ..Default::default()
        })
        .await?;
    let begun = Instant::now();
    machine.resume(&name).await?;
    let took = begun.elapsed();
    let request = ateapi::DeleteActorRequest { actor: Some(actor(&name)), ..Default::default() };
    machine.api.delete_actor(request).await?;
    Ok(took)
}

#[tokio::test]
async fn the_second_actor_of_a_large_image_is_as_fast_as_one_of_a_small_one() -> Result<()> {
    let _alone = ALONE.lock().await;
    let (files, mebibytes) = (setting("SUBSTRATE_IMAGE_FILES", 3000), setting("SUBSTRATE_IMAGE_MIB", 48));
    let gate = if files >= 100_000 { 1.2 } else { 1.5 };
    let root = tempfile::Builder::new().prefix("sub-").tempdir_in("/tmp")?;
    let (large, _) = enlarge(root.path(), files, mebibytes)?;
    let dir = root.path().join("d");
    let mut machine = Machine::start_in(dir, Some(root), 2, &[]).await?;
    machine.allow(Duration::from_mins(25));
    machine.ensure_atespace("default").await?;
    let begun = Instant::now();
    template(&mut machine, "large", large).await?;
    template(&mut machine, "small", image("counter")?).await?;
    let pulled = begun.elapsed();
    for which in ["large", "small"] {
        boot(&mut machine, which).await?;
    }
    let (mut of_large, mut of_small) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        of_large.push(boot(&mut machine, "large").await?);
        of_small.push(boot(&mut machine, "small").await?);
    }
    of_large.sort();
    of_small.sort();
    let ratio = of_large[4].as_secs_f64() / of_small[4].as_secs_f64();
    eprintln!(
        "{files} files, {mebibytes} MiB: pulled in {pulled:?}; a further actor is ready in {:?}, of the small image in \
         {:?}: ratio {ratio:.2}",
        of_large[4], of_small[4]
    );
    ensure!(ratio <= gate, "{ratio:.2} times as long as with a small image");
    Ok(())
}

/// A server on this machine that answers every request with the same words.
fn model() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            // Whatever is asked; who has gone does not want the answer.
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\ncontent-length: 8\r\n\r\nthe word");
        }
    });
    Ok(port)
}

/// What an actor's python prints.
fn python(machine: &Machine, actor: &str, script: &str) -> Result<String> {
    let output = machine.cli(&["exec", actor, "--", "/usr/bin/python3", "-S", "-c", script])?;
    ensure!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

#[tokio::test]
async fn a_microvm_of_a_large_image_serves_reaches_out_by_name_sleeps_and_wakes() -> Result<()> {
    let _alone = ALONE.lock().await;
    let (files, mebibytes) = (setting("SUBSTRATE_IMAGE_FILES", 3000), setting("SUBSTRATE_IMAGE_MIB", 48));
    let root = tempfile::Builder::new().prefix("sub-").tempdir_in("/tmp")?;
    let (large, sample) = enlarge(root.path(), files, mebibytes)?;
    let port = model()?;
    let config = root.path().join("up.toml");
    std::fs::write(
        &config,
        format!(
            "[[egress.published]]\nname = \"model.test\"\nport = {port}\ntarget = \"127.0.0.1:{port}\"\n"
        ),
    )?;
    let kernel = workspace().join("target/tools/microvm");
    let more = [
        ["--microvm-workers", "2"],
        ["--kernel", kernel.to_str().context("path")?],
        ["--config", config.to_str().context("path")?],
    ];
    let mut machine = Machine::start_in(root.path().join("d"), Some(root), 0, more.as_flattened()).await?;
    machine.allow(Duration::from_mins(25));
    let begun = Instant::now();
    machine
        .counter("large", |spec| {
            spec.containers[0].image = large;
            "microvm".clone_into(&mut spec.sandbox_class);
            spec.resources =
                Some(types::Resources { memory: "192MiB".into(), pids: 256, ..Default::default() });
            let rule = types::EgressRule {
                host: "model.test".into(),
                ports: vec![u32::from(port)],
                protocol: "http".into(),
                ..Default::default()
            };
            spec.egress = Some(types::EgressPolicy { allow: vec![rule] });
        })
        .await?;
    let (count, nonce) = machine.count("large").await?;
    let booted = begun.elapsed();
    let expected = format!("{sample:?}");
    let read = format!("print(list(open('/{SAMPLE}', 'rb').read()))");
    let ask = format!(
        "import urllib.request\nprint(urllib.request.urlopen('http://model.test:{port}/').read().decode())"
    );
    let mut woken = Vec::new();
    for cycle in 0..3 {
        ensure!(python(&machine, "large", &read)? == expected, "cycle {cycle}: another {SAMPLE}");
        ensure!(python(&machine, "large", &ask)? == "the word", "cycle {cycle}: another answer");
        machine.suspend("large").await?;
        let begun = Instant::now();
        let (next, same) = machine.count("large").await?;
        woken.push(begun.elapsed());
        ensure!((next, &same) == (count + cycle + 1, &nonce), "cycle {cycle}: {next} of {same}");
    }
    eprintln!(
        "a microVM of {files} files, {mebibytes} MiB: pulled, booted and answered in {booted:?}; woke in {woken:?}"
    );
    Ok(())
}
