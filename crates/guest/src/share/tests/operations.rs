use std::{
    fs::{self, File, OpenOptions},
    io::{Read as _, Seek as _, Write as _},
    os::unix::{
        fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink},
        process::CommandExt as _,
    },
    process::Command,
    thread,
    time::{Duration, SystemTime},
};

use cubicle_share::Access;
use rustix::{
    fs::{CWD, FileType, Mode, RenameFlags, XattrFlags, mknodat, renameat_with, statvfs},
    io::Errno,
};

use super::{Rig, names};

#[test]
fn files_are_made_written_read_and_removed() {
    let rig = Rig::single();
    let (host, guest) = (rig.host("a"), rig.guest("a"));
    fs::create_dir_all(guest.join("deep/er")).unwrap();
    let file = guest.join("deep/er/file");
    let content: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    fs::write(&file, &content).unwrap();
    assert_eq!(fs::read(host.join("deep/er/file")).unwrap(), content);
    assert_eq!(fs::read(&file).unwrap(), content);
    assert_eq!(fs::metadata(&file).unwrap().len(), 3_000_000);

    let mut open = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&file)
        .unwrap();
    open.write_all_at(b"here", 1_000_000).unwrap();
    open.set_len(1_000_010).unwrap();
    open.sync_all().unwrap();
    open.seek(std::io::SeekFrom::Start(999_999)).unwrap();
    let mut end = Vec::new();
    open.read_to_end(&mut end).unwrap();
    assert_eq!(&end[1..5], b"here");
    assert_eq!(end.len(), 11);
    assert_eq!(
        fs::metadata(host.join("deep/er/file")).unwrap().len(),
        1_000_010
    );

    drop(open);
    fs::rename(&file, guest.join("moved")).unwrap();
    assert_eq!(names(&host), ["deep", "moved"]);
    fs::remove_file(guest.join("moved")).unwrap();
    assert!(fs::remove_dir(guest.join("deep")).is_err());
    fs::remove_dir(guest.join("deep/er")).unwrap();
    fs::remove_dir(guest.join("deep")).unwrap();
    assert!(names(&host).is_empty());
    let missing = fs::read(guest.join("nothing")).unwrap_err();
    assert_eq!(missing.kind(), std::io::ErrorKind::NotFound);
}

#[test]
fn all_of_a_large_directory_is_listed_while_it_is_emptied() {
    let rig = Rig::single();
    let guest = rig.guest("a");
    let all: Vec<_> = (0..1500)
        .map(|n| format!("a-file-with-a-name-{n:04}"))
        .collect();
    for name in &all {
        fs::write(rig.host("a").join(name), name).unwrap();
    }
    assert_eq!(names(&guest), all);
    fs::remove_dir_all(&guest).unwrap_err(); // the mount point itself is in use
    assert!(names(&rig.host("a")).is_empty());
}

