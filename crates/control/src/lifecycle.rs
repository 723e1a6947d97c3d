//! The only place where a sandbox changes state.
//!
//! [`next`] is the whole transition table. A cell that says `None` is an event that the state
//! refuses: either a request that makes no sense now, or a fact that the running operation will
//! report itself. Three properties hold for every row and are tested cell by cell:
//!
//! - [`Event::Kill`] is legal in every state.
//! - [`State::Killing`] is left for [`State::Dead`] only, whatever else arrives.
//! - [`State::Dead`] is never left.
//!
//! A snapshot, a fork and a rollback change no state: before and after, and meanwhile for everyone
//! outside, the sandbox runs. That one of them is under way is not here, but in the sandbox's entry
//! in memory, where it keeps others from beginning.

use std::{fmt, str::FromStr};

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Its row exists, its VM is being restored. Nobody knows its id yet.
    Creating,
    /// Its VM runs and answers.
    Running,
    /// Its VM is being frozen and dropped.
    Pausing,
    /// It is a snapshot and owns no VM.
    Paused,
    /// Its snapshot is being restored under the same id.
    Resuming,
    /// Its VM is being torn down. For everyone outside, it is gone already.
    Killing,
    /// Nothing of it is left but its row, which is kept for a while for its log.
    Dead,
}

/// What happens to a sandbox: a request, the outcome of one, or a fact that the node reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The restore of a new sandbox succeeded.
    Created,
    /// The restore of a new sandbox failed; the node has released everything.
    CreateFailed,
    /// Somebody asks for a pause.
    Pause,
    /// The snapshot of a pause is published and the VM is gone.
    Paused,
    /// The pause failed and the VM runs on.
    PauseFailed,
    /// Somebody asks for a resume.
    Resume,
    /// The restore of a paused sandbox succeeded.
    Resumed,
    /// The restore of a paused sandbox failed; its snapshot is untouched.
    ResumeFailed,
    /// Somebody, or its timeout, asks for its end.
    Kill,
    /// The node has released everything of it.
    Killed,
    /// The VM ended without being asked to. While a pause or a rollback is under way, which end
    /// VMs themselves, that is found out at its end.
    Exited,
    /// After a restart: the node has a VM of this sandbox.
    Found,
    /// After a restart: the node has no VM of this sandbox.
    Missing,
}

/// The state after `event` in `state`, or `None` where the state refuses the event.
#[must_use]
pub const fn next(state: State, event: Event) -> Option<State> {
    use Event as E;
    use State as S;
    match (state, event) {
        (S::Dead, E::Kill) => Some(S::Dead),
        (S::Dead, _) => None,

        (_, E::Kill) => Some(S::Killing),

        (S::Killing, E::Killed | E::Missing) => Some(S::Dead),
        (S::Killing, E::Pause | E::Resume) => None,
        // Whatever was under way when the kill came reports its outcome; the kill goes on.
        (S::Killing, _) => Some(S::Killing),

        (S::Creating, E::Created) => Some(S::Running),
        (S::Creating, E::CreateFailed | E::Missing) => Some(S::Dead),
        // Its client never got an answer, so nobody knows the id of this VM.
        (S::Creating, E::Found) => Some(S::Killing),
        (S::Creating, _) => None,

        (S::Running, E::Pause) => Some(S::Pausing),
        (S::Running, E::Exited | E::Missing) => Some(S::Dead),
        (S::Running, E::Found) => Some(S::Running),
        (S::Running, _) => None,

        (S::Pausing, E::Paused) => Some(S::Paused),
        (S::Pausing, E::PauseFailed | E::Found) => Some(S::Running),
        (S::Pausing, E::Exited | E::Missing) => Some(S::Dead),
        (S::Pausing, _) => None,

        (S::Paused, E::Resume) => Some(S::Resuming),
        // A VM that is found here is a leftover of the pause; the reconciler drops it.
        (S::Paused, E::Found | E::Missing) => Some(S::Paused),
        (S::Paused, _) => None,

        (S::Resuming, E::Resumed | E::Found) => Some(S::Running),
        (S::Resuming, E::ResumeFailed | E::Missing) => Some(S::Paused),
        (S::Resuming, _) => None,
    }
}

impl State {
    /// Every state, in the order of a life.
    pub const ALL: [Self; 7] = [
        Self::Creating,
        Self::Running,
        Self::Pausing,
        Self::Paused,
        Self::Resuming,
        Self::Killing,
        Self::Dead,
    ];

