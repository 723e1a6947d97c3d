//! The unpacker, case by case.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "this is all tests")]

mod support;

use std::{
    io::{self, Read},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::Path,
    process::Command,
};

use cubicle_oci::{
    Error, Limits, Result,
    unpack::{Stop, Unpacked, Unpacker},
};
use support::{Entry, canary::Ground, gzip, tar, zstd};

fn unpack_with(ground: &Ground, layers: &[&[u8]], limits: Limits) -> Result<Vec<Unpacked>> {
    let mut unpacker = Unpacker::new(&ground.target(), limits, Stop::default())?;
    layers.iter().map(|layer| unpacker.layer(*layer)).collect()
}

fn unpack(ground: &Ground, layers: &[&[Entry]]) -> Result<Vec<Unpacked>> {
    let archives: Vec<_> = layers.iter().map(|layer| tar(layer)).collect();
    let archives: Vec<_> = archives.iter().map(Vec::as_slice).collect();
    unpack_with(ground, &archives, Limits::default())
}

#[test]
fn no_way_leads_out() {
    let ground = Ground::new();
    let canary = ground.canary();
    let canary = canary.to_str().unwrap();
    let up = "../".repeat(20);
    let inside = [
        Entry::dir("dir"),
        Entry::file("dir/file", "mine"),
        Entry::file("secret", "mine"),
    ];
    let mut ways: Vec<Vec<Entry>> = vec![
        vec![Entry::file("../canary/secret", "x")],
        vec![Entry::file(format!("a/{up}{canary}/secret"), "x")],
        vec![Entry::file("./../../x", "x")],
        vec![Entry::dir("..")],
        vec![Entry::symlink("../canary/new", "x")],
        vec![Entry::hard_link("stolen", "../canary/secret")],
        vec![Entry::hard_link("stolen", format!("{canary}/secret"))],
        vec![Entry::file("../canary/.wh.secret", "")],
        vec![Entry::file("../canary/.wh..wh..opq", "")],
        vec![Entry::file(".wh...", "")],
        vec![Entry::file("a/.wh..", "")],
        vec![Entry::file("x", "x").pax("path", "../canary/secret")],
        vec![Entry::file("x", "x").pax("GNU.sparse.name", "../canary/secret")],
    ];
    for to in [
        canary.to_owned(),
        "../canary".to_owned(),
        format!("{up}{canary}"),
    ] {
        let link = || Entry::symlink("way", &to);
        ways.extend([
            vec![link(), Entry::file("way/secret", "x")],
            vec![link(), Entry::dir("way")],
            vec![link(), Entry::dir("way/dir").mode(0o777)],
            vec![link(), Entry::file("way/new", "x")],
            vec![link(), Entry::symlink("way/link", "x")],
            vec![link(), Entry::hard_link("stolen", "way/secret")],
            vec![link(), Entry::hard_link("way/new", "secret")],
            vec![link(), Entry::file("way/.wh.secret", "")],
            vec![link(), Entry::file("way/.wh..wh..opq", "")],
            vec![link(), Entry::file(".wh.way", "")],
            vec![link(), Entry::device("way/null", b'3', 1, 3)],
            vec![
                Entry::symlink("one", &to),
                Entry::symlink("way", "one/dir"),
                Entry::file("way/file", "x"),
            ],
            // A link where there was a directory that is known already.
            vec![
                Entry::file("dir/a", "x"),
                Entry::symlink("dir", &to),
                Entry::file("dir/file", "x"),
            ],
            vec![
                Entry::dir("d"),
                Entry::symlink("d", &to),
                Entry::file("d/dir/file", "x"),
            ],
            // Names of a link itself; what it leads to is not to be written.
            vec![
                Entry::symlink("link", format!("{to}/secret")),
                Entry::hard_link("again", "link"),
                Entry::file("again", "x"),
                Entry::file("link", "x").mode(0o777),
            ],
        ]);
    }
    for way in ways {
        // Whether it is refused or leads to somewhere inside: outside nothing happens.
        let result = unpack(&ground, &[&inside, &way]);
        ground.check();
        drop(result);
        ground.clear();
    }
}

