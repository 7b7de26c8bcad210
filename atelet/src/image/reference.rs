// SPDX-License-Identifier: Apache-2.0
//! What an image is called.
//!
//! | Form | Where the image is |
//! |---|---|
//! | `registry/repo@sha256:…` | in a registry, pinned |
//! | `registry/repo:tag` | in a registry, resolved when it is asked for |
//! | `oci:/dir[:tag]`, `oci:/dir@sha256:…` | in an OCI image layout directory on this machine |
//! | `oci-archive:/file.tar[:tag]`, `…@sha256:…` | in a tar file of such a layout |
//!
//! Where a tag and a digest are given the digest decides. The registry is always named: a short name would mean
//! whatever registry a machine happens to be configured with. In the local forms the path ends at the first `:`, as
//! in containers-transports(5), so that tags may contain colons and slashes.
use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::ImageError;

/// Longest reference taken, bytes.
const MAX_REFERENCE: usize = 4096;
/// Longest tag, from the OCI distribution specification.
const MAX_TAG: usize = 128;

/// A sha256 content address; prints as `sha256:<64 hex digits>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// The digest of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self::from_hash(sha2::Sha256::digest(bytes).into())
    }

    /// The digest with this value.
    pub fn from_hash(hash: [u8; 32]) -> Self {
        Self(hex::encode(hash))
    }

    /// The 64 lower-case hex digits, safe as a file name.
    pub fn hex(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

impl FromStr for Digest {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        let bad =
            |reason: &str| ImageError::BadDigest { digest: shorten(text).into(), reason: reason.into() };
        let Some((algorithm, value)) = text.split_once(':') else {
            return Err(bad("it has no algorithm in front"));
        };
        if algorithm != "sha256" {
            return Err(bad("only sha256 is supported"));
        }
        if value.len() != 64 {
            return Err(bad("sha256 has 64 hex digits"));
        }
        if !value.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
            return Err(bad("it has characters other than 0-9 and a-f"));
        }
        Ok(Self(value.to_owned()))
    }
}

impl TryFrom<String> for Digest {
    type Error = ImageError;

    fn try_from(text: String) -> Result<Self, ImageError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// A repository in a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repository {
    /// `host[:port]` as written, e.g. `docker.io`.
    pub registry: String,
    /// Path of the repository, e.g. `library/python`.
    pub path: String,
}

impl Repository {
    /// `host[:port]` that is really dialled: the name `docker.io` stands for another host.
    pub fn host(&self) -> &str {
        if self.registry == "docker.io" { "registry-1.docker.io" } else { &self.registry }
    }

    /// Whether the registry is on this machine, the only place where plain HTTP is spoken.
    pub fn is_loopback(&self) -> bool {
        is_loopback(&self.registry)
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.path)
    }
}

/// Whether `host[:port]` names this machine by `localhost`, `127.0.0.1` or `[::1]`.
pub(crate) fn is_loopback(authority: &str) -> bool {
    let host = if authority.starts_with('[') {
        authority.split_inclusive(']').next().unwrap_or(authority)
    } else {
        authority.split(':').next().unwrap_or(authority)
    };
    matches!(host, "localhost" | "127.0.0.1" | "[::1]")
}

/// Where an image comes from, without which one it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Source {
    /// A registry.
    Registry(Repository),
    /// An OCI image layout directory.
    Layout(PathBuf),
    /// A tar file of an OCI image layout.
    Archive(PathBuf),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(repository) => repository.fmt(f),
            Self::Layout(path) => write!(f, "oci:{}", path.display()),
            Self::Archive(path) => write!(f, "oci-archive:{}", path.display()),
        }
    }
}

/// A parsed image reference; prints as it was written, with the digest alone where both were given.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// Where the image is.
    pub source: Source,
    /// The tag; none in a layout that holds one image, or where a digest is given.
    pub tag: Option<String>,
    /// The digest of a manifest or index.
    pub digest: Option<Digest>,
}

impl Reference {
    /// The digest of a reference that must have one.
    ///
    /// # Errors
    /// [`ImageError::Unpinned`] where there is none.
    pub fn pinned(&self) -> Result<&Digest, ImageError> {
        self.digest.as_ref().ok_or_else(|| ImageError::Unpinned { reference: self.to_string() })
    }

