//! The rules: what a slot lets through, and what the host does.
//!
//! Two lines of defence, each sufficient for what it forbids. The first is in the slot's own
//! namespace and knows the sandbox's policy; the second is on the host, knows no sandbox, and
//! holds whatever happens in a slot.

pub(crate) mod host;
pub(crate) mod slot;
