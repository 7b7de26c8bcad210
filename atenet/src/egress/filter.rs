// SPDX-License-Identifier: Apache-2.0
//! Addresses that no rule can open (P7), whether an actor dials them or a name resolves to them.
//!
//! Refused: this machine (loopback, unspecified, every address of its interfaces), link-local with the metadata
//! services, multicast, broadcast and reserved ranges, substrate's own synthetic and inner ranges, what the
//! administrator adds (control plane, pods, services), and IPv6 forms that carry one of these IPv4 addresses.
use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tokio::time::Instant;

/// IPv4 half of the synthetic addresses.
pub(crate) const SYNTHETIC_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(198, 18, 0, 0), 15);
/// IPv6 half of the synthetic addresses.
pub(crate) const SYNTHETIC_V6: Ipv6Net =
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd17, 0x5a, 0, 0, 0, 0, 0, 0), 64);

/// Whether an address stands for a name.
pub(crate) fn is_synthetic(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => SYNTHETIC_V4.contains(&ip),
        IpAddr::V6(ip) => SYNTHETIC_V6.contains(&ip),
    }
}

/// Whether an address is one that substrate itself hands out inside a worker; looking it up is no attempt at anything.
pub(crate) fn is_own_range(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            SYNTHETIC_V4.contains(&ip) || ip.is_link_local() || ip.is_loopback() || ip.is_unspecified()
        }
        IpAddr::V6(ip) => {
            OWN_V6.contains(&ip) || ip.is_unicast_link_local() || ip.is_loopback() || ip.is_unspecified()
        }
    }
}

/// Everything of ours in IPv6: inner addresses and synthetic ones.
const OWN_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd17, 0, 0, 0, 0, 0, 0, 0), 16);

const V4: &[(Ipv4Net, &str)] = &[
    (Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 8), "unspecified"),
    (Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8), "loopback"),
    (Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16), "link-local or metadata"),
    (Ipv4Net::new_assert(Ipv4Addr::new(100, 100, 100, 200), 32), "metadata"),
    (Ipv4Net::new_assert(Ipv4Addr::new(168, 63, 129, 16), 32), "metadata"),
    (Ipv4Net::new_assert(Ipv4Addr::new(192, 0, 0, 0), 24), "metadata or protocol assignments"),
    (SYNTHETIC_V4, "synthetic"),
    (Ipv4Net::new_assert(Ipv4Addr::new(192, 88, 99, 0), 24), "6to4 relay"),
    (Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4), "multicast"),
    (Ipv4Net::new_assert(Ipv4Addr::new(240, 0, 0, 0), 4), "broadcast or reserved"),
];

const fn v6(a: u16, b: u16, c: u16, len: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0), len)
}

const V6: &[(Ipv6Net, &str)] = &[
    (Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 128), "unspecified"),
    (Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128), "loopback"),
    (v6(0xfe80, 0, 0, 10), "link-local"),
    (v6(0xfec0, 0, 0, 10), "site-local"),
    (v6(0xff00, 0, 0, 8), "multicast"),
    (OWN_V6, "substrate's own"),
    (Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), 128), "metadata"),
    (Ipv6Net::new_assert(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254), 128), "metadata"),
    // Where exactly these carry their IPv4 address depends on the operator or is obfuscated.
    (v6(0x64, 0xff9b, 1, 48), "local NAT64"),
    (v6(0x2001, 0, 0, 32), "Teredo"),
    (v6(0x100, 0, 0, 64), "discard"),
];

/// The IPv4 address that an IPv6 address stands for, if it is one of the known forms.
fn embedded(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let from = |high: u16, low: u16| Some(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)));
    match ip.segments() {
        // v4-mapped and v4-compatible (RFC 4291), v4-translated (RFC 2765), NAT64 (RFC 6052), ISATAP (RFC 5214).
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low]
        | [0, 0, 0, 0, 0xffff, 0, high, low]
        | [0x64, 0xff9b, 0, 0, 0, 0, high, low]
        | [_, _, _, _, 0 | 0x200, 0x5efe, high, low]
        // 6to4 (RFC 3056).
        | [0x2002, high, low, ..] => from(high, low),
        _ => None,
    }
}

/// Where the machine's own addresses come from.
pub(crate) type NodeAddresses = Arc<dyn Fn() -> std::io::Result<Vec<IpAddr>> + Send + Sync>;

/// The addresses of all interfaces of this network namespace.
pub(crate) fn interface_addresses() -> std::io::Result<Vec<IpAddr>> {
    let addresses = nix::ifaddrs::getifaddrs().map_err(std::io::Error::from)?;
    Ok(addresses
        .filter_map(|interface| {
            let address = interface.address?;
            if let Some(v4) = address.as_sockaddr_in() {
                return Some(IpAddr::V4(v4.ip()));
            }
            address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip()))
        })
        .collect())
}

/// How long the machine's addresses are remembered.
const NODE_TTL: Duration = Duration::from_secs(1);

pub(crate) struct Filter {
    refuse: Vec<IpNet>,
    /// Never refused. Only tests, which have nothing but loopback, set this.
    exempt: Vec<IpNet>,
    node: NodeAddresses,
    read: Mutex<Option<(Instant, Arc<HashSet<IpAddr>>)>>,
}

impl Filter {
    pub(crate) fn new(refuse: Vec<IpNet>, exempt: Vec<IpNet>, node: NodeAddresses) -> Self {
        Self { refuse, exempt, node, read: Mutex::new(None) }
    }

