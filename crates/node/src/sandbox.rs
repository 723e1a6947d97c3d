//! One sandbox, from its owner's view: a task that makes it, does to it what is asked, waits for
//! its end and takes it apart.
//!
//! All that a sandbox holds is held by its owner task and by nothing else, and only that task
//! changes its stage. Snapshot, pause and rollback are letters to the owner, one at a time. A kill
//! merely asks; so a kill during a create, two kills at once, or a kill while the VM dies by itself
//! are all the same sequence: make, wait, take apart.

use std::{any::Any, future::Future, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use cubicle_cow::Manifest;
use cubicle_ids::{SandboxId, SnapshotId};
use cubicle_net::EgressPolicy;
use cubicle_protocol::guest_api::InitRequest;
use cubicle_vmm::{Disk, Vm};
use futures::{FutureExt as _, future::BoxFuture};
use time::OffsetDateTime;
use tokio::sync::{Mutex, OwnedMutexGuard, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Error, Result},
    facts::{
        CreateSandbox, Created, NodeEvent, SandboxFact, SandboxState, Shape, TakeSnapshot, Taken,
    },
    holdings::Holdings,
    journal::Key,
    link::Link,
    memory::Memory,
    node::Inner,
    rollback::rollback,
    snapshot::{pause, snapshot},
    spares::{self, Spare},
};

/// What others see of a sandbox.
#[derive(Debug)]
pub(crate) struct Sandbox {
    id: SandboxId,
    /// What it is made from, and the generation of its first VM here.
    made_from: (SnapshotId, u64),
    shape: Shape,
    started_at: OffsetDateTime,
    stop: CancellationToken,
    stage: watch::Sender<Stage>,
    letters: mpsc::Sender<Letter>,
    /// Held while an operation is under way.
    turn: Arc<Mutex<()>>,
}

/// Where a sandbox's owner reads what it is asked to do.
pub(crate) type Letters = mpsc::Receiver<Letter>;

/// An operation, and the turn that it takes.
#[derive(Debug)]
pub(crate) struct Letter {
    operation: Operation,
    /// Given up before the reply, so that whoever reads it may ask for the next.
    turn: OwnedMutexGuard<()>,
}

/// Something that the owner of a running sandbox is asked to do. It is seen through whether or not
/// anybody still waits for the reply.
#[derive(Debug)]
pub(crate) enum Operation {
    Snapshot(TakeSnapshot, oneshot::Sender<Result<Taken>>),
    Pause(TakeSnapshot, oneshot::Sender<Result<Taken>>),
    Rollback(Box<CreateSandbox>, oneshot::Sender<Result<Created>>),
    SetEgress(EgressPolicy, oneshot::Sender<Result<()>>),
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
    /// Which of its sandbox's VMs it is.
    pub(crate) generation: u64,
    /// What was restored.
    pub(crate) snapshot: SnapshotId,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) link: Link,
    pub(crate) disks: Vec<Disk>,
    /// What its guest was told last, without clock and entropy.
    pub(crate) identity: InitRequest,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live")
            .field("generation", &self.generation)
            .field("link", &self.link)
            .finish_non_exhaustive()
    }
}

/// Where a VM's memory and disks come from: what its next snapshot descends from.
#[derive(Debug)]
pub(crate) struct Origin {
    /// Of the snapshot that it was restored from or last captured as.
    pub(crate) manifest: Arc<Manifest>,
    pub(crate) memory: Memory,
}

/// A running VM with all that its owner knows of it.
pub(crate) struct Running {
    pub(crate) live: Arc<Live>,
    pub(crate) origin: Origin,
    pub(crate) held: Holdings,
    /// Of its next VM. Not always one more: what is left of one that came to nothing may still be
    /// on its way out.
    pub(crate) next_generation: u64,
    /// It was paused and stands still, as that snapshot.
    pub(crate) paused_as: Option<SnapshotId>,
}

impl Running {
    pub(crate) fn new(live: Arc<Live>, origin: Origin, held: Holdings) -> Self {
        let next_generation = live.generation + 1;
        Self {
            live,
            origin,
            held,
            next_generation,
            paused_as: None,
        }
    }
}

impl Sandbox {
    /// A sandbox that is about to be made, and where its owner reads.
    pub(crate) fn new(
        key: Key,
        snapshot: SnapshotId,
        shape: Shape,
        started_at: OffsetDateTime,
    ) -> (Arc<Self>, Letters) {
        // Whoever has the turn is the only one who writes.
        let (letters, inbox) = mpsc::channel(1);
        let sandbox = Self {
            id: key.sandbox,
            made_from: (snapshot, key.generation),
            shape,
            started_at,
            stop: CancellationToken::new(),
            stage: watch::Sender::new(Stage::Creating),
            letters,
            turn: Arc::default(),
        };
        (Arc::new(sandbox), inbox)
    }

    pub(crate) fn id(&self) -> &SandboxId {
        &self.id
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
        let state = self.state()?;
        let (snapshot, generation) = match &*self.stage.borrow() {
            Stage::Running(live) => (live.snapshot.clone(), live.generation),
            _ => self.made_from.clone(),
        };
        Some(SandboxFact {
            id: self.id.clone(),
            state,
            snapshot,
            shape: self.shape,
            started_at: self.started_at,
            generation,
        })
    }

    /// The VM, if it runs and is meant to.
    pub(crate) fn live(&self) -> Result<Arc<Live>> {
        let id = || self.id.clone();
        if self.stop.is_cancelled() {
            return Err(Error::NotFound { id: id() });
        }
        match &*self.stage.borrow() {
            Stage::Running(live) => Ok(live.clone()),
            Stage::Creating => Err(Error::NotReady { id: id() }),
            Stage::Removing(_) | Stage::Gone => Err(Error::NotFound { id: id() }),
        }
    }

