// SPDX-License-Identifier: Apache-2.0
//! Real workers for the tests: the built `ateom-gvisor` and `ateom-microvm`, the pinned runsc, the distribution's QEMU,
//! the counter image.
#![allow(dead_code, missing_docs)]

use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use ateom::cgroup::{Cgroup, Hierarchy};
use prost::Message as _;
use substrate_proto::atenet::{EgressFrame, IngressOpen, IngressOpened, egress_frame, ingress_opened};
use substrate_proto::ateom::ateom_client::AteomClient;
use substrate_proto::ateom::*;
use substrate_proto::types::{
    Assignment, Compatibility, ExecInput, ExecOutput, ExecStart, HttpGet, Readiness, exec_input, exec_output,
};
use tonic::transport::Channel;

pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The pinned runsc; a machine without it fails, because scripts/setup can build it.
pub fn runsc() -> PathBuf {
    let path = std::env::var_os("SUBSTRATE_RUNSC")
        .map_or_else(|| workspace().join("target/tools/runsc"), PathBuf::from);
    assert!(path.exists(), "no runsc at {}: run scripts/setup, or set SUBSTRATE_RUNSC", path.display());
    assert!(nix::unistd::geteuid().is_root(), "these tests make namespaces and cgroups: run them as root");
    path
}

/// The counter image, unpacked once into the build's directory for tests.
pub fn rootfs() -> &'static Path {
    static ROOTFS: OnceLock<PathBuf> = OnceLock::new();
    ROOTFS.get_or_init(|| {
        let layout = workspace().join("target/images/counter");
        assert!(layout.exists(), "no image at {}: run scripts/build-image counter", layout.display());
        let blob = |digest: &str| layout.join("blobs/sha256").join(digest.strip_prefix("sha256:").unwrap());
        let json = |path: &Path| -> serde_json::Value {
            serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
        };
        let index = json(&layout.join("index.json"));
        let manifest = json(&blob(index["manifests"][0]["digest"].as_str().unwrap()));
        let digest = index["manifests"][0]["digest"].as_str().unwrap();
        let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let rootfs = tmp.join(format!("rootfs-{}", &digest[7..19]));
        if rootfs.exists() {
            return rootfs;
        }
        let unpacked = tempfile::tempdir_in(tmp).unwrap().keep();
        for layer in manifest["layers"].as_array().unwrap() {
            let status = Command::new("tar")
                .args(["-xf", blob(layer["digest"].as_str().unwrap()).to_str().unwrap(), "-C"])
                .arg(&unpacked)
                .status()
                .unwrap();
            assert!(status.success());
        }
        std::fs::set_permissions(&unpacked, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        // Another process may have been faster; both are the same.
        if std::fs::rename(&unpacked, &rootfs).is_err() {
            std::fs::remove_dir_all(&unpacked).unwrap();
        }
        rootfs
    })
}

/// The counter image as the read-only disk of microVMs, with its digest beside it.
pub fn erofs() -> &'static Path {
    static EROFS: OnceLock<PathBuf> = OnceLock::new();
    EROFS.get_or_init(|| {
        let rootfs = rootfs();
        let image = rootfs.with_extension("erofs");
        let digest = PathBuf::from(format!("{}.sha256", image.display()));
        if digest.exists() {
            return image;
        }
        let dir = tempfile::tempdir_in(rootfs.parent().unwrap()).unwrap();
        let made = dir.path().join("image");
        let status = Command::new("mkfs.erofs").arg("--quiet").args([&made, rootfs]).status();
        assert!(status.expect("mkfs.erofs: run scripts/setup").success());
        let output = Command::new("sha256sum").arg(&made).output().unwrap();
        std::fs::rename(&made, &image).unwrap();
        std::fs::write(&digest, &output.stdout[..64]).unwrap();
        image
    })
}

/// The distribution's QEMU.
pub fn qemu() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    let found = std::env::split_paths(&path).map(|dir| dir.join("qemu-system-x86_64")).find(|p| p.exists());
    found.expect("no qemu-system-x86_64: run scripts/setup")
}

/// The guests' kernel.
pub fn kernel() -> PathBuf {
    let path = workspace().join("target/tools/microvm");
    assert!(path.join("vmlinuz").exists(), "no kernel at {}: run scripts/setup", path.display());
    path
}

pub fn boottime_in(seconds: f64) -> i64 {
    ateom::boottime_ns() + (seconds * 1e9) as i64
}

