use std::fmt;

use cubicle_protocol::signature::SignedAccess;
use subtle::ConstantTimeEq as _;

use super::Error;

/// The secret that opens a sandbox to whoever knows it. Never shown in logs.
#[derive(Clone, PartialEq, Eq)]
pub struct AccessToken(String);

impl AccessToken {
    /// Takes a token; none for an empty text.
    #[must_use]
    pub fn new(token: String) -> Option<Self> {
        (!token.is_empty()).then_some(Self(token))
    }

    /// Compares in a time that doesn't depend on where the two differ.
    #[must_use]
    pub fn matches(&self, candidate: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(candidate).into()
    }

    /// The signature of a URL.
    #[must_use]
    pub fn sign(&self, access: &Access<'_>) -> String {
        let expiration = access.expiration.map(|time| time.to_string());
        let access = SignedAccess {
            path: access.path,
            operation: access.operation.as_str(),
            user: access.user,
            expiration: expiration.as_deref(),
        };
        access.sign(&self.0)
    }

    /// Checks the signature of a request that arrives at `now` (seconds since the Unix epoch).
    ///
    /// # Errors
    /// [`Error::InvalidSignature`], and [`Error::ExpiredSignature`] only for a signature that is
    /// right: the expiration is part of what is signed.
    pub fn verify(&self, access: &Access<'_>, signature: &str, now: i64) -> Result<(), Error> {
        if !bool::from(self.sign(access).as_bytes().ct_eq(signature.as_bytes())) {
            return Err(Error::InvalidSignature);
        }
        match access.expiration {
            Some(expiration) if expiration < now => Err(Error::ExpiredSignature),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessToken(..)")
    }
}

/// What a signature in a URL allows.
#[derive(Debug, Clone, Copy)]
pub struct Access<'a> {
    /// The path as the URL spells it, empty if it has none.
    pub path: &'a str,
    /// Whether the file is read or written.
    pub operation: Operation,
    /// The user that the URL names, empty if it names none.
    pub user: &'a str,
    /// When the permission ends, in seconds since the Unix epoch.
    pub expiration: Option<i64>,
}

/// What a signed URL does to its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Download.
    Read,
    /// Upload.
    Write,
}

impl Operation {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCESS: Access<'_> = Access {
        path: "a.txt",
        operation: Operation::Read,
        user: "user",
        expiration: None,
    };

    fn token() -> AccessToken {
        AccessToken::new("secret".to_owned()).unwrap()
    }

    /// The reference values were computed with sha256sum(1) and base64(1).
    #[test]
    fn signatures_are_those_of_version_1() {
        assert_eq!(
            token().sign(&ACCESS),
            "v1_stkmA8e+jgqVlHtN1q0Lnds8E2BBfIwi1iepkQ4hdh4"
        );
        let access = Access {
            operation: Operation::Write,
            expiration: Some(1_700_000_000),
            ..ACCESS
        };
        assert_eq!(
            token().sign(&access),
            "v1_3R4qFqGl9ggoGeX+GtlUvtYBR/I/+OzEpBCN69+ASpU"
        );
    }

    #[test]
    fn every_part_of_a_request_is_signed() {
        let signature = token().sign(&ACCESS);
        assert!(token().verify(&ACCESS, &signature, 0).is_ok());
        for other in [
            Access {
                path: "b.txt",
                ..ACCESS
            },
            Access {
                operation: Operation::Write,
                ..ACCESS
            },
            Access { user: "", ..ACCESS },
            Access {
                expiration: Some(1),
                ..ACCESS
            },
        ] {
            let result = token().verify(&other, &signature, 0);
            assert!(matches!(result, Err(Error::InvalidSignature)), "{other:?}");
        }
        let other = AccessToken::new("other".to_owned()).unwrap();
        assert!(matches!(
            other.verify(&ACCESS, &signature, 0),
            Err(Error::InvalidSignature)
        ));
    }

    #[test]
    fn a_signature_ends_with_its_time() {
        let access = Access {
            expiration: Some(100),
            ..ACCESS
        };
        let signature = token().sign(&access);
        assert!(token().verify(&access, &signature, 100).is_ok());
        let late = token().verify(&access, &signature, 101);
        assert!(matches!(late, Err(Error::ExpiredSignature)));
        let wrong = token().verify(&access, "v1_x", 101);
        assert!(matches!(wrong, Err(Error::InvalidSignature)));
    }

    #[test]
    fn tokens_compare_whole_and_stay_secret() {
        assert!(token().matches(b"secret"));
        for wrong in ["", "secre", "secret ", "Secret"] {
            assert!(!token().matches(wrong.as_bytes()));
        }
        assert_eq!(format!("{:?}", token()), "AccessToken(..)");
        assert_eq!(AccessToken::new(String::new()), None);
    }
}
