//! The host's package manager: which distribution this is, where it gets packages from, and
//! packages themselves, downloaded but never installed.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    command::Program,
    error::{Error, Result},
    progress::{Progress, Step},
    version,
};

/// The distributions whose packages Cubicle knows how to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Distribution {
    /// Debian, and systems that are made of its packages.
    Debian,
    /// Ubuntu, and systems that are made of its packages.
    Ubuntu,
}

impl Distribution {
    /// What it is called, for people.
    pub fn name(self) -> &'static str {
        match self {
            Distribution::Debian => "Debian",
            Distribution::Ubuntu => "Ubuntu",
        }
    }

    /// Kernel packages begin with `linux-image-<digit>` and end like this.
    fn kernel_flavour(self) -> &'static str {
        match self {
            Distribution::Debian => "-cloud-amd64",
            Distribution::Ubuntu => "-generic",
        }
    }

    fn kernel_pattern(self) -> &'static str {
        match self {
            Distribution::Debian => "linux-image-*-cloud-amd64",
            Distribution::Ubuntu => "linux-image-*-generic",
        }
    }

    /// What the distribution's own repositories call their origin.
    fn origin(self) -> &'static str {
        match self {
            Distribution::Debian => "Debian",
            Distribution::Ubuntu => "Ubuntu",
        }
    }

    /// The components that are free software and supported; others stay out of images.
    fn components(self) -> &'static [&'static str] {
        match self {
            Distribution::Debian => &["main"],
            Distribution::Ubuntu => &["main", "universe"],
        }
    }

    /// The keys that sign the distribution's repositories, where its keyring package puts them.
    fn keyrings(self) -> &'static [&'static str] {
        match self {
            Distribution::Debian => &[
                "/usr/share/keyrings/debian-archive-keyring.gpg",
                "/usr/share/keyrings/debian-archive-keyring.pgp",
            ],
            Distribution::Ubuntu => &["/usr/share/keyrings/ubuntu-archive-keyring.gpg"],
        }
    }
}

/// The system that Cubicle runs on, as far as its packages are concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Whose packages it uses.
    pub distribution: Distribution,
    /// The release's code name, such as `bookworm`.
    pub codename: String,
}

impl Host {
    /// Reads `/etc/os-release`.
    pub fn detect() -> Result<Host> {
        let text = fs_err::read_to_string("/etc/os-release").map_err(|error| Error::Host {
            reason: format!("it does not say which distribution it is ({error})"),
        })?;
        Host::parse(&text)
    }

    fn parse(os_release: &str) -> Result<Host> {
        let value = |key: &str| {
            let mut lines = os_release.lines().filter_map(|line| line.split_once('='));
            lines
                .find(|(name, _)| *name == key)
                .map(|(_, value)| value.trim_matches(['"', '\'']))
        };
        let ids = [value("ID").unwrap_or(""), value("ID_LIKE").unwrap_or("")].join(" ");
        let mut ids = ids.split_whitespace();
        let distribution = ids.find_map(|id| match id {
            "debian" => Some(Distribution::Debian),
            "ubuntu" => Some(Distribution::Ubuntu),
            _ => None,
        });
        let Some(distribution) = distribution else {
            let name = value("PRETTY_NAME")
                .unwrap_or("an unknown system")
                .to_owned();
            let reason = format!("it is {name}, and only Debian and Ubuntu are known");
            return Err(Error::Host { reason });
        };
        // A derivative has a code name of its own; Ubuntu's say whose release they are made of.
        let codename = value("UBUNTU_CODENAME").or(value("VERSION_CODENAME"));
        match codename.filter(|name| !name.is_empty()) {
            Some(codename) => Ok(Host {
                distribution,
                codename: codename.to_owned(),
            }),
            None => Err(Error::Host {
                reason: "/etc/os-release has no VERSION_CODENAME; name the suite".into(),
            }),
        }
    }

