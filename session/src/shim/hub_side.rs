// SPDX-License-Identifier: Apache-2.0
//! The port that the hub dials.
use std::io;
use std::sync::Arc;
use std::time::Duration;

use substrate_proto::session::{Attach, Attached, Challenge, Position, Proof};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::mux::Mux;
use crate::wire::{self, NONCE, SessionKey};

/// Connections that have not proved anything yet.
const MAX_STRANGERS: usize = 8;
const HANDSHAKE: Duration = Duration::from_secs(5);
/// "GET ", where the length of a greeting would stand.
const HTTP: u32 = u32::from_be_bytes(*b"GET ");
const READY: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

/// Serves the port for ever. The hub is told whether `shell` is there.
pub async fn serve(listener: TcpListener, key: SessionKey, mux: Mux, shell: &'static str) {
    let strangers = Arc::new(Semaphore::new(MAX_STRANGERS));
    loop {
        let Ok(permit) = Arc::clone(&strangers).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept the hub");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (key, mux) = (key.clone(), mux.clone());
        tokio::spawn(async move {
            let shaken = tokio::time::timeout(HANDSHAKE, shake_hands(stream, &key, &mux, shell)).await;
            drop(permit);
            match shaken {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a connection to the hub's port was refused"),
                Err(_) => tracing::debug!("a connection to the hub's port said too little"),
            }
        });
    }
}

/// Handles one connection: gives it to the link, or closes it.
async fn shake_hands(mut stream: TcpStream, key: &SessionKey, mux: &Mux, shell: &str) -> io::Result<()> {
    let refused = |why: &str| Err(io::Error::new(io::ErrorKind::PermissionDenied, why.to_owned()));
    stream.set_nodelay(true)?;
    let length = stream.read_u32().await?;
    if length == HTTP {
        // The request is short; what is not read yet would turn the close into a reset.
        let mut request = [0; 2048];
        let length = stream.read(&mut request).await?;
        tracing::trace!(length, "asked whether the shim is ready");
        stream.write_all(READY).await?;
        stream.shutdown().await?;
        return Ok(());
    }
    let challenge: Challenge = wire::greeted_of(&mut stream, length).await?;
    if challenge.version != wire::VERSION || challenge.nonce.len() != NONCE {
        return refused("another version of the protocol");
    }
    let nonce: [u8; NONCE] = wire::random()?;
    let ours = mux.stand().await.map_err(io::Error::other)?;
    let mac = key.prove("shim", &challenge.nonce, &nonce);
    // Asked each time: the workload may have installed it.
    let lacks_shell = !std::path::Path::new(shell).exists();
    let proof = Proof { nonce: nonce.to_vec(), mac, position: Some(ours.clone()), lacks_shell };
    wire::greet(&mut stream, &proof).await?;
    let attach: Attach = wire::greeted(&mut stream).await?;
    if !key.verifies("hub", &challenge.nonce, &nonce, &attach.mac) {
        return refused("who dialled is not the hub");
    }
    let other: Position = attach.position.unwrap_or_default();
    let continues = attach.continues && mux.accepts(other.clone()).await.map_err(io::Error::other)?;
    if attach.fresh_link == 0 {
        return refused("no id for a fresh link");
    }
    wire::greet(&mut stream, &Attached { continues }).await?;
    let fresh = (!continues).then_some(attach.fresh_link);
    if !mux.attach(ours, other, fresh, stream).await.map_err(io::Error::other)? {
        return refused("frames arrived over the connection before; the handshake has to be done again");
    }
    Ok(())
}
