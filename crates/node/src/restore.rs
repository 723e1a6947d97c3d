//! Restore: the one way in which a snapshot becomes a running VM. One that holds disks only is
//! booted.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use cubicle_cow::{Snapshot, VolumeName};
use cubicle_ids::SandboxId;
use cubicle_net::EgressPolicy;
use cubicle_vmm::{Boot, Disk, Limits, VM_UID_BASE, VmSpec};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::{
    create::shape_of,
    error::{Error, Result},
    facts::{BootFiles, PhaseTimings},
    holdings::Holdings,
    journal::{self, Key},
    link::{Identity, Link},
    memory::Memory,
    node::{Inner, blocking},
    sandbox::{Live, Origin, check_stop, contained, unless_stopped},
};

/// What kernel and init of a guest are told. Each word from `lsm` on takes away something that a
/// machine with one tenant inside a VM does not need and that would run on the way to every answer,
/// most of all in the first moments after a restore: security modules besides capabilities, the
/// watchdog for stuck CPUs, pressure accounting, and auditing.
pub(crate) const CMDLINE: &str = "quiet cubicle.root=/dev/vda cubicle.rootfstype=ext4 \
    lsm=capability nowatchdog psi=0 audit=0";

/// In a manifest's options of the VM: [`cubicle_vmm::Hypervisor::machine`].
pub(crate) const MACHINE: &str = "machine";

/// What is to be restored, and as what.
pub(crate) struct Restore<'a> {
    /// The sandbox whose VM it becomes, and which of its VMs. Nobody's, for now, without.
    pub(crate) serves: Option<(&'a SandboxId, u64)>,
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) identity: Identity,
    pub(crate) egress: Option<EgressPolicy>,
    pub(crate) limits: Option<Limits>,
    /// For a snapshot of disks only.
    pub(crate) kernel: Option<BootFiles>,
    pub(crate) started_at: OffsetDateTime,
}

/// A VM that has answered and knows who it is.
pub(crate) struct Restored {
    pub(crate) live: Live,
    pub(crate) origin: Origin,
    /// `total` is left to the caller.
    pub(crate) timings: PhaseTimings,
}

/// Claims a spare of the snapshot if there is one, which becomes what `held` is; restores the
/// snapshot otherwise. A sandbox that was paused a moment ago gets its own VM back.
pub(crate) async fn claim_or_restore(
    node: &Arc<Inner>,
    order: Restore<'_>,
    held: &mut Holdings,
    stop: &CancellationToken,
) -> Result<Restored> {
    let begun = Instant::now();
    let own = match order.serves {
        Some((id, _)) => node.spares.wake(order.snapshot.id(), id).await,
        None => None,
    };
    let spare = match own {
        Some(own) => Some(own),
        // A spare has the bounds and the beginnings that most have.
        None if order.limits.is_none() => node.spares.claim(order.snapshot).await,
        None => None,
    };
    if let Some(spare) = spare {
        let claim = begun.elapsed();
        // In place of what would have been taken under the order's own name.
        let unused = std::mem::replace(held, spare.held);
        match adapt(node, &order, (&spare.live, spare.origin), held, stop).await {
            Ok(mut restored) => {
                restored.timings.claim = claim;
                return Ok(restored);
            }
            Err(error) => {
                tracing::warn!(%error, "a spare could not be used");
                std::mem::replace(held, unused).release_later(node);
                check_stop(&held.key.sandbox, stop)?;
            }
        }
    }
    restore(node, order, held, stop).await
}

