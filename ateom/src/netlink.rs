// SPDX-License-Identifier: Apache-2.0
//! The few netlink(7) messages a slot needs: links, addresses, routes, neighbours, and the log of refused packets.
//!
//! Written out here because they are sent from a thread that is inside a network namespace for just that long, in one
//! go and without a runtime; layouts are those of rtnetlink(7) and `linux/netfilter/nfnetlink_log.h`.
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};

const HEADER: usize = 16;

/// What the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} by netlink: {errno}")]
pub struct NetlinkError {
    /// What was attempted.
    what: String,
    /// The kernel's answer.
    errno: Errno,
}

type Result<T> = std::result::Result<T, NetlinkError>;

/// Six bytes of an Ethernet address.
pub type Mac = [u8; 6];

/// One request being built.
#[derive(Debug)]
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// A request of a type, with extra flags and its fixed part.
    pub fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        let flags = flags | (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(fixed);
        let mut message = Self { bytes };
        message.pad();
        message
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Adds an attribute.
    #[must_use]
    pub fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.bytes.extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
        self
    }

    /// Adds an attribute that holds others (and, before them, raw bytes).
    #[must_use]
    pub fn nested(mut self, kind: u16, fixed: &[u8], inner: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0, 0]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(fixed);
        self.pad();
        let mut message = inner(self);
        let length = (message.bytes.len() - start) as u16;
        message.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        message
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = self.bytes.len() as u32;
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

