use std::{
    borrow::Cow,
    io,
    path::{Path, PathBuf},
};

use super::Error;

/// A user of the sandbox: one line of `/etc/passwd`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Login name.
    pub name: String,
    /// Numeric id.
    pub uid: u32,
    /// Numeric id of the primary group.
    pub gid: u32,
    /// Home directory: where relative paths start.
    pub home: PathBuf,
    /// Login shell.
    pub shell: PathBuf,
}

#[derive(Debug)]
struct Group {
    name: String,
    gid: u32,
    members: Vec<String>,
}

/// The users and groups of the sandbox at one moment.
#[derive(Debug, Default)]
pub struct Accounts {
    users: Vec<User>,
    groups: Vec<Group>,
}

impl Accounts {
    /// Reads `etc/passwd` and `etc/group` below `root`. Lines that make no sense are skipped, a
    /// missing file counts as empty.
    ///
    /// # Errors
    /// [`Error::ReadAccounts`] if a file exists and cannot be read.
    pub fn load(root: &Path) -> Result<Self, Error> {
        Ok(Self {
            users: read(&root.join("etc/passwd"))?
                .lines()
                .filter_map(parse_user)
                .collect(),
            groups: read(&root.join("etc/group"))?
                .lines()
                .filter_map(parse_group)
                .collect(),
        })
    }

    /// The user of that name; a number that is nobody's name is taken as a uid.
    #[must_use]
    pub fn user(&self, name: &str) -> Option<&User> {
        self.users
            .iter()
            .find(|user| user.name == name)
            .or_else(|| {
                let uid = name.parse::<u32>().ok()?;
                self.users.iter().find(|user| user.uid == uid)
            })
    }

    /// Whom an image means by `user`, `user:group`, or numbers. Numbers need not be anybody's, and
    /// root exists in every image.
    #[must_use]
    pub fn resolve(&self, text: &str) -> Option<User> {
        let (name, group) = match text.split_once(':') {
            Some((name, group)) => (name, Some(group).filter(|group| !group.is_empty())),
            None => (text, None),
        };
        let nobodys = || {
            let uid = if name == "root" {
                0
            } else {
                name.parse().ok()?
            };
            Some(User {
                name: name.to_owned(),
                uid,
                gid: 0,
                home: PathBuf::from(if uid == 0 { "/root" } else { "/" }),
                shell: PathBuf::from("/bin/sh"),
            })
        };
        let mut user = self.user(name).cloned().or_else(nobodys)?;
        if let Some(group) = group {
            let known = self.groups.iter().find(|known| known.name == group);
            user.gid = match known {
                Some(known) => known.gid,
                None => group.parse().ok()?,
            };
        }
        Some(user)
    }

    /// The ids of the groups that list `user` as a member, and of its primary one.
    #[must_use]
    pub fn groups_of(&self, user: &User) -> Vec<u32> {
        let mut gids = vec![user.gid];
        for group in self
            .groups
            .iter()
            .filter(|group| group.members.contains(&user.name))
        {
            if !gids.contains(&group.gid) {
                gids.push(group.gid);
            }
        }
        gids
    }

    /// The name of a user, or the number if nobody has it.
    #[must_use]
    pub fn user_name(&self, uid: u32) -> Cow<'_, str> {
        match self.users.iter().find(|user| user.uid == uid) {
            Some(user) => Cow::Borrowed(&user.name),
            None => Cow::Owned(uid.to_string()),
        }
    }

    /// The name of a group, or the number if no group has it.
    #[must_use]
    pub fn group_name(&self, gid: u32) -> Cow<'_, str> {
        match self.groups.iter().find(|group| group.gid == gid) {
            Some(group) => Cow::Borrowed(&group.name),
            None => Cow::Owned(gid.to_string()),
        }
    }
}

fn read(path: &Path) -> Result<String, Error> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(Error::ReadAccounts {
            path: path.to_owned(),
            source,
        }),
    }
}

/// `name:password:uid:gid:comment:home:shell`, see passwd(5).
fn parse_user(line: &str) -> Option<User> {
    let fields: Vec<&str> = line.split(':').collect();
    let [name, _, uid, gid, _, home, shell] = fields[..] else {
        return None;
    };
    Some(User {
        name: (!name.is_empty()).then(|| name.to_owned())?,
        uid: uid.parse().ok()?,
        gid: gid.parse().ok()?,
        home: PathBuf::from(if home.is_empty() { "/" } else { home }),
        // passwd(5): an empty field means /bin/sh.
        shell: PathBuf::from(if shell.is_empty() { "/bin/sh" } else { shell }),
    })
}

/// `name:password:gid:member,member`, see group(5).
fn parse_group(line: &str) -> Option<Group> {
    let fields: Vec<&str> = line.split(':').collect();
    let [name, _, gid, members] = fields[..] else {
        return None;
    };
    Some(Group {
        name: (!name.is_empty()).then(|| name.to_owned())?,
        gid: gid.parse().ok()?,
        members: members
            .split(',')
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts(passwd: &str, group: &str) -> Accounts {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(root.path().join("etc/passwd"), passwd).unwrap();
        std::fs::write(root.path().join("etc/group"), group).unwrap();
        Accounts::load(root.path()).unwrap()
    }

    #[test]
    fn users_and_groups_are_found_by_name_and_number() {
        let accounts = accounts(
            "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1001:,,,:/home/user:\n",
            "root:x:0:\nsudo:x:27:user,other\nuser:x:1001:\nuser2:x:1002:user,user\n",
        );
        let user = accounts.user("user").unwrap();
        assert_eq!((user.uid, user.gid), (1000, 1001));
        assert_eq!(user.home, Path::new("/home/user"));
        assert_eq!(user.shell, Path::new("/bin/sh"));
        assert_eq!(accounts.user("1000"), Some(user));
        assert_eq!(accounts.user("nobody"), None);
        assert_eq!(accounts.resolve("user").as_ref(), Some(user));
        let ids = |text: &str| accounts.resolve(text).map(|user| (user.uid, user.gid));
        assert_eq!(ids("user:sudo"), Some((1000, 27)));
        assert_eq!(ids("0:7"), Some((0, 7)));
        assert_eq!(ids("4711"), Some((4711, 0)));
        assert_eq!(ids("nobody"), None);
        assert_eq!(ids("user:nobody"), None);
        let empty = Accounts::default();
        assert_eq!(empty.resolve("root").map(|user| user.uid), Some(0));
        assert_eq!(accounts.groups_of(user), [1001, 27, 1002]);
        assert_eq!(accounts.user_name(1000), "user");
        assert_eq!(accounts.user_name(5), "5");
        assert_eq!(accounts.group_name(27), "sudo");
        assert_eq!(accounts.group_name(99), "99");
    }

    #[test]
    fn broken_lines_are_skipped() {
        let accounts = accounts(
            "# comment\n\nuser:x:abc:0::/home:/bin/sh\n:x:1:1::/:/bin/sh\na:b:1:1:\nok:x:7:8:::\n",
            "x\n:x:1:\ny:x:-1:\n",
        );
        assert_eq!(accounts.users.len(), 1);
        assert_eq!(accounts.user("ok").unwrap().home, Path::new("/"));
        assert!(accounts.groups.is_empty());
    }

    #[test]
    fn missing_files_mean_nobody() {
        let root = tempfile::tempdir().unwrap();
        assert!(Accounts::load(root.path()).unwrap().users.is_empty());
    }
}
