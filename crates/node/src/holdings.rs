//! What one instance holds, and how it is given back.

use std::sync::Arc;

use cubicle_vmm::Vm;

use crate::{
    error::{Error, Result},
    journal::Key,
    node::Inner,
    slots::Slot,
};

/// Everything that an instance has taken. Each thing is put here the moment it exists and leaves
/// only when it has been given back, so whatever is in here is all that there is to release,
/// however far its making got.
#[derive(Default)]
pub(crate) struct Holdings {
    /// Whether the journal has a row of it.
    pub(crate) journaled: bool,
    pub(crate) slot: Option<Slot>,
    /// Whether it may have volumes.
    pub(crate) volumes: bool,
    pub(crate) vm: Option<Arc<dyn Vm>>,
}

impl Holdings {
    /// Gives everything back. After a failure, what could not be given back is still in here, and
    /// calling again goes on from there.
    pub(crate) async fn release(&mut self, node: &Inner, key: &Key) -> Result<()> {
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
}
