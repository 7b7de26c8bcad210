// SPDX-License-Identifier: Apache-2.0
//! Manifests of snapshots: as bytes of a blob store, and past the seal. The first byte chooses.
//!
//! What must hold: nothing panics; a body that was sealed by us opens to itself or is refused, never to anything else.
use atelet::snapshot::DataKey;
use atelet::snapshot::manifest::{self, Body, Header};
use prost::Message;

/// Checks one input.
pub fn check(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    let Ok(key) = DataKey::random() else { return };
    if kind.is_multiple_of(2) {
        if let Ok(sealed) = manifest::read(data, None, "s") {
            assert!(sealed.open(&key).is_err(), "a body opened with a key that was drawn just now");
        }
        return;
    }
    // What lies behind the seal comes from whoever holds the key; it is checked all the same.
    let Some((split, rest)) = data.split_first() else { return };
    let (head, body) = rest.split_at(usize::from(*split).min(rest.len()));
    let (Ok(header), Ok(body)) = (Header::decode(head), Body::decode(body)) else { return };
    let Ok(content) = manifest::encode(&header, &body, &key) else { return };
    if let Ok(opened) = manifest::read(&content, None, "s").and_then(|sealed| sealed.open(&key)) {
        assert!(opened.header == header && opened.body == body, "it opened to something else");
    }
}
