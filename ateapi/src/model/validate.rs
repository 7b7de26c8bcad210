// SPDX-License-Identifier: Apache-2.0
//! The rules that every field of every request is held to. A message names the field, what it holds, and the rule.
use std::collections::BTreeMap;

use base64::Engine as _;
use substrate_proto::{ateapi, types};

use super::{ActorUid, names, quantity, validate_template};

/// Longest request id, bytes.
const MAX_REQUEST_ID: usize = 128;
/// Most labels or annotations of one thing.
const MAX_LABELS: usize = 64;
/// Longest value of a label, bytes.
const MAX_LABEL_VALUE: usize = 256;
/// Longest value of an annotation, bytes.
const MAX_ANNOTATION_VALUE: usize = 16 * 1024;
/// Most variables of an environment.
const MAX_ENV: usize = 512;
/// Longest variable, bytes.
const MAX_ENV_VALUE: usize = 128 * 1024;
/// Most files of an actor.
const MAX_FILES: usize = 64;
/// All files of an actor, bytes.
const MAX_FILES_BYTES: usize = 1 << 20;
/// Largest page.
const MAX_PAGE: u32 = 1_000;
/// Page when none is asked for.
const DEFAULT_PAGE: u32 = 100;

/// A field that breaks its rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct Invalid {
    /// Path of the field in the request, e.g. `spec.containers[0].image`.
    pub field: String,
    /// What it holds and the rule.
    pub message: String,
}

impl Invalid {
    pub(super) fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }
}

pub(super) fn ensure(
    condition: bool,
    field: impl Into<String>,
    message: impl FnOnce() -> String,
) -> Result<(), Invalid> {
    if condition { Ok(()) } else { Err(Invalid::new(field, message())) }
}

/// How a request names an actor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ActorKey {
    /// By uid.
    Uid(ActorUid),
    /// By name in an atespace.
    Name {
        /// The atespace.
        atespace: String,
        /// The name.
        name: String,
    },
}

impl std::fmt::Display for ActorKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Uid(uid) => write!(f, "{uid}"),
            Self::Name { atespace, name } => write!(f, "{atespace}/{name}"),
        }
    }
}

/// A DNS-1123 name.
pub fn resource_name(field: &str, name: &str) -> Result<(), Invalid> {
    ensure(names::is_label(name), field, || {
        format!(
            "{name:?} is no DNS-1123 label: 1 to 63 lower-case letters, digits and \"-\", begun and ended by a letter or digit"
        )
    })
}

/// The name of an atespace.
pub fn atespace_name(field: &str, name: &str) -> Result<(), Invalid> {
    resource_name(field, name)
}

/// A uid chosen by the caller.
pub fn uid(field: &str, uid: &str) -> Result<(), Invalid> {
    ensure(names::is_uid(uid), field, || {
        format!(
            "{uid:?} is no uid: 1 to 63 letters, digits, \"-\", \"_\" and single \".\", begun by a letter or digit"
        )
    })
}

/// A reference to an actor.
pub fn actor_key(reference: Option<&ateapi::ActorRef>) -> Result<ActorKey, Invalid> {
    let reference = reference.ok_or_else(|| Invalid::new("actor", "is missing: give a name or a uid"))?;
    if !reference.uid.is_empty() {
        uid("actor.uid", &reference.uid)?;
        return Ok(ActorKey::Uid(ActorUid(reference.uid.clone())));
    }
    if reference.atespace.is_empty() && names::is_uid(&reference.name) {
        return Ok(ActorKey::Uid(ActorUid(reference.name.clone())));
    }
    atespace_name("actor.atespace", &reference.atespace)?;
    resource_name("actor.name", &reference.name)?;
    Ok(ActorKey::Name { atespace: reference.atespace.clone(), name: reference.name.clone() })
}

/// A request id; empty is none.
pub fn request_id(id: &str) -> Result<(), Invalid> {
    ensure(id.len() <= MAX_REQUEST_ID && id.bytes().all(|b| b.is_ascii_graphic()), "request_id", || {
        format!("has to be at most {MAX_REQUEST_ID} printable ASCII characters")
    })
}

