// SPDX-License-Identifier: Apache-2.0
//! Bearer tokens of the ingress router: JWTs signed with Ed25519.
//!
//! A token names one atespace and perhaps one actor of it (P6); whoever holds it may send requests there and so
//! wake what sleeps. The router needs only the public key. A public key file may hold several PEM blocks, so that a
//! key can be replaced while tokens of the old one still circulate.
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{EncodePrivateKey as _, EncodePublicKey as _};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use rand::TryRngCore as _;
use serde::{Deserialize, Serialize};

/// The `aud` claim of every token.
pub const AUDIENCE: &str = "substrate-ingress";
/// Longest token that is looked at, bytes.
pub const MAX_TOKEN: usize = 4096;
/// Name of the router's key pair.
const INGRESS: &str = "ingress";

/// Why a key or token could not be made, read or accepted.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The system's random source failed.
    #[error("cannot draw a key: the system's random source failed: {0}")]
    Random(String),
    /// A key file could not be read or written.
    #[error("cannot use the ingress key file {path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// One of the two files of a key pair is missing.
    #[error(
        "{missing} is missing beside {present}: restore it, or remove {present} so that a new pair is made (tokens of the old one end)"
    )]
    Half {
        /// The file that is not there.
        missing: PathBuf,
        /// The file that is.
        present: PathBuf,
    },
    /// Not an Ed25519 key in PEM.
    #[error("{what} is not an Ed25519 key in PEM: {reason}")]
    BadKey {
        /// Which key.
        what: String,
        /// What the decoder said.
        reason: String,
    },
    /// The token could not be signed.
    #[error("cannot sign the token: {0}")]
    Sign(String),
    /// Not a token of ours, or one that no longer holds.
    #[error("the token is not accepted: {0}")]
    Refused(String),
}

/// A fresh key pair in PEM.
pub struct KeyPair {
    /// PKCS#8. Keep it 0600.
    pub private_pem: String,
    /// SubjectPublicKeyInfo.
    pub public_pem: String,
}

/// Where the two files of a key pair are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyFiles {
    /// PKCS#8 PEM, 0600.
    pub private: PathBuf,
    /// Public PEM, what [`crate::ingress::Config::public_key`] wants.
    pub public: PathBuf,
}

/// What a token permits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The atespace whose actors may be asked.
    pub atespace: String,
    /// Only this actor of it.
    pub actor: Option<String>,
}

impl Grant {
    /// Whether a request to this actor is permitted.
    pub fn permits(&self, atespace: &str, actor: &str) -> bool {
        self.atespace == atespace && self.actor.as_deref().is_none_or(|only| only == actor)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    aud: String,
    atespace: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    actor: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    exp: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    iat: Option<u64>,
}

/// Draws a key pair.
///
/// # Errors
/// When the system's random source fails.
pub fn generate_key_pair() -> Result<KeyPair, TokenError> {
    let mut secret = [0_u8; 32];
    rand::rngs::OsRng.try_fill_bytes(&mut secret).map_err(|error| TokenError::Random(error.to_string()))?;
    let key = ed25519_dalek::SigningKey::from_bytes(&secret);
    let bad = |reason: String| TokenError::BadKey { what: "the drawn key".into(), reason };
    let private_pem = key.to_pkcs8_pem(LineEnding::LF).map_err(|error| bad(error.to_string()))?.to_string();
    let public_pem =
        key.verifying_key().to_public_key_pem(LineEnding::LF).map_err(|error| bad(error.to_string()))?;
    Ok(KeyPair { private_pem, public_pem })
}

/// Makes the key pair of a directory (`ingress.key` 0600, `ingress.pub`) unless it is there, and says where it is.
///
/// # Errors
/// When a file cannot be read or written, or only one of the two exists.
pub fn ensure_key_pair(dir: &Path) -> Result<KeyFiles, TokenError> {
    ensure_key_pair_named(dir, INGRESS)
}

/// Likewise for the key pair of another purpose (`NAME.key` 0600, `NAME.pub`).
///
/// # Errors
/// As [`ensure_key_pair`].
pub fn ensure_key_pair_named(dir: &Path, name: &str) -> Result<KeyFiles, TokenError> {
    let files =
        KeyFiles { private: dir.join(format!("{name}.key")), public: dir.join(format!("{name}.pub")) };
    match (files.private.exists(), files.public.exists()) {
        (true, true) => return Ok(files),
        // The private key is written first: alone it can be completed.
        (true, false) => {
            let pem = std::fs::read_to_string(&files.private)
                .map_err(|source| TokenError::File { path: files.private.clone(), source })?;
            let key =
                <ed25519_dalek::SigningKey as ed25519_dalek::pkcs8::DecodePrivateKey>::from_pkcs8_pem(&pem)
                    .map_err(|error| TokenError::BadKey {
                    what: files.private.display().to_string(),
                    reason: error.to_string(),
                })?;
            let public = key.verifying_key().to_public_key_pem(LineEnding::LF).map_err(|error| {
                TokenError::BadKey { what: files.private.display().to_string(), reason: error.to_string() }
            })?;
            write_whole(&files.public, public.as_bytes(), 0o644)?;
            return Ok(files);
        }
        (false, true) => {
            return Err(TokenError::Half { missing: files.private, present: files.public });
        }
        (false, false) => {}
    }
    let pair = generate_key_pair()?;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| TokenError::File { path: dir.to_owned(), source })?;
    write_whole(&files.private, pair.private_pem.as_bytes(), 0o600)?;
    write_whole(&files.public, pair.public_pem.as_bytes(), 0o644)?;
    Ok(files)
}

