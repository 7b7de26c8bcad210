// SPDX-License-Identifier: Apache-2.0
//! Stands before the service: identifies the caller, looks up the grant, passes the call on, writes the audit line.
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use substrate_proto::ateapi::control_server::Control;
use substrate_proto::tls::Peer;
use substrate_proto::{ateapi, types};
use tonic::metadata::MetadataMap;
use tonic::{Code, Extensions, Request, Response, Status};
use tonic_types::StatusExt as _;

use super::audit::Line;
use super::scope::{Scope, Scoped};
use super::token::Verifier;
use super::verbs::{Verb, verb};
use super::{
    AccessError, Audit, Grant, Identity, Remote, names_an_actor, refusal, unauthenticated, unix_seconds,
};
use crate::model;
use crate::service::ControlService;

/// Refused calls that get a line each second; more are counted in the log. Nobody shall wash the audit log away by
/// being refused.
const REFUSALS_PER_SECOND: u32 = 20;

/// What is decided by.
pub(crate) struct Access {
    verifier: Option<Mutex<Verifier>>,
    grants: Vec<Grant>,
    audit: Audit,
    /// The second, and the refusals written and left out in it.
    refused: Mutex<(i64, u32, u32)>,
}

impl Access {
    pub(crate) fn open(remote: Option<&Remote>, audit: &Path) -> Result<Self, AccessError> {
        let keys = remote.and_then(|remote| remote.token_keys.as_deref());
        Ok(Self {
            verifier: keys.map(Verifier::open).transpose()?.map(Mutex::new),
            grants: remote.map(|remote| remote.grants.clone()).unwrap_or_default(),
            audit: Audit::open(audit)?,
            refused: Mutex::default(),
        })
    }

    /// Who a request comes from.
    pub(crate) fn identify(
        &self,
        extensions: &Extensions,
        metadata: &MetadataMap,
    ) -> Result<Identity, Status> {
        let certificate = match extensions.get::<Option<Peer>>() {
            Some(Some(Peer::Local { uid })) => return Ok(Identity::Local { uid: *uid }),
            Some(Some(Peer::Remote { certificate, .. })) => certificate,
            _ => return Err(unauthenticated("NO_PEER", "the connection does not say who calls")),
        };
        if let Some(header) = metadata.get("authorization") {
            let token = header.to_str().ok().and_then(|text| {
                let (scheme, token) = text.split_once(' ')?;
                scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
            });
            let token = token
                .ok_or_else(|| unauthenticated("BAD_TOKEN", "the header authorization is no bearer token"))?;
            let verifier = self.verifier.as_ref().ok_or_else(|| {
                unauthenticated("BAD_TOKEN", "this control plane believes no bearer tokens")
            })?;
            let verified = verifier.lock().unwrap_or_else(PoisonError::into_inner).verify(token);
            return verified.map_err(|reason| {
                unauthenticated("BAD_TOKEN", &format!("the bearer token is not accepted: {reason}"))
            });
        }
        let Some(certificate) = certificate else {
            return Err(unauthenticated("NO_CREDENTIALS", "the call says nothing about who makes it"));
        };
        if certificate.not_after < unix_seconds() {
            return Err(unauthenticated(
                "CERTIFICATE_EXPIRED",
                "the client certificate has expired since the connection was made",
            ));
        }
        let name = format!("cert:{}", certificate.name);
        Ok(if names_an_actor(&certificate.name) { Identity::Actor(name) } else { Identity::Named(name) })
    }

    /// Lets in whom the Unix socket let in, for verbs that are no remote caller's, with a line for each attempt.
    pub(crate) fn local_only<T>(
        &self,
        verb: &str,
        atespace: &str,
        request: &Request<T>,
    ) -> Result<(), Status> {
        let identity = self.identify(request.extensions(), request.metadata())?;
        let is_local = matches!(identity, Identity::Local { .. });
        let (outcome, reason) = if is_local { ("OK", "") } else { ("PERMISSION_DENIED", "LOCAL_ONLY") };
        if is_local || self.has_room_for_refusal() {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.audit.write(&Line {
                time_ms: since.as_millis() as i64,
                who: &identity.to_string(),
                from: if is_local { "unix" } else { "remote" },
                verb,
                atespace,
                actor: "",
                request_id: "",
                outcome,
                reason,
                ms: 0,
            });
        }
        if is_local {
            return Ok(());
        }
        Err(refusal(
            Code::PermissionDenied,
            reason,
            "this is decided on the control plane's own machine",
            "call it there",
        ))
    }

