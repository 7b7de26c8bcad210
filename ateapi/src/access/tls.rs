// SPDX-License-Identifier: Apache-2.0
//! The TCP listener: accepts, shakes hands, and says who is at the other end.
//!
//! Every handshake is a task with a limit of time; their number and that of connections are bounded. The files are
//! looked at before each handshake, so that a replaced certificate, key or list of authorities holds from the next
//! connection on.
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use x509_parser::extensions::GeneralName;

use super::{AccessError, Remote};

/// Longest handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Connections at a time, those that are still shaking hands included; more wait in the listener's queue.
const CONNECTIONS: usize = 1024;

/// What files were when they were last read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp(Vec<Option<(SystemTime, u64, u64)>>);

impl Stamp {
    pub(super) fn of(paths: &[&Path]) -> Self {
        use std::os::unix::fs::MetadataExt as _;
        let one = |path: &&Path| {
            let meta = std::fs::metadata(path).ok()?;
            Some((meta.modified().ok()?, meta.len(), meta.ino()))
        };
        Self(paths.iter().map(one).collect())
    }
}

/// A client certificate that was believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Certificate {
    pub(super) name: String,
    /// Unix seconds.
    pub(super) not_after: i64,
}

/// The other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Peer {
    /// A process on this machine that the socket let in.
    Local {
        /// From `SO_PEERCRED`.
        uid: u32,
    },
    /// A client over TLS.
    Remote {
        /// Where from.
        address: SocketAddr,
        /// What it showed.
        certificate: Option<Box<Certificate>>,
    },
}

/// A connection of either kind.
pub(crate) enum Wire {
    /// Over the Unix socket.
    Local(UnixStream),
    /// Over TCP and TLS.
    Remote(Box<Secured>),
}

pub(crate) struct Secured {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    _permit: OwnedSemaphorePermit,
}

impl Connected for Wire {
    type ConnectInfo = Option<Peer>;

