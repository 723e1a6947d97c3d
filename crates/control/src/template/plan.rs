//! From a spec to the stages that a build consists of. Nothing is done here.
//!
//! A stage is what changes a VM: its snapshot is a layer. Everything that a stage depends on is in
//! its fingerprint, and so is the fingerprint of the stage before it; what only sets variables, the
//! user or the working directory is part of the next one.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{Action, BuildSpec, Defaults, FilesHash, Origin, Probe, expand::expand, spec::set};
use crate::fleet::{Command, OriginFacts};

/// The user that builds begin as that ask for one, and its home.
const USER: &str = "user";
const HOME: &str = "/home/user";
/// What programs are looked for in, where nobody says.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Programs that are plain shells when they are an image's only command.
const SHELLS: [&str; 6] = ["sh", "bash", "ash", "dash", "zsh", "fish"];
/// What a change of the meaning of stages would have to change.
const VERSION: &[u8] = b"cubicle template layer 1\0";

/// Where things happen that are no step.
pub(super) const BASE: &str = "base";
/// The same, after the steps.
pub(super) const FINALIZE: &str = "finalize";

/// All that is done after the origin, and what comes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) stages: Vec<Stage>,
    pub(super) defaults: Defaults,
    pub(super) launches: Vec<Launch>,
    /// Identifies everything together.
    pub(super) fingerprint: String,
}

/// What leads from one layer to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stage {
    /// `base`, the number of a step from 1, or `finalize`.
    pub(super) step: String,
    /// What is done, for people.
    pub(super) title: String,
    pub(super) work: Work,
    /// Directories that are made before that if they are missing, each for a user.
    pub(super) directories: Vec<(String, String)>,
    /// Environment, user and working directory that hold for it.
    pub(super) defaults: Defaults,
    pub(super) fingerprint: String,
    /// Whether it is done even if it was done before.
    pub(super) forced: bool,
}

/// What is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Work {
    /// Making the user that builds begin as, if it is missing.
    MakeUser,
    Run {
        command: String,
        user: String,
    },
    Copy {
        src: String,
        dest: String,
        user: String,
        mode: Option<u32>,
        files: FilesHash,
    },
    /// Starting what runs in every sandbox, and waiting for it.
    Launch(Launch),
    /// Nothing but the directories.
    Directories,
}

/// Something that runs in every sandbox of a template: what a cold boot has to start again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Launch {
    /// What is started. `None`: it starts by itself.
    pub command: Option<Command>,
    /// Environment, user and working directory of it.
    pub defaults: Defaults,
    /// When it is ready.
    pub ready: Probe,
    /// How long that may take.
    pub within: Duration,
}

/// What the stages are put on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ground {
    pub(super) fingerprint: String,
    pub(super) defaults: Defaults,
    pub(super) launches: Vec<Launch>,
    /// What an image would start.
    pub(super) command: Vec<String>,
    /// What is to run in any case, and does not yet.
    pub(super) launch: Option<Launch>,
}

impl Ground {
    /// The ground that an origin makes in sandboxes of one size.
    pub(super) fn of_origin(
        facts: &OriginFacts,
        cpus: u32,
        memory_mib: u32,
        disk_mib: u32,
    ) -> Self {
        let size = format!("{cpus} {memory_mib} {disk_mib}");
        let launch = facts.start.is_some() || facts.ready != Probe::None;
        Self {
            fingerprint: digest(&facts.fingerprint, &[&size]),
            defaults: facts.defaults.clone(),
            launches: Vec::new(),
            command: facts.command.clone(),
            launch: launch.then(|| Launch {
                command: facts.start.clone(),
                defaults: facts.defaults.clone(),
                ready: facts.ready.clone(),
                within: BuildSpec::READY_WITHIN,
            }),
        }
    }

    /// Nothing but what a template's sandboxes have running, on a disk of it that was booted.
    pub(super) fn of_shape(fingerprint: &str, cpus: u32, memory_mib: u32) -> Self {
        Self {
            fingerprint: digest(fingerprint, &["shape", &format!("{cpus} {memory_mib}")]),
            defaults: Defaults::default(),
            launches: Vec::new(),
            command: Vec::new(),
            launch: None,
        }
    }
}