    fn grants_of<'a>(&'a self, who: &'a str, verb: &'a Verb) -> impl Iterator<Item = &'a Grant> {
        self.grants.iter().filter(move |grant| grant.subject == who && grant.role.has(verb.right))
    }

    /// Whether a caller may use a verb in an atespace; none: everywhere.
    fn may(&self, who: &Identity, verb: &Verb, atespace: Option<&str>) -> bool {
        let covers = |grant: &Grant| {
            grant.role == super::Role::Admin
                || grant.atespaces.iter().any(|one| one == "*" || Some(one.as_str()) == atespace)
        };
        match who {
            Identity::Local { .. } => true,
            Identity::Actor(_) => false,
            Identity::Named(name) => self.grants_of(name, verb).any(covers),
        }
    }

    fn may_somewhere(&self, who: &Identity, verb: &Verb) -> bool {
        match who {
            Identity::Local { .. } => true,
            Identity::Actor(_) => false,
            Identity::Named(name) => self.grants_of(name, verb).next().is_some(),
        }
    }

    /// Whether a refusal gets a line.
    fn has_room_for_refusal(&self) -> bool {
        let now = unix_seconds();
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if refused.0 != now {
            if refused.2 > 0 {
                tracing::warn!(count = refused.2, "refused calls without an audit line, of one second");
            }
            *refused = (now, 0, 0);
        }
        if refused.1 < REFUSALS_PER_SECOND {
            refused.1 += 1;
            return true;
        }
        refused.2 += 1;
        false
    }
}

fn denied(who: &Identity, verb: &Verb, place: &str) -> Status {
    if let Identity::Actor(name) = who {
        return refusal(
            Code::PermissionDenied,
            "ACTOR_IDENTITY",
            &format!("{name} is an actor's identity, which may not call the control plane"),
            "call with an identity of your own",
        );
    }
    refusal(
        Code::PermissionDenied,
        "NOT_GRANTED",
        &format!("{who} may not call {} {place}", verb.name),
        "have an administrator of substrate grant a role for it (docs/access.md)",
    )
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// A call on its way, and what its audit line will say. Dropped before its end (the caller hung up) it says that.
struct Call {
    access: Arc<Access>,
    verb: &'static Verb,
    identity: Option<Identity>,
    from: String,
    atespace: String,
    actor: String,
    request_id: String,
    begun: Instant,
    is_written: bool,
}

impl Call {
    fn finish<T>(&mut self, answer: &Result<T, Status>) {
        match answer {
            Ok(_) => self.write("OK", ""),
            Err(status) => {
                let info = status.get_details_error_info();
                let reason = info.map(|info| info.reason).unwrap_or_default();
                self.write(code_name(status.code()), &reason);
            }
        }
    }

    fn refuse(&mut self, status: Status) -> Status {
        if self.access.has_room_for_refusal() {
            let reason = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
            self.line(code_name(status.code()), &reason);
        }
        self.is_written = true;
        status
    }

    fn write(&mut self, outcome: &str, reason: &str) {
        self.is_written = true;
        if self.verb.changes {
            self.line(outcome, reason);
        }
    }

    fn line(&self, outcome: &str, reason: &str) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.access.audit.write(&Line {
            time_ms: since.as_millis() as i64,
            who: &self.identity.as_ref().map(ToString::to_string).unwrap_or_default(),
            from: &self.from,
            verb: self.verb.name,
            atespace: &self.atespace,
            actor: &self.actor,
            request_id: &self.request_id,
            outcome,
            reason,
            ms: self.begun.elapsed().as_millis() as u64,
        });
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.is_written {
            self.write("CLIENT_LEFT", "");
        }
    }
}

/// The service behind its guard.
pub(crate) struct Guarded {
    service: ControlService,
    access: Arc<Access>,
}

type Answered<T> = Result<Response<T>, Status>;

impl Guarded {
    pub(crate) fn new(service: ControlService, access: Arc<Access>) -> Self {
        Self { service, access }
    }

    /// Identifies the caller of a verb.
    fn open(&self, name: &str, extensions: &Extensions, metadata: &MetadataMap) -> Result<Call, Status> {
        let verb =
            verb(name).ok_or_else(|| Status::permission_denied(format!("{name} is granted to nobody")))?;
        let from = match extensions.get::<Option<Peer>>() {
            Some(Some(Peer::Remote { address, .. })) => address.to_string(),
            _ => "unix".to_owned(),
        };
        let mut call = Call {
            access: Arc::clone(&self.access),
            verb,
            identity: None,
            from,
            atespace: String::new(),
            actor: String::new(),
            request_id: String::new(),
            begun: Instant::now(),
            is_written: false,
        };
        match self.access.identify(extensions, metadata) {
            Err(status) => Err(call.refuse(status)),
            Ok(who) => {
                call.identity = Some(who);
                Ok(call)
            }
        }
    }

