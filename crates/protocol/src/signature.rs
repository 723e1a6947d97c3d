//! Signed file URLs, version 1: who holds a sandbox's token can let others read or write one file.
//!
//! E2B's clients compute the signature; the guest checks it. The host recomputes it only to find
//! out whose URL it is, since such a URL need not name its sandbox.

use base64::{Engine as _, prelude::BASE64_STANDARD_NO_PAD};
use sha2::{Digest as _, Sha256};

/// What a signature in a URL allows.
#[derive(Debug, Clone, Copy)]
pub struct SignedAccess<'a> {
    /// The path as the URL spells it, empty if it has none.
    pub path: &'a str,
    /// `read` or `write`.
    pub operation: &'a str,
    /// The user that the URL names, empty if it names none.
    pub user: &'a str,
    /// When the permission ends, in seconds since the Unix epoch, as the URL spells it.
    pub expiration: Option<&'a str>,
}

impl SignedAccess<'_> {
    /// `v1_` and the base64, without padding, of `sha256(path:operation:user:token[:expiration])`.
    #[must_use]
    pub fn sign(&self, token: &str) -> String {
        let mut hash = Sha256::new();
        for part in [self.path, self.operation, self.user] {
            hash.update(part);
            hash.update(":");
        }
        hash.update(token);
        if let Some(expiration) = self.expiration {
            hash.update(":");
            hash.update(expiration);
        }
        format!("v1_{}", BASE64_STANDARD_NO_PAD.encode(hash.finalize()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reference value was computed with sha256sum(1) and base64(1).
    #[test]
    fn a_signature_is_that_of_version_1() {
        let access = SignedAccess {
            path: "a.txt",
            operation: "read",
            user: "user",
            expiration: None,
        };
        assert_eq!(
            access.sign("secret"),
            "v1_stkmA8e+jgqVlHtN1q0Lnds8E2BBfIwi1iepkQ4hdh4"
        );
        let bounded = SignedAccess {
            expiration: Some("1700000000"),
            ..access
        };
        assert_ne!(bounded.sign("secret"), access.sign("secret"));
    }
}
