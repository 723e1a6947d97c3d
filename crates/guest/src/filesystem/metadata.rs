//! A file's key/value pairs, kept in extended attributes.

use std::{collections::BTreeMap, fs::File, io, path::Path};

use http::HeaderMap;
use xattr::FileExt as _;

/// Prefix of the attributes that hold metadata.
const NAMESPACE: &str = "user.e2b.";

/// Prefix of the request headers that carry metadata.
const HEADER_PREFIX: &str = "x-metadata-";

/// Longest key, in bytes: what the kernel allows for an attribute's name, less the prefix.
const MAX_KEY_LEN: usize = 255 - NAMESPACE.len();

/// Most that the pairs of one file may take, keys with prefix and values together, in bytes: what
/// ext4 can be relied upon to hold.
const MAX_TOTAL_LEN: usize = 4096;

/// Pairs that are fit to be stored.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Metadata(BTreeMap<String, String>);

/// Why metadata cannot be stored.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MetadataError {
    /// `X-Metadata-` and nothing after it.
    #[error("metadata key must not be empty")]
    EmptyKey,
    /// The kernel would refuse the attribute.
    #[error("metadata key '{0}' is longer than {MAX_KEY_LEN} bytes")]
    LongKey(String),
    /// A value holds something else than printable ASCII.
    #[error("metadata value for key '{0}' is not printable ASCII")]
    Value(String),
    /// Together it is more than a file can hold.
    #[error("metadata takes {0} bytes, more than {MAX_TOTAL_LEN}")]
    TooLarge(usize),
}

impl Metadata {
    /// The pairs that a request's `X-Metadata-<key>: <value>` headers hold. Keys are in lower case;
    /// of a header that comes twice, the first counts.
    ///
    /// # Errors
    /// [`MetadataError`].
    pub(crate) fn from_headers(headers: &HeaderMap) -> Result<Self, MetadataError> {
        let mut pairs = BTreeMap::new();
        let mut total = 0;
        // `HeaderName`s are in lower case, and are tokens: printable ASCII.
        for name in headers.keys() {
            let Some(key) = name.as_str().strip_prefix(HEADER_PREFIX) else {
                continue;
            };
            let value = headers
                .get(name)
                .map(http::HeaderValue::as_bytes)
                .unwrap_or_default();
            if key.is_empty() {
                return Err(MetadataError::EmptyKey);
            }
            if key.len() > MAX_KEY_LEN {
                return Err(MetadataError::LongKey(key.to_owned()));
            }
            let value = match std::str::from_utf8(value) {
                Ok(value) if value.bytes().all(|byte| matches!(byte, 0x20..=0x7e)) => value,
                _ => return Err(MetadataError::Value(key.to_owned())),
            };
            total += NAMESPACE.len() + key.len() + value.len();
            pairs.insert(key.to_owned(), value.to_owned());
        }
        if total > MAX_TOTAL_LEN {
            return Err(MetadataError::TooLarge(total));
        }
        Ok(Self(pairs))
    }

    /// The pairs that the file at `path` has, links followed. Whatever isn't text was not put there
    /// through the daemon and is left out; a file that cannot have any has none.
    pub(crate) fn read(path: &Path) -> BTreeMap<String, String> {
        let Ok(names) = xattr::list_deref(path) else {
            return BTreeMap::new();
        };
        names
            .filter_map(|name| {
                let key = name.to_str()?.strip_prefix(NAMESPACE)?.to_owned();
                let value = xattr::get_deref(path, &name).ok()??;
                Some((key, String::from_utf8(value).ok()?))
            })
            .collect()
    }

    /// Makes these pairs the only ones of `file`. A file system without attributes is no error:
    /// what was stored is to be read back.
    ///
    /// # Errors
    /// Whatever the kernel says, `ENOSPC` among them.
    pub(crate) fn write(&self, file: &File) -> io::Result<()> {
        match self.replace(file) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            result => result,
        }
    }

    fn replace(&self, file: &File) -> io::Result<()> {
        for name in file.list_xattr()? {
            let key = name.to_str().and_then(|name| name.strip_prefix(NAMESPACE));
            if key.is_some_and(|key| !self.0.contains_key(key)) {
                file.remove_xattr(&name)?;
            }
        }
        for (key, value) in &self.0 {
            file.set_xattr(format!("{NAMESPACE}{key}"), value.as_bytes())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    fn parse(pairs: &[(&str, &[u8])]) -> Result<Metadata, MetadataError> {
        let headers = pairs.iter().map(|(name, value)| {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            (name, HeaderValue::from_bytes(value).unwrap())
        });
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(name, value);
        }
        Metadata::from_headers(&map)
    }

    #[test]
    fn headers_become_pairs() {
        let metadata = parse(&[
            ("X-Metadata-Author", b"mish"),
            ("x-metadata-author", b"other"),
            ("x-metadata-empty", b""),
            ("x-meta", b"no"),
        ]);
        let want = [("author", "mish"), ("empty", "")];
        let want = want.map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(metadata.unwrap().0, BTreeMap::from(want));
    }

    #[test]
    fn limits_hold_to_the_byte() {
        let key = |len: usize| format!("x-metadata-{}", "k".repeat(len));
        assert!(parse(&[(&key(246), b"")]).is_ok());
        assert_eq!(
            parse(&[(&key(247), b"")]),
            Err(MetadataError::LongKey("k".repeat(247)))
        );
        let room = MAX_TOTAL_LEN - NAMESPACE.len() - 1;
        assert!(parse(&[("x-metadata-k", "v".repeat(room).as_bytes())]).is_ok());
        let over = parse(&[("x-metadata-k", "v".repeat(room + 1).as_bytes())]);
        assert_eq!(over, Err(MetadataError::TooLarge(MAX_TOTAL_LEN + 1)));
        assert_eq!(
            parse(&[("x-metadata-", b"v")]),
            Err(MetadataError::EmptyKey)
        );
        for bad in [&b"\xc3\xa4"[..], b"\xff", b"a\tb"] {
            let result = parse(&[("x-metadata-k", bad)]);
            assert_eq!(result, Err(MetadataError::Value("k".to_owned())), "{bad:?}");
        }
    }
}
