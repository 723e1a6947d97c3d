//! The part of [`Fleet`](super::Fleet) that makes templates: what they begin with, and what is done
//! in the VMs that they are made in.

use std::{path::PathBuf, time::Duration};

use bytes::Bytes;
use cubicle_ids::{SnapshotId, TemplateId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Level;
use crate::template::{Defaults, Probe};

/// An image to boot and to publish as a snapshot.
#[derive(Debug, Clone)]
pub struct BuildOrder {
    /// The template that it is for.
    pub template: TemplateId,
    /// The build of it.
    pub build: Uuid,
    /// What the snapshot is to be called; chosen by the caller, so that it can own it beforehand.
    pub snapshot: SnapshotId,
    /// What is booted.
    pub source: Source,
    /// CPUs of its sandboxes.
    pub cpu_count: u32,
    /// Memory of its sandboxes.
    pub memory_mib: u32,
    /// Size of their root disk. A disk that is there already keeps the size that it has.
    pub disk_mib: u32,
}

/// What is booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// What a recipe makes, by its name.
    Recipe(String),
    /// A container image, as [`OriginFacts::source`] has named it.
    Image(String),
    /// The disk of a snapshot.
    Snapshot(SnapshotId),
}

/// What was found out about the origin of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OriginFacts {
    /// What to boot.
    pub source: Source,
    /// Tells it from everything else that could be booted, kernel and guest daemon included.
    pub fingerprint: String,
    /// What it gives its sandboxes.
    pub defaults: Defaults,
    /// What it would start: Entrypoint and Cmd of an image. Empty: nothing.
    pub command: Vec<String>,
    /// What is started in every sandbox, whatever else a template asks for.
    pub start: Option<Command>,
    /// When that, or what starts by itself, is ready.
    pub ready: Probe,
}

/// A program to run in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// What to run.
    pub command: Command,
    /// Who runs it: a name or a number, with or without a group. `None`: the sandbox's default.
    pub user: Option<String>,
    /// Environment, on top of the sandbox's.
    pub env: Vec<(String, String)>,
    /// Working directory, which must exist. `None`: the sandbox's default.
    pub workdir: Option<String>,
    /// How long it may take; it is killed then. `None`: as long as it likes.
    pub within: Option<Duration>,
}

/// What a program is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Command {
    /// A command for the shell: `/bin/bash` if there is one, else `/bin/sh`.
    Shell(String),
    /// A program and its arguments.
    Exec(Vec<String>),
}

/// What a program printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// On its standard output.
    Stdout(Bytes),
    /// On its standard error.
    Stderr(Bytes),
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Whether that was by itself and with 0.
    pub success: bool,
    /// How, for people: `exit status 3`, `signal: killed`.
    pub status: String,
}

/// Files to put into a sandbox, as Dockerfile's COPY does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyFiles {
    /// The archive on the server: tar, with or without gzip.
    pub archive: PathBuf,
    /// What was copied, relative to the root of the archive.
    pub src: String,
    /// Where to: absolute.
    pub dest: String,
    /// Who owns all of it: a name or a number, with or without a group.
    pub user: String,
    /// Mode of all of it. `None`: as in the archive.
    pub mode: Option<u32>,
    /// How long it may take.
    pub within: Duration,
}

/// One line of a build's progress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildStep {
    /// How grave it is.
    pub level: Level,
    /// The step it belongs to, if any.
    pub step: Option<String>,
    /// What to tell a person.
    pub message: String,
}
