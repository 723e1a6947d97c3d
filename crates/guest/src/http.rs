//! The daemon's HTTP surface: what is served where, and how errors look.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, FromRef, Request, State as Shared},
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use connectrpc::{ConnectRpcService, Limits};
use cubicle_protocol::{guest_api, share::SHARES_PATH};
use futures::FutureExt as _;
use http::StatusCode;
use serde::Serialize;
use tower::ServiceExt as _;
use tower_http::cors::{Any, CorsLayer};

use crate::{
    access::{self, State},
    channel::Introduce,
    copy, files,
    filesystem::Filesystem,
    proto::filesystem::FilesystemExt as _,
    share, system,
};

/// Largest RPC message, in bytes. Input for programs comes in one message at a time; files have
/// routes of their own that know no limit.
const MAX_MESSAGE_SIZE: usize = 64 << 20;

/// Everything that the daemon serves over HTTP. Both routers share one state, one table of
/// processes and one set of watchers.
#[derive(Clone)]
pub struct Api {
    state: Arc<State>,
    rpc: ConnectRpcService,
}

impl Api {
    /// Adds the file system service and the plain routes to the given RPC services.
    #[must_use]
    pub fn new(state: Arc<State>, services: connectrpc::Router) -> Self {
        let services = Arc::new(Filesystem::new(Arc::clone(&state))).register(services);
        let limits = Limits::default()
            .with_max_request_body_size(MAX_MESSAGE_SIZE)
            .with_max_message_size(MAX_MESSAGE_SIZE);
        // Deadlines of streams are the services' own business: one that passes has consequences
        // (a program is killed) which dropping the stream hasn't.
        Self {
            state,
            rpc: services.into_axum_service().with_limits(limits),
        }
    }

    /// What everybody may ask for who has the access token.
    pub fn public_router(&self) -> Router {
        self.routes()
            .layer(middleware::from_fn_with_state(
                Arc::clone(&self.state),
                access::require_token,
            ))
            .layer(
                CorsLayer::new()
                    .allow_origin(Any)
                    .allow_methods(Any)
                    .allow_headers(Any)
                    .expose_headers(Any),
            )
    }

    /// The same without a token, and what only the host may ask for. Requests of others must not
    /// get here.
    pub fn host_router(&self) -> Router {
        Router::new()
            .route(&format!("{SHARES_PATH}/{{tag}}"), post(share::serve))
            .route(guest_api::SYNC_PATH, post(system::sync))
            .method_not_allowed_fallback(wrong_method)
            .layer(DefaultBodyLimit::max(MAX_MESSAGE_SIZE))
            // An archive is as long as it is, and never held as a whole.
            .route(guest_api::COPY_PATH, post(copy::serve))
            .with_state(self.clone())
            .merge(self.routes())
    }

    /// What the host says first, and its answer.
    pub fn introduce(&self) -> Introduce {
        let state = Arc::clone(&self.state);
        Arc::new(move |request| {
            let state = Arc::clone(&state);
            async move { system::introduce(&state, request).await }.boxed()
        })
    }

    fn routes(&self) -> Router {
        Router::new()
            .route("/health", get(system::health))
            .route("/metrics", get(system::metrics))
            .route("/envs", get(system::envs))
            .route("/files", get(files::download).post(files::upload))
            .route("/files/compose", post(files::compose))
            .method_not_allowed_fallback(wrong_method)
            .fallback(rpc_or_nothing)
            .with_state(self.clone())
    }
}

impl FromRef<Api> for Arc<State> {
    fn from_ref(api: &Api) -> Self {
        Arc::clone(&api.state)
    }
}

/// Takes what no route takes: calls of the RPC services.
async fn rpc_or_nothing(Shared(api): Shared<Api>, request: Request) -> Response {
    if !api.rpc.dispatcher().has_method(request.uri().path()) {
        return ApiError::new(StatusCode::NOT_FOUND, "no such route").into_response();
    }
    match api.rpc.oneshot(request).await {
        Ok(response) => response.into_response(),
        Err(never) => match never {},
    }
}

async fn wrong_method() -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "this route doesn't take this method",
    )
}

/// An error as JSON: `{"code": 404, "message": "..."}`, with the code as HTTP status too.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    message: String,
}

impl ApiError {
    /// An error of that status; the message is for a person.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }
}

impl From<access::Error> for ApiError {
    fn from(error: access::Error) -> Self {
        Self::new(error.status(), error.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        #[derive(Serialize)]
        struct Body {
            code: u16,
            message: String,
        }
        let body = Body {
            code: self.status.as_u16(),
            message: self.message,
        };
        (self.status, Json(body)).into_response()
    }
}
