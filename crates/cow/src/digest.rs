//! Checksums of sparse files that share blocks.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path};

use crate::{
    error::{Context as _, Error, Result},
    extents::same_parts,
    memory::is_zero,
    reflink::DataExtents,
};

/// Content is hashed in blocks of this many bytes; blocks of zeros are skipped.
const BLOCK: u64 = 64 << 10;
/// What a checksum of blocks begins with. The first programs hashed files without this.
const PREFIX: &str = "blocks:";

/// The hashes of a file's blocks, from which its checksum is made. Kept, they make the checksum of
/// a file that shares most blocks with this one cheap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Sums {
    size: u64,
    /// By block number, ascending; blocks of zeros are not there.
    blocks: Vec<(u64, blake3::Hash)>,
}

impl Sums {
    /// The checksum of the file's content: BLAKE3 over `(block number, BLAKE3 of the block)` of every
    /// 64 KiB block that is not all zero, and the length. It does not depend on where the file has
    /// holes or whose its blocks are.
    pub(crate) fn checksum(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for (number, hash) in &self.blocks {
            hasher.update(&number.to_le_bytes());
            hasher.update(hash.as_bytes());
        }
        hasher.update(&self.size.to_le_bytes());
        format!("{PREFIX}{}", hasher.finalize().to_hex())
    }

    /// How many blocks it knows.
    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }

    fn get(&self, number: u64) -> Option<blake3::Hash> {
        let index = self.blocks.binary_search_by_key(&number, |block| block.0);
        index.ok().map(|index| self.blocks[index].1)
    }
}

/// Hashes a file. What it shares with `known`, a file whose hashes are known, is not read; for
/// that, nothing of either file may be waiting to be written. Holes cost nothing.
///
/// `go_on` is asked before every block; the result is `None` once it says no.
///
/// # Errors
/// If the file cannot be read.
pub(crate) fn sums(
    path: &Path,
    known: Option<(&File, &Sums)>,
    go_on: impl Fn() -> bool,
) -> Result<Option<Sums>> {
    let mut blocks = Blocks::open(path, go_on)?;
    let known = known.filter(|(_, old)| old.size == blocks.size);
    let same = match known {
        Some((base, _)) => same_parts(&blocks.file, base).at("compare the blocks of", path)?,
        None => Vec::new(),
    };
    let mut same = same.into_iter().peekable();
    let mut sums = Sums {
        size: blocks.size,
        blocks: Vec::new(),
    };
    let done = blocks.each(|block| {
        while same.next_if(|(_, end)| *end < block.end).is_some() {}
        let is_known = same.peek().is_some_and(|(start, _)| *start <= block.start);
        let hash = match known.filter(|_| is_known) {
            Some((_, old)) => old.get(block.number),
            None => block.read()?.map(blake3::hash),
        };
        sums.blocks.extend(hash.map(|hash| (block.number, hash)));
        Ok(())
    })?;
    Ok(done.then_some(sums))
}

/// A checksum as the first programs made it: BLAKE3 over `(block number, content)` of every block
/// that is not all zero, and the length.
fn first_checksum(path: &Path, go_on: impl Fn() -> bool) -> Result<Option<String>> {
    let mut blocks = Blocks::open(path, go_on)?;
    let mut hasher = blake3::Hasher::new();
    let size = blocks.size;
    let done = blocks.each(|block| {
        let number = block.number;
        if let Some(content) = block.read()? {
            hasher.update(&number.to_le_bytes());
            hasher.update(content);
        }
        Ok(())
    })?;
    hasher.update(&size.to_le_bytes());
    Ok(done.then(|| hasher.finalize().to_hex().to_string()))
}

/// The blocks of a file that are not all hole.
struct Blocks<'a, G> {
    file: File,
    path: &'a Path,
    size: u64,
    go_on: G,
}

struct Block<'a> {
    number: u64,
    start: u64,
    end: u64,
    file: &'a File,
    path: &'a Path,
    buffer: &'a mut [u8],
}

impl<'a, G: Fn() -> bool> Blocks<'a, G> {
    fn open(path: &'a Path, go_on: G) -> Result<Self> {
        let file = File::open(path).at("open for its checksum", path)?;
        let size = file.metadata().at("read the size of", path)?.len();
        Ok(Self {
            file,
            path,
            size,
            go_on,
        })
    }

