//! `cubicle sandbox cp`: files and directories, into a sandbox or out of it.

use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio_util::io::ReaderStream;

use crate::{
    client::{Client, SandboxRef},
    error::Error,
};

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    Here(PathBuf),
    There { sandbox: String, path: String },
}

/// `<sandbox>:<path>` is there; anything with a slash before its colon is a file of ours.
fn side(text: &str) -> Side {
    match text.split_once(':') {
        Some((sandbox, path)) if !sandbox.is_empty() && !sandbox.contains('/') => Side::There {
            sandbox: sandbox.to_owned(),
            path: path.to_owned(),
        },
        _ => Side::Here(text.into()),
    }
}

/// Copies; returns how many files and bytes.
pub(crate) async fn copy(
    client: &Client,
    source: &str,
    destination: &str,
    user: Option<String>,
) -> Result<(u64, u64), Error> {
    match (side(source), side(destination)) {
        (Side::Here(from), Side::There { sandbox, path }) => {
            let sandbox = client.sandbox(&sandbox, user).await?;
            upload(client, &sandbox, &from, &path).await
        }
        (Side::There { sandbox, path }, Side::Here(to)) => {
            let sandbox = client.sandbox(&sandbox, user).await?;
            download(client, &sandbox, &path, &to).await
        }
        _ => Err(Error::Usage(
            "exactly one side must be in a sandbox: <sandbox>:<path>".to_owned(),
        )),
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

async fn upload(
    client: &Client,
    sandbox: &SandboxRef,
    from: &Path,
    to: &str,
) -> Result<(u64, u64), Error> {
    let files = walk(from)?;
    let bar = progress();
    let mut bytes = 0;
    let own_name = from
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
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
        client.write_file(sandbox, &target, content).await?;
    }
    bar.finish_and_clear();
    Ok((files.len() as u64, bytes))
}

async fn download(
    client: &Client,
    sandbox: &SandboxRef,
    from: &str,
    to: &Path,
) -> Result<(u64, u64), Error> {
    let stat = client
        .unary(
            sandbox,
            "filesystem.Filesystem/Stat",
            &json!({ "path": from }),
        )
        .await?;
    let bar = progress();
    let mut bytes = 0;
    let mut count = 0;
    let root = text(&stat["entry"], "path");
    let mut todo = vec![(root.clone(), is_directory(&stat["entry"]))];
    let target_is_dir = to.is_dir();
    while let Some((path, directory)) = todo.pop() {
        if directory {
            let list = client
                .unary(
                    sandbox,
                    "filesystem.Filesystem/ListDir",
                    &json!({ "path": path }),
                )
                .await?;
            for entry in list["entries"].as_array().into_iter().flatten() {
                todo.push((text(entry, "path"), is_directory(entry)));
            }
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
                return Err(Error::Usage(format!("the sandbox named a file {below:?}")));
            }
            (below, _) => to.join(below),
        };
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent).map_err(file_error("make", parent))?;
        }
        bar.set_message(target.display().to_string());
        let mut response = client.read_file(sandbox, &path).await?;
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
    Ok((count, bytes))
}

fn text(entry: &Value, field: &str) -> String {
    entry[field].as_str().unwrap_or_default().to_owned()
}

fn is_directory(entry: &Value) -> bool {
    entry["type"] == "FILE_TYPE_DIRECTORY"
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
                sandbox: "i0".into(),
                path: "x".into()
            }
        );
        assert_eq!(
            side("i0:"),
            Side::There {
                sandbox: "i0".into(),
                path: String::new()
            }
        );
    }
}
