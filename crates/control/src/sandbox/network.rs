//! What a sandbox may reach, changed while it runs.

use std::sync::Arc;

use cubicle_ids::SandboxId;

use super::{Entry, Inner, Sandbox, Sandboxes, create::traffic_token, operation::Operation};
use crate::{
    error::{Error, Result},
    fleet::{Level, NetworkOptions},
};

impl Sandboxes {
    /// Replaces what a running sandbox may reach. On return every packet obeys that, also those of
    /// connections that exist; so do its copies, and the sandbox itself after a pause, a rollback
    /// or a restart of the server. Who may reach it stays as it is where `wanted` says nothing of it.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the sandbox is paused, [`Error::Busy`] while something else is done
    /// with it. Nothing has changed then.
    pub async fn set_network(
        &self,
        id: &SandboxId,
        wanted: NetworkOptions,
    ) -> Result<Arc<Sandbox>> {
        let why = "only the network of a running sandbox can be changed; resume it first";
        let begun = self.inner.begin(id, Operation::Network, why)?;
        let work = |inner: Arc<Inner>, entry: Arc<Entry>| async move {
            inner.set_network(&entry, wanted).await
        };
        self.inner
            .see_through(Operation::Network, begun, work)
            .await
    }
}

impl Inner {
    /// Puts in force what is on record, which a server that was killed during a change left open.
    pub(super) async fn confirm_network(&self, sandbox: &Sandbox) {
        let confirmed = self.fleet.set_network(&sandbox.id, &sandbox.network).await;
        if let Err(error) = confirmed {
            tracing::warn!(sandbox = %sandbox.id, %error, "what it may reach was not confirmed");
        }
    }

    async fn set_network(&self, entry: &Entry, wanted: NetworkOptions) -> Result<Arc<Sandbox>> {
        let before = entry.sandbox();
        let network = NetworkOptions {
            allow_public_traffic: wanted
                .allow_public_traffic
                .or(before.network.allow_public_traffic),
            mask_request_host: wanted
                .mask_request_host
                .or_else(|| before.network.mask_request_host.clone()),
            ..wanted
        };
        let token = traffic_token(&network).map(|new| before.traffic_token.clone().unwrap_or(new));
        self.fleet.set_network(&before.id, &network).await?;
        let _one_at_a_time = entry.row.lock().await;
        let written = self
            .store
            .set_network(&before.id, &network, token.as_deref())
            .await;
        if let Err(error) = written {
            if let Err(error) = self.fleet.set_network(&before.id, &before.network).await {
                tracing::error!(sandbox = %before.id, %error, "its network is not what is on record");
            }
            return Err(error);
        }
        let after = entry.change(|sandbox| {
            sandbox.network = network;
            sandbox.traffic_token = token;
        });
        let sandbox = after.ok_or_else(|| Error::SandboxNotFound {
            id: before.id.clone(),
        })?;
        self.log
            .line(&sandbox.id, Level::Info, "network changed", []);
        Ok(sandbox)
    }
}
