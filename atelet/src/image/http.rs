// SPDX-License-Identifier: Apache-2.0
//! The HTTP client of registries and runtime assets: HTTPS with the system's roots, plain HTTP where the caller's rules
//! allow it.
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

pub(crate) use super::reference::is_loopback;

type Body = Full<Bytes>;

/// A client with a pool of connections.
#[derive(Debug)]
pub(crate) struct HttpClient {
    connect_timeout: Duration,
    ca_file: Option<PathBuf>,
    plain: Client<HttpConnector, Body>,
    /// Made when first needed, so that a machine without CA certificates can use a server on localhost.
    tls: OnceLock<Client<hyper_rustls::HttpsConnector<HttpConnector>, Body>>,
}

impl Default for HttpClient {
    fn default() -> Self {
        Self::new(Duration::from_secs(10), None)
    }
}

impl HttpClient {
    /// `ca_file` (PEM) is trusted besides the system's roots.
    pub fn new(connect_timeout: Duration, ca_file: Option<PathBuf>) -> Self {
        let plain = Client::builder(TokioExecutor::new()).build(connector(connect_timeout));
        Self { connect_timeout, ca_file, plain, tls: OnceLock::new() }
    }

    /// Sends one request, over TLS where its URL says `https`.
    pub async fn request(&self, request: Request<Body>) -> Result<Response<Incoming>, String> {
        let response = if request.uri().scheme_str() == Some("https") {
            let client = if let Some(client) = self.tls.get() {
                client
            } else {
                let client = self.tls_client()?;
                self.tls.get_or_init(|| client)
            };
            client.request(request)
        } else {
            self.plain.request(request)
        };
        response.await.map_err(|error| chain(&error))
    }

    fn tls_client(&self) -> Result<Client<hyper_rustls::HttpsConnector<HttpConnector>, Body>, String> {
        let mut roots = rustls::RootCertStore::empty();
        let system = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(system.certs);
        if let Some(path) = &self.ca_file {
            let bad = |error: &dyn std::fmt::Display| format!("CA file {}: {error}", path.display());
            for certificate in CertificateDer::pem_file_iter(path).map_err(|error| bad(&error))? {
                let certificate = certificate.map_err(|error| bad(&error))?;
                roots.add(certificate).map_err(|error| bad(&error))?;
            }
        }
        if roots.is_empty() {
            return Err("no CA certificates are installed: install ca-certificates".into());
        }
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_only()
            .enable_http1()
            .wrap_connector(connector(self.connect_timeout));
        Ok(Client::builder(TokioExecutor::new()).build(connector))
    }
}

fn connector(connect_timeout: Duration) -> HttpConnector {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_connect_timeout(Some(connect_timeout));
    connector.set_nodelay(true);
    connector
}

/// Resolves a `Location`: absolute, or a path on the same origin.
pub(crate) fn join(base: &Uri, location: &str) -> Option<Uri> {
    if location.starts_with('/') && !location.starts_with("//") {
        let mut parts = base.clone().into_parts();
        parts.path_and_query = Some(location.parse().ok()?);
        return Uri::from_parts(parts).ok();
    }
    location.parse().ok()
}

/// An error with its causes: hyper's own text says only which layer failed.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
