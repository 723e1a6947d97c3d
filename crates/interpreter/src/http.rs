//! The interpreter's HTTP surface, as E2B's clients know it. Errors are plain text.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, Path, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::{Deserialize, de::DeserializeOwned};
use tower_http::cors::{Any, CorsLayer};

use crate::{ContextInfo, Error, Health, Interpreter, Language};

/// Largest request, in bytes: nearly all of it is code.
const MAX_REQUEST: usize = 64 << 20;

#[derive(Deserialize)]
struct Execute {
    code: String,
    context_id: Option<String>,
    language: Option<String>,
    env_vars: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct Create {
    cwd: Option<String>,
    language: Option<String>,
}

impl Interpreter {
    /// What is served on the interpreter's port.
    pub fn router(self: &Arc<Self>) -> Router {
        Router::new()
            .route("/health", get(health))
            .route("/execute", post(execute))
            .route("/contexts", get(list).post(create))
            .route("/contexts/{id}", axum::routing::delete(remove))
            .route("/contexts/{id}/restart", post(restart))
            .layer(DefaultBodyLimit::max(MAX_REQUEST))
            .layer(
                CorsLayer::new()
                    .allow_origin(Any)
                    .allow_methods(Any)
                    .allow_headers(Any),
            )
            .with_state(Arc::clone(self))
    }
}

async fn health(State(interpreter): State<Arc<Interpreter>>) -> Response {
    match interpreter.health() {
        Health::Ready => Json("OK").into_response(),
        Health::Starting => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the kernels are being started",
        )
            .into_response(),
        Health::Failed(reason) => (StatusCode::INTERNAL_SERVER_ERROR, reason).into_response(),
    }
}

async fn execute(
    State(interpreter): State<Arc<Interpreter>>,
    body: Bytes,
) -> Result<Response, Refusal> {
    let request: Execute = parse(&body)?;
    let output = interpreter
        .execute(
            request.code,
            filled(request.context_id.as_deref()),
            filled(request.language.as_deref()),
            request.env_vars.unwrap_or_default(),
        )
        .await?;
    let kind = HeaderValue::from_static("application/x-ndjson");
    let body = Body::from_stream(output.into_stream());
    Ok(([(header::CONTENT_TYPE, kind)], body).into_response())
}

async fn create(
    State(interpreter): State<Arc<Interpreter>>,
    body: Bytes,
) -> Result<Json<ContextInfo>, Refusal> {
    let request: Create = parse(&body)?;
    let language = Language::parse(&request.language.unwrap_or_default());
    let cwd = filled(request.cwd.as_deref()).map(PathBuf::from);
    Ok(Json(interpreter.create(&language, cwd).await?))
}

async fn list(State(interpreter): State<Arc<Interpreter>>) -> Json<Vec<ContextInfo>> {
    Json(interpreter.list())
}

async fn restart(
    State(interpreter): State<Arc<Interpreter>>,
    Path(id): Path<String>,
) -> Result<Json<()>, Refusal> {
    Ok(Json(interpreter.restart(&id).await?))
}

async fn remove(
    State(interpreter): State<Arc<Interpreter>>,
    Path(id): Path<String>,
) -> Result<Json<()>, Refusal> {
    Ok(Json(interpreter.remove(&id).await?))
}

/// Why a request is not served.
enum Refusal {
    Error(Error),
    Request(String),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Self::Error(error) => (error.status(), error.to_string()).into_response(),
            Self::Request(reason) => (StatusCode::UNPROCESSABLE_ENTITY, reason).into_response(),
        }
    }
}

/// The body as JSON, whatever type it says that it has.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body)
        .map_err(|error| Refusal::Request(format!("invalid request: {error}")))
}

fn filled(text: Option<&str>) -> Option<&str> {
    text.filter(|text| !text.is_empty())
}
