// SPDX-License-Identifier: Apache-2.0
//! Bearer tokens of the control plane: JWTs signed with Ed25519 (`aud`, `sub` and `exp` are required).
use std::path::{Path, PathBuf};
use std::time::Duration;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use substrate_proto::tls::Stamp;

use super::{AccessError, Identity, names_an_actor, unix_seconds};

/// The `aud` claim of every token.
pub const AUDIENCE: &str = "substrate-control";
/// Longest token that is looked at, bytes.
const MAX_TOKEN: usize = 4096;
/// Difference of clocks that is put up with, s.
const LEEWAY: u64 = 5;

#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    aud: String,
    sub: String,
    exp: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    iat: Option<i64>,
    /// Says that this is the identity of a workload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    actor: Option<String>,
}

/// Signs a token for a subject (without `token:`).
pub fn mint(private_pem: &str, subject: &str, lifetime: Duration) -> Result<String, String> {
    let key = EncodingKey::from_ed_pem(private_pem.as_bytes())
        .map_err(|error| format!("the private key is not an Ed25519 key in PKCS#8 PEM: {error}"))?;
    let now = unix_seconds();
    let claims = Claims {
        aud: AUDIENCE.to_owned(),
        sub: subject.to_owned(),
        exp: now.saturating_add(i64::try_from(lifetime.as_secs()).unwrap_or(i64::MAX)),
        iat: Some(now),
        actor: None,
    };
    jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), &claims, &key).map_err(|error| error.to_string())
}

/// Checks tokens against the keys of a file, which is read anew when it changes.
pub(super) struct Verifier {
    path: PathBuf,
    stamp: Stamp,
    keys: Vec<DecodingKey>,
    validation: Validation,
}

impl Verifier {
    pub(super) fn open(path: &Path) -> Result<Self, AccessError> {
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_audience(&[AUDIENCE]);
        validation.set_required_spec_claims(&["aud", "sub", "exp"]);
        validation.validate_nbf = true;
        validation.leeway = LEEWAY;
        let stamp = Stamp::of(&[path]);
        Ok(Self { keys: read(path)?, path: path.to_owned(), stamp, validation })
    }

    /// Who a token names.
    pub(super) fn verify(&mut self, token: &str) -> Result<Identity, String> {
        self.refresh();
        if token.len() > MAX_TOKEN {
            return Err(format!("it is longer than {MAX_TOKEN} bytes"));
        }
        let mut reason = String::new();
        for key in &self.keys {
            match jsonwebtoken::decode::<Claims>(token, key, &self.validation) {
                Ok(data) if data.claims.sub.is_empty() => return Err("its claim \"sub\" is empty".to_owned()),
                Ok(data) => {
                    let name = format!("token:{}", data.claims.sub);
                    let of_a_workload = data.claims.actor.is_some() || names_an_actor(&data.claims.sub);
                    return Ok(if of_a_workload { Identity::Actor(name) } else { Identity::Named(name) });
                }
                Err(error) => reason = explain(&error),
            }
        }
        Err(reason)
    }

    fn refresh(&mut self) {
        let now = Stamp::of(&[&self.path]);
        if now == self.stamp {
            return;
        }
        match read(&self.path) {
            Ok(keys) => {
                tracing::info!(file = %self.path.display(), keys = keys.len(), "token keys read anew");
                self.keys = keys;
            }
            Err(error) => tracing::error!(%error, "the new token keys cannot be used; the former ones stay"),
        }
        // Also when it was bad: it is looked at again when it changes again.
        self.stamp = now;
    }
}

fn read(path: &Path) -> Result<Vec<DecodingKey>, AccessError> {
    const END: &str = "-----END PUBLIC KEY-----";
    let wrong = |reason: String| AccessError::File { what: "token keys", path: path.to_owned(), reason };
    let pem = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let mut keys = Vec::new();
    let mut rest = pem.as_str();
    while let Some(at) = rest.find(END) {
        let (block, after) = rest.split_at(at + END.len());
        let key = DecodingKey::from_ed_pem(block.as_bytes());
        keys.push(key.map_err(|error| wrong(format!("holds no Ed25519 public key: {error}")))?);
        rest = after;
    }
    if keys.is_empty() {
        return Err(wrong("holds no \"BEGIN PUBLIC KEY\" block".to_owned()));
    }
    Ok(keys)
}

fn explain(error: &jsonwebtoken::errors::Error) -> String {
    match error.kind() {
        ErrorKind::ExpiredSignature => "it has expired".to_owned(),
        ErrorKind::InvalidSignature => "it was signed with another key".to_owned(),
        ErrorKind::InvalidAudience => format!("its audience is not {AUDIENCE:?}"),
        ErrorKind::InvalidAlgorithm => "it is not signed with EdDSA".to_owned(),
        ErrorKind::MissingRequiredClaim(claim) => format!("its claim {claim:?} is missing"),
        ErrorKind::ImmatureSignature => "it does not hold yet".to_owned(),
        _ => format!("it is not a JWT of this control plane ({error})"),
    }
}
