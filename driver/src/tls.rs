// SPDX-License-Identifier: Apache-2.0
//! TLS towards the control plane. The PEM files are read at each handshake: a connection made after a file was
//! replaced uses the new one.
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// The files a handshake needs.
#[derive(Debug, Clone)]
pub struct Files {
    /// How the configuration's keys of these files begin, for messages.
    pub prefix: &'static str,
    /// Authorities of the server's certificate.
    pub ca: Option<PathBuf>,
    /// Own certificate chain.
    pub cert: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
    /// Name expected in the server's certificate, in place of the host's.
    pub server_name: Option<String>,
}

impl Files {
    /// Secures a connection to `host`.
    pub async fn handshake(&self, host: &str, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let name = self.server_name.as_deref().unwrap_or(host);
        let server = ServerName::try_from(name.to_owned()).map_err(|_| {
            io::Error::other(format!("{name:?} is no server name; set {}_server_name to one", self.prefix))
        })?;
        let connector = TlsConnector::from(Arc::new(self.client_config()?));
        connector
            .connect(server, stream)
            .await
            .map_err(|error| io::Error::new(error.kind(), format!("TLS with {name}: {error}")))
    }

    fn client_config(&self) -> io::Result<rustls::ClientConfig> {
        let mut roots = rustls::RootCertStore::empty();
        let ca = self
            .ca
            .as_deref()
            .ok_or_else(|| io::Error::other(format!("{}_ca_path is not set", self.prefix)))?;
        for certificate in certificates(&format!("{}_ca_path", self.prefix), ca)? {
            roots.add(certificate).map_err(|error| {
                io::Error::other(format!("{}_ca_path {}: {error}", self.prefix, ca.display()))
            })?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots);
        let mut config = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => {
                let chain = certificates(&format!("{}_cert_path", self.prefix), cert)?;
                let key_der = PrivateKeyDer::from_pem_file(key).map_err(|error| {
                    io::Error::other(format!("{}_key_path {}: {error}", self.prefix, key.display()))
                })?;
                builder.with_client_auth_cert(chain, key_der).map_err(|error| {
                    io::Error::other(format!("{}_cert_path {}: {error}", self.prefix, cert.display()))
                })?
            }
            _ => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

fn certificates(key: &str, path: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let wrong = |problem: String| io::Error::other(format!("{key} {}: {problem}", path.display()));
    let found = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| wrong(error.to_string()))?;
    if found.is_empty() {
        return Err(wrong("holds no certificate".to_owned()));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_holds_no_certificate_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca.pem");
        let files =
            Files { prefix: "api_tls", ca: Some(ca.clone()), cert: None, key: None, server_name: None };
        let missing = files.client_config().unwrap_err().to_string();
        assert!(missing.contains("api_tls_ca_path") && missing.contains("ca.pem"), "{missing}");
        std::fs::write(&ca, "not PEM\n").unwrap();
        assert!(files.client_config().unwrap_err().to_string().contains("holds no certificate"));
    }
}
