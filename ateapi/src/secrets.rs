// SPDX-License-Identifier: Apache-2.0
//! Secrets at rest.
//!
//! The contents of an actor's files are sealed with XChaCha20-Poly1305 under a key that lives in a file of its own
//! (`keys/at-rest.key`, 32 bytes as hex, 0600), with the actor's uid as associated data, so that a sealed value moved
//! to another row does not open. They are never in a record, an event, a log or an answer.
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{Key, XChaCha20Poly1305, XNonce};
use prost::Message as _;
use rand::TryRngCore as _;
use substrate_proto::types;

const NONCE: usize = 24;
const VERSION: u8 = 1;

/// Why a key or a secret could not be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The key file or its directory.
    #[error("key file {path}: {message}")]
    #[allow(missing_docs)]
    KeyFile { path: PathBuf, message: String },
    /// A sealed value does not open.
    #[error(
        "the sealed files of actor {0} do not open: the key file is not the one they were sealed with; restore it \
         from the backup that belongs to the database"
    )]
    Sealed(String),
    /// No randomness.
    #[error("the system gives no random bytes: {0}")]
    Random(String),
}

/// Seals and opens.
pub struct Sealer(XChaCha20Poly1305);

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer(…)")
    }
}

/// The files of an actor as one sealed value.
#[derive(Clone, PartialEq, prost::Message)]
struct Files {
    #[prost(message, repeated, tag = "1")]
    files: Vec<types::File>,
}

impl Sealer {
    /// Reads the key of a directory, or draws one on the first start.
    pub fn open(dir: &Path) -> Result<Self, SecretError> {
        let path = dir.join("at-rest.key");
        let fail = |message: String| SecretError::KeyFile { path: path.clone(), message };
        if !dir.exists() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(|error| fail(format!("cannot create its directory: {error}")))?;
        }
        let text = match fs::read_to_string(&path) {
            Ok(text) => {
                let meta = fs::metadata(&path).map_err(|error| fail(error.to_string()))?;
                if meta.mode() & 0o077 != 0 {
                    return Err(fail(format!(
                        "its mode is {:o}: others may read it; chmod 600 it",
                        meta.mode() & 0o777
                    )));
                }
                text
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let mut key = [0; 32];
                rand::rngs::OsRng
                    .try_fill_bytes(&mut key)
                    .map_err(|error| SecretError::Random(error.to_string()))?;
                let text = hex::encode(key);
                write_new(&path, &text).map_err(|error| fail(format!("cannot write it: {error}")))?;
                text
            }
            Err(error) => return Err(fail(format!("cannot read it: {error}"))),
        };
        let mut key = [0; 32];
        hex::decode_to_slice(text.trim(), &mut key).map_err(|_| {
            fail("does not hold 32 bytes as hexadecimal digits; restore it from a backup".to_owned())
        })?;
        Ok(Self::with_key(key))
    }

    /// With a key at hand.
    pub fn with_key(key: [u8; 32]) -> Self {
        Self(XChaCha20Poly1305::new(Key::from_slice(&key)))
    }

    /// Seals the files of an actor.
    pub fn seal(&self, owner: &str, files: &[types::File]) -> Result<Vec<u8>, SecretError> {
        let mut nonce = [0; NONCE];
        rand::rngs::OsRng
            .try_fill_bytes(&mut nonce)
            .map_err(|error| SecretError::Random(error.to_string()))?;
        let plain = Files { files: files.to_vec() }.encode_to_vec();
        let payload = Payload { msg: &plain, aad: owner.as_bytes() };
        let sealed = self
            .0
            .encrypt(XNonce::from_slice(&nonce), payload)
            .map_err(|_| SecretError::Sealed(owner.to_owned()))?;
        Ok([&[VERSION][..], &nonce, &sealed].concat())
    }

    /// Opens the files of an actor.
    pub fn unseal(&self, owner: &str, sealed: &[u8]) -> Result<Vec<types::File>, SecretError> {
        let wrong = || SecretError::Sealed(owner.to_owned());
        let rest = sealed.strip_prefix(&[VERSION]).ok_or_else(wrong)?;
        let (nonce, text) = rest.split_at_checked(NONCE).ok_or_else(wrong)?;
        let payload = Payload { msg: text, aad: owner.as_bytes() };
        let plain = self.0.decrypt(XNonce::from_slice(nonce), payload).map_err(|_| wrong())?;
        Ok(Files::decode(plain.as_slice()).map_err(|_| wrong())?.files)
    }
}

/// Complete or not there: written beside, fsynced, renamed, and the directory fsynced.
fn write_new(path: &Path, text: &str) -> std::io::Result<()> {
    let draft = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&draft, path)?;
    match path.parent() {
        Some(dir) => fs::File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn file() -> types::File {
        types::File { path: "/t".into(), mode: 0o400, content: b"hunter2".to_vec() }
    }

    #[test]
    fn sealed_files_open_for_their_owner_only() {
        let sealer = Sealer::with_key([7; 32]);
        let sealed = sealer.seal("a", &[file()]).unwrap();
        assert!(!sealed.windows(7).any(|w| w == b"hunter2"));
        assert_ne!(sealed, sealer.seal("a", &[file()]).unwrap());
        assert_eq!(sealer.unseal("a", &sealed).unwrap(), [file()]);
        assert!(sealer.unseal("b", &sealed).is_err());
        assert!(Sealer::with_key([8; 32]).unseal("a", &sealed).is_err());
        for cut in [0, 1, NONCE, sealed.len() - 1] {
            assert!(sealer.unseal("a", &sealed[..cut]).is_err());
        }
    }

    #[test]
    fn the_key_is_drawn_once_and_only_ours() {
        let dir = tempfile::tempdir().unwrap();
        let keys = dir.path().join("keys");
        let sealed = Sealer::open(&keys).unwrap().seal("a", &[file()]).unwrap();
        assert_eq!(Sealer::open(&keys).unwrap().unseal("a", &sealed).unwrap(), [file()]);
        let path = keys.join("at-rest.key");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(Sealer::open(&keys).unwrap_err().to_string().contains("chmod 600"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "short").unwrap();
        assert!(Sealer::open(&keys).unwrap_err().to_string().contains("32 bytes"));
    }
}
