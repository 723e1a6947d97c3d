//! A process that stands for a VM, and what benchmarks share besides.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "every benchmark uses another part of this"
)]

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    time::Duration,
};

use cubicle_cow::memory::Source;
use rustix::mm::{MapFlags, ProtFlags, mmap};

/// Guest memory, in bytes.
pub const GUEST: usize = 512 << 20;
const IMAGE: &str = "CUBICLE_COW_BENCH_IMAGE";

/// Plays the VM, if this process was started to do that.
pub fn is_vm() -> bool {
    let image = std::env::var(IMAGE);
    if let Ok(image) = &image {
        play_vm(Path::new(image));
    }
    image.is_ok()
}

/// How the written pages lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pattern {
    /// Runs of 64 KiB.
    Runs,
    /// Single pages, three clean ones between them.
    Pages,
}

pub fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; len];
    for word in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    bytes
}

/// The other process: maps the image and writes what it is told, `megabytes pattern seed`.
fn play_vm(image: &Path) {
    let file = File::open(image).unwrap();
    // SAFETY: a fresh private mapping that lives until the process ends.
    let memory = unsafe {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let hint = std::ptr::null_mut();
        let start = mmap(hint, GUEST, protection, MapFlags::PRIVATE, &file, 0).unwrap();
        std::slice::from_raw_parts_mut(start.cast::<u8>(), GUEST)
    };
    println!("{}", memory.as_ptr() as usize);
    for line in std::io::stdin().lines() {
        let numbers: Vec<usize> = line
            .unwrap()
            .split(' ')
            .map(|word| word.parse().unwrap())
            .collect();
        let (run, stride) = [(64 << 10, 160 << 10), (4 << 10, 16 << 10)][numbers[1]];
        let content = noise(run, numbers[2] as u64);
        let count = (numbers[0] << 20) / run;
        for index in 0..count {
            let at = index * stride % (GUEST - run);
            memory[at..at + run].copy_from_slice(&content);
        }
        println!("done");
    }
}

pub struct Vm {
    child: Child,
    output: BufReader<ChildStdout>,
    pub source: Source,
}

impl Vm {
    pub fn start(image: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(IMAGE, image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let source = Source {
            pid: child.id(),
            address: line.trim().parse().unwrap(),
            len: GUEST as u64,
        };
        Self {
            child,
            output,
            source,
        }
    }

    pub fn write(&mut self, megabytes: usize, pattern: Pattern, seed: usize) {
        let input = self.child.stdin.as_mut().unwrap();
        writeln!(input, "{megabytes} {} {seed}", pattern as u8).unwrap();
        self.output.read_line(&mut String::new()).unwrap();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
