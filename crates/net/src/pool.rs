//! The pool: slots made ahead of time, handed out at once, made new after use.

use std::{
    collections::{BTreeSet, VecDeque},
    fs::{self, File},
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use rustix::fs::{FlockOperation, flock};
use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, sleep_until},
};

use crate::{
    Error, PoolConfig, Result, Slot, SlotIndex, SweepReport, host,
    netns::Netns,
    numbers::Numbers,
    provision::{self, Condemned, Parts, lock},
    sweep,
};

/// Slots that are made or made new at the same time. More only wait for the kernel's one lock
/// over all interfaces.
const PARALLEL: usize = 4;
/// How long the pool waits after it could not make a slot before it tries again.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(1);

/// How many slots are where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Ready to be acquired.
    pub ready: usize,
    /// In use, adopted ones included.
    pub leased: usize,
    /// Being made, made new after use, or removed.
    pub pending: usize,
    /// In use since before this process started, and not adopted yet.
    pub adoptable: usize,
    /// Could not be removed, or were while their VM still ran; their numbers stay unused.
    pub broken: usize,
    /// As many as may exist.
    pub max: usize,
}

/// What closing a pool did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CloseReport {
    /// Slots that were removed.
    pub removed: usize,
    /// Slots that VMs use. They keep working, and the host's rules with them, until a later
    /// process adopts or sweeps them.
    pub left: Vec<SlotIndex>,
}

/// A pool of network slots. Clones are the same pool.
///
/// Dropping the last clone without [`SlotPool::close`] leaves everything in place for a later
/// process, as if this one had been killed.
#[derive(Debug, Clone)]
pub struct SlotPool {
    shared: Arc<Shared>,
}

/// What the pool, its slots and its background work have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    config: Arc<PoolConfig>,
    /// The namespace in which the pool was opened: where the slots' links end.
    host: Netns,
    fenced_uplinks: Vec<String>,
    state: Mutex<State>,
    /// Wakes the upkeep.
    wake: Arc<Notify>,
    /// Tells that a piece of background work has ended.
    settled: Notify,
    /// Holds the run directory against other processes.
    lock: File,
}

#[derive(Debug)]
struct State {
    numbers: Numbers,
    ready: VecDeque<Parts>,
    returned: Vec<Parts>,
    leased: BTreeSet<SlotIndex>,
    adoptable: BTreeSet<SlotIndex>,
    /// Slots that are being made or made new: they become ready.
    pending: usize,
    /// Slots that are being removed: they only make room.
    removing: usize,
    broken: usize,
    waiting: VecDeque<oneshot::Sender<Result<Slot>>>,
    pause_until: Option<Instant>,
    last_taken: Instant,
    closed: bool,
}

impl State {
    fn total(&self) -> usize {
        self.ready.len()
            + self.returned.len()
            + self.leased.len()
            + self.adoptable.len()
            + self.pending
            + self.removing
            + self.broken
    }
}