/// A generation-free id given by a caller (worker, snapshot).
pub fn call_id(field: &str, id: &str) -> Result<(), Invalid> {
    ensure(!id.is_empty() && id.len() <= 128 && id.bytes().all(|b| b.is_ascii_graphic()), field, || {
        format!("{id:?} is no id: 1 to 128 printable ASCII characters")
    })
}

/// A tag of a snapshot.
pub fn tag(field: &str, tag: &str) -> Result<(), Invalid> {
    resource_name(field, tag)?;
    ensure(!tag.starts_with("s-"), field, || {
        format!("{tag:?} begins as snapshot ids do; choose another name")
    })
}

/// A snapshot's id or tag; empty is allowed where the latest is meant.
pub fn snapshot_ref(field: &str, reference: &str, allow_empty: bool) -> Result<(), Invalid> {
    if allow_empty && reference.is_empty() {
        return Ok(());
    }
    resource_name(field, reference).map_err(|_| {
        Invalid::new(field, format!("{reference:?} is neither the id nor the tag of a snapshot"))
    })
}

fn key_is_valid(key: &str) -> bool {
    let (prefix, name) = key.rsplit_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    let name_ok = !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
    name_ok && prefix.is_none_or(|prefix| names::is_host(prefix, false))
}

fn map(field: &str, map: &BTreeMap<String, String>, longest: usize) -> Result<(), Invalid> {
    ensure(map.len() <= MAX_LABELS, field, || {
        format!("has {} entries, at most {MAX_LABELS} are allowed", map.len())
    })?;
    for (key, value) in map {
        ensure(key_is_valid(key), format!("{field}[{key:?}]"), || {
            "is no key: an optional DNS prefix and \"/\", then at most 63 letters, digits, \"-\", \"_\" and \".\""
                .to_owned()
        })?;
        ensure(value.len() <= longest && !value.contains('\0'), format!("{field}[{key:?}]"), || {
            format!("has {} bytes, at most {longest} without NUL are allowed", value.len())
        })?;
    }
    Ok(())
}

/// Labels.
pub fn labels(field: &str, labels: &BTreeMap<String, String>) -> Result<(), Invalid> {
    map(field, labels, MAX_LABEL_VALUE)
}

/// Annotations.
pub fn annotations(field: &str, annotations: &BTreeMap<String, String>) -> Result<(), Invalid> {
    map(field, annotations, MAX_ANNOTATION_VALUE)
}

/// An environment.
pub(super) fn env(field: &str, env: &BTreeMap<String, String>) -> Result<(), Invalid> {
    ensure(env.len() <= MAX_ENV, field, || {
        format!("has {} variables, at most {MAX_ENV} are allowed", env.len())
    })?;
    for (name, value) in env {
        ensure(
            !name.is_empty() && name.len() <= 256 && !name.contains(['=', '\0']),
            format!("{field}[{name:?}]"),
            || "is no name of a variable: 1 to 256 bytes without \"=\" and NUL".to_owned(),
        )?;
        ensure(value.len() <= MAX_ENV_VALUE && !value.contains('\0'), format!("{field}[{name:?}]"), || {
            format!("has a value of {} bytes, at most {MAX_ENV_VALUE} without NUL are allowed", value.len())
        })?;
    }
    Ok(())
}

