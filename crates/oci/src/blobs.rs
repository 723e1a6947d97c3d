//! Blobs on disk: each verified when it arrives, and there once.
//!
//! What has arrived of a blob is kept beside its final name until it is whole, so that a pull that
//! broke off, also by a crash, goes on where it was. Nothing is believed about it: its bytes are
//! hashed again.

use std::{
    collections::HashMap,
    io::{self, Read as _, Write as _},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, SystemTime},
};

use futures::{StreamExt as _, stream::BoxStream};
use oci_client::errors::DigestError;
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};

use crate::{
    digest::Digest,
    document::Descriptor,
    error::{During as _, Error, Result},
};

/// What arrives is written and hashed in pieces of about this length, in bytes.
const BATCH: usize = 1 << 20;
/// How often a source is asked again if it breaks off without having brought anything new.
const ATTEMPTS: u32 = 4;
/// How long to wait before the first of these times; twice as long each time.
const PATIENCE: Duration = Duration::from_millis(200);
/// How often is looked whether another process has finished with a blob.
const LOCK_INTERVAL: Duration = Duration::from_millis(100);
/// A blob that nobody has asked for again for so long is not resumed.
const STALE: Duration = Duration::from_secs(3 * 24 * 60 * 60);

/// Bytes on their way.
pub(crate) struct Incoming {
    /// Where in the blob they begin: where was asked for, or at the start.
    pub(crate) from: u64,
    pub(crate) bytes: BoxStream<'static, io::Result<bytes::Bytes>>,
}

/// Where a blob comes from.
pub(crate) trait Source: Sync {
    /// Its bytes from `offset` on, or nothing if it ends before that.
    fn open(
        &self,
        blob: &Descriptor,
        offset: u64,
    ) -> impl Future<Output = Result<Option<Incoming>>> + Send;

    /// What it is called.
    fn place(&self) -> String;
}

/// The directory of blobs.
#[derive(Debug)]
pub(crate) struct Blobs {
    directory: PathBuf,
    arriving: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
    pins: Arc<Mutex<HashMap<Digest, usize>>>,
}

/// Blobs that must not be removed for as long as this exists.
#[derive(Debug)]
pub(crate) struct Pins {
    digests: Vec<Digest>,
    table: Arc<Mutex<HashMap<Digest, usize>>>,
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        for digest in &self.digests {
            if let Some(count) = table.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    table.remove(digest);
                }
            }
        }
    }
}

impl Blobs {
    pub(crate) fn open(root: &Path) -> Result<Blobs> {
        let directory = root.join("blobs/sha256");
        fs_err::create_dir_all(&directory).during("make the directory of blobs")?;
        Ok(Blobs {
            directory,
            arriving: Mutex::default(),
            pins: Arc::default(),
        })
    }

    /// Removes what of blobs has arrived and will not be asked for again.
    pub(crate) fn sweep(&self) -> Result<()> {
        let sweep = || {
            for entry in fs_err::read_dir(&self.directory)? {
                let entry = entry?;
                let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
                if is_partial(&entry.path()) && age > STALE {
                    fs_err::remove_file(entry.path())?;
                }
            }
            io::Result::Ok(())
        };
        sweep().during("remove blobs that never became whole")
    }

    pub(crate) fn path(&self, digest: &Digest) -> PathBuf {
        self.directory.join(digest.hex())
    }

    fn partial(&self, digest: &Digest) -> PathBuf {
        self.directory.join(format!("{}.partial", digest.hex()))
    }

    /// Keeps blobs from being removed, those too that are still to come.
    pub(crate) fn pin(&self, digests: Vec<Digest>) -> Pins {
        let mut table = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        for digest in &digests {
            *table.entry(digest.clone()).or_default() += 1;
        }
        drop(table);
        let table = self.pins.clone();
        Pins { digests, table }
    }

    /// A blob that is there, and its use noted.
    pub(crate) fn find(&self, digest: &Digest) -> Option<fs_err::File> {
        let file = fs_err::File::open(self.path(digest)).ok()?;
        file.file().set_modified(SystemTime::now()).ok();
        Some(file)
    }

    /// Forgets a blob that has changed on disk.
    pub(crate) fn discard(&self, digest: &Digest) {
        fs_err::remove_file(self.path(digest)).ok();
    }

