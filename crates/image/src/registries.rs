//! How this host reaches its registries of Python and JavaScript packages: what programs inside a
//! tree are told for as long as they install something, and what never gets into an image.

use std::{
    collections::BTreeMap,
    env,
    fmt::Write as _,
    path::{Path, PathBuf},
};

use rustix::fs::Mode;

use crate::{
    cache::remove,
    error::{During as _, Result},
};

/// Where the files are inside the tree while a package manager runs.
const INSIDE: &str = "/run/registries";
/// The certificates that Debian's and Ubuntu's programs trust.
const SYSTEM_CA: &str = "/etc/ssl/certs/ca-certificates.crt";
/// The options of pip that say how an index is reached. Those that name local files, or what to
/// install, are the host's own business.
const PIP_OPTIONS: [&str; 7] = [
    "index-url",
    "extra-index-url",
    "trusted-host",
    "proxy",
    "timeout",
    "default-timeout",
    "retries",
];
/// The same of npm, besides `//host/...` (credentials) and `@scope:registry`.
const NPM_OPTIONS: [&str; 11] = [
    "registry",
    "proxy",
    "http-proxy",
    "https-proxy",
    "noproxy",
    "strict-ssl",
    "_auth",
    "_authToken",
    "fetch-retries",
    "fetch-timeout",
    "maxsockets",
];
/// Variables that nearly every program finds its proxy by; in both cases.
const PROXIES: [&str; 4] = ["http_proxy", "https_proxy", "all_proxy", "no_proxy"];

/// The host's configuration of pip and npm, as far as it says how to reach a registry.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Registries {
    pip: BTreeMap<String, String>,
    npm: Vec<String>,
    pip_ca: Option<String>,
    npm_ca: Option<String>,
    netrc: Option<String>,
    proxies: Vec<(&'static str, String)>,
}

impl Registries {
    /// As this process and the files of its user say.
    pub(crate) fn of_host() -> Registries {
        let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        Registries::gather(variable, |path| fs_err::read_to_string(path).ok())
    }

    fn gather(
        variable: impl Fn(&str) -> Option<String>,
        read: impl Fn(&Path) -> Option<String>,
    ) -> Registries {
        let home = PathBuf::from(variable("HOME").unwrap_or_else(|| "/root".into()));
        let (pip, pip_ca) = pip_options(&home, &variable, &read);
        let (npm, npm_ca) = npm_options(&home, &variable, &read);
        // The first that is named is what the program would use; a file that is not there is not.
        let certificates = |named: &[Option<String>]| {
            let paths = named.iter().flatten().map(String::as_str);
            paths
                .chain([SYSTEM_CA])
                .find_map(|path| read(Path::new(path)))
        };
        let common = variable("SSL_CERT_FILE");
        let netrc = variable("NETRC").map_or_else(|| home.join(".netrc"), PathBuf::from);
        Registries {
            pip_ca: certificates(&[
                variable("PIP_CERT"),
                pip_ca,
                variable("REQUESTS_CA_BUNDLE"),
                variable("CURL_CA_BUNDLE"),
                common.clone(),
            ]),
            npm_ca: certificates(&[npm_ca, variable("NODE_EXTRA_CA_CERTS"), common]),
            netrc: read(&netrc),
            proxies: PROXIES
                .into_iter()
                .filter_map(|name| {
                    let value = variable(name).or_else(|| variable(&name.to_ascii_uppercase()));
                    value.map(|value| (name, value))
                })
                .collect(),
            pip,
            npm,
        }
    }

    /// Writes the files below `run`, which is `/run` inside the tree. They are gone when the
    /// returned value is.
    pub(crate) fn lend(&self, run: &Path) -> Result<Lent> {
        let directory = run.join(INSIDE.trim_start_matches("/run/"));
        let lent = Lent {
            directory: directory.clone(),
            variables: self.variables(),
        };
        let write = || {
            remove(&directory)?;
            fs_err::create_dir(&directory)?;
            rustix::fs::chmod(&directory, Mode::RWXU)?;
            fs_err::write(directory.join("pip.conf"), self.pip_conf())?;
            fs_err::write(directory.join("npmrc"), self.npmrc())?;
            for (name, text) in [
                ("pip.pem", &self.pip_ca),
                ("npm.pem", &self.npm_ca),
                ("netrc", &self.netrc),
            ] {
                if let Some(text) = text {
                    fs_err::write(directory.join(name), text)?;
                }
            }
            Ok::<_, std::io::Error>(())
        };
        write().during("write how registries are reached")?;
        Ok(lent)
    }

    fn pip_conf(&self) -> String {
        let mut text = "[global]\n".to_owned();
        for (name, value) in &self.pip {
            // Further lines of a value are told from options by their indentation.
            let value = value.lines().collect::<Vec<_>>().join("\n    ");
            let _ = writeln!(text, "{name} = {value}");
        }
        if self.pip_ca.is_some() {
            let _ = writeln!(text, "cert = {INSIDE}/pip.pem");
        }
        text
    }

