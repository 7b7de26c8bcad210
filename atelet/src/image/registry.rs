// SPDX-License-Identifier: Apache-2.0
//! Pulling from registries: the read half of the OCI distribution specification 1.1 over hyper.
//!
//! **Why not `oci-client`.** That crate (0.18, well kept) was compared. It brings reqwest with a second TLS provider
//! that our dependency rules ban, reads manifests without a size limit, hides `Retry-After` and the reason of a
//! refusal behind strings, has no retry or resume, and follows redirects and token realms to plain HTTP anywhere: a
//! tenant names the registry, so that would let a tenant make the node call any address inside the network. What we
//! need is five requests; the parsing of challenges is left to `http-auth`.
//!
//! **Rules**
//! * HTTPS with the system's roots; plain HTTP only to `localhost`, `127.0.0.1` and `[::1]`. A redirect or a token
//!   service may never be plain HTTP unless the registry itself is such a loopback one, and then only on loopback.
//! * `Authorization` is not sent on when a redirect leaves the origin.
//! * Tokens belong to (atespace, host, repository) and are never shared.
//! * Every body has a size limit, every wait a deadline: connect, headers, each chunk.
//! * Network errors, 5xx and 429 are tried again with jittered, doubling pauses; a blob goes on where it broke off.
//!   The hash runs over what arrives, and nothing that does not match is returned.
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap};
use hyper::{Method, Request, Response, StatusCode, Uri};
use sha2::Digest as _;
use tokio::io::AsyncWriteExt as _;

use super::auth::{Challenge, Credentials, Login, TokenAnswer, challenge};
use super::error::ImageError;
use super::http::{HttpClient, chain, join};
use super::reference::{Digest, Repository, is_loopback, shorten};
use super::spec::{ACCEPT, MAX_MANIFEST};

/// Deadlines and retries of requests to registries.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// To open a connection, default 10 s.
    pub connect_timeout: Duration,
    /// From a request to its headers, and between two chunks of a body, default 30 s.
    pub idle_timeout: Duration,
    /// Attempts in all, default 5.
    pub attempts: u32,
    /// First pause between attempts, default 250 ms; it doubles each time and varies by half.
    pub pause: Duration,
    /// More CA certificates (PEM) to trust besides the system's, for private registries.
    pub ca_file: Option<PathBuf>,
    /// Longest pause a registry may ask for with `Retry-After`; beyond, its 429 is final. Default 20 s.
    pub max_retry_after: Duration,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(30),
            attempts: 5,
            pause: Duration::from_millis(250),
            ca_file: None,
            max_retry_after: Duration::from_secs(20),
        }
    }
}

/// Redirects followed for one request.
const MAX_REDIRECTS: u32 = 5;
/// Largest answer of a token service, and largest error text read, bytes.
const MAX_ANSWER: u64 = 256 << 10;

type Body = Full<Bytes>;

/// A client for all registries.
#[derive(Debug)]
pub(super) struct Registry {
    config: RegistryConfig,
    credentials: Credentials,
    /// Where downloads go, for messages.
    dir: PathBuf,
    client: HttpClient,
    tokens: Mutex<HashMap<Caller, Authorization>>,
}

/// Attempts of one request: fails for good with the last reason when there are no more.
struct Tries<'a> {
    config: &'a RegistryConfig,
    what: &'a str,
    number: u32,
    pause: Duration,
}

impl<'a> Tries<'a> {
    fn new(config: &'a RegistryConfig, what: &'a str) -> Self {
        Self { config, what, number: 1, pause: config.pause }
    }

    /// Waits until the next attempt, or returns the error if there is none.
    async fn again(&mut self, failure: Failure) -> Result<(), ImageError> {
        let (error, wait) = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Transient(error, wait) => (error, wait),
        };
        let is_too_long = wait.is_some_and(|wait| wait > self.config.max_retry_after);
        if self.number >= self.config.attempts || is_too_long {
            return Err(error);
        }
        let wait = wait.unwrap_or_else(|| self.pause.mul_f64(rand::random_range(0.5..1.5)));
        tracing::info!(what = self.what, %error, attempt = self.number, wait_ms = wait.as_millis(), "trying again");
        tokio::time::sleep(wait).await;
        self.pause *= 2;
        self.number += 1;
        Ok(())
    }

    /// The last attempt got somewhere: the count begins again, the deadline of the whole image bounds it.
    fn progressed(&mut self) {
        (self.number, self.pause) = (1, self.config.pause);
    }
}

/// On whose behalf a request is made.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Caller {
    pub atespace: String,
    pub repository: Repository,
}

