// SPDX-License-Identifier: Apache-2.0
//! SOCK_SEQPACKET Unix sockets whose packets are `EgressFrame`s and may carry one descriptor.
#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
};
use nix::sys::socket::{accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, socket, sockopt};
use prost::Message as _;
use substrate_proto::atenet::{EgressFrame, egress_frame::Frame};
use substrate_proto::seam::{ListenError, MAX_SOCKET_PATH};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Longest packet, bytes: a DNS message of 64 KiB with its owner.
pub const MAX_PACKET: usize = 72 << 10;
/// Descriptors a packet may carry; more than one is a mistake and all are closed.
const MAX_DESCRIPTORS: usize = 4;

/// One end of a connection.
#[derive(Debug)]
pub struct Packets(AsyncFd<OwnedFd>);

fn flags() -> SockFlag {
    SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK
}

fn watch(socket: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor for as long as it lives, and the AsyncFd owns it.
    let watched = unsafe { AsyncFd::register_with_interest(socket, interest) };
    watched.map_err(io::Error::from)
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.to_owned())
}

impl Packets {
    /// Takes a connected socket over; it must be non-blocking. Needs a tokio runtime.
    ///
    /// # Errors
    /// When it cannot be watched.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        watch(socket, Interest::READABLE | Interest::WRITABLE).map(Self)
    }

    /// Connects to a listening socket.
    ///
    /// # Errors
    /// What the system says: nobody listens, the queue is full, no permission.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags(), None)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        Self::new(socket)
    }

    /// The next frame and the descriptor that came with it; `None` when the peer has closed.
    ///
    /// # Errors
    /// A broken connection, or a packet that is no frame.
    pub async fn receive(&self) -> io::Result<Option<(Frame, Option<OwnedFd>)>> {
        loop {
            let mut guard = self.0.readable().await?;
            match guard.try_io(|socket| receive(socket.get_ref())) {
                Ok(received) => return received,
                Err(_would_block) => {}
            }
        }
    }

    /// Sends one frame, with a descriptor if given; waits while the peer's queue is full.
    ///
    /// # Errors
    /// A broken connection, or a frame longer than [`MAX_PACKET`].
    pub async fn send(&self, frame: Frame, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let bytes = EgressFrame { frame: Some(frame) }.encode_to_vec();
        if bytes.len() > MAX_PACKET {
            return Err(invalid("a frame longer than a packet may be"));
        }
        let raw = descriptor.map(|descriptor| [descriptor.as_raw_fd()]);
        loop {
            let mut guard = self.0.writable().await?;
            let sent = guard.try_io(|socket| {
                let control = raw.as_ref().map(|raw| ControlMessage::ScmRights(raw));
                let sent = sendmsg::<()>(
                    socket.as_raw_fd(),
                    &[IoSlice::new(&bytes)],
                    control.as_slice(),
                    MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
                    None,
                );
                sent.map_err(io::Error::from)
            });
            match sent {
                Ok(sent) => return sent.map(drop),
                Err(_would_block) => {}
            }
        }
    }
}

fn receive(socket: &OwnedFd) -> io::Result<Option<(Frame, Option<OwnedFd>)>> {
    let mut bytes = vec![0_u8; MAX_PACKET];
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; MAX_DESCRIPTORS]);
    let (len, truncated, mut descriptors) = {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(
            socket.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
        )?;
        let mut descriptors = Vec::new();
        for item in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = item {
                // SAFETY: the kernel has just installed these descriptors for this process; nothing else owns them.
                descriptors.extend(raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
            }
        }
        let truncated = message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
        (message.bytes, truncated, descriptors)
    };
    if len == 0 && descriptors.is_empty() && !truncated {
        return Ok(None);
    }
    if truncated || descriptors.len() > 1 {
        return Err(invalid("a packet that is too long or carries too many descriptors"));
    }
    let frame = EgressFrame::decode(&bytes[..len]).map_err(|error| invalid(&error.to_string()))?;
    let frame = frame.frame.ok_or_else(|| invalid("an empty frame"))?;
    Ok(Some((frame, descriptors.pop())))
}

