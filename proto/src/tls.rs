// SPDX-License-Identifier: Apache-2.0
//! TCP listeners and their clients, always with TLS: accepts or dials, shakes hands, and says who is at the other end.
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

use futures::{Stream, StreamExt as _, TryStreamExt as _};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use x509_parser::extensions::GeneralName;

/// Why TLS could not be set up.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TlsError {
    /// A PEM file.
    #[error("{what} {}: {reason}", path.display())]
    #[allow(missing_docs)]
    File { what: &'static str, path: PathBuf, reason: String },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {reason}; choose another address")]
    #[allow(missing_docs)]
    Listen { address: SocketAddr, reason: String },
}

/// What a listener is told.
#[derive(Debug, Clone)]
pub struct Listen {
    /// Address; port 0 takes a free one.
    pub address: SocketAddr,
    /// Its certificate chain, PEM.
    pub cert: PathBuf,
    /// The certificate's private key, PEM.
    pub key: PathBuf,
    /// Authorities of client certificates, PEM; without, no client certificate is believed.
    pub client_ca: Option<PathBuf>,
    /// Whether the handshake fails without a client certificate.
    pub wants_certificate: bool,
}

/// What a client shows and whom it believes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientFiles {
    /// Authorities of the server's certificate, PEM.
    pub ca: PathBuf,
    /// Its own certificate chain, PEM.
    pub cert: PathBuf,
    /// The certificate's private key, PEM.
    pub key: PathBuf,
}

/// Longest handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Connections at a time, those that are still shaking hands included; more wait in the listener's queue.
const CONNECTIONS: usize = 1024;

/// What files were when they were last read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp(Vec<Option<(SystemTime, u64, u64)>>);

impl Stamp {
    /// Of files as they are now; what cannot be looked at counts as absent.
    #[must_use]
    pub fn of(paths: &[&Path]) -> Self {
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
pub struct Certificate {
    /// Its first URI name, else its first DNS name, else its common name.
    pub name: String,
    /// Unix seconds.
    pub not_after: i64,
}

/// The other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
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
pub enum Wire {
    /// Over the Unix socket.
    Local(UnixStream),
    /// Over TCP and TLS.
    Remote(Box<Secured>),
}

/// A connection over TLS.
pub struct Secured {
    stream: server::TlsStream<TcpStream>,
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
    fn open(listen: Listen) -> Result<Self, TlsError> {
        let Listen { cert, key, client_ca, wants_certificate, .. } = listen;
        let stamp = Stamp::of(&paths(&cert, &key, client_ca.as_deref()));
        let config = server_config(&cert, &key, client_ca.as_deref(), wants_certificate)?;
        Ok(Self { cert, key, client_ca, wants_certificate, current: Mutex::new((stamp, Arc::new(config))) })
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

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |reason: String| TlsError::File { what, path: path.to_owned(), reason };
    let found = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| wrong(error.to_string()))?;
    if found.is_empty() {
        return Err(wrong("holds no certificate".to_owned()));
    }
    Ok(found)
}

fn authorities(what: &'static str, path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for authority in certificates(what, path)? {
        roots.add(authority).map_err(|error| TlsError::File {
            what,
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
    }
    Ok(roots)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| TlsError::File {
        what: "private key",
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

fn misfit(cert: &Path, error: &rustls::Error) -> TlsError {
    let reason = format!("does not fit its key: {error}");
    TlsError::File { what: "certificate", path: cert.to_owned(), reason }
}

fn server_config(
    cert: &Path,
    key: &Path,
    client_ca: Option<&Path>,
    wants_certificate: bool,
) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| misfit(cert, &error))?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let what = "client authorities";
            let roots = Arc::new(authorities(what, path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
            let verifier = if wants_certificate { verifier } else { verifier.allow_unauthenticated() };
            builder.with_client_cert_verifier(verifier.build().map_err(|error| TlsError::File {
                what,
                path: path.to_owned(),
                reason: error.to_string(),
            })?)
        }
    };
    let mut config = builder
        .with_single_cert(certificates("certificate", cert)?, private_key(key)?)
        .map_err(|error| misfit(cert, &error))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn client_config(files: &ClientFiles) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| misfit(&files.cert, &error))?
        .with_root_certificates(authorities("server authorities", &files.ca)?)
        .with_client_auth_cert(certificates("certificate", &files.cert)?, private_key(&files.key)?)
        .map_err(|error| misfit(&files.cert, &error))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

impl ClientFiles {
    /// Reads the files, so that what is wrong with them is said at a start.
    ///
    /// # Errors
    /// A file that cannot be used.
    pub fn check(&self) -> Result<(), TlsError> {
        client_config(self).map(drop)
    }

    /// Connects to a server whose certificate names `host`. The files are read anew each time.
    ///
    /// # Errors
    /// The connection, the handshake, or a file that cannot be used.
    pub async fn dial(&self, host: &str, port: u16) -> io::Result<client::TlsStream<TcpStream>> {
        let config = client_config(self).map_err(io::Error::other)?;
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        let shaken = tokio::time::timeout(HANDSHAKE, async {
            let stream = TcpStream::connect((host, port)).await?;
            stream.set_nodelay(true)?;
            TlsConnector::from(Arc::new(config)).connect(name, stream).await
        });
        shaken.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }
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
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
    credentials: Arc<Credentials>,
}

impl Listener {
    /// Reads the files and binds.
    ///
    /// # Errors
    /// [`TlsError`].
    pub async fn bind(listen: Listen) -> Result<Self, TlsError> {
        let address = listen.address;
        let credentials = Arc::new(Credentials::open(listen)?);
        let wrong = |error: io::Error| TlsError::Listen { address, reason: error.to_string() };
        let socket = TcpListener::bind(address).await.map_err(wrong)?;
        let address = socket.local_addr().map_err(wrong)?;
        Ok(Self { socket, address, credentials })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections whose handshake succeeded. Accepting ends when the stream is dropped.
    pub fn incoming(self) -> ReceiverStream<io::Result<Wire>> {
        let (to, incoming) = mpsc::channel(16);
        tokio::spawn(accept(self.socket, self.credentials, to));
        ReceiverStream::new(incoming)
    }
}

/// The connections of a server on a Unix socket and perhaps on TCP.
pub fn either(
    local: impl Stream<Item = io::Result<UnixStream>> + Send + 'static,
    remote: Option<Listener>,
) -> impl Stream<Item = io::Result<Wire>> + Send {
    let remote = remote.map_or_else(|| futures::stream::pending().boxed(), |it| it.incoming().boxed());
    futures::stream::select(local.map_ok(Wire::Local), remote)
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
                tracing::warn!(%error, "cannot accept a client");
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
