//! What a sandbox has mounted.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// Most directories that one sandbox has mounted.
pub const MAX_MOUNTS: usize = 16;

/// Longest path in a sandbox, in bytes.
const MAX_PATH: usize = 1024;

/// Where nothing may be mounted, nor below.
const SYSTEM: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Bytes of a tag's hash.
const TAG_BYTES: usize = 12;

/// Something that is mounted in a sandbox. As stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Mount {
    /// What.
    pub source: MountSource,
    /// Where, in the sandbox.
    pub path: String,
    /// Whether the sandbox cannot change it.
    pub read_only: bool,
}

/// Something that a request wants to have mounted: the same, but not looked at yet. Volumes are
/// named by `name`, which may be an id.
pub type MountRequest = Mount;

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MountSource {
    /// A volume.
    Volume {
        /// Its id.
        id: String,
        /// Its name when it was mounted.
        name: String,
    },
    /// A directory of the host.
    Host {
        /// Which one.
        path: PathBuf,
    },
}

impl MountSource {
    /// A volume by its name, or its id.
    #[must_use]
    pub fn volume(name: impl Into<String>) -> Self {
        Self::Volume {
            id: String::new(),
            name: name.into(),
        }
    }
}

impl Mount {
    /// Names this mount between host and guest: the same for the same directory at the same place,
    /// in every sandbox and every life, and another one for every other.
    #[must_use]
    pub fn tag(&self) -> String {
        let (kind, what) = match &self.source {
            MountSource::Volume { id, .. } => ("volume", id.as_bytes()),
            MountSource::Host { path } => ("host", path.as_os_str().as_encoded_bytes()),
        };
        let digest = Sha256::new()
            .chain_update(kind)
            .chain_update([0])
            .chain_update(what)
            .chain_update([0])
            .chain_update(&self.path)
            .finalize();
        hex::encode(&digest[..TAG_BYTES])
    }
}

/// A path without slashes that mean nothing.
pub(super) fn clean(path: &str) -> String {
    let clean: PathBuf = Path::new(path).components().collect();
    clean.to_string_lossy().into_owned()
}

/// Refuses places where nothing can be mounted, and places that hide each other.
pub(super) fn check(requests: &[MountRequest]) -> Result<()> {
    let refused = |why: String| Err(Error::invalid("volumeMounts", why));
    if requests.len() > MAX_MOUNTS {
        return refused(format!("a sandbox has at most {MAX_MOUNTS} mounts"));
    }
    for (n, request) in requests.iter().enumerate() {
        let shown: String = request.path.chars().take(80).collect();
        let path = Path::new(&request.path);
        let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
        if !path.is_absolute()
            || !path.components().all(plain)
            || request.path.len() > MAX_PATH
            || request.path.contains('\0')
        {
            return refused(format!(
                "'{shown}' is no place for a mount: it has to be an absolute path without '..' of \
                 at most {MAX_PATH} bytes"
            ));
        }
        if path == Path::new("/") || SYSTEM.iter().any(|system| path.starts_with(system)) {
            return refused(format!(
                "nothing can be mounted on '{shown}': the system needs it"
            ));
        }
        let mut others = requests[..n].iter().map(|other| Path::new(&other.path));
        if let Some(other) = others.find(|other| other.starts_with(path) || path.starts_with(other))
        {
            let other = other.display();
            return refused(format!("'{shown}' and '{other}' would hide each other"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(path: &str) -> Mount {
        Mount {
            source: MountSource::volume("data"),
            path: path.to_owned(),
            read_only: false,
        }
    }

    #[test]
    fn places_are_absolute_and_apart() {
        for good in [
            &["/data"][..],
            &["/a", "/b/c", "/b/d", "/ab"],
            &["/home/user/x"],
            &[],
        ] {
            let mounts: Vec<_> = good.iter().map(|path| mount(path)).collect();
            assert!(check(&mounts).is_ok(), "{good:?}");
        }
        for bad in [
            &["data"][..],
            &[""],
            &["/"],
            &["//"],
            &["/a/../b"],
            &["/proc"],
            &["/dev/shm"],
            &["/a\0"],
            &["/a", "/a"],
            &["/a", "/a/b"],
            &["/a/b", "/a/"],
        ] {
            let mounts: Vec<_> = bad.iter().map(|path| mount(path)).collect();
            assert!(
                matches!(check(&mounts), Err(Error::Invalid { .. })),
                "{bad:?}"
            );
        }
        let many: Vec<_> = (0..=MAX_MOUNTS).map(|n| mount(&format!("/m{n}"))).collect();
        assert!(check(&many).is_err() && check(&many[1..]).is_ok());
    }

    #[test]
    fn a_tag_belongs_to_one_directory_at_one_place() {
        let volume = |id: &str, path: &str| Mount {
            source: MountSource::Volume {
                id: id.to_owned(),
                name: "whatever".to_owned(),
            },
            path: path.to_owned(),
            read_only: false,
        };
        let host = Mount {
            source: MountSource::Host { path: "a".into() },
            ..volume("", "/x")
        };
        let tags = [
            volume("a", "/x").tag(),
            volume("b", "/x").tag(),
            volume("a", "/y").tag(),
            host.tag(),
        ];
        for (n, tag) in tags.iter().enumerate() {
            assert!(!tags[..n].contains(tag), "{tags:?}");
            assert!(tag.len() <= 64 && tag.bytes().all(|b| b.is_ascii_alphanumeric()));
        }
        assert_eq!(volume("a", "/x").tag(), tags[0]);
    }

    #[test]
    fn mounts_are_stored_as_they_always_were() {
        let mounts = [
            Mount {
                source: MountSource::Volume {
                    id: "vol-1".to_owned(),
                    name: "data".to_owned(),
                },
                path: "/data".to_owned(),
                read_only: true,
            },
            Mount {
                source: MountSource::Host {
                    path: "/srv".into(),
                },
                path: "/srv".to_owned(),
                read_only: false,
            },
        ];
        let json = serde_json::to_string(&mounts).expect("json");
        assert_eq!(
            json,
            r#"[{"source":{"volume":{"id":"vol-1","name":"data"}},"path":"/data","readOnly":true},{"source":{"host":{"path":"/srv"}},"path":"/srv","readOnly":false}]"#
        );
        let back: Vec<Mount> = serde_json::from_str(&json).expect("mounts");
        assert_eq!(back, mounts);
    }
}
