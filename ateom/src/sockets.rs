// SPDX-License-Identifier: Apache-2.0
//! Listening sockets on the worker's inner addresses. The veth that carries them is made afresh for each activation,
//! so they are bound with IP_FREEBIND, once, and stay.
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket, sockopt,
};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

/// Between failed attempts to accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

fn open(address: IpAddr, port: u16, kind: SockType) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    }
    // Of the IPv4 level, but the same flag of the socket for both families (ip(7), ipv6_bind in the kernel).
    setsockopt(&fd, sockopt::IpFreebind, &true)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(address, port)))?;
    Ok(fd)
}

fn named(address: IpAddr, port: u16) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("cannot listen on {address} port {port}: {error}"))
}

/// A TCP listener.
///
/// # Errors
/// As bind(2), with the address named.
pub fn bind_tcp(address: IpAddr, port: u16) -> io::Result<TcpListener> {
    let bound = || {
        let fd = open(address, port, SockType::Stream)?;
        listen(&fd, Backlog::new(512)?)?;
        TcpListener::from_std(fd.into())
    };
    bound().map_err(named(address, port))
}

/// A UDP socket.
///
/// # Errors
/// As bind(2), with the address named.
pub fn bind_udp(address: IpAddr, port: u16) -> io::Result<UdpSocket> {
    let bound = || UdpSocket::from_std(open(address, port, SockType::Datagram)?.into());
    bound().map_err(named(address, port))
}

/// The next connection. An error (out of descriptors, or a client that is gone already) is logged and waited out.
pub async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection of the actor");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Where a redirected connection was going before nft changed its destination.
///
/// # Errors
/// ENOENT when it was not redirected.
pub fn original_destination(socket: &TcpStream) -> io::Result<SocketAddr> {
    use nix::sys::socket::getsockopt;
    match socket.local_addr()? {
        SocketAddr::V4(_) => {
            let raw = getsockopt(socket, sockopt::OriginalDst)?;
            let address = u32::from_be(raw.sin_addr.s_addr);
            Ok(SocketAddr::new(IpAddr::V4(address.into()), u16::from_be(raw.sin_port)))
        }
        SocketAddr::V6(_) => {
            let raw = getsockopt(socket, sockopt::Ip6tOriginalDst)?;
            Ok(SocketAddrV6::new(raw.sin6_addr.s6_addr.into(), u16::from_be(raw.sin6_port), 0, 0).into())
        }
    }
}
