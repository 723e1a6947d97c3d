//! The control plane: what sandboxes and templates there are to be.
//!
//! `control` holds intent and the API's truth: keys, templates, sandboxes with their timeouts,
//! metadata and tokens, and their snapshots and volumes. The fleet below it holds fact. Six
//! services make up its face, gathered in [`Control`]: [`Keys`], [`Templates`], [`TemplateStore`],
//! [`Sandboxes`], [`Snapshots`] and [`Volumes`]. None of them knows HTTP.
//!
//! Invariants:
//! - A sandbox changes state in [`lifecycle::next`] and nowhere else; kill is legal in every state.
//! - What a client is told is in the database first; what is in memory can be rebuilt from it.
//! - Every VM of the fleet belongs to a sandbox here, or is killed.
//! - Operations on VMs outlive the client that asked for them; a sandbox that nobody learned of is
//!   killed.
//! - A snapshot in the store belongs to a template, a row here, or a paused sandbox, or is deleted.
//! - One operation at a time freezes or restores a sandbox; only a kill waits for none.
//! - An API key is stored as a hash only; a sandbox's environment only as long as the sandbox lives.

mod db;
mod error;
pub mod fleet;
pub mod keys;
pub mod lifecycle;
pub mod metrics;
pub mod sandbox;
mod secret;
pub mod snapshot;
pub mod store;
pub mod template;
pub mod volume;

use std::{path::PathBuf, sync::Arc};

pub use cubicle_protocol::ENVD_VERSION;

pub use self::error::{Error, Result};
use self::{
    db::Db,
    fleet::SharedFleet,
    keys::Keys,
    metrics::Metrics,
    sandbox::{Reconciled, SandboxConfig, Sandboxes},
    snapshot::{SnapshotConfig, Snapshots},
    store::{StoreConfig, TemplateStore},
    template::{TemplateConfig, Templates},
    volume::{VolumeConfig, Volumes},
};

/// Where the control plane keeps its state and how it behaves.
#[derive(Debug, Clone)]
pub struct ControlConfig {
    /// The database file; made if it is missing, in a directory that exists.
    pub database: PathBuf,
    /// How sandboxes are watched over.
    pub sandboxes: SandboxConfig,
    /// How many snapshots are kept, and for how long.
    pub snapshots: SnapshotConfig,
    /// Where volumes are, and what else may be mounted.
    pub volumes: VolumeConfig,
    /// How templates are built.
    pub templates: TemplateConfig,
    /// What templates there are to be had.
    pub store: StoreConfig,
}

impl ControlConfig {
    /// Defaults, with the database in this file.
    #[must_use]
    pub fn new(database: impl Into<PathBuf>) -> Self {
        let database = database.into();
        Self {
            volumes: VolumeConfig::beside(&database),
            templates: TemplateConfig::beside(&database),
            store: StoreConfig::default(),
            database,
            sandboxes: SandboxConfig::default(),
            snapshots: SnapshotConfig::default(),
        }
    }
}

/// The services of the control plane. Cheap to clone.
#[derive(Clone)]
pub struct Control {
    /// Who may call.
    pub keys: Keys,
    /// What sandboxes are made from.
    pub templates: Templates,
    /// Templates that there are to be had.
    pub store: TemplateStore,
    /// The sandboxes.
    pub sandboxes: Sandboxes,
    /// The past of sandboxes.
    pub snapshots: Snapshots,
    /// What outlives sandboxes.
    pub volumes: Volumes,
    /// What they all count.
    pub metrics: Arc<Metrics>,
    /// The machines below.
    pub fleet: SharedFleet,
    db: Db,
}

impl Control {
    /// Opens the database, compares it with the fleet, and starts the tasks that watch over
    /// sandboxes.
    pub async fn open(config: ControlConfig, fleet: SharedFleet) -> Result<(Self, Reconciled)> {
        let db = Db::open(&config.database).await?;
        let keys = Keys::open(db.clone()).await?;
        let templates = Templates::open(config.templates, db.clone(), fleet.clone()).await?;
        let snapshot_store = snapshot::Store::new(db.clone());
        let metrics = Arc::<Metrics>::default();
        let volumes = Volumes::open(config.volumes, db.clone()).await?;
        let (sandboxes, reconciled) = Sandboxes::open(
            config.sandboxes,
            db.clone(),
            fleet.clone(),
            templates.clone(),
            snapshot_store.clone(),
            volumes.clone(),
            Arc::clone(&metrics),
        )
        .await?;
        let snapshots = Snapshots::open(
            config.snapshots,
            snapshot_store,
            &sandboxes,
            templates.clone(),
        )
        .await?;
        Ok((
            Self {
                keys,
                store: TemplateStore::new(config.store, templates.clone()),
                templates,
                snapshots,
                volumes,
                metrics,
                sandboxes,
                fleet,
                db,
            },
            reconciled,
        ))
    }

    /// Deletes the template or the snapshot that a reference stands for. What was made from it
    /// runs on.
    ///
    /// # Errors
    /// [`Error::TemplateNotFound`] if it stands for neither.
    pub async fn delete(&self, reference: &str) -> Result<()> {
        match self.templates.delete(reference).await {
            Err(not_a_template @ Error::TemplateNotFound { .. }) => {
                match self.snapshots.delete(reference).await {
                    Err(Error::SnapshotNotFound { .. }) => Err(not_a_template),
                    done => done,
                }
            }
            done => done,
        }
    }

    /// The same, unless sandboxes that were made of it are there.
    ///
    /// # Errors
    /// As [`Self::delete`]; [`Error::TemplateInUse`].
    pub async fn delete_unused(&self, reference: &str) -> Result<()> {
        let template = self.templates.get(reference).await?;
        let sandboxes = self.sandboxes.all();
        if let Some(user) = sandboxes.iter().find(|s| s.template == template.id) {
            return Err(Error::TemplateInUse {
                template: reference.to_owned(),
                sandbox: user.id.clone(),
            });
        }
        self.delete(reference).await
    }

    /// Stops watching, waits for operations under way, and closes the database. Sandboxes run on.
    pub async fn close(&self) {
        self.sandboxes.close().await;
        self.templates.end_builds().await;
        self.db.close().await;
    }
}
