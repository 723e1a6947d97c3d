use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{MAX_NAME, MAX_PATH};

/// A path below a share's root. Empty: the root itself.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct RelativePath(Vec<u8>);

/// Why some bytes are no [`RelativePath`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidPath {
    /// The path is longer than [`MAX_PATH`].
    #[error("a path of {0} bytes is too long")]
    TooLong(usize),
    /// One of its components is longer than [`MAX_NAME`].
    #[error("a name of {0} bytes is too long")]
    NameTooLong(usize),
    /// One of its components is empty, `.` or `..`, or has a `/` or NUL in it.
    #[error("a path has a component that is not a name")]
    NotAName,
}

impl RelativePath {
    /// The share's root.
    pub const ROOT: Self = Self(Vec::new());

    /// Checks that `bytes` are names joined by `/`, or nothing.
    ///
    /// # Errors
    /// [`InvalidPath`].
    pub fn new(bytes: Vec<u8>) -> Result<Self, InvalidPath> {
        if bytes.len() > MAX_PATH {
            return Err(InvalidPath::TooLong(bytes.len()));
        }
        if !bytes.is_empty() {
            bytes.split(|&byte| byte == b'/').try_for_each(check_name)?;
        }
        Ok(Self(bytes))
    }

    /// The path of `name` in this directory.
    ///
    /// # Errors
    /// [`InvalidPath`].
    pub fn join(&self, name: &[u8]) -> Result<Self, InvalidPath> {
        check_name(name)?;
        let mut bytes = Vec::with_capacity(self.0.len() + 1 + name.len());
        bytes.extend_from_slice(&self.0);
        if !bytes.is_empty() {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(name);
        if bytes.len() > MAX_PATH {
            return Err(InvalidPath::TooLong(bytes.len()));
        }
        Ok(Self(bytes))
    }

    /// The directory that it is in, and its name there. `None`: it is the root.
    #[must_use]
    pub fn split(&self) -> Option<(&[u8], &[u8])> {
        if self.0.is_empty() {
            return None;
        }
        Some(match self.0.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => (&self.0[..slash], &self.0[slash + 1..]),
            None => (b"", &self.0),
        })
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

fn check_name(name: &[u8]) -> Result<(), InvalidPath> {
    if name.len() > MAX_NAME {
        return Err(InvalidPath::NameTooLong(name.len()));
    }
    let bad = matches!(name, b"" | b"." | b"..") || name.iter().any(|&b| b == b'/' || b == 0);
    if bad {
        Err(InvalidPath::NotAName)
    } else {
        Ok(())
    }
}

impl fmt::Debug for RelativePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

impl fmt::Display for RelativePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        String::from_utf8_lossy(&self.0).fmt(f)
    }
}

impl Serialize for RelativePath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for RelativePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes: Vec<u8> = serde_bytes::deserialize(deserializer)?;
        Self::new(bytes).map_err(de::Error::custom)
    }
}
