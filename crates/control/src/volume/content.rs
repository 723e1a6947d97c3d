//! The content of a volume, for who has its token: files that are read and written whole, without a
//! sandbox.

use std::{fs::File, io, pin::pin};

use bytes::Bytes;
use cubicle_protocol::share::RelativePath;
use cubicle_share::{Attributes, Contents, Item, Problem};
use futures::{Stream, StreamExt as _};
use subtle::ConstantTimeEq as _;

use super::{Volumes, directories};
use crate::error::{Error, Result};

/// One volume's content. It does not keep the volume from being deleted.
#[derive(Debug)]
pub struct Content {
    volumes: Volumes,
    volume: String,
}

impl Volumes {
    /// The content of a volume, for who has its token.
    ///
    /// # Errors
    /// [`Error::VolumeNotFound`]: no volume has this id; a name is none.
    /// [`Error::VolumeToken`].
    pub async fn content(&self, id: &str, token: &str) -> Result<Content> {
        let found = self.store.get(id).await?.filter(|volume| volume.id == id);
        let volume = found.ok_or_else(|| Error::VolumeNotFound {
            reference: id.to_owned(),
        })?;
        if !bool::from(volume.token.as_bytes().ct_eq(token.as_bytes())) {
            return Err(Error::VolumeToken { volume: volume.id });
        }
        Ok(Content {
            volumes: self.clone(),
            volume: volume.id,
        })
    }
}

/// Each of these fails with [`Error::Invalid`] for what is no path, and with [`Error::VolumePath`]
/// for what the volume has not, or has in the way. Paths are absolute, with the volume's top as `/`.
impl Content {
    /// What is at a path.
    pub async fn item(&self, path: &str) -> Result<Item> {
        let path = parse(path)?;
        self.work(&path, |contents, path| contents.item(path)).await
    }

    /// What is in a directory, and `depth - 1` levels below.
    pub async fn list(&self, path: &str, depth: u32) -> Result<Vec<Item>> {
        let path = parse(path)?;
        self.work(&path, move |contents, path| contents.list(path, depth))
            .await
    }

    /// Makes a directory; with `parents` those above it, too, and then it may be there already.
    pub async fn make_directory(
        &self,
        path: &str,
        attributes: Attributes,
        parents: bool,
    ) -> Result<Item> {
        let path = parse(path)?;
        self.work(&path, move |contents, path| {
            contents.make_directory(path, attributes, parents)
        })
        .await
    }

    /// Changes owner and mode.
    pub async fn change(&self, path: &str, attributes: Attributes) -> Result<Item> {
        let path = parse(path)?;
        self.work(&path, move |contents, path| {
            contents.change(path, attributes)
        })
        .await
    }

    /// Removes a file, or a directory with all that is in it: that is gone at once, and the space
    /// it took a while later.
    pub async fn remove(&self, path: &str) -> Result<()> {
        let path = parse(path)?;
        let trash = self.volumes.directories.trash();
        let to = trash.clone();
        let moved = self.work(&path, move |contents, path| contents.remove(path, &to));
        if moved.await? {
            directories::empty(trash);
        }
        Ok(())
    }

    /// Opens a file to read it; how many bytes it has.
    pub async fn read(&self, path: &str) -> Result<(File, u64)> {
        let path = parse(path)?;
        self.work(&path, |contents, path| {
            let file = contents.read(path)?;
            let len = file.metadata()?.len();
            Ok((file, len))
        })
        .await
    }

    /// Writes a file, which appears when all of `body` has come. With `replace` it takes the place of
    /// one that is there, and its owner and mode unless others are named.
    pub async fn write(
        &self,
        path: &str,
        attributes: Attributes,
        replace: bool,
        body: impl Stream<Item = io::Result<Bytes>> + Send,
    ) -> Result<Item> {
        let path = parse(path)?;
        let draft = self.volumes.directories.draft();
        let begin = self.work(&path, move |contents, path| {
            contents.write(path, attributes, replace, draft)
        });
        let mut upload = begin.await?;
        let mut body = pin!(body);
        while let Some(piece) = body.next().await {
            let broken = |error| Error::invalid("body", format!("it broke off: {error}"));
            let piece = piece.map_err(broken)?;
            let write = move || upload.write(&piece).map(|()| upload);
            upload = self.blocking(&path, write).await?;
        }
        self.blocking(&path, move || upload.finish()).await
    }

    async fn work<T: Send + 'static>(
        &self,
        path: &RelativePath,
        work: impl FnOnce(&Contents, &RelativePath) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T> {
        let root = self.volumes.directories.path(&self.volume);
        let asked = path.clone();
        self.blocking(path, move || work(&Contents::open(&root)?, &asked))
            .await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        path: &RelativePath,
        work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
    ) -> Result<T> {
        let done = tokio::task::spawn_blocking(work).await;
        let done = done.unwrap_or_else(|panic| Err(Problem::Other(io::Error::other(panic))));
        done.map_err(|problem| Error::VolumePath {
            volume: self.volume.clone(),
            path: path.clone(),
            problem,
        })
    }
}

/// A path as clients write it: absolute or not, with or without a slash at its end.
fn parse(text: &str) -> Result<RelativePath> {
    let names = text.split('/').filter(|name| !matches!(*name, "" | "."));
    let joined = names.collect::<Vec<_>>().join("/");
    RelativePath::new(joined.into_bytes()).map_err(|why| Error::invalid("path", why.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_as_clients_write_them() {
        for (text, path) in [
            ("/", ""),
            ("", ""),
            ("/a/b", "a/b"),
            ("a//./b/", "a/b"),
            ("/ü x", "ü x"),
        ] {
            assert_eq!(parse(text).expect(text).to_string(), path);
        }
        let long = "x".repeat(300);
        for bad in ["..", "/a/../b", "a\0b", &long] {
            assert!(matches!(parse(bad), Err(Error::Invalid { .. })), "{bad}");
        }
    }
}
