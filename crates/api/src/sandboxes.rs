//! Sandboxes, in the words of E2B's clients and of Cube's.

mod branch;
mod create;
mod lifetime;
mod model;
mod network;
mod pause;
mod read;

use std::time::Duration;

use utoipa_axum::{router::OpenApiRouter, routes};

pub(crate) use self::{
    branch::{fork_it, rollback_it},
    model::{ForkBody, ForkResult, PauseBody, RollbackBody, reference},
    pause::pause_it,
    read::{backward, is_e2b, level},
};
use crate::{AppState, envelope::deadline, snapshots::FREEZE_DEADLINE};

/// Time for a request that waits for a VM.
const VM_DEADLINE: Duration = Duration::from_secs(120);

pub(crate) fn router() -> OpenApiRouter<AppState> {
    let quick = OpenApiRouter::new()
        .routes(routes!(read::get))
        .routes(routes!(read::list_all))
        .routes(routes!(read::list))
        .routes(routes!(read::metrics))
        .routes(routes!(read::latest_metrics))
        .routes(routes!(read::logs))
        .routes(routes!(read::logs_v2))
        .routes(routes!(lifetime::set_timeout))
        .routes(routes!(lifetime::refresh))
        .routes(routes!(network::update));
    let slow = OpenApiRouter::new()
        .routes(routes!(create::create_v1))
        .routes(routes!(create::create_v2))
        .routes(routes!(lifetime::kill))
        .routes(routes!(pause::resume))
        .routes(routes!(pause::connect_v1))
        .routes(routes!(pause::connect_v2))
        .layer(deadline(VM_DEADLINE));
    let slowest = OpenApiRouter::new()
        .routes(routes!(pause::pause))
        .routes(routes!(branch::fork))
        .routes(routes!(branch::rollback))
        .layer(deadline(FREEZE_DEADLINE));
    let quick = quick.layer(deadline(crate::DEADLINE));
    quick.merge(slow).merge(slowest)
}
