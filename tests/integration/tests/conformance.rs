// SPDX-License-Identifier: Apache-2.0
//! What an actor may rely on whatever its sandbox class: the same stories, told by each class on a real machine.
//!
//! gVisor and QEMU run always. cloud-hypervisor and Firecracker are in `ateom/tests/vmm.rs`.
use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use substrate_integration::{Machine, PATIENCE, actor, binary, image, processes_naming, workspace};
use substrate_proto::ateapi::{self, ActorState};
use substrate_proto::types::{self, TemplateSpec};

/// A class under test.
struct Class {
    name: &'static str,
    /// Part of the name of the program that is one sandbox.
    program: &'static str,
}

const GVISOR: Class = Class { name: "gvisor", program: "runsc-sandbox" };
const MICROVM: Class = Class { name: "microvm", program: "qemu-system-" };

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
        let is_one = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let program = line.split(|byte| *byte == 0).next().unwrap_or_default();
            String::from_utf8_lossy(program).contains(self.program)
        };
        processes_naming(&machine.dir.to_string_lossy()).into_iter().filter(is_one).collect()
    }

    /// Those of one worker.
    fn sandboxes_of(&self, machine: &Machine, worker: &str) -> Vec<i32> {
        let group = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let mark = format!("/{worker}/");
        self.sandboxes(machine).into_iter().filter(|pid| group(*pid).contains(&mark)).collect()
    }
}

