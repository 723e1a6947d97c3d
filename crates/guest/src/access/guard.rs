use std::sync::Arc;

use axum::{
    extract::{Request, State as Shared},
    http::{HeaderMap, Method, header::AUTHORIZATION},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};

use super::{Error, State};
use crate::http::ApiError;

/// The header that carries the access token.
pub(crate) const TOKEN_HEADER: &str = "x-access-token";

/// Middleware: refuses requests without the sandbox's access token, if it has one.
///
/// `GET /health` needs none; `GET` and `POST /files` also accept a signature and check by
/// themselves.
pub async fn require_token(
    Shared(state): Shared<Arc<State>>,
    request: Request,
    next: Next,
) -> Response {
    let exempt = matches!(
        (request.method(), request.uri().path()),
        (&Method::GET, "/health" | "/files") | (&Method::POST, "/files")
    );
    if !exempt && let Some(token) = &state.settings().access_token {
        let given = request.headers().get(TOKEN_HEADER);
        if !given.is_some_and(|given| token.matches(given.as_bytes())) {
            return ApiError::from(Error::Unauthorized).into_response();
        }
    }
    next.run(request).await
}

/// The user that a call names by HTTP basic authentication; the password means nothing.
pub(crate) fn caller(headers: &HeaderMap) -> Option<String> {
    let (scheme, credentials) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(BASE64_STANDARD.decode(credentials.trim()).ok()?).ok()?;
    // Up to the last colon, so that there is room for a group; passwords there are none.
    Some(decoded.rsplit_once(':')?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caller_is_the_user_of_basic_authentication() {
        let caller = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, value.parse().unwrap());
            caller(&headers)
        };
        assert_eq!(caller("Basic cm9vdDo=").as_deref(), Some("root"));
        assert_eq!(caller("basic dXNlcjpwYXNz").as_deref(), Some("user"));
        assert_eq!(caller("Basic Og==").as_deref(), Some(""));
        for other in ["Bearer cm9vdDo=", "Basic", "Basic ???", "Basic cm9vdA=="] {
            assert_eq!(caller(other), None, "{other}");
        }
    }
}
