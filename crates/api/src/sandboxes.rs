//! Sandboxes, in the words of E2B's clients and of Cube's.

mod create;
mod lifetime;
mod model;
mod network;
mod read;

use std::time::Duration;

use utoipa_axum::{router::OpenApiRouter, routes};

pub(crate) use self::read::{backward, level};
use crate::{AppState, envelope::deadline};

/// Time for a request that waits for a VM.
const VM_DEADLINE: Duration = Duration::from_secs(120);

pub(crate) fn router() -> OpenApiRouter<AppState> {
    let quick = OpenApiRouter::new()
        .routes(routes!(read::get))
        .routes(routes!(read::list_running))
        .routes(routes!(read::list))
        .routes(routes!(read::metrics))
        .routes(routes!(read::latest_metrics))
        .routes(routes!(read::logs))
        .routes(routes!(read::logs_v2))
        .routes(routes!(lifetime::set_timeout))
        .routes(routes!(lifetime::refresh));
    let slow = OpenApiRouter::new()
        .routes(routes!(create::create_v1))
        .routes(routes!(create::create_v2))
        .routes(routes!(lifetime::kill))
        .routes(routes!(lifetime::connect_v1))
        .routes(routes!(lifetime::connect_v2))
        .layer(deadline(VM_DEADLINE));
    quick.layer(deadline(crate::DEADLINE)).merge(slow)
}
