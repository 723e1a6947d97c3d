//! What a restart finds of the builds of the last run.

use std::collections::HashMap;

use super::Templates;
use crate::{
    error::Result,
    fleet::{FleetError, SnapshotKind},
};

impl Templates {
    /// Ends the builds that were under way, and makes layers and store agree: a layer without a
    /// snapshot is none, and a snapshot of a template that no layer owns goes.
    pub(super) async fn reconcile(&self) -> Result<()> {
        let ended = self
            .store
            .fail_unfinished("the server stopped during the build")
            .await?;
        if ended > 0 {
            tracing::warn!(ended, "builds of the last run did not finish");
        }
        self.store.forget_unfinished_layers().await?;
        let facts = match self.fleet.snapshots().await {
            Ok(facts) => facts,
            Err(FleetError::Unsupported { .. }) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let mut facts: HashMap<_, _> = facts
            .into_iter()
            .filter(|fact| fact.kind == SnapshotKind::Template)
            .map(|fact| (fact.id.clone(), fact))
            .collect();
        for layer in self.store.layers().await? {
            let usable = facts
                .remove(&layer)
                .is_some_and(|fact| fact.failure.is_none());
            if !usable {
                tracing::warn!(%layer, "a layer is lost: builds make it again");
                self.store.forget_layer(&layer).await?;
            }
        }
        for stray in facts.into_keys() {
            tracing::warn!(snapshot = %stray, "a layer that nothing uses is deleted");
            self.discard(&stray).await;
        }
        self.collect().await;
        Ok(())
    }
}