/// A worker process with everything around it.
pub struct Worker {
    pub id: String,
    pub dir: tempfile::TempDir,
    pub process: Child,
    pub cgroup: Cgroup,
    pub client: AteomClient<Channel>,
}

impl Worker {
    pub async fn start(name: &str) -> Self {
        Self::start_in(name, tempfile::tempdir().unwrap()).await
    }

    /// Starts one with a state directory that may have had another before.
    pub async fn start_in(name: &str, dir: tempfile::TempDir) -> Self {
        let program = Path::new(env!("CARGO_BIN_EXE_ateom-gvisor"));
        Self::start_program(name, dir, program, &[("--runsc", runsc())]).await
    }

    /// Starts one of the microVM class.
    pub async fn start_microvm(name: &str) -> Self {
        Self::start_microvm_on(name, qemu()).await
    }

    /// Starts one of the microVM class on a machine monitor.
    pub async fn start_microvm_on(name: &str, vmm: PathBuf) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests make namespaces and cgroups: run them as root"
        );
        let program = Path::new(env!("CARGO_BIN_EXE_ateom-microvm"));
        let dir = tempfile::tempdir().unwrap();
        Self::start_program(name, dir, program, &[("--qemu", vmm), ("--kernel", kernel())]).await
    }

    async fn start_program(
        name: &str,
        dir: tempfile::TempDir,
        program: &Path,
        more: &[(&str, PathBuf)],
    ) -> Self {
        let id = format!("t{}-{name}", std::process::id());
        let cgroup_name = format!("substrate-test/{id}");
        let cgroup = Cgroup::at(&Hierarchy::detect().unwrap(), &cgroup_name);
        let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.path().join("log")).unwrap();
        let mut command = Command::new(program);
        for (option, path) in more {
            command.arg(option).arg(path);
        }
        command
            .args(["--worker-id", &id, "--pool", "test", "--cgroup", &cgroup_name])
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .arg("--run-dir")
            .arg(dir.path().join("run"))
            .arg("--egress-socket")
            .arg(dir.path().join("egress.sock"))
            .env("SUBSTRATE_LOG", "debug,h2=info,hyper=info,tower=info")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0);
        let process = command.spawn().unwrap();
        let socket = dir.path().join("run/ateom.sock");
        let deadline = Instant::now() + Duration::from_secs(30);
        let client = loop {
            if let Ok(client) = AteomClient::connect(format!("unix:{}", socket.display())).await {
                break client;
            }
            assert!(
                Instant::now() < deadline,
                "the worker does not serve:\n{}",
                std::fs::read_to_string(dir.path().join("log")).unwrap()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        Self { id, dir, process, cgroup, client }
    }

    pub fn assignment(&self, uid: &str, generation: u64) -> Assignment {
        Assignment {
            actor_uid: uid.to_owned(),
            atespace: "default".to_owned(),
            actor_name: format!("name-of-{uid}"),
            generation,
            worker_id: self.id.clone(),
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// A spec of the counter, with the image's own settings.
    pub fn counter(&self) -> SandboxSpec {
        let ate = self.dir.path().join("ate");
        std::fs::create_dir_all(&ate).unwrap();
        std::fs::write(ate.join("name"), "first\n").unwrap();
        let container = ResolvedContainer {
            name: "counter".into(),
            image_digest: "sha256:counter".into(),
            rootfs: rootfs().display().to_string(),
            args: ["/usr/bin/python3", "-S", "/app/counter.py"].map(str::to_owned).into(),
            env: ["PATH=/usr/local/bin:/usr/bin:/bin", "PORT=8080", "PYTHONUNBUFFERED=1"]
                .map(str::to_owned)
                .into(),
            working_dir: "/home/agent".into(),
            uid: 1000,
            gid: 1000,
            readiness: Some(Readiness {
                http_get: Some(HttpGet { path: "/healthz".into(), port: 8080 }),
                ..Readiness::default()
            }),
            mounts: vec![Mount {
                source: ate.display().to_string(),
                destination: "/run/ate".into(),
                read_only: true,
                kind: "bind".into(),
                late_bound: true,
                size_bytes: 0,
                subpath: String::new(),
            }],
            log_path: self.dir.path().join("logs/counter.log").display().to_string(),
            ..ResolvedContainer::default()
        };
        SandboxSpec {
            containers: vec![container],
            memory_bytes: 512 << 20,
            pids: 256,
            hostname: "counter".into(),
            ingress_port: 8080,
            ..SandboxSpec::default()
        }
    }

    /// The counter in a microVM.
    pub fn guest(&self) -> SandboxSpec {
        let mut spec = self.counter();
        spec.containers[0].rootfs = erofs().display().to_string();
        spec.memory_bytes = 192 << 20;
        spec
    }

    /// The counter with another program.
    pub fn program(&self, args: &[&str]) -> SandboxSpec {
        let mut spec = self.counter();
        spec.containers[0].args = args.iter().map(|arg| (*arg).to_owned()).collect();
        spec.containers[0].readiness = None;
        spec
    }

    pub async fn run(&mut self, who: &Assignment, spec: SandboxSpec) -> Result<RunResponse, tonic::Status> {
        let request = RunRequest {
            assignment: Some(who.clone()),
            spec: Some(spec),
            lease_deadline_ns: boottime_in(60.0),
        };
        self.client.run(request).await.map(tonic::Response::into_inner)
    }

    pub async fn restore(
        &mut self,
        who: &Assignment,
        spec: SandboxSpec,
        directory: &Path,
        compatibility: &Compatibility,
    ) -> Result<RestoreResponse, tonic::Status> {
        let request = RestoreRequest {
            assignment: Some(who.clone()),
            spec: Some(spec),
            directory: directory.display().to_string(),
            compatibility: Some(compatibility.clone()),
            lease_deadline_ns: boottime_in(60.0),
            clone: false,
        };
        self.client.restore(request).await.map(tonic::Response::into_inner)
    }

    pub async fn checkpoint(
        &mut self,
        who: &Assignment,
        directory: &Path,
        mode: checkpoint_request::Mode,
    ) -> Result<CheckpointResponse, tonic::Status> {
        std::fs::create_dir_all(directory).unwrap();
        let request = CheckpointRequest {
            assignment: Some(who.clone()),
            directory: directory.display().to_string(),
            mode: mode.into(),
            only_if_idle: false,
            drain_ms: 1000,
        };
        self.client.checkpoint(request).await.map(tonic::Response::into_inner)
    }

    pub async fn terminate(&mut self, who: &Assignment) -> Result<(), tonic::Status> {
        self.client.terminate(TerminateRequest { assignment: Some(who.clone()) }).await.map(drop)
    }

    pub async fn set_lease(
        &mut self,
        uid: &str,
        generation: u64,
        deadline_ns: i64,
    ) -> Result<(), tonic::Status> {
        let request = SetLeaseRequest { actor_uid: uid.to_owned(), generation, deadline_ns };
        self.client.set_lease(request).await.map(drop)
    }

    pub async fn status(&mut self) -> SlotStatus {
        self.client.get_status(GetStatusRequest {}).await.unwrap().into_inner()
    }

    /// Watches until a status satisfies, at most 20 s.
    pub async fn wait_status(&mut self, what: &str, wanted: impl Fn(&SlotStatus) -> bool) -> SlotStatus {
        let mut events = self.client.watch(WatchRequest {}).await.unwrap().into_inner();
        let mut last = None;
        let found = tokio::time::timeout(Duration::from_secs(20), async {
            while let Some(event) = events.message().await.unwrap() {
                if let Some(slot_event::Event::Status(status)) = event.event {
                    if wanted(&status) {
                        return Some(status);
                    }
                    last = Some(status);
                }
            }
            None
        })
        .await;
        match found {
            Ok(Some(status)) => status,
            _ => panic!("never {what}, last {last:?}; log:\n{}", self.log()),
        }
    }

    pub async fn wait_phase(&mut self, phase: slot_status::Phase) -> SlotStatus {
        self.wait_status(phase.as_str_name(), |status| status.phase() == phase).await
    }

    /// Waits until the next sandbox is created ahead.
    pub async fn wait_prepared(&mut self) {
        self.wait_status("prepared", |status| status.prepared).await;
    }

    /// Dials the ingress; the connection when the actor answers.
    pub fn dial(&self, who: &Assignment, port: u32) -> Result<UnixStream, (ingress_opened::Code, String)> {
        let mut stream = UnixStream::connect(self.dir.path().join("run/ingress.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let open = IngressOpen {
            actor_uid: who.actor_uid.clone(),
            generation: who.generation,
            port,
            ..IngressOpen::default()
        };
        stream.write_all(&open.encode_length_delimited_to_vec()).unwrap();
        let mut length = [0];
        stream.read_exact(&mut length).unwrap();
        let mut message = vec![0; usize::from(length[0])];
        stream.read_exact(&mut message).unwrap();
        let opened = IngressOpened::decode(message.as_slice()).unwrap();
        match opened.code() {
            ingress_opened::Code::Ok => Ok(stream),
            code => Err((code, opened.message)),
        }
    }

    /// One HTTP request through the ingress; the body of its answer.
    pub fn get(&self, who: &Assignment, path: &str) -> String {
        let mut stream = self.dial(who, 0).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP: {answer:?}")).1.to_owned()
    }

    pub fn count(&self, who: &Assignment) -> (u64, String) {
        let value: serde_json::Value = serde_json::from_str(&self.get(who, "/")).unwrap();
        (value["count"].as_u64().unwrap(), value["nonce"].as_str().unwrap().to_owned())
    }

    /// Runs a process: (exit code, stdout, stderr).
    pub async fn exec(&mut self, who: &Assignment, start: ExecStart, stdin: &[u8]) -> (i32, String, String) {
        let start = ExecStart { assignment: Some(who.clone()), ..start };
        let messages = vec![
            exec_input::Input::Start(start),
            exec_input::Input::Stdin(stdin.to_vec()),
            exec_input::Input::CloseStdin(true),
        ];
        let input = tokio_stream::iter(messages.into_iter().map(|input| ExecInput { input: Some(input) }));
        let mut output = self.client.exec(input).await.unwrap().into_inner();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        while let Some(ExecOutput { output: Some(message) }) = output.message().await.unwrap() {
            match message {
                exec_output::Output::Stdout(bytes) => out.extend(bytes),
                exec_output::Output::Stderr(bytes) => err.extend(bytes),
                exec_output::Output::Exit(exit) => {
                    let text = |bytes| String::from_utf8(bytes).unwrap();
                    return (exit.code, text(out), text(err));
                }
                exec_output::Output::Started(_) => {}
            }
        }
        panic!("no exit; {}", self.log());
    }

    pub async fn shutdown(mut self) {
        self.client.shutdown(ShutdownRequest {}).await.unwrap();
        assert!(self.process.wait().unwrap().success(), "{}", self.log());
        assert!(!self.cgroup.is_populated().unwrap());
        assert!(self.cgroup.children().is_empty());
        assert!(!self.dir.path().join("state/worker.json").exists());
        let left: Vec<_> = std::fs::read_dir(self.dir.path().join("state/sandboxes")).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of worker {}:\n{}", self.id, self.log());
        }
        self.cgroup.kill_and_wait_empty(Duration::from_secs(10)).unwrap();
        drop(self.process.wait());
        self.cgroup.remove().unwrap();
        // What a killed worker had mounted, the innermost first.
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let points: Vec<&str> = text.lines().filter_map(|line| line.split(' ').nth(4)).collect();
        for point in
            points.into_iter().rev().map(Path::new).filter(|point| point.starts_with(self.dir.path()))
        {
            nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH).unwrap();
        }
    }
}

pub fn sh(script: &str) -> ExecStart {
    ExecStart { command: ["/bin/sh", "-c", script].map(str::to_owned).into(), ..ExecStart::default() }
}

/// An egress proxy that records frames.
pub struct Proxy {
    connection: OwnedFd,
}

impl Proxy {
    /// Listens where the worker dials; call before it starts, then `accept`.
    pub fn listen(path: &Path) -> OwnedFd {
        use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        listen(&fd, Backlog::new(8).unwrap()).unwrap();
        fd
    }

    pub fn accept(listener: &OwnedFd) -> Self {
        use nix::sys::socket::{SockFlag, accept4, setsockopt, sockopt};
        let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).unwrap();
        // SAFETY: the kernel just made it for us.
        let connection = unsafe { OwnedFd::from_raw_fd(fd) };
        setsockopt(&connection, sockopt::ReceiveTimeout, &nix::sys::time::TimeVal::new(10, 0)).unwrap();
        Self { connection }
    }

    pub fn receive(&self) -> (egress_frame::Frame, Option<OwnedFd>) {
        use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
        let mut buffer = vec![0; 65536];
        let mut control = nix::cmsg_space!([i32; 4]);
        let mut slices = [std::io::IoSliceMut::new(&mut buffer)];
        let message =
            recvmsg::<()>(self.connection.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::empty())
                .unwrap();
        let mut fd = None;
        for part in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(fds) = part {
                // SAFETY: the kernel just made it for us.
                fd = fds.first().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
            }
        }
        let length = message.bytes;
        (EgressFrame::decode(&buffer[..length]).unwrap().frame.unwrap(), fd)
    }

    pub fn send(&self, frame: egress_frame::Frame) {
        let bytes = EgressFrame { frame: Some(frame) }.encode_to_vec();
        nix::unistd::write(&self.connection, &bytes).unwrap();
    }
}