    fn npmrc(&self) -> String {
        let mut text = self.npm.join("\n");
        if self.npm_ca.is_some() {
            let _ = write!(text, "\ncafile={INSIDE}/npm.pem");
        }
        // Where packages came from is nobody's business inside.
        text.push_str("\nomit-lockfile-registry-resolved=true\n");
        text
    }

    fn variables(&self) -> Vec<(&'static str, String)> {
        let inside = |name: &str| format!("{INSIDE}/{name}");
        let mut variables = vec![
            ("PIP_CONFIG_FILE", inside("pip.conf")),
            ("NPM_CONFIG_USERCONFIG", inside("npmrc")),
        ];
        if self.netrc.is_some() {
            variables.push(("NETRC", inside("netrc")));
        }
        for (name, value) in &self.proxies {
            variables.push((name, value.clone()));
        }
        variables
    }
}

/// Files that a package manager may read while it runs.
pub(crate) struct Lent {
    directory: PathBuf,
    variables: Vec<(&'static str, String)>,
}

impl Lent {
    /// What must be in its environment.
    pub(crate) fn variables(&self) -> &[(&'static str, String)] {
        &self.variables
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.directory) {
            tracing::warn!(%error, "how registries are reached stays readable until the build ends");
        }
    }
}

/// The options of pip in the order in which it reads them, later ones before earlier ones, and the
/// file with the certificates that it trusts.
fn pip_options(
    home: &Path,
    variable: &impl Fn(&str) -> Option<String>,
    read: &impl Fn(&Path) -> Option<String>,
) -> (BTreeMap<String, String>, Option<String>) {
    let own = variable("PIP_CONFIG_FILE").map(PathBuf::from);
    let mut files = vec![
        PathBuf::from("/etc/xdg/pip/pip.conf"),
        "/etc/pip.conf".into(),
        home.join(".pip/pip.conf"),
        home.join(".config/pip/pip.conf"),
    ];
    if own.as_deref() == Some(Path::new("/dev/null")) {
        files.clear();
    }
    files.extend(own);
    let mut options = BTreeMap::new();
    let mut ca = None;
    for text in files.iter().filter_map(|path| read(path)) {
        for section in ["global", "install"] {
            for (name, value) in ini_section(&text, section) {
                if name == "cert" {
                    ca = Some(value);
                } else if PIP_OPTIONS.contains(&name.as_str()) {
                    options.insert(name, value);
                }
            }
        }
    }
    for name in PIP_OPTIONS {
        let variable = variable(&format!(
            "PIP_{}",
            name.replace('-', "_").to_ascii_uppercase()
        ));
        if let Some(value) = variable {
            // Where a file has a line for each, a variable has blanks.
            let several = matches!(name, "extra-index-url" | "trusted-host");
            let value = if several {
                value.split_whitespace().collect::<Vec<_>>().join("\n")
            } else {
                value
            };
            options.insert(name.to_owned(), value);
        }
    }
    (options, ca)
}

/// The options of one section of a file in pip's format, their names as pip's command line has
/// them. A value goes on in the lines after it that are indented.
fn ini_section(text: &str, wanted: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        let trimmed = line.trim();
        if trimmed.is_empty() || trimmed.starts_with(['#', ';']) {
            continue;
        }
        if let Some(section) = trimmed.strip_prefix('[').and_then(|s| s.strip_suffix(']')) {
            inside = section == wanted;
        } else if !inside {
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = found.last_mut() {
                if !value.is_empty() {
                    value.push('\n');
                }
                value.push_str(trimmed);
            }
        } else if let Some((name, value)) = trimmed.split_once(['=', ':']) {
            let name = name.trim().replace('_', "-").to_ascii_lowercase();
            found.push((name, value.trim().to_owned()));
        }
    }
    found
}

/// The lines of npm's configuration that matter, the ones that win last, and the file with the
/// certificates that it trusts.
fn npm_options(
    home: &Path,
    variable: &impl Fn(&str) -> Option<String>,
    read: &impl Fn(&Path) -> Option<String>,
) -> (Vec<String>, Option<String>) {
    let own = variable("NPM_CONFIG_USERCONFIG").or_else(|| variable("npm_config_userconfig"));
    let files = [
        PathBuf::from("/etc/npmrc"),
        "/usr/etc/npmrc".into(),
        own.map_or_else(|| home.join(".npmrc"), PathBuf::from),
    ];
    let (mut options, mut ca) = (Vec::new(), None);
    for text in files.iter().filter_map(|path| read(path)) {
        for line in text.lines() {
            let Some((name, value)) = line.split_once('=') else {
                continue;
            };
            let (name, value) = (name.trim(), value.trim().trim_matches('"'));
            let value = expand(value, variable);
            if name == "cafile" {
                ca = Some(value);
            } else if name.starts_with("//")
                || (name.starts_with('@') && name.ends_with(":registry"))
                || NPM_OPTIONS.contains(&name)
            {
                options.push(format!("{name}={value}"));
            }
        }
    }
    for name in NPM_OPTIONS {
        let lower = format!("npm_config_{}", name.replace('-', "_"));
        let value = variable(&lower).or_else(|| variable(&lower.to_ascii_uppercase()));
        if let Some(value) = value {
            options.push(format!("{name}={value}"));
        }
    }
    let ca = variable("npm_config_cafile")
        .or_else(|| variable("NPM_CONFIG_CAFILE"))
        .or(ca);
    (options, ca)
}

