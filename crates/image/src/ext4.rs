//! A directory tree as the file system of a disk.

use std::path::Path;

use crate::{
    command::Program,
    error::{During as _, Result},
    fingerprint::Fingerprint,
};

/// The features of the file system, named here so that they do not depend on the host's
/// `/etc/mke2fs.conf`: what every kernel since 4.x can mount.
///
/// The journal stays, though small: a snapshot of the disk alone is taken of a file system in use.
const FEATURES: &str = "[defaults]
    base_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr
    blocksize = 4096
    inode_size = 256
    inode_ratio = 16384
[fs_types]
    ext4 = {
        features = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize
    }
";
const JOURNAL_MIB: u32 = 16;
/// Image sizes are multiples of this, in bytes, so that an image may also be mapped by huge pages.
pub(crate) const ALIGNMENT: u64 = 2 << 20;

/// What is to be packed.
#[derive(Debug)]
pub struct Packing<'a> {
    /// The directory that becomes the root, with its owners, modes and attributes.
    pub tree: &'a Path,
    /// Size of the disk, in bytes. It is rounded up to a multiple of 2 MiB.
    pub bytes: u64,
    /// How many files the file system has room for, if that is not to follow from its size: one
    /// in 16 KiB.
    pub inodes: Option<u64>,
    /// Decides the UUID of the file system.
    pub identity: &'a Fingerprint,
}

/// Packs `tree` into a sparse ext4 image of `bytes`; see [`Packing::pack`].
pub(crate) async fn pack(
    tree: &Path,
    image: &Path,
    bytes: u64,
    identity: &Fingerprint,
    work: &Path,
    log: &Path,
) -> Result<()> {
    let packing = Packing {
        tree,
        bytes,
        inodes: None,
        identity,
    };
    packing.pack(image, work, log).await
}

impl Packing<'_> {
    /// Makes a sparse ext4 image at `image`. `work` is a directory for a small file; what the
    /// program says is appended to `log`.
    ///
    /// # Errors
    /// [`crate::Error::Program`], also if the tree has no room in the image.
    pub async fn pack(&self, image: &Path, work: &Path, log: &Path) -> Result<()> {
        let bytes = self.bytes.next_multiple_of(ALIGNMENT);
        let config = work.join("mke2fs.conf");
        fs_err::write(&config, FEATURES).during("write a configuration file")?;
        let create = fs_err::File::create(image).and_then(|file| file.file().set_len(bytes));
        create.during("create a disk image")?;
        let uuid = uuid(self.identity);
        // Inode tables and journal are initialised now, while they are holes in a sparse file: the
        // guest would otherwise write them out, block by block, in every sandbox's own volume.
        let extended =
            format!("lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0,hash_seed={uuid}");
        let inodes = self
            .inodes
            .map(|inodes| ["-N".to_owned(), inodes.to_string()]);
        Program::new(
            "mke2fs",
            "e2fsprogs",
            "make the file system of a disk image",
        )
        .args([
            "-q", "-F", "-t", "ext4", "-m", "0", "-L", "sandbox", "-U", &uuid,
        ])
        .args(["-J", &format!("size={JOURNAL_MIB}")])
        .args(inodes.into_iter().flatten())
        .args(["-E", &extended, "-d"])
        .arg(self.tree)
        .arg(image)
        .env("MKE2FS_CONFIG", &config)
        .log(log)
        .run(|_| ())
        .await
    }
}

/// A UUID made of a fingerprint, marked as one of the kind that has no further structure (8).
fn uuid(fingerprint: &Fingerprint) -> String {
    let hex = fingerprint.as_str();
    format!(
        "{}-{}-8{}-8{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..15],
        &hex[15..18],
        &hex[18..30]
    )
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::MetadataExt as _, process::Command};

    use super::*;

    #[tokio::test]
    async fn a_tree_becomes_a_clean_sparse_aligned_image() {
        let work = tempfile::tempdir().unwrap();
        let tree = work.path().join("tree");
        fs_err::create_dir_all(tree.join("home/user")).unwrap();
        fs_err::write(tree.join("home/user/note"), "hello").unwrap();
        let owned = std::os::unix::fs::chown(tree.join("home/user/note"), Some(1000), Some(1000));
        owned.expect("this test runs as root, as image builds do");
        let (image, log) = (work.path().join("image"), work.path().join("log"));
        let identity = Fingerprint::of_bytes(b"tree");
        let odd_size = (600 << 20) + 4096;
        pack(&tree, &image, odd_size, &identity, work.path(), &log)
            .await
            .unwrap();

        let metadata = fs_err::metadata(&image).unwrap();
        assert_eq!(metadata.len(), 602 << 20, "rounded up to 2 MiB");
        assert!(
            metadata.blocks() * 512 < 24 << 20,
            "{} blocks",
            metadata.blocks()
        );
        let run = |program: &str, arguments: &[&str]| {
            let output = Command::new(program)
                .args(arguments)
                .arg(&image)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{program} {arguments:?}: {text}");
            text
        };
        run("e2fsck", &["-f", "-n"]);
        let stat = run("debugfs", &["-R", "stat /home/user/note"]);
        assert!(stat.contains("User:  1000   Group:  1000"), "{stat}");
        let header = run("dumpe2fs", &["-h"]);
        assert!(header.contains(&uuid(&identity)), "{header}");
        assert!(header.contains("Reserved block count:     0"), "{header}");
    }
}
