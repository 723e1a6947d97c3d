//! What is asked a second time, because the answer to the first did not arrive, is not done twice.
#![allow(clippy::unwrap_used, reason = "tests may panic")]

use std::{fs, sync::Arc};

use bytes::Bytes;
use cubicle_protocol::share::{
    Answer, FileRef, Frames, MAX_DATA, MAX_IN_FLIGHT, Operation, RelativePath, RenameHow, Reply,
    Request, encode,
};
use cubicle_share::{Access, MAX_OPEN_FILES, Share, Workers, serve};
use futures::stream;
use rustix::io::Errno;
use tokio::sync::mpsc;

fn path(text: &str) -> RelativePath {
    RelativePath::new(text.as_bytes().to_vec()).unwrap()
}

fn file(text: &str) -> FileRef {
    FileRef {
        path: path(text),
        inode: 0,
    }
}

fn ask(share: &Share, again: bool, operation: Operation, data: &[u8]) -> Result<Answer, Errno> {
    let request = Request {
        id: 7,
        again,
        operation,
    };
    let (reply, _) = share.perform(&request, data).unwrap();
    assert_eq!(reply.id, 7);
    reply
        .outcome
        .map_err(|errno| Errno::from_raw_os_error(errno.0))
}

#[test]
fn each_operation_succeeds_a_second_time_if_it_is_marked_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let share = Share::open(dir.path(), Access::ReadWrite).unwrap();
    let mode = 0o644;
    let steps: Vec<(Operation, &[u8], Errno)> = vec![
        (
            Operation::Create {
                path: path("a"),
                mode,
                exclusive: true,
            },
            b"",
            Errno::EXIST,
        ),
        (
            Operation::MakeDirectory {
                path: path("d"),
                mode: 0o755,
            },
            b"",
            Errno::EXIST,
        ),
        (
            Operation::MakeSymlink { path: path("s") },
            b"target",
            Errno::EXIST,
        ),
        (
            Operation::MakeLink {
                from: path("a"),
                to: path("l"),
            },
            b"",
            Errno::EXIST,
        ),
        (
            Operation::Rename {
                from: path("a"),
                to: path("b"),
                how: RenameHow::Replace,
            },
            b"",
            Errno::NOENT,
        ),
        (Operation::Remove { path: path("b") }, b"", Errno::NOENT),
        (
            Operation::RemoveDirectory { path: path("d") },
            b"",
            Errno::NOENT,
        ),
    ];
    for (operation, data, otherwise) in steps {
        let shown = format!("{operation:?}");
        ask(&share, false, operation.clone(), data).expect(&shown);
        ask(&share, true, operation.clone(), data).expect(&shown);
        let error = ask(&share, false, operation, data).unwrap_err();
        assert_eq!(error, otherwise, "{shown}");
    }
    // But what is there for another reason is not taken for the result of the first attempt.
    fs::create_dir(dir.path().join("other")).unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    for (operation, data) in [
        (
            Operation::MakeDirectory {
                path: path("file"),
                mode,
            },
            &b""[..],
        ),
        (Operation::MakeSymlink { path: path("s") }, b"elsewhere"),
        (
            Operation::MakeLink {
                from: path("file"),
                to: path("s"),
            },
            b"",
        ),
    ] {
        assert_eq!(ask(&share, true, operation, data), Err(Errno::EXIST));
    }
    let rename = Operation::Rename {
        from: path("missing"),
        to: path("missing, too"),
        how: RenameHow::Replace,
    };
    assert_eq!(ask(&share, true, rename, b""), Err(Errno::NOENT));
}

#[test]
fn an_append_that_was_done_is_not_done_again() {
    let dir = tempfile::tempdir().unwrap();
    let share = Share::open(dir.path(), Access::ReadWrite).unwrap();
    let log = dir.path().join("log");
    fs::write(&log, "one\n").unwrap();
    let append = |offset| Operation::Write {
        file: file("log"),
        offset,
        append: true,
    };
    ask(&share, false, append(4), b"two\n").unwrap();
    ask(&share, true, append(4), b"two\n").unwrap();
    assert_eq!(fs::read_to_string(&log).unwrap(), "one\ntwo\n");
    // Others have appended since.
    ask(&share, false, append(8), b"three\n").unwrap();
    ask(&share, true, append(4), b"two\n").unwrap();
    assert_eq!(fs::read_to_string(&log).unwrap(), "one\ntwo\nthree\n");
    // It had not been done at all, and somebody else was first.
    ask(&share, true, append(14), b"four\n").unwrap();
    assert_eq!(fs::read_to_string(&log).unwrap(), "one\ntwo\nthree\nfour\n");
}

#[test]
fn no_more_files_are_open_than_may_be() {
    let dir = tempfile::tempdir().unwrap();
    let share = Share::open(dir.path(), Access::ReadWrite).unwrap();
    let ours = || {
        let fds = fs::read_dir("/proc/self/fd").unwrap();
        let links = fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
        links.filter(|link| link.starts_with(dir.path())).count()
    };
    let mut inodes = Vec::new();
    for n in 0..3 * MAX_OPEN_FILES {
        let create = Operation::Create {
            path: path(&format!("f{n}")),
            mode: 0o644,
            exclusive: true,
        };
        let Answer::Status(status) = ask(&share, false, create, b"").unwrap() else {
            panic!("no status");
        };
        inodes.push(status.inode);
        assert!(ours() <= MAX_OPEN_FILES + 1);
    }
    for inode in inodes {
        let request = Request {
            id: 0,
            again: false,
            operation: Operation::Release { inode },
        };
        assert!(share.perform(&request, b"").is_none());
    }
    assert_eq!(ours(), 1, "the directory itself");
    drop(share);
    assert_eq!(ours(), 0);
}

#[tokio::test]
async fn a_guest_that_floods_or_talks_nonsense_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), vec![1; MAX_DATA]).unwrap();
    let share = Arc::new(Share::open(dir.path(), Access::ReadWrite).unwrap());
    let workers = Workers::new(4.try_into().unwrap());
    // It asks for far more than it may, and reads the replies late.
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let requests = stream::iter((0..2000).map(|id| {
        let operation = Operation::Read {
            file: file("file"),
            offset: 0,
            len: u32::MAX,
        };
        let again = false;
        let request = Request {
            id,
            again,
            operation,
        };
        Ok::<_, String>(encode(&request, b"").unwrap())
    }));
    let served = tokio::spawn(serve(share.clone(), workers.clone(), requests, sender));
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    let mut answered = std::collections::HashSet::new();
    let mut frames = Frames::new();
    assert!(receiver.len() <= MAX_IN_FLIGHT);
    while let Some(piece) = receiver.recv().await {
        frames.push(&piece.into_frame());
        while let Some(frame) = frames.take::<Reply>().unwrap() {
            assert_eq!(frame.data.len(), MAX_DATA);
            answered.insert(frame.message.id);
        }
    }
    assert_eq!(answered.len(), 2000);
    served.await.unwrap().unwrap();

    let (sender, _receiver) = mpsc::unbounded_channel();
    let nonsense = stream::iter([Ok::<_, String>(Bytes::from_static(&[0xff; 64]))]);
    let error = serve(share, workers, nonsense, sender).await.unwrap_err();
    assert!(error.to_string().contains("make no sense"), "{error}");
}
