// SPDX-License-Identifier: Apache-2.0
//! Bytes of the handshake and of frames (`proto/session/v1/session.proto`), and who may speak.
//!
//! Hub and shim share a key per sandbox: HMAC-SHA256 of the sandbox's uid with the hub's master key, delivered as a
//! file that only root in the sandbox can read. Each proves that it knows it, over nonces of both, so that neither a
//! process of the sandbox's user can play the hub to the shim, nor another sandbox's shim stand in for this one. Which
//! sandbox is dialled, and at which generation, was checked by the slot before.
use std::io;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use prost::Message;
use ring::hmac;
use ring::rand::{SecureRandom as _, SystemRandom};
use substrate_proto::session::StreamFrame;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::link::Outgoing;

/// Of the protocol.
pub const VERSION: u32 = 1;
/// Longest frame, bytes; data is cut into [`CHUNK`]s.
pub const MAX_FRAME: usize = 128 << 10;
/// Most data in one frame, bytes.
pub const CHUNK: usize = 32 << 10;
const MAX_GREETING: usize = 4 << 10;
const HEADER: usize = 16;
/// Length of a nonce, bytes.
pub const NONCE: usize = 32;

/// A key shared by the hub and one sandbox's shim.
#[derive(Clone)]
pub struct SessionKey(hmac::Key);

impl std::fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SessionKey")
    }
}

impl SessionKey {
    /// The key itself, as it stands in the sandbox's file.
    pub fn new(key: &[u8]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key))
    }

    /// Bytes of the key of a sandbox, by the hub's master key.
    pub fn derive(master: &[u8], uid: &str) -> Vec<u8> {
        let master = hmac::Key::new(hmac::HMAC_SHA256, master);
        hmac::sign(&master, format!("substrate session v1 {uid}").as_bytes()).as_ref().to_vec()
    }

    fn message(role: &str, of_hub: &[u8], of_shim: &[u8]) -> Vec<u8> {
        [role.as_bytes(), of_hub, of_shim].concat()
    }

    /// Proof of knowing the key.
    pub fn prove(&self, role: &str, of_hub: &[u8], of_shim: &[u8]) -> Vec<u8> {
        hmac::sign(&self.0, &Self::message(role, of_hub, of_shim)).as_ref().to_vec()
    }

    /// Whether that is one.
    pub fn verifies(&self, role: &str, of_hub: &[u8], of_shim: &[u8], mac: &[u8]) -> bool {
        of_hub.len() == NONCE
            && of_shim.len() == NONCE
            && hmac::verify(&self.0, &Self::message(role, of_hub, of_shim), mac).is_ok()
    }
}

/// Fresh random bytes of the kernel: also a restored copy draws others than its twin.
///
/// # Errors
/// When the kernel gives none.
pub fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| io::Error::other("the kernel gives no random bytes"))?;
    Ok(bytes)
}

/// Writes a message of the handshake.
///
/// # Errors
/// Of the connection.
pub async fn greet(stream: &mut (impl AsyncWrite + Unpin), message: &impl Message) -> io::Result<()> {
    let encoded = message.encode_to_vec();
    let mut bytes = BytesMut::with_capacity(4 + encoded.len());
    bytes.put_u32(encoded.len() as u32);
    bytes.put_slice(&encoded);
    stream.write_all(&bytes).await
}

/// Reads a message of the handshake whose length was read already.
///
/// # Errors
/// Of the connection, or when it is no such message.
pub async fn greeted_of<M: Message + Default>(
    stream: &mut (impl AsyncRead + Unpin),
    length: u32,
) -> io::Result<M> {
    let length = length as usize;
    if length > MAX_GREETING {
        return Err(io::Error::other(format!("a greeting of {length} bytes")));
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    M::decode(bytes.as_slice()).map_err(io::Error::other)
}

/// Reads a message of the handshake.
///
/// # Errors
/// Of the connection, or when it is no such message.
pub async fn greeted<M: Message + Default>(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<M> {
    let length = stream.read_u32().await?;
    greeted_of(stream, length).await
}

/// A frame as it goes over the connection.
pub fn encode(outgoing: &Outgoing) -> Bytes {
    let mut bytes = BytesMut::with_capacity(4 + HEADER + outgoing.frame.len());
    bytes.put_u32((HEADER + outgoing.frame.len()) as u32);
    bytes.put_u64(outgoing.sequence);
    bytes.put_u64(outgoing.acknowledged);
    bytes.put_slice(&outgoing.frame);
    bytes.freeze()
}

/// Reads the next frame.
///
/// # Errors
/// Of the connection, or when it is no frame.
pub async fn read_frame(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Outgoing> {
    let length = stream.read_u32().await? as usize;
    if !(HEADER..=HEADER + MAX_FRAME).contains(&length) {
        return Err(io::Error::other(format!("a frame of {length} bytes")));
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    let mut bytes = Bytes::from(bytes);
    let (sequence, acknowledged) = (bytes.get_u64(), bytes.get_u64());
    if (sequence == 0) != bytes.is_empty() {
        return Err(io::Error::other("a frame without a number, or a number without a frame"));
    }
    Ok(Outgoing { sequence, acknowledged, frame: bytes })
}

/// A stream's frame as bytes of the link.
pub fn pack(frame: &StreamFrame) -> Bytes {
    frame.encode_to_vec().into()
}

/// The stream's frame in bytes of the link.
///
/// # Errors
/// When it is none.
pub fn unpack(bytes: Bytes) -> io::Result<StreamFrame> {
    StreamFrame::decode(bytes).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_one_key_role_and_pair_of_nonces() {
        let key = SessionKey::new(&SessionKey::derive(b"master", "u1"));
        let other = SessionKey::new(&SessionKey::derive(b"master", "u2"));
        let (a, b) = ([1; NONCE], [2; NONCE]);
        let proof = key.prove("shim", &a, &b);
        assert!(key.verifies("shim", &a, &b, &proof));
        assert!(!key.verifies("hub", &a, &b, &proof));
        assert!(!key.verifies("shim", &b, &a, &proof));
        assert!(!other.verifies("shim", &a, &b, &proof));
        assert!(!key.verifies("shim", &[], &b, &key.prove("shim", &[], &b)), "a nonce is not optional");
    }

    #[tokio::test]
    async fn frames_keep_their_bounds() {
        let outgoing = Outgoing { sequence: 3, acknowledged: 9, frame: "hello".into() };
        let bytes = encode(&outgoing);
        assert_eq!(read_frame(&mut bytes.as_ref()).await.unwrap(), outgoing);
        let long = ((HEADER + MAX_FRAME + 1) as u32).to_be_bytes();
        assert!(read_frame(&mut long.as_slice()).await.is_err());
        let numbered_nothing = encode(&Outgoing { sequence: 1, acknowledged: 0, frame: Bytes::new() });
        assert!(read_frame(&mut numbered_nothing.as_ref()).await.is_err());
        assert!(greeted::<StreamFrame>(&mut u32::MAX.to_be_bytes().as_slice()).await.is_err());
    }
}
