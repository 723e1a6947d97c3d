//! Kernel settings under `/proc/sys/net`, which shows each thread those of its own namespace.

use std::{fs, io};

use crate::{Error, Result};

fn path(key: &str) -> String {
    format!("/proc/sys/net/{key}")
}

/// Sets `key`, a path below `/proc/sys/net`.
pub(crate) fn set(key: &str, value: &str) -> Result<()> {
    let path = path(key);
    fs::write(&path, value).map_err(Error::file("write", path))
}

/// Sets `key` if the kernel knows it: one built or booted without IPv6 has none of its settings.
pub(crate) fn set_if_present(key: &str, value: &str) -> Result<()> {
    let path = path(key);
    match fs::write(&path, value) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::file("write", path)(error))
        }
        _ => Ok(()),
    }
}

/// Whether the switch `key` is on.
pub(crate) fn is_on(key: &str) -> Result<bool> {
    let path = path(key);
    let text = fs::read_to_string(&path).map_err(Error::file("read", path))?;
    Ok(text.trim() != "0")
}
