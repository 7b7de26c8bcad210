// SPDX-License-Identifier: Apache-2.0
//! What an actor may rely on whatever its sandbox class: one story, told by each class on a real machine.
//!
//! gVisor and QEMU run always. cloud-hypervisor and Firecracker have no backend yet.
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use substrate_integration::{Machine, PATIENCE, processes_naming, workspace};
use substrate_proto::ateapi::{self, ActorState};
use substrate_proto::types::{self, TemplateSpec};

/// A class under test.
struct Class {
    name: &'static str,
    /// Part of the command line of the process that is one sandbox.
    sandbox: &'static str,
}

const GVISOR: Class = Class { name: "gvisor", sandbox: " boot " };
const MICROVM: Class = Class { name: "microvm", sandbox: "qemu-system-" };

impl Class {
    async fn machine(&self, workers: u32) -> Result<Machine> {
        if self.name == "gvisor" {
            return Machine::start(workers, &[]).await;
        }
        let kernel = workspace().join("target/tools/microvm");
        ensure!(kernel.join("vmlinuz").exists(), "no kernel for guests: run scripts/setup");
        let mut machine = Machine::start(
            0,
            &["--microvm-workers", &workers.to_string(), "--kernel", kernel.to_str().context("path")?],
        )
        .await?;
        // A guest boots in seconds without hardware support, several times slower on a busy machine.
        machine.allow(Duration::from_mins(8));
        Ok(machine)
    }

    /// The counter in this class, with room enough for its python.
    async fn counter(
        &self,
        machine: &mut Machine,
        name: &str,
        change: impl FnOnce(&mut TemplateSpec),
    ) -> Result<ateapi::Actor> {
        machine
            .counter(name, |spec| {
                self.name.clone_into(&mut spec.sandbox_class);
                spec.resources =
                    Some(types::Resources { memory: "192MiB".into(), pids: 256, ..Default::default() });
                change(spec);
            })
            .await
    }

    /// Processes that are sandboxes of the machine.
    fn sandboxes(&self, machine: &Machine) -> Vec<i32> {
        let line = |pid: &i32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let is_one = |line: Vec<u8>| {
            let words = String::from_utf8_lossy(&line).replace('\0', " ");
            words.contains(self.sandbox) && !words.starts_with("/proc/self/exe")
        };
        processes_naming(&machine.dir.to_string_lossy()).into_iter().filter(|pid| is_one(line(pid))).collect()
    }
}

