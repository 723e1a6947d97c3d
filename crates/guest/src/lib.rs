//! The daemon inside the virtual machine.

pub mod proto;