impl Plan {
    pub(super) fn new(ground: &Ground, spec: &BuildSpec) -> Self {
        let mut planner = Planner::new(ground, ground.defaults.clone(), Some(spec));
        let mut launches = ground.launches.clone();
        if let Some(launch) = &ground.launch {
            launches.push(launch.clone());
            planner.launch(BASE, launch.clone());
        }
        planner.begin(spec);
        for (number, step) in (1..).zip(&spec.steps) {
            planner.forced |= step.force;
            planner.step(number, &step.action);
        }
        let ready = spec.ready.clone();
        let command = own_command(spec, &ground.command);
        if command.is_some() || ready != Probe::None {
            let launch = Launch {
                command,
                defaults: planner.defaults.clone(),
                ready,
                within: spec.ready_within,
            };
            launches.push(launch.clone());
            planner.launch(FINALIZE, launch);
        } else if !planner.directories.is_empty() {
            let title = "making the working directory".to_owned();
            planner.stage(FINALIZE, title, Work::Directories, &[]);
        } else if planner.stages.is_empty() && matches!(spec.origin, Origin::Template(_)) {
            // The snapshot of the other goes when that does.
            let title = "making a template of its own".to_owned();
            planner.stage(FINALIZE, title, Work::Directories, &[]);
        }
        Self {
            fingerprint: planner.fingerprint,
            stages: planner.stages,
            defaults: planner.defaults,
            launches,
        }
    }

    /// Starting again what a template has running.
    pub(super) fn of_launches(ground: &Ground, launches: &[Launch]) -> Self {
        let mut planner = Planner::new(ground, Defaults::default(), None);
        for launch in launches {
            planner.launch(FINALIZE, launch.clone());
        }
        Self {
            fingerprint: planner.fingerprint,
            stages: planner.stages,
            defaults: planner.defaults,
            launches: launches.to_vec(),
        }
    }
}

struct Planner {
    fingerprint: String,
    forced: bool,
    defaults: Defaults,
    with_user: bool,
    stages: Vec<Stage>,
    directories: Vec<(String, String)>,
}

impl Planner {
    fn new(ground: &Ground, defaults: Defaults, spec: Option<&BuildSpec>) -> Self {
        Self {
            fingerprint: ground.fingerprint.clone(),
            forced: spec.is_some_and(|spec| spec.force),
            with_user: spec.is_some_and(|spec| spec.with_user),
            defaults,
            stages: Vec::new(),
            directories: Vec::new(),
        }
    }

    /// What holds before the first step.
    fn begin(&mut self, spec: &BuildSpec) {
        for (name, value) in &spec.env {
            set(&mut self.defaults.env, name, value.clone());
        }
        if spec.with_user && !matches!(spec.origin, Origin::Template(_)) {
            if matches!(spec.origin, Origin::Image { .. }) {
                let title = format!("making sure that there is a user `{USER}`");
                self.stage(BASE, title, Work::MakeUser, &[]);
            }
            self.defaults.user = Some(USER.to_owned());
            self.defaults.workdir = Some(HOME.to_owned());
        }
        if !spec.dns.is_empty() {
            self.defaults.dns.clone_from(&spec.dns);
        }
        for port in &spec.ports {
            if !self.defaults.ports.contains(port) {
                self.defaults.ports.push(*port);
            }
        }
    }

    fn step(&mut self, number: usize, action: &Action) {
        let (step, title) = (number.to_string(), action.to_string());
        match action {
            Action::Env(vars) => {
                // All of one step see what held before it.
                let values: Vec<_> = vars.iter().map(|(_, value)| self.expand(value)).collect();
                for ((name, _), value) in vars.iter().zip(values) {
                    set(&mut self.defaults.env, name, value);
                }
            }
            Action::User(user) => self.defaults.user = Some(self.expand(user)),
            Action::Workdir(path) => {
                let path = self.absolute(&self.expand(path));
                self.directories.push((path.clone(), self.user()));
                self.defaults.workdir = Some(path);
            }
            Action::Run { command, user } => {
                let user = user.clone().unwrap_or_else(|| self.user());
                let command = command.clone();
                self.stage(&step, title, Work::Run { command, user }, &[]);
            }
            Action::Copy {
                src,
                dest,
                user,
                mode,
                files,
            } => {
                let work = Work::Copy {
                    src: src.clone(),
                    dest: self.absolute(&self.expand(dest)),
                    user: user.clone().unwrap_or_else(|| self.owner()),
                    mode: *mode,
                    files: files.clone(),
                };
                self.stage(&step, title, work, &[]);
            }
        }
    }