/// Runs a shell command in an actor; standard output of one that succeeds.
fn shell(machine: &Machine, actor: &str, container: &str, script: &str) -> Result<String> {
    let output = machine.cli(&["exec", actor, "--container", container, "--", "/bin/sh", "-c", script])?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{script}: {}: {errors}", output.status);
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// A container that holds 10 MB of noise and tells its sum to who connects.
const NOISE: &str = "
import hashlib, os, socket
noise = os.urandom(10 << 20)
listener = socket.create_server(('127.0.0.1', 9000))
print('side is up', flush=True)
while True:
    with listener.accept()[0] as asking:
        asking.sendall(hashlib.sha256(noise).hexdigest().encode())
";
/// Asks it.
const ASK: &str = "python3 -S -c \"
import socket, time
for attempt in range(200):
    try:
        print(socket.create_connection(('127.0.0.1', 9000)).recv(64, socket.MSG_WAITALL).decode())
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
\"";

/// Makes system calls that no ordinary container may, and tells their errors: mount, keyctl, unshare of users.
const FORBIDDEN: &str = "python3 -S -c \"
import ctypes
call = ctypes.CDLL(None, use_errno=True).syscall
for words in ((165, 0, 0, 0, 0, 0), (250, 0, 0, 0), (272, 0x10000000)):
    print(ctypes.get_errno() if call(*words) < 0 else 0)
\"";

/// What a container's profile says holds for its main process and for whatever is started in it, and nowhere else.
fn system_calls(class: &Class, machine: &Machine) -> Result<()> {
    let forbidden = shell(machine, "life", "side", "mkdir /dev/shm/sub").expect_err("mkdir was let through");
    ensure!(forbidden.to_string().contains("not permitted"), "{forbidden}");
    shell(machine, "life", "side", "echo x > /dev/shm/file")?;
    shell(machine, "life", "main", "mkdir /dev/shm/sub && rmdir /dev/shm/sub")?;
    let filtered = shell(machine, "life", "side", "grep Seccomp: /proc/1/status")?;
    ensure!(filtered.ends_with('2'), "its main process is not filtered: {filtered}");
    let errors = shell(machine, "life", "main", FORBIDDEN)?;
    let errors: Vec<&str> = errors.lines().collect();
    // Whose kernel is gVisor is kept from mounting by that; a kernel of its own, by the default profile too.
    let expected = if class.name == "gvisor" { &["1"][..] } else { &["1", "1", "1"] };
    ensure!(errors.starts_with(expected), "{errors:?} of mount, keyctl, unshare");
    Ok(())
}

/// How far a sandbox's clock is off at least, seconds: half the time of asking is not known.
fn clock_error(machine: &Machine, actor: &str) -> Result<f64> {
    const SAY: &str = "import sys, time\nwhile sys.stdin.readline(): print(time.time_ns(), flush=True)";
    let mut child = Command::new(binary("substrate")?)
        .arg("--socket")
        .arg(machine.dir.join("run/ateapi.sock"))
        .args(["exec", "-i", actor, "--", "/usr/bin/python3", "-S", "-c", SAY])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().context("stdin")?;
    let mut output = BufReader::new(child.stdout.take().context("stdout")?);
    let now = || Ok::<_, anyhow::Error>(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64());
    let mut least = f64::INFINITY;
    for _ in 0..20 {
        let before = now()?;
        input.write_all(b"\n")?;
        let mut line = String::new();
        ensure!(output.read_line(&mut line)? > 0, "the exec ended");
        let after = now()?;
        let there: f64 = line.trim().parse::<f64>()? / 1e9;
        least = least.min(((there - f64::midpoint(before, after)).abs() - (after - before) / 2.0).max(0.0));
    }
    drop(input);
    child.wait()?;
    Ok(least)
}

/// What a machine has of the system's, to be gone after its end: control groups, and its network namespaces, each with a
/// process that is in it (a namespace's number is given out again).
#[derive(Debug, Default)]
struct Possessions {
    groups: BTreeSet<PathBuf>,
    namespaces: BTreeSet<PathBuf>,
    inhabitants: Vec<(PathBuf, PathBuf)>,
}

impl Possessions {
    fn of(machine: &Machine) -> Self {
        let groups = |pid: &str| -> Vec<PathBuf> {
            let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            let paths = text.lines().filter_map(|line| {
                let mut parts = line.splitn(3, ':').skip(1);
                let (names, path) = (parts.next()?, parts.next()?.trim_start_matches('/'));
                let hierarchy = match names {
                    "" => ["unified", ""].into_iter().find(|dir| {
                        Path::new("/sys/fs/cgroup").join(dir).join("cgroup.controllers").exists()
                    })?,
                    _ => names.trim_start_matches("name="),
                };
                Some(Path::new("/sys/fs/cgroup").join(hierarchy).join(path))
            });
            paths.collect()
        };
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let (mut all, own) = (Self::default(), groups("self"));
        for pid in processes_naming(&machine.dir.to_string_lossy()) {
            all.groups.extend(groups(&pid.to_string()).into_iter().filter(|group| !own.contains(group)));
            all.namespaces.extend(namespace(&pid.to_string()));
        }
        all.namespaces.remove(&namespace("self").unwrap_or_default());
        for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let link = process.path().join("ns/net");
            if let Some(inside) = std::fs::read_link(&link).ok().filter(|ns| all.namespaces.contains(ns)) {
                all.inhabitants.push((link, inside));
            }
        }
        all
    }

    /// Nothing of a machine that was stopped is left: processes, mounts, control groups, namespaces with their taps,
    /// links in our own, sandboxes' files.
    fn gone(&self, machine: &Machine) -> Result<()> {
        ensure!(!self.groups.is_empty() && !self.namespaces.is_empty(), "nothing was looked at: {self:?}");
        let left = processes_naming(&machine.dir.to_string_lossy());
        ensure!(left.is_empty(), "processes are left: {left:?}");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let left: Vec<&str> = mounts
            .lines()
            .filter(|line| {
                let mut words = line.split(' ').skip(3);
                let (root, point) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
                Path::new(point).starts_with(&machine.dir) || self.namespaces.contains(Path::new(root))
            })
            .collect();
        ensure!(left.is_empty(), "mounts are left: {left:?}");
        let left: Vec<&PathBuf> = self.groups.iter().filter(|group| group.exists()).collect();
        ensure!(left.is_empty(), "control groups are left: {left:?}");
        let still =
            |(link, inside): &&(PathBuf, PathBuf)| std::fs::read_link(link).is_ok_and(|ns| ns == *inside);
        let left: Vec<_> = self.inhabitants.iter().filter(still).collect();
        ensure!(left.is_empty(), "network namespaces are left: {left:?}");
        let links = std::fs::read_dir("/sys/class/net")?.flatten().map(|link| link.file_name());
        let left: Vec<_> = links.filter(|name| name.as_encoded_bytes().starts_with(b"wk")).collect();
        ensure!(left.is_empty(), "links are left: {left:?}");
        for worker in std::fs::read_dir(machine.dir.join("node/workers"))?.flatten() {
            let sandboxes = worker.path().join("state/sandboxes");
            let left: Vec<_> = std::fs::read_dir(&sandboxes).into_iter().flatten().flatten().collect();
            ensure!(left.is_empty(), "files of sandboxes are left: {left:?}");
        }
        Ok(())
    }
}

