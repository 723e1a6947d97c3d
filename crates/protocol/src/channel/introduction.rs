//! What is said first in a life, before HTTP/2: who the guest is now.
//!
//! Each side says one message: the host who the guest is to be
//! ([`InitRequest`](crate::guest_api::InitRequest)), the guest whether it is that now
//! ([`Introduced`](crate::guest_api::Introduced)). A message is its length, 32 bits and big-endian, and
//! so many bytes of postcard. It is neither HTTP nor JSON because of what those cost at the one moment
//! when it counts: a restored guest runs every part of its code for the first time, and until it has
//! said this nobody can use it. A host uses
//! [`HostChannel::introduce`](super::host::HostChannel::introduce), which also knows how older guests
//! say it.

use std::io;

use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Longest message, in bytes: an environment is the largest thing in it.
pub const MAX_LEN: u32 = 8 << 20;

/// Says `message`, in one write, and flushes it.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`] if it is longer than [`MAX_LEN`]; or if the other side cannot be
/// written to.
pub async fn say<T>(io: &mut T, message: &impl Serialize) -> io::Result<()>
where
    T: AsyncWrite + Unpin,
{
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidInput, error);
    say_bytes(
        io,
        postcard::to_extend(message, vec![0; 4]).map_err(invalid)?,
    )
    .await
}

/// Says a message of any format, in a buffer whose first four bytes are left for its length.
pub(super) async fn say_bytes<T>(io: &mut T, mut framed: Vec<u8>) -> io::Result<()>
where
    T: AsyncWrite + Unpin,
{
    let len = framed
        .len()
        .checked_sub(4)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let len = u32::try_from(len).ok().filter(|len| *len <= MAX_LEN);
    let len = len.ok_or(io::ErrorKind::InvalidInput)?;
    framed[..4].copy_from_slice(&len.to_be_bytes());
    io.write_all(&framed).await?;
    io.flush().await
}

/// Hears what the other side says, and not a byte more.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] if it is longer than [`MAX_LEN`] or no such message; or if the other
/// side cannot be read from, or ends.
pub async fn hear<M, T>(io: &mut T) -> io::Result<M>
where
    M: DeserializeOwned,
    T: AsyncRead + Unpin,
{
    let message = hear_bytes(io).await?;
    postcard::from_bytes(&message)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Hears a message of any format.
pub(super) async fn hear_bytes<T>(io: &mut T) -> io::Result<Vec<u8>>
where
    T: AsyncRead + Unpin,
{
    let len = io.read_u32().await?;
    if len > MAX_LEN {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut message = vec![0; len as usize];
    io.read_exact(&mut message).await?;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_message_arrives_whole_and_what_follows_is_left() {
        let (mut near, mut far) = tokio::io::duplex(16);
        let message: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
        let sent = message.clone();
        tokio::spawn(async move {
            say(&mut near, &sent).await.unwrap();
            say(&mut near, &()).await.unwrap();
            near.write_all(b"PRI *").await.unwrap();
        });
        assert_eq!(hear::<Vec<u8>, _>(&mut far).await.unwrap(), message);
        hear::<(), _>(&mut far).await.unwrap();
        let mut rest = String::new();
        far.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "PRI *");
    }

    #[tokio::test]
    async fn a_length_that_nobody_means_is_refused() {
        let (mut near, mut far) = tokio::io::duplex(16);
        near.write_all(&[0xff; 4]).await.unwrap();
        let refused = hear::<String, _>(&mut far).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
        near.write_all(&[0, 0, 0, 2, 9, b'?']).await.unwrap();
        let cut_short = hear::<String, _>(&mut far).await.unwrap_err();
        assert_eq!(cut_short.kind(), io::ErrorKind::InvalidData);
        drop(near);
        let ended = hear::<String, _>(&mut far).await.unwrap_err();
        assert_eq!(ended.kind(), io::ErrorKind::UnexpectedEof);
        let (mut near, _far) = tokio::io::duplex(16);
        let long = vec![0_u8; MAX_LEN as usize + 1];
        let refused = say(&mut near, &long).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }
}
