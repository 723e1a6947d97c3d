use std::{
    future::{pending, poll_fn},
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use connectrpc::{ConnectError, ServiceStream};
use futures::stream;
use http::HeaderMap;
use tokio::time::{Sleep, sleep, sleep_until};

use super::{
    Error,
    output::{End, Event, ExitStatus, Output, Source, Subscriber},
};
use crate::proto::process::{
    ProcessEvent,
    process_event::{DataEvent, EndEvent, Event as Kind, KeepAlive, StartEvent, data_event},
};

const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";
const DEFAULT_KEEPALIVE: Duration = Duration::from_secs(90);

/// The stream of a process's events, as the caller of `Start` or `Connect` gets it.
pub(super) struct Events {
    pid: u32,
    subscriber: Subscriber,
    output: Arc<Output>,
    started: bool,
    keepalive: Duration,
    quiet: Pin<Box<Sleep>>,
    deadline: Option<Pin<Box<Sleep>>>,
    over: bool,
}

impl Events {
    pub(super) fn new(
        pid: u32,
        subscriber: Subscriber,
        headers: &HeaderMap,
        deadline: Option<Instant>,
    ) -> Self {
        let keepalive = keepalive(headers);
        Self {
            pid,
            output: subscriber.output(),
            subscriber,
            started: false,
            keepalive,
            quiet: Box::pin(sleep(keepalive)),
            deadline: deadline.map(|deadline| Box::pin(sleep_until(deadline.into()))),
            over: false,
        }
    }

    /// As messages made by `wrap`.
    pub(super) fn into_stream<M: Send + 'static>(
        self,
        wrap: fn(ProcessEvent) -> M,
    ) -> ServiceStream<M> {
        Box::pin(stream::unfold(self, move |mut events| async move {
            let event = events.next().await?;
            Some((event.map(wrap), events))
        }))
    }

    async fn next(&mut self) -> Option<Result<ProcessEvent, ConnectError>> {
        if self.over {
            return None;
        }
        if !self.started {
            self.started = true;
            return Some(Ok(event(StartEvent {
                pid: self.pid,
                ..StartEvent::default()
            })));
        }
        let next = tokio::select! {
            biased;
            () = deadline(&mut self.deadline, &self.output) => {
                self.over = true;
                return Some(Err(Error::Deadline(self.pid).into()));
            }
            next = poll_fn(|cx| self.subscriber.poll_next(cx)) => next?,
            () = &mut self.quiet => {
                self.still_alive();
                return Some(Ok(event(KeepAlive::default())));
            }
        };
        self.still_alive();
        Some(match next {
            Event::Data(source, bytes) => {
                let output = match source {
                    Source::Stdout => data_event::Output::Stdout(bytes),
                    Source::Stderr => data_event::Output::Stderr(bytes),
                    Source::Terminal => data_event::Output::Pty(bytes),
                };
                Ok(event(DataEvent {
                    output: Some(output),
                    ..DataEvent::default()
                }))
            }
            Event::End(End {
                timed_out: true, ..
            }) if self.deadline.is_some() => {
                self.over = true;
                Err(Error::Deadline(self.pid).into())
            }
            Event::End(End { status, .. }) => {
                self.over = true;
                Ok(event(end_event(status)))
            }
        })
    }

    fn still_alive(&mut self) {
        self.quiet
            .as_mut()
            .reset(tokio::time::Instant::now() + self.keepalive);
    }
}

/// Waits for the deadline. It has no meaning any more for a process that ended before it: the
/// caller is still owed the rest of the output and the end.
async fn deadline(deadline: &mut Option<Pin<Box<Sleep>>>, output: &Output) {
    if let Some(deadline) = deadline {
        deadline.as_mut().await;
        if output.end().is_none_or(|end| end.timed_out) {
            return;
        }
    }
    pending().await
}

fn keepalive(headers: &HeaderMap) -> Duration {
    headers
        .get(KEEPALIVE_HEADER)
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .filter(|&seconds| seconds > 0)
        .map_or(DEFAULT_KEEPALIVE, Duration::from_secs)
}

fn event(kind: impl Into<Kind>) -> ProcessEvent {
    ProcessEvent {
        event: Some(kind.into()),
        ..ProcessEvent::default()
    }
}

fn end_event(status: ExitStatus) -> EndEvent {
    let text = describe(status);
    let (exit_code, exited) = match status {
        ExitStatus::Exited(code) => (code, true),
        ExitStatus::Signalled { .. } => (-1, false),
    };
    EndEvent {
        exit_code: Some(exit_code),
        exited,
        error: (exit_code != 0).then(|| text.clone()),
        status: text,
        ..EndEvent::default()
    }
}

/// In words, as Go says it: clients read this.
pub(super) fn describe(status: ExitStatus) -> String {
    match status {
        ExitStatus::Exited(code) => format!("exit status {code}"),
        ExitStatus::Signalled {
            signal,
            core_dumped,
        } => {
            let dumped = if core_dumped { " (core dumped)" } else { "" };
            match signal_name(signal) {
                Some(name) => format!("signal: {name}{dumped}"),
                None => format!("signal: signal {signal}{dumped}"),
            }
        }
    }
}

fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        libc::SIGHUP => "hangup",
        libc::SIGINT => "interrupt",
        libc::SIGQUIT => "quit",
        libc::SIGILL => "illegal instruction",
        libc::SIGTRAP => "trace/breakpoint trap",
        libc::SIGABRT => "aborted",
        libc::SIGBUS => "bus error",
        libc::SIGFPE => "floating point exception",
        libc::SIGKILL => "killed",
        libc::SIGUSR1 => "user defined signal 1",
        libc::SIGSEGV => "segmentation fault",
        libc::SIGUSR2 => "user defined signal 2",
        libc::SIGPIPE => "broken pipe",
        libc::SIGALRM => "alarm clock",
        libc::SIGTERM => "terminated",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_said_in_the_words_that_clients_read() {
        let signalled = |signal, core_dumped| ExitStatus::Signalled {
            signal,
            core_dumped,
        };
        assert_eq!(describe(ExitStatus::Exited(0)), "exit status 0");
        assert_eq!(describe(ExitStatus::Exited(127)), "exit status 127");
        assert_eq!(describe(signalled(libc::SIGKILL, false)), "signal: killed");
        assert_eq!(
            describe(signalled(libc::SIGSEGV, true)),
            "signal: segmentation fault (core dumped)"
        );
        assert_eq!(describe(signalled(40, false)), "signal: signal 40");
    }

    #[test]
    fn a_zero_exit_code_is_there_in_json() {
        let json = serde_json::to_value(event(end_event(ExitStatus::Exited(0)))).unwrap();
        let want = serde_json::json!(
            {"end": {"exitCode": 0, "exited": true, "status": "exit status 0"}}
        );
        assert_eq!(json, want);
    }

    #[test]
    fn the_keepalive_interval_is_whole_seconds() {
        let interval = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(KEEPALIVE_HEADER, value.parse().unwrap());
            keepalive(&headers).as_secs()
        };
        assert_eq!(
            [interval("50"), interval("0"), interval("x"), interval("-1")],
            [50, 90, 90, 90]
        );
        assert_eq!(keepalive(&HeaderMap::new()), DEFAULT_KEEPALIVE);
    }
}