    /// Removes the blobs that were not used for so long; returns their number and bytes.
    pub(crate) fn remove_unused(&self, unused: Duration) -> Result<(usize, u64)> {
        let remove = || {
            let mut removed = (0, 0);
            for entry in fs_err::read_dir(&self.directory)? {
                let entry = entry?;
                let metadata = entry.metadata()?;
                let name = entry.file_name();
                let Some(digest) = name
                    .to_str()
                    .and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok())
                else {
                    continue;
                };
                // Held until the file is gone, so that nobody begins to use it meanwhile.
                let pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
                let age = metadata.modified()?.elapsed().unwrap_or_default();
                if age >= unused && !pins.contains_key(&digest) {
                    fs_err::remove_file(entry.path())?;
                    removed.0 += 1;
                    removed.1 += metadata.blocks() * 512;
                }
            }
            io::Result::Ok(removed)
        };
        remove().during("remove blobs")
    }

    /// Brings a blob here, unless it is here. `arrived` is told how many bytes more there are;
    /// fewer, if it has to begin again.
    ///
    /// One that is on its way already is waited for.
    pub(crate) async fn fetch(
        &self,
        blob: &Descriptor,
        source: &impl Source,
        arrived: &(impl Fn(i64) + Sync),
    ) -> Result<()> {
        if self.find(&blob.digest).is_some() {
            arrived(blob.size.cast_signed());
            return Ok(());
        }
        let turn = self.turn(&blob.digest);
        let _turn = turn.lock().await;
        let Some((writer, _unless_empty)) = self.begin(blob).await? else {
            arrived(blob.size.cast_signed());
            return Ok(());
        };
        let partial = self.partial(&blob.digest);
        match receive(writer, blob, source, arrived).await {
            Ok(writer) => {
                let (partial, path) = (partial.clone(), self.path(&blob.digest));
                blocking(move || writer.publish(&partial, &path)).await
            }
            Err(error) => {
                // What broke off may be gone on with; what is wrong, or has no room, may not.
                let is_wrong = matches!(
                    error,
                    Error::Truncated { .. } | Error::Tampered { .. } | Error::DiskFull { .. }
                );
                if is_wrong {
                    fs_err::remove_file(&partial).ok();
                }
                Err(error)
            }
        }
    }

    /// What decides, in this process, who brings a blob.
    fn turn(&self, digest: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut arriving = self.arriving.lock().unwrap_or_else(PoisonError::into_inner);
        arriving.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = arriving.get(digest).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::default();
        arriving.insert(digest.clone(), Arc::downgrade(&turn));
        turn
    }

    /// What there is of a blob, locked against other processes; none if it is whole by now.
    async fn begin(&self, blob: &Descriptor) -> Result<Option<(Writer, UnlessEmpty)>> {
        let partial = self.partial(&blob.digest);
        let file = loop {
            if self.find(&blob.digest).is_some() {
                return Ok(None);
            }
            let file = fs_err::OpenOptions::new()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(&partial)
                .during("begin a blob")?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if is_same(&file, &partial) => break file,
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => tokio::time::sleep(LOCK_INTERVAL).await,
                Err(error) => return Err(error).during("lock a blob"),
            }
        };
        // From here on it is ours to remove, also if nobody waits for what follows.
        let unless_empty = UnlessEmpty(partial);
        let size = blob.size;
        let writer = blocking(move || Writer::resume(file, size)).await?;
        Ok(Some((writer, unless_empty)))
    }
}

async fn receive(
    mut writer: Writer,
    blob: &Descriptor,
    source: &impl Source,
    arrived: &(impl Fn(i64) + Sync),
) -> Result<Writer> {
    arrived(writer.length.cast_signed());
    let mut resumed = writer.length > 0;
    loop {
        writer = complete(writer, blob, source, arrived).await?;
        let actual = Digest::of_hash(writer.hasher.clone().finalize().into());
        if actual == blob.digest {
            return Ok(writer);
        }
        if !resumed {
            return Err(Error::Tampered {
                expected: blob.digest.clone(),
                actual: Some(actual),
            });
        }
        // Perhaps it is what an earlier pull had left that was wrong, as after a power failure.
        resumed = false;
        arrived(-writer.length.cast_signed());
        writer = blocking(move || writer.restart()).await?;
    }
}

