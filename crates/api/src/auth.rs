//! Who may call: `X-API-Key`, or the same key as `Authorization: Bearer`.

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use http::{
    HeaderMap, StatusCode,
    header::{AUTHORIZATION, ORIGIN},
};

use crate::{AppState, error::ApiError};

/// Whether callers must present a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthMode {
    /// One of the server's keys.
    Key,
    /// Nothing: for a server that only its owner reaches.
    Open,
}

/// Lets a request pass that presents a key.
pub(crate) async fn require_key(
    State(state): State<AppState>,
    request: Request,
    next: Next,
) -> Response {
    match check(&state, request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    }
}

pub(crate) fn check(state: &AppState, headers: &HeaderMap) -> Result<(), ApiError> {
    if state.config.auth == AuthMode::Open {
        // Browsers name the page that asks; programs name none. A page needs no leave to send a
        // simple request, so it is refused here and not only by what it may read.
        if headers.contains_key(ORIGIN) {
            let message = "pages may not call a server that asks for no key";
            return Err(ApiError::new(StatusCode::FORBIDDEN, message));
        }
        return Ok(());
    }
    let refuse = |message: &str| Err(ApiError::new(StatusCode::UNAUTHORIZED, message));
    let Some(key) = presented(headers) else {
        return refuse("an API key is required: send it as X-API-Key or as Authorization: Bearer");
    };
    if state.control.keys.verify(key).is_none() {
        return refuse("this API key is not known to the server, or has been revoked");
    }
    Ok(())
}

fn presented(headers: &HeaderMap) -> Option<&str> {
    if let Some(key) = headers.get("x-api-key") {
        return key.to_str().ok();
    }
    bearer(headers)
}

/// What a caller presents as `Authorization: Bearer`.
pub(crate) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_where_clients_put_them() {
        let with = |name: &'static str, value: &str| {
            HeaderMap::from_iter([(
                http::HeaderName::from_static(name),
                value.parse().expect("value"),
            )])
        };
        assert_eq!(presented(&with("x-api-key", "k")), Some("k"));
        assert_eq!(presented(&with("authorization", "bearer  k ")), Some("k"));
        assert_eq!(presented(&with("authorization", "Basic k")), None);
        assert_eq!(presented(&with("authorization", "k")), None);
        assert_eq!(presented(&HeaderMap::new()), None);
    }
}