    /// Asks the owner for an operation and waits for what comes of it.
    pub(crate) async fn ask<T>(
        &self,
        operation: impl FnOnce(oneshot::Sender<Result<T>>) -> Operation,
    ) -> Result<T> {
        self.live()?;
        let id = || self.id.clone();
        let Ok(turn) = self.turn.clone().try_lock_owned() else {
            return Err(Error::Busy { id: id() });
        };
        let (reply, done) = oneshot::channel();
        let letter = Letter {
            operation: operation(reply),
            turn,
        };
        let sent = self.letters.send(letter).await;
        sent.map_err(|_| Error::NotFound { id: id() })?;
        done.await
            .unwrap_or_else(|_| Err(Error::Killed { id: id() }))
    }

    /// From now on this VM is it.
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

    /// Cancelled once it is to be taken apart.
    pub(crate) fn stopping(&self) -> &CancellationToken {
        &self.stop
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
            id: self.id.clone(),
            after: patience,
            last,
        })
    }
}

/// What comes of making a sandbox.
pub(crate) type Made = Result<(Arc<Live>, Origin, Created)>;

/// Makes a sandbox by `make`, hands it out through `reply`, and owns it until it is gone. `make`
/// puts all that it takes into the [`Holdings`]; whatever it left there when it fails is released
/// before the failure is told.
///
/// If nobody waits for the reply any more, nobody knows of the sandbox, so it is removed.
pub(crate) async fn own_new<M>(
    node: Arc<Inner>,
    sandbox: Arc<Sandbox>,
    letters: Letters,
    mut held: Holdings,
    mut reply: oneshot::Sender<Result<Created>>,
    make: M,
) where
    M: for<'a> FnOnce(&'a mut Holdings, &'a CancellationToken) -> BoxFuture<'a, Made>,
{
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
    match made.unwrap_or_else(|panic| Err(panicked(&sandbox, panic.as_ref()))) {
        Ok((live, origin, created)) => {
            sandbox.set_running(&live);
            if reply.send(Ok(created)).is_ok() {
                let running = Running::new(live, origin, held);
                run(&node, &sandbox, letters, running).await;
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
    letters: Letters,
    running: Running,
) {
    run(&node, &sandbox, letters, running).await;
}

/// Does what a running sandbox is asked until it ends, then takes it apart.
async fn run(
    node: &Arc<Inner>,
    sandbox: &Arc<Sandbox>,
    mut letters: Letters,
    mut running: Running,
) {
    let exited = loop {
        let letter = tokio::select! {
            biased;
            () = sandbox.stop.cancelled() => break false,
            () = node.abandon.cancelled() => return,
            () = running.live.vm.exited() => break !sandbox.stop.is_cancelled(),
            letter = letters.recv() => letter,
        };
        // The sandbox itself holds the other end.
        let Some(letter) = letter else { continue };
        serve(node, sandbox, &mut running, letter).await;
    };
    if exited {
        tracing::warn!(sandbox = %sandbox.id(), "the VM ended by itself");
    }
    let generation = running.live.generation;
    match running.paused_as.take().filter(|_| !exited) {
        Some(snapshot) => leave(node, sandbox, snapshot, running).await,
        None => remove(node, sandbox, Some(&running.live), &mut running.held).await,
    }
    if exited {
        let id = sandbox.id.clone();
        node.events.send(NodeEvent::Exited { id, generation }).ok();
    }
}

/// Sees one operation through.
async fn serve(node: &Arc<Inner>, sandbox: &Arc<Sandbox>, running: &mut Running, letter: Letter) {
    let id = sandbox.id();
    let Letter { operation, turn } = letter;
    match operation {
        Operation::Snapshot(order, reply) => {
            let taken = contained(id, snapshot(node, sandbox, running, order)).await;
            drop(turn);
            reply.send(taken).ok();
        }
        Operation::Pause(order, reply) => {
            let taken = contained(id, pause(node, sandbox, running, order)).await;
            drop(turn);
            reply.send(taken).ok();
        }
        Operation::Rollback(order, reply) => {
            let made = contained(id, rollback(node, sandbox, running, *order)).await;
            drop(turn);
            reply.send(made).ok();
        }
        Operation::SetEgress(policy, reply) => {
            let set = contained(id, running.held.set_egress(&policy)).await;
            drop(turn);
            reply.send(set).ok();
        }
    }
}

/// Lets go of a sandbox that was paused. Its VM stays for a while, for whoever resumes it.
async fn leave(node: &Arc<Inner>, sandbox: &Arc<Sandbox>, snapshot: SnapshotId, running: Running) {
    let Running {
        live, origin, held, ..
    } = running;
    live.link.close();
    let spare = Spare { live, origin, held };
    match spares::keep(node, sandbox.id(), &snapshot, spare).await {
        Ok(()) => depart(node, sandbox),
        Err(mut spare) => remove(node, sandbox, Some(&spare.live), &mut spare.held).await,
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
    let failed = |error: &Error| {
        sandbox
            .stage
            .send_replace(Stage::Removing(error.to_string()));
    };
    held.release_for_sure(node, failed).await;
    depart(node, sandbox);
}

/// A sandbox holds nothing any more.
fn depart(node: &Inner, sandbox: &Arc<Sandbox>) {
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

fn panicked(sandbox: &Sandbox, panic: &(dyn Any + Send)) -> Error {
    let message = panic_message(panic);
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
