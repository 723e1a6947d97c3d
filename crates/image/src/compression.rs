//! The compressions that kernels and their modules come in.

use std::io::{self, Read};

use crate::error::{Error, Result};

/// Nothing that a kernel package compresses is larger, unpacked, than this: 1 GiB.
const MAX_UNPACKED: u64 = 1 << 30;

/// A compression, known by the first bytes of what it made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Xz,
    Zstd,
    Gzip,
    /// The frame format of the `lz4 -l` tool, which only the kernel still uses.
    Lz4Legacy,
}

impl Format {
    const MAGIC: [(Format, &'static [u8]); 4] = [
        (Format::Xz, b"\xfd7zXZ\0"),
        (Format::Zstd, b"\x28\xb5\x2f\xfd"),
        (Format::Gzip, b"\x1f\x8b"),
        (Format::Lz4Legacy, b"\x02\x21\x4c\x18"),
    ];

    pub(crate) fn detect(bytes: &[u8]) -> Option<Format> {
        let known = Format::MAGIC
            .iter()
            .find(|(_, magic)| bytes.starts_with(magic));
        known.map(|(format, _)| *format)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Format::Xz => "xz",
            Format::Zstd => "zstd",
            Format::Gzip => "gzip",
            Format::Lz4Legacy => "lz4",
        }
    }

    /// Unpacks one stream at the start of `bytes`; whatever follows it is ignored. `what` names
    /// the input in an error.
    pub(crate) fn decompress(self, bytes: &[u8], what: &str) -> Result<Vec<u8>> {
        let unpack = || match self {
            Format::Xz => read_all(liblzma::read::XzDecoder::new(bytes)),
            Format::Gzip => read_all(flate2::read::GzDecoder::new(bytes)),
            Format::Zstd => {
                let decoder = ruzstd::decoding::StreamingDecoder::new(bytes);
                read_all(decoder.map_err(io::Error::other)?)
            }
            Format::Lz4Legacy => lz4_legacy(bytes),
        };
        unpack().map_err(|source| Error::Decompress {
            what: what.to_owned(),
            format: self.name(),
            source,
        })
    }
}

fn read_all(reader: impl Read) -> io::Result<Vec<u8>> {
    let mut unpacked = Vec::new();
    if reader.take(MAX_UNPACKED + 1).read_to_end(&mut unpacked)? as u64 > MAX_UNPACKED {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "it unpacks to more than 1 GiB",
        ));
    }
    Ok(unpacked)
}

/// Blocks of at most 8 MiB, unpacked, each preceded by its packed length. The format has no end
/// mark: a block that is not full is the last one, and so is one that the input has no room for
/// (the kernel's build appends the unpacked size to the stream).
fn lz4_legacy(bytes: &[u8]) -> io::Result<Vec<u8>> {
    const BLOCK: usize = 8 << 20;
    let mut rest = &bytes[4..];
    let mut unpacked = Vec::new();
    let mut block = vec![0; BLOCK];
    while let Some((length, tail)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let Some((packed, tail)) = tail.split_at_checked(length) else {
            break;
        };
        let n = lz4_flex::block::decompress_into(packed, &mut block).map_err(io::Error::other)?;
        unpacked.extend_from_slice(&block[..n]);
        if unpacked.len() as u64 > MAX_UNPACKED {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "more than 1 GiB unpacked",
            ));
        }
        rest = tail;
        if n < BLOCK {
            break;
        }
    }
    if unpacked.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the first block is cut short",
        ));
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        process::{Command, Stdio},
    };

    use super::*;

    /// Text that compresses, longer than one block of the legacy lz4 format.
    fn sample() -> Vec<u8> {
        (0..2_000_000_u32)
            .flat_map(|i| (i / 7).to_le_bytes())
            .chain(0..100)
            .collect()
    }

    fn packed_by(program: &str, arguments: &[&str], input: Vec<u8>) -> Option<Vec<u8>> {
        let mut command = Command::new(program);
        let piped = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = piped.spawn().ok()?;
        let mut stdin = child.stdin.take().unwrap();
        let writer = std::thread::spawn(move || stdin.write_all(&input).unwrap());
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        output.status.success().then_some(output.stdout)
    }

    fn round_trip(format: Format, program: &str, arguments: &[&str]) {
        let Some(mut packed) = packed_by(program, arguments, sample()) else {
            panic!("`{program}` is needed by this test");
        };
        assert_eq!(Format::detect(&packed), Some(format));
        packed.extend_from_slice(&(sample().len() as u32).to_le_bytes());
        let unpacked = format.decompress(&packed, "a sample").unwrap();
        assert!(
            unpacked == sample(),
            "{} gave back other bytes",
            format.name()
        );
        let error = format
            .decompress(&packed[..20], "a sample")
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            format!("cannot decompress a sample ({})", format.name())
        );
    }

    #[test]
    fn xz_with_the_x86_filter_and_trailing_size() {
        round_trip(
            Format::Xz,
            "xz",
            &["--check=crc32", "--x86", "--lzma2=dict=1MiB", "-1"],
        );
    }

    #[test]
    fn gzip_with_trailing_size() {
        round_trip(Format::Gzip, "gzip", &["-1"]);
    }

    #[test]
    fn zstd_with_trailing_size() {
        round_trip(Format::Zstd, "zstd", &["-1", "-c"]);
    }

    #[test]
    fn legacy_lz4_with_trailing_size() {
        round_trip(Format::Lz4Legacy, "lz4", &["-l", "-1", "-c"]);
    }

    #[test]
    fn other_bytes_are_no_compression() {
        assert_eq!(Format::detect(b"\x7fELF"), None);
        assert_eq!(Format::detect(b""), None);
    }
}
