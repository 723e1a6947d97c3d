//! One sandbox becomes several: it is frozen once, and restored as often as was asked for.

use std::{sync::Arc, time::Instant};

use cubicle_ids::{SandboxId, SnapshotId};
use futures::StreamExt as _;
use tokio::sync::oneshot;

use super::{
    EndReason, Entry, Inner, Lifetime, Sandbox, Sandboxes,
    create::{Clock, token, traffic_token},
    operation::{Operation, Underway},
};
use crate::{
    db::now,
    error::{Error, Result},
    fleet::{FreezeKind, FreezeOrder, Level, SnapshotTaken},
    lifecycle::State,
};

/// Most copies made by one request.
pub const MAX_FORKS: u32 = 100;

/// Copies of a running sandbox to make.
#[derive(Debug, Clone, Copy)]
pub struct ForkSandbox {
    /// How many, 1 to [`MAX_FORKS`].
    pub count: u32,
    /// How long each is to live, measured from the moment it answers.
    pub lifetime: Lifetime,
}

/// What came of a fork.
#[derive(Debug)]
pub struct Forked {
    /// As many as were asked for, each for itself.
    pub children: Vec<Result<Arc<Sandbox>>>,
    /// How the source was frozen.
    pub taken: SnapshotTaken,
}

impl Sandboxes {
    /// Makes copies of a running sandbox. Each has its metadata, environment, network and
    /// lifecycle, and an id, tokens and an end of its own. The source runs on. One copy may fail
    /// and the others not.
    ///
    /// # Errors
    /// If the source cannot be frozen: [`Error::Conflict`] if it is paused, [`Error::Busy`] while
    /// something else is done with it.
    pub async fn fork(&self, id: &SandboxId, request: ForkSandbox) -> Result<Forked> {
        if !(1..=MAX_FORKS).contains(&request.count) {
            let why = format!("{} is not between 1 and {MAX_FORKS}", request.count);
            return Err(Error::invalid("count", why));
        }
        let why = "only a running sandbox can be forked; resume it first";
        let (entry, underway) = self.inner.begin(id, Operation::Fork, why)?;
        let (answer, answered) = oneshot::channel();
        let inner = Arc::clone(&self.inner);
        self.inner.tasks.spawn(async move {
            let began = Instant::now();
            let result = inner.fork(&entry, underway, request).await;
            inner
                .metrics
                .ended(Operation::Fork, result.is_ok(), began.elapsed());
            if let Err(Ok(forked)) = answer.send(result) {
                inner.abandon(&forked);
            }
        });
        answered.await.unwrap_or(Err(Error::ShuttingDown))
    }
}

impl Inner {
    async fn fork(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        underway: Underway,
        request: ForkSandbox,
    ) -> Result<Forked> {
        let source = entry.sandbox();
        // Nothing is written down: what a crash leaves of this is owned by nobody, and goes.
        let snapshot = SnapshotId::generate();
        let order = FreezeOrder {
            id: source.id.clone(),
            snapshot: snapshot.clone(),
            kind: FreezeKind::Temporary,
            memory: true,
            quiesce: None,
            require_healthy: false,
        };
        let taken = match self.fleet.snapshot(order).await {
            Ok(taken) => taken,
            Err(error) => {
                self.trash.discard(snapshot);
                return Err(error.into());
            }
        };
        // The source is its own again; the rest concerns its copies only.
        drop(underway);
        self.metrics.frozen(Operation::Fork, &taken);
        let children: Vec<_> = futures::stream::iter(0..request.count)
            .map(|_| self.bear(&source, &snapshot, request.lifetime))
            .buffered(self.config.fork_at_once.max(1))
            .collect()
            .await;
        // They keep what they need of it.
        self.trash.discard(snapshot);
        let born = children.iter().filter(|child| child.is_ok()).count();
        let fields = [
            ("asked", request.count.to_string()),
            ("made", born.to_string()),
        ];
        self.log
            .line(&source.id, Level::Info, "sandbox forked", fields);
        Ok(Forked { children, taken })
    }

    /// One copy.
    async fn bear(
        self: &Arc<Self>,
        source: &Sandbox,
        snapshot: &SnapshotId,
        lifetime: Lifetime,
    ) -> Result<Arc<Sandbox>> {
        let clock = Clock::start();
        let child = Sandbox {
            id: SandboxId::generate(),
            snapshot: snapshot.clone(),
            state: State::Creating,
            envd_token: token(),
            traffic_token: traffic_token(&source.network),
            generation: 0,
            started_at: now(),
            end_at: None,
            lifetime,
            pause: None,
            rollback_to: None,
            ..source.clone()
        };
        let born = match self.store.insert(&child, None).await {
            Ok(_) => self.bring_up(child, clock).await,
            Err(error) => Err(error),
        };
        self.metrics.child(born.is_ok());
        born.map(|creation| creation.sandbox)
    }

    /// Kills the copies that nobody learned of.
    fn abandon(self: &Arc<Self>, forked: &Forked) {
        for child in forked.children.iter().flatten() {
            if let Some(entry) = self.registry.get(&child.id) {
                tracing::info!(sandbox = %child.id, "nobody waits for it any more");
                self.begin_end(&entry, EndReason::Abandoned, |_| true);
            }
        }
    }
}
