// SPDX-License-Identifier: Apache-2.0
//! What actors write: in volumes, and in roots on a disk, it is bounded and outside the memory snapshot; in a gVisor root
//! it is memory, and said.
//!
//! `SUBSTRATE_VOLUME_MIB` sets how much is written (scripts/nightly: 1024; here 96).
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use substrate_integration::{Machine, actor, files_below, processes_naming, workspace};
use substrate_proto::ateapi::{self, ActorState};
use substrate_proto::types;

fn mebibytes() -> u64 {
    std::env::var("SUBSTRATE_VOLUME_MIB").ok().and_then(|text| text.parse().ok()).unwrap_or(96)
}

fn shell(machine: &Machine, actor: &str, script: &str) -> Result<String> {
    let output = machine.cli(&["exec", actor, "--", "/bin/sh", "-c", script])?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{script}: {}: {errors}", output.status);
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Bytes on the disk of the newest node snapshot: of memory and the rest of the state, and of volumes.
fn snapshot_bytes(machine: &Machine, uid: &str) -> Result<(u64, u64)> {
    let (mut state, mut volumes) = (0, 0);
    for path in files_below(&machine.latest_on_node(uid)?)? {
        use std::os::unix::fs::MetadataExt as _;
        // A note is replaced through a file beside it.
        let Ok(meta) = path.metadata() else { continue };
        let bytes = meta.blocks() * 512;
        if path.components().any(|part| part.as_os_str() == "volumes") {
            volumes += bytes;
        } else {
            state += bytes;
        }
    }
    Ok((state, volumes))
}

/// Bytes of memory that the machine's VMMs hold.
fn resident(machine: &Machine) -> u64 {
    let of = |pid: i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let kib = |name| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        (kib("RssAnon:").unwrap_or(0) + kib("RssShmem:").unwrap_or(0)) << 10
    };
    processes_naming(&machine.dir.to_string_lossy()).into_iter().map(of).sum()
}

/// Waits for the guest to give back most of the page cache of a file, which may be larger than the guest, and for that to
/// end.
async fn page_cache_is_given_back(machine: &Machine, file: u64) -> Result<()> {
    let most = resident(machine);
    let cached = file.min(most);
    let deadline = Instant::now() + Duration::from_mins(2);
    let (mut before, mut steady) = (most, 0);
    loop {
        // The guest reports freed memory every two seconds, and later where it gets little of the processor.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let held = resident(machine);
        steady = if before.abs_diff(held) < (1 << 20) { steady + 1 } else { 0 };
        if held + cached / 2 <= most && steady == 3 {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the guest holds {held} bytes, {most} with a file of {file}");
        before = held;
    }
}

/// Most that the state may grow by, bytes.
fn limit(before: u64) -> u64 {
    (24 << 20).max(before / 10)
}

/// [`snapshot_bytes`] of an actor that sleeps. A guest that stood without a processor when it was looked at goes on giving
/// its page cache back when it is awake.
async fn settled(machine: &mut Machine, name: &str, uid: &str, before: u64) -> Result<(u64, u64)> {
    for _ in 0..3 {
        let (after, _) = snapshot_bytes(machine, uid)?;
        if after.saturating_sub(before) <= limit(before) {
            break;
        }
        machine.resume(name).await?;
        tokio::time::sleep(Duration::from_secs(15)).await;
        machine.suspend(name).await?;
    }
    snapshot_bytes(machine, uid)
}

/// A volume is bounded, kept across reset, and no part of the memory snapshot.
async fn a_volume(class: &str, more: &[&str]) -> Result<()> {
    let mut machine = Machine::start(u32::from(class == "gvisor"), more).await?;
    machine.allow(Duration::from_mins(10));
    let (wanted, size) = (mebibytes(), mebibytes() + 32);
    let made = machine
        .counter("vol", |spec| {
            class.clone_into(&mut spec.sandbox_class);
            spec.volumes = vec![types::Volume { name: "data".into(), size: format!("{size}MiB") }];
            spec.resources = Some(types::Resources { memory: "512MiB".into(), ..Default::default() });
            spec.containers[0].volume_mounts =
                vec![types::VolumeMount { volume: "data".into(), path: "/data".into(), read_only: false }];
        })
        .await?;
    machine.count("vol").await?;
    // What running these tools takes by itself is not what is measured.
    shell(
        &machine,
        "vol",
        "head -c 65536 /dev/urandom > /data/big && sync && sha256sum < /data/big && rm /data/big && sync",
    )?;
    machine.suspend("vol").await?;
    let (before, empty) = snapshot_bytes(&machine, &made.uid)?;
    machine.resume("vol").await?;
    // Not compressible, not zero: it is stored.
    shell(&machine, "vol", &format!("head -c {} /dev/urandom > /data/big && sync", wanted << 20))?;
    let sum = shell(&machine, "vol", "sha256sum < /data/big")?;
    if class == "microvm" {
        page_cache_is_given_back(&machine, wanted << 20).await?;
    }
    machine.suspend("vol").await?;
    let (after, full) = settled(&mut machine, "vol", &made.uid, before).await?;
    eprintln!("{class}: state {before} -> {after} bytes, volume {empty} -> {full} bytes on disk");
    ensure!(full >= wanted << 20, "the volume is not in the snapshot: {full} bytes");
    let grown = after.saturating_sub(before);
    ensure!(grown <= limit(before), "the state grew by {grown} bytes of {wanted} MiB written");
    machine.resume("vol").await?;
    ensure!(shell(&machine, "vol", "sha256sum < /data/big")? == sum, "the volume's file changed");
    // Bounded.
    let over = format!("head -c {} /dev/urandom > /data/more", size << 20);
    let refused = shell(&machine, "vol", &over).expect_err("a volume outgrew its size").to_string();
    ensure!(refused.to_lowercase().contains("no space"), "{refused}");
    shell(&machine, "vol", "rm /data/more")?;
    // Kept.
    machine.suspend("vol").await?;
    let request = ateapi::ResetActorRequest { actor: Some(actor("vol")), ..Default::default() };
    machine.api.reset_actor(request).await?;
    ensure!(shell(&machine, "vol", "sha256sum < /data/big")? == sum, "reset lost the volume");
    let delete = ateapi::DeleteActorRequest { actor: Some(actor("vol")), ..Default::default() };
    machine.api.delete_actor(delete).await?;
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    ensure!(!mounts.contains(&format!("{}/volumes", made.uid)), "the volume of a deleted actor is mounted");
    Ok(())
}

// The connection to the control plane answers beside what blocks here.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_gvisor_volume_is_bounded_kept_and_outside_the_memory() -> Result<()> {
    a_volume("gvisor", &[]).await
}

