// SPDX-License-Identifier: Apache-2.0
//! The way to the control plane, and what the running process says about itself.
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use substrate_proto::ateapi::ActorRef;
use substrate_proto::ateapi::admin_client::AdminClient;
use substrate_proto::ateapi::control_client::ControlClient;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

use crate::args::{Global, Remote};
use crate::failure::{Exit, Failure};

/// A client of `ateapi.v1.Control`.
pub type Control = ControlClient<InterceptedService<Channel, Bearer>>;

/// Adds the bearer token of a file, which may be replaced meanwhile, to each call.
#[derive(Debug, Clone, Default)]
pub struct Bearer {
    file: Option<PathBuf>,
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        let Some(path) = &self.file else { return Ok(request) };
        let wrong = |why: String| {
            tonic::Status::unauthenticated(format!("cannot use --token-file {}: {why}", path.display()))
        };
        let token = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        let mut value: tonic::metadata::MetadataValue<_> = format!("Bearer {}", token.trim())
            .parse()
            .map_err(|_| wrong("it holds characters that no header may hold".to_owned()))?;
        value.set_sensitive(true);
        request.metadata_mut().insert("authorization", value);
        Ok(request)
    }
}

/// A client over a channel to the local socket.
pub fn control(channel: Channel) -> Control {
    ControlClient::with_interceptor(channel, Bearer::default())
}

/// File beside the sockets in which `substrate up` says where everything is.
pub const UP_FILE: &str = "up.json";

/// What `substrate up` writes to RUN/up.json when it is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UpInfo {
    /// Version of the program.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// State directory.
    pub dir: PathBuf,
    /// Socket of the control plane.
    pub api_socket: PathBuf,
    /// Socket of the compute driver.
    pub driver_socket: PathBuf,
    /// Address of the HTTP ingress.
    pub ingress: SocketAddr,
    /// Address of the control plane's TCP listener.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api: Option<SocketAddr>,
    /// Worker slots.
    pub workers: u32,
    /// Path of runsc.
    pub runsc: PathBuf,
    /// Its sha256, hex.
    pub runsc_sha256: String,
    /// Its version string; the digest is its identity.
    pub runsc_version: String,
    /// Actors that ran already, on workers of an earlier run.
    pub running_actors: u32,
    /// How long the start took, ms.
    pub start_ms: u64,
}

/// The socket that `--socket` names: itself, or `ateapi.sock` in the directory it names.
pub fn socket_path(global: &Global) -> PathBuf {
    if global.socket.is_dir() { global.socket.join("ateapi.sock") } else { global.socket.clone() }
}

/// Connects to the control plane.
///
/// # Errors
/// Exit code 5 with the way out when nothing serves there, 1 when it may not be used.
pub async fn connect(global: &Global) -> Result<Control, Failure> {
    let channel = if let Some(endpoint) = &global.remote.endpoint {
        connect_tls(endpoint, &global.remote).await?
    } else {
        let path = socket_path(global);
        connect_unix(&path).await.map_err(|error| explain(&path, &error))?
    };
    let bearer =
        Bearer { file: global.remote.token_file.clone().filter(|_| global.remote.endpoint.is_some()) };
    Ok(ControlClient::with_interceptor(channel, bearer).max_decoding_message_size(64 << 20))
}

