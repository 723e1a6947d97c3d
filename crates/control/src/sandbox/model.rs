//! What control knows about one sandbox.

use std::{collections::BTreeMap, time::Duration};

use cubicle_ids::{SandboxId, SnapshotId, TemplateId};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    error::{Error, Result},
    fleet::{Level, NetworkOptions},
    lifecycle::State,
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
    /// The life it is in: counts restores under this id.
    pub generation: u64,
    /// When it began to answer.
    pub started_at: OffsetDateTime,
    /// When its time is up; `None`: never.
    pub end_at: Option<OffsetDateTime>,
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
    /// It could not be created.
    CreateFailed,
    /// Its creator went away before it was ready.
    Abandoned,
}

impl EndReason {
    /// Every reason.
    pub const ALL: [Self; 6] = [
        Self::Killed,
        Self::Timeout,
        Self::Exited,
        Self::Lost,
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
