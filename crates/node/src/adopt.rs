//! Adoption: what a node does with what it finds when it opens.
//!
//! Sandboxes that were handed out and whose VM lived on get their channel back, under the same
//! generation. Everything else that the journal names is removed, and so is whatever it does not
//! name.

use std::{collections::HashSet, sync::Arc};

use cubicle_ids::SandboxId;
use cubicle_vmm::{Vm, VmRecord};
use futures::{StreamExt as _, stream};

use crate::{
    error::{Error, Result},
    facts::AdoptionReport,
    holdings::Holdings,
    journal::{Row, Step},
    link::{Identity, Link},
    node::{Inner, blocking},
    sandbox::{Live, Sandbox, own_adopted, own_remains},
    strays,
};

/// Sandboxes that are taken over at the same time. Each waits for its guest, hardly for the host.
const CONCURRENCY: usize = 32;

/// What became of one row.
enum Fate {
    /// It goes on, in this VM.
    Adopted(Arc<Sandbox>, VmRecord),
    /// It was running and is gone.
    Lost(SandboxId, String),
    /// It had not been handed out, or was being removed.
    Unfinished(SandboxId),
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
            Fate::Adopted(sandbox, record) => {
                report.adopted.push(sandbox.id().clone());
                kept.push(record);
            }
            Fate::Lost(id, reason) => {
                tracing::warn!(sandbox = %id, reason, "a sandbox did not survive");
                report.lost.push((id, reason));
            }
            Fate::Unfinished(id) => report.unfinished.push(id),
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
    let id = row.key.sandbox.clone();
    let was_running = row.step == Step::Running;
    let sandbox = Arc::new(Sandbox::new(
        row.key.clone(),
        row.snapshot.clone(),
        row.shape,
        row.created_at,
    ));
    let mut held = Holdings {
        journaled: true,
        volumes: true,
        ..Holdings::default()
    };
    let taken = take_over(node, &row, &mut held).await;
    match taken {
        Ok(Some(live)) => {
            let record = live.vm.record();
            node.registry.adopt(sandbox.clone());
            sandbox.set_running(&live);
            node.tasks
                .spawn(own_adopted(node.clone(), sandbox.clone(), live, held));
            Fate::Adopted(sandbox, record)
        }
        not_taken => {
            // Awaited, so that nothing of it is left when the node is open.
            if let Err(error) = held.release(node, &row.key).await {
                tracing::error!(sandbox = %id, %error, "could not remove what is left of a sandbox");
                node.registry.adopt(sandbox.clone());
                node.tasks.spawn(own_remains(node.clone(), sandbox, held));
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
async fn take_over(node: &Arc<Inner>, row: &Row, held: &mut Holdings) -> Result<Option<Arc<Live>>> {
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
    let (link, ..) = Link::open(vm.clone(), &row.key.sandbox, identity, patience).await?;
    Ok(Some(Arc::new(Live { vm, link })))
}

/// Removes what no row named. `kept` are the VMs of the sandboxes that go on.
async fn sweep(node: &Arc<Inner>, kept: &[VmRecord], report: &mut AdoptionReport) -> Result<()> {
    // What could not be removed yet is in the registry, too, and has its owner.
    let owned = node.registry.all();
    let run_dirs: HashSet<_> = owned
        .iter()
        .map(|sandbox| node.vm_run_dir(sandbox.key()))
        .collect();
    let lives: HashSet<_> = owned
        .iter()
        .map(|sandbox| (sandbox.id().clone(), sandbox.key().generation))
        .collect();
    let kept: Vec<i32> = kept.iter().map(|record| record.pid).collect();
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
