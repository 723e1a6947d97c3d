//! How a snapshot is taken.

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use cubicle_ids::{SandboxId, SnapshotId};
use tokio::sync::oneshot;
use uuid::Uuid;

use super::{Report, Shared, Snapshot, SnapshotState, Snapshots};
use crate::{
    db::now,
    error::{Error, Result},
    fleet::{FreezeKind, FreezeOrder, Level, SnapshotTaken},
    sandbox::{Entry, PauseMode, operation::Operation},
    template::{DEFAULT_TAG, Reference},
};

/// How long the last look at the size of all snapshots counts.
const MEASURED_FOR: Duration = Duration::from_secs(30);

/// A snapshot to take.
#[derive(Debug, Clone)]
pub struct CreateSnapshot {
    /// `name` or `name:tag`; a name that exists stands for the new one from then on.
    pub name: Option<String>,
    /// False: its disks only; sandboxes that are made from it boot.
    pub memory: bool,
    /// Refuse if the guest does not answer.
    pub require_healthy: bool,
    /// How long it is to live; `None`: as long as the server is set to keep one.
    pub ttl: Option<Duration>,
}

impl Default for CreateSnapshot {
    fn default() -> Self {
        Self {
            name: None,
            memory: true,
            require_healthy: false,
            ttl: None,
        }
    }
}

/// A snapshot that was taken.
#[derive(Debug, Clone)]
pub struct SnapshotCreation {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// How that went.
    pub taken: SnapshotTaken,
}

impl Snapshots {
    /// Takes a snapshot of a running sandbox, which runs on. A client that goes away meanwhile
    /// finds it in the list.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the sandbox is paused, [`Error::Busy`] while something else is done
    /// with it, [`Error::Quota`], [`Error::NameTaken`] for the name of a template.
    pub async fn create(
        &self,
        sandbox: &SandboxId,
        request: CreateSnapshot,
    ) -> Result<SnapshotCreation> {
        let shared = Arc::clone(&self.shared);
        let name = shared.name(request.name.as_deref()).await?;
        shared.check_bytes().await?;
        let why = "only a running sandbox can be frozen; resume it first";
        let inner = &self.shared.sandboxes;
        let (entry, underway) = inner.begin(sandbox, Operation::Snapshot, why)?;
        let (answer, answered) = oneshot::channel();
        inner.tasks.spawn(async move {
            let began = Instant::now();
            let result = shared.take(&entry, name, request).await;
            drop(underway);
            let metrics = &shared.sandboxes.metrics;
            metrics.ended(Operation::Snapshot, result.is_ok(), began.elapsed());
            if let Ok(creation) = &result {
                metrics.frozen(Operation::Snapshot, &creation.taken);
            }
            let _ = answer.send(result);
        });
        answered.await.unwrap_or(Err(Error::ShuttingDown))
    }
}

