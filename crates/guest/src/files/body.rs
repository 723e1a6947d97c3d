//! The body of a request that may be answered before it has arrived.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::{Body, BodyDataStream};
use bytes::Bytes;
use futures::{Stream, StreamExt as _};

/// How much of a refused body is still read, in bytes.
const MAX_REST: usize = 64 << 20;

/// For how long.
const MAX_TIME: Duration = Duration::from_secs(30);

/// A body as a stream. Dropped before its end, it reads and discards the rest in the background:
/// many clients look at the answer only once they have sent everything, and take a connection that
/// closes before that for an accident.
pub(super) struct Incoming {
    rest: Option<BodyDataStream>,
}

impl Incoming {
    pub(super) fn new(body: Body) -> Self {
        Self {
            rest: Some(body.into_data_stream()),
        }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(body) = &mut self.rest else {
            return Poll::Ready(None);
        };
        let item = std::task::ready!(body.poll_next_unpin(context));
        if !matches!(item, Some(Ok(_))) {
            self.rest = None;
        }
        Poll::Ready(item.map(|item| item.map_err(io::Error::other)))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        let (Some(mut rest), Ok(runtime)) =
            (self.rest.take(), tokio::runtime::Handle::try_current())
        else {
            return;
        };
        runtime.spawn(tokio::time::timeout(MAX_TIME, async move {
            let mut left = MAX_REST;
            while let Some(Ok(piece)) = rest.next().await {
                match left.checked_sub(piece.len()) {
                    Some(less) => left = less,
                    None => break,
                }
            }
        }));
    }
}
