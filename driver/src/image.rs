// SPDX-License-Identifier: Apache-2.0
//! The form of an image reference. Whether the image exists is for the control plane to find out.
//!
//! Three forms: `oci:/dir[:tag|@digest]` (an OCI layout directory), `oci-archive:/file.tar[:tag]`, and a registry
//! reference `[host[:port]/]path(:tag|@sha256:…)` by the grammar of the OCI distribution specification. A registry
//! reference with neither tag nor digest is refused: nobody could say later which image it was.

/// Checks a reference.
///
/// # Errors
/// What is wrong with it and what to write instead.
pub fn check(reference: &str) -> Result<(), String> {
    let wrong = |problem: &str| Err(format!("image {reference:?} {problem}"));
    if reference.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return wrong("holds white space or control characters");
    }
    for scheme in ["oci:", "oci-archive:"] {
        if let Some(path) = reference.strip_prefix(scheme) {
            return if path.starts_with('/') && path.len() > 1 {
                match path.rsplit_once('@') {
                    Some((_, digest)) if !is_digest(digest) => {
                        wrong("has a malformed digest: write @sha256: and 64 hexadecimal digits")
                    }
                    _ => Ok(()),
                }
            } else {
                wrong("names no absolute path: write oci:/dir:tag or oci-archive:/file.tar")
            };
        }
    }
    if reference.contains("://") {
        return wrong(
            "has a scheme this driver does not know: write registry/repository:tag, oci:/dir or oci-archive:/file",
        );
    }
    let (rest, digest) = match reference.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (reference, None),
    };
    if digest.is_some_and(|digest| !is_digest(digest)) {
        return wrong("has a malformed digest: write @sha256: and 64 hexadecimal digits");
    }
    let (repository, tag) = match rest.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, Some(tag)),
        _ => (rest, None),
    };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return wrong("has a malformed tag: at most 128 letters, digits, '_', '.', '-'");
    }
    let path = match repository.split_once('/') {
        Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => path,
        _ => repository,
    };
    if path.is_empty() || !path.split('/').all(is_path_component) {
        return wrong("is no image reference: write registry/repository:tag in lower case");
    }
    if tag.is_none() && digest.is_none() {
        return wrong("has neither tag nor digest: add :tag or @sha256:…");
    }
    Ok(())
}

/// The digest a reference is pinned to.
pub fn digest(reference: &str) -> Option<&str> {
    reference.rsplit_once('@').map(|(_, digest)| digest).filter(|digest| is_digest(digest))
}

fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(|hex| {
        hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    })
}

fn is_tag(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=128).contains(&bytes.len())
        && (bytes[0].is_ascii_alphanumeric() || bytes[0] == b'_')
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(byte))
}

fn is_path_component(text: &str) -> bool {
    let bytes = text.as_bytes();
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    bytes.first().is_some_and(alphanumeric)
        && bytes.last().is_some_and(alphanumeric)
        && bytes.iter().all(|byte| alphanumeric(byte) || b"._-".contains(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_forms_pass() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for good in [
            "oci:/images/helpdesk:latest",
            "oci:/images/helpdesk",
            "oci-archive:/images/a.tar",
            "registry.example:5000/team/agent:1.2",
            "localhost/agent:x",
            "ghcr.io/nvidia/openshell-community/sandboxes/base:latest",
            "debian:12",
            &format!("registry.example/agent@{digest}"),
            &format!("agent:1@{digest}"),
            &format!("oci:/images/a@{digest}"),
        ] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        assert_eq!(super::digest(&format!("a@{digest}")), Some(digest.as_str()));
    }

    #[test]
    fn other_forms_are_refused_with_the_way_out() {
        for (bad, part) in [
            ("oci:relative", "absolute path"),
            ("oci-archive:", "absolute path"),
            ("docker://x/y:1", "scheme"),
            ("registry.example/agent", "neither tag nor digest"),
            ("Agent:1", "lower case"),
            ("a b:1", "white space"),
            ("agent@sha256:12", "malformed digest"),
            ("agent:t@g", "malformed digest"),
            ("agent:", "malformed tag"),
            ("registry.example/:1", "lower case"),
            (":1", "lower case"),
        ] {
            let problem = check(bad).unwrap_err();
            assert!(problem.contains(part) && problem.contains(bad), "{bad}: {problem}");
        }
    }
}
