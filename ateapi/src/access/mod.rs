// SPDX-License-Identifier: Apache-2.0
//! Who may call what.
//!
//! ```text
//!  Unix socket ── SO_PEERCRED ─────────────────────────┐ administrator
//!  TCP + TLS ──┬─ client certificate (mTLS) ── name ───┤
//!              └─ bearer JWT (Ed25519) ─────── sub ────┴▶ grants ▶ verb's right? ▶ its atespace? ▶ service ▶ audit
//! ```
//!
//! Without a grant nothing is allowed. A grant gives one subject one role in named atespaces; a role is a set of
//! rights ([`verbs::Role`]), and every RPC needs exactly one right in one scope ([`verbs::VERBS`], [`scope`]). The
//! identity of an actor (a certificate or token that names one) holds no right and cannot be granted any: a workload
//! that gets hold of it cannot change anybody's life, its own included. TCP without TLS is not offered, because a
//! bearer token would travel in clear.
//!
//! Certificate, key, authorities and token keys are read anew when a file changes ([`substrate_proto::tls`], [`token`]);
//! one that
//! cannot be used is logged and the former one stays. A certificate is good until its own end also on a connection
//! that was opened before.
mod audit;
mod guard;
mod scope;
#[cfg(test)]
mod tests;
mod token;
mod verbs;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use substrate_proto::tls::{Listen, TlsError};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use audit::Audit;
pub(crate) use guard::{Access, Guarded};
pub use token::{AUDIENCE, mint};
pub use verbs::Role;

/// The TCP listener of the control plane.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Remote {
    /// Address; port 0 takes a free one. No default.
    pub listen: SocketAddr,
    /// Its certificate chain, PEM. No default.
    pub cert: PathBuf,
    /// The certificate's private key, PEM. No default.
    pub key: PathBuf,
    /// Authorities of client certificates, PEM. Default: none, no client certificate is believed.
    #[serde(default)]
    pub client_ca: Option<PathBuf>,
    /// Ed25519 public keys of bearer tokens, PEM, one or more. Default: none, no token is believed. Without them a
    /// client has to show a certificate before anything is said.
    #[serde(default)]
    pub token_keys: Option<PathBuf>,
    /// Who may do what. Default: nobody anything.
    #[serde(default)]
    pub grants: Vec<Grant>,
}

/// One subject's role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Grant {
    /// `cert:NAME`, where NAME is the certificate's first URI name, else its first DNS name, else its common name;
    /// or `token:NAME`, where NAME is the token's `sub`.
    pub subject: String,
    /// What it may do.
    pub role: Role,
    /// Where: names of atespaces, or `*` for all. An administrator's are all.
    #[serde(default)]
    pub atespaces: Vec<String>,
}

impl Remote {
    /// The listener. No token could be shown instead where none is believed.
    pub(crate) fn listener(&self) -> Listen {
        Listen {
            address: self.listen,
            cert: self.cert.clone(),
            key: self.key.clone(),
            client_ca: self.client_ca.clone(),
            wants_certificate: self.token_keys.is_none(),
        }
    }

    /// Refuses what cannot be meant.
    pub(crate) fn validate(&self) -> Result<(), String> {
        if self.client_ca.is_none() && self.token_keys.is_none() {
            return Err(
                "remote has neither clientCa nor tokenKeys: nobody could call it; give one".to_owned()
            );
        }
        for (index, grant) in self.grants.iter().enumerate() {
            let wrong = |what: String| Err(format!("remote.grants[{index}]: {what}"));
            let Some(name) =
                grant.subject.strip_prefix("cert:").or_else(|| grant.subject.strip_prefix("token:"))
            else {
                return wrong(format!("subject {:?} begins with neither cert: nor token:", grant.subject));
            };
            if name.is_empty() {
                return wrong("subject names nobody".to_owned());
            }
            if names_an_actor(name) {
                return wrong(format!("subject {name:?} is an actor's identity, which cannot hold a role"));
            }
            match (grant.role, grant.atespaces.is_empty()) {
                (Role::Admin, false) => {
                    return wrong("an admin's atespaces are all: leave atespaces out".to_owned());
                }
                (Role::Admin, true) | (_, false) => {}
                (role, true) => {
                    return wrong(format!("{} names no atespaces: list them, or \"*\"", role.as_str()));
                }
            }
            for atespace in grant.atespaces.iter().filter(|name| *name != "*") {
                if !crate::model::names::is_label(atespace) {
                    return wrong(format!("atespace {atespace:?} is no DNS-1123 label"));
                }
            }
        }
        Ok(())
    }
}

/// Whether a subject is the identity of a workload: `actor:…`, or a SPIFFE-like URI with a component `actor`.
fn names_an_actor(name: &str) -> bool {
    name.starts_with("actor:") || (name.contains("://") && name.split('/').any(|part| part == "actor"))
}

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Identity {
    /// A process that the Unix socket let in.
    Local { uid: u32 },
    /// `cert:…` or `token:…`.
    Named(String),
    /// A workload.
    Actor(String),
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Local { uid } => write!(f, "uid:{uid}"),
            Self::Named(name) | Self::Actor(name) => f.write_str(name),
        }
    }
}

/// Why access could not be set up.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AccessError {
    /// A PEM file.
    #[error("{what} {}: {reason}", path.display())]
    #[allow(missing_docs)]
    File { what: &'static str, path: PathBuf, reason: String },
    /// The listener.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The audit log cannot be written.
    #[error("cannot write the audit log {}: {reason}", path.display())]
    #[allow(missing_docs)]
    Audit { path: PathBuf, reason: String },
}

fn unix_seconds() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

/// A refusal with its machine-readable reason and the way out.
fn refusal(code: Code, reason: &str, message: &str, way_out: &str) -> Status {
    let metadata = HashMap::from([("way_out".to_owned(), way_out.to_owned())]);
    let details = ErrorDetails::with_error_info(reason, "substrate", metadata);
    Status::with_error_details(code, format!("{message}; {way_out}"), details)
}

fn unauthenticated(reason: &str, message: &str) -> Status {
    refusal(
        Code::Unauthenticated,
        reason,
        message,
        "show a client certificate or a bearer token that this control plane believes",
    )
}
