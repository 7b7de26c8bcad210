// SPDX-License-Identifier: Apache-2.0
//! Who an atespace is to a registry.
//!
//! Credentials come from one JSON file of the administrator, in the form that `docker login` writes, per atespace:
//!
//! ```json
//! {
//!   "team-a": {"auths": {"ghcr.io": {"username": "a", "password": "…"}}},
//!   "*":      {"auths": {"registry.example:5000": {"auth": "dXNlcjpwYXNz"}}}
//! }
//! ```
//!
//! `"*"` holds for every atespace that has no entry of its own for that registry: what it can pull, all can. An entry
//! has `auth` (base64 of `user:password`), or `username` and `password`, or `identitytoken` (a refresh token for the
//! registry's token service). The file is read again whenever a registry asks for credentials, so a change needs no
//! restart. Nothing of it is ever printed.
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use serde::Deserialize;

use super::error::ImageError;
use super::reference::{Repository, shorten};

/// What to show to one registry.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Login {
    /// User and password.
    Basic { username: String, password: String },
    /// A refresh token for the token service.
    Refresh(String),
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Basic { .. } => "Login::Basic(…)",
            Self::Refresh(_) => "Login::Refresh(…)",
        })
    }
}

impl Login {
    /// The value of an `Authorization` header; none for a refresh token.
    pub fn basic_header(&self) -> Option<String> {
        let Self::Basic { username, password } = self else { return None };
        let pair = base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}"));
        Some(format!("Basic {pair}"))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAtespace {
    #[serde(default)]
    auths: BTreeMap<String, RawAuth>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAuth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    #[serde(default, rename = "email")]
    _email: Option<serde::de::IgnoredAny>,
}

/// The logins of one reading of the file, by atespace and registry.
pub(super) type Logins = HashMap<String, HashMap<String, Login>>;

/// Parses the file.
pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<Logins, ImageError> {
    let bad = |reason: String| ImageError::Credentials { path: path.to_owned(), reason };
    // serde's messages may quote values, so only the place is passed on.
    let file: BTreeMap<String, RawAtespace> = serde_json::from_slice(bytes).map_err(|error| {
        bad(format!(
            "line {}, column {} is not as {{\"ATESPACE\": {{\"auths\": {{\"REGISTRY\": {{\"auth\": …}}}}}}}}",
            error.line(),
            error.column()
        ))
    })?;
    let mut logins = Logins::new();
    for (atespace, entry) in file {
        let of_atespace = logins.entry(atespace.clone()).or_default();
        for (registry, auth) in entry.auths {
            let login = match auth {
                RawAuth { identitytoken: Some(token), .. } if !token.is_empty() => Login::Refresh(token),
                RawAuth { username: Some(username), password: Some(password), .. } => {
                    Login::Basic { username, password }
                }
                RawAuth { auth: Some(pair), .. } => base64::engine::general_purpose::STANDARD
                    .decode(pair.trim())
                    .ok()
                    .and_then(|pair| String::from_utf8(pair).ok())
                    .and_then(|pair| {
                        let (username, password) = pair.split_once(':')?;
                        Some(Login::Basic { username: username.into(), password: password.into() })
                    })
                    .ok_or_else(|| {
                        bad(format!(
                            "`auth` of {registry} for atespace {atespace} is not base64 of user:password"
                        ))
                    })?,
                _ => {
                    return Err(bad(format!(
                        "{registry} of atespace {atespace} has neither `auth` nor `username` and `password` nor \
                         `identitytoken`"
                    )));
                }
            };
            of_atespace.insert(normalize(&registry), login);
        }
    }
    Ok(logins)
}

/// `docker login` writes URLs in places: keys are compared by host and port.
fn normalize(registry: &str) -> String {
    let host = registry.trim_start_matches("https://").trim_start_matches("http://");
    let host = host.split('/').next().unwrap_or(host);
    match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        host => host.to_ascii_lowercase(),
    }
}

/// Reads credentials for atespaces.
#[derive(Debug)]
pub(super) struct Credentials {
    path: Option<PathBuf>,
}

impl Credentials {
    pub fn new(path: Option<PathBuf>) -> Self {
        Self { path }
    }

    /// Where a person would add some, for messages.
    pub fn place(&self) -> String {
        match &self.path {
            Some(path) => path.display().to_string(),
            None => "a credentials file, which this node has none of".into(),
        }
    }

    /// What `atespace` shows to the registry of `repository`; none means anonymous.
    pub async fn login(&self, atespace: &str, repository: &Repository) -> Result<Option<Login>, ImageError> {
        let Some(path) = &self.path else { return Ok(None) };
        let bytes = match tokio::fs::read(path).await {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(ImageError::Credentials { path: path.clone(), reason: error.to_string() });
            }
        };
        let logins = parse(&bytes, path)?;
        let registry = normalize(&repository.registry);
        Ok([atespace, "*"].iter().find_map(|who| logins.get(*who)?.get(&registry)).cloned())
    }
}