    /// Visits every block once, in order. Whether it has not been told to stop.
    fn each(&mut self, mut visit: impl FnMut(&mut Block<'_>) -> Result<()>) -> Result<bool> {
        let mut buffer = vec![0; BLOCK as usize];
        let mut next = 0;
        for extent in DataExtents::new(&self.file, self.size) {
            let (start, end) = extent.at("find the data of", self.path)?;
            // Two extents may share a block.
            for number in (start / BLOCK).max(next)..end.div_ceil(BLOCK) {
                if !(self.go_on)() {
                    return Ok(false);
                }
                let start = number * BLOCK;
                visit(&mut Block {
                    number,
                    start,
                    end: (start + BLOCK).min(self.size),
                    file: &self.file,
                    path: self.path,
                    buffer: &mut buffer,
                })?;
                next = number + 1;
            }
        }
        Ok(true)
    }
}

impl Block<'_> {
    /// Its content; `None` if that is all zero.
    fn read(&mut self) -> Result<Option<&[u8]>> {
        let content = &mut self.buffer[..(self.end - self.start) as usize];
        self.file
            .read_exact_at(content, self.start)
            .at("read for its checksum", self.path)?;
        Ok(Some(&*content).filter(|content| !is_zero(content)))
    }
}

/// Compares a file with what was recorded about it: its size, and its content if there is a
/// checksum. `None`: intact, or not found to be otherwise before `go_on` said no.
pub(crate) fn damage(
    path: &Path,
    size: u64,
    checksum: Option<&str>,
    go_on: impl Fn() -> bool,
) -> Option<String> {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let found = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) => return Some(format!("{name}: {error}")),
    };
    if found != size {
        return Some(format!("{name} has {found} bytes, {size} were published"));
    }
    let expected = checksum?;
    let found = if expected.starts_with(PREFIX) {
        sums(path, None, go_on).map(|sums| sums.map(|sums| sums.checksum()))
    } else {
        first_checksum(path, go_on)
    };
    match found {
        Ok(Some(found)) if found == expected => None,
        Ok(None) => None,
        Ok(Some(_)) => Some(format!(
            "{name} does not have the content that was published"
        )),
        Err(Error::Io { source, .. }) => Some(format!("{name} cannot be read: {source}")),
        Err(error) => Some(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sparse(dir: &Path, name: &str, size: u64, writes: &[(u64, u8)], explicit: bool) -> String {
        let path = dir.join(name);
        let file = File::create(&path).unwrap();
        if explicit {
            file.write_all_at(&vec![0; size as usize], 0).unwrap();
        }
        file.set_len(size).unwrap();
        for (at, byte) in writes {
            file.write_all_at(&[*byte], at % size).unwrap();
        }
        let first = first_checksum(&path, || true).unwrap().unwrap();
        let sum = checksum(&path);
        for checksum in [&first, &sum] {
            assert_eq!(damage(&path, size, Some(checksum), || true), None);
        }
        // Both tell the same files apart.
        format!("{first} {sum}")
    }

    fn checksum(path: &Path) -> String {
        sums(path, None, || true).unwrap().unwrap().checksum()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn depends_on_content_and_not_on_holes(
            size in 1_u64..(1 << 21), writes in proptest::collection::vec((0_u64..1 << 21, any::<u8>()), 0..12),
            other in (0_u64..1 << 21, 1_u8..),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let holes = sparse(dir.path(), "holes", size, &writes, false);
            let zeros = sparse(dir.path(), "zeros", size, &writes, true);
            prop_assert_eq!(&holes, &zeros);
            let mut content = vec![0; size as usize];
            for (at, byte) in &writes {
                content[(at % size) as usize] = *byte;
            }
            let at = other.0 % size;
            let mut changed = writes.clone();
            changed.push((at, content[at as usize] ^ other.1));
            prop_assert_ne!(&holes, &sparse(dir.path(), "changed", size, &changed, false));
            prop_assert_ne!(&holes, &sparse(dir.path(), "longer", size + 1, &writes, false));
        }
    }

    #[test]
    fn moved_content_is_other_content() {
        let dir = tempfile::tempdir().unwrap();
        let here = sparse(dir.path(), "here", 1 << 20, &[(0, 1)], false);
        let there = sparse(dir.path(), "there", 1 << 20, &[(BLOCK, 1)], false);
        assert_ne!(here, there);
        let path = dir.path().join("here");
        assert_eq!(sums(&path, None, || false).unwrap(), None);
        assert_eq!(
            damage(&path, 1 << 20, Some(&checksum(&path)), || false),
            None
        );
        let other = checksum(&dir.path().join("there"));
        assert!(damage(&path, 1 << 20, Some(&other), || true).is_some());
    }
}