/// Files of an actor. Contents never appear in a message.
pub fn files(field: &str, files: &[types::File]) -> Result<(), Invalid> {
    ensure(files.len() <= MAX_FILES, field, || {
        format!("has {} files, at most {MAX_FILES} are allowed", files.len())
    })?;
    let mut total = 0;
    for (index, file) in files.iter().enumerate() {
        let at = format!("{field}[{index}]");
        ensure(names::is_clean_path(&file.path) && !file.path.ends_with('/'), format!("{at}.path"), || {
            format!("{:?} is no absolute path of a file without \"..\"", file.path)
        })?;
        ensure(!validate_template::is_reserved_path(&file.path), format!("{at}.path"), || {
            format!(
                "{:?} is under a directory that the runtime owns (/proc, /sys, /dev, /run/ate)",
                file.path
            )
        })?;
        ensure(files[..index].iter().all(|other| other.path != file.path), format!("{at}.path"), || {
            format!("{:?} is there twice", file.path)
        })?;
        ensure(file.mode <= 0o777, format!("{at}.mode"), || {
            format!("{:o} (octal) has bits beyond 0777", file.mode)
        })?;
        total += file.content.len();
    }
    ensure(total <= MAX_FILES_BYTES, field, || {
        format!("hold {total} bytes in all, at most {MAX_FILES_BYTES} are allowed; use a volume or the image")
    })
}

/// What one actor has of its own.
pub fn spec_of_actor(spec: Option<&types::ActorSpec>) -> Result<&types::ActorSpec, Invalid> {
    let spec = spec.ok_or_else(|| Invalid::new("spec", "is missing"))?;
    resource_name("spec.template", &spec.template)?;
    env("spec.env", &spec.env)?;
    files("spec.files", &spec.files)?;
    labels("spec.labels", &spec.labels)?;
    annotations("spec.annotations", &spec.annotations)?;
    Ok(spec)
}

/// An idle policy.
pub fn idle(field: &str, policy: &types::IdlePolicy) -> Result<(), Invalid> {
    if !matches!(policy.suspend_after.as_str(), "" | "never") {
        quantity::duration(&policy.suspend_after).map_err(|error| {
            Invalid::new(format!("{field}.suspendAfter"), format!("{error}, or \"never\""))
        })?;
    }
    if !policy.pause_first.is_empty() {
        quantity::duration(&policy.pause_first)
            .map_err(|error| Invalid::new(format!("{field}.pauseFirst"), error))?;
    }
    Ok(())
}

/// A checkpoint policy.
pub fn checkpoint_policy(field: &str, policy: &types::CheckpointPolicy) -> Result<(), Invalid> {
    ensure(matches!(policy.on_reply.as_str(), "" | "async" | "sync"), format!("{field}.onReply"), || {
        format!("{:?} is neither empty, \"async\" nor \"sync\"", policy.on_reply)
    })?;
    ensure(
        matches!(policy.durability.as_str(), "" | "durable" | "node"),
        format!("{field}.durability"),
        || format!("{:?} is neither empty, \"durable\" nor \"node\"", policy.durability),
    )?;
    let durations = [("maxHold", &policy.max_hold, 1), ("interval", &policy.interval, 1_000)];
    for (name, text, least_ms) in durations {
        if !text.is_empty() {
            let value =
                quantity::duration(text).map_err(|error| Invalid::new(format!("{field}.{name}"), error))?;
            ensure(value.as_millis() >= least_ms, format!("{field}.{name}"), || {
                format!("{text:?} is shorter than {least_ms} ms")
            })?;
        }
    }
    if !policy.max_heap.is_empty() {
        quantity::bytes(&policy.max_heap).map_err(|error| Invalid::new(format!("{field}.maxHeap"), error))?;
    }
    Ok(())
}

/// An egress policy in a request.
pub fn egress(field: &str, policy: &types::EgressPolicy) -> Result<(), Invalid> {
    validate_template::egress_policy(field, policy)
}

/// Where a page begins and how long it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// Items at most.
    pub size: usize,
    /// After this (atespace, name).
    pub after: Option<(String, String)>,
}

impl Page {
    /// The token that leads to what follows (atespace, name).
    pub fn token(atespace: &str, name: &str) -> String {
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(format!("{atespace}\0{name}"))
    }
}

