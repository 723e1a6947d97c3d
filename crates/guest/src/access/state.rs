use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use tokio::sync::watch;

use super::{AccessToken, Accounts, Error, User};
use crate::{share::Shares, system::Meter};

/// What the host told the daemon. Immutable: a change makes a new one.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// What a request must carry in `X-Access-Token`. None: the sandbox is open.
    pub access_token: Option<AccessToken>,
    /// Environment that the sandbox was created with.
    pub env_vars: BTreeMap<String, String>,
    /// User of requests that name none.
    pub default_user: Option<String>,
    /// Directory of requests that name none. None: the user's home.
    pub default_workdir: Option<PathBuf>,
    /// The sandbox that this is.
    pub sandbox_id: Option<String>,
    /// The template that it was made from.
    pub template_id: Option<String>,
    /// How often the sandbox has been restored.
    pub generation: Option<u64>,
    /// Proves by its presence in RAM which memory image this VM was restored from.
    pub nonce: Option<String>,
}

impl Settings {
    /// The environment of every program in the sandbox: what it was created with, and what the
    /// sandbox says of itself, which cannot be overridden.
    #[must_use]
    pub fn environment(&self) -> BTreeMap<String, String> {
        let mut environment = self.env_vars.clone();
        environment.insert("E2B_SANDBOX".to_owned(), "true".to_owned());
        for (name, id) in [
            ("E2B_SANDBOX_ID", &self.sandbox_id),
            ("E2B_TEMPLATE_ID", &self.template_id),
        ] {
            match id {
                Some(id) => environment.insert(name.to_owned(), id.clone()),
                None => environment.remove(name),
            };
        }
        environment
    }
}

/// The daemon's state that every service shares. Reading it costs one uncontended lock and one
/// reference count.
#[derive(Debug)]
pub struct State {
    root: PathBuf,
    settings: RwLock<Arc<Settings>>,
    programs: watch::Sender<()>,
    pub(crate) meter: Meter,
    pub(crate) shares: Shares,
}

impl State {
    /// The state of a sandbox that nobody has told anything yet: open, and with the default user
    /// `user`.
    #[must_use]
    pub fn new() -> Self {
        Self::with_root(PathBuf::from("/"))
    }

    /// The same with `/etc` and `/run` below another directory. Paths in requests are not touched
    /// by this.
    #[must_use]
    pub fn with_root(root: PathBuf) -> Self {
        let settings = Settings {
            default_user: Some("user".to_owned()),
            ..Settings::default()
        };
        Self {
            root,
            settings: RwLock::new(Arc::new(settings)),
            programs: watch::Sender::default(),
            meter: Meter::default(),
            shares: Shares::default(),
        }
    }

    /// The directory that holds the sandbox's `/etc` and `/run`.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What the host has said so far.
    #[must_use]
    pub fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the settings; whoever holds the earlier ones keeps them.
    pub fn update<T>(&self, change: impl FnOnce(&mut Settings) -> T) -> T {
        let mut guard = self
            .settings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        change(Arc::make_mut(&mut guard))
    }

    /// Changes whenever a program was started or has ended. While nothing runs, nothing is installed.
    pub(crate) fn programs(&self) -> watch::Receiver<()> {
        self.programs.subscribe()
    }

    /// A program was started or has ended.
    pub(crate) fn note_program(&self) {
        self.programs.send_replace(());
    }

    /// The sandbox's users and groups, read anew: programs may add users at any time.
    ///
    /// # Errors
    /// [`Error::ReadAccounts`].
    pub fn accounts(&self) -> Result<Accounts, Error> {
        Accounts::load(&self.root)
    }

    /// The user of a call that names `name`, or the default one.
    ///
    /// # Errors
    /// [`Error::NoUser`], [`Error::UnknownUser`], [`Error::UnknownDefaultUser`],
    /// [`Error::ReadAccounts`].
    pub fn user(&self, name: Option<&str>) -> Result<User, Error> {
        let settings = self.settings();
        let accounts = self.accounts()?;
        match (name, settings.default_user.as_deref()) {
            (Some(name), _) => accounts
                .resolve(name)
                .ok_or_else(|| Error::UnknownUser(name.to_owned())),
            (None, Some(name)) => accounts
                .resolve(name)
                .ok_or_else(|| Error::UnknownDefaultUser(name.to_owned())),
            (None, None) => Err(Error::NoUser),
        }
    }
}

impl Default for State {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_sandbox_says_of_itself_wins() {
        let mut settings = Settings {
            env_vars: BTreeMap::from(
                [("A", "1"), ("E2B_SANDBOX", "no"), ("E2B_SANDBOX_ID", "x")]
                    .map(|(name, value)| (name.to_owned(), value.to_owned())),
            ),
            ..Settings::default()
        };
        let names = |settings: &Settings| -> Vec<String> {
            settings
                .environment()
                .iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect()
        };
        assert_eq!(names(&settings), ["A=1", "E2B_SANDBOX=true"]);
        settings.sandbox_id = Some("i1".to_owned());
        settings.template_id = Some("base".to_owned());
        assert_eq!(
            names(&settings),
            [
                "A=1",
                "E2B_SANDBOX=true",
                "E2B_SANDBOX_ID=i1",
                "E2B_TEMPLATE_ID=base"
            ]
        );
    }

    #[test]
    fn readers_keep_what_they_have() {
        let state = State::new();
        let before = state.settings();
        state.update(|settings| settings.generation = Some(2));
        assert_eq!(before.generation, None);
        assert_eq!(state.settings().generation, Some(2));
    }
}
