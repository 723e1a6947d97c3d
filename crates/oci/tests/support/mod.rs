//! Archives made by hand, so that they can be wrong in every way.
#![allow(dead_code, reason = "each test program uses another part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "this is all tests")]

pub(crate) mod canary;
pub(crate) mod hostile;
pub(crate) mod image;
pub(crate) mod model;
pub(crate) mod place;
pub(crate) mod proxy;
pub(crate) mod registry;
pub(crate) mod secured;

use std::io::Write as _;

/// A member of an archive, as its header will say.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) name: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: u8,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) mtime: u64,
    pub(crate) device: (u32, u32),
    pub(crate) data: Vec<u8>,
    /// What the header claims to be the size, if that is not the length of the data.
    pub(crate) size: Option<u64>,
    /// Records of an extended header in front of it.
    pub(crate) pax: Vec<(Vec<u8>, Vec<u8>)>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (kind, name) = (char::from(self.kind), self.name.escape_ascii());
        write!(f, "{kind} {name} {:o} {}:{}", self.mode, self.uid, self.gid)?;
        write!(f, " link {} time {}", self.link.escape_ascii(), self.mtime)?;
        let data = &self.data[..self.data.len().min(20)];
        write!(f, " data {} ", data.escape_ascii())?;
        for (key, value) in &self.pax {
            write!(f, " {}={}", key.escape_ascii(), value.escape_ascii())?;
        }
        Ok(())
    }
}

impl Entry {
    pub(crate) fn new(kind: u8, name: impl AsRef<[u8]>) -> Entry {
        Entry {
            name: name.as_ref().to_vec(),
            link: Vec::new(),
            kind,
            mode: if kind == b'5' { 0o755 } else { 0o644 },
            uid: 0,
            gid: 0,
            mtime: 1_600_000_000,
            device: (0, 0),
            data: Vec::new(),
            size: None,
            pax: Vec::new(),
        }
    }

    pub(crate) fn file(name: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Entry {
        let mut entry = Entry::new(b'0', name);
        entry.data = data.as_ref().to_vec();
        entry
    }

    pub(crate) fn dir(name: impl AsRef<[u8]>) -> Entry {
        Entry::new(b'5', name)
    }

    pub(crate) fn symlink(name: impl AsRef<[u8]>, to: impl AsRef<[u8]>) -> Entry {
        let mut entry = Entry::new(b'2', name);
        entry.link = to.as_ref().to_vec();
        entry
    }

    pub(crate) fn hard_link(name: impl AsRef<[u8]>, to: impl AsRef<[u8]>) -> Entry {
        let mut entry = Entry::new(b'1', name);
        entry.link = to.as_ref().to_vec();
        entry
    }

    pub(crate) fn device(name: impl AsRef<[u8]>, kind: u8, major: u32, minor: u32) -> Entry {
        let mut entry = Entry::new(kind, name);
        entry.device = (major, minor);
        entry
    }

    pub(crate) fn owner(mut self, uid: u64, gid: u64) -> Entry {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    pub(crate) fn mode(mut self, mode: u32) -> Entry {
        self.mode = mode;
        self
    }

    pub(crate) fn mtime(mut self, mtime: u64) -> Entry {
        self.mtime = mtime;
        self
    }

    pub(crate) fn pax(mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Entry {
        self.pax
            .push((key.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }

    pub(crate) fn xattr(self, name: &str, value: impl AsRef<[u8]>) -> Entry {
        self.pax(format!("SCHILY.xattr.{name}"), value)
    }
}

/// The archive of some entries, with its end mark.
pub(crate) fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut archive = Vec::new();
    for entry in entries {
        append(&mut archive, entry);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

pub(crate) fn append(archive: &mut Vec<u8>, entry: &Entry) {
    let mut pax = entry.pax.clone();
    if entry.name.len() > 100 {
        pax.push((b"path".to_vec(), entry.name.clone()));
    }
    if entry.link.len() > 100 {
        pax.push((b"linkpath".to_vec(), entry.link.clone()));
    }
    if !pax.is_empty() {
        let mut records = Vec::new();
        for (key, value) in &pax {
            record(&mut records, key, value);
        }
        let mut extended = Entry::new(b'x', "pax");
        extended.data = records;
        append(archive, &extended);
    }
    let mut header = [0_u8; 512];
    put(&mut header[..100], &entry.name);
    number(&mut header[100..108], entry.mode.into());
    number(&mut header[108..116], entry.uid);
    number(&mut header[116..124], entry.gid);
    number(
        &mut header[124..136],
        entry.size.unwrap_or(entry.data.len() as u64),
    );
    number(&mut header[136..148], entry.mtime);
    header[156] = entry.kind;
    put(&mut header[157..257], &entry.link);
    header[257..265].copy_from_slice(b"ustar\x0000");
    number(&mut header[329..337], entry.device.0.into());
    number(&mut header[337..345], entry.device.1.into());
    seal(&mut header);
    archive.extend_from_slice(&header);
    archive.extend_from_slice(&entry.data);
    archive.resize(archive.len().next_multiple_of(512), 0);
}

/// Makes a header's checksum right.
pub(crate) fn seal(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header[..512].iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn put(field: &mut [u8], bytes: &[u8]) {
    let n = bytes.len().min(field.len());
    field[..n].copy_from_slice(&bytes[..n]);
}

fn number(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    let octal = format!("{value:0digits$o}");
    if octal.len() <= digits {
        field[..digits].copy_from_slice(octal.as_bytes());
    } else {
        let length = field.len();
        field.fill(0);
        let bytes = value.to_be_bytes();
        let n = bytes.len().min(length);
        field[length - n..].copy_from_slice(&bytes[8 - n..]);
        field[0] |= 0x80;
    }
}

fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(length.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// A file system in memory that is soon full; unmounted when dropped.
pub(crate) struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    pub(crate) fn new(size: &str) -> SmallDisk {
        let place = tempfile::tempdir().unwrap();
        let options = std::ffi::CString::new(format!("size={size}")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("oci-test", place.path(), "tmpfs", flags, Some(&*options))
            .expect("this test runs as root");
        SmallDisk(place)
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let how = rustix::mount::UnmountFlags::DETACH;
        rustix::mount::unmount(self.0.path(), how).unwrap();
    }
}