impl Shared {
    async fn take(
        &self,
        entry: &Entry,
        name: Option<Reference>,
        request: CreateSnapshot,
    ) -> Result<SnapshotCreation> {
        let sandbox = entry.sandbox();
        let at = now();
        let ttl = request.ttl.or(self.config.default_ttl);
        let mut snapshot = Snapshot {
            id: SnapshotId::generate(),
            tag: name.as_ref().map_or(DEFAULT_TAG, Reference::tag).to_owned(),
            name: name.map(|reference| reference.name),
            build: Uuid::new_v4(),
            sandbox: sandbox.id.clone(),
            template: sandbox.template.clone(),
            parent: Some(sandbox.base.clone()),
            state: SnapshotState::Publishing,
            reason: None,
            mode: PauseMode::of(request.memory),
            created_at: at,
            updated_at: at,
            expires_at: ttl.map(|ttl| at + ttl),
            cpu_count: sandbox.cpu_count,
            memory_mib: sandbox.memory_mib,
            disk_mib: sandbox.disk_mib,
            envd_version: sandbox.envd_version.clone(),
            report: None,
            stored: None,
        };
        // On record before it begins: what a crash leaves behind has an owner, or none.
        if !self.store.insert(&snapshot, self.config.max_count).await? {
            let max = self.config.max_count.unwrap_or_default();
            return Err(Error::Quota {
                why: format!("this server keeps at most {max}"),
            });
        }
        let order = FreezeOrder {
            id: sandbox.id.clone(),
            snapshot: snapshot.id.clone(),
            kind: FreezeKind::User,
            memory: request.memory,
            quiesce: self.sandboxes.quiesce(request.memory),
            require_healthy: request.require_healthy,
        };
        let taken = match self.sandboxes.fleet.snapshot(order).await {
            Ok(taken) => taken,
            Err(error) => {
                self.undo(&snapshot).await;
                return Err(error.into());
            }
        };
        let report = Report::from(&taken);
        {
            // Whoever writes the sandbox's row next knows what it descends from.
            let _one_at_a_time = entry.row.lock().await;
            match self.store.ready(&snapshot.id, &sandbox.id, &report).await {
                Ok(at) => snapshot.updated_at = at,
                Err(error) => {
                    self.undo(&snapshot).await;
                    return Err(error);
                }
            }
            entry.change(|sandbox| sandbox.base = snapshot.id.clone());
        }
        self.deadlines.set(&snapshot.id, || snapshot.expires_at);
        let mut measured = self
            .own_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bytes)) = measured.as_mut() {
            *bytes = bytes.saturating_add(taken.bytes_written);
        }
        drop(measured);
        let fields = [
            ("snapshot", snapshot.id.to_string()),
            ("tier", taken.tier.to_owned()),
        ];
        self.sandboxes
            .log
            .line(&sandbox.id, Level::Info, "snapshot taken", fields);
        snapshot.state = SnapshotState::Ready;
        snapshot.report = Some(report);
        Ok(SnapshotCreation { snapshot, taken })
    }

    /// Leaves nothing of a snapshot that could not be taken.
    async fn undo(&self, snapshot: &Snapshot) {
        if let Err(error) = self.store.remove(&snapshot.id).await {
            // The next start finds that it never was.
            tracing::error!(snapshot = %snapshot.id, %error, "a failed snapshot stays on record");
        }
        self.trash.discard(snapshot.id.clone());
    }

    /// Checks that a new snapshot may have this name.
    async fn name(&self, name: Option<&str>) -> Result<Option<Reference>> {
        let Some(name) = name else { return Ok(None) };
        let reference: Reference = name
            .parse()
            .map_err(|error: crate::template::BadName| Error::invalid("name", error.to_string()))?;
        reference
            .check_name()
            .map_err(|error| Error::invalid("name", error.to_string()))?;
        if self.templates.has_alias(&reference.name).await? {
            return Err(Error::NameTaken {
                name: reference.name,
                what: "template",
            });
        }
        Ok(Some(reference))
    }

    /// Checks that snapshots may take more of the store.
    async fn check_bytes(&self) -> Result<()> {
        let Some(max) = self.config.max_own_bytes else {
            return Ok(());
        };
        let last = *self
            .own_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let own_bytes = match last {
            Some((at, bytes)) if at.elapsed() < MEASURED_FOR && bytes < max => bytes,
            _ => self.measure_all().await?,
        };
        if own_bytes < max {
            return Ok(());
        }
        Err(Error::Quota {
            why: format!("they take {own_bytes} of {max} bytes"),
        })
    }

    /// Asks the store what all snapshots of users take.
    async fn measure_all(&self) -> Result<u64> {
        use crate::fleet::SnapshotKind;
        let facts = self.sandboxes.fleet.snapshots().await?;
        let of_users = facts
            .iter()
            .filter(|fact| fact.kind == SnapshotKind::Frozen(FreezeKind::User));
        let own_bytes = of_users.map(|fact| fact.own_bytes).sum();
        *self
            .own_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), own_bytes));
        Ok(own_bytes)
    }
}