    /// Makes sure that the caller may use the verb there.
    async fn check(&self, call: &mut Call, scope: Scope<'_>) -> Result<(), Status> {
        let by_uid;
        let reference = match scope {
            Scope::Actor(reference) => reference,
            Scope::Uid(uid) => {
                by_uid = ateapi::ActorRef { uid: uid.to_owned(), ..Default::default() };
                Some(&by_uid)
            }
            Scope::All | Scope::Own | Scope::Atespace(_) => None,
        };
        if let Some(reference) = reference {
            let named = if reference.name.is_empty() { &reference.uid } else { &reference.name };
            named.clone_into(&mut call.actor);
            reference.atespace.clone_into(&mut call.atespace);
        }
        if let Scope::Atespace(name) = scope {
            name.clone_into(&mut call.atespace);
        }
        let Some(who) = call.identity.clone() else {
            return Err(call.refuse(unauthenticated("NO_PEER", "nobody calls")));
        };
        // Somebody without any such grant does not make us look anything up.
        let mut permitted = self.access.may_somewhere(&who, call.verb);
        if permitted && scope != Scope::Own {
            let place = match (scope, reference) {
                (Scope::Atespace(name), _) => Some(name.to_owned()),
                (_, Some(reference)) => self.atespace_of(call, reference).await?,
                _ => None,
            };
            permitted = self.access.may(&who, call.verb, place.as_deref());
        }
        if permitted {
            return Ok(());
        }
        // An actor that is not there and one that is somewhere else look the same to whom has no grant there.
        let text = match (scope, reference) {
            (Scope::Own, _) => "anywhere".to_owned(),
            (Scope::Atespace(name), _) => format!("in atespace {name}"),
            (_, Some(reference)) if reference.uid.is_empty() && !reference.atespace.is_empty() => {
                format!("in atespace {}", reference.atespace)
            }
            (_, Some(_)) => "for that actor".to_owned(),
            (_, None) => "for all atespaces".to_owned(),
        };
        let status = denied(&who, call.verb, &text);
        Err(call.refuse(status))
    }

    /// The atespace that an actor is in; by its record where it was named by uid.
    async fn atespace_of(
        &self,
        call: &mut Call,
        reference: &ateapi::ActorRef,
    ) -> Result<Option<String>, Status> {
        // The service's own reading of a reference, so that both mean the same actor. A malformed one is the
        // service's to refuse, to whom may hear of it.
        let Ok(key) = model::actor_key(Some(reference)) else { return Ok(None) };
        let uid = match key {
            model::ActorKey::Name { atespace, .. } => return Ok(Some(atespace)),
            model::ActorKey::Uid(uid) => uid,
        };
        if matches!(call.identity, Some(Identity::Local { .. })) {
            return Ok(None);
        }
        let found = self.service.atespace_of(&uid).await?;
        call.atespace = found.clone().unwrap_or_default();
        Ok(found)
    }

    async fn admit<Q: Scoped>(&self, name: &str, request: &mut Request<Q>) -> Result<Call, Status> {
        let mut call = self.open(name, request.extensions(), request.metadata())?;
        request.get_ref().request_id().clone_into(&mut call.request_id);
        self.check(&mut call, request.get_ref().scope()).await?;
        let sees_all = call.identity.as_ref().is_some_and(|who| self.access.may(who, call.verb, None));
        if !sees_all && let Err(message) = request.get_mut().narrow() {
            let status = refusal(
                Code::PermissionDenied,
                "NOT_GRANTED",
                message,
                "leave it out, or have a role granted for all atespaces",
            );
            return Err(call.refuse(status));
        }
        Ok(call)
    }
}

