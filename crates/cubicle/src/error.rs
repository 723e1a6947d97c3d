//! What a person reads when a command fails: what failed, why, and what to do next.

use std::{fmt, path::PathBuf};

/// A failed command.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("no Cubicle server answers at {url}")]
    ServerDown {
        url: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("the request to {what} broke")]
    Transport {
        what: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("{message}")]
    Refused { status: u16, message: String },
    #[error("the answer to {what} is not what this client expects")]
    Unexpected {
        what: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("no server is known on this machine: {path} is missing")]
    NoLocalServer { path: PathBuf },
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot use the terminal")]
    Terminal(#[source] std::io::Error),
    #[error("{0}")]
    Usage(String),
    #[error("interrupted: {what}")]
    Interrupted { what: String, hint: Option<String> },
    #[error("cannot {action}")]
    Setup {
        action: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
        hint: Option<String>,
    },
}

impl Error {
    /// What the person can do about it, if we know.
    fn hint(&self) -> Option<String> {
        match self {
            Self::ServerDown { .. } | Self::NoLocalServer { .. } => Some(
                "start one with `cubicle up`, or name another with --url and --api-key".to_owned(),
            ),
            Self::Refused { status: 401, .. } => Some(
                "pass --api-key, or use the local server's own key (readable by root only)"
                    .to_owned(),
            ),
            Self::File { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                Some("run it as root, or as the user who started the server".to_owned())
            }
            Self::Setup { hint, .. } | Self::Interrupted { hint, .. } => hint.clone(),
            _ => None,
        }
    }

    /// A failed step of a command's own work.
    pub(crate) fn setup(
        action: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Setup {
            action: action.into(),
            source: source.into(),
            hint: None,
        }
    }

    /// The same with advice.
    pub(crate) fn with_hint(self, advice: impl Into<String>) -> Self {
        match self {
            Self::Setup { action, source, .. } => Self::Setup {
                action,
                source,
                hint: Some(advice.into()),
            },
            other => other,
        }
    }

    /// Prints the error for a person, or as JSON for a program, on standard error.
    pub(crate) fn print(&self, json: bool) {
        if json {
            let body = serde_json::json!({ "error": Chain(self).to_string(), "hint": self.hint() });
            eprintln!("{body}");
            return;
        }
        eprintln!("error: {}", Chain(self));
        if let Some(hint) = self.hint() {
            eprintln!("  try: {hint}");
        }
    }
}

/// An error with its causes on one line.
pub(crate) struct Chain<'a>(pub(crate) &'a (dyn std::error::Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = self.0.to_string();
        f.write_str(&last)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let text = error.to_string();
            // Some libraries repeat their cause in their own text.
            if !last.contains(&text) {
                write!(f, ": {text}")?;
            }
            last = text;
            cause = error.source();
        }
        Ok(())
    }
}
