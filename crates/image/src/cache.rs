//! Artefacts on disk: made once, by one builder at a time, published by a rename.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustix::fs::{FlockOperation, flock};

use crate::{
    error::{During as _, Result},
    fingerprint::Fingerprint,
    progress::{Progress, Step},
};

/// How often somebody who waits for another builder looks whether it has finished.
const LOCK_INTERVAL: Duration = Duration::from_millis(100);

/// One kind of artefact in the image directory, such as `kernels`.
#[derive(Debug, Clone)]
pub struct Cache {
    directory: PathBuf,
}

impl Cache {
    /// The artefacts of a kind in the image directory `root`.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if it cannot be made.
    pub fn open(root: &Path, kind: &str) -> Result<Cache> {
        let directory = root.join(kind);
        fs_err::create_dir_all(&directory).during("make the image directory")?;
        // Paths into it must hold wherever they are used.
        let directory = fs_err::canonicalize(directory).during("find the image directory")?;
        Ok(Cache { directory })
    }

    /// The final path of a file or directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Waits until nobody else makes the artefact with this fingerprint.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if the lock file cannot be used.
    pub async fn lock(&self, fingerprint: &Fingerprint, progress: &Progress) -> Result<Arc<Lock>> {
        let path = self.path(&format!(".{}.lock", fingerprint.short()));
        let mut waited = false;
        loop {
            let file = fs_err::File::create(&path).during("make a lock file")?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // The last owner removed the file after we had opened it: ours locks nothing.
                Ok(()) if !same_file(&file, &path) => {}
                Ok(()) => {
                    let fingerprint = fingerprint.clone();
                    return Ok(Arc::new(Lock {
                        fingerprint,
                        path,
                        _file: file,
                    }));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    if !waited {
                        progress.message(Step::WAIT, "the same image is being made already");
                        waited = true;
                    }
                    tokio::time::sleep(LOCK_INTERVAL).await;
                }
                Err(error) => return Err(error).during(format!("lock `{}`", path.display())),
            }
        }
    }

    /// A place to make the artefact in that the lock is for: it is removed when dropped before it
    /// was published. What is there already was left by a crash.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if that cannot be removed.
    pub fn draft(&self, lock: &Arc<Lock>, suffix: &str) -> Result<Draft> {
        let path = self.path(&format!(".{}{suffix}.partial", lock.fingerprint.short()));
        remove(&path).during("remove what an interrupted build left")?;
        Ok(Draft {
            path,
            published: false,
            _lock: lock.clone(),
        })
    }

    /// Notes that an artefact was used now, for [`Cache::prune`].
    pub fn touch(&self, name: &str) {
        // Only the order of removal depends on it; a read-only directory is no reason to fail.
        let file = fs_err::File::open(self.path(name));
        file.and_then(|file| file.file().set_modified(SystemTime::now()))
            .ok();
    }

    /// Removes all artefacts whose name ends in `suffix` but the `keep` most recently used, and
    /// those that share the removed ones' stem.
    pub(crate) fn prune(&self, suffix: &str, keep: usize) -> io::Result<()> {
        let mut found = Vec::new();
        for entry in fs_err::read_dir(&self.directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if let Some(stem) = name.to_str().and_then(|name| name.strip_suffix(suffix))
                && !stem.starts_with('.')
            {
                found.push((entry.metadata()?.modified()?, stem.to_owned()));
            }
        }
        found.sort_by(|a, b| b.cmp(a));
        for (_, stem) in found.iter().skip(keep) {
            for entry in fs_err::read_dir(&self.directory)? {
                let entry = entry?;
                let name = entry.file_name();
                if name
                    .to_str()
                    .is_some_and(|name| name.split('.').next() == Some(stem))
                {
                    remove(&entry.path())?;
                }
            }
        }
        Ok(())
    }
}

/// The right to make one artefact; given back when it and all drafts under it are dropped.
#[derive(Debug)]
pub struct Lock {
    fingerprint: Fingerprint,
    path: PathBuf,
    _file: fs_err::File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Removed while still held, so that nobody can lock a name that is about to go.
        fs_err::remove_file(&self.path).ok();
    }
}

/// An artefact that is not finished.
#[derive(Debug)]
pub struct Draft {
    path: PathBuf,
    published: bool,
    /// Held for as long as something may be written here, also by a thread that outlives the
    /// future that began it.
    _lock: Arc<Lock>,
}

