//! Templates: named snapshots to make sandboxes from, and how they are built.
//!
//! A template has aliases (names for people) and tags (names of builds; `default` is meant when
//! none is said). A build that no tag stands for any more loses its snapshot; sandboxes that were
//! made from it run on.

mod alias;
mod build;
mod expand;
mod files;
mod log;
mod model;
mod name;
mod plan;
mod reconcile;
mod request;
mod size;
mod spec;
mod store;
mod tags;
mod turns;
mod vm;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cubicle_ids::{SandboxId, SnapshotId, TemplateId};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use self::{files::Files, store::Store, turns::Turns};
pub use self::{
    files::TemplateConfig,
    log::LogPage,
    model::{Build, BuildLine, BuildStatus, Resolved, Template},
    name::{BadName, DEFAULT_TAG, Reference, is_tag},
    plan::Launch,
    request::Started,
    size::Size,
    spec::{
        Action, BASE_IMAGE, BASE_RECIPE, BadFilesHash, BuildSpec, BuildTemplate, Defaults,
        FilesHash, Origin, Probe, RegistryAuth, Step,
    },
    tags::Tag,
};
use crate::{
    db::Db,
    error::{Error, Result},
    fleet::SharedFleet,
    snapshot,
};

/// The templates of this server. Cheap to clone.
#[derive(Clone)]
pub struct Templates {
    store: Store,
    snapshots: snapshot::Store,
    fleet: SharedFleet,
    /// Builds under way, and how many lines each has logged.
    running: Arc<Mutex<HashMap<Uuid, watch::Sender<u64>>>>,
    files: Arc<Files>,
    config: Arc<TemplateConfig>,
    /// Who makes a layer, by its fingerprint.
    turns: Turns,
    /// The VMs that builds run in.
    vms: Arc<Mutex<HashSet<SandboxId>>>,
    /// Cancelled when the server stops.
    stopping: CancellationToken,
    tasks: TaskTracker,
}