/// Makes a spare what was ordered: opens its network, lets it run and tells its guest who it is now.
async fn adapt(
    node: &Inner,
    order: &Restore<'_>,
    (live, origin): (&Live, Origin),
    held: &mut Holdings,
    stop: &CancellationToken,
) -> Result<Restored> {
    let (id, generation) = order
        .serves
        .unwrap_or((&held.key.sandbox, held.key.generation));
    let mut timings = PhaseTimings::default();
    let begun = Instant::now();
    node.failpoints.pass("create/egress").await?;
    let egress = order.egress.clone();
    held.set_egress(&egress.unwrap_or_else(EgressPolicy::allow_all))
        .await?;
    timings.slot = begun.elapsed();

    // A life of its own, of which nothing was ever anybody else's.
    live.link.close();
    let snapshot = order.snapshot.id();
    let nonce = live.identity.nonce.clone();
    let identity = Identity {
        init: order.identity.init.clone(),
        restored: nonce.map(|nonce| (snapshot.clone(), nonce)),
    };
    node.failpoints.pass("create/channel").await?;
    let patience = node.config.deadlines.answer;
    let opened = async {
        // One that was paused stands still, and finds the host's hello when it goes on.
        let run = async { Ok(live.vm.resume().await?) };
        let open = Link::open(live.vm.clone(), id, identity, patience);
        let ((), opened) = tokio::try_join!(run, open)?;
        Ok(opened)
    };
    let (link, _answer, life) = unless_stopped(id, stop, opened).await?;
    timings.channel = life.channel;
    timings.init = life.init;
    Ok(Restored {
        live: Live {
            generation,
            link,
            identity: order.identity.init.clone(),
            snapshot: snapshot.clone(),
            vm: live.vm.clone(),
            disks: live.disks.clone(),
        },
        origin,
        timings,
    })
}

/// Restores a snapshot. All that is taken goes into `held` at once, where it stays when this fails.
///
/// `stop` ends it between steps that must not be cut short and within those that only wait.
pub(crate) async fn restore(
    node: &Inner,
    order: Restore<'_>,
    held: &mut Holdings,
    stop: &CancellationToken,
) -> Result<Restored> {
    let Holdings {
        key,
        journaled,
        slot,
        volumes,
        vm: held_vm,
    } = held;
    let id = order.serves.map_or(&key.sandbox, |(id, _)| id);
    let mut timings = PhaseTimings::default();
    check_machine(node, order.snapshot)?;

    // Three things that need nothing of each other. All are seen through, so that `held` tells the
    // truth whichever of them fails.
    let (intent, slot, disks) = tokio::join!(
        contained(id, announce(node, key, &order, journaled)),
        contained(id, async {
            let begun = Instant::now();
            node.failpoints.pass("create/slot").await?;
            let slot = slot.insert(node.slots.acquire().await?);
            if let Some(egress) = &order.egress {
                node.failpoints.pass("create/egress").await?;
                slot.set_egress(egress).await?;
            }
            timings.slot = begun.elapsed();
            Ok((slot.index(), slot.attach()?))
        })
        .instrument(tracing::debug_span!("slot")),
        contained(id, async {
            let begun = Instant::now();
            node.failpoints.pass("create/volume").await?;
            *volumes = true;
            let disks = clone_disks(node, key, order.snapshot).await?;
            timings.volume = begun.elapsed();
            Ok(disks)
        })
        .instrument(tracing::debug_span!("volume")),
    );
    intent?;
    let ((index, attachment), disks) = (slot?, disks?);
    check_stop(id, stop)?;

    let begun = Instant::now();
    let shape = shape_of(order.snapshot);
    let (boot, memory, patience) = start_of(node, &order)?;
    let spec = VmSpec {
        disks: disks.clone(),
        tap: attachment.tap,
        netns: attachment.netns,
        limits: order
            .limits
            .unwrap_or_else(|| Limits::for_shape(shape.cpus, shape.memory_mib)),
        start: true,
        ..VmSpec::new(
            id.clone(),
            node.vm_run_dir(key),
            VM_UID_BASE + index,
            shape.cpus,
            shape.memory_mib,
            boot,
        )
    };
    read_ahead(order.snapshot);
    node.failpoints.pass("create/launch").await?;
    let launching = node
        .hypervisor
        .launch(spec)
        .instrument(tracing::debug_span!("launch"));
    let vm = held_vm.insert(launching.await?).clone();
    timings.launch = begun.elapsed();
    check_stop(id, stop)?;

    // The journal has the VM before the sandbox is handed out; until then the sweep would find it.
    let record = vm.record();
    let (recorded, opened) = tokio::join!(
        contained(id, async {
            node.failpoints.pass("create/record").await?;
            node.journal.started(key, index, &record).await
        }),
        contained(
            id,
            unless_stopped(id, stop, async {
                node.failpoints.pass("create/channel").await?;
                Link::open(vm.clone(), id, order.identity.clone(), patience).await
            })
        )
        .instrument(tracing::debug_span!("channel")),
    );
    recorded?;
    let (link, _answer, life) = opened?;
    timings.channel = life.channel;
    timings.init = life.init;
    node.failpoints.pass("create/init").await?;
    Ok(Restored {
        live: Live {
            generation: order
                .serves
                .map_or(key.generation, |(_, generation)| generation),
            snapshot: order.snapshot.id().clone(),
            vm,
            link,
            disks,
            identity: order.identity.init,
        },
        origin: Origin {
            manifest: order.snapshot.manifest().clone(),
            memory,
        },
        timings,
    })
}

