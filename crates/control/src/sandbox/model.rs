//! What control knows about one sandbox.

use std::{collections::BTreeMap, time::Duration};

use cubicle_ids::{SandboxId, SnapshotId, TemplateId};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    error::{Error, Result},
    fleet::{Level, NetworkOptions},
    lifecycle::State,
    template::Defaults,
    volume::Mount,
};

/// Longest life that can be asked for in one go, short of "never": a year.
pub const MAX_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);

/// One sandbox, as of one instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sandbox {
    /// Its name for its whole life.
    pub id: SandboxId,
    /// The template it was made from.
    pub template: TemplateId,
    /// The build of that template.
    pub build: Uuid,
    /// The snapshot it was restored from.
    pub snapshot: SnapshotId,
    /// The template's name at that moment, if it had one.
    pub alias: Option<String>,
    /// Where it is in its life.
    pub state: State,
    /// What its creator attached to it.
    pub metadata: BTreeMap<String, String>,
    /// What it has mounted.
    pub mounts: Vec<Mount>,
    /// What it may reach and who may reach it.
    pub network: NetworkOptions,
    /// What clients of its guest daemon must present.
    pub envd_token: String,
    /// What everybody else must present, if its ports are not public.
    pub traffic_token: Option<String>,
    /// Version of its guest daemon.
    pub envd_version: String,
    /// CPUs it has.
    pub cpu_count: u32,
    /// Memory it has.
    pub memory_mib: u32,
    /// Size of its root disk.
    pub disk_mib: u32,
    /// What its template gives it.
    pub defaults: Defaults,
    /// The life it is in: counts restores under this id.
    pub generation: u64,
    /// When it began to answer.
    pub started_at: OffsetDateTime,
    /// When its time is up; `None`: never. A paused sandbox has no end unless it was given one
    /// since.
    pub end_at: Option<OffsetDateTime>,
    /// The life it was asked to have; traffic that wakes it gives it that again.
    pub lifetime: Lifetime,
    /// What happens when its time is up, and what traffic does while it is paused.
    pub lifecycle: LifecycleOptions,
    /// Environment of every process that is started in it. Kept for restores whose memory does not
    /// have it, and forgotten with the sandbox.
    pub env_vars: Vec<(String, String)>,
    /// The newest snapshot that its present state descends from: what it was made from, or what it
    /// has taken or gone back to since.
    pub base: SnapshotId,
    /// What it consists of while it is paused, being paused or being resumed.
    pub pause: Option<Pause>,
    /// What it is being rolled back to, while it is.
    pub rollback_to: Option<SnapshotId>,
}

/// What happens when a sandbox's time is up, and what traffic does while it is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LifecycleOptions {
    /// It is paused when its time is up, not killed.
    pub auto_pause: bool,
    /// That pause keeps its memory. Without, it boots when it is resumed.
    pub auto_pause_memory: bool,
    /// Traffic to it resumes it if it is paused with its memory.
    pub auto_resume: bool,
}

impl Default for LifecycleOptions {
    fn default() -> Self {
        Self {
            auto_pause: false,
            auto_pause_memory: true,
            auto_resume: false,
        }
    }
}

impl LifecycleOptions {
    /// Refuses combinations that make no sense.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a pause without memory that would never happen, or that traffic
    /// would have to end.
    pub fn check(&self) -> Result<()> {
        let why = match (self.auto_pause_memory, self.auto_pause, self.auto_resume) {
            (false, false, _) => "false makes no sense without autoPause",
            (false, true, true) => {
                "false cannot be combined with autoResume: a sandbox whose memory was not kept \
                 boots when it is resumed, and that has to be asked for"
            }
            _ => return Ok(()),
        };
        Err(Error::invalid("autoPauseMemory", why))
    }
}

/// What a paused sandbox consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pause {
    /// Its snapshot, which nobody else may use or delete.
    pub snapshot: SnapshotId,
    /// What that holds.
    pub mode: PauseMode,
    /// When it was asked for.
    pub at: OffsetDateTime,
}

/// What is kept of a paused sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PauseMode {
    /// Memory and disks: it goes on where it was.
    Full,
    /// Disks only: it boots, and only when a client asks for it.
    Filesystem,
}

impl PauseMode {
    /// The mode of a pause that keeps memory, or does not.
    #[must_use]
    pub const fn of(memory: bool) -> Self {
        if memory { Self::Full } else { Self::Filesystem }
    }

