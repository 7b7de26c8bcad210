// SPDX-License-Identifier: Apache-2.0
//! The two network namespaces of a slot (design section 8, promises P6 and P7).
//!
//! ```text
//!  actor namespace (fresh for each activation)     worker namespace (this process lives in it)
//!  ┌──────────────────────────────┐               ┌───────────────────────────────────────────────┐
//!  │ sandbox ── eth0              │══════ veth ═══│ wk0 169.254.17.1/30, fd17::1/64               │
//!  │ 169.254.17.2/30, fd17::2/64  │               │ nftables: log + reject all but :53, :80, and  │
//!  │ default via .1               │               │ redirected TCP; nothing is ever forwarded     │
//!  └──────────────────────────────┘               └───────────────────────────────────────────────┘
//! ```
//! The runtime writes to `eth0` with AF_PACKET, past any rules of the actor namespace, so the rules stand where its
//! packets come out. They are loaded once when the ateom starts and name `wk0` by name; what changes for each
//! activation are the elements of two sets. Refusals happen in PREROUTING: a namespace that does not forward drops
//! what it has no route for before its other hooks, silently, and software would hang.
//!
//! A microVM has a tap in place of the veth: its network card is the actor's end, `wk0` is the tap itself. Its actor
//! namespace stays empty and holds only the VMM's process. The tap comes up last ([`open_link`]).
//!
//! Addresses and link addresses are the same on every worker, so nothing inside an actor changes when it moves.
//! A namespace is held by a descriptor, not by a mount: it goes with its last user and cannot be left behind.
use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::sched::CloneFlags;
use substrate_proto::ateom::EgressCidr;

use crate::cgroup::blocking;
use crate::children::Children;
use crate::netlink::{LOOPBACK, Mac, Netlink, NetlinkError};

/// The worker's end of the veth.
pub const WORKER_LINK: &str = "wk0";
/// The actor's end.
pub const ACTOR_LINK: &str = "eth0";
/// Where the resolver and the actor endpoint are.
pub const WORKER_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 17, 1);
/// The actor.
pub const ACTOR_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 17, 2);
/// The resolver by IPv6.
pub const WORKER_V6: Ipv6Addr = Ipv6Addr::new(0xfd17, 0, 0, 0, 0, 0, 0, 1);
/// The actor by IPv6.
pub const ACTOR_V6: Ipv6Addr = Ipv6Addr::new(0xfd17, 0, 0, 0, 0, 0, 0, 2);
/// Where redirected connections arrive.
pub const EGRESS_PORT: u16 = 15001;
/// Group of `nft log` for refused packets.
pub const LOG_GROUP: u16 = 5;

/// Of the IPv4 addresses, bits.
pub const V4_PREFIX: u8 = 30;
/// Of the IPv6 addresses, bits.
pub const V6_PREFIX: u8 = 64;
// Locally administered, and the same everywhere: a restored guest keeps its neighbour cache.
const WORKER_MAC: Mac = [0x02, 0x17, 0, 0, 0, 0x01];
/// Of the actor's end.
pub const ACTOR_MAC: Mac = [0x02, 0x17, 0, 0, 0, 0x02];

/// Why a slot's network could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A namespace call failed.
    #[error("cannot {action}: {source} (needs CAP_SYS_ADMIN and CAP_NET_ADMIN)")]
    Namespace {
        /// What was attempted.
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The kernel refused a link, address or route.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// nft cannot be run.
    #[error("cannot run nft: {0}; install nftables (apt-get install nftables)")]
    NoNft(io::Error),
    /// nft refused the rules.
    #[error("nft refused the rules of this worker: {0}")]
    Rules(String),
    /// A rule cannot be expressed.
    #[error("egress {cidr:?} is not an address or network in CIDR notation with ports")]
    Cidr {
        /// What was asked for.
        cidr: String,
    },
}

type Result<T> = std::result::Result<T, NetworkError>;

fn namespace_error(action: &'static str) -> impl FnOnce(nix::Error) -> NetworkError {
    move |errno| NetworkError::Namespace { action, source: errno.into() }
}

