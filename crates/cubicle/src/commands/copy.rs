//! `cubicle sandbox cp` and `cubicle volume cp`: files and directories, to the other end or from there.

use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::io::AsyncWriteExt as _;
use tokio_util::io::ReaderStream;

use crate::{
    client::{Client, remote::Remote},
    error::Error,
    output,
};

/// What is at the other end.
pub(crate) enum End {
    /// A sandbox; whose files they are in it.
    Sandbox {
        user: Option<String>,
    },
    Volume,
}

/// What was copied.
#[derive(Debug, Serialize)]
pub(crate) struct Copied {
    files: u64,
    bytes: u64,
}

impl Copied {
    /// Tells programs; a person sees that nothing went wrong.
    pub(crate) fn print(&self, json: bool) {
        if json {
            output::print_json(self);
        }
    }
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    Here(PathBuf),
    There { name: String, path: String },
}

/// `<name>:<path>` is there; anything with a slash before its colon is a file of ours.
fn side(text: &str) -> Side {
    match text.split_once(':') {
        Some((name, path)) if !name.is_empty() && !name.contains('/') => Side::There {
            name: name.to_owned(),
            path: path.to_owned(),
        },
        _ => Side::Here(text.into()),
    }
}

/// Copies, in place of what is there.
pub(crate) async fn copy(
    client: &Client,
    end: End,
    source: &str,
    destination: &str,
) -> Result<Copied, Error> {
    match (side(source), side(destination)) {
        (Side::Here(from), Side::There { name, path }) => {
            let remote = end.open(client, &name).await?;
            upload(client, &remote, &from, &path).await
        }
        (Side::There { name, path }, Side::Here(to)) => {
            let remote = end.open(client, &name).await?;
            download(client, &remote, &path, &to).await
        }
        _ => Err(Error::Usage(end.one_side().to_owned())),
    }
}

impl End {
    async fn open(self, client: &Client, name: &str) -> Result<Remote, Error> {
        match self {
            Self::Sandbox { user } => Ok(Remote::Sandbox(client.sandbox(name, user).await?)),
            Self::Volume => Ok(Remote::Volume(client.volume(name).await?)),
        }
    }

    fn one_side(&self) -> &'static str {
        match self {
            Self::Sandbox { .. } => "exactly one side must be in a sandbox: <sandbox>:<path>",
            Self::Volume => "exactly one side must be in a volume: <volume>:<path>",
        }
    }
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File {
        action,
        path,
        source,
    }
}

fn progress() -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {bytes} ({bytes_per_sec}) {msg}");
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar
}

/// All files below a path with their names relative to it; the path itself if it is a file.
fn walk(root: &Path) -> Result<Vec<(PathBuf, String)>, Error> {
    let metadata = std::fs::metadata(root).map_err(file_error("read", root))?;
    if !metadata.is_dir() {
        return Ok(vec![(root.to_owned(), String::new())]);
    }
    let mut files = Vec::new();
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).map_err(file_error("list", &dir))? {
            let path = entry.map_err(file_error("list", &dir))?.path();
            let kind = std::fs::symlink_metadata(&path).map_err(file_error("read", &path))?;
            if kind.is_dir() {
                todo.push(path);
            } else if kind.is_file() {
                let below = path.strip_prefix(root).unwrap_or(&path);
                let name = below.to_str().ok_or_else(|| {
                    Error::Usage(format!("the name of {} is not UTF-8", path.display()))
                })?;
                files.push((path.clone(), name.to_owned()));
            }
        }
    }
    files.sort();
    Ok(files)
}

async fn upload(client: &Client, remote: &Remote, from: &Path, to: &str) -> Result<Copied, Error> {
    let files = walk(from)?;
    let bar = progress();
    let mut bytes = 0;
    let own_name = from
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    let mut room = None;
    for (path, below) in &files {
        let target = if below.is_empty() {
            // Into a directory, under its own name: as cp does.
            if to.is_empty() || to.ends_with('/') {
                format!("{to}{}", own_name.clone().unwrap_or_default())
            } else {
                to.to_owned()
            }
        } else {
            format!("{}/{below}", to.trim_end_matches('/'))
        };
        let directory = target.rsplit_once('/').map(|(directory, _)| directory);
        if let Some(directory) = directory.filter(|directory| !directory.is_empty())
            && room.as_deref() != Some(directory)
        {
            remote.make_room(client, directory).await?;
            room = Some(directory.to_owned());
        }
        bar.set_message(target.clone());
        let file = tokio::fs::File::open(path)
            .await
            .map_err(file_error("read", path))?;
        bytes += file
            .metadata()
            .await
            .map_err(file_error("read", path))?
            .len();
        let counted = bar.wrap_async_read(file);
        let content = reqwest::Body::wrap_stream(ReaderStream::with_capacity(counted, 256 * 1024));
        remote.write(client, &target, content).await?;
    }
    bar.finish_and_clear();
    Ok(Copied {
        files: files.len() as u64,
        bytes,
    })
}

async fn download(
    client: &Client,
    remote: &Remote,
    from: &str,
    to: &Path,
) -> Result<Copied, Error> {
    let top = remote.stat(client, from).await?;
    let bar = progress();
    let mut bytes = 0;
    let mut count = 0;
    let root = top.path.clone();
    let mut todo = vec![top];
    let target_is_dir = to.is_dir();
    while let Some(entry) = todo.pop() {
        let path = entry.path;
        if entry.is_directory {
            todo.extend(remote.list(client, &path).await?);
            continue;
        }
        let below = path
            .strip_prefix(&root)
            .unwrap_or(&path)
            .trim_start_matches('/');
        let target = match (below, target_is_dir) {
            ("", true) => to.join(path.rsplit('/').next().unwrap_or("file")),
            ("", false) => to.to_owned(),
            (below, _) if below.split('/').any(|part| part == "..") => {
                return Err(Error::Usage(format!("a file there is called {below:?}")));
            }
            (below, _) => to.join(below),
        };
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent).map_err(file_error("make", parent))?;
        }
        bar.set_message(target.display().to_string());
        let mut response = remote.read(client, &path).await?;
        let mut file = tokio::fs::File::create(&target)
            .await
            .map_err(file_error("write", &target))?;
        while let Some(chunk) = response.chunk().await.map_err(|source| Error::Transport {
            what: path.clone(),
            source,
        })? {
            file.write_all(&chunk)
                .await
                .map_err(file_error("write", &target))?;
            bar.inc(chunk.len() as u64);
            bytes += chunk.len() as u64;
        }
        file.flush().await.map_err(file_error("write", &target))?;
        count += 1;
    }
    bar.finish_and_clear();
    Ok(Copied {
        files: count,
        bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides() {
        assert_eq!(side("./a:b"), Side::Here("./a:b".into()));
        assert_eq!(side("notes.txt"), Side::Here("notes.txt".into()));
        assert_eq!(
            side("i0:x"),
            Side::There {
                name: "i0".into(),
                path: "x".into()
            }
        );
        assert_eq!(
            side("i0:"),
            Side::There {
                name: "i0".into(),
                path: String::new()
            }
        );
    }
}
