// SPDX-License-Identifier: Apache-2.0
//! Headers that belong to one hop (RFC 9110 section 7.6.1) and must not be passed on.
use http::header::{CONNECTION, HeaderMap, HeaderName, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE};

/// The protocol an HTTP/1.1 message asks to change to, if it does. `h2c` is not passed on: the next hop is HTTP/1.1.
pub(crate) fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let asked = headers.get_all(CONNECTION).iter().any(|value| {
        value
            .to_str()
            .is_ok_and(|list| list.split(',').any(|item| item.trim().eq_ignore_ascii_case("upgrade")))
    });
    let protocol = headers.get(UPGRADE)?;
    (asked && !protocol.as_bytes().eq_ignore_ascii_case(b"h2c")).then(|| protocol.clone())
}

/// Removes what belongs to the hop: `connection` and whatever it names, `keep-alive`, `te`, `transfer-encoding`, …
pub(crate) fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|list| list.split(','))
        .filter_map(|item| HeaderName::from_bytes(item.trim().as_bytes()).ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in ["connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization"]
    {
        headers.remove(name);
    }
    headers.remove(TE);
    headers.remove(TRANSFER_ENCODING);
    headers.remove(UPGRADE);
    headers.remove("http2-settings");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_connection_names_goes_and_the_rest_stays() {
        let mut headers = HeaderMap::new();
        headers.append("connection", HeaderValue::from_static("close, X-Hop"));
        headers.append("x-hop", HeaderValue::from_static("1"));
        headers.append("transfer-encoding", HeaderValue::from_static("chunked"));
        headers.append("te", HeaderValue::from_static("trailers"));
        headers.append("x-end", HeaderValue::from_static("1"));
        assert!(upgrade(&headers).is_none());
        strip(&mut headers);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-end"]);
    }

    #[test]
    fn an_upgrade_needs_both_headers_and_is_never_h2c() {
        for (connection, protocol, expected) in [
            (Some("keep-alive, Upgrade"), Some("websocket"), true),
            (None, Some("websocket"), false),
            (Some("upgrade"), None, false),
            (Some("upgrade"), Some("h2c"), false),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(value) = connection {
                headers.insert("connection", HeaderValue::from_static(value));
            }
            if let Some(value) = protocol {
                headers.insert("upgrade", HeaderValue::from_static(value));
            }
            assert_eq!(upgrade(&headers).is_some(), expected, "{connection:?} {protocol:?}");
        }
    }
}