    /// The distribution's keyring, if this host has it.
    pub(crate) fn keyring(&self) -> Option<&'static Path> {
        self.distribution
            .keyrings()
            .iter()
            .map(Path::new)
            .find(|path| path.exists())
    }

    /// The distribution's own repositories that serve `suite`, from this host's apt configuration.
    pub(crate) async fn sources(&self, suite: &str) -> Result<Vec<Source>> {
        const FORMAT: &str = "$(REPO_URI)\t$(RELEASE)\t$(CODENAME)\t$(COMPONENT)\t$(ORIGIN)";
        let targets = Program::new("apt-get", "apt", "read the apt configuration")
            .args(["indextargets", "--format", FORMAT, "Created-By: Packages"])
            .output()
            .await?;
        let sources = self.select_sources(&targets, suite);
        if !sources.iter().any(|source| source.suite == suite) {
            let origin = self.distribution.origin();
            let reason = format!(
                "no apt source of {origin} serves {suite} or {}",
                self.codename
            );
            return Err(Error::Host { reason });
        }
        Ok(sources)
    }

    fn select_sources(&self, targets: &str, suite: &str) -> Vec<Source> {
        let mut sources: Vec<Source> = Vec::new();
        for target in targets.lines() {
            let fields: Vec<&str> = target.split('\t').collect();
            let [uri, release, codename, component, origin] = fields[..] else {
                continue;
            };
            // Before the first `apt-get update` nothing is known of an origin or a code name, and
            // apt leaves those fields as they are written in the format.
            let known = |field: &str| !field.starts_with("$(");
            if known(origin) && origin != self.distribution.origin() {
                continue;
            }
            let release = if known(codename) && !codename.is_empty() {
                codename
            } else {
                release
            };
            let pocket = release.strip_prefix(self.codename.as_str());
            if !matches!(pocket, Some("" | "-updates" | "-security"))
                || !self.distribution.components().contains(&component)
            {
                continue;
            }
            let release = format!("{suite}{}", pocket.unwrap_or_default());
            let uri = resolve_mirror_list(uri);
            match sources
                .iter_mut()
                .find(|known| known.uri == uri && known.suite == release)
            {
                Some(known) => known.components.push(component.to_owned()),
                None => sources.push(Source {
                    uri,
                    suite: release,
                    components: vec![component.to_owned()],
                }),
            }
        }
        sources
    }

    /// The newest kernel package that any configured suite has, or the one with the given name.
    pub(crate) async fn kernel_package(&self, name: Option<&str>) -> Result<KernelPackage> {
        let names = match name {
            Some(name) => vec![name.to_owned()],
            None => {
                let all = Program::new("apt-cache", "apt", "list the kernel packages")
                    .args(["pkgnames", "linux-image-"])
                    .output()
                    .await?;
                all.lines()
                    .filter(|name| self.is_kernel(name))
                    .map(str::to_owned)
                    .collect()
            }
        };
        let none = || Error::NoKernelPackage {
            pattern: self.distribution.kernel_pattern(),
        };
        if names.is_empty() {
            return Err(none());
        }
        let records = Program::new("apt-cache", "apt", "describe the kernel packages")
            .args(["show", "--no-all-versions"])
            .args(&names)
            .output()
            .await?;
        let packages = records.split("\n\n").filter_map(KernelPackage::parse);
        packages
            .max_by(|a, b| version::compare(&a.version, &b.version))
            .ok_or_else(none)
    }

    fn is_kernel(&self, name: &str) -> bool {
        let version = name
            .strip_prefix("linux-image-")
            .and_then(|rest| rest.strip_suffix(self.distribution.kernel_flavour()));
        version.is_some_and(|version| version.starts_with(|c: char| c.is_ascii_digit()))
    }
}

/// One line of an apt source list: a repository, a suite in it, and components of that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) uri: String,
    pub(crate) suite: String,
    pub(crate) components: Vec<String>,
}

impl Source {
    /// The source in apt's own notation (deb822).
    pub(crate) fn render(&self, keyring: Option<&Path>) -> String {
        let Source {
            uri,
            suite,
            components,
        } = self;
        let components = components.join(" ");
        let mut text =
            format!("Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: {components}\n");
        if let Some(keyring) = keyring {
            text.push_str(&format!("Signed-By: {}\n", keyring.display()));
        }
        text
    }

    /// The same source without a user name and password in its address: what may go into an image.
    pub(crate) fn without_credentials(&self) -> Source {
        let uri = match self.uri.split_once("://") {
            Some((scheme, rest)) => {
                let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
                let host = authority
                    .rsplit_once('@')
                    .map_or(authority, |(_, host)| host);
                format!("{scheme}://{host}{path}")
            }
            None => self.uri.clone(),
        };
        Source {
            uri,
            ..self.clone()
        }
    }
}

/// Cloud images point apt at a file with a list of mirrors; an image cannot, so it gets the first.
fn resolve_mirror_list(uri: &str) -> String {
    let file = uri
        .strip_prefix("mirror+file:")
        .map(|path| path.trim_end_matches('/'));
    let list = file
        .and_then(|path| fs_err::read_to_string(path).ok())
        .unwrap_or_default();
    let mut lines = list
        .lines()
        .map(str::trim)
        .filter(|line| !line.starts_with('#'));
    let first = lines.find_map(|line| line.split_whitespace().next());
    first.unwrap_or(uri).to_owned()
}

