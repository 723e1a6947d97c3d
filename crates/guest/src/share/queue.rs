//! What has been asked of the host and not answered.

use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use cubicle_protocol::share::{Answer, Frames, Operation, Reply, Request, encode_head};
use futures::{Stream, StreamExt as _};
use rustix::io::Errno;
use tokio::sync::oneshot;

/// How long programs wait for a host that is away, in this machine's own time, which stands still
/// while the sandbox is paused.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// An answer, and the data behind it.
pub(super) type Outcome = Result<(Answer, Bytes), Errno>;

/// The requests of one share. All of it is memory, and so part of a snapshot: what was asked is
/// asked again in the next life.
#[derive(Debug)]
pub(super) struct Queue {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    next_id: u64,
    waiting: BTreeMap<u64, Waiting>,
    /// What the host has not been sent in this life.
    unsent: VecDeque<Unsent>,
    /// Data of the request whose head was sent last.
    rest: Bytes,
    link: Link,
    /// Counts the lives: what belongs to an earlier one is ignored.
    life: u64,
    /// Of the stream of requests, when it has nothing to send.
    sender: Option<Waker>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    /// The host answers.
    Up,
    /// It is expected back.
    Down,
    /// It has been away for too long: nothing waits for it any more.
    Lost,
    /// Nobody uses this share any more.
    Closed,
}

#[derive(Debug)]
struct Waiting {
    /// The kernel's name for what needs this.
    unique: u64,
    operation: Operation,
    data: Bytes,
    /// Whether the host has been sent it, in this life or another.
    sent: bool,
    /// Whether the program has been sent a signal.
    interrupted: bool,
    reply: oneshot::Sender<Outcome>,
}

#[derive(Debug)]
enum Unsent {
    Request(u64),
    Release(u64),
}

impl Queue {
    /// A queue whose host is expected.
    pub(super) fn new() -> Arc<Self> {
        let queue = Arc::new(Self {
            inner: Mutex::new(Inner {
                next_id: 1,
                waiting: BTreeMap::new(),
                unsent: VecDeque::new(),
                rest: Bytes::new(),
                link: Link::Down,
                life: 0,
                sender: None,
            }),
        });
        queue.lose_patience(0);
        queue
    }

    /// Asks the host and waits for its answer, for as many lives as it takes.
    pub(super) async fn ask(&self, unique: u64, operation: Operation, data: Bytes) -> Outcome {
        let (reply, answer) = oneshot::channel();
        {
            let mut inner = self.lock();
            if matches!(inner.link, Link::Lost | Link::Closed) {
                return Err(Errno::IO);
            }
            let id = inner.next_id;
            inner.next_id += 1;
            let waiting = Waiting {
                unique,
                operation,
                data,
                sent: false,
                interrupted: false,
                reply,
            };
            inner.waiting.insert(id, waiting);
            inner.send(Unsent::Request(id));
        }
        answer.await.unwrap_or(Err(Errno::IO))
    }

    /// Tells the host that a file is closed, if it is there to hear it.
    pub(super) fn release(&self, inode: u64) {
        self.lock().send(Unsent::Release(inode));
    }

    /// The program that needs `unique` was sent a signal. As long as the host answers, it is let
    /// wait: most signals are not meant to make a system call fail.
    pub(super) fn interrupt(&self, unique: u64) {
        let mut inner = self.lock();
        let up = inner.link == Link::Up;
        for waiting in inner.waiting.values_mut() {
            waiting.interrupted |= waiting.unique == unique;
        }
        if !up {
            inner.fail(Errno::INTR, |waiting| waiting.interrupted);
        }
    }

