// SPDX-License-Identifier: Apache-2.0
//! QEMU, in full: q35 with virtio on PCI, driven over QMP.
//!
//! ```text
//! boot      memory file (tmpfs, shared) → start ─▶ QMP and agent connect to us → running
//! snapshot  [stopped] migrate → device file ─▶ written pages copied [─▶ goes on] ─▶ the rest copied
//! restore   start on the snapshot's memory file, waiting ─▶ migrate-incoming ◀─ device file → [stopped]
//! ```
//! **Memory** is a file that QEMU maps shared, so a snapshot's stream holds devices only (`x-ignore-shared`) and a stop
//! costs milliseconds at any size. A machine that is restored maps the snapshot's own file privately: it copies nothing,
//! and clones share the page cache. QEMU would then put all its memory into the stream of the next snapshot, so it is
//! made to believe that the mapping is shared ([`PRELOAD`], `preload/private.rs`); that it is not is looked at before a
//! guest instruction runs. What it has written is found as `memory` says. The same library has the kernel note what a
//! machine that was booted writes (userfaultfd(2), where it can), so that most of its memory is copied before it stands
//! still.
//!
//! **KVM** where it is proven ([`super::accelerator`]), TCG everywhere else. The flags were measured under the latter: no
//! VM ports, SMBus, SATA, USB; a small translation cache; a named processor with a fixed set of features; the HPET as
//! clock source. The machine type is a versioned one.
//!
//! **The process** has an empty network namespace, no new privileges, QEMU's own system call filter, and is `nobody`
//! from the end of its start: every file is opened before, or handed over as a descriptor.
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::json;
use substrate_proto::ateom::SnapshotFile;
use tokio::net::{UnixListener, UnixStream};

use super::accelerator::Accelerator;
use super::jail;
use super::memory::{self, Ahead, Private, Rest};
use super::process::{self, Place, Process, Program};
use super::qmp::{Qmp, QmpError};
use super::spec::Machine;
use super::vmm::{self, Capabilities, Home, Kernel, Saved, Vm, Vmm, parse_version};
use crate::cgroup::blocking;
use crate::microvm::MicrovmError;
use crate::network::ACTOR_MAC;
use crate::runtime::{RuntimeError, Steps, file_error};

/// The oldest that is known to work.
const OLDEST: (u32, u32) = (7, 2);
/// What the guest sees: x86-64-v2, which every TCG and every host of the last decade offers.
pub(super) const CPU: &str = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt";
/// How long QEMU may take to connect to us, and for a command.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long saving or loading devices may take.
const DEVICE_LIMIT: Duration = Duration::from_mins(1);
/// What is preloaded into a QEMU that restores; see build.rs.
pub const PRELOAD: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/private.so"));
/// By which it finds the memory file of a machine that is restored.
const PRIVATE: &str = "ATEOM_PRIVATE_MEMORY";
/// By which it finds that of a machine that is booted.
const TRACKED: &str = "ATEOM_TRACKED_MEMORY";
/// Devices that every machine has beside its disks, as the guest sees them.
const DEVICE_LIST: &str = "virtio-serial-pci virtserialport virtio-balloon-pci virtio-net-pci";
/// Bytes that the guest has written and that are held in our memory while it stands still and is to go on soon; what is
/// more goes to the disk's cache at once, which takes longer.
const HELD: u64 = 128 << 20;
/// Name of the memory file in a snapshot.
pub const MEMORY: &str = "memory";
/// Name of the devices' file in a snapshot.
pub const DEVICES: &str = "devices";
/// Whether writable, of the descriptors of each disk that may be written to.
const FILE_MODES: [bool; 2] = [true, false];
/// Between attempts to go on after a failed snapshot.
const SETTLE: Duration = Duration::from_millis(10);

/// The QEMU backend for one binary and kernel.
#[derive(Debug)]
pub struct Qemu {
    binary: PathBuf,
    machine: String,
    kernel: Kernel,
    preload: PathBuf,
    accelerator: Accelerator,
    capabilities: Capabilities,
}