#[test]
fn names_that_lead_upwards_are_refused_and_absolute_ones_are_inside() {
    let ground = Ground::new();
    let error = unpack(&ground, &[&[Entry::file("a/../b", "")]]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot unpack `a/../b`: its name leads upwards"
    );
    unpack(
        &ground,
        &[&[
            Entry::file("/etc/passwd", "root"),
            Entry::symlink("run", "/var/run"),
            Entry::dir("var/run"),
            Entry::file("run/pid", "1"),
        ]],
    )
    .unwrap();
    assert_eq!(
        fs_err::read(ground.target().join("etc/passwd")).unwrap(),
        b"root"
    );
    assert_eq!(
        fs_err::read(ground.target().join("var/run/pid")).unwrap(),
        b"1"
    );
}

#[test]
fn everything_that_a_header_says_arrives() {
    let ground = Ground::new();
    // The capability to bind low ports, as `setcap cap_net_bind_service=ep` stores it.
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    unpack(
        &ground,
        &[&[
            Entry::dir("d")
                .mode(0o3751)
                .owner(70_000, 80_000)
                .mtime(123),
            Entry::file("d/program", "x")
                .mode(0o6755)
                .owner(5, 6)
                .xattr("security.capability", capability)
                .xattr("user.empty", ""),
            Entry::file("early", "").pax("mtime", "-1.5"),
            Entry::file("large-id", "").owner(4_000_000_000, 4_294_967_294),
            Entry::device("char", b'3', 5, 300).mode(0o620),
            Entry::device("block", b'4', 259, 65_537)
                .mode(0o660)
                .owner(0, 6),
            Entry::new(b'6', "pipe").mode(0o622),
            Entry::symlink("link", "d/program").owner(7, 8).mtime(99),
        ]],
    )
    .unwrap();
    let meta = |name: &str| fs_err::symlink_metadata(ground.target().join(name)).unwrap();
    let directory = meta("d");
    assert_eq!(
        (directory.mode() & 0o7777, directory.mtime()),
        (0o3751, 123)
    );
    assert_eq!((directory.uid(), directory.gid()), (70_000, 80_000));
    assert_eq!(meta("d/program").mode() & 0o7777, 0o6755);
    let path = ground.target().join("d/program");
    let stored = xattr::get(&path, "security.capability").unwrap().unwrap();
    assert_eq!(stored, capability);
    assert_eq!(xattr::get(&path, "user.empty").unwrap().unwrap(), b"");
    let early = meta("early");
    assert_eq!((early.mtime(), early.mtime_nsec()), (-2, 500_000_000));
    assert_eq!(meta("large-id").gid(), 4_294_967_294);
    let (char, block) = (meta("char"), meta("block"));
    assert!(char.file_type().is_char_device() && char.mode() & 0o7777 == 0o620);
    assert_eq!(char.rdev(), rustix::fs::makedev(5, 300));
    assert_eq!(block.rdev(), rustix::fs::makedev(259, 65_537));
    assert!(meta("pipe").file_type().is_fifo() && meta("pipe").mode() & 0o7777 == 0o622);
    assert_eq!((meta("link").uid(), meta("link").mtime()), (7, 99));
    assert_eq!(
        meta("d/program").uid(),
        5,
        "the link's owner is not its target's"
    );
}

#[test]
fn access_control_lists_are_kept_and_not_passed_on() {
    let ground = Ground::new();
    // Version 2; user::rwx, group::r-x, group 4 r-x, mask::rwx, other::r-x.
    let entry = |tag: u16, rights: u16, id: u32| {
        [
            &tag.to_le_bytes()[..],
            &rights.to_le_bytes(),
            &id.to_le_bytes(),
        ]
        .concat()
    };
    let nobody = u32::MAX;
    let acl = [
        2_u32.to_le_bytes().to_vec(),
        entry(1, 7, nobody),
        entry(4, 5, nobody),
        entry(8, 5, 4),
        entry(16, 7, nobody),
        entry(32, 5, nobody),
    ]
    .concat();
    let name = "system.posix_acl_default";
    unpack(
        &ground,
        &[
            &[Entry::dir("d").xattr(name, &acl)],
            &[
                Entry::file("d/f", "x"),
                Entry::dir("d/sub"),
                Entry::file("d/implied/f", "x"),
            ],
        ],
    )
    .unwrap();
    let has = |path: &str| {
        let names = xattr::list(ground.target().join(path)).unwrap();
        names
            .filter(|name| name.to_str().unwrap().contains("acl"))
            .count()
    };
    assert_eq!(has("d"), 1);
    for path in ["d/f", "d/sub", "d/implied", "d/implied/f"] {
        assert_eq!(has(path), 0, "{path}");
    }
}