#[derive(Debug, Clone)]
struct Authorization {
    header: String,
    expires: Option<Instant>,
}

/// A failed attempt.
enum Failure {
    /// Worth another attempt, after this pause if it is known.
    Transient(ImageError, Option<Duration>),
    Final(ImageError),
}

impl Registry {
    pub fn new(config: RegistryConfig, credentials: Credentials, dir: PathBuf) -> Self {
        let client = HttpClient::new(config.connect_timeout, config.ca_file.clone());
        Self { config, credentials, dir, client, tokens: Mutex::default() }
    }

    /// A manifest or index by tag or digest: its bytes and digest. A digest asked for is verified.
    pub async fn manifest(
        &self,
        caller: &Caller,
        tag: Option<&str>,
        digest: Option<&Digest>,
    ) -> Result<(Bytes, Digest), ImageError> {
        let name = digest.map_or_else(|| tag.unwrap_or("latest").to_owned(), Digest::to_string);
        let path = format!("manifests/{name}");
        let what = format!("{}{}{name}", caller.repository, if digest.is_some() { "@" } else { ":" });
        let mut tries = Tries::new(&self.config, &what);
        loop {
            let attempt = async {
                let response = self.send(caller, Method::GET, &path, &what, HeaderMap::new()).await?;
                let bytes = self.collect(response, MAX_MANIFEST, &what, caller.repository.host()).await?;
                let found = Digest::of(&bytes);
                match digest {
                    Some(digest) if *digest != found => Err(Failure::Final(ImageError::Corrupt {
                        what: format!("manifest {what}"),
                        reason: format!("what the registry sent has digest {found}"),
                    })),
                    _ => Ok((bytes, found)),
                }
            };
            match attempt.await {
                Ok(value) => return Ok(value),
                Err(failure) => tries.again(failure).await?,
            }
        }
    }

    /// Checks that the caller may read this manifest or blob (`kind` is `manifests` or `blobs`) now.
    pub async fn check(&self, caller: &Caller, kind: &str, digest: &Digest) -> Result<(), ImageError> {
        let path = format!("{kind}/{digest}");
        let what = format!("{}@{digest}", caller.repository);
        let mut tries = Tries::new(&self.config, &what);
        loop {
            let attempt = async {
                self.send(caller, Method::HEAD, &path, &what, HeaderMap::new()).await?;
                Ok(())
            };
            match attempt.await {
                Ok(value) => return Ok(value),
                Err(failure) => tries.again(failure).await?,
            }
        }
    }

    /// A small blob, verified.
    pub async fn blob(
        &self,
        caller: &Caller,
        digest: &Digest,
        size: u64,
        limit: u64,
    ) -> Result<Bytes, ImageError> {
        let what = format!("blob {digest} of {}", caller.repository);
        if size > limit {
            return Err(ImageError::TooLarge { what, limit: format!("{limit} bytes") });
        }
        let path = format!("blobs/{digest}");
        let mut tries = Tries::new(&self.config, &what);
        loop {
            let attempt = async {
                let response = self.send(caller, Method::GET, &path, &what, HeaderMap::new()).await?;
                let bytes = self.collect(response, size, &what, caller.repository.host()).await?;
                let found = Digest::of(&bytes);
                if bytes.len() as u64 != size || found != *digest {
                    return Err(Failure::Final(ImageError::Corrupt {
                        what: what.clone(),
                        reason: format!("the registry sent {} bytes with digest {found}", bytes.len()),
                    }));
                }
                Ok(bytes)
            };
            match attempt.await {
                Ok(value) => return Ok(value),
                Err(failure) => tries.again(failure).await?,
            }
        }
    }

