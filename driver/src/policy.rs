// SPDX-License-Identifier: Apache-2.0
//! The network section of a sandbox's policy as substrate's egress policy: in place of the supervisor's proxy where it runs
//! without, around it where it runs in full (`strict`), which then enforces what names and ports cannot say.
//!
//! OpenShell's rules name endpoints, the programs that may use them, and requests that may be made; substrate's egress
//! knows names, ports and what TLS or HTTP says the name is. What it cannot enforce at least as strictly as it was
//! written is left out, which denies it, and said; a user who would rather have it coarser says so with
//! `egress.allowCoarse`.
//!
//! The hub shows the gateway's answer to `GetSandboxConfig` before the supervisor gets it ([`Policies::apply`]): the
//! egress policy is in place before the user's command starts, and follows every change that the supervisor learns of.
//! An answer that cannot be applied is not passed on; the supervisor asks again.
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use prost::Message as _;
use substrate_proto::types::{EgressPolicy, EgressRule};

use crate::control::Control;
use crate::failure::Failure;
use crate::hub::Hub;
use crate::{condition, mirror, names};

/// What is read of `openshell.sandbox.v1.GetSandboxConfigResponse` (proto/sandbox.proto at 2f7fb655).
#[derive(Clone, PartialEq, prost::Message)]
struct SandboxConfig {
    #[prost(message, optional, tag = "1")]
    policy: Option<SandboxPolicy>,
}

/// `SandboxPolicy`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SandboxPolicy {
    /// Rules by key.
    #[prost(btree_map = "string, message", tag = "5")]
    pub network_policies: BTreeMap<String, Rule>,
}

/// `NetworkPolicyRule`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Rule {
    /// For people.
    #[prost(string, tag = "1")]
    pub name: String,
    /// What may be reached.
    #[prost(message, repeated, tag = "2")]
    pub endpoints: Vec<Endpoint>,
    /// By which programs.
    #[prost(message, repeated, tag = "3")]
    pub binaries: Vec<Binary>,
}

/// `NetworkEndpoint`, as far as it restricts.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Endpoint {
    /// Name or pattern.
    #[prost(string, tag = "1")]
    pub host: String,
    /// A port, unless `ports` has any.
    #[prost(uint32, tag = "2")]
    pub port: u32,
    /// "" and "tcp" inspect nothing.
    #[prost(string, tag = "3")]
    pub protocol: String,
    /// "enforce", or else violations are only noted.
    #[prost(string, tag = "5")]
    pub enforcement: String,
    /// Addresses that the name may have.
    #[prost(string, repeated, tag = "8")]
    pub allowed_ips: Vec<String>,
    /// Ports.
    #[prost(uint32, repeated, tag = "9")]
    pub ports: Vec<u32>,
    /// Requests that are denied whatever else is said.
    #[prost(message, repeated, tag = "10")]
    pub deny_rules: Vec<Unread>,
    /// Paths it is limited to.
    #[prost(string, tag = "15")]
    pub path: String,
    /// How the proxy signs for the client.
    #[prost(string, tag = "19")]
    pub credential_signing: String,
}

/// `NetworkBinary`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Binary {
    /// Path or pattern.
    #[prost(string, tag = "1")]
    pub path: String,
}

/// Something that matters by being there.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Unread {}

/// What became of a policy.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Translation {
    /// What may be reached.
    pub allow: Vec<EgressRule>,
    /// What is denied although the policy allows it, and why.
    pub denied: Vec<String>,
    /// What is allowed more broadly than the policy says, and how.
    pub coarse: Vec<String>,
    /// What a proxy in the sandbox refuses although the policy allows it, and why.
    pub refused: Vec<String>,
}

/// Translates a policy.
pub fn translate(policy: &SandboxPolicy, allow_coarse: bool) -> Translation {
    let mut translation = Translation::default();
    for (key, rule) in &policy.network_policies {
        let of_rule = programs(rule);
        for endpoint in &rule.endpoints {
            let ports = if endpoint.ports.is_empty() { vec![endpoint.port] } else { endpoint.ports.clone() };
            let what = format!(
                "{key}: {}:{}",
                endpoint.host,
                ports.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
            );
            if let Some(reason) = inexpressible(endpoint, &ports) {
                translation.denied.push(format!("{what}: {reason}"));
                continue;
            }
            let losses: Vec<String> = of_rule.iter().cloned().chain(unenforceable(endpoint)).collect();
            if !losses.is_empty() {
                let text = format!("{what}: {}", losses.join("; "));
                if !allow_coarse {
                    translation.denied.push(text);
                    continue;
                }
                translation.coarse.push(text);
            }
            if takes_for_internal(endpoint) {
                translation.refused.push(format!(
                    "{what}: names have addresses of {0} here, which the supervisor's proxy takes for internal ones: \
                     write allowed_ips: [{0}]",
                    STAND_INS.map(|net| format!("{net:?}")).join(", ")
                ));
            }
            let rule =
                EgressRule { host: endpoint.host.to_ascii_lowercase(), ports, ..EgressRule::default() };
            if !translation.allow.contains(&rule) {
                translation.allow.push(rule);
            }
        }
    }
    translation
}

