use std::{fmt, io::Read, path::Path, str::FromStr};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// The SHA-256 of something, as `sha256:` and 64 hexadecimal digits in lower case.
///
/// Other algorithms, which the specification allows and no registry uses, are refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of bytes.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(Sha256::digest(bytes).into())
    }

    pub(crate) fn of_hash(hash: [u8; 32]) -> Digest {
        Digest(hash)
    }

    pub(crate) fn of_file(path: &Path) -> std::io::Result<Digest> {
        Digest::of_reader(fs_err::File::open(path)?)
    }

    pub(crate) fn of_reader(mut input: impl Read) -> std::io::Result<Digest> {
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 1 << 18];
        loop {
            match input.read(&mut buffer)? {
                0 => return Ok(Digest(hasher.finalize().into())),
                n => hasher.update(&buffer[..n]),
            }
        }
    }

    /// The hexadecimal digits.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Digest> {
        let mut hash = [0; 32];
        let parsed = text
            .strip_prefix("sha256:")
            .filter(|digits| !digits.bytes().any(|byte| byte.is_ascii_uppercase()))
            .is_some_and(|digits| hex::decode_to_slice(digits, &mut hash).is_ok());
        if !parsed {
            return Err(Error::Digest {
                text: text.to_owned(),
            });
        }
        Ok(Digest(hash))
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;

    fn try_from(text: String) -> Result<Digest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let digest = Digest::of(b"abc");
        let text = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest.to_string(), text);
        assert_eq!(text.parse::<Digest>().unwrap(), digest);
        for bad in [
            "",
            "sha256:",
            "sha256:ab",
            &text.to_uppercase(),
            &text.replace("sha256", "sha512"),
            &format!("{text}0"),
            &text.replace("ba", "BA"),
            "sha256:../../../../../../../../../../../../../../../../../../../../../../",
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