/// A page's size and token.
pub fn page(size: u32, token: &str) -> Result<Page, Invalid> {
    ensure(size <= MAX_PAGE, "page_size", || format!("is {size}, at most {MAX_PAGE} is allowed"))?;
    let size = if size == 0 { DEFAULT_PAGE } else { size } as usize;
    if token.is_empty() {
        return Ok(Page { size, after: None });
    }
    let decoded = base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(token)
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .and_then(|text| text.split_once('\0').map(|(a, b)| (a.to_owned(), b.to_owned())))
        .ok_or_else(|| {
            Invalid::new("page_token", "is not a token of an earlier answer: start without one")
        })?;
    Ok(Page { size, after: Some(decoded) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_actor_is_named_by_uid_or_by_name() {
        let by = |atespace: &str, name: &str, uid: &str| {
            actor_key(Some(&ateapi::ActorRef {
                atespace: atespace.into(),
                name: name.into(),
                uid: uid.into(),
            }))
        };
        assert_eq!(by("a", "b", "u-1"), Ok(ActorKey::Uid("u-1".into())));
        assert_eq!(by("", "u-1", ""), Ok(ActorKey::Uid("u-1".into())));
        assert_eq!(by("a", "b", ""), Ok(ActorKey::Name { atespace: "a".into(), name: "b".into() }));
        assert_eq!(by("a", "B", "").unwrap_err().field, "actor.name");
        assert_eq!(by("A_", "b", "").unwrap_err().field, "actor.atespace");
        assert_eq!(actor_key(None).unwrap_err().field, "actor");
        assert_eq!(by("", "", "../x").unwrap_err().field, "actor.uid");
    }

    #[test]
    fn files_are_checked_and_never_shown() {
        let file = |path: &str, mode| types::File { path: path.into(), mode, content: b"secret".to_vec() };
        files("f", &[file("/etc/token", 0o400)]).unwrap();
        for (bad, field) in [
            (vec![file("etc/token", 0o400)], "f[0].path"),
            (vec![file("/etc/../x", 0o400)], "f[0].path"),
            (vec![file("/run/ate/x", 0o400)], "f[0].path"),
            (vec![file("/a", 0o4755)], "f[0].mode"),
            (vec![file("/a", 0o400), file("/a", 0o400)], "f[1].path"),
        ] {
            let error = files("f", &bad).unwrap_err();
            assert_eq!(error.field, field);
            assert!(!error.to_string().contains("secret"));
        }
        let big = types::File { path: "/a".into(), mode: 0, content: vec![0; MAX_FILES_BYTES + 1] };
        assert_eq!(files("f", &[big]).unwrap_err().field, "f");
    }

    #[test]
    fn pages_continue_where_they_ended() {
        let token = Page::token("a", "b");
        assert_eq!(page(5, &token), Ok(Page { size: 5, after: Some(("a".into(), "b".into())) }));
        assert_eq!(page(0, "").unwrap().size, DEFAULT_PAGE as usize);
        assert_eq!(page(MAX_PAGE + 1, "").unwrap_err().field, "page_size");
        assert_eq!(page(1, "%%%").unwrap_err().field, "page_token");
    }

    #[test]
    fn policies() {
        let policy = |text: &str| types::IdlePolicy { suspend_after: text.into(), ..Default::default() };
        for good in ["", "never", "1s", "5m"] {
            idle("idle", &policy(good)).unwrap();
        }
        assert_eq!(idle("idle", &policy("soon")).unwrap_err().field, "idle.suspendAfter");
        let checkpoint = types::CheckpointPolicy { interval: "10ms".into(), ..Default::default() };
        assert_eq!(checkpoint_policy("c", &checkpoint).unwrap_err().field, "c.interval");
        let checkpoint = types::CheckpointPolicy { on_reply: "maybe".into(), ..Default::default() };
        assert_eq!(checkpoint_policy("c", &checkpoint).unwrap_err().field, "c.onReply");
    }

    #[test]
    fn labels_have_keys() {
        let one = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
        labels("l", &one("openshell.ai/managed", "true")).unwrap();
        for bad in ["", "/x", "a b", "-x", "x/y/"] {
            assert!(labels("l", &one(bad, "")).is_err(), "{bad}");
        }
        assert!(labels("l", &one("k", &"v".repeat(300))).is_err());
        annotations("l", &one("k", &"v".repeat(300))).unwrap();
    }
}
