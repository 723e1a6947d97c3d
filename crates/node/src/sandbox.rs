//! One sandbox, from its owner's view: a task that makes it, waits for its end and takes it apart.
//!
//! All that a sandbox holds is held by its owner task and by nothing else, and only that task
//! changes its stage. A kill merely asks; so a kill during a create, two kills at once, or a kill
//! while the VM dies by itself are all the same sequence: make, wait, take apart.

use std::{any::Any, future::Future, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use cubicle_ids::{SandboxId, SnapshotId};
use cubicle_vmm::Vm;
use futures::{FutureExt as _, future::BoxFuture};
use time::OffsetDateTime;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Error, Result},
    facts::{Created, NodeEvent, SandboxFact, SandboxState, Shape},
    holdings::Holdings,
    journal::Key,
    link::Link,
    node::Inner,
};

/// Pause between two attempts to take a sandbox apart; doubles up to the second.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(10);

/// What others see of a sandbox.
#[derive(Debug)]
pub(crate) struct Sandbox {
    key: Key,
    snapshot: SnapshotId,
    shape: Shape,
    started_at: OffsetDateTime,
    stop: CancellationToken,
    stage: watch::Sender<Stage>,
}

/// Where it is in its life.
#[derive(Debug, Clone)]
pub(crate) enum Stage {
    Creating,
    Running(Arc<Live>),
    /// Why the last attempt to take it apart failed.
    Removing(String),
    Gone,
}

/// A VM that answers.
pub(crate) struct Live {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) link: Link,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live")
            .field("link", &self.link)
            .finish_non_exhaustive()
    }
}

impl Sandbox {
    pub(crate) fn new(
        key: Key,
        snapshot: SnapshotId,
        shape: Shape,
        started_at: OffsetDateTime,
    ) -> Self {
        let stop = CancellationToken::new();
        Self {
            key,
            snapshot,
            shape,
            started_at,
            stop,
            stage: watch::Sender::new(Stage::Creating),
        }
    }

    pub(crate) fn id(&self) -> &SandboxId {
        &self.key.sandbox
    }

    pub(crate) fn key(&self) -> &Key {
        &self.key
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    pub(crate) fn started_at(&self) -> OffsetDateTime {
        self.started_at
    }

    /// `None` once nothing of it is left.
    pub(crate) fn state(&self) -> Option<SandboxState> {
        match &*self.stage.borrow() {
            Stage::Gone => None,
            // Asked to stop is as good as stopping for everyone outside.
            _ if self.stop.is_cancelled() => Some(SandboxState::Removing),
            Stage::Creating => Some(SandboxState::Creating),
            Stage::Running(_) => Some(SandboxState::Running),
            Stage::Removing(_) => Some(SandboxState::Removing),
        }
    }

    pub(crate) fn fact(&self) -> Option<SandboxFact> {
        Some(SandboxFact {
            id: self.key.sandbox.clone(),
            state: self.state()?,
            snapshot: self.snapshot.clone(),
            shape: self.shape,
            started_at: self.started_at,
            generation: self.key.generation,
        })
    }

    /// The VM, if it runs and is meant to.
    pub(crate) fn live(&self) -> Result<Arc<Live>> {
        let id = || self.key.sandbox.clone();
        if self.stop.is_cancelled() {
            return Err(Error::NotFound { id: id() });
        }
        match &*self.stage.borrow() {
            Stage::Running(live) => Ok(live.clone()),
            Stage::Creating => Err(Error::NotReady { id: id() }),
            Stage::Removing(_) | Stage::Gone => Err(Error::NotFound { id: id() }),
        }
    }

    /// From now on it can be used.
    pub(crate) fn set_running(&self, live: &Arc<Live>) {
        self.stage.send_replace(Stage::Running(live.clone()));
    }

    /// Asks the owner to take it apart, from whatever it is doing.
    pub(crate) fn stop(&self) {
        self.stop.cancel();
        if let Stage::Running(live) = &*self.stage.borrow() {
            live.link.close();
        }
    }

    /// Waits until nothing of it is left.
    pub(crate) async fn gone(&self, patience: Duration) -> Result<()> {
        let mut stages = self.stage.subscribe();
        let gone = stages.wait_for(|stage| matches!(stage, Stage::Gone));
        // The sender lives in `self`, so the only other outcome is the time limit.
        if tokio::time::timeout(patience, gone).await.is_ok() {
            return Ok(());
        }
        let last = match &*self.stage.borrow() {
            Stage::Removing(last) => last.clone(),
            _ => String::new(),
        };
        Err(Error::KillTimeout {
            id: self.key.sandbox.clone(),
            after: patience,
            last,
        })
    }
}

/// Makes a sandbox by `make`, hands it out through `reply`, and owns it until it is gone. `make`
/// puts all that it takes into the [`Holdings`]; whatever it left there when it fails is released
/// before the failure is told.
///
/// If nobody waits for the reply any more, nobody knows of the sandbox, so it is removed.
pub(crate) async fn own_new<M>(
    node: Arc<Inner>,
    sandbox: Arc<Sandbox>,
    mut reply: oneshot::Sender<Result<Created>>,
    make: M,
) where
    M: for<'a> FnOnce(
        &'a mut Holdings,
        &'a CancellationToken,
    ) -> BoxFuture<'a, Result<(Arc<Live>, Created)>>,
{
    let mut held = Holdings::default();
    let made = {
        let mut making = AssertUnwindSafe(make(&mut held, &sandbox.stop)).catch_unwind();
        tokio::select! {
            made = &mut making => made,
            () = reply.closed() => {
                sandbox.stop.cancel();
                making.await
            }
        }
    };
    match made.unwrap_or_else(|panic| Err(panicked(&sandbox, panic))) {
        Ok((live, created)) => {
            sandbox.set_running(&live);
            if reply.send(Ok(created)).is_ok() {
                run(&node, &sandbox, &live, &mut held).await;
            } else {
                remove(&node, &sandbox, Some(&live), &mut held).await;
            }
        }
        Err(error) => {
            remove(&node, &sandbox, None, &mut held).await;
            reply.send(Err(error)).ok();
        }
    }
}

