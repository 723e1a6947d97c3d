//! A tree of files as it is seen from outside of any sandbox.
#![allow(clippy::unwrap_used, reason = "tests may panic")]

use std::{
    fs,
    io::Read as _,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use cubicle_protocol::share::{Kind, RelativePath};
use cubicle_share::{Attributes, Contents, Item, Problem};

fn path(text: &str) -> RelativePath {
    RelativePath::new(text.as_bytes().to_vec()).unwrap()
}

const ANY: Attributes = Attributes {
    uid: None,
    gid: None,
    mode: None,
};

/// `tree/` is what is asked about; drafts and trash are beside it.
struct Stage {
    dir: tempfile::TempDir,
    contents: Contents,
}

impl Stage {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("tree")).unwrap();
        let contents = Contents::open(&dir.path().join("tree")).unwrap();
        Self { dir, contents }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, to: &str, text: &str, replace: bool) -> Result<Item, Problem> {
        let draft = self.at("draft");
        let mut upload = self.contents.write(&path(to), ANY, replace, draft)?;
        upload.write(text.as_bytes())?;
        upload.finish()
    }

    fn read(&self, from: &str) -> Result<String, Problem> {
        let mut text = String::new();
        let mut file = self.contents.read(&path(from))?;
        file.read_to_string(&mut text).unwrap();
        Ok(text)
    }

    fn names(&self, of: &str, depth: u32) -> Vec<String> {
        let items = self.contents.list(&path(of), depth).unwrap();
        items.iter().map(|item| item.path.to_string()).collect()
    }
}

#[test]
fn files_are_written_whole_read_listed_and_removed() {
    let stage = Stage::new();
    let contents = &stage.contents;
    contents.make_directory(&path("a/b/c"), ANY, true).unwrap();
    let made = stage.write("a/b/file", "one", false).unwrap();
    assert_eq!((made.kind, made.size, made.mode), (Kind::File, 3, 0o644));
    assert_eq!(contents.item(&path("a/b/file")).unwrap(), made);
    assert_eq!(stage.read("a/b/file").unwrap(), "one");
    symlink("b/file", stage.at("tree/a/link")).unwrap();
    let link = contents.item(&path("a/link")).unwrap();
    assert_eq!(link.target.as_deref(), Some(&b"b/file"[..]));

    assert_eq!(stage.names("", 1), ["a"]);
    assert_eq!(stage.names("a", 1), ["a/b", "a/link"]);
    assert_eq!(stage.names("a", 2), ["a/b", "a/b/c", "a/b/file", "a/link"]);
    assert_eq!(stage.names("", 9).len(), 5);

    assert!(!contents.remove(&path("a/link"), &stage.at("t")).unwrap());
    assert!(contents.remove(&path("a"), &stage.at("t")).unwrap());
    assert_eq!(fs::read(stage.at("t/b/file")).unwrap(), b"one");
    assert_eq!(stage.names("", 9), [""; 0]);
    let root = contents.item(&RelativePath::ROOT).unwrap();
    assert_eq!(root.kind, Kind::Directory);
}

#[test]
fn what_is_there_is_replaced_only_if_that_is_asked_for() {
    let stage = Stage::new();
    stage.write("file", "one", false).unwrap();
    let error = stage.write("file", "two", false).unwrap_err();
    assert!(matches!(error, Problem::Exists), "{error}");
    let own = Attributes {
        mode: Some(0o4751),
        ..ANY
    };
    let changed = stage.contents.change(&path("file"), own).unwrap();
    assert_eq!(changed.mode, 0o751, "no file runs as somebody else");
    let replaced = stage.write("file", "three", true).unwrap();
    assert_eq!((replaced.size, replaced.mode), (5, 0o751));

    // One that comes while another is being written.
    let draft = stage.at("draft");
    let mut late = stage
        .contents
        .write(&path("new"), ANY, false, draft.clone())
        .unwrap();
    late.write(b"late").unwrap();
    fs::write(stage.at("tree/new"), "early").unwrap();
    let error = late.finish().unwrap_err();
    assert!(matches!(error, Problem::Exists), "{error}");
    assert_eq!(stage.read("new").unwrap(), "early");
    assert!(!draft.exists(), "what was not finished is gone");

    let dropped = stage
        .contents
        .write(&path("never"), ANY, false, draft.clone());
    drop(dropped.unwrap());
    assert!(!draft.exists());
    assert_eq!(stage.names("", 1), ["file", "new"]);

    // A link is replaced, never written through.
    fs::write(stage.at("outside"), "secret").unwrap();
    symlink("../outside", stage.at("tree/link")).unwrap();
    stage.write("link", "mine", true).unwrap();
    assert_eq!(fs::read(stage.at("outside")).unwrap(), b"secret");
    assert_eq!(stage.read("link").unwrap(), "mine");
}

