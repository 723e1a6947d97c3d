//! Bodies on their way through: counted, never collected.

use std::{
    pin::Pin,
    sync::{Arc, atomic::AtomicU64, atomic::Ordering::Relaxed},
    task::{Context, Poll, ready},
};

use axum::body::Body;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};

use crate::metrics::{Metrics, add};

/// Counts a request as active until it is dropped: with its response's body, or with the client.
pub(crate) struct Active(Arc<Metrics>);

impl Active {
    pub(crate) fn new(metrics: &Arc<Metrics>) -> Self {
        add(&metrics.active, 1);
        Self(Arc::clone(metrics))
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Relaxed);
    }
}

/// Which way a body travels.
#[derive(Clone, Copy)]
pub(crate) enum Direction {
    In,
    Out,
}

/// A body that counts its bytes, and passes on everything else as it is: an error, above all, so
/// that a response that broke off looks broken to the client, too.
pub(crate) struct Counted<B> {
    inner: B,
    metrics: Arc<Metrics>,
    direction: Direction,
    _active: Option<Active>,
}

impl<B> Counted<B> {
    pub(crate) fn new(
        inner: B,
        metrics: &Arc<Metrics>,
        direction: Direction,
        active: Option<Active>,
    ) -> Self {
        Self {
            inner,
            metrics: Arc::clone(metrics),
            direction,
            _active: active,
        }
    }

    fn counter(&self) -> &AtomicU64 {
        match self.direction {
            Direction::In => &self.metrics.bytes_in,
            Direction::Out => &self.metrics.bytes_out,
        }
    }
}

impl<B: HttpBody<Data = Bytes> + Unpin> HttpBody for Counted<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(context));
        match &frame {
            Some(Ok(frame)) => {
                let len = frame.data_ref().map_or(0, Bytes::len);
                add(self.counter(), len as u64);
            }
            Some(Err(_)) if matches!(self.direction, Direction::Out) => {
                add(&self.metrics.broken_off, 1);
            }
            _ => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A request's body, counted.
pub(crate) fn incoming(body: Body, metrics: &Arc<Metrics>) -> Body {
    // An empty one stays recognisable as such.
    if body.is_end_stream() {
        return body;
    }
    Body::new(Counted::new(body, metrics, Direction::In, None))
}
