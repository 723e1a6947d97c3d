//! What a template is to be made of.

use std::{fmt, net::Ipv4Addr, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

use super::Size;
use crate::error::{Error, Result};

/// The recipe that is meant when nothing is said.
pub const BASE_RECIPE: &str = "base";
/// The image that E2B's clients begin with: the same thing under another name.
pub const BASE_IMAGE: &str = "e2bdev/base";

/// A template to build.
#[derive(Debug, Clone)]
pub struct BuildTemplate {
    /// `alias[:tag]`; an alias that exists gets a new build.
    pub name: String,
    /// More tags for it.
    pub tags: Vec<String>,
    /// Size of its sandboxes.
    pub size: Size,
    /// What it is made of.
    pub spec: BuildSpec,
    /// Names this request: a second one with the same id is answered with the build of the first.
    pub request_id: Option<String>,
}

impl BuildTemplate {
    /// A template of the default size.
    #[must_use]
    pub fn new(name: impl Into<String>, spec: BuildSpec) -> Self {
        Self {
            name: name.into(),
            tags: Vec::new(),
            size: Size::default(),
            spec,
            request_id: None,
        }
    }
}

/// What a template is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BuildSpec {
    /// What it begins with.
    pub origin: Origin,
    /// What is done to that, in this order.
    #[serde(default)]
    pub steps: Vec<Step>,
    /// A shell command that is started last and runs in every sandbox.
    #[serde(default)]
    pub start: Option<String>,
    /// When the template is ready to be frozen.
    #[serde(default)]
    pub ready: Probe,
    /// How long it may take until it is.
    #[serde(default = "BuildSpec::default_ready_within")]
    pub ready_within: Duration,
    /// Environment on top of the origin's.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Ports that its servers listen on, for clients to know.
    #[serde(default)]
    pub ports: Vec<u16>,
    /// Name servers of its sandboxes. Empty: the server's own choice.
    #[serde(default)]
    pub dns: Vec<Ipv4Addr>,
    /// In the place of the image's Entrypoint and Cmd.
    #[serde(default)]
    pub command: Option<Vec<String>>,
    /// Without [`Self::start`], start [`Self::command`] or the image's own Entrypoint and Cmd,
    /// unless that is a plain shell.
    #[serde(default)]
    pub run_image_command: bool,
    /// Begin as the user `user` in its home, whatever the image says; `user` is made if the image
    /// has none. Otherwise the image's own User and WorkingDir hold.
    #[serde(default)]
    pub with_user: bool,
    /// Build even if it was built the same way before, from the origin on.
    #[serde(default)]
    pub force: bool,
}

impl BuildSpec {
    /// How long a template may take to be ready if nothing is said.
    pub const READY_WITHIN: Duration = Duration::from_secs(5 * 60);

    const fn default_ready_within() -> Duration {
        Self::READY_WITHIN
    }

    /// The origin alone.
    #[must_use]
    pub fn new(origin: Origin) -> Self {
        Self {
            origin,
            steps: Vec::new(),
            start: None,
            ready: Probe::None,
            ready_within: Self::READY_WITHIN,
            env: Vec::new(),
            ports: Vec::new(),
            dns: Vec::new(),
            command: None,
            run_image_command: false,
            with_user: false,
            force: false,
        }
    }

    /// What a recipe makes, and nothing more.
    #[must_use]
    pub fn recipe(name: impl Into<String>) -> Self {
        Self::new(Origin::Recipe(name.into()))
    }