// The connection to the control plane answers beside what blocks here.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_microvm_volume_is_bounded_kept_and_outside_the_memory() -> Result<()> {
    let kernel = workspace().join("target/tools/microvm");
    ensure!(kernel.join("vmlinuz").exists(), "no kernel for guests: run scripts/setup");
    let kernel = kernel.to_str().context("path")?;
    a_volume("microvm", &["--microvm-workers", "1", "--kernel", kernel]).await
}

/// What is written to a root on a disk goes where the actor goes, and ends with a reset.
#[tokio::test]
async fn a_microvm_root_on_a_disk_is_bounded_moves_and_is_outside_the_memory() -> Result<()> {
    tokio::time::timeout(Duration::from_mins(10), a_root_on_a_disk())
        .await
        .context("not done in 10 minutes")?
}

async fn a_root_on_a_disk() -> Result<()> {
    let kernel = workspace().join("target/tools/microvm");
    ensure!(kernel.join("vmlinuz").exists(), "no kernel for guests: run scripts/setup");
    let mut machine =
        Machine::start(0, &["--microvm-workers", "2", "--kernel", kernel.to_str().context("path")?]).await?;
    machine.allow(Duration::from_mins(8));
    let (wanted, size) = (mebibytes(), mebibytes() + 32);
    let persist = |spec: &mut types::TemplateSpec| spec.containers[0].rootfs = "persist".into();
    let refused = machine.counter("none", persist).await.expect_err("gVisor has no root on a disk");
    ensure!(format!("{refused:#}").contains("mount a volume"), "{refused:#}");
    let made = machine
        .counter("root", |spec| {
            persist(spec);
            spec.sandbox_class = "microvm".into();
            spec.resources = Some(types::Resources { memory: "256MiB".into(), ..Default::default() });
            let main = &mut spec.containers[0];
            main.rootfs_size = format!("{size}MiB");
            main.security_context = Some(types::SecurityContext { run_as: "0".into(), ..Default::default() });
        })
        .await?;
    let (_, nonce) = machine.count("root").await?;
    shell(
        &machine,
        "root",
        "head -c 65536 /dev/urandom > /var/big && sync && sha256sum < /var/big && rm /var/big && sync",
    )?;
    machine.suspend("root").await?;
    let (before, empty) = snapshot_bytes(&machine, &made.uid)?;
    machine.resume("root").await?;
    let write = format!("head -c {} /dev/urandom > /var/big && rm /usr/bin/factor && sync", wanted << 20);
    shell(&machine, "root", &write)?;
    let sum = shell(&machine, "root", "sha256sum < /var/big")?;
    page_cache_is_given_back(&machine, wanted << 20).await?;
    machine.suspend("root").await?;
    let (after, full) = settled(&mut machine, "root", &made.uid, before).await?;
    eprintln!("state {before} -> {after} bytes, root {empty} -> {full} bytes on disk");
    ensure!(full >= wanted << 20, "the root is not in the snapshot: {full} bytes");
    let grown = after.saturating_sub(before);
    ensure!(grown <= limit(before), "the state grew by {grown} bytes of {wanted} MiB written");

    // Where nothing of the actor is but its snapshot, it and a fork of it run at once, each with a root of its own.
    let of_actor = machine.dir.join("node/actors").join(&made.uid);
    std::fs::remove_dir_all(of_actor.join("volumes"))?;
    let fork = ateapi::ForkActorRequest {
        actor: Some(actor("root")),
        new_name: "fork".into(),
        ..Default::default()
    };
    machine.api.fork_actor(fork).await?;
    for name in ["root", "fork"] {
        ensure!(machine.count(name).await?.1 == nonce, "{name} was booted afresh");
        ensure!(shell(&machine, name, "sha256sum < /var/big")? == sum, "{name}'s root changed");
        ensure!(
            shell(&machine, name, "test ! -e /usr/bin/factor").is_ok(),
            "a deleted file is back in {name}"
        );
    }
    let on = [machine.get("root").await?.worker_id, machine.get("fork").await?.worker_id];
    ensure!(on[0] != on[1], "both on {on:?}");
    shell(&machine, "fork", "echo x > /var/of-fork && sync")?;
    ensure!(shell(&machine, "root", "test ! -e /var/of-fork").is_ok(), "a fork wrote to its origin's root");

    let over = format!("head -c {} /dev/urandom > /var/more", size << 20);
    let refused = shell(&machine, "fork", &over).expect_err("the root outgrew its size").to_string();
    ensure!(refused.to_lowercase().contains("no space"), "{refused}");
    shell(&machine, "fork", "rm /var/more && sync")?;
    let refused = machine.cli(&["checkpoint", "fork"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success() && said.contains("root on a disk"), "{said}");

    // A reset starts from the image.
    machine.suspend("root").await?;
    let request = ateapi::ResetActorRequest { actor: Some(actor("root")), ..Default::default() };
    machine.api.reset_actor(request).await?;
    ensure!(machine.count("root").await?.1 != nonce, "reset did not boot afresh");
    shell(&machine, "root", "test ! -e /var/big && test -x /usr/bin/factor")
        .context("reset kept the root")?;
    ensure!(shell(&machine, "fork", "cat /var/of-fork")? == "x", "a reset reached the fork");
    machine.stop()
}

#[tokio::test]
async fn files_in_the_memory_of_a_gvisor_actor_are_warned_of() -> Result<()> {
    let mut machine = Machine::start(1, &[]).await?;
    let memory = types::Resources { memory: "400MiB".into(), ..Default::default() };
    machine.counter("grow", |spec| spec.resources = Some(memory)).await?;
    shell(
        &machine,
        "grow",
        "head -c 60000000 /dev/zero > /tmp/few; head -c 80000000 /dev/urandom > /tmp/many",
    )?;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    let message = loop {
        let events = machine.events("grow").await?;
        if let Some((_, message)) = events.into_iter().find(|(reason, _)| reason == "OverlayGrew") {
            break message;
        }
        ensure!(tokio::time::Instant::now() < deadline, "no warning came");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    for word in ["25 %", "400 MiB", "volume"] {
        ensure!(message.contains(word), "{message}");
    }
    ensure!(machine.get("grow").await?.state() == ActorState::Running);
    Ok(())
}
