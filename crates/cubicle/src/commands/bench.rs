//! `cubicle bench`: how fast the running server is on this machine, phase by phase.
//!
//! Every number is taken from outside, at the HTTP client, except the phases and what only the
//! server can count, such as the time for which a sandbox stood still. A run names the machine, the
//! accelerator and the version, since a number without them means nothing.

mod create;
mod guest;
mod machine;
mod matrix;
mod operations;
mod page;
mod peers;
mod report;
mod summary;

use crate::{
    cli::{Bench, Global},
    error::Error,
};

pub(crate) async fn run(global: &Global, command: Bench) -> Result<(), Error> {
    match command {
        Bench::Create(options) => create::create(global, options).await,
        Bench::Snapshot(options) => matrix::run(global, options, operations::Snapshot).await,
        Bench::Clone(options) => matrix::run(global, options, operations::Clone).await,
        Bench::Rollback(options) => matrix::run(global, options, operations::Rollback).await,
        Bench::Pause(options) => matrix::run(global, options, operations::Pause).await,
        Bench::Page { files } => page::print(&files),
    }
}
