// SPDX-License-Identifier: Apache-2.0
//! A real S3 server (SeaweedFS, from scripts/setup) for tests; tests/integration includes this file too.
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long the server may take to come up.
const START: Duration = Duration::from_mins(1);
/// How long one question may take.
const QUESTION: Duration = Duration::from_secs(10);

/// A server with a bucket of the name `bucket`, for the access key `test` with the secret `secret`.
pub struct Server {
    child: Child,
    dir: tempfile::TempDir,
    /// Of S3, plain HTTP.
    pub address: SocketAddr,
    filer: SocketAddr,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("cannot stop the S3 server: {error}");
        }
    }
}

/// The status line of an answer.
fn ask(address: SocketAddr, request: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, QUESTION)?;
    stream.set_read_timeout(Some(QUESTION))?;
    stream.write_all(format!("{request} HTTP/1.1\r\nHost: s3\r\nContent-Length: 0\r\n\r\n").as_bytes())?;
    let mut answer = [0; 64];
    let length = stream.read(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..length]).lines().next().unwrap_or_default().to_owned())
}

impl Server {
    /// Starts one on free ports; `None`, loudly, where there is no program.
    pub fn start(program: &Path) -> Option<Self> {
        let named = std::env::var_os("SUBSTRATE_WEED");
        let program = named.as_deref().map_or(program, Path::new);
        if !program.exists() {
            assert!(std::env::var_os("CI").is_none(), "no {}: scripts/setup installs it", program.display());
            eprintln!("skipped: no {}: scripts/setup installs it", program.display());
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(
            dir.path().join("s3.json"),
            r#"{"identities": [{"name": "test", "credentials": [{"accessKey": "test", "secretKey": "secret"}],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}"#,
        )
        .unwrap();
        let names = [
            "master.port",
            "master.port.grpc",
            "volume.port",
            "volume.port.grpc",
            "filer.port",
            "filer.port.grpc",
            "s3.port",
            "s3.port.grpc",
        ];
        // Held until all are chosen, so that they differ. Below the range that the system takes ports of connections
        // from (ip(7), ip_local_port_range): one of those could take them before the server does.
        let free = || loop {
            let port = 10_240 + rand::random::<u16>() % 22_000;
            if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
                break listener;
            }
        };
        let held: Vec<TcpListener> = names.iter().map(|_| free()).collect();
        let ports: Vec<u16> = held.iter().map(|listener| listener.local_addr().unwrap().port()).collect();
        drop(held);
        let mut command = Command::new(program);
        command.current_dir(dir.path()).arg("-logtostderr=true").arg("server");
        for (name, port) in names.iter().zip(&ports) {
            command.arg(format!("-{name}={port}"));
        }
        command.args([
            "-dir=.",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-filer",
            "-s3",
            "-s3.config=s3.json",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
            "-volume.max=8",
            "-master.volumeSizeLimitMB=64",
        ]);
        command.arg(format!("-filer.localSocket={}", dir.path().join("filer.sock").display()));
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let address = |port: usize| (Ipv4Addr::LOCALHOST, ports[port]).into();
        let server = Self { child, dir, address: address(6), filer: address(4) };
        // A bucket is a directory of the filer. It is up when it has made that and S3 asks for credentials.
        let begun = Instant::now();
        loop {
            let made = ask(server.filer, "POST /buckets/bucket/").unwrap_or_else(|error| error.to_string());
            let asked = ask(server.address, "GET /bucket").unwrap_or_else(|error| error.to_string());
            if (made.contains(" 201") || made.contains(" 409")) && asked.contains(" 403") {
                return Some(server);
            }
            let log = std::fs::read_to_string(server.dir.path().join("log")).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(5).collect();
            assert!(begun.elapsed() < START, "the S3 server does not come up: {made}; {asked}; {tail:#?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Has the bucket lose an object.
    #[allow(dead_code, reason = "not every test that includes this loses one")]
    pub fn lose(&self, key: &str) {
        let answer = ask(self.filer, &format!("DELETE /buckets/bucket/{key}")).unwrap();
        assert!(answer.contains(" 204"), "{key}: {answer}");
    }
}
