//! What a Dockerfile asks for, as the steps of a template build.
//!
//! The grammar is `parse-dockerfile`'s; here is what the instructions mean. Everything that one
//! stage can do to a root file system is done; whatever is not is refused with its line, and
//! nothing is left out in silence.

mod context;
mod ignored;
mod instructions;
mod words;

use std::fmt;

pub(crate) use self::{
    context::{Context, Files},
    instructions::read,
};

/// A build as a Dockerfile describes it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Image to start from.
    pub(crate) image: String,
    /// What to do to it, in order.
    pub(crate) steps: Vec<Step>,
    /// Last `ENTRYPOINT`.
    pub(crate) entrypoint: Option<Vec<String>>,
    /// Last `CMD`.
    pub(crate) cmd: Option<Vec<String>>,
    /// What `EXPOSE` names.
    pub(crate) ports: Vec<u16>,
    /// What was read and has no effect, for the person who wrote it.
    pub(crate) notes: Vec<Problem>,
}

/// One step, with the line that asks for it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// Where it is written, from 1 on.
    pub(crate) line: usize,
    /// What it does.
    pub(crate) action: Action,
}

/// What a step does.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Runs a command in a shell.
    Run(String),
    /// Copies files of the context.
    Copy(Copy),
    /// Sets environment variables.
    Env(Vec<(String, String)>),
    /// Changes the directory of what follows.
    Workdir(String),
    /// Changes the user of what follows.
    User(String),
}

/// `COPY`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Copy {
    /// Paths in the context, with wildcards.
    pub(crate) sources: Vec<String>,
    /// Where to.
    pub(crate) dest: String,
    /// Whose they become: `--chown`.
    pub(crate) owner: Option<String>,
    /// Their permissions: `--chmod`.
    pub(crate) mode: Option<u32>,
}

/// What is to be said about a line of a Dockerfile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) struct Problem {
    /// From 1 on; 0 if it is about the whole file.
    pub(crate) line: usize,
    /// What is wrong with it, and what to do.
    pub(crate) message: String,
}

impl Problem {
    fn new(line: usize, message: impl Into<String>) -> Self {
        Self {
            line,
            message: message.into(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "line {}: ", self.line)?;
        }
        f.write_str(&self.message)
    }
}
