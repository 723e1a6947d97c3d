use std::{
    future::poll_fn,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use cubicle_protocol::channel::{Detector, Event, Hello};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Port;

/// How much is read between lives, and where payload has to be moved, in bytes.
const CHUNK: usize = 4096;

/// The port and where its bytes stand between two lives.
#[derive(Debug)]
pub(super) struct Wire {
    port: Port,
    detector: Detector,
    /// Read from the port and not yet looked at, from `staged_at` on.
    staged: Vec<u8>,
    staged_at: usize,
    /// The life that is about to begin. Nothing of the one before is written any more.
    next: Option<Hello>,
}

impl Wire {
    pub(super) fn new(port: Port) -> Self {
        let detector = Detector::new();
        Self {
            port,
            detector,
            staged: Vec::new(),
            staged_at: 0,
            next: None,
        }
    }

    /// Waits for the next hello. Payload before it belongs to no life and is dropped.
    pub(super) async fn hello(&mut self) -> io::Result<Hello> {
        loop {
            if let Some(hello) = self.next.take() {
                return Ok(hello);
            }
            let mut dropped = [0; CHUNK];
            let mut dropped = ReadBuf::new(&mut dropped);
            match poll_fn(|cx| self.poll_payload(cx, &mut dropped)).await {
                Ok(()) => {}
                // That is what is being waited for.
                Err(_) if self.next.is_some() => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Confirms the hello. The host discards what came before, be it half a frame.
    pub(super) async fn reply(&mut self, hello: Hello) -> io::Result<()> {
        let reply = Hello::new(hello.nonce).to_reply_bytes();
        let mut rest = &reply[..];
        while !rest.is_empty() {
            let written = poll_fn(|cx| self.port.poll_write(cx, &[IoSlice::new(rest)])).await?;
            rest = &rest[written..];
        }
        Ok(())
    }

    /// The life that has just been confirmed, as a stream of bytes.
    pub(super) fn life(&mut self) -> Life<'_> {
        Life { wire: self }
    }

    /// Puts payload of the current life into `buf`. Fails if that life is over.
    fn poll_payload(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if self.next.is_some() {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            if self.staged_at < self.staged.len() {
                if self.take_staged(buf) {
                    return Poll::Ready(Ok(()));
                }
                continue;
            }
            let space = buf.initialize_unfilled();
            if space.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let mut read = ready!(self.port.poll_read(cx, space))?;
            // One read gives a page at most; fill the buffer while there is more.
            while read < space.len() {
                match self.port.try_read(&mut space[read..]) {
                    0 => break,
                    more => read += more,
                }
            }
            let read = &space[..read];
            let before = self.detector.clone();
            let mut input = read;
            let event = self.detector.next(&mut input);
            // Not just as long: a magic that was held back is not in `read`.
            if matches!(event, Some(Event::Data(data)) if std::ptr::eq(data, read)) {
                // The usual case: all of it is payload, and where it should be.
                let len = read.len();
                buf.advance(len);
                return Poll::Ready(Ok(()));
            }
            self.detector = before;
            self.staged.clear();
            self.staged.extend_from_slice(read);
            self.staged_at = 0;
        }
    }

    /// Moves staged payload into `buf`. False: there was none, or a hello.
    fn take_staged(&mut self, buf: &mut ReadBuf<'_>) -> bool {
        let start = buf.filled().len();
        while buf.remaining() > 0 && self.next.is_none() {
            // No more than fits: a piece as long as its payload, or shorter with an escape in it.
            let end = self.staged.len().min(self.staged_at + buf.remaining());
            let piece = &self.staged[self.staged_at..end];
            let mut input = piece;
            let event = self.detector.next(&mut input);
            self.staged_at += piece.len() - input.len();
            match event {
                Some(Event::Data(data)) if data.len() <= buf.remaining() => buf.put_slice(data),
                Some(Event::Data(data)) => {
                    // A magic that was held back, longer than what is left of a tiny buffer.
                    let (now, later) = data.split_at(buf.remaining());
                    buf.put_slice(now);
                    let mut staged = later.to_vec();
                    staged.extend_from_slice(&self.staged[self.staged_at..]);
                    // It is a piece of a magic, which the detector must not see again.
                    self.detector = Detector::new();
                    self.staged = staged;
                    self.staged_at = 0;
                }
                Some(Event::Hello(hello)) => self.next = Some(hello),
                None if self.staged_at < self.staged.len() => {}
                None => break,
            }
        }
        buf.filled().len() > start
    }
}

/// One life, until the next hello: reading and writing fail from then on.
pub(super) struct Life<'a> {
    wire: &'a mut Wire,
}

impl Life<'_> {
    fn poll_write_slices(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.wire.next.is_some() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        self.wire.port.poll_write(cx, bufs)
    }
}

impl AsyncRead for Life<'_> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.get_mut().wire.poll_payload(cx, buf)
    }
}

impl AsyncWrite for Life<'_> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_write_slices(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_write_slices(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The port has no end; only a hello ends a life.
        Poll::Ready(Ok(()))
    }
}