/// Options of the host's apt that a bootstrap needs as well to reach the same mirrors: its proxies
/// and their certificates.
pub(crate) async fn transport_options() -> Result<Vec<String>> {
    let dump = Program::new("apt-config", "apt", "read the apt configuration")
        .args(["dump", "Acquire"])
        .output()
        .await?;
    Ok(dump
        .lines()
        .filter(|line| is_transport_option(line))
        .map(str::to_owned)
        .collect())
}

fn is_transport_option(line: &str) -> bool {
    let Some((name, value)) = line.split_once(' ') else {
        return false;
    };
    let name = name.to_ascii_lowercase();
    let per_transport = name.starts_with("acquire::http::") || name.starts_with("acquire::https::");
    let wanted = ["::proxy", "::cainfo"];
    per_transport && value != "\"\";" && wanted.iter().any(|option| name.contains(option))
}

/// A kernel package that apt could download.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KernelPackage {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) sha256: String,
}

impl KernelPackage {
    /// No package with a kernel in it is smaller, in bytes; one that only depends on a kernel is.
    const MIN_SIZE: u64 = 1 << 20;

    fn parse(record: &str) -> Option<KernelPackage> {
        let value = |key: &str| {
            let mut lines = record.lines().filter_map(|line| line.split_once(": "));
            lines
                .find(|(name, _)| *name == key)
                .map(|(_, value)| value.trim().to_owned())
        };
        if value("Size")?.parse::<u64>().ok()? < KernelPackage::MIN_SIZE {
            return None;
        }
        Some(KernelPackage {
            name: value("Package")?,
            version: value("Version")?,
            sha256: value("SHA256")?,
        })
    }

    /// The package with the kernel's modules where it is another one, as Ubuntu has it.
    pub(crate) fn modules_package(&self, distribution: Distribution) -> Option<String> {
        match distribution {
            Distribution::Debian => None,
            Distribution::Ubuntu => {
                let release = self.name.strip_prefix("linux-image-")?;
                Some(format!("linux-modules-{release}={}", self.version))
            }
        }
    }
}

/// Fetches the package lists of all configured sources.
pub(crate) async fn update(progress: &Progress) -> Result<()> {
    progress.message(Step::KERNEL_DOWNLOAD, "refreshing the package lists");
    Program::new("apt-get", "apt", "refresh the package lists")
        .args(["-q", "update"])
        .run(|_| ())
        .await
}

/// Downloads a package, given as `name=version`, into the empty `directory`. apt checks it against
/// the signed package lists.
pub(crate) async fn download(
    package: &str,
    directory: &Path,
    progress: &Progress,
) -> Result<PathBuf> {
    let name = package.split('=').next().unwrap_or(package);
    // The directory belongs to root, so apt's unprivileged user could not write there.
    Program::new("apt-get", "apt", "download a package")
        .args([
            "-q",
            "-o",
            "APT::Sandbox::User=root",
            "-o",
            "APT::Status-Fd=1",
            "download",
            package,
        ])
        .directory(directory)
        .run(|line| {
            if let Some(fraction) = download_fraction(line) {
                progress.fraction(
                    Step::KERNEL_DOWNLOAD,
                    format!("downloading {name}"),
                    fraction,
                );
            }
        })
        .await?;
    let arrived = || {
        let mut entries = fs_err::read_dir(directory)
            .ok()?
            .filter_map(|entry| entry.ok());
        entries.find(|entry| entry.path().extension().is_some_and(|e| e == "deb"))
    };
    arrived()
        .map(|entry| entry.path())
        .ok_or_else(|| Error::Io {
            action: format!("find the downloaded package `{package}`"),
            source: std::io::ErrorKind::NotFound.into(),
        })
}

