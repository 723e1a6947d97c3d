//! The part of ZMTP 3.0 that a client of kernels needs: framing, the NULL handshake, and sockets of
//! the types DEALER and SUB. Kernels listen on this machine's loopback, where nothing is gained by a
//! library of all of ZeroMQ.
//!
//! The specification is <https://rfc.zeromq.org/spec/23/>.

use std::io;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};

/// Set on every frame of a message but the last.
const MORE: u8 = 0b001;
/// The frame's length has eight bytes, not one.
const LONG: u8 = 0b010;
/// The frame is for the protocol, not for its user.
const COMMAND: u8 = 0b100;

const GREETING_SIZE: usize = 64;
/// Where the version and the mechanism are in a greeting.
const VERSION_AT: usize = 10;
const MECHANISM_AT: usize = 12;
const MECHANISM_SIZE: usize = 20;

/// Frames that a message may have: a Jupyter message has seven and a buffer or two.
const MAX_FRAMES: usize = 1024;

/// Why a peer cannot be talked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The connection failed or ended.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// What came is not ZMTP 3, or not the NULL mechanism.
    #[error("the peer speaks another protocol: {0}")]
    Protocol(&'static str),
}

/// What one end of a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Socket {
    /// Sends requests to a ROUTER and gets its replies, in any order.
    Dealer,
    /// Gets everything that a PUB publishes.
    Subscriber,
}

impl Socket {
    fn name(self) -> &'static str {
        match self {
            Self::Dealer => "DEALER",
            Self::Subscriber => "SUB",
        }
    }
}

/// What a peer sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// A message's frames.
    Message(Vec<Bytes>),
    /// A message of this many bytes, more than was allowed. It was read and dropped.
    Oversized(u64),
}

/// The end that messages are sent through.
#[derive(Debug)]
pub(crate) struct Sender<W> {
    writer: W,
    buffer: Vec<u8>,
}

/// The end that messages come out of.
#[derive(Debug)]
pub(crate) struct Receiver<R> {
    reader: BufReader<R>,
    max_size: u64,
}

/// Introduces this end as `socket` to the peer; a subscriber subscribes to everything. Messages
/// larger than `max_size` bytes will be dropped.
///
/// # Errors
/// [`Error`].
pub(crate) async fn handshake<R, W>(
    reader: R,
    mut writer: W,
    socket: Socket,
    max_size: u64,
) -> Result<(Sender<W>, Receiver<R>), Error>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    writer.write_all(&greeting()).await?;
    let mut reader = BufReader::new(reader);
    let mut theirs = [0; GREETING_SIZE];
    reader.read_exact(&mut theirs).await?;
    check(&theirs)?;

    let mut sender = Sender {
        writer,
        buffer: Vec::new(),
    };
    sender.frame(COMMAND, &ready(socket));
    sender.flush().await?;
    let mut receiver = Receiver { reader, max_size };
    let (flags, command) = receiver.small_frame().await?;
    if flags & COMMAND == 0 || !command.starts_with(b"\x05READY") {
        return Err(Error::Protocol("it refused the handshake"));
    }
    if socket == Socket::Subscriber {
        sender.send(&[&[1]]).await?;
    }
    Ok((sender, receiver))
}

fn greeting() -> [u8; GREETING_SIZE] {
    let mut greeting = [0; GREETING_SIZE];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[VERSION_AT] = 3;
    greeting[MECHANISM_AT..][..4].copy_from_slice(b"NULL");
    greeting
}

fn check(greeting: &[u8; GREETING_SIZE]) -> Result<(), Error> {
    if greeting[0] != 0xff || greeting[9] & 1 == 0 {
        return Err(Error::Protocol("it sent no ZMTP greeting"));
    }
    if greeting[VERSION_AT] < 3 {
        return Err(Error::Protocol("its version of ZMTP is older than 3"));
    }
    let mechanism = &greeting[MECHANISM_AT..][..MECHANISM_SIZE];
    if mechanism
        .strip_prefix(b"NULL")
        .is_none_or(|rest| rest.iter().any(|byte| *byte != 0))
    {
        return Err(Error::Protocol(
            "it wants another security mechanism than NULL",
        ));
    }
    Ok(())
}

