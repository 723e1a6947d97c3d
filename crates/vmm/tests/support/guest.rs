//! A guest of a few hundred lines for the tests of this crate: process 1 of an initial file
//! system. It loads the modules it finds, waits for the channel port and answers one-line
//! commands on it. Compiled by the tests with plain `rustc` and linked statically, so it may use
//! nothing but the standard library and the C functions that come with it.

use std::{
    ffi::{CString, c_char, c_int, c_long, c_ulong, c_void},
    fs,
    io::{Read, Write},
    thread::sleep,
    time::Duration,
};

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
}

const SYS_FINIT_MODULE: c_long = 313;
const SYS_REBOOT: c_long = 169;

fn mount_pseudo(kind: &str, target: &str) {
    let _ = fs::create_dir_all(target);
    let (kind, target) = (CString::new(kind).unwrap(), CString::new(target).unwrap());
    // SAFETY: both strings end in NUL and outlive the call; these file systems take no data.
    unsafe { mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
}

fn load_modules() {
    let Ok(order) = fs::read_to_string("/modules/order") else { return };
    for name in order.lines() {
        let file = fs::File::open(format!("/modules/{name}")).expect("a module that is listed");
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        // SAFETY: `fd` is open for the duration of the call and the parameter string is static.
        let result = unsafe { syscall(SYS_FINIT_MODULE, fd, c"".as_ptr(), 0) };
        if result != 0 {
            println!("loading {name}: {}", std::io::Error::last_os_error());
        }
    }
}

fn port() -> fs::File {
    loop {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim() == "cubicle.channel" {
                let device = format!("/dev/{}", entry.file_name().to_string_lossy());
                if let Ok(file) = fs::OpenOptions::new().read(true).write(true).open(device) {
                    return file;
                }
            }
        }
        sleep(Duration::from_millis(1));
    }
}

fn reboot(how: u64) -> String {
    // SAFETY: the two magic numbers and the command are those of reboot(2); no pointer is passed.
    unsafe { syscall(SYS_REBOOT, 0xfee1_dead_u64, 672_274_793_u64, how, 0_u64) };
    "still here".into()
}

/// Answers one command.
fn answer(line: &str, state: &mut String, ballast: &mut Vec<u8>) -> String {
    let mut words = line.splitn(3, ' ');
    let (command, first, second) =
        (words.next().unwrap_or(""), words.next().unwrap_or(""), words.next().unwrap_or(""));
    match command {
        "ping" => "pong".into(),
        "set" => {
            *state = first.to_owned();
            "ok".into()
        }
        "get" => state.clone(),
        // Touches that many MiB of memory with a pattern that a restore has to bring back.
        "fill" => {
            *ballast = (0..first.parse::<usize>().unwrap_or(0) << 20)
                .map(|i| (i as u8).wrapping_mul(31) ^ (i >> 12) as u8)
                .collect();
            "ok".into()
        }
        "sum" => {
            let sum = ballast.iter().fold(14_695_981_039_346_656_037_u64, |hash, byte| {
                (hash ^ u64::from(*byte)).wrapping_mul(1_099_511_628_211)
            });
            format!("{} {sum:x}", ballast.len())
        }
        "cpus" => std::thread::available_parallelism().map_or(0, usize::from).to_string(),
        "memory" => fs::read_to_string("/proc/meminfo")
            .unwrap_or_default()
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned(),
        "ls" => {
            let mut names: Vec<String> = fs::read_dir(first)
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect();
            names.sort();
            names.join(" ")
        }
        "cat" => fs::read_to_string(first).unwrap_or_else(|e| e.to_string()).replace('\n', "|"),
        "read-disk" => {
            let mut head = vec![0; second.parse().unwrap_or(16)];
            match fs::File::open(first).and_then(|mut disk| disk.read_exact(&mut head)) {
                Ok(()) => String::from_utf8_lossy(&head).trim_end_matches('\0').to_owned(),
                Err(error) => error.to_string(),
            }
        }
        "write-disk" => {
            let mut block = vec![0; 4096];
            block[..second.len()].copy_from_slice(second.as_bytes());
            let written = fs::OpenOptions::new()
                .write(true)
                .open(first)
                .and_then(|mut disk| disk.write_all(&block).and_then(|()| disk.sync_all()));
            written.map_or_else(|error| error.to_string(), |()| "ok".into())
        }
        "print" => {
            for _ in 0..second.parse().unwrap_or(1) {
                let _ = fs::write("/dev/console", format!("{first}\n"));
            }
            "ok".into()
        }
        "poweroff" => reboot(0x4321_fedc),
        "restart" => reboot(0x0123_4567),
        other => format!("unknown command {other}"),
    }
}

fn main() {
    mount_pseudo("proc", "/proc");
    mount_pseudo("sysfs", "/sys");
    mount_pseudo("devtmpfs", "/dev");
    load_modules();
    println!("GUEST READY");
    let mut port = port();
    let (mut pending, mut state, mut ballast) = (Vec::new(), String::new(), Vec::new());
    let mut buffer = [0; 4096];
    loop {
        match port.read(&mut buffer) {
            // The host is away.
            Ok(0) | Err(_) => sleep(Duration::from_millis(1)),
            Ok(read) => pending.extend_from_slice(&buffer[..read]),
        }
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            let reply = answer(&line, &mut state, &mut ballast);
            let _ = port.write_all(format!("{reply}\n").as_bytes());
        }
    }
}
