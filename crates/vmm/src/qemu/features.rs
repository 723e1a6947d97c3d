//! What the installed QEMU is and can do; found out once per program.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use tokio::process::Command;

use crate::error::{Error, Result};

/// A release of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First number.
    pub major: u16,
    /// Second number.
    pub minor: u16,
    /// Third number.
    pub micro: u16,
}

impl Version {
    /// Oldest release that works.
    pub const OLDEST: Self = Self::new(7, 2);

    const fn new(major: u16, minor: u16) -> Self {
        Self {
            major,
            minor,
            micro: 0,
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// A QEMU program and what it can do.
#[derive(Debug, Clone)]
pub struct Features {
    /// The program, all symbolic links resolved.
    pub binary: PathBuf,
    /// Its release.
    pub version: Version,
    /// Where it looks for firmware.
    pub(crate) data_dirs: Vec<PathBuf>,
}

impl Features {
    /// Asks `binary` (a path, or a name to find in `PATH`) what it is: two runs at the same time,
    /// about 15 ms.
    ///
    /// # Errors
    /// [`Error::Unusable`] if there is no such program or it does not say what it is.
    pub async fn detect(binary: &Path) -> Result<Self> {
        let unusable = |reason: String| Error::Unusable {
            binary: binary.to_owned(),
            reason,
        };
        let binary = find(binary).ok_or_else(|| {
            unusable("there is no such program; install qemu-system-x86".to_owned())
        })?;
        let (version, dirs) =
            tokio::join!(run(&binary, &["--version"]), run(&binary, &["-L", "help"]));
        let unusable = |reason: String| Error::Unusable {
            binary: binary.clone(),
            reason,
        };
        let version = version.map_err(|error| unusable(error.to_string()))?;
        let version = parse_version(&version)
            .ok_or_else(|| unusable(format!("it does not tell its version but: {version}")))?;
        if version < Version::OLDEST {
            let oldest = Version::OLDEST;
            return Err(unusable(format!(
                "it is version {version}, and {oldest} is needed"
            )));
        }
        let dirs = dirs.map_err(|error| unusable(error.to_string()))?;
        let data_dirs = dirs
            .lines()
            .map(PathBuf::from)
            .filter(|dir| dir.is_absolute())
            .collect();
        Ok(Self {
            binary,
            version,
            data_dirs,
        })
    }

    /// Whether a memory image may be opened read-only and yet be mapped as writable private
    /// memory. Before 8.2, every VM must be able to open its image for writing.
    #[must_use]
    pub fn read_only_images(&self) -> bool {
        self.version >= Version::new(8, 2)
    }

    /// Whether `/dev/kvm` may be handed over as a descriptor. Before 9.0, the VM's process opens it
    /// by its path, and so must be in the group that may.
    pub(crate) fn kvm_descriptor(&self) -> bool {
        self.version >= Version::new(9, 0)
    }

    /// Whether `-incoming file:` exists; the older `fd:` of a regular file is deprecated since.
    pub(crate) fn incoming_file(&self) -> bool {
        self.version >= Version::new(8, 2)
    }
}

fn find(binary: &Path) -> Option<PathBuf> {
    if binary.components().count() > 1 {
        return binary.canonicalize().ok();
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/usr/local/bin".into());
    std::env::split_paths(&path).find_map(|dir| dir.join(binary).canonicalize().ok())
}

async fn run(binary: &Path, arguments: &[&str]) -> io::Result<String> {
    let output = Command::new(binary)
        .args(arguments)
        .kill_on_drop(true)
        .output()
        .await?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(io::Error::other(format!("{}: {error}", output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)`.
fn parse_version(text: &str) -> Option<Version> {
    let (_, rest) = text.split_once("version ")?;
    let numbers: String = rest
        .chars()
        .take_while(|c| c.is_ascii_digit() || *c == '.')
        .collect();
    let mut numbers = numbers.split('.').map(|number| number.parse().ok());
    let (major, minor) = (numbers.next()??, numbers.next()??);
    Some(Version {
        major,
        minor,
        micro: numbers.next().flatten().unwrap_or(0),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_ordered() {
        let debian = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)\nFoo";
        let ten = parse_version(debian).unwrap();
        assert_eq!(ten.to_string(), "10.0.2");
        let seven = parse_version("QEMU emulator version 7.2.22").unwrap();
        assert!(seven >= Version::OLDEST && seven < ten);
        assert!(parse_version("QEMU emulator version 9.1").unwrap() > seven);
        assert_eq!(parse_version("busybox"), None);
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let error = Features::detect(Path::new("/nonexistent/qemu"))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("/nonexistent/qemu"), "{error}");
        let error = Features::detect(Path::new("/bin/true")).await.unwrap_err();
        assert!(matches!(error, Error::Unusable { .. }), "{error}");
    }
}
