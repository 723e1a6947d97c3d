//! What is mounted where, from /proc/thread-self/mountinfo
//! (proc_pid_mountinfo(5)).

use std::{
    ffi::OsString,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

use crate::error::{Context as _, Result};

/// One mount.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) point: PathBuf,
    pub(super) filesystem: String,
    /// The device, for file systems that have one.
    pub(super) source: OsString,
}

/// The mount whose root is `path`; the topmost, if there are several.
pub(super) fn mounted_at(path: &Path) -> Result<Option<Mount>> {
    Ok(all()?.into_iter().rev().find(|mount| mount.point == path))
}

/// Name of the file system that holds `path`, which must be canonical.
pub(super) fn filesystem_of(path: &Path) -> Result<String> {
    let mounts = all()?;
    // Later mounts cover earlier ones; `max_by_key` returns the last of equals.
    let found = mounts
        .iter()
        .filter(|mount| path.starts_with(&mount.point))
        .max_by_key(|mount| mount.point.as_os_str().len());
    Ok(found.map_or_else(
        || "an unknown file system".to_owned(),
        |mount| mount.filesystem.clone(),
    ))
}

fn all() -> Result<Vec<Mount>> {
    let path = Path::new("/proc/thread-self/mountinfo");
    let text = std::fs::read(path).at("read", path)?;
    Ok(text
        .split(|byte| *byte == b'\n')
        .filter_map(parse)
        .collect())
}

fn parse(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let separator = fields.iter().position(|field| *field == b"-")?;
    Some(Mount {
        point: PathBuf::from(unescape(fields.get(4)?)),
        filesystem: unescape(fields.get(separator + 1)?)
            .to_string_lossy()
            .into_owned(),
        source: unescape(fields.get(separator + 2)?),
    })
}

/// Space, tab, newline and backslash are written as three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'))
            }
            _ => None,
        };
        out.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt as _;

    use super::*;

    #[test]
    fn parses_what_the_kernel_writes() {
        let line = br"36 35 98:0 /mnt1 /data\040dir/st\134ore rw,noatime master:1 - xfs /dev/loop7 rw,discard";
        let mount = parse(line).unwrap();
        assert_eq!(mount.point, Path::new(r"/data dir/st\ore"));
        assert_eq!(mount.filesystem, "xfs");
        assert_eq!(mount.source.as_bytes(), b"/dev/loop7");
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"36 35 98:0 / / rw"), None);
        assert_eq!(unescape(br"\9\04"), OsString::from(r"\9\04"));
    }

    #[test]
    fn knows_the_mounts_of_this_machine() {
        assert_eq!(
            mounted_at(Path::new("/proc")).unwrap().unwrap().filesystem,
            "proc"
        );
        assert_eq!(mounted_at(Path::new("/proc/self")).unwrap(), None);
        assert_eq!(filesystem_of(Path::new("/proc/self")).unwrap(), "proc");
    }
}
