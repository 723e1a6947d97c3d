//! `Range: bytes=...`, RFC 9110, section 14.

use std::ops::Range;

/// What a `Range` header asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Requested {
    /// Everything: the header makes no sense, or asks for several parts at once, which a server may
    /// answer with the whole.
    Whole,
    /// These bytes; not empty.
    Part(Range<u64>),
    /// Bytes that the file doesn't have.
    Nothing,
}

/// Reads the header for a file of `len` bytes.
pub(super) fn parse(header: &str, len: u64) -> Requested {
    let Some((first, last)) = header
        .trim()
        .strip_prefix("bytes=")
        .and_then(|range| range.trim().split_once('-'))
    else {
        return Requested::Whole;
    };
    let number = |text: &str| match text.trim() {
        "" => Some(None),
        // `parse` would take a sign.
        text if text.bytes().all(|byte| byte.is_ascii_digit()) => {
            Some(Some(text.parse().unwrap_or(u64::MAX)))
        }
        _ => None,
    };
    let part = match (number(first), number(last)) {
        (Some(Some(first)), Some(None)) => first..len,
        (Some(Some(first)), Some(Some(last))) if first <= last => {
            first..last.saturating_add(1).min(len)
        }
        (Some(None), Some(Some(suffix))) => len.saturating_sub(suffix)..len,
        _ => return Requested::Whole,
    };
    if part.is_empty() {
        Requested::Nothing
    } else {
        Requested::Part(part)
    }
}

#[cfg(test)]
mod tests {
    use super::{Requested::*, *};

    #[test]
    fn ranges_are_cut_to_the_file() {
        for (header, want) in [
            ("bytes=0-0", Part(0..1)),
            ("bytes=2-5", Part(2..6)),
            ("bytes=2-", Part(2..10)),
            ("bytes=-3", Part(7..10)),
            ("bytes=-30", Part(0..10)),
            ("bytes=5-99999999999999999999999", Part(5..10)),
            (" bytes= 1 - 2 ", Part(1..3)),
            ("bytes=10-", Nothing),
            ("bytes=10-20", Nothing),
            ("bytes=-0", Nothing),
            ("bytes=99999999999999999999999-", Nothing),
            ("bytes=5-2", Whole),
            ("bytes=-", Whole),
            ("bytes=+1-2", Whole),
            ("bytes=a-b", Whole),
            ("bytes=0-1,3-4", Whole),
            ("lines=0-1", Whole),
            ("", Whole),
        ] {
            assert_eq!(parse(header, 10), want, "{header:?}");
        }
        assert_eq!(parse("bytes=0-", 0), Nothing);
    }
}