    /// What clients are told, or `None` while (or after) a sandbox does not exist for them.
    #[must_use]
    pub const fn visible(self) -> Option<Visible> {
        match self {
            Self::Running | Self::Pausing => Some(Visible::Running),
            Self::Paused | Self::Resuming => Some(Visible::Paused),
            Self::Creating | Self::Killing | Self::Dead => None,
        }
    }

    /// Whether a VM that the node has may belong to a sandbox in this state.
    #[must_use]
    pub const fn may_own_vm(self) -> bool {
        !matches!(self, Self::Paused | Self::Killing | Self::Dead)
    }

    /// The word in the database, in metrics and in logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
            Self::Killing => "killing",
            Self::Dead => "dead",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that names no state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' names no sandbox state")]
pub struct UnknownState(pub String);

impl FromStr for State {
    type Err = UnknownState;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|state| state.as_str() == word)
            .ok_or_else(|| UnknownState(word.to_owned()))
    }
}

/// The two states that exist for clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Visible {
    /// It answers.
    Running,
    /// It is a snapshot that can be resumed.
    Paused,
}

impl Visible {
    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
        }
    }
}

impl FromStr for Visible {
    type Err = UnknownState;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        match word {
            "running" => Ok(Self::Running),
            "paused" => Ok(Self::Paused),
            _ => Err(UnknownState(word.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Event as E, State as S, *};

    const EVENTS: [E; 13] = [
        E::Created,
        E::CreateFailed,
        E::Pause,
        E::Paused,
        E::PauseFailed,
        E::Resume,
        E::Resumed,
        E::ResumeFailed,
        E::Kill,
        E::Killed,
        E::Exited,
        E::Found,
        E::Missing,
    ];

    /// One row a state, one column an event in the order of [`EVENTS`]; written down a second
    /// time, by hand, so that a change of the table has to be meant.
    #[rustfmt::skip]
    const TABLE: [(S, &str); 7] = [
        // created, createFailed, pause, paused, pauseFailed, resume, resumed, resumeFailed, kill, killed, exited, found, missing
        (S::Creating, "running dead    -       -       -       -        -       -       killing -    -       killing dead"),
        (S::Running,  "-       -       pausing -       -       -        -       -       killing -    dead    running dead"),
        (S::Pausing,  "-       -       -       paused  running -        -       -       killing -    dead    running dead"),
        (S::Paused,   "-       -       -       -       -       resuming -       -       killing -    -       paused  paused"),
        (S::Resuming, "-       -       -       -       -       -        running paused  killing -    -       running paused"),
        (S::Killing,  "killing killing -       killing killing -        killing killing killing dead killing killing dead"),
        (S::Dead,     "-       -       -       -       -       -        -       -       dead    -    -       -       -"),
    ];

    #[test]
    fn the_table_cell_by_cell() {
        let mut cells = 0;
        for (state, row) in TABLE {
            let row: Vec<&str> = row.split_whitespace().collect();
            assert_eq!(row.len(), EVENTS.len(), "row {state}");
            for (event, wanted) in EVENTS.into_iter().zip(row) {
                let got = next(state, event).map_or("-", State::as_str);
                assert_eq!(got, wanted, "{state} + {event:?}");
                cells += 1;
            }
        }
        assert_eq!(cells, State::ALL.len() * EVENTS.len());
    }

    #[test]
    fn kill_is_legal_everywhere_and_ends_in_death() {
        for state in State::ALL {
            let killing = next(state, E::Kill).expect("kill is legal");
            assert!(
                killing == S::Dead || next(killing, E::Killed) == Some(S::Dead),
                "{state}"
            );
            assert_eq!(
                killing.visible(),
                None,
                "a killed sandbox does not exist for clients"
            );
        }
    }

    #[test]
    fn every_state_is_reached_and_its_word_parses() {
        for state in State::ALL {
            assert_eq!(state.as_str().parse(), Ok(state));
            let reached = State::ALL.into_iter().any(|from| {
                EVENTS
                    .into_iter()
                    .any(|event| next(from, event) == Some(state))
            });
            assert!(reached || state == S::Creating, "{state} is a dead cell");
        }
        assert_eq!("gone".parse::<State>(), Err(UnknownState("gone".into())));
    }
}
