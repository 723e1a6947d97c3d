//! Typed identifiers: what names a sandbox, a template, a snapshot or a node, and nothing else.
//!
//! Every id that reaches Cubicle from outside is parsed here, once, at the edge. Past that edge
//! an id is a value whose grammar is proven, so it may be used as a file name, a DNS label, a
//! cgroup name or a SQL parameter without further thought.
//!
//! Invariants:
//! - An id never contains `/`, `.`, a control character, white space or an upper-case letter.
//! - `parse(id.to_string()) == id` for every id.
//! - A sandbox id fits in the left-most DNS label together with a port: `65535-<id>`.

use std::{borrow::Borrow, fmt, str::FromStr};

use rand::RngExt as _;
use serde::{Deserialize, Serialize};

/// Number of random characters in a generated id: 36^19 values, more than 98 bits.
const RANDOM_LEN: usize = 19;
const ALPHABET: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdError {
    /// The text is empty or longer than the kind allows.
    #[error("a {kind} id has 1 to {max} characters, this one has {len}")]
    Length {
        /// What was parsed, for example `sandbox`.
        kind: &'static str,
        /// Longest text accepted, in bytes.
        max: usize,
        /// Length of the text, in bytes.
        len: usize,
    },
    /// The text holds a character outside the kind's alphabet.
    #[error("a {kind} id consists of {alphabet}")]
    Alphabet {
        /// What was parsed, for example `sandbox`.
        kind: &'static str,
        /// The characters that are allowed, for a person to read.
        alphabet: &'static str,
    },
}

fn random(prefix: &str) -> String {
    let mut rng = rand::rng();
    let tail = (0..RANDOM_LEN).map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())]));
    prefix.chars().chain(tail).collect()
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $prefix:literal, $max:literal, $allowed:expr, $alphabet:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Longest text accepted, in bytes.
            pub const MAX_LEN: usize = $max;

            /// A fresh random id.
            #[must_use]
            pub fn generate() -> Self {
                Self(random($prefix))
            }

            /// The id as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                if text.is_empty() || text.len() > Self::MAX_LEN {
                    return Err(ParseIdError::Length { kind: $kind, max: Self::MAX_LEN, len: text.len() });
                }
                let allowed: fn(u8) -> bool = $allowed;
                if !text.bytes().all(allowed) || !text.as_bytes()[0].is_ascii_alphanumeric() {
                    return Err(ParseIdError::Alphabet { kind: $kind, alphabet: $alphabet });
                }
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseIdError;
            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

id! {
    /// Names one sandbox for its whole life, across pause, resume and rollback. E2B's clients want
    /// `^[a-z0-9]+$`; its prefix is theirs, too.
    SandboxId, "sandbox", "i", 32,
    |b| b.is_ascii_lowercase() || b.is_ascii_digit(), "lower-case letters and digits"
}
id! {
    /// Names one snapshot: an immutable directory in the snapshot store.
    SnapshotId, "snapshot", "snap-", 64,
    |b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-', "lower-case letters, digits and '-'"
}
id! {
    /// Names one template. People use its aliases; machines use this.
    TemplateId, "template", "tpl-", 64,
    |b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-', "lower-case letters, digits and '-'"
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn generated_ids_parse_and_fit_in_a_dns_label() {
        let id = SandboxId::generate();
        assert_eq!(id.as_str().parse::<SandboxId>().as_ref(), Ok(&id));
        assert!(format!("65535-{id}").len() <= 63);
        let id = SnapshotId::generate();
        assert_eq!(id.as_str().parse::<SnapshotId>(), Ok(id));
    }

    #[test]
    fn what_could_leave_a_directory_is_no_id() {
        for bad in [
            "",
            "..",
            "a/b",
            "a.b",
            "a\nb",
            "A",
            "i0 ",
            "-a",
            "é",
            &"a".repeat(10_000),
        ] {
            assert!(bad.parse::<SandboxId>().is_err(), "{bad:?}");
            assert!(bad.parse::<SnapshotId>().is_err(), "{bad:?}");
            assert!(bad.parse::<TemplateId>().is_err(), "{bad:?}");
        }
        assert!(
            "i0-i1".parse::<SandboxId>().is_err(),
            "a client id suffix is stripped by the API"
        );
    }

    proptest! {
        #[test]
        fn any_text_either_round_trips_or_is_refused(text in ".{0,80}") {
            if let Ok(id) = text.parse::<SandboxId>() {
                prop_assert_eq!(id.to_string(), text.clone());
            }
            if let Ok(id) = text.parse::<TemplateId>() {
                prop_assert!(!id.as_str().contains(['/', '.', '\n', ' ']));
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }
}