/// A netlink socket of the calling thread's network namespace; stays there wherever it is used.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// A socket for links and routes.
    ///
    /// # Errors
    /// As socket(2).
    pub fn route() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkRoute)
    }

    /// A socket for netfilter.
    ///
    /// # Errors
    /// As socket(2).
    pub fn netfilter() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkNetFilter)
    }

    fn open(protocol: SockProtocol) -> io::Result<Self> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends a request and waits for the kernel's acknowledgement.
    ///
    /// # Errors
    /// The kernel's answer, with `what` named.
    pub fn request(&mut self, what: &str, message: Message) -> Result<()> {
        let fail = |errno: Errno| NetlinkError { what: what.to_owned(), errno };
        self.sequence += 1;
        let bytes = message.finish(self.sequence);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty()).map_err(fail)?;
        let mut buffer = [0; 8192];
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(fail)?;
            for (kind, sequence, payload) in messages(&buffer[..length]) {
                if kind == libc::NLMSG_ERROR as u16 && sequence == self.sequence {
                    let code = payload.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
                    return if code == 0 { Ok(()) } else { Err(fail(Errno::from_raw(-code))) };
                }
            }
        }
    }

    /// The socket, to be read by a runtime.
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Makes a veth whose other end `peer` appears in another namespace.
    ///
    /// # Errors
    /// EEXIST when the name is taken.
    pub fn add_veth(
        &mut self,
        name: &str,
        mac: Mac,
        peer: &str,
        peer_mac: Mac,
        peer_namespace: BorrowedFd<'_>,
    ) -> Result<()> {
        const VETH_INFO_PEER: u16 = 1;
        let flags = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
        let message = Message::new(libc::RTM_NEWLINK, flags, &link_header(0, 0))
            .with(libc::IFLA_IFNAME, &c_name(name))
            .with(libc::IFLA_ADDRESS, &mac)
            .nested(libc::IFLA_LINKINFO, &[], |info| {
                info.with(libc::IFLA_INFO_KIND, b"veth").nested(libc::IFLA_INFO_DATA, &[], |data| {
                    data.nested(VETH_INFO_PEER, &link_header(0, 0), |other| {
                        other
                            .with(libc::IFLA_IFNAME, &c_name(peer))
                            .with(libc::IFLA_ADDRESS, &peer_mac)
                            .with(libc::IFLA_NET_NS_FD, &peer_namespace.as_raw_fd().to_ne_bytes())
                    })
                })
            });
        self.request(&format!("make veth {name}"), message)
    }

    /// Gives a link its address.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn set_mac(&mut self, index: u32, mac: Mac) -> Result<()> {
        let message =
            Message::new(libc::RTM_SETLINK, 0, &link_header(index, 0)).with(libc::IFLA_ADDRESS, &mac);
        self.request("set a link's address", message)
    }

    /// Turns off automatic IPv6 link-local addresses (and with them duplicate detection and its delays), then brings
    /// the link up.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn bring_up(&mut self, index: u32) -> Result<()> {
        const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
        const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
        let quiet = Message::new(libc::RTM_SETLINK, 0, &link_header(index, 0)).nested(
            libc::IFLA_AF_SPEC,
            &[],
            |families| {
                families.nested(libc::AF_INET6 as u16, &[], |inet6| {
                    inet6.with(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE])
                })
            },
        );
        if index != LOOPBACK {
            // A kernel without IPv6 has nothing to turn off.
            if let Err(error) = self.request("turn off link-local addresses", quiet) {
                tracing::debug!(%error, "no IPv6 on this kernel");
            }
        }
        let up = Message::new(libc::RTM_NEWLINK, 0, &link_header(index, libc::IFF_UP as u32));
        self.request("bring a link up", up)
    }

    /// Adds an address, usable at once (no duplicate address detection).
    ///
    /// # Errors
    /// As the kernel says.
    pub fn add_address(&mut self, index: u32, address: IpAddr, prefix: u8) -> Result<()> {
        let (family, bytes) = family_and_bytes(address);
        let mut fixed = vec![family, prefix, libc::IFA_F_NODAD as u8, 0];
        fixed.extend_from_slice(&index.to_ne_bytes());
        let flags = (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;
        let message = Message::new(libc::RTM_NEWADDR, flags, &fixed)
            .with(libc::IFA_LOCAL, &bytes)
            .with(libc::IFA_ADDRESS, &bytes);
        self.request(&format!("add address {address}/{prefix}"), message)
    }

    /// Adds a default route.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn add_default_route(&mut self, index: u32, gateway: IpAddr) -> Result<()> {
        const RTPROT_STATIC: u8 = 4;
        let (family, bytes) = family_and_bytes(gateway);
        let fixed = [family, 0, 0, 0, libc::RT_TABLE_MAIN, RTPROT_STATIC, 0, libc::RTN_UNICAST, 0, 0, 0, 0];
        let flags = (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;
        let message = Message::new(libc::RTM_NEWROUTE, flags, &fixed)
            .with(libc::RTA_GATEWAY, &bytes)
            .with(libc::RTA_OIF, &index.to_ne_bytes());
        self.request(&format!("add a default route via {gateway}"), message)
    }

    /// Fixes a neighbour's link address, so that nothing waits for its discovery.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn add_neighbour(&mut self, index: u32, address: IpAddr, mac: Mac) -> Result<()> {
        let (family, bytes) = family_and_bytes(address);
        let mut fixed = vec![family, 0, 0, 0];
        fixed.extend_from_slice(&index.to_ne_bytes());
        fixed.extend_from_slice(&libc::NUD_PERMANENT.to_ne_bytes());
        fixed.extend_from_slice(&[0, 0]);
        let flags = (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;
        let message = Message::new(libc::RTM_NEWNEIGH, flags, &fixed)
            .with(libc::NDA_DST, &bytes)
            .with(libc::NDA_LLADDR, &mac);
        self.request(&format!("add neighbour {address}"), message)
    }

    /// Index of a link in this socket's namespace.
    ///
    /// # Errors
    /// ENODEV when there is none of that name.
    pub fn link_index(&mut self, name: &str) -> Result<u32> {
        let what = format!("find link {name}");
        let fail = |errno: Errno| NetlinkError { what: what.clone(), errno };
        self.sequence += 1;
        let message =
            Message::new(libc::RTM_GETLINK, 0, &link_header(0, 0)).with(libc::IFLA_IFNAME, &c_name(name));
        send(self.socket.as_raw_fd(), &message.finish(self.sequence), MsgFlags::empty()).map_err(fail)?;
        let mut buffer = vec![0; 16 * 1024];
        let mut index = None;
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(fail)?;
            for (kind, _, payload) in messages(&buffer[..length]) {
                if kind == libc::RTM_NEWLINK {
                    index = payload
                        .get(4..8)
                        .and_then(|bytes| bytes.first_chunk())
                        .map(|bytes| u32::from_ne_bytes(*bytes));
                } else if kind == libc::NLMSG_ERROR as u16 {
                    let code = payload.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
                    return match (code, index) {
                        (0, Some(index)) => Ok(index),
                        (0, None) => Err(fail(Errno::ENODEV)),
                        _ => Err(fail(Errno::from_raw(-code))),
                    };
                }
            }
        }
    }

    /// Removes a link (and with a veth its other end); one that does not exist is no error.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn delete_link(&mut self, name: &str) -> Result<()> {
        let message =
            Message::new(libc::RTM_DELLINK, 0, &link_header(0, 0)).with(libc::IFLA_IFNAME, &c_name(name));
        match self.request(&format!("remove link {name}"), message) {
            Err(error) if error.errno == Errno::ENODEV => Ok(()),
            result => result,
        }
    }

    /// Subscribes to a group of `nft log` and asks for the first `snap` bytes of each packet.
    ///
    /// # Errors
    /// As the kernel says; EBUSY when another reader of this namespace has the group.
    pub fn bind_log_group(&mut self, group: u16, snap: u32) -> Result<()> {
        const NFULNL_MSG_CONFIG: u16 = ((libc::NFNL_SUBSYS_ULOG as u16) << 8) | 1;
        const NFULA_CFG_CMD: u16 = 1;
        const NFULA_CFG_MODE: u16 = 2;
        const NFULNL_CFG_CMD_BIND: u8 = 1;
        const NFULNL_COPY_PACKET: u8 = 2;
        let [high, low] = group.to_be_bytes();
        let fixed = [libc::AF_UNSPEC as u8, 0, high, low];
        let bind = Message::new(NFULNL_MSG_CONFIG, 0, &fixed).with(NFULA_CFG_CMD, &[NFULNL_CFG_CMD_BIND]);
        self.request(&format!("read nft log group {group}"), bind)?;
        let mut mode = snap.to_be_bytes().to_vec();
        mode.extend_from_slice(&[NFULNL_COPY_PACKET, 0]);
        let mode = Message::new(NFULNL_MSG_CONFIG, 0, &fixed).with(NFULA_CFG_MODE, &mode);
        self.request(&format!("configure nft log group {group}"), mode)
    }
}

