// SPDX-License-Identifier: Apache-2.0
//! Unix sockets as every server of substrate opens them.
//!
//! A socket is reachable only through a directory that its owner alone may enter, is 0600 itself, replaces only a
//! stale socket of the same owner, and serves only peers of an allowed uid or gid (`SO_PEERCRED`). Clients need no
//! counterpart: tonic dials `unix:/path` endpoints by itself.
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};
use tokio_stream::Stream;

/// Longest path of a Unix socket in bytes, from `sockaddr_un` (unix(7)) less its terminating NUL.
pub const MAX_SOCKET_PATH: usize = 107;

/// Why a socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The path does not fit into `sockaddr_un`.
    #[error("socket path {path} has {len} bytes, at most {MAX_SOCKET_PATH} fit: choose a shorter directory")]
    TooLong {
        /// The path asked for.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// Another process serves on it.
    #[error(
        "socket {0} is in use: another substrate runs on this directory; stop it or choose another --dir"
    )]
    InUse(PathBuf),
    /// Something that is no socket of ours is in the way.
    #[error("{0} exists and is not a socket of this user: remove it or choose another path")]
    Foreign(PathBuf),
    /// The directory cannot be trusted.
    #[error(
        "directory {path} of the socket belongs to uid {uid}, not to this process's: choose another directory"
    )]
    ForeignDirectory {
        /// The directory.
        path: PathBuf,
        /// Who owns it.
        uid: u32,
    },
    /// The system refused.
    #[error("cannot listen on {path}: {source}")]
    Io {
        /// The path asked for.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Who may connect.
#[derive(Debug, Clone, Copy, Default)]
pub struct Peers {
    /// A uid besides root and the process's own.
    pub uid: Option<u32>,
    /// A gid whose processes may connect too; the socket and its directory are then group-accessible.
    pub gid: Option<u32>,
}

impl Peers {
    fn allows(self, uid: u32, gid: u32) -> bool {
        uid == 0 || uid == nix::unistd::geteuid().as_raw() || self.uid == Some(uid) || self.gid == Some(gid)
    }
}

/// Opens a socket by the rules of this module and yields the connections of allowed peers; others are closed and
/// logged.
///
/// # Errors
/// See [`ListenError`].
pub fn listen(
    path: &Path,
    peers: Peers,
) -> Result<impl Stream<Item = io::Result<UnixStream>> + Send + use<>, ListenError> {
    let listener = bind(path, peers)?;
    let path = path.to_owned();
    Ok(accept_allowed(listener, peers, path))
}

fn accept_allowed(
    listener: UnixListener,
    peers: Peers,
    path: PathBuf,
) -> impl Stream<Item = io::Result<UnixStream>> + Send {
    futures::stream::unfold((listener, path), move |(listener, path)| async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => match stream.peer_cred() {
                    Ok(cred) if peers.allows(cred.uid(), cred.gid()) => {
                        return Some((Ok(stream), (listener, path)));
                    }
                    Ok(cred) => tracing::warn!(
                        socket = %path.display(), uid = cred.uid(), gid = cred.gid(), "refused a peer"
                    ),
                    Err(error) => {
                        tracing::warn!(socket = %path.display(), %error, "peer without credentials");
                    }
                },
                Err(error) => return Some((Err(error), (listener, path))),
            }
        }
    })
}

/// Binds a listening socket by the rules of this module; for servers that accept by themselves.
///
/// # Errors
/// See [`ListenError`].
pub fn bind(path: &Path, peers: Peers) -> Result<UnixListener, ListenError> {
    let io = |source| ListenError::Io { path: path.to_owned(), source };
    let len = path.as_os_str().len();
    if len > MAX_SOCKET_PATH {
        return Err(ListenError::TooLong { path: path.to_owned(), len });
    }
    let uid = nix::unistd::geteuid().as_raw();
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let fresh = !dir.exists();
    std::fs::create_dir_all(dir).map_err(io)?;
    let owner = std::fs::metadata(dir).map_err(io)?.uid();
    if owner != uid {
        return Err(ListenError::ForeignDirectory { path: dir.to_owned(), uid: owner });
    }
    let shared = peers.uid.is_some() || peers.gid.is_some();
    // A peer of another uid has to reach the socket; the directory then shows names only, and SO_PEERCRED decides.
    if fresh || !shared {
        let mode = if shared { 0o711 } else { 0o700 };
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode)).map_err(io)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() && meta.uid() == uid => {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(ListenError::InUse(path.to_owned()));
            }
            std::fs::remove_file(path).map_err(io)?;
        }
        Ok(_) => return Err(ListenError::Foreign(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io(error)),
    }
    let listener = UnixListener::bind(path).map_err(io)?;
    let mode = if shared { 0o666 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(io)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/a.sock");
        drop(bind(&path, Peers::default()).unwrap());
        let live = bind(&path, Peers::default()).unwrap();
        assert!(matches!(bind(&path, Peers::default()), Err(ListenError::InUse(_))));
        drop(live);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[tokio::test]
    async fn a_file_in_the_way_and_a_long_path_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"x").unwrap();
        assert!(matches!(bind(&path, Peers::default()), Err(ListenError::Foreign(_))));
        let long = dir.path().join("x".repeat(120));
        assert!(matches!(bind(&long, Peers::default()), Err(ListenError::TooLong { .. })));
    }
}
