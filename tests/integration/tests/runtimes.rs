// SPDX-License-Identifier: Apache-2.0
//! Runtimes by content: an update keeps what older snapshots need, a revocation stops them with a choice.
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use substrate_integration::{Machine, actor, runsc, workspace};
use substrate_proto::ateapi::{self, ActorState};

/// A runtime in a sandbox config.
struct Runtime {
    name: &'static str,
    path: PathBuf,
    sha256: String,
}

impl Runtime {
    fn of(name: &'static str, path: PathBuf) -> Result<Self> {
        let output = std::process::Command::new("sha256sum").arg(&path).output()?;
        let sha256 = String::from_utf8(output.stdout)?.chars().take(64).collect();
        Ok(Self { name, path, sha256 })
    }

    fn entry(&self) -> String {
        let file = format!("{{ url = \"file:{}\", sha256 = \"{}\" }}", self.path.display(), self.sha256);
        format!(
            "[[gvisor.runtimes]]\nname = \"{}\"\nrunsc = {{ amd64 = {file}, arm64 = {file} }}\n",
            self.name
        )
    }
}

fn write(path: &Path, head: &str, runtimes: &[&Runtime], tail: &str) -> Result<()> {
    let entries: String = runtimes.iter().map(|runtime| runtime.entry()).collect();
    Ok(std::fs::write(path, format!("{head}\n{entries}\n{tail}\n"))?)
}

