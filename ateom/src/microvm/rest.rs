// SPDX-License-Identifier: Apache-2.0
//! A machine monitor that serves HTTP on a Unix socket, and the way to its guest's vsock ports: what cloud-hypervisor and
//! Firecracker have in common. Each has its own words in its own file.
//!
//! Both bind their sockets themselves and tell nobody when: the first connection is
//! tried until it is taken or the process is dead. Disks and sockets have names relative to the machine's directory, so
//! that what a snapshot says of them is true in every place.
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use substrate_proto::ateom::SnapshotFile;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::process::{self, Place, Process, Program};
use super::spec::Machine;
use super::vmm::{AGENT_PORT, Capabilities, Home, Saved};
use crate::microvm::MicrovmError;
use crate::runtime::{RuntimeError, file_error};

/// Names in the machine's directory.
pub const API: &str = "api.sock";
/// See [`API`].
pub const AGENT: &str = "agent.sock";
/// See [`API`].
pub const CONSOLE: &str = "console";
/// How long a monitor may take to serve, and for a request. A snapshot writes all memory.
const LIMIT: Duration = Duration::from_mins(1);
/// Between attempts to connect.
const AGAIN: Duration = Duration::from_millis(2);
/// Longest answer to a `CONNECT`.
const ANSWER: usize = 64;

/// What a binary can do, if it is of this monitor and new enough: `--version` says `{said}{version}`. Runs it: call
/// before children are reaped elsewhere.
///
/// # Errors
/// [`MicrovmError`] naming what it lacks.
pub fn look(
    binary: &Path,
    digest: String,
    (who, name, said): (&'static str, &'static str, &str),
    oldest: (u32, u32),
) -> Result<Capabilities, MicrovmError> {
    let answer = process::ask(binary, &["--version"])?;
    let version = answer.lines().find_map(|line| line.strip_prefix(said)).map(str::trim);
    let unsuitable = |lack: String| MicrovmError::Unsuitable { path: binary.to_owned(), lack };
    let version = version.ok_or_else(|| unsuitable(format!("is no {who}")))?;
    if super::vmm::parse_version(version).is_none_or(|found| found < oldest) {
        let (major, minor) = oldest;
        return Err(unsuitable(format!("is version {version}, too old: {major}.{minor} or newer is needed")));
    }
    Ok(Capabilities {
        name,
        version: version.to_owned(),
        digest,
        experimental: true,
        pause: false,
        incremental: false,
        restore_requires: [("accel", "kvm"), ("cpu", "host"), ("devices", "virtio-net virtio-vsock")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
        cpu_features: crate::gvisor::cpu_features(),
    })
}

/// A machine behind such a monitor.
#[derive(Debug)]
pub struct RestVm {
    rest: Rest,
    process: Process,
    directory: PathBuf,
    agent: Mutex<Option<UnixStream>>,
}

impl RestVm {
    /// Starts the monitor without a guest. `args` have it serve on [`API`].
    ///
    /// # Errors
    /// [`RuntimeError`].
    pub async fn start(
        who: &'static str,
        binary: &Path,
        args: &[&str],
        home: Home,
    ) -> Result<Self, RuntimeError> {
        // Kept without its descriptor; it goes when the link is removed.
        crate::sys::keep_tap(&home.tap)
            .map_err(|error| RuntimeError::Failed(format!("cannot keep the actor's link: {error}")))?;
        let Home { directory, launcher, tap, .. } = home;
        drop(tap);
        let args = args.iter().copied().map(str::to_owned).collect();
        let program = Program { who, binary, files: &[], environment: &[], args };
        // The launcher's own: the worker's, where the link is.
        let namespace = Path::new("/proc/self/ns/net");
        let place = Place { directory: &directory, launcher: &launcher, network_namespace: namespace };
        let process = process::start(place, program, None, directory.join(CONSOLE)).await?;
        let rest = Rest::serve(who, &directory, API, &process).await?;
        Ok(Self { rest, process, directory, agent: Mutex::new(None) })
    }

    /// One request, without a body if that is null; what it refuses is said in its words, or why the monitor is dead.
    ///
    /// # Errors
    /// [`RuntimeError`].
    pub async fn call(&self, method: &str, path: &str, body: &Value) -> Result<(), RuntimeError> {
        match self.rest.call(method, path, body).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.process.because(error).await),
        }
    }

    /// Opens the stream to the guest's agent.
    ///
    /// # Errors
    /// When no pair of sockets can be made.
    pub fn listen(&self) -> Result<(), RuntimeError> {
        let stream = vsock(&self.directory, AGENT, AGENT_PORT, &self.process)
            .map_err(|error| RuntimeError::Failed(format!("no stream to the agent: {error}")))?;
        *self.agent.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
        Ok(())
    }

    /// That stream, once.
    pub fn agent(&self) -> Option<UnixStream> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Waits for the monitor's death; why.
    pub async fn died(&self) -> String {
        self.process.end().await
    }
}

/// What a monitor has written to a snapshot's directory: names, and whether they hold memory.
///
/// # Errors
/// [`RuntimeError::File`] when one is not there.
pub fn saved(directory: &Path, files: &[(&str, bool)]) -> Result<Saved, RuntimeError> {
    let file = |&(name, memory): &(&str, bool)| {
        let path = directory.join(name);
        let size = std::fs::metadata(&path).map_err(file_error("look at", &path))?.len();
        Ok(SnapshotFile { name: name.to_owned(), size, memory })
    };
    let files = files.iter().map(file).collect::<Result<_, RuntimeError>>()?;
    Ok(Saved { files, rest: None })
}