#[test]
fn links_attributes_times_and_modes_are_kept() {
    let rig = Rig::single();
    let (host, guest) = (rig.host("a"), rig.guest("a"));
    fs::write(guest.join("file"), "x").unwrap();
    symlink("file", guest.join("soft")).unwrap();
    assert_eq!(
        fs::read_link(host.join("soft")).unwrap().to_str(),
        Some("file")
    );
    assert_eq!(fs::read(guest.join("soft")).unwrap(), b"x");
    fs::hard_link(guest.join("file"), guest.join("hard")).unwrap();
    assert_eq!(fs::metadata(guest.join("file")).unwrap().nlink(), 2);
    assert_eq!(
        fs::metadata(guest.join("hard")).unwrap().ino(),
        fs::metadata(host.join("file")).unwrap().ino()
    );

    let mode = fs::Permissions::from_mode(0o640);
    fs::set_permissions(guest.join("file"), mode).unwrap();
    assert_eq!(
        fs::metadata(host.join("file")).unwrap().mode() & 0o7777,
        0o640
    );
    let then = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    let file = File::options()
        .write(true)
        .open(guest.join("file"))
        .unwrap();
    file.set_modified(then).unwrap();
    assert_eq!(
        fs::metadata(host.join("file")).unwrap().modified().unwrap(),
        then
    );
    assert_eq!(
        fs::metadata(guest.join("file"))
            .unwrap()
            .modified()
            .unwrap(),
        then
    );

    let path = guest.join("file");
    rustix::fs::setxattr(&path, "user.color", b"red", XattrFlags::empty()).unwrap();
    let mut value = [0; 16];
    let len = rustix::fs::getxattr(&path, "user.color", &mut value[..]).unwrap();
    assert_eq!(&value[..len], b"red");
    let len = rustix::fs::listxattr(&path, &mut value[..]).unwrap();
    assert_eq!(&value[..len], b"user.color\0");
    rustix::fs::removexattr(&path, "user.color").unwrap();
    assert_eq!(
        rustix::fs::getxattr(&path, "user.color", &mut value[..]),
        Err(Errno::NODATA)
    );
    let trusted = rustix::fs::setxattr(&path, "trusted.x", b"", XattrFlags::empty());
    assert_eq!(trusted, Err(Errno::OPNOTSUPP));

    let (ours, theirs) = (statvfs(&guest).unwrap(), statvfs(&host).unwrap());
    assert_eq!(ours.f_blocks, theirs.f_blocks);
    assert!(ours.f_bavail <= theirs.f_bavail);
}

