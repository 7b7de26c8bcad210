// SPDX-License-Identifier: Apache-2.0
//! Names of OpenShell turned into names of the control plane.
//!
//! The gateway's workspaces and sandbox names may hold what a DNS-1123 label may not. A name that is a label stays as
//! it is; any other becomes `<readable part>-x<20 characters of its SHA-256>`. A label that already has that form is
//! hashed too, so that no plain name can be made to collide with a hashed one. The mapping is only a convenience: the
//! sandbox's own name travels in an annotation, everything is keyed on the id, and [`crate::atespace`] compares the
//! workspace recorded on an atespace before it is used, so even a collision of hashes could not merge two tenants.
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use substrate_proto::types::TemplateSpec;

/// Label on every actor, template and atespace that the driver made.
pub const MANAGED: &str = "openshell.ai/managed";
/// Label with the gateway's id of the sandbox.
pub const SANDBOX_ID: &str = "openshell.ai/sandbox-id";
/// Label of an atespace: the workspace it stands for, see [`label_value`].
pub const WORKSPACE_LABEL: &str = "openshell.ai/workspace";
/// Label of an atespace that a Create made on the way (as opposed to `EnsureWorkspace`).
pub const IMPLICIT: &str = "openshell.ai/implicit";
/// Label of a template that the driver synthesized, and may delete once no actor uses it.
pub const SYNTHESIZED: &str = "openshell.ai/synthesized";
/// Annotation: the sandbox's name exactly as the gateway gave it.
pub const SANDBOX_NAME: &str = "openshell.ai/sandbox-name";
/// Annotation: the workspace exactly as the gateway gave it.
pub const WORKSPACE: &str = "openshell.ai/workspace";
/// Annotation: `pending-<nonce>` from the actor's creation until the Create that made it is sure to succeed, then
/// `done-<nonce>`.
pub const CREATE: &str = "openshell.ai/create";
/// Annotation: digest of the create request, by which a retry is told from another sandbox with the same id.
pub const REQUEST_DIGEST: &str = "openshell.ai/request-digest";
/// Annotation: the generation at which StopSandbox found the actor stopped. Stale once it has woken.
pub const STOPPED: &str = "openshell.ai/stopped";
/// Annotation: a supervisor in the sandbox has a session with the gateway, which the hub keeps.
pub const SESSION: &str = "openshell.ai/session";
/// Annotation: rules of the sandbox's policy that cannot be enforced as written are allowed more broadly.
pub const ALLOW_COARSE: &str = "openshell.ai/allow-coarse";
/// Annotation: the supervisor's own proxy enforces the sandbox's policy, within what substrate lets out.
pub const STRICT: &str = "openshell.ai/strict";
/// Annotation: why the first boot was given up.
pub const BOOT_FAILED: &str = "openshell.ai/boot-failed";
/// Prefix of the labels and annotations that only the driver writes.
pub const RESERVED_PREFIX: &str = "openshell.ai/";
/// Annotation by which a caller names a pre-made template.
pub const PREMADE_TEMPLATE: &str = "substrate_actor_template";

/// Longest DNS-1123 label, in bytes (RFC 1123, section 2.1).
pub const MAX_LABEL: usize = 63;
const HASH_CHARS: usize = 20;

/// Whether `name` is a DNS-1123 label: 1 to 63 of `a-z 0-9 -`, an alphanumeric at both ends.
pub fn is_dns_label(name: &str) -> bool {
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = name.as_bytes();
    (1..=MAX_LABEL).contains(&bytes.len())
        && bytes.first().is_some_and(alphanumeric)
        && bytes.last().is_some_and(alphanumeric)
        && bytes.iter().all(|byte| alphanumeric(byte) || *byte == b'-')
}

/// Whether `value` may be a label's value: at most 63 of `A-Z a-z 0-9 . _ -`, an alphanumeric at both ends, or empty.
pub fn is_label_value(value: &str) -> bool {
    let bytes = value.as_bytes();
    bytes.len() <= MAX_LABEL
        && bytes.first().is_none_or(u8::is_ascii_alphanumeric)
        && bytes.last().is_none_or(u8::is_ascii_alphanumeric)
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(byte))
}

/// Whether `key` may be a label's or an annotation's key: an optional DNS name and `/`, then 1 to 63 letters, digits,
/// `-`, `_` and `.`, begun by a letter or digit.
pub fn is_label_key(key: &str) -> bool {
    let (prefix, name) = key.rsplit_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    let bytes = name.as_bytes();
    (1..=MAX_LABEL).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(byte))
        && prefix.is_none_or(|prefix| prefix.len() <= 253 && prefix.split('.').all(is_dns_label))
}

/// `value` where a label may hold it, else a digest of it that one may.
pub fn label_value(value: &str) -> String {
    if is_label_value(value) && !value.starts_with("sha256.") {
        return value.to_owned();
    }
    format!("sha256.{}", short_hash(value.as_bytes(), 40))
}

/// The atespace of a workspace.
pub fn atespace(workspace: &str) -> String {
    map(workspace)
}

/// The actor's name of a sandbox's name.
pub fn actor(sandbox_name: &str) -> String {
    map(sandbox_name)
}