impl Qemu {
    /// Looks at a binary; `preload` is where [`PRELOAD`] is, `choose` decides on the accelerator for a machine type and
    /// kernel. Runs it: call before children are reaped elsewhere.
    ///
    /// # Errors
    /// [`MicrovmError`] naming what it lacks.
    pub fn new(
        binary: &Path,
        digest: String,
        kernel: Kernel,
        preload: PathBuf,
        choose: impl FnOnce(&str, &Kernel) -> Result<Accelerator, MicrovmError>,
    ) -> Result<Self, MicrovmError> {
        let unsuitable = |lack: String| MicrovmError::Unsuitable { path: binary.to_owned(), lack };
        let said = process::ask(binary, &["--version"])?;
        let version = said
            .lines()
            .next()
            .and_then(|line| line.strip_prefix("QEMU emulator version "))
            .ok_or_else(|| {
                unsuitable(format!("is no QEMU: it says {:?}", said.lines().next().unwrap_or_default()))
            })?
            .to_owned();
        if parse_version(&version).is_none_or(|version| version < OLDEST) {
            return Err(unsuitable(format!(
                "is version {version}, too old: {}.{} or newer is needed",
                OLDEST.0, OLDEST.1
            )));
        }
        let machines = process::ask(binary, &["-machine", "help"])?;
        let machine =
            versioned_machine(&machines).ok_or_else(|| unsuitable("has no q35 machine".to_owned()))?;
        let accelerator = choose(&machine, &kernel)?;
        let accel = accelerator.name();
        let requires = [("accel", accel), ("machine", &machine), ("cpu", CPU), ("devices", DEVICE_LIST)];
        let capabilities = Capabilities {
            name: "qemu",
            version: format!("{version} ({accel})"),
            digest,
            experimental: false,
            pause: true,
            incremental: false,
            restore_requires: requires
                .into_iter()
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .collect::<BTreeMap<_, _>>(),
            // Of the named processor: nothing more of the host's shows.
            cpu_features: Vec::new(),
        };
        Ok(Self { binary: binary.to_owned(), machine, kernel, preload, accelerator, capabilities })
    }

    /// The command line. The same for a boot and a restore but for the last words.
    fn arguments(&self, home: &Home, machine: &Machine, memory: &Path, incoming: bool) -> Vec<String> {
        let mac = ACTOR_MAC.map(|byte| format!("{byte:02x}")).join(":");
        let mut args: Vec<String> = [
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-runas",
            "65534:65534",
            "-sandbox",
            "on,obsolete=deny,spawn=deny,resourcecontrol=deny",
        ]
        .map(str::to_owned)
        .to_vec();
        args.extend(self.accelerator.arguments());
        let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
        add(
            "-machine",
            format!("{},vmport=off,smbus=off,sata=off,usb=off,memory-backend=memory", self.machine),
        );
        add("-smp", machine.processors.to_string());
        add("-m", format!("{}M", machine.memory >> 20));
        add(
            "-object",
            format!(
                "memory-backend-file,id=memory,size={},mem-path={},share=on",
                machine.memory,
                comma(memory)
            ),
        );
        add("-kernel", self.kernel.image.display().to_string());
        add("-initrd", self.kernel.initramfs.display().to_string());
        add("-append", kernel_command_line(self.accelerator) + vmm::arguments(machine));
        add("-chardev", format!("file,id=console,path={}", comma(&home.memory.join("console"))));
        add("-serial", "chardev:console".to_owned());
        add("-chardev", "socket,id=qmp,path=qmp.sock,server=off".to_owned());
        add("-mon", "chardev=qmp,mode=control".to_owned());
        add("-chardev", "socket,id=agent,path=agent.sock,server=off".to_owned());
        add("-device", "virtio-serial-pci,id=serial,max_ports=2".to_owned());
        add("-device", format!("virtserialport,chardev=agent,name={}", ateom_guest::PORT));
        add("-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on".to_owned());
        add("-netdev", format!("tap,id=net,fd={}", jail::TAP));
        add("-device", format!("virtio-net-pci,netdev=net,mac={mac},romfile="));
        let mut fd = jail::FILES;
        for (number, disk) in machine.disks.iter().enumerate() {
            let serial = &disk.serial;
            let (access, path) = if disk.read_only {
                ("on", comma(&disk.path))
            } else {
                // Opened again, in the other mode, around each snapshot.
                for _ in FILE_MODES {
                    add("-add-fd", format!("fd={fd},set={number}"));
                    fd += 1;
                }
                ("off", format!("/dev/fdset/{number}"))
            };
            add(
                "-drive",
                format!(
                    "if=none,id={serial},format=raw,readonly={access},discard=unmap,file.locking=off,file={path}"
                ),
            );
            add("-device", format!("virtio-blk-pci,drive={serial},serial={serial}"));
        }
        if incoming {
            add("-incoming", "defer".to_owned());
        }
        args
    }

