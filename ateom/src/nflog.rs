// SPDX-License-Identifier: Apache-2.0
//! Packets that the slot's rules refused, read from `nft log` and told to the egress proxy for the audit log.
//!
//! A program that is refused tries again, so records with the same destination are folded within a second. Both the
//! rules (`limit rate`) and the table here are bounded: what an actor can make the node write is not up to the actor.
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use substrate_proto::atenet::{FlowOwner, PacketDenied};
use tokio::io::unix::AsyncFd;

use crate::egress::Egress;
use crate::netlink::{Netlink, attribute, messages};
use crate::network::LOG_GROUP;
use crate::occupancy::Occupancy;

const FOLD: Duration = Duration::from_secs(1);
/// Different destinations within one fold; what is beyond is counted together.
const MAX_DESTINATIONS: usize = 128;
const SNAP: u32 = 128;

/// What a record is about.
type Key = (String, String);

/// Starts reading; ends with the process.
///
/// # Errors
/// When the log group cannot be bound.
pub fn serve(occupancy: Occupancy, egress: Egress) -> io::Result<()> {
    let mut netlink = Netlink::netfilter()?;
    netlink.bind_log_group(LOG_GROUP, SNAP).map_err(io::Error::other)?;
    let socket = netlink.into_socket();
    nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
    let socket = crate::sys::watched(socket)?;
    tokio::spawn(async move {
        let mut folded = Folded { occupancy, egress, owner: None, counts: HashMap::new() };
        let mut buffer = vec![0; 64 * 1024];
        loop {
            // The first record opens a window; what comes in it is folded.
            let window = tokio::time::sleep(FOLD);
            tokio::pin!(window);
            let mut open = false;
            loop {
                tokio::select! {
                    () = &mut window, if open => break,
                    length = read(&socket, &mut buffer) => match length {
                        Ok(length) => folded.add(&buffer[..length]),
                        // ENOBUFS: more was refused than could be told; the rules still held.
                        Err(error) => tracing::warn!(%error, "records of refused packets were lost"),
                    },
                }
                if !open {
                    window.as_mut().reset(tokio::time::Instant::now() + FOLD);
                    open = true;
                }
            }
            folded.flush();
        }
    });
    Ok(())
}

/// Records of one window and one actor.
struct Folded {
    occupancy: Occupancy,
    egress: Egress,
    owner: Option<FlowOwner>,
    counts: HashMap<Key, u32>,
}

impl Folded {
    fn add(&mut self, datagram: &[u8]) {
        let owner = self.occupancy.owner();
        if owner != self.owner {
            // What was counted so far was another's.
            self.flush();
            self.owner = owner;
        }
        fold(datagram, &mut self.counts);
    }

    fn flush(&mut self) {
        for ((protocol, destination), count) in self.counts.drain() {
            self.egress.denied(PacketDenied { owner: self.owner.clone(), protocol, destination, count });
        }
    }
}

async fn read(socket: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = socket.readable().await?;
        match ready.try_io(|socket| Ok(recv(socket.as_raw_fd(), buffer, MsgFlags::empty())?)) {
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

fn fold(datagram: &[u8], folded: &mut HashMap<Key, u32>) {
    const NFGENMSG: usize = 4;
    const NFULNL_MSG_PACKET: u16 = (nix::libc::NFNL_SUBSYS_ULOG as u16) << 8;
    const NFULA_PAYLOAD: u16 = 9;
    for (kind, _, payload) in messages(datagram) {
        if kind != NFULNL_MSG_PACKET {
            continue;
        }
        let packet = payload.get(NFGENMSG..).and_then(|rest| attribute(rest, NFULA_PAYLOAD));
        if let Some(mut key) = packet.and_then(describe) {
            if folded.len() >= MAX_DESTINATIONS && !folded.contains_key(&key) {
                key = (key.0, "(others)".to_owned());
            }
            *folded.entry(key).or_default() += 1;
        }
    }
}

/// Protocol and destination of an IP packet; `None` for what is too short to be one.
fn describe(packet: &[u8]) -> Option<Key> {
    let (protocol, address, rest): (u8, IpAddr, &[u8]) = match packet.first()? >> 4 {
        4 => {
            let header = packet.first_chunk::<20>()?;
            let length = usize::from(header[0] & 0xf) * 4;
            let address: [u8; 4] = header[16..20].try_into().ok()?;
            // Only the first fragment has ports: its offset, the low 13 bits, is 0.
            let first = u16::from_be_bytes([header[6], header[7]]).trailing_zeros() >= 13;
            (header[9], Ipv4Addr::from(address).into(), if first { packet.get(length..)? } else { &[] })
        }
        6 => {
            let header = packet.first_chunk::<40>()?;
            let address: [u8; 16] = header[24..40].try_into().ok()?;
            (header[6], Ipv6Addr::from(address).into(), &packet[40..])
        }
        _ => return None,
    };
    let name = match protocol {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        58 => "icmpv6".to_owned(),
        other => other.to_string(),
    };
    let port = match (protocol, rest.get(2..4)) {
        (6 | 17, Some(bytes)) => Some(u16::from_be_bytes([bytes[0], bytes[1]])),
        _ => None,
    };
    let destination =
        port.map_or_else(|| address.to_string(), |port| SocketAddr::new(address, port).to_string());
    Some((name, destination))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn udp4(to: [u8; 4], port: u16) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 169, 254, 17, 2];
        packet.extend_from_slice(&to);
        packet.extend_from_slice(&[0x12, 0x34]);
        packet.extend_from_slice(&port.to_be_bytes());
        packet
    }

    #[test]
    fn packets_are_named_by_protocol_and_destination() {
        assert_eq!(describe(&udp4([1, 1, 1, 1], 53)), Some(("udp".into(), "1.1.1.1:53".into())));
        let mut six = vec![0x60, 0, 0, 0, 0, 20, 6, 64];
        six.extend_from_slice(&[0; 16]);
        six.extend_from_slice(&Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).octets());
        six.extend_from_slice(&[0, 1, 1, 187]);
        assert_eq!(describe(&six), Some(("tcp".into(), "[2001:db8::1]:443".into())));
        let mut icmp = udp4([9, 9, 9, 9], 0);
        icmp[9] = 1;
        assert_eq!(describe(&icmp), Some(("icmp".into(), "9.9.9.9".into())));
    }

    #[test]
    fn later_fragments_and_cut_packets_have_no_port() {
        let mut fragment = udp4([1, 1, 1, 1], 53);
        fragment[7] = 9;
        assert_eq!(describe(&fragment), Some(("udp".into(), "1.1.1.1".into())));
        assert_eq!(describe(&udp4([1, 1, 1, 1], 53)[..19]), None);
        assert_eq!(describe(&[]), None);
        assert_eq!(describe(&[0x00; 40]), None);
    }
}