fn ready(socket: Socket) -> Vec<u8> {
    let mut command = b"\x05READY".to_vec();
    for (name, value) in [("Socket-Type", socket.name()), ("Identity", "")] {
        // Both are literals, shorter than 256 bytes.
        command.push(name.len() as u8);
        command.extend_from_slice(name.as_bytes());
        command.extend_from_slice(&(value.len() as u32).to_be_bytes());
        command.extend_from_slice(value.as_bytes());
    }
    command
}

impl<W: AsyncWrite + Unpin> Sender<W> {
    /// Sends one message.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) async fn send(&mut self, frames: &[&[u8]]) -> Result<(), Error> {
        let Some((last, others)) = frames.split_last() else {
            return Ok(());
        };
        for frame in others {
            self.frame(MORE, frame);
        }
        self.frame(0, last);
        self.flush().await
    }

    fn frame(&mut self, flags: u8, body: &[u8]) {
        match u8::try_from(body.len()) {
            Ok(size) => self.buffer.extend_from_slice(&[flags, size]),
            Err(_) => {
                self.buffer.push(flags | LONG);
                let size = body.len() as u64;
                self.buffer.extend_from_slice(&size.to_be_bytes());
            }
        }
        self.buffer.extend_from_slice(body);
    }

    async fn flush(&mut self) -> Result<(), Error> {
        // Taken, so that a large message does not leave a large buffer behind.
        let buffer = std::mem::take(&mut self.buffer);
        self.writer.write_all(&buffer).await?;
        Ok(self.writer.flush().await?)
    }
}