/// A channel to a control plane on another machine.
async fn connect_tls(endpoint: &str, remote: &Remote) -> Result<Channel, Failure> {
    let usage = |why: &str| {
        Failure::usage(format!("--endpoint {endpoint:?}: {why}")).with_way_out("write https://HOST:PORT")
    };
    let uri: hyper::Uri = endpoint.parse().map_err(|_| usage("is no URL"))?;
    if uri.scheme_str() != Some("https") {
        return Err(usage("is not https: the control plane serves TCP with TLS only"));
    }
    let host = uri.host().ok_or_else(|| usage("names no host"))?.trim_matches(['[', ']']).to_owned();
    let port = uri.port_u16().unwrap_or(443);
    if remote.ca.is_none() {
        return Err(Failure::usage("--endpoint needs --ca: the authorities of the server's certificate"));
    }
    if remote.cert.is_some() != remote.key.is_some() {
        return Err(Failure::usage("--cert and --key belong together: give both or neither"));
    }
    let files = openshell_driver_substrate::tls::Files {
        prefix: "api_tls",
        ca: remote.ca.clone(),
        cert: remote.cert.clone(),
        key: remote.key.clone(),
        server_name: None,
    };
    // TLS is ours, below HTTP/2: the scheme that tonic sees does not matter.
    let plain = Endpoint::try_from(format!(
        "http://{}",
        uri.authority().map_or("", hyper::http::uri::Authority::as_str)
    ))
    .map_err(|error| usage(&error.to_string()))?;
    let connect = tower::service_fn(move |_: hyper::Uri| {
        let (files, host) = (files.clone(), host.clone());
        async move {
            let stream = tokio::net::TcpStream::connect((host.as_str(), port)).await?;
            stream.set_nodelay(true)?;
            files.handshake(&host, stream).await.map(hyper_util::rt::TokioIo::new)
        }
    });
    plain.connect_timeout(CONNECT).connect_with_connector(connect).await.map_err(|error| {
        // The innermost says it; the files' own errors name the driver's keys for what are options here.
        let mut cause: &dyn std::error::Error = &error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        let why = [
            ("api_tls_ca_path", "--ca"),
            ("api_client_cert_path", "--cert"),
            ("api_client_key_path", "--key"),
        ]
        .iter()
        .fold(cause.to_string(), |text, (key, option)| text.replace(key, option));
        Failure::new(Exit::Unavailable, format!("cannot connect to {endpoint}: {why}"))
            .with_way_out("see docs/access.md")
    })
}

/// Longest wait for a connection over TCP.
const CONNECT: std::time::Duration = std::time::Duration::from_secs(20);

/// Connects to what the control plane serves to administrators.
///
/// # Errors
/// As `connect`.
pub async fn connect_admin(global: &Global) -> Result<AdminClient<Channel>, Failure> {
    let path = socket_path(global);
    Ok(AdminClient::new(connect_unix(&path).await.map_err(|error| explain(&path, &error))?))
}

/// A channel over a Unix socket. The socket is tried first, so that the system's own reason is seen.
///
/// # Errors
/// The system's.
pub async fn connect_unix(path: &Path) -> io::Result<Channel> {
    drop(tokio::net::UnixStream::connect(path).await?);
    let endpoint = Endpoint::try_from(format!("unix:{}", path.display())).map_err(io::Error::other)?;
    endpoint.connect().await.map_err(io::Error::other)
}

fn explain(path: &Path, error: &io::Error) -> Failure {
    let shown = path.display();
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Failure::new(
            Exit::Unavailable,
            format!("substrate does not run here: nothing serves on {shown} ({error})"),
        )
        .with_way_out(
            "start it with `substrate up` as root, or name the socket of a running one with --socket",
        ),
        io::ErrorKind::PermissionDenied => Failure::general(format!("may not connect to {shown}: {error}"))
            .with_way_out("run this as the user that runs `substrate up`, usually root: sudo substrate …"),
        _ => Failure::new(Exit::Unavailable, format!("cannot connect to {shown}: {error}")),
    }
}

/// Reads RUN/up.json beside the control plane's socket.
///
/// # Errors
/// Exit code 5 when nothing runs there or it is remote.
pub fn up_info(global: &Global) -> Result<UpInfo, Failure> {
    let socket = socket_path(global);
    let path = socket.with_file_name(UP_FILE);
    let text = std::fs::read(&path).map_err(|error| {
        Failure::new(Exit::Unavailable, format!("cannot read {}: {error}", path.display()))
            .with_way_out("start substrate with `substrate up`, or name its socket with --socket")
    })?;
    serde_json::from_slice(&text).map_err(|error| {
        Failure::general(format!("{} is not understood: {error}", path.display()))
            .with_way_out("it was written by another version: use the program that runs `substrate up`")
    })
}

/// The actor of a name in the command's atespace; a uid (a UUID) works everywhere.
pub fn actor_ref(global: &Global, name: &str) -> ActorRef {
    if uuid::Uuid::try_parse(name).is_ok() {
        ActorRef { uid: name.to_owned(), ..ActorRef::default() }
    } else {
        ActorRef { atespace: global.atespace.clone(), name: name.to_owned(), uid: String::new() }
    }
}

/// A fresh request id: a retry of the same call finds the first one's effect.
pub fn request_id() -> String {
    uuid::Uuid::new_v4().to_string()
}