    /// Streams a blob into `file`, which is empty, and verifies size and digest. `progress` gets the bytes there so
    /// far. An attempt that breaks off is continued with a range request.
    pub async fn download(
        &self,
        caller: &Caller,
        digest: &Digest,
        size: u64,
        file: &mut tokio::fs::File,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), ImageError> {
        let what = format!("blob {digest} of {}", caller.repository);
        let path = format!("blobs/{digest}");
        let mut hash = sha2::Sha256::new();
        let mut done = 0_u64;
        let mut tries = Tries::new(&self.config, &what);
        loop {
            let before = done;
            let attempt = async {
                let local = |error: std::io::Error| {
                    Failure::Final(ImageError::io(format!("write {what}"), &self.dir, error))
                };
                let mut headers = HeaderMap::new();
                if done > 0 {
                    let range = header::HeaderValue::from_str(&format!("bytes={done}-"))
                        .map_err(|error| Failure::Final(internal(&what, &error)))?;
                    headers.insert(header::RANGE, range);
                }
                let response = self.send(caller, Method::GET, &path, &what, headers).await?;
                let continues = response.status() == StatusCode::PARTIAL_CONTENT
                    && response
                        .headers()
                        .get(header::CONTENT_RANGE)
                        .and_then(|range| range.to_str().ok())
                        .is_some_and(|range| range.starts_with(&format!("bytes {done}-")));
                if !continues && done > 0 {
                    // The registry ignored the range: begin again.
                    use tokio::io::AsyncSeekExt as _;
                    file.set_len(0).await.map_err(local)?;
                    file.rewind().await.map_err(local)?;
                    (hash, done) = (sha2::Sha256::new(), 0);
                }
                let host = caller.repository.host();
                let mut body = response.into_body();
                while let Some(chunk) = self.next_chunk(&mut body, host).await? {
                    done += chunk.len() as u64;
                    if done > size {
                        return Err(Failure::Final(ImageError::Corrupt {
                            what: what.clone(),
                            reason: format!("the registry sends more than the {size} bytes of its manifest"),
                        }));
                    }
                    hash.update(&chunk);
                    file.write_all(&chunk).await.map_err(local)?;
                    progress(done);
                }
                if done < size {
                    let reason = format!("the transfer of {what} ended after {done} of {size} bytes");
                    return Err(Failure::Transient(
                        ImageError::Unreachable { host: host.to_owned(), reason },
                        None,
                    ));
                }
                let found = Digest::from_hash(hash.clone().finalize().into());
                if found != *digest {
                    return Err(Failure::Final(ImageError::Corrupt {
                        what: what.clone(),
                        reason: format!("the registry sent {size} bytes with digest {found}"),
                    }));
                }
                file.flush().await.map_err(local)
            };
            match attempt.await {
                Ok(value) => return Ok(value),
                Err(failure) => {
                    if done > before {
                        tries.progressed();
                    }
                    tries.again(failure).await?;
                }
            }
        }
    }

    /// One request with authentication and redirects; only success comes back.
    async fn send(
        &self,
        caller: &Caller,
        method: Method,
        path: &str,
        what: &str,
        headers: HeaderMap,
    ) -> Result<Response<Incoming>, Failure> {
        let repository = &caller.repository;
        let scheme = if repository.is_loopback() { "http" } else { "https" };
        let uri: Uri = format!("{scheme}://{}/v2/{}/{path}", repository.host(), repository.path)
            .parse()
            .map_err(|error| Failure::Final(internal(what, &error)))?;
        let mut authorization = self.cached(caller);
        let mut fresh = false;
        loop {
            let response =
                self.follow(repository, &method, uri.clone(), authorization.as_deref(), &headers).await?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            let asked = (status == StatusCode::UNAUTHORIZED && !fresh).then(|| {
                let values = response.headers().get_all(header::WWW_AUTHENTICATE);
                challenge(values.iter().filter_map(|value| value.to_str().ok()))
            });
            if let Some(Some(challenge)) = asked {
                self.forget(caller);
                if let Some(header) = self.authenticate(caller, &challenge, what).await? {
                    authorization = Some(header);
                    fresh = true;
                    continue;
                }
            }
            return Err(self.refusal(caller, what, response).await);
        }
    }

    /// Sends a request and follows redirects by the rules of this module.
    async fn follow(
        &self,
        repository: &Repository,
        method: &Method,
        mut uri: Uri,
        authorization: Option<&str>,
        headers: &HeaderMap,
    ) -> Result<Response<Incoming>, Failure> {
        let origin = (uri.scheme().cloned(), uri.authority().cloned());
        let host = repository.host();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = Request::builder().method(method).uri(&uri).header(header::ACCEPT, ACCEPT);
            if let Some(authorization) = authorization
                && (uri.scheme().cloned(), uri.authority().cloned()) == origin
            {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            for (name, value) in headers {
                request = request.header(name, value);
            }
            let request = request
                .header(header::USER_AGENT, concat!("substrate/", env!("CARGO_PKG_VERSION")))
                .body(Body::default())
                .map_err(|error| Failure::Final(internal(host, &error)))?;
            let response = self.request(request, host).await?;
            if !response.status().is_redirection() || response.status() == StatusCode::NOT_MODIFIED {
                return Ok(response);
            }
            let broken =
                |reason: String| Failure::Final(ImageError::Registry { host: host.to_owned(), reason });
            let location = response
                .headers()
                .get(header::LOCATION)
                .and_then(|location| location.to_str().ok())
                .ok_or_else(|| {
                    broken(format!("it redirects ({}) without saying where", response.status()))
                })?;
            uri = join(&uri, location).filter(|uri| may_visit(uri, repository)).ok_or_else(|| {
                let to = uri_without_query(location);
                broken(format!("it redirects to `{to}`: only https is followed"))
            })?;
        }
        Err(Failure::Final(ImageError::Registry {
            host: host.to_owned(),
            reason: format!("it redirects more than {MAX_REDIRECTS} times"),
        }))
    }

