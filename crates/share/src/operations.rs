//! Each operation, in the calls of the kernel.

use std::{
    io::IoSlice,
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use cubicle_protocol::share::{
    Answer, Change, Entry, Errno as WireErrno, FileRef, Kind, MAX_DATA, Operation, RelativePath,
    RenameHow, Reply, Request, Status, Usage, push_entry,
};
use rustix::{
    fs::{
        AtFlags, CWD, FallocateFlags, FileType, Mode, RawDir, RenameFlags, SeekFrom, Stat,
        Timestamps, XattrFlags, chmodat, chownat, fallocate, fchmod, fchown, fdatasync, fstat,
        fstatvfs, fsync, ftruncate, getxattr, linkat, listxattr, mkdirat, readlinkat, removexattr,
        renameat_with, seek, setxattr, statat, symlinkat, unlinkat, utimensat,
    },
    io::{Errno, ReadWriteFlags, pread, pwrite, pwritev2},
};

use crate::{
    root::{Place, proc_path},
    share::{Access, Share},
    space,
    status::{permissions, timespec},
};

/// The only attributes that guests get to see: all others mean something to the host.
const ATTRIBUTES: &[u8] = b"user.";

/// Most bytes that a system takes as the value or the names of attributes.
const MAX_ATTRIBUTE: usize = 64 << 10;

/// Room for entries as the kernel gives them, in bytes.
const LISTING: usize = 32 << 10;

/// What an operation gives: an answer, and the data behind it.
type Outcome = rustix::io::Result<(Answer, Vec<u8>)>;

const DONE: Outcome = Ok((Answer::Done, Vec::new()));

impl Share {
    /// Does what the guest asks, on this thread. `None`: the request wants no reply.
    pub fn perform(&self, request: &Request, data: &[u8]) -> Option<(Reply, Vec<u8>)> {
        let operation = &request.operation;
        if let Operation::Release { inode } = operation {
            self.files.release(*inode);
            return None;
        }
        let outcome = if operation.changes() && self.access == Access::ReadOnly {
            Err(Errno::ROFS)
        } else {
            self.attempt(operation, data, request.again)
        };
        let (outcome, data) = match outcome {
            Ok((answer, data)) => (Ok(answer), data),
            Err(errno) => (Err(WireErrno(errno.raw_os_error())), Vec::new()),
        };
        let id = request.id;
        Some((Reply { id, outcome }, data))
    }

    fn attempt(&self, operation: &Operation, data: &[u8], again: bool) -> Outcome {
        match operation {
            Operation::Stat { of } => match self.files.get(of.inode, false) {
                Some(open) => self.answer(&fstat(&open)?),
                None => self.answer(&self.find(of)?.1),
            },
            Operation::List {
                directory,
                after,
                room,
            } => self.list(directory, *after, *room as usize),
            Operation::ReadLink { path } => {
                let place = self.root.place(path)?;
                let target = readlinkat(&place.parent, place.name, Vec::new())?;
                Ok((Answer::Data, target.into_bytes()))
            }
            Operation::Open { file, write } => {
                // Not one that was there once, and is open still.
                let fd = self.open_anew(file, *write)?;
                self.answer(&fstat(&fd)?)
            }
            Operation::Read { file, offset, len } => self.read(file, *offset, *len as usize),
            Operation::Write {
                file,
                offset,
                append,
            } => self.write(file, *offset, *append, data, again),
            Operation::Create {
                path,
                mode,
                exclusive,
            } => self.create(path, *mode, *exclusive && !again),
            Operation::MakeDirectory { path, mode } => self.make_directory(path, *mode, again),
            Operation::MakeSymlink { path } => self.make_symlink(path, data, again),
            Operation::MakeLink { from, to } => self.make_link(from, to, again),
            Operation::Remove { path } => self.remove(path, AtFlags::empty(), again),
            Operation::RemoveDirectory { path } => self.remove(path, AtFlags::REMOVEDIR, again),
            Operation::Rename { from, to, how } => self.rename(from, to, *how, again),
            Operation::Change { file, change } => self.change(file, change),
            Operation::Sync { file, data_only } => self.sync(file, *data_only),
            Operation::Allocate {
                file,
                flags,
                offset,
                len,
            } => {
                let fd = self.file(file, true)?;
                self.space.take(&fd, *len)?;
                let flags = FallocateFlags::from_bits_retain(*flags);
                fallocate(&fd, flags, *offset, *len)?;
                DONE
            }
            Operation::Usage => self.usage(),
            Operation::GetAttribute { path, name } => {
                let value = self.with_attributes(path, Some(name), |file| {
                    filled(|buffer| getxattr(file, &**name, buffer))
                })?;
                Ok((Answer::Data, value))
            }
            Operation::SetAttribute { path, name, flags } => {
                let flags = XattrFlags::from_bits(*flags).ok_or(Errno::INVAL)?;
                self.with_attributes(path, Some(name), |file| {
                    setxattr(file, &**name, data, flags)
                })?;
                DONE
            }
            Operation::ListAttributes { path } => self.list_attributes(path),
            Operation::RemoveAttribute { path, name } => {
                match self.with_attributes(path, Some(name), |file| removexattr(file, &**name)) {
                    Err(Errno::NODATA) if again => DONE,
                    result => result.and(DONE),
                }
            }
            Operation::Release { .. } => DONE,
        }
    }

    fn answer(&self, stat: &Stat) -> Outcome {
        Ok((Answer::Status(self.status(stat)), Vec::new()))
    }

    fn stat_at(&self, place: &Place<'_>) -> rustix::io::Result<Status> {
        let stat = statat(&place.parent, place.name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(self.status(&stat))
    }

    fn list(&self, directory: &RelativePath, after: u64, room: usize) -> Outcome {
        let fd = self.root.directory(directory)?;
        let room = room.min(MAX_DATA);
        let own = self.status(&fstat(&fd)?);
        if after != 0 {
            seek(&fd, SeekFrom::Start(after))?;
        }
        let mut buffer = vec![MaybeUninit::uninit(); LISTING];
        let mut listing = RawDir::new(&fd, &mut buffer);
        let mut data = Vec::new();
        let mut end = true;
        while let Some(entry) = listing.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            let status = match name {
                b"." | b".." => own,
                _ => match statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(stat) => self.status(&stat),
                    // Removed meanwhile.
                    Err(Errno::NOENT) => continue,
                    Err(errno) => return Err(errno),
                },
            };
            let entry = Entry {
                cookie: entry.next_entry_cookie(),
                status,
                name: name.to_owned(),
            };
            if !push_entry(&mut data, &entry, room).map_err(|_| Errno::IO)? {
                if data.is_empty() {
                    return Err(Errno::INVAL);
                }
                end = false;
                break;
            }
        }
        Ok((Answer::Entries { end }, data))
    }

    fn read(&self, file: &FileRef, offset: u64, len: usize) -> Outcome {
        let fd = self.file(file, false)?;
        let mut data = vec![0; len.min(MAX_DATA)];
        let mut filled = 0;
        while filled < data.len() {
            let read = pread(&fd, &mut data[filled..], offset + filled as u64)?;
            if read == 0 {
                break;
            }
            filled += read;
        }
        data.truncate(filled);
        Ok((Answer::Data, data))
    }

    fn write(
        &self,
        file: &FileRef,
        offset: u64,
        append: bool,
        data: &[u8],
        again: bool,
    ) -> Outcome {
        let fd = self.file(file, true)?;
        self.space.take(&fd, data.len() as u64)?;
        if append && again && has_been_appended(&fd, offset, data)? {
            return Ok((Answer::Written(written(data.len())), Vec::new()));
        }
        let mut done = 0;
        while done < data.len() {
            let (piece, offset) = (&data[done..], offset + done as u64);
            let result = match append {
                // Wherever the end is by now: others may have written to the file.
                true => pwritev2(&fd, &[IoSlice::new(piece)], offset, ReadWriteFlags::APPEND),
                false => pwrite(&fd, piece, offset),
            };
            match result {
                Ok(0) => break,
                Ok(more) => done += more,
                // What is written is written; the guest gets the error with the next piece.
                Err(_) if done > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok((Answer::Written(written(done)), Vec::new()))
    }

    fn create(&self, path: &RelativePath, mode: u32, exclusive: bool) -> Outcome {
        let place = self.root.place(path)?;
        self.space.take(&place.parent, 0)?;
        match place.create() {
            Ok(fd) => {
                fchmod(&fd, permissions(mode))?;
                self.give(&fd)?;
                let stat = fstat(&fd)?;
                self.keep(&stat, &Arc::new(fd), true);
                self.answer(&stat)
            }
            Err(Errno::EXIST) if !exclusive => {
                let path = path.clone();
                let fd = self.file(&FileRef { path, inode: 0 }, true)?;
                self.answer(&fstat(&fd)?)
            }
            Err(errno) => Err(errno),
        }
    }

    fn make_directory(&self, path: &RelativePath, mode: u32, again: bool) -> Outcome {
        let place = self.root.place(path)?;
        self.space.take(&place.parent, 0)?;
        match mkdirat(&place.parent, place.name, Mode::RWXU) {
            Ok(()) => {
                let fd = place.directory()?;
                fchmod(&fd, permissions(mode))?;
                self.give(&fd)?;
                self.answer(&fstat(&fd)?)
            }
            Err(Errno::EXIST) if again => {
                let status = self.stat_at(&place)?;
                is(status.kind == Kind::Directory, Errno::EXIST)?;
                Ok((Answer::Status(status), Vec::new()))
            }
            Err(errno) => Err(errno),
        }
    }

    fn make_symlink(&self, path: &RelativePath, target: &[u8], again: bool) -> Outcome {
        let place = self.root.place(path)?;
        self.space.take(&place.parent, 0)?;
        match symlinkat(target, &place.parent, place.name) {
            Ok(()) => {
                if let Some((uid, gid)) = self.owner() {
                    let flags = AtFlags::SYMLINK_NOFOLLOW;
                    chownat(&place.parent, place.name, Some(uid), Some(gid), flags)?;
                }
            }
            Err(Errno::EXIST) if again => {
                let there = readlinkat(&place.parent, place.name, Vec::new());
                let same = there.is_ok_and(|there| there.as_bytes() == target);
                is(same, Errno::EXIST)?;
            }
            Err(errno) => return Err(errno),
        }
        Ok((Answer::Status(self.stat_at(&place)?), Vec::new()))
    }

    fn make_link(&self, from: &RelativePath, to: &RelativePath, again: bool) -> Outcome {
        let (from, to) = (self.root.place(from)?, self.root.place(to)?);
        let linked = linkat(
            &from.parent,
            from.name,
            &to.parent,
            to.name,
            AtFlags::empty(),
        );
        match linked {
            Ok(()) => {}
            Err(Errno::EXIST) if again => {
                let same = self.stat_at(&from)?.inode == self.stat_at(&to)?.inode;
                is(same, Errno::EXIST)?;
            }
            Err(errno) => return Err(errno),
        }
        Ok((Answer::Status(self.stat_at(&to)?), Vec::new()))
    }

    fn remove(&self, path: &RelativePath, flags: AtFlags, again: bool) -> Outcome {
        let place = match self.root.place(path) {
            Err(Errno::NOENT) if again => return DONE,
            place => place?,
        };
        match unlinkat(&place.parent, place.name, flags) {
            Err(Errno::NOENT) if again => DONE,
            result => result.and(DONE),
        }
    }

    fn rename(
        &self,
        from: &RelativePath,
        to: &RelativePath,
        how: RenameHow,
        again: bool,
    ) -> Outcome {
        let target = self.root.place(to)?;
        let moved = self.root.place(from).and_then(|source| {
            let flags = match how {
                RenameHow::Replace => RenameFlags::empty(),
                RenameHow::Keep => RenameFlags::NOREPLACE,
                RenameHow::Exchange => RenameFlags::EXCHANGE,
            };
            renameat_with(
                &source.parent,
                source.name,
                &target.parent,
                target.name,
                flags,
            )
        });
        match moved {
            // The old name is gone and the new one is there.
            Err(Errno::NOENT) if again && how != RenameHow::Exchange => {
                self.stat_at(&target)?;
                DONE
            }
            Err(Errno::EXIST) if again && self.root.find(from).is_err() => DONE,
            result => result.and(DONE),
        }
    }

    fn change(&self, file: &FileRef, change: &Change) -> Outcome {
        if let Some(size) = change.size {
            let fd = self.file(file, true)?;
            ftruncate(&fd, size)?;
        }
        // An open file is that file, whatever its path names by now.
        let open = self.files.get(file.inode, false);
        let found = match open {
            Some(open) => open,
            None => Arc::new(self.find(file)?.0),
        };
        if let Some(mode) = change.mode {
            let stat = fstat(&found)?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
                return Err(Errno::OPNOTSUPP);
            }
            chmodat(CWD, proc_path(&found), permissions(mode), AtFlags::empty())?;
        }
        if change.accessed.is_some() || change.modified.is_some() {
            let times = Timestamps {
                last_access: timespec(change.accessed)?,
                last_modification: timespec(change.modified)?,
            };
            // What the magic link names is not followed further, so this takes links, too.
            utimensat(CWD, proc_path(&found), &times, AtFlags::empty())?;
        }
        self.answer(&fstat(&found)?)
    }

    fn sync(&self, file: &FileRef, data_only: bool) -> Outcome {
        let fd = match self.file(file, false) {
            Err(Errno::ISDIR) => Arc::new(self.root.directory(&file.path)?),
            fd => fd?,
        };
        if data_only {
            fdatasync(&fd)?;
        } else {
            fsync(&fd)?;
        }
        DONE
    }

    fn usage(&self) -> Outcome {
        let usage = fstatvfs(&self.root)?;
        let unit = usage.f_frsize.max(1);
        let usage = Usage {
            block_size: u32::try_from(unit).unwrap_or(4096),
            blocks: usage.f_blocks,
            free: usage.f_bfree,
            available: space::spare(&usage) / unit,
            files: usage.f_files,
            files_free: usage.f_ffree,
        };
        Ok((Answer::Usage(usage), Vec::new()))
    }

    fn list_attributes(&self, path: &RelativePath) -> Outcome {
        let all =
            self.with_attributes(path, None, |file| filled(|buffer| listxattr(file, buffer)))?;
        let own = all
            .split_inclusive(|&byte| byte == 0)
            .filter(|name| name.starts_with(ATTRIBUTES));
        Ok((Answer::Data, own.flatten().copied().collect()))
    }

    /// Does something with the attributes of what is at `path`, given as a path of its own.
    fn with_attributes<T>(
        &self,
        path: &RelativePath,
        name: Option<&[u8]>,
        work: impl FnOnce(&str) -> rustix::io::Result<T>,
    ) -> rustix::io::Result<T> {
        if name.is_some_and(|name| !name.starts_with(ATTRIBUTES) || name.contains(&0)) {
            return Err(Errno::OPNOTSUPP);
        }
        let found = self.root.find(path)?;
        work(&proc_path(&found))
    }

    /// Gives what was just made to the owner of the share.
    fn give(&self, fd: impl AsFd) -> rustix::io::Result<()> {
        match self.owner() {
            Some((uid, gid)) => fchown(fd, Some(uid), Some(gid)),
            None => Ok(()),
        }
    }
}

/// Whether `data` are where an append that was tried before would have put them: where the guest
/// believed the end to be, or at the end.
fn has_been_appended(fd: &OwnedFd, offset: u64, data: &[u8]) -> rustix::io::Result<bool> {
    let size = fstat(fd)?.st_size.unsigned_abs();
    let mut there = vec![0; data.len()];
    for start in [Some(offset), size.checked_sub(data.len() as u64)] {
        let Some(start) = start else { continue };
        let read = pread(fd, &mut there, start)?;
        if read == data.len() && there == data {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Calls `read` with room for the largest attribute.
fn filled(
    read: impl FnOnce(&mut Vec<u8>) -> rustix::io::Result<usize>,
) -> rustix::io::Result<Vec<u8>> {
    let mut buffer = vec![0; MAX_ATTRIBUTE];
    let len = read(&mut buffer)?;
    buffer.truncate(len);
    Ok(buffer)
}

fn written(len: usize) -> u32 {
    // At most MAX_DATA.
    u32::try_from(len).unwrap_or(u32::MAX)
}

fn is(good: bool, otherwise: Errno) -> rustix::io::Result<()> {
    if good { Ok(()) } else { Err(otherwise) }
}
