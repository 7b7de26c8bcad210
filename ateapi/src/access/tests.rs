// SPDX-License-Identifier: Apache-2.0
//! Over real sockets: who is let in, what each may do, and what the audit log says of it.
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{EncodePrivateKey as _, EncodePublicKey as _};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use substrate_proto::ateapi as api;
use substrate_proto::ateapi::control_client::ControlClient;
use substrate_proto::types;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_types::StatusExt as _;

use super::*;

/// An authority and what it signs.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Certificate and key, PEM.
    fn sign(&self, names: Vec<SanType>, common: &str, usage: ExtendedKeyUsagePurpose) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = names;
        params.distinguished_name.push(DnType::CommonName, common);
        params.extended_key_usages = vec![usage];
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    fn server(&self) -> (String, String) {
        let names = vec![SanType::DnsName("localhost".try_into().unwrap())];
        self.sign(names, "server", ExtendedKeyUsagePurpose::ServerAuth)
    }

    fn client(&self, common: &str) -> (String, String) {
        self.sign(Vec::new(), common, ExtendedKeyUsagePurpose::ClientAuth)
    }
}

/// Private and public PEM of an Ed25519 key.
fn token_key(seed: u8) -> (String, String) {
    let key = ed25519_dalek::SigningKey::from_bytes(&[seed; 32]);
    let private = key.to_pkcs8_pem(LineEnding::LF).unwrap().to_string();
    (private, key.verifying_key().to_public_key_pem(LineEnding::LF).unwrap())
}

/// A control plane with a TCP listener, a node that never answers, and its authorities.
struct Plane {
    dir: tempfile::TempDir,
    ca: Authority,
    private: String,
    address: SocketAddr,
    shutdown: CancellationToken,
    served: tokio::task::JoinHandle<Result<(), crate::Error>>,
}

fn grant(subject: &str, role: Role, atespaces: &[&str]) -> Grant {
    let atespaces = atespaces.iter().map(ToString::to_string).collect();
    Grant { subject: subject.into(), role, atespaces }
}

