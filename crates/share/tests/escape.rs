//! A guest gets nowhere but beneath the directory, whatever it asks and whoever moves things.
#![allow(clippy::unwrap_used, reason = "tests may panic")]

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
};

use cubicle_protocol::share::{
    Answer, Change, FileRef, Operation, RelativePath, RenameHow, Reply, Request,
};
use cubicle_share::{Access, Share};
use proptest::prelude::*;
use rustix::io::Errno;

fn path(text: &str) -> RelativePath {
    RelativePath::new(text.as_bytes().to_vec()).unwrap()
}

fn file(text: &str) -> FileRef {
    FileRef {
        path: path(text),
        inode: 0,
    }
}

fn ask(share: &Share, operation: Operation, data: &[u8]) -> Result<(Answer, Vec<u8>), Errno> {
    let request = Request {
        id: 1,
        again: false,
        operation,
    };
    let (Reply { outcome, .. }, data) = share.perform(&request, data).unwrap();
    outcome
        .map(|answer| (answer, data))
        .map_err(|errno| Errno::from_raw_os_error(errno.0))
}

/// `share/` is shared; beside it is `outside/secret`, to which all kinds of links lead.
fn stage() -> (tempfile::TempDir, Share) {
    let stage = tempfile::tempdir().unwrap();
    let root = stage.path();
    fs::create_dir_all(root.join("share/dir/deep")).unwrap();
    fs::create_dir(root.join("outside")).unwrap();
    fs::write(root.join("outside/secret"), "secret").unwrap();
    fs::write(root.join("share/file"), "file").unwrap();
    symlink(root.join("outside"), root.join("share/absolute")).unwrap();
    symlink("../outside", root.join("share/relative")).unwrap();
    symlink("../outside/secret", root.join("share/leaf")).unwrap();
    symlink("/proc/self/root", root.join("share/magic")).unwrap();
    symlink("dir", root.join("share/inner")).unwrap();
    let share = Share::open(&root.join("share"), Access::ReadWrite).unwrap();
    (stage, share)
}

/// Every operation on one path, and the names that it may leave behind.
fn everything(at: &str) -> Vec<(Operation, &'static [u8])> {
    let mode = 0o777;
    let change = Change {
        mode: Some(0o777),
        size: Some(0),
        ..Change::default()
    };
    let name = b"user.x".to_vec();
    let plain = |operation| (operation, &b""[..]);
    vec![
        plain(Operation::Stat { of: file(at) }),
        plain(Operation::List {
            directory: path(at),
            after: 0,
            room: 4096,
        }),
        plain(Operation::Open {
            file: file(at),
            write: true,
        }),
        plain(Operation::Read {
            file: file(at),
            offset: 0,
            len: 100,
        }),
        (
            Operation::Write {
                file: file(at),
                offset: 0,
                append: false,
            },
            b"overwritten",
        ),
        (
            Operation::Write {
                file: file(at),
                offset: 0,
                append: true,
            },
            b"appended",
        ),
        plain(Operation::Create {
            path: path(at),
            mode,
            exclusive: false,
        }),
        plain(Operation::MakeDirectory {
            path: path(at),
            mode,
        }),
        plain(Operation::MakeLink {
            from: path(at),
            to: path("stolen"),
        }),
        plain(Operation::MakeLink {
            from: path("file"),
            to: path(at),
        }),
        plain(Operation::Rename {
            from: path(at),
            to: path("moved"),
            how: RenameHow::Replace,
        }),
        plain(Operation::Rename {
            from: path("file"),
            to: path(at),
            how: RenameHow::Keep,
        }),
        plain(Operation::Change {
            file: file(at),
            change,
        }),
        plain(Operation::Sync {
            file: file(at),
            data_only: false,
        }),
        plain(Operation::Allocate {
            file: file(at),
            flags: 0,
            offset: 0,
            len: 1 << 16,
        }),
        (
            Operation::SetAttribute {
                path: path(at),
                name: name.clone(),
                flags: 0,
            },
            b"x",
        ),
        plain(Operation::GetAttribute {
            path: path(at),
            name,
        }),
        plain(Operation::RemoveDirectory { path: path(at) }),
        plain(Operation::Remove { path: path(at) }),
    ]
}

/// What is outside is as it was.
fn assert_untouched(root: &Path) {
    let outside = root.join("outside");
    let names: Vec<_> = fs::read_dir(&outside)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["secret"]);
    assert_eq!(fs::read(outside.join("secret")).unwrap(), b"secret");
    use std::os::unix::fs::MetadataExt as _;
    let secret = fs::metadata(outside.join("secret")).unwrap();
    assert_eq!((secret.nlink(), secret.mode() & 0o777), (1, 0o644));
}

#[test]
fn no_operation_goes_through_a_link() {
    for through in [
        "absolute/secret",
        "relative/secret",
        "absolute/new",
        "relative/new",
        "magic/etc/hostname",
        "inner/deep",
    ] {
        for (operation, data) in everything(through) {
            let (stage, share) = stage();
            let shown = format!("{operation:?}");
            let error = ask(&share, operation, data).unwrap_err();
            assert!(
                matches!(error, Errno::STALE | Errno::NOTDIR),
                "{shown}: {error}"
            );
            assert_untouched(stage.path());
        }
    }
}

