// SPDX-License-Identifier: Apache-2.0
//! How long the gateway's token for a sandbox lives, as far as it says so itself. Its signature is the gateway's to
//! check; the token is never logged.
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::supervisor::Advisory;
use crate::validate::Wanted;

/// When a JWT expires, unix seconds; none when it does not or is no JWT.
pub fn expires(token: &str) -> Option<i64> {
    let payload = token.split('.').nth(1)?;
    let payload = URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?;
    serde_json::from_slice::<serde_json::Value>(&payload).ok()?.get("exp")?.as_i64()
}

/// What to tell the user of a token that a sleep may outlive.
pub fn advisory(wanted: &Wanted, now_ms: i64) -> Option<Advisory> {
    let left = expires(wanted.token.reveal())? - now_ms / 1000;
    let idle = wanted.config.idle.as_ref().and_then(|idle| idle.suspend_after.as_deref());
    if idle == Some("never") {
        return None;
    }
    Some(Advisory {
        subsystem: "token",
        message: format!(
            "the sandbox's token expires in {left} s; a sleep that lasts longer loses it: set ttl_secs = 0 in \
             [openshell.gateway.gateway_jwt], or longer than the longest sleep"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_exp_and_takes_anything_else_for_endless() {
        let jwt = |claims: &str| format!("h.{}.s", URL_SAFE_NO_PAD.encode(claims));
        assert_eq!(expires(&jwt(r#"{"exp":1700000000}"#)), Some(1_700_000_000));
        assert_eq!(expires(&jwt(r#"{"sub":"x"}"#)), None);
        for odd in ["", "a", "a.b.c", "a.!!.c", "opaque"] {
            assert_eq!(expires(odd), None);
        }
    }
}