/// Addresses that names have in a sandbox, each name one of both; `openshell-core`'s `net.rs` counts them as internal.
const STAND_INS: [&str; 2] = ["198.18.0.0/15", "fd17:5a::/64"];

/// Whether the supervisor's proxy refuses the addresses that the endpoint's names have here: it takes any of a name that
/// is written out, of a pattern only public ones, and of any name none but `allowed_ips` where they are given
/// (`openshell-supervisor-network`, proxy/destination.rs).
fn takes_for_internal(endpoint: &Endpoint) -> bool {
    if endpoint.allowed_ips.is_empty() {
        endpoint.host.contains('*')
    } else {
        !STAND_INS.iter().all(|net| endpoint.allowed_ips.iter().any(|allowed| allowed == net))
    }
}

/// What cannot be written as an egress rule at all.
fn inexpressible(endpoint: &Endpoint, ports: &[u32]) -> Option<&'static str> {
    let host = endpoint.host.to_ascii_lowercase();
    let rest = host.strip_prefix("*.").unwrap_or(&host);
    if host.is_empty() {
        Some("it names no host")
    } else if rest.is_empty() || rest.contains(['*', '?', '[', '{']) {
        Some("only a whole first label may be a wildcard")
    } else if rest.parse::<std::net::IpAddr>().is_ok() {
        Some("it names an address, which substrate opens only by an egress rule of its own (cidr)")
    } else if ports.iter().any(|port| !(1..=65_535).contains(port)) {
        Some("it names no port")
    } else {
        None
    }
}

/// What an egress rule for it would allow beyond it.
fn unenforceable(endpoint: &Endpoint) -> Vec<String> {
    let mut losses = Vec::new();
    if !endpoint.allowed_ips.is_empty() {
        losses.push("the addresses of the name cannot be limited".to_owned());
    }
    let inspects = !matches!(endpoint.protocol.as_str(), "" | "tcp");
    if inspects && endpoint.enforcement == "enforce" {
        losses.push(format!("its rules about {} requests cannot be enforced", endpoint.protocol));
    }
    if !endpoint.deny_rules.is_empty() || !endpoint.path.is_empty() {
        losses.push("single requests and paths cannot be denied".to_owned());
    }
    if !endpoint.credential_signing.is_empty() {
        losses.push("requests cannot be signed for the client".to_owned());
    }
    losses
}

fn programs(rule: &Rule) -> Option<String> {
    let any = rule.binaries.is_empty()
        || rule.binaries.iter().any(|binary| matches!(binary.path.as_str(), "**" | "/**"));
    (!any).then(|| "programs cannot be told apart".to_owned())
}

/// Applies policies to actors.
#[derive(Clone)]
pub struct Policies {
    control: Control,
    hub: Hub,
    /// What was applied last, by uid.
    applied: Arc<Mutex<HashMap<String, EgressPolicy>>>,
}

impl Policies {
    /// Nothing applied yet.
    pub fn new(control: Control, hub: Hub) -> Self {
        Self { control, hub, applied: Arc::default() }
    }