impl Draft {
    /// Where to write it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the artefact its final name, at once and as a whole. Its data must have been synced.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if it cannot be renamed.
    pub fn publish(mut self, to: &Path) -> Result<()> {
        let publish = || {
            if to.is_dir() {
                // Unlike a file, it cannot be replaced by a rename. It is not whole, or nobody
                // would have made another one.
                remove(to)?;
            }
            fs_err::rename(&self.path, to)?;
            fs_err::File::open(to.parent().unwrap_or(Path::new(".")))?.sync_all()
        };
        publish().during("publish an image")?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.published {
            remove(&self.path).ok();
        }
    }
}

/// Removes a file or a directory with all that is in it; neither being there is fine.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let kind = match fs_err::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if kind.is_dir() {
        fs_err::remove_dir_all(path)
    } else {
        fs_err::remove_file(path)
    }
}

fn same_file(file: &fs_err::File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let id = |m: &std::fs::Metadata| (m.dev(), m.ino());
    matches!((file.metadata(), fs_err::metadata(path)), (Ok(a), Ok(b)) if id(&a) == id(&b))
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    fn fingerprint() -> Fingerprint {
        Fingerprint::of_bytes(b"inputs")
    }

    fn lock_name() -> String {
        format!(".{}.lock", fingerprint().short())
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn one_builder_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::open(root.path(), "things").unwrap();
        let (inside, rounds) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let builders = (0..8).map(|_| {
            let (cache, inside, rounds) = (cache.clone(), inside.clone(), rounds.clone());
            tokio::spawn(async move {
                for _ in 0..5 {
                    let lock = cache
                        .lock(&fingerprint(), &Progress::silent())
                        .await
                        .unwrap();
                    assert_eq!(
                        inside.fetch_add(1, Ordering::SeqCst),
                        0,
                        "two builders at once"
                    );
                    tokio::task::yield_now().await;
                    inside.fetch_sub(1, Ordering::SeqCst);
                    rounds.fetch_add(1, Ordering::SeqCst);
                    drop(lock);
                }
            })
        });
        for builder in builders.collect::<Vec<_>>() {
            builder.await.unwrap();
        }
        assert_eq!(rounds.load(Ordering::SeqCst), 40);
        assert_eq!(
            fs_err::read_dir(cache.path("")).unwrap().count(),
            0,
            "no lock file is left"
        );
    }

    #[tokio::test]
    async fn a_draft_is_published_whole_or_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::open(root.path(), "things").unwrap();
        let lock = cache
            .lock(&fingerprint(), &Progress::silent())
            .await
            .unwrap();
        let draft = cache.draft(&lock, "").unwrap();
        fs_err::create_dir(draft.path()).unwrap();
        fs_err::write(draft.path().join("part"), "x").unwrap();
        drop(draft);
        let left: Vec<_> = fs_err::read_dir(cache.path("")).unwrap().collect();
        assert_eq!(left.len(), 1, "only the lock: {left:?}");

        let draft = cache.draft(&lock, "").unwrap();
        drop(lock);
        assert!(cache.path(&lock_name()).exists(), "a draft keeps the lock");
        fs_err::write(draft.path(), "whole").unwrap();
        draft.publish(&cache.path("final")).unwrap();
        assert_eq!(
            fs_err::read_to_string(cache.path("final")).unwrap(),
            "whole"
        );
        assert_eq!(fs_err::read_dir(cache.path("")).unwrap().count(), 1);
    }

    #[test]
    fn pruning_keeps_the_most_recently_used() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::open(root.path(), "things").unwrap();
        for (age, stem) in ["new", "middle", "old"].iter().enumerate() {
            for suffix in [".img", ".json"] {
                let file = fs_err::File::create(cache.path(&format!("{stem}{suffix}"))).unwrap();
                let used = SystemTime::now() - Duration::from_secs(1000 * (age as u64 + 1));
                file.file().set_modified(used).unwrap();
            }
        }
        cache.touch("old.img");
        cache.prune(".img", 2).unwrap();
        let exists = |name: &str| cache.path(name).exists();
        assert!(exists("old.img") && exists("old.json") && exists("new.img") && exists("new.json"));
        assert!(!exists("middle.img") && !exists("middle.json"));
    }
}
