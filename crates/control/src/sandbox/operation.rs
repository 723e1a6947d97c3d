//! One thing at a time is done with a sandbox's VM.
//!
//! Whoever does something holds an [`Underway`] from before its first effect until after its last;
//! others are told what is going on, and can wait for its end. Only a kill waits for nobody: it
//! ends the VM at once, and comes back when the operation has noticed.

use tokio::sync::watch;

use crate::fleet::FleetError;

/// What is done with a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Operation {
    Create,
    Snapshot,
    Pause,
    Resume,
    Rollback,
    Fork,
    Network,
}

impl Operation {
    /// The word in messages, metrics and logs.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Snapshot => "snapshot",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Rollback => "rollback",
            Self::Fork => "fork",
            Self::Network => "network",
        }
    }

    /// Whether the end of the sandbox's VM may be a part of it, so that news of one mean nothing
    /// until it has ended.
    pub(crate) const fn ends_vm(self) -> bool {
        matches!(self, Self::Pause | Self::Rollback)
    }
}

type Outcome = Option<Result<(), FleetError>>;

/// Where at most one operation is under way.
#[derive(Debug)]
pub(crate) struct Slot {
    current: watch::Sender<Option<Ongoing>>,
}

/// An operation that somebody else began.
#[derive(Debug, Clone)]
pub(crate) struct Ongoing {
    pub(crate) operation: Operation,
    outcome: watch::Receiver<Outcome>,
}

/// An operation that its holder began. Dropping it makes room for the next one.
#[derive(Debug)]
pub(crate) struct Underway {
    slot: watch::Sender<Option<Ongoing>>,
    outcome: watch::Sender<Outcome>,
}

impl Default for Slot {
    fn default() -> Self {
        Self {
            current: watch::Sender::new(None),
        }
    }
}

impl Slot {
    /// Begins an operation, unless one is under way.
    pub(crate) fn begin(&self, operation: Operation) -> Result<Underway, Ongoing> {
        let (outcome, receiver) = watch::channel(None);
        let mut ongoing = None;
        self.current.send_if_modified(|current| {
            ongoing = current.clone();
            if ongoing.is_some() {
                return false;
            }
            *current = Some(Ongoing {
                operation,
                outcome: receiver,
            });
            true
        });
        match ongoing {
            Some(ongoing) => Err(ongoing),
            None => Ok(Underway {
                slot: self.current.clone(),
                outcome,
            }),
        }
    }

    /// What is under way.
    pub(crate) fn current(&self) -> Option<Ongoing> {
        self.current.borrow().clone()
    }
}

impl Ongoing {
    /// Waits for its end. `None`: its holder said nothing of how it went.
    pub(crate) async fn ended(mut self) -> Outcome {
        match self.outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone(),
            Err(_) => None,
        }
    }

    /// Waits until there is room for the next one.
    pub(crate) async fn made_room(mut self) {
        // Its sender lives as long as the operation holds its place; the value does not matter.
        while self.outcome.changed().await.is_ok() {}
    }
}

impl Underway {
    /// Tells who waits how it went.
    pub(crate) fn tell(&self, outcome: Result<(), FleetError>) {
        self.outcome.send_replace(Some(outcome));
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.slot.send_replace(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_at_a_time_and_who_waits_learns_how_it_went() {
        let slot = Slot::default();
        assert!(slot.current().is_none());
        let underway = slot.begin(Operation::Snapshot).expect("free");
        let ongoing = slot.begin(Operation::Pause).expect_err("taken");
        assert_eq!(ongoing.operation, Operation::Snapshot);
        let waiters = [
            tokio::spawn(ongoing.clone().ended()),
            tokio::spawn(ongoing.ended()),
        ];
        tokio::task::yield_now().await;
        underway.tell(Ok(()));
        for waiter in waiters {
            assert!(matches!(waiter.await.expect("waiter"), Some(Ok(()))));
        }
        let ongoing = slot.current().expect("holds its place until it is dropped");
        let waiter = tokio::spawn(ongoing.made_room());
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        drop(underway);
        waiter.await.expect("room");
        let silent = slot.begin(Operation::Resume).expect("free again");
        let ongoing = slot.current().expect("under way");
        drop(silent);
        assert!(ongoing.ended().await.is_none());
        assert!(slot.current().is_none());
    }
}
