//! Adoption: what a node does with what it finds when it opens.
//!
//! Sandboxes that were handed out and whose VM lived on get their channel back, under the same
//! generation. Everything else that the journal names is removed, and so is whatever it does not
//! name.

use std::{collections::HashSet, sync::Arc};

use cubicle_cow::{Manifest, VolumeName};
use cubicle_ids::SandboxId;
use cubicle_vmm::{Disk, Vm, VmRecord};
use futures::{StreamExt as _, stream};

use crate::{
    error::{Error, Result},
    facts::AdoptionReport,
    holdings::Holdings,
    journal::{Key, Row, Step},
    link::{Identity, Link},
    memory::Memory,
    node::{Inner, blocking},
    sandbox::{Live, Origin, Running, Sandbox, own_adopted},
    strays,
};

/// Sandboxes that are taken over at the same time. Each waits for its guest, hardly for the host.
const CONCURRENCY: usize = 32;

/// What became of one row.
enum Fate {
    /// It goes on, as this instance in this VM.
    Adopted(Arc<Sandbox>, Key, VmRecord),
    /// It was running and is gone.
    Lost(SandboxId, String),
    /// It had not been handed out, or was being removed.
    Unfinished(SandboxId),
    /// It is not to run, and not all of it could be removed yet.
    Remains(SandboxId, Holdings),
}

/// Takes over what lives and removes the rest.
pub(crate) async fn adopt(node: &Arc<Inner>) -> Result<AdoptionReport> {
    let mut report = AdoptionReport::default();
    let mut rows = Vec::new();
    for row in node.journal.rows().await? {
        match row {
            Ok(row) => rows.push(row),
            Err(Error::JournalRow { sandbox, reason }) => {
                tracing::error!(sandbox, reason, "discarding a damaged row of the journal");
                node.journal.discard(&sandbox).await?;
                report.damaged_rows += 1;
            }
            Err(error) => return Err(error),
        }
    }

    let fates: Vec<Fate> = stream::iter(rows)
        .map(|row| async { settle(node, row).await })
        .buffer_unordered(CONCURRENCY)
        .collect()
        .await;
    let mut kept = Vec::new();
    for fate in fates {
        match fate {
            Fate::Adopted(sandbox, key, record) => {
                report.adopted.push(sandbox.id().clone());
                kept.push((key, Some(record)));
            }
            Fate::Lost(id, reason) => {
                tracing::warn!(sandbox = %id, reason, "a sandbox did not survive");
                report.lost.push((id, reason));
            }
            Fate::Unfinished(id) => report.unfinished.push(id),
            Fate::Remains(id, held) => {
                kept.push((held.key.clone(), None));
                held.release_later(node);
                report.unfinished.push(id);
            }
        }
    }
    sweep(node, &kept, &mut report).await?;
    for snapshot in node.journal.builds().await? {
        node.delete_snapshot(&snapshot).await?;
        node.journal.end_build(&snapshot).await?;
        report.unfinished_builds.push(snapshot);
    }
    Ok(report)
}

/// Brings one row and the world into agreement.
async fn settle(node: &Arc<Inner>, row: Row) -> Fate {
    let (id, generation) = row
        .serves
        .clone()
        .unwrap_or_else(|| (row.key.sandbox.clone(), row.key.generation));
    let was_running = row.step == Step::Running;
    let served = Key {
        sandbox: id.clone(),
        generation,
    };
    let (sandbox, letters) = Sandbox::new(served, row.snapshot.clone(), row.shape, row.created_at);
    let mut held = Holdings {
        journaled: true,
        volumes: true,
        ..Holdings::new(row.key.clone())
    };
    let taken = take_over(node, &row, &id, generation, &mut held).await;
    match taken {
        Ok(Some((live, origin))) => {
            let record = live.vm.record();
            node.registry.adopt(sandbox.clone());
            sandbox.set_running(&live);
            let running = Running::new(live, origin, held);
            node.tasks
                .spawn(own_adopted(node.clone(), sandbox.clone(), letters, running));
            Fate::Adopted(sandbox, row.key, record)
        }
        not_taken => {
            // Awaited, so that nothing of it is left when the node is open.
            if let Err(error) = held.release(node).await {
                tracing::error!(sandbox = %id, %error, "could not remove what is left of a sandbox");
                return Fate::Remains(id, held);
            }
            match not_taken {
                Err(error) if was_running => Fate::Lost(id, error.to_string()),
                Ok(_) if was_running => Fate::Lost(id, "its VM no longer runs".to_owned()),
                _ => Fate::Unfinished(id),
            }
        }
    }
}

