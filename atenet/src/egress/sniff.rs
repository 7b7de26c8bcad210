// SPDX-License-Identifier: Apache-2.0
//! What a connection says about where it wants to go: the SNI of a TLS ClientHello, the Host of an HTTP request.
//!
//! Both parsers are strict and bounded: what is not understood is refused, never passed. A hello with Encrypted
//! Client Hello is refused, because its outer name says nothing about the inner one. A server may ask for a second
//! hello (TLS 1.3 HelloRetryRequest); [`SecondHello`] sees to it that it names the same host.
use http::{HeaderMap, Uri, Version};

use super::policy::normal_name;

/// Longest ClientHello that is read, bytes; those with post-quantum key shares have about 2 KiB.
pub(crate) const MAX_HELLO: usize = 64 << 10;
const MAX_RECORD: usize = (1 << 14) + 256;
const HANDSHAKE: u8 = 22;
const CHANGE_CIPHER_SPEC: u8 = 20;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
const ENCRYPTED_CLIENT_HELLO: u16 = 0xfe0d;

/// What the first bytes of a connection are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Hello {
    /// Not enough yet.
    More,
    /// A whole ClientHello that names this host.
    Name(String),
    /// No ClientHello, or one that may not pass, and why.
    Refused(&'static str),
}

/// Looks for a ClientHello at the start of a client's bytes; handshake messages may span records.
pub(crate) fn client_hello(bytes: &[u8]) -> Hello {
    match reassemble(bytes) {
        Ok(Some(message)) => match parse_hello(&message) {
            Ok(Some(name)) => Hello::Name(name),
            Ok(None) => Hello::Refused("the ClientHello names no host (SNI)"),
            Err(why) => Hello::Refused(why),
        },
        Ok(None) if bytes.len() >= MAX_HELLO => Hello::Refused("the ClientHello is too long"),
        Ok(None) => Hello::More,
        Err(why) => Hello::Refused(why),
    }
}

/// The body of the first handshake message, once it is complete.
fn reassemble(bytes: &[u8]) -> Result<Option<Vec<u8>>, &'static str> {
    const NOT_TLS: &str = "not a TLS ClientHello";
    let mut message = Vec::new();
    let mut rest = bytes;
    loop {
        if rest.first().is_some_and(|kind| *kind != HANDSHAKE) || rest.get(1).is_some_and(|major| *major != 3)
        {
            return Err(NOT_TLS);
        }
        let Some((header, after)) = rest.split_first_chunk::<5>() else {
            return Ok(None);
        };
        let len = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if len == 0 || len > MAX_RECORD {
            return Err("a TLS record of impossible length");
        }
        message.extend_from_slice(&after[..len.min(after.len())]);
        if message.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
            return Err(NOT_TLS);
        }
        if let Some((head, body)) = message.split_first_chunk::<4>() {
            let wanted = usize::from(head[1]) << 16 | usize::from(head[2]) << 8 | usize::from(head[3]);
            if wanted > MAX_HELLO {
                return Err("the ClientHello is too long");
            }
            if body.len() > wanted {
                return Err("more than a ClientHello in its record");
            }
            if body.len() == wanted {
                return Ok(Some(body.to_vec()));
            }
        }
        if after.len() < len {
            return Ok(None);
        }
        rest = &after[len..];
    }
}

/// A cursor that refuses to read beyond its end.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    const SHORT: &'static str = "a malformed ClientHello";

    fn take(&mut self, len: usize) -> Result<&'a [u8], &'static str> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Self::SHORT)?;
        self.0 = rest;
        Ok(taken)
    }

    fn number(&mut self, bytes: usize) -> Result<usize, &'static str> {
        Ok(self.take(bytes)?.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte)))
    }

    fn vector(&mut self, length_bytes: usize) -> Result<&'a [u8], &'static str> {
        let len = self.number(length_bytes)?;
        self.take(len)
    }
}

