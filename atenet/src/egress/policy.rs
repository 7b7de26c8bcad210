// SPDX-License-Identifier: Apache-2.0
//! What an actor may reach: its egress policy, normalized, as pure decisions.
//!
//! A rule that cannot be enforced at least as strictly as it was written opens nothing (P7); it is reported instead.
//! The address filter comes before any of this.
use std::net::IpAddr;

use ipnet::IpNet;
use substrate_proto::types::{EgressPolicy, EgressRule};

/// Longest DNS name in presentation form, RFC 1035.
const MAX_NAME: usize = 253;

/// What has to be seen on a connection before it is carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Check {
    /// A TLS ClientHello whose SNI is the name.
    pub(crate) tls: bool,
    /// HTTP requests whose Host is the name.
    pub(crate) http: bool,
    /// Nothing.
    pub(crate) open: bool,
}

impl Check {
    fn or(self, other: Self) -> Self {
        Self { tls: self.tls || other.tls, http: self.http || other.http, open: self.open || other.open }
    }

    fn any(self) -> bool {
        self.tls || self.http || self.open
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Pattern {
    Exact(String),
    /// One label before this suffix, which begins with a dot.
    Wildcard(String),
}

impl Pattern {
    fn matches(&self, name: &str) -> bool {
        match self {
            Self::Exact(exact) => name == exact,
            Self::Wildcard(suffix) => name
                .strip_suffix(suffix.as_str())
                .is_some_and(|label| !label.is_empty() && !label.contains('.')),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct HostRule {
    pattern: Pattern,
    ports: Vec<(u16, Check)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct CidrRule {
    net: IpNet,
    ports: Vec<u16>,
}

/// A normalized policy. The default allows nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Policy {
    hosts: Vec<HostRule>,
    cidrs: Vec<CidrRule>,
}

impl Policy {
    /// Normalizes a policy; rules that cannot be enforced are left out and named.
    pub(crate) fn normalize(policy: &EgressPolicy) -> (Self, Vec<String>) {
        let mut normal = Self::default();
        let mut problems = Vec::new();
        for rule in &policy.allow {
            if let Err(problem) = normal.add(rule) {
                problems.push(format!("rule {:?}: {problem}", display(rule)));
            }
        }
        (normal, problems)
    }

    fn add(&mut self, rule: &EgressRule) -> Result<(), String> {
        let mut ports = Vec::new();
        for port in &rule.ports {
            ports.push(u16::try_from(*port).ok().filter(|port| *port != 0).ok_or(format!("port {port}"))?);
        }
        match (rule.host.as_str(), rule.cidr.as_str()) {
            ("", "") => Err("names neither host nor cidr".into()),
            (host, "") => {
                let pattern = pattern(host)?;
                if ports.is_empty() {
                    ports.push(443);
                }
                let ports = ports
                    .into_iter()
                    .map(|port| Ok((port, check(&rule.protocol, port)?)))
                    .collect::<Result<_, String>>()?;
                self.hosts.push(HostRule { pattern, ports });
                Ok(())
            }
            ("", cidr) => {
                if !matches!(rule.protocol.as_str(), "" | "tcp") {
                    return Err(format!("protocol {:?} cannot be checked without a host", rule.protocol));
                }
                if ports.is_empty() {
                    return Err("a cidr needs ports".into());
                }
                let net: IpNet = match cidr.parse() {
                    Ok(net) => net,
                    Err(_) => cidr.parse::<IpAddr>().map(IpNet::from).map_err(|error| error.to_string())?,
                };
                self.cidrs.push(CidrRule { net: net.trunc(), ports });
                Ok(())
            }
            _ => Err("names both host and cidr".into()),
        }
    }

    /// Whether a name may be asked for, and so has an address.
    pub(crate) fn allows_name(&self, name: &str) -> bool {
        self.hosts.iter().any(|rule| rule.pattern.matches(name))
    }

    /// What a connection to a name's port has to show; `None`: the port is not allowed.
    pub(crate) fn host(&self, name: &str, port: u16) -> Option<Check> {
        let check = self
            .hosts
            .iter()
            .filter(|rule| rule.pattern.matches(name))
            .flat_map(|rule| &rule.ports)
            .filter(|(allowed, _)| *allowed == port)
            .fold(Check::default(), |sum, (_, check)| sum.or(*check));
        check.any().then_some(check)
    }

    /// Whether an address and port are allowed by themselves.
    pub(crate) fn address(&self, ip: IpAddr, port: u16) -> bool {
        let ip = ip.to_canonical();
        self.cidrs.iter().any(|rule| rule.net.contains(&ip) && rule.ports.contains(&port))
    }
}

fn display(rule: &EgressRule) -> String {
    format!("{}{} {:?} {}", rule.host, rule.cidr, rule.ports, rule.protocol)
}

fn check(protocol: &str, port: u16) -> Result<Check, String> {
    let none = Check::default();
    match (protocol, port) {
        ("tls", _) | ("", 443) => Ok(Check { tls: true, ..none }),
        ("http", _) | ("", 80) => Ok(Check { http: true, ..none }),
        // Unsaid on an unusual port: either, but with its check.
        ("", _) => Ok(Check { tls: true, http: true, open: false }),
        ("tcp", _) => Ok(Check { open: true, ..none }),
        (other, _) => Err(format!("protocol {other:?} is none of tls, http, tcp")),
    }
}

fn pattern(host: &str) -> Result<Pattern, String> {
    let (wildcard, rest) = match host.strip_prefix("*.") {
        Some(rest) => (true, rest),
        None => (false, host),
    };
    let name = normal_name(rest).ok_or_else(|| format!("{host:?} is not a host name"))?;
    if name.parse::<IpAddr>().is_ok() || name.rsplit('.').next().is_some_and(is_numeric) {
        return Err(format!("{host:?} is an address: use cidr"));
    }
    Ok(if wildcard { Pattern::Wildcard(format!(".{name}")) } else { Pattern::Exact(name) })
}

fn is_numeric(label: &str) -> bool {
    !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_digit())
}

/// Lower case, without the root's dot; `None` when it is no host name (letters, digits, `-`, `_`).
pub(crate) fn normal_name(name: &str) -> Option<String> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let label_ok = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    (!name.is_empty() && name.len() <= MAX_NAME && name.split('.').all(label_ok))
        .then(|| name.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(host: &str, ports: &[u32], protocol: &str) -> EgressRule {
        EgressRule {
            host: host.into(),
            ports: ports.to_vec(),
            protocol: protocol.into(),
            ..Default::default()
        }
    }

    fn cidr(cidr: &str, ports: &[u32]) -> EgressRule {
        EgressRule { cidr: cidr.into(), ports: ports.to_vec(), ..Default::default() }
    }

    fn policy(allow: Vec<EgressRule>) -> Policy {
        let (policy, problems) = Policy::normalize(&EgressPolicy { allow });
        assert!(problems.is_empty(), "{problems:?}");
        policy
    }

    const TLS: Check = Check { tls: true, http: false, open: false };
    const HTTP: Check = Check { tls: false, http: true, open: false };
    const OPEN: Check = Check { tls: false, http: false, open: true };

    #[test]
    fn names_match_exactly_or_by_one_label() {
        let policy = policy(vec![host("API.Example.com.", &[], ""), host("*.example.org", &[], "")]);
        for (name, allowed) in [
            ("api.example.com", true),
            ("xapi.example.com", false),
            ("example.com", false),
            ("a.api.example.com", false),
            ("a.example.org", true),
            ("a.b.example.org", false),
            ("example.org", false),
            (".example.org", false),
            ("aexample.org", false),
            ("", false),
        ] {
            assert_eq!(policy.allows_name(name), allowed, "{name}");
        }
    }

    #[test]
    fn ports_and_protocols() {
        let policy = policy(vec![
            host("a.test", &[], ""),
            host("b.test", &[80, 8443, 443], ""),
            host("c.test", &[80, 5432], "tcp"),
            host("d.test", &[8080], "http"),
            host("e.test", &[443], "tls"),
            host("*.test", &[443], "tcp"),
        ]);
        for (name, port, expected) in [
            ("a.test", 80, None),
            ("b.test", 80, Some(HTTP)),
            ("b.test", 8443, Some(Check { tls: true, http: true, open: false })),
            ("c.test", 5432, Some(OPEN)),
            ("c.test", 80, Some(OPEN)),
            ("d.test", 8080, Some(HTTP)),
            ("d.test", 80, None),
            // Two rules for one name and port: what either allows is allowed.
            ("e.test", 443, Some(Check { tls: true, http: false, open: true })),
            ("other", 443, None),
        ] {
            assert_eq!(policy.host(name, port), expected, "{name}:{port}");
        }
        assert_eq!(policy.host("a.test", 443).unwrap(), TLS.or(OPEN));
    }

    #[test]
    fn addresses() {
        let policy = policy(vec![
            cidr("10.1.0.0/16", &[5432]),
            cidr("2001:db8::/32", &[443]),
            cidr("192.0.2.9", &[1]),
        ]);
        for (ip, port, allowed) in [
            ("10.1.2.3", 5432, true),
            ("10.1.2.3", 5433, false),
            ("10.2.0.1", 5432, false),
            ("::ffff:10.1.2.3", 5432, true),
            ("2001:db8::1", 443, true),
            ("2001:db9::1", 443, false),
            ("192.0.2.9", 1, true),
            ("192.0.2.8", 1, false),
        ] {
            assert_eq!(policy.address(ip.parse().unwrap(), port), allowed, "{ip}:{port}");
        }
        assert!(!policy.allows_name("10.1.2.3"));
    }

    #[test]
    fn a_rule_that_cannot_be_enforced_opens_nothing_and_is_named() {
        for rule in [
            host("", &[], ""),
            host("*", &[], ""),
            host("a.*.com", &[], ""),
            host("**.example.com", &[], ""),
            host("1.2.3.4", &[], ""),
            host("1.2.3.0x4.5", &[], ""),
            host("a b.test", &[], ""),
            host("ä.test", &[], ""),
            host("a.test", &[0], ""),
            host("a.test", &[70000], ""),
            host("a.test", &[443], "udp"),
            cidr("10.0.0.0/8", &[]),
            cidr("10.0.0.0/40", &[1]),
            cidr("10.0.0.0/8/8", &[1]),
            EgressRule { protocol: "tls".into(), ..cidr("10.0.0.0/8", &[443]) },
            EgressRule { host: "a.test".into(), ..cidr("10.0.0.0/8", &[443]) },
        ] {
            let (policy, problems) = Policy::normalize(&EgressPolicy { allow: vec![rule.clone()] });
            assert_eq!(policy, Policy::default(), "{rule:?}");
            assert_eq!(problems.len(), 1, "{rule:?}");
        }
    }
}