/// What a registry asks for in `WWW-Authenticate`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User and password with each request.
    Basic,
    /// A token of the service at `realm`.
    Bearer { realm: String, service: Option<String> },
}

/// Reads the challenges of all `WWW-Authenticate` headers; a token is preferred.
pub(super) fn challenge<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Challenge> {
    let mut found = None;
    for header in headers {
        let Ok(challenges) = http_auth::parse_challenges(header) else {
            tracing::debug!(header = shorten(header), "unreadable WWW-Authenticate");
            continue;
        };
        for challenge in challenges {
            if challenge.scheme.eq_ignore_ascii_case("basic") {
                found.get_or_insert(Challenge::Basic);
            } else if challenge.scheme.eq_ignore_ascii_case("bearer") {
                let param = |name: &str| {
                    let (_, value) =
                        challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name))?;
                    Some(value.to_unescaped())
                };
                if let Some(realm) = param("realm") {
                    return Some(Challenge::Bearer { realm, service: param("service") });
                }
            }
        }
    }
    found
}

/// The answer of a token service.
#[derive(Deserialize)]
pub(super) struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    /// Seconds; the specification's default is 60.
    expires_in: Option<u64>,
}

impl TokenAnswer {
    /// The token and how long it may be used, seconds.
    pub fn into_token(self) -> Option<(String, u64)> {
        let token = self.token.or(self.access_token).filter(|token| !token.is_empty())?;
        Some((token, self.expires_in.unwrap_or(60).clamp(10, 3600)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(registry: &str) -> Repository {
        Repository { registry: registry.into(), path: "a".into() }
    }

    #[tokio::test]
    async fn each_atespace_has_its_own_and_the_star_is_for_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("auth.json");
        let credentials = Credentials::new(Some(path.clone()));
        let login = |atespace: &'static str, registry: &'static str| {
            let credentials = &credentials;
            async move { credentials.login(atespace, &repository(registry)).await }
        };
        assert_eq!(login("a", "ghcr.io").await.unwrap(), None, "a missing file means anonymous");
        let pair = base64::engine::general_purpose::STANDARD.encode("u:p:with:colons");
        let text = serde_json::json!({
            "a": {"auths": {"https://index.docker.io/v1/": {"auth": pair, "email": "x"},
                            "ghcr.io": {"username": "me", "password": "own"}}},
            "*": {"auths": {"GHCR.io": {"username": "all", "password": "shared"},
                            "reg:5000": {"identitytoken": "refresh"}}},
        });
        std::fs::write(&path, text.to_string()).unwrap();
        let basic = |username: &str, password: &str| {
            Some(Login::Basic { username: username.into(), password: password.into() })
        };
        assert_eq!(login("a", "docker.io").await.unwrap(), basic("u", "p:with:colons"));
        assert_eq!(login("a", "ghcr.io").await.unwrap(), basic("me", "own"));
        assert_eq!(login("b", "ghcr.io").await.unwrap(), basic("all", "shared"));
        assert_eq!(login("b", "docker.io").await.unwrap(), None);
        assert_eq!(login("b", "reg:5000").await.unwrap(), Some(Login::Refresh("refresh".into())));
    }

    #[test]
    fn a_bad_file_is_named_and_its_secrets_are_not() {
        for text in [
            r#"{"a": {"auths": {"r": {"password": "hunter2", "username": 7}}}}"#,
            r#"{"a": {"auths": {"r": {"auth": "hunter2!"}}}}"#,
            r#"{"a": {"auths": {"r": {"password": "hunter2"}}}}"#,
            r#"{"a": {"credHelpers": {"r": "hunter2"}}}"#,
        ] {
            let message = parse(text.as_bytes(), Path::new("/etc/auth.json")).unwrap_err().to_string();
            assert!(message.contains("/etc/auth.json") && !message.contains("hunter2"), "{message}");
        }
        let login = Login::Basic { username: "u".into(), password: "hunter2".into() };
        assert!(!format!("{login:?}").contains("hunter2"));
    }

    #[test]
    fn challenges_are_read_as_registries_write_them() {
        let bearer = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a:pull""#;
        assert_eq!(
            challenge([r#"Basic realm="x""#, bearer].into_iter()),
            Some(Challenge::Bearer {
                realm: "https://auth.docker.io/token".into(),
                service: Some("registry.docker.io".into())
            })
        );
        assert_eq!(challenge([r#"basic realm="Registry Realm""#].into_iter()), Some(Challenge::Basic));
        assert_eq!(challenge(["Bearer service=x", "garbage \" here"].into_iter()), None);
        assert_eq!(challenge(["Negotiate"].into_iter()), None);
    }
}
