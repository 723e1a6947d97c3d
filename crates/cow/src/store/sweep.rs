//! Agreement between files and catalog, made when a store is opened.

use cubicle_ids::SnapshotId;

use super::{Store, SweepReport, remove_tree};
use crate::{
    catalog::Row,
    digest,
    error::{Context as _, Result},
    manifest::{Manifest, SnapshotKind},
    snapshot::{MANIFEST, SnapshotState},
};

const FAILED_BEFORE_DURABLE: &str =
    "the machine stopped before the snapshot had reached the disk; its files cannot be trusted";

impl Store {
    pub(super) async fn sweep(&self, interrupted: bool) -> Result<SweepReport> {
        let inner = &self.inner;
        let mut report = SweepReport::default();
        for entry in std::fs::read_dir(&inner.tmp).at("list", &inner.tmp)? {
            remove_tree(&entry.at("list", &inner.tmp)?.path())?;
            report.drafts_removed += 1;
        }
        let mut rows = inner.catalog.rows(inner.root.path()).await?;
        // Whoever they were made for is gone, and what was restored from them needs them no more.
        for (id, _) in rows.extract_if(|_, row| row.entry.manifest.kind == SnapshotKind::Temporary)
        {
            inner.catalog.delete(&id, inner.root.path()).await?;
            remove_tree(&self.snapshot_dir(&id))?;
            report.temporary_removed.push(id);
        }
        for entry in std::fs::read_dir(&inner.snapshots).at("list", &inner.snapshots)? {
            let entry = entry.at("list", &inner.snapshots)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name
                .parse()
                .ok()
                .is_none_or(|id: SnapshotId| !rows.contains_key(&id))
            {
                remove_tree(&entry.path())?;
                report.unowned_removed.push(name);
            }
        }
        for (id, Row { mut entry, boot_id }) in rows {
            let SnapshotState::Published { durable } = entry.state else {
                self.entries_mut(|entries| entries.insert(id, entry));
                continue;
            };
            let torn = (!durable && boot_id != inner.boot_id)
                .then(|| FAILED_BEFORE_DURABLE.to_owned())
                .or_else(|| self.missing(&entry.manifest));
            match torn {
                Some(reason) => {
                    inner
                        .catalog
                        .set_failed(&id, &reason, inner.root.path())
                        .await?;
                    entry.state = SnapshotState::Failed {
                        reason: reason.clone(),
                    };
                    report.failed.push((id.clone(), reason));
                }
                None => {
                    report.usable += 1;
                    if !durable {
                        self.finish_later(&entry.manifest, false);
                    } else if interrupted {
                        // A disk that lied about a flush has the size right and not the content.
                        self.check_later(&id).await?;
                        report.checking += 1;
                    }
                }
            }
            self.entries_mut(|entries| entries.insert(id, entry));
        }
        report.volumes = self.volume_dirs()?;
        Ok(report)
    }

    /// What the files of a snapshot lack, by their sizes alone.
    pub(super) fn missing(&self, manifest: &Manifest) -> Option<String> {
        let dir = self.snapshot_dir(&manifest.id);
        let path = dir.join(MANIFEST);
        let found = std::fs::read(&path)
            .at("read the manifest", &path)
            .and_then(|text| Manifest::parse(&text, &path));
        match found {
            Ok(found) if found == *manifest => {}
            Ok(_) => return Some(format!("{MANIFEST} is not the one that was published")),
            Err(error) => return Some(error.to_string()),
        }
        manifest
            .parts
            .iter()
            .find_map(|part| digest::damage(&dir.join(&part.name), part.size, None, || true))
    }
}