/// Replaces `${NAME}` by the variable's value, as npm does; one that is not set stays as it is.
fn expand(text: &str, variable: &impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        out.push_str(before);
        let Some((name, tail)) = after.split_once('}') else {
            out.push_str("${");
            rest = after;
            continue;
        };
        match variable(name) {
            Some(value) => out.push_str(&value),
            None => {
                let _ = write!(out, "${{{name}}}");
            }
        }
        rest = tail;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gather(variables: &[(&str, &str)], files: &[(&str, &str)]) -> Registries {
        let find = |pairs: &[(&str, &str)], name: &str| {
            let pair = pairs.iter().find(|(known, _)| *known == name);
            pair.map(|(_, value)| (*value).to_owned())
        };
        Registries::gather(
            |name| find(variables, name),
            |path| find(files, path.to_str().unwrap()),
        )
    }

    #[test]
    fn pip_is_told_what_the_host_says_and_variables_win() {
        let found = gather(
            &[
                ("HOME", "/home/me"),
                (
                    "PIP_EXTRA_INDEX_URL",
                    "https://b.example/ https://c.example/",
                ),
                ("PIP_FIND_LINKS", "/opt/wheels"),
                ("HTTPS_PROXY", "http://proxy.example:3128"),
            ],
            &[
                (
                    "/etc/pip.conf",
                    "[global]\nindex-url = https://a.example/simple\ncert=/etc/own.pem\n\
                     [install]\nuser = true\n[freeze]\ntimeout = 1\n",
                ),
                (
                    "/home/me/.config/pip/pip.conf",
                    "[global]\n; a remark\nindex_url: https://me:pass@a2.example/simple\n\
                     trusted-host =\n    a2.example\n    b.example\n",
                ),
                ("/etc/own.pem", "OWN"),
                (SYSTEM_CA, "SYSTEM"),
                ("/home/me/.netrc", "machine a.example"),
            ],
        );
        assert_eq!(
            found.pip_conf(),
            "[global]\n\
             extra-index-url = https://b.example/\n    https://c.example/\n\
             index-url = https://me:pass@a2.example/simple\n\
             trusted-host = a2.example\n    b.example\n\
             cert = /run/registries/pip.pem\n"
        );
        assert_eq!(found.pip_ca.as_deref(), Some("OWN"));
        assert_eq!(found.npm_ca.as_deref(), Some("SYSTEM"));
        let variables = found.variables();
        assert!(variables.contains(&("https_proxy", "http://proxy.example:3128".into())));
        assert!(variables.contains(&("NETRC", "/run/registries/netrc".into())));
    }

    #[test]
    fn npm_is_told_registries_and_credentials_and_nothing_about_the_host() {
        let found = gather(
            &[
                ("TOKEN", "secret"),
                ("NPM_CONFIG_REGISTRY", "https://r.example/"),
            ],
            &[(
                "/root/.npmrc",
                "prefix=/home/me/.npm\nregistry=https://old.example/\n\
                 @corp:registry=https://corp.example/\n\
                 //corp.example/:_authToken=${TOKEN}\n//x.example/:_authToken=${UNSET}\n\
                 cafile=/missing.pem\n",
            )],
        );
        assert_eq!(
            found.npmrc(),
            "registry=https://old.example/\n@corp:registry=https://corp.example/\n\
             //corp.example/:_authToken=secret\n//x.example/:_authToken=${UNSET}\n\
             registry=https://r.example/\nomit-lockfile-registry-resolved=true\n"
        );
    }

    #[test]
    fn what_is_lent_is_given_back() {
        let run = tempfile::tempdir().unwrap();
        let found = gather(&[], &[(SYSTEM_CA, "SYSTEM")]);
        let lent = found.lend(run.path()).unwrap();
        let npmrc = fs_err::read_to_string(run.path().join("registries/npmrc")).unwrap();
        assert!(npmrc.contains("cafile=/run/registries/npm.pem"), "{npmrc}");
        drop(lent);
        assert_eq!(fs_err::read_dir(run.path()).unwrap().count(), 0);
    }
}
