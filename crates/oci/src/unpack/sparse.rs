//! Where the data of a file with holes belongs.

use std::io::Read;

use super::{
    Fault,
    archive::{Archive, BLOCK},
    pax::number,
};

/// A file in more pieces than this is refused. The list of this many takes 16 MiB.
pub(super) const MAX_RUNS: usize = 1 << 20;
/// The largest file that ext4 holds with blocks of 4 KiB, in bytes: 16 TiB less a block.
pub(super) const MAX_LENGTH: u64 = (1 << 44) - 4096;

/// A stretch of data in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// The runs, if they are in order, inside of the file, and as long as its data.
pub(super) fn check(runs: Vec<Run>, length: u64, stored: u64) -> Result<Vec<Run>, Fault> {
    let mut end = 0_u64;
    let mut total = 0_u64;
    for run in &runs {
        if run.offset < end {
            return Err(Fault::field("sparse map"));
        }
        end = run
            .offset
            .checked_add(run.length)
            .ok_or(Fault::field("sparse map"))?;
        total += run.length;
    }
    if end > length || length > MAX_LENGTH || total != stored {
        return Err(Fault::field("sparse map"));
    }
    Ok(runs)
}

/// The runs and the length that are in an old GNU header and in the blocks that follow it.
pub(super) fn old_gnu(
    header: &[u8; BLOCK],
    mut next: impl FnMut() -> Result<Option<[u8; BLOCK]>, Fault>,
) -> Result<(Vec<Run>, u64), Fault> {
    let length = field(&header[483..495])?;
    let mut runs = Vec::new();
    entries(&header[386..482], &mut runs)?;
    let mut goes_on = header[482] == 1;
    while goes_on {
        let block = next()?.ok_or(Fault::Truncated)?;
        entries(&block[..504], &mut runs)?;
        goes_on = block[504] == 1;
        if runs.len() > MAX_RUNS {
            return Err(Fault::field("sparse map"));
        }
    }
    Ok((runs, length))
}

fn entries(bytes: &[u8], runs: &mut Vec<Run>) -> Result<(), Fault> {
    for entry in bytes.as_chunks::<24>().0 {
        // An entry that is not used ends the list.
        if entry[0] == 0 {
            break;
        }
        runs.push(Run {
            offset: field(&entry[..12])?,
            length: field(&entry[12..])?,
        });
    }
    Ok(())
}

/// A number of 12 bytes: octal digits, or, if its first bit is set, binary.
fn field(bytes: &[u8]) -> Result<u64, Fault> {
    if bytes[0] & 0x80 != 0 {
        let (high, low) = bytes.split_at(4);
        if high != [0x80, 0, 0, 0] {
            return Err(Fault::field("sparse map"));
        }
        return Ok(low.iter().fold(0, |n, &byte| n << 8 | u64::from(byte)));
    }
    let mut value = 0_u64;
    for &byte in bytes {
        match byte {
            b'0'..=b'7' => value = value << 3 | u64::from(byte - b'0'),
            b' ' | 0 => {}
            _ => return Err(Fault::field("sparse map")),
        }
    }
    Ok(value)
}

/// The runs that are written, one number in a line, in front of a member's data.
pub(super) fn in_data<R: Read>(archive: &mut Archive<R>) -> Result<Vec<Run>, Fault> {
    let mut lines = Lines {
        archive,
        block: [0; BLOCK],
        at: BLOCK,
    };
    let count = lines.number()?;
    if count > MAX_RUNS as u64 {
        return Err(Fault::field("sparse map"));
    }
    let mut runs = Vec::new();
    for _ in 0..count {
        runs.push(Run {
            offset: lines.number()?,
            length: lines.number()?,
        });
    }
    Ok(runs)
}

struct Lines<'a, R> {
    archive: &'a mut Archive<R>,
    block: [u8; BLOCK],
    at: usize,
}

impl<R: Read> Lines<'_, R> {
    fn number(&mut self) -> Result<u64, Fault> {
        let mut digits = Vec::new();
        loop {
            if self.at == BLOCK {
                self.archive.read_exact(&mut self.block)?;
                self.at = 0;
            }
            let byte = self.block[self.at];
            self.at += 1;
            if byte == b'\n' {
                return number(&digits, "sparse map");
            }
            if digits.len() > 20 {
                return Err(Fault::field("sparse map"));
            }
            digits.push(byte);
        }
    }
}