impl Plane {
    async fn start(grants: Vec<Grant>, with_tokens: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let ca = Authority::new();
        let (cert, key) = ca.server();
        let (private, public) = token_key(1);
        for (name, text) in
            [("cert.pem", &cert), ("key.pem", &key), ("ca.pem", &ca.pem), ("tokens.pem", &public)]
        {
            std::fs::write(path(name), text).unwrap();
        }
        let node = crate::NodeEndpoint {
            name: "n0".into(),
            endpoint: "unix:/nonexistent/atelet.sock".into(),
            tls: None,
        };
        let mut config =
            crate::Config::new(path("control/state.db"), path("keys"), path("run/ateapi.sock"), vec![node]);
        config.remote = Some(Remote {
            listen: ([127, 0, 0, 1], 0).into(),
            cert: path("cert.pem"),
            key: path("key.pem"),
            client_ca: Some(path("ca.pem")),
            token_keys: with_tokens.then(|| path("tokens.pem")),
            grants,
        });
        let shutdown = CancellationToken::new();
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let served = tokio::spawn(crate::serve(config, ready, shutdown.clone()));
        let address =
            tokio::time::timeout(Duration::from_secs(20), is_ready).await.unwrap().unwrap().unwrap();
        let plane = Self { dir, ca, private, address, shutdown, served };
        let mut local = plane.local().await;
        for name in ["team", "other"] {
            let request = api::CreateAtespaceRequest { name: name.into(), ..Default::default() };
            local.create_atespace(request).await.unwrap();
        }
        plane
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn local(&self) -> ControlClient<Channel> {
        let socket = format!("unix:{}", self.path("run/ateapi.sock").display());
        ControlClient::connect(socket).await.unwrap()
    }

    async fn channel(&self, identity: Option<&(String, String)>) -> Result<Channel, String> {
        dial(self.address, &self.ca.pem, identity).await
    }

    async fn by_certificate(&self, common: &str) -> ControlClient<Channel> {
        ControlClient::new(self.channel(Some(&self.ca.client(common))).await.unwrap())
    }

    async fn by_token(&self, token: &str) -> Called {
        let channel = self.channel(None).await.unwrap();
        let header: tonic::metadata::MetadataValue<_> = format!("Bearer {token}").parse().unwrap();
        let add = move |mut request: Request<()>| {
            request.metadata_mut().insert("authorization", header.clone());
            Ok(request)
        };
        ControlClient::new(InterceptedService::new(channel, Box::new(add)))
    }

    fn audit(&self) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(self.path("control/audit.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(Duration::from_secs(20), self.served).await.unwrap().unwrap().unwrap();
    }
}

type Called = ControlClient<
    InterceptedService<Channel, Box<dyn FnMut(Request<()>) -> Result<Request<()>, Status> + Send>>,
>;

async fn dial(address: SocketAddr, ca: &str, identity: Option<&(String, String)>) -> Result<Channel, String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(cert.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tls = tokio_rustls::TlsConnector::from(Arc::new(config));
    let connect = tower::service_fn(move |_: http::Uri| {
        let tls = tls.clone();
        async move {
            let stream = tokio::net::TcpStream::connect(address).await?;
            let name = ServerName::try_from("localhost").unwrap();
            tls.connect(name, stream).await.map(hyper_util::rt::TokioIo::new)
        }
    });
    let endpoint = Endpoint::from_static("http://localhost").timeout(Duration::from_secs(10));
    endpoint.connect_with_connector(connect).await.map_err(|error| {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        text
    })
}

fn reason(status: &Status) -> String {
    status.get_details_error_info().map(|info| info.reason).unwrap_or_default()
}

fn actor(atespace: &str, name: &str) -> api::ActorRef {
    api::ActorRef { atespace: atespace.into(), name: name.into(), uid: String::new() }
}

fn suspend(atespace: &str) -> api::SuspendActorRequest {
    api::SuspendActorRequest {
        actor: Some(actor(atespace, "alice")),
        request_id: "r-1".into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn certificates_of_our_authority_only_and_each_name_has_its_own_role() {
    let plane = Plane::start(
        vec![
            grant("cert:ops", Role::Operator, &["team"]),
            grant("cert:eye", Role::Viewer, &["team"]),
            grant("cert:root", Role::Admin, &[]),
            grant("cert:router", Role::Router, &["*"]),
        ],
        false,
    )
    .await;
    // Without a certificate, or with one of another authority, there is no connection: TLS 1.3 tells the client with
    // its first read, so a call may be the first to see it.
    for identity in [None, Some(Authority::new().client("ops"))] {
        let turned_away = match plane.channel(identity.as_ref()).await {
            Err(_) => true,
            Ok(channel) => ControlClient::new(channel)
                .list_atespaces(api::ListAtespacesRequest::default())
                .await
                .is_err(),
        };
        assert!(turned_away);
    }
    // The client does not believe a server of another authority either.
    assert!(dial(plane.address, &Authority::new().pem, None).await.is_err());

    let mut ops = plane.by_certificate("ops").await;
    let absent = ops.suspend_actor(suspend("team")).await.unwrap_err();
    assert_eq!(absent.code(), Code::NotFound, "{absent}");
    let elsewhere = ops.suspend_actor(suspend("other")).await.unwrap_err();
    assert_eq!((elsewhere.code(), reason(&elsewhere).as_str()), (Code::PermissionDenied, "NOT_GRANTED"));
    assert!(elsewhere.message().contains("atespace other"), "{elsewhere}");
    let seen = ops.list_atespaces(api::ListAtespacesRequest::default()).await.unwrap().into_inner();
    assert_eq!(seen.atespaces.iter().map(|it| it.name.as_str()).collect::<Vec<_>>(), ["team"]);
    let workers = ops.list_workers(api::ListWorkersRequest {}).await.unwrap_err();
    assert_eq!(workers.code(), Code::PermissionDenied);
    let all = ops.list_actors(api::ListActorsRequest::default()).await.unwrap_err();
    assert!(all.message().contains("all atespaces"), "{all}");
    for kinds in [vec!["worker".to_owned()], Vec::new()] {
        let watch = api::WatchRequest { atespace: String::new(), from_revision: 0, kinds };
        assert_eq!(ops.watch(watch).await.unwrap_err().code(), Code::PermissionDenied);
    }
    let watch = api::WatchRequest { atespace: "team".into(), kinds: vec!["worker".into()], from_revision: 0 };
    assert_eq!(ops.watch(watch.clone()).await.unwrap_err().code(), Code::PermissionDenied);
    let mut stream = ops.watch(api::WatchRequest { kinds: Vec::new(), ..watch }).await.unwrap().into_inner();
    let first =
        tokio::time::timeout(Duration::from_secs(10), stream.message()).await.unwrap().unwrap().unwrap();
    assert!(matches!(first.change, Some(api::watch_response::Change::Atespace(it)) if it.name == "team"));

    let mut eye = plane.by_certificate("eye").await;
    let read =
        eye.list_actors(api::ListActorsRequest { atespace: "team".into(), ..Default::default() }).await;
    assert!(read.unwrap().into_inner().actors.is_empty());
    let changes = eye.suspend_actor(suspend("team")).await.unwrap_err();
    assert_eq!(reason(&changes), "NOT_GRANTED");
    let exec = types::ExecStart { atespace: "team".into(), actor: "alice".into(), ..Default::default() };
    let inputs = vec![types::ExecInput { input: Some(types::exec_input::Input::Start(exec.clone())) }];
    let status = eye.exec_actor(tokio_stream::iter(inputs.clone())).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    let status = ops.exec_actor(tokio_stream::iter(inputs)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    let other = types::ExecStart { atespace: "other".into(), ..exec };
    let inputs = vec![types::ExecInput { input: Some(types::exec_input::Input::Start(other)) }];
    assert_eq!(ops.exec_actor(tokio_stream::iter(inputs)).await.unwrap_err().code(), Code::PermissionDenied);

    // A uid that is nowhere and one that is elsewhere look the same to whom may not see it.
    let hidden =
        api::GetActorRequest { actor: Some(api::ActorRef { uid: "sandbox-1".into(), ..Default::default() }) };
    let status = eye.get_actor(hidden.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(!status.message().contains("other"), "{status}");
    let mut router = plane.by_certificate("router").await;
    assert_eq!(router.get_actor(hidden.clone()).await.unwrap_err().code(), Code::NotFound);
    let request = api::DeleteActorRequest { actor: Some(actor("team", "alice")), ..Default::default() };
    assert_eq!(router.delete_actor(request).await.unwrap_err().code(), Code::PermissionDenied);
    let mut root = plane.by_certificate("root").await;
    root.list_workers(api::ListWorkersRequest {}).await.unwrap();
    let mut nobody = plane.by_certificate("nobody").await;
    let status = nobody.list_atespaces(api::ListAtespacesRequest::default()).await.unwrap_err();
    assert_eq!(reason(&status), "NOT_GRANTED");

    let lines = plane.audit();
    let said = |who: &str, verb: &str| -> Vec<(String, String)> {
        let of = |line: &serde_json::Value, key: &str| line[key].as_str().unwrap_or_default().to_owned();
        lines
            .iter()
            .filter(|line| of(line, "who") == who && of(line, "verb") == verb)
            .map(|line| (of(line, "atespace") + "/" + &of(line, "actor"), of(line, "outcome")))
            .collect()
    };
    let pair = |place: &str, outcome: &str| (place.to_owned(), outcome.to_owned());
    assert_eq!(
        said("cert:ops", "SuspendActor"),
        [pair("team/alice", "NOT_FOUND"), pair("other/alice", "PERMISSION_DENIED")]
    );
    assert_eq!(said("cert:eye", "SuspendActor"), [pair("team/alice", "PERMISSION_DENIED")]);
    let uid = format!("uid:{}", nix::unistd::geteuid());
    assert_eq!(said(&uid, "CreateAtespace"), [pair("team/", "OK"), pair("other/", "OK")]);
    assert!(said("cert:eye", "ListActors").is_empty(), "a look leaves no line");
    assert!(lines.iter().any(|line| line["requestId"] == "r-1" && line["reason"] == "NOT_GRANTED"));
    plane.stop().await;
}

#[tokio::test]
async fn tokens_hold_until_they_expire_and_an_actors_identity_holds_nothing() {
    let grants = vec![
        grant("token:ci", Role::Operator, &["team"]),
        // Refused by validate; here because even a grant that slipped in must not help.
        grant("token:old", Role::Viewer, &["team"]),
    ];
    let plane = Plane::start(grants, true).await;
    let look = || api::ListActorsRequest { atespace: "team".into(), ..Default::default() };
    let hour = Duration::from_hours(1);
    let good = mint(&plane.private, "ci", hour).unwrap();
    plane.by_token(&good).await.list_actors(look()).await.unwrap();

    let now = unix_seconds();
    let forge = |private: &str, claims: serde_json::Value| {
        let key = jsonwebtoken::EncodingKey::from_ed_pem(private.as_bytes()).unwrap();
        jsonwebtoken::encode(&jsonwebtoken::Header::new(jsonwebtoken::Algorithm::EdDSA), &claims, &key)
            .unwrap()
    };
    let (other, _) = token_key(2);
    for (token, part) in [
        (
            forge(&plane.private, serde_json::json!({"aud": AUDIENCE, "sub": "ci", "exp": now - 60})),
            "expired",
        ),
        (forge(&plane.private, serde_json::json!({"aud": AUDIENCE, "sub": "ci"})), "exp"),
        (
            forge(
                &plane.private,
                serde_json::json!({"aud": "substrate-ingress", "sub": "ci", "exp": now + 60}),
            ),
            "audience",
        ),
        (mint(&other, "ci", hour).unwrap(), "another key"),
        ("nonsense".to_owned(), "no JWT"),
    ] {
        let status = plane.by_token(&token).await.list_actors(look()).await.unwrap_err();
        assert_eq!((status.code(), reason(&status).as_str()), (Code::Unauthenticated, "BAD_TOKEN"));
        assert!(status.message().contains(part) || part == "no JWT", "{status}");
    }
    let mut silent = ControlClient::new(plane.channel(None).await.unwrap());
    assert_eq!(reason(&silent.list_actors(look()).await.unwrap_err()), "NO_CREDENTIALS");

    // The same subject with the mark of a workload, as a claim or as a name: no verb at all.
    for claims in [
        serde_json::json!({"aud": AUDIENCE, "sub": "ci", "exp": now + 60, "actor": "alice"}),
        serde_json::json!({"aud": AUDIENCE, "sub": "actor:alice", "exp": now + 60}),
        serde_json::json!({"aud": AUDIENCE, "sub": "spiffe://substrate/team/actor/alice", "exp": now + 60}),
    ] {
        let mut workload = plane.by_token(&forge(&plane.private, claims)).await;
        let status = workload.suspend_actor(suspend("team")).await.unwrap_err();
        assert_eq!((status.code(), reason(&status).as_str()), (Code::PermissionDenied, "ACTOR_IDENTITY"));
        assert_eq!(reason(&workload.list_actors(look()).await.unwrap_err()), "ACTOR_IDENTITY");
    }

    // Anyone who got a connection may ask for health; what is served is told to callers who say who they are.
    let request = tonic_health::pb::HealthCheckRequest { service: String::new() };
    HealthClient::new(plane.channel(None).await.unwrap()).check(request).await.unwrap();
    let ask = || {
        let list =
            tonic_reflection::pb::v1::server_reflection_request::MessageRequest::ListServices(String::new());
        tokio_stream::iter([tonic_reflection::pb::v1::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(list),
        }])
    };
    let mut silent = ServerReflectionClient::new(plane.channel(None).await.unwrap());
    assert_eq!(silent.server_reflection_info(ask()).await.unwrap_err().code(), Code::Unauthenticated);
    let mut request = Request::new(ask());
    request.metadata_mut().insert("authorization", format!("Bearer {good}").parse().unwrap());
    silent.server_reflection_info(request).await.unwrap();
    plane.stop().await;
}

fn replace(path: &Path, text: &str) {
    let part = path.with_extension("part");
    std::fs::write(&part, text).unwrap();
    std::fs::rename(&part, path).unwrap();
}

#[tokio::test]
async fn replaced_certificates_authorities_and_token_keys_hold_from_the_next_connection_on() {
    let plane = Plane::start(
        vec![grant("cert:ops", Role::Viewer, &["*"]), grant("token:ci", Role::Viewer, &["*"])],
        true,
    )
    .await;
    let look = api::ListAtespacesRequest::default;
    let old_client = plane.ca.client("ops");
    let (new_private, new_public) = token_key(3);
    let fresh = mint(&new_private, "ci", Duration::from_hours(1)).unwrap();
    assert!(plane.by_token(&fresh).await.list_atespaces(look()).await.is_err());
    // Garbage does not take away what worked.
    replace(&plane.path("tokens.pem"), "garbage");
    let stale = mint(&plane.private, "ci", Duration::from_hours(1)).unwrap();
    plane.by_token(&stale).await.list_atespaces(look()).await.unwrap();
    replace(&plane.path("tokens.pem"), &new_public);
    plane.by_token(&fresh).await.list_atespaces(look()).await.unwrap();
    assert!(plane.by_token(&stale).await.list_atespaces(look()).await.is_err());

    let next = Authority::new();
    let (cert, key) = next.server();
    replace(&plane.path("cert.pem"), &cert);
    // Between the two files the old pair still serves.
    plane.channel(None).await.unwrap();
    replace(&plane.path("key.pem"), &key);
    replace(&plane.path("ca.pem"), &next.pem);
    assert!(plane.channel(None).await.is_err(), "the old certificate is gone");
    let channel = dial(plane.address, &next.pem, Some(&next.client("ops"))).await.unwrap();
    ControlClient::new(channel).list_atespaces(look()).await.unwrap();
    let refused = match dial(plane.address, &next.pem, Some(&old_client)).await {
        Err(_) => true,
        Ok(channel) => ControlClient::new(channel).list_atespaces(look()).await.is_err(),
    };
    assert!(refused, "a certificate of the former authority");
    plane.stop().await;
}

#[test]
fn grants_that_cannot_be_meant_are_refused() {
    let remote = |grant: Grant| Remote {
        listen: ([127, 0, 0, 1], 0).into(),
        cert: "c".into(),
        key: "k".into(),
        client_ca: Some("a".into()),
        token_keys: None,
        grants: vec![grant],
    };
    for (bad, part) in [
        (grant("ops", Role::Admin, &[]), "neither cert: nor token:"),
        (grant("cert:", Role::Admin, &[]), "names nobody"),
        (grant("cert:ops", Role::Admin, &["team"]), "leave atespaces out"),
        (grant("cert:ops", Role::Operator, &[]), "names no atespaces"),
        (grant("cert:ops", Role::Operator, &["Team"]), "DNS-1123"),
        (grant("token:actor:alice", Role::Viewer, &["*"]), "actor's identity"),
        (grant("cert:spiffe://x/actor/alice", Role::Viewer, &["*"]), "actor's identity"),
    ] {
        let error = remote(bad).validate().unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    remote(grant("cert:spiffe://x/node/n1", Role::Node, &["*"])).validate().unwrap();
    let mut closed = remote(grant("cert:ops", Role::Admin, &[]));
    closed.client_ca = None;
    assert!(closed.validate().unwrap_err().contains("nobody could call it"));
}
