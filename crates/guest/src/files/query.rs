use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::extract::{FromRequestParts, Query};
use http::{HeaderMap, request::Parts};
use serde::Deserialize;

use super::Error;
use crate::{
    access::{self, Access, Operation, Settings, State, TOKEN_HEADER},
    http::ApiError,
};

/// The query of `/files`.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct FileQuery {
    pub(super) path: Option<String>,
    username: Option<String>,
    signature: Option<String>,
    signature_expiration: Option<i64>,
}

impl<S: Sync> FromRequestParts<S> for FileQuery {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        match Query::try_from_uri(&parts.uri) {
            Ok(Query(query)) => Ok(query),
            Err(error) => Err(Error::Query(error.body_text()).into()),
        }
    }
}

impl FileQuery {
    /// The user that the query names; an empty name is none.
    pub(super) fn username(&self) -> Option<&str> {
        self.username.as_deref().filter(|name| !name.is_empty())
    }

    /// Checks that the request carries the token or is signed, and returns the settings by which
    /// that was judged.
    pub(super) fn authorize(
        &self,
        state: &State,
        headers: &HeaderMap,
        operation: Operation,
    ) -> Result<Arc<Settings>, access::Error> {
        let settings = state.settings();
        let Some(token) = &settings.access_token else {
            return Ok(settings);
        };
        let given = headers.get(TOKEN_HEADER).map(http::HeaderValue::as_bytes);
        if let Some(given) = given.filter(|given| !given.is_empty()) {
            return if token.matches(given) {
                Ok(settings)
            } else {
                Err(access::Error::WrongToken)
            };
        }
        let signature = self
            .signature
            .as_deref()
            .ok_or(access::Error::MissingSignature)?;
        let access = Access {
            path: self.path.as_deref().unwrap_or_default(),
            operation,
            user: self.username.as_deref().unwrap_or_default(),
            expiration: self.signature_expiration,
        };
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        token.verify(
            &access,
            signature,
            i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        )?;
        Ok(settings)
    }
}
