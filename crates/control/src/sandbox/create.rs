//! How a sandbox comes to be.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use cubicle_ids::SandboxId;
use tokio::sync::oneshot;

use super::{
    EndReason, Entry, Inner, LifecycleOptions, Lifetime, Sandbox, Sandboxes, sampler,
    store::FirstUse,
};
use crate::{
    db::now,
    error::{Error, Result},
    fleet::{FleetError, Level, NetworkOptions, Phase},
    lifecycle::{Event, State},
    secret, snapshot,
    template::Resolved,
    volume::{Mount, MountRequest},
};

/// Random bytes of an access token.
const TOKEN_BYTES: usize = 20;

/// A sandbox to create.
#[derive(Debug, Clone)]
pub struct CreateSandbox {
    /// What to make it from: a template id, an alias, `name:tag`, or a snapshot id.
    pub template: String,
    /// How long it is to live, measured from the moment it answers.
    pub lifetime: Lifetime,
    /// What to attach to it.
    pub metadata: BTreeMap<String, String>,
    /// Environment of every process that is started in it.
    pub env_vars: Vec<(String, String)>,
    /// CPUs, if not as many as the template's sandboxes have.
    pub cpu_count: Option<u32>,
    /// Memory in MiB, if not as much as the template's sandboxes have.
    pub memory_mib: Option<u32>,
    /// What is to be mounted. Nothing: what the snapshot had, if it is made from one.
    pub mounts: Vec<MountRequest>,
    /// What it may reach and who may reach it.
    pub network: NetworkOptions,
    /// What happens when its time is up, and what traffic does while it is paused.
    pub lifecycle: LifecycleOptions,
    /// Makes a repetition of this request return the same sandbox.
    pub idempotency: Option<Idempotency>,
}

/// What makes two create requests the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Idempotency {
    /// Chosen by the client; scoped by the caller to whoever it is.
    pub key: String,
    /// SHA-256 of what was asked for.
    pub body_hash: [u8; 32],
}

/// A sandbox that was created.
#[derive(Debug, Clone)]
pub struct Creation {
    /// The sandbox.
    pub sandbox: Arc<Sandbox>,
    /// How long each step took, in order.
    pub phases: Vec<Phase>,
    /// True if an earlier request with the same idempotency key created it.
    pub replayed: bool,
}

impl Sandboxes {
    /// Creates a sandbox and returns once it answers.
    ///
    /// The work is done by a task of its own. When this future is dropped before it ends, nobody
    /// knows the sandbox's id, so the task kills it; unless there is an idempotency key, with which
    /// the client can ask for it again.
    pub async fn create(&self, request: CreateSandbox) -> Result<Creation> {
        let inner = Arc::clone(&self.inner);
        if inner.stopping.is_cancelled() {
            return Err(Error::ShuttingDown);
        }
        let (answer, answered) = oneshot::channel();
        self.inner.tasks.spawn(async move {
            let can_ask_again = request.idempotency.is_some();
            let result = inner.create(request).await;
            let created = result
                .as_ref()
                .ok()
                .map(|creation| Arc::clone(&creation.sandbox));
            let unheard = answer.send(result).is_err();
            if let Some(sandbox) = created
                && unheard
                && !can_ask_again
                && let Some(entry) = inner.registry.get(&sandbox.id)
            {
                tracing::info!(sandbox = %sandbox.id, "nobody waits for it any more");
                inner.begin_end(&entry, EndReason::Abandoned, |_| true);
            }
        });
        answered.await.unwrap_or(Err(Error::ShuttingDown))
    }
}

