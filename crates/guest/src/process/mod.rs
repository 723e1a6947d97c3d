//! Programs inside the sandbox: `process.Process`.
//!
//! - `spawn` starts a program without copying the daemon.
//! - `launch` says what a request means: as which user, where, with which environment.
//! - `running` is one process: its input, its terminal, its signals.
//! - `supervise` reads what it writes and waits for its end.
//! - `output` hands that on to everybody who follows it, `events` as a stream of messages.
//! - `table` knows every process by pid and by tag.
//!
//! Invariants:
//! - A process belongs to nobody: whoever follows it may go, and it runs on. Only its own end, a
//!   signal or the deadline of the call that started it ends it.
//! - The end event comes exactly once to every follower, after all output of the process.
//! - Output is neither lost nor kept without bound: a follower that doesn't read makes the process
//!   wait.
//! - Every process leads a session of its own, so that a signal reaches what it started, too.

mod error;
mod events;
mod launch;
mod output;
mod running;
mod service;
mod spawn;
mod supervise;
mod table;

#[cfg(test)]
mod tests;

pub use error::Error;
pub use service::Processes;