/// Moves the calling process into a network namespace of its own. Call before any thread exists.
///
/// # Errors
/// [`NetworkError::Namespace`].
pub fn enter_worker_namespace() -> Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNET)
        .map_err(namespace_error("make the worker's network namespace"))?;
    let mut netlink = Netlink::route()
        .map_err(|source| NetworkError::Namespace { action: "open a netlink socket", source })?;
    netlink.bring_up(LOOPBACK)?;
    Ok(())
}

/// A network namespace held by a descriptor.
#[derive(Debug)]
pub struct Namespace {
    fd: OwnedFd,
}

impl Namespace {
    /// Makes one with nothing in it; `inside` runs in it, on a thread of its own.
    fn make<T: Send + 'static>(
        inside: impl FnOnce(&OwnedFd) -> Result<T> + Send + 'static,
    ) -> Result<(Self, T)> {
        let thread = std::thread::spawn(move || {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET)
                .map_err(namespace_error("make a network namespace"))?;
            let fd =
                OwnedFd::from(std::fs::File::open("/proc/thread-self/ns/net").map_err(|source| {
                    NetworkError::Namespace { action: "open a network namespace", source }
                })?);
            let value = inside(&fd)?;
            Ok((Self { fd }, value))
        });
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// An empty one, for processes that need no network.
    ///
    /// # Errors
    /// [`NetworkError::Namespace`].
    pub fn empty() -> Result<Self> {
        Self::make(|_| Ok(())).map(|(namespace, ())| namespace)
    }

    /// A path under which other processes of this machine can open it while this process lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd()))
    }
}

/// How a sandbox is linked to the worker's namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkKind {
    /// By a veth, whose other end is in the actor's namespace, ready for use.
    Veth,
    /// By a tap for a virtual network card. Down until [`open_link`].
    Tap,
}

/// The actor's namespace, and the descriptor of its tap.
#[derive(Debug)]
pub struct Link {
    /// The namespace.
    pub namespace: Namespace,
    /// With [`LinkKind::Tap`].
    pub tap: Option<OwnedFd>,
}

fn route_socket() -> Result<Netlink> {
    Netlink::route().map_err(|source| NetworkError::Namespace { action: "open a netlink socket", source })
}

/// Builds the actor's namespace afresh, with the link into this process's own; replaces what an earlier activation
/// left of it.
///
/// # Errors
/// See [`NetworkError`].
pub async fn build_actor_namespace(kind: LinkKind) -> Result<Link> {
    blocking(move || {
        let mut worker = route_socket()?;
        worker.delete_link(WORKER_LINK)?;
        let (namespace, mut actor) = Namespace::make(move |_| {
            let mut netlink = route_socket()?;
            netlink.bring_up(LOOPBACK)?;
            Ok(netlink)
        })?;
        if kind == LinkKind::Tap {
            let tap = crate::sys::make_tap(WORKER_LINK)
                .map_err(|source| NetworkError::Namespace { action: "make a tap (/dev/net/tun)", source })?;
            let index = worker.link_index(WORKER_LINK)?;
            worker.set_mac(index, WORKER_MAC)?;
            return Ok(Link { namespace, tap: Some(tap) });
        }
        worker.add_veth(WORKER_LINK, WORKER_MAC, ACTOR_LINK, ACTOR_MAC, namespace.fd.as_fd())?;
        address_worker(&mut worker)?;
        // In a fresh namespace lo is 1 and the first link that arrives keeps its index only if it is free there, so
        // it is asked for.
        let index = actor.link_index(ACTOR_LINK)?;
        actor.bring_up(index)?;
        actor.add_address(index, ACTOR_V4.into(), V4_PREFIX)?;
        actor.add_address(index, ACTOR_V6.into(), V6_PREFIX)?;
        actor.add_default_route(index, WORKER_V4.into())?;
        actor.add_default_route(index, WORKER_V6.into())?;
        Ok(Link { namespace, tap: None })
    })
    .await
}

