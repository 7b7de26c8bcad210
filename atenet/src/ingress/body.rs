// SPDX-License-Identifier: Apache-2.0
//! A request's body within its bounds: so many bytes, and never silent for too long.
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

const TOO_LARGE: u8 = 1;
const IDLE: u8 = 2;

/// Which bound a body met; the client of the upstream connection sees only that the body failed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fault(Arc<AtomicU8>);

impl Fault {
    pub(crate) fn too_large(&self) -> bool {
        self.0.load(Ordering::Relaxed) == TOO_LARGE
    }

    pub(crate) fn idle(&self) -> bool {
        self.0.load(Ordering::Relaxed) == IDLE
    }
}

pub(crate) struct Guarded<B> {
    inner: B,
    left: u64,
    idle: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    fault: Fault,
}

impl<B> Guarded<B> {
    /// `limit` in bytes; `idle` is the longest silence while somebody waits for the body.
    pub(crate) fn new(inner: B, limit: u64, idle: Duration) -> (Self, Fault) {
        let fault = Fault::default();
        (Self { inner, left: limit, idle, timer: None, fault: fault.clone() }, fault)
    }

    fn fail(&self, fault: u8, text: &str) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        self.fault.0.store(fault, Ordering::Relaxed);
        Poll::Ready(Some(Err(io::Error::other(text.to_owned()))))
    }
}

impl<B> Body for Guarded<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::error::Error + Send + Sync + 'static,
{
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match Pin::new(&mut self.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                self.timer = None;
                let len = frame.data_ref().map_or(0, Bytes::len) as u64;
                match self.left.checked_sub(len) {
                    Some(left) => {
                        self.left = left;
                        Poll::Ready(Some(Ok(frame)))
                    }
                    None => self.fail(TOO_LARGE, "the body is too long"),
                }
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(io::Error::other(error)))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => {
                let idle = self.idle;
                let timer = self
                    .timer
                    .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + idle)));
                match timer.as_mut().poll(cx) {
                    Poll::Ready(()) => self.fail(IDLE, "the body was silent for too long"),
                    Poll::Pending => Poll::Pending,
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{BodyExt as _, Full, StreamBody};

    #[tokio::test]
    async fn a_body_beyond_its_limit_fails_and_one_at_it_does_not() {
        let body = || Full::new(Bytes::from_static(b"12345"));
        let (guarded, fault) = Guarded::new(body(), 5, Duration::from_secs(1));
        assert_eq!(guarded.collect().await.unwrap().to_bytes(), "12345");
        assert!(!fault.too_large());
        let (guarded, fault) = Guarded::new(body(), 4, Duration::from_secs(1));
        assert!(guarded.collect().await.is_err());
        assert!(fault.too_large() && !fault.idle());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_body_fails_after_its_idle_bound() {
        let silent = StreamBody::new(futures::stream::pending::<io::Result<Frame<Bytes>>>());
        let (guarded, fault) = Guarded::new(silent, 5, Duration::from_secs(30));
        let start = Instant::now();
        assert!(guarded.collect().await.is_err());
        assert_eq!(start.elapsed().as_secs(), 30);
        assert!(fault.idle());
    }
}
