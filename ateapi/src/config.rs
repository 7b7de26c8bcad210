// SPDX-License-Identifier: Apache-2.0
//! What the control plane is told when it starts.
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use substrate_proto::tls::ClientFiles;

/// Configuration of the control plane.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// SQLite database file; its directory is created (0700). No default.
    pub database: PathBuf,
    /// Directory of key files (0700, created); holds `at-rest.key`. No default.
    pub keys: PathBuf,
    /// Unix socket of `ateapi.v1.Control`. No default.
    pub socket: PathBuf,
    /// The nodes it commands. No default.
    pub nodes: Vec<NodeEndpoint>,
    /// Uid besides root and our own that may connect to the socket. Default: none.
    #[serde(default)]
    pub socket_peer_uid: Option<u32>,
    /// Gid that may connect to the socket. Default: none.
    #[serde(default)]
    pub socket_peer_gid: Option<u32>,
    /// TCP listener for clients of other machines. Default: none.
    #[serde(default)]
    pub remote: Option<crate::access::Remote>,
    /// The audit log, one JSON line per call that changes something. Default: `audit.jsonl` beside the database.
    #[serde(default)]
    pub audit: Option<PathBuf>,
    /// Term of a node's lease, milliseconds, counted from the moment the node asked. Default 60000, at least 1000.
    #[serde(default = "defaults::lease_term_ms")]
    pub lease_term_ms: u64,
    /// What is waited beyond a silent node's lease before its actors may start elsewhere, milliseconds; covers the
    /// skew of clock rates and the time a freeze takes. Default 5000.
    #[serde(default = "defaults::lease_margin_ms")]
    pub lease_margin_ms: u64,
    /// Idle time after which an actor whose template does not say is suspended, milliseconds; 0: never. Default 60000.
    #[serde(default = "defaults::idle_suspend_after_ms")]
    pub idle_suspend_after_ms: u64,
    /// Quiet time from which a running actor may be suspended to make room in a full pool, milliseconds; 0: never.
    /// Default 5000.
    #[serde(default = "defaults::evict_after_ms")]
    pub evict_after_ms: u64,
    /// How long a resume waits for a worker that is just being freed, milliseconds. Default 5000.
    #[serde(default = "defaults::place_wait_ms")]
    pub place_wait_ms: u64,
    /// Revisions kept for watches that resume. Default 100000.
    #[serde(default = "defaults::changelog_keep")]
    pub changelog_keep: u64,
    /// Events kept. Default 50000.
    #[serde(default = "defaults::events_keep")]
    pub events_keep: u64,
    /// Calls on one actor that may wait, so that a flood is refused and not queued. Default 1024.
    #[serde(default = "defaults::calls_per_actor")]
    pub calls_per_actor: usize,
}

/// A node and where its agent listens.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct NodeEndpoint {
    /// The node's name, a DNS-1123 label.
    pub name: String,
    /// `unix:/path` or `https://host:port`.
    pub endpoint: String,
    /// What is shown to a node agent on TCP, and whom it has to be signed by; its certificate names the endpoint's
    /// host. Default: none, needed with `https:`.
    #[serde(default)]
    pub tls: Option<ClientFiles>,
}

mod defaults {
    pub fn lease_term_ms() -> u64 {
        60_000
    }
    pub fn lease_margin_ms() -> u64 {
        5_000
    }
    pub fn idle_suspend_after_ms() -> u64 {
        60_000
    }
    pub fn evict_after_ms() -> u64 {
        5_000
    }
    pub fn place_wait_ms() -> u64 {
        5_000
    }
    pub fn changelog_keep() -> u64 {
        100_000
    }
    pub fn events_keep() -> u64 {
        50_000
    }
    pub fn calls_per_actor() -> usize {
        1024
    }
}

impl Config {
    /// A configuration with every default.
    pub fn new(
        database: impl Into<PathBuf>,
        keys: impl Into<PathBuf>,
        socket: impl Into<PathBuf>,
        nodes: Vec<NodeEndpoint>,
    ) -> Self {
        Self {
            database: database.into(),
            keys: keys.into(),
            socket: socket.into(),
            nodes,
            socket_peer_uid: None,
            socket_peer_gid: None,
            remote: None,
            audit: None,
            lease_term_ms: defaults::lease_term_ms(),
            lease_margin_ms: defaults::lease_margin_ms(),
            idle_suspend_after_ms: defaults::idle_suspend_after_ms(),
            evict_after_ms: defaults::evict_after_ms(),
            place_wait_ms: defaults::place_wait_ms(),
            changelog_keep: defaults::changelog_keep(),
            events_keep: defaults::events_keep(),
            calls_per_actor: defaults::calls_per_actor(),
        }
    }

    /// Where the audit log is.
    pub fn audit_log(&self) -> PathBuf {
        self.audit.clone().unwrap_or_else(|| self.database.with_file_name("audit.jsonl"))
    }

    /// Term of a lease.
    pub fn lease_term(&self) -> Duration {
        Duration::from_millis(self.lease_term_ms)
    }

    /// Margin beyond a lease.
    pub fn lease_margin(&self) -> Duration {
        Duration::from_millis(self.lease_margin_ms)
    }

    pub(crate) fn validate(&self) -> Result<(), crate::Error> {
        let refuse = |message: String| Err(crate::Error::Config(message));
        if self.lease_term_ms < 1_000 {
            return refuse(format!("leaseTermMs is {}, at least 1000 is needed", self.lease_term_ms));
        }
        if let Some(remote) = &self.remote {
            remote.validate().or_else(refuse)?;
        }
        if self.nodes.is_empty() {
            return refuse("nodes is empty: name at least one node agent".to_owned());
        }
        for (index, node) in self.nodes.iter().enumerate() {
            if !crate::model::names::is_label(&node.name) {
                return refuse(format!("nodes[{index}].name {:?} is no DNS-1123 label", node.name));
            }
            if self.nodes[..index].iter().any(|other| other.name == node.name) {
                return refuse(format!("nodes[{index}].name {:?} is there twice", node.name));
            }
        }
        Ok(())
    }
}
