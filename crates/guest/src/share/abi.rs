//! What the kernel and a file system in user space say to each other on `/dev/fuse`: the part of
//! `linux/fuse.h` that is needed here. Numbers are in the machine's own byte order.

use bytes::Bytes;
use cubicle_protocol::share::{Kind, Status, Time};
use rustix::io::Errno;

/// Version of the protocol that is spoken, at most.
pub(super) const MAJOR: u32 = 7;
pub(super) const MINOR: u32 = 36;

/// Length of the header of a request, in bytes.
const IN_HEADER: usize = 40;
/// Length of the header of a reply, in bytes.
const OUT_HEADER: usize = 16;
/// Longest part of a request between its header and its data.
pub(super) const MAX_ARGUMENTS: usize = 8192;

/// The root's node.
pub(super) const ROOT: u64 = 1;

/// What a request asks for.
pub(super) mod opcode {
    pub(in super::super) const LOOKUP: u32 = 1;
    pub(in super::super) const FORGET: u32 = 2;
    pub(in super::super) const GETATTR: u32 = 3;
    pub(in super::super) const SETATTR: u32 = 4;
    pub(in super::super) const READLINK: u32 = 5;
    pub(in super::super) const SYMLINK: u32 = 6;
    pub(in super::super) const MKNOD: u32 = 8;
    pub(in super::super) const MKDIR: u32 = 9;
    pub(in super::super) const UNLINK: u32 = 10;
    pub(in super::super) const RMDIR: u32 = 11;
    pub(in super::super) const RENAME: u32 = 12;
    pub(in super::super) const LINK: u32 = 13;
    pub(in super::super) const OPEN: u32 = 14;
    pub(in super::super) const READ: u32 = 15;
    pub(in super::super) const WRITE: u32 = 16;
    pub(in super::super) const STATFS: u32 = 17;
    pub(in super::super) const RELEASE: u32 = 18;
    pub(in super::super) const FSYNC: u32 = 20;
    pub(in super::super) const SETXATTR: u32 = 21;
    pub(in super::super) const GETXATTR: u32 = 22;
    pub(in super::super) const LISTXATTR: u32 = 23;
    pub(in super::super) const REMOVEXATTR: u32 = 24;
    pub(in super::super) const INIT: u32 = 26;
    pub(in super::super) const OPENDIR: u32 = 27;
    pub(in super::super) const READDIR: u32 = 28;
    pub(in super::super) const RELEASEDIR: u32 = 29;
    pub(in super::super) const FSYNCDIR: u32 = 30;
    pub(in super::super) const CREATE: u32 = 35;
    pub(in super::super) const INTERRUPT: u32 = 36;
    pub(in super::super) const DESTROY: u32 = 38;
    pub(in super::super) const BATCH_FORGET: u32 = 42;
    pub(in super::super) const FALLOCATE: u32 = 43;
    pub(in super::super) const READDIRPLUS: u32 = 44;
    pub(in super::super) const RENAME2: u32 = 45;
}

/// What both sides can do.
pub(super) mod feature {
    const ASYNC_READ: u32 = 1 << 0;
    const BIG_WRITES: u32 = 1 << 5;
    /// Cached data are dropped when size or time of a file turn out to have changed.
    const AUTO_INVAL_DATA: u32 = 1 << 12;
    const DO_READDIRPLUS: u32 = 1 << 13;
    const READDIRPLUS_AUTO: u32 = 1 << 14;
    const PARALLEL_DIROPS: u32 = 1 << 18;
    const MAX_PAGES: u32 = 1 << 22;
    /// No file here runs as somebody else, so the kernel need not ask before each write.
    const HANDLE_KILLPRIV_V2: u32 = 1 << 28;

    pub(in super::super) const WANTED: u32 = ASYNC_READ
        | BIG_WRITES
        | AUTO_INVAL_DATA
        | DO_READDIRPLUS
        | READDIRPLUS_AUTO
        | PARALLEL_DIROPS
        | MAX_PAGES
        | HANDLE_KILLPRIV_V2;
}

/// Which fields of a `SETATTR` count.
pub(super) mod changed {
    pub(in super::super) const MODE: u32 = 1 << 0;
    pub(in super::super) const SIZE: u32 = 1 << 3;
    pub(in super::super) const ATIME: u32 = 1 << 4;
    pub(in super::super) const MTIME: u32 = 1 << 5;
    pub(in super::super) const ATIME_NOW: u32 = 1 << 7;
    pub(in super::super) const MTIME_NOW: u32 = 1 << 8;
}

/// Flag of an `OPEN`'s reply: closing needs no request.
pub(super) const FOPEN_NOFLUSH: u32 = 1 << 5;
/// Flag of a `WRITE`: it writes back a mapped page.
pub(super) const WRITE_CACHE: u32 = 1 << 0;
/// Flag of an `FSYNC`.
pub(super) const FSYNC_DATA_ONLY: u32 = 1 << 0;

/// "Forget what you know of this file's attributes."
const NOTIFY_INVAL_INODE: i32 = 2;