/// Brings the worker's end of a link up, with its addresses.
fn address_worker(worker: &mut Netlink) -> Result<()> {
    let index = nix::net::if_::if_nametoindex(WORKER_LINK).map_err(namespace_error("find link wk0"))?;
    worker.bring_up(index)?;
    worker.add_address(index, WORKER_V4.into(), V4_PREFIX)?;
    worker.add_address(index, WORKER_V6.into(), V6_PREFIX)?;
    worker.add_neighbour(index, ACTOR_V4.into(), ACTOR_MAC)?;
    Ok(worker.add_neighbour(index, ACTOR_V6.into(), ACTOR_MAC)?)
}

/// Lets packets pass between an actor with a tap and the worker's namespace.
///
/// # Errors
/// See [`NetworkError`].
pub async fn open_link() -> Result<()> {
    blocking(|| address_worker(&mut route_socket()?)).await
}

/// Removes the link, so that no packet of a past activation arrives any more.
///
/// # Errors
/// [`NetworkError::Netlink`].
pub async fn remove_link() -> Result<()> {
    blocking(|| {
        let mut netlink = Netlink::route()
            .map_err(|source| NetworkError::Namespace { action: "open a netlink socket", source })?;
        Ok(netlink.delete_link(WORKER_LINK)?)
    })
    .await
}

/// The rules of a worker's namespace. Pure; loaded once. Router solicitations and group reports are link chatter that
/// reaches nobody: dropped without a record. UDP is refused as "port unreachable", the only ICMP error that gVisor
/// tells a UDP socket at once.
pub fn ruleset() -> String {
    format!(
        r#"table inet substrate
delete table inet substrate
table inet substrate {{
    set cidr4 {{ type ipv4_addr . inet_service; flags interval; }}
    set cidr6 {{ type ipv6_addr . inet_service; flags interval; }}

    chain redirected {{
        type nat hook prerouting priority dstnat; policy accept;
        iifname "{WORKER_LINK}" ip daddr 198.18.0.0/15 meta l4proto tcp redirect to :{EGRESS_PORT}
        iifname "{WORKER_LINK}" ip6 daddr fd17:5a::/64 meta l4proto tcp redirect to :{EGRESS_PORT}
        iifname "{WORKER_LINK}" ip daddr . tcp dport @cidr4 redirect to :{EGRESS_PORT}
        iifname "{WORKER_LINK}" ip6 daddr . tcp dport @cidr6 redirect to :{EGRESS_PORT}
    }}

    chain arriving {{
        type filter hook prerouting priority -90; policy drop;
        iifname "lo" accept
        iifname "{WORKER_LINK}" jump actor
    }}

    chain actor {{
        ip saddr != {ACTOR_V4} jump refuse
        ip6 saddr != {{ {ACTOR_V6}, fe80::/10, :: }} jump refuse
        ip daddr {WORKER_V4} udp dport 53 accept
        ip daddr {WORKER_V4} tcp dport {{ 53, 80 }} accept
        ip6 daddr {WORKER_V6} udp dport 53 accept
        ip6 daddr {WORKER_V6} tcp dport {{ 53, 80 }} accept
        ct status dnat tcp dport {EGRESS_PORT} accept
        ct state established,related ct direction reply accept
        icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
        icmpv6 type {{ nd-router-solicit, mld-listener-report, mld2-listener-report }} drop
        meta l4proto igmp drop
        jump refuse
    }}

    chain refuse {{
        limit rate 1000/second burst 1000 packets log group {LOG_GROUP} snaplen 128 queue-threshold 1
        meta l4proto tcp reject with tcp reset
        meta l4proto udp reject with icmpx port-unreachable
        reject with icmpx admin-prohibited
        drop
    }}

    chain forward {{
        type filter hook forward priority filter; policy drop;
    }}
}}
"#
    )
}

