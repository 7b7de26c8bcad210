// SPDX-License-Identifier: Apache-2.0
//! The driver's client of the control plane (`ateapi.v1.Control`).
//!
//! One lazily connected HTTP/2 channel. Every call has a deadline. A call whose connection broke is tried again with
//! growing, jittered pauses for as long as [`PATIENCE`]; so is a short one that was answered with `Unavailable` or
//! `Aborted`, but not a verb: it has been tried, and its failure is the answer. Every mutating call carries a request
//! id that stays the same over its retries, so a retry finds the first attempt's effect. Keys and tokens are read from
//! their files at each connect and call, so replacing a file is enough to renew them.
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use hyper_util::rt::TokioIo;
use substrate_proto::ateapi::{self, control_client::ControlClient};
use substrate_proto::types::{ActorSpec, EgressPolicy, TemplateSpec};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tonic::codegen::InterceptedService;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Response, Status};

use crate::backoff::Backoff;
use crate::config::Config;
use crate::failure::Failure;
use crate::tls;

/// How long an unreachable control plane is tried before a call fails.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// Deadline of one attempt of a call that reads or records something.
pub const SHORT: Duration = Duration::from_secs(10);
/// Deadline of a call that may have to ask a registry.
pub const RESOLVE: Duration = Duration::from_mins(1);
const PAGE: u32 = 500;
const MAX_MESSAGE: usize = 32 << 20;

type Client = ControlClient<InterceptedService<Channel, Bearer>>;

/// How long one attempt of a call may take, and of which kind it is.
#[derive(Clone, Copy)]
enum Allowance {
    Short(Duration),
    Verb(Duration),
}

/// A handle on the control plane; cheap to clone.
#[derive(Clone)]
pub struct Control {
    client: Client,
    endpoint: Arc<str>,
}

