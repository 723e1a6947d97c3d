//! Files of `COPY` steps: where a client uploads them, and the upload.

use axum::{Json, body::Body, extract::State};
use cubicle_control::template::FilesHash;
use futures::TryStreamExt as _;
use http::{HeaderMap, StatusCode, Uri, header::HOST};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{Query, Segment, Segments},
};

/// Where files go.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = TemplateBuildFileUpload)]
pub(crate) struct UploadBody {
    /// Whether the server has them already.
    present: bool,
    /// Where to `PUT` them, as a tar archive with or without gzip. The URL holds for an hour and
    /// needs no key.
    url: String,
}

/// Whether the server has files.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = BuildFiles)]
pub(crate) struct PresentBody {
    /// Whether it has them.
    present: bool,
}

/// Where to upload the files of a step
#[utoipa::path(
    get, path = "/templates/{templateID}/files/{hash}", tag = "templates",
    params(
        ("templateID" = String, Path),
        ("hash" = String, Path, description = "SHA-256 of the files, in hex"),
    ),
    responses(
        (status = 201, body = UploadBody),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn link(
    State(state): State<AppState>,
    Segments(template, hash): Segments,
    uri: Uri,
    headers: HeaderMap,
) -> ApiResult<(StatusCode, Json<UploadBody>)> {
    let hash = parse(&hash)?;
    let templates = &state.control.templates;
    let template = templates.get(&template).await?.id;
    let token = templates.upload_token(&template, &hash);
    let origin = origin(&uri, &headers)?;
    let body = UploadBody {
        present: templates.has_files(&hash).await?,
        url: format!("{origin}/templates/{template}/files/{hash}?token={token}"),
    };
    Ok((StatusCode::CREATED, Json(body)))
}

/// Upload the files of a step
///
/// To the URL that was given for it. The archive replaces one that was uploaded before.
#[utoipa::path(
    put, path = "/templates/{templateID}/files/{hash}", tag = "templates", security(()),
    params(
        ("templateID" = String, Path), ("hash" = String, Path),
        ("token" = String, Query, description = "Part of the URL that was given"),
    ),
    request_body(content = Vec<u8>, content_type = "application/octet-stream",
                 description = "A tar archive, with or without gzip"),
    responses(
        (status = 200, description = "The server has them"),
        (status = 400, body = ErrorBody),
        (status = 403, body = ErrorBody, description = "The URL is not or no longer valid"),
    ),
)]
pub(crate) async fn upload(
    State(state): State<AppState>,
    Segments(template, hash): Segments,
    query: Query,
    body: Body,
) -> ApiResult<StatusCode> {
    let hash = parse(&hash)?;
    let templates = &state.control.templates;
    let token = query.text("token")?.unwrap_or_default();
    let allowed = template
        .parse()
        .is_ok_and(|template| templates.check_upload_token(&template, &hash, token));
    if !allowed {
        let message = "this upload URL is not valid, or no longer; ask for another";
        return Err(ApiError::new(StatusCode::FORBIDDEN, message));
    }
    receive(&state, &hash, body).await
}

/// Whether the server has files
#[utoipa::path(
    get, path = "/files/{hash}", tag = "cubicle",
    params(("hash" = String, Path, description = "SHA-256 of the files, in hex")),
    responses(
        (status = 200, body = PresentBody),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    ),
)]
pub(crate) async fn present(
    State(state): State<AppState>,
    Segment(hash): Segment,
) -> ApiResult<Json<PresentBody>> {
    let present = state.control.templates.has_files(&parse(&hash)?).await?;
    Ok(Json(PresentBody { present }))
}

/// Upload files for steps
#[utoipa::path(
    put, path = "/files/{hash}", tag = "cubicle",
    params(("hash" = String, Path, description = "SHA-256 of the files, in hex")),
    request_body(content = Vec<u8>, content_type = "application/octet-stream",
                 description = "A tar archive, with or without gzip"),
    responses(
        (status = 200, description = "The server has them"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    ),
)]
pub(crate) async fn put(
    State(state): State<AppState>,
    Segment(hash): Segment,
    body: Body,
) -> ApiResult<StatusCode> {
    receive(&state, &parse(&hash)?, body).await
}

async fn receive(state: &AppState, hash: &FilesHash, body: Body) -> ApiResult<StatusCode> {
    let body = body.into_data_stream().map_err(std::io::Error::other);
    state.control.templates.put_files(hash, body).await?;
    Ok(StatusCode::OK)
}

fn parse(hash: &str) -> ApiResult<FilesHash> {
    hash.parse().map_err(|why| ApiError::field("hash", why))
}

/// Where the client has reached this server, as far as the request tells.
fn origin(uri: &Uri, headers: &HeaderMap) -> ApiResult<String> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let scheme = match text("x-forwarded-proto") {
        Some("https") => "https",
        _ => "http",
    };
    let host = text("x-forwarded-host")
        .or_else(|| uri.authority().map(http::uri::Authority::as_str))
        .or_else(|| text(HOST.as_str()))
        .unwrap_or_default();
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b);
    if host.is_empty() || !host.bytes().all(allowed) {
        let message = "the request's Host does not say how this server is reached";
        return Err(ApiError::bad_request(message));
    }
    Ok(format!("{scheme}://{host}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uploads_go_where_the_request_came() {
        let origin = |uri: &str, pairs: &[(&'static str, &str)]| {
            let headers = pairs.iter().map(|(name, value)| {
                let name = http::HeaderName::from_static(name);
                (name, value.parse().expect("a value"))
            });
            origin(&uri.parse().expect("a URI"), &headers.collect()).ok()
        };
        assert_eq!(
            origin("/x", &[("host", "127.0.0.1:3000")]).as_deref(),
            Some("http://127.0.0.1:3000")
        );
        assert_eq!(
            origin("http://[::1]:3000/x", &[]).as_deref(),
            Some("http://[::1]:3000")
        );
        let proxied = [
            ("host", "10.0.0.1"),
            ("x-forwarded-host", "api.example"),
            ("x-forwarded-proto", "https"),
        ];
        assert_eq!(
            origin("/x", &proxied).as_deref(),
            Some("https://api.example")
        );
        assert_eq!(origin("/x", &[]), None);
        assert_eq!(origin("/x", &[("host", "a/b")]), None);
    }
}