    /// Whether it can be carried out at all, as far as that can be told without looking.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the field.
    pub(crate) fn check(&self) -> Result<()> {
        let of_steps = self.steps.iter().filter_map(|step| match &step.action {
            Action::Env(vars) => Some(vars),
            _ => None,
        });
        let names = of_steps.flatten().chain(&self.env).map(|(name, _)| name);
        for name in names {
            if name.is_empty() || name.contains(['=', '\0']) {
                let why = format!(
                    "'{}' cannot be the name of a variable",
                    super::shorten(name)
                );
                return Err(Error::invalid("env", why));
            }
        }
        for step in &self.steps {
            let empty = match &step.action {
                Action::Copy { src, dest, .. } => src.is_empty() || dest.is_empty(),
                Action::Run { command, .. } => command.trim().is_empty(),
                Action::Env(_) => false,
                Action::Workdir(path) => path.is_empty(),
                Action::User(user) => user.is_empty(),
            };
            if empty {
                let why = format!("'{}' lacks an argument", step.action);
                return Err(Error::invalid("steps", why));
            }
        }
        match &self.ready {
            Probe::Http { path, .. } if !path.starts_with('/') => {
                Err(Error::invalid("probe", "a path begins with '/'".to_owned()))
            }
            _ => Ok(()),
        }
    }
}

/// What a template begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Origin {
    /// What this server makes by a recipe of its own.
    Recipe(String),
    /// A container image.
    #[serde(rename_all = "camelCase")]
    Image {
        /// `name`, `host/name:tag`, `name@sha256:...`.
        reference: String,
        /// Who asks the registry for it. Never stored.
        #[serde(skip)]
        auth: Option<RegistryAuth>,
    },
    /// Another template: an id, an alias, `name:tag`, or a snapshot.
    Template(String),
}

impl Origin {
    /// A container image from a registry that asks no questions. E2B's base image, also none at
    /// all, is the recipe that takes its place.
    #[must_use]
    pub fn image(reference: &str) -> Self {
        let name = reference.strip_prefix("docker.io/").unwrap_or(reference);
        let (name, tag) = name.split_once(':').unwrap_or((name, "latest"));
        if reference.is_empty() || (name == BASE_IMAGE && tag == "latest") {
            return Self::Recipe(BASE_RECIPE.to_owned());
        }
        Self::Image {
            reference: reference.to_owned(),
            auth: None,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Recipe(name) => write!(f, "recipe {name}"),
            Self::Image { reference, .. } => write!(f, "image {reference}"),
            Self::Template(reference) => write!(f, "template {reference}"),
        }
    }
}

/// Who asks a registry for an image.
#[derive(Clone, PartialEq, Eq)]
pub struct RegistryAuth {
    /// The user.
    pub username: String,
    /// Its password or token.
    pub password: String,
}

impl fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryAuth")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// One step of a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// What it does.
    pub action: Action,
    /// Do it, and everything after it, even if it was done before.
    #[serde(default)]
    pub force: bool,
}

impl From<Action> for Step {
    fn from(action: Action) -> Self {
        Self {
            action,
            force: false,
        }
    }
}

/// What a step does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Action {
    /// Puts uploaded files into it.
    Copy {
        /// What was copied, relative to the root of the uploaded archive, in which it has this
        /// path; may hold wildcards, which the client has resolved.
        src: String,
        /// Where to: a directory if it ends in `/`, is one, or takes several files.
        dest: String,
        /// `user`, `user:group`, or numbers. `None`: root.
        user: Option<String>,
        /// Mode of every file and directory. `None`: as in the archive.
        mode: Option<u32>,
        /// Names the uploaded archive.
        files: FilesHash,
    },
    /// Runs a shell command.
    Run {
        /// The command.
        command: String,
        /// Who runs it. `None`: the user of the last `User`.
        user: Option<String>,
    },
    /// Sets variables, for the steps after it and for sandboxes.
    Env(Vec<(String, String)>),
    /// Sets the working directory, likewise; made if it is missing.
    Workdir(String),
    /// Sets the user, likewise.
    User(String),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Copy { src, dest, .. } => write!(f, "COPY {src} {dest}"),
            Self::Run { command, .. } => write!(f, "RUN {command}"),
            // Values may be secrets.
            Self::Env(vars) => {
                f.write_str("ENV")?;
                vars.iter().try_for_each(|(name, _)| write!(f, " {name}"))
            }
            Self::Workdir(path) => write!(f, "WORKDIR {path}"),
            Self::User(user) => write!(f, "USER {user}"),
        }
    }
}