/// Memory, files, connections, clock and identity over suspends, and what is inside a sandbox.
async fn one_life(class: &Class) -> Result<()> {
    let mut machine = class.machine(2).await?;
    let other = image("helpdesk")?;
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
            side.command = ["/usr/bin/python3", "-S", "-c", NOISE].map(str::to_owned).into();
            side.readiness = None;
            side.ports.clear();
            side.read_only_root = true;
            // Another image's files: a directory of it, and all of it.
            let mount = |path: &str, source: &str| types::ImageMount {
                image: other.clone(),
                path: path.into(),
                source: source.into(),
            };
            main.image_mounts = vec![mount("/opt/all", "")];
            side.image_mounts = vec![mount("/opt/app", "/app"), mount("/opt/etc", "/etc")];
            side.volume_mounts[0].read_only = true;
            side.security_context = Some(types::SecurityContext {
                run_as: "0".into(),
                drop_capabilities: vec!["ALL".into()],
                add_capabilities: vec!["CHOWN".into()],
                seccomp: Some(types::Seccomp {
                    rules: vec![types::SeccompRule {
                        names: ["mkdir", "mkdirat"].map(str::to_owned).into(),
                        action: "errno".into(),
                        errno: 0,
                    }],
                    ..Default::default()
                }),
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
    let app = shell(&machine, "life", "side", "cat /opt/app/helpdesk.py")?;
    let of_host = std::fs::read_to_string(workspace().join("examples/helpdesk/helpdesk.py"))?;
    ensure!(app == of_host.trim(), "not the other image's file: {app}");
    for refused in [
        "echo x > /data/file",
        "echo x > /x",
        "echo x > /run/ate/name",
        "echo x > /opt/app/x",
        "chroot / true",
    ] {
        ensure!(shell(&machine, "life", "side", refused).is_err(), "{refused} was not refused");
    }
    ensure!(shell(&machine, "life", "main", "cat /run/ate/name /run/ate/generation")? == "life1", "identity");
    ensure!(shell(&machine, "life", "main", "cat /etc/hostname")? == "life");
    system_calls(class, &machine)?;
    let sum = shell(&machine, "life", "main", "sha256sum /tmp/blob")?;
    let noise = shell(&machine, "life", "main", ASK)?;
    ensure!(noise.len() == 64, "the other container's memory: {noise:?}");

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
        let worker = machine.get("life").await?.worker_id;
        let own = class.sandboxes_of(&machine, &worker);
        ensure!(!own.is_empty(), "no sandbox of {worker}");
        let answer = machine.suspend("life").await?;
        ensure!(answer.snapshot.is_some(), "{answer:?}");
        let left = class.sandboxes(&machine);
        ensure!(
            !own.iter().any(|pid| left.contains(pid)),
            "something of the actor still runs: {own:?}, {left:?}"
        );
        seen.insert(worker);
        let (next, same) = machine.count("life").await?;
        ensure!((next, &same) == (count + 1, &nonce), "round {round}: {count} → {next}, {nonce} → {same}");
        count = next;
    }
    ensure!(!seen.is_empty());

    // Clock, identity, files and volume after the last of them.
    let error = clock_error(&machine, "life")?;
    ensure!(error <= 0.005, "the clock is off by {:.1} ms at least", error * 1e3);
    ensure!(shell(&machine, "life", "main", ASK)? == noise, "the other container's memory changed");
    ensure!(shell(&machine, "life", "main", "cat /run/ate/generation")? == "4", "identity was not renewed");
    ensure!(shell(&machine, "life", "main", "sha256sum /tmp/blob")? == sum, "the root's files changed");
    // Read from the disk, or from the guest's page cache: the same either way.
    ensure!(shell(&machine, "life", "side", "cat /opt/app/helpdesk.py")? == app, "a mounted image changed");
    ensure!(
        shell(&machine, "life", "main", "cat /opt/all/app/helpdesk.py")? == app,
        "a mounted image changed"
    );
    shell(&machine, "life", "side", "test -s /opt/etc/passwd")?;
    ensure!(shell(&machine, "life", "side", "cat /data/file")? == "kept");
    system_calls(class, &machine)?;
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
    let victims = class.sandboxes_of(&machine, &actor.worker_id);
    ensure!(!victims.is_empty(), "no sandbox of {}", actor.worker_id);
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
    let possessions = Possessions::of(&machine);
    let deleted = machine.cli(&["delete", "actor", "cat"])?;
    ensure!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stderr));
    machine.stop()?;
    possessions.gone(&machine)
}

