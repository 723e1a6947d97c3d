//! The files that a `COPY` means, their fingerprint, and the archive that takes them to the server.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

use super::{
    Copy, Problem,
    ignored::{self, Ignored},
};
use crate::error::Error;

/// Directory in an archive whose contents are copied.
const TOP: &str = "files";

/// The directory that a Dockerfile's `COPY`s take their files from.
#[derive(Debug)]
pub(crate) struct Context {
    root: PathBuf,
    ignored: Ignored,
}

/// The files of one `COPY`.
#[derive(Debug)]
pub(crate) struct Files {
    /// SHA-256 of their names, permissions and contents, in hex.
    pub(crate) hash: String,
    /// What is to be copied from the archive: a file, or a directory whose contents are meant.
    pub(crate) source: String,
    /// How many files there are.
    pub(crate) count: usize,
    /// Their size in bytes.
    pub(crate) bytes: u64,
    entries: Vec<Entry>,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    /// Path in the archive.
    name: PathBuf,
    path: PathBuf,
    mode: u32,
    modified: u64,
    kind: Kind,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Directory,
    File { size: u64 },
    Link { to: PathBuf },
}

impl Context {
    /// The context in a directory. What is left out of it is said by `<Dockerfile>.dockerignore`,
    /// or else by `.dockerignore`.
    pub(crate) fn open(root: &Path, dockerfile: &Path) -> Result<Self, Error> {
        let root = root
            .canonicalize()
            .map_err(cannot("open the build context", root))?;
        let mut own = dockerfile.as_os_str().to_owned();
        own.push(".dockerignore");
        let mut ignored = Ignored::default();
        for path in [PathBuf::from(own), root.join(".dockerignore")] {
            match fs::read_to_string(&path) {
                Ok(text) => {
                    ignored = Ignored::parse(&text)
                        .map_err(|why| Error::Usage(format!("{}: {why}", path.display())))?;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(cannot("read", &path)(error)),
            }
        }
        Ok(Self { root, ignored })
    }

    /// Finds and reads the files that a `COPY` on this line means.
    pub(crate) fn files(&self, line: usize, copy: &Copy) -> Result<Files, Problem> {
        let problem = |message: String| Problem { line, message };
        let broken = |path: &Path, error: io::Error| {
            problem(format!("cannot read {}: {error}", path.display()))
        };
        let mut sources = Vec::new();
        for source in &copy.sources {
            let found = self.find(source).map_err(problem)?;
            if found.is_empty() {
                return Err(problem(format!(
                    "COPY {source}: there is no such file in {}, or .dockerignore leaves it out",
                    self.root.display()
                )));
            }
            sources.extend(found);
        }
        let into_directory = copy.dest.ends_with('/')
            || matches!(copy.dest.as_str(), "." | "..")
            || copy.dest.ends_with("/.");
        let single = match sources.as_slice() {
            [one] if !into_directory && !self.root.join(one).is_dir() => Some(one.clone()),
            _ => None,
        };
        if single.is_none() && sources.len() > 1 && !into_directory {
            return Err(problem(format!(
                "COPY of several files to {}: write it with a slash at its end, as a directory",
                copy.dest
            )));
        }
        let mut entries = Vec::new();
        for source in &sources {
            let path = self.root.join(source);
            let name = match (source.file_name(), single.is_some(), path.is_dir()) {
                (Some(name), true, _) => PathBuf::from(name),
                (Some(name), false, false) => Path::new(TOP).join(name),
                _ => PathBuf::from(TOP),
            };
            self.collect(source, &name, true, &mut entries)
                .map_err(|(path, error)| broken(&path, error))?;
        }
        entries.sort();
        entries.dedup_by(|a, b| a.name == b.name);
        let hash = hash(&entries).map_err(|(path, error)| broken(&path, error))?;
        let sizes = entries.iter().filter_map(|entry| match entry.kind {
            Kind::File { size } => Some(size),
            _ => None,
        });
        let source = single.as_deref().and_then(Path::file_name);
        Ok(Files {
            hash,
            source: source.map_or(TOP.into(), |name| name.to_string_lossy().into_owned()),
            count: sizes.clone().count(),
            bytes: sizes.sum(),
            entries,
        })
    }

    /// Paths, relative to the context, that a source means.
    fn find(&self, source: &str) -> Result<Vec<PathBuf>, String> {
        let outside = || format!("COPY {source}: that is outside of the build context");
        let relative = ignored::relative(source).ok_or_else(outside)?;
        if !ignored::has_wildcard(source) {
            let path = self.root.join(&relative);
            let Ok(real) = path.canonicalize() else {
                return Ok(Vec::new());
            };
            if !real.starts_with(&self.root) {
                return Err(outside());
            }
            // Of a directory that is left out, something may have been taken back in.
            let left_out = self.ignored.matches(&relative)
                && !(real.is_dir() && self.ignored.has_exceptions());
            return Ok(if left_out { Vec::new() } else { vec![relative] });
        }
        let pattern = relative.to_string_lossy();
        let matcher = ignored::glob(&pattern)
            .map_err(|why| format!("COPY {source}: {why}"))?
            .compile_matcher();
        let mut found = Vec::new();
        let mut open = vec![PathBuf::new()];
        while let Some(directory) = open.pop() {
            let path = self.root.join(&directory);
            let list = fs::read_dir(&path)
                .and_then(Iterator::collect::<io::Result<Vec<_>>>)
                .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
            for entry in list {
                let relative = directory.join(entry.file_name());
                let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
                let left_out = self.ignored.matches(&relative);
                if matcher.is_match(&relative) && !left_out {
                    found.push(relative);
                } else if is_directory && (!left_out || self.ignored.has_exceptions()) {
                    open.push(relative);
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// A file, or a directory with all in it. A link that is named itself is followed.
    fn collect(
        &self,
        relative: &Path,
        name: &Path,
        named: bool,
        entries: &mut Vec<Entry>,
    ) -> Result<(), (PathBuf, io::Error)> {
        let path = self.root.join(relative);
        let meta = if named {
            fs::metadata(&path)
        } else {
            fs::symlink_metadata(&path)
        };
        let meta = meta.map_err(|error| (path.clone(), error))?;
        let kind = if meta.is_dir() {
            Kind::Directory
        } else if meta.is_file() {
            Kind::File { size: meta.len() }
        } else if meta.is_symlink() {
            let to = fs::read_link(&path).map_err(|error| (path.clone(), error))?;
            Kind::Link { to }
        } else {
            let why = "it is no file, directory or link; name it in .dockerignore";
            return Err((path, io::Error::other(why)));
        };
        let directory = kind == Kind::Directory;
        if named || !self.ignored.matches(relative) {
            entries.push(Entry {
                name: name.to_owned(),
                path: path.clone(),
                mode: meta.mode() & 0o7777,
                modified: u64::try_from(meta.mtime()).unwrap_or(0),
                kind,
            });
        } else if !directory || !self.ignored.has_exceptions() {
            return Ok(());
        }
        if directory {
            let list = fs::read_dir(&path)
                .and_then(Iterator::collect::<io::Result<Vec<_>>>)
                .map_err(|error| (path, error))?;
            for entry in list {
                let file = entry.file_name();
                self.collect(&relative.join(&file), &name.join(&file), false, entries)?;
            }
        }
        Ok(())
    }
}

/// What is the same wherever and whenever it is computed: no times, no owners.
fn hash(entries: &[Entry]) -> Result<String, (PathBuf, io::Error)> {
    let mut hash = Sha256::new();
    let field = |hash: &mut Sha256, bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    let mut buffer = vec![0; 1 << 18];
    for entry in entries {
        field(&mut hash, entry.name.as_os_str().as_bytes());
        match &entry.kind {
            Kind::Directory => field(&mut hash, b"directory"),
            Kind::Link { to } => {
                field(&mut hash, b"link");
                field(&mut hash, to.as_os_str().as_bytes());
                // The permissions of a link mean nothing.
                continue;
            }
            Kind::File { size } => {
                field(&mut hash, b"file");
                hash.update(size.to_le_bytes());
                let mut content = || -> io::Result<()> {
                    let mut file = Exactly::open(&entry.path, *size)?;
                    loop {
                        match file.read(&mut buffer)? {
                            0 => return Ok(()),
                            n => hash.update(&buffer[..n]),
                        }
                    }
                };
                content().map_err(|error| (entry.path.clone(), error))?;
            }
        }
        hash.update(entry.mode.to_le_bytes());
    }
    let digest = hash.finalize();
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

impl Files {
    /// Writes the files as a tar archive. They belong to root in it.
    pub(crate) fn write_tar(&self, to: impl Write) -> io::Result<()> {
        let mut archive = tar::Builder::new(to);
        for entry in &self.entries {
            let mut header = tar::Header::new_gnu();
            header.set_mode(entry.mode);
            header.set_mtime(entry.modified);
            header.set_uid(0);
            header.set_gid(0);
            header.set_size(0);
            match &entry.kind {
                Kind::Directory => {
                    header.set_entry_type(tar::EntryType::Directory);
                    archive.append_data(&mut header, &entry.name, io::empty())?;
                }
                Kind::Link { to } => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    archive.append_link(&mut header, &entry.name, to)?;
                }
                Kind::File { size } => {
                    header.set_size(*size);
                    let file = Exactly::open(&entry.path, *size)?;
                    archive.append_data(&mut header, &entry.name, file)?;
                }
            }
        }
        archive.into_inner()?.flush()
    }
}

/// A file that has to have the size that it had.
struct Exactly {
    file: File,
    left: u64,
    name: PathBuf,
}

impl Exactly {
    fn open(path: &Path, size: u64) -> io::Result<Self> {
        Ok(Self {
            file: File::open(path)?,
            left: size,
            name: path.to_owned(),
        })
    }
}

impl Read for Exactly {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.file.read(&mut buffer[..wanted])?;
        if read == 0 && wanted > 0 {
            let name = self.name.file_name().unwrap_or(OsStr::new("?"));
            let message = format!(
                "{} became shorter while it was read",
                name.to_string_lossy()
            );
            return Err(io::Error::other(message));
        }
        self.left -= read as u64;
        Ok(read)
    }
}

fn cannot(action: &'static str, path: &Path) -> impl Fn(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File {
        action,
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn context() -> (tempfile::TempDir, Context) {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path();
        for (path, text) in [
            ("Dockerfile", "FROM x"),
            (".dockerignore", "*.log\nsrc/skip\n!src/skip/keep\n"),
            ("a.txt", "a"),
            ("b.txt", "bb"),
            ("x.log", "left out"),
            ("src/main.py", "print()"),
            ("src/skip/gone", "left out"),
            ("src/skip/keep", "kept"),
        ] {
            let path = root.join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("directory");
            fs::write(path, text).expect("file");
        }
        symlink("main.py", root.join("src/link")).expect("link");
        symlink("a.txt", root.join("to-a")).expect("link");
        symlink("/etc", root.join("out")).expect("link");
        let context = Context::open(root, &root.join("Dockerfile")).expect("context");
        (dir, context)
    }

    fn copy(sources: &[&str], dest: &str) -> Copy {
        Copy {
            sources: sources.iter().map(|&s| s.to_owned()).collect(),
            dest: dest.to_owned(),
            owner: None,
            mode: None,
        }
    }

    fn names(files: &Files) -> Vec<String> {
        let mut tar = Vec::new();
        files.write_tar(&mut tar).expect("archive");
        tar::Archive::new(tar.as_slice())
            .entries()
            .expect("entries")
            .map(|entry| {
                let entry = entry.expect("entry");
                let path = entry.path().expect("path").display().to_string();
                match entry.link_name().expect("link") {
                    Some(to) => format!("{path} -> {}", to.display()),
                    None => path,
                }
            })
            .collect()
    }

    #[test]
    fn a_file_a_directory_and_several() {
        let (_dir, context) = context();
        let files = |sources: &[&str], dest| context.files(1, &copy(sources, dest)).expect("files");

        let one = files(&["a.txt"], "/x/y");
        assert_eq!(
            (one.source.as_str(), names(&one)),
            ("a.txt", vec!["a.txt".into()])
        );
        assert_eq!((one.count, one.bytes), (1, 1));

        let into = files(&["./a.txt"], "/x/");
        assert_eq!(
            (into.source.as_str(), names(&into)),
            ("files", vec!["files/a.txt".into()])
        );

        let expected = [
            "files",
            "files/link -> main.py",
            "files/main.py",
            "files/skip/keep",
        ];
        assert_eq!(names(&files(&["src"], "/app")), expected, "its contents");

        let several = files(&["*.txt", "to-a"], "/x/");
        assert_eq!(
            names(&several),
            ["files/a.txt", "files/b.txt", "files/to-a"]
        );

        let all = names(&files(&["."], "."));
        assert!(all.contains(&"files/src/main.py".to_owned()), "{all:?}");
        assert!(
            !all.iter()
                .any(|name| name.contains("log") || name.contains("gone")),
            "{all:?}"
        );
    }

    #[test]
    fn what_cannot_be_copied_is_said_with_its_line() {
        let (_dir, context) = context();
        for (sources, dest, why) in [
            (&["none"][..], "/x", "there is no such file"),
            (&["*.none"], "/x", "there is no such file"),
            (&["x.log"], "/x", ".dockerignore leaves it out"),
            (&["../x"], "/x", "outside of the build context"),
            (&["out/passwd"], "/x", "outside of the build context"),
            (&["a.txt", "b.txt"], "/x", "with a slash at its end"),
        ] {
            let problem = match context.files(7, &copy(sources, dest)) {
                Err(problem) => problem.to_string(),
                Ok(files) => panic!("{sources:?}: {files:?}"),
            };
            assert!(
                problem.starts_with("line 7: ") && problem.contains(why),
                "{problem}"
            );
        }
    }

    #[test]
    fn the_hash_is_of_what_is_copied_and_of_nothing_else() {
        let (dir, context) = context();
        let hash = || context.files(1, &copy(&["src"], "/x")).expect("files").hash;
        let first = hash();
        assert_eq!(first.len(), 64);
        fs::write(dir.path().join("src/skip/gone"), "still left out").expect("file");
        let main = dir.path().join("src/main.py");
        fs::write(&main, "print()").expect("file");
        assert_eq!(hash(), first, "times do not matter");
        fs::set_permissions(&main, fs::Permissions::from_mode(0o755)).expect("mode");
        let second = hash();
        assert_ne!(second, first);
        fs::write(&main, "print(1)").expect("file");
        assert_ne!(hash(), second);
    }
}