#[test]
fn what_gnu_tar_writes_in_any_of_its_ways_is_read() {
    let source = tempfile::tempdir().unwrap();
    let tree = source.path().join("tree");
    let long = format!("{}/{}", "directory-".repeat(9), "name-".repeat(30));
    fs_err::create_dir_all(tree.join(&long).parent().unwrap()).unwrap();
    fs_err::write(tree.join(&long), "long").unwrap();
    std::os::unix::fs::symlink(&long, tree.join("long-link")).unwrap();
    fs_err::hard_link(tree.join(&long), tree.join("hard")).unwrap();
    fs_err::write(tree.join("umlaut-ä-\u{1f980}"), "x").unwrap();
    xattr::set(tree.join("hard"), "user.binary", b"\0\n=\xff").unwrap();
    let sparse = fs_err::File::create(tree.join("sparse")).unwrap();
    // More runs than a header has room for.
    use std::os::unix::fs::FileExt as _;
    for run in 0..60_u64 {
        sparse
            .file()
            .write_all_at(format!("run {run}").as_bytes(), run << 17)
            .unwrap();
    }
    sparse.file().set_len(100 << 20).unwrap();
    fs_err::File::create(tree.join("hole"))
        .unwrap()
        .file()
        .set_len(5 << 20)
        .unwrap();
    fs_err::write(tree.join("zeros"), vec![0; 3 << 20]).unwrap();
    for format in [
        &["--format=gnu", "--sparse"][..],
        &["--format=oldgnu", "--sparse"],
        &["--format=posix", "--sparse", "--sparse-version=0.0"],
        &["--format=posix", "--sparse", "--sparse-version=0.1"],
        &["--format=posix", "--sparse", "--sparse-version=1.0"],
        &["--format=posix", "--xattrs"],
        &["--format=gnu"],
    ] {
        let output = Command::new("tar")
            .args(format)
            .args(["--create", "--to-stdout", "--directory"])
            .arg(&tree)
            .arg(".")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let ground = Ground::new();
        for layer in [
            output.stdout.clone(),
            gzip(&output.stdout),
            zstd(&output.stdout),
        ] {
            unpack_with(&ground, &[&layer], Limits::default()).unwrap();
            let same = Command::new("diff")
                .args(["--recursive", "--no-dereference"])
                .arg(&tree)
                .arg(ground.target())
                .output()
                .unwrap();
            assert!(same.status.success(), "{format:?}: {same:?}");
            for (name, most) in [("sparse", 600 << 10), ("hole", 0), ("zeros", 0)] {
                let meta = fs_err::metadata(ground.target().join(name)).unwrap();
                let used = meta.blocks() * 512;
                assert!(used <= most, "{format:?}: {name} takes {used} bytes");
            }
            assert_eq!(
                fs_err::metadata(ground.target().join("hard"))
                    .unwrap()
                    .nlink(),
                2
            );
            if format.contains(&"--xattrs") {
                let value = xattr::get(ground.target().join("hard"), "user.binary");
                assert_eq!(value.unwrap().unwrap(), b"\0\n=\xff");
            }
            ground.check();
            ground.clear();
        }
    }
}

#[test]
fn an_archive_that_ends_anywhere_is_refused_unless_it_is_between_entries() {
    let archive = tar(&[
        Entry::dir("d"),
        Entry::file("d/file", [b'x'; 1000]),
        Entry::file("d/other", "").xattr("user.a", "b"),
    ]);
    let ground = Ground::new();
    let between = [0, 512, 2048, 3584, 4096];
    for end in 0..archive.len() {
        if end % 7 != 0 && end % 512 > 1 {
            continue;
        }
        let result = unpack_with(&ground, &[&archive[..end]], Limits::default());
        // Filling up the last block, and the end mark, may be missing.
        let is_whole = between.contains(&end) || (1536 + 488..2048).contains(&end) || end > 3583;
        assert!(
            result.is_ok() || !is_whole || end % 512 != 0,
            "{end}: {result:?}"
        );
        if !is_whole {
            assert!(result.is_err(), "{end}");
        }
        ground.check();
        ground.clear();
    }
}