impl Inner {
    async fn create(self: &Arc<Self>, request: CreateSandbox) -> Result<Creation> {
        let mut clock = Clock::start();
        request.lifecycle.check()?;
        let resolved = self.templates.resolve(&request.template).await?;
        let resolved = self
            .templates
            .shaped(resolved, request.cpu_count, request.memory_mib)
            .await?;
        let mounts = self.mounts(&request.mounts, &resolved).await?;
        clock.lap("resolve");
        let sandbox = new_sandbox(&request, &resolved, mounts);
        if let Some(first) = self
            .store
            .insert(&sandbox, request.idempotency.as_ref())
            .await?
        {
            return self.replay(request.idempotency, first).await;
        }
        clock.lap("record");

        match self.bring_up(sandbox, clock).await {
            Ok(creation) => {
                self.templates.count_spawn(&resolved.template);
                Ok(creation)
            }
            Err(ref error @ Error::Fleet(FleetError::NoSnapshot { ref id })) => {
                self.note_damage(error).await;
                // It may have been deleted a moment ago; then that is the answer.
                self.templates.resolve(&request.template).await?;
                Err(Error::SnapshotLost {
                    id: id.clone(),
                    reference: request.template,
                })
            }
            Err(error) => {
                self.note_damage(&error).await;
                Err(error)
            }
        }
    }

    /// What a new sandbox has mounted.
    async fn mounts(&self, asked: &[MountRequest], from: &Resolved) -> Result<Vec<Mount>> {
        let asked = match asked {
            [] => self.volumes.of_snapshot(&from.snapshot).await?,
            asked => asked.to_vec(),
        };
        self.volumes.resolve(asked).await
    }

    /// Marks the snapshot that turned out to be damaged or lost.
    pub(super) async fn note_damage(&self, error: &Error) {
        use crate::snapshot::SnapshotState as S;
        let (id, reason) = match error {
            Error::Fleet(FleetError::Damaged { id, reason }) => (id, reason.as_str()),
            Error::Fleet(FleetError::NoSnapshot { id }) => (id, snapshot::MISSING),
            _ => return,
        };
        tracing::error!(snapshot = %id, reason, "a snapshot cannot be used");
        let marked = self
            .snapshots
            .change(id, &[S::Ready], S::Failed, Some(reason));
        if let Err(error) = marked.await {
            tracing::error!(snapshot = %id, %error, "and that is not on record");
        }
    }

    /// Has a sandbox that is on record restored and makes it visible.
    pub(super) async fn bring_up(
        self: &Arc<Self>,
        sandbox: Sandbox,
        mut clock: Clock,
    ) -> Result<Creation> {
        let order = super::order(&sandbox, sandbox.snapshot.clone());
        let (entry, underway) = self.registry.insert_creating(sandbox);
        let created = self.fleet.create(order).await;
        drop(underway);
        let created = match created {
            Ok(created) => created,
            Err(error) => {
                self.creation_failed(&entry, &error).await;
                return Err(error.into());
            }
        };
        clock
            .phases
            .extend(created.phases.into_iter().map(of_fleet));
        clock.skip();

        let sandbox = self.came_alive(&entry, created.generation).await?;
        clock.lap("publish");
        sampler::begin(self, &entry);
        Ok(Creation {
            sandbox,
            phases: clock.phases,
            replayed: false,
        })
    }

    /// Makes a sandbox that answers visible: in memory, in the database, for the timer.
    async fn came_alive(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        generation: u64,
    ) -> Result<Arc<Sandbox>> {
        let started_at = now();
        let moved = entry.apply(Event::Created, |sandbox| {
            sandbox.generation = generation;
            sandbox.started_at = started_at;
            sandbox.end_at = sandbox.lifetime.end(started_at);
        });
        let Some(moved) = moved.filter(|moved| moved.sandbox.state == State::Running) else {
            // Whoever killed it meanwhile has been waiting for `settled` and tears it down.
            return Err(Error::KilledDuringCreate {
                id: entry.sandbox().id.clone(),
            });
        };
        let sandbox = moved.sandbox;
        if let Err(error) = self.save(entry).await {
            self.begin_end(entry, EndReason::CreateFailed, |_| true);
            return Err(error);
        }
        self.follow_end(entry);
        self.log.line(
            &sandbox.id,
            Level::Info,
            "sandbox created",
            [
                ("template", sandbox.template.to_string()),
                ("snapshot", sandbox.snapshot.to_string()),
            ],
        );
        // It may have died before it was visible, and its exit event found nothing to end.
        if self.fleet.generation(&sandbox.id).is_none() {
            self.exited(&sandbox.id, generation);
        }
        Ok(sandbox)
    }