/// The commands that make the two sets hold exactly what an actor may reach by address. Pure.
///
/// # Errors
/// [`NetworkError::Cidr`] naming the entry; nothing of it is then loaded (refused, never widened).
pub fn egress_elements(cidrs: &[EgressCidr]) -> Result<String> {
    let mut elements = (Vec::new(), Vec::new());
    for entry in cidrs {
        let refused = || NetworkError::Cidr { cidr: entry.cidr.clone() };
        let (address, prefix) = match entry.cidr.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix.parse::<u8>().map_err(|_| refused())?)),
            None => (entry.cidr.as_str(), None),
        };
        let address: IpAddr = address.parse().map_err(|_| refused())?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.unwrap_or(longest);
        if prefix > longest || entry.ports.is_empty() {
            return Err(refused());
        }
        let set = if address.is_ipv4() { &mut elements.0 } else { &mut elements.1 };
        for port in &entry.ports {
            if *port == 0 || *port > u32::from(u16::MAX) {
                return Err(refused());
            }
            let element = format!("{address}/{prefix} . {port}");
            if !set.contains(&element) {
                set.push(element);
            }
        }
    }
    let mut text = String::new();
    for (name, set) in [("cidr4", elements.0), ("cidr6", elements.1)] {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "flush set inet substrate {name}");
        if !set.is_empty() {
            let _ = writeln!(text, "add element inet substrate {name} {{ {} }}", set.join(", "));
        }
    }
    Ok(text)
}

/// Has nft load commands, all or nothing.
///
/// # Errors
/// [`NetworkError::NoNft`] or [`NetworkError::Rules`] with what it said.
pub async fn load_rules(children: &Children, commands: String) -> Result<()> {
    let (read, write) = nix::unistd::pipe().map_err(namespace_error("make a pipe"))?;
    // Rules are handed over in a file, so that no pipe can fill up on either side.
    let rules = tempfile_with(&commands)
        .map_err(|source| NetworkError::Namespace { action: "write rules to a file", source })?;
    let exit = {
        let mut command = Command::new("nft");
        command.args(["-f", "-"]).stdin(Stdio::from(rules)).stdout(Stdio::null()).stderr(Stdio::from(write));
        children.spawn(&mut command).map_err(NetworkError::NoNft)?.1
    };
    let said = blocking(move || {
        use std::io::Read as _;
        let mut said = String::new();
        // Without its text the exit code still tells.
        let _ = std::fs::File::from(read).take(16 * 1024).read_to_string(&mut said);
        said
    })
    .await;
    match exit.await {
        Ok(exit) if exit.success() => Ok(()),
        _ => Err(NetworkError::Rules(said.trim().to_owned())),
    }
}

fn tempfile_with(text: &str) -> io::Result<OwnedFd> {
    use std::io::{Seek as _, Write as _};
    let fd = nix::sys::memfd::memfd_create(c"nft-rules", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(cidr: &str, ports: &[u32]) -> EgressCidr {
        EgressCidr { cidr: cidr.to_owned(), ports: ports.to_vec() }
    }

    #[test]
    fn elements_replace_what_was_there() {
        let text = egress_elements(&[
            cidr("10.0.0.0/8", &[80, 443]),
            cidr("fd00::/8", &[5432]),
            cidr("1.2.3.4", &[1]),
        ])
        .unwrap();
        assert_eq!(
            text,
            "flush set inet substrate cidr4\n\
             add element inet substrate cidr4 { 10.0.0.0/8 . 80, 10.0.0.0/8 . 443, 1.2.3.4/32 . 1 }\n\
             flush set inet substrate cidr6\n\
             add element inet substrate cidr6 { fd00::/8 . 5432 }\n"
        );
        assert_eq!(egress_elements(&[]).unwrap().lines().count(), 2);
    }

    #[test]
    fn what_cannot_be_written_exactly_is_refused() {
        for bad in &[
            cidr("10.0.0.0/33", &[80]),
            cidr("10.0.0.0/8", &[]),
            cidr("10.0.0.0/8", &[0]),
            cidr("10.0.0.0/8", &[70000]),
            cidr("example.com", &[80]),
            cidr("10.0.0.0/8 . 1 }; flush ruleset", &[80]),
        ] {
            assert!(egress_elements(std::slice::from_ref(bad)).is_err(), "{bad:?}");
        }
    }
}
