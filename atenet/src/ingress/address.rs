// SPDX-License-Identifier: Apache-2.0
//! Which actor a request is for.
//!
//! Either its `Host` says so, `<actor>.<atespace>.<domain>` or `<port>-<actor>.<atespace>.<domain>`, or the header
//! `ate-actor: <atespace>/<actor>[:port]`, which wins. A label that begins with digits and a dash always means a
//! port: an actor whose own name begins so is asked for with the header.
use std::fmt;

use http::{HeaderMap, Uri};

/// An actor by its names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) atespace: String,
    pub(crate) name: String,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.atespace, self.name)
    }
}

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) key: Key,
    /// 0: the actor's default port.
    pub(crate) port: u16,
}

/// Why a request names no actor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NoTarget {
    /// Neither the header nor a host of the domain.
    Unaddressed,
    /// One of them is there but malformed.
    Malformed(String),
}

/// Header that names the actor.
pub(crate) const ACTOR_HEADER: &str = "ate-actor";

pub(crate) fn target(uri: &Uri, headers: &HeaderMap, domain: &str) -> Result<Target, NoTarget> {
    if let Some(value) = headers.get(ACTOR_HEADER) {
        let text = value.to_str().ok().unwrap_or_default().trim();
        return from_header(text).ok_or_else(|| {
            NoTarget::Malformed(format!(
                "header {ACTOR_HEADER} is {text:?}; it must be <atespace>/<actor> or <atespace>/<actor>:<port>"
            ))
        });
    }
    let host = match uri.authority() {
        Some(authority) => authority.host().to_owned(),
        None => match headers.get(http::header::HOST).and_then(|value| value.to_str().ok()) {
            Some(value) => without_port(value).to_owned(),
            None => return Err(NoTarget::Unaddressed),
        },
    };
    from_host(&host, domain)
}

fn from_header(text: &str) -> Option<Target> {
    let (atespace, rest) = text.split_once('/')?;
    let (name, port) = match rest.split_once(':') {
        Some((name, port)) => (name, parse_port(port)?),
        None => (rest, 0),
    };
    (is_label(atespace) && is_label(name))
        .then(|| Target { key: Key { atespace: atespace.into(), name: name.into() }, port })
}

fn from_host(host: &str, domain: &str) -> Result<Target, NoTarget> {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let Some(prefix) = host.strip_suffix(domain).and_then(|rest| rest.strip_suffix('.')) else {
        return Err(NoTarget::Unaddressed);
    };
    let malformed =
        || NoTarget::Malformed(format!("host {host:?} is not [<port>-]<actor>.<atespace>.{domain}"));
    let (label, atespace) = prefix.split_once('.').ok_or_else(malformed)?;
    let (name, port) = match label.split_once('-') {
        Some((digits, name)) if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) => {
            (name, parse_port(digits).ok_or_else(malformed)?)
        }
        _ => (label, 0),
    };
    if !is_label(name) || !is_label(atespace) {
        return Err(malformed());
    }
    Ok(Target { key: Key { atespace: atespace.into(), name: name.into() }, port })
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

fn parse_port(text: &str) -> Option<u16> {
    text.parse().ok().filter(|port| *port != 0)
}

/// DNS-1123 label.
fn is_label(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: &str = "actors.localhost";

    fn by_host(host: &str) -> Result<Target, NoTarget> {
        let mut headers = HeaderMap::new();
        headers.insert("host", host.parse().unwrap());
        target(&Uri::from_static("/x"), &headers, DOMAIN)
    }

    fn to(atespace: &str, name: &str, port: u16) -> Target {
        Target { key: Key { atespace: atespace.into(), name: name.into() }, port }
    }

    #[test]
    fn hosts() {
        assert_eq!(by_host("alice.team.actors.localhost"), Ok(to("team", "alice", 0)));
        assert_eq!(by_host("alice.team.actors.localhost:8480"), Ok(to("team", "alice", 0)));
        assert_eq!(by_host("Alice.Team.Actors.Localhost."), Ok(to("team", "alice", 0)));
        assert_eq!(by_host("9090-alice.team.actors.localhost"), Ok(to("team", "alice", 9090)));
        assert_eq!(by_host("my-agent.team.actors.localhost"), Ok(to("team", "my-agent", 0)));
        assert_eq!(by_host("80-1-a.team.actors.localhost"), Ok(to("team", "1-a", 80)));
        for unaddressed in
            ["localhost", "127.0.0.1:8480", "[::1]:8480", "actors.localhost", "xactors.localhost"]
        {
            assert_eq!(by_host(unaddressed), Err(NoTarget::Unaddressed), "{unaddressed}");
        }
        for malformed in [
            "alice.actors.localhost",
            "a.b.c.actors.localhost",
            "70000-alice.team.actors.localhost",
            "0-alice.team.actors.localhost",
            "a_b.team.actors.localhost",
            "-a.team.actors.localhost",
            ".team.actors.localhost",
        ] {
            assert!(matches!(by_host(malformed), Err(NoTarget::Malformed(_))), "{malformed}");
        }
    }

    #[test]
    fn the_header_wins_and_is_checked() {
        let ask = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("host", "alice.team.actors.localhost".parse().unwrap());
            headers.insert(ACTOR_HEADER, value.parse().unwrap());
            target(&Uri::from_static("/"), &headers, DOMAIN)
        };
        assert_eq!(ask("team/bob"), Ok(to("team", "bob", 0)));
        assert_eq!(ask(" team/8080-bob:81 "), Ok(to("team", "8080-bob", 81)));
        for malformed in
            ["bob", "/bob", "team/", "team/bob:", "team/bob:0", "team/bob:x", "team/b/c", "TEAM/bob"]
        {
            assert!(matches!(ask(malformed), Err(NoTarget::Malformed(_))), "{malformed}");
        }
    }

    #[test]
    fn an_authority_in_the_uri_counts_as_the_host() {
        let uri = Uri::from_static("http://alice.team.actors.localhost:8480/x");
        assert_eq!(target(&uri, &HeaderMap::new(), DOMAIN), Ok(to("team", "alice", 0)));
        assert_eq!(target(&Uri::from_static("/"), &HeaderMap::new(), DOMAIN), Err(NoTarget::Unaddressed));
    }
}