/// When a template is ready.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Probe {
    /// As soon as it has been started and has settled.
    #[default]
    None,
    /// When this shell command succeeds.
    Command(String),
    /// When this is answered with a status below 400.
    #[serde(rename_all = "camelCase")]
    Http {
        /// Port on the sandbox's localhost.
        port: u16,
        /// Path and query; begins with `/`.
        path: String,
    },
    /// When something listens here.
    #[serde(rename_all = "camelCase")]
    Tcp {
        /// Port on the sandbox's localhost.
        port: u16,
    },
}

/// What a template gives its sandboxes. As stored; an absent value is none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Defaults {
    /// Environment, under that of the sandbox itself.
    pub env: Vec<(String, String)>,
    /// User of programs that are started without one. `None`: the server's own choice.
    pub user: Option<String>,
    /// Working directory of programs that are started without one. `None`: the user's home.
    pub workdir: Option<String>,
    /// Name servers. Empty: the server's own choice.
    pub dns: Vec<Ipv4Addr>,
    /// Ports that its servers listen on, for clients to know.
    pub ports: Vec<u16>,
}

impl Defaults {
    /// The environment, with `over` laid over it.
    #[must_use]
    pub fn env_with(&self, over: &[(String, String)]) -> Vec<(String, String)> {
        let mut env = self.env.clone();
        for (name, value) in over {
            set(&mut env, name, value.clone());
        }
        env
    }
}

/// Sets a variable, in the place that it has.
pub(super) fn set(env: &mut Vec<(String, String)>, name: &str, value: String) {
    match env.iter_mut().find(|(known, _)| known == name) {
        Some((_, old)) => *old = value,
        None => env.push((name.to_owned(), value)),
    }
}

/// Names an uploaded archive of files: 64 lower-case hexadecimal digits, chosen by the client.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FilesHash(String);

impl FilesHash {
    /// The digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Why a text does not name uploaded files.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a hash of files has 64 lower-case hexadecimal digits")]
pub struct BadFilesHash;

impl FromStr for FilesHash {
    type Err = BadFilesHash;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if text.len() == 64 && text.bytes().all(digit) {
            Ok(Self(text.to_owned()))
        } else {
            Err(BadFilesHash)
        }
    }
}

impl TryFrom<String> for FilesHash {
    type Error = BadFilesHash;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<FilesHash> for String {
    fn from(hash: FilesHash) -> Self {
        hash.0
    }
}

impl fmt::Display for FilesHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_base_image_is_a_recipe() {
        for name in [
            "",
            "e2bdev/base",
            "e2bdev/base:latest",
            "docker.io/e2bdev/base",
        ] {
            assert_eq!(Origin::image(name), Origin::Recipe("base".into()), "{name}");
        }
        for name in ["python:3", "e2bdev/base:old", "127.0.0.1:5000/e2bdev/base"] {
            assert!(
                matches!(Origin::image(name), Origin::Image { .. }),
                "{name}"
            );
        }
    }

    #[test]
    fn secrets_are_neither_shown_nor_stored() {
        let auth = Some(RegistryAuth {
            username: "me".into(),
            password: "hunter2".into(),
        });
        let origin = Origin::Image {
            reference: "x".into(),
            auth,
        };
        let step = Action::Env(vec![("TOKEN".into(), "hunter2".into())]);
        assert!(!format!("{origin:?} {origin} {step}").contains("hunter2"));
        let json = serde_json::to_string(&origin).unwrap();
        assert!(!json.contains("hunter2") && !json.contains("me"));
    }

    #[test]
    fn a_hash_of_files_is_hexadecimal() {
        assert!("a1".repeat(32).parse::<FilesHash>().is_ok());
        for bad in ["", "a1", &"A1".repeat(32), &"../".repeat(22)[..64]] {
            assert!(bad.parse::<FilesHash>().is_err(), "{bad}");
        }
    }
}
