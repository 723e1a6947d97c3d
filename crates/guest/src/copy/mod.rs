//! Files that a template's build puts into its image: an archive, placed as a Dockerfile's COPY
//! would. Nothing of the image is needed for it.

mod place;

use std::{io, sync::Arc};

use axum::{
    body::Body,
    extract::{Query, State as Shared},
    response::{IntoResponse as _, Response},
};
use cubicle_protocol::guest_api::CopyQuery;
use futures::TryStreamExt as _;
use http::StatusCode;
use tokio_util::io::{StreamReader, SyncIoBridge};

use self::place::Placer;
use crate::{access::State, blocking::blocking, http::ApiError};

/// `POST /copy`: 204 once all of it is in place. What was placed before an error stays.
pub(crate) async fn serve(
    Shared(state): Shared<Arc<State>>,
    Query(query): Query<CopyQuery>,
    body: Body,
) -> Result<Response, ApiError> {
    let refused = |why: String| ApiError::new(StatusCode::BAD_REQUEST, why);
    let owner = state
        .user(Some(&query.owner))
        .map_err(|error| refused(error.to_string()))?;
    let placer = Placer::new(&query, (owner.uid, owner.gid)).map_err(refused)?;
    let stream = body.into_data_stream().map_err(io::Error::other);
    let reader = SyncIoBridge::new(StreamReader::new(Box::pin(stream)));
    let placed = blocking(move || placer.place(tar::Archive::new(reader))).await;
    placed.map_err(|error| refused(format!("cannot copy {}: {error}", query.src)))?;
    Ok(StatusCode::NO_CONTENT.into_response())
}