    /// Says why an address may not be reached, whatever the rules say.
    pub(crate) fn check(&self, ip: IpAddr) -> Result<(), &'static str> {
        let ip = ip.to_canonical();
        if self.exempt.iter().any(|net| net.contains(&ip)) {
            return Ok(());
        }
        self.one(ip)?;
        if let IpAddr::V6(v6) = ip
            && let Some(inner) = embedded(v6)
        {
            self.one(IpAddr::V4(inner))?;
        }
        Ok(())
    }

    fn one(&self, ip: IpAddr) -> Result<(), &'static str> {
        let fixed = match ip {
            IpAddr::V4(ip) => V4.iter().find(|(net, _)| net.contains(&ip)).map(|(_, why)| *why),
            IpAddr::V6(ip) => V6.iter().find(|(net, _)| net.contains(&ip)).map(|(_, why)| *why),
        };
        if let Some(why) = fixed {
            return Err(why);
        }
        if self.refuse.iter().any(|net| net.contains(&ip)) {
            return Err("refused by the administrator");
        }
        match self.node_addresses() {
            Some(addresses) if !addresses.contains(&ip) => Ok(()),
            Some(_) => Err("an address of this node"),
            None => Err("the node's own addresses cannot be read"),
        }
    }

    fn node_addresses(&self) -> Option<Arc<HashSet<IpAddr>>> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, addresses)) = read.as_ref().filter(|(at, _)| at.elapsed() < NODE_TTL) {
            let _ = at;
            return Some(addresses.clone());
        }
        match (self.node)() {
            Ok(addresses) => {
                let addresses = Arc::new(addresses.into_iter().map(|ip| ip.to_canonical()).collect());
                *read = Some((Instant::now(), Arc::clone(&addresses)));
                Some(addresses)
            }
            Err(error) => {
                tracing::error!(%error, "cannot read the node's addresses: egress is refused until it can");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter() -> Filter {
        let node: NodeAddresses =
            Arc::new(|| Ok(vec!["192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap()]));
        Filter::new(vec!["10.96.0.0/12".parse().unwrap()], vec![], node)
    }

    #[test]
    fn refused_addresses() {
        let filter = filter();
        for (ip, why) in [
            ("0.0.0.0", "unspecified"),
            ("0.1.2.3", "unspecified"),
            ("127.0.0.1", "loopback"),
            ("127.8.8.8", "loopback"),
            ("169.254.169.254", "metadata"),
            ("169.254.17.1", "link-local"),
            ("100.100.100.200", "metadata"),
            ("168.63.129.16", "metadata"),
            ("192.0.0.192", "metadata"),
            ("198.18.0.1", "synthetic"),
            ("198.19.255.255", "synthetic"),
            ("224.0.0.1", "multicast"),
            ("255.255.255.255", "broadcast"),
            ("240.0.0.1", "reserved"),
            ("10.96.0.1", "administrator"),
            ("192.0.2.7", "node"),
            ("::", "unspecified"),
            ("::1", "loopback"),
            ("fe80::1", "link-local"),
            ("fec0::1", "site-local"),
            ("ff02::1", "multicast"),
            ("fd17::2", "substrate"),
            ("fd17:5a::9", "substrate"),
            ("fd00:ec2::254", "metadata"),
            ("2001:db8::7", "node"),
            ("::ffff:127.0.0.1", "loopback"),
            ("::ffff:169.254.169.254", "metadata"),
            ("::ffff:192.0.2.7", "node"),
            ("::ffff:10.96.0.1", "administrator"),
            ("::127.0.0.1", "loopback"),
            ("::ffff:0:127.0.0.1", "loopback"),
            ("2002:7f00:1::", "loopback"),
            ("2002:a9fe:a9fe::1", "metadata"),
            ("64:ff9b::169.254.169.254", "metadata"),
            ("64:ff9b::192.0.2.7", "node"),
            ("64:ff9b:1::1", "NAT64"),
            ("2001:db8::5efe:127.0.0.1", "loopback"),
            ("2001:db8::200:5efe:127.0.0.1", "loopback"),
            ("2001:0:1::1", "Teredo"),
        ] {
            let refused = filter.check(ip.parse().unwrap());
            assert!(refused.is_err_and(|got| got.contains(why)), "{ip}: {refused:?}, expected {why}");
        }
    }

    #[test]
    fn ordinary_addresses_pass() {
        let filter = filter();
        for ip in [
            "1.1.1.1",
            "10.1.2.3",
            "192.168.1.1",
            "192.0.2.8",
            "198.17.255.255",
            "198.20.0.0",
            "100.64.0.1",
            "2606:4700::1111",
            "2001:db8::8",
            "fd12::1",
            "64:ff9b::1.1.1.1",
            "::ffff:1.1.1.1",
            "2002:101:101::",
        ] {
            assert_eq!(filter.check(ip.parse().unwrap()), Ok(()), "{ip}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_nodes_addresses_are_read_again_and_unreadable_ones_refuse_all() {
        let current: Arc<Mutex<Option<Vec<IpAddr>>>> = Arc::new(Mutex::new(Some(vec![])));
        let source = current.clone();
        let node: NodeAddresses = Arc::new(move || {
            source.lock().unwrap().clone().ok_or_else(|| std::io::Error::other("no netlink"))
        });
        let filter = Filter::new(vec![], vec![], node);
        let ip: IpAddr = "203.0.113.1".parse().unwrap();
        assert!(filter.check(ip).is_ok());
        *current.lock().unwrap() = Some(vec![ip]);
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(filter.check(ip).is_err());
        *current.lock().unwrap() = None;
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(filter.check("1.1.1.1".parse().unwrap()).is_err());
    }

    #[test]
    fn this_machines_own_addresses_are_found() {
        let found = interface_addresses().unwrap();
        assert!(found.contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)), "{found:?}");
    }
}
