// SPDX-License-Identifier: Apache-2.0
//! SOCK_SEQPACKET Unix sockets with descriptors attached: one packet is one message.
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::Path;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect,
    recvmsg, sendmsg, socket, socketpair,
};
use tokio::io::unix::AsyncFd;

/// Longest message accepted, bytes.
pub const MAX_MESSAGE: usize = 128 * 1024;
/// Most descriptors in one message.
const MAX_FDS: usize = 4;

/// A connected pair: the first end for this process's runtime, the second to be inherited.
///
/// # Errors
/// As socketpair(2).
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Sends one message, over a Unix socket of any type; blocks or fails with EAGAIN as the socket is set.
///
/// # Errors
/// As sendmsg(2).
pub fn send(socket: RawFd, message: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    sendmsg::<()>(socket, &[IoSlice::new(message)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives one message; `None` when the other end is closed.
///
/// # Errors
/// As recvmsg(2); EMSGSIZE for a message longer than [`MAX_MESSAGE`].
pub fn receive(socket: RawFd) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let mut control = cmsg_space!([RawFd; MAX_FDS]);
    let (length, truncated, fds) = {
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let message = recvmsg::<()>(socket, &mut slices, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let mut fds = Vec::new();
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = part {
                fds.extend(crate::sys::received(&received));
            }
        }
        let truncated = message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
        (message.bytes, truncated, fds)
    };
    if truncated {
        return Err(Errno::EMSGSIZE.into());
    }
    if length == 0 && fds.is_empty() {
        return Ok(None);
    }
    buffer.truncate(length);
    Ok(Some((buffer, fds)))
}

/// A connected socket on the runtime.
#[derive(Debug)]
pub struct SeqPacket {
    socket: AsyncFd<OwnedFd>,
}

impl SeqPacket {
    /// Takes a connected socket over.
    ///
    /// # Errors
    /// When it cannot be made non-blocking or registered.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
        Ok(Self { socket: crate::sys::watched(socket)? })
    }

    /// Dials a listening socket.
    ///
    /// # Errors
    /// As connect(2): ENOENT or ECONNREFUSED when nobody listens, EAGAIN when its backlog is full.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Self::new(fd)
    }

    /// Sends one message with descriptors, waiting for room.
    ///
    /// # Errors
    /// As sendmsg(2).
    pub async fn send(&self, message: &[u8], fds: &[RawFd]) -> io::Result<()> {
        loop {
            let mut ready = self.socket.writable().await?;
            match ready.try_io(|socket| send(socket.as_raw_fd(), message, fds)) {
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }

    /// Receives one message; `None` at the end.
    ///
    /// # Errors
    /// As [`receive`].
    pub async fn receive(&self) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        loop {
            let mut ready = self.socket.readable().await?;
            match ready.try_io(|socket| receive(socket.as_raw_fd())) {
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_keep_their_borders_and_descriptors() {
        let (one, two) = pair().unwrap();
        let (one, two) = (SeqPacket::new(one).unwrap(), SeqPacket::new(two).unwrap());
        let file = tempfile::tempfile().unwrap();
        one.send(b"first", &[file.as_raw_fd()]).await.unwrap();
        one.send(b"second", &[]).await.unwrap();
        let (message, fds) = two.receive().await.unwrap().unwrap();
        assert_eq!((message.as_slice(), fds.len()), (&b"first"[..], 1));
        let (message, fds) = two.receive().await.unwrap().unwrap();
        assert_eq!((message.as_slice(), fds.len()), (&b"second"[..], 0));
        drop(one);
        assert!(two.receive().await.unwrap().is_none());
    }
}
