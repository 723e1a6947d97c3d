//! The ways to find the pages of a memory image.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// How the pages of a memory image were found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Tier {
    /// Everything was copied.
    #[default]
    Full,
    /// The private anonymous pages of the mapping; where there was a base image, compared with it.
    AnonymousPages,
    /// Of the private anonymous pages, those that the kernel saw written since the last capture;
    /// over the image of that capture.
    SoftDirty,
}

impl Tier {
    /// The tier as it is written in manifests.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::AnonymousPages => "anonymous_pages",
            Self::SoftDirty => "soft_dirty",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which tier to use: the best that works, or a certain one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TierChoice {
    /// Soft-dirty bits where the kernel has them, else the anonymous pages.
    #[default]
    Auto,
    /// Soft-dirty bits, or an error where the kernel has none. The first capture of a VM finds its
    /// anonymous pages all the same: there is nothing yet that the bits could be relative to.
    SoftDirty,
    /// The anonymous pages.
    AnonymousPages,
    /// All of guest memory, every time.
    Full,
}

impl TierChoice {
    const ALL: [Self; 4] = [
        Self::Auto,
        Self::SoftDirty,
        Self::AnonymousPages,
        Self::Full,
    ];

    /// The choice as it is written in configuration.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::SoftDirty => "soft_dirty",
            Self::AnonymousPages => "anonymous_pages",
            Self::Full => "full",
        }
    }
}

impl fmt::Display for TierChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that names no tier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no way to capture memory; there are `auto`, `soft_dirty`, `anonymous_pages` and `full`"
)]
pub struct UnknownTier(pub String);

impl FromStr for TierChoice {
    type Err = UnknownTier;

    /// Takes hyphens for underscores, as command lines have them.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let word = text.replace('-', "_");
        Self::ALL
            .into_iter()
            .find(|choice| choice.as_str() == word)
            .ok_or_else(|| UnknownTier(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_names_the_same_tier_everywhere() {
        for choice in TierChoice::ALL {
            assert_eq!(choice.as_str().parse(), Ok(choice));
            assert_eq!(choice.as_str().replace('_', "-").parse(), Ok(choice));
            let quoted = format!("{:?}", choice.as_str());
            assert_eq!(serde_json::to_string(&choice).unwrap(), quoted);
        }
        for tier in [Tier::Full, Tier::AnonymousPages, Tier::SoftDirty] {
            let quoted = format!("{:?}", tier.as_str());
            assert_eq!(serde_json::to_string(&tier).unwrap(), quoted);
        }
        let error = "softdirty".parse::<TierChoice>().unwrap_err();
        assert!(error.to_string().contains("soft_dirty"), "{error}");
    }
}
