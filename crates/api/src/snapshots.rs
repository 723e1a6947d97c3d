//! Snapshots, in the words of E2B's clients and of Cube's. A snapshot is deleted as a template is.

mod create;
mod model;
mod read;

use std::time::Duration;

use utoipa_axum::{router::OpenApiRouter, routes};

pub(crate) use self::{create::create_it, model::SnapshotBody as NewSnapshotBody, read::page_of};
use crate::{AppState, envelope::deadline};

/// Time for an operation that freezes a sandbox.
pub(crate) const FREEZE_DEADLINE: Duration = Duration::from_secs(240);

pub(crate) fn router() -> OpenApiRouter<AppState> {
    let quick = OpenApiRouter::new().routes(routes!(read::list));
    let slow = OpenApiRouter::new()
        .routes(routes!(create::create))
        .layer(deadline(FREEZE_DEADLINE));
    quick.layer(deadline(crate::DEADLINE)).merge(slow)
}
