// SPDX-License-Identifier: Apache-2.0
//! What each request is about: the atespace whose grant it needs, and what the audit line says of it.
use substrate_proto::ateapi::{self, ActorRef};

/// What a request is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope<'a> {
    /// Every atespace, or none in particular: a grant for all is needed.
    All,
    /// One atespace.
    Atespace(&'a str),
    /// An actor, by name or uid.
    Actor(Option<&'a ActorRef>),
    /// An actor by uid.
    Uid(&'a str),
    /// Whatever the caller may see of a list; the answer is cut down to it.
    Own,
}

/// A request of the service.
pub(crate) trait Scoped {
    fn scope(&self) -> Scope<'_>;

    fn request_id(&self) -> &str;

    /// Cuts the request down to what someone without a grant for everything may see.
    fn narrow(&mut self) -> Result<(), &'static str> {
        Ok(())
    }
}

fn named_or_all(atespace: &str) -> Scope<'_> {
    if atespace.is_empty() { Scope::All } else { Scope::Atespace(atespace) }
}

macro_rules! scoped {
    ($($request:ident => |$it:ident| $scope:expr, $id:expr;)*) => {$(
        // Where a request has no such thing, it is not looked at.
        #[allow(unused_variables, clippy::unnecessary_literal_bound)]
        impl Scoped for ateapi::$request {
            fn scope(&self) -> Scope<'_> {
                let $it = self;
                $scope
            }

            fn request_id(&self) -> &str {
                let $it = self;
                $id
            }
        }
    )*};
}

scoped! {
    CreateAtespaceRequest => |it| Scope::Atespace(&it.name), &it.request_id;
    GetAtespaceRequest => |it| Scope::Atespace(&it.name), "";
    ListAtespacesRequest => |_it| Scope::Own, "";
    DeleteAtespaceRequest => |it| Scope::Atespace(&it.name), &it.request_id;
    CreateTemplateRequest => |it| Scope::Atespace(&it.atespace), &it.request_id;
    GetTemplateRequest => |it| Scope::Atespace(&it.atespace), "";
    ListTemplatesRequest => |it| named_or_all(&it.atespace), "";
    DeleteTemplateRequest => |it| Scope::Atespace(&it.atespace), &it.request_id;
    CreateActorRequest => |it| Scope::Atespace(&it.atespace), &it.request_id;
    GetActorRequest => |it| Scope::Actor(it.actor.as_ref()), "";
    ListActorsRequest => |it| named_or_all(&it.atespace), "";
    UpdateActorRequest => |it| Scope::Actor(it.actor.as_ref()), &it.request_id;
    ResumeActorRequest => |it| Scope::Actor(it.actor.as_ref()), &it.request_id;
    SuspendActorRequest => |it| Scope::Actor(it.actor.as_ref()), &it.request_id;
    PauseActorRequest => |it| Scope::Actor(it.actor.as_ref()), &it.request_id;
    PromoteActorRequest => |it| Scope::Actor(it.actor.as_ref()), &it.request_id;
    CheckpointActorRequest => |it| Scope::Actor(it.actor.as_ref()), &it.request_id;
    RevertActorRequest => |it| Scope::Actor(it.actor.as_ref()), &it.request_id;
    ResetActorRequest => |it| Scope::Actor(it.actor.as_ref()), &it.request_id;
    ForkActorRequest => |it| Scope::Actor(it.actor.as_ref()), &it.request_id;
    DeleteActorRequest => |it| Scope::Actor(it.actor.as_ref()), &it.request_id;
    ActorLogsRequest => |it| Scope::Actor(it.actor.as_ref()), "";
    ListSnapshotsRequest => |it| match &it.actor {
        Some(actor) => Scope::Actor(Some(actor)),
        None => named_or_all(&it.atespace),
    }, "";
    TagSnapshotRequest => |it| Scope::Actor(it.actor.as_ref()), &it.request_id;
    UntagSnapshotRequest => |it| Scope::Actor(it.actor.as_ref()), &it.request_id;
    ListWorkersRequest => |_it| Scope::All, "";
    CordonWorkerRequest => |_it| Scope::All, "";
    DrainWorkerRequest => |_it| Scope::All, "";
    ListEventsRequest => |it| named_or_all(&it.atespace), "";
    GetEgressRequest => |it| Scope::Uid(&it.actor_uid), "";
    BindEgressNameRequest => |it| Scope::Uid(&it.actor_uid), "";
    // Of several actors.
    ReportDenialsRequest => |_it| Scope::All, "";
    ReportFallbackRequest => |it| Scope::Uid(&it.actor_uid), "";
    SuspendAllRequest => |_it| Scope::All, "";
}

impl Scoped for ateapi::WatchRequest {
    fn scope(&self) -> Scope<'_> {
        named_or_all(&self.atespace)
    }

    #[allow(clippy::unnecessary_literal_bound)]
    fn request_id(&self) -> &str {
        ""
    }

    /// Workers belong to no atespace, and say which actors of others they hold.
    fn narrow(&mut self) -> Result<(), &'static str> {
        if self.kinds.iter().any(|kind| kind == "worker") {
            return Err("watching workers needs a grant for all atespaces");
        }
        if self.kinds.is_empty() {
            self.kinds = ["actor", "template", "snapshot", "event", "atespace"].map(str::to_owned).to_vec();
        }
        Ok(())
    }
}
