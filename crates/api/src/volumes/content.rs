//! The content of a volume, in the words of E2B's clients: what its `Volume` reads and writes without
//! a sandbox. Who asks presents the volume's token, not a key.

use axum::{
    Json,
    body::Body,
    extract::FromRequestParts,
    response::{IntoResponse as _, Response},
};
use cubicle_control::volume::{Attributes, Content, Item, Kind, Time};
use futures::TryStreamExt as _;
use http::{
    StatusCode,
    header::{CONTENT_LENGTH, CONTENT_TYPE},
    request::Parts,
};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::io::AsyncReadExt as _;
use tokio_util::io::ReaderStream;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    AppState, auth,
    envelope::deadline,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{JsonBody, Query, Segment},
};

/// How much of a file is read at a time, in bytes.
const PIECE: usize = 256 << 10;

/// Largest mode: `rwxrwxrwx`.
const MAX_MODE: u32 = 0o777;

/// Largest id of a user or a group; the one above means "leave it" to the kernel.
const MAX_OWNER: u32 = u32::MAX - 1;

/// What needs a volume's token instead of a key.
pub(crate) fn open_router() -> OpenApiRouter<AppState> {
    let quick = OpenApiRouter::new()
        .routes(routes!(read, change, remove))
        .routes(routes!(list, make_directory))
        .layer(deadline(crate::DEADLINE));
    // Without a deadline: a file takes as long as it takes.
    quick.merge(OpenApiRouter::new().routes(routes!(download, upload)))
}

/// Something in a volume.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = VolumeEntryStat)]
pub(crate) struct EntryBody {
    /// The last part of its path.
    name: String,
    #[serde(rename = "type")]
    kind: EntryType,
    /// From the top of the volume, which is `/`.
    path: String,
    /// Bytes.
    size: u64,
    /// Permissions: 0 to 511, which is `rwxrwxrwx`.
    mode: u32,
    /// Owner on the host; in sandboxes everything belongs to their default user.
    uid: u32,
    /// Group on the host.
    gid: u32,
    /// When it was last read.
    #[serde(with = "time::serde::rfc3339")]
    atime: OffsetDateTime,
    /// When its content last changed.
    #[serde(with = "time::serde::rfc3339")]
    mtime: OffsetDateTime,
    /// When anything of it last changed.
    #[serde(with = "time::serde::rfc3339")]
    ctime: OffsetDateTime,
    /// Where a symbolic link leads, in the sandboxes that follow it.
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
}

/// What something in a volume is.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = VolumeEntryType)]
enum EntryType {
    Unknown,
    File,
    Directory,
    Symlink,
}

impl From<Item> for EntryBody {
    fn from(item: Item) -> Self {
        let path = format!("/{}", item.path);
        Self {
            name: match path.rsplit_once('/') {
                Some((_, name)) if !name.is_empty() => name.to_owned(),
                _ => path.clone(),
            },
            kind: match item.kind {
                Kind::File => EntryType::File,
                Kind::Directory => EntryType::Directory,
                Kind::Symlink => EntryType::Symlink,
                Kind::Other => EntryType::Unknown,
            },
            path,
            size: item.size,
            mode: item.mode,
            uid: item.uid,
            gid: item.gid,
            atime: moment(item.accessed),
            mtime: moment(item.modified),
            ctime: moment(item.changed),
            target: item
                .target
                .map(|target| String::from_utf8_lossy(&target).into_owned()),
        }
    }
}