/// Gets hold of all that a row names. `None`: there is nothing to go on with.
async fn take_over(
    node: &Arc<Inner>,
    row: &Row,
    id: &SandboxId,
    generation: u64,
    held: &mut Holdings,
) -> Result<Option<(Arc<Live>, Origin)>> {
    node.failpoints.pass("adopt/vm").await?;
    let vm: Option<Arc<dyn Vm>> = match &row.vm {
        Some(record) => node.hypervisor.adopt(record).await?,
        None => None,
    };
    held.vm.clone_from(&vm);
    let Some(vm) = vm.filter(|_| row.step == Step::Running) else {
        return Ok(None);
    };

    node.failpoints.pass("adopt/slot").await?;
    if let Some(index) = row.slot {
        held.slot = Some(node.slots.adopt(index).await?);
    }
    node.failpoints.pass("adopt/channel").await?;
    // It may have been frozen when the node went away.
    vm.resume().await?;
    // The guest still holds the nonce that it was given.
    let identity = Identity {
        restored: row
            .identity
            .nonce
            .clone()
            .map(|nonce| (row.snapshot.clone(), nonce)),
        init: row.identity.clone(),
    };
    let patience = node.config.deadlines.answer;
    let (link, ..) = Link::open(vm.clone(), id, identity, patience).await?;
    let origin = find_origin(node, row, id, vm.as_ref())?;
    let disks = disks_of(node, row, &origin.manifest);
    let live = Live {
        generation,
        snapshot: row.snapshot.clone(),
        vm,
        link,
        disks,
        identity: row.identity.clone(),
    };
    Ok(Some((Arc::new(live), origin)))
}

/// What the next snapshot of an adopted VM descends from.
fn find_origin(node: &Inner, row: &Row, id: &SandboxId, vm: &dyn Vm) -> Result<Origin> {
    let manifest = match &row.origin {
        Some(manifest) => manifest.clone(),
        // A row of an older version of this program.
        None => node.store.snapshot(&row.snapshot)?.manifest().clone(),
    };
    let tier = node.config.memory_tier;
    let memory = if manifest.has_memory() {
        let captured = node.store.snapshot(&manifest.id).ok();
        let captured = captured.map(|snapshot| snapshot.memory_image());
        Memory::adopted(tier, id, vm, captured.as_deref())?
    } else {
        Memory::booted(tier)?
    };
    Ok(Origin { manifest, memory })
}

/// The disks that a VM was given at its start.
fn disks_of(node: &Inner, row: &Row, origin: &Manifest) -> Vec<Disk> {
    (0..)
        .zip(&origin.disks)
        .map(|(n, disk)| {
            let volume = VolumeName::new(row.key.sandbox.clone(), row.key.generation, n);
            let shared = disk
                .read_only
                .then(|| node.store.snapshot(&row.snapshot).ok());
            Disk {
                path: match shared.flatten() {
                    Some(snapshot) => snapshot.disk(n),
                    None => node.store.volume(&volume),
                },
                read_only: disk.read_only,
            }
        })
        .collect()
}

/// Removes what no row named. `kept` are the instances that go on, with their VMs, and those that
/// are still being removed.
async fn sweep(
    node: &Arc<Inner>,
    kept: &[(Key, Option<VmRecord>)],
    report: &mut AdoptionReport,
) -> Result<()> {
    let run_dirs: HashSet<_> = kept.iter().map(|(key, _)| node.vm_run_dir(key)).collect();
    let lives: HashSet<_> = kept
        .iter()
        .map(|(key, _)| (key.sandbox.clone(), key.generation))
        .collect();
    let kept: Vec<i32> = kept
        .iter()
        .filter_map(|(_, record)| Some(record.as_ref()?.pid))
        .collect();
    let (store, vms) = (node.store.clone(), node.vms_dir());
    let swept = blocking(move || {
        let mut left = Vec::new();
        for entry in std::fs::read_dir(&vms).map_err(Error::io("list", &vms))? {
            let path = entry.map_err(Error::io("list", &vms))?.path();
            if !run_dirs.contains(&path) {
                left.push(path);
            }
        }
        // Processes first: they use the rest.
        let sandboxes = left
            .iter()
            .filter_map(|dir| Some(dir.file_stem()?.to_str()?.to_owned()));
        let vms = strays::kill_strays(&sandboxes.collect(), &kept)?;
        for dir in &left {
            std::fs::remove_dir_all(dir).map_err(Error::io("remove", dir))?;
        }
        Ok((vms, left.len(), store.retain_volumes(&lives)?.len()))
    })
    .await?;
    (
        report.swept_vms,
        report.swept_run_dirs,
        report.swept_volumes,
    ) = swept;
    report.swept_slots = node.slots.sweep().await?;
    Ok(())
}