    /// Starts it, on the memory of a snapshot where one is given.
    async fn start(
        &self,
        home: Home,
        machine: &Machine,
        saved: Option<(&Path, File)>,
    ) -> Result<QemuVm, RuntimeError> {
        let live = home.memory.join(MEMORY);
        let memory = saved.as_ref().map_or(live.as_path(), |(path, _)| path);
        let (qmp, agent) = (listen(&home.directory, "qmp.sock")?, listen(&home.directory, "agent.sock")?);
        let args = self.arguments(&home, machine, memory, saved.is_some());
        let (name, meta) = match &saved {
            Some((_, file)) => (PRIVATE, file.metadata()),
            None => (TRACKED, std::fs::metadata(&live)),
        };
        let meta = meta.map_err(file_error("look at", memory))?;
        let environment = [
            ("LD_PRELOAD", self.preload.display().to_string()),
            (name, format!("{}:{}", meta.dev(), meta.ino())),
        ];
        let writable = machine.disks.iter().filter(|disk| !disk.read_only);
        let files: Vec<(bool, PathBuf)> =
            writable.flat_map(|disk| FILE_MODES.map(|write| (write, disk.path.clone()))).collect();
        let program =
            Program { who: "QEMU", binary: &self.binary, files: &files, environment: &environment, args };
        let place = Place {
            directory: &home.directory,
            launcher: &home.launcher,
            network_namespace: &home.network_namespace,
        };
        let console = home.memory.join("console");
        let process = process::start(place, program, Some(home.tap), console).await?;
        let connect = async {
            let (qmp, agent) = tokio::try_join!(accept(&qmp), accept(&agent))?;
            let pid = qmp.peer_cred().ok().and_then(|peer| peer.pid());
            let mut qmp = Qmp::new(qmp).await.map_err(RuntimeError::from)?;
            let capabilities =
                ["events", "x-ignore-shared"].map(|name| json!({"capability": name, "state": true}));
            qmp.execute("migrate-set-capabilities", json!({"capabilities": capabilities}))
                .await
                .map_err(RuntimeError::from)?;
            // 128 MB/s by default, which would throttle even a small stream.
            qmp.execute("migrate-set-parameters", json!({"max-bandwidth": 1_u64 << 40}))
                .await
                .map_err(RuntimeError::from)?;
            Ok::<_, RuntimeError>((qmp, agent, pid))
        };
        let (qmp, agent, pid) = tokio::select! {
            biased;
            connected = tokio::time::timeout(START_LIMIT, connect) => match connected {
                // It says why when it is dead.
                Ok(Err(error)) => return Err(process.because(error).await),
                Ok(Ok(connected)) => connected,
                Err(_) => {
                    let what = "QEMU's start".to_owned();
                    return Err(RuntimeError::Timeout { what, seconds: START_LIMIT.as_secs() });
                }
            },
            why = process.end() => return Err(RuntimeError::Failed(format!("QEMU did not start: {why}"))),
        };
        let memory = match saved {
            None => Memory::Live(live, pid),
            Some((path, file)) => {
                let found = pid
                    .ok_or_else(|| io::Error::other("its process is not known"))
                    .and_then(|pid| Private::find(pid, file, machine.memory));
                Memory::Private(found.map_err(|error| {
                    RuntimeError::Failed(format!(
                        "QEMU cannot run on {} without changing it: {error}; is {} a QEMU that loads shared libraries?",
                        path.display(),
                        self.binary.display()
                    ))
                })?)
            }
        };
        Ok(QemuVm {
            qmp: tokio::sync::Mutex::new(qmp),
            agent: Mutex::new(Some(agent)),
            process,
            memory,
            size: machine.memory,
            ahead: Mutex::new(None),
        })
    }
}