    fn launch(&mut self, step: &str, launch: Launch) {
        let title = match &launch.command {
            Some(Command::Shell(command)) => format!("starting {command}"),
            Some(Command::Exec(words)) => format!("starting {}", words.join(" ")),
            None => "waiting until it is ready".to_owned(),
        };
        let detail = serde_json::to_string(&launch).unwrap_or_default();
        self.stage(step, title, Work::Launch(launch), &[&detail]);
    }

    fn stage(&mut self, step: &str, title: String, work: Work, detail: &[&str]) {
        let directories = std::mem::take(&mut self.directories);
        let held = &self.defaults;
        let scene = serde_json::to_string(&(&directories, &held.env, &held.user, &held.workdir));
        let what = match &work {
            Work::MakeUser => "user".to_owned(),
            Work::Run { command, user } => format!("run {user}\0{command}"),
            Work::Copy {
                src,
                dest,
                user,
                mode,
                files,
            } => format!("copy {src}\0{dest}\0{user}\0{mode:?}\0{files}"),
            Work::Launch(_) => "launch".to_owned(),
            Work::Directories => "directories".to_owned(),
        };
        let mut parts = vec![what, scene.unwrap_or_default()];
        parts.extend(detail.iter().map(|&part| part.to_owned()));
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        self.fingerprint = digest(&self.fingerprint, &parts);
        self.stages.push(Stage {
            step: step.to_owned(),
            title,
            work,
            directories,
            defaults: self.defaults.clone(),
            fingerprint: self.fingerprint.clone(),
            forced: self.forced,
        });
    }

    fn user(&self) -> String {
        self.defaults
            .user
            .clone()
            .unwrap_or_else(|| "root".to_owned())
    }

    /// Who owns what is copied, if nobody says: root, as everywhere, or whom the build is for.
    fn owner(&self) -> String {
        if self.with_user {
            self.user()
        } else {
            "root".to_owned()
        }
    }

    fn expand(&self, text: &str) -> String {
        let env = &self.defaults.env;
        expand(text, &|name| {
            let known = env.iter().find(|(known, _)| known == name);
            match known {
                Some((_, value)) => Some(value.clone()),
                None => (name == "PATH").then(|| PATH.to_owned()),
            }
        })
    }

    /// A path from the working directory on, without `.` and `..`; a slash at its end stays.
    fn absolute(&self, path: &str) -> String {
        let base = self.defaults.workdir.as_deref().unwrap_or("/");
        let full = match path.strip_prefix('~') {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => match self.user().as_str() {
                "root" => format!("/root{rest}"),
                user => format!("/home/{user}{rest}"),
            },
            _ if path.starts_with('/') => path.to_owned(),
            _ => format!("{base}/{path}"),
        };
        let mut parts: Vec<&str> = Vec::new();
        for part in full.split('/') {
            match part {
                "" | "." => {}
                ".." => drop(parts.pop()),
                part => parts.push(part),
            }
        }
        let directory = (full.ends_with('/') || full.ends_with("/.")) && !parts.is_empty();
        format!("/{}{}", parts.join("/"), if directory { "/" } else { "" })
    }
}

/// What a template starts of its own.
fn own_command(spec: &BuildSpec, image: &[String]) -> Option<Command> {
    if let Some(start) = spec.start.as_ref().filter(|start| !start.trim().is_empty()) {
        return Some(Command::Shell(start.clone()));
    }
    let words = spec.command.as_deref().unwrap_or(image);
    let is_shell = |words: &[String]| {
        let name = words[0].rsplit('/').next().unwrap_or_default();
        words.len() == 1 && SHELLS.contains(&name)
    };
    let wanted = spec.run_image_command && !words.is_empty() && !is_shell(words);
    wanted.then(|| Command::Exec(words.to_vec()))
}

/// A digest of what was before and what comes now; no two lists of parts have the same.
fn digest(before: &str, parts: &[&str]) -> String {
    let mut hash = Sha256::new().chain_update(VERSION).chain_update(before);
    for part in parts {
        hash = hash
            .chain_update(part.len().to_be_bytes())
            .chain_update(part);
    }
    hex::encode(hash.finalize())
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
