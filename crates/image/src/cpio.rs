//! Writes the archive that the kernel unpacks as its first root file system: cpio in the "newc"
//! form, as the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst` has it.

use std::io::{self, Write};

const TRAILER: &str = "TRAILER!!!";
const PAGE: usize = 4096;
/// How much of its last page an archive takes, in bytes. QEMU's `microvm` puts the archive at the
/// very end of memory, beginning at a page, and its firmware puts the ACPI tables, which grow with
/// the number of processors, into what is left behind it. They don't know of each other: an archive
/// that leaves too little overwrites the tables, and the kernel hangs reading them.
const LAST_PAGE: usize = 512;
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFCHR: u32 = 0o020_000;

/// An archive under way. All entries belong to root and are dated 1970, so that the same entries
/// always make the same bytes.
pub(crate) struct Archive<W> {
    out: W,
    written: usize,
    next_inode: u32,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Archive<W> {
        Archive {
            out,
            written: 0,
            next_inode: 1,
        }
    }

    /// Adds a directory. Its parent must have been added before it. Paths have no leading `/`.
    pub(crate) fn directory(&mut self, path: &str, permissions: u32) -> io::Result<()> {
        self.entry(path, S_IFDIR | permissions, (0, 0), &[])
    }

    /// Adds a regular file.
    pub(crate) fn file(&mut self, path: &str, permissions: u32, data: &[u8]) -> io::Result<()> {
        self.entry(path, S_IFREG | permissions, (0, 0), data)
    }

    /// Adds a character device by its major and minor number.
    pub(crate) fn device(
        &mut self,
        path: &str,
        permissions: u32,
        id: (u32, u32),
    ) -> io::Result<()> {
        self.entry(path, S_IFCHR | permissions, id, &[])
    }

    /// Ends the archive and returns what it was written to.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.next_inode = 0;
        self.entry(TRAILER, 0, (0, 0), &[])?;
        self.leave_room_behind()?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), data: &[u8]) -> io::Result<()> {
        let length = |n: usize| {
            u32::try_from(n)
                .map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, path.to_owned()))
        };
        let links = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        let fields = [
            self.next_inode,
            mode,
            0, // owner
            0, // group
            links,
            0, // time of last change
            length(data.len())?,
            0, // device that holds it
            0,
            device.0,
            device.1,
            length(path.len() + 1)?,
            0, // checksum, unused in this form
        ];
        self.next_inode += 1;
        self.write(b"070701")?;
        for field in fields {
            self.write(format!("{field:08x}").as_bytes())?;
        }
        self.write(path.as_bytes())?;
        self.write(b"\0")?;
        self.align()?;
        self.write(data)?;
        self.align()
    }

    /// Fills the last page with zeros, which the kernel skips, up to [`LAST_PAGE`].
    fn leave_room_behind(&mut self) -> io::Result<()> {
        let used = self.written % PAGE;
        let padding = (PAGE + LAST_PAGE - used) % PAGE;
        self.write(&[0; PAGE][..padding])
    }

    fn align(&mut self) -> io::Result<()> {
        let padding = self.written.next_multiple_of(4) - self.written;
        self.write(&[0; 4][..padding])
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
        path::Path,
        process::{Command, Stdio},
    };

    use proptest::prelude::*;

    use super::*;

    fn sample(data: &[u8]) -> Vec<u8> {
        let mut archive = Archive::new(Vec::new());
        archive.directory("dev", 0o755).unwrap();
        archive.device("dev/console", 0o600, (5, 1)).unwrap();
        archive.file("init", 0o755, data).unwrap();
        archive.finish().unwrap()
    }

    #[test]
    fn there_is_room_behind_an_archive_of_any_length() {
        for len in 0..PAGE {
            assert_eq!(sample(&vec![b'x'; len]).len() % PAGE, LAST_PAGE, "{len}");
        }
    }

    /// Unpacks by the system's own tool and returns what it listed.
    fn cpio(archive: &[u8], directory: &Path) -> String {
        let mut command = Command::new("cpio");
        command
            .args(["--extract", "--verbose", "--quiet"])
            .current_dir(directory);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("this test needs the program `cpio`");
        child.stdin.take().unwrap().write_all(archive).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stderr).unwrap()
    }

    #[test]
    fn cpio_unpacks_what_was_packed() {
        let directory = tempfile::tempdir().unwrap();
        let listed = cpio(&sample(b"#!ELF"), directory.path());
        assert_eq!(
            listed.split_whitespace().collect::<Vec<_>>(),
            ["dev", "dev/console", "init"]
        );
        let init = directory.path().join("init");
        assert_eq!(fs_err::read(&init).unwrap(), b"#!ELF");
        assert_eq!(
            fs_err::metadata(&init).unwrap().permissions().mode() & 0o7777,
            0o755
        );
        let console = fs_err::metadata(directory.path().join("dev/console")).unwrap();
        assert!(console.file_type().is_char_device());
        assert_eq!(console.rdev(), rustix::fs::makedev(5, 1));
    }

    #[test]
    fn the_same_entries_make_the_same_bytes() {
        assert_eq!(sample(b"x"), sample(b"x"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn any_length_of_data_survives(data in prop::collection::vec(any::<u8>(), 0..9000)) {
            let directory = tempfile::tempdir().unwrap();
            cpio(&sample(&data), directory.path());
            prop_assert_eq!(fs_err::read(directory.path().join("init")).unwrap(), data);
        }
    }
}
