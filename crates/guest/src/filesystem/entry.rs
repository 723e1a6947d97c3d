//! Files as clients see them.

use std::{
    fs::Metadata as Stat,
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use buffa_types::google::protobuf::Timestamp;

use super::{Metadata, mode};
use crate::{
    access::Accounts,
    proto::filesystem::{EntryInfo, FileType},
};

/// Describes the entry at `path`.
///
/// A symbolic link is described by its own size, owner and letters, and by the type and the
/// permission bits of what it leads to; one that leads nowhere is a symbolic link.
///
/// # Errors
/// Whatever `lstat` says.
pub(super) fn describe(path: &Path, accounts: &Accounts) -> io::Result<EntryInfo> {
    let stat = std::fs::symlink_metadata(path)?;
    let mut entry = EntryInfo {
        name: path
            .file_name()
            .unwrap_or(path.as_os_str())
            .to_string_lossy()
            .into_owned(),
        r#type: file_type(&stat).into(),
        path: path.to_string_lossy().into_owned(),
        size: i64::try_from(stat.size()).unwrap_or(i64::MAX),
        mode: stat.mode() & 0o777,
        permissions: mode::letters(stat.mode()),
        owner: accounts.user_name(stat.uid()).into_owned(),
        group: accounts.group_name(stat.gid()).into_owned(),
        modified_time: Timestamp {
            seconds: stat.mtime(),
            // Below 10^9.
            nanos: i32::try_from(stat.mtime_nsec()).unwrap_or_default(),
            ..Timestamp::default()
        }
        .into(),
        metadata: Metadata::read(path).into_iter().collect(),
        ..EntryInfo::default()
    };
    if stat.is_symlink() {
        let target = match std::fs::canonicalize(path) {
            Ok(target) => target,
            Err(_) => written_target(path)?,
        };
        if let Ok(stat) = std::fs::metadata(path) {
            entry.r#type = file_type(&stat).into();
            entry.mode = stat.mode() & 0o777;
        }
        entry.symlink_target = Some(target.to_string_lossy().into_owned());
    }
    Ok(entry)
}

/// What a link says, absolute, for one that leads nowhere.
fn written_target(link: &Path) -> io::Result<PathBuf> {
    let target = std::fs::read_link(link)?;
    Ok(link.parent().unwrap_or(Path::new("/")).join(target))
}

/// Devices, pipes and sockets have no type on the wire.
fn file_type(stat: &Stat) -> FileType {
    let kind = stat.file_type();
    if kind.is_file() {
        FileType::FILE_TYPE_FILE
    } else if kind.is_dir() {
        FileType::FILE_TYPE_DIRECTORY
    } else if kind.is_symlink() {
        FileType::FILE_TYPE_SYMLINK
    } else {
        FileType::FILE_TYPE_UNSPECIFIED
    }
}
