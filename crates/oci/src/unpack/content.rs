//! What is in files and what is said about them.

use std::{
    io::Read,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{
        AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags, chownat,
        fchmod, fchown, fsetxattr, ftruncate, futimens, lremovexattr, lsetxattr, openat, utimensat,
    },
    io::{Errno, pwrite},
};

use super::{
    Fault,
    archive::{Archive, Kind, Member},
    sparse::{MAX_LENGTH, Run},
    tree::{INHERITED, Place, descriptor_path},
};

const BUFFER: usize = 1 << 18;
/// Zeros are left out in pieces of this length, in bytes: the block size of what the tree lies on
/// and of the image that is made of it.
const HOLE: usize = 4096;
/// What ext4 has room for besides an inode, with headers, in bytes.
const MAX_XATTRS: usize = 3900;
/// What the kernel spends on each attribute besides name and value, in bytes.
const XATTR_HEADER: usize = 24;

/// Makes the file that a member describes; nothing is at its place.
pub(super) fn write_file<R: Read>(
    place: &Place,
    member: &Member,
    archive: &mut Archive<R>,
) -> Result<OwnedFd, Fault> {
    if member.length > MAX_LENGTH {
        return Err(Fault::Field("size"));
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(0o600);
    let file = openat(place.parent.fd(), &*place.name, flags, mode)
        .map_err(|error| Fault::system("create it", error))?;
    let whole = [Run {
        offset: 0,
        length: member.length,
    }];
    let runs = member.runs.as_deref().unwrap_or(&whole);
    let longest = runs.iter().map(|run| run.length).max().unwrap_or(0);
    let mut buffer = vec![0; usize::try_from(longest).map_or(BUFFER, |n| n.min(BUFFER))];
    let mut end = 0;
    for run in runs {
        end = end.max(write_run(&file, run, archive, &mut buffer)?);
    }
    if end < member.length {
        ftruncate(&file, member.length).map_err(|error| Fault::system("set its size", error))?;
    }
    Ok(file)
}

/// Writes a run and returns where the last of its data ends.
fn write_run<R: Read>(
    file: &OwnedFd,
    run: &Run,
    archive: &mut Archive<R>,
    buffer: &mut [u8],
) -> Result<u64, Fault> {
    let mut offset = run.offset;
    let mut left = run.length;
    let mut end = 0;
    while left > 0 {
        let n = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let piece = &mut buffer[..n];
        archive.read_exact(piece)?;
        end = end.max(write_piece(file, piece, offset)?);
        offset += n as u64;
        left -= n as u64;
    }
    Ok(end)
}

fn write_piece(file: &OwnedFd, piece: &[u8], offset: u64) -> Result<u64, Fault> {
    let mut end = 0;
    let mut at = 0;
    let is_hole = |from: usize| {
        let chunk = &piece[from..piece.len().min(from + HOLE)];
        chunk.iter().all(|&byte| byte == 0)
    };
    while at < piece.len() {
        let from = at;
        while at < piece.len() && !is_hole(at) {
            at += HOLE;
        }
        let mut data = &piece[from..at.min(piece.len())];
        let mut to = offset + from as u64;
        while !data.is_empty() {
            match pwrite(file, data, to) {
                Ok(n) => {
                    data = &data[n..];
                    to += n as u64;
                    end = to;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(Fault::system("write it", error)),
            }
        }
        while at < piece.len() && is_hole(at) {
            at += HOLE;
        }
    }
    Ok(end)
}

/// Whether what is made in a directory will have more than its own entry says.
pub(super) fn passes_on_acls(member: &Member) -> bool {
    let is_default = |(name, _): &(Vec<u8>, Vec<u8>)| name == INHERITED[1].as_bytes();
    member.kind == Kind::Directory && member.xattrs.iter().any(is_default)
}

/// Takes away what something new has from its directory.
pub(super) fn drop_inherited(place: &Place) {
    let path = [
        descriptor_path(place.parent.fd()).as_bytes(),
        b"/",
        &*place.name,
    ]
    .concat();
    for name in INHERITED {
        // Mostly there is none.
        lremovexattr(&*path, name).ok();
    }
}

/// Gives an open file or directory what its member says. What is made in a directory later changes its time again.
pub(super) fn describe(fd: BorrowedFd<'_>, member: &Member) -> Result<(), Fault> {
    fchown(
        fd,
        Some(Uid::from_raw(member.uid)),
        Some(Gid::from_raw(member.gid)),
    )
    .map_err(|error| Fault::system("set its owner", error))?;
    // After the owner, since a change of it takes set-id bits and capabilities away.
    for (name, value) in attributes(member)? {
        let set = fsetxattr(fd, name, value, XattrFlags::empty());
        tolerate(set)?;
    }
    fchmod(fd, Mode::from_raw_mode(member.mode))
        .map_err(|error| Fault::system("set its mode", error))?;
    set_time(fd, member.mtime)
}

/// As [`describe`], for what is not opened: links and devices.
pub(super) fn describe_unopened(place: &Place, member: &Member) -> Result<(), Fault> {
    let (parent, name) = (place.parent.fd(), &*place.name);
    chownat(
        parent,
        name,
        Some(Uid::from_raw(member.uid)),
        Some(Gid::from_raw(member.gid)),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .map_err(|error| Fault::system("set its owner", error))?;
    for (attribute, value) in attributes(member)? {
        // Links and devices have no attributes of this kind.
        if attribute.starts_with(b"user.") {
            continue;
        }
        let mut path = descriptor_path(parent).into_bytes();
        path.push(b'/');
        path.extend_from_slice(name);
        tolerate(lsetxattr(&*path, attribute, value, XattrFlags::empty()))?;
    }
    utimensat(
        parent,
        name,
        &times(member.mtime),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .map_err(|error| Fault::system("set its time", error))
}

/// Name and value.
type Attribute<'a> = (&'a [u8], &'a [u8]);

/// Those extended attributes that mean something in a guest. Labels of a security module that is
/// not there, and what container tools note for themselves, are left out.
fn attributes(member: &Member) -> Result<Vec<Attribute<'_>>, Fault> {
    let wanted = |name: &[u8]| {
        name.starts_with(b"user.")
            || name == b"security.capability"
            || name.starts_with(b"system.posix_acl_")
            || (name.starts_with(b"trusted.") && !name.starts_with(b"trusted.overlay."))
    };
    let wanted = member.xattrs.iter().filter(|(name, _)| wanted(name));
    let list: Vec<_> = wanted
        .map(|(name, value)| (name.as_slice(), value.as_slice()))
        .collect();
    let size = |(name, value): &Attribute<'_>| name.len() + value.len() + XATTR_HEADER;
    if list.iter().any(|(name, _)| name.len() > 255)
        || list.iter().map(size).sum::<usize>() > MAX_XATTRS
    {
        return Err(Fault::Field("list of extended attributes"));
    }
    Ok(list)
}

/// A file system that has no attributes of some kind is no reason to fail, as elsewhere.
fn tolerate(set: Result<(), Errno>) -> Result<(), Fault> {
    match set {
        Ok(()) | Err(Errno::NOTSUP | Errno::PERM | Errno::INVAL) => Ok(()),
        Err(error) => Err(Fault::system("set an extended attribute of it", error)),
    }
}

/// Sets the time of an open directory.
pub(super) fn set_time(fd: BorrowedFd<'_>, mtime: (i64, u32)) -> Result<(), Fault> {
    futimens(fd, &times(mtime)).map_err(|error| Fault::system("set its time", error))
}

fn times((seconds, nanoseconds): (i64, u32)) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds.into(),
    };
    let unchanged = Timespec {
        tv_sec: 0,
        tv_nsec: UTIME_OMIT,
    };
    Timestamps {
        last_access: unchanged,
        last_modification: time,
    }
}
