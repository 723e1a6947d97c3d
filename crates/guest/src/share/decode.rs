//! What the kernel asks for, as it says it.

use bytes::Bytes;
use cubicle_protocol::share::{Change, Moment, RenameHow, Time};
use rustix::{
    fs::{FileType, OFlags},
    io::Errno,
};

use super::abi::{self, Arguments, Request, changed, opcode};

/// Flags of `RENAME2`, see renameat2(2).
const RENAME_NOREPLACE: u32 = 1;
const RENAME_EXCHANGE: u32 = 2;

/// A name in a directory, as the kernel gives it.
#[derive(Debug)]
pub(super) struct Name {
    pub(super) parent: u64,
    pub(super) name: Box<[u8]>,
}

impl Name {
    pub(super) fn key(&self) -> (u64, &[u8]) {
        (self.parent, &self.name)
    }
}

/// A request of the kernel that needs the host.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) node: u64,
    pub(super) what: What,
}

/// What is wanted.
#[derive(Debug)]
pub(super) enum What {
    Lookup(Name),
    GetAttributes,
    SetAttributes(Change),
    ReadLink,
    MakeSymlink(Name, Bytes),
    MakeFile {
        name: Name,
        mode: u32,
    },
    MakeDirectory {
        name: Name,
        mode: u32,
    },
    Remove(Name),
    RemoveDirectory(Name),
    Rename {
        from: Name,
        to: Name,
        how: RenameHow,
    },
    Link {
        from: u64,
        to: Name,
    },
    Open {
        flags: OFlags,
    },
    Create {
        name: Name,
        mode: u32,
        flags: OFlags,
    },
    Read {
        offset: u64,
        len: u32,
    },
    Write {
        offset: u64,
        append: bool,
        data: Bytes,
    },
    Release,
    Sync {
        data_only: bool,
    },
    Allocate {
        flags: u32,
        offset: u64,
        len: u64,
    },
    Usage,
    GetAttribute {
        name: Vec<u8>,
        room: u32,
    },
    SetAttribute {
        name: Vec<u8>,
        flags: u32,
        value: Bytes,
    },
    ListAttributes {
        room: u32,
    },
    RemoveAttribute {
        name: Vec<u8>,
    },
    OpenDirectory,
    ReadDirectory {
        handle: u64,
        after: u64,
        room: u32,
        plus: bool,
    },
    ReleaseDirectory {
        handle: u64,
    },
    Refused(Errno),
}

impl Work {
    /// What a request asks for. `None`: something that this file system doesn't have.
    pub(super) fn decode(request: Request<'_>) -> Option<Self> {
        let node = request.node;
        let mut arguments = request.arguments;
        let what = decode(request.opcode, node, &mut arguments)?;
        Some(Work { node, what })
    }
}

