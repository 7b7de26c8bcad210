// SPDX-License-Identifier: Apache-2.0
//! The seam where OpenShell's supervisor gets into a sandbox.
//!
//! [`deliver`] is given what the user asked for and completes the template and the actor: it may replace the main
//! command, mount a binary, add capabilities, files and environment, and answers with what degrades. It runs after
//! the template was synthesized and before it is keyed, so that what it adds is part of the key, while what it adds
//! to the actor (identity) is not. [`SupervisorMode::None`] is the only mode so far: the actor runs the user's own
//! command and its egress policy is substrate's. A mode with a session also asks the gateway for a listener, in
//! [`listener_requirements`], and sets `holds_identity`, which rules out golden snapshots and forks.
use std::collections::BTreeMap;

use substrate_proto::compute::GatewayListenerRequirement;
use substrate_proto::types::{ActorSpec, File, TemplateSpec};

use crate::config::{Config, SupervisorMode};
use crate::validate::Wanted;

/// Where the gateway's token appears in the sandbox.
pub const TOKEN_PATH: &str = "/etc/openshell/auth/sandbox.jwt";
const TOKEN_MODE: u32 = 0o400;

/// Something the user should know although the sandbox was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advisory {
    /// Which subsystem it is about.
    pub subsystem: &'static str,
    /// What is weaker than asked for, and what stands in for it.
    pub message: String,
}

/// Completes the template and the actor of a sandbox by the configured mode.
pub fn deliver(
    config: &Config,
    wanted: &Wanted,
    _template: &mut TemplateSpec,
    actor: &mut ActorSpec,
) -> Vec<Advisory> {
    match config.supervisor {
        SupervisorMode::None => {
            identify(wanted, &mut actor.env);
            if !wanted.token.is_empty() {
                actor.env.insert("OPENSHELL_SANDBOX_TOKEN_FILE".to_owned(), TOKEN_PATH.to_owned());
                actor.files.push(File {
                    path: TOKEN_PATH.to_owned(),
                    mode: TOKEN_MODE,
                    content: wanted.token.reveal().as_bytes().to_vec(),
                });
            }
            Vec::new()
        }
    }
}

/// Listeners the mode needs of the gateway.
pub fn listener_requirements(config: &Config) -> Vec<GatewayListenerRequirement> {
    match config.supervisor {
        SupervisorMode::None => Vec::new(),
    }
}

/// Who the sandbox is; set last, so that no user environment can pretend otherwise.
fn identify(wanted: &Wanted, env: &mut BTreeMap<String, String>) {
    env.remove("OPENSHELL_SANDBOX_TOKEN");
    env.remove("OPENSHELL_SANDBOX_TOKEN_FILE");
    env.insert("OPENSHELL_SANDBOX_ID".to_owned(), wanted.id.clone());
    env.insert("OPENSHELL_SANDBOX".to_owned(), wanted.name.clone());
    if !wanted.log_level.is_empty() {
        env.insert("OPENSHELL_LOG_LEVEL".to_owned(), wanted.log_level.clone());
    }
}