/// Golden snapshots, forks and pauses. Each clone has entropy of its own at its first look, before any traffic.
async fn clones(class: &Class, count: usize) -> Result<()> {
    let mut machine = class.machine(2).await?;
    let look = if class.name == "gvisor" {
        "head -c 16 /dev/urandom | od -An -tx1 > /tmp/first"
    } else {
        "cat /proc/sys/kernel/random/uuid > /tmp/first"
    };
    class
        .counter(&mut machine, "origin", |spec| {
            spec.golden = true;
            spec.hooks = Some(types::Hooks {
                after_restore: Some(types::Hook {
                    command: ["/bin/sh", "-c", look].map(str::to_owned).into(),
                    ..Default::default()
                }),
                ..Default::default()
            });
        })
        .await?;
    // The maker takes a worker while another is free.
    let asked = ateapi::GetTemplateRequest { atespace: "default".into(), name: "origin-template".into() };
    let until = tokio::time::Instant::now() + PATIENCE * 2;
    loop {
        let template = machine.api.get_template(asked.clone()).await?.into_inner();
        if template.golden.iter().any(|golden| golden.state == "READY") {
            break;
        }
        ensure!(tokio::time::Instant::now() < until, "no golden snapshot: {:?}", template.golden);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (mut seen, mut nonces) = (BTreeSet::new(), BTreeSet::new());
    for number in 0..count {
        let name = format!("clone{number}");
        let create = ateapi::CreateActorRequest {
            atespace: "default".into(),
            name: name.clone(),
            spec: Some(types::ActorSpec { template: "origin-template".into(), ..Default::default() }),
            ..Default::default()
        };
        machine.api.create_actor(create).await?;
        let (counted, nonce) = machine.count(&name).await?;
        ensure!(counted == 1, "{name} counted {counted}");
        seen.insert(shell(&machine, &name, "main", "cat /tmp/first")?);
        nonces.insert(nonce);
        let delete = ateapi::DeleteActorRequest { actor: Some(actor(&name)), ..Default::default() };
        machine.api.delete_actor(delete).await?;
    }
    ensure!(nonces.len() == 1, "not all are clones of one memory: {nonces:?}");
    ensure!(seen.len() == count, "{} different of {count}: {seen:?}", seen.len());

    // A fork goes on by itself, the origin too; a pause keeps the memory on the node.
    let (count, nonce) = machine.count("origin").await?;
    machine.suspend("origin").await?;
    let fork = ateapi::ForkActorRequest {
        actor: Some(actor("origin")),
        new_name: "fork".into(),
        ..Default::default()
    };
    machine.api.fork_actor(fork).await?;
    for _ in 0..2 {
        machine.count("fork").await?;
    }
    ensure!(machine.count("origin").await? == (count + 1, nonce.clone()), "a fork changed its origin");
    ensure!(machine.count("fork").await? == (count + 3, nonce.clone()));
    let pause = ateapi::PauseActorRequest { actor: Some(actor("fork")), ..Default::default() };
    let paused = machine.api.pause_actor(pause).await?.into_inner();
    ensure!(paused.snapshot.context("no snapshot")?.durability() == types::Durability::Node);
    ensure!(machine.count("fork").await? == (count + 4, nonce), "a pause lost something");
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

#[tokio::test]
async fn gvisor_clones_are_alike_but_for_their_entropy() -> Result<()> {
    within(PATIENCE * 4, clones(&GVISOR, 5)).await
}

#[tokio::test]
async fn microvm_clones_are_alike_but_for_their_entropy() -> Result<()> {
    within(PATIENCE * 6, clones(&MICROVM, 20)).await
}

/// What goes wrong inside a guest or with its machine monitor: said, and nothing is lost.
#[tokio::test]
async fn a_microvms_misfortunes_are_said_and_cost_nothing_that_was_saved() -> Result<()> {
    within(PATIENCE * 6, misfortunes()).await
}

async fn misfortunes() -> Result<()> {
    let mut machine = MICROVM.machine(1).await?;
    // An image without the command.
    let missing = |spec: &mut TemplateSpec| spec.containers[0].command = vec!["/no/such/program".into()];
    let refused = MICROVM.counter(&mut machine, "none", missing).await.expect_err("it runs");
    ensure!(format!("{refused:#}").contains("/no/such/program"), "{refused:#}");
    machine.cli(&["delete", "actor", "none"])?;

    let root = |spec: &mut TemplateSpec| {
        spec.containers[0].security_context =
            Some(types::SecurityContext { run_as: "0".into(), ..Default::default() });
    };
    MICROVM.counter(&mut machine, "ill", root).await?;
    let (count, nonce) = machine.count("ill").await?;
    machine.suspend("ill").await?;
    machine.resume("ill").await?;
    // Out of memory: the guest's kernel ends who took it.
    let hungry = machine.cli(&["exec", "ill", "--", "/usr/bin/python3", "-S", "-c", "b'x' * (1 << 30)"])?;
    ensure!(matches!(hungry.status.code(), Some(137 | 1)), "{hungry:?}");
    let (next, same) = machine.count("ill").await?;
    ensure!((next, &same) == (count + 1, &nonce), "the actor went down with it");
    // The kernel panics, as it does when its first process, the agent, ends.
    machine.cli(&["exec", "ill", "--", "/bin/sh", "-c", "echo c > /proc/sysrq-trigger"])?;
    machine.wait_for("ill", ActorState::Suspended).await?;
    let events = machine.events("ill").await?;
    ensure!(events.iter().any(|(_, message)| message.contains("Kernel panic")), "{events:?}");
    ensure!(machine.count("ill").await? == (count + 1, nonce.clone()), "not what was saved");
    machine.suspend("ill").await?;
    machine.stop()?;

    // Another QEMU, by its content: refused, and the actor is where it was.
    let dir = machine.dir.clone();
    let copy = dir.join("qemu");
    let path = std::env::var_os("PATH").context("PATH")?;
    let qemu =
        std::env::split_paths(&path).map(|dir| dir.join("qemu-system-x86_64")).find(|path| path.exists());
    let mut bytes = std::fs::read(qemu.context("no QEMU: run scripts/setup")?)?;
    bytes.push(b'\n');
    std::fs::write(&copy, bytes)?;
    std::fs::set_permissions(&copy, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let kernel = workspace().join("target/tools/microvm");
    let (copy, kernel) = (copy.to_str().context("path")?, kernel.to_str().context("path")?);
    let more = ["--microvm-workers", "1", "--kernel", kernel, "--qemu", copy];
    let mut other = Machine::start_in(dir, None, 0, &more).await?;
    let until = tokio::time::Instant::now() + PATIENCE;
    while !other
        .api
        .list_workers(ateapi::ListWorkersRequest {})
        .await?
        .into_inner()
        .workers
        .iter()
        .any(|w| w.alive)
    {
        ensure!(tokio::time::Instant::now() < until, "no worker came up");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let refused = other.resume("ill").await.expect_err("restored by another QEMU").to_string();
    eprintln!("another QEMU: {refused}");
    ensure!(refused.contains("runtime"), "{refused}");
    ensure!(other.get("ill").await?.state() == ActorState::Suspended);
    // A verb leads on: a fresh boot, or the QEMU that it was.
    other.stop()?;
    machine.restart().await?;
    ensure!(machine.count("ill").await? == (count + 2, nonce), "not what was saved");
    machine.stop()
}