/// Resumes alice: the worker of an older runtime may be a moment later than the others.
async fn restored_in(machine: &mut Machine, limit: Duration) -> Result<ateapi::Actor> {
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        match machine.resume("alice").await {
            Ok(restored) => return Ok(restored),
            Err(error) if tokio::time::Instant::now() > deadline => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

async fn reset(machine: &mut Machine, name: &str) -> Result<()> {
    let request = ateapi::ResetActorRequest { actor: Some(actor(name)), ..Default::default() };
    machine.api.reset_actor(request).await?;
    Ok(())
}

#[tokio::test]
async fn an_update_keeps_older_snapshots_and_a_revocation_stops_them_with_a_choice() -> Result<()> {
    let root = tempfile::Builder::new().prefix("sub-").tempdir_in("/tmp")?;
    let old = Runtime::of("old", runsc()?)?;
    // The same program as far as it runs, another by its content.
    let copy = root.path().join("runsc-new");
    let mut bytes = std::fs::read(&old.path)?;
    bytes.push(b'\n');
    std::fs::write(&copy, bytes)?;
    std::fs::set_permissions(&copy, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let new = Runtime::of("new", copy.clone())?;
    let (sandbox, config) = (root.path().join("sandbox.toml"), root.path().join("substrate.toml"));
    std::fs::write(&config, format!("sandbox_config = \"{}\"\n", sandbox.display()))?;
    write(&sandbox, "", &[&old], "")?;
    let dir = root.path().join("d");
    let config = config.to_str().context("path")?.to_owned();
    let mut machine =
        Machine::start_without_runsc(dir.clone(), Some(root), 1, &["--config", &config], &[]).await?;
    machine.counter("alice", |_| ()).await?;
    let (count, nonce) = machine.count("alice").await?;
    machine.suspend("alice").await?;
    machine.stop()?;

    // Updated: what was made with the older one is restored by it, on a worker of its own.
    write(&sandbox, "", &[&new, &old], "")?;
    machine.restart().await?;
    // Fetched, it needs its source no more.
    std::fs::remove_file(&copy)?;
    let restored = restored_in(&mut machine, Duration::from_secs(30)).await?;
    ensure!(restored.worker_id.starts_with('o'), "restored on {}", restored.worker_id);
    ensure!(machine.count("alice").await? == (count + 1, nonce.clone()));
    machine.suspend("alice").await?;

    // Revoked while everything runs: refused, and nothing is lost.
    let revoked = format!("[gvisor]\nrevoked = [\"{}\"]", old.sha256);
    write(&sandbox, &revoked, &[&new, &old], "")?;
    let refused = machine.resume("alice").await.expect_err("restored by a revoked runtime").to_string();
    for word in ["revoked", "reset", "[[overrides]]", old.sha256.as_str()] {
        ensure!(refused.contains(word), "{word} is missing: {refused}");
    }
    ensure!(machine.get("alice").await?.state() == ActorState::Suspended);
    // An administrator lets it pass.
    let pass = "[[overrides]]\nactors = [\"default/alice\"]\nreason = \"its memory is needed once more\"";
    write(&sandbox, &revoked, &[&new, &old], pass)?;
    machine.resume("alice").await?;
    ensure!(machine.count("alice").await? == (count + 2, nonce.clone()));
    machine.suspend("alice").await?;
    // Or its owner gives the memory up.
    write(&sandbox, &revoked, &[&new, &old], "")?;
    reset(&mut machine, "alice").await?;
    let fresh = machine.get("alice").await?;
    ensure!(fresh.state() == ActorState::Running && fresh.worker_id == "w1", "{fresh:?}");
    ensure!(machine.count("alice").await?.1 != nonce, "it still has its memory");

    // An age stops it likewise.
    machine.suspend("alice").await?;
    write(&sandbox, "[gvisor]\nmax_age_days = 0", &[&new, &old], "")?;
    let refused = machine.resume("alice").await.expect_err("restored although too old").to_string();
    ensure!(refused.contains("days old") && refused.contains("reset"), "{refused}");

    // No config names the older one any more, but snapshots do.
    write(&sandbox, "", &[&new], "")?;
    let cached = dir.join("node/runtimes").join(&old.sha256);
    let aged = std::time::SystemTime::now() - Duration::from_hours(1);
    let collect = || -> Result<String> {
        std::fs::File::open(&cached)?.set_modified(aged)?;
        let directory = dir.to_str().context("path")?;
        let output = machine.cli(&["gc", "--dir", directory, "--config", &config])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    collect()?;
    ensure!(cached.exists(), "a runtime that snapshots need was collected");
    let delete = ateapi::DeleteActorRequest { actor: Some(actor("alice")), ..Default::default() };
    machine.api.clone().delete_actor(delete).await?;
    collect()?;
    ensure!(cached.exists(), "a runtime that a worker runs was collected");
    machine.stop()?;
    let output = machine.cli(&["gc", "--dir", dir.to_str().context("path")?, "--config", &config])?;
    ensure!(String::from_utf8(output.stdout)?.contains(&old.sha256) && !cached.exists(), "not collected");
    Ok(())
}

/// An archive of the guests' kernel, its image followed by `more`.
fn kernel_archive(into: &Path, name: &str, more: &[u8]) -> Result<Runtime> {
    let kernel = workspace().join("target/tools/microvm");
    let tree = into.join(name);
    std::fs::create_dir(&tree)?;
    let mut image =
        std::fs::read(kernel.join("vmlinuz")).context("no kernel for guests: run scripts/setup")?;
    image.extend_from_slice(more);
    std::fs::write(tree.join("vmlinuz"), image)?;
    std::os::unix::fs::symlink(kernel.join("modules"), tree.join("modules"))?;
    let archive = into.join(format!("{name}.tar.gz"));
    let mut tar = std::process::Command::new("tar");
    tar.args(["--dereference", "--use-compress-program=gzip -1", "-cf"]).arg(&archive).arg("-C").arg(&tree);
    let status = tar.args(["vmlinuz", "modules"]).status()?;
    ensure!(status.success(), "tar: {status}");
    Runtime::of("kernel", archive)
}

/// The first worker for microVMs.
async fn first(machine: &mut Machine) -> Result<ateapi::Worker> {
    let workers = machine.api.list_workers(ateapi::ListWorkersRequest {}).await?.into_inner().workers;
    workers.into_iter().find(|worker| worker.id == "m1").context("no worker m1")
}

#[tokio::test]
async fn a_machine_monitor_and_a_kernel_come_from_the_sandbox_config() -> Result<()> {
    let root = tempfile::Builder::new().prefix("sub-").tempdir_in("/tmp")?;
    // QEMU with what it loads, which it looks for from its own place.
    let qemu = root.path().join("qemu.tar.gz");
    let parts = ["bin/qemu-system-x86_64", "lib/x86_64-linux-gnu/qemu", "share/qemu", "share/seabios"];
    let mut tar = std::process::Command::new("tar");
    tar.args(["--use-compress-program=gzip -1", "-cf"]).arg(&qemu).args(["--exclude=*.fd", "-C", "/"]);
    let status = tar.args(parts.map(|part| format!("usr/{part}"))).status()?;
    ensure!(status.success(), "tar: {status}; is QEMU there? scripts/setup installs it");
    let vmm = Runtime::of("vmm", qemu.clone())?;
    let kernels = [kernel_archive(root.path(), "old", b"")?, kernel_archive(root.path(), "new", b"\n")?];
    let (sandbox, config) = (root.path().join("sandbox.toml"), root.path().join("substrate.toml"));
    std::fs::write(&config, format!("sandbox_config = \"{}\"\n", sandbox.display()))?;
    let part = |name: &str, of: &Runtime| {
        format!("{name}.amd64 = {{ url = \"file:{}\", sha256 = \"{}\" }}\n", of.path.display(), of.sha256)
    };
    let entry = |name: &str, kernel: &Runtime| {
        let parts = [part("vmm", &vmm), part("kernel", kernel)].concat();
        format!("[[microvm.runtimes]]\nname = \"{name}\"\n{parts}")
    };
    std::fs::write(&sandbox, entry("old", &kernels[0]))?;
    let dir = root.path().join("d");
    let config = config.to_str().context("path")?.to_owned();
    let args = ["--config", &config, "--microvm-workers", "1"];
    let mut machine = Machine::start_without_runsc(dir.clone(), Some(root), 0, &args, &[]).await?;
    machine.allow(Duration::from_mins(5));
    machine.counter("alice", |spec| "microvm".clone_into(&mut spec.sandbox_class)).await?;
    let (count, nonce) = machine.count("alice").await?;
    machine.suspend("alice").await?;
    let of_old_kernel = first(&mut machine).await?.pid;
    machine.kill();

    // Another kernel: the worker that lived on is ended, and what ran on the older one goes on with it. Fetched, neither
    // needs its source.
    std::fs::write(&sandbox, [entry("new", &kernels[1]), entry("old", &kernels[0])].concat())?;
    machine.restart().await?;
    let deadline = tokio::time::Instant::now() + Duration::from_mins(1);
    loop {
        let now = first(&mut machine).await?;
        if now.alive && now.pid != of_old_kernel {
            break;
        }
        ensure!(tokio::time::Instant::now() < deadline, "the worker with the older kernel goes on: {now:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    for source in [&qemu, &kernels[0].path, &kernels[1].path] {
        std::fs::remove_file(source)?;
    }
    let restored = restored_in(&mut machine, Duration::from_mins(1)).await?;
    let id = format!("p{}-{}-1", &vmm.sha256[..6], &kernels[0].sha256[..6]);
    ensure!(restored.worker_id == id, "restored on {}, not on {id}", restored.worker_id);
    ensure!(machine.count("alice").await? == (count + 1, nonce));
    // And new ones start on the newer.
    machine.counter("bob", |spec| "microvm".clone_into(&mut spec.sandbox_class)).await?;
    ensure!(machine.get("bob").await?.worker_id == "m1");
    machine.stop()
}