    /// The word on the wire and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Filesystem => "filesystem",
        }
    }

    /// The inverse of [`Self::as_str`].
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Full, Self::Filesystem]
            .into_iter()
            .find(|mode| mode.as_str() == word)
    }
}

impl Sandbox {
    /// Whether its time is up.
    #[must_use]
    pub fn is_expired(&self, now: OffsetDateTime) -> bool {
        self.end_at.is_some_and(|end| end <= now)
    }
}

/// How long a sandbox is to live from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// This long; zero ends it now.
    For(Duration),
    /// Until somebody kills it.
    Never,
}

impl Lifetime {
    /// From a number of seconds as clients send it: 0 is now, -1 is never.
    ///
    /// # Errors
    /// [`Error::Invalid`] for anything below -1 or beyond [`MAX_LIFETIME`].
    pub fn from_seconds(field: &'static str, seconds: i64) -> Result<Self> {
        match seconds {
            -1 => Ok(Self::Never),
            0.. if seconds.unsigned_abs() <= MAX_LIFETIME.as_secs() => {
                Ok(Self::For(Duration::from_secs(seconds.unsigned_abs())))
            }
            _ => Err(Error::invalid(
                field,
                format!(
                    "{seconds} is no number of seconds between 0 and {} (or -1 for never)",
                    MAX_LIFETIME.as_secs()
                ),
            )),
        }
    }

    /// The end of a life that is measured from `now`; `None`: never.
    #[must_use]
    pub fn end(self, now: OffsetDateTime) -> Option<OffsetDateTime> {
        match self {
            Self::For(span) => Some(now + span),
            Self::Never => None,
        }
    }
}

/// The later of two ends, where `None` is never.
pub(crate) fn later(
    a: Option<OffsetDateTime>,
    b: Option<OffsetDateTime>,
) -> Option<OffsetDateTime> {
    Some(a?.max(b?))
}

/// Why a sandbox ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EndReason {
    /// Somebody killed it.
    Killed,
    /// Its time was up.
    Timeout,
    /// Its VM ended by itself.
    Exited,
    /// Its VM was not there any more after a restart of the server.
    Lost,
    /// What it was paused as is gone, or it could not be paused when its time was up.
    PauseLost,
    /// It could not be created.
    CreateFailed,
    /// Its creator went away before it was ready.
    Abandoned,
}

impl EndReason {
    /// Every reason.
    pub const ALL: [Self; 7] = [
        Self::Killed,
        Self::Timeout,
        Self::Exited,
        Self::Lost,
        Self::PauseLost,
        Self::CreateFailed,
        Self::Abandoned,
    ];

    /// The word in the database, in metrics and in logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Killed => "killed",
            Self::Timeout => "timeout",
            Self::Exited => "exited",
            Self::Lost => "lost",
            Self::PauseLost => "pause_lost",
            Self::CreateFailed => "create_failed",
            Self::Abandoned => "abandoned",
        }
    }
}

/// One line of a sandbox's log: what happened to it as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// When.
    pub at: OffsetDateTime,
    /// How grave.
    pub level: Level,
    /// What, for a person.
    pub message: String,
    /// What, for a program.
    pub fields: BTreeMap<String, String>,
}

/// What a sandbox used at one instant.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// When.
    pub at: OffsetDateTime,
    /// What.
    pub usage: crate::fleet::Usage,
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn seconds_become_lifetimes_or_are_refused() {
        let year = i64::try_from(MAX_LIFETIME.as_secs()).expect("fits");
        assert_eq!(
            Lifetime::from_seconds("timeout", -1).expect("never"),
            Lifetime::Never
        );
        assert_eq!(
            Lifetime::from_seconds("timeout", 0).expect("now"),
            Lifetime::For(Duration::ZERO)
        );
        assert!(Lifetime::from_seconds("timeout", year).is_ok());
        for bad in [-2, i64::MIN, year + 1, i64::MAX] {
            let refused = Lifetime::from_seconds("timeout", bad);
            assert!(
                matches!(
                    refused,
                    Err(Error::Invalid {
                        field: "timeout",
                        ..
                    })
                ),
                "{bad}"
            );
        }
    }

    #[test]
    fn never_is_later_than_any_end() {
        let (a, b) = (
            datetime!(2030-01-01 0:00 UTC),
            datetime!(2031-01-01 0:00 UTC),
        );
        assert_eq!(later(Some(a), Some(b)), Some(b));
        assert_eq!(later(Some(b), Some(a)), Some(b));
        assert_eq!(later(None, Some(a)), None);
        assert_eq!(later(Some(a), None), None);
    }
}
