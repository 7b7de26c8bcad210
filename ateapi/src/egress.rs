// SPDX-License-Identifier: Apache-2.0
//! Names an actor may reach and their stable synthetic addresses (design section 8).
//!
//! An address is an index into 198.18.0.0/15 and fd17:5a::/64. The map belongs to the actor: a name keeps its address
//! for as long as the actor lives, over restores and moves, because the workload's resolver may have cached it.
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use substrate_proto::{ateapi, types};

use crate::model::names;

/// Names of one actor at most.
pub const MAX_NAMES: usize = 4_096;

/// Why a name has no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// It is no DNS name.
    #[error("{0:?} is no lower-case DNS name")]
    Malformed(String),
    /// The policy does not allow it.
    #[error("{0:?} is not allowed by the actor's egress policy")]
    Denied(String),
    /// Too many names.
    #[error("the actor has {MAX_NAMES} names already; a policy with fewer or exact names keeps it below")]
    Full,
}

/// Whether a rule for hosts allows a name. A wildcard stands for exactly one label.
pub fn allows(policy: &types::EgressPolicy, name: &str) -> bool {
    policy.allow.iter().any(|rule| match rule.host.strip_prefix("*.") {
        Some(parent) => name.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest == parent),
        None => !rule.host.is_empty() && rule.host == name,
    })
}

/// The addresses of an index.
pub fn addresses(index: u32) -> (Ipv4Addr, Ipv6Addr) {
    let base = u32::from(Ipv4Addr::new(198, 18, 0, 0));
    let v4 = Ipv4Addr::from(base + index);
    let v6 = Ipv6Addr::new(0xfd17, 0x5a, 0, 0, 0, 0, (index >> 16) as u16, index as u16);
    (v4, v6)
}

/// What the API says of a bound name.
pub fn bound(name: &str, index: u32) -> ateapi::EgressName {
    let (v4, v6) = addresses(index);
    ateapi::EgressName { name: name.to_owned(), ipv4: v4.to_string(), ipv6: v6.to_string() }
}

/// The name's index: the one it has, or the next. True when it is new.
pub fn bind(
    names: &BTreeMap<String, u32>,
    policy: &types::EgressPolicy,
    name: &str,
) -> Result<(u32, bool), NameError> {
    if !names::is_host(name, false) {
        return Err(NameError::Malformed(name.to_owned()));
    }
    if !allows(policy, name) {
        return Err(NameError::Denied(name.to_owned()));
    }
    if let Some(index) = names.get(name) {
        return Ok((*index, false));
    }
    if names.len() >= MAX_NAMES {
        return Err(NameError::Full);
    }
    // Names are never removed, so the count is free; 0 would be the network's own address.
    Ok((names.len() as u32 + 1, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(hosts: &[&str]) -> types::EgressPolicy {
        types::EgressPolicy {
            allow: hosts
                .iter()
                .map(|host| types::EgressRule { host: (*host).into(), ..Default::default() })
                .collect(),
        }
    }

    #[test]
    fn only_what_is_named() {
        let policy = policy(&["api.example.com", "*.example.org"]);
        for name in ["api.example.com", "a.example.org"] {
            assert!(allows(&policy, name), "{name}");
        }
        for name in ["example.com", "x.api.example.com", "example.org", "a.b.example.org", ".example.org", ""]
        {
            assert!(!allows(&policy, name), "{name}");
        }
        let by_cidr = types::EgressPolicy {
            allow: vec![types::EgressRule { cidr: "203.0.113.0/24".into(), ..Default::default() }],
        };
        assert!(!allows(&by_cidr, "") && !allows(&by_cidr, "a.com"));
    }

    #[test]
    fn addresses_are_stable_and_inside_their_ranges() {
        let policy = policy(&["*.example.com"]);
        let mut names = BTreeMap::new();
        for i in 0..MAX_NAMES {
            let name = format!("h{i}.example.com");
            let (index, new) = bind(&names, &policy, &name).unwrap();
            assert!(new);
            names.insert(name, index);
        }
        assert_eq!(names.values().collect::<std::collections::BTreeSet<_>>().len(), MAX_NAMES);
        assert_eq!(bind(&names, &policy, "h7.example.com"), Ok((8, false)));
        assert_eq!(bind(&names, &policy, "new.example.com"), Err(NameError::Full));
        let v4: ipnet::Ipv4Net = "198.18.0.0/15".parse().unwrap();
        let v6: ipnet::Ipv6Net = "fd17:5a::/64".parse().unwrap();
        for index in [1, MAX_NAMES as u32, 65_536, 131_071] {
            let (a, b) = addresses(index);
            assert!(v4.contains(&a) && v6.contains(&b), "{a} {b}");
        }
    }

    #[test]
    fn denied_and_malformed_names_get_none() {
        let names = BTreeMap::from([("old.example.com".to_owned(), 1)]);
        // A name that an older policy allowed keeps its number but is not answered.
        let denied = bind(&names, &policy(&["api.example.com"]), "old.example.com");
        assert!(matches!(denied, Err(NameError::Denied(_))));
        assert!(matches!(bind(&names, &policy(&[]), "Not A Name"), Err(NameError::Malformed(_))));
    }
}
