//! The files by which programs learn where they are.

use std::{
    fmt::Write as _,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use rustix::system::sethostname;

use super::init::Error;

/// The machine's own address in `/etc/hosts`, by which its host name is found without a server.
const OWN_ADDRESS: &str = "127.0.1.1";

/// The files below one directory, which is `/` but in tests.
pub(super) struct Names<'a> {
    pub(super) root: &'a Path,
}

impl Names<'_> {
    /// Sets the host name, now and for the next boot, and makes it one that can be resolved.
    pub(super) fn set_hostname(&self, name: &str) -> Result<(), Error> {
        sethostname(name.as_bytes()).map_err(|errno| Error::Hostname {
            name: name.to_owned(),
            source: errno.into(),
        })?;
        self.write("etc/hostname", &format!("{name}\n"))?;
        let path = self.root.join("etc/hosts");
        let hosts = match fs::read_to_string(&path) {
            Ok(hosts) => hosts,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n".to_owned()
            }
            Err(source) => return Err(Error::Write { path, source }),
        };
        self.write("etc/hosts", &with_own_name(&hosts, name))
    }

    /// Sets the machine's id, by which programs tell machines apart.
    pub(super) fn set_machine_id(&self, id: &str) -> Result<(), Error> {
        if id.len() != 32
            || !id
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        {
            return Err(Error::MachineId(id.to_owned()));
        }
        self.write("etc/machine-id", &format!("{id}\n"))
    }

    /// Sets the name servers.
    pub(super) fn set_resolvers(&self, servers: &[Ipv4Addr]) -> Result<(), Error> {
        let mut conf = String::new();
        for server in servers {
            // Writing to a string cannot fail.
            let _ = writeln!(conf, "nameserver {server}");
        }
        self.write("etc/resolv.conf", &conf)
    }

    /// Says in `/run/e2b` which sandbox this is, for programs that were started without a word of
    /// it in their environment.
    pub(super) fn set_marks(&self, marks: &[(&str, &str)]) -> Result<(), Error> {
        marks
            .iter()
            .try_for_each(|(name, value)| self.write(&format!("run/e2b/.{name}"), value))
    }

    /// Writes a file that everybody may read, unless it says that already: each write costs a copy
    /// of what the sandbox shares with others.
    fn write(&self, path: &str, content: &str) -> Result<(), Error> {
        let path = self.root.join(path);
        if fs::read(&path).is_ok_and(|found| found == content.as_bytes()) {
            return Ok(());
        }
        replace(&path, content).map_err(|source| Error::Write { path, source })
    }
}

/// Writes in place, as the file may be one that something is mounted on.
fn replace(path: &Path, content: &str) -> io::Result<()> {
    match overwrite(path, content) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // Its directory is missing, or it is a link that leads nowhere (`resolv.conf` of a
            // service that isn't running).
            if path.is_symlink() {
                fs::remove_file(path)?;
            } else if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            overwrite(path, content)
        }
        result => result,
    }
}

/// Does not empty the file first: what replaces an id is mostly as long as what was there, and
/// giving pages back to take them again is a large part of such a write.
fn overwrite(path: &Path, content: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    file.write_all(content.as_bytes())?;
    let metadata = file.metadata()?;
    if metadata.len() != content.len() as u64 {
        file.set_len(content.len() as u64)?;
    }
    if metadata.permissions().mode() & 0o444 != 0o444 {
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
    }
    Ok(())
}

/// `/etc/hosts` in which [`OWN_ADDRESS`] has that name and no other.
fn with_own_name(hosts: &str, name: &str) -> String {
    let own = |line: &str| line.split_ascii_whitespace().next() == Some(OWN_ADDRESS);
    let mut result = String::with_capacity(hosts.len() + name.len() + 16);
    for line in hosts.lines().filter(|line| !own(line)) {
        result.push_str(line);
        result.push('\n');
    }
    result.push_str(OWN_ADDRESS);
    result.push(' ');
    result.push_str(name);
    result.push('\n');
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        root
    }

    #[test]
    fn the_own_name_replaces_the_one_before() {
        let hosts = with_own_name(
            "127.0.0.1 localhost\n127.0.1.1\told old.local\n::1 x",
            "new",
        );
        assert_eq!(hosts, "127.0.0.1 localhost\n::1 x\n127.0.1.1 new\n");
        assert_eq!(with_own_name(&hosts, "new"), hosts);
    }

    #[test]
    fn a_shorter_content_leaves_nothing_of_a_longer_one() {
        let root = root();
        let path = root.path().join("etc/hostname");
        for content in ["a-long-name\n", "short\n", "a-name-as-long-as-before\n", ""] {
            replace(&path, content).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        replace(&path, "x").unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o644);
    }

    #[test]
    fn machine_ids_are_checked() {
        let root = root();
        let names = Names { root: root.path() };
        let id = "0123456789abcdef0123456789abcdef";
        names.set_machine_id(id).unwrap();
        let path = root.path().join("etc/machine-id");
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{id}\n"));
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o644
        );
        for bad in ["", "0123", &id.to_uppercase(), &format!("{id}0")] {
            assert!(
                matches!(names.set_machine_id(bad), Err(Error::MachineId(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn resolvers_replace_a_link_that_leads_nowhere() {
        let root = root();
        let path = root.path().join("etc/resolv.conf");
        std::os::unix::fs::symlink("/nowhere/stub-resolv.conf", &path).unwrap();
        let names = Names { root: root.path() };
        names
            .set_resolvers(&[Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(1, 1, 1, 1)])
            .unwrap();
        assert_eq!(
            fs::read_to_string(path).unwrap(),
            "nameserver 8.8.8.8\nnameserver 1.1.1.1\n"
        );
    }

    #[test]
    fn marks_make_their_directory() {
        let root = root();
        Names { root: root.path() }
            .set_marks(&[("E2B_SANDBOX", "true")])
            .unwrap();
        assert_eq!(
            fs::read_to_string(root.path().join("run/e2b/.E2B_SANDBOX")).unwrap(),
            "true"
        );
    }
}
