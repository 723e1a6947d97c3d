//! Templates, in the words of E2B's clients and of Cube's, and how to build one in our own.

mod build;
mod model;
mod read;

use std::time::Duration;

use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{AppState, envelope::deadline};

/// Time for a deletion, which removes files.
const DELETE_DEADLINE: Duration = Duration::from_secs(240);

pub(crate) fn router() -> OpenApiRouter<AppState> {
    let quick = OpenApiRouter::new()
        .routes(routes!(read::list))
        .routes(routes!(read::list_v2))
        .routes(routes!(read::defaults))
        .routes(routes!(read::get))
        .routes(routes!(read::update))
        .routes(routes!(read::update_v2))
        .routes(routes!(read::alias))
        .routes(routes!(read::build_status))
        .routes(routes!(read::build_logs))
        .layer(deadline(crate::DEADLINE));
    let slow = OpenApiRouter::new()
        .routes(routes!(read::delete))
        .layer(deadline(DELETE_DEADLINE));
    quick.merge(slow)
}

/// Under `/cubicle/v1`.
pub(crate) fn own_router() -> OpenApiRouter<AppState> {
    // Without a deadline: the answer is a stream that ends with the build.
    OpenApiRouter::new().routes(routes!(build::build))
}
