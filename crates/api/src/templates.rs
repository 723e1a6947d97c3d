//! Templates, and how they are built: in the words of E2B's clients, of Cube's, and in our own.

mod build;
mod checks;
mod cube;
mod files;
mod follow;
mod model;
mod read;
mod start;
mod status;
mod tags;

use std::time::Duration;

pub(crate) use self::follow::{BuildEvent, followed};

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
        .routes(routes!(status::status))
        .routes(routes!(status::logs))
        .routes(routes!(start::prepare))
        .routes(routes!(start::start))
        .routes(routes!(start::start_cube))
        .routes(routes!(files::link))
        .routes(routes!(tags::assign))
        .routes(routes!(tags::delete))
        .routes(routes!(tags::list))
        .routes(routes!(tags::count))
        .routes(routes!(tags::exists))
        .routes(routes!(cube::build))
        .routes(routes!(cube::rebuild))
        .routes(routes!(cube::set_alias))
        .layer(deadline(crate::DEADLINE));
    let slow = OpenApiRouter::new()
        .routes(routes!(read::delete))
        .layer(deadline(DELETE_DEADLINE));
    quick.merge(slow)
}

/// Without a key: the URL itself is the permission.
pub(crate) fn open_router() -> OpenApiRouter<AppState> {
    // Without a deadline: an upload takes as long as it takes.
    OpenApiRouter::new().routes(routes!(files::upload))
}

/// Under `/cubicle/v1`.
pub(crate) fn own_router() -> OpenApiRouter<AppState> {
    // Without a deadline: an answer is a stream that ends with the build, an upload takes as long
    // as it takes.
    OpenApiRouter::new()
        .routes(routes!(build::build))
        .routes(routes!(files::present))
        .routes(routes!(files::put))
}
