use std::{fmt, io::Read, path::Path};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::{During as _, Result};

/// SHA-256 over a canonical description of everything that decides what an artefact holds.
///
/// Two artefacts of the same kind with the same fingerprint are interchangeable.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(String);

impl Fingerprint {
    /// The fingerprint of a description: its JSON form, whose field order is that of the type.
    pub fn of(description: &impl Serialize) -> Fingerprint {
        #[expect(
            clippy::expect_used,
            reason = "descriptions are structs of strings and numbers"
        )]
        let canonical = serde_json::to_vec(description).expect("a description has a JSON form");
        Fingerprint::of_bytes(&canonical)
    }

    pub(crate) fn of_bytes(bytes: &[u8]) -> Fingerprint {
        Fingerprint(hex::encode(Sha256::digest(bytes)))
    }

    pub(crate) fn of_file(path: &Path) -> Result<Fingerprint> {
        let read = || {
            let mut file = fs_err::File::open(path)?;
            let mut hasher = Sha256::new();
            let mut buffer = vec![0; 1 << 18];
            loop {
                match file.read(&mut buffer)? {
                    0 => {
                        return Ok::<_, std::io::Error>(Fingerprint(hex::encode(
                            hasher.finalize(),
                        )));
                    }
                    n => hasher.update(&buffer[..n]),
                }
            }
        };
        read().during("compute a fingerprint")
    }

    /// All 64 hexadecimal digits, in lower case.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 16 digits: 64 bits, enough to name a file in a cache.
    pub fn short(&self) -> &str {
        &self.0[..16]
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_and_its_bytes_have_the_same_fingerprint() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs_err::write(file.path(), b"abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(
            Fingerprint::of_file(file.path()).unwrap().as_str(),
            expected
        );
        assert_eq!(Fingerprint::of_bytes(b"abc").as_str(), expected);
        assert_eq!(Fingerprint::of_bytes(b"abc").short(), "ba7816bf8f01cfea");
    }
}
