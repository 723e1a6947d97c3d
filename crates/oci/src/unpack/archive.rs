//! Reading a tar stream: headers, their extensions, and where the data of a member lies.
//!
//! Understood are the old format, ustar, pax and GNU's, with what each says about sparse files. All
//! that a header claims is checked here, so that whoever uses a [`Member`] deals with numbers that
//! are in range and names that have no zero bytes.

use std::io::{self, Read};

use super::{
    Fault,
    pax::{self, Extensions},
    sparse::{self, Run},
};

pub(super) const BLOCK: usize = 512;
/// The longest path that Linux takes, with its final zero byte.
const PATH_MAX: usize = 4096;
/// Nothing that an extended header has to say is longer: 1 MiB.
const MAX_EXTENSION: u64 = 1 << 20;

/// What a member of the archive becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    Symlink,
    HardLink,
    Character,
    Block,
    Fifo,
}

/// One file, directory, link or device in an archive.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) path: Vec<u8>,
    /// Where a link leads.
    pub(super) link: Vec<u8>,
    pub(super) kind: Kind,
    /// Permission bits, with set-id and sticky bits.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds since 1970 and nanoseconds.
    pub(super) mtime: (i64, u32),
    /// Major and minor number.
    pub(super) device: (u32, u32),
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Length of the file, holes included.
    pub(super) length: u64,
    /// Where the file's data belongs if it has holes.
    pub(super) runs: Option<Vec<Run>>,
}

/// A tar stream, read from front to back.
pub(super) struct Archive<R> {
    input: R,
    /// What of the current member's data was not read yet, and what follows it up to a full block.
    remaining: u64,
    padding: u64,
    finished: bool,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(input: R) -> Archive<R> {
        Archive {
            input,
            remaining: 0,
            padding: 0,
            finished: false,
        }
    }

    /// The next member, if there is one; what was not read of the last one is skipped.
    pub(super) fn next(&mut self) -> Result<Option<Member>, Fault> {
        let mut extensions = Extensions::default();
        let mut long_path = None;
        let mut long_link = None;
        let mut is_announced = false;
        loop {
            self.skip_rest()?;
            let Some(block) = self.block()? else {
                // An extended header belongs to something that has to follow.
                return if is_announced {
                    Err(Fault::Truncated)
                } else {
                    Ok(None)
                };
            };
            let header = tar::Header::from_byte_slice(&block);
            verify(header, &block)?;
            let stored = header.entry_size().map_err(|_| Fault::field("size"))?;
            is_announced |= matches!(block[156], b'x' | b'X' | b'L' | b'K');
            match block[156] {
                // Meant for all that follows; nobody puts anything there that concerns us.
                b'g' => self.begin(stored),
                b'x' | b'X' => extensions = pax::parse(&self.extension(stored)?)?,
                b'L' => long_path = Some(until_zero(self.extension(stored)?)),
                b'K' => long_link = Some(until_zero(self.extension(stored)?)),
                kind => {
                    return self
                        .member(kind, &block, stored, extensions, long_path, long_link)
                        .map(Some);
                }
            }
        }
    }

