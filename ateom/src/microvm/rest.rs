// SPDX-License-Identifier: Apache-2.0
//! A machine monitor that serves HTTP on a Unix socket, and the way to its guest's vsock ports.
//!
//! Both cloud-hypervisor and Firecracker bind their sockets themselves and tell nobody when: the first connection is
//! tried until it is taken or the process is dead. Disks and sockets have names relative to the machine's directory, so
//! that what a snapshot says of them is true in every place.
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::process::Process;
use super::spec::Machine;
use crate::runtime::{RuntimeError, file_error};

/// How long a monitor may take to serve, and for a request. A snapshot writes all memory.
const LIMIT: Duration = Duration::from_mins(1);
/// Between attempts to connect.
const AGAIN: Duration = Duration::from_millis(2);
/// Longest answer to a `CONNECT`.
const ANSWER: usize = 64;

/// A connection is made for each request.
#[derive(Debug)]
pub struct Rest {
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
    pub async fn serve(
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
    pub async fn call(&self, method: &str, path: &str, body: &Value) -> Result<(), RuntimeError> {
        let failed = |why: String| RuntimeError::Failed(format!("{} {method} {path}: {why}", self.who));
        let exchange = async {
            let stream = connect(&self.directory, self.socket).await.map_err(|error| error.to_string())?;
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
                .await
                .map_err(|error| error.to_string())?;
            tokio::spawn(connection);
            let request = hyper::Request::builder()
                .method(method)
                .uri(path)
                .header("Host", "localhost")
                .header("Content-Type", "application/json")
                .body(Full::new(Bytes::from(body.to_string())))
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
pub fn vsock(directory: &Path, name: &'static str, port: u32, process: &Process) -> io::Result<UnixStream> {
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
