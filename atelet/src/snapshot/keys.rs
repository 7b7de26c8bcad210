// SPDX-License-Identifier: Apache-2.0
//! Keys of snapshots (P6).
//!
//! Each snapshot has a random data key; it is stored in the manifest, wrapped by the key of the atespace. An
//! atespace's keys are versioned: new snapshots use the newest, older versions stay for what they wrapped. They are
//! kept in `KEYS/atespaces/<name>.key`, sealed by `KEYS/master.key`; both files are 0600 and made on first use. Losing
//! the master key loses every durable snapshot: it belongs into the same backup as the blob store.
//!
//! Wrapping is XChaCha20-Poly1305 with a random nonce; what the key is for (its context) is authenticated, so that a
//! wrapped key cannot be moved to another snapshot.
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use nix::fcntl::{Flock, FlockArg};
use rand::TryRngCore as _;
use serde::{Deserialize, Serialize};

use crate::config::is_label;
use crate::durable;

/// What went wrong with a key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A key file cannot be read or written.
    #[error("key file: {0}")]
    Io(#[from] io::Error),
    /// A key file others may read, or of the wrong content.
    #[error("key file {path}: {reason}")]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// An atespace name that cannot be one.
    #[error("atespace {0:?} is not a DNS-1123 label, it has no key")]
    Atespace(String),
    /// The version that wrapped a key is gone.
    #[error("atespace {atespace} has no key version {version}: restore {path} from its backup")]
    NoVersion {
        /// Whose.
        atespace: String,
        /// Which.
        version: u32,
        /// Where it should be.
        path: PathBuf,
    },
    /// The wrapped key does not open with this key and context.
    #[error(
        "the data key of {context} does not open with the key of atespace {atespace} (version {version})"
    )]
    Mismatch {
        /// Whose key was tried.
        atespace: String,
        /// Which version.
        version: u32,
        /// What it was for.
        context: String,
    },
    /// The system has no randomness.
    #[error("no randomness: {0}")]
    Random(String),
}

/// The key that a snapshot's blocks are sealed with.
#[derive(Clone)]
pub struct DataKey(pub(crate) [u8; 32]);

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(…)")
    }
}

impl DataKey {
    /// A new random key.
    ///
    /// # Errors
    /// [`KeyError::Random`].
    pub fn random() -> Result<Self, KeyError> {
        let mut key = [0; 32];
        fill(&mut key)?;
        Ok(Self(key))
    }
}

fn fill(bytes: &mut [u8]) -> Result<(), KeyError> {
    rand::rngs::OsRng.try_fill_bytes(bytes).map_err(|error| KeyError::Random(error.to_string()))
}

/// A data key as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrappedKey {
    /// Version of the atespace's key.
    pub version: u32,
    /// Nonce (24 bytes), then the sealed key with its tag.
    pub sealed: Vec<u8>,
}

/// Wraps and unwraps data keys; a KMS can stand behind it.
#[async_trait]
pub trait KeyStore: Send + Sync + fmt::Debug {
    /// Wraps a data key for an atespace, making the atespace's key if it has none. `context` says what it is for.
    async fn wrap(&self, atespace: &str, context: &str, key: &DataKey) -> Result<WrappedKey, KeyError>;
    /// Opens a wrapped data key of the same context.
    async fn unwrap(&self, atespace: &str, context: &str, key: &WrappedKey) -> Result<DataKey, KeyError>;
    /// Adds a version that later snapshots use; returns its number.
    async fn rotate(&self, atespace: &str) -> Result<u32, KeyError>;
}

const NONCE: usize = 24;

fn seal(key: &[u8; 32], context: &[u8], plain: &[u8]) -> Result<Vec<u8>, KeyError> {
    let mut nonce = [0; NONCE];
    fill(&mut nonce)?;
    let sealed = XChaCha20Poly1305::new(key.into())
        .encrypt(XNonce::from_slice(&nonce), Payload { msg: plain, aad: context })
        .map_err(|_| KeyError::Random("sealing a key failed".to_owned()))?;
    Ok([nonce.as_slice(), &sealed].concat())
}

fn open(key: &[u8; 32], context: &[u8], sealed: &[u8]) -> Option<[u8; 32]> {
    let (nonce, sealed) = sealed.split_at_checked(NONCE)?;
    XChaCha20Poly1305::new(key.into())
        .decrypt(XNonce::from_slice(nonce), Payload { msg: sealed, aad: context })
        .ok()?
        .try_into()
        .ok()
}

/// Content of `atespaces/<name>.key`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AtespaceFile {
    /// Version → hex of nonce and sealed key.
    versions: BTreeMap<u32, String>,
}

/// Whether reading an atespace's keys may make one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Add {
    /// No: what was wrapped needs the key that wrapped it.
    None,
    /// If there is none yet.
    First,
    /// Always.
    One,
}

/// The keys of an atespace by version.
type Versions = BTreeMap<u32, [u8; 32]>;

/// Which file a key file is: it is only ever replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp(Option<(u64, i64, i64)>);