    fn connect_info(&self) -> Option<Peer> {
        match self {
            Self::Local(stream) => stream.peer_cred().ok().map(|peer| Peer::Local { uid: peer.uid() }),
            Self::Remote(secured) => Some(secured.peer.clone()),
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Local(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Remote(secured) => Pin::new(&mut secured.stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Local(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Remote(secured) => Pin::new(&mut secured.stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Local(stream) => Pin::new(stream).poll_flush(cx),
            Self::Remote(secured) => Pin::new(&mut secured.stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Local(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Remote(secured) => Pin::new(&mut secured.stream).poll_shutdown(cx),
        }
    }
}

/// Certificate, key and authorities, as they are now.
struct Credentials {
    cert: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
    /// No token could be shown instead.
    wants_certificate: bool,
    current: Mutex<(Stamp, Arc<ServerConfig>)>,
}

impl Credentials {
    fn open(remote: &Remote) -> Result<Self, AccessError> {
        let wants_certificate = remote.token_keys.is_none();
        let client_ca = remote.client_ca.as_deref();
        let stamp = Stamp::of(&paths(&remote.cert, &remote.key, client_ca));
        let config = server_config(&remote.cert, &remote.key, client_ca, wants_certificate)?;
        Ok(Self {
            cert: remote.cert.clone(),
            key: remote.key.clone(),
            client_ca: remote.client_ca.clone(),
            wants_certificate,
            current: Mutex::new((stamp, Arc::new(config))),
        })
    }

    fn current(&self) -> Arc<ServerConfig> {
        let client_ca = self.client_ca.as_deref();
        let now = Stamp::of(&paths(&self.cert, &self.key, client_ca));
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.0 != now {
            match server_config(&self.cert, &self.key, client_ca, self.wants_certificate) {
                Ok(config) => {
                    tracing::info!(cert = %self.cert.display(), "certificate, key and authorities read anew");
                    current.1 = Arc::new(config);
                }
                // Certificate and key are replaced one after the other: the next change is looked at again.
                Err(error) => {
                    tracing::error!(%error, "the new certificate files cannot be used; the former ones stay");
                }
            }
            current.0 = now;
        }
        Arc::clone(&current.1)
    }
}

fn paths<'a>(cert: &'a Path, key: &'a Path, client_ca: Option<&'a Path>) -> Vec<&'a Path> {
    [cert, key].into_iter().chain(client_ca).collect()
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, AccessError> {
    let wrong = |reason: String| AccessError::File { what, path: path.to_owned(), reason };
    let found = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| wrong(error.to_string()))?;
    if found.is_empty() {
        return Err(wrong("holds no certificate".to_owned()));
    }
    Ok(found)
}

fn server_config(
    cert: &Path,
    key: &Path,
    client_ca: Option<&Path>,
    wants_certificate: bool,
) -> Result<ServerConfig, AccessError> {
    let file = |what: &'static str, path: &Path, reason: String| AccessError::File {
        what,
        path: path.to_owned(),
        reason,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| file("certificate", cert, error.to_string()))?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let wrong = |reason: String| file("client authorities", path, reason);
            let mut roots = rustls::RootCertStore::empty();
            for authority in certificates("client authorities", path)? {
                roots.add(authority).map_err(|error| wrong(error.to_string()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            let verifier = if wants_certificate { verifier } else { verifier.allow_unauthenticated() };
            builder.with_client_cert_verifier(verifier.build().map_err(|error| wrong(error.to_string()))?)
        }
    };
    let private =
        PrivateKeyDer::from_pem_file(key).map_err(|error| file("private key", key, error.to_string()))?;
    let mut config = builder
        .with_single_cert(certificates("certificate", cert)?, private)
        .map_err(|error| file("certificate", cert, format!("does not fit its key: {error}")))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Whom a certificate names: its first URI name, else its first DNS name, else its common name.
fn name_of(der: &CertificateDer<'_>) -> Result<Certificate, String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(der).map_err(|error| error.to_string())?;
    let alternative = parsed.subject_alternative_name().map_err(|error| error.to_string())?;
    let names = alternative.map_or(&[][..], |it| it.value.general_names.as_slice());
    let uri = names.iter().find_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let dns = names.iter().find_map(|name| match name {
        GeneralName::DNSName(dns) => Some(*dns),
        _ => None,
    });
    let common = parsed.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    let name = uri.or(dns).or(common).filter(|name| !name.is_empty());
    Ok(Certificate {
        name: name.ok_or("it names nobody")?.to_owned(),
        not_after: parsed.validity().not_after.timestamp(),
    })
}

/// The listener, bound.
pub(crate) struct Listener {
    socket: TcpListener,
    address: SocketAddr,
    credentials: Arc<Credentials>,
}

impl Listener {
    pub(crate) async fn bind(remote: &Remote) -> Result<Self, AccessError> {
        let credentials = Arc::new(Credentials::open(remote)?);
        let wrong =
            |error: io::Error| AccessError::Listen { address: remote.listen, reason: error.to_string() };
        let socket = TcpListener::bind(remote.listen).await.map_err(wrong)?;
        let address = socket.local_addr().map_err(wrong)?;
        Ok(Self { socket, address, credentials })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections whose handshake succeeded. Accepting ends when the stream is dropped.
    pub(crate) fn incoming(self) -> ReceiverStream<io::Result<Wire>> {
        let (to, incoming) = mpsc::channel(16);
        tokio::spawn(accept(self.socket, self.credentials, to));
        ReceiverStream::new(incoming)
    }
}

async fn accept(listener: TcpListener, credentials: Arc<Credentials>, to: mpsc::Sender<io::Result<Wire>>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = to.closed() => return,
        };
        match accepted {
            Ok((stream, address)) => {
                let (credentials, to) = (Arc::clone(&credentials), to.clone());
                tokio::spawn(async move {
                    let shaken =
                        tokio::time::timeout(HANDSHAKE, shake(stream, address, &credentials, permit));
                    match shaken.await {
                        // Nobody serves any more when this fails.
                        Ok(Ok(wire)) => drop(to.send(Ok(wire)).await),
                        Ok(Err(reason)) => tracing::info!(%address, reason, "a client was turned away"),
                        Err(_) => tracing::info!(%address, "a client did not finish its TLS handshake"),
                    }
                });
            }
            Err(error) => {
                // Out of file descriptors, most likely: some will be closed.
                tracing::warn!(%error, "cannot accept a client of the control plane");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn shake(
    stream: TcpStream,
    address: SocketAddr,
    credentials: &Credentials,
    permit: OwnedSemaphorePermit,
) -> Result<Wire, String> {
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let acceptor = TlsAcceptor::from(credentials.current());
    let stream = acceptor.accept(stream).await.map_err(|error| error.to_string())?;
    let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first).map(name_of).transpose()?;
    let peer = Peer::Remote { address, certificate: shown.map(Box::new) };
    Ok(Wire::Remote(Box::new(Secured { stream, peer, _permit: permit })))
}