/// One request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request<'a> {
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) arguments: Arguments<'a>,
}

impl<'a> Request<'a> {
    /// The request in what was read from the device. `None`: it is not one.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let mut header = Arguments(bytes.get(..IN_HEADER)?);
        let len = header.u32()? as usize;
        let opcode = header.u32()?;
        let unique = header.u64()?;
        let node = header.u64()?;
        // User, group and process don't matter: the kernel checks permissions.
        let arguments = Arguments(bytes.get(IN_HEADER..len)?);
        Some(Self {
            opcode,
            unique,
            node,
            arguments,
        })
    }
}

/// The rest of a request, field by field.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arguments<'a>(&'a [u8]);

impl<'a> Arguments<'a> {
    pub(super) fn u32(&mut self) -> Option<u32> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_ne_bytes(*bytes))
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_ne_bytes(*bytes))
    }

    pub(super) fn skip(&mut self, bytes: usize) -> Option<()> {
        self.0 = self.0.get(bytes..)?;
        Some(())
    }

    /// A text that ends with a NUL, without it.
    pub(super) fn name(&mut self) -> Option<&'a [u8]> {
        let end = self.0.iter().position(|&byte| byte == 0)?;
        let name = &self.0[..end];
        self.0 = &self.0[end + 1..];
        Some(name)
    }

    pub(super) fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// The body of a reply.
#[derive(Debug, Default)]
pub(super) struct Body(Vec<u8>);

impl Body {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(super) fn zeros(&mut self, count: usize) -> &mut Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    /// `struct fuse_attr`.
    pub(super) fn attributes(&mut self, attributes: &Attributes) -> &mut Self {
        let Attributes { status, uid, gid } = attributes;
        let seconds = |time: Time| time.seconds.cast_unsigned();
        self.u64(status.inode)
            .u64(status.size)
            .u64(status.blocks)
            .u64(seconds(status.accessed))
            .u64(seconds(status.modified))
            .u64(seconds(status.changed))
            .u32(status.accessed.nanos)
            .u32(status.modified.nanos)
            .u32(status.changed.nanos)
            .u32(file_type(status.kind) << 12 | u32::from(status.permissions))
            .u32(status.links)
            .u32(*uid)
            .u32(*gid)
            .u32(0) // device
            .u32(4096) // preferred size of reads
            .u32(0) // flags
    }

    /// `struct fuse_entry_out`, valid for `seconds`.
    pub(super) fn entry(&mut self, node: u64, attributes: &Attributes, seconds: u64) -> &mut Self {
        self.u64(node)
            .u64(0) // generation
            .u64(seconds)
            .u64(seconds)
            .zeros(8)
            .attributes(attributes)
    }

    /// `struct fuse_dirent`.
    pub(super) fn directory_entry(&mut self, cookie: u64, status: &Status, name: &[u8]) {
        self.u64(status.inode)
            .u64(cookie)
            .u32(name.len() as u32)
            .u32(file_type(status.kind))
            .bytes(name)
            .zeros(name.len().next_multiple_of(8) - name.len());
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

impl From<Body> for Bytes {
    fn from(body: Body) -> Self {
        body.0.into()
    }
}

/// A file's attributes as the kernel gets them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attributes {
    pub(super) status: Status,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// The type in a mode, which is also that of an entry.
fn file_type(kind: Kind) -> u32 {
    match kind {
        Kind::File => 0o10,
        Kind::Directory => 0o4,
        Kind::Symlink => 0o12,
        // A socket: the kernel itself refuses to open one.
        Kind::Other => 0o14,
    }
}

/// Length of a `struct fuse_dirent` with that name, in bytes.
pub(super) const fn directory_entry_len(name: &[u8]) -> usize {
    24 + name.len().next_multiple_of(8)
}

/// Length of a `struct fuse_entry_out`, in bytes.
pub(super) const ENTRY_LEN: usize = 128;

/// The header of the reply to `unique`.
pub(super) fn reply_header(unique: u64, outcome: Result<usize, Errno>) -> [u8; OUT_HEADER] {
    match outcome {
        Ok(len) => out_header(len, 0, unique),
        Err(errno) => out_header(0, -errno.raw_os_error(), unique),
    }
}

/// A message to the kernel that the attributes of `node` are out of date. Pages of it that are
/// cached are dropped when the new attributes turn out to be others.
pub(super) fn attributes_are_stale(node: u64) -> Vec<u8> {
    let mut body = Body::new();
    // An offset below 0: the attributes only.
    body.u64(node).u64((-1_i64).cast_unsigned()).u64(0);
    let mut message = out_header(body.0.len(), NOTIFY_INVAL_INODE, 0).to_vec();
    message.extend(body.into_bytes());
    message
}

fn out_header(len: usize, error: i32, unique: u64) -> [u8; OUT_HEADER] {
    let mut header = [0; OUT_HEADER];
    // No body is longer than the buffer of a request.
    header[..4].copy_from_slice(&((OUT_HEADER + len) as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}
