use serde::Serialize;

use crate::{
    apt::{Distribution, Host},
    error::{Error, Result},
    fingerprint::Fingerprint,
};

/// The packages of `base`: what an agent reaches for in its first minutes, and no compiler.
const BASE_PACKAGES: [&str; 24] = [
    "apt",
    "bash",
    "bzip2",
    "ca-certificates",
    "curl",
    "file",
    "git",
    "iproute2",
    "iputils-ping",
    "jq",
    "less",
    "netbase",
    "openssh-client",
    "procps",
    "psmisc",
    "python-is-python3",
    "python3",
    "python3-pip",
    "python3-venv",
    "sudo",
    "tzdata",
    "unzip",
    "wget",
    "xz-utils",
];

/// What is done to the bootstrapped tree; part of every fingerprint.
pub(crate) const CUSTOMIZE: &str = include_str!("../recipes/customize.sh");

/// Changes whenever the same recipe would be built into something else for a reason that is not
/// among its fields.
const LAYOUT: u32 = 1;

/// Sizes that a disk may have, in MiB.
const DISK_MIB: std::ops::RangeInclusive<u32> = 512..=1024 * 1024;

/// Which release a root file system is made of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Suite {
    /// The release that the host runs.
    #[default]
    Host,
    /// The release with this code name, such as `trixie`, of the host's distribution.
    Named(String),
}

/// A root file system, described.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// What the recipe is called, for people and log files: lower-case letters, digits, `-`.
    pub name: String,
    /// The release that its packages are from.
    pub suite: Suite,
    /// Packages besides the distribution's minimal system. Recommended packages do not follow.
    pub packages: Vec<String>,
    /// Size of the disk that the image is for, in MiB. The image is sparse: what is not used
    /// takes no room on the host.
    pub disk_mib: u32,
}

impl Recipe {
    /// Size of a sandbox's disk unless it is asked for another: 8 GiB.
    pub const DEFAULT_DISK_MIB: u32 = 8 * 1024;

    /// The template that every installation has: a shell, Python, git, curl, and a user called
    /// `user` (uid 1000) who may do everything.
    pub fn base() -> Recipe {
        Recipe {
            name: "base".into(),
            suite: Suite::Host,
            packages: BASE_PACKAGES.map(str::to_owned).to_vec(),
            disk_mib: Recipe::DEFAULT_DISK_MIB,
        }
    }

    /// The code name of the release on this host.
    pub(crate) fn suite_on<'a>(&'a self, host: &'a Host) -> &'a str {
        match &self.suite {
            Suite::Host => &host.codename,
            Suite::Named(name) => name,
        }
    }

    /// The fingerprint of what the recipe makes on this host.
    ///
    /// Newer versions of packages do not change it: an image stays what it is until it is removed.
    pub fn fingerprint(&self, host: &Host) -> Fingerprint {
        #[derive(Serialize)]
        struct Inputs<'a> {
            layout: u32,
            distribution: Distribution,
            suite: &'a str,
            architecture: &'static str,
            packages: Vec<&'a str>,
            customize: &'static str,
            disk_mib: u32,
        }
        let mut packages: Vec<&str> = self.packages.iter().map(String::as_str).collect();
        packages.sort_unstable();
        packages.dedup();
        Fingerprint::of(&Inputs {
            layout: LAYOUT,
            distribution: host.distribution,
            suite: self.suite_on(host),
            architecture: "amd64",
            packages,
            customize: CUSTOMIZE,
            disk_mib: self.disk_mib,
        })
    }

    /// Refuses what must not become an argument of a program or a path.
    pub(crate) fn validate(&self, host: &Host) -> Result<()> {
        let wrong = |reason: String| Error::Recipe {
            recipe: self.name.clone(),
            reason,
        };
        if !is_word(&self.name, b"-") {
            return Err(wrong(
                "its name has other characters than a-z, 0-9 and `-`".into(),
            ));
        }
        let suite = self.suite_on(host);
        if !is_word(suite, b"-.") {
            return Err(wrong(format!("`{suite}` is not the name of a release")));
        }
        if let Some(package) = self
            .packages
            .iter()
            .find(|package| !is_word(package, b"+-."))
        {
            return Err(wrong(format!("`{package}` is not the name of a package")));
        }
        if !DISK_MIB.contains(&self.disk_mib) {
            let (least, most) = DISK_MIB.into_inner();
            let size = self.disk_mib;
            return Err(wrong(format!(
                "a disk has {least} to {most} MiB, not {size}"
            )));
        }
        Ok(())
    }
}

/// A lower-case letter or digit, followed by any number of those or of `others`.
fn is_word(text: &str, others: &[u8]) -> bool {
    let plain = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    text.as_bytes().first().is_some_and(plain)
        && text
            .bytes()
            .all(|byte| plain(&byte) || others.contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Host {
        Host {
            distribution: Distribution::Debian,
            codename: "bookworm".into(),
        }
    }

    #[test]
    fn the_fingerprint_covers_what_matters_and_nothing_else() {
        let base = Recipe::base();
        let fingerprint = base.fingerprint(&host());
        let mut other = base.clone();
        other.name = "renamed".into();
        other.packages.reverse();
        other.suite = Suite::Named("bookworm".into());
        assert_eq!(other.fingerprint(&host()), fingerprint);

        for change in [
            (|r: &mut Recipe| r.packages.push("gcc".into())) as fn(&mut Recipe),
            |r| r.disk_mib *= 2,
            |r| r.suite = Suite::Named("trixie".into()),
        ] {
            let mut changed = base.clone();
            change(&mut changed);
            assert_ne!(changed.fingerprint(&host()), fingerprint);
        }
    }

    #[test]
    fn what_could_become_an_option_or_a_path_is_refused() {
        let reason = |change: fn(&mut Recipe)| {
            let mut recipe = Recipe::base();
            change(&mut recipe);
            recipe.validate(&host()).unwrap_err().to_string()
        };
        assert!(Recipe::base().validate(&host()).is_ok());
        let package = reason(|r| r.packages.push("--hook=x".into()));
        assert_eq!(
            package,
            "recipe `base`: `--hook=x` is not the name of a package"
        );
        assert!(reason(|r| r.packages.push("git,vim".into())).contains("`git,vim`"));
        assert!(reason(|r| r.suite = Suite::Named("../x".into())).contains("`../x`"));
        assert!(reason(|r| r.name = "a/b".into()).contains("its name"));
        assert!(reason(|r| r.disk_mib = 1).contains("512 to 1048576 MiB, not 1"));
    }
}