    /// Applies the policy in an answer to `GetSandboxConfig`.
    ///
    /// # Errors
    /// When it is not understood, or the control plane did not take it.
    pub async fn apply(&self, uid: &str, answer: Bytes) -> Result<(), Failure> {
        let config = SandboxConfig::decode(answer).map_err(|error| {
            Failure::Precondition(format!("the sandbox's policy is not understood: {error}"))
        })?;
        let Some(actor) = self.control.get_actor(uid).await? else { return Ok(()) };
        let allow_coarse = condition::annotation(&actor, names::ALLOW_COARSE).is_some();
        // The proxy in the sandbox enforces the rest of it.
        let strict = condition::annotation(&actor, names::STRICT).is_some();
        let mut translation = translate(&config.policy.unwrap_or_default(), allow_coarse || strict);
        if strict {
            translation.coarse.clear();
        }
        let spec = actor.spec.clone().unwrap_or_default();
        let template = self.control.get_template(&actor.atespace, &spec.template).await?;
        // What the user asked of substrate itself stays.
        let mut allow = template
            .and_then(|template| template.spec?.egress)
            .map(|egress| egress.allow)
            .unwrap_or_default();
        allow.extend(translation.allow.iter().cloned());
        let policy = EgressPolicy { allow };
        if self.applied.lock().unwrap_or_else(PoisonError::into_inner).get(uid) == Some(&policy) {
            return Ok(());
        }
        self.control.set_egress(uid, policy.clone()).await?;
        tracing::info!(
            actor = uid,
            rules = policy.allow.len(),
            denied = translation.denied.len(),
            "egress follows the sandbox's policy"
        );
        self.applied.lock().unwrap_or_else(PoisonError::into_inner).insert(uid.to_owned(), policy);
        let Some(sandbox_id) = condition::sandbox_id(&actor) else { return Ok(()) };
        let none = Vec::new();
        for (reason, what, entries) in [
            (
                "PolicyDenied",
                "denied, because substrate's egress cannot enforce it as it is written (egress.allowCoarse allows it)",
                &translation.denied,
            ),
            (
                "PolicyCoarse",
                "allowed more broadly than it is written (egress.allowCoarse)",
                &translation.coarse,
            ),
            (
                "PolicyRefused",
                "the sandbox's own proxy refuses it",
                if strict { &translation.refused } else { &none },
            ),
        ] {
            for entry in entries {
                let event = mirror::warning(mirror::now_ms(), reason, format!("{what}: {entry}"));
                self.hub.tell(mirror::platform_event(sandbox_id, event)).await;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(host: &str, port: u32) -> Endpoint {
        Endpoint { host: host.to_owned(), port, ..Endpoint::default() }
    }

    fn policy(endpoints: Vec<Endpoint>, binaries: &[&str]) -> SandboxPolicy {
        let binaries = binaries.iter().map(|path| Binary { path: (*path).to_owned() }).collect();
        let rule = Rule { endpoints, binaries, ..Rule::default() };
        SandboxPolicy { network_policies: [("r".to_owned(), rule)].into() }
    }

    #[test]
    fn what_can_be_enforced_is_allowed_and_nothing_else_is() {
        type Case = (Endpoint, &'static [&'static str], bool, bool);
        let table: [Case; 13] = [
            // (endpoint, programs, allowed, allowed when coarse is)
            (endpoint("api.example.com", 443), &[], true, true),
            (endpoint("API.example.com", 443), &["/**"], true, true),
            (endpoint("*.example.com", 443), &[], true, true),
            (endpoint("**.example.com", 443), &[], false, false),
            (endpoint("a*.example.com", 443), &[], false, false),
            (endpoint("*", 443), &[], false, false),
            (endpoint("", 443), &[], false, false),
            (endpoint("192.0.2.1", 443), &[], false, false),
            (endpoint("api.example.com", 0), &[], false, false),
            (endpoint("api.example.com", 443), &["/usr/bin/curl"], false, true),
            (
                Endpoint {
                    protocol: "rest".into(),
                    enforcement: "enforce".into(),
                    ..endpoint("api.example.com", 443)
                },
                &[],
                false,
                true,
            ),
            // Only noted there too.
            (Endpoint { protocol: "rest".into(), ..endpoint("api.example.com", 443) }, &[], true, true),
            (
                Endpoint { allowed_ips: vec!["192.0.2.0/24".into()], ..endpoint("api.example.com", 443) },
                &[],
                false,
                true,
            ),
        ];
        for (endpoint, programs, strict, coarse) in table {
            for (allow_coarse, expected) in [(false, strict), (true, coarse)] {
                let translation = translate(&policy(vec![endpoint.clone()], programs), allow_coarse);
                assert_eq!(
                    translation.allow.len(),
                    usize::from(expected),
                    "{endpoint:?} {programs:?} {allow_coarse}"
                );
                assert_eq!(translation.denied.is_empty(), expected, "{endpoint:?}: what is denied is said");
                assert_eq!(
                    !translation.coarse.is_empty(),
                    expected && !strict,
                    "{endpoint:?}: what is coarse is said"
                );
            }
        }
    }

    #[test]
    fn what_a_proxy_in_the_sandbox_would_refuse_is_known() {
        let with = |host: &str, ips: &[&str]| {
            let allowed_ips = ips.iter().map(|net| (*net).to_owned()).collect();
            let policy = policy(vec![Endpoint { allowed_ips, ..endpoint(host, 443) }], &[]);
            translate(&policy, true).refused.len()
        };
        assert_eq!(with("api.example.com", &[]), 0);
        assert_eq!(with("*.example.com", &[]), 1);
        assert_eq!(with("*.example.com", &["198.18.0.0/15"]), 1);
        assert_eq!(with("*.example.com", &["198.18.0.0/15", "fd17:5a::/64"]), 0);
        assert_eq!(with("api.example.com", &["192.0.2.0/24"]), 1);
    }

    #[test]
    fn ports_win_over_port_and_rules_come_once() {
        let many = Endpoint { ports: vec![80, 443], ..endpoint("api.example.com", 9) };
        let translation = translate(&policy(vec![many.clone(), many], &[]), false);
        assert_eq!(translation.allow.len(), 1);
        assert_eq!(translation.allow[0].ports, [80, 443]);
        assert_eq!(translate(&SandboxPolicy::default(), true), Translation::default());
    }
}