impl Control {
    /// Prepares the channel; it connects with the first call.
    pub fn new(config: &Config) -> Self {
        let dial = Arc::new(Dial::new(config));
        let connector = tower::service_fn(move |_: Uri| {
            let dial = Arc::clone(&dial);
            async move { dial.connect().await.map(TokioIo::new) }
        });
        // The connector knows where to go; this is the authority that HTTP/2 shows.
        let channel = Endpoint::from_static("http://ateapi")
            .connect_timeout(Duration::from_secs(3))
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true)
            .connect_with_connector_lazy(connector);
        let bearer = Bearer {
            token: config
                .api_bearer_token_path
                .clone()
                .map(|path| Arc::new(Mutex::new(CachedToken { path, read: None }))),
        };
        Self {
            client: ControlClient::with_interceptor(channel, bearer)
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE),
            endpoint: config.api_endpoint.as_str().into(),
        }
    }

    /// Where the control plane is, for messages.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    async fn call<Q, R, F, A>(
        &self,
        doing: impl Into<String>,
        allowance: Allowance,
        request: Q,
        attempt: F,
    ) -> Result<R, Failure>
    where
        Q: Clone,
        F: Fn(Client, Request<Q>) -> A,
        A: Future<Output = Result<Response<R>, Status>>,
    {
        let call = self.try_call(doing, allowance, request, attempt);
        crate::metrics::waited(Box::pin(call)).await
    }

    async fn try_call<Q, R, F, A>(
        &self,
        doing: impl Into<String>,
        allowance: Allowance,
        request: Q,
        attempt: F,
    ) -> Result<R, Failure>
    where
        Q: Clone,
        F: Fn(Client, Request<Q>) -> A,
        A: Future<Output = Result<Response<R>, Status>>,
    {
        let (Allowance::Short(deadline) | Allowance::Verb(deadline)) = allowance;
        let begun = Instant::now();
        let mut backoff = Backoff::new(Duration::from_millis(25), PATIENCE);
        let status = loop {
            let mut request = Request::new(request.clone());
            request.set_timeout(deadline);
            let answer = tokio::time::timeout(deadline, attempt(self.client.clone(), request)).await;
            let status = match answer {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => status,
                Err(_) => {
                    break Status::deadline_exceeded(format!("no answer within {} s", deadline.as_secs()));
                }
            };
            let retriable = is_transport(&status)
                || (matches!(allowance, Allowance::Short(_))
                    && matches!(status.code(), Code::Unavailable | Code::Aborted));
            let pause = backoff.pause();
            if !retriable || begun.elapsed() + pause > PATIENCE {
                break status;
            }
            tokio::time::sleep(pause).await;
        };
        Err(self.failure(doing.into(), status))
    }

    fn failure(&self, doing: String, status: Status) -> Failure {
        if is_transport(&status) {
            return Failure::Unreachable {
                doing,
                endpoint: self.endpoint.to_string(),
                cause: status.message().to_owned(),
            };
        }
        Failure::Refused { doing, status: Box::new(status) }
    }

    /// The actor with that uid, if there is one.
    pub async fn get_actor(&self, uid: &str) -> Result<Option<ateapi::Actor>, Failure> {
        let request = ateapi::GetActorRequest { actor: Some(by_uid(uid)) };
        let answer = self
            .call(
                format!("look up actor {uid}"),
                Allowance::Short(SHORT),
                request,
                |mut client, request| async move { client.get_actor(request).await },
            )
            .await;
        absent_is_none(answer)
    }

    /// All actors with these labels, complete or an error.
    pub async fn list_actors(
        &self,
        atespace: &str,
        template: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<ateapi::Actor>, Failure> {
        let mut actors = Vec::new();
        let mut request = ateapi::ListActorsRequest {
            atespace: atespace.to_owned(),
            template: template.to_owned(),
            labels,
            page_size: PAGE,
            ..Default::default()
        };
        loop {
            let page = self
                .call(
                    "list actors",
                    Allowance::Short(SHORT),
                    request.clone(),
                    |mut client, request| async move { client.list_actors(request).await },
                )
                .await?;
            actors.extend(page.actors);
            if page.next_page_token.is_empty() {
                return Ok(actors);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// Records an actor and has it booted.
    pub async fn create_actor(
        &self,
        atespace: &str,
        name: &str,
        uid: &str,
        spec: ActorSpec,
    ) -> Result<ateapi::Actor, Failure> {
        let request = ateapi::CreateActorRequest {
            atespace: atespace.to_owned(),
            name: name.to_owned(),
            spec: Some(spec),
            start: true,
            request_id: request_id(),
            uid: uid.to_owned(),
        };
        self.call(
            format!("create actor {atespace}/{name}"),
            Allowance::Short(SHORT),
            request,
            |mut client, request| async move { client.create_actor(request).await },
        )
        .await
    }

    /// Replaces the annotations of an actor.
    pub async fn annotate(
        &self,
        uid: &str,
        annotations: BTreeMap<String, String>,
    ) -> Result<ateapi::Actor, Failure> {
        let request = ateapi::UpdateActorRequest {
            actor: Some(by_uid(uid)),
            annotations: Some(ateapi::LabelSet { entries: annotations }),
            request_id: request_id(),
            ..Default::default()
        };
        self.call(
            format!("annotate actor {uid}"),
            Allowance::Short(SHORT),
            request,
            |mut client, request| async move { client.update_actor(request).await },
        )
        .await
    }

    /// Replaces what an actor may reach.
    pub async fn set_egress(&self, uid: &str, egress: EgressPolicy) -> Result<ateapi::Actor, Failure> {
        let request = ateapi::UpdateActorRequest {
            actor: Some(by_uid(uid)),
            egress: Some(egress),
            request_id: request_id(),
            ..Default::default()
        };
        self.call(
            format!("set the egress policy of actor {uid}"),
            Allowance::Short(SHORT),
            request,
            |mut client, request| async move { client.update_actor(request).await },
        )
        .await
    }

    /// Brings an actor up; joins a resume that is under way.
    pub async fn resume(&self, uid: &str, deadline: Duration) -> Result<ateapi::Actor, Failure> {
        self.bring_up(uid, "driver", deadline).await
    }

    /// Brings an actor up because someone wants to reach into it.
    pub async fn wake(&self, uid: &str, deadline: Duration) -> Result<ateapi::Actor, Failure> {
        self.bring_up(uid, "exec", deadline).await
    }

    async fn bring_up(&self, uid: &str, cause: &str, deadline: Duration) -> Result<ateapi::Actor, Failure> {
        let request = ateapi::ResumeActorRequest {
            actor: Some(by_uid(uid)),
            cause: cause.to_owned(),
            request_id: request_id(),
        };
        let answer = self
            .call(
                format!("start actor {uid}"),
                Allowance::Verb(deadline),
                request,
                |mut client, request| async move { client.resume_actor(request).await },
            )
            .await?;
        self.answered(answer.actor, "start", uid)
    }

    /// Suspends an actor for its user.
    pub async fn suspend(&self, uid: &str, deadline: Duration) -> Result<ateapi::Actor, Failure> {
        let request = ateapi::SuspendActorRequest {
            actor: Some(by_uid(uid)),
            cause: "user".to_owned(),
            request_id: request_id(),
            ..Default::default()
        };
        let answer = self
            .call(
                format!("suspend actor {uid}"),
                Allowance::Verb(deadline),
                request,
                |mut client, request| async move { client.suspend_actor(request).await },
            )
            .await?;
        self.answered(answer.actor, "suspend", uid)
    }

    /// Makes a paused actor's snapshot durable.
    pub async fn promote(&self, uid: &str, deadline: Duration) -> Result<ateapi::Actor, Failure> {
        let request = ateapi::PromoteActorRequest { actor: Some(by_uid(uid)), request_id: request_id() };
        let answer = self
            .call(
                format!("promote actor {uid}"),
                Allowance::Verb(deadline),
                request,
                |mut client, request| async move { client.promote_actor(request).await },
            )
            .await?;
        self.answered(answer.actor, "promote", uid)
    }

    fn answered(
        &self,
        actor: Option<ateapi::Actor>,
        verb: &str,
        uid: &str,
    ) -> Result<ateapi::Actor, Failure> {
        actor.ok_or_else(|| {
            self.failure(format!("{verb} actor {uid}"), Status::internal("the answer names no actor"))
        })
    }

    /// Deletes an actor; false when there was none.
    pub async fn delete_actor(&self, uid: &str, deadline: Duration) -> Result<bool, Failure> {
        let request = ateapi::DeleteActorRequest { actor: Some(by_uid(uid)), request_id: request_id() };
        let answer = self
            .call(
                format!("delete actor {uid}"),
                Allowance::Verb(deadline),
                request,
                |mut client, request| async move { client.delete_actor(request).await },
            )
            .await;
        Ok(absent_is_none(answer)?.is_some_and(|answer| answer.deleted))
    }

    /// The template of that name, if there is one.
    pub async fn get_template(
        &self,
        atespace: &str,
        name: &str,
    ) -> Result<Option<ateapi::Template>, Failure> {
        let request = ateapi::GetTemplateRequest { atespace: atespace.to_owned(), name: name.to_owned() };
        let answer = self
            .call(
                format!("look up template {atespace}/{name}"),
                Allowance::Short(SHORT),
                request,
                |mut client, request| async move { client.get_template(request).await },
            )
            .await;
        absent_is_none(answer)
    }

    /// Makes a template, or finds the equal one; with `dry_run` only validates and pins its images.
    pub async fn create_template(
        &self,
        atespace: &str,
        name: &str,
        spec: TemplateSpec,
        labels: BTreeMap<String, String>,
        dry_run: bool,
    ) -> Result<ateapi::Template, Failure> {
        let doing = if dry_run {
            "accept what the sandbox would run".to_owned()
        } else {
            format!("make template {atespace}/{name}")
        };
        let request = ateapi::CreateTemplateRequest {
            atespace: atespace.to_owned(),
            name: name.to_owned(),
            spec: Some(spec),
            labels,
            request_id: request_id(),
            dry_run,
        };
        self.call(doing, Allowance::Short(RESOLVE), request, |mut client, request| async move {
            client.create_template(request).await
        })
        .await
    }

    /// Deletes a template; false when there was none.
    pub async fn delete_template(&self, atespace: &str, name: &str) -> Result<bool, Failure> {
        let request = ateapi::DeleteTemplateRequest {
            atespace: atespace.to_owned(),
            name: name.to_owned(),
            request_id: request_id(),
        };
        let answer = self
            .call(
                format!("delete template {atespace}/{name}"),
                Allowance::Short(SHORT),
                request,
                |mut client, request| async move { client.delete_template(request).await },
            )
            .await;
        Ok(absent_is_none(answer)?.is_some_and(|answer| answer.deleted))
    }

    /// All templates of an atespace.
    pub async fn list_templates(&self, atespace: &str) -> Result<Vec<ateapi::Template>, Failure> {
        let mut templates = Vec::new();
        let mut request = ateapi::ListTemplatesRequest {
            atespace: atespace.to_owned(),
            page_size: PAGE,
            page_token: String::new(),
        };
        loop {
            let page = self
                .call(
                    "list templates",
                    Allowance::Short(SHORT),
                    request.clone(),
                    |mut client, request| async move { client.list_templates(request).await },
                )
                .await?;
            templates.extend(page.templates);
            if page.next_page_token.is_empty() {
                return Ok(templates);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// The atespace of that name, if there is one.
    pub async fn get_atespace(&self, name: &str) -> Result<Option<ateapi::Atespace>, Failure> {
        let request = ateapi::GetAtespaceRequest { name: name.to_owned() };
        let answer = self
            .call(
                format!("look up atespace {name}"),
                Allowance::Short(SHORT),
                request,
                |mut client, request| async move { client.get_atespace(request).await },
            )
            .await;
        absent_is_none(answer)
    }

    /// Makes an atespace.
    pub async fn create_atespace(
        &self,
        name: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<ateapi::Atespace, Failure> {
        let request =
            ateapi::CreateAtespaceRequest { name: name.to_owned(), labels, request_id: request_id() };
        self.call(
            format!("make atespace {name}"),
            Allowance::Short(SHORT),
            request,
            |mut client, request| async move { client.create_atespace(request).await },
        )
        .await
    }

    /// Deletes an atespace; false when there was none.
    pub async fn delete_atespace(&self, name: &str) -> Result<bool, Failure> {
        let request = ateapi::DeleteAtespaceRequest { name: name.to_owned(), request_id: request_id() };
        let answer = self
            .call(
                format!("delete atespace {name}"),
                Allowance::Short(SHORT),
                request,
                |mut client, request| async move { client.delete_atespace(request).await },
            )
            .await;
        Ok(absent_is_none(answer)?.is_some_and(|answer| answer.deleted))
    }

    /// All workers.
    pub async fn list_workers(&self) -> Result<Vec<ateapi::Worker>, Failure> {
        let answer = self
            .call(
                "list workers",
                Allowance::Short(SHORT),
                ateapi::ListWorkersRequest::default(),
                |mut client, request| async move { client.list_workers(request).await },
            )
            .await?;
        Ok(answer.workers)
    }

    /// All atespaces.
    pub async fn list_atespaces(&self) -> Result<Vec<ateapi::Atespace>, Failure> {
        let mut atespaces = Vec::new();
        let mut request = ateapi::ListAtespacesRequest { page_size: PAGE, page_token: String::new() };
        loop {
            let page = self
                .call(
                    "list atespaces",
                    Allowance::Short(SHORT),
                    request.clone(),
                    |mut client, request| async move { client.list_atespaces(request).await },
                )
                .await?;
            atespaces.extend(page.atespaces);
            if page.next_page_token.is_empty() {
                return Ok(atespaces);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// Everything about actors and their events, from a full snapshot on.
    pub async fn watch(&self) -> Result<tonic::Streaming<ateapi::WatchResponse>, Failure> {
        let request = ateapi::WatchRequest {
            from_revision: 0,
            kinds: vec!["actor".to_owned(), "event".to_owned()],
            atespace: String::new(),
        };
        let mut client = self.client.clone();
        let opened = tokio::time::timeout(SHORT, client.watch(request)).await;
        match opened {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.failure("watch actors".to_owned(), status)),
            Err(_) => {
                Err(self
                    .failure("watch actors".to_owned(), Status::deadline_exceeded("no answer within 10 s")))
            }
        }
    }
}

/// Whether the connection failed, as opposed to the control plane's answer being an error: only the former has a
/// source on this side.
fn is_transport(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

fn by_uid(uid: &str) -> ateapi::ActorRef {
    ateapi::ActorRef { uid: uid.to_owned(), ..Default::default() }
}

fn request_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

fn absent_is_none<T>(answer: Result<T, Failure>) -> Result<Option<T>, Failure> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(failure) if failure.code() == Code::NotFound => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// What a connection to the control plane is made of.
trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

/// Where to connect, and with which keys.
struct Dial {
    endpoint: String,
    tls: tls::Files,
}

impl Dial {
    fn new(config: &Config) -> Self {
        Self {
            endpoint: config.api_endpoint.clone(),
            tls: tls::Files {
                prefix: "api_tls",
                ca: config.api_tls_ca_path.clone(),
                cert: config.api_client_cert_path.clone(),
                key: config.api_client_key_path.clone(),
                server_name: config.api_tls_server_name.clone(),
            },
        }
    }

    async fn connect(&self) -> io::Result<Box<dyn Wire>> {
        if let Some(path) = self.endpoint.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            let stream = UnixStream::connect(path)
                .await
                .map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))?;
            return Ok(Box::new(stream));
        }
        let uri: Uri = self.endpoint.parse().map_err(io::Error::other)?;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let secure = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        if !secure {
            return Ok(Box::new(stream));
        }
        Ok(Box::new(self.tls.handshake(host, stream).await?))
    }
}

/// Adds the bearer token of a file that may be replaced while the driver runs.
#[derive(Clone)]
struct Bearer {
    token: Option<Arc<Mutex<CachedToken>>>,
}

struct CachedToken {
    path: std::path::PathBuf,
    read: Option<(SystemTime, MetadataValue<Ascii>)>,
}

impl CachedToken {
    fn current(&mut self) -> Result<MetadataValue<Ascii>, String> {
        let path = self.path.display();
        let modified = std::fs::metadata(&self.path).and_then(|meta| meta.modified()).map_err(|error| {
            format!("cannot read the bearer token {path} (api_bearer_token_path): {error}")
        })?;
        if let Some((read, value)) = &self.read
            && *read == modified
        {
            return Ok(value.clone());
        }
        let token = std::fs::read_to_string(&self.path)
            .map_err(|error| format!("cannot read the bearer token {path}: {error}"))?;
        let mut value: MetadataValue<Ascii> = format!("Bearer {}", token.trim())
            .parse()
            .map_err(|_| format!("the bearer token in {path} holds characters no header may hold"))?;
        value.set_sensitive(true);
        self.read = Some((modified, value.clone()));
        Ok(value)
    }
}

impl tonic::service::Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.token {
            let value = token
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .current()
                .map_err(Status::unauthenticated)?;
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_unreachable_control_plane_is_named_with_the_way_out() {
        let config =
            Config { api_endpoint: "unix:/nonexistent/ateapi.sock".to_owned(), ..Default::default() };
        let failure = Control::new(&config).get_actor("x").await.unwrap_err();
        assert_eq!(failure.code(), Code::Unavailable);
        let message = failure.to_string();
        assert!(
            message.contains("unix:/nonexistent/ateapi.sock") && message.contains("api_endpoint"),
            "{message}"
        );
    }

    #[test]
    fn a_replaced_token_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let mut cached = CachedToken { path: path.clone(), read: None };
        assert!(cached.current().unwrap_err().contains("api_bearer_token_path"));
        std::fs::write(&path, "one\n").unwrap();
        assert_eq!(cached.current().unwrap().to_str().unwrap(), "Bearer one");
        std::fs::write(&path, "two\n").unwrap();
        let later = SystemTime::now() + Duration::from_secs(5);
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
        assert_eq!(cached.current().unwrap().to_str().unwrap(), "Bearer two");
    }
}