impl<R: AsyncRead + Unpin> Receiver<R> {
    /// Waits for the next message. Not safe to cancel.
    ///
    /// # Errors
    /// [`Error`]; an end of the stream is [`Error::Io`] as well.
    pub(crate) async fn receive(&mut self) -> Result<Received, Error> {
        let mut frames = Vec::new();
        let mut total = 0_u64;
        loop {
            let (flags, size) = self.head().await?;
            total = total.saturating_add(size);
            if flags & COMMAND != 0 {
                // None that matters to these sockets.
                self.skip(size).await?;
                total -= size;
                continue;
            }
            if total > self.max_size || frames.len() == MAX_FRAMES {
                frames.clear();
                self.skip(size).await?;
            } else {
                let size = usize::try_from(size).map_err(io::Error::other)?;
                let mut body = Vec::with_capacity(size);
                let read = (&mut self.reader)
                    .take(size as u64)
                    .read_to_end(&mut body)
                    .await?;
                if read < size {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
                frames.push(Bytes::from(body));
            }
            if flags & MORE == 0 {
                return Ok(match total > self.max_size {
                    true => Received::Oversized(total),
                    false => Received::Message(frames),
                });
            }
        }
    }

    /// A frame of the handshake, which is never long.
    async fn small_frame(&mut self) -> Result<(u8, Vec<u8>), Error> {
        const MAX: u64 = 64 << 10;
        let (flags, size) = self.head().await?;
        if size > MAX {
            return Err(Error::Protocol("its handshake is too long"));
        }
        let mut body = vec![0; size as usize];
        self.reader.read_exact(&mut body).await?;
        Ok((flags, body))
    }

    async fn head(&mut self) -> Result<(u8, u64), Error> {
        let flags = self.reader.read_u8().await?;
        if flags & !(MORE | LONG | COMMAND) != 0 {
            return Err(Error::Protocol("a frame has unknown flags"));
        }
        let size = match flags & LONG {
            0 => self.reader.read_u8().await?.into(),
            _ => self.reader.read_u64().await?,
        };
        Ok((flags, size))
    }

    async fn skip(&mut self, size: u64) -> Result<(), Error> {
        let mut rest = (&mut self.reader).take(size);
        let skipped = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await?;
        if skipped < size {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{DuplexStream, duplex, split};

    use super::*;

    const MAX: u64 = 4096;

    /// Two ends that have introduced themselves to each other, with a pipe between them that holds
    /// `capacity` bytes.
    fn pair(capacity: usize) -> (Sender<DuplexStream>, Receiver<DuplexStream>) {
        let (writer, reader) = duplex(capacity);
        let sender = Sender {
            writer,
            buffer: Vec::new(),
        };
        let receiver = Receiver {
            reader: BufReader::new(reader),
            max_size: MAX,
        };
        (sender, receiver)
    }

    #[tokio::test]
    async fn the_bytes_of_a_greeting_and_a_subscription() {
        let (ours, mut peer) = duplex(4096);
        let (reader, writer) = split(ours);
        let client = tokio::spawn(handshake(reader, writer, Socket::Subscriber, MAX));
        let mut greeting = [0; 64];
        peer.read_exact(&mut greeting).await.unwrap();
        assert_eq!(&greeting[..10], b"\xff\0\0\0\0\0\0\0\0\x7f");
        assert_eq!(&greeting[10..17], b"\x03\0NULL\0");
        assert!(greeting[17..].iter().all(|byte| *byte == 0));
        peer.write_all(&greeting).await.unwrap();
        peer.write_all(b"\x04\x06\x05READY").await.unwrap();
        let expected =
            b"\x04\x26\x05READY\x0bSocket-Type\0\0\0\x03SUB\x08Identity\0\0\0\0\0\x01\x01";
        let mut rest = vec![0; expected.len()];
        peer.read_exact(&mut rest).await.unwrap();
        assert_eq!(rest, expected);
        assert!(client.await.unwrap().is_ok());
    }

    #[tokio::test]
    async fn another_protocol_is_refused() {
        for answer in [
            &b"HTTP/1.1 400 Bad Request"[..],
            b"\xff\0\0\0\0\0\0\0\0\x7f\x02\0NULL",
            b"\xff\0\0\0\0\0\0\0\0\x7f\x03\0CURVE",
        ] {
            let mut greeting = [0; GREETING_SIZE];
            greeting[..answer.len()].copy_from_slice(answer);
            let (ours, mut peer) = duplex(4096);
            let (reader, writer) = split(ours);
            peer.write_all(&greeting).await.unwrap();
            let refused = handshake(reader, writer, Socket::Dealer, MAX).await;
            assert!(matches!(refused, Err(Error::Protocol(_))), "{answer:?}");
        }
    }

    #[tokio::test]
    async fn what_is_too_large_is_dropped_and_the_next_message_is_not() {
        let (mut sender, mut receiver) = pair(64);
        let large = vec![7; 3000];
        let sending = tokio::spawn(async move {
            sender.send(&[&large, &large]).await.unwrap();
            sender.send(&[b"next"]).await.unwrap();
        });
        assert_eq!(receiver.receive().await.unwrap(), Received::Oversized(6000));
        let next = Received::Message(vec![Bytes::from_static(b"next")]);
        assert_eq!(receiver.receive().await.unwrap(), next);
        sending.await.unwrap();
        assert!(matches!(receiver.receive().await, Err(Error::Io(_))));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn messages_come_out_as_they_went_in(
            messages in prop::collection::vec(
                prop::collection::vec(prop::collection::vec(any::<u8>(), 0..400), 1..6), 1..6),
            capacity in 1_usize..600,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let (mut sender, mut receiver) = pair(capacity);
                let sent = messages.clone();
                let sending = tokio::spawn(async move {
                    for message in &sent {
                        let frames: Vec<&[u8]> = message.iter().map(Vec::as_slice).collect();
                        sender.send(&frames).await.unwrap();
                    }
                });
                for message in messages {
                    let frames = message.into_iter().map(Bytes::from).collect();
                    prop_assert_eq!(receiver.receive().await.unwrap(), Received::Message(frames));
                }
                sending.await.unwrap();
                Ok(())
            })?;
        }
    }
}
