use std::{
    collections::{BTreeMap, VecDeque},
    future::poll_fn,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

/// How much output may wait for the slowest subscriber, in bytes. Past it the process is left
/// waiting, as it would be by a slow reader of a pipe.
const LIMIT: usize = 256 << 10;

/// Pieces are joined up to this length while they wait, in bytes: a program that writes byte by
/// byte costs its followers no message each.
const JOIN: usize = 16 << 10;

/// Which of the process's files something was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Stdout,
    Stderr,
    Terminal,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct End {
    /// What it exited with, or the signal that ended it.
    pub(super) status: ExitStatus,
    /// Whether it was killed because its time was over.
    pub(super) timed_out: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExitStatus {
    Exited(i32),
    Signalled { signal: i32, core_dumped: bool },
}

/// Something a subscriber is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    Data(Source, Vec<u8>),
    End(End),
}

/// What a process writes, on its way to everybody who follows it.
///
/// Every subscriber gets everything that was written since it subscribed, in order, and then the
/// end. A piece is kept until the slowest subscriber has taken it; nobody following means that
/// nothing is kept. Once the end is there, every later subscriber gets just that.
#[derive(Debug, Default)]
pub(super) struct Output {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    pieces: VecDeque<(Source, Vec<u8>)>,
    /// Number of the first of `pieces`, counted from the beginning of the process.
    first: u64,
    /// Total length of `pieces`.
    bytes: usize,
    end: Option<End>,
    subscribers: BTreeMap<u64, Cursor>,
    next_subscriber: u64,
    /// Who writes, if it waits for room.
    writer: Option<Waker>,
}

#[derive(Debug)]
struct Cursor {
    /// Number of the piece that comes next.
    next: u64,
    waker: Option<Waker>,
}

impl Inner {
    fn has_room(&self) -> bool {
        self.bytes < LIMIT
    }

    /// The last piece, if nobody has taken it yet.
    fn untouched(&mut self) -> Option<&mut (Source, Vec<u8>)> {
        let last = (self.first + self.pieces.len() as u64).checked_sub(1)?;
        let taken = |cursor: &Cursor| cursor.next > last;
        if self.subscribers.values().any(taken) {
            None
        } else {
            self.pieces.back_mut()
        }
    }

    /// The piece for the subscriber that is about to take number `at`: a copy, unless it is the
    /// last one to take it.
    fn take(&mut self, at: u64) -> Option<(Source, Vec<u8>)> {
        let piece = self
            .pieces
            .get_mut(usize::try_from(at.checked_sub(self.first)?).ok()?)?;
        let wanted = self
            .subscribers
            .values()
            .filter(|cursor| cursor.next <= at)
            .count();
        if wanted > 1 {
            return Some(piece.clone());
        }
        self.bytes -= piece.1.len();
        Some((piece.0, std::mem::take(&mut piece.1)))
    }

    /// Forgets what every subscriber has taken.
    fn trim(&mut self) {
        let end = self.first + self.pieces.len() as u64;
        let needed = self
            .subscribers
            .values()
            .map(|cursor| cursor.next)
            .min()
            .unwrap_or(end);
        while self.first < needed
            && let Some((_, bytes)) = self.pieces.pop_front()
        {
            self.bytes -= bytes.len();
            self.first += 1;
        }
        if self.has_room()
            && let Some(writer) = self.writer.take()
        {
            writer.wake();
        }
    }

    fn wake_subscribers(&mut self) {
        for cursor in self.subscribers.values_mut() {
            if let Some(waker) = cursor.waker.take() {
                waker.wake();
            }
        }
    }
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows the process from now on.
    pub(super) fn subscribe(self: &Arc<Self>) -> Subscriber {
        let mut inner = self.lock();
        let id = inner.next_subscriber;
        inner.next_subscriber += 1;
        let next = inner.first + inner.pieces.len() as u64;
        inner.subscribers.insert(id, Cursor { next, waker: None });
        drop(inner);
        Subscriber {
            output: Arc::clone(self),
            id,
            ended: false,
        }
    }

    /// Hands on what the process wrote.
    pub(super) fn push(&self, source: Source, mut bytes: Vec<u8>) {
        let mut inner = self.lock();
        let inner = &mut *inner;
        if inner.subscribers.is_empty() {
            return;
        }
        inner.bytes += bytes.len();
        // Nobody is woken for a piece that grows: all who follow have been for its beginning.
        match inner.untouched() {
            Some((last, waiting)) if *last == source && waiting.len() + bytes.len() <= JOIN => {
                waiting.append(&mut bytes);
            }
            _ => {
                bytes.shrink_to_fit();
                inner.pieces.push_back((source, bytes));
                inner.wake_subscribers();
            }
        }
    }

    /// Waits until more may be pushed.
    pub(super) async fn room(&self) {
        poll_fn(|cx| {
            let mut inner = self.lock();
            if inner.has_room() {
                return Poll::Ready(());
            }
            inner.writer = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Hands on the end. Nothing is pushed after it.
    pub(super) fn finish(&self, end: End) {
        let mut inner = self.lock();
        inner.end = Some(end);
        inner.wake_subscribers();
    }

    /// How the process ended, if it has.
    pub(super) fn end(&self) -> Option<End> {
        self.lock().end
    }
}

/// One who follows a process. Dropping it means no longer following, and nothing else.
#[derive(Debug)]
pub(super) struct Subscriber {
    output: Arc<Output>,
    id: u64,
    ended: bool,
}

impl Subscriber {
    /// What comes next; `None` after the end.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let mut inner = self.output.lock();
        let inner = &mut *inner;
        let Some(cursor) = inner.subscribers.get(&self.id) else {
            return Poll::Ready(None);
        };
        let at = cursor.next;
        if let Some((source, bytes)) = inner.take(at) {
            if let Some(cursor) = inner.subscribers.get_mut(&self.id) {
                cursor.next = at + 1;
            }
            inner.trim();
            return Poll::Ready(Some(Event::Data(source, bytes)));
        }
        if let Some(end) = inner.end {
            self.ended = true;
            return Poll::Ready(Some(Event::End(end)));
        }
        if let Some(cursor) = inner.subscribers.get_mut(&self.id) {
            cursor.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// What is followed.
    pub(super) fn output(&self) -> Arc<Output> {
        Arc::clone(&self.output)
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        let mut inner = self.output.lock();
        inner.subscribers.remove(&self.id);
        inner.trim();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    async fn next(subscriber: &mut Subscriber) -> Option<Event> {
        poll_fn(|cx| subscriber.poll_next(cx)).await
    }

    fn data(bytes: &'static [u8]) -> Event {
        Event::Data(Source::Stdout, bytes.to_vec())
    }

    const END: End = End {
        status: ExitStatus::Exited(0),
        timed_out: false,
    };

    #[tokio::test]
    async fn everybody_gets_what_came_since_and_the_end() {
        let output = Arc::new(Output::default());
        output.push(Source::Stdout, Vec::from(b"nobody listens"));
        let mut early = output.subscribe();
        output.push(Source::Stdout, Vec::from(b"1"));
        let mut late = output.subscribe();
        output.push(Source::Stderr, b"2".to_vec());
        output.finish(END);
        assert_eq!(next(&mut early).await, Some(data(b"1")));
        let second = Event::Data(Source::Stderr, b"2".to_vec());
        assert_eq!(next(&mut early).await.as_ref(), Some(&second));
        assert_eq!(next(&mut early).await, Some(Event::End(END)));
        assert_eq!(next(&mut early).await, None);
        assert_eq!(next(&mut late).await, Some(second));
        assert_eq!(next(&mut late).await, Some(Event::End(END)));
        assert_eq!(next(&mut output.subscribe()).await, Some(Event::End(END)));
        assert_eq!(output.lock().bytes, 0);
    }

    #[tokio::test]
    async fn short_pieces_are_joined_until_somebody_takes_them() {
        let output = Arc::new(Output::default());
        let mut one = output.subscribe();
        let mut two = output.subscribe();
        for byte in [b"a", b"b"] {
            output.push(Source::Stdout, byte.to_vec());
        }
        assert_eq!(next(&mut one).await, Some(data(b"ab")));
        output.push(Source::Stdout, b"c".to_vec());
        output.push(Source::Stderr, b"d".to_vec());
        output.push(Source::Stdout, vec![b'e'; JOIN]);
        output.push(Source::Stdout, b"f".to_vec());
        let lengths = async |subscriber: &mut Subscriber, count| {
            let mut lengths = Vec::new();
            for _ in 0..count {
                match next(subscriber).await {
                    Some(Event::Data(source, bytes)) => lengths.push((source, bytes.len())),
                    other => panic!("{other:?}"),
                }
            }
            lengths
        };
        let rest = [
            (Source::Stdout, 1),
            (Source::Stderr, 1),
            (Source::Stdout, JOIN),
            (Source::Stdout, 1),
        ];
        assert_eq!(lengths(&mut one, 4).await, rest);
        assert_eq!(lengths(&mut two, 1).await, [(Source::Stdout, 2)]);
        assert_eq!(lengths(&mut two, 4).await, rest);
        assert_eq!(output.lock().bytes, 0);
    }

    #[tokio::test]
    async fn the_slowest_subscriber_holds_the_writer_until_it_reads_or_goes() {
        let output = Arc::new(Output::default());
        let mut slow = output.subscribe();
        let mut fast = output.subscribe();
        output.push(Source::Stdout, vec![0; LIMIT]);
        next(&mut fast).await;
        let wait = Duration::from_millis(20);
        assert!(tokio::time::timeout(wait, output.room()).await.is_err());
        let (_, _) = tokio::join!(output.room(), next(&mut slow));
        output.push(Source::Stdout, vec![0; LIMIT]);
        next(&mut fast).await;
        let room = tokio::spawn({
            let output = Arc::clone(&output);
            async move { output.room().await }
        });
        tokio::task::yield_now().await;
        assert!(!room.is_finished());
        drop(slow);
        room.await.unwrap();
        assert!(output.lock().pieces.is_empty());
    }
}
