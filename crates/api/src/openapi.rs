//! The description of the API, made from the handlers themselves.

use axum::{Json, Router, routing::get};
use utoipa::{
    Modify, OpenApi,
    openapi::{
        Server,
        security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};
use utoipa_axum::router::OpenApiRouter;

use crate::{AppState, measure, own, sandboxes, snapshots, store, system, templates, volumes};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Cubicle",
        description = "Sandboxes for AI agents. Speaks to E2B's and to Cube's clients; what is \
                       under /cubicle/v1 is our own.",
    ),
    tags(
        (name = "sandboxes", description = "Sandboxes: create, find, keep, kill"),
        (name = "snapshots", description = "The past of sandboxes"),
        (name = "volumes", description = "Directories that outlive sandboxes"),
        (name = "templates", description = "What sandboxes are made from"),
        (name = "cluster", description = "Machines; under /cubeapi/v1 only"),
        (name = "cubicle", description = "Our own"),
        (name = "system", description = "The server itself"),
    ),
    security(("key" = []), ("bearer" = [])),
    modifiers(&Schemes),
)]
struct Description;

struct Schemes;

impl Modify for Schemes {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let components = openapi.components.get_or_insert_default();
        let key = ApiKey::Header(ApiKeyValue::new("X-API-Key"));
        components.add_security_scheme("key", SecurityScheme::ApiKey(key));
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
        openapi.servers = Some(vec![Server::new("/")]);
    }
}

/// The API in the parts that are mounted apart.
pub(crate) struct Parts {
    /// At `/` and under `/cubeapi/v1`, with a key.
    pub(crate) shared: Router<AppState>,
    /// The same without one.
    pub(crate) open: Router<AppState>,
    /// Under `/cubeapi/v1` only.
    pub(crate) cluster: Router<AppState>,
    /// Under `/cubicle/v1`.
    pub(crate) own: Router<AppState>,
}

pub(crate) fn parts() -> (Parts, utoipa::openapi::OpenApi) {
    let mut description = Description::openapi();
    let mut split = |router: OpenApiRouter<AppState>, prefix: &str| {
        let (router, part) = router.split_for_parts();
        if prefix.is_empty() {
            description.merge(part);
        } else {
            description = std::mem::take(&mut description).nest(prefix, part);
        }
        router
    };
    let parts = Parts {
        shared: split(
            sandboxes::router()
                .merge(snapshots::router())
                .merge(templates::router())
                .merge(store::router())
                .merge(volumes::router()),
            "",
        ),
        open: split(
            system::open_router()
                .merge(templates::open_router())
                .merge(volumes::open_router()),
            "",
        ),
        cluster: split(system::cluster_router(), "/cubeapi/v1"),
        own: split(
            system::own_router()
                .merge(templates::own_router())
                .merge(store::own_router())
                .merge(measure::own_router())
                .merge(own::router()),
            "/cubicle/v1",
        ),
    };
    (parts, description)
}

/// The description of the API, in OpenAPI 3.1.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    parts().1
}

pub(crate) fn route() -> Router<AppState> {
    Router::new().route("/openapi.json", get(|| async { Json(openapi()) }))
}
