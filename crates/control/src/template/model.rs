//! What control knows about templates and their builds.

use cubicle_ids::{SnapshotId, TemplateId};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{BuildSpec, Defaults, Launch};
use crate::fleet::Level;

/// A named snapshot, and how it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Names it for machines.
    pub id: TemplateId,
    /// Name it for people; any of them.
    pub aliases: Vec<String>,
    /// Whether it is for everyone.
    pub public: bool,
    /// When it was first asked for.
    pub created_at: OffsetDateTime,
    /// When it last changed.
    pub updated_at: OffsetDateTime,
    /// How many sandboxes were made from it.
    pub spawn_count: u64,
    /// When the last of them was.
    pub last_spawned_at: Option<OffsetDateTime>,
    /// What the tag `default` stands for: a build that succeeded.
    pub current: Option<Uuid>,
    /// Every build, newest first. Never empty.
    pub builds: Vec<Build>,
}

impl Template {
    /// The build that describes it: the current one, or the latest if none has succeeded.
    #[must_use]
    pub fn build(&self) -> Option<&Build> {
        self.builds
            .iter()
            .find(|build| Some(build.id) == self.current)
            .or_else(|| self.builds.first())
    }
}

/// One attempt to make a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Build {
    /// Names it.
    pub id: Uuid,
    /// The template.
    pub template: TemplateId,
    /// What it is made of; `None` if nobody has said yet.
    pub spec: Option<BuildSpec>,
    /// What it is to be called once it is ready.
    pub tags: Vec<String>,
    /// How far it is.
    pub status: BuildStatus,
    /// Why it failed, if it did.
    pub reason: Option<String>,
    /// Where it failed, if it did: `base`, the number of a step from 1, or `finalize`.
    pub failed_step: Option<String>,
    /// What tells it from builds that were made of anything else; known once that has been looked
    /// at.
    pub fingerprint: Option<String>,
    /// What it gives its sandboxes; known once it is ready.
    pub defaults: Defaults,
    /// What runs in each of them; known once it is ready.
    pub launches: Vec<Launch>,
    /// What its sandboxes are restored from; `None` until it succeeds and after it was superseded.
    pub snapshot: Option<SnapshotId>,
    /// CPUs of its sandboxes.
    pub cpu_count: u32,
    /// Memory of its sandboxes.
    pub memory_mib: u32,
    /// Size of their root disk.
    pub disk_mib: u32,
    /// Version of the guest daemon in it.
    pub envd_version: String,
    /// When it was asked for.
    pub created_at: OffsetDateTime,
    /// When its status last changed.
    pub updated_at: OffsetDateTime,
    /// When it ended, well or not.
    pub finished_at: Option<OffsetDateTime>,
}

/// How far a build is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BuildStatus {
    /// Asked for.
    Waiting,
    /// Under way.
    Building,
    /// Done.
    Ready,
    /// Failed.
    Error,
}

impl BuildStatus {
    /// The word in the database and on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Building => "building",
            Self::Ready => "ready",
            Self::Error => "error",
        }
    }

    /// The inverse of [`Self::as_str`].
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Waiting, Self::Building, Self::Ready, Self::Error]
            .into_iter()
            .find(|status| status.as_str() == word)
    }

    /// Whether it will change no more.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Ready | Self::Error)
    }
}

/// One line of a build's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildLine {
    /// Its place in the log, from 0.
    pub seq: u64,
    /// When.
    pub at: OffsetDateTime,
    /// How grave.
    pub level: Level,
    /// The step it belongs to, if any.
    pub step: Option<String>,
    /// What happened.
    pub message: String,
}

/// What a sandbox is to be made from, found by its reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The template.
    pub template: TemplateId,
    /// The build of it.
    pub build: Uuid,
    /// What to restore.
    pub snapshot: SnapshotId,
    /// The template's first alias.
    pub alias: Option<String>,
    /// CPUs.
    pub cpu_count: u32,
    /// Memory.
    pub memory_mib: u32,
    /// Size of the root disk.
    pub disk_mib: u32,
    /// Version of the guest daemon in it.
    pub envd_version: String,
    /// What it gives the sandbox.
    pub defaults: Defaults,
}