    /// The same image by digest.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { source: self.source.clone(), tag: None, digest: Some(digest) }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)?;
        match (&self.digest, &self.tag) {
            (Some(digest), _) => write!(f, "@{digest}"),
            (None, Some(tag)) => write!(f, ":{tag}"),
            (None, None) => Ok(()),
        }
    }
}

impl FromStr for Reference {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        let bad = |reason: String| ImageError::BadReference { reference: shorten(text).into(), reason };
        if text.is_empty() {
            return Err(bad("it is empty".into()));
        }
        if text.len() > MAX_REFERENCE {
            return Err(bad(format!("it has {} bytes, at most {MAX_REFERENCE} are allowed", text.len())));
        }
        if text.bytes().any(|byte| byte.is_ascii_control() || byte == b' ') {
            return Err(bad("it contains a space or a control character".into()));
        }
        let (name, digest) = match text.rsplit_once('@') {
            Some((name, digest)) => (name, Some(digest.parse()?)),
            None => (text, None),
        };
        if let Some(rest) = name.strip_prefix("oci:") {
            let (path, tag) = local(rest).map_err(bad)?;
            return Ok(Self { source: Source::Layout(path), tag: unless(digest.as_ref(), tag), digest });
        }
        if let Some(rest) = name.strip_prefix("oci-archive:") {
            let (path, tag) = local(rest).map_err(bad)?;
            return Ok(Self { source: Source::Archive(path), tag: unless(digest.as_ref(), tag), digest });
        }
        let (repository, tag) = registry(name).map_err(bad)?;
        if digest.is_none() && tag.is_none() {
            return Err(bad("it names neither a tag nor a digest: append `:TAG` or `@sha256:…`".into()));
        }
        Ok(Self { source: Source::Registry(repository), tag: unless(digest.as_ref(), tag), digest })
    }
}

/// The digest decides where both are given; keeping the tag would make two names for one pinned image.
fn unless(digest: Option<&Digest>, tag: Option<String>) -> Option<String> {
    if digest.is_some() { None } else { tag }
}

/// The first part of a text that someone else wrote, for messages.
pub(super) fn shorten(text: &str) -> &str {
    let end = text.char_indices().nth(200).map_or(text.len(), |(index, _)| index);
    &text[..end]
}

fn local(rest: &str) -> Result<(PathBuf, Option<String>), String> {
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    if !path.starts_with('/') {
        return Err("the path of a local image must be absolute".into());
    }
    if tag.is_some_and(str::is_empty) {
        return Err("the tag after `:` is empty".into());
    }
    let path = Path::new(path);
    if path.components().any(|part| matches!(part, Component::ParentDir)) {
        return Err("the path of a local image must not contain `..`".into());
    }
    // Without trailing or doubled slashes, so that one place has one name.
    Ok((path.components().collect(), tag.map(str::to_owned)))
}

fn registry(name: &str) -> Result<(Repository, Option<String>), String> {
    let named =
        |head: &str| head.contains('.') || head.contains(':') || head == "localhost" || head.starts_with('[');
    let (registry, rest) = match name.split_once('/') {
        Some((head, rest)) if named(head) => (head, rest),
        Some(_) => return Err(format!("it does not name its registry: write `docker.io/{name}` or another")),
        None => {
            return Err(format!(
                "it does not name its registry: write `docker.io/library/{name}` or another"
            ));
        }
    };
    if !valid_authority(registry) {
        return Err(format!("`{registry}` is not a host name with an optional port"));
    }
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    if let Some(tag) = tag
        && !valid_tag(tag)
    {
        return Err(format!("`{tag}` is not a tag: up to {MAX_TAG} of letters, digits, `_`, `.` and `-`"));
    }
    if !valid_repository(path) {
        return Err(format!("`{path}` is not a repository name: lower-case letters, digits, `.`, `_`, `-`"));
    }
    let path =
        if registry == "docker.io" && !path.contains('/') { format!("library/{path}") } else { path.into() };
    Ok((Repository { registry: registry.into(), path }, tag.map(str::to_owned)))
}

fn valid_authority(authority: &str) -> bool {
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let Some((address, after)) = rest.split_once(']') else { return false };
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return false;
        }
        match after.strip_prefix(':') {
            Some(port) => ("v6", Some(port)),
            None if after.is_empty() => ("v6", None),
            None => return false,
        }
    } else {
        match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        }
    };
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    host.len() <= 253
        && host.split('.').all(label)
        && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port != 0))
}

