//! What `cubicle volume` understands, and how volumes are named elsewhere.

use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(crate) enum Volume {
    /// Make an empty volume
    ///
    /// Prints its id. Sandboxes mount it with `cubicle sandbox create --volume NAME:PATH`.
    Create {
        /// What to call it [default: its id]
        name: Option<String>,
    },
    /// List volumes
    #[command(visible_alias = "list")]
    Ls,
    /// Show one volume
    Info {
        /// Its id or name
        volume: String,
    },
    /// Copy files or directories into a volume or out of it
    ///
    /// One side is `<volume>:<path>`, from the top of the volume. No sandbox is needed.
    Cp {
        /// From where
        source: String,
        /// To where
        destination: String,
    },
    /// Delete volumes with all that is in them; not while a sandbox has them mounted
    Rm {
        /// Their ids or names
        #[arg(required = true)]
        volumes: Vec<String>,
    },
}

/// A volume in a sandbox: `NAME:PATH` or `NAME:PATH:ro`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VolumeMount {
    pub(crate) name: String,
    pub(crate) path: String,
    pub(crate) read_only: bool,
}

/// Reads `NAME:PATH` or `NAME:PATH:ro`.
pub(crate) fn mount(text: &str) -> Result<VolumeMount, String> {
    let (text, read_only) = match text.strip_suffix(":ro") {
        Some(rest) => (rest, true),
        None => (text, false),
    };
    match text.split_once(':') {
        Some((name, path)) if !name.is_empty() && path.starts_with('/') => Ok(VolumeMount {
            name: name.to_owned(),
            path: path.to_owned(),
            read_only,
        }),
        _ => Err("expected NAME:PATH or NAME:PATH:ro, with an absolute path".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_a_name_and_an_absolute_path() {
        let parsed = |text: &str| mount(text).map(|m| (m.name, m.path, m.read_only));
        let is = |name: &str, path: &str, ro| Ok((name.to_owned(), path.to_owned(), ro));
        assert_eq!(parsed("data:/data"), is("data", "/data", false));
        assert_eq!(parsed("data:/a:b:ro"), is("data", "/a:b", true));
        for bad in ["", "data", ":/data", "data:", "data:ro", "data:rel/ative"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }
}
