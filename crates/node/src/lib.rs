//! The node: owner of every VM, slot and volume on one machine.
//!
//! A [`Node`] is put together from a hypervisor driver, a store of snapshots and a pool of network
//! slots, none of which knows the others. It makes sandboxes from snapshots ([`Node::create`]),
//! snapshots from sandboxes ([`Node::snapshot`], [`Node::pause`]), puts a snapshot in the place of a
//! running VM ([`Node::rollback`]), makes snapshots from images ([`Node::build_template`]), carries requests and streams into guests
//! ([`Node::request`], [`Node::connect`]), and takes everything apart again ([`Node::kill`]). It holds
//! facts; what ought to be is decided above it.
//!
//! Invariants:
//! - There is one way to freeze a VM (`freeze`) and one to restore a snapshot (`restore`). A VM is
//!   booted in one place only, the template build.
//! - A sandbox is owned by one task, which alone changes its stage and holds what it holds. So a
//!   kill is legal whenever and always works, and creates and kills that race have one order.
//! - Whatever is taken is released on every path: success, failure, panic, a caller that goes away,
//!   `kill -9` of this process. A row of the journal exists from before the first resource of an
//!   instance is taken until after the last is given back.
//! - No code of a user runs in a restored VM before its guest has taken on the new identity: clock,
//!   entropy, ids, environment, token.
//! - When a VM's life ends, every stream into it fails; none survives into the next generation.

mod adopt;
mod config;
mod create;
mod error;
mod facts;
mod failpoint;
mod freeze;
mod guest;
mod holdings;
mod journal;
mod kill;
mod link;
mod memory;
mod metrics;
mod node;
mod program;
mod registry;
mod restore;
mod rollback;
mod sandbox;
mod shares;
mod slots;
mod snapshot;
mod spares;
mod strays;
mod template;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use config::{Deadlines, GuestDefaults, NodeConfig, NodeLimits, SparePolicy};
pub use error::{Error, Result};
pub use facts::{
    AdoptionReport, BootFiles, Capacity, CreateSandbox, Created, KillOutcome, NodeEvent,
    PhaseTimings, SandboxFact, SandboxMetrics, SandboxState, Shape, SlotCounts, SpareCounts,
    TakeSnapshot, Taken,
};
#[cfg(any(test, feature = "failpoints"))]
pub use failpoint::{FailPoints, Failure};
pub use freeze::FreezeTimings;
pub use link::{Body, BoxError, GuestStream, empty_body, full_body};
pub use node::Node;
pub use program::{Printed, ProgramEnd, RunProgram};
pub use template::{BuiltTemplate, ImageSource, TemplateBuild, TemplateImage, WarmUp};