/// The SNI of a ClientHello's body (RFC 8446 section 4.1.2, RFC 6066 section 3).
fn parse_hello(body: &[u8]) -> Result<Option<String>, &'static str> {
    let mut hello = Reader(body);
    hello.take(2 + 32)?;
    hello.vector(1)?;
    hello.vector(2)?;
    hello.vector(1)?;
    if hello.0.is_empty() {
        return Ok(None);
    }
    let mut extensions = Reader(hello.vector(2)?);
    if !hello.0.is_empty() {
        return Err(Reader::SHORT);
    }
    let mut name = None;
    while !extensions.0.is_empty() {
        let kind = extensions.number(2)? as u16;
        let data = extensions.vector(2)?;
        match kind {
            ENCRYPTED_CLIENT_HELLO => return Err("the ClientHello hides its host (ECH)"),
            SERVER_NAME => {
                let mut list = Reader(Reader(data).vector(2)?);
                if data.len() != list.0.len() + 2 || list.number(1)? != 0 {
                    return Err(Reader::SHORT);
                }
                let host = list.vector(2)?;
                if !list.0.is_empty() || name.is_some() {
                    return Err("the ClientHello names more than one host");
                }
                let host = std::str::from_utf8(host).ok().and_then(normal_name);
                name = Some(host.ok_or("the ClientHello's host is not a host name")?);
            }
            _ => {}
        }
    }
    Ok(name)
}

/// Watches what a client sends after its first ClientHello until it is clear that no second one comes.
pub(crate) struct SecondHello {
    name: String,
    seen: Vec<u8>,
    after_change: bool,
    done: bool,
}

impl SecondHello {
    /// `first` is everything the client sent up to and including its ClientHello; the host is `name`.
    pub(crate) fn new(name: String) -> Self {
        Self { name, seen: Vec::new(), after_change: false, done: false }
    }

    /// Looks at the client's next bytes before they pass.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Result<(), &'static str> {
        if self.done {
            return Ok(());
        }
        self.seen.extend_from_slice(bytes);
        // Middlebox compatibility: a change_cipher_spec may come before the second hello (RFC 8446 D.4).
        while let [CHANGE_CIPHER_SPEC, 3, _, 0, 1, _, rest @ ..] = self.seen.as_slice() {
            self.seen = rest.to_vec();
            self.after_change = true;
        }
        match self.seen.as_slice() {
            // Too little to tell, as is nothing at all.
            [] | [CHANGE_CIPHER_SPEC | HANDSHAKE, ..] if self.seen.len() < 6 => return Ok(()),
            [HANDSHAKE, _, _, _, _, CLIENT_HELLO, ..] => {}
            _ => {
                self.finish();
                return Ok(());
            }
        }
        let verdict = match client_hello(&self.seen) {
            Hello::More => return Ok(()),
            Hello::Name(name) if name == self.name => Ok(()),
            Hello::Name(_) => Err("a second ClientHello names another host"),
            // An encrypted Finished of TLS 1.2 may begin like a hello; nobody could read it as one.
            Hello::Refused(why) if self.after_change && why != "the ClientHello hides its host (ECH)" => {
                Ok(())
            }
            Hello::Refused(why) => Err(why),
        };
        self.finish();
        verdict
    }

    fn finish(&mut self) {
        self.done = true;
        self.seen = Vec::new();
    }
}