    /// Sends one request; `host` is named in errors.
    async fn request(&self, request: Request<Body>, host: &str) -> Result<Response<Incoming>, Failure> {
        let unreachable = |reason: String| {
            Failure::Transient(ImageError::Unreachable { host: host.to_owned(), reason }, None)
        };
        match tokio::time::timeout(self.config.idle_timeout, self.client.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(reason)) => Err(unreachable(reason)),
            Err(_) => Err(unreachable(format!("no answer within {} s", self.config.idle_timeout.as_secs()))),
        }
    }

    /// The next chunk of a body, or none at its end.
    async fn next_chunk(&self, body: &mut Incoming, host: &str) -> Result<Option<Bytes>, Failure> {
        let unreachable = |reason: String| {
            Failure::Transient(ImageError::Unreachable { host: host.to_owned(), reason }, None)
        };
        loop {
            match tokio::time::timeout(self.config.idle_timeout, body.frame()).await {
                Ok(None) => return Ok(None),
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                Ok(Some(Err(error))) => return Err(unreachable(chain(&error))),
                Err(_) => {
                    return Err(unreachable(format!(
                        "nothing came for {} s",
                        self.config.idle_timeout.as_secs()
                    )));
                }
            }
        }
    }

    async fn collect(
        &self,
        response: Response<Incoming>,
        limit: u64,
        what: &str,
        host: &str,
    ) -> Result<Bytes, Failure> {
        let mut body = response.into_body();
        let mut bytes = Vec::new();
        while let Some(chunk) = self.next_chunk(&mut body, host).await? {
            if (bytes.len() + chunk.len()) as u64 > limit {
                return Err(Failure::Final(ImageError::TooLarge {
                    what: what.to_owned(),
                    limit: format!("{limit} bytes"),
                }));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes.into())
    }

    fn cached(&self, caller: &Caller) -> Option<String> {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.retain(|_, token| token.expires.is_none_or(|expires| expires > Instant::now()));
        tokens.get(caller).map(|token| token.header.clone())
    }

    fn forget(&self, caller: &Caller) {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).remove(caller);
    }

    /// Answers a challenge; none where there is nothing to answer with.
    async fn authenticate(
        &self,
        caller: &Caller,
        challenge: &Challenge,
        what: &str,
    ) -> Result<Option<String>, Failure> {
        let login =
            self.credentials.login(&caller.atespace, &caller.repository).await.map_err(Failure::Final)?;
        let authorization = match challenge {
            Challenge::Basic => match login.as_ref().and_then(Login::basic_header) {
                Some(header) => Authorization { header, expires: None },
                None => return Ok(None),
            },
            Challenge::Bearer { realm, service } => {
                self.token(caller, realm, service.as_deref(), login.as_ref(), what).await?
            }
        };
        let header = authorization.header.clone();
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).insert(caller.clone(), authorization);
        Ok(Some(header))
    }

    /// Gets a token that allows to pull from the caller's repository.
    async fn token(
        &self,
        caller: &Caller,
        realm: &str,
        service: Option<&str>,
        login: Option<&Login>,
        what: &str,
    ) -> Result<Authorization, Failure> {
        let repository = &caller.repository;
        let realm_uri: Uri =
            realm.parse().ok().filter(|uri| may_visit(uri, repository)).ok_or_else(|| {
                Failure::Final(ImageError::Registry {
                    host: repository.host().to_owned(),
                    reason: format!(
                        "its token service `{}` is not at an https URL",
                        uri_without_query(realm)
                    ),
                })
            })?;
        // The scope is ours and not the challenge's: never ask for more than to pull this repository.
        let scope = format!("repository:{}:pull", repository.path);
        let mut fields = vec![("scope", scope.as_str())];
        fields.extend(service.map(|service| ("service", service)));
        let request = if let Some(Login::Refresh(token)) = login {
            fields.extend([
                ("grant_type", "refresh_token"),
                ("client_id", "substrate"),
                ("refresh_token", token.as_str()),
            ]);
            Request::post(&realm_uri)
                .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(Body::from(form(&fields)))
        } else {
            let glue = if realm_uri.query().is_some() { '&' } else { '?' };
            let mut request = Request::get(format!("{realm}{glue}{}", form(&fields)));
            if let Some(basic) = login.and_then(Login::basic_header) {
                request = request.header(header::AUTHORIZATION, basic);
            }
            request.body(Body::default())
        }
        .map_err(|error| Failure::Final(internal(what, &error)))?;
        let host = realm_uri.authority().map_or("?", |authority| authority.as_str()).to_owned();
        let response = self.request(request, &host).await?;
        if !response.status().is_success() {
            return Err(self.refusal(caller, what, response).await);
        }
        let bytes = self.collect(response, MAX_ANSWER, "answer of the token service", &host).await?;
        let (token, seconds) = serde_json::from_slice::<TokenAnswer>(&bytes)
            .ok()
            .and_then(TokenAnswer::into_token)
            .ok_or_else(|| {
                Failure::Final(ImageError::Registry {
                    host,
                    reason: "its token service answered without a token".into(),
                })
            })?;
        // A little less than promised, for the way there.
        let expires = Instant::now() + Duration::from_secs(seconds.saturating_sub(5));
        Ok(Authorization { header: format!("Bearer {token}"), expires: Some(expires) })
    }

    /// Turns an answer that is no success into an error.
    async fn refusal(&self, caller: &Caller, what: &str, response: Response<Incoming>) -> Failure {
        let status = response.status();
        let host = caller.repository.host().to_owned();
        let retry_after = response
            .headers()
            .get(header::RETRY_AFTER)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.parse().ok())
            .map(Duration::from_secs);
        let said = match self.collect(response, MAX_ANSWER, "error", &host).await {
            Ok(bytes) => said(&bytes),
            Err(_) => String::new(),
        };
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let known = match self.credentials.login(&caller.atespace, &caller.repository).await {
                    Ok(Some(_)) => "its credentials were not accepted",
                    Ok(None) => "it has no credentials for this registry",
                    Err(error) => return Failure::Final(error),
                };
                Failure::Final(ImageError::Denied {
                    atespace: caller.atespace.clone(),
                    image: what.to_owned(),
                    reason: format!(
                        "registry {host} answered {status}{said}, {known} (they belong in {}); it may also not exist",
                        self.credentials.place()
                    ),
                })
            }
            StatusCode::NOT_FOUND => Failure::Final(ImageError::NotFound {
                image: what.to_owned(),
                reason: format!(
                    "registry {host} answered 404{said}; check name and tag, and that atespace `{}` may see it",
                    caller.atespace
                ),
            }),
            StatusCode::TOO_MANY_REQUESTS => {
                Failure::Transient(ImageError::RateLimited { host, retry_after }, retry_after)
            }
            status if status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT => {
                Failure::Transient(
                    ImageError::Registry { host, reason: format!("it answered {status}{said} for {what}") },
                    retry_after,
                )
            }
            status => Failure::Final(ImageError::Registry {
                host,
                reason: format!("it answered {status}{said} for {what}"),
            }),
        }
    }
}

