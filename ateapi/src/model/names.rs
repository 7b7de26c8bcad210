// SPDX-License-Identifier: Apache-2.0
//! Which strings are names.

/// A DNS-1123 label: 1 to 63 of `a-z`, `0-9` and `-`, begun and ended by a letter or digit (RFC 1123 section 2.1).
pub fn is_label(name: &str) -> bool {
    let bytes = name.as_bytes();
    let edge = |byte: Option<&u8>| byte.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    bytes.len() <= 63
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

/// A uid that a caller chose: 1 to 63 letters, digits, `-`, `_` and `.`, begun by a letter or digit. It becomes part
/// of paths and object keys.
pub fn is_uid(uid: &str) -> bool {
    uid.len() <= 63
        && uid.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
        && uid.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && !uid.contains("..")
}

/// A DNS name of 1 to 253 bytes; `wildcard` allows a first label `*`.
pub fn is_host(host: &str, wildcard: bool) -> bool {
    let rest = match host.strip_prefix("*.") {
        Some(rest) if wildcard => rest,
        _ => host,
    };
    !rest.is_empty()
        && host.len() <= 253
        && rest.split('.').all(|label| {
            !label.is_empty()
                && label.len() <= 63
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_'))
        })
        && rest.parse::<std::net::IpAddr>().is_err()
}

/// An absolute path without `.` or `..` components, empty components and NUL, at most 1024 bytes.
pub fn is_clean_path(path: &str) -> bool {
    path.len() <= 1024
        && path.len() > 1
        && path.strip_prefix('/').is_some_and(|rest| {
            rest.strip_suffix('/')
                .unwrap_or(rest)
                .split('/')
                .all(|part| !part.is_empty() && part != "." && part != ".." && !part.contains('\0'))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels() {
        for good in ["a", "a-b", "0", "x1", &"a".repeat(63)] {
            assert!(is_label(good), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "ä", &"a".repeat(64)] {
            assert!(!is_label(bad), "{bad}");
        }
    }

    #[test]
    fn uids_cannot_leave_a_directory() {
        assert!(is_uid("Abc-1_2.x"));
        for bad in ["", ".", "..", "a..b", "a/b", "-a", "a b", "a\0"] {
            assert!(!is_uid(bad), "{bad}");
        }
    }

    #[test]
    fn hosts() {
        assert!(is_host("api.example.com", false) && is_host("*.example.com", true));
        for bad in ["", "*", "*.", "*.*.com", "a..b", "-a.com", "1.2.3.4", "Api.com", "a.com.", "x y"] {
            assert!(!is_host(bad, true), "{bad}");
        }
        assert!(!is_host("*.example.com", false));
    }

    #[test]
    fn paths() {
        assert!(is_clean_path("/a/b") && is_clean_path("/a/"));
        for bad in ["", "/", "a", "/a/../b", "/./a", "//a", "/a//b", "/a\0"] {
            assert!(!is_clean_path(bad), "{bad:?}");
        }
    }
}
