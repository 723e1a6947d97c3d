use std::{
    fs::{self, File, OpenOptions},
    io::Write as _,
    os::unix::fs::FileExt as _,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use cubicle_share::Access;

use super::{Rig, names};

const WRITABLE: [(&str, Access); 1] = [("a", Access::ReadWrite)];

#[test]
fn programs_wait_while_the_host_is_away_and_go_on_when_it_is_back() {
    let mut rig = Rig::single();
    let guest = rig.guest("a");
    fs::write(guest.join("before"), "before").unwrap();
    let open = File::options()
        .read(true)
        .write(true)
        .open(guest.join("before"))
        .unwrap();
    rig.disconnect();
    let back = AtomicBool::new(false);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            fs::write(guest.join("after"), "after").unwrap();
            open.write_all_at(b"AFTER", 0).unwrap();
            back.load(Ordering::SeqCst)
        });
        thread::sleep(Duration::from_millis(200));
        back.store(true, Ordering::SeqCst);
        rig.connect(&WRITABLE);
        assert!(waiting.join().unwrap(), "it did not wait");
    });
    assert_eq!(fs::read(rig.host("a").join("after")).unwrap(), b"after");
    assert_eq!(fs::read(rig.host("a").join("before")).unwrap(), b"AFTERe");
}

#[test]
fn what_changed_while_the_host_was_away_is_seen_at_once() {
    let mut rig = Rig::single();
    let (host, guest) = (rig.host("a"), rig.guest("a"));
    fs::write(host.join("file"), "one").unwrap();
    let open = File::open(guest.join("file")).unwrap();
    let mut content = [0; 3];
    open.read_exact_at(&mut content, 0).unwrap();
    fs::metadata(guest.join("file")).unwrap();
    rig.disconnect();
    thread::sleep(Duration::from_millis(20));
    fs::write(host.join("file"), "two").unwrap();
    // What a restore does: the sandbox is told who it is, then the host serves it.
    rig.reconcile(&WRITABLE).unwrap();
    rig.connect(&WRITABLE);
    // The same descriptor, whose pages the kernel has.
    open.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(&content, b"two");
    assert_eq!(fs::read(guest.join("file")).unwrap(), b"two");
}

#[test]
fn nothing_is_lost_or_done_twice_in_many_short_lives() {
    let mut rig = Rig::single();
    let guest = rig.guest("a");
    let done = AtomicBool::new(false);
    let mut lives = 0;
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let mut log = OpenOptions::new()
                .append(true)
                .create_new(true)
                .open(guest.join("log"))
                .unwrap();
            for n in 0..150 {
                let directory = guest.join(format!("d{n}"));
                fs::create_dir(&directory).unwrap();
                let file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .open(directory.join("file"));
                file.unwrap().write_all(&[n; 10_000]).unwrap();
                fs::rename(directory.join("file"), directory.join("renamed")).unwrap();
                std::os::unix::fs::symlink("renamed", directory.join("link")).unwrap();
                fs::hard_link(directory.join("renamed"), directory.join("hard")).unwrap();
                assert_eq!(fs::read(directory.join("link")).unwrap(), [n; 10_000]);
                if n % 2 == 0 {
                    fs::remove_dir_all(&directory).unwrap();
                }
                writeln!(log, "{n}").unwrap();
            }
            done.store(true, Ordering::SeqCst);
        });
        let mut pause = 0;
        while !worker.is_finished() {
            // Of different lengths, so that lives end in the middle of different things.
            pause = (pause + 7) % 40;
            thread::sleep(Duration::from_micros(1000 + pause * 370));
            rig.disconnect();
            rig.reconcile(&WRITABLE).unwrap();
            rig.connect(&WRITABLE);
            lives += 1;
        }
        worker.join().unwrap();
    });
    assert!(done.load(Ordering::SeqCst));
    assert!(lives > 10, "only {lives} lives");
    let host = rig.host("a");
    let log = fs::read_to_string(host.join("log")).unwrap();
    let expected: String = (0..150).map(|n| format!("{n}\n")).collect();
    assert_eq!(log, expected);
    assert_eq!(names(&host).len(), 75 + 1);
    for n in (1..150_u8).step_by(2) {
        let directory = host.join(format!("d{n}"));
        assert_eq!(names(&directory), ["hard", "link", "renamed"]);
        assert_eq!(fs::read(directory.join("hard")).unwrap(), [n; 10_000]);
    }
}