impl SlotPool {
    /// Opens the pool in the calling thread's network namespace: removes what an earlier process
    /// left and no VM uses, puts the host's rules in place, makes a first slot as a proof that
    /// it can, and goes on making slots in the background.
    ///
    /// # Errors
    /// When the configuration cannot work, another process has the pool, or the kernel refuses
    /// something that slots need ([`probe`](crate::probe()) explains what).
    pub async fn open(config: PoolConfig) -> Result<(Self, SweepReport)> {
        config.check()?;
        let dir = config.netns_dir();
        fs::create_dir_all(&dir).map_err(Error::file("create the directory", &dir))?;
        let lock = host::lock(&config).await?;
        let host = Netns::current()?;
        let report = sweep::sweep(&Arc::new(config.clone()), &host).await?;
        let fenced_uplinks = {
            let config = config.clone();
            host.run("put the host's rules in place", move || {
                host::prepare(&config)
            })
            .await?
        };
        let adoptable: BTreeSet<SlotIndex> = report.adoptable.iter().copied().collect();
        let wake = Arc::new(Notify::new());
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                numbers: Numbers::except(&adoptable),
                ready: VecDeque::new(),
                returned: Vec::new(),
                leased: BTreeSet::new(),
                adoptable,
                pending: 0,
                removing: 0,
                broken: 0,
                waiting: VecDeque::new(),
                pause_until: None,
                last_taken: Instant::now(),
                closed: false,
            }),
            config: Arc::new(config),
            host,
            fenced_uplinks,
            wake: Arc::clone(&wake),
            settled: Notify::new(),
            lock,
        });
        shared.prove().await?;
        tokio::spawn(upkeep(Arc::downgrade(&shared), wake));
        Ok((Self { shared }, report))
    }

    /// Takes a slot out of the pool: at once when one is ready, else as soon as one is. It has a
    /// tap that nothing is attached to and the policy
    /// [`EgressPolicy::allow_all`](crate::EgressPolicy::allow_all).
    ///
    /// # Errors
    /// [`Error::Exhausted`] when no slot will become ready unless one is released; what made it
    /// impossible to make a slot; [`Error::Closed`].
    pub async fn acquire(&self) -> Result<Slot> {
        let ready = {
            let mut state = lock(&self.shared.state);
            if state.closed {
                return Err(Error::Closed);
            }
            state.last_taken = Instant::now();
            match state.ready.pop_front() {
                Some(parts) => {
                    state.leased.insert(parts.index);
                    Ok(parts)
                }
                None => Err(self.shared.queue(&mut state)?),
            }
        };
        self.shared.wake.notify_one();
        match ready {
            Ok(parts) => Ok(Slot::new(parts, &self.shared)),
            Err(waiting) => waiting.await.unwrap_or(Err(Error::Closed)),
        }
    }

    /// Takes over a slot that a VM has used since before this process started. Its tap is with
    /// the VM; its policy is what it was.
    ///
    /// # Errors
    /// [`Error::NotAdoptable`] when no VM uses such a slot, [`Error::Damaged`] when it has lost a
    /// part. A slot that could not be adopted is left to [`SlotPool::sweep`].
    pub async fn adopt(&self, index: SlotIndex) -> Result<Slot> {
        if !lock(&self.shared.state).adoptable.contains(&index) {
            return Err(Error::NotAdoptable {
                index,
                why: "no VM used it when the pool opened",
            });
        }
        let (config, host) = (Arc::clone(&self.shared.config), self.shared.host.clone());
        let parts = provision::adopt(config, host, index).await?;
        let mut state = lock(&self.shared.state);
        if !state.adoptable.remove(&index) {
            return Err(Error::NotAdoptable {
                index,
                why: "it was adopted or swept meanwhile",
            });
        }
        state.leased.insert(index);
        drop(state);
        Ok(Slot::new(parts, &self.shared))
    }

    /// Gives a slot back once its VM has ended. On return it is as good as new and in the pool,
    /// or on its way out if the pool has enough: a tap without a past, open policy, counters at zero,
    /// and no connection remembered in the slot or on the host. Goes on if the caller stops
    /// waiting.
    ///
    /// # Errors
    /// Why the slot could not be made new, for example [`Error::TapAttached`]. It has been
    /// removed then, and the pool makes another.
    pub async fn release(&self, slot: Slot) -> Result<()> {
        let index = slot.index();
        if !slot.belongs_to(&self.shared) {
            return Err(Error::Foreign { index });
        }
        let Some(parts) = slot.into_parts() else {
            return Ok(());
        };
        {
            let mut state = lock(&self.shared.state);
            state.leased.remove(&index);
            state.pending += 1;
        }
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move { shared.recycle(parts).await })
            .await
            .map_err(|_| Error::WorkerDied {
                action: format!("recycle network slot {index}"),
            })?
    }

    /// Removes the slots that were in use when the pool opened and that nobody has adopted.
    /// Call it when all VMs that are wanted are adopted and the others are dead.
    ///
    /// # Errors
    /// When one cannot be removed; the others are.
    pub async fn sweep(&self) -> Result<SweepReport> {
        let unadopted = std::mem::take(&mut lock(&self.shared.state).adoptable);
        lock(&self.shared.state).removing += unadopted.len();
        let removed = self
            .shared
            .remove_all(unadopted.into_iter().map(Condemned::from))
            .await?;
        Ok(SweepReport {
            removed,
            adoptable: Vec::new(),
        })
    }

    /// How many slots are where.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let state = lock(&self.shared.state);
        Counts {
            ready: state.ready.len(),
            leased: state.leased.len(),
            pending: state.pending + state.removing + state.returned.len(),
            adoptable: state.adoptable.len(),
            broken: state.broken,
            max: self.shared.config.size_max,
        }
    }

    /// Ends the pool and removes every slot that no VM uses. When none is left, the host's rules
    /// and settings are taken back too. Slots that are in use keep working.
    ///
    /// # Errors
    /// When something could not be removed.
    pub async fn close(self) -> Result<CloseReport> {
        let waiting = {
            let mut state = lock(&self.shared.state);
            state.closed = true;
            std::mem::take(&mut state.waiting)
        };
        drop(waiting);
        self.shared.wake.notify_one();
        self.shared.wait_until_settled().await;
        let (ready, left, broken) = {
            let mut state = lock(&self.shared.state);
            let mut ready: Vec<Parts> = state.ready.drain(..).collect();
            ready.append(&mut state.returned);
            state.removing += ready.len();
            let left: Vec<SlotIndex> = state.leased.union(&state.adoptable).copied().collect();
            (ready, left, state.broken)
        };
        let removed = self
            .shared
            .remove_all(ready.into_iter().map(Condemned::from))
            .await?
            .len();
        if left.is_empty() && broken == 0 {
            self.shared.leave_host().await?;
        }
        Ok(CloseReport { removed, left })
    }
}