/// Goes on with a blob until it has its length.
async fn complete(
    mut writer: Writer,
    blob: &Descriptor,
    source: &impl Source,
    arrived: &(impl Fn(i64) + Sync),
) -> Result<Writer> {
    let truncated = |actual| Error::Truncated {
        digest: blob.digest.clone(),
        expected: blob.size,
        actual,
    };
    let mut failures = 0;
    while writer.length < blob.size {
        let before = writer.length;
        let failure = match source.open(blob, before).await {
            Ok(None) => return Err(truncated(before)),
            Ok(Some(incoming)) => {
                if incoming.from != before {
                    arrived(-before.cast_signed());
                    writer = blocking(move || writer.restart()).await?;
                }
                let (back, failure) = drink(writer, incoming, blob, arrived).await?;
                writer = back;
                match failure {
                    None if writer.length < blob.size => return Err(truncated(writer.length)),
                    None => break,
                    Some(error) => Error::Registry {
                        action: format!("fetch the blob {}", blob.digest),
                        registry: source.place(),
                        reason: error.to_string(),
                    },
                }
            }
            Err(error @ Error::Registry { .. }) => error,
            Err(other) => return Err(other),
        };
        failures = if writer.length > before {
            1
        } else {
            failures + 1
        };
        if failures >= ATTEMPTS {
            return Err(failure);
        }
        tracing::debug!(digest = %blob.digest, at = writer.length, %failure, "trying again");
        tokio::time::sleep(PATIENCE * 2_u32.pow(failures)).await;
    }
    Ok(writer)
}

/// Writes what comes, to its end or until it breaks off, for the reason that is returned.
async fn drink(
    mut writer: Writer,
    mut incoming: Incoming,
    blob: &Descriptor,
    arrived: &(impl Fn(i64) + Sync),
) -> Result<(Writer, Option<io::Error>)> {
    let mut failure = None;
    loop {
        let mut batch = Vec::new();
        let mut length = 0;
        let mut ended = true;
        while let Some(next) = incoming.bytes.next().await {
            match next {
                Ok(piece) => {
                    length += piece.len();
                    batch.push(piece);
                }
                Err(error) => {
                    // The library's own comparison; ours follows.
                    let is_digest = error.get_ref().is_some_and(|e| e.is::<DigestError>());
                    failure = (!is_digest).then_some(error);
                    break;
                }
            }
            if length >= BATCH {
                ended = false;
                break;
            }
        }
        if writer.length + length as u64 > blob.size {
            return Err(Error::Tampered {
                expected: blob.digest.clone(),
                actual: None,
            });
        }
        writer = blocking(move || writer.append(&batch)).await?;
        arrived(length as i64);
        if ended {
            return Ok((writer, failure));
        }
    }
}

/// Removes a file if nothing is in it, also if the work on it is dropped.
struct UnlessEmpty(PathBuf);

impl Drop for UnlessEmpty {
    fn drop(&mut self) {
        if fs_err::metadata(&self.0).is_ok_and(|file| file.len() == 0) {
            fs_err::remove_file(&self.0).ok();
        }
    }
}

/// The bytes of a blob so far.
struct Writer {
    file: fs_err::File,
    hasher: Sha256,
    length: u64,
}

impl Writer {
    fn resume(file: fs_err::File, size: u64) -> Result<Writer> {
        let mut writer = Writer {
            file,
            hasher: Sha256::new(),
            length: 0,
        };
        let present = writer.file.metadata().during("measure a blob")?.len();
        if present > size {
            return writer.restart();
        }
        let mut buffer = vec![0; BATCH];
        loop {
            match writer.file.read(&mut buffer).during("read a blob")? {
                0 => return Ok(writer),
                n => {
                    writer.hasher.update(&buffer[..n]);
                    writer.length += n as u64;
                }
            }
        }
    }

    fn restart(mut self) -> Result<Writer> {
        self.file.set_len(0).during("empty a blob")?;
        self.hasher = Sha256::new();
        self.length = 0;
        Ok(self)
    }

    fn append(mut self, batch: &[bytes::Bytes]) -> Result<Writer> {
        for piece in batch {
            let file = self.file.file();
            file.write_all_at(piece, self.length)
                .during("write a blob")?;
            self.hasher.update(piece);
            self.length += piece.len() as u64;
        }
        Ok(self)
    }

    fn publish(mut self, partial: &Path, path: &Path) -> Result<()> {
        let mut publish = || {
            self.file.flush()?;
            self.file.sync_all()?;
            fs_err::rename(partial, path)?;
            fs_err::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
        };
        publish().during("publish a blob")
    }
}

fn is_partial(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension == "partial")
}

fn is_same(file: &fs_err::File, path: &Path) -> bool {
    let id = |metadata: &std::fs::Metadata| (metadata.dev(), metadata.ino());
    matches!((file.metadata(), fs_err::metadata(path)), (Ok(a), Ok(b)) if id(&a) == id(&b))
}

/// Runs on a thread that may wait for the disk.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(Error::Stopped),
        },
    }
}
