//! The HTTP control plane: E2B's dialect, Cube's dialect, and our own, over one set of services.
//!
//! [`router`] answers at `/` and, the same, under `/cubeapi/v1`; what no client of others knows is
//! under `/cubicle/v1`. The crate translates: it parses what clients send, calls
//! [`cubicle_control`], and words the answer. It holds no state of its own but counters.
//!
//! Invariants:
//! - Every answer carries `x-request-id`; every error is JSON `{code, message, error_code?}` and says
//!   with `Should-Retry` whether trying again can help.
//! - A field that is accepted does what it says. What is not there yet is refused with 501, never
//!   ignored; a field that nobody knows is ignored, as clients of newer versions expect.
//! - Ids are parsed at the edge; past it no text from a path is used as a name.
//! - `GET /health` and `GET /openapi.json` need no key; `GET /metrics` needs one unless
//!   [`ApiConfig::open_metrics`] is set; everything else needs one unless [`AuthMode::Open`] is.

mod auth;
mod envelope;
mod error;
mod extract;
mod filter;
mod measure;
mod observe;
mod openapi;
mod own;
mod sandboxes;
mod snapshots;
mod store;
mod system;
mod templates;
mod timing;
mod volumes;

use std::{sync::Arc, time::Duration};

use axum::{Router, middleware};
use cubicle_control::Control;
use http::HeaderName;
use prometheus_client::registry::Registry;
use tower_http::cors::{Any, CorsLayer};

pub use self::{auth::AuthMode, openapi::openapi};
use self::{envelope::envelope, observe::Metrics};

/// Time for an ordinary request.
const DEADLINE: Duration = Duration::from_secs(30);

/// How the API is set up.
#[derive(Debug, Clone)]
pub struct ApiConfig {
    /// Whether callers need a key.
    pub auth: AuthMode,
    /// Whether `/metrics` needs none. Right for a server that listens on the loopback only.
    pub open_metrics: bool,
    /// Ports of sandboxes are at `<port>-<sandboxID>.<domain>`; it may end in `:port`. Clients
    /// that are told none use their own setting.
    pub domain: Option<String>,
    /// Name of this node, told to clients as `clientID`.
    pub node_id: String,
    /// What the server was built from, if that is known.
    pub commit: Option<&'static str>,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            auth: AuthMode::Key,
            open_metrics: false,
            domain: None,
            node_id: "local".to_owned(),
            commit: None,
        }
    }
}

/// What requests are answered from. Cheap to clone.
#[derive(Clone)]
pub struct AppState {
    control: Control,
    config: Arc<ApiConfig>,
    metrics: Metrics,
}

impl AppState {
    /// A server over these services. `register` adds metrics of others to `/metrics`, whose names
    /// begin with `cubicle_` too.
    #[must_use]
    pub fn new(control: Control, config: ApiConfig, register: impl FnOnce(&mut Registry)) -> Self {
        let metrics = Metrics::new(&control, register);
        Self {
            control,
            config: Arc::new(config),
            metrics,
        }
    }
}

/// The control plane.
pub fn router(state: AppState) -> Router {
    let (api, _) = openapi::parts();
    let protect = || middleware::from_fn_with_state(state.clone(), auth::require_key);
    let cube = api.shared.clone().merge(api.cluster).route_layer(protect());
    let own = api.own.route_layer(protect());
    let root = api
        .shared
        .route_layer(protect())
        .merge(api.open.clone())
        .merge(openapi::route())
        .nest("/cubeapi/v1", cube.merge(api.open))
        .nest("/cubicle/v1", own)
        .fallback(envelope::not_found)
        .method_not_allowed_fallback(envelope::wrong_method)
        .layer(middleware::from_fn_with_state(state.clone(), envelope));
    let root = match state.config.auth {
        AuthMode::Key => root.layer(cors()),
        // Without a key, any page that somebody on this machine opens could use the server.
        AuthMode::Open => root,
    };
    root.with_state(state)
}

/// Browsers may call from anywhere: a key, not an origin, is what gives access.
fn cors() -> CorsLayer {
    const EXPOSED: [&str; 6] = [
        "x-request-id",
        "x-next-token",
        "x-total-running",
        "server-timing",
        "retry-after",
        "should-retry",
    ];
    CorsLayer::new()
        .allow_origin(Any)
        .allow_methods(Any)
        .allow_headers(Any)
        .expose_headers(
            EXPOSED
                .into_iter()
                .chain(timing::COST)
                .map(HeaderName::from_static)
                .collect::<Vec<_>>(),
        )
}
