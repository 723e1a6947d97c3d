//! What a Dockerfile's COPY does, case by case.

use std::os::unix::fs::MetadataExt as _;

use super::*;

/// A directory to copy into, and what is copied.
struct Scene {
    root: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        Self {
            root: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn copy(&self, files: &[(&str, &str)], src: &str, dest: &str) -> io::Result<()> {
        self.copy_as(files, src, dest, None)
    }

    fn copy_as(
        &self,
        files: &[(&str, &str)],
        src: &str,
        dest: &str,
        mode: Option<u32>,
    ) -> io::Result<()> {
        let query = CopyQuery {
            src: src.into(),
            dest: format!("{}/{dest}", self.root.path().display()),
            owner: "root".into(),
            mode,
        };
        let ids = (rustix::process::getuid(), rustix::process::getgid());
        let placer = Placer::new(&query, (ids.0.as_raw(), ids.1.as_raw()));
        let placer = placer.map_err(io::Error::other)?;
        placer.place(Archive::new(&archive(files)[..]))
    }

    /// Every file with its content, directories with a slash.
    fn tree(&self) -> Vec<String> {
        fn walk(dir: &Path, prefix: &str, out: &mut Vec<String>) {
            for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
                let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
                if entry.file_type().unwrap().is_dir() {
                    out.push(format!("{name}/"));
                    walk(&entry.path(), &format!("{name}/"), out);
                } else {
                    let content = fs::read_to_string(entry.path()).unwrap_or("?".into());
                    out.push(format!("{name}={content}"));
                }
            }
        }
        let mut out = Vec::new();
        walk(self.root.path(), "", &mut out);
        out.sort();
        out
    }
}

/// A name with a slash at its end is a directory, content with an arrow a link.
fn archive(files: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(if name.ends_with('/') { 0o750 } else { 0o640 });
        header.set_mtime(1_000_000);
        header.set_size(0);
        if name.ends_with('/') {
            header.set_entry_type(EntryType::Directory);
            builder.append_data(&mut header, name, io::empty()).unwrap();
        } else if let Some(to) = content.strip_prefix("-> ") {
            header = tar::Header::new_gnu();
            header.set_size(0);
            header.set_entry_type(EntryType::Symlink);
            builder.append_link(&mut header, name, to).unwrap();
        } else if let Some(to) = content.strip_prefix("=> ") {
            header.set_entry_type(EntryType::Link);
            builder.append_link(&mut header, name, to).unwrap();
        } else {
            header.set_size(content.len() as u64);
            builder
                .append_data(&mut header, name, content.as_bytes())
                .unwrap();
        }
    }
    builder.into_inner().unwrap()
}

#[test]
fn a_file_takes_the_name_of_its_destination_or_goes_into_it() {
    let file = [("app/main.py", "1")];
    for (dest, wanted) in [
        ("run.py", vec!["run.py=1"]),
        (
            "new/deep/run.py",
            vec!["new/", "new/deep/", "new/deep/run.py=1"],
        ),
        ("new/", vec!["new/", "new/main.py=1"]),
    ] {
        let scene = Scene::new();
        scene.copy(&file, "app/main.py", dest).unwrap();
        assert_eq!(scene.tree(), wanted, "{dest}");
    }
    let scene = Scene::new();
    fs::create_dir(scene.path("there")).unwrap();
    scene.copy(&file, "./app/main.py", "there").unwrap();
    scene
        .copy(&[("app/main.py", "2")], "app/main.py", "there")
        .unwrap();
    assert_eq!(scene.tree(), ["there/", "there/main.py=2"], "replaced");
}

#[test]
fn of_a_directory_its_contents_are_copied() {
    let files = [
        ("src/", ""),
        ("src/a", "1"),
        ("src/lib/", ""),
        ("src/lib/b", "2"),
        ("other", "3"),
    ];
    for src in ["src", "src/", "./src"] {
        let scene = Scene::new();
        scene.copy(&files, src, "app").unwrap();
        assert_eq!(scene.tree(), ["app/", "app/a=1", "app/lib/", "app/lib/b=2"]);
    }
    let scene = Scene::new();
    scene.copy(&files, ".", "app").unwrap();
    assert_eq!(scene.tree().len(), 6);
    // Archives need not name directories.
    let scene = Scene::new();
    scene.copy(&[("src/lib/b", "2")], "src", "app").unwrap();
    assert_eq!(scene.tree(), ["app/", "app/lib/", "app/lib/b=2"]);
}

#[test]
fn wildcards_stand_for_whatever_there_is() {
    let two = [("docs/a.txt", "1"), ("docs/b.txt", "2")];
    let scene = Scene::new();
    scene.copy(&two, "docs/*.txt", "all").unwrap();
    assert_eq!(scene.tree(), ["all/", "all/a.txt=1", "all/b.txt=2"]);
    let scene = Scene::new();
    scene.copy(&two[..1], "docs/*.txt", "one").unwrap();
    assert_eq!(scene.tree(), ["one=1"]);
    let scene = Scene::new();
    let deep = [("docs/x/a.txt", "1"), ("docs/y/b.txt", "2")];
    scene.copy(&deep, "docs/**/*.txt", "all").unwrap();
    assert_eq!(
        scene.tree(),
        ["all/", "all/x/", "all/x/a.txt=1", "all/y/", "all/y/b.txt=2"]
    );
}

#[test]
fn owners_modes_times_and_links_arrive() {
    let scene = Scene::new();
    let files = [
        ("d/", ""),
        ("d/file", "1"),
        ("d/soft", "-> file"),
        ("d/hard", "=> d/file"),
        ("d/dangling", "-> /nowhere"),
    ];
    scene.copy(&files, "d", "app").unwrap();
    let meta = fs::metadata(scene.path("app/file")).unwrap();
    assert_eq!(
        (meta.mode() & 0o7777, meta.mtime(), meta.nlink()),
        (0o640, 1_000_000, 2)
    );
    assert_eq!(
        fs::read_link(scene.path("app/soft")).unwrap(),
        Path::new("file")
    );
    assert_eq!(
        fs::metadata(scene.path("app")).unwrap().mode() & 0o7777,
        0o750
    );
    scene.copy_as(&files, "d", "bin", Some(0o755)).unwrap();
    for path in ["bin", "bin/file"] {
        let mode = fs::metadata(scene.path(path)).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o755, "{path}");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let scene = Scene::new();
    let file = [("a", "1")];
    assert!(scene.copy(&file, "../a", "x").is_err());
    let missing = scene.copy(&file, "b", "x").unwrap_err();
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    fs::create_dir_all(scene.path("d/a")).unwrap();
    assert!(
        scene.copy(&file, "a", "d").is_err(),
        "a directory in its place"
    );
    assert_eq!(scene.tree(), ["d/", "d/a/"]);
}
