//! How people write down what a sandbox is to be made from.

use std::str::FromStr;

/// Longest alias, without its namespace.
pub(super) const MAX_ALIAS: usize = 64;
/// Longest tag.
pub(super) const MAX_TAG: usize = 64;
/// The tag that is meant when none is said.
pub const DEFAULT_TAG: &str = "default";
/// Beginnings of ids that are not for aliases.
const RESERVED: [&str; 2] = ["tpl-", "snap-"];
/// Random characters after such a beginning in the ids that this server gives.
const RANDOM: usize = 19;

/// `name[:tag]`, where the name is an alias, a template id or a snapshot id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// What comes before the colon.
    pub name: String,
    /// What comes after it, if there is one.
    pub tag: Option<String>,
}

/// Why a text refers to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// The name is empty, too long, or has a character that names don't have.
    #[error(
        "a name has 1 to {MAX_ALIAS} of a-z, 0-9, '-' and '_', with an optional 'namespace/' before it"
    )]
    Name,
    /// The tag is empty, too long, or has a character that tags don't have.
    #[error("a tag has 1 to {MAX_TAG} of a-z, 0-9, '-', '_' and '.'")]
    Tag,
    /// The name looks like an id.
    #[error("a name must not begin with 'tpl-' or 'snap-': those are ids")]
    Reserved,
    /// The name is what an id looks like.
    #[error("a name must not look like the id of a snapshot or a template")]
    Id,
}

impl FromStr for Reference {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, tag) = match text.split_once(':') {
            Some((name, tag)) => (name, Some(tag)),
            None => (text, None),
        };
        let mut parts = name.split('/');
        let well_formed = match (parts.next(), parts.next(), parts.next()) {
            (Some(name), None, _) => is_word(name),
            (Some(namespace), Some(name), None) => is_word(namespace) && is_word(name),
            _ => false,
        };
        if !well_formed {
            return Err(BadName::Name);
        }
        if !tag.is_none_or(is_tag) {
            return Err(BadName::Tag);
        }
        Ok(Self {
            name: name.to_owned(),
            tag: tag.map(str::to_owned),
        })
    }
}

impl Reference {
    /// The tag that is meant.
    #[must_use]
    pub fn tag(&self) -> &str {
        self.tag.as_deref().unwrap_or(DEFAULT_TAG)
    }

    /// Checks that the name may become a new alias.
    ///
    /// # Errors
    /// [`BadName::Reserved`] if it could be taken for an id.
    pub fn check_alias(&self) -> Result<(), BadName> {
        if RESERVED.iter().any(|prefix| self.name.starts_with(prefix)) {
            return Err(BadName::Reserved);
        }
        Ok(())
    }

    /// Checks that the name may become a new name of snapshots. Clients call them anything, so
    /// only what could be mistaken for an id that this server gives is refused.
    ///
    /// # Errors
    /// [`BadName::Id`] if it reads like an id.
    pub fn check_name(&self) -> Result<(), BadName> {
        let is_random =
            |tail: &str| tail.len() == RANDOM && tail.bytes().all(|b| b.is_ascii_alphanumeric());
        let tail = |prefix| self.name.strip_prefix(prefix);
        if RESERVED.into_iter().filter_map(tail).any(is_random) {
            return Err(BadName::Id);
        }
        Ok(())
    }
}

fn is_word(word: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
    (1..=MAX_ALIAS).contains(&word.len())
        && word.bytes().all(allowed)
        && word.as_bytes()[0].is_ascii_alphanumeric()
}

/// Whether a text can be a tag.
#[must_use]
pub fn is_tag(tag: &str) -> bool {
    let allowed =
        |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.');
    (1..=MAX_TAG).contains(&tag.len()) && tag.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use cubicle_ids::{SnapshotId, TemplateId};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn references_of_every_kind() {
        let parse = |text: &str| text.parse::<Reference>().map(|r| (r.name, r.tag));
        let named = |name: &str, tag: Option<&str>| Ok((name.to_owned(), tag.map(str::to_owned)));
        assert_eq!(parse("base"), named("base", None));
        assert_eq!(parse("base:v1.2"), named("base", Some("v1.2")));
        assert_eq!(
            parse("team/base:default"),
            named("team/base", Some("default"))
        );
        assert_eq!(parse("snap-0abc"), named("snap-0abc", None));
        for bad in [
            "",
            "a/b/c",
            "A",
            "a b",
            "-a",
            "../a",
            "/a",
            "a/",
            "é",
            &"x".repeat(10_000),
        ] {
            assert_eq!(parse(bad), Err(BadName::Name), "{bad:?}");
        }
        for bad in [
            "a:",
            "a:b:c",
            "a:V",
            "a: ",
            &format!("a:{}", "x".repeat(10_000)),
        ] {
            assert_eq!(parse(bad), Err(BadName::Tag), "{bad:?}");
        }
        let reserved: Reference = "snap-x".parse().expect("well-formed");
        assert_eq!(reserved.check_alias(), Err(BadName::Reserved));
        assert_eq!(reserved.check_name(), Ok(()), "clients call snapshots so");
        let ids = [
            SnapshotId::generate().to_string(),
            TemplateId::generate().to_string(),
        ];
        for id in ids {
            let id: Reference = id.parse().expect("well-formed");
            assert_eq!(id.check_name(), Err(BadName::Id));
        }
    }

    proptest! {
        #[test]
        fn whatever_parses_reads_back(text in ".{0,80}") {
            if let Ok(reference) = text.parse::<Reference>() {
                let again = match &reference.tag {
                    Some(tag) => format!("{}:{tag}", reference.name),
                    None => reference.name.clone(),
                };
                prop_assert_eq!(again, text);
            }
        }
    }
}