#[test]
fn owners_and_modes_are_as_asked() {
    let stage = Stage::new();
    // Only root can give files away.
    let root = fs::metadata(stage.dir.path()).unwrap().uid() == 0;
    let wanted = Attributes {
        uid: root.then_some(1234),
        gid: root.then_some(2345),
        mode: Some(0o640),
    };
    let draft = stage.at("draft");
    let upload = stage.contents.write(&path("file"), wanted, false, draft);
    let file = upload.unwrap().finish().unwrap();
    let directory = stage
        .contents
        .make_directory(&path("d/e"), wanted, true)
        .unwrap();
    stage.write("plain", "", false).unwrap();
    let plain = stage.contents.change(&path("plain"), wanted).unwrap();
    for item in [&file, &directory, &plain] {
        let there = fs::metadata(stage.at(&format!("tree/{}", item.path))).unwrap();
        assert_eq!(there.permissions().mode() & 0o7777, 0o640, "{item:?}");
        assert_eq!((item.uid, item.gid), (there.uid(), there.gid()));
        assert_eq!(item.mode, 0o640);
        if root {
            assert_eq!((item.uid, item.gid), (1234, 2345));
        }
    }
}

#[test]
fn problems_say_what_is_in_the_way() {
    let stage = Stage::new();
    let contents = &stage.contents;
    contents.make_directory(&path("d"), ANY, false).unwrap();
    stage.write("file", "", false).unwrap();
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        stage.at("tree/pipe"),
        rustix::fs::Mode::RWXU,
    )
    .unwrap();
    let trash = stage.at("trash");
    let root = RelativePath::ROOT;
    let make = |at: &str, parents| contents.make_directory(&path(at), ANY, parents).map(drop);
    let problems = [
        (stage.read("missing").map(drop), "not found"),
        (stage.write("no/file", "", true).map(drop), "not found"),
        (contents.remove(&path("no"), &trash).map(drop), "not found"),
        (contents.list(&path("no"), 1).map(drop), "not found"),
        (make("x/y", false), "not found"),
        (make("d", false), "exists already"),
        (make("file", true), "exists already"),
        (make("", false), "exists already"),
        (make("file/x/y", true), "is no directory"),
        (contents.list(&path("file"), 1).map(drop), "is no directory"),
        (stage.read("d").map(drop), "is a directory"),
        (stage.write("d", "", true).map(drop), "is a directory"),
        (stage.write("", "", true).map(drop), "is a directory"),
        (stage.read("pipe").map(drop), "is neither"),
        (contents.change(&path("pipe"), ANY).map(drop), "is neither"),
        (contents.remove(&root, &trash).map(drop), "is the root"),
    ];
    for (outcome, expected) in problems {
        let problem = outcome.expect_err(expected).to_string();
        assert!(problem.starts_with(expected), "{problem}, not {expected}");
    }
    make("d", true).unwrap();
    make("", true).unwrap();
    assert_eq!(stage.names("", 3), ["d", "file", "pipe"]);
}

/// Whatever is asked through a link that leads out, nothing outside is seen or changed.
#[test]
fn links_lead_nowhere() {
    let stage = Stage::new();
    let contents = &stage.contents;
    fs::create_dir(stage.at("outside")).unwrap();
    fs::write(stage.at("outside/secret"), "secret").unwrap();
    fs::create_dir(stage.at("tree/inner")).unwrap();
    let links = [
        ("absolute", stage.at("outside")),
        ("relative", PathBuf::from("../outside")),
        ("magic", PathBuf::from("/proc/self/cwd")),
        ("inside", PathBuf::from("inner")),
    ];
    for (name, target) in &links {
        symlink(target, stage.at("tree").join(name)).unwrap();
    }
    let before = fs::metadata(stage.at("outside/secret")).unwrap();
    for (name, _) in &links {
        let below = path(&format!("{name}/secret"));
        let new = path(&format!("{name}/new"));
        let wide = Attributes {
            mode: Some(0o777),
            ..ANY
        };
        let draft = stage.at("draft");
        let outcomes = [
            contents.item(&below).map(drop),
            contents.list(&path(name), 5).map(drop),
            contents.read(&below).map(drop),
            contents.change(&below, wide).map(drop),
            contents.remove(&below, &stage.at("trash")).map(drop),
            contents.make_directory(&new, ANY, true).map(drop),
            contents.write(&new, ANY, true, draft).map(drop),
        ];
        for outcome in outcomes {
            let problem = outcome.expect_err("led somewhere");
            assert!(
                matches!(problem, Problem::ThroughLink | Problem::NotADirectory),
                "{name}: {problem}"
            );
        }
    }
    assert_eq!(entries(&stage.at("outside")), ["secret"]);
    let after = fs::metadata(stage.at("outside/secret")).unwrap();
    assert_eq!(after.mode(), before.mode());
    assert_eq!(stage.names("", 9).len(), links.len() + 1);
}

fn entries(of: &Path) -> Vec<String> {
    let entries = fs::read_dir(of).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}
