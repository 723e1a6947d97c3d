//! The way from an execution to its client: unbounded in messages, since a kernel drops what is not
//! taken from it at once, and bounded in bytes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures::Stream;
use tokio::{sync::mpsc, time::timeout};

use crate::output::{Output, Text};

/// How long a client hears nothing before it is told that the code still runs.
pub(crate) const KEEPALIVE: Duration = Duration::from_secs(5);
/// How much may wait for a client that reads slowly, in bytes.
const MAX_WAITING: usize = 64 << 20;
/// Lines that are sent at once.
const BATCH: usize = 64;

/// The execution's end.
#[derive(Debug)]
pub(crate) struct Sink {
    lines: mpsc::UnboundedSender<Bytes>,
    waiting: Arc<AtomicUsize>,
    dropped: usize,
}

/// The client's end. Dropping it says that the client is gone.
#[derive(Debug)]
pub(crate) struct Source {
    lines: mpsc::UnboundedReceiver<Bytes>,
    waiting: Arc<AtomicUsize>,
}

pub(crate) fn channel() -> (Sink, Source) {
    let (sender, lines) = mpsc::unbounded_channel();
    let waiting = Arc::new(AtomicUsize::new(0));
    let sink = Sink {
        lines: sender,
        waiting: Arc::clone(&waiting),
        dropped: 0,
    };
    (sink, Source { lines, waiting })
}

impl Sink {
    /// Sends an output, or drops it if too much waits already.
    pub(crate) fn send(&mut self, output: &Output) {
        let line = output.line();
        let droppable = matches!(
            output,
            Output::Stdout(_) | Output::Stderr(_) | Output::Result(_)
        );
        if droppable && self.waiting.load(Ordering::Relaxed) + line.len() > MAX_WAITING {
            self.dropped += line.len();
            return;
        }
        self.push(line);
    }

    /// Says something that the daemon, not the code, has to say.
    pub(crate) fn notice(&mut self, text: &str) {
        let text = Text {
            text: format!("{text}\n"),
            timestamp: crate::clock::now(),
        };
        self.send(&Output::Stderr(text));
    }

    /// Says that there is nothing more to say.
    pub(crate) fn finish(&mut self) {
        if self.dropped > 0 {
            let text = Text {
                text: format!(
                    "{} bytes of output were dropped, because they were not read in time\n",
                    self.dropped
                ),
                timestamp: crate::clock::now(),
            };
            self.push(Output::Stderr(text).line());
            self.dropped = 0;
        }
        self.push(Output::EndOfExecution.line());
    }

    /// Waits until the client is gone.
    pub(crate) async fn gone(&self) {
        self.lines.closed().await;
    }

    fn push(&mut self, line: Bytes) {
        self.waiting.fetch_add(line.len(), Ordering::Relaxed);
        // A client that is gone is noticed by `gone`.
        let _ = self.lines.send(line);
    }
}

impl Source {
    /// What the client reads, until the execution has finished.
    pub(crate) fn into_stream(self) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> {
        futures::stream::unfold(self, |mut source| async {
            let bytes = source.next().await?;
            Some((Ok(bytes), source))
        })
    }

    async fn next(&mut self) -> Option<Bytes> {
        let mut lines = Vec::new();
        match timeout(KEEPALIVE, self.lines.recv_many(&mut lines, BATCH)).await {
            Ok(0) => None,
            Ok(_) => {
                let size = lines.iter().map(Bytes::len).sum();
                self.waiting.fetch_sub(size, Ordering::Relaxed);
                if lines.len() == 1 {
                    return lines.pop();
                }
                let mut joined = BytesMut::with_capacity(size);
                lines.iter().for_each(|line| joined.extend_from_slice(line));
                Some(joined.freeze())
            }
            Err(_) => Some(Output::Keepalive.line()),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;

    use super::*;

    async fn text(source: Source) -> String {
        let chunks: Vec<_> = source
            .into_stream()
            .map(|chunk| chunk.unwrap())
            .collect()
            .await;
        String::from_utf8(chunks.concat()).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_hears_nothing_is_told_so() {
        let (mut sink, source) = channel();
        tokio::spawn(async move {
            tokio::time::sleep(KEEPALIVE * 5 / 2).await;
            sink.finish();
        });
        let keepalive = "{\"type\":\"keepalive\"}\n";
        let end = "{\"type\":\"end_of_execution\"}\n";
        assert_eq!(text(source).await, [keepalive, keepalive, end].concat());
    }

    #[tokio::test]
    async fn what_nobody_reads_is_dropped_and_the_end_is_not() {
        let (mut sink, source) = channel();
        let output = Output::Stdout(Text {
            text: "x".repeat(1 << 20),
            timestamp: String::new(),
        });
        for _ in 0..100 {
            sink.send(&output);
        }
        sink.send(&Output::NumberOfExecutions { execution_count: 7 });
        sink.finish();
        drop(sink);
        let text = text(source).await;
        assert!(text.len() < MAX_WAITING + 1024);
        assert_eq!(text.matches("\"stdout\"").count(), 63);
        let rest: Vec<&str> = text.lines().skip(63).collect();
        assert!(rest[0].contains("\"execution_count\":7"));
        assert!(rest[1].contains("bytes of output were dropped"));
        assert!(rest[2].contains("end_of_execution"));
    }

    #[tokio::test]
    async fn the_sink_knows_when_the_client_is_gone() {
        let (sink, source) = channel();
        drop(source);
        sink.gone().await;
    }
}