fn internal(what: &str, error: &dyn std::fmt::Display) -> ImageError {
    ImageError::Internal { what: format!("asking for {what}"), reason: error.to_string() }
}

/// Whether a request for `repository` may go to `uri`: https, or loopback if the registry is there too.
fn may_visit(uri: &Uri, repository: &Repository) -> bool {
    let Some(authority) = uri.authority() else { return false };
    match uri.scheme_str() {
        Some("https") => true,
        Some("http") => repository.is_loopback() && is_loopback(authority.as_str()),
        _ => false,
    }
}

/// Signed URLs carry secrets in their query.
fn uri_without_query(uri: &str) -> &str {
    shorten(uri.split('?').next().unwrap_or(uri))
}

fn form(fields: &[(&str, &str)]) -> String {
    use std::fmt::Write as _;
    let encode = |text: &str| {
        let mut out = String::with_capacity(text.len());
        for byte in text.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                out.push(byte as char);
            } else {
                // Writing to a string cannot fail.
                let _ = write!(out, "%{byte:02X}");
            }
        }
        out
    };
    let pairs: Vec<String> =
        fields.iter().map(|(key, value)| format!("{}={}", encode(key), encode(value))).collect();
    pairs.join("&")
}

/// What the registry said in the specification's form, printable and short; with a leading space.
fn said(bytes: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Answer {
        errors: Vec<Entry>,
    }
    #[derive(serde::Deserialize)]
    struct Entry {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let Ok(answer) = serde_json::from_slice::<Answer>(bytes) else { return String::new() };
    let Some(first) = answer.errors.first() else { return String::new() };
    let text: String =
        format!("{}: {}", first.code, first.message).chars().filter(|c| !c.is_control()).collect();
    format!(" ({})", shorten(&text))
}