impl Stamp {
    fn of(path: &Path) -> Self {
        let meta = std::fs::metadata(path).ok();
        Self(meta.map(|meta| (meta.ino(), meta.mtime(), meta.mtime_nsec())))
    }
}

/// Keys in files.
pub struct FileKeyStore {
    dir: PathBuf,
    master: [u8; 32],
    /// Opened keys. One writer at a time makes or rotates a key.
    opened: Mutex<BTreeMap<String, (Stamp, Versions)>>,
}

impl fmt::Debug for FileKeyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileKeyStore").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl FileKeyStore {
    /// Opens the keys in `dir`, making the master key if there is none.
    ///
    /// # Errors
    /// [`KeyError`]; a master key that others may read, or of another length, is refused.
    pub fn open(dir: &Path) -> Result<Self, KeyError> {
        durable::create_dir(&dir.join("atespaces"))?;
        let path = dir.join("master.key");
        if !path.exists() {
            let mut key = [0; 32];
            fill(&mut key)?;
            // Linked, not renamed: of two that make it at once, one wins and both read it.
            let temp = dir.join(format!(".master-{}", uuid::Uuid::new_v4()));
            durable::write(&temp, hex::encode(key).as_bytes(), 0o600)?;
            let linked = std::fs::hard_link(&temp, &path);
            durable::remove_file(&temp)?;
            match linked {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
                _ => durable::sync_dir(dir)?,
            }
        }
        let bad = |reason: &str| KeyError::File { path: path.clone(), reason: reason.to_owned() };
        let mode = std::fs::metadata(&path).map_err(durable::at("read", &path))?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(bad("others may read it: chmod 0600, and consider it known"));
        }
        let text = std::fs::read_to_string(&path).map_err(durable::at("read", &path))?;
        let mut master = [0; 32];
        hex::decode_to_slice(text.trim(), &mut master)
            .map_err(|_| bad("it is not 64 hexadecimal digits: restore it from its backup"))?;
        Ok(Self { dir: dir.to_owned(), master, opened: Mutex::default() })
    }

    fn path(&self, atespace: &str) -> PathBuf {
        self.dir.join("atespaces").join(format!("{atespace}.key"))
    }

    fn context(atespace: &str, version: u32) -> Vec<u8> {
        format!("substrate atespace key 1\0{atespace}\0{version}").into_bytes()
    }

    /// Reads an atespace's keys, adding a version if that is `wanted`.
    fn load(&self, atespace: &str, wanted: Add) -> Result<Versions, KeyError> {
        if !is_label(atespace) {
            return Err(KeyError::Atespace(atespace.chars().take(80).collect()));
        }
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.path(atespace);
        if wanted != Add::One
            && let Some((stamp, keys)) = opened.get(atespace)
            && *stamp == Stamp::of(&path)
        {
            return Ok(keys.clone());
        }
        // Other processes rotate too; nobody's version may be overwritten.
        let _alone = if wanted == Add::None { None } else { Some(self.lock()?) };
        // Before the file is read: a change in between is noticed at the next use.
        let mut stamp = Stamp::of(&path);
        let bad = |reason: String| KeyError::File { path: path.clone(), reason };
        let mut file = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice::<AtespaceFile>(&text)
                .map_err(|error| bad(format!("{error}: restore it from its backup")))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                AtespaceFile { versions: BTreeMap::new() }
            }
            Err(error) => return Err(durable::at("read", &path)(error).into()),
        };
        let mut keys = BTreeMap::new();
        for (version, sealed) in &file.versions {
            let key = hex::decode(sealed)
                .ok()
                .and_then(|sealed| open(&self.master, &Self::context(atespace, *version), &sealed))
                .ok_or_else(|| {
                    bad(format!(
                        "version {version} does not open with master.key: restore both from one backup"
                    ))
                })?;
            keys.insert(*version, key);
        }
        if wanted == Add::One || wanted == Add::First && keys.is_empty() {
            let version = keys.last_key_value().map_or(1, |(last, _)| last + 1);
            let key = DataKey::random()?.0;
            let sealed = seal(&self.master, &Self::context(atespace, version), &key)?;
            file.versions.insert(version, hex::encode(sealed));
            let text = serde_json::to_vec_pretty(&file).map_err(|error| bad(error.to_string()))?;
            // Durable before anything is wrapped with it.
            durable::write(&path, &text, 0o600)?;
            keys.insert(version, key);
            stamp = Stamp::of(&path);
        }
        if !keys.is_empty() {
            opened.insert(atespace.to_owned(), (stamp, keys.clone()));
        }
        Ok(keys)
    }

    fn lock(&self) -> Result<Flock<std::fs::File>, KeyError> {
        let path = self.dir.join("lock");
        let file = std::fs::File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(durable::at("open", &path))?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, error)| durable::at("lock", &path)(error.into()).into())
    }
}