    async fn creation_failed(self: &Arc<Self>, entry: &Arc<Entry>, error: &FleetError) {
        let id = entry.sandbox().id.clone();
        let reason = entry.end_reason(EndReason::CreateFailed);
        self.log
            .line(&id, Level::Error, format!("creation failed: {error}"), []);
        if entry
            .apply(Event::CreateFailed, |_| ())
            .is_some_and(|m| m.sandbox.state == State::Dead)
        {
            self.forget(entry, reason).await;
        }
    }

    async fn replay(&self, idempotency: Option<Idempotency>, first: FirstUse) -> Result<Creation> {
        // Only an insert with a key finds a first use of it.
        let Some(Idempotency { key, body_hash }) = idempotency else {
            return Err(Error::SandboxNotFound { id: first.sandbox });
        };
        if body_hash.as_slice() != first.body_hash {
            return Err(Error::IdempotencyMismatch { key });
        }
        let live = self
            .registry
            .get(&first.sandbox)
            .map(|entry| entry.sandbox());
        let sandbox = match live {
            Some(sandbox) if sandbox.state == State::Creating => {
                return Err(Error::IdempotencyInProgress { key });
            }
            Some(sandbox) => sandbox,
            None => match self.store.get(&first.sandbox).await? {
                Some(sandbox) => Arc::new(sandbox),
                None => return Err(Error::SandboxNotFound { id: first.sandbox }),
            },
        };
        Ok(Creation {
            sandbox,
            phases: Vec::new(),
            replayed: true,
        })
    }
}

fn new_sandbox(request: &CreateSandbox, resolved: &Resolved, mounts: Vec<Mount>) -> Sandbox {
    Sandbox {
        id: SandboxId::generate(),
        template: resolved.template.clone(),
        build: resolved.build,
        snapshot: resolved.snapshot.clone(),
        alias: resolved.alias.clone(),
        state: State::Creating,
        metadata: request.metadata.clone(),
        mounts,
        network: request.network.clone(),
        envd_token: token(),
        traffic_token: traffic_token(&request.network),
        envd_version: resolved.envd_version.clone(),
        cpu_count: resolved.cpu_count,
        memory_mib: resolved.memory_mib,
        disk_mib: resolved.disk_mib,
        defaults: resolved.defaults.clone(),
        generation: 0,
        started_at: now(),
        end_at: None,
        lifetime: request.lifetime,
        lifecycle: request.lifecycle,
        env_vars: request.env_vars.clone(),
        base: resolved.snapshot.clone(),
        pause: None,
        rollback_to: None,
    }
}

/// A fresh access token.
pub(super) fn token() -> String {
    secret::hex(TOKEN_BYTES)
}

/// A fresh token for traffic, if the ports are not public.
pub(super) fn traffic_token(network: &NetworkOptions) -> Option<String> {
    (network.allow_public_traffic == Some(false)).then(token)
}

/// What the fleet calls its total is a part of ours.
pub(super) fn of_fleet(phase: Phase) -> Phase {
    if phase.name == "total" {
        Phase {
            name: "fleet",
            ..phase
        }
    } else {
        phase
    }
}

/// Times consecutive steps.
pub(super) struct Clock {
    pub(super) phases: Vec<Phase>,
    last: Instant,
}

impl Clock {
    pub(super) fn start() -> Self {
        Self {
            phases: Vec::new(),
            last: Instant::now(),
        }
    }

    pub(super) fn lap(&mut self, name: &'static str) {
        self.phases.push(Phase {
            name,
            took: self.last.elapsed(),
        });
        self.skip();
    }

    pub(super) fn skip(&mut self) {
        self.last = Instant::now();
    }
}
