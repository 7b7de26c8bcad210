// SPDX-License-Identifier: Apache-2.0
//! A registry on loopback that does what a test tells it, faults included.
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use atelet::image::{Digest, Reference};
use base64::Engine as _;
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;

use crate::support::Built;

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// Who may pull what.
#[derive(Clone, Default)]
pub enum Auth {
    #[default]
    Open,
    /// User and password for everything.
    Basic(&'static str, &'static str),
    /// Tokens from `/token`: (user, password, repository) for each right; an empty user is anonymous.
    Bearer(Vec<(&'static str, &'static str, &'static str)>),
}

/// What goes wrong with one request.
#[derive(Clone)]
pub enum Fault {
    /// An answer instead of the real one.
    Answer(u16, Vec<(&'static str, String)>, String),
    /// The body breaks off after so many bytes.
    Cut(usize),
    /// The body is another one.
    Replace(Vec<u8>),
    /// No answer ever.
    Hang,
}

#[derive(Default)]
pub struct State {
    pub auth: Auth,
    /// By repository, then tag or digest.
    pub manifests: HashMap<String, HashMap<String, Vec<u8>>>,
    pub blobs: HashMap<String, HashMap<String, Vec<u8>>>,
    /// Applied in order to requests whose path contains the text.
    pub faults: VecDeque<(&'static str, Fault)>,
    /// HEAD succeeds for anything.
    pub claims_everything: bool,
    pub ignores_ranges: bool,
    /// Another host that blobs are redirected to.
    pub blobs_at: Option<SocketAddr>,
    /// Where the token service is said to be; default here.
    pub realm: Option<String>,
    /// `METHOD path [range]` of each request, with `+auth` where there was an Authorization.
    pub log: Vec<String>,
}

pub struct Stub {
    pub address: SocketAddr,
    pub state: Arc<Mutex<State>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Stub {
    pub async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let of_task = Arc::clone(&state);
        let task = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                let state = Arc::clone(&of_task);
                tokio::spawn(async move {
                    let service = hyper::service::service_fn(move |request| {
                        let state = Arc::clone(&state);
                        async move { answer(&state, address, &request).await }
                    });
                    let connection = hyper::server::conn::http1::Builder::new();
                    // Cut bodies end in an error here, as they should.
                    let _ = connection.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { address, state, task }
    }

    pub fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    /// Puts an image under a tag and gives the reference by that tag.
    pub fn push(&self, repository: &str, tag: &str, image: &Built) -> Reference {
        self.change(|state| {
            let manifests = state.manifests.entry(repository.into()).or_default();
            manifests.insert(tag.into(), image.manifest.clone());
            manifests.insert(image.digest().to_string(), image.manifest.clone());
            let blobs = state.blobs.entry(repository.into()).or_default();
            for blob in &image.blobs {
                blobs.insert(Digest::of(blob).to_string(), blob.clone());
            }
        });
        self.reference(&format!("{repository}:{tag}"))
    }

    pub fn reference(&self, rest: &str) -> Reference {
        format!("127.0.0.1:{}/{rest}", self.address.port()).parse().unwrap()
    }

    /// The requests since the last call.
    pub fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }
}

fn full(status: u16, headers: &[(&str, String)], body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(*name, value);
    }
    response.body(Full::new(body.into()).map_err(|never| match never {}).boxed_unsync()).unwrap()
}

fn login(header: Option<&str>) -> Option<(String, String)> {
    let pair = header?.strip_prefix("Basic ")?;
    let pair = base64::engine::general_purpose::STANDARD.decode(pair).unwrap();
    let (user, password) =
        String::from_utf8(pair).unwrap().split_once(':').map(|(a, b)| (a.into(), b.into()))?;
    Some((user, password))
}

async fn answer(
    state: &Mutex<State>,
    address: SocketAddr,
    request: &Request<Incoming>,
) -> Result<Response<Body>, std::io::Error> {
    let path = request.uri().path().to_owned();
    let header = |name: &str| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
    let authorization = header("authorization");
    let range = header("range");
    let fault = {
        let mut state = state.lock().unwrap();
        let mark = if authorization.is_some() { " +auth" } else { "" };
        let ranged = range.as_deref().map(|range| format!(" {range}")).unwrap_or_default();
        state.log.push(format!("{} {path}{ranged}{mark}", request.method()));
        let position = state.faults.iter().position(|(part, _)| path.contains(part));
        position.and_then(|position| state.faults.remove(position)).map(|(_, fault)| fault)
    };
    match &fault {
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Answer(status, headers, body)) => return Ok(full(*status, headers, body.clone())),
        _ => {}
    }
    let state = state.lock().unwrap();
    if path == "/token" {
        return Ok(token(&state, request, authorization.as_deref()));
    }
    let Some((repository, kind, name)) = split(&path) else { return Ok(full(404, &[], "")) };
    if let Some(refusal) = refuse(&state, address, &repository, authorization.as_deref()) {
        return Ok(refusal);
    }
    if request.method() == Method::HEAD && state.claims_everything {
        return Ok(full(200, &[], ""));
    }
    let content = match kind {
        "manifests" => state.manifests.get(&repository),
        _ => state.blobs.get(&repository),
    };
    let Some(content) = content.and_then(|content| content.get(&name)).cloned() else {
        let body = r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#;
        return Ok(full(404, &[], body));
    };
    if let (Some(elsewhere), "blobs", &Method::GET) = (state.blobs_at, kind, request.method()) {
        let location = format!("http://{elsewhere}/v2/{repository}/blobs/{name}");
        return Ok(full(307, &[("location", location)], ""));
    }
    let content = match &fault {
        Some(Fault::Replace(other)) => other.clone(),
        _ => content,
    };
    let from = range
        .filter(|_| !state.ignores_ranges)
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let (status, headers) = match from {
        Some(from) => {
            let last = content.len() - 1;
            (206, vec![("content-range", format!("bytes {from}-{last}/{}", content.len()))])
        }
        None => (200, vec![]),
    };
    let content = Bytes::from(content).slice(from.unwrap_or(0)..);
    if request.method() == Method::HEAD {
        return Ok(full(status, &headers, ""));
    }
    if let Some(Fault::Cut(after)) = fault {
        let part = content.slice(..after);
        // The server writes out what it has when the body has nothing to give for a moment.
        let frames = futures::stream::unfold(Some(part), |part| async move {
            if let Some(part) = part {
                return Some((Ok(Frame::data(part)), None));
            }
            tokio::task::yield_now().await;
            Some((Err(std::io::Error::other("cut")), None))
        });
        let mut response = Response::builder().status(status).header("content-length", content.len());
        for (name, value) in headers {
            response = response.header(name, value);
        }
        let body = StreamBody::new(frames).boxed_unsync();
        return Ok(response.body(body).unwrap());
    }
    Ok(full(status, &headers, content))
}

/// `/v2/REPOSITORY/KIND/NAME`.
fn split(path: &str) -> Option<(String, &'static str, String)> {
    let rest = path.strip_prefix("/v2/")?;
    for kind in ["manifests", "blobs"] {
        if let Some((repository, name)) = rest.split_once(&format!("/{kind}/")) {
            return Some((repository.into(), kind, name.into()));
        }
    }
    None
}

fn refuse(
    state: &State,
    address: SocketAddr,
    repository: &str,
    authorization: Option<&str>,
) -> Option<Response<Body>> {
    let denied = r#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#;
    match &state.auth {
        Auth::Open => None,
        Auth::Basic(user, password) => {
            let is_right = login(authorization) == Some(((*user).into(), (*password).into()));
            (!is_right).then(|| full(401, &[("www-authenticate", "Basic realm=\"stub\"".into())], denied))
        }
        Auth::Bearer(_) => {
            if authorization == Some(&format!("Bearer for:{repository}")) {
                return None;
            }
            let realm = state.realm.clone().unwrap_or_else(|| format!("http://{address}/token"));
            let challenge = format!(
                "Bearer realm=\"{realm}\",service=\"stub\",scope=\"repository:{repository}:pull,push\""
            );
            Some(full(401, &[("www-authenticate", challenge)], denied))
        }
    }
}

fn token(state: &State, request: &Request<Incoming>, authorization: Option<&str>) -> Response<Body> {
    let Auth::Bearer(rights) = &state.auth else { return full(404, &[], "") };
    let query = request.uri().query().unwrap_or_default();
    assert!(query.contains("service=stub"), "{query}");
    let (user, password) = login(authorization).unwrap_or_default();
    if !user.is_empty() && !rights.iter().any(|right| (right.0, right.1) == (&user, &password)) {
        return full(StatusCode::UNAUTHORIZED.as_u16(), &[], "");
    }
    let allowed = rights.iter().find(|right| {
        right.0 == user
            && query.contains(&format!("scope=repository%3A{}%3Apull", right.2.replace('/', "%2F")))
    });
    // A real service gives a token with fewer rights instead of refusing.
    let repository = allowed.map_or("nothing", |right| right.2);
    full(200, &[], format!(r#"{{"token": "for:{repository}", "expires_in": 300}}"#))
}