    /// Begins a life: `replies` is what the host sends in it, and what is returned is for the host.
    pub(super) fn attach<E: Send + 'static>(
        self: &Arc<Self>,
        replies: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    ) -> Requests {
        let life = {
            let mut inner = self.lock();
            inner.life += 1;
            if inner.link != Link::Closed {
                inner.link = Link::Up;
            }
            inner.rest = Bytes::new();
            inner.unsent = inner.waiting.keys().copied().map(Unsent::Request).collect();
            // The stream of the life before ends.
            inner.wake();
            inner.life
        };
        let queue = Arc::clone(self);
        tokio::spawn(async move {
            queue.read(replies, life).await;
            queue.detach(life);
        });
        let queue = Arc::clone(self);
        Requests { queue, life }
    }

    /// Makes everything fail, now and from now on.
    pub(super) fn close(&self) {
        let mut inner = self.lock();
        inner.link = Link::Closed;
        inner.fail(Errno::IO, |_| true);
        inner.wake();
    }

    async fn read<E>(&self, replies: impl Stream<Item = Result<Bytes, E>>, life: u64) {
        let mut replies = std::pin::pin!(replies);
        let mut frames = Frames::new();
        while let Some(Ok(piece)) = replies.next().await {
            frames.push(&piece);
            loop {
                match frames.take::<Reply>() {
                    Ok(Some(frame)) => self.answered(life, frame.message, frame.data),
                    Ok(None) => break,
                    Err(error) => {
                        tracing::warn!(%error, "the host's replies make no sense");
                        return;
                    }
                }
            }
        }
    }

    fn answered(&self, life: u64, reply: Reply, data: Bytes) {
        let mut inner = self.lock();
        if inner.life != life {
            return;
        }
        // Nobody waits for it any more if the program was interrupted.
        if let Some(waiting) = inner.waiting.remove(&reply.id) {
            let outcome = match reply.outcome {
                Ok(answer) => Ok((answer, data)),
                // The kernel takes no other numbers.
                Err(errno) if (1..512).contains(&errno.0) => Err(Errno::from_raw_os_error(errno.0)),
                Err(_) => Err(Errno::IO),
            };
            let _ = waiting.reply.send(outcome);
        }
    }

    fn detach(self: &Arc<Self>, life: u64) {
        {
            let mut inner = self.lock();
            if inner.life != life || inner.link != Link::Up {
                return;
            }
            inner.link = Link::Down;
            inner.unsent.clear();
            inner.rest = Bytes::new();
            inner.fail(Errno::INTR, |waiting| waiting.interrupted);
            inner.wake();
        }
        self.lose_patience(life);
    }

    /// Lets programs wait for so long, unless a new life begins.
    fn lose_patience(self: &Arc<Self>, life: u64) {
        let queue = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(PATIENCE).await;
            let Some(queue) = queue.upgrade() else { return };
            let mut inner = queue.lock();
            if inner.life == life && inner.link == Link::Down {
                inner.link = Link::Lost;
                inner.fail(Errno::IO, |_| true);
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn send(&mut self, what: Unsent) {
        // What is asked while the host is away is sent when it is back.
        if self.link == Link::Up {
            self.unsent.push_back(what);
            self.wake();
        }
    }

    fn wake(&mut self) {
        if let Some(sender) = self.sender.take() {
            sender.wake();
        }
    }

    fn fail(&mut self, errno: Errno, which: impl Fn(&Waiting) -> bool) {
        let failing: Vec<u64> = self
            .waiting
            .iter()
            .filter(|(_, waiting)| which(waiting))
            .map(|(id, _)| *id)
            .collect();
        for id in failing {
            if let Some(waiting) = self.waiting.remove(&id) {
                let _ = waiting.reply.send(Err(errno));
            }
        }
    }

    /// The next frame for the host, or a part of one.
    fn next_piece(&mut self) -> Option<Bytes> {
        if !self.rest.is_empty() {
            return Some(std::mem::take(&mut self.rest));
        }
        loop {
            let encoded = match self.unsent.pop_front()? {
                Unsent::Request(id) => {
                    // Interrupted meanwhile.
                    let Some(waiting) = self.waiting.get_mut(&id) else {
                        continue;
                    };
                    let request = Request {
                        id,
                        again: std::mem::replace(&mut waiting.sent, true),
                        operation: waiting.operation.clone(),
                    };
                    let encoded = encode_head(&request, waiting.data.len());
                    if encoded.is_ok() {
                        self.rest = waiting.data.clone();
                    }
                    if encoded.is_err()
                        && let Some(waiting) = self.waiting.remove(&id)
                    {
                        let _ = waiting.reply.send(Err(Errno::NAMETOOLONG));
                    }
                    encoded
                }
                Unsent::Release(inode) => {
                    let request = Request {
                        id: 0,
                        again: false,
                        operation: Operation::Release { inode },
                    };
                    encode_head(&request, 0)
                }
            };
            match encoded {
                Ok(frame) => return Some(frame),
                Err(error) => tracing::warn!(%error, "a request is too long"),
            }
        }
    }
}

/// The requests of one life, for the host. Dropping it ends the life.
#[derive(Debug)]
pub(super) struct Requests {
    queue: Arc<Queue>,
    life: u64,
}

impl Stream for Requests {
    type Item = Bytes;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let mut inner = self.queue.lock();
        if inner.life != self.life || inner.link != Link::Up {
            return Poll::Ready(None);
        }
        match inner.next_piece() {
            Some(frame) => Poll::Ready(Some(frame)),
            None => {
                inner.sender = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        self.queue.detach(self.life);
    }
}
