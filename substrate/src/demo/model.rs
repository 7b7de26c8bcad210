// SPDX-License-Identifier: Apache-2.0
//! Which model answers: the offline responder, or the one that `HELPDESK_BASE_URL` names.
//!
//! A real one that is elsewhere is reached by its name, which the demo's DNS server is told. One on this machine, or
//! given by address, is published to the actors as `model.helpdesk.internal` (egress refuses this machine otherwise).
use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};

use super::network::MODEL;
use crate::failure::{Doing as _, Exit, Failure};

/// Name of a published model server.
const PUBLISHED: &str = "model.helpdesk.internal";
/// Where the agent finds the key of a real model, in its own memory.
pub const KEY_FILE: &str = "/tmp/model-key";

/// The model and how it is reached.
#[derive(Debug, Clone)]
pub struct Model {
    /// For people.
    pub description: String,
    /// For the agent.
    pub environment: Vec<(String, String)>,
    /// Names that the demo's DNS server has to know.
    pub names: Vec<(String, IpAddr)>,
    /// Egress rule for it, beyond that of the responder.
    pub rule: Option<Value>,
    /// Configuration of `up`.
    pub config: String,
    /// Key of a real model.
    pub key: Option<String>,
}

impl Model {
    /// Reads `HELPDESK_BASE_URL`, `HELPDESK_MODEL` and `HELPDESK_API_KEY_FILE`.
    ///
    /// # Errors
    /// When the URL is not understood or its name has no address.
    pub async fn from_environment() -> Result<Self, Failure> {
        let get = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let Some(url) = get("HELPDESK_BASE_URL") else { return Ok(Self::offline()) };
        let name = get("HELPDESK_MODEL").unwrap_or_else(|| "gpt-oss:20b-cloud".to_owned());
        let parts = parse(&url)?;
        let key = match get("HELPDESK_API_KEY_FILE") {
            Some(path) => Some(std::fs::read_to_string(&path).doing(|| format!("cannot read {path}"))?),
            None => None,
        };
        let found = tokio::net::lookup_host((parts.host.as_str(), parts.port)).await.map_err(|error| {
            Failure::new(
                Exit::Unavailable,
                format!("HELPDESK_BASE_URL: {} has no address: {error}", parts.host),
            )
        })?;
        let addresses: Vec<SocketAddr> = found.collect();
        let own = own_addresses();
        let published = parts.host.parse::<IpAddr>().is_ok()
            || addresses.iter().any(|address| address.ip().is_loopback() || own.contains(&address.ip()));
        Ok(Self::real(&parts, &name, &addresses, published, key))
    }

    fn offline() -> Self {
        Self {
            description: "the offline responder (set HELPDESK_BASE_URL for a real model)".to_owned(),
            environment: vec![
                ("HELPDESK_BASE_URL".to_owned(), format!("http://{MODEL}/v1")),
                ("HELPDESK_MODEL".to_owned(), "helpdesk-offline".to_owned()),
            ],
            names: Vec::new(),
            rule: None,
            config: String::new(),
            key: None,
        }
    }

    fn real(
        parts: &Parts,
        name: &str,
        addresses: &[SocketAddr],
        published: bool,
        key: Option<String>,
    ) -> Self {
        let host = if published { PUBLISHED } else { &parts.host };
        let protocol = if parts.tls { "tls" } else { "http" };
        let mut environment = vec![
            (
                "HELPDESK_BASE_URL".to_owned(),
                format!("{}://{host}:{}{}", parts.scheme(), parts.port, parts.path),
            ),
            ("HELPDESK_MODEL".to_owned(), name.to_owned()),
        ];
        if key.is_some() {
            environment.push(("HELPDESK_API_KEY_FILE".to_owned(), KEY_FILE.to_owned()));
        }
        let config = match (published, addresses.first()) {
            (true, Some(target)) => format!(
                "[[egress.published]]\nname = \"{PUBLISHED}\"\nport = {}\ntarget = \"{target}\"\n",
                parts.port
            ),
            _ => String::new(),
        };
        Self {
            description: format!(
                "{name} at {}://{}:{}{}",
                parts.scheme(),
                parts.host,
                parts.port,
                parts.path
            ),
            environment,
            names: if published {
                Vec::new()
            } else {
                addresses.iter().map(|address| (parts.host.clone(), address.ip())).collect()
            },
            rule: Some(json!({"host": host, "ports": [parts.port], "protocol": protocol})),
            config,
            key,
        }
    }
}

/// A base URL, in parts.
#[derive(Debug, PartialEq, Eq)]
struct Parts {
    tls: bool,
    host: String,
    port: u16,
    path: String,
}

impl Parts {
    fn scheme(&self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }
}

fn parse(url: &str) -> Result<Parts, Failure> {
    let wrong = || Failure::usage(format!("HELPDESK_BASE_URL {url:?} is not http(s)://HOST[:PORT]/PATH"));
    let uri: hyper::Uri = url.trim_end_matches('/').parse().map_err(|_| wrong())?;
    let tls = match uri.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        _ => return Err(wrong()),
    };
    let host = uri.host().ok_or_else(wrong)?.trim_matches(['[', ']']).to_owned();
    let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
    let path = if uri.path() == "/" { String::new() } else { uri.path().to_owned() };
    Ok(Parts { tls, host, port, path })
}

fn own_addresses() -> Vec<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_have_a_host_a_port_and_a_path() {
        let parts = parse("http://localhost:11434/v1/").unwrap();
        assert_eq!(parts, Parts { tls: false, host: "localhost".into(), port: 11434, path: "/v1".into() });
        assert_eq!(parse("https://api.example.com/v1").unwrap().port, 443);
        for bad in ["localhost:11434", "ftp://a/", "http:///v1", "::"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_model_on_this_machine_is_published_and_another_is_named() {
        let parts = parse("http://localhost:11434/v1").unwrap();
        let local = Model::real(&parts, "m", &[([127, 0, 0, 1], 11434).into()], true, None);
        assert_eq!(local.environment[0].1, "http://model.helpdesk.internal:11434/v1");
        assert!(local.config.contains("target = \"127.0.0.1:11434\"") && local.names.is_empty());
        crate::up::config::parse(&local.config).unwrap();
        let parts = parse("https://api.example.com/v1").unwrap();
        let remote = Model::real(&parts, "m", &[([192, 0, 2, 9], 443).into()], false, Some("k".into()));
        assert_eq!(remote.names, [("api.example.com".to_owned(), IpAddr::from([192, 0, 2, 9]))]);
        assert!(remote.config.is_empty() && remote.environment.len() == 3);
        assert_eq!(remote.rule.unwrap()["protocol"], "tls");
    }
}
