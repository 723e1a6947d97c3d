//! What is in a directory.

use std::{
    ffi::OsString,
    fs::FileType,
    io,
    path::{Path, PathBuf},
};

use super::{Error, entry};
use crate::{access::Accounts, proto::filesystem::EntryInfo};

/// Names in a directory that are still to be visited, sorted.
type Names = std::vec::IntoIter<(OsString, FileType)>;

/// Lists the directory at `path` down to `depth` levels, in the order of names, each directory
/// before what is in it. Links to directories are listed and not entered; `path` itself may be one,
/// and stays the beginning of every path in the answer. What disappears meanwhile is left out.
///
/// # Errors
/// [`Error::NotFound`], [`Error::NotADirectory`], [`Error::Io`].
pub(super) fn list(path: &Path, depth: u32, accounts: &Accounts) -> Result<Vec<EntryInfo>, Error> {
    let mut entries = Vec::new();
    // The way down to the directory that is being read, each level with what is left to visit.
    let mut levels: Vec<(PathBuf, Names)> = vec![(
        path.to_owned(),
        names(path).map_err(Error::io("list", path))?,
    )];
    while let Some((directory, rest)) = levels.last_mut() {
        let Some((name, kind)) = rest.next() else {
            levels.pop();
            continue;
        };
        let path = directory.join(name);
        let entry = match entry::describe(&path, accounts) {
            Ok(entry) => entry,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::io("look at", &path)(error)),
        };
        entries.push(entry);
        if kind.is_dir() && levels.len() < depth as usize {
            match names(&path) {
                Ok(names) => levels.push((path, names)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io("list", &path)(error)),
            }
        }
    }
    Ok(entries)
}

fn names(directory: &Path) -> io::Result<Names> {
    let mut names = std::fs::read_dir(directory)?
        .map(|entry| entry.and_then(|entry| Ok((entry.file_name(), entry.file_type()?))))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
    Ok(names.into_iter())
}