/// A connection is made for each request.
#[derive(Debug)]
struct Rest {
    who: &'static str,
    directory: PathBuf,
    socket: &'static str,
}

/// Connects to a socket in a directory whose path may be longer than a socket's address.
async fn connect(directory: &Path, name: &str) -> io::Result<UnixStream> {
    let open = File::open(directory)?;
    UnixStream::connect(format!("/proc/self/fd/{}/{name}", open.as_raw_fd())).await
}

impl Rest {
    /// Waits until a process serves on a socket in its directory.
    ///
    /// # Errors
    /// Why the process is dead, or [`RuntimeError::Timeout`].
    async fn serve(
        who: &'static str,
        directory: &Path,
        socket: &'static str,
        process: &Process,
    ) -> Result<Self, RuntimeError> {
        let up = async {
            while connect(directory, socket).await.is_err() {
                tokio::time::sleep(AGAIN).await;
            }
        };
        tokio::select! {
            biased;
            why = process.end() => Err(RuntimeError::Failed(format!("{who} did not start: {why}"))),
            up = tokio::time::timeout(LIMIT, up) => match up {
                Ok(()) => Ok(Self { who, directory: directory.to_owned(), socket }),
                Err(_) => {
                    Err(RuntimeError::Timeout { what: format!("{who}'s start"), seconds: LIMIT.as_secs() })
                }
            },
        }
    }

    /// One request; what it refuses is said in its words.
    ///
    /// # Errors
    /// [`RuntimeError`].
    async fn call(&self, method: &str, path: &str, body: &Value) -> Result<(), RuntimeError> {
        let failed = |why: String| RuntimeError::Failed(format!("{} {method} {path}: {why}", self.who));
        let exchange = async {
            let stream = connect(&self.directory, self.socket).await.map_err(|error| error.to_string())?;
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
                .await
                .map_err(|error| error.to_string())?;
            tokio::spawn(connection);
            // cloud-hypervisor refuses a body, even an empty object, where nothing is to be said.
            let body = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
            let request = hyper::Request::builder()
                .method(method)
                .uri(path)
                .header("Host", "localhost")
                .header("Content-Type", "application/json")
                .body(Full::new(body))
                .map_err(|error| error.to_string())?;
            let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
            let status = answer.status();
            let said = answer.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
            if status.is_success() {
                return Ok(());
            }
            Err(format!("{status}: {}", String::from_utf8_lossy(&said)))
        };
        match tokio::time::timeout(LIMIT, exchange).await {
            Ok(done) => done.map_err(failed),
            Err(_) => Err(RuntimeError::Timeout {
                what: format!("{} {method} {path}", self.who),
                seconds: LIMIT.as_secs(),
            }),
        }
    }
}

/// Gives each disk its name in a machine's directory; returns serial, name and whether nobody may write to it.
///
/// # Errors
/// [`RuntimeError::File`].
pub fn link_disks(directory: &Path, machine: &Machine) -> Result<Vec<(String, String, bool)>, RuntimeError> {
    let link = |disk: &super::spec::Disk| {
        let name = format!("disk-{}", disk.serial);
        let path = directory.join(&name);
        std::os::unix::fs::symlink(&disk.path, &path).map_err(file_error("link", &path))?;
        Ok((disk.serial.clone(), name, disk.read_only))
    };
    machine.disks.iter().map(link).collect()
}

/// A stream to a port of the guest. Its other end is connected as soon as somebody listens there (hybrid vsock:
/// `CONNECT port` is answered by `OK`), and goes with the process.
///
/// # Errors
/// When no pair of sockets can be made.
fn vsock(directory: &Path, name: &'static str, port: u32, process: &Process) -> io::Result<UnixStream> {
    let (ours, mut theirs) = UnixStream::pair()?;
    let (directory, process) = (directory.to_owned(), process.clone());
    tokio::spawn(async move {
        let bridge = async {
            loop {
                match open_port(&directory, name, port).await {
                    Ok(mut stream) => {
                        // Either end may go first: the agent's stream ends then.
                        let _ = tokio::io::copy_bidirectional(&mut theirs, &mut stream).await;
                        return;
                    }
                    Err(error) => {
                        tracing::trace!(%error, port, "nobody listens in the guest yet");
                        tokio::time::sleep(AGAIN).await;
                    }
                }
            }
        };
        tokio::select! {
            () = bridge => {}
            _ = process.end() => {}
        }
    });
    Ok(ours)
}

async fn open_port(directory: &Path, name: &str, port: u32) -> io::Result<UnixStream> {
    let mut stream = connect(directory, name).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') && answer.len() < ANSWER {
        answer.push(stream.read_u8().await?);
    }
    if answer.starts_with(b"OK ") { Ok(stream) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt as _, BufReader};
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_port_is_open_when_the_guest_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("v.sock")).unwrap();
        let guest = tokio::spawn(async move {
            // Nobody listens in the guest at first: the monitor closes the connection.
            drop(listener.accept().await.unwrap());
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            stream.get_mut().write_all(b"OK 7\nhello").await.unwrap();
            line
        });
        assert!(open_port(dir.path(), "v.sock", 1024).await.is_err());
        let mut stream = open_port(dir.path(), "v.sock", 1024).await.unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        assert_eq!((said.as_str(), guest.await.unwrap().as_str()), ("hello", "CONNECT 1024\n"));
    }
}
