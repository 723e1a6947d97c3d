//! One layer over those before it.

use std::{
    collections::HashSet,
    hash::{BuildHasher as _, RandomState},
    io::Read,
    os::fd::AsFd as _,
};

use rustix::{
    fs::{AtFlags, FileType, Mode, linkat, makedev, mkdirat, mknodat, symlinkat, unlinkat},
    io::Errno,
};

use super::{
    Fault,
    archive::{Archive, Kind, Member},
    content,
    tree::{self, Directory, Place, Tree, is_directory},
};
use crate::error::Error;

const WHITEOUT: &[u8] = b".wh.";
/// Names of this form are for the layering itself; this one hides all of a directory's content.
const RESERVED: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// The longest name in a directory, in bytes, for Linux and for ext4.
const NAME_MAX: usize = 255;

/// One layer being unpacked.
pub(super) struct Layer<'a, R> {
    tree: &'a mut Tree,
    archive: Archive<R>,
    most: u64,
    /// What this layer has made or confirmed, by its directory's inode and a hash of its name.
    /// An inode that comes to be used again was removed, so what bore these marks is gone, and
    /// what the new one holds is this layer's anyway.
    made: HashSet<(u64, u64)>,
    hasher: RandomState,
    /// Times of directories, to be set again when nothing is written into them any more.
    times: Vec<(Vec<u8>, (i64, u32))>,
}

