//! The data plane: carries requests from outside to ports inside sandboxes.
//!
//! It shares a listener with the API. [`Proxy::classify`] tells from the head of a request whether
//! it is meant for a sandbox, and [`Proxy::serve`] answers it; [`intercept`] is both as a middleware.
//! A request names its sandbox in one of four ways (see [`Target`]). Requests to the guest daemon's
//! port travel as HTTP/2 over the sandbox's channel; for any other port, a connection to the guest's
//! localhost is opened through the channel and spoken to in HTTP/1.1.
//!
//! Invariants:
//! - Bodies are streamed both ways, chunk by chunk; nothing is collected.
//! - A connection into a sandbox is only reused within one generation of it.
//! - Only the guest daemon's public routes are reachable, whatever a path is spelled like; the calls
//!   that belong to the host never leave it.
//! - When a sandbox dies, the responses that it was sending break off; they do not end as if they
//!   were complete.
//! - A request for a paused sandbox waits while the routing table wakes it, if it does that.
//! - A request that a rollback or a resume comes between ends at once: it is sent to the new life, or
//!   answered with one error that says that it can be sent again.
//! - A request is sent twice only if it did not reach the sandbox, or if sending it twice is
//!   harmless and it had no body.

mod attempt;
mod envd;
mod forward;
mod headers;
mod metrics;
mod ports;
mod proxy;
mod reply;
mod rewrite;
mod route;
mod routes;
mod upgrade;
mod upstream;

pub use metrics::{Metrics, MetricsSnapshot};
pub use proxy::{Proxy, intercept};
pub use route::{Refusal, Route, SignedFile, Target, Via};
pub use routes::{Availability, FileOperation, NotWoken, Routes, SandboxRoute};
pub use upstream::{GuestIo, Upstream, UpstreamError};
