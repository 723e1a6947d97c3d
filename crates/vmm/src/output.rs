//! What a VM process prints, kept within bounds.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, fd::BorrowedFd, unix::fs::FileExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use tokio::{
    fs,
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
};

/// Room for what QEMU prints. It prints nothing unless something is wrong.
const OUTPUT_LEN: u64 = 64 << 10;

/// Most of it that an error message quotes.
const QUOTED_LEN: usize = 2 << 10;

/// Ends of lines that QEMU prints for every cold boot and that mean nothing: `/dev/zero`, which
/// is its memory, has no length to set; a network card may be without a cable.
const HARMLESS: [&str; 2] = ["ftruncate: Invalid argument", "has no peer"];

/// The console log is turned over at this length: at most twice as much is on disk.
const CONSOLE_LEN: u64 = 512 << 10;

/// Standard output and error of a VM process: memory of a fixed size, so that a process gone mad
/// fills neither a disk nor the host's memory.
#[derive(Debug)]
pub(crate) struct Output(File);

impl Output {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = memfd_create("vm-output", flags)?;
        ftruncate(&memory, OUTPUT_LEN)?;
        fcntl_add_seals(
            &memory,
            SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL,
        )?;
        Ok(Self(memory.into()))
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// The end of what was printed so far.
    pub(crate) fn tail(&self) -> String {
        let mut text = vec![0; usize::try_from(OUTPUT_LEN).unwrap_or(0)];
        let read = self.0.read_at(&mut text, 0).unwrap_or(0);
        text.truncate(read);
        // What was not written yet is zero.
        let len = text.iter().position(|byte| *byte == 0).unwrap_or(read);
        let text = String::from_utf8_lossy(&text[len.saturating_sub(QUOTED_LEN)..len]);
        let tells = |line: &&str| !HARMLESS.iter().any(|known| line.ends_with(known));
        text.lines()
            .filter(tells)
            .collect::<Vec<_>>()
            .join("\n")
            .trim()
            .to_owned()
    }
}

/// Copies what the guest's console says to a file until it ends. When the file is long enough it
/// becomes `<name>.old`, replacing the one before, and a new one is begun.
pub(crate) async fn keep_console(mut console: UnixStream, path: PathBuf) {
    if let Err(error) = copy_console(&mut console, &path, CONSOLE_LEN).await {
        tracing::warn!(path = %path.display(), %error, "the kernel log is incomplete");
        // A console that nobody reads makes the guest wait.
        let _ = tokio::io::copy(&mut console, &mut tokio::io::sink()).await;
    }
}

async fn copy_console(console: &mut UnixStream, path: &Path, limit: u64) -> io::Result<()> {
    let old = path.with_extension("log.old");
    let mut options = fs::OpenOptions::new();
    options.create(true).append(true);
    let mut file = options.open(path).await?;
    let mut len = file.metadata().await?.len();
    let mut buffer = vec![0; 16 << 10];
    loop {
        let read = console.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        if len + u64::try_from(read).unwrap_or(u64::MAX) > limit {
            fs::rename(path, &old).await?;
            file = options.open(path).await?;
            len = 0;
        }
        file.write_all(&buffer[..read]).await?;
        file.flush().await?;
        len += u64::try_from(read).unwrap_or(u64::MAX);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn output_is_quoted_from_its_end_and_cannot_grow() {
        let output = Output::new().unwrap();
        assert_eq!(output.tail(), "");
        let mut writer = output.0.try_clone().unwrap();
        writer.write_all(b"first\nlast words\n").unwrap();
        assert_eq!(output.tail(), "first\nlast words");
        writer
            .write_all(b"ftruncate: Invalid argument\nno!\n")
            .unwrap();
        assert_eq!(output.tail(), "first\nlast words\nno!");
        let flood = vec![b'x'; usize::try_from(OUTPUT_LEN).unwrap()];
        assert!(writer.write_all(&flood).is_err());
        assert_eq!(output.0.metadata().unwrap().len(), OUTPUT_LEN);
        assert_eq!(output.tail().len(), QUOTED_LEN);
    }

    #[tokio::test]
    async fn a_chatty_console_stays_within_its_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel.log");
        let (mut guest, mut host) = UnixStream::pair().unwrap();
        let writer = async move {
            for line in 0..1000 {
                guest
                    .write_all(format!("line {line:4}\n").as_bytes())
                    .await
                    .unwrap();
            }
        };
        let (copied, ()) = tokio::join!(copy_console(&mut host, &path, 4096), writer);
        copied.unwrap();
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        let (old, new) = (read(&path.with_extension("log.old")), read(&path));
        assert!(old.len() <= 4096 && new.len() <= 4096);
        assert!(new.ends_with("line  999\n"));
        let all = format!("{old}{new}");
        let first: usize = all
            .split_ascii_whitespace()
            .nth(1)
            .unwrap()
            .parse()
            .unwrap();
        assert_eq!(
            all.lines().count(),
            1000 - first,
            "lines were lost between the two files"
        );
    }
}
