//! What one instance holds, and how it is given back.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use cubicle_net::EgressPolicy;
use cubicle_vmm::Vm;
use futures::FutureExt as _;

use crate::{
    error::{Error, Result},
    journal::Key,
    node::Inner,
    sandbox::panic_message,
    slots::Slot,
};

/// Pause between two attempts to give everything back; doubles up to the second.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(10);

/// Everything that an instance has taken. Each thing is put here the moment it exists and leaves
/// only when it has been given back, so whatever is in here is all that there is to release,
/// however far its making got.
pub(crate) struct Holdings {
    /// Which instance: names its directories, volumes and groups.
    pub(crate) key: Key,
    /// Whether the journal has a row of it.
    pub(crate) journaled: bool,
    pub(crate) slot: Option<Slot>,
    /// Whether it may have volumes.
    pub(crate) volumes: bool,
    pub(crate) vm: Option<Arc<dyn Vm>>,
}

impl Holdings {
    /// An instance that holds nothing yet.
    pub(crate) fn new(key: Key) -> Self {
        Self {
            key,
            journaled: false,
            slot: None,
            volumes: false,
            vm: None,
        }
    }

    /// Puts an egress policy in force. Without a slot there is nothing that could be reached.
    pub(crate) async fn set_egress(&self, policy: &EgressPolicy) -> Result<()> {
        match &self.slot {
            Some(slot) => slot.set_egress(policy).await,
            None => Ok(()),
        }
    }

    /// Gives everything back. After a failure, what could not be given back is still in here, and
    /// calling again goes on from there.
    pub(crate) async fn release(&mut self, node: &Inner) -> Result<()> {
        let key = &self.key;
        // Whatever fails, the VM must go first, and nothing it uses may go before it.
        if self.journaled {
            let noted = node.journal.removing(key).await;
            if let Err(error) = noted {
                tracing::warn!(sandbox = %key.sandbox, %error, "removing a sandbox unrecorded");
            }
        }
        if let Some(vm) = &self.vm {
            node.failpoints.pass("kill/vm").await?;
            vm.kill().await?;
            self.vm = None;
        }
        let slot = async {
            if self.slot.is_some() {
                node.failpoints.pass("kill/slot").await?;
            }
            if let Some(slot) = self.slot.take() {
                node.slots.release(slot).await?;
            }
            Ok::<_, Error>(())
        };
        let volumes = async {
            if self.volumes {
                node.failpoints.pass("kill/volume").await?;
                node.remove_volumes(key).await?;
                self.volumes = false;
            }
            Ok::<_, Error>(())
        };
        // Neither must keep the other from being given back.
        let (slot, volumes) = tokio::join!(slot, volumes);
        slot.and(volumes)?;
        if self.journaled {
            node.failpoints.pass("kill/journal").await?;
            node.journal.forget(key).await?;
            self.journaled = false;
        }
        Ok(())
    }

    /// Gives everything back, however often it takes, and says after each failure why. Only a node
    /// that lets go of its sandboxes cuts it short: rows and files are there for the next start.
    pub(crate) async fn release_for_sure(&mut self, node: &Inner, mut failed: impl FnMut(&Error)) {
        let mut pause = RETRY_PAUSE;
        loop {
            let released = AssertUnwindSafe(self.release(node)).catch_unwind().await;
            let released = released.unwrap_or_else(|panic| {
                Err(Error::Panic {
                    id: self.key.sandbox.clone(),
                    message: panic_message(panic.as_ref()),
                })
            });
            let Err(error) = released else { return };
            tracing::error!(sandbox = %self.key.sandbox, %error, "could not remove all of a VM, trying again");
            failed(&error);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = node.abandon.cancelled() => return,
            }
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    /// The same in a task of its own.
    pub(crate) fn release_later(mut self, node: &Arc<Inner>) {
        let task = {
            let node = node.clone();
            async move { self.release_for_sure(&node, |_| ()).await }
        };
        node.tasks.spawn(task);
    }
}
