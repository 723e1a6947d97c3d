//! Where the files of an archive go.

use std::{
    collections::HashSet,
    ffi::OsString,
    fs, io,
    os::unix::fs::{PermissionsExt as _, lchown},
    path::{Component, Path, PathBuf},
};

use cubicle_protocol::guest_api::CopyQuery;
use tar::{Archive, Entry, EntryType};

/// Places the files of one archive.
pub(super) struct Placer {
    /// What was copied, component by component; wildcards stand for anything.
    src: Vec<OsString>,
    /// Whether `src` has a wildcard, so that it may stand for several files.
    wild: bool,
    dest: PathBuf,
    /// Whether `dest` is a directory, as far as that is known before the files are.
    directory: bool,
    owner: (u32, u32),
    mode: Option<u32>,
    /// The file that took `dest` for its own name, as long as it is the only one.
    alone: Option<OsString>,
    /// Directories that this has made.
    made: HashSet<PathBuf>,
    found: bool,
}

impl Placer {
    pub(super) fn new(query: &CopyQuery, owner: (u32, u32)) -> Result<Self, String> {
        let dest = PathBuf::from(&query.dest);
        if !dest.is_absolute() {
            return Err(format!("the destination {} is not absolute", query.dest));
        }
        let src = components(Path::new(&query.src))
            .ok_or_else(|| format!("{} leads out of what was uploaded", query.src))?;
        // `**` may be any number of directories: what is below the part before it keeps its place.
        let wild = query.src.contains(['*', '?', '[']);
        let depth = src.iter().position(|part| part == "**");
        let src = depth.map_or(src.clone(), |depth| src[..depth].to_vec());
        Ok(Self {
            wild: wild && depth.is_none(),
            directory: query.dest.ends_with('/') || depth.is_some() || dest.is_dir(),
            src,
            dest,
            owner,
            mode: query.mode,
            alone: None,
            made: HashSet::new(),
            found: false,
        })
    }

    pub(super) fn place(mut self, mut archive: Archive<impl io::Read>) -> io::Result<()> {
        for entry in archive.entries()? {
            let mut entry = entry?;
            let path = entry.path()?.into_owned();
            let Some(parts) = components(&path) else {
                let why = format!("{} leads out of the archive", path.display());
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            };
            let is_directory = entry.header().entry_type() == EntryType::Directory;
            if let Some(to) = self.target(&parts, is_directory)? {
                self.found = true;
                self.write(&mut entry, &to)
                    .map_err(|error| with_path(&error, &to))?;
            }
        }
        if self.found {
            return Ok(());
        }
        // An empty directory may be all that there is.
        if self.src.is_empty() {
            return self.make_directories(&self.dest.clone());
        }
        let why = "nothing that was uploaded has that name";
        Err(io::Error::new(io::ErrorKind::NotFound, why))
    }

    /// Where an entry goes; `None`: it is not a part of what was copied.
    fn target(&mut self, parts: &[OsString], is_directory: bool) -> io::Result<Option<PathBuf>> {
        let depth = self.src.len();
        let matches = |(wanted, part): (&OsString, &OsString)| {
            let wanted = wanted.to_string_lossy();
            wanted.contains(['*', '?', '[']) || *wanted == *part.to_string_lossy()
        };
        if parts.len() < depth || !self.src.iter().zip(parts).all(matches) {
            return Ok(None);
        }
        if parts.len() > depth {
            let inside: PathBuf = parts[depth..].iter().collect();
            return Ok(Some(self.dest.join(inside)));
        }
        if is_directory {
            return Ok(Some(self.dest.clone()));
        }
        let Some(name) = parts.last() else {
            return Ok(None);
        };
        if self.directory {
            return Ok(Some(self.dest.join(name)));
        }
        if !self.wild {
            return Ok(Some(self.dest.clone()));
        }
        if let Some(first) = self.alone.take() {
            self.make_room(&first)?;
            return Ok(Some(self.dest.join(name)));
        }
        self.alone = Some(name.clone());
        Ok(Some(self.dest.clone()))
    }

    /// A second file has come: the destination is a directory, and the first file moves into it.
    fn make_room(&mut self, first: &OsString) -> io::Result<()> {
        let aside = self.dest.with_file_name(".cubicle-copy");
        fs::rename(&self.dest, &aside)?;
        self.directory = true;
        self.make_directories(&self.dest.clone())?;
        fs::rename(aside, self.dest.join(first))
    }

    fn write(&mut self, entry: &mut Entry<'_, impl io::Read>, to: &Path) -> io::Result<()> {
        let kind = entry.header().entry_type();
        let links = matches!(kind, EntryType::Link | EntryType::Symlink);
        let mode = match self.mode {
            Some(mode) => mode & 0o7777,
            // Links have none, and not every archive makes one up for them.
            None if links => 0,
            None => entry.header().mode()? & 0o7777,
        };
        if kind == EntryType::Directory {
            let existed = to.is_dir();
            self.make_directories(to)?;
            // A directory that was there before, such as `/`, stays what it is.
            if !existed || self.made.contains(to) {
                fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
            }
            return Ok(());
        }
        if let Some(parent) = to.parent() {
            self.make_directories(parent)?;
        }
        match fs::symlink_metadata(to) {
            Ok(old) if old.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
            Ok(_) => fs::remove_file(to)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        match kind {
            EntryType::Link => {
                let link = entry.link_name()?.unwrap_or_default().into_owned();
                let from = components(&link).unwrap_or_default();
                let Some(from) = self.target(&from, false)? else {
                    let why = format!("a link to {}, which is not copied", link.display());
                    return Err(io::Error::new(io::ErrorKind::NotFound, why));
                };
                return fs::hard_link(from, to);
            }
            EntryType::Symlink => {
                let link = entry.link_name()?.unwrap_or_default().into_owned();
                std::os::unix::fs::symlink(link, to)?;
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let mut file = fs::File::create_new(to)?;
                io::copy(entry, &mut file)?;
                if let Ok(seconds) = entry.header().mtime() {
                    let at = std::time::Duration::from_secs(seconds);
                    file.set_modified(std::time::UNIX_EPOCH + at)?;
                }
            }
            other => {
                let why = format!("an entry of kind {other:?} is not a file");
                return Err(io::Error::new(io::ErrorKind::Unsupported, why));
            }
        }
        lchown(to, Some(self.owner.0), Some(self.owner.1))?;
        if kind != EntryType::Symlink {
            // After the owner, whose change takes set-user-id bits away.
            fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
        }
        Ok(())
    }

    /// Makes a directory and what is missing above it, for the owner.
    fn make_directories(&mut self, path: &Path) -> io::Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.make_directories(parent)?;
        }
        fs::create_dir(path)?;
        lchown(path, Some(self.owner.0), Some(self.owner.1))?;
        self.made.insert(path.to_owned());
        Ok(())
    }
}

/// The parts of a relative path; `None` if it leads out of where it begins.
fn components(path: &Path) -> Option<Vec<OsString>> {
    let mut parts = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => parts.push(part.to_owned()),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    Some(parts)
}

fn with_path(error: &io::Error, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
