//! The extended headers of pax: records of the form `LENGTH KEY=VALUE\n`.

use super::{
    Fault,
    sparse::{MAX_RUNS, Run},
};

const XATTR: &[u8] = b"SCHILY.xattr.";

/// What an extended header says about the member that follows it.
#[derive(Debug, Default)]
pub(super) struct Extensions {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: Sparse,
}

/// What it says if the member is sparse, in any of the three forms that GNU tar has had.
#[derive(Debug, Default)]
pub(super) struct Sparse {
    pub(super) name: Option<Vec<u8>>,
    /// Length of the file, holes included.
    pub(super) length: Option<u64>,
    /// Offsets and lengths, alternating: forms 0.0 and 0.1.
    numbers: Option<Vec<u64>>,
    /// Form 1.0, where they are in front of the data.
    in_data: bool,
}

impl Sparse {
    /// The runs of data, if they are not in front of the data.
    pub(super) fn runs(&self) -> Result<Option<Vec<Run>>, Fault> {
        if self.in_data {
            return Ok(None);
        }
        let numbers = self.numbers.as_deref().unwrap_or_default();
        let (pairs, rest) = numbers.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(Fault::field("sparse map"));
        }
        let run = |&[offset, length]: &[u64; 2]| Run { offset, length };
        Ok(Some(pairs.iter().map(run).collect()))
    }
}

pub(super) fn parse(mut records: &[u8]) -> Result<Extensions, Fault> {
    let mut found = Extensions::default();
    while !records.is_empty() {
        // Some programs fill the header up with zeros.
        if records.iter().all(|&byte| byte == 0) {
            break;
        }
        let (key, value, rest) =
            record(records).ok_or(Fault::Malformed("an extended header that is no list"))?;
        records = rest;
        apply(&mut found, key, value)?;
    }
    Ok(found)
}

fn apply(found: &mut Extensions, key: &[u8], value: &[u8]) -> Result<(), Fault> {
    let text = || (!value.is_empty()).then(|| value.to_vec());
    match key {
        b"path" => found.path = text(),
        b"linkpath" => found.link = text(),
        b"size" => found.size = Some(number(value, "size")?),
        b"uid" => found.uid = Some(number(value, "uid")?),
        b"gid" => found.gid = Some(number(value, "gid")?),
        b"mtime" => found.mtime = Some(time(value).ok_or(Fault::field("mtime"))?),
        b"GNU.sparse.name" => found.sparse.name = text(),
        b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
            found.sparse.length = Some(number(value, "sparse size")?);
        }
        b"GNU.sparse.major" => found.sparse.in_data = value == b"1",
        b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
            let numbers = found.sparse.numbers.get_or_insert_default();
            if numbers.len() >= 2 * MAX_RUNS {
                return Err(Fault::field("sparse map"));
            }
            numbers.push(number(value, "sparse map")?);
        }
        b"GNU.sparse.map" => {
            let numbers = value
                .split(|&byte| byte == b',')
                .filter(|digits| !digits.is_empty());
            let numbers = numbers.map(|digits| number(digits, "sparse map"));
            found.sparse.numbers = Some(numbers.collect::<Result<_, _>>()?);
        }
        _ => {
            if let Some(name) = key.strip_prefix(XATTR)
                && !name.is_empty()
                && !name.contains(&0)
            {
                found.xattrs.retain(|(known, _)| known != name);
                found.xattrs.push((name.to_vec(), value.to_vec()));
            }
        }
    }
    Ok(())
}

/// The first record's key and value, and what follows it.
fn record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = records.iter().take(10).position(|&byte| byte == b' ')?;
    let length: usize = std::str::from_utf8(&records[..space]).ok()?.parse().ok()?;
    let body = records.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|&byte| byte == b'=')?;
    Some((&body[..equals], &body[equals + 1..], &records[length..]))
}

pub(super) fn number(digits: &[u8], field: &'static str) -> Result<u64, Fault> {
    let parsed = std::str::from_utf8(digits)
        .ok()
        .filter(|digits| !digits.starts_with('+'))
        .and_then(|digits| digits.parse().ok());
    parsed.ok_or(Fault::field(field))
}

/// Seconds and nanoseconds from a decimal number, which may be negative.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let mut nanoseconds = 0;
    for position in 0..9 {
        let digit = match fraction.as_bytes().get(position) {
            Some(digit) if digit.is_ascii_digit() => u32::from(digit - b'0'),
            Some(_) => return None,
            None => 0,
        };
        nanoseconds = nanoseconds * 10 + digit;
    }
    if whole.starts_with('-') && nanoseconds > 0 {
        // -1.25 s is 0.75 s after -2 s.
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds));
    }
    Some((seconds, nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_may_hold_anything() {
        let found = parse(b"12 path=a=b\n32 SCHILY.xattr.user.x=\0\n=\xff end\n").unwrap();
        assert_eq!(found.path.unwrap(), b"a=b");
        assert_eq!(
            found.xattrs,
            [(b"user.x".to_vec(), b"\0\n=\xff end".to_vec())]
        );
    }

    #[test]
    fn what_is_no_list_of_records_is_refused() {
        for bad in [
            &b"99 path=a\n"[..],
            b"11 path=a=b\n",
            b"x path=a\n",
            b"3 a\n",
            b"0 =\n",
            b"1 ",
        ] {
            assert!(parse(bad).is_err(), "{}", bad.escape_ascii());
        }
        assert!(parse(b"9 uid=-1\n").is_err());
    }

    #[test]
    fn times_have_fractions_and_signs() {
        assert_eq!(time(b"12"), Some((12, 0)));
        assert_eq!(time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(time(b"12.0000000019"), Some((12, 1)));
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"-0.25"), Some((-1, 750_000_000)));
        assert_eq!(time(b"1.x"), None);
        assert_eq!(time(b""), None);
    }
}
