//! Files that clients upload for the steps that copy them.
//!
//! Each archive is one file, named by a hash that the client chose. It appears whole, by a rename,
//! or not at all, and goes when nobody has used it for a week.

use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use cubicle_ids::TemplateId;
use futures::{Stream, StreamExt as _};
use subtle::ConstantTimeEq as _;
use time::OffsetDateTime;
use tokio::io::AsyncWriteExt as _;

use super::{FilesHash, Templates};
use crate::error::{Error, Result};

/// Beginning of the names of files that are not whole yet.
const INCOMING: &str = ".incoming-";
/// How long an archive is kept after it was last used.
const KEEP: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a client may take from asking where to upload until it does.
const TOKEN_LIFE: time::Duration = time::Duration::HOUR;

/// How templates are built.
#[derive(Debug, Clone)]
pub struct TemplateConfig {
    /// Directory of uploaded files; made if it is missing.
    pub files: PathBuf,
    /// Most bytes of one upload.
    pub files_limit: u64,
    /// How long one step of a build may take.
    pub step_within: Duration,
    /// How long what was started is left alone before it is frozen.
    pub settle: Duration,
    /// How long to wait between two looks at whether a template is ready.
    pub probe_every: Duration,
}

impl TemplateConfig {
    /// Defaults, with the files beside the database.
    #[must_use]
    pub fn beside(database: &Path) -> Self {
        Self {
            files: database.with_file_name("build-files"),
            files_limit: 16 << 30,
            step_within: Duration::from_secs(3600),
            settle: Duration::from_secs(3),
            probe_every: Duration::from_millis(250),
        }
    }
}

/// Uploaded archives on disk.
#[derive(Debug)]
pub(super) struct Files {
    dir: PathBuf,
    limit: u64,
    /// Signs upload tokens; as old as the server.
    secret: [u8; 32],
}

impl Files {
    /// Opens the directory and removes what is unfinished or long unused. Blocking, but short.
    pub(super) fn open(config: &TemplateConfig) -> Result<Self> {
        let dir = config.files.clone();
        std::fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
        for entry in std::fs::read_dir(&dir).map_err(Error::io("read", &dir))? {
            let entry = entry.map_err(Error::io("read", &dir))?;
            let unfinished = entry.file_name().to_string_lossy().starts_with(INCOMING);
            let used = entry.metadata().and_then(|meta| meta.modified());
            let unused = used.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > KEEP));
            if unfinished || unused {
                let path = entry.path();
                std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
        }
        Ok(Self {
            dir,
            limit: config.files_limit,
            secret: rand::random(),
        })
    }

    /// Where an archive is, whether or not it is there.
    fn path(&self, hash: &FilesHash) -> PathBuf {
        self.dir.join(hash.as_str())
    }

    /// The archive, if it is there; it stays for another while.
    pub(super) async fn find(&self, hash: &FilesHash) -> Result<Option<PathBuf>> {
        let path = self.path(hash);
        let touched = tokio::task::spawn_blocking({
            let path = path.clone();
            move || std::fs::File::open(path)?.set_modified(SystemTime::now())
        });
        match touched.await.map_err(|_| Error::ShuttingDown)? {
            Ok(()) => Ok(Some(path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("open", path)(error)),
        }
    }

    async fn put(
        &self,
        hash: &FilesHash,
        body: impl Stream<Item = io::Result<Bytes>> + Send,
    ) -> Result<()> {
        let incoming = Incoming(self.dir.join(format!("{INCOMING}{}", uuid::Uuid::new_v4())));
        let failed = |error| Error::io("write", &incoming.0)(error);
        let mut file = tokio::fs::File::create(&incoming.0).await.map_err(failed)?;
        let (mut body, mut written) = (std::pin::pin!(body), 0);
        while let Some(chunk) = body.next().await {
            let chunk =
                chunk.map_err(|error| Error::invalid("body", format!("it broke off: {error}")))?;
            written += chunk.len() as u64;
            if written > self.limit {
                let why = format!("more than {} MiB", self.limit >> 20);
                return Err(Error::invalid("body", why));
            }
            file.write_all(&chunk).await.map_err(failed)?;
        }
        file.flush().await.map_err(failed)?;
        let path = self.path(hash);
        let renamed = tokio::fs::rename(&incoming.0, &path).await;
        renamed.map_err(Error::io("write", path))
    }

    fn sign(&self, template: &TemplateId, hash: &FilesHash, expires: i64) -> String {
        let message = format!("{template}/{hash}/{expires}");
        let signature = blake3::keyed_hash(&self.secret, message.as_bytes());
        format!("{expires}.{}", signature.to_hex())
    }
}