fn write_whole(path: &Path, content: &[u8], mode: u32) -> Result<(), TokenError> {
    let file = |source| TokenError::File { path: path.to_owned(), source };
    let part = path.with_extension("part");
    match std::fs::remove_file(&part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(file(error)),
        _ => {}
    }
    let mut out =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&part).map_err(file)?;
    out.write_all(content).and_then(|()| out.sync_all()).map_err(file)?;
    std::fs::rename(&part, path).map_err(file)?;
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(file)
}

/// Signs a token. `lifetime` `None`: it does not expire.
///
/// # Errors
/// When the key is not an Ed25519 key in PKCS#8 PEM.
pub fn mint(private_pem: &str, grant: &Grant, lifetime: Option<Duration>) -> Result<String, TokenError> {
    let key = EncodingKey::from_ed_pem(private_pem.as_bytes()).map_err(|error| TokenError::BadKey {
        what: "the private key of ingress".into(),
        reason: error.to_string(),
    })?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let claims = Claims {
        aud: AUDIENCE.into(),
        atespace: grant.atespace.clone(),
        actor: grant.actor.clone(),
        exp: lifetime.map(|lifetime| now.saturating_add(lifetime.as_secs())),
        iat: Some(now),
    };
    jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), &claims, &key)
        .map_err(|error| TokenError::Sign(error.to_string()))
}

/// Checks tokens against one or more public keys.
pub struct Verifier {
    keys: Vec<DecodingKey>,
    validation: Validation,
}

impl Verifier {
    /// Reads a file of one or more public keys in PEM.
    ///
    /// # Errors
    /// When the file cannot be read or holds anything but Ed25519 public keys.
    pub fn from_file(path: &Path) -> Result<Self, TokenError> {
        let pem = std::fs::read_to_string(path)
            .map_err(|source| TokenError::File { path: path.to_owned(), source })?;
        Self::from_pem(&pem, &path.display().to_string())
    }

    /// Reads one or more public keys in PEM; `what` names them in errors.
    ///
    /// # Errors
    /// When there is none, or one is not an Ed25519 public key.
    pub fn from_pem(pem: &str, what: &str) -> Result<Self, TokenError> {
        const END: &str = "-----END PUBLIC KEY-----";
        let bad = |reason: String| TokenError::BadKey { what: what.to_owned(), reason };
        let mut keys = Vec::new();
        let mut rest = pem;
        while let Some(at) = rest.find(END) {
            let (block, after) = rest.split_at(at + END.len());
            keys.push(DecodingKey::from_ed_pem(block.as_bytes()).map_err(|error| bad(error.to_string()))?);
            rest = after;
        }
        if keys.is_empty() {
            return Err(bad("it holds no \"BEGIN PUBLIC KEY\" block".into()));
        }
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_audience(&[AUDIENCE]);
        validation.set_required_spec_claims(&["aud"]);
        validation.validate_exp = true;
        validation.validate_nbf = true;
        validation.leeway = 5;
        Ok(Self { keys, validation })
    }

    /// What the token permits.
    ///
    /// # Errors
    /// [`TokenError::Refused`] with the reason: not a JWT, another key, audience or algorithm, expired.
    pub fn verify(&self, token: &str) -> Result<Grant, TokenError> {
        if token.len() > MAX_TOKEN {
            return Err(TokenError::Refused(format!("it is longer than {MAX_TOKEN} bytes")));
        }
        let mut reason = String::new();
        for key in &self.keys {
            match jsonwebtoken::decode::<Claims>(token, key, &self.validation) {
                Ok(data) if data.claims.atespace.is_empty() => {
                    return Err(TokenError::Refused("its claim \"atespace\" is empty".into()));
                }
                Ok(data) => {
                    return Ok(Grant { atespace: data.claims.atespace, actor: data.claims.actor });
                }
                Err(error) => reason = refusal(&error),
            }
        }
        Err(TokenError::Refused(reason))
    }
}