/// Checks that an HTTP request is for `name`: exactly one Host, and an absolute URI's authority, must say so, with no
/// other port than the one dialled.
pub(crate) fn http_host(
    version: Version,
    uri: &Uri,
    headers: &HeaderMap,
    name: &str,
    port: u16,
) -> Result<(), String> {
    if !matches!(version, Version::HTTP_10 | Version::HTTP_11) {
        return Err("not HTTP/1".into());
    }
    let mut hosts = headers.get_all(http::header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return Err("the request has not exactly one Host".into());
    };
    let host = host.to_str().map_err(|_| "the request's Host is not text".to_owned())?;
    for said in [Some(host), uri.authority().map(http::uri::Authority::as_str)].into_iter().flatten() {
        let (host, said_port) = match said.rsplit_once(':') {
            Some((host, digits)) => (host, Some(digits)),
            None => (said, None),
        };
        let same_port = said_port.is_none_or(|digits| digits.parse() == Ok(port));
        if !same_port || normal_name(host).as_deref() != Some(name) {
            return Err(format!("the request is for {said:?}"));
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A ClientHello with these extensions, in records of at most `fragment` bytes.
    pub(crate) fn hello(extensions: &[(u16, Vec<u8>)], fragment: usize) -> Vec<u8> {
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0, 0, 2, 0x13, 0x01, 1, 0]);
        let mut list = Vec::new();
        for (kind, data) in extensions {
            list.extend(kind.to_be_bytes());
            list.extend((data.len() as u16).to_be_bytes());
            list.extend(data);
        }
        body.extend((list.len() as u16).to_be_bytes());
        body.extend(list);
        let mut message = vec![CLIENT_HELLO];
        message.extend(&(body.len() as u32).to_be_bytes()[1..]);
        message.extend(body);
        message
            .chunks(fragment)
            .flat_map(|part| {
                let mut record = vec![HANDSHAKE, 3, 1];
                record.extend((part.len() as u16).to_be_bytes());
                record.extend(part);
                record
            })
            .collect()
    }

    pub(crate) fn sni(name: &str) -> (u16, Vec<u8>) {
        let len = name.len() as u16;
        let mut data = (len + 3).to_be_bytes().to_vec();
        data.push(0);
        data.extend(len.to_be_bytes());
        data.extend(name.as_bytes());
        (SERVER_NAME, data)
    }

    const ALL: usize = 1 << 14;

    #[test]
    fn a_hello_tells_its_host_however_it_is_cut() {
        for fragment in [1, 2, 3, 4, 5, 50, ALL] {
            let bytes = hello(&[(0x2b, vec![2, 3, 4]), sni("API.Example.com"), (0x0a, vec![0, 0])], fragment);
            for len in 0..bytes.len() {
                assert_eq!(client_hello(&bytes[..len]), Hello::More, "{fragment} {len}");
            }
            assert_eq!(client_hello(&bytes), Hello::Name("api.example.com".into()), "{fragment}");
        }
    }

    #[test]
    fn a_real_clients_hello_is_understood() {
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        let config = std::sync::Arc::new(config);
        let hello_for = |name: &'static str| {
            let name = name.try_into().unwrap();
            let mut client = rustls::ClientConnection::new(config.clone(), name).unwrap();
            let mut bytes = Vec::new();
            client.write_tls(&mut bytes).unwrap();
            client_hello(&bytes)
        };
        assert_eq!(hello_for("api.example.com"), Hello::Name("api.example.com".into()));
        assert!(matches!(hello_for("192.0.2.1"), Hello::Refused(_)), "an address has no SNI");
    }

    #[test]
    fn what_is_not_a_hello_with_one_host_is_refused() {
        let refused = |bytes: &[u8], part: &str| match client_hello(bytes) {
            Hello::Refused(why) => assert!(why.contains(part), "{why} has no {part:?}"),
            other => panic!("{other:?}, expected {part:?}"),
        };
        refused(b"GET / HTTP/1.1\r\n", "not a TLS");
        refused(b"SSH-2.0-x\r\n", "not a TLS");
        refused(&[HANDSHAKE, 2, 0], "not a TLS");
        refused(&[HANDSHAKE, 3, 1, 0, 0], "length");
        refused(&[HANDSHAKE, 3, 1, 0xff, 0xff], "length");
        refused(&[HANDSHAKE, 3, 1, 0, 4, 2, 0, 0, 0], "not a TLS");
        refused(&[HANDSHAKE, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff], "too long");
        refused(&hello(&[], ALL), "no host");
        refused(&hello(&[sni("a.test"), (ENCRYPTED_CLIENT_HELLO, vec![1])], ALL), "ECH");
        refused(&hello(&[(ENCRYPTED_CLIENT_HELLO, vec![]), sni("a.test")], ALL), "ECH");
        refused(&hello(&[sni("a.test"), sni("b.test")], ALL), "more than one");
        refused(&hello(&[sni("")], ALL), "host name");
        refused(&hello(&[sni("a\0.test")], ALL), "host name");
        refused(&hello(&[(SERVER_NAME, vec![])], ALL), "malformed");
        refused(&hello(&[(SERVER_NAME, vec![0, 9, 0, 0, 1, b'a'])], ALL), "malformed");
        let mut two = sni("a.test");
        two.1.extend([0, 0, 1, b'b']);
        two.1[1] += 4;
        refused(&hello(&[two], ALL), "more than one");
        let mut trailing = hello(&[sni("a.test")], ALL);
        trailing.push(0);
        trailing[4] += 1;
        refused(&trailing, "more than a ClientHello");
    }

    #[test]
    fn an_endless_hello_is_refused() {
        let mut bytes = Vec::new();
        let mut start = vec![HANDSHAKE, 3, 1, 0x40, 0, CLIENT_HELLO, 0, 0xff, 0xff];
        start.resize(5 + 0x4000, 0);
        while bytes.len() < MAX_HELLO {
            bytes.extend(if bytes.is_empty() {
                start.clone()
            } else {
                [&[HANDSHAKE, 3, 1, 0x40, 0][..], &[0; 0x4000]].concat()
            });
            bytes.truncate(MAX_HELLO);
        }
        assert!(matches!(client_hello(&bytes), Hello::Refused(_)));
    }

    #[test]
    fn a_second_hello_must_name_the_same_host() {
        const CHANGE: [u8; 6] = [CHANGE_CIPHER_SPEC, 3, 3, 0, 1, 1];
        let run = |parts: &[&[u8]]| {
            let mut watch = SecondHello::new("a.test".into());
            parts.iter().try_for_each(|part| part.chunks(3).try_for_each(|chunk| watch.feed(chunk)))
        };
        let same = hello(&[sni("a.test")], ALL);
        let other = hello(&[sni("b.test")], 20);
        assert!(run(&[&same]).is_ok());
        assert!(run(&[&CHANGE, &same]).is_ok());
        assert!(run(&[&other]).is_err());
        assert!(run(&[&CHANGE, &other]).is_err());
        assert!(
            run(&[&CHANGE, &CHANGE, &hello(&[sni("a.test"), (ENCRYPTED_CLIENT_HELLO, vec![])], ALL)])
                .is_err()
        );
        // Application data, a key exchange, an encrypted Finished that looks like a hello.
        assert!(run(&[&[23, 3, 3, 0, 2, 1, 1], &other]).is_ok());
        assert!(run(&[&[HANDSHAKE, 3, 3, 0, 4, 16, 0, 0, 0], &other]).is_ok());
        assert!(run(&[&CHANGE, &[HANDSHAKE, 3, 3, 0, 4, 1, 0, 0, 0], &other]).is_ok());
    }

    #[test]
    fn hosts_of_requests() {
        let check = |uri: &str, hosts: &[&str]| {
            let mut headers = HeaderMap::new();
            for host in hosts {
                headers.append("host", host.parse().unwrap());
            }
            http_host(Version::HTTP_11, &uri.parse().unwrap(), &headers, "a.test", 8080)
        };
        assert!(check("/", &["a.test"]).is_ok());
        assert!(check("/", &["A.Test.:8080"]).is_ok());
        assert!(check("http://a.test/x", &["a.test"]).is_ok());
        for (uri, hosts) in [
            ("/", &[][..]),
            ("/", &["b.test"]),
            ("/", &["a.test", "a.test"]),
            ("/", &["a.test:80"]),
            ("/", &["a.test:"]),
            ("/", &["xa.test"]),
            ("/", &["a.test, b.test"]),
            ("/", &["user@a.test"]),
            ("http://b.test/", &["a.test"]),
            ("http://x@a.test/", &["a.test"]),
            ("http://a.test:81/", &["a.test"]),
        ] {
            assert!(check(uri, hosts).is_err(), "{uri} {hosts:?}");
        }
        let mut headers = HeaderMap::new();
        headers.insert("host", "a.test".parse().unwrap());
        assert!(http_host(Version::HTTP_2, &"/".parse().unwrap(), &headers, "a.test", 8080).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic_nor_grow(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let _ = client_hello(&bytes);
            let mut watch = SecondHello::new("a.test".into());
            for chunk in bytes.chunks(7) {
                let _ = watch.feed(chunk);
            }
            prop_assert!(watch.seen.len() <= bytes.len());
        }

        #[test]
        fn damaged_hellos_never_tell_another_host(at in 0_usize..120, to in any::<u8>(), fragment in 1_usize..200) {
            let mut bytes = hello(&[(0x2b, vec![2, 3, 4]), sni("a.test")], fragment);
            let at = at % bytes.len();
            bytes[at] = to;
            if let Hello::Name(name) = client_hello(&bytes) {
                // A dot at the end is no part of a name.
                prop_assert_eq!(name.len(), if to == b'.' && name == "a.tes" { 5 } else { 6 });
            }
        }

        #[test]
        fn no_host_header_passes_but_the_name(host in "[ -~]{0,20}") {
            let mut headers = HeaderMap::new();
            headers.insert("host", host.parse().unwrap());
            let uri: Uri = "/".parse().unwrap();
            if http_host(Version::HTTP_11, &uri, &headers, "a.test", 80).is_ok() {
                let lower = host.to_ascii_lowercase();
                prop_assert!(["a.test", "a.test.", "a.test:80", "a.test.:80"].contains(&lower.trim()), "{}", host);
            }
        }
    }
}