    /// Reads data of the current member.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Fault> {
        let most = usize::try_from(self.remaining).map_or(buffer.len(), |n| n.min(buffer.len()));
        if most == 0 {
            return Ok(0);
        }
        let n = retry(|| self.input.read(&mut buffer[..most]))?;
        if n == 0 {
            return Err(Fault::Truncated);
        }
        self.remaining -= n as u64;
        Ok(n)
    }

    /// Reads exactly as much data of the current member.
    pub(super) fn read_exact(&mut self, mut buffer: &mut [u8]) -> Result<(), Fault> {
        while !buffer.is_empty() {
            match self.read(buffer)? {
                0 => return Err(Fault::Truncated),
                n => buffer = &mut buffer[n..],
            }
        }
        Ok(())
    }

    /// Reads what follows the end of the archive, which a digest covers as well.
    pub(super) fn drain(&mut self) -> Result<(), Fault> {
        let mut buffer = [0; 1 << 14];
        while retry(|| self.input.read(&mut buffer))? > 0 {}
        Ok(())
    }

    fn member(
        &mut self,
        kind: u8,
        block: &[u8; BLOCK],
        stored: u64,
        extensions: Extensions,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Member, Fault> {
        let header = tar::Header::from_byte_slice(block);
        let stored = extensions.size.unwrap_or(stored);
        let path = extensions
            .sparse
            .name
            .clone()
            .or(extensions.path)
            .or(long_path)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extensions
            .link
            .or(long_link)
            .or_else(|| header.link_name_bytes().map(|link| link.into_owned()))
            .unwrap_or_default();
        check_name(&path, "name")?;
        let is_sparse = kind == b'S';
        let kind = match kind {
            // Archives from before directories had a type of their own mark them like this.
            b'0' | 0 if path.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Character,
            b'4' => Kind::Block,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => return Err(Fault::Type(other)),
        };
        if matches!(kind, Kind::Symlink | Kind::HardLink) {
            check_name(&link, "link")?;
        }
        let id = |own: Option<u64>, id: io::Result<u64>, field| {
            let id = own.map_or(id, Ok).map_err(|_| Fault::field(field))?;
            // The highest one means "leave it as it is".
            u32::try_from(id)
                .ok()
                .filter(|&id| id != u32::MAX)
                .ok_or(Fault::field(field))
        };
        let number = |number: io::Result<Option<u32>>, field| {
            number
                .map(Option::unwrap_or_default)
                .map_err(|_| Fault::field(field))
        };
        let device = if matches!(kind, Kind::Character | Kind::Block) {
            (
                number(header.device_major(), "major number")?,
                number(header.device_minor(), "minor number")?,
            )
        } else {
            (0, 0)
        };
        let mtime = match extensions.mtime {
            Some(mtime) => mtime,
            // Negative ones, which few programs write, are read as very large ones.
            None => (header.mtime().map_or(0, |seconds| seconds.cast_signed()), 0),
        };
        let mut member = Member {
            kind,
            mode: header.mode().map_err(|_| Fault::field("mode"))? & 0o7777,
            uid: id(extensions.uid, header.uid(), "uid")?,
            gid: id(extensions.gid, header.gid(), "gid")?,
            mtime,
            device,
            xattrs: extensions.xattrs,
            length: 0,
            runs: None,
            path,
            link,
        };
        // Whatever the header of anything else claims, no data follows it.
        if kind == Kind::File {
            member.length = stored;
            if is_sparse {
                let (runs, length) = sparse::old_gnu(block, || self.block())?;
                self.begin(stored);
                member.runs = Some(sparse::check(runs, length, self.remaining)?);
                member.length = length;
            } else if let Some(length) = extensions.sparse.length {
                self.begin(stored);
                let runs = match extensions.sparse.runs()? {
                    Some(runs) => runs,
                    None => sparse::in_data(self)?,
                };
                member.runs = Some(sparse::check(runs, length, self.remaining)?);
                member.length = length;
            } else {
                self.begin(stored);
            }
        }
        Ok(member)
    }

    fn begin(&mut self, size: u64) {
        self.remaining = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, Fault> {
        if size > MAX_EXTENSION {
            return Err(Fault::Malformed("an extended header of more than 1 MiB"));
        }
        self.begin(size);
        let mut data = vec![0; size as usize];
        self.read_exact(&mut data)?;
        Ok(data)
    }

    fn skip_rest(&mut self) -> Result<(), Fault> {
        let mut buffer = [0; 1 << 14];
        while self.remaining > 0 {
            self.read(&mut buffer)?;
        }
        let padding = std::mem::take(&mut self.padding) as usize;
        let mut at = 0;
        while at < padding {
            match retry(|| self.input.read(&mut buffer[at..padding]))? {
                // Some programs leave out what only fills the last block.
                0 => break,
                n => at += n,
            }
        }
        Ok(())
    }

    /// The next block, if the archive goes on.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, Fault> {
        if self.finished {
            return Ok(None);
        }
        let block = self.raw_block()?;
        let Some(first) = block.filter(|block| block.iter().all(|&byte| byte == 0)) else {
            self.finished = block.is_none();
            return Ok(block);
        };
        self.finished = true;
        match self.raw_block()? {
            Some(second) if second != first => Err(Fault::Malformed("a header of zeros")),
            _ => Ok(None),
        }
    }

    fn raw_block(&mut self) -> Result<Option<[u8; BLOCK]>, Fault> {
        let mut block = [0; BLOCK];
        let mut at = 0;
        while at < BLOCK {
            match retry(|| self.input.read(&mut block[at..]))? {
                0 if at == 0 => return Ok(None),
                0 => return Err(Fault::Truncated),
                n => at += n,
            }
        }
        Ok(Some(block))
    }
}

fn retry(mut read: impl FnMut() -> io::Result<usize>) -> Result<usize, Fault> {
    loop {
        match read() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map_err(Fault::Input),
        }
    }
}

/// Compares the checksum, which counts its own field as spaces.
fn verify(header: &tar::Header, block: &[u8; BLOCK]) -> Result<(), Fault> {
    let wrong = Fault::Malformed("a header whose checksum is wrong");
    let Ok(claimed) = header.cksum() else {
        return Err(wrong);
    };
    let sum = |bytes: &[u8]| bytes.iter().map(|&byte| u32::from(byte)).sum::<u32>();
    let actual = sum(&block[..148]) + 8 * u32::from(b' ') + sum(&block[156..]);
    if claimed == actual {
        Ok(())
    } else {
        Err(wrong)
    }
}

fn check_name(name: &[u8], field: &'static str) -> Result<(), Fault> {
    if name.is_empty() || name.len() >= PATH_MAX || name.contains(&0) {
        return Err(Fault::field(field));
    }
    Ok(())
}

fn until_zero(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|&byte| byte == 0) {
        bytes.truncate(end);
    }
    bytes
}