#[test]
fn a_program_can_be_killed_while_the_host_is_away() {
    let mut rig = Rig::single();
    let guest = rig.guest("a");
    fs::write(guest.join("file"), "x").unwrap();
    rig.disconnect();
    let mut child = Command::new("cat")
        .arg(guest.join("missing"))
        .spawn()
        .unwrap();
    thread::sleep(Duration::from_millis(200));
    assert!(child.try_wait().unwrap().is_none(), "it waits");
    child.kill().unwrap();
    let since = Instant::now();
    child.wait().unwrap();
    assert!(since.elapsed() < Duration::from_secs(5));
}

#[test]
fn mounts_come_and_go_and_must_not_hide_each_other() {
    let mut rig = Rig::new(&[("a", Access::ReadWrite), ("b", Access::ReadOnly)]);
    fs::write(rig.guest("a").join("file"), "").unwrap();
    fs::create_dir_all(rig.host("c")).unwrap();
    let wanted = [("a", Access::ReadOnly), ("c", Access::ReadWrite)];
    rig.disconnect();
    rig.reconcile(&wanted).unwrap();
    rig.connect(&wanted);
    assert!(names(&rig.guest("b")).is_empty());
    fs::write(rig.guest("b").join("local"), "").unwrap();
    assert!(names(&rig.host("b")).is_empty());
    assert_eq!(names(&rig.guest("a")), ["file"]);
    assert!(fs::write(rig.guest("a").join("file"), "x").is_err());
    fs::write(rig.guest("c").join("file"), "").unwrap();
    assert_eq!(names(&rig.host("c")), ["file"]);

    let error = rig.reconcile(&[("c", Access::ReadWrite), ("c/d", Access::ReadWrite)]);
    assert!(matches!(
        error,
        Err(crate::share::Error::Tag(_) | crate::share::Error::Nested(..))
    ));
    let error = rig.reconcile(&[("c", Access::ReadWrite), ("c", Access::ReadWrite)]);
    assert!(matches!(error, Err(crate::share::Error::Nested(..))));
    // What was asked for wrongly has changed nothing.
    assert_eq!(names(&rig.guest("c")), ["file"]);
}

#[test]
fn a_mount_point_is_where_its_links_lead() {
    let rig = Rig::single();
    let (a, b) = (rig.guest("a"), rig.guest("b"));
    fs::create_dir(rig.host("b")).unwrap();
    // Into a share that is mounted: there is no mounting below it.
    fs::write(a.join("file"), "").unwrap();
    std::os::unix::fs::symlink(&a, &b).unwrap();
    let wanted = [("a", Access::ReadWrite), ("b", Access::ReadWrite)];
    let error = rig.reconcile(&wanted).unwrap_err();
    assert!(matches!(error, crate::share::Error::Nested(..)), "{error}");
    fs::remove_file(&b).unwrap();
    std::os::unix::fs::symlink("/proc", &b).unwrap();
    let error = rig.reconcile(&wanted).unwrap_err();
    assert!(matches!(error, crate::share::Error::Path { .. }), "{error}");
    fs::remove_file(&b).unwrap();
    let elsewhere = a.parent().unwrap().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &b).unwrap();
    rig.reconcile(&wanted).unwrap();
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    assert!(mounts.contains(elsewhere.to_str().unwrap()), "{mounts}");
    // All or nothing: the first is not mounted if the second cannot be.
    rig.reconcile(&[]).unwrap();
    fs::remove_file(&b).unwrap();
    fs::write(&b, "in the way").unwrap();
    rig.reconcile(&wanted).unwrap_err();
    assert!(names(&a).is_empty(), "nothing is mounted");
}