#[test]
fn everything_belongs_to_the_user_and_nothing_runs_as_somebody_else() {
    let rig = Rig::single();
    let (host, guest) = (rig.host("a"), rig.guest("a"));
    std::os::unix::fs::chown(&host, Some(1234), Some(4321)).unwrap();
    fs::write(host.join("theirs"), "").unwrap();
    // The owner of what is made is whoever owned the directory when it was shared.
    let mut rig = rig;
    rig.crash();
    rig.connect(&[("a", Access::ReadWrite)]);
    fs::write(guest.join("file"), "").unwrap();
    fs::create_dir(guest.join("directory")).unwrap();
    symlink("x", guest.join("link")).unwrap();
    for name in ["file", "directory", "link"] {
        let there = fs::symlink_metadata(host.join(name)).unwrap();
        assert_eq!((there.uid(), there.gid()), (1234, 4321), "{name}");
    }
    for name in ["file", "directory", "link", "theirs"] {
        let here = fs::symlink_metadata(guest.join(name)).unwrap();
        assert_eq!((here.uid(), here.gid()), (1000, 1001), "{name}");
    }
    // As on any file system that knows no owners.
    std::os::unix::fs::chown(guest.join("file"), Some(5), Some(5)).unwrap();
    assert_eq!(fs::metadata(guest.join("file")).unwrap().uid(), 1000);
    assert_eq!(fs::metadata(host.join("file")).unwrap().uid(), 1234);

    fs::set_permissions(guest.join("file"), fs::Permissions::from_mode(0o6755)).unwrap();
    assert_eq!(
        fs::metadata(host.join("file")).unwrap().mode() & 0o7777,
        0o755
    );
    let options = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o4777)
        .clone();
    options.open(guest.join("suid")).unwrap();
    assert_eq!(fs::metadata(host.join("suid")).unwrap().mode() & 0o7000, 0);

    for kind in [
        FileType::CharacterDevice,
        FileType::BlockDevice,
        FileType::Fifo,
        FileType::Socket,
    ] {
        let made = mknodat(CWD, guest.join("special"), kind, Mode::RWXU, 0);
        assert_eq!(made, Err(Errno::PERM), "{kind:?}");
    }
    assert!(!host.join("special").exists());
    // One that is there is seen, and not opened.
    mknodat(CWD, host.join("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    assert!(names(&guest).contains(&"pipe".to_owned()));
    assert!(File::open(guest.join("pipe")).is_err());
}

#[test]
fn permissions_are_checked_for_those_who_are_not_root() {
    let rig = Rig::single();
    let guest = rig.guest("a");
    fs::set_permissions(
        rig.host("a").parent().unwrap().parent().unwrap(),
        fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    fs::write(guest.join("private"), "secret").unwrap();
    fs::set_permissions(guest.join("private"), fs::Permissions::from_mode(0o600)).unwrap();
    let cat = |uid| {
        let mut cat = Command::new("cat");
        cat.arg(guest.join("private")).uid(uid).gid(uid);
        cat.output().unwrap()
    };
    assert_eq!(cat(1000).stdout, b"secret");
    assert!(!cat(2000).status.success());
}

#[test]
fn programs_run_from_a_share() {
    let rig = Rig::single();
    let program = rig.guest("a").join("program");
    fs::copy("/bin/echo", &program).unwrap();
    let output = Command::new(&program).arg("hello").output().unwrap();
    assert_eq!(output.stdout, b"hello\n");
}

#[test]
fn a_file_that_is_removed_or_replaced_lives_until_it_is_closed() {
    let rig = Rig::single();
    let (host, guest) = (rig.host("a"), rig.guest("a"));
    fs::create_dir(guest.join("d")).unwrap();
    fs::write(guest.join("d/removed"), "removed").unwrap();
    fs::write(guest.join("d/replaced"), "replaced").unwrap();
    fs::write(guest.join("new"), "new").unwrap();
    let mut removed = File::options()
        .read(true)
        .write(true)
        .open(guest.join("d/removed"))
        .unwrap();
    let mut replaced = File::open(guest.join("d/replaced")).unwrap();
    fs::remove_file(guest.join("d/removed")).unwrap();
    fs::rename(guest.join("new"), guest.join("d/replaced")).unwrap();
    assert_eq!(names(&guest), ["d"]);
    assert_eq!(names(&guest.join("d")), ["replaced"]);
    assert_eq!(names(&host).len(), 3, "both are kept by the host");
    let mut text = String::new();
    replaced.read_to_string(&mut text).unwrap();
    assert_eq!(text, "replaced");
    removed.write_all(b"REM").unwrap();
    removed.rewind().unwrap();
    text.clear();
    removed.read_to_string(&mut text).unwrap();
    assert_eq!(text, "REMoved");
    assert_eq!(fs::read(guest.join("d/replaced")).unwrap(), b"new");
    // What looks empty can be removed.
    fs::remove_dir_all(guest.join("d")).unwrap();
    drop((removed, replaced));
    for _ in 0..100 {
        if names(&host).is_empty() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("{:?} is left", names(&host));
}

#[test]
fn what_the_host_changes_is_seen() {
    let rig = Rig::single();
    let (host, guest) = (rig.host("a"), rig.guest("a"));
    fs::write(host.join("file"), "one").unwrap();
    assert_eq!(fs::read(guest.join("file")).unwrap(), b"one");
    // At once by whoever opens it, also in place and of the same length.
    thread::sleep(Duration::from_millis(20));
    fs::write(host.join("file"), "two").unwrap();
    assert_eq!(fs::read(guest.join("file")).unwrap(), b"two");
    thread::sleep(Duration::from_millis(20));
    fs::write(host.join("file"), "longer than before").unwrap();
    assert_eq!(fs::read(guest.join("file")).unwrap(), b"longer than before");
    // Replaced by another file.
    fs::write(host.join("other"), "three").unwrap();
    fs::rename(host.join("other"), host.join("file")).unwrap();
    assert_eq!(fs::read(guest.join("file")).unwrap(), b"three");
    fs::remove_file(host.join("file")).unwrap();
    assert!(fs::read(guest.join("file")).is_err());
    fs::create_dir(host.join("file")).unwrap();
    fs::write(host.join("file/inside"), "").unwrap();
    assert_eq!(names(&guest.join("file")), ["inside"]);
}

#[test]
fn a_file_that_somebody_else_has_replaced_is_stale_for_who_has_it_open() {
    let mut rig = Rig::single();
    let (host, guest) = (rig.host("a"), rig.guest("a"));
    fs::write(guest.join("log"), "old").unwrap();
    let open = File::options().write(true).open(guest.join("log")).unwrap();
    fs::write(host.join("new"), "new").unwrap();
    fs::rename(host.join("new"), host.join("log")).unwrap();
    // A host that has never seen the guest before, so that it has nothing open.
    rig.crash();
    rig.connect(&[("a", Access::ReadWrite)]);
    let error = open.write_all_at(b"more", 3).unwrap_err();
    assert_eq!(Errno::from_io_error(&error), Some(Errno::STALE));
    assert_eq!(fs::read(host.join("log")).unwrap(), b"new");
}

#[test]
fn a_read_only_share_refuses_in_the_guest_and_on_the_host() {
    let rig = Rig::new(&[("a", Access::ReadOnly)]);
    let (host, guest) = (rig.host("a"), rig.guest("a"));
    fs::write(host.join("file"), "content").unwrap();
    assert_eq!(fs::read(guest.join("file")).unwrap(), b"content");
    // Root in the sandbox can mount it anew, and still change nothing.
    let again = rustix::mount::MountFlags::empty();
    for remount in [false, true] {
        if remount {
            rustix::mount::mount_remount(&guest, again, c"").unwrap();
        }
        let errors = [
            fs::write(guest.join("file"), "x"),
            fs::write(guest.join("new"), "x"),
            fs::create_dir(guest.join("new")),
            fs::remove_file(guest.join("file")),
            fs::rename(guest.join("file"), guest.join("new")),
            symlink("x", guest.join("new")),
            fs::set_permissions(guest.join("file"), fs::Permissions::from_mode(0o777)),
        ];
        for (n, error) in errors.into_iter().enumerate() {
            let errno = Errno::from_io_error(&error.unwrap_err());
            assert_eq!(errno, Some(Errno::ROFS), "{n}, mounted again: {remount}");
        }
    }
    assert_eq!(names(&host), ["file"]);
}

#[test]
fn two_sandboxes_append_to_one_file_and_lose_nothing() {
    let rig = Rig::new(&[("a", Access::ReadWrite), ("b", Access::ReadWrite)]);
    let mut rig = rig;
    let shared =
        std::sync::Arc::new(cubicle_share::Share::open(&rig.host("a"), Access::ReadWrite).unwrap());
    rig.serve("b", shared);
    let write = |directory: std::path::PathBuf, who: char| {
        move || {
            let mut log = OpenOptions::new()
                .append(true)
                .create(true)
                .open(directory.join("log"))
                .unwrap();
            for n in 0..200 {
                log.write_all(format!("{who} {n:03}\n").as_bytes()).unwrap();
            }
        }
    };
    let writers = [write(rig.guest("a"), 'a'), write(rig.guest("b"), 'b')];
    thread::scope(|scope| {
        for writer in writers {
            scope.spawn(writer);
        }
    });
    let log = fs::read_to_string(rig.host("a").join("log")).unwrap();
    let mut lines: Vec<_> = log.lines().collect();
    assert_eq!(lines.len(), 400);
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(lines.len(), 400);
}

#[test]
fn names_are_kept_or_exchanged_if_that_is_asked_for() {
    let rig = Rig::single();
    let guest = rig.guest("a");
    fs::write(guest.join("one"), "1").unwrap();
    fs::write(guest.join("two"), "2").unwrap();
    let rename = |flags| renameat_with(CWD, guest.join("one"), CWD, guest.join("two"), flags);
    assert_eq!(rename(RenameFlags::NOREPLACE), Err(Errno::EXIST));
    rename(RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::read(guest.join("one")).unwrap(), b"2");
    assert_eq!(fs::read(guest.join("two")).unwrap(), b"1");
}