fn decode(opcode: u32, node: u64, rest: &mut Arguments<'_>) -> Option<What> {
    let named = |rest: &mut Arguments<'_>, parent| {
        let name = rest.name()?.into();
        Some(Name { parent, name })
    };
    Some(match opcode {
        opcode::LOOKUP => What::Lookup(named(rest, node)?),
        opcode::GETATTR => What::GetAttributes,
        opcode::SETATTR => What::SetAttributes(decode_change(rest)?),
        opcode::READLINK => What::ReadLink,
        opcode::SYMLINK => {
            let name = named(rest, node)?;
            What::MakeSymlink(name, Bytes::copy_from_slice(rest.name()?))
        }
        opcode::MKNOD => {
            let mode = rest.u32()?;
            rest.skip(12)?;
            let name = named(rest, node)?;
            match FileType::from_raw_mode(mode) {
                FileType::RegularFile => What::MakeFile { name, mode },
                // Devices, pipes and sockets would be the host's.
                _ => What::Refused(Errno::PERM),
            }
        }
        opcode::MKDIR => {
            let mode = rest.u32()?;
            rest.skip(4)?;
            let name = named(rest, node)?;
            What::MakeDirectory { name, mode }
        }
        opcode::UNLINK => What::Remove(named(rest, node)?),
        opcode::RMDIR => What::RemoveDirectory(named(rest, node)?),
        opcode::RENAME | opcode::RENAME2 => {
            let directory = rest.u64()?;
            let flags = if opcode == opcode::RENAME2 {
                let flags = rest.u32()?;
                rest.skip(4)?;
                flags
            } else {
                0
            };
            let from = named(rest, node)?;
            let to = named(rest, directory)?;
            match flags {
                0 => rename(from, to, RenameHow::Replace),
                RENAME_NOREPLACE => rename(from, to, RenameHow::Keep),
                RENAME_EXCHANGE => rename(from, to, RenameHow::Exchange),
                _ => What::Refused(Errno::INVAL),
            }
        }
        opcode::LINK => {
            let from = rest.u64()?;
            let to = named(rest, node)?;
            What::Link { from, to }
        }
        opcode::OPEN => What::Open {
            flags: OFlags::from_bits_retain(rest.u32()?),
        },
        opcode::CREATE => {
            let flags = OFlags::from_bits_retain(rest.u32()?);
            let mode = rest.u32()?;
            rest.skip(8)?;
            let name = named(rest, node)?;
            What::Create { name, mode, flags }
        }
        opcode::READ => {
            rest.skip(8)?;
            let (offset, len) = (rest.u64()?, rest.u32()?);
            What::Read { offset, len }
        }
        opcode::WRITE => {
            rest.skip(8)?;
            let (offset, len, how) = (rest.u64()?, rest.u32()?, rest.u32()?);
            rest.skip(8)?;
            let flags = OFlags::from_bits_retain(rest.u32()?);
            rest.skip(4)?;
            let data = rest.rest().get(..len as usize)?;
            What::Write {
                offset,
                // A mapped page goes where it belongs.
                append: flags.contains(OFlags::APPEND) && how & abi::WRITE_CACHE == 0,
                data: Bytes::copy_from_slice(data),
            }
        }
        opcode::STATFS => What::Usage,
        opcode::RELEASE => What::Release,
        opcode::FSYNC | opcode::FSYNCDIR => {
            rest.skip(8)?;
            let data_only = rest.u32()? & abi::FSYNC_DATA_ONLY != 0;
            What::Sync { data_only }
        }
        opcode::SETXATTR => {
            let (len, flags) = (rest.u32()?, rest.u32()?);
            let name = rest.name()?.to_vec();
            let value = Bytes::copy_from_slice(rest.rest().get(..len as usize)?);
            What::SetAttribute { name, flags, value }
        }
        opcode::GETXATTR => {
            let room = rest.u32()?;
            rest.skip(4)?;
            let name = rest.name()?.to_vec();
            What::GetAttribute { name, room }
        }
        opcode::LISTXATTR => What::ListAttributes { room: rest.u32()? },
        opcode::REMOVEXATTR => What::RemoveAttribute {
            name: rest.name()?.to_vec(),
        },
        opcode::OPENDIR => What::OpenDirectory,
        opcode::READDIR | opcode::READDIRPLUS => What::ReadDirectory {
            handle: rest.u64()?,
            after: rest.u64()?,
            room: rest.u32()?,
            plus: opcode == opcode::READDIRPLUS,
        },
        opcode::RELEASEDIR => What::ReleaseDirectory {
            handle: rest.u64()?,
        },
        opcode::FALLOCATE => {
            rest.skip(8)?;
            let (offset, len, flags) = (rest.u64()?, rest.u64()?, rest.u32()?);
            What::Allocate { flags, offset, len }
        }
        _ => return None,
    })
}

fn rename(from: Name, to: Name, how: RenameHow) -> What {
    What::Rename { from, to, how }
}

/// The fields of `struct fuse_setattr_in`. Owners are not changed: everything belongs to the
/// sandbox's user.
fn decode_change(rest: &mut Arguments<'_>) -> Option<Change> {
    let valid = rest.u32()?;
    rest.skip(12)?;
    let size = rest.u64()?;
    rest.skip(8)?;
    let (atime, mtime) = (rest.u64()?, rest.u64()?);
    rest.skip(8)?;
    let (atime_nanos, mtime_nanos) = (rest.u32()?, rest.u32()?);
    rest.skip(4)?;
    let mode = rest.u32()?;
    let has = |flag| valid & flag != 0;
    let moment = |given, now, seconds: u64, nanos| {
        let seconds = seconds.cast_signed();
        match (has(given), has(now)) {
            (true, true) => Some(Moment::Now),
            (true, false) => Some(Moment::At(Time { seconds, nanos })),
            (false, _) => None,
        }
    };
    Some(Change {
        mode: has(changed::MODE).then_some(mode),
        size: has(changed::SIZE).then_some(size),
        accessed: moment(changed::ATIME, changed::ATIME_NOW, atime, atime_nanos),
        modified: moment(changed::MTIME, changed::MTIME_NOW, mtime, mtime_nanos),
    })
}
