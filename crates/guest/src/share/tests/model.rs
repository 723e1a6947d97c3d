//! Random operations on a share and on a plain directory have the same results, whatever becomes of
//! the channel meanwhile.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use cubicle_share::Access;
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

use super::Rig;

/// Few names, so that operations meet.
fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec(prop_oneof![Just("a"), Just("b"), Just("c")], 1..4)
        .prop_map(|names| names.join("/"))
}

#[derive(Debug, Clone)]
enum Step {
    Write(String, usize, u8),
    WriteAt(String, u64, usize, u8),
    Append(String, usize, u8),
    CreateNew(String),
    Truncate(String, u64),
    MakeDirectory(String),
    Remove(String),
    RemoveDirectory(String),
    Rename(String, String),
    Link(String, String),
    Symlink(String, String),
    Chmod(String, u32),
    Read(String),
    List(String),
    NewLife,
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![0_usize..10, 0_usize..9000, Just(300_000_usize)];
    prop_oneof![
        4 => (path(), len.clone(), any::<u8>()).prop_map(|(p, l, b)| Step::Write(p, l, b)),
        2 => (path(), 0_u64..20_000, len.clone(), any::<u8>())
            .prop_map(|(p, o, l, b)| Step::WriteAt(p, o, l, b)),
        2 => (path(), len, any::<u8>()).prop_map(|(p, l, b)| Step::Append(p, l, b)),
        1 => path().prop_map(Step::CreateNew),
        1 => (path(), 0_u64..20_000).prop_map(|(p, l)| Step::Truncate(p, l)),
        4 => path().prop_map(Step::MakeDirectory),
        2 => path().prop_map(Step::Remove),
        1 => path().prop_map(Step::RemoveDirectory),
        3 => (path(), path()).prop_map(|(a, b)| Step::Rename(a, b)),
        1 => (path(), path()).prop_map(|(a, b)| Step::Link(a, b)),
        1 => (path(), path()).prop_map(|(a, b)| Step::Symlink(a, b)),
        1 => (path(), 0_u32..0o1000).prop_map(|(p, m)| Step::Chmod(p, m)),
        3 => path().prop_map(Step::Read),
        2 => path().prop_map(Step::List),
        1 => Just(Step::NewLife),
    ]
}

impl Step {
    /// What it gives below `root`, for comparison.
    fn take(&self, root: &Path) -> Result<Vec<u8>, Option<i32>> {
        let at = |path: &str| root.join(path);
        let nothing = |result: io::Result<()>| result.map(|()| Vec::new());
        let result = match self {
            Self::Write(path, len, byte) => nothing(fs::write(at(path), vec![*byte; *len])),
            Self::WriteAt(path, offset, len, byte) => nothing(
                OpenOptions::new()
                    .write(true)
                    .open(at(path))
                    .and_then(|file| file.write_all_at(&vec![*byte; *len], *offset)),
            ),
            Self::Append(path, len, byte) => nothing(
                OpenOptions::new()
                    .append(true)
                    .open(at(path))
                    .and_then(|mut file| file.write_all(&vec![*byte; *len])),
            ),
            Self::CreateNew(path) => nothing(fs::File::create_new(at(path)).map(drop)),
            Self::Truncate(path, len) => nothing(
                OpenOptions::new()
                    .write(true)
                    .open(at(path))
                    .and_then(|file| file.set_len(*len)),
            ),
            Self::MakeDirectory(path) => nothing(fs::create_dir(at(path))),
            Self::Remove(path) => nothing(fs::remove_file(at(path))),
            Self::RemoveDirectory(path) => nothing(fs::remove_dir(at(path))),
            Self::Rename(from, to) => nothing(fs::rename(at(from), at(to))),
            Self::Link(from, to) => nothing(fs::hard_link(at(from), at(to))),
            Self::Symlink(target, link) => nothing(symlink(target, at(link))),
            Self::Chmod(path, mode) => nothing(fs::set_permissions(
                at(path),
                fs::Permissions::from_mode(*mode),
            )),
            Self::Read(path) => fs::read(at(path)),
            Self::List(path) => fs::read_dir(at(path)).map(|entries| {
                let mut names: Vec<_> = entries
                    .map(|entry| entry.unwrap().file_name().into_encoded_bytes())
                    .collect();
                names.sort();
                names.join(&b'/')
            }),
            Self::NewLife => Ok(Vec::new()),
        };
        result.map_err(|error| error.raw_os_error())
    }
}

/// All that is in a directory: kind, mode, links and content by path.
fn tree(root: &Path) -> BTreeMap<PathBuf, (u32, u64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let content = if metadata.is_dir() {
                open.push(path.clone());
                Vec::new()
            } else if metadata.is_symlink() {
                fs::read_link(&path)
                    .unwrap()
                    .into_os_string()
                    .into_encoded_bytes()
            } else {
                fs::read(&path).unwrap()
            };
            let links = if metadata.is_dir() {
                0
            } else {
                metadata.nlink()
            };
            let name = path.strip_prefix(root).unwrap().to_owned();
            found.insert(name, (metadata.mode(), links, content));
        }
    }
    found
}

#[test]
fn a_share_is_like_any_directory() {
    let mut rig = Rig::single();
    let mut runner = TestRunner::new(Config {
        cases: 60,
        failure_persistence: None,
        ..Config::default()
    });
    let rig = std::cell::RefCell::new(&mut rig);
    let steps = proptest::collection::vec(step(), 1..60);
    let outcome = runner.run(&steps, |steps| {
        let mut rig = rig.borrow_mut();
        let (host, guest) = (rig.host("a"), rig.guest("a"));
        for name in super::names(&guest) {
            let path = guest.join(name);
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                fs::remove_dir_all(path).unwrap();
            } else {
                fs::remove_file(path).unwrap();
            }
        }
        let plain = tempfile::tempdir().unwrap();
        for (n, step) in steps.iter().enumerate() {
            if matches!(step, Step::NewLife) {
                rig.disconnect();
                rig.connect(&[("a", Access::ReadWrite)]);
            }
            let (expected, got) = (step.take(plain.path()), step.take(&guest));
            prop_assert_eq!(got, expected, "step {}: {:?}", n, step);
        }
        prop_assert_eq!(tree(&guest), tree(plain.path()));
        // What was removed while the kernel had not closed it yet goes when it does.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while tree(&host) != tree(plain.path()) && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        prop_assert_eq!(tree(&host), tree(plain.path()));
        Ok(())
    });
    outcome.unwrap();
}