/// A listening socket by the rules of `substrate_proto::seam`: 0600 in an owner-only directory, peers of root or this
/// process's own uid.
#[derive(Debug)]
pub(crate) struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    pub(crate) fn bind(path: &Path) -> Result<Self, ListenError> {
        let io = |source| ListenError::Io { path: path.to_owned(), source };
        let errno = |errno: Errno| io(errno.into());
        let len = path.as_os_str().len();
        if len > MAX_SOCKET_PATH {
            return Err(ListenError::TooLong { path: path.to_owned(), len });
        }
        let uid = nix::unistd::geteuid().as_raw();
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
        let owner = std::fs::metadata(dir).map_err(io)?.uid();
        if owner != uid {
            return Err(ListenError::ForeignDirectory { path: dir.to_owned(), uid: owner });
        }
        let address = UnixAddr::new(path).map_err(errno)?;
        match std::fs::symlink_metadata(path) {
            Ok(meta) if meta.file_type().is_socket() && meta.uid() == uid => {
                let probe = socket(AddressFamily::Unix, SockType::SeqPacket, flags(), None).map_err(errno)?;
                match connect(probe.as_raw_fd(), &address) {
                    Err(Errno::ECONNREFUSED) => std::fs::remove_file(path).map_err(io)?,
                    _ => return Err(ListenError::InUse(path.to_owned())),
                }
            }
            Ok(_) => return Err(ListenError::Foreign(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io(error)),
        }
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags(), None).map_err(errno)?;
        bind(listener.as_raw_fd(), &address).map_err(errno)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(io)?;
        listen(&listener, Backlog::new(128).map_err(errno)?).map_err(errno)?;
        watch(listener, Interest::READABLE).map(Self).map_err(io)
    }

    /// The next connection of an allowed peer; others are closed and logged.
    pub(crate) async fn accept(&self) -> io::Result<Packets> {
        loop {
            let mut guard = self.0.readable().await?;
            let accepted = guard.try_io(|listener| {
                let raw = accept4(listener.as_raw_fd(), flags())?;
                // SAFETY: accept4 has just made this descriptor; nothing else owns it.
                Ok(unsafe { OwnedFd::from_raw_fd(raw) })
            });
            let socket = match accepted {
                Ok(socket) => socket?,
                Err(_would_block) => continue,
            };
            let peer = getsockopt(&socket, sockopt::PeerCredentials)?;
            if peer.uid() == 0 || peer.uid() == nix::unistd::geteuid().as_raw() {
                return Packets::new(socket);
            }
            tracing::warn!(uid = peer.uid(), pid = peer.pid(), "refused a peer on the egress socket");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd as _;
    use substrate_proto::atenet::{DnsAnswer, FlowClosed};

    fn closed(flow_id: u64) -> Frame {
        Frame::Closed(FlowClosed { flow_id })
    }

    #[tokio::test]
    async fn frames_and_descriptors_pass_and_the_end_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/egress.sock");
        let listener = Listener::bind(&path).unwrap();
        let client = Packets::connect(&path).unwrap();
        let server = listener.accept().await.unwrap();
        let (mut kept, given) = std::os::unix::net::UnixStream::pair().unwrap();
        client.send(closed(7), Some(given.as_fd())).await.unwrap();
        client.send(closed(8), None).await.unwrap();
        drop(given);
        let (frame, descriptor) = server.receive().await.unwrap().unwrap();
        assert_eq!(frame, closed(7));
        let mut got = std::os::unix::net::UnixStream::from(descriptor.unwrap());
        got.write_all(b"hi").unwrap();
        drop(got);
        let mut text = String::new();
        kept.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hi");
        assert!(matches!(server.receive().await.unwrap(), Some((frame, None)) if frame == closed(8)));
        let large = Frame::DnsAnswer(DnsAnswer { query_id: 1, message: vec![1; 65535] });
        client.send(large.clone(), None).await.unwrap();
        assert_eq!(server.receive().await.unwrap().unwrap().0, large);
        let beyond = Frame::DnsAnswer(DnsAnswer { query_id: 1, message: vec![1; MAX_PACKET] });
        assert!(client.send(beyond, None).await.is_err());
        drop(client);
        assert!(server.receive().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_is_no_frame_or_carries_too_much_is_refused() {
        let (left, right) =
            nix::sys::socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags()).unwrap();
        let right = Packets::new(right).unwrap();
        let send = |bytes: &[u8], descriptors: &[std::os::fd::RawFd]| {
            let control = [ControlMessage::ScmRights(descriptors)];
            let control = if descriptors.is_empty() { &[][..] } else { &control[..] };
            sendmsg::<()>(left.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::empty(), None)
                .unwrap();
        };
        send(&[0xff; 10], &[]);
        assert!(right.receive().await.is_err());
        send(&vec![0; MAX_PACKET + 1], &[]);
        assert!(right.receive().await.is_err());
        let open = std::fs::read_dir("/proc/self/fd").unwrap().count();
        send(&EgressFrame { frame: Some(closed(1)) }.encode_to_vec(), &[0, 1, 2]);
        assert!(right.receive().await.is_err());
        let now = std::fs::read_dir("/proc/self/fd").unwrap().count();
        assert!(now <= open + 1, "descriptors of a refused packet are closed: {open} before, {now} after");
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("e.sock");
        drop(Listener::bind(&path).unwrap());
        let live = Listener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path), Err(ListenError::InUse(_))));
        drop(live);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, b"").unwrap();
        assert!(matches!(Listener::bind(&path), Err(ListenError::Foreign(_))));
    }
}