/// Runs a shell command in an actor; standard output of one that succeeds.
fn shell(machine: &Machine, actor: &str, container: &str, script: &str) -> Result<String> {
    let output = machine.cli(&["exec", actor, "--container", container, "--", "/bin/sh", "-c", script])?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{script}: {}: {errors}", output.status);
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Memory, files, connections, clock and identity over suspends, and what is inside a sandbox.
async fn one_life(class: &Class) -> Result<()> {
    let mut machine = class.machine(2).await?;
    let actor = class
        .counter(&mut machine, "life", |spec| {
            spec.volumes = vec![types::Volume { name: "data".into(), size: "64MiB".into() }];
            let main = &mut spec.containers[0];
            main.volume_mounts =
                vec![types::VolumeMount { volume: "data".into(), path: "/data".into(), read_only: false }];
            main.security_context =
                Some(types::SecurityContext { run_as: "1000:1000".into(), ..Default::default() });
            let mut side = main.clone();
            side.name = "side".into();
            side.command = ["/bin/sh", "-c", "echo side is up; exec sleep 1000000"].map(str::to_owned).into();
            side.readiness = None;
            side.ports.clear();
            side.read_only_root = true;
            side.volume_mounts[0].read_only = true;
            side.security_context = Some(types::SecurityContext {
                run_as: "0".into(),
                drop_capabilities: vec!["ALL".into()],
                add_capabilities: vec!["CHOWN".into()],
                ..Default::default()
            });
            spec.containers.push(side);
        })
        .await?;
    ensure!(actor.state() == ActorState::Running, "{actor:?}");

    // Users, capabilities, read-only places, volumes, several containers.
    ensure!(shell(&machine, "life", "main", "id -u; id -g")? == "1000\n1000");
    ensure!(shell(&machine, "life", "side", "id -u")? == "0");
    let effective = shell(&machine, "life", "side", "grep CapEff /proc/self/status")?;
    ensure!(effective.ends_with("0000000000000001"), "only CHOWN was asked for: {effective}");
    shell(&machine, "life", "main", "echo kept > /data/file; head -c 1000000 /dev/urandom > /tmp/blob")?;
    ensure!(shell(&machine, "life", "side", "cat /data/file")? == "kept", "volumes are shared");
    for refused in ["echo x > /data/file", "echo x > /x", "echo x > /run/ate/name", "chroot / true"] {
        ensure!(shell(&machine, "life", "side", refused).is_err(), "{refused} was not refused");
    }
    ensure!(shell(&machine, "life", "main", "cat /run/ate/name /run/ate/generation")? == "life1", "identity");
    ensure!(shell(&machine, "life", "main", "cat /etc/hostname")? == "life");
    let sum = shell(&machine, "life", "main", "sha256sum /tmp/blob")?;

    // Exit codes, of programs that are not there too, and standard input to its end.
    let code = |args: &[&str]| -> Result<Option<i32>> {
        Ok(machine.cli(&[&["exec", "life", "--"], args].concat())?.status.code())
    };
    ensure!(code(&["/bin/sh", "-c", "exit 7"])? == Some(7));
    ensure!(code(&["/no/such/program"])? == Some(127));
    ensure!(code(&["/etc/hostname"])? == Some(126));

    // Three sleeps, each time up on another worker where there is one.
    let (mut count, nonce) = machine.count("life").await?;
    let mut seen = std::collections::BTreeSet::new();
    for round in 0..3 {
        seen.insert(machine.get("life").await?.worker_id);
        let answer = machine.suspend("life").await?;
        ensure!(answer.snapshot.is_some(), "{answer:?}");
        ensure!(class.sandboxes(&machine).len() <= 2, "something of the actor still runs");
        let (next, same) = machine.count("life").await?;
        ensure!((next, &same) == (count + 1, &nonce), "round {round}: {count} → {next}, {nonce} → {same}");
        count = next;
    }
    ensure!(!seen.is_empty());

    // Clock, identity, files and volume after the last of them.
    let there: i64 = shell(&machine, "life", "main", "date +%s")?.parse()?;
    let here = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs() as i64;
    ensure!((here - there).abs() <= 2, "the clock is {} s behind", here - there);
    ensure!(shell(&machine, "life", "main", "cat /run/ate/generation")? == "4", "identity was not renewed");
    ensure!(shell(&machine, "life", "main", "sha256sum /tmp/blob")? == sum, "the root's files changed");
    ensure!(shell(&machine, "life", "side", "cat /data/file")? == "kept");
    let logs = String::from_utf8(machine.cli(&["logs", "life"])?.stdout)?;
    ensure!(logs.contains("listening on port 8080"), "{logs}");

    // A reset boots afresh and keeps the volume.
    machine.suspend("life").await?;
    let reset = machine.cli(&["reset", "life"])?;
    ensure!(reset.status.success(), "{}", String::from_utf8_lossy(&reset.stderr));
    let (first, other) = machine.count("life").await?;
    ensure!(first == 1 && other != nonce, "reset did not boot afresh");
    ensure!(shell(&machine, "life", "main", "cat /data/file")? == "kept", "reset lost the volume");
    Ok(())
}

/// What a death costs: nothing that was committed, and nothing is left behind.
async fn deaths(class: &Class) -> Result<()> {
    let mut machine = class.machine(2).await?;
    class.counter(&mut machine, "cat", |_| ()).await?;
    let (count, nonce) = machine.count("cat").await?;
    // A checkpoint keeps it running.
    let checkpoint = machine.cli(&["checkpoint", "cat"])?;
    ensure!(checkpoint.status.success(), "{}", String::from_utf8_lossy(&checkpoint.stderr));
    let (next, same) = machine.count("cat").await?;
    ensure!((next, &same) == (count + 1, &nonce), "the checkpoint did not let it go on");
    // The sandbox is killed: back to the checkpoint.
    let actor = machine.get("cat").await?;
    let mark = format!("/workers/{}/", actor.worker_id);
    let group = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let own = format!("/{}/", actor.worker_id);
    let victims: Vec<i32> =
        class.sandboxes(&machine).into_iter().filter(|pid| group(*pid).contains(&own)).collect();
    ensure!(!victims.is_empty(), "no process of the sandbox below {mark}");
    for pid in victims {
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    }
    machine.wait_for("cat", ActorState::Suspended).await?;
    let (next, same) = machine.count("cat").await?;
    ensure!((next, &same) == (count + 1, &nonce), "{count}, {nonce} → {next}, {same}");
    // The worker's process is killed: what it had is fenced, the actor goes back once more.
    machine.suspend("cat").await?;
    let (next, _) = machine.count("cat").await?;
    let actor = machine.get("cat").await?;
    let workers = machine.api.list_workers(ateapi::ListWorkersRequest {}).await?.into_inner().workers;
    let worker = workers.iter().find(|worker| worker.id == actor.worker_id).context("its worker")?;
    kill(Pid::from_raw(worker.pid as i32), Signal::SIGKILL)?;
    machine.wait_for("cat", ActorState::Suspended).await?;
    let (again, same) = machine.count("cat").await?;
    ensure!((again, &same) == (next, &nonce), "{next}, {nonce} → {again}, {same}");
    // Nothing stays behind.
    let deleted = machine.cli(&["delete", "actor", "cat"])?;
    ensure!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stderr));
    machine.stop()?;
    let own = machine.dir.to_string_lossy().into_owned();
    ensure!(processes_naming(&own).is_empty(), "processes are left");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let sandboxes = machine.dir.join("node/workers");
    let left: Vec<&str> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|point| Path::new(point).starts_with(&sandboxes))
        .collect();
    ensure!(left.is_empty(), "mounts are left: {left:?}");
    Ok(())
}

/// A story with a limit: a hang is a failure that says where.
async fn within(limit: Duration, story: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::time::timeout(limit, story).await.with_context(|| format!("not done within {limit:?}"))?
}

#[tokio::test]
async fn a_gvisor_actor_lives_as_every_class_does() -> Result<()> {
    within(PATIENCE * 3, one_life(&GVISOR)).await
}

#[tokio::test]
async fn a_gvisor_actor_loses_nothing_by_deaths() -> Result<()> {
    within(PATIENCE * 3, deaths(&GVISOR)).await
}

#[tokio::test]
async fn a_microvm_actor_lives_as_every_class_does() -> Result<()> {
    within(PATIENCE * 6, one_life(&MICROVM)).await
}

#[tokio::test]
async fn a_microvm_actor_loses_nothing_by_deaths() -> Result<()> {
    within(PATIENCE * 6, deaths(&MICROVM)).await
}