/// The kernel's arguments.
pub(super) fn kernel_command_line(accelerator: Accelerator) -> String {
    // Freed memory is reported in pieces of 128 KiB: with the kernel's 2 MiB, what fragments never is.
    format!(
        "console=ttyS0 quiet loglevel=4 panic=-1 page_reporting.page_reporting_order=5 8250.nr_uarts=1 \
         i8042.noaux i8042.nokbd{}",
        accelerator.kernel_arguments()
    )
}

/// A path in QEMU's option syntax: a comma is written twice.
pub(super) fn comma(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// The versioned type that `q35` is an alias of.
fn versioned_machine(help: &str) -> Option<String> {
    let line = help.lines().find(|line| line.split_whitespace().next() == Some("q35"))?;
    let (_, alias) = line.split_once("(alias of ")?;
    alias.split(')').next().map(str::to_owned)
}

/// Listens in a directory whose path may be longer than a socket's address.
fn listen(directory: &Path, name: &str) -> Result<UnixListener, RuntimeError> {
    let path = directory.join(name);
    let open = File::open(directory).map_err(file_error("open", directory))?;
    let short = format!("/proc/self/fd/{}/{name}", open.as_raw_fd());
    UnixListener::bind(short).map_err(file_error("listen on", &path))
}

async fn accept(listener: &UnixListener) -> Result<UnixStream, RuntimeError> {
    let accepted = listener.accept().await;
    accepted
        .map(|(stream, _)| stream)
        .map_err(|error| RuntimeError::Failed(format!("QEMU cannot connect: {error}")))
}

#[async_trait]
impl Vmm for Qemu {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn boot(&self, home: Home, machine: &Machine, steps: &Steps) -> Result<Box<dyn Vm>, RuntimeError> {
        let path = home.memory.join(MEMORY);
        memory::create(&path, machine.memory).map_err(file_error("create", &path))?;
        let vm = steps.time("vmm_start", self.start(home, machine, None)).await?;
        Ok(Box::new(vm))
    }

    async fn restore(
        &self,
        home: Home,
        machine: &Machine,
        directory: &Path,
        steps: &Steps,
    ) -> Result<Box<dyn Vm>, RuntimeError> {
        let path = directory.join(MEMORY);
        let devices = directory.join(DEVICES);
        let devices = File::open(&devices).map_err(file_error("open", &devices))?;
        let saved = File::open(&path).map_err(file_error("open", &path))?;
        let length = saved.metadata().map_err(file_error("look at", &path))?.len();
        if length != machine.memory {
            return Err(RuntimeError::Failed(format!(
                "{} has {length} bytes, the machine has {} of memory: the snapshot is damaged",
                path.display(),
                machine.memory
            )));
        }
        let vm = steps.time("vmm_start", self.start(home, machine, Some((&path, saved)))).await?;
        steps.time("devices", vm.load(devices.into())).await?;
        Ok(Box::new(vm))
    }
}

/// Where a machine's memory is.
#[derive(Debug)]
enum Memory {
    /// In a file of its own, which the process with this pid writes to.
    Live(PathBuf, Option<i32>),
    /// In a snapshot's file, but for what it has written.
    Private(Private),
}

/// A machine.
#[derive(Debug)]
struct QemuVm {
    qmp: tokio::sync::Mutex<Qmp>,
    agent: Mutex<Option<UnixStream>>,
    process: Process,
    memory: Memory,
    size: u64,
    /// What was copied for the next snapshot, into this file.
    ahead: Mutex<Option<(PathBuf, Ahead)>>,
}

impl QemuVm {
    /// A command or more, within a limit; a machine that dies meanwhile says why.
    async fn within<T>(
        &self,
        what: &str,
        limit: Duration,
        work: impl Future<Output = Result<T, QmpError>>,
    ) -> Result<T, RuntimeError> {
        match tokio::time::timeout(limit, work).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(QmpError::Gone(during))) => {
                let error = RuntimeError::Failed(format!("QEMU ended during {during}"));
                Err(self.process.because(error).await)
            }
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(RuntimeError::Timeout { what: what.to_owned(), seconds: limit.as_secs() }),
        }
    }

    async fn command(&self, command: &str) -> Result<(), RuntimeError> {
        let mut qmp = self.qmp.lock().await;
        self.within(command, START_LIMIT, qmp.execute(command, json!({}))).await.map(drop)
    }

    /// Takes the state of the devices.
    async fn load(&self, devices: OwnedFd) -> Result<(), RuntimeError> {
        let mut qmp = self.qmp.lock().await;
        self.within("loading the devices", DEVICE_LIMIT, async {
            qmp.execute_with("getfd", json!({"fdname": DEVICES}), Some(devices.as_fd())).await?;
            qmp.execute("migrate-incoming", json!({"uri": format!("fd:{DEVICES}")})).await?;
            qmp.migrated("loading the devices").await
        })
        .await
    }

    async fn save(&self, devices: OwnedFd) -> Result<(), RuntimeError> {
        let mut qmp = self.qmp.lock().await;
        self.within("saving the devices", DEVICE_LIMIT, async {
            qmp.execute_with("getfd", json!({"fdname": DEVICES}), Some(devices.as_fd())).await?;
            qmp.execute("migrate", json!({"uri": format!("fd:{DEVICES}")})).await?;
            qmp.migrated("saving the devices").await
        })
        .await
    }
}

