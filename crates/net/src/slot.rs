//! A slot in use.

use std::{
    net::Ipv4Addr,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::{Arc, Weak},
};

use tokio::task::spawn_blocking;

use crate::{
    EgressPolicy, Error, Result, SlotIndex, Traffic, firewall,
    netlink::Netfilter,
    pool::Shared,
    provision::{Parts, lock},
};

/// A network slot in use by one sandbox.
///
/// Give it back with [`SlotPool::release`](crate::SlotPool::release) once its VM has ended.
/// Dropping a slot whose tap was not taken gives it back too. Dropping one whose tap was taken
/// changes nothing: a VM may be using it, also after this process is gone, and
/// [`SlotPool::adopt`](crate::SlotPool::adopt) finds it again.
#[derive(Debug)]
pub struct Slot {
    /// Empty only while the slot is taken apart.
    parts: Option<Parts>,
    pool: Weak<Shared>,
    interface: String,
    netns_path: PathBuf,
}

impl Slot {
    pub(crate) fn new(parts: Parts, pool: &Arc<Shared>) -> Self {
        let config = pool.config();
        Self {
            interface: config.name.interface(parts.index),
            netns_path: config.netns_path(parts.index),
            parts: Some(parts),
            pool: Arc::downgrade(pool),
        }
    }

    #[allow(
        clippy::expect_used,
        reason = "only `into_parts` and `drop` empty it, and they end it"
    )]
    fn parts(&self) -> &Parts {
        self.parts
            .as_ref()
            .expect("a slot has its parts until it is consumed")
    }

    /// The slot without its obligation to go back to the pool by itself.
    pub(crate) fn into_parts(mut self) -> Option<Parts> {
        self.parts.take()
    }

    pub(crate) fn belongs_to(&self, pool: &Arc<Shared>) -> bool {
        std::ptr::eq(self.pool.as_ptr(), Arc::as_ptr(pool))
    }

    /// The slot's number, which finds it again after a restart.
    #[must_use]
    pub fn index(&self) -> SlotIndex {
        self.parts().index
    }

    /// The address that is the slot's alone on this host: what the host sees the guest's packets
    /// come from.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.parts().link.slot
    }

    /// Name of the slot's interface on the host, for traffic accounting.
    #[must_use]
    pub fn host_interface(&self) -> &str {
        &self.interface
    }

    /// The slot's network namespace, for the VM's process to enter.
    #[must_use]
    pub fn netns(&self) -> BorrowedFd<'_> {
        self.parts().namespace.as_fd()
    }

    /// A descriptor of the slot's network namespace to hand to the VM's process.
    ///
    /// # Errors
    /// When this process has no descriptor left.
    pub fn netns_fd(&self) -> Result<OwnedFd> {
        self.netns()
            .try_clone_to_owned()
            .map_err(Error::system("duplicate a network slot's namespace"))
    }

    /// Where the slot's namespace can be found in the file system.
    #[must_use]
    pub fn netns_path(&self) -> &std::path::Path {
        &self.netns_path
    }

    /// The descriptor of the tap, ready for QEMU's `-netdev tap,fd=`: an Ethernet device without
    /// packet information and with virtio headers. `None` if it was taken before, as it was from
    /// every adopted slot. Whoever takes it holds the tap's only descriptor: the tap goes with
    /// the last copy of it.
    #[must_use]
    pub fn take_tap(&mut self) -> Option<OwnedFd> {
        self.parts.as_mut()?.tap.take()
    }

    /// Puts a policy in force: on return every packet obeys it, also those of connections that
    /// exist. A fresh slot has [`EgressPolicy::allow_all`].
    ///
    /// # Errors
    /// When the kernel refuses; the previous policy is in force then.
    pub async fn set_policy(&self, policy: &EgressPolicy) -> Result<()> {
        let policy = policy.clone();
        let action = format!("change the egress policy of network slot {}", self.index());
        self.netfilter(action, move |netfilter| {
            firewall::slot::set_policy(netfilter, &policy)
        })
        .await
    }

    /// What has gone through the slot since it was acquired.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub async fn traffic(&self) -> Result<Traffic> {
        let action = format!("read the counters of network slot {}", self.index());
        self.netfilter(action, firewall::slot::traffic).await
    }

    async fn netfilter<T, F>(&self, action: String, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&mut Netfilter) -> std::io::Result<T> + Send + 'static,
    {
        let netfilter = Arc::clone(&self.parts().netfilter);
        let died = Error::WorkerDied {
            action: action.clone(),
        };
        spawn_blocking(move || work(&mut lock(&netfilter)))
            .await
            .map_err(|_| died)?
            .map_err(Error::kernel(action))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(parts) = self.parts.take()
            && parts.tap.is_some()
            && let Some(pool) = self.pool.upgrade()
        {
            pool.give_back(parts);
        }
    }
}
