//! Lines in the kernel's log, which is all there is to write to.

use std::{
    fs::File,
    io::{self, Write},
};

use rustix::fs::{Mode, OFlags};
use tracing::level_filters::LevelFilter;

/// Puts the kernel's log, or nothing, behind the three standard descriptors, so that none of them
/// is taken by a file and none of the daemon's messages is lost.
pub(super) fn open() {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let null = rustix::fs::open("/dev/null", flags, Mode::empty());
    let log = rustix::fs::open("/dev/kmsg", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    if let Ok(null) = &null {
        let _ = rustix::stdio::dup2_stdin(null);
        let _ = rustix::stdio::dup2_stdout(null);
        let _ = rustix::stdio::dup2_stderr(null);
    }
    if let Ok(log) = &log {
        let _ = rustix::stdio::dup2_stderr(log);
    }
}

/// Writes one line.
pub(super) fn say(line: &str) {
    // One write is one line of the log. Nobody is left to tell if there is no log.
    let _ = io::stderr().write_all(format!("<4>cubicle: {line}\n").as_bytes());
}

/// Sends the program's own messages of that level and above to the kernel's log.
pub fn log_to_kernel(level: LevelFilter) {
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .with_writer(|| Kernel(File::options().write(true).open("/dev/kmsg").ok()))
        .try_init();
}

struct Kernel(Option<File>);

impl Write for Kernel {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            Some(log) => log.write(bytes),
            None => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