/// A file that is removed unless it was renamed.
struct Incoming(PathBuf);

impl Drop for Incoming {
    fn drop(&mut self) {
        match std::fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.0.display(), %error, "an unfinished upload stays");
            }
            _ => {}
        }
    }
}

impl Templates {
    /// Whether an archive was uploaded.
    pub async fn has_files(&self, hash: &FilesHash) -> Result<bool> {
        Ok(self.files.find(hash).await?.is_some())
    }

    /// Stores an archive: a tar file, with or without gzip.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is too long or breaks off; nothing of it is kept.
    pub async fn put_files(
        &self,
        hash: &FilesHash,
        body: impl Stream<Item = io::Result<Bytes>> + Send,
    ) -> Result<()> {
        self.files.put(hash, body).await
    }

    /// What lets a client upload this archive for this template, for an hour, without a key.
    #[must_use]
    pub fn upload_token(&self, template: &TemplateId, hash: &FilesHash) -> String {
        let expires = OffsetDateTime::now_utc() + TOKEN_LIFE;
        self.files.sign(template, hash, expires.unix_timestamp())
    }

    /// Whether a token was made for that and holds.
    #[must_use]
    pub fn check_upload_token(&self, template: &TemplateId, hash: &FilesHash, token: &str) -> bool {
        let Some(expires) = token.split('.').next().and_then(|t| t.parse().ok()) else {
            return false;
        };
        let right = self.files.sign(template, hash, expires);
        expires >= OffsetDateTime::now_utc().unix_timestamp()
            && bool::from(right.as_bytes().ct_eq(token.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path, limit: u64) -> Files {
        let config = TemplateConfig {
            files_limit: limit,
            ..TemplateConfig::beside(&dir.join("db"))
        };
        Files::open(&config).expect("open")
    }

    fn body(chunks: &[&'static str]) -> impl Stream<Item = io::Result<Bytes>> + Send + use<> {
        let chunks: Vec<_> = chunks
            .iter()
            .map(|c| Ok(Bytes::from_static(c.as_bytes())))
            .collect();
        futures::stream::iter(chunks)
    }

    #[tokio::test]
    async fn an_archive_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().expect("tempdir");
        let files = open(dir.path(), 8);
        let hash: FilesHash = "a".repeat(64).parse().expect("hash");
        assert_eq!(files.find(&hash).await.expect("find"), None);
        let long = files.put(&hash, body(&["12345", "6789"])).await;
        assert!(matches!(long, Err(Error::Invalid { field: "body", .. })));
        let broken = body(&["1"]).chain(futures::stream::iter([Err(io::Error::other("gone"))]));
        assert!(files.put(&hash, broken).await.is_err());
        let left = || std::fs::read_dir(&files.dir).expect("dir").count();
        assert_eq!((files.find(&hash).await.expect("find"), left()), (None, 0));

        files
            .put(&hash, body(&["1234", "5678"]))
            .await
            .expect("put");
        files.put(&hash, body(&["87654321"])).await.expect("again");
        let path = files.find(&hash).await.expect("find").expect("there");
        assert_eq!(std::fs::read(path).expect("read"), b"87654321");
        assert_eq!(left(), 1);
        std::fs::write(files.dir.join(".incoming-x"), "half").expect("half");
        drop(files);
        let files = open(dir.path(), 8);
        assert_eq!(std::fs::read_dir(&files.dir).expect("dir").count(), 1);
        assert!(files.find(&hash).await.expect("find").is_some());
    }

    #[test]
    fn a_signature_is_for_one_thing() {
        let dir = tempfile::tempdir().expect("tempdir");
        let files = open(dir.path(), 8);
        let (one, other) = (TemplateId::generate(), TemplateId::generate());
        let hash: FilesHash = "b".repeat(64).parse().expect("hash");
        assert_eq!(files.sign(&one, &hash, 7), files.sign(&one, &hash, 7));
        assert_ne!(files.sign(&one, &hash, 7), files.sign(&other, &hash, 7));
        assert_ne!(files.sign(&one, &hash, 7), files.sign(&one, &hash, 8));
    }
}
