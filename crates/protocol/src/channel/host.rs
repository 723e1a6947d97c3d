//! The host's side: begins a life and is a plain byte stream from then on.

use std::{
    future::poll_fn,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use memchr::memmem;
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    ESCAPE, Error, HELLO_LEN, Hello, MAGIC, Nonce, REPLY, Stuffer, VERSION, VERSION_WITH_JSON,
    introduction,
};

/// Most slices of one vectored write that are looked at.
const MAX_SLICES: usize = 32;

/// Begins a life on `io`: sends the Hello, drops every byte of older lives, returns when the guest's
/// Reply to this `nonce` has arrived.
///
/// Waits for as long as the guest does not answer: give it a timeout, and after one drop `io` and
/// try again on a fresh connection with a fresh nonce. Dropping the future or the result at any
/// point leaves the port in a state from which the next handshake recovers.
///
/// # Errors
/// [`Error::Io`] and [`Error::Closed`] when `io` fails or ends; [`Error::Version`] when the guest
/// speaks another version.
pub async fn handshake<T>(mut io: T, nonce: Nonce) -> Result<HostChannel<T>, Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let hello = Hello::new(nonce).to_bytes();
    let mut greeting = Greeting {
        unsent: &hello,
        flushed: false,
    };
    let mut seen = Vec::with_capacity(4096);
    loop {
        let read = poll_fn(|cx| {
            // The guest may be stuck writing for an older life: read, whether or not it takes the
            // hello.
            if let Poll::Ready(Err(source)) = greeting.poll_send(&mut io, cx) {
                return Poll::Ready(Err(Error::Io {
                    doing: "sending the hello",
                    source,
                }));
            }
            poll_read_more(&mut io, cx, &mut seen).map_err(|source| Error::Io {
                doing: "waiting for the guest's reply",
                source,
            })
        })
        .await?;
        if read == 0 {
            return Err(Error::Closed);
        }
        match find_reply(&seen, nonce) {
            Search::Found { reply, end }
                if [VERSION, VERSION_WITH_JSON].contains(&reply.version) =>
            {
                seen.drain(..end);
                return Ok(HostChannel {
                    io,
                    version: reply.version,
                    early: seen,
                    early_read: 0,
                    stuffer: Stuffer::new(),
                    escape_due: false,
                });
            }
            Search::Found { reply, .. } => {
                return Err(Error::Version {
                    guest: reply.version,
                    host: VERSION,
                });
            }
            Search::Junk { len } => {
                seen.drain(..len);
            }
        }
    }
}

/// A Hello on its way out.
struct Greeting<'a> {
    unsent: &'a [u8],
    flushed: bool,
}

impl Greeting<'_> {
    fn poll_send<T>(&mut self, io: &mut T, cx: &mut Context<'_>) -> Poll<io::Result<()>>
    where
        T: AsyncWrite + Unpin,
    {
        while !self.unsent.is_empty() {
            let written = ready!(Pin::new(&mut *io).poll_write(cx, self.unsent))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unsent = &self.unsent[written..];
        }
        if !self.flushed {
            ready!(Pin::new(io).poll_flush(cx))?;
            self.flushed = true;
        }
        Poll::Ready(Ok(()))
    }
}

/// Appends what one read gives to `seen` and says how many bytes that was.
fn poll_read_more<T>(
    io: &mut T,
    cx: &mut Context<'_>,
    seen: &mut Vec<u8>,
) -> Poll<io::Result<usize>>
where
    T: AsyncRead + Unpin,
{
    let mut chunk = [0; 4096];
    let mut buf = ReadBuf::new(&mut chunk);
    ready!(Pin::new(io).poll_read(cx, &mut buf))?;
    seen.extend_from_slice(buf.filled());
    Poll::Ready(Ok(buf.filled().len()))
}

enum Search {
    /// The Reply ends at byte `end`.
    Found { reply: Hello, end: usize },
    /// The first `len` bytes hold no Reply to this nonce, nor its beginning.
    Junk { len: usize },
}

fn find_reply(seen: &[u8], nonce: Nonce) -> Search {
    for at in memmem::find_iter(seen, &MAGIC) {
        let Some((frame, _)) = seen[at..].split_first_chunk::<HELLO_LEN>() else {
            return Search::Junk { len: at };
        };
        if frame[MAGIC.len()] == REPLY
            && let Some((_, body)) = frame.split_last_chunk()
            && let Some(reply) = Hello::decode(body)
            && reply.nonce == nonce
        {
            return Search::Found {
                reply,
                end: at + HELLO_LEN,
            };
        }
    }
    Search::Junk {
        len: seen.len() - super::partial_match(seen),
    }
}

/// One life of the channel, seen from the host. Bytes written are stuffed, bytes read are raw.
///
/// As with any buffered writer, what was written has reached the guest only after a flush.
#[derive(Debug)]
pub struct HostChannel<T> {
    io: T,
    /// That the guest speaks: [`VERSION`] or [`VERSION_WITH_JSON`].
    version: u16,
    /// What came behind the Reply in the same read.
    early: Vec<u8>,
    early_read: usize,
    stuffer: Stuffer,
    escape_due: bool,
}

impl<T> HostChannel<T> {
    /// The stream underneath.
    #[must_use]
    pub fn get_ref(&self) -> &T {
        &self.io
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> HostChannel<T> {
    /// Tells the guest who it is to be, and returns what it says to that: the first thing in a life,
    /// in the format that the guest understands.
    ///
    /// # Errors
    /// As [`introduction::say`] and [`introduction::hear`].
    pub async fn introduce<M, A>(&mut self, message: &M) -> io::Result<A>
    where
        M: Serialize,
        A: DeserializeOwned,
    {
        if self.version == VERSION_WITH_JSON {
            let mut framed = vec![0; 4];
            serde_json::to_writer(&mut framed, message)?;
            introduction::say_bytes(self, framed).await?;
            let answer = introduction::hear_bytes(self).await?;
            return Ok(serde_json::from_slice(&answer)?);
        }
        introduction::say(self, message).await?;
        introduction::hear(self).await
    }
}

impl<T: AsyncWrite + Unpin> HostChannel<T> {
    fn poll_escape(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.escape_due {
            if ready!(Pin::new(&mut self.io).poll_write(cx, &[ESCAPE]))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.escape_due = false;
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for HostChannel<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.early_read < this.early.len() {
            let left = &this.early[this.early_read..];
            let len = left.len().min(buf.remaining());
            buf.put_slice(&left[..len]);
            this.early_read += len;
            if this.early_read == this.early.len() {
                this.early = Vec::new();
                this.early_read = 0;
            }
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut this.io).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for HostChannel<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_escape(cx))?;
        let run = this.stuffer.peek(buf);
        let written = ready!(Pin::new(&mut this.io).poll_write(cx, &buf[..run.len]))?;
        this.escape_due = this.stuffer.advance(&buf[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_escape(cx))?;
        // Runs up to and including the first that needs an escape behind it.
        let mut ahead = this.stuffer.clone();
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let mut used = 0;
        for (slot, buf) in slices.iter_mut().zip(bufs) {
            let run = ahead.peek(buf);
            *slot = IoSlice::new(&buf[..run.len]);
            used += 1;
            if ahead.advance(&buf[..run.len]) {
                break;
            }
        }
        let slices = &slices[..used];
        let written = ready!(Pin::new(&mut this.io).poll_write_vectored(cx, slices))?;
        let mut left = written;
        for slice in slices {
            let len = left.min(slice.len());
            this.escape_due = this.stuffer.advance(&slice[..len]) || this.escape_due;
            left -= len;
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_escape(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_escape(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}