#[async_trait]
impl KeyStore for FileKeyStore {
    async fn wrap(&self, atespace: &str, context: &str, key: &DataKey) -> Result<WrappedKey, KeyError> {
        let keys = self.load(atespace, Add::First)?;
        let Some((version, wrapping)) = keys.last_key_value() else {
            return Err(KeyError::NoVersion {
                atespace: atespace.to_owned(),
                version: 1,
                path: self.path(atespace),
            });
        };
        Ok(WrappedKey { version: *version, sealed: seal(wrapping, context.as_bytes(), &key.0)? })
    }

    async fn unwrap(&self, atespace: &str, context: &str, key: &WrappedKey) -> Result<DataKey, KeyError> {
        let keys = self.load(atespace, Add::None)?;
        let wrapping = keys.get(&key.version).ok_or_else(|| KeyError::NoVersion {
            atespace: atespace.to_owned(),
            version: key.version,
            path: self.path(atespace),
        })?;
        open(wrapping, context.as_bytes(), &key.sealed).map(DataKey).ok_or_else(|| KeyError::Mismatch {
            atespace: atespace.to_owned(),
            version: key.version,
            context: context.replace('\0', " "),
        })
    }

    async fn rotate(&self, atespace: &str) -> Result<u32, KeyError> {
        Ok(self.load(atespace, Add::One)?.last_key_value().map_or(0, |(version, _)| *version))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn keys_survive_a_restart_and_open_only_what_they_were_for() {
        let dir = tempfile::tempdir().unwrap();
        let key = DataKey::random().unwrap();
        let wrapped = {
            let store = FileKeyStore::open(dir.path()).unwrap();
            store.wrap("blue", "snapshot 1", &key).await.unwrap()
        };
        let store = FileKeyStore::open(dir.path()).unwrap();
        assert_eq!(store.unwrap("blue", "snapshot 1", &wrapped).await.unwrap().0, key.0);
        let error = store.unwrap("red", "snapshot 1", &wrapped).await.unwrap_err();
        assert!(matches!(error, KeyError::NoVersion { .. }), "{error}");
        store.wrap("red", "snapshot 1", &key).await.unwrap();
        for (atespace, context) in [("blue", "snapshot 2"), ("red", "snapshot 1")] {
            let error = store.unwrap(atespace, context, &wrapped).await.unwrap_err();
            assert!(matches!(error, KeyError::Mismatch { .. }), "{error}");
        }
        let mut bent = wrapped.clone();
        *bent.sealed.last_mut().unwrap() ^= 1;
        assert!(store.unwrap("blue", "snapshot 1", &bent).await.is_err());
        for path in ["master.key", "atespaces/blue.key"] {
            let path = dir.path().join(path);
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            let text = std::fs::read(&path).unwrap();
            assert!(!text.windows(32).any(|part| part == key.0));
        }
    }

    #[tokio::test]
    async fn rotation_keeps_what_older_versions_wrapped() {
        let dir = tempfile::tempdir().unwrap();
        let store = FileKeyStore::open(dir.path()).unwrap();
        let key = DataKey::random().unwrap();
        let old = store.wrap("blue", "s", &key).await.unwrap();
        assert_eq!(store.rotate("blue").await.unwrap(), 2);
        let new = store.wrap("blue", "s", &key).await.unwrap();
        assert_eq!((old.version, new.version), (1, 2));
        let store = FileKeyStore::open(dir.path()).unwrap();
        assert_eq!(store.unwrap("blue", "s", &old).await.unwrap().0, key.0);
        assert_eq!(store.unwrap("blue", "s", &new).await.unwrap().0, key.0);
        // Another process rotates: this one uses the new version from then on.
        assert_eq!(FileKeyStore::open(dir.path()).unwrap().rotate("blue").await.unwrap(), 3);
        let newest = store.wrap("blue", "s", &key).await.unwrap();
        assert_eq!(newest.version, 3);
        assert_eq!(store.rotate("blue").await.unwrap(), 4);
        assert_eq!(store.unwrap("blue", "s", &newest).await.unwrap().0, key.0);
        std::fs::remove_file(dir.path().join("atespaces/blue.key")).unwrap();
        let lost = FileKeyStore::open(dir.path()).unwrap();
        assert!(matches!(lost.unwrap("blue", "s", &old).await, Err(KeyError::NoVersion { .. })));
        assert!(!dir.path().join("atespaces/blue.key").exists(), "a lost key was replaced");
        let unknown = WrappedKey { version: 5, ..new };
        assert!(matches!(store.unwrap("blue", "s", &unknown).await, Err(KeyError::NoVersion { .. })));
        assert!(matches!(store.wrap("../up", "s", &key).await, Err(KeyError::Atespace(_))));
    }

    #[test]
    fn a_master_key_that_others_may_read_or_that_changed_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = FileKeyStore::open(dir.path()).unwrap();
        store.load("blue", Add::First).unwrap();
        let path = dir.path().join("master.key");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(FileKeyStore::open(dir.path()).unwrap_err().to_string().contains("chmod"));
        durable::write(&path, hex::encode([7; 32]).as_bytes(), 0o600).unwrap();
        let error = FileKeyStore::open(dir.path()).unwrap().load("blue", Add::First).unwrap_err();
        assert!(error.to_string().contains("does not open with master.key"), "{error}");
    }
}
