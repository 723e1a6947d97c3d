//! Names of templates for people.

use cubicle_ids::TemplateId;

use super::Store;
use crate::{
    db::{now, to_micros},
    error::{Error, Result},
};

impl Store {
    /// Gives a template one name in the place of all others, or none. False if another template
    /// has that name; then nothing has changed.
    pub(crate) async fn set_alias(
        &self,
        template: &TemplateId,
        alias: Option<&str>,
    ) -> Result<bool> {
        let doing = "rename a template";
        let mut tx = self.db.begin(doing).await?;
        sqlx::query("DELETE FROM template_aliases WHERE template_id = ?")
            .bind(template.as_str())
            .execute(&mut *tx)
            .await
            .map_err(Error::database(doing))?;
        if let Some(alias) = alias {
            let taken = sqlx::query(
                "INSERT INTO template_aliases (alias, template_id) VALUES (?, ?)
                 ON CONFLICT DO NOTHING",
            )
            .bind(alias)
            .bind(template.as_str())
            .execute(&mut *tx)
            .await
            .map_err(Error::database(doing))?;
            if taken.rows_affected() == 0 {
                return Ok(false);
            }
        }
        sqlx::query("UPDATE templates SET updated_at = ? WHERE id = ?")
            .bind(to_micros(now()))
            .bind(template.as_str())
            .execute(&mut *tx)
            .await
            .map_err(Error::database(doing))?;
        tx.commit().await.map_err(Error::database(doing))?;
        Ok(true)
    }
}
