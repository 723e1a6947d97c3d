//! A process that stands for a VM: it maps an image privately and writes.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "every test binary uses another part of this"
)]

use std::{
    io::{BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use cubicle_cow::memory::Source;
use proptest::prelude::*;

pub const PAGE: usize = 4096;
pub const PAGES: usize = 512;
const CHILD: &str = "CUBICLE_COW_TEST_IMAGE";
const WORD: &str = "model:";

/// What one step does to a page.
#[derive(Debug, Clone, Copy)]
pub enum Write {
    Fill(u8),
    Byte(u16, u8),
    Zero,
    Same,
    Read,
}

/// The process that tests start, in a test of this name that is none of its own, `model_process`. It
/// maps the image that the environment names, and applies the writes that it is told.
pub fn play() {
    let Ok(image) = std::env::var(CHILD) else {
        return;
    };
    let file = std::fs::File::open(image).unwrap();
    let len = file.metadata().unwrap().len() as usize;
    let flags = rustix::mm::MapFlags::PRIVATE;
    let protection = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
    // SAFETY: a fresh private mapping that lives until the process ends.
    let memory = unsafe {
        let start = rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, &file, 0);
        std::slice::from_raw_parts_mut(start.unwrap().cast::<u8>(), len)
    };
    println!("\n{WORD}{}", memory.as_ptr() as usize);
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let numbers: Vec<usize> = line.split(' ').map(|word| word.parse().unwrap()).collect();
        let page = &mut memory[numbers[0] * PAGE..][..PAGE];
        match numbers[1..] {
            [0, byte] => page.fill(byte as u8),
            [1, at, byte] => page[at] = byte as u8,
            // A write that changes nothing makes the page dirty all the same.
            [2] => {
                let first = std::hint::black_box(page[0]);
                // SAFETY: in bounds; volatile so that it happens.
                unsafe { page.as_mut_ptr().write_volatile(first) };
            }
            [3] => drop(std::hint::black_box(page.to_vec())),
            _ => panic!("{line}"),
        }
        println!("{WORD}done");
    }
}

pub struct Model {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    pub source: Source,
    /// What its memory must be.
    pub content: Vec<u8>,
}

impl Model {
    pub fn start(image: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "model_process", "--nocapture"])
            .env(CHILD, image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let address = word(&mut output).parse().unwrap();
        let content = std::fs::read(image).unwrap();
        let source = Source {
            pid: child.id(),
            address,
            len: content.len() as u64,
        };
        Self {
            child,
            input,
            output,
            source,
            content,
        }
    }

    pub fn apply(&mut self, page: usize, write: Write) {
        let content = &mut self.content[page * PAGE..][..PAGE];
        let command = match write {
            Write::Fill(byte) => {
                content.fill(byte);
                format!("{page} 0 {byte}")
            }
            Write::Zero => {
                content.fill(0);
                format!("{page} 0 0")
            }
            Write::Byte(at, byte) => {
                let at = usize::from(at) % PAGE;
                content[at] = byte;
                format!("{page} 1 {at} {byte}")
            }
            Write::Same => format!("{page} 2"),
            Write::Read => format!("{page} 3"),
        };
        writeln!(self.input, "{command}").unwrap();
        assert_eq!(word(&mut self.output), "done");
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn word(output: &mut impl std::io::BufRead) -> String {
    let mut line = String::new();
    while output.read_line(&mut line).unwrap() > 0 {
        if let Some(word) = line.trim().strip_prefix(WORD) {
            return word.to_owned();
        }
        line.clear();
    }
    panic!("the model process ended");
}

/// Some writes, to random pages.
pub fn writes() -> impl Strategy<Value = Vec<(usize, Write)>> {
    let write = prop_oneof![
        4 => any::<u8>().prop_map(Write::Fill),
        4 => (any::<u16>(), any::<u8>()).prop_map(|(at, byte)| Write::Byte(at, byte)),
        2 => Just(Write::Zero),
        1 => Just(Write::Same),
        1 => Just(Write::Read),
    ];
    proptest::collection::vec((0..PAGES, write), 0..40)
}

/// An image of zero and other pages.
pub fn base_image(path: &Path) {
    let mut content = vec![0; PAGES * PAGE];
    for (index, page) in content.chunks_mut(PAGE).enumerate() {
        if index % 3 > 0 {
            page.fill(index as u8);
        }
    }
    std::fs::write(path, content).unwrap();
}

/// Whether a file is this memory.
pub fn same(path: &Path, content: &[u8]) {
    assert!(
        std::fs::read(path).unwrap() == content,
        "{} is another memory",
        path.display()
    );
}
