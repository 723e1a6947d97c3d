//! What root file systems are made of: the recipes of this program, and what may be in one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    apt::{Distribution, Host},
    error::{Error, Result},
    fingerprint::Fingerprint,
    setup::{self, Setup, is_pinned},
};

/// The recipes of this program, by name.
const RECIPES: [(&str, &str); 4] = [
    ("base", include_str!("../recipes/base.toml")),
    (
        "code-interpreter-v1",
        include_str!("../recipes/code-interpreter-v1.toml"),
    ),
    (
        "desktop-browser",
        include_str!("../recipes/desktop-browser.toml"),
    ),
    ("node", include_str!("../recipes/node.toml")),
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

/// A root file system, described, and what a template of it needs beyond that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// What the recipe is called, for people and log files: lower-case letters, digits, `-`.
    pub name: String,
    /// What it is, in one line for people.
    pub description: String,
    /// What it is for, in one word: `base`, `code`, `browser`.
    pub category: String,
    /// The release that its packages are from.
    pub suite: Suite,
    /// The distributions that have its packages. Empty: all that are known.
    pub distributions: Vec<Distribution>,
    /// Packages besides the distribution's minimal system. Recommended packages do not follow.
    pub packages: Vec<String>,
    /// What is done once those are installed, in this order.
    pub setup: Vec<Setup>,
    /// Versions of Python packages, `name==version`, that hold for whatever [`Setup::Pip`] installs
    /// because something else needs it.
    pub constraints: Vec<String>,
    /// What building it takes at most, in MiB, of memory or disk.
    pub room_mib: u32,
    /// CPUs that its sandboxes should have.
    pub cpu_count: u32,
    /// Memory that its sandboxes should have, in MiB.
    pub memory_mib: u32,
    /// Size of the disk that the image is for, in MiB. The image is sparse: what is not used
    /// takes no room on the host.
    pub disk_mib: u32,
    /// Environment of every process of its sandboxes.
    pub env: Vec<(String, String)>,
    /// A shell command that is started once and runs in every sandbox.
    pub start: Option<String>,
    /// When its template is ready to be frozen.
    pub ready: Option<Ready>,
    /// Ports that its servers listen on.
    pub ports: Vec<u16>,
}

/// What tells that a template's servers are up.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Ready {
    /// A `GET` of this path is answered with 200.
    Http {
        /// The port.
        port: u16,
        /// The path, from `/` on.
        path: String,
    },
    /// Connections to this port are accepted.
    Tcp {
        /// The port.
        port: u16,
    },
    /// A shell command succeeds.
    Command(String),
}

/// A recipe as it is written down.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    extends: Option<String>,
    description: String,
    category: String,
    #[serde(default)]
    distributions: Vec<Distribution>,
    #[serde(default)]
    packages: Vec<String>,
    #[serde(default)]
    setup: Vec<Setup>,
    #[serde(default)]
    constraints: Vec<String>,
    room_mib: Option<u32>,
    cpu_count: Option<u32>,
    memory_mib: Option<u32>,
    disk_mib: Option<u32>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    start: Option<String>,
    ready: Option<Ready>,
    #[serde(default)]
    ports: Vec<u16>,
}

impl Recipe {
    /// CPUs of a sandbox unless it is asked for others.
    pub const DEFAULT_CPU_COUNT: u32 = 1;
    /// Memory of a sandbox unless it is asked for another: what Python needs, and little enough to
    /// have many.
    pub const DEFAULT_MEMORY_MIB: u32 = 512;
    /// Size of a sandbox's disk unless it is asked for another: 8 GiB.
    pub const DEFAULT_DISK_MIB: u32 = 8 * 1024;
    /// Room for a bootstrap: a minimal system with its packages, downloaded and unpacked, several
    /// times over.
    const DEFAULT_ROOM_MIB: u32 = 2 * 1024;

    /// The template that every installation has: a shell, Python, git, curl, and a user called
    /// `user` (uid 1000) who may do everything.
    pub fn base() -> Recipe {
        #[expect(clippy::expect_used, reason = "it is one of `RECIPES`")]
        Recipe::by_name("base").expect("there is a recipe `base`")
    }

