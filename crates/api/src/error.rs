//! Errors on the wire: always JSON `{"code", "message", "error_code"?}`, with headers that tell a
//! client whether to try again.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use cubicle_control::{Error as Control, fleet::FleetError, volume::Problem};
use http::{HeaderValue, StatusCode, header::RETRY_AFTER};
use serde::Serialize;
use utoipa::ToSchema;

/// Name of the header that tells E2B's clients whether a retry can help.
pub(crate) const SHOULD_RETRY: &str = "should-retry";

/// What E2B's clients tell a guest that does not answer by.
const GUEST_UNRESPONSIVE: &str = "sandbox_snapshot_guest_agent_unresponsive";

/// An answer that is not what was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    status: StatusCode,
    message: String,
    error_code: Option<&'static str>,
    retry: Retry,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retry {
    /// The same request will fail again.
    Never,
    /// It may succeed after this many seconds.
    After(u32),
}

/// Body of every error.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Error)]
pub(crate) struct ErrorBody {
    /// The HTTP status.
    code: u16,
    /// What failed, why, and what to do about it.
    message: String,
    /// A word that programs can rely on.
    #[serde(skip_serializing_if = "Option::is_none")]
    error_code: Option<&'static str>,
}

pub(crate) type ApiResult<T> = Result<T, ApiError>;

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            status,
            message,
            error_code: None,
            retry: Retry::Never,
        }
    }

    /// 400: the request makes no sense.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 400 about one field.
    pub(crate) fn field(field: &str, why: impl std::fmt::Display) -> Self {
        Self::bad_request(format!("{field}: {why}"))
    }

    /// 501: it makes sense, but not to this server.
    pub(crate) fn unsupported(what: &str) -> Self {
        Self::new(
            StatusCode::NOT_IMPLEMENTED,
            format!("{what} is not supported by this server; leave it out"),
        )
    }

    fn code(self, error_code: &'static str) -> Self {
        Self {
            error_code: Some(error_code),
            ..self
        }
    }

    pub(crate) fn retry_after(self, seconds: u32) -> Self {
        Self {
            retry: Retry::After(seconds),
            ..self
        }
    }

    /// 500 whose details are for the server's log only.
    pub(crate) fn internal(error: &dyn std::fmt::Display) -> Self {
        tracing::error!(%error, "a request failed inside the server");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the server failed; its log, under this response's x-request-id, says how",
        )
        .code("internal_server_error")
    }

    /// The same error, as the answer to a create.
    pub(crate) fn of_create(error: Control) -> Self {
        match error {
            Control::Fleet(FleetError::Failed { .. }) | Control::KilledDuringCreate { .. } => {
                tracing::error!(%error, "a sandbox could not be created");
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
                    .code("sandbox_create_failed")
                    .retry_after(1)
            }
            Control::SnapshotLost { .. } => {
                tracing::error!(%error, "a sandbox could not be created");
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
                    .code("sandbox_create_refused")
            }
            error => error.into(),
        }
    }
}

impl ApiError {
    /// The same error, as the answer to a pause: there 409 says that the sandbox is paused already.
    pub(crate) fn of_pause(error: Control) -> Self {
        match error {
            Control::Fleet(FleetError::Unresponsive { .. }) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string())
                    .code(GUEST_UNRESPONSIVE)
                    .retry_after(1)
            }
            error => error.into(),
        }
    }

    /// The error as a part of a larger answer.
    pub(crate) fn into_body(self) -> ErrorBody {
        ErrorBody {
            code: self.status.as_u16(),
            message: self.message,
            error_code: self.error_code,
        }
    }
}

impl From<Control> for ApiError {
    fn from(error: Control) -> Self {
        let status = match &error {
            Control::SandboxNotFound { .. }
            | Control::TemplateNotFound { .. }
            | Control::SnapshotNotFound { .. }
            | Control::VolumeNotFound { .. }
            | Control::BuildNotFound { .. }
            | Control::NotInStore { .. } => StatusCode::NOT_FOUND,
            Control::Invalid { .. } | Control::TemplateNotReady { .. } => StatusCode::BAD_REQUEST,
            Control::HostMountRefused { .. } => StatusCode::FORBIDDEN,
            Control::VolumeToken { .. } => StatusCode::UNAUTHORIZED,
            Control::VolumePath { problem, .. } => match problem {
                Problem::NotFound => StatusCode::NOT_FOUND,
                Problem::Exists => StatusCode::CONFLICT,
                Problem::Full => StatusCode::INSUFFICIENT_STORAGE,
                Problem::Other(_) => return Self::internal(&error),
                _ => StatusCode::BAD_REQUEST,
            },
            Control::Unsupported { .. } => StatusCode::NOT_IMPLEMENTED,
            Control::BuildInProgress { .. }
            | Control::Conflict { .. }
            | Control::SnapshotUnusable { .. }
            | Control::SnapshotInUse { .. }
            | Control::NotInHistory { .. }
            | Control::NameTaken { .. }
            | Control::VolumeInUse { .. }
            | Control::TemplateInUse { .. }
            | Control::Fleet(FleetError::Damaged { .. }) => StatusCode::CONFLICT,
            Control::Busy { .. } | Control::Fleet(FleetError::Busy { .. }) => {
                return Self::new(StatusCode::CONFLICT, error.to_string()).retry_after(1);
            }
            Control::Quota { .. } => StatusCode::TOO_MANY_REQUESTS,
            Control::Fleet(FleetError::Unresponsive { .. }) => {
                return Self::new(StatusCode::CONFLICT, error.to_string()).code(GUEST_UNRESPONSIVE);
            }
            Control::IdempotencyMismatch { .. } => {
                return Self::new(StatusCode::CONFLICT, error.to_string())
                    .code("idempotency_request_mismatch");
            }
            Control::IdempotencyInProgress { .. } => {
                return Self::new(StatusCode::CONFLICT, error.to_string())
                    .code("idempotency_in_progress")
                    .retry_after(1);
            }
            Control::Fleet(FleetError::NoSandbox { id }) => {
                return Control::SandboxNotFound { id: id.clone() }.into();
            }
            Control::Fleet(FleetError::Unsupported { .. }) => StatusCode::NOT_IMPLEMENTED,
            Control::Fleet(FleetError::Capacity { .. }) => {
                return Self::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string())
                    .code("sandbox_capacity_unavailable")
                    .retry_after(2);
            }
            Control::Catalogue { .. } => {
                return Self::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string())
                    .retry_after(30);
            }
            Control::ShuttingDown => {
                return Self::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string())
                    .retry_after(5);
            }
            Control::StepFailed { .. } | Control::Fleet(FleetError::Failed { .. }) => {
                return Self::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
                    .code("internal_server_error");
            }
            Control::Fleet(FleetError::NoSnapshot { .. })
            | Control::KilledDuringCreate { .. }
            | Control::SnapshotLost { .. }
            | Control::Database { .. }
            | Control::Migrate { .. }
            | Control::Volume { .. }
            | Control::Files { .. }
            | Control::Damaged { .. } => return Self::internal(&error),
        };
        Self::new(status, error.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, retry) = (self.status, self.retry);
        let mut response = (status, Json(self.into_body())).into_response();
        let headers = response.headers_mut();
        let should_retry = match retry {
            Retry::Never => "false",
            Retry::After(seconds) => {
                headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
                "true"
            }
        };
        headers.insert(SHOULD_RETRY, HeaderValue::from_static(should_retry));
        response
    }
}
