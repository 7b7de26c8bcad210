// SPDX-License-Identifier: Apache-2.0
//! Bytes in both directions between two streams, counted, with one idle bound for the pair.
//!
//! A direction that ends is closed at the other side while the opposite one goes on (half-close). Nothing is
//! buffered beyond one block per direction: a slow reader slows its writer.
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::time::Instant;

const BLOCK: usize = 16 << 10;

/// Bytes that passed and when the last one did.
#[derive(Debug)]
pub(crate) struct Traffic {
    start: Instant,
    last_ms: AtomicU64,
    /// From the first stream to the second.
    sent: AtomicU64,
    /// From the second to the first.
    received: AtomicU64,
}

impl Traffic {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            start: Instant::now(),
            last_ms: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        })
    }

    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Counts bytes that were passed on outside of the pipe.
    pub(crate) fn add_sent(&self, bytes: usize) {
        self.note(&self.sent, bytes);
    }

    fn note(&self, counter: &AtomicU64, bytes: usize) {
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(now, Ordering::Relaxed);
    }

    /// Returns once nothing has passed for so long.
    pub(crate) async fn idle(&self, limit: Duration) {
        loop {
            let last = self.start + Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
            if last.elapsed() >= limit {
                return;
            }
            tokio::time::sleep_until(last + limit).await;
        }
    }
}

/// How a pair of streams ended.
#[derive(Debug)]
pub(crate) enum End {
    /// Both directions were closed.
    Closed,
    /// Nothing passed for the idle bound.
    Idle,
    /// A stream broke.
    Broken(io::Error),
    /// The inspector refused what the first stream sent.
    Refused(String),
}

enum CopyError {
    Io(io::Error),
    Refused(String),
}

/// Carries bytes both ways until both directions have ended, one broke, nothing passed for `idle`, or `inspect`
/// refused a block that the first stream sent (before any of it is passed on).
pub(crate) async fn both_ways<A, B>(
    first: &mut A,
    second: &mut B,
    idle: Duration,
    traffic: &Traffic,
    mut inspect: impl FnMut(&[u8]) -> Result<(), String>,
) -> End
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (first_read, first_write) = tokio::io::split(first);
    let (second_read, second_write) = tokio::io::split(second);
    let out = copy(first_read, second_write, |block| {
        inspect(block)?;
        traffic.note(&traffic.sent, block.len());
        Ok(())
    });
    let back = copy(second_read, first_write, |block| {
        traffic.note(&traffic.received, block.len());
        Ok(())
    });
    tokio::select! {
        ended = async { tokio::try_join!(out, back) } => match ended {
            Ok(((), ())) => End::Closed,
            Err(CopyError::Io(error)) => End::Broken(error),
            Err(CopyError::Refused(reason)) => End::Refused(reason),
        },
        () = traffic.idle(idle) => End::Idle,
    }
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut on: impl FnMut(&[u8]) -> Result<(), String>,
) -> Result<(), CopyError> {
    let mut block = vec![0; BLOCK];
    loop {
        let len = from.read(&mut block).await.map_err(CopyError::Io)?;
        if len == 0 {
            // The peer may have gone already; the end of this direction is all that was to be said.
            return match to.shutdown().await {
                Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(CopyError::Io(error)),
                _ => Ok(()),
            };
        }
        on(&block[..len]).map_err(CopyError::Refused)?;
        to.write_all(&block[..len]).await.map_err(CopyError::Io)?;
    }
}

/// A stream whose bytes are counted: what is read counts as sent, what is written as received.
pub(crate) struct Counted<T> {
    inner: T,
    traffic: Arc<Traffic>,
}

impl<T> Counted<T> {
    pub(crate) fn new(inner: T, traffic: Arc<Traffic>) -> Self {
        Self { inner, traffic }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Counted<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        let len = buf.filled().len() - before;
        if len > 0 {
            self.traffic.note(&self.traffic.sent, len);
        }
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Counted<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        if let Poll::Ready(Ok(len)) = &polled {
            self.traffic.note(&self.traffic.received, *len);
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// A stream of which some bytes were read already; they come first.
pub(crate) struct Prefixed<T> {
    prefix: Vec<u8>,
    at: usize,
    inner: T,
}

impl<T> Prefixed<T> {
    pub(crate) fn new(prefix: Vec<u8>, inner: T) -> Self {
        Self { prefix, at: 0, inner }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Prefixed<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.at < self.prefix.len() {
            let len = buf.remaining().min(self.prefix.len() - self.at);
            buf.put_slice(&self.prefix[self.at..self.at + len]);
            self.at += len;
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Prefixed<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn both_directions_pass_and_half_close_is_kept() {
        let (mut client, mut left) = tokio::io::duplex(64);
        let (mut right, mut server) = tokio::io::duplex(64);
        let traffic = Traffic::new();
        let seen = traffic.clone();
        let task = tokio::spawn(async move {
            both_ways(&mut left, &mut right, Duration::from_secs(5), &seen, |_| Ok(())).await
        });
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut got = String::new();
        server.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "question");
        server.write_all(b"late answer").await.unwrap();
        drop(server);
        let mut got = String::new();
        client.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "late answer");
        assert!(matches!(task.await.unwrap(), End::Closed));
        assert_eq!((traffic.sent(), traffic.received()), (8, 11));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_pair_ends_after_the_idle_bound_and_a_talking_one_does_not() {
        let (mut client, mut left) = tokio::io::duplex(64);
        let (mut right, _server) = tokio::io::duplex(1024);
        let traffic = Traffic::new();
        let start = Instant::now();
        let task = tokio::spawn(async move {
            both_ways(&mut left, &mut right, Duration::from_mins(1), &traffic, |_| Ok(())).await
        });
        tokio::time::sleep(Duration::from_secs(40)).await;
        client.write_all(b"x").await.unwrap();
        assert!(matches!(task.await.unwrap(), End::Idle));
        assert_eq!(start.elapsed().as_secs(), 100);
    }

    #[tokio::test]
    async fn a_refused_block_does_not_pass() {
        let (mut client, mut left) = tokio::io::duplex(64);
        let (mut right, mut server) = tokio::io::duplex(64);
        client.write_all(b"bad").await.unwrap();
        let traffic = Traffic::new();
        let end =
            both_ways(&mut left, &mut right, Duration::from_secs(5), &traffic, |_| Err("no".into())).await;
        assert!(matches!(end, End::Refused(reason) if reason == "no"));
        drop(right);
        let mut got = Vec::new();
        server.read_to_end(&mut got).await.unwrap();
        assert!(got.is_empty());
    }
}
