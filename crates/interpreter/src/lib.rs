//! The code interpreter: runs code of many languages in kernels of Jupyter's, for the clients of
//! E2B's code interpreter. It speaks to the kernels itself; there is no Jupyter server.
//!
//! - [`Interpreter`] owns the contexts; [`Interpreter::router`] serves them.
//! - `context` runs executions, one at a time in each context; `stream` carries what they say.
//! - `kernel` is a running kernel, `process` its process, `wire` and `zmtp` the way to talk to it.
//! - `kernelspec` finds the kernels of an image; `language` is what is special about each language.
//!
//! Invariants:
//! - Without kernels in the image nothing runs, listens or is allocated; with kernels, none is
//!   started before somebody asks.
//! - A kernel's process has one owner. It ends with its context, or with the daemon; what a daemon
//!   that died left behind, the next one ends.
//! - What a client has abandoned is interrupted; a kernel that cannot be is replaced. A context can
//!   always be used again.
//! - Each execution ends with `end_of_execution`, whatever happens to its kernel.
//! - Code that a user has not written shows no output and is not counted.

mod clock;
mod context;
mod error;
mod http;
mod interpreter;
mod kernel;
mod kernelspec;
mod language;
mod output;
mod ports;
mod process;
mod stream;
mod wire;
mod zmtp;

use std::collections::BTreeMap;

pub use error::Error;
pub use interpreter::{ContextInfo, Health, Interpreter, Unit};
pub use kernelspec::Search;
pub use language::Language;
pub use output::{Output, Rich, Text};
pub use zmtp::Error as ConnectionError;

/// Where programs are, unless a kernel is told otherwise.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The sandbox around the interpreter.
pub trait Surroundings: Send + Sync + 'static {
    /// The environment of programs in the sandbox. It may change when the sandbox is restored.
    fn environment(&self) -> BTreeMap<String, String>;

    /// Names the sandbox's life. Another one, after a restore, is another sandbox: random generators
    /// must not go on where those of its siblings do.
    fn life(&self) -> String;
}
