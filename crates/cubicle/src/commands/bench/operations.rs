//! What is measured: one operation on a sandbox that runs, and what a user does right after it.

use std::time::Instant;

use futures::future::try_join_all;
use serde_json::json;

use super::{guest::Guest, summary::millis};
use crate::{
    client::{
        Client,
        snapshots::{NewSnapshot, Phase, Taken},
    },
    error::Error,
};

/// Life of a copy, in seconds.
const COPY_TIMEOUT: u32 = 300;

/// Values of one operation, by names that end in their unit. A name may occur several times.
#[derive(Debug)]
pub(super) struct Sample {
    /// When the call began and returned; what was measured after it is not part of it.
    pub(super) call: (Instant, Instant),
    pub(super) values: Vec<(&'static str, f64)>,
    pub(super) phases: Vec<Phase>,
    /// How the memory was taken.
    pub(super) tier: Option<String>,
}

impl Sample {
    /// A call that began then and has just returned.
    fn called(began: Instant) -> Self {
        let ended = Instant::now();
        let ms = ended.duration_since(began).as_secs_f64() * 1e3;
        Self {
            call: (began, ended),
            values: vec![("callMs", ms)],
            phases: Vec::new(),
            tier: None,
        }
    }

    fn add(&mut self, name: &'static str, value: f64) {
        self.values.push((name, value));
    }

    fn taken(&mut self, taken: Taken) {
        self.add("frozenMs", taken.frozen_ms);
        self.add("writtenMb", taken.bytes_written as f64 / 1e6);
        self.phases.extend(taken.phases);
        self.tier = Some(taken.tier);
    }
}

/// A measured operation.
pub(super) trait Operation {
    /// What it is called on the command line.
    const NAME: &'static str;
    /// The values that the table shows, with a title for each.
    const SHOWN: &'static [(&'static str, &'static str)];
    /// What one sandbox keeps between two operations.
    type State: Default;

    /// How many sandboxes are operated on at the same time.
    fn guests(concurrency: u32) -> u32 {
        concurrency
    }

    /// Before the first operation on a sandbox.
    async fn prepare(client: &Client, guest: &Guest) -> Result<Self::State, Error> {
        let _ = (client, guest);
        Ok(Self::State::default())
    }

    /// The operation. All sandboxes begin it at the same time.
    async fn operate(
        client: &Client,
        guest: &Guest,
        state: &mut Self::State,
        concurrency: u32,
    ) -> Result<Sample, Error>;

    /// What comes after it, once all sandboxes have finished it.
    async fn follow(
        client: &Client,
        guest: &Guest,
        state: &mut Self::State,
        sample: &mut Sample,
    ) -> Result<(), Error>;
}

/// The values of an operation that a table shows, by its name.
pub(super) fn shown(operation: &str) -> &'static [(&'static str, &'static str)] {
    [
        (Snapshot::NAME, Snapshot::SHOWN),
        (Clone::NAME, Clone::SHOWN),
        (Rollback::NAME, Rollback::SHOWN),
        (Pause::NAME, Pause::SHOWN),
    ]
    .into_iter()
    .find_map(|(name, shown)| (name == operation).then_some(shown))
    .unwrap_or_default()
}

/// Take a snapshot; create a sandbox from it.
pub(super) struct Snapshot;

impl Operation for Snapshot {
    const NAME: &'static str = "snapshot";
    const SHOWN: &'static [(&'static str, &'static str)] = &[
        ("callMs", "CALL"),
        ("frozenMs", "FREEZE"),
        ("writtenMb", "WRITTEN"),
        ("createMs", "CREATE FROM IT"),
        ("createFirstCommandMs", "UNTIL `true` RAN"),
    ];
    type State = String;

    async fn operate(
        client: &Client,
        guest: &Guest,
        state: &mut String,
        _: u32,
    ) -> Result<Sample, Error> {
        let began = Instant::now();
        let taken = take(client, guest).await?;
        let mut sample = Sample::called(began);
        state.clone_from(&taken.snapshot_id);
        sample.taken(taken);
        Ok(sample)
    }

    async fn follow(
        client: &Client,
        _: &Guest,
        state: &mut String,
        sample: &mut Sample,
    ) -> Result<(), Error> {
        let began = Instant::now();
        let body = json!({ "templateID": state, "timeout": COPY_TIMEOUT });
        let created = client.create(&body).await;
        let created = match created {
            Ok(created) => Guest::of(&created),
            Err(error) => {
                client.delete_snapshot(state).await?;
                return Err(error);
            }
        };
        sample.add("createMs", millis(began));
        let ran = created.run_true(client).await;
        sample.add("createFirstCommandMs", millis(began));
        created.kill(client).await?;
        client.delete_snapshot(state).await?;
        ran
    }
}

