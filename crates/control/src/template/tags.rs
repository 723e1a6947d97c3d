//! Tags: names of builds of one template.

use time::OffsetDateTime;
use uuid::Uuid;

use super::{Reference, Templates, name::BadName, name::is_tag, shorten};
use crate::error::{Error, Result};

/// A name of a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag {
    /// The name.
    pub tag: String,
    /// What it stands for.
    pub build: Uuid,
    /// Since when.
    pub assigned_at: OffsetDateTime,
}

impl Templates {
    /// The tags of a template, newest first.
    ///
    /// # Errors
    /// [`Error::TemplateNotFound`].
    pub async fn tags(&self, reference: &str) -> Result<Vec<Tag>> {
        let template = self.get(reference).await?;
        self.store.tags(&template.id).await
    }

    /// Gives the build that `target` (`name:tag`) stands for more tags; returns it.
    ///
    /// # Errors
    /// [`Error::TemplateNotFound`]; [`Error::TemplateNotReady`]; [`Error::Invalid`] if one is no
    /// tag.
    pub async fn assign_tags(&self, target: &str, tags: &[String]) -> Result<Uuid> {
        if tags.is_empty() || !tags.iter().all(|tag| is_tag(tag)) {
            return Err(Error::invalid("tags", BadName::Tag.to_string()));
        }
        // A snapshot of a sandbox has no tags.
        self.get(target).await?;
        let resolved = self.resolve(target).await?;
        let template = &resolved.template;
        self.store.assign(template, resolved.build, tags).await?;
        self.collect().await;
        Ok(resolved.build)
    }

    /// Takes tags away from a template. Those that it does not have are passed over, as long as it
    /// has one of them.
    ///
    /// # Errors
    /// [`Error::TemplateNotFound`], also if it has none of these tags.
    pub async fn delete_tags(&self, name: &str, tags: &[String]) -> Result<()> {
        let not_found = || Error::TemplateNotFound {
            reference: shorten(name),
        };
        let parsed: Reference = name.parse().map_err(|_| not_found())?;
        let id = self.store.find(&parsed.name).await?.ok_or_else(not_found)?;
        if !self.store.drop_tags(&id, tags).await? {
            return Err(not_found());
        }
        self.collect().await;
        Ok(())
    }
}
