//! Names of templates for people.

use super::{Reference, Template, Templates, name::BadName};
use crate::error::{Error, Result};

impl Templates {
    /// Gives a template this name, in the place of those that it has; or none at all.
    ///
    /// # Errors
    /// [`Error::TemplateNotFound`]; [`Error::Invalid`] if it is no name for a template;
    /// [`Error::NameTaken`] if something else has it.
    pub async fn set_alias(&self, reference: &str, alias: Option<&str>) -> Result<Template> {
        let template = self.get(reference).await?;
        if let Some(alias) = alias {
            let bad_name = |error: BadName| Error::invalid("alias", error.to_string());
            let parsed: Reference = alias.parse().map_err(bad_name)?;
            parsed.check_alias().map_err(bad_name)?;
            if parsed.tag.is_some() {
                return Err(Error::invalid("alias", "a tag is not part of it"));
            }
            if self.snapshots.has_name(alias).await? {
                return Err(Error::NameTaken {
                    name: alias.to_owned(),
                    what: "snapshot",
                });
            }
        }
        if !self.store.set_alias(&template.id, alias).await? {
            return Err(Error::NameTaken {
                name: alias.unwrap_or_default().to_owned(),
                what: "template",
            });
        }
        self.get(template.id.as_str()).await
    }
}