impl Shared {
    pub(crate) fn config(&self) -> &PoolConfig {
        &self.config
    }

    /// Makes the first slot, so that a host that cannot have slots says so at once.
    async fn prove(self: &Arc<Self>) -> Result<()> {
        let index = {
            let mut state = lock(&self.state);
            if self.config.size_min == 0 || state.total() >= self.config.size_max {
                return Ok(());
            }
            state.pending += 1;
            state.numbers.take()
        };
        self.build(index).await
    }

    /// Stands in line for a slot that is about to be ready.
    fn queue(&self, state: &mut State) -> Result<oneshot::Receiver<Result<Slot>>> {
        state.waiting.retain(|waiting| !waiting.is_closed());
        let coming = state.pending
            + state.removing
            + state.returned.len()
            + self.config.size_max.saturating_sub(state.total());
        if state.waiting.len() >= coming {
            return Err(Error::Exhausted {
                max: self.config.size_max,
            });
        }
        let (sender, receiver) = oneshot::channel();
        state.waiting.push_back(sender);
        Ok(receiver)
    }

    /// Takes back a slot that was never used.
    pub(crate) fn give_back(&self, parts: Parts) {
        let mut state = lock(&self.state);
        state.leased.remove(&parts.index);
        state.returned.push(parts);
        drop(state);
        self.wake.notify_one();
    }

    async fn build(self: &Arc<Self>, index: SlotIndex) -> Result<()> {
        let built = provision::build(Arc::clone(&self.config), self.host.clone(), index).await;
        let outcome = match built.map(|parts| self.deliver(parts)) {
            Ok(None) => Ok(()),
            Ok(Some(surplus)) => self.remove(surplus, true).await,
            Err(error) => {
                let mut state = lock(&self.state);
                state.pending -= 1;
                state.numbers.give_back(index);
                state.pause_until = Some(Instant::now() + PAUSE_AFTER_FAILURE);
                Err(error)
            }
        };
        self.settled.notify_waiters();
        self.wake.notify_one();
        outcome
    }

    async fn recycle(self: Arc<Self>, parts: Parts) -> Result<()> {
        let (config, host) = (Arc::clone(&self.config), self.host.clone());
        let (index, outcome) = provision::recycle(config, host, parts).await;
        let surplus = match outcome {
            Ok(parts) => self.deliver(parts),
            Err(error) => {
                // The number stands for a user id too, and a process with that id still runs.
                let reuse = !matches!(error, Error::TapAttached { .. });
                self.remove(index, reuse).await?;
                return Err(error);
            }
        };
        if let Some(surplus) = surplus {
            // Nobody has to wait for that. What goes wrong is in the books and in the log.
            tokio::spawn(async move { self.remove(surplus, true).await });
            return Ok(());
        }
        self.settled.notify_waiters();
        self.wake.notify_one();
        Ok(())
    }

    /// Hands a pending slot to whoever waits longest, or makes it ready. Returns it, pending
    /// still, if the pool has no use for it.
    #[must_use]
    fn deliver(self: &Arc<Self>, parts: Parts) -> Option<Parts> {
        let mut state = lock(&self.state);
        state.pause_until = None;
        let index = parts.index;
        let mut slot = Slot::new(parts, self);
        while let Some(waiting) = state.waiting.pop_front() {
            match waiting.send(Ok(slot)) {
                Ok(()) => {
                    state.pending -= 1;
                    state.leased.insert(index);
                    return None;
                }
                Err(Ok(refused)) => slot = refused,
                Err(Err(_)) => unreachable!("what is refused is the slot that was sent"),
            }
        }
        let parts = slot.into_parts();
        if state.closed || state.ready.len() >= 2 * self.config.size_min {
            return parts;
        }
        state.pending -= 1;
        state.ready.extend(parts);
        None
    }

    /// Removes a pending slot from the host and its number from the books, or leaves the number
    /// taken if it is not to be used again.
    async fn remove(&self, condemned: impl Into<Condemned>, reuse: bool) -> Result<()> {
        {
            let mut state = lock(&self.state);
            state.pending -= 1;
            state.removing += 1;
        }
        // Somebody may wait for a slot: another can be made meanwhile.
        self.wake.notify_one();
        let condemned = condemned.into();
        let (config, host, index) = (Arc::clone(&self.config), self.host.clone(), condemned.index);
        let removed = provision::destroy(config, host, condemned).await;
        self.book_removal(index, &removed, reuse);
        removed
    }

