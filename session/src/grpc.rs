// SPDX-License-Identifier: Apache-2.0
//! As much of gRPC over HTTP/2 as is needed to carry it: message framing, heads, statuses.
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use percent_encoding::{AsciiSet, CONTROLS, percent_decode, utf8_percent_encode};
use prost::Message;
use substrate_proto::session::{Head, Header};

/// Longest message that is read where messages are read, bytes.
pub const MAX_MESSAGE: usize = 1 << 20;
const PREFIX: usize = 5;

/// Headers that belong to a connection and not to a call.
const OF_THE_CONNECTION: [&str; 6] =
    ["connection", "host", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"];

/// What stands encoded in a `grpc-message` ("PROTOCOL-HTTP2.md" of gRPC), besides what is not ASCII.
const ENCODED: AsciiSet = CONTROLS.add(b'%');

/// A message longer than [`MAX_MESSAGE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message of {0} bytes, more than {MAX_MESSAGE}")]
pub struct TooLong(usize);

/// A message as it came, prefix and all, and its content if it is not compressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Framed {
    /// With its prefix.
    pub raw: Bytes,
}

impl Framed {
    /// A message of ours.
    pub fn new(message: &impl Message) -> Self {
        let encoded = message.encode_to_vec();
        let mut raw = BytesMut::with_capacity(PREFIX + encoded.len());
        raw.put_u8(0);
        raw.put_u32(encoded.len() as u32);
        raw.put_slice(&encoded);
        Self { raw: raw.freeze() }
    }

    /// Without its prefix; none when it is compressed.
    pub fn content(&self) -> Option<Bytes> {
        (self.raw.first() == Some(&0)).then(|| self.raw.slice(PREFIX..))
    }

    /// What it says; none when it is compressed or something else.
    pub fn read<M: Message + Default>(&self) -> Option<M> {
        self.content().and_then(|content| M::decode(content).ok())
    }
}

/// Finds messages in bytes.
#[derive(Debug, Default)]
pub struct Deframer {
    bytes: BytesMut,
}

impl Deframer {
    /// More bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next complete message.
    ///
    /// # Errors
    /// [`TooLong`].
    pub fn take(&mut self) -> Result<Option<Framed>, TooLong> {
        if self.bytes.len() < PREFIX {
            return Ok(None);
        }
        let length = (&self.bytes[1..PREFIX]).get_u32() as usize;
        if length > MAX_MESSAGE {
            return Err(TooLong(length));
        }
        if self.bytes.len() < PREFIX + length {
            return Ok(None);
        }
        Ok(Some(Framed { raw: self.bytes.split_to(PREFIX + length).freeze() }))
    }

    /// What is left.
    pub fn rest(self) -> Bytes {
        self.bytes.freeze()
    }
}

/// Headers as a head.
pub fn head(path: &str, headers: &HeaderMap) -> Head {
    let headers = headers
        .iter()
        .filter(|(name, _)| !OF_THE_CONNECTION.contains(&name.as_str()))
        .map(|(name, value)| Header { name: name.to_string(), value: value.as_bytes().to_vec() })
        .collect();
    Head { path: path.to_owned(), headers }
}

/// A head as headers; what is no header is left out.
pub fn headers(head: &Head) -> HeaderMap {
    head.headers
        .iter()
        .filter(|header| !OF_THE_CONNECTION.contains(&header.name.as_str()))
        .filter_map(|header| {
            let name = HeaderName::from_bytes(header.name.as_bytes()).ok()?;
            Some((name, HeaderValue::from_bytes(&header.value).ok()?))
        })
        .collect()
}

/// Headers that begin an answer.
pub fn answer_head() -> Head {
    Head {
        path: String::new(),
        headers: vec![Header { name: "content-type".to_owned(), value: b"application/grpc".to_vec() }],
    }
}

/// A status as headers; also the only headers of an answer that is nothing else.
pub fn status(code: u32, message: &str) -> Head {
    let mut head = Head::default();
    let mut put = |name: &str, value: String| {
        head.headers.push(Header { name: name.to_owned(), value: value.into_bytes() });
    };
    put("grpc-status", code.to_string());
    if !message.is_empty() {
        put("grpc-message", utf8_percent_encode(message, &ENCODED).to_string());
    }
    head
}

/// The status in headers or trailers.
pub fn status_of(headers: &HeaderMap) -> Option<(u32, String)> {
    let code = headers.get("grpc-status")?.to_str().ok()?.parse().ok()?;
    let message =
        headers.get("grpc-message").map(|value| percent_decode(value.as_bytes()).decode_utf8_lossy());
    Some((code, message.unwrap_or_default().into_owned()))
}

#[cfg(test)]
mod tests {
    use substrate_proto::supervisor::SupervisorHello;

    use super::*;

    #[test]
    fn messages_are_found_wherever_the_bytes_are_cut() {
        let hello = SupervisorHello { sandbox_id: "s".into(), instance_id: "i".into() };
        let raw = [Framed::new(&hello).raw, Framed::new(&hello).raw].concat();
        for cut in 0..raw.len() {
            let mut deframer = Deframer::default();
            let mut found = Vec::new();
            for part in [&raw[..cut], &raw[cut..]] {
                deframer.push(part);
                while let Some(framed) = deframer.take().unwrap() {
                    found.push(framed.read::<SupervisorHello>().unwrap());
                }
            }
            assert_eq!(found, [hello.clone(), hello.clone()]);
        }
        let mut deframer = Deframer::default();
        deframer.push(&[0, 0xff, 0, 0, 0]);
        assert!(deframer.take().is_err());
        let compressed = Framed { raw: Bytes::from_static(&[1, 0, 0, 0, 0]) };
        assert!(compressed.read::<SupervisorHello>().is_none());
    }

    #[test]
    fn a_status_survives_the_way_as_headers() {
        let head = status(14, "gone: 100 %\n");
        let (code, message) = status_of(&headers(&head)).unwrap();
        assert_eq!((code, message.as_str()), (14, "gone: 100 %\n"));
    }
}