fn valid_tag(tag: &str) -> bool {
    tag.len() <= MAX_TAG
        && tag.starts_with(|first: char| first.is_ascii_alphanumeric() || first == '_')
        && tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

fn valid_repository(path: &str) -> bool {
    let component = |part: &str| {
        part.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte))
            && part.starts_with(|first: char| first.is_ascii_alphanumeric())
            && part.ends_with(|last: char| last.is_ascii_alphanumeric())
    };
    !path.is_empty() && path.len() <= 255 && path.split('/').all(component)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "a948904f2f0f479b8f8197694b30184b0d2ed1c1cd2a1ec0fb85d299a192a447";

    fn parse(text: &str) -> Result<Reference, String> {
        text.parse::<Reference>().map_err(|error| error.to_string())
    }

    #[test]
    fn every_form_is_read_and_printed_back() {
        for text in [
            "ghcr.io/nvidia/agent:1.2",
            "localhost:5000/a/b:latest",
            "[::1]:5000/a:x",
            "oci:/var/images/counter",
            "oci:/var/images/counter:latest",
            "oci:/var/images/counter:with/slash:and-colon",
            "oci-archive:/tmp/a.tar",
            "oci-archive:/tmp/a.tar:v1",
        ] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
        for name in ["ghcr.io/a/b", "oci:/dir", "oci-archive:/a.tar"] {
            let text = format!("{name}@sha256:{HEX}");
            let reference = parse(&text).unwrap();
            assert_eq!(reference.to_string(), text);
            assert_eq!(reference.pinned().unwrap().hex(), HEX);
        }
    }

    #[test]
    fn the_digest_decides_over_the_tag() {
        let reference = parse(&format!("ghcr.io/a/b:v1@sha256:{HEX}")).unwrap();
        assert_eq!(reference, parse(&format!("ghcr.io/a/b@sha256:{HEX}")).unwrap());
    }

    #[test]
    fn docker_hub_has_its_own_host_and_library() {
        let Source::Registry(repository) = parse("docker.io/python:3.12").unwrap().source else { panic!() };
        assert_eq!(repository.path, "library/python");
        assert_eq!(repository.host(), "registry-1.docker.io");
    }

    #[test]
    fn one_place_has_one_name() {
        assert_eq!(parse("oci:/a//b/").unwrap().source, parse("oci:/a/b").unwrap().source);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, says) in [
            ("", "empty"),
            ("python:3.12", "docker.io/library/python:3.12"),
            ("nvidia/agent:1", "docker.io/nvidia/agent:1"),
            ("ghcr.io/a/b", "neither a tag nor a digest"),
            ("ghcr.io/a/B:x", "not a repository name"),
            ("ghcr.io/a/../b:x", "not a repository name"),
            ("ghcr.io/a//b:x", "not a repository name"),
            ("ghcr.io/a:-x", "not a tag"),
            ("ghcr.io:99999/a:x", "host name with an optional port"),
            ("-bad.io/a:x", "host name"),
            ("[::zz]/a:x", "host name"),
            ("oci:relative", "absolute"),
            ("oci:/a/../b", "`..`"),
            ("oci:/a:", "tag after `:` is empty"),
            ("ghcr.io/a b:x", "space"),
            ("ghcr.io/a@sha256:12", "64 hex digits"),
            ("ghcr.io/a@sha512:12", "only sha256"),
            ("ghcr.io/a@12", "no algorithm"),
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(says), "{text}: {message}");
        }
        let upper = format!("ghcr.io/a@sha256:{}", HEX.to_uppercase());
        assert!(parse(&upper).unwrap_err().contains("0-9 and a-f"));
        assert!(parse(&"x".repeat(5000)).unwrap_err().contains("5000 bytes"));
        assert!(matches!(parse("oci:/dir:tag").unwrap().pinned(), Err(ImageError::Unpinned { .. })));
    }

    #[test]
    fn loopback_is_told_from_names_that_look_like_it() {
        for yes in ["localhost", "localhost:5000", "127.0.0.1:80", "[::1]:5000"] {
            assert!(is_loopback(yes), "{yes}");
        }
        for no in ["localhost.example:80", "127.0.0.1.example", "[::2]:80", "10.0.0.1"] {
            assert!(!is_loopback(no), "{no}");
        }
    }
}