impl<'a, R: Read> Layer<'a, R> {
    pub(super) fn new(tree: &'a mut Tree, input: R, most: u64) -> Layer<'a, R> {
        Layer {
            tree,
            archive: Archive::new(input),
            most,
            made: HashSet::new(),
            hasher: RandomState::new(),
            times: Vec::new(),
        }
    }

    /// Unpacks everything and returns how many entries there were.
    pub(super) fn unpack(mut self) -> Result<u64, Error> {
        self.tree.forget();
        let mut entries = 0;
        loop {
            let member = self.archive.next().map_err(|fault| fault.at(None))?;
            let Some(member) = member else {
                break;
            };
            entries += 1;
            let applied = if entries > self.most {
                Err(Fault::TooManyEntries)
            } else {
                self.apply(&member)
            };
            applied.map_err(|fault| fault.at(Some(&member.path)))?;
        }
        self.archive.drain().map_err(|fault| fault.at(None))?;
        self.set_times().map_err(|fault| fault.at(None))?;
        Ok(entries)
    }

    fn apply(&mut self, member: &Member) -> Result<(), Fault> {
        let components = components(&member.path)?;
        let Some((&name, parents)) = components.split_last() else {
            return self.apply_root(member);
        };
        if parents.iter().any(|parent| parent.starts_with(RESERVED)) {
            return Ok(());
        }
        if parents.iter().any(|parent| parent.starts_with(WHITEOUT)) {
            return Err(Fault::Name("is below a whiteout"));
        }
        if name == OPAQUE {
            return self.hide_all(parents);
        }
        if name.starts_with(RESERVED) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(Fault::Name("is a whiteout of nothing"));
            }
            return self.hide(parents, hidden);
        }
        let place = self.tree.place(&components)?;
        self.make(&place, member)?;
        self.mark(&place);
        if member.kind == Kind::Directory {
            self.times.push((components.join(&b'/'), member.mtime));
        }
        Ok(())
    }

    fn apply_root(&mut self, member: &Member) -> Result<(), Fault> {
        if member.kind != Kind::Directory {
            return Err(Fault::Name("is that of the root"));
        }
        content::describe(self.tree.root().fd(), member)?;
        self.times.push((Vec::new(), member.mtime));
        Ok(())
    }

    fn make(&mut self, place: &Place, member: &Member) -> Result<(), Fault> {
        match member.kind {
            Kind::Directory => return self.make_directory(place, member),
            Kind::HardLink => return self.make_hard_link(place, member),
            _ => self.clear(place)?,
        }
        let (parent, name) = (place.parent.fd(), &*place.name);
        let special = |kind, device| {
            mknodat(parent, name, kind, Mode::from_raw_mode(member.mode), device)
                .map_err(|error| Fault::system("make it", error))
        };
        let device = || makedev(member.device.0, member.device.1);
        match member.kind {
            Kind::File => {
                let file = content::write_file(place, member, &mut self.archive)?;
                self.drop_inherited(place);
                return content::describe(file.as_fd(), member);
            }
            Kind::Symlink => symlinkat(&*member.link, parent, name)
                .map_err(|error| Fault::system("make the link", error))?,
            Kind::Character => special(FileType::CharacterDevice, device())?,
            Kind::Block => special(FileType::BlockDevice, device())?,
            Kind::Fifo => special(FileType::Fifo, 0)?,
            Kind::Directory | Kind::HardLink => {}
        }
        self.drop_inherited(place);
        content::describe_unopened(place, member)?;
        if member.kind != Kind::Symlink {
            // The process's mask has taken bits away, the change of owner others. Nothing that is
            // a link can be here: this was made just now, in a directory that is only ours.
            rustix::fs::chmodat(
                parent,
                name,
                Mode::from_raw_mode(member.mode),
                AtFlags::empty(),
            )
            .map_err(|error| Fault::system("set its mode", error))?;
        }
        Ok(())
    }

    fn make_directory(&mut self, place: &Place, member: &Member) -> Result<(), Fault> {
        match place.stat()? {
            // The layers' contents are merged.
            Some(stat) if is_directory(&stat) => {}
            _ => {
                self.clear(place)?;
                mkdirat(place.parent.fd(), &*place.name, Mode::from_raw_mode(0o700))
                    .map_err(|error| Fault::system("make it", error))?;
                self.drop_inherited(place);
            }
        }
        self.tree.has_default_acls |= content::passes_on_acls(member);
        let directory = tree::enter(&place.parent, &place.name)?;
        content::describe(directory.fd(), member)
    }

    fn make_hard_link(&mut self, place: &Place, member: &Member) -> Result<(), Fault> {
        let target = components(&member.link).map_err(|_| Fault::Link("is outside"))?;
        let missing = Fault::Link("is not there");
        let Some(target) = self.tree.existing_place(&target)? else {
            return Err(missing);
        };
        let Some(found) = target.stat()? else {
            return Err(missing);
        };
        if is_directory(&found) {
            return Err(Fault::Link("is a directory"));
        }
        if let Some(there) = place.stat()? {
            if (there.st_dev, there.st_ino) == (found.st_dev, found.st_ino) {
                return Ok(());
            }
            self.clear(place)?;
        }
        let link = linkat(
            target.parent.fd(),
            &*target.name,
            place.parent.fd(),
            &*place.name,
            AtFlags::empty(),
        );
        match link {
            Ok(()) => Ok(()),
            // It was in the directory that has just made room.
            Err(Errno::NOENT) => Err(missing),
            Err(error) => Err(Fault::system("link it", error)),
        }
    }

    fn drop_inherited(&self, place: &Place) {
        if self.tree.has_default_acls {
            content::drop_inherited(place);
        }
    }

    /// Makes room at a place.
    fn clear(&mut self, place: &Place) -> Result<(), Fault> {
        self.tree.forget();
        tree::remove(&place.parent, &place.name)
    }

    fn hide(&mut self, parents: &[&[u8]], hidden: &[u8]) -> Result<(), Fault> {
        let mut components = parents.to_vec();
        components.push(hidden);
        let Some(place) = self.tree.existing_place(&components)? else {
            return Ok(());
        };
        self.tree.forget();
        self.remove_lower(&place.parent, &place.name).map(drop)
    }

    fn hide_all(&mut self, parents: &[&[u8]]) -> Result<(), Fault> {
        let directory = match self.tree.existing(&parents.join(&b'/')) {
            Ok(Some(directory)) => directory,
            Ok(None) | Err(Fault::Parent(_)) => return Ok(()),
            Err(other) => return Err(other),
        };
        self.tree.forget();
        for name in tree::names(&directory)? {
            self.remove_lower(&directory, &name)?;
        }
        Ok(())
    }

    /// Removes what earlier layers have made at a place and below it; says whether all is gone.
    fn remove_lower(&self, parent: &Directory, name: &[u8]) -> Result<bool, Fault> {
        let made_here = self.made.contains(&self.key(parent, name));
        if !made_here {
            match unlinkat(parent.fd(), name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => return Ok(true),
                Err(Errno::ISDIR) => {}
                Err(error) => return Err(Fault::system("hide what is there", error)),
            }
        }
        let directory = match rustix::fs::statat(parent.fd(), name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if is_directory(&stat) => tree::enter(parent, name)?,
            Ok(_) => return Ok(false),
            Err(Errno::NOENT) => return Ok(true),
            Err(error) => return Err(Fault::system("look at what is there", error)),
        };
        let mut empty = true;
        for child in tree::names(&directory)? {
            empty &= self.remove_lower(&directory, &child)?;
        }
        if made_here || !empty {
            return Ok(false);
        }
        unlinkat(parent.fd(), name, AtFlags::REMOVEDIR)
            .map_err(|error| Fault::system("hide a directory", error))?;
        Ok(true)
    }

    fn mark(&mut self, place: &Place) {
        let key = self.key(&place.parent, &place.name);
        self.made.insert(key);
    }

    fn key(&self, parent: &Directory, name: &[u8]) -> (u64, u64) {
        (parent.inode, self.hasher.hash_one(name))
    }

    fn set_times(&mut self) -> Result<(), Fault> {
        for (path, mtime) in std::mem::take(&mut self.times) {
            if path.is_empty() {
                content::set_time(self.tree.root().fd(), mtime)?;
                continue;
            }
            let Some(place) = self.tree.existing_place(&components(&path)?)? else {
                continue;
            };
            // It may have been replaced since.
            if place.stat()?.is_some_and(|stat| is_directory(&stat)) {
                let directory = tree::enter(&place.parent, &place.name)?;
                content::set_time(directory.fd(), mtime)?;
            }
        }
        Ok(())
    }
}

/// The names in a path. Leading slashes mean nothing, as in every program that unpacks archives.
fn components(path: &[u8]) -> Result<Vec<&[u8]>, Fault> {
    let parts = path.split(|&byte| byte == b'/');
    let parts: Vec<_> = parts
        .filter(|part| !part.is_empty() && *part != b".")
        .collect();
    if parts.contains(&&b".."[..]) {
        return Err(Fault::Name("leads upwards"));
    }
    if parts.iter().any(|part| part.len() > NAME_MAX) {
        return Err(Fault::Name("has a part of more than 255 bytes"));
    }
    Ok(parts)
}
