//! Where volumes are on this machine, and which directories of it may be mounted.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use super::{Mount, MountSource, VolumeConfig};
use crate::{
    error::{Error, Result},
    secret,
};

/// What the names of what is being removed begin with, and of files that are not whole yet.
const TRASH: &str = ".trash-";
const DRAFT: &str = ".draft-";

/// See the module.
#[derive(Debug)]
pub struct Directories {
    config: VolumeConfig,
}

impl Directories {
    /// Looks at nothing yet.
    #[must_use]
    pub const fn new(config: VolumeConfig) -> Self {
        Self { config }
    }

    /// Makes the directory of volumes if it is missing and removes what is not in `known` from it.
    pub(super) async fn open(
        config: VolumeConfig,
        known: impl Iterator<Item = String>,
    ) -> Result<Self> {
        let known: HashSet<String> = known.collect();
        let directory = config.directory.clone();
        blocking("make", directory.clone(), move || {
            // Nobody but the server looks into volumes; what is in them is the sandboxes'.
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&directory)?;
            for entry in fs::read_dir(&directory)? {
                let entry = entry?;
                let name = entry.file_name();
                if name.to_str().is_none_or(|name| !known.contains(name)) {
                    tracing::info!(path = %entry.path().display(), "removing what is no volume");
                    remove_tree(&entry.path())?;
                }
            }
            Ok(())
        })
        .await?;
        Ok(Self { config })
    }

    /// Where a mount's source is on this machine. A directory of the host must be allowed now,
    /// whatever was allowed when it was first mounted.
    ///
    /// # Errors
    /// [`Error::HostMountRefused`].
    pub async fn root(&self, mount: &Mount) -> Result<PathBuf> {
        match &mount.source {
            MountSource::Volume { id, .. } => Ok(self.path(id)),
            MountSource::Host { path } => self.allowed(path).await,
        }
    }

    /// The real path of a directory of the host that may be mounted.
    pub(super) async fn allowed(&self, path: &Path) -> Result<PathBuf> {
        let allow = self.config.host_allow.clone();
        let asked = path.to_owned();
        let refused = |why: String| Error::HostMountRefused {
            path: asked.clone(),
            why,
        };
        if allow.is_empty() {
            return Err(refused(
                "this server shares no directories of its host; its owner allows them with \
                 `cubicle up --host-mount-allow DIR`"
                    .to_owned(),
            ));
        }
        let plain = |part| {
            use std::path::Component;
            matches!(part, Component::RootDir | Component::Normal(_))
        };
        if !path.is_absolute() || !path.components().all(plain) {
            return Err(refused(
                "it has to be an absolute path without '..'".to_owned(),
            ));
        }
        let path = path.to_owned();
        let found = tokio::task::spawn_blocking(move || {
            let allowed = |real: &Path| {
                let mut allow = allow.iter().filter_map(|dir| fs::canonicalize(dir).ok());
                allow.any(|dir| real.starts_with(dir))
            };
            // What is outside is not talked about: not even whether it is there.
            match fs::canonicalize(&path) {
                Ok(real) if !allowed(&real) => None,
                Ok(real) => Some(fs::metadata(&real).map(|found| (real, found.is_dir()))),
                Err(error) => {
                    let mut above = path
                        .ancestors()
                        .filter_map(|dir| fs::canonicalize(dir).ok());
                    above.next().filter(|real| allowed(real))?;
                    Some(Err(error))
                }
            }
        })
        .await;
        match found {
            Ok(Some(Ok((real, true)))) => Ok(real),
            Ok(Some(Ok((_, false)))) => Err(refused("it is no directory".to_owned())),
            Ok(Some(Err(error))) => Err(refused(error.to_string())),
            Ok(None) => Err(refused(
                "it is not below a directory that `cubicle up --host-mount-allow` names".to_owned(),
            )),
            Err(panic) => Err(refused(panic.to_string())),
        }
    }

    /// Makes the directory of a volume.
    pub(super) async fn make(&self, id: &str) -> Result<()> {
        let path = self.path(id);
        blocking("make", path.clone(), move || {
            fs::DirBuilder::new().mode(0o755).create(&path)
        })
        .await
    }

    /// Removes the directory of a volume. What cannot be removed now is tried again when the
    /// server starts.
    pub(super) async fn remove(&self, id: &str) -> Result<()> {
        let path = self.path(id);
        let trash = self.trash();
        let renamed = trash.clone();
        blocking("remove", path.clone(), move || {
            match fs::rename(&path, &renamed) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                result => result,
            }
        })
        .await?;
        empty(trash);
        Ok(())
    }

    /// Where the content of a volume is.
    pub(super) fn path(&self, id: &str) -> PathBuf {
        self.config.directory.join(id)
    }

    /// Where something goes that is to be removed with [`empty`]. What is left there, and in
    /// [`Self::draft`], is removed when the server starts.
    pub(super) fn trash(&self) -> PathBuf {
        self.temporary(TRASH)
    }

    /// Where a file is that is not whole yet.
    pub(super) fn draft(&self) -> PathBuf {
        self.temporary(DRAFT)
    }

    fn temporary(&self, prefix: &str) -> PathBuf {
        let name = format!("{prefix}{}", secret::hex(8));
        self.config.directory.join(name)
    }
}

/// Removes what was moved to [`Directories::trash`]. Nobody waits for this: there may be a lot in it.
pub(super) fn empty(trash: PathBuf) {
    tokio::task::spawn_blocking(move || {
        if let Err(error) = remove_tree(&trash) {
            tracing::warn!(%error, path = %trash.display(), "could not remove a volume's files");
        }
    });
}

/// Removes a file or a directory, without following links; one that is gone is no error.
fn remove_tree(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

async fn blocking(
    doing: &'static str,
    path: PathBuf,
    work: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> Result<()> {
    let done = tokio::task::spawn_blocking(work).await;
    let done = done.unwrap_or_else(|panic| Err(io::Error::other(panic)));
    done.map_err(|source| Error::Volume {
        doing,
        path,
        source,
    })
}