#[test]
fn no_operation_follows_a_link_that_it_names() {
    for (operation, data) in everything("leaf") {
        let (stage, share) = stage();
        let shown = format!("{operation:?}");
        if let Ok((_, data)) = ask(&share, operation, data) {
            assert!(!data.starts_with(b"secret"), "{shown}");
        }
        assert_untouched(stage.path());
    }
    let (_stage, share) = stage();
    let (_, target) = ask(&share, Operation::ReadLink { path: path("leaf") }, b"").unwrap();
    assert_eq!(target, b"../outside/secret");
}

#[test]
fn the_root_itself_stays() {
    let (stage, share) = stage();
    for operation in [
        Operation::RemoveDirectory {
            path: RelativePath::ROOT,
        },
        Operation::Rename {
            from: RelativePath::ROOT,
            to: path("x"),
            how: RenameHow::Replace,
        },
        Operation::MakeDirectory {
            path: RelativePath::ROOT,
            mode: 0o700,
        },
    ] {
        assert!(ask(&share, operation, b"").is_err());
    }
    // Also when its path is taken away: it is held, not looked up.
    fs::rename(stage.path().join("share"), stage.path().join("elsewhere")).unwrap();
    symlink("outside", stage.path().join("share")).unwrap();
    ask(&share, Operation::Stat { of: file("file") }, b"").unwrap();
    ask(
        &share,
        Operation::Create {
            path: path("new"),
            mode: 0o644,
            exclusive: true,
        },
        b"",
    )
    .unwrap();
    assert!(stage.path().join("elsewhere/new").exists());
    assert_untouched(stage.path());
}

#[test]
fn a_read_only_share_changes_nothing() {
    let (stage, _) = stage();
    let share = Share::open(&stage.path().join("share"), Access::ReadOnly).unwrap();
    let before = fs::read_dir(stage.path().join("share")).unwrap().count();
    for at in ["file", "dir", "new"] {
        for (operation, data) in everything(at) {
            let changes = operation.changes();
            let shown = format!("{operation:?}");
            let result = ask(&share, operation, data);
            assert_eq!(result == Err(Errno::ROFS), changes, "{shown}: {result:?}");
        }
    }
    assert_eq!(
        fs::read_dir(stage.path().join("share")).unwrap().count(),
        before
    );
    assert_eq!(fs::read(stage.path().join("share/file")).unwrap(), b"file");
}

#[test]
fn a_directory_that_turns_into_a_link_again_and_again_leads_nowhere() {
    let (stage, share) = stage();
    let shared = stage.path().join("share");
    fs::create_dir(shared.join("flip")).unwrap();
    fs::write(shared.join("flip/secret"), "inside").unwrap();
    symlink(stage.path().join("outside"), shared.join("flop")).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let exchange = rustix::fs::RenameFlags::EXCHANGE;
            let (flip, flop) = (shared.join("flip"), shared.join("flop"));
            let cwd = rustix::fs::CWD;
            while !done.load(SeqCst) {
                rustix::fs::renameat_with(cwd, &flip, cwd, &flop, exchange).unwrap();
            }
        });
        let mut inside = 0;
        for round in 0..3000 {
            let at = ["flip/secret", "flop/secret"][round % 2];
            if let Ok((_, data)) = ask(
                &share,
                Operation::Read {
                    file: file(at),
                    offset: 0,
                    len: 100,
                },
                b"",
            ) {
                assert!(!data.starts_with(b"secret"));
                inside += 1;
            }
            let change = Change {
                mode: Some(0o600),
                ..Change::default()
            };
            let _ = ask(
                &share,
                Operation::Change {
                    file: file(at),
                    change,
                },
                b"",
            );
            let made = ["flip/new", "flop/new"][round % 2];
            let create = Operation::Create {
                path: path(made),
                mode: 0o644,
                exclusive: false,
            };
            let _ = ask(&share, create, b"");
            let _ = ask(&share, Operation::Remove { path: path(made) }, b"");
        }
        done.store(true, SeqCst);
        assert!(inside > 0, "it was never what it should be");
    });
    assert_untouched(stage.path());
}

/// Random operations of a guest, on names that lead everywhere.
fn anything() -> impl Strategy<Value = (usize, String)> {
    let name = prop_oneof![
        Just("absolute"),
        Just("relative"),
        Just("magic"),
        Just("inner"),
        Just("leaf"),
        Just("dir"),
        Just("deep"),
        Just("secret"),
        Just("file"),
        Just("new"),
        Just("moved"),
    ];
    let path = proptest::collection::vec(name, 1..4).prop_map(|names| names.join("/"));
    (0..everything("x").len(), path)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_operations_leave_the_outside_alone(steps in proptest::collection::vec(anything(), 1..60)) {
        let (stage, share) = stage();
        for (which, at) in steps {
            let (operation, data) = everything(&at).swap_remove(which);
            if let Ok((_, data)) = ask(&share, operation, data) {
                prop_assert!(!data.starts_with(b"secret"));
            }
        }
        // Also links that the guest makes itself.
        let target = stage.path().join("outside").into_os_string().into_encoded_bytes();
        let made = ask(&share, Operation::MakeSymlink { path: path("mine") }, &target);
        prop_assert!(made.is_ok());
        for (operation, data) in everything("mine/secret") {
            prop_assert!(ask(&share, operation, data).is_err());
        }
        assert_untouched(stage.path());
    }
}
