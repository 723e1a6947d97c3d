//! Our own calls about the past of sandboxes, under `/cubicle/v1`: with every number that there is.

mod model;
mod sandboxes;
mod snapshots;

use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{AppState, envelope::deadline, snapshots::FREEZE_DEADLINE};

pub(crate) fn router() -> OpenApiRouter<AppState> {
    let quick = OpenApiRouter::new()
        .routes(routes!(snapshots::list))
        .routes(routes!(snapshots::get))
        .routes(routes!(snapshots::tree))
        .routes(routes!(snapshots::usage))
        .layer(deadline(crate::DEADLINE));
    let slow = OpenApiRouter::new()
        .routes(routes!(snapshots::create))
        .routes(routes!(snapshots::delete))
        .routes(routes!(snapshots::verify))
        .routes(routes!(sandboxes::pause))
        .routes(routes!(sandboxes::fork))
        .routes(routes!(sandboxes::rollback))
        .layer(deadline(FREEZE_DEADLINE));
    quick.merge(slow)
}
