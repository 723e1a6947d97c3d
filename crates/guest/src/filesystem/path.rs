//! Which file a request means.

use std::{
    fs::DirBuilder,
    io,
    os::unix::fs::{DirBuilderExt as _, chown},
    path::{Component, Path, PathBuf},
};

use crate::access::{Settings, User};

/// Why a request's path means no file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PathError {
    /// `~name` for any name.
    #[error("cannot resolve path '{0}': only '~' of the user itself is understood")]
    ForeignHome(String),
    /// No file can have that name.
    #[error("cannot resolve path {0:?}: it contains a NUL character")]
    Nul(String),
}

/// The absolute path that `path` means to `user`: `~` and relative paths start at the user's home,
/// an empty one is the sandbox's working directory, or the home if it has none.
///
/// `.` and doubled slashes are dropped; `..` of relative paths is resolved by its letters, that of
/// absolute ones is left to the kernel.
///
/// # Errors
/// [`PathError`].
pub fn resolve(path: &str, user: &User, settings: &Settings) -> Result<PathBuf, PathError> {
    if path.contains('\0') {
        return Err(PathError::Nul(path.to_owned()));
    }
    let workdir = settings.default_workdir.as_deref().unwrap_or(Path::new(""));
    let path = if path.is_empty() {
        workdir
    } else {
        Path::new(path)
    };
    let relative = match path.strip_prefix("~") {
        Ok(rest) => rest,
        Err(_) if path.as_os_str().as_encoded_bytes().starts_with(b"~") => {
            return Err(PathError::ForeignHome(path.display().to_string()));
        }
        Err(_) if path.is_absolute() => return Ok(path.components().collect()),
        Err(_) => path,
    };
    let mut resolved = PathBuf::from("/");
    for component in user.home.join(relative).components() {
        match component {
            Component::Normal(name) => resolved.push(name),
            Component::ParentDir => drop(resolved.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Ok(resolved)
}

/// Makes the missing directories of an absolute path and gives them to `user`.
///
/// # Errors
/// Whatever `stat`, `mkdir` and `chown` say; `ENOTDIR` if something else is in the way.
pub fn ensure_directories(path: &Path, user: &User) -> io::Result<()> {
    let mut missing = Vec::new();
    for directory in path.ancestors() {
        match std::fs::metadata(directory) {
            Ok(found) if found.is_dir() => break,
            Ok(_) => return Err(rustix::io::Errno::NOTDIR.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(directory),
            Err(error) => return Err(error),
        }
    }
    for directory in missing.into_iter().rev() {
        match DirBuilder::new().mode(0o755).create(directory) {
            Ok(()) => {}
            // Somebody was faster; they may not have given it away yet.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && directory.is_dir() => {}
            Err(error) => return Err(error),
        }
        chown(directory, Some(user.uid), Some(user.gid))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> User {
        User {
            name: "user".to_owned(),
            uid: 1000,
            gid: 1000,
            home: PathBuf::from("/home/user"),
            shell: PathBuf::from("/bin/bash"),
        }
    }

    #[test]
    fn paths_start_at_home_or_at_the_root() {
        let settings = Settings::default();
        for (path, want) in [
            ("", "/home/user"),
            ("a.txt", "/home/user/a.txt"),
            ("./a//b/", "/home/user/a/b"),
            ("../x", "/home/x"),
            ("../../../../x", "/x"),
            ("~", "/home/user"),
            ("~/", "/home/user"),
            ("~/a/../b", "/home/user/b"),
            ("a/~", "/home/user/a/~"),
            ("/", "/"),
            ("//tmp/./a/", "/tmp/a"),
            ("/tmp/../a", "/tmp/../a"),
        ] {
            assert_eq!(
                resolve(path, &user(), &settings).unwrap(),
                Path::new(want),
                "{path:?}"
            );
        }
    }

    #[test]
    fn an_empty_path_is_the_working_directory() {
        let resolve = |workdir: &str| {
            let settings = Settings {
                default_workdir: Some(PathBuf::from(workdir)),
                ..Settings::default()
            };
            (
                resolve("", &user(), &settings).unwrap(),
                resolve("a", &user(), &settings).unwrap(),
            )
        };
        for (workdir, want) in [
            ("/srv", "/srv"),
            ("code", "/home/user/code"),
            ("~", "/home/user"),
        ] {
            assert_eq!(resolve(workdir).0, Path::new(want));
            assert_eq!(resolve(workdir).1, Path::new("/home/user/a"));
        }
    }

    #[test]
    fn some_paths_mean_nothing() {
        let resolve = |path| resolve(path, &user(), &Settings::default());
        assert_eq!(
            resolve("~root/x"),
            Err(PathError::ForeignHome("~root/x".to_owned()))
        );
        assert_eq!(resolve("a\0b"), Err(PathError::Nul("a\0b".to_owned())));
    }
}
