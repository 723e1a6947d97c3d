//! Volumes: directories with a name that sandboxes mount and that outlive them. And directories of
//! the host, which the server's owner has to allow.
//!
//! A volume is a row here and a directory of the same name below [`VolumeConfig::directory`]; what
//! no row owns is removed when the server starts. Sandboxes say what they have mounted in
//! [`Sandbox::mounts`](crate::sandbox::Sandbox::mounts), from their creation to their end; a fork, a
//! rollback and a resume change nothing about it.

mod content;
mod directories;
mod mount;
mod store;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use cubicle_ids::SnapshotId;
pub use cubicle_protocol::share::{Kind, Time};
pub use cubicle_share::{Attributes, Item, Problem};
use time::OffsetDateTime;

use self::store::Store;
pub use self::{
    content::Content,
    directories::Directories,
    mount::{MAX_MOUNTS, Mount, MountRequest, MountSource},
};
use crate::{
    db::{Db, now},
    error::{Error, Result},
    secret,
};

/// Longest name of a volume, in bytes.
pub const MAX_VOLUME_NAME: usize = 128;

/// Random bytes of a volume's id and of its token.
const ID_BYTES: usize = 10;
const TOKEN_BYTES: usize = 20;

/// Where volumes are, and what else may be mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeConfig {
    /// Holds one directory for each volume. Made if it is missing.
    pub directory: PathBuf,
    /// Directories of the host that may be mounted, with all below them.
    pub host_allow: Vec<PathBuf>,
}

impl VolumeConfig {
    /// The name of the directory of volumes beside the database.
    const DIRECTORY: &str = "volumes-data";

    /// Volumes beside this database; no directories of the host.
    #[must_use]
    pub fn beside(database: &Path) -> Self {
        Self {
            directory: database.with_file_name(Self::DIRECTORY),
            host_allow: Vec::new(),
        }
    }
}

/// A directory that outlives sandboxes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Names it for ever.
    pub id: String,
    /// What a person calls it; no two have the same.
    pub name: String,
    /// For clients that speak to the volume itself.
    pub token: String,
    /// When it was made.
    pub created_at: OffsetDateTime,
}

/// The volumes of this server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Volumes {
    store: Store,
    directories: Arc<Directories>,
}

impl Volumes {
    /// Opens the directory, and removes from it what belongs to no volume.
    pub(crate) async fn open(config: VolumeConfig, db: Db) -> Result<Self> {
        let store = Store::new(db);
        let known = store.list().await?;
        let directories = Directories::open(config, known.into_iter().map(|volume| volume.id));
        let directories = Arc::new(directories.await?);
        Ok(Self { store, directories })
    }

    /// Makes an empty volume. Without a name it is called like its id.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what cannot be a name, [`Error::NameTaken`].
    pub async fn create(&self, name: Option<&str>) -> Result<Volume> {
        let id = format!("vol-{}", secret::hex(ID_BYTES));
        let name = name.unwrap_or(&id).to_owned();
        check_name(&name)?;
        let volume = Volume {
            id,
            name,
            token: secret::hex(TOKEN_BYTES),
            created_at: now(),
        };
        // In this order: a directory that a crash leaves without a row is swept.
        self.directories.make(&volume.id).await?;
        match self.store.insert(&volume).await {
            Ok(true) => Ok(volume),
            failed => {
                self.directories.remove(&volume.id).await?;
                failed.and(Err(Error::NameTaken {
                    name: volume.name,
                    what: "volume",
                }))
            }
        }
    }

    /// All volumes, the oldest first.
    pub async fn list(&self) -> Result<Vec<Volume>> {
        self.store.list().await
    }

    /// The volume with this id or name.
    ///
    /// # Errors
    /// [`Error::VolumeNotFound`].
    pub async fn get(&self, reference: &str) -> Result<Volume> {
        let found = self.store.get(reference).await?;
        found.ok_or_else(|| Error::VolumeNotFound {
            reference: reference.to_owned(),
        })
    }

    /// Deletes a volume with all that is in it.
    ///
    /// # Errors
    /// [`Error::VolumeInUse`] while a sandbox has it mounted, also a paused one.
    pub async fn delete(&self, reference: &str) -> Result<()> {
        let volume = self.get(reference).await?;
        if !self.store.delete(&volume.id).await? {
            return match self.store.user(&volume.id).await? {
                Some(sandbox) => Err(Error::VolumeInUse {
                    name: volume.name,
                    sandbox,
                }),
                // It has just been deleted, or its last user has just gone.
                None => Box::pin(self.delete(&volume.id)).await,
            };
        }
        self.directories.remove(&volume.id).await
    }

    /// Finds what a request wants to have mounted, and makes sure that it can be.
    ///
    /// # Errors
    /// [`Error::Invalid`] for places where nothing can be mounted and for volumes that are not
    /// there, [`Error::HostMountRefused`].
    pub async fn resolve(&self, requests: Vec<MountRequest>) -> Result<Vec<Mount>> {
        mount::check(&requests)?;
        let mut mounts = Vec::with_capacity(requests.len());
        for request in requests {
            let source = match request.source {
                MountSource::Volume { id, name } => {
                    let reference = if id.is_empty() { &name } else { &id };
                    let found = self.store.get(reference).await?;
                    let found = found.ok_or_else(|| {
                        let why = format!("there is no volume '{name}'; create it first");
                        Error::invalid("volumeMounts", why)
                    })?;
                    MountSource::Volume {
                        id: found.id,
                        name: found.name,
                    }
                }
                MountSource::Host { path } => {
                    let path = self.directories.allowed(&path).await?;
                    MountSource::Host { path }
                }
            };
            mounts.push(Mount {
                source,
                path: mount::clean(&request.path),
                read_only: request.read_only,
            });
        }
        Ok(mounts)
    }

    /// What sandboxes that are made from a snapshot have mounted unless they say otherwise.
    pub(crate) async fn of_snapshot(&self, snapshot: &SnapshotId) -> Result<Vec<Mount>> {
        self.store.of_snapshot(snapshot).await
    }
}

fn check_name(name: &str) -> Result<()> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if (1..=MAX_VOLUME_NAME).contains(&name.len()) && name.bytes().all(good) {
        return Ok(());
    }
    let shown: String = name.chars().take(40).collect();
    let why = format!("'{shown}' is not 1 to {MAX_VOLUME_NAME} of A-Z, a-z, 0-9, '-' and '_'");
    Err(Error::invalid("name", why))
}
