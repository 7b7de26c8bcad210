// SPDX-License-Identifier: Apache-2.0
//! The real addresses of names, from the node's resolver, each checked by the address filter.
//!
//! What comes out has passed the filter and is what gets connected to: no second look-up can answer differently
//! between the check and the connection.
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;

use super::filter::Filter;

/// Addresses of a name that are looked at.
const MAX_ADDRESSES: usize = 16;

/// Why a name has no address to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unresolved {
    /// Every address is refused.
    Denied(String),
    /// The resolver says no, or says nothing.
    Failed(String),
}

pub(crate) struct Names {
    fixed: Option<TokioResolver>,
    /// The system's configuration, read again when its files change.
    system: Mutex<Option<(Stamp, Arc<TokioResolver>)>>,
    timeout: Duration,
}

type Stamp = [Option<SystemTime>; 2];

fn stamp() -> Stamp {
    ["/etc/resolv.conf", "/etc/hosts"]
        .map(|path| std::fs::metadata(Path::new(path)).and_then(|meta| meta.modified()).ok())
}

fn tune(options: &mut ResolverOpts, timeout: Duration) {
    options.timeout = timeout / 2;
    options.attempts = 1;
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    options.cache_size = 1024;
    options.positive_max_ttl = Some(Duration::from_mins(5));
    options.negative_max_ttl = Some(Duration::from_secs(5));
}

impl Names {
    /// `server` `None`: the system's resolvers.
    pub(crate) fn new(server: Option<SocketAddr>, timeout: Duration) -> Result<Self, String> {
        let fixed = server
            .map(|server| {
                let mut config = NameServerConfig::udp_and_tcp(server.ip());
                for connection in &mut config.connections {
                    connection.port = server.port();
                }
                let config = ResolverConfig::from_name_servers(vec![config]);
                let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
                tune(builder.options_mut(), timeout);
                builder.build().map_err(|error| error.to_string())
            })
            .transpose()?;
        Ok(Self { fixed, system: Mutex::new(None), timeout })
    }

    fn system(&self) -> Result<Arc<TokioResolver>, String> {
        let now = stamp();
        let mut known = self.system.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, resolver)) = known.as_ref().filter(|(then, _)| *then == now) {
            return Ok(resolver.clone());
        }
        let built = TokioResolver::builder_tokio().and_then(|mut builder| {
            tune(builder.options_mut(), self.timeout);
            builder.build()
        });
        let resolver =
            Arc::new(built.map_err(|error| format!("the node's resolver is not usable: {error}"))?);
        *known = Some((now, resolver.clone()));
        Ok(resolver)
    }

    /// The addresses of a name that may be connected to, the two families taking turns.
    pub(crate) async fn resolve(&self, name: &str, filter: &Filter) -> Result<Vec<IpAddr>, Unresolved> {
        let query = format!("{name}.");
        let lookup = async {
            let found = if let Some(resolver) = &self.fixed {
                resolver.lookup_ip(query).await
            } else {
                let resolver = self.system().map_err(Unresolved::Failed)?;
                resolver.lookup_ip(query).await
            };
            found.map_err(|error| {
                Unresolved::Failed(if error.is_nx_domain() {
                    format!("{name} does not exist")
                } else if error.is_no_records_found() {
                    format!("{name} has no address")
                } else {
                    format!("cannot resolve {name}: {error}")
                })
            })
        };
        let found = tokio::time::timeout(self.timeout, lookup)
            .await
            .map_err(|_| Unresolved::Failed(format!("cannot resolve {name}: no answer in time")))??;
        select(found.iter().take(MAX_ADDRESSES), filter)
    }
}

/// Keeps what the filter passes; nothing left is a denial.
fn select(found: impl Iterator<Item = IpAddr>, filter: &Filter) -> Result<Vec<IpAddr>, Unresolved> {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    let mut refused = None;
    for ip in found {
        match filter.check(ip) {
            Ok(()) if ip.is_ipv4() => v4.push(ip),
            Ok(()) => v6.push(ip),
            Err(why) => refused = Some(format!("resolves to {ip}, which is refused ({why})")),
        }
    }
    let mut chosen = Vec::with_capacity(v4.len() + v6.len());
    let (mut v4, mut v6) = (v4.into_iter(), v6.into_iter());
    loop {
        let pair = [v4.next(), v6.next()];
        if pair == [None, None] {
            break;
        }
        chosen.extend(pair.into_iter().flatten());
    }
    match (chosen.is_empty(), refused) {
        (false, _) => Ok(chosen),
        (true, Some(reason)) => Err(Unresolved::Denied(reason)),
        (true, None) => Err(Unresolved::Failed("the name has no address".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_addresses_are_left_out_and_families_take_turns() {
        let filter = Filter::new(vec![], vec![], Arc::new(|| Ok(vec![])));
        let pick = |list: &[&str]| select(list.iter().map(|ip| ip.parse().unwrap()), &filter);
        let ips = |list: &[&str]| list.iter().map(|ip| ip.parse::<IpAddr>().unwrap()).collect::<Vec<_>>();
        assert_eq!(
            pick(&["1.1.1.1", "127.0.0.1", "1.1.1.2", "::1", "2606:4700::1"]),
            Ok(ips(&["1.1.1.1", "2606:4700::1", "1.1.1.2"]))
        );
        assert!(matches!(
            pick(&["127.0.0.1", "169.254.169.254"]),
            Err(Unresolved::Denied(reason)) if reason.contains("metadata")
        ));
        assert!(matches!(pick(&["::ffff:127.0.0.1"]), Err(Unresolved::Denied(_))));
        assert!(matches!(pick(&[]), Err(Unresolved::Failed(_))));
    }
}