/// Index of `lo` in every namespace.
pub const LOOPBACK: u32 = 1;

fn link_header(index: u32, flags: u32) -> Vec<u8> {
    let mut fixed = vec![libc::AF_UNSPEC as u8, 0, 0, 0];
    fixed.extend_from_slice(&index.to_ne_bytes());
    fixed.extend_from_slice(&flags.to_ne_bytes());
    // Which flags to change: those that are set.
    fixed.extend_from_slice(&flags.to_ne_bytes());
    fixed
}

fn c_name(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn family_and_bytes(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(v4) => (libc::AF_INET as u8, v4.octets().to_vec()),
        IpAddr::V6(v6) => (libc::AF_INET6 as u8, v6.octets().to_vec()),
    }
}

/// Splits a datagram into (type, sequence, payload).
pub fn messages(mut bytes: &[u8]) -> Vec<(u16, u32, &[u8])> {
    let mut found = Vec::new();
    while let Some(header) = bytes.first_chunk::<HEADER>() {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let Some(payload) = bytes.get(HEADER..length) else { break };
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let sequence = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        found.push((kind, sequence, payload));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    found
}

/// The value of an attribute in what follows a message's fixed part.
pub fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let Some(header) = bytes.first_chunk::<4>() {
        let length = u16::from_ne_bytes([header[0], header[1]]) as usize;
        let value = bytes.get(4..length)?;
        // The two highest bits are flags.
        if u16::from_ne_bytes([header[2], header[3]]) & 0x3fff == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_nest_with_exact_lengths() {
        let message = Message::new(16, 0, &[0; 4])
            .nested(18, &[], |inner| inner.with(1, b"veth").with(7, &[9]))
            .with(3, b"x\0")
            .finish(5);
        let parsed = messages(&message);
        assert_eq!(parsed.len(), 1);
        let (kind, sequence, payload) = parsed[0];
        assert_eq!((kind, sequence), (16, 5));
        let inner = attribute(&payload[4..], 18).unwrap();
        assert_eq!(attribute(inner, 1), Some(&b"veth"[..]));
        assert_eq!(attribute(inner, 7), Some(&[9][..]));
        assert_eq!(attribute(&payload[4..], 3), Some(&b"x\0"[..]));
        assert_eq!(attribute(&payload[4..], 4), None);
    }

    #[test]
    fn truncated_input_ends_the_walk() {
        let message = Message::new(16, 0, &[0; 4]).with(3, b"abc").finish(1);
        assert!(messages(&message[..message.len() - 4]).is_empty());
        assert_eq!(attribute(&[200, 0, 1, 0, 5], 1), None);
    }
}
