// SPDX-License-Identifier: Apache-2.0
//! Rights, roles, and the one table from RPC to right. docs/access.md shows the same; tests compare.
use serde::{Deserialize, Serialize};

/// What an RPC needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Right {
    /// See actors and follow them.
    Look,
    /// See everything else of an atespace: templates, snapshots, events, logs.
    Read,
    /// Wake an actor and have it checkpointed.
    Wake,
    /// Everything that changes an atespace or what is in it.
    Operate,
    /// Run commands inside.
    Exec,
    /// What a node's egress proxy asks and tells.
    Egress,
    /// Workers and the whole machine.
    Administer,
}

/// A set of rights with a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Everything, everywhere.
    Admin,
    /// Everything in its atespaces, making and deleting them included.
    Operator,
    /// Sees its atespaces.
    Viewer,
    /// An ingress router: follows actors, wakes and checkpoints them.
    Router,
    /// A node's egress proxy: policies and names of actors, denials.
    Node,
}

impl Role {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Operator => "operator",
            Self::Viewer => "viewer",
            Self::Router => "router",
            Self::Node => "node",
        }
    }

    pub(crate) fn has(self, right: Right) -> bool {
        match self {
            Self::Admin => true,
            Self::Operator => {
                matches!(right, Right::Look | Right::Read | Right::Wake | Right::Operate | Right::Exec)
            }
            Self::Viewer => matches!(right, Right::Look | Right::Read),
            Self::Router => matches!(right, Right::Look | Right::Wake),
            Self::Node => matches!(right, Right::Look | Right::Egress),
        }
    }
}

/// An RPC of `ateapi.v1.Control`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Verb {
    pub(crate) name: &'static str,
    pub(crate) right: Right,
    /// It changes something: it gets an audit line.
    pub(crate) changes: bool,
}

const fn sees(name: &'static str, right: Right) -> Verb {
    Verb { name, right, changes: false }
}

const fn changes(name: &'static str, right: Right) -> Verb {
    Verb { name, right, changes: true }
}

/// Every RPC and what it needs.
pub(crate) const VERBS: &[Verb] = &[
    changes("CreateAtespace", Right::Operate),
    sees("GetAtespace", Right::Look),
    sees("ListAtespaces", Right::Look),
    changes("DeleteAtespace", Right::Operate),
    changes("CreateTemplate", Right::Operate),
    sees("GetTemplate", Right::Read),
    sees("ListTemplates", Right::Read),
    changes("DeleteTemplate", Right::Operate),
    changes("CreateActor", Right::Operate),
    sees("GetActor", Right::Look),
    sees("ListActors", Right::Look),
    changes("UpdateActor", Right::Operate),
    changes("ResumeActor", Right::Wake),
    changes("SuspendActor", Right::Operate),
    changes("PauseActor", Right::Operate),
    changes("PromoteActor", Right::Operate),
    changes("CheckpointActor", Right::Wake),
    changes("RevertActor", Right::Operate),
    changes("ResetActor", Right::Operate),
    changes("ForkActor", Right::Operate),
    changes("DeleteActor", Right::Operate),
    changes("ExecActor", Right::Exec),
    sees("ActorLogs", Right::Read),
    sees("ListSnapshots", Right::Read),
    changes("TagSnapshot", Right::Operate),
    changes("UntagSnapshot", Right::Operate),
    sees("ListWorkers", Right::Administer),
    changes("CordonWorker", Right::Administer),
    changes("DrainWorker", Right::Administer),
    sees("ListEvents", Right::Read),
    sees("Watch", Right::Look),
    sees("GetEgress", Right::Egress),
    changes("BindEgressName", Right::Egress),
    changes("ReportDenials", Right::Egress),
    changes("ReportFallback", Right::Wake),
    changes("SuspendAll", Right::Administer),
];

/// The entry of an RPC. One that is not in the table is nobody's.
pub(crate) fn verb(name: &str) -> Option<&'static Verb> {
    VERBS.iter().find(|verb| verb.name == name)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message as _;

    use super::*;

    #[test]
    fn every_rpc_of_the_descriptor_is_in_the_table_and_nothing_else() {
        let set = prost_types::FileDescriptorSet::decode(substrate_proto::DESCRIPTORS).unwrap();
        let file = set.file.iter().find(|file| file.package() == "ateapi.v1").unwrap();
        let control = file.service.iter().find(|service| service.name() == "Control").unwrap();
        let served: BTreeSet<&str> =
            control.method.iter().map(prost_types::MethodDescriptorProto::name).collect();
        let listed: BTreeSet<&str> = VERBS.iter().map(|verb| verb.name).collect();
        assert_eq!(served, listed);
        assert_eq!(listed.len(), VERBS.len(), "an RPC is listed twice");
    }

    #[test]
    fn whatever_is_no_look_changes_something() {
        for verb in VERBS {
            let looks = ["Get", "List", "Watch", "ActorLogs"].iter().any(|word| verb.name.starts_with(word));
            assert_eq!(verb.changes, !looks, "{}", verb.name);
            if verb.changes {
                assert!(!Role::Viewer.has(verb.right), "a viewer could call {}", verb.name);
            }
        }
    }

    #[test]
    fn the_document_shows_the_table() {
        let document = include_str!("../../../docs/access.md");
        for verb in VERBS {
            let may = |role: Role| if role.has(verb.right) { "✓" } else { "" };
            let row = format!(
                "| {} | {:?} | {} | {} | {} | {} |",
                verb.name,
                verb.right,
                may(Role::Viewer),
                may(Role::Operator),
                may(Role::Router),
                may(Role::Node)
            );
            assert!(document.contains(&row), "docs/access.md lacks this row:\n{row}");
        }
    }
}