/// Guests may set the time of a file to any, also to one that no calendar has.
fn moment(time: Time) -> OffsetDateTime {
    let nanos = i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
    OffsetDateTime::from_unix_timestamp_nanos(nanos).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// Owner and mode to set.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = VolumeEntryChange)]
pub(crate) struct ChangeBody {
    /// Owner on the host.
    uid: Option<u32>,
    /// Group on the host.
    gid: Option<u32>,
    /// Permissions: 0 to 511.
    mode: Option<u32>,
}

impl ChangeBody {
    /// As it stands in a query.
    fn of_query(query: &Query) -> ApiResult<Self> {
        let number = |name| -> ApiResult<Option<u32>> {
            let number = query.number(name, 0..=u64::from(u32::MAX))?;
            Ok(number.and_then(|number| u32::try_from(number).ok()))
        };
        Ok(Self {
            uid: number("uid")?,
            gid: number("gid")?,
            mode: number("mode")?,
        })
    }

    fn attributes(&self) -> ApiResult<Attributes> {
        for (name, value, max) in [
            ("uid", self.uid, MAX_OWNER),
            ("gid", self.gid, MAX_OWNER),
            ("mode", self.mode, MAX_MODE),
        ] {
            if value.is_some_and(|value| value > max) {
                return Err(ApiError::field(name, format!("is larger than {max}")));
            }
        }
        Ok(Attributes {
            uid: self.uid,
            gid: self.gid,
            mode: self.mode,
        })
    }
}

/// What every request names: a volume, whose token it has, and a path in it.
pub(crate) struct Asked {
    content: Content,
    path: String,
    query: Query,
}

impl FromRequestParts<AppState> for Asked {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> ApiResult<Self> {
        let Segment(volume) = Segment::from_request_parts(parts, state).await?;
        let token = auth::bearer(&parts.headers).ok_or_else(|| {
            let message = "the token of the volume is required, as Authorization: Bearer";
            ApiError::new(StatusCode::UNAUTHORIZED, message)
        })?;
        let content = state.control.volumes.content(&volume, token).await?;
        let query = Query::from_request_parts(parts, state).await?;
        let missing = || ApiError::field("path", "is required, as a part of the query");
        let path = query.text("path")?.ok_or_else(missing)?.to_owned();
        Ok(Self {
            content,
            path,
            query,
        })
    }
}

impl Asked {
    /// Owner and mode of what is to be made.
    fn attributes(&self) -> ApiResult<Attributes> {
        ChangeBody::of_query(&self.query)?.attributes()
    }

    fn force(&self) -> ApiResult<bool> {
        Ok(self.query.flag("force")?.unwrap_or(false))
    }
}

/// What is at a path of a volume
#[utoipa::path(
    get, path = "/volumecontent/{volumeID}/path", tag = "volumes", security(("bearer" = [])),
    params(
        ("volumeID" = String, Path, description = "Its id"), ("path" = String, Query),
    ),
    responses(
        (status = 200, body = EntryBody), (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn read(asked: Asked) -> ApiResult<Json<EntryBody>> {
    Ok(Json(asked.content.item(&asked.path).await?.into()))
}

/// Change owner and mode of something in a volume
#[utoipa::path(
    patch, path = "/volumecontent/{volumeID}/path", tag = "volumes", security(("bearer" = [])),
    params(
        ("volumeID" = String, Path, description = "Its id"), ("path" = String, Query),
    ),
    request_body = ChangeBody,
    responses(
        (status = 200, body = EntryBody), (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn change(asked: Asked, body: JsonBody<ChangeBody>) -> ApiResult<Json<EntryBody>> {
    let attributes = body.0.attributes()?;
    let changed = asked.content.change(&asked.path, attributes).await?;
    Ok(Json(changed.into()))
}

/// Remove something from a volume
///
/// A directory with all that is in it.
#[utoipa::path(
    delete, path = "/volumecontent/{volumeID}/path", tag = "volumes", security(("bearer" = [])),
    params(
        ("volumeID" = String, Path, description = "Its id"), ("path" = String, Query),
    ),
    responses(
        (status = 204), (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn remove(asked: Asked) -> ApiResult<StatusCode> {
    asked.content.remove(&asked.path).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// List a directory of a volume
#[utoipa::path(
    get, path = "/volumecontent/{volumeID}/dir", tag = "volumes", security(("bearer" = [])),
    params(
        ("volumeID" = String, Path, description = "Its id"), ("path" = String, Query),
        ("depth" = Option<u32>, Query, description = "How many levels: 1, unless it is said, is \
            the directory itself"),
    ),
    responses(
        (status = 200, body = Vec<EntryBody>), (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn list(asked: Asked) -> ApiResult<Json<Vec<EntryBody>>> {
    let depth = asked.query.number("depth", 1..=u64::from(u32::MAX))?;
    let depth = depth.and_then(|depth| u32::try_from(depth).ok());
    let items = asked.content.list(&asked.path, depth.unwrap_or(1)).await?;
    Ok(Json(items.into_iter().map(Into::into).collect()))
}

/// Make a directory in a volume
#[utoipa::path(
    post, path = "/volumecontent/{volumeID}/dir", tag = "volumes", security(("bearer" = [])),
    params(
        ("volumeID" = String, Path, description = "Its id"), ("path" = String, Query),
        ("uid" = Option<u32>, Query), ("gid" = Option<u32>, Query),
        ("mode" = Option<u32>, Query, description = "0 to 511; 493, which is `rwxr-xr-x`, unless \
            it is said"),
        ("force" = Option<bool>, Query, description = "Makes those above it that are missing, and \
            does not mind if it is there"),
    ),
    responses(
        (status = 201, body = EntryBody), (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "It is there already"),
    ),
)]
pub(crate) async fn make_directory(asked: Asked) -> ApiResult<(StatusCode, Json<EntryBody>)> {
    let (attributes, force) = (asked.attributes()?, asked.force()?);
    let made = asked.content.make_directory(&asked.path, attributes, force);
    Ok((StatusCode::CREATED, Json(made.await?.into())))
}

/// Download a file of a volume
#[utoipa::path(
    get, path = "/volumecontent/{volumeID}/file", tag = "volumes", security(("bearer" = [])),
    params(
        ("volumeID" = String, Path, description = "Its id"), ("path" = String, Query),
    ),
    responses(
        (status = 200, body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn download(asked: Asked) -> ApiResult<Response> {
    let (file, len) = asked.content.read(&asked.path).await?;
    // Somebody may write to it meanwhile.
    let file = tokio::fs::File::from_std(file).take(len);
    let body = Body::from_stream(ReaderStream::with_capacity(file, PIECE));
    let headers = [
        (CONTENT_TYPE, "application/octet-stream".to_owned()),
        (CONTENT_LENGTH, len.to_string()),
    ];
    Ok((headers, body).into_response())
}

/// Upload a file to a volume
///
/// It appears when all of it has come.
#[utoipa::path(
    put, path = "/volumecontent/{volumeID}/file", tag = "volumes", security(("bearer" = [])),
    params(
        ("volumeID" = String, Path, description = "Its id"), ("path" = String, Query),
        ("uid" = Option<u32>, Query), ("gid" = Option<u32>, Query),
        ("mode" = Option<u32>, Query, description = "0 to 511; 420, which is `rw-r--r--`, unless \
            it is said or a file is replaced"),
        ("force" = Option<bool>, Query, description = "Replaces a file that is there"),
    ),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses(
        (status = 201, body = EntryBody), (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody, description = "No such volume or directory"),
        (status = 409, body = ErrorBody, description = "It is there already"),
        (status = 507, body = ErrorBody, description = "The disk is full"),
    ),
)]
pub(crate) async fn upload(asked: Asked, body: Body) -> ApiResult<(StatusCode, Json<EntryBody>)> {
    let (attributes, force) = (asked.attributes()?, asked.force()?);
    let body = body.into_data_stream().map_err(std::io::Error::other);
    let written = asked.content.write(&asked.path, attributes, force, body);
    Ok((StatusCode::CREATED, Json(written.await?.into())))
}