#[test]
fn what_is_too_much_is_refused_early() {
    let ground = Ground::new();
    let limits = Limits {
        bytes: 1 << 20,
        entries: 100,
    };
    let refuse = |layer: &[u8], what: &str| {
        let error = unpack_with(&ground, &[layer], limits).unwrap_err();
        assert!(error.to_string().contains(what), "{what}: {error}");
        ground.clear();
    };
    let many: Vec<Entry> = (0..101).map(|i| Entry::dir(i.to_string())).collect();
    refuse(&tar(&many), "more than 100 entries");
    // 64 MiB of zeros in 64 KiB; as a file, as an extended header, and after the end.
    let zeros = vec![0; 64 << 20];
    refuse(
        &gzip(&tar(&[Entry::file("zeros", &zeros)])),
        "bytes, unpacked",
    );
    refuse(&zstd(&zeros), "bytes, unpacked");
    let mut extended = Entry::new(b'x', "pax");
    extended.data = zeros.clone();
    refuse(&gzip(&tar(&[extended])), "more than 1 MiB");
    let mut name = Entry::new(b'L', "name");
    name.data = zeros;
    refuse(&gzip(&tar(&[name])), "more than 1 MiB");
    // A file that claims to be large, and has nothing.
    let mut claim = Entry::file("claim", "");
    claim.size = Some(1 << 50);
    refuse(&tar(&[claim]), "out of range");
    let huge = Entry::file("sparse", "")
        .pax("GNU.sparse.realsize", (1_u64 << 60).to_string())
        .pax("GNU.sparse.map", "");
    refuse(&tar(&[huge]), "sparse map");
    let large = Entry::file("x", "").xattr("user.large", [b'x'; 4000]);
    refuse(&tar(&[large]), "list of extended attributes");
    refuse(
        &tar(&[Entry::file("x/".repeat(2047) + "x", "")]),
        "too deep",
    );
    refuse(
        &tar(&[Entry::file("x".repeat(256), "")]),
        "more than 255 bytes",
    );
    refuse(&tar(&[Entry::file("x".repeat(5000), "")]), "its name");
    refuse(b"BZh91AY&SY", "bzip2");
    refuse(b"\xfd7zXZ\0\0\x04", "xz");
}

#[test]
fn links_cannot_be_used_to_go_deeper_than_paths_can_say() {
    let ground = Ground::new();
    let mut entries = Vec::new();
    let deep = "d/".repeat(200);
    for step in 0..20 {
        let start = if step == 0 {
            String::new()
        } else {
            format!("s{step}/")
        };
        entries.push(Entry::dir(format!("{start}{deep}")));
        entries.push(Entry::symlink(
            format!("s{}", step + 1),
            format!("{start}{deep}"),
        ));
    }
    let error = unpack(&ground, &[&entries]).unwrap_err();
    assert!(error.to_string().contains("too deep"), "{error}");
    // It can be removed, which takes a descriptor for each level.
    ground.clear();
}

#[test]
fn it_stops_when_told_to() {
    struct Endless(Stop, u32);
    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 += 1;
            if self.1 == 100 {
                self.0.stop();
            }
            let block = tar(&[Entry::dir("d")]);
            let n = buffer.len().min(512);
            assert!(n == 512 || self.1 < 3, "{n}");
            buffer[..n].copy_from_slice(&block[..n]);
            Ok(n)
        }
    }
    let ground = Ground::new();
    let stop = Stop::default();
    let mut unpacker = Unpacker::new(&ground.target(), Limits::default(), stop.clone()).unwrap();
    let archive = io::Cursor::new(tar(&[Entry::dir("d")])[..512].to_vec());
    let error = unpacker.layer(archive.chain(Endless(stop, 0))).unwrap_err();
    assert!(matches!(error, Error::Stopped), "{error:?}");
}

#[test]
fn a_full_disk_is_called_that() {
    let small = support::SmallDisk::new("1m");
    let target: &Path = small.path();
    let mut unpacker = Unpacker::new(target, Limits::default(), Stop::default()).unwrap();
    let archive = tar(&[Entry::file("large", vec![b'x'; 2 << 20])]);
    let error = unpacker.layer(&*archive).unwrap_err();
    assert!(matches!(error, Error::DiskFull { .. }), "{error:?}");
}