macro_rules! guarded {
    ($($method:ident($request:ident) -> $answer:ty, $verb:literal;)*) => {
        #[tonic::async_trait]
        impl Control for Guarded {
            $(
                async fn $method(&self, mut request: Request<ateapi::$request>) -> Answered<$answer> {
                    let mut call = self.admit($verb, &mut request).await?;
                    let answer = self.service.$method(request).await;
                    call.finish(&answer);
                    answer
                }
            )*

            async fn list_atespaces(
                &self,
                mut request: Request<ateapi::ListAtespacesRequest>,
            ) -> Answered<ateapi::ListAtespacesResponse> {
                let mut call = self.admit("ListAtespaces", &mut request).await?;
                let mut answer = self.service.list_atespaces(request).await;
                if let (Ok(answer), Some(who)) = (&mut answer, &call.identity) {
                    let sees = |one: &ateapi::Atespace| self.access.may(who, call.verb, Some(&one.name));
                    answer.get_mut().atespaces.retain(sees);
                }
                call.finish(&answer);
                answer
            }

            type ExecActorStream = <ControlService as Control>::ExecActorStream;

            async fn exec_actor(
                &self,
                request: Request<tonic::Streaming<types::ExecInput>>,
            ) -> Answered<Self::ExecActorStream> {
                let mut call = self.open("ExecActor", request.extensions(), request.metadata())?;
                self.check(&mut call, Scope::Own).await?;
                // Which actor is meant is in the first message.
                let mut inputs = request.into_inner();
                let first = inputs.message().await?;
                if let Some(types::exec_input::Input::Start(start)) =
                    first.as_ref().and_then(|first| first.input.as_ref())
                {
                    let reference = ateapi::ActorRef {
                        atespace: start.atespace.clone(),
                        name: start.actor.clone(),
                        uid: String::new(),
                    };
                    self.check(&mut call, Scope::Actor(Some(&reference))).await?;
                }
                let answer = self.service.exec(first, inputs).await;
                call.finish(&answer);
                answer
            }

            type ActorLogsStream = <ControlService as Control>::ActorLogsStream;
            type WatchStream = <ControlService as Control>::WatchStream;
        }
    };
}

guarded! {
    create_atespace(CreateAtespaceRequest) -> ateapi::Atespace, "CreateAtespace";
    get_atespace(GetAtespaceRequest) -> ateapi::Atespace, "GetAtespace";
    delete_atespace(DeleteAtespaceRequest) -> ateapi::DeleteAtespaceResponse, "DeleteAtespace";
    create_template(CreateTemplateRequest) -> ateapi::Template, "CreateTemplate";
    get_template(GetTemplateRequest) -> ateapi::Template, "GetTemplate";
    list_templates(ListTemplatesRequest) -> ateapi::ListTemplatesResponse, "ListTemplates";
    delete_template(DeleteTemplateRequest) -> ateapi::DeleteTemplateResponse, "DeleteTemplate";
    create_actor(CreateActorRequest) -> ateapi::Actor, "CreateActor";
    get_actor(GetActorRequest) -> ateapi::Actor, "GetActor";
    list_actors(ListActorsRequest) -> ateapi::ListActorsResponse, "ListActors";
    update_actor(UpdateActorRequest) -> ateapi::Actor, "UpdateActor";
    resume_actor(ResumeActorRequest) -> ateapi::ResumeActorResponse, "ResumeActor";
    suspend_actor(SuspendActorRequest) -> ateapi::SnapshotAnswer, "SuspendActor";
    pause_actor(PauseActorRequest) -> ateapi::SnapshotAnswer, "PauseActor";
    promote_actor(PromoteActorRequest) -> ateapi::SnapshotAnswer, "PromoteActor";
    checkpoint_actor(CheckpointActorRequest) -> ateapi::SnapshotAnswer, "CheckpointActor";
    revert_actor(RevertActorRequest) -> ateapi::Actor, "RevertActor";
    reset_actor(ResetActorRequest) -> ateapi::Actor, "ResetActor";
    fork_actor(ForkActorRequest) -> ateapi::Actor, "ForkActor";
    delete_actor(DeleteActorRequest) -> ateapi::DeleteActorResponse, "DeleteActor";
    actor_logs(ActorLogsRequest) -> Self::ActorLogsStream, "ActorLogs";
    list_snapshots(ListSnapshotsRequest) -> ateapi::ListSnapshotsResponse, "ListSnapshots";
    tag_snapshot(TagSnapshotRequest) -> ateapi::Snapshot, "TagSnapshot";
    untag_snapshot(UntagSnapshotRequest) -> ateapi::Snapshot, "UntagSnapshot";
    list_workers(ListWorkersRequest) -> ateapi::ListWorkersResponse, "ListWorkers";
    cordon_worker(CordonWorkerRequest) -> ateapi::Worker, "CordonWorker";
    drain_worker(DrainWorkerRequest) -> ateapi::Worker, "DrainWorker";
    list_events(ListEventsRequest) -> ateapi::ListEventsResponse, "ListEvents";
    watch(WatchRequest) -> Self::WatchStream, "Watch";
    get_egress(GetEgressRequest) -> ateapi::GetEgressResponse, "GetEgress";
    bind_egress_name(BindEgressNameRequest) -> ateapi::EgressName, "BindEgressName";
    report_denials(ReportDenialsRequest) -> ateapi::ReportDenialsResponse, "ReportDenials";
    report_fallback(ReportFallbackRequest) -> ateapi::ReportFallbackResponse, "ReportFallback";
    suspend_all(SuspendAllRequest) -> ateapi::SuspendAllResponse, "SuspendAll";
}