#[async_trait]
impl Vm for QemuVm {
    fn agent(&self) -> Option<UnixStream> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    async fn pause(&self) -> Result<(), RuntimeError> {
        self.command("stop").await
    }

    async fn resume(&self) -> Result<(), RuntimeError> {
        // A failed migration is told before it is over, and no event says when it is.
        let settle = async {
            loop {
                match self.command("cont").await {
                    Err(error) if error.to_string().contains("not finalized") => {
                        tokio::time::sleep(SETTLE).await;
                    }
                    other => return other,
                }
            }
        };
        tokio::time::timeout(START_LIMIT, settle).await.unwrap_or_else(|_| {
            Err(RuntimeError::Timeout { what: "going on".to_owned(), seconds: START_LIMIT.as_secs() })
        })
    }

    async fn copy_ahead(&self, directory: &Path, steps: &Steps) -> Result<(), RuntimeError> {
        let Memory::Live(path, Some(pid)) = &self.memory else { return Ok(()) };
        let to = directory.join(MEMORY);
        let live = File::open(path).map_err(file_error("open", path))?;
        let saved = memory::create(&to, self.size).map_err(file_error("create", &to))?;
        let (pid, size) = (*pid, self.size);
        let begun = steps.time("ahead", blocking(move || Ahead::begin(pid, live, saved, size))).await;
        let begun = match begun {
            Ok(ahead) => Some((to, ahead)),
            Err(error) => {
                // All of it then is copied while the machine stands still.
                tracing::debug!(%error, "cannot copy memory ahead");
                std::fs::remove_file(&to).map_err(file_error("remove", &to))?;
                None
            }
        };
        *self.ahead.lock().unwrap_or_else(PoisonError::into_inner) = begun;
        Ok(())
    }

