//! Layers are compressed, or not, and their media types do not always say so truthfully.

use std::io::{self, BufRead as _, BufReader, Chain, Cursor, Read};

use super::Fault;

const BUFFER: usize = 1 << 17;
/// The largest window of a zstd stream that is accepted, as a power of two: 128 MiB, which is what
/// the command line tool accepts too.
const ZSTD_WINDOW_LOG: u32 = 27;

/// A layer's bytes, decompressed.
pub(super) fn open<R: Read>(mut input: R) -> Result<Decompressed<R>, Fault> {
    let mut start = [0; 6];
    let mut length = 0;
    while length < start.len() {
        match input.read(&mut start[length..]) {
            Ok(0) => break,
            Ok(n) => length += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Fault::Input(error)),
        }
    }
    let whole = Cursor::new(start).take(length as u64).chain(input);
    let start = &start[..length];
    if start.starts_with(b"\x1f\x8b") {
        let input = BufReader::with_capacity(BUFFER, whole);
        return Ok(Decompressed::Gzip(Box::new(
            flate2::bufread::MultiGzDecoder::new(input),
        )));
    }
    if start.starts_with(b"\x28\xb5\x2f\xfd") || is_skippable_zstd(start) {
        let input = BufReader::with_capacity(BUFFER, whole);
        let mut decoder = zstd::stream::read::Decoder::with_buffer(input).map_err(Fault::Input)?;
        decoder
            .window_log_max(ZSTD_WINDOW_LOG)
            .map_err(Fault::Input)?;
        return Ok(Decompressed::Zstd(decoder));
    }
    for (magic, name) in [(&b"BZh"[..], "bzip2"), (b"\xfd7zXZ\0", "xz")] {
        if start.starts_with(magic) {
            return Err(Fault::Compression(name));
        }
    }
    Ok(Decompressed::Plain(BufReader::with_capacity(BUFFER, whole)))
}

/// Frames that hold something else may come first (0x184D2A50 to 5F, little-endian).
fn is_skippable_zstd(start: &[u8]) -> bool {
    matches!(start, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

type Whole<R> = BufReader<Chain<io::Take<Cursor<[u8; 6]>>, R>>;

/// The bytes that come out.
pub(super) enum Decompressed<R: Read> {
    Plain(Whole<R>),
    Gzip(Box<flate2::bufread::MultiGzDecoder<Whole<R>>>),
    Zstd(zstd::stream::read::Decoder<'static, Whole<R>>),
}

impl<R: Read> Read for Decompressed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Decompressed::Plain(input) => {
                let n = input.fill_buf()?.read(buffer)?;
                input.consume(n);
                Ok(n)
            }
            Decompressed::Gzip(input) => input.read(buffer),
            Decompressed::Zstd(input) => input.read(buffer),
        }
    }
}
