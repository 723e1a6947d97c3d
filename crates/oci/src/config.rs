use std::{collections::BTreeMap, fmt, path::PathBuf, str::FromStr};

use serde::Deserialize;

use crate::{
    error::{Error, Result},
    map::ImageMap,
    unpack::Limits,
};

/// Where images come from and where they are kept.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// A directory that belongs to [`crate::Images`] alone.
    pub dir: PathBuf,
    /// Names that mean something else here than they do elsewhere.
    pub map: ImageMap,
    /// Registries that are asked in the place of others, in this order.
    pub mirrors: Vec<Mirror>,
    /// Files with certificates, in PEM, that are trusted besides the system's.
    pub ca_files: Vec<PathBuf>,
    /// Registries, as `host` or `host:port`, that are spoken to without encryption if they do not
    /// offer it. Those on the loopback interface are among them without being named.
    pub insecure: Vec<String>,
    /// How large an image may be.
    pub limits: Limits,
}

/// A registry that has the images of another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// The registry whose images it has, such as `docker.io`.
    pub of: String,
    /// Host and port of the mirror.
    pub host: String,
    /// What comes in front of the repository's name there, if anything does.
    pub prefix: Option<String>,
}

impl FromStr for Mirror {
    type Err = Error;

    /// Understands `docker.io=mirror.example:5000/prefix` and, for `docker.io`, the right side
    /// alone.
    fn from_str(text: &str) -> Result<Mirror> {
        let (of, at) = text.split_once('=').unwrap_or(("docker.io", text));
        let (host, prefix) = match at.split_once('/') {
            Some((host, prefix)) => (host, Some(prefix.trim_matches('/').to_owned())),
            None => (at, None),
        };
        let is_host = |host: &str| {
            let known = |byte: u8| byte.is_ascii_alphanumeric() || b".-:".contains(&byte);
            !host.is_empty() && host.bytes().all(known)
        };
        if !is_host(of) || !is_host(host) || at.contains("://") {
            return Err(Error::Setting {
                what: format!("the registry mirror `{text}`"),
                reason: "write it as `REGISTRY=HOST[:PORT][/PREFIX]`, without `https://`".into(),
            });
        }
        Ok(Mirror {
            of: of.to_owned(),
            host: host.to_owned(),
            prefix: prefix.filter(|prefix| !prefix.is_empty()),
        })
    }
}

/// Who asks a registry. The password is in no output.
#[derive(Clone, PartialEq, Eq)]
pub struct Auth {
    /// Name of the user.
    pub username: String,
    /// The password, or a token in its place.
    pub password: String,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// What an image says about how it is to be run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ImageConfig {
    /// Environment variables, in order; of equal names the last one holds.
    pub env: Vec<(String, String)>,
    /// `user`, `uid`, `user:group` or `uid:gid`; none means root.
    pub user: Option<String>,
    /// Where commands begin; none means `/`.
    pub workdir: Option<String>,
    /// The program and its first arguments.
    pub entrypoint: Vec<String>,
    /// The rest of the arguments, or, without an entry point, all of it.
    pub cmd: Vec<String>,
    /// TCP ports that it offers, in ascending order.
    pub ports: Vec<u16>,
}

/// The part of the configuration document that concerns us. Everything may be missing or `null`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct RawConfig {
    env: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
}

impl From<RawConfig> for ImageConfig {
    fn from(raw: RawConfig) -> ImageConfig {
        let variable = |variable: String| {
            // A name without a value is one that whoever runs it was to pass on.
            let (name, value) = variable.split_once('=')?;
            (!name.is_empty()).then(|| (name.to_owned(), value.to_owned()))
        };
        let port = |port: &String| {
            let number = match port.split_once('/') {
                None => port,
                Some((number, protocol)) if protocol.eq_ignore_ascii_case("tcp") => number,
                Some(_) => return None,
            };
            number.parse::<u16>().ok().filter(|&port| port > 0)
        };
        let ports = raw.exposed_ports.unwrap_or_default();
        let mut ports: Vec<u16> = ports.keys().filter_map(port).collect();
        ports.sort_unstable();
        ports.dedup();
        let text = |text: Option<String>| text.filter(|text| !text.is_empty());
        ImageConfig {
            env: raw
                .env
                .unwrap_or_default()
                .into_iter()
                .filter_map(variable)
                .collect(),
            user: text(raw.user),
            workdir: text(raw.working_dir),
            entrypoint: raw.entrypoint.unwrap_or_default(),
            cmd: raw.cmd.unwrap_or_default(),
            ports,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_have_a_registry_a_host_and_perhaps_a_prefix() {
        let mirror = |of: &str, host: &str, prefix: Option<&str>| Mirror {
            of: of.into(),
            host: host.into(),
            prefix: prefix.map(Into::into),
        };
        let parse = |text: &str| text.parse::<Mirror>().unwrap();
        assert_eq!(parse("m:5000"), mirror("docker.io", "m:5000", None));
        assert_eq!(parse("ghcr.io=m/x/y/"), mirror("ghcr.io", "m", Some("x/y")));
        for bad in [
            "",
            "=",
            "docker.io=",
            "https://m",
            "docker.io=https://m",
            "a b",
        ] {
            assert!(bad.parse::<Mirror>().is_err(), "{bad}");
        }
    }

    #[test]
    fn odd_configurations_are_understood() {
        let raw: RawConfig = serde_json::from_str(
            r#"{"Env": ["A=1", "B=x=y", "C", "=z", "D="], "User": "", "Entrypoint": null,
                "Cmd": ["sh"], "ExposedPorts": {"80/tcp": {}, "53/udp": {}, "8080": {}, "x": {}},
                "Unknown": 1}"#,
        )
        .unwrap();
        let config = ImageConfig::from(raw);
        let env: Vec<_> = config.env.iter().map(|(k, v)| format!("{k}|{v}")).collect();
        assert_eq!(env, ["A|1", "B|x=y", "D|"]);
        assert_eq!((config.user, config.cmd), (None, vec!["sh".to_owned()]));
        assert_eq!(config.ports, [80, 8080]);
    }

    #[test]
    fn a_password_is_not_printed() {
        let auth = Auth {
            username: "me".into(),
            password: "hunter2".into(),
        };
        assert!(!format!("{auth:?}").contains("hunter2"));
    }
}