fn refusal(error: &jsonwebtoken::errors::Error) -> String {
    use jsonwebtoken::errors::ErrorKind;
    match error.kind() {
        ErrorKind::ExpiredSignature => "it has expired".into(),
        ErrorKind::InvalidSignature => "it was signed with another key".into(),
        ErrorKind::InvalidAudience => format!("its audience is not {AUDIENCE:?}"),
        ErrorKind::InvalidAlgorithm => "it is not signed with EdDSA".into(),
        ErrorKind::Json(_) => {
            "a claim is missing or of the wrong type; it needs \"aud\" and \"atespace\"".into()
        }
        ErrorKind::ImmatureSignature => "it does not hold yet".into(),
        _ => format!("it is not a JWT of this router ({error})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant() -> Grant {
        Grant { atespace: "team".into(), actor: None }
    }

    #[test]
    fn a_minted_token_is_accepted_until_it_expires() {
        let pair = generate_key_pair().unwrap();
        let verifier = Verifier::from_pem(&pair.public_pem, "k").unwrap();
        let token = mint(&pair.private_pem, &grant(), None).unwrap();
        assert_eq!(verifier.verify(&token).unwrap(), grant());
        let one = Grant { atespace: "team".into(), actor: Some("alice".into()) };
        let token = mint(&pair.private_pem, &one, Some(Duration::from_mins(1))).unwrap();
        assert_eq!(verifier.verify(&token).unwrap(), one);
        assert!(
            one.permits("team", "alice") && !one.permits("team", "bob") && !one.permits("other", "alice")
        );

        let key = EncodingKey::from_ed_pem(pair.private_pem.as_bytes()).unwrap();
        let refuse = |claims: serde_json::Value, part: &str| {
            let token = jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), &claims, &key).unwrap();
            let error = verifier.verify(&token).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        refuse(serde_json::json!({"aud": AUDIENCE, "atespace": "team", "exp": 1}), "expired");
        refuse(serde_json::json!({"aud": "other", "atespace": "team"}), "audience");
        refuse(serde_json::json!({"atespace": "team"}), "claim");
        refuse(serde_json::json!({"aud": AUDIENCE}), "atespace");
        refuse(serde_json::json!({"aud": AUDIENCE, "atespace": ""}), "empty");
    }

    #[test]
    fn other_keys_and_algorithms_are_refused_and_old_keys_can_stay() {
        let old = generate_key_pair().unwrap();
        let new = generate_key_pair().unwrap();
        let token = mint(&old.private_pem, &grant(), None).unwrap();
        let only_new = Verifier::from_pem(&new.public_pem, "k").unwrap();
        assert!(only_new.verify(&token).unwrap_err().to_string().contains("another key"));
        let both = Verifier::from_pem(&format!("{}{}", new.public_pem, old.public_pem), "k").unwrap();
        assert_eq!(both.verify(&token).unwrap(), grant());
        let hmac = jsonwebtoken::encode(
            &Header::new(Algorithm::HS256),
            &serde_json::json!({"aud": AUDIENCE, "atespace": "team"}),
            &EncodingKey::from_secret(new.public_pem.as_bytes()),
        )
        .unwrap();
        assert!(only_new.verify(&hmac).is_err(), "a public key must not serve as an HMAC secret");
        assert!(only_new.verify(&"x".repeat(MAX_TOKEN + 1)).is_err());
        assert!(Verifier::from_pem("nothing", "k").is_err());
    }

    #[test]
    fn a_key_pair_is_made_once_and_completed_after_a_crash() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let keys = dir.path().join("keys");
        let files = ensure_key_pair(&keys).unwrap();
        let private = std::fs::read_to_string(&files.private).unwrap();
        let public = std::fs::read_to_string(&files.public).unwrap();
        assert_eq!(std::fs::metadata(&files.private).unwrap().permissions().mode() & 0o777, 0o600);
        ensure_key_pair(&keys).unwrap();
        assert_eq!(std::fs::read_to_string(&files.private).unwrap(), private);
        std::fs::remove_file(&files.public).unwrap();
        ensure_key_pair(&keys).unwrap();
        assert_eq!(std::fs::read_to_string(&files.public).unwrap(), public);
        std::fs::remove_file(&files.private).unwrap();
        assert!(matches!(ensure_key_pair(&keys), Err(TokenError::Half { .. })));
    }
}