/// The actor's uid of a sandbox's id: the id itself where it is a UUID in its usual form (the gateway's are), else a
/// UUID made from its SHA-256 (version 8, RFC 9562).
pub fn uid(sandbox_id: &str) -> String {
    match uuid::Uuid::try_parse(sandbox_id) {
        Ok(uuid) if uuid.hyphenated().to_string() == sandbox_id => sandbox_id.to_owned(),
        _ => {
            let digest = Sha256::digest(sandbox_id.as_bytes());
            let mut bytes = [0u8; 16];
            bytes.copy_from_slice(&digest[..16]);
            uuid::Builder::from_custom_bytes(bytes).into_uuid().hyphenated().to_string()
        }
    }
}

/// The name of a synthesized template: the content of what it runs. Equal specs share one template, and a field that a
/// later version adds changes no name while it is unset.
pub fn template(pinned: &TemplateSpec) -> String {
    format!("os-{}", short_hash(&pinned.encode_to_vec(), 26))
}

fn map(name: &str) -> String {
    if is_dns_label(name) && !has_hashed_form(name) {
        return name.to_owned();
    }
    let mut readable = String::new();
    for c in name.chars() {
        if readable.len() >= MAX_LABEL - HASH_CHARS - 2 {
            break;
        }
        let c = c.to_ascii_lowercase();
        if c.is_ascii_lowercase() || c.is_ascii_digit() {
            readable.push(c);
        } else if !readable.is_empty() && !readable.ends_with('-') {
            readable.push('-');
        }
    }
    let readable = readable.trim_end_matches('-');
    let readable = if readable.is_empty() { "n" } else { readable };
    format!("{readable}-x{}", short_hash(name.as_bytes(), HASH_CHARS))
}

fn has_hashed_form(name: &str) -> bool {
    name.len() > HASH_CHARS + 2
        && name.is_char_boundary(name.len() - HASH_CHARS)
        && name[..name.len() - HASH_CHARS].ends_with("-x")
        && name[name.len() - HASH_CHARS..].bytes().all(|byte| ALPHABET.contains(&byte))
}

const ALPHABET: &[u8; 32] = b"0123456789abcdefghijklmnopqrstuv";

/// The first `chars` characters (5 bits each, at most 51) of the SHA-256 of `bytes`.
pub fn short_hash(bytes: &[u8], chars: usize) -> String {
    let digest = Sha256::digest(bytes);
    (0..chars.min(51))
        .map(|index| {
            let bit = index * 5;
            let pair = u16::from(digest[bit / 8]) << 8 | u16::from(*digest.get(bit / 8 + 1).unwrap_or(&0));
            char::from(ALPHABET[usize::from(pair >> (11 - bit % 8) & 31)])
        })
        .collect()
}

/// The known word closest to a mistyped one, if one is close enough to be meant.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |s: &str| s.to_ascii_lowercase().replace(['_', '-'], "");
    let word = plain(word);
    known
        .into_iter()
        .map(|candidate| (distance(&word, &plain(candidate)), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= 2.max(candidate.len() / 3))
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance in characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_stay_and_everything_else_is_hashed_into_a_label() {
        assert_eq!(atespace("team-a"), "team-a");
        for odd in ["Team A", "", "-", "ünïcode", "a.b", "x_y", &"long".repeat(40), "kube/../x"] {
            let mapped = atespace(odd);
            assert!(is_dns_label(&mapped), "{odd} became {mapped}");
            assert_ne!(mapped, odd);
        }
        assert!(actor("Alice Smith").starts_with("alice-smith-x"));
    }

    #[test]
    fn names_that_differ_never_meet() {
        let mapped = atespace("Team A");
        assert_ne!(atespace(&mapped), mapped, "a plain name of the hashed form is hashed again");
        let spellings = ["Team A", "team a", "team_a", "TEAM-A", "team-a", "team.a", "team-a-"];
        let set: std::collections::BTreeSet<_> = spellings.iter().map(|name| atespace(name)).collect();
        assert_eq!(set.len(), spellings.len());
    }

    #[test]
    fn uids_are_uuids_and_depend_on_the_whole_id() {
        let id = "0198c0de-0000-7000-8000-0123456789ab";
        assert_eq!(uid(id), id);
        for odd in
            ["sbx-1", "SBX-1", "0198C0DE-0000-7000-8000-0123456789AB", "0198c0de0000700080000123456789ab"]
        {
            assert!(uuid::Uuid::try_parse(&uid(odd)).is_ok());
            assert_ne!(uid(odd), id);
        }
        assert_ne!(uid("sbx-1"), uid("SBX-1"));
    }

    #[test]
    fn label_values_fit_and_differ() {
        assert_eq!(label_value("team-a"), "team-a");
        let odd = label_value("a b");
        assert!(is_label_value(&odd) && odd.starts_with("sha256."));
        assert_ne!(label_value(&odd), odd);
        assert!(is_label_value(&label_value(&"w".repeat(200))));
    }

    #[test]
    fn the_hash_is_that_of_sha256() {
        // sha256("") begins e3 b0 c4: 11100 01110 11000 01100 0100….
        assert_eq!(short_hash(b"", 4), "seoc");
    }

    #[test]
    fn nearest_finds_typos_and_leaves_strangers_alone() {
        let known = ["socket_path", "api_endpoint", "gateway_endpoint"];
        assert_eq!(nearest("socketpath", known), Some("socket_path"));
        assert_eq!(nearest("api_endpiont", known), Some("api_endpoint"));
        assert_eq!(nearest("apiEndpoint", known), Some("api_endpoint"));
        assert_eq!(nearest("colour", known), None);
    }
}
