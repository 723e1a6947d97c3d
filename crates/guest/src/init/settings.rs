use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use rustix::process::{Resource, Rlimit, setrlimit};

use super::{Error, console::say};

const DEFAULT_HOSTNAME: &str = "cubicle";
const RESOLVERS: &str = "nameserver 8.8.8.8\nnameserver 1.1.1.1\n";
const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";

/// Open files that a program may have: what it has at first, and what it may ask for.
const OPEN_FILES: (u64, u64) = (65_536, 1 << 20);

/// Host name, resolver and limits, where the root file system doesn't say otherwise.
pub(super) fn apply() {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let (current, maximum) = OPEN_FILES;
    let files = Rlimit {
        current: Some(current),
        maximum: Some(maximum),
    };
    if let Err(error) = setrlimit(Resource::Nofile, files) {
        say(&format!("cannot raise the limit of open files: {error}"));
    }
    let hostname = fs::read_to_string("/etc/hostname").unwrap_or_default();
    let hostname = hostname
        .lines()
        .map(str::trim)
        .find(|line| !line.is_empty());
    if let Err(error) = rustix::system::sethostname(hostname.unwrap_or(DEFAULT_HOSTNAME).as_bytes())
    {
        say(&format!("cannot set the host name: {error}"));
    }
    for (path, content) in [("/etc/resolv.conf", RESOLVERS), ("/etc/hosts", HOSTS)] {
        if let Err(error) = provide(Path::new(path), content) {
            say(&error.to_string());
        }
    }
}

/// Writes a file that isn't there or is empty, or is a link to nowhere: what would serve it doesn't
/// run here.
fn provide(path: &Path, content: &str) -> Result<(), Error> {
    let failed = |source| Error::File {
        what: "write",
        path: PathBuf::from(path),
        source,
    };
    match fs::metadata(path) {
        Ok(found) if found.len() > 0 => return Ok(()),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let mut file = fs::File::create_new(path).map_err(failed)?;
    file.write_all(content.as_bytes()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_provided_only_where_there_is_none() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("etc/hosts");
        provide(&path, "new").unwrap();
        provide(&path, "newer").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        let link = root.path().join("etc/resolv.conf");
        fs::write(&link, "").unwrap();
        provide(&link, "first").unwrap();
        assert_eq!(fs::read_to_string(&link).unwrap(), "first");
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("/run/no/such/stub", &link).unwrap();
        provide(&link, "nameserver").unwrap();
        assert!(!fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&link).unwrap(), "nameserver");
    }
}