    async fn snapshot(
        &self,
        directory: &Path,
        keep_running: bool,
        steps: &Steps,
    ) -> Result<Saved, RuntimeError> {
        let path = directory.join(DEVICES);
        let before = Instant::now();
        let devices = memory::create(&path, 0).map_err(file_error("create", &path))?;
        let kept = devices.try_clone().map_err(file_error("open", &path))?;
        self.save(devices.into()).await?;
        steps.add("devices", before);
        let to = directory.join(MEMORY);
        let size = self.size;
        let ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner).take();
        let saved = match &ahead {
            Some((path, _)) if *path == to => None,
            _ => Some(memory::create(&to, size).map_err(file_error("create", &to))?),
        };
        let rest = match (saved, ahead, &self.memory) {
            (None, ahead, _) => {
                let finish = blocking(move || ahead.map_or(Ok(0), |(_, ahead)| ahead.finish()));
                let bytes = steps.time("memory", finish).await.map_err(file_error("copy memory to", &to))?;
                tracing::debug!(bytes, "copied what the guest has written meanwhile");
                None
            }
            (Some(saved), _, Memory::Live(path, _)) => {
                let live = File::open(path).map_err(file_error("open", path))?;
                let rest = Rest::of(live, saved, size);
                if keep_running {
                    // It writes to the file as soon as it goes on.
                    let copy = blocking(move || rest.copy());
                    steps.time("memory", copy).await.map_err(file_error("copy memory to", &to))?;
                    None
                } else {
                    Some(rest)
                }
            }
            (Some(saved), _, Memory::Private(private)) => {
                let private = private.clone();
                let room = if keep_running { HELD } else { 0 };
                let copy = blocking(move || {
                    let rest = private.copy_dirty(saved, room, memory::threads())?;
                    tracing::debug!(bytes = rest.dirty(), "copied what the guest has written");
                    Ok::<_, io::Error>(rest)
                });
                Some(steps.time("memory", copy).await.map_err(file_error("copy memory to", &to))?)
            }
        };
        let length = kept.metadata().map_err(file_error("look at", &path))?.len();
        let file = |name: &str, size, memory| SnapshotFile { name: name.to_owned(), size, memory };
        Ok(Saved { files: vec![file(DEVICES, length, false), file(MEMORY, size, true)], rest })
    }

    async fn died(&self) -> String {
        self.process.end().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_machines_are_read_from_qemus_words() {
        assert_eq!(parse_version("7.2.22 (Debian 1:7.2+dfsg-7)"), Some((7, 2)));
        assert_eq!(parse_version("10.0.2"), Some((10, 0)));
        assert_eq!(parse_version("53.0-246-gae44c2971"), Some((53, 0)));
        assert_eq!(parse_version("git"), None);
        let help = "Supported machines are:\npc  Standard PC (alias of pc-i440fx-7.2)\n\
                    q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)\n\
                    pc-q35-7.2           Standard PC (Q35 + ICH9, 2009)\n";
        assert_eq!(versioned_machine(help).as_deref(), Some("pc-q35-7.2"));
        assert_eq!(versioned_machine("none"), None);
    }

    #[test]
    fn what_cannot_be_used_is_named_with_its_way_out() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let kernel = Kernel { image: "/k".into(), initramfs: "/i".into() };
        let refused = |path: &Path| {
            let emulation = |_: &str, _: &Kernel| Ok(Accelerator::Tcg);
            Qemu::new(path, "d".into(), kernel.clone(), "/p".into(), emulation).unwrap_err().to_string()
        };
        let script = |text: &str| {
            let path = dir.path().join("qemu");
            std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            refused(&path)
        };
        let missing = refused(&dir.path().join("none"));
        assert!(missing.contains("none") && missing.contains("scripts/setup"), "{missing}");
        let old = script("echo 'QEMU emulator version 6.2.0'");
        assert!(old.contains("6.2.0") && old.contains("7.2 or newer"), "{old}");
        let other = script("echo 'runsc version 1'");
        assert!(other.contains("is no QEMU"), "{other}");
        let crashing = script("echo 'no such library' >&2; exit 127");
        assert!(crashing.contains("127") && crashing.contains("no such library"), "{crashing}");
    }
}