    /// Removes slots that are in the books as being removed; returns which, or what went wrong with one that was not.
    async fn remove_all(
        &self,
        condemned: impl IntoIterator<Item = Condemned>,
    ) -> Result<Vec<SlotIndex>> {
        let outcomes = provision::destroy_all(&self.config, &self.host, condemned).await;
        for (index, removed) in &outcomes {
            self.book_removal(*index, removed, true);
        }
        outcomes
            .into_iter()
            .map(|(index, removed)| removed.map(|()| index))
            .collect()
    }

    fn book_removal(&self, index: SlotIndex, removed: &Result<()>, reuse: bool) {
        let mut state = lock(&self.state);
        state.removing -= 1;
        match removed {
            Ok(()) if reuse => state.numbers.give_back(index),
            Ok(()) => state.broken += 1,
            Err(error) => {
                state.broken += 1;
                tracing::error!(slot = %index, %error, "a network slot cannot be removed");
            }
        }
        drop(state);
        self.settled.notify_waiters();
        self.wake.notify_one();
    }

    async fn wait_until_settled(&self) {
        loop {
            let settled = self.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            let busy = {
                let state = lock(&self.state);
                state.pending + state.removing
            };
            if busy == 0 {
                return;
            }
            settled.await;
        }
    }

    /// Takes back what the pool changed on the host.
    async fn leave_host(&self) -> Result<()> {
        let (config, uplinks) = (Arc::clone(&self.config), self.fenced_uplinks.clone());
        self.host
            .run("take the host's rules back", move || {
                host::leave(&config, &uplinks)
            })
            .await
    }

    /// Starts whatever work there is; says until when there is none.
    fn tend(self: &Arc<Self>) -> Option<Instant> {
        let mut state = lock(&self.state);
        while state.pending < PARALLEL
            && let Some(parts) = state.returned.pop()
        {
            state.pending += 1;
            let shared = Arc::clone(self);
            tokio::spawn(async move {
                let index = parts.index;
                if let Err(error) = shared.recycle(parts).await {
                    tracing::warn!(slot = %index, %error, "an unused network slot was replaced");
                }
            });
        }
        if state.closed {
            return None;
        }
        if let Some(until) = state.pause_until.filter(|until| *until > Instant::now()) {
            return Some(until);
        }
        state.waiting.retain(|waiting| !waiting.is_closed());
        while state.pending < PARALLEL
            && state.total() < self.config.size_max
            && state.ready.len() + state.returned.len() + state.pending
                < self.config.size_min + state.waiting.len()
        {
            state.pending += 1;
            let index = state.numbers.take();
            let shared = Arc::clone(self);
            tokio::spawn(async move {
                if let Err(error) = shared.build(index).await {
                    tracing::warn!(slot = %index, %error, "cannot make a network slot");
                    let waiting = lock(&shared.state).waiting.pop_front();
                    if let Some(waiting) = waiting {
                        // Whoever stopped waiting does not need to know.
                        let _ = waiting.send(Err(error));
                    }
                }
            });
        }
        self.dismiss_surplus(&mut state)
    }

    /// Removes the slots that were worth keeping only while others were taken; says when it is
    /// time to, if it is not yet.
    fn dismiss_surplus(self: &Arc<Self>, state: &mut State) -> Option<Instant> {
        if state.ready.len() <= self.config.size_min {
            return None;
        }
        let due = state.last_taken + self.config.linger;
        if Instant::now() < due {
            return Some(due);
        }
        let surplus = state.ready.split_off(self.config.size_min);
        state.removing += surplus.len();
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            // What cannot be removed is in the books and in the log.
            let _ = shared
                .remove_all(surplus.into_iter().map(Condemned::from))
                .await;
        });
        None
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The upkeep finds that there is nothing to keep up.
        self.wake.notify_one();
        // Closing the file would do, were it not for a child that is being started elsewhere in
        // this process and has not closed its copy yet.
        if let Err(error) = flock(&self.lock, FlockOperation::Unlock) {
            tracing::warn!(%error, "the lock of the network slots' directory is not released");
        }
    }
}

/// Keeps the pool filled until it is gone.
async fn upkeep(pool: Weak<Shared>, wake: Arc<Notify>) {
    loop {
        let pause = match pool.upgrade() {
            Some(shared) => shared.tend(),
            None => return,
        };
        match pause {
            Some(until) => tokio::select! {
                () = sleep_until(until) => {}
                () = wake.notified() => {}
            },
            None => wake.notified().await,
        }
    }
}