    /// The recipe of this name, if there is one.
    pub fn by_name(name: &str) -> Option<Recipe> {
        let (name, text) = RECIPES.iter().find(|(known, _)| *known == name)?;
        #[expect(
            clippy::expect_used,
            reason = "the files are part of this program, and a test reads them all"
        )]
        let file: File = toml::from_str(text).expect("the recipes of this program are well-formed");
        Some(Recipe::new(name, file))
    }

    /// Every recipe of this program, by name.
    pub fn all() -> Vec<Recipe> {
        let names = RECIPES.iter().map(|(name, _)| *name);
        names.filter_map(Recipe::by_name).collect()
    }

    fn new(name: &str, file: File) -> Recipe {
        let (mut packages, mut setup) = (Vec::new(), Vec::new());
        if let Some(below) = file.extends.as_deref().and_then(Recipe::by_name) {
            (packages, setup) = (below.packages, below.setup);
        }
        packages.extend(file.packages);
        setup.extend(file.setup);
        Recipe {
            name: name.to_owned(),
            description: file.description,
            category: file.category,
            suite: Suite::Host,
            distributions: file.distributions,
            packages,
            setup,
            constraints: file.constraints,
            room_mib: file.room_mib.unwrap_or(Recipe::DEFAULT_ROOM_MIB),
            cpu_count: file.cpu_count.unwrap_or(Recipe::DEFAULT_CPU_COUNT),
            memory_mib: file.memory_mib.unwrap_or(Recipe::DEFAULT_MEMORY_MIB),
            disk_mib: file.disk_mib.unwrap_or(Recipe::DEFAULT_DISK_MIB),
            env: file.env.into_iter().collect(),
            start: file.start,
            ready: file.ready,
            ports: file.ports,
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
            #[serde(skip_serializing_if = "Option::is_none")]
            setup: Option<SetUp<'a>>,
        }
        #[derive(Serialize)]
        struct SetUp<'a> {
            version: u32,
            enter: &'static str,
            steps: &'a [Setup],
            constraints: &'a [String],
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
            setup: (!self.setup.is_empty()).then_some(SetUp {
                version: setup::VERSION,
                enter: setup::ENTER,
                steps: &self.setup,
                constraints: &self.constraints,
            }),
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
        if !self.distributions.is_empty() && !self.distributions.contains(&host.distribution) {
            let names: Vec<_> = self.distributions.iter().map(|d| d.name()).collect();
            return Err(wrong(format!(
                "it needs packages of {}, and this host has those of {}",
                names.join(" or "),
                host.distribution.name()
            )));
        }
        for (index, step) in self.setup.iter().enumerate() {
            let number = index + 1;
            let in_step = |reason| wrong(format!("step {number} of its setup: {reason}"));
            step.check().map_err(in_step)?;
        }
        if let Some(constraint) = self.constraints.iter().find(|c| !is_pinned(c, "==")) {
            return Err(wrong(format!("`{constraint}` is not `name==version`")));
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
            |r| r.setup.push(Setup::Run(vec!["true".into()])),
        ] {
            let mut changed = base.clone();
            change(&mut changed);
            assert_ne!(changed.fingerprint(&host()), fingerprint);
        }
    }

    #[test]
    fn every_recipe_is_well_formed_and_whole() {
        let all = Recipe::all();
        assert_eq!(all.len(), RECIPES.len());
        for recipe in &all {
            recipe.validate(&host()).unwrap();
            let name = &recipe.name;
            assert!(
                RECIPES.is_sorted() && is_word(&recipe.category, b"-"),
                "{name}"
            );
            assert!(!recipe.description.ends_with('.'), "{name}");
            let file: File =
                toml::from_str(RECIPES.iter().find(|(n, _)| n == name).unwrap().1).unwrap();
            let extends = file.extends.as_deref();
            assert!(
                extends.is_none_or(|below| Recipe::by_name(below).is_some()),
                "{name}"
            );
            // What is said of a recipe is what its probe asks.
            if let Some(Ready::Http { port, .. } | Ready::Tcp { port }) = &recipe.ready {
                assert!(recipe.ports.contains(port), "{name}");
            }
            if let Some(Ready::Http { path, .. }) = &recipe.ready {
                assert!(path.starts_with('/'), "{name}");
            }
        }
        assert!(Recipe::by_name("no-such-recipe").is_none());
        let (base, node) = (Recipe::base(), Recipe::by_name("node").unwrap());
        assert!(base.setup.is_empty() && node.packages.starts_with(&base.packages));
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
        assert!(reason(|r| r.constraints.push("x>=1".into())).contains("`name==version`"));
        let setup = reason(|r| r.setup.push(Setup::Npm(vec!["x".into()])));
        assert_eq!(
            setup,
            "recipe `base`: step 1 of its setup: `x` is not `name@version`"
        );
        let elsewhere = reason(|r| r.distributions = vec![Distribution::Ubuntu]);
        assert!(elsewhere.ends_with("needs packages of Ubuntu, and this host has those of Debian"));
        assert!(reason(|r| r.disk_mib = 1).contains("512 to 1048576 MiB, not 1"));
    }
}
