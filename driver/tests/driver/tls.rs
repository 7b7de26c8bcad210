// SPDX-License-Identifier: Apache-2.0
//! The connection to the control plane over real TCP and TLS: who is believed, who is let in, and that replaced keys
//! and tokens are taken up.
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use crate::stub::Stub;
use openshell_driver_substrate::Config;
use openshell_driver_substrate::control::Control;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use substrate_proto::ateapi::control_server::ControlServer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;
use tonic::{Code, Request, Status};

/// An authority and what it signed.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    der: CertificateDer<'static>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        let (pem, der) = (certificate.pem(), certificate.der().clone());
        Self { issuer: Issuer::new(params, key), pem, der }
    }

    /// A certificate for that name and its key, PEM.
    fn sign(&self, name: &str, usage: ExtendedKeyUsagePurpose) -> (String, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages = vec![usage];
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key)
    }
}

struct Secured(TlsStream<TcpStream>);

impl Connected for Secured {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Secured {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A control plane that asks for a client certificate of `clients` and the token "good".
async fn serve(server: &Authority, clients: &Authority) -> SocketAddr {
    let (certificate, key) = server.sign("ateapi.test", ExtendedKeyUsagePurpose::ServerAuth);
    let certificate = rustls::pki_types::pem::PemObject::from_pem_slice(certificate.as_bytes()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(clients.der.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build().unwrap();
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = futures::stream::unfold((listener, acceptor), |(listener, acceptor)| async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            // A handshake that fails is the test's point, not the server's end.
            if let Ok(stream) = acceptor.accept(stream).await {
                return Some((Ok::<_, io::Error>(Secured(stream)), (listener, acceptor)));
            }
        }
    });
    let check = |request: Request<()>| match request.metadata().get("authorization") {
        Some(value) if value == "Bearer good" => Ok(request),
        _ => Err(Status::unauthenticated("no good token")),
    };
    let service = ControlServer::with_interceptor(Stub::new(), check);
    let server = tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming);
    tokio::spawn(async move { server.await.unwrap() });
    address
}

fn config(dir: &Path, address: SocketAddr) -> Config {
    Config {
        api_endpoint: format!("https://{address}"),
        api_tls_ca_path: Some(dir.join("ca.pem")),
        api_tls_server_name: Some("ateapi.test".to_owned()),
        api_client_cert_path: Some(dir.join("client.pem")),
        api_client_key_path: Some(dir.join("client.key")),
        api_bearer_token_path: Some(dir.join("token")),
        ..Config::default()
    }
}

fn write_client(dir: &Path, authority: &Authority) {
    let (certificate, key) = authority.sign("driver", ExtendedKeyUsagePurpose::ClientAuth);
    std::fs::write(dir.join("client.pem"), certificate).unwrap();
    std::fs::write(dir.join("client.key"), key.serialize_pem()).unwrap();
}

#[tokio::test]
async fn only_the_right_server_certificate_client_certificate_and_token_get_through() {
    let (server, clients) = (Authority::new(), Authority::new());
    let address = serve(&server, &clients).await;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("ca.pem"), &server.pem).unwrap();
    std::fs::write(dir.path().join("token"), "good\n").unwrap();
    write_client(dir.path(), &clients);
    let good = config(dir.path(), address);
    good.check().unwrap();
    assert!(Control::new(&good).list_atespaces().await.unwrap().is_empty());

    let stranger = Config { api_tls_server_name: Some("other.test".to_owned()), ..good.clone() };
    let refused = Control::new(&stranger).list_atespaces().await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(refused.to_string().contains("other.test"), "{refused}");

    let nobody = Config { api_client_cert_path: None, api_client_key_path: None, ..good.clone() };
    assert_eq!(Control::new(&nobody).list_atespaces().await.unwrap_err().code(), Code::Unavailable);

    let mute = Config { api_bearer_token_path: None, ..good.clone() };
    assert_eq!(Control::new(&mute).list_atespaces().await.unwrap_err().code(), Code::Unauthenticated);

    std::fs::write(dir.path().join("ca.pem"), Authority::new().pem).unwrap();
    let misled = Control::new(&good).list_atespaces().await.unwrap_err();
    assert!(misled.to_string().contains("TLS with ateapi.test"), "{misled}");
}

#[tokio::test]
async fn replaced_keys_and_tokens_are_taken_up_without_a_restart() {
    let (server, clients) = (Authority::new(), Authority::new());
    let address = serve(&server, &clients).await;
    let dir = tempfile::tempdir().unwrap();
    // Everything is wrong at first.
    std::fs::write(dir.path().join("ca.pem"), Authority::new().pem).unwrap();
    std::fs::write(dir.path().join("token"), "old").unwrap();
    write_client(dir.path(), &Authority::new());
    let control = Control::new(&config(dir.path(), address));
    assert_eq!(control.list_atespaces().await.unwrap_err().code(), Code::Unavailable);
    std::fs::write(dir.path().join("ca.pem"), &server.pem).unwrap();
    write_client(dir.path(), &clients);
    assert_eq!(control.list_atespaces().await.unwrap_err().code(), Code::Unauthenticated);
    let token = dir.path().join("token");
    std::fs::write(&token, "good").unwrap();
    let later = SystemTime::now() + Duration::from_secs(5);
    std::fs::File::options().write(true).open(&token).unwrap().set_modified(later).unwrap();
    control.list_atespaces().await.unwrap();
}