impl Templates {
    pub(crate) async fn open(config: TemplateConfig, db: Db, fleet: SharedFleet) -> Result<Self> {
        let this = Self {
            files: Arc::new(Files::open(&config)?),
            config: Arc::new(config),
            snapshots: snapshot::Store::new(db.clone()),
            store: Store::new(db),
            fleet,
            running: Arc::default(),
            turns: Turns::default(),
            vms: Arc::default(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        this.reconcile().await?;
        Ok(this)
    }

    /// Every template, newest first.
    pub async fn list(&self) -> Result<Vec<Template>> {
        self.store.load(None).await
    }

    /// The template that an id, an alias, `name:tag` or a snapshot id stands for.
    pub async fn get(&self, reference: &str) -> Result<Template> {
        let not_found = || Error::TemplateNotFound {
            reference: shorten(reference),
        };
        let id = self.find_id(reference).await?.ok_or_else(not_found)?;
        self.store
            .load(Some(&id))
            .await?
            .pop()
            .ok_or_else(not_found)
    }

    /// The id of that template, if there is one. Tags are not looked at.
    pub async fn find_id(&self, reference: &str) -> Result<Option<TemplateId>> {
        let Ok(reference) = reference.parse::<Reference>() else {
            return Ok(None);
        };
        if let Some(id) = self.store.find(&reference.name).await? {
            return Ok(Some(id));
        }
        // What is made from a snapshot has that in the place of its template.
        let snapshot = self.snapshots.find(&reference).await?;
        Ok(snapshot.and_then(|snapshot| snapshot.id.as_str().parse().ok()))
    }

    /// Whether a name for people stands for a template.
    pub(crate) async fn has_alias(&self, name: &str) -> Result<bool> {
        Ok(self.store.find(name).await?.is_some())
    }

    /// What a sandbox is to be made from: a template or a snapshot.
    pub async fn resolve(&self, reference: &str) -> Result<Resolved> {
        let not_found = || Error::TemplateNotFound {
            reference: shorten(reference),
        };
        let parsed: Reference = reference.parse().map_err(|_| not_found())?;
        if let Some(resolved) = self.store.resolve(&parsed).await? {
            return Ok(resolved);
        }
        let Some(id) = self.store.find(&parsed.name).await? else {
            let snapshot = self.snapshots.resolve(&parsed).await?;
            return snapshot.ok_or_else(not_found);
        };
        let template = self
            .store
            .load(Some(&id))
            .await?
            .pop()
            .ok_or_else(not_found)?;
        if template.current.is_some() {
            // It is usable, so what is missing is the tag.
            return Err(not_found());
        }
        let status = match template.builds.first() {
            Some(Build {
                reason: Some(reason),
                ..
            }) => format!("the last one failed: {reason}"),
            Some(build) => format!("its latest build is {}", build.status.as_str()),
            None => "none was started".to_owned(),
        };
        Err(Error::TemplateNotReady {
            reference: shorten(reference),
            status,
        })
    }

    /// Deletes a template; with a tag, and other tags beside it, only that tag. Sandboxes that
    /// were made from it run on.
    pub async fn delete(&self, reference: &str) -> Result<()> {
        let not_found = || Error::TemplateNotFound {
            reference: shorten(reference),
        };
        let parsed: Reference = reference.parse().map_err(|_| not_found())?;
        let id = self.store.find(&parsed.name).await?.ok_or_else(not_found)?;
        if let Some(tag) = &parsed.tag {
            if !self.store.has_tag(&id, tag).await? {
                return Err(not_found());
            }
            if self.store.delete_tag(&id, tag).await? {
                self.collect().await;
                return Ok(());
            }
        }
        self.store.delete(&id).await?;
        self.collect().await;
        Ok(())
    }

    /// Changes whether a template is for everyone.
    pub async fn set_public(&self, reference: &str, public: bool) -> Result<Template> {
        let template = self.get(reference).await?;
        self.store.set_public(&template.id, public).await?;
        self.get(template.id.as_str()).await
    }

    /// One build of a template.
    pub async fn build_of(&self, reference: &str, build: &str) -> Result<Build> {
        let template = self.get(reference).await?;
        let wanted = build.parse::<Uuid>().ok();
        template
            .builds
            .into_iter()
            .find(|known| Some(known.id) == wanted)
            .ok_or_else(|| Error::BuildNotFound {
                template: shorten(reference),
                build: shorten(build),
            })
    }

    /// Counts one more sandbox of a template, when there is time for it.
    pub(crate) fn count_spawn(&self, template: &TemplateId) {
        let (store, template) = (self.store.clone(), template.clone());
        self.tasks.spawn(async move {
            if let Err(error) = store.count_spawn(&template).await {
                tracing::warn!(%template, %error, "a sandbox was not counted");
            }
        });
    }

    /// Ends builds under way, and begins no more. To be called before the fleet closes, so that it
    /// is what they failed of.
    pub async fn end_builds(&self) {
        self.stopping.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        let left = std::mem::take(&mut *self.vms());
        for vm in left {
            // Unless the fleet was closed first, which ends it as well.
            let _ = self.fleet.kill(&vm).await;
        }
    }

    /// The VMs that builds run in.
    fn vms(&self) -> MutexGuard<'_, HashSet<SandboxId>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Deletes every layer that nothing uses any more.
    async fn collect(&self) {
        let unused = match self.store.forget_unused().await {
            Ok(unused) => unused,
            Err(error) => {
                tracing::error!(%error, "layers that nothing uses stay for now");
                return;
            }
        };
        for snapshot in unused {
            self.discard(&snapshot).await;
        }
    }

    /// Deletes a snapshot that nothing refers to; what cannot be deleted now, the next start finds.
    async fn discard(&self, snapshot: &SnapshotId) {
        if let Err(error) = self.fleet.delete_snapshot(snapshot).await {
            tracing::error!(%snapshot, %error, "a snapshot that nothing refers to stays for now");
        }
    }
}

/// What a client sent, short enough to send back.
pub(crate) fn shorten(text: &str) -> String {
    const MAX: usize = 100;
    let mut short: String = text.chars().take(MAX).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}