/// Has the kernel read what the guest will ask for, while its VM is started. Nobody waits for it.
fn read_ahead(snapshot: &Snapshot) {
    if snapshot.has_memory() {
        let snapshot = snapshot.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = snapshot.read_ahead() {
                // It may have been deleted since: that is no reason for a word.
                tracing::debug!(snapshot = %snapshot.id(), %error, "not read ahead");
            }
        });
    }
}

/// How the VM starts, what becomes of its memory, and how long its guest may take to answer.
fn start_of(node: &Inner, order: &Restore<'_>) -> Result<(Boot, Memory, Duration)> {
    let (snapshot, tier) = (order.snapshot, node.config.memory_tier);
    if snapshot.has_memory() {
        let image = snapshot.memory_image();
        let memory = Memory::restored(tier, &image)?;
        let boot = Boot::Restore {
            memory: image,
            device_state: snapshot.device_state(),
        };
        return Ok((boot, memory, node.config.deadlines.answer));
    }
    let files = order.kernel.clone().ok_or_else(|| Error::NoKernel {
        snapshot: snapshot.id().clone(),
    })?;
    let boot = Boot::Cold {
        kernel: files.kernel,
        initramfs: files.initramfs,
        cmdline: CMDLINE.to_owned(),
    };
    Ok((boot, Memory::booted(tier)?, node.config.deadlines.boot))
}

/// Writes down what is about to exist.
async fn announce(
    node: &Inner,
    key: &Key,
    order: &Restore<'_>,
    journaled: &mut bool,
) -> Result<()> {
    node.failpoints.pass("create/journal").await?;
    *journaled = true;
    let row = journal::Row {
        key: key.clone(),
        serves: order
            .serves
            .map(|(id, generation)| (id.clone(), generation)),
        origin: Some(order.snapshot.manifest().clone()),
        snapshot: order.snapshot.id().clone(),
        step: journal::Step::Creating,
        shape: shape_of(order.snapshot),
        slot: None,
        vm: None,
        identity: order.identity.init.clone(),
        created_at: order.started_at,
        running_at: None,
    };
    node.journal.begin(&row).await
}

/// A clone of each writable disk; the others are used as they are.
async fn clone_disks(node: &Inner, key: &Key, snapshot: &Snapshot) -> Result<Vec<Disk>> {
    let (store, key, snapshot) = (node.store.clone(), key.clone(), snapshot.clone());
    blocking(move || {
        let disks = (0..).zip(&snapshot.manifest().disks).map(|(n, disk)| {
            let frozen = snapshot.disk(n);
            let path = if disk.read_only {
                frozen
            } else {
                let name = VolumeName::new(key.sandbox.clone(), key.generation, n);
                store.clone_volume(&frozen, &name)?
            };
            Ok(Disk {
                path,
                read_only: disk.read_only,
            })
        });
        disks.collect()
    })
    .await
}

/// Device state means nothing to another machine than the one that it was saved from.
pub(crate) fn check_machine(node: &Inner, snapshot: &Snapshot) -> Result<()> {
    let vm = &snapshot.manifest().vm;
    let name = (node.hypervisor.name().to_owned(), vm.hypervisor.clone());
    let machine = (
        node.hypervisor.machine(),
        vm.options.get(MACHINE).cloned().unwrap_or_default(),
    );
    for (ours, theirs) in [name, machine] {
        if ours != theirs {
            return Err(Error::WrongMachine {
                snapshot: snapshot.id().clone(),
                theirs,
                ours,
            });
        }
    }
    Ok(())
}