/// Owns a sandbox that was running when the node opened.
pub(crate) async fn own_adopted(
    node: Arc<Inner>,
    sandbox: Arc<Sandbox>,
    live: Arc<Live>,
    mut held: Holdings,
) {
    run(&node, &sandbox, &live, &mut held).await;
}

/// Owns what is left of a sandbox that is not to run.
pub(crate) async fn own_remains(node: Arc<Inner>, sandbox: Arc<Sandbox>, mut held: Holdings) {
    sandbox.stop.cancel();
    remove(&node, &sandbox, None, &mut held).await;
}

/// Waits for the end of a running sandbox, then takes it apart.
async fn run(node: &Inner, sandbox: &Arc<Sandbox>, live: &Arc<Live>, held: &mut Holdings) {
    let exited = tokio::select! {
        () = sandbox.stop.cancelled() => false,
        () = node.abandon.cancelled() => return,
        () = live.vm.exited() => !sandbox.stop.is_cancelled(),
    };
    if exited {
        tracing::warn!(sandbox = %sandbox.id(), "the VM ended by itself");
    }
    remove(node, sandbox, Some(live), held).await;
    if exited {
        let Key {
            sandbox: id,
            generation,
        } = sandbox.key.clone();
        node.events.send(NodeEvent::Exited { id, generation }).ok();
    }
}

/// Takes a sandbox apart, however often it takes.
async fn remove(
    node: &Inner,
    sandbox: &Arc<Sandbox>,
    live: Option<&Arc<Live>>,
    held: &mut Holdings,
) {
    if let Some(live) = live {
        live.link.close();
    }
    sandbox.stage.send_replace(Stage::Removing(String::new()));
    let mut pause = RETRY_PAUSE;
    loop {
        let released = AssertUnwindSafe(held.release(node, sandbox.key()))
            .catch_unwind()
            .await;
        match released.unwrap_or_else(|panic| Err(panicked(sandbox, panic))) {
            Ok(()) => break,
            Err(error) => {
                tracing::error!(sandbox = %sandbox.id(), %error, "could not remove all of a sandbox, trying again");
                sandbox
                    .stage
                    .send_replace(Stage::Removing(error.to_string()));
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            // The rows and files are still there for the next start to find.
            () = node.abandon.cancelled() => break,
        }
        pause = (pause * 2).min(RETRY_PAUSE_MAX);
    }
    node.registry.remove(sandbox);
    sandbox.stage.send_replace(Stage::Gone);
}

/// Runs `step` unless the sandbox is asked to stop first; for steps that only wait.
pub(crate) async fn unless_stopped<T>(
    id: &SandboxId,
    stop: &CancellationToken,
    step: impl Future<Output = Result<T>>,
) -> Result<T> {
    stop.run_until_cancelled(step)
        .await
        .unwrap_or_else(|| Err(Error::Killed { id: id.clone() }))
}

/// Runs `step` and makes a panic in it an error, so that what runs beside it is seen through, too.
pub(crate) async fn contained<T>(
    id: &SandboxId,
    step: impl Future<Output = Result<T>>,
) -> Result<T> {
    AssertUnwindSafe(step)
        .catch_unwind()
        .await
        .unwrap_or_else(|panic| {
            Err(Error::Panic {
                id: id.clone(),
                message: panic_message(panic.as_ref()),
            })
        })
}

/// For use between steps that must not be cut short.
pub(crate) fn check_stop(id: &SandboxId, stop: &CancellationToken) -> Result<()> {
    if stop.is_cancelled() {
        Err(Error::Killed { id: id.clone() })
    } else {
        Ok(())
    }
}

fn panicked(sandbox: &Sandbox, panic: Box<dyn Any + Send>) -> Error {
    let message = panic_message(panic.as_ref());
    tracing::error!(sandbox = %sandbox.id(), message, "a task panicked");
    Error::Panic {
        id: sandbox.id().clone(),
        message,
    }
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "(no message)".to_owned())
}
