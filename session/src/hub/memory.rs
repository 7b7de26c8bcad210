// SPDX-License-Identifier: Apache-2.0
//! What a hub remembers over its own restarts: the last Hello of each sandbox and what it came with, the token among it.
//!
//! With it, a hub that comes back gives sleeping sandboxes their session at the gateway again, without waking them. One
//! file per sandbox, sealed (ChaCha20-Poly1305) with a key that is derived from the hub's master key and bound to the
//! sandbox, replaced by a rename. A file that cannot be read is no session, and said so.
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message as _;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hmac;
use substrate_proto::session::Head;

use crate::grpc::Framed;
use crate::wire;

/// A directory of sealed files.
#[derive(Clone)]
pub struct Memory {
    directory: PathBuf,
    master: Vec<u8>,
}

impl Memory {
    /// In that directory, which is made when something is kept.
    pub fn new(directory: &Path, master: &[u8]) -> Self {
        Self { directory: directory.to_owned(), master: master.to_vec() }
    }

    fn key(&self) -> io::Result<LessSafeKey> {
        let master = hmac::Key::new(hmac::HMAC_SHA256, &self.master);
        let key = hmac::sign(&master, b"substrate session memory v1");
        UnboundKey::new(&CHACHA20_POLY1305, key.as_ref())
            .map(LessSafeKey::new)
            .map_err(|_| io::Error::other("the key has the wrong length"))
    }

    /// Of a sandbox; uids hold nothing that means something in a path.
    fn path(&self, uid: &str) -> PathBuf {
        self.directory.join(uid)
    }

    /// Keeps a sandbox's Hello.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn keep(&self, uid: &str, head: &Head, hello: &Framed) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt as _;
        use std::os::unix::fs::OpenOptionsExt as _;
        let mut sealed = head.encode_length_delimited_to_vec();
        sealed.extend_from_slice(&hello.raw);
        let nonce: [u8; NONCE_LEN] = wire::random()?;
        self.key()?
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(uid.as_bytes()),
                &mut sealed,
            )
            .map_err(|_| io::Error::other("it cannot be sealed"))?;
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
        let fresh = self.directory.join(format!(".{uid}.new"));
        let mut file =
            std::fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        io::Write::write_all(&mut file, &[&nonce[..], &sealed].concat())?;
        std::fs::rename(&fresh, self.path(uid))
    }

    /// What was kept of a sandbox.
    ///
    /// # Errors
    /// When it cannot be read, or is not what was written.
    pub fn recall(&self, uid: &str) -> io::Result<Option<(Head, Framed)>> {
        let bytes = match std::fs::read(self.path(uid)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read?,
        };
        let damaged = || io::Error::other("it is damaged, of another sandbox or sealed with another key");
        let (nonce, sealed) = bytes.split_first_chunk::<NONCE_LEN>().ok_or_else(damaged)?;
        let mut sealed = sealed.to_vec();
        let opened = self
            .key()?
            .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(uid.as_bytes()), &mut sealed)
            .map_err(|_| damaged())?;
        let mut bytes = Bytes::copy_from_slice(opened);
        let head = Head::decode_length_delimited(&mut bytes).map_err(io::Error::other)?;
        Ok(Some((head, Framed { raw: bytes })))
    }

    /// Forgets a sandbox.
    pub fn forget(&self, uid: &str) {
        match std::fs::remove_file(self.path(uid)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(actor = uid, %error, "cannot remove what was kept of a session");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc;

    #[test]
    fn what_is_kept_is_sealed_and_bound_to_its_sandbox() {
        let dir = tempfile::tempdir().unwrap();
        let memory = Memory::new(dir.path(), b"master");
        let head = Head { path: "/x".to_owned(), ..grpc::status(0, "a secret token") };
        let hello = Framed { raw: Bytes::from_static(b"hello") };
        assert_eq!(memory.recall("u1").unwrap(), None);
        memory.keep("u1", &head, &hello).unwrap();
        assert_eq!(memory.recall("u1").unwrap(), Some((head.clone(), hello.clone())));
        let written = std::fs::read(dir.path().join("u1")).unwrap();
        assert!(!written.windows(6).any(|part| part == b"secret"));
        std::fs::rename(dir.path().join("u1"), dir.path().join("u2")).unwrap();
        assert!(memory.recall("u2").is_err(), "another sandbox's");
        memory.keep("u1", &head, &hello).unwrap();
        assert!(Memory::new(dir.path(), b"other").recall("u1").is_err());
        memory.forget("u1");
        memory.forget("u1");
        assert_eq!(memory.recall("u1").unwrap(), None);
    }
}