/// `dlstatus:1:42.0000:Retrieving file 1 of 1`: percent done.
fn download_fraction(line: &str) -> Option<f32> {
    let mut fields = line.strip_prefix("dlstatus:")?.split(':');
    let percent: f32 = fields.nth(1)?.parse().ok()?;
    Some(percent / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bookworm() -> Host {
        Host {
            distribution: Distribution::Debian,
            codename: "bookworm".into(),
        }
    }

    #[test]
    fn distributions_are_told_apart() {
        let debian = "PRETTY_NAME=\"Debian GNU/Linux 12\"\nID=debian\nVERSION_CODENAME=bookworm\n";
        assert_eq!(Host::parse(debian).unwrap(), bookworm());
        let mint = "ID=linuxmint\nID_LIKE=\"ubuntu debian\"\nVERSION_CODENAME=wilma\nUBUNTU_CODENAME=noble\n";
        let expected = Host {
            distribution: Distribution::Ubuntu,
            codename: "noble".into(),
        };
        assert_eq!(Host::parse(mint).unwrap(), expected);
        let fedora = Host::parse("ID=fedora\nPRETTY_NAME=\"Fedora Linux 42\"\n").unwrap_err();
        assert!(fedora.to_string().contains("Fedora Linux 42"), "{fedora}");
    }

    const TARGETS: &str = "\
http://mirror.example/debian/\tbookworm-backports\tbookworm-backports\tmain\tDebian Backports
http://mirror.example/debian/\tstable\tbookworm\tmain\tDebian
http://mirror.example/debian/\tstable\tbookworm\tnon-free-firmware\tDebian
http://mirror.example/debian/\tbookworm-updates\tbookworm-updates\tmain\tDebian
http://user:secret@mirror.example/debian-security/\tbookworm-security\tbookworm-security\tmain\tDebian
https://vendor.example/\tbookworm\tbookworm\tmain\tVendor
https://vendor.example/deb/\tnodistro\tnodistro\tmain\tVendor
";

    #[test]
    fn only_the_distributions_own_repositories_are_taken() {
        let sources = bookworm().select_sources(TARGETS, "bookworm");
        let suites: Vec<_> = sources.iter().map(|source| source.suite.as_str()).collect();
        assert_eq!(
            suites,
            ["bookworm", "bookworm-updates", "bookworm-security"]
        );
        assert!(sources.iter().all(|source| source.components == ["main"]));
        assert!(sources.iter().all(|source| !source.uri.contains("vendor")));
    }

    #[test]
    fn another_suite_comes_from_the_same_repositories() {
        let sources = bookworm().select_sources(TARGETS, "trixie");
        let suites: Vec<_> = sources.iter().map(|source| source.suite.as_str()).collect();
        assert_eq!(suites, ["trixie", "trixie-updates", "trixie-security"]);
    }

    #[test]
    fn sources_are_known_before_the_first_update() {
        let targets = "http://mirror.example/debian/\tbookworm\t$(CODENAME)\tmain\t$(ORIGIN)\n";
        assert_eq!(bookworm().select_sources(targets, "bookworm").len(), 1);
    }

    #[test]
    fn passwords_stay_out_of_images() {
        let sources = bookworm().select_sources(TARGETS, "bookworm");
        assert!(sources[2].render(None).contains("user:secret@"));
        let keyring = Path::new("/usr/share/keyrings/k.gpg");
        assert_eq!(
            sources[2].without_credentials().render(Some(keyring)),
            "Types: deb\nURIs: http://mirror.example/debian-security/\nSuites: bookworm-security\n\
             Components: main\nSigned-By: /usr/share/keyrings/k.gpg\n"
        );
    }

    #[test]
    fn kernels_are_told_from_symbols_and_meta_packages() {
        let kernel = |name| bookworm().is_kernel(name);
        assert!(kernel("linux-image-6.12.90+deb12.1-cloud-amd64"));
        assert!(!kernel("linux-image-6.12.90+deb12.1-cloud-amd64-dbg"));
        assert!(!kernel("linux-image-6.12.90+deb12.1-cloud-amd64-unsigned"));
        assert!(!kernel("linux-image-6.12.90+deb12.1-amd64"));
        assert!(!kernel("linux-image-cloud-amd64"));
        let meta =
            "Package: linux-image-6.12-cloud-amd64\nVersion: 6.12.90-1\nSize: 1460\nSHA256: ab";
        assert_eq!(KernelPackage::parse(meta), None);
    }

    #[test]
    fn proxies_are_handed_on_and_nothing_else() {
        assert!(is_transport_option(
            "Acquire::http::Proxy \"http://proxy.example:3128\";"
        ));
        assert!(is_transport_option(
            "Acquire::HTTP::Proxy::mirror.example \"DIRECT\";"
        ));
        assert!(!is_transport_option("Acquire::http::Proxy \"\";"));
        assert!(!is_transport_option("Acquire::Languages \"none\";"));
    }

    #[test]
    fn download_progress_is_read() {
        assert_eq!(
            download_fraction("dlstatus:1:42.5000:Retrieving file 1 of 1"),
            Some(0.425)
        );
        assert_eq!(
            download_fraction("Get:1 http://mirror.example/debian bookworm/main"),
            None
        );
    }

    #[tokio::test]
    async fn this_host_can_be_used() {
        let host = Host::detect().unwrap();
        let sources = host.sources(&host.codename).await.unwrap();
        assert!(
            sources.iter().any(|source| source.suite == host.codename),
            "{sources:?}"
        );
        assert!(host.keyring().is_some());
    }
}
