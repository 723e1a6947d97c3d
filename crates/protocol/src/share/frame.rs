//! Messages as bytes: `length: u32`, `length of the head: u16`, the head, the data. Numbers are
//! little-endian, and the length counts everything after itself.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};

use super::{Entry, MAX_DATA, MAX_FRAME, MAX_HEAD};

const LENGTH: usize = size_of::<u32>();
pub(super) const PREFIX: usize = LENGTH + size_of::<u16>();

/// A stream of frames that makes no sense, or a message that fits into none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A frame is longer or shorter than one can be.
    #[error("a frame of {0} bytes cannot be")]
    Length(usize),
    /// The head of a message is longer than [`MAX_HEAD`] or than its frame.
    #[error("a message's head of {0} bytes cannot be")]
    Head(usize),
    /// The data of a message are longer than [`MAX_DATA`].
    #[error("a message's {0} bytes of data are too many")]
    Data(usize),
    /// A head is not what it should be.
    #[error("a message cannot be read: {0}")]
    Message(#[from] postcard::Error),
}

/// One message and the data that follow it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame<T> {
    /// The message.
    pub message: T,
    /// Its data; empty for most.
    pub data: Bytes,
}

/// The frame of `message` with `data` behind it.
///
/// # Errors
/// [`Error`] if it is too long.
pub fn encode<T: Serialize>(message: &T, data: &[u8]) -> Result<Bytes, Error> {
    let mut frame = begin(message, data.len(), data.len())?;
    frame.put_slice(data);
    Ok(frame.freeze())
}

/// The frame of `message` up to its data, of which `data_len` bytes have to follow in the stream.
///
/// # Errors
/// [`Error`] if it is too long.
pub fn encode_head<T: Serialize>(message: &T, data_len: usize) -> Result<Bytes, Error> {
    Ok(begin(message, data_len, 0)?.freeze())
}

/// The same, with room for so many bytes more.
fn begin<T: Serialize>(message: &T, data_len: usize, room: usize) -> Result<BytesMut, Error> {
    if data_len > MAX_DATA {
        return Err(Error::Data(data_len));
    }
    let head = postcard::to_allocvec(message)?;
    let head_len = u16::try_from(head.len())
        .ok()
        .filter(|_| head.len() <= MAX_HEAD)
        .ok_or(Error::Head(head.len()))?;
    let rest = size_of::<u16>() + head.len() + data_len;
    let mut frame = BytesMut::with_capacity(PREFIX + head.len() + room);
    frame.put_u32_le(u32::try_from(rest).map_err(|_| Error::Length(rest))?);
    frame.put_u16_le(head_len);
    frame.put_slice(&head);
    Ok(frame)
}

/// Puts the pieces of a stream together and takes the frames out of it.
#[derive(Debug, Default)]
pub struct Frames {
    buffer: BytesMut,
}

impl Frames {
    /// At the beginning of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next piece of the stream.
    pub fn push(&mut self, piece: &[u8]) {
        self.buffer.extend_from_slice(piece);
    }

    /// Takes the next frame; `None` if all of it has not come yet.
    ///
    /// # Errors
    /// [`Error`]; the rest of the stream is of no use then.
    pub fn take<T: DeserializeOwned>(&mut self) -> Result<Option<Frame<T>>, Error> {
        let Some((prefix, _)) = self.buffer.split_first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let rest = u32::from_le_bytes(*prefix) as usize;
        if rest < size_of::<u16>() || LENGTH + rest > MAX_FRAME {
            return Err(Error::Length(rest));
        }
        if self.buffer.len() < LENGTH + rest {
            self.buffer.reserve(LENGTH + rest - self.buffer.len());
            return Ok(None);
        }
        let mut frame = self.buffer.split_to(LENGTH + rest).freeze();
        frame.advance(LENGTH);
        let head_len = usize::from(frame.get_u16_le());
        if head_len > frame.len().min(MAX_HEAD) {
            return Err(Error::Head(head_len));
        }
        let head = frame.split_to(head_len);
        if frame.len() > MAX_DATA {
            return Err(Error::Data(frame.len()));
        }
        Ok(Some(Frame {
            message: postcard::from_bytes(&head)?,
            data: frame,
        }))
    }
}

/// Adds an entry to the data of an [`Answer::Entries`](super::Answer::Entries) unless that would
/// make them longer than `room`: `false` then.
///
/// # Errors
/// [`Error::Message`] if the entry cannot be encoded.
pub fn push_entry(data: &mut Vec<u8>, entry: &Entry, room: usize) -> Result<bool, Error> {
    let before = data.len();
    *data = postcard::to_extend(entry, std::mem::take(data))?;
    let fits = data.len() <= room;
    if !fits {
        data.truncate(before);
    }
    Ok(fits)
}

/// The entries in the data of an [`Answer::Entries`](super::Answer::Entries).
///
/// # Errors
/// [`Error::Message`] if they cannot be decoded.
pub fn entries(mut data: &[u8]) -> Result<Vec<Entry>, Error> {
    let mut entries = Vec::new();
    while !data.is_empty() {
        let (entry, rest) = postcard::take_from_bytes(data)?;
        entries.push(entry);
        data = rest;
    }
    Ok(entries)
}
