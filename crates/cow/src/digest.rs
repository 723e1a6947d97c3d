//! Checksums of sparse files.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path};

use crate::{
    error::{Context as _, Error, Result},
    memory::is_zero,
    reflink::DataExtents,
};

/// Content is hashed in blocks of this many bytes; blocks of zeros are skipped.
const BLOCK: u64 = 64 << 10;

/// The checksum of a file's content: BLAKE3 over `(block number, content)` of every 64 KiB block
/// that is not all zero, and the length. It does not depend on where the file has holes, and holes
/// cost nothing.
///
/// `go_on` is asked before every extent and every MiB; the result is `None` once it says no.
///
/// # Errors
/// If the file cannot be read.
pub(crate) fn digest(path: &Path, go_on: impl Fn() -> bool) -> Result<Option<String>> {
    let file = File::open(path).at("open for its checksum", path)?;
    let size = file.metadata().at("read the size of", path)?.len();
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut next_block = 0;
    for extent in DataExtents::new(&file, size) {
        let (start, end) = extent.at("find the data of", path)?;
        // Whole blocks; two extents may share one, which is hashed once.
        let mut at = (start / BLOCK).max(next_block) * BLOCK;
        while at < end {
            if !go_on() {
                return Ok(None);
            }
            let stop = end.next_multiple_of(BLOCK).min(size);
            let want = (buffer.len() as u64).min(stop - at) as usize;
            let piece = &mut buffer[..want];
            file.read_exact_at(piece, at)
                .at("read for its checksum", path)?;
            for (index, block) in piece.chunks(BLOCK as usize).enumerate() {
                if !is_zero(block) {
                    hasher.update(&(at / BLOCK + index as u64).to_le_bytes());
                    hasher.update(block);
                }
            }
            at += want as u64;
        }
        next_block = at.div_ceil(BLOCK);
    }
    hasher.update(&size.to_le_bytes());
    Ok(Some(hasher.finalize().to_hex().to_string()))
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
    match digest(path, go_on) {
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
        digest(&path, || true).unwrap().unwrap()
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
        assert_eq!(digest(&dir.path().join("here"), || false).unwrap(), None);
    }
}
