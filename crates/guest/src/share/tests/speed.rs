//! Not a test: says how fast it is. `cargo test --release -p cubicle-guest share::tests::speed --
//! --ignored --nocapture`

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    time::Instant,
};

use super::Rig;

#[test]
#[ignore = "measures"]
fn operations_and_throughput() {
    let rig = Rig::single();
    let guest = rig.guest("a");
    let per = |what: &str, count: u32, work: &mut dyn FnMut(u32)| {
        let begun = Instant::now();
        (0..count).for_each(&mut *work);
        let each = begun.elapsed() / count;
        println!("{what:32} {:>8.1} us", each.as_secs_f64() * 1e6);
    };
    let name = |n: u32| guest.join(format!("file-{n}"));
    per("create, write 1 KiB, close", 2000, &mut |n| {
        fs::write(name(n), [1; 1024]).unwrap()
    });
    per("open, read 1 KiB, close", 2000, &mut |n| {
        drop(fs::read(name(n)).unwrap())
    });
    per("stat of what is not known", 2000, &mut |n| {
        assert!(!guest.join(format!("no-{n}")).exists());
    });
    per("stat of what is known", 2000, &mut |n| {
        assert!(fs::metadata(name(n % 10)).unwrap().is_file())
    });
    let begun = Instant::now();
    let count = fs::read_dir(&guest)
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().metadata().unwrap().is_file())
        .count();
    println!(
        "{:32} {:>8.1} us",
        "list, each of 2000 entries",
        begun.elapsed().as_secs_f64() * 1e6 / count as f64
    );
    per("remove", 2000, &mut |n| fs::remove_file(name(n)).unwrap());

    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(guest.join("big"))
        .unwrap();
    let size = 256 << 20;
    let piece = vec![7; 1 << 20];
    let speed = |what: &str, work: &dyn Fn()| {
        let begun = Instant::now();
        work();
        println!(
            "{what:32} {:>8.0} MB/s",
            f64::from(size) / 1e6 / begun.elapsed().as_secs_f64()
        );
    };
    speed("write, 1 MiB at a time", &|| {
        for n in 0..256 {
            file.write_all_at(&piece, n << 20).unwrap();
        }
    });
    speed("read, 1 MiB at a time", &|| {
        let mut piece = vec![0; 1 << 20];
        let file = File::open(guest.join("big")).unwrap();
        for n in 0..256 {
            file.read_exact_at(&mut piece, n << 20).unwrap();
        }
    });
    per("write 4 KiB in place", 2000, &mut |n| {
        file.write_all_at(&piece[..4096], u64::from(n) * 4096)
            .unwrap()
    });
}