/// Make several copies at once.
pub(super) struct Clone;

impl Operation for Clone {
    const NAME: &'static str = "clone";
    const SHOWN: &'static [(&'static str, &'static str)] = &[
        ("callMs", "CALL"),
        ("frozenMs", "FREEZE"),
        ("writtenMb", "WRITTEN"),
        ("firstCommandMs", "UNTIL `true` RAN IN A COPY"),
    ];
    type State = Vec<Guest>;

    fn guests(_: u32) -> u32 {
        1
    }

    async fn operate(
        client: &Client,
        guest: &Guest,
        copies: &mut Vec<Guest>,
        concurrency: u32,
    ) -> Result<Sample, Error> {
        let began = Instant::now();
        let forked = client.fork(guest.id(), concurrency, COPY_TIMEOUT).await?;
        let mut sample = Sample::called(began);
        let mut failure = None;
        for outcome in forked.sandboxes {
            match (outcome.sandbox, outcome.error) {
                (Some(sandbox), _) => copies.push(Guest::of(&sandbox)),
                (None, error) => failure = Some(error),
            }
        }
        if let Some(error) = failure {
            let why = error.map_or_else(String::new, |error| error.message);
            kill_all(client, copies).await?;
            return Err(Error::Usage(format!("a copy could not be made: {why}")));
        }
        let first = copies
            .iter()
            .map(|copy| async move { copy.run_true(client).await.map(|()| millis(began)) });
        let first = try_join_all(first).await;
        sample.taken(forked.snapshot);
        for ms in first? {
            sample.add("firstCommandMs", ms);
        }
        Ok(sample)
    }

    async fn follow(
        client: &Client,
        _: &Guest,
        copies: &mut Vec<Guest>,
        _: &mut Sample,
    ) -> Result<(), Error> {
        kill_all(client, copies).await
    }
}

/// Go back to a snapshot that was taken at the beginning.
pub(super) struct Rollback;

impl Operation for Rollback {
    const NAME: &'static str = "rollback";
    const SHOWN: &'static [(&'static str, &'static str)] =
        &[("callMs", "CALL"), ("firstCommandMs", "UNTIL `true` RAN")];
    type State = String;

    async fn prepare(client: &Client, guest: &Guest) -> Result<String, Error> {
        Ok(take(client, guest).await?.snapshot_id)
    }

    async fn operate(
        client: &Client,
        guest: &Guest,
        state: &mut String,
        _: u32,
    ) -> Result<Sample, Error> {
        let began = Instant::now();
        let done = client.rollback(guest.id(), state).await?;
        let mut sample = Sample::called(began);
        sample.phases = done.phases;
        guest.run_true(client).await?;
        sample.add("firstCommandMs", millis(began));
        Ok(sample)
    }

    async fn follow(_: &Client, _: &Guest, _: &mut String, _: &mut Sample) -> Result<(), Error> {
        Ok(())
    }
}

/// Pause a sandbox; resume it.
pub(super) struct Pause;

impl Operation for Pause {
    const NAME: &'static str = "pause";
    const SHOWN: &'static [(&'static str, &'static str)] = &[
        ("callMs", "PAUSE"),
        ("frozenMs", "FREEZE"),
        ("writtenMb", "WRITTEN"),
        ("resumeMs", "RESUME"),
        ("firstCommandMs", "UNTIL `true` RAN"),
    ];
    type State = ();

    async fn operate(client: &Client, guest: &Guest, (): &mut (), _: u32) -> Result<Sample, Error> {
        let began = Instant::now();
        let taken = client.pause(guest.id(), true, false).await?;
        let mut sample = Sample::called(began);
        sample.taken(taken);
        Ok(sample)
    }

    async fn follow(
        client: &Client,
        guest: &Guest,
        (): &mut (),
        sample: &mut Sample,
    ) -> Result<(), Error> {
        let began = Instant::now();
        client.connect(guest.id(), COPY_TIMEOUT, true).await?;
        sample.add("resumeMs", millis(began));
        guest.run_true(client).await?;
        sample.add("firstCommandMs", millis(began));
        Ok(())
    }
}

/// A snapshot with its memory, and without more ado.
pub(super) async fn take(client: &Client, guest: &Guest) -> Result<Taken, Error> {
    let new = NewSnapshot {
        memory: true,
        ..NewSnapshot::default()
    };
    client.snapshot(guest.id(), &new).await
}

async fn kill_all(client: &Client, copies: &mut Vec<Guest>) -> Result<(), Error> {
    let killed = try_join_all(copies.iter().map(|copy| copy.kill(client))).await;
    copies.clear();
    killed.map(drop)
}
