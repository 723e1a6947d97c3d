//! Volumes, and what is mounted in sandboxes, in the words of E2B's clients and of Cube's.

mod content;

use std::{collections::BTreeMap, path::PathBuf};

use axum::{Json, extract::State};
use cubicle_control::{
    sandbox::Sandbox,
    volume::{MountRequest, MountSource, Volume},
};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    AppState,
    envelope::deadline,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{JsonBody, Segment},
};

pub(crate) use self::content::open_router;

/// Keys of metadata by which Cube's clients ask for a directory of the host.
const HOST_MOUNTS: [&str; 2] = ["host-mount", "hostdir-mount"];

/// What Cube's clients may say as the driver of a volume: there is one.
const DRIVERS: [&str; 2] = ["local", "default"];

pub(crate) fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(read, delete))
        .layer(deadline(crate::DEADLINE))
}

/// A volume to make.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = NewVolume)]
pub(crate) struct NewVolumeBody {
    /// What to call it: 1 to 128 of A-Z, a-z, 0-9, `-` and `_`. Without: like its id.
    name: Option<String>,
    /// Where it is kept; `local` is all there is.
    driver: Option<String>,
}

/// A volume.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Volume)]
pub(crate) struct VolumeBody {
    /// Names it for ever.
    #[serde(rename = "volumeID")]
    volume_id: String,
    /// What it is called.
    name: String,
}

/// A volume, and what its own clients must present.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = VolumeAndToken)]
pub(crate) struct VolumeAndTokenBody {
    #[serde(flatten)]
    volume: VolumeBody,
    /// Gives access to what is in it, under `/volumecontent/{volumeID}`.
    token: String,
}

impl From<Volume> for VolumeBody {
    fn from(volume: Volume) -> Self {
        Self {
            volume_id: volume.id,
            name: volume.name,
        }
    }
}

impl From<Volume> for VolumeAndTokenBody {
    fn from(volume: Volume) -> Self {
        Self {
            token: volume.token.clone(),
            volume: volume.into(),
        }
    }
}

/// A volume in a sandbox.
#[derive(Debug, Clone, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = SandboxVolumeMount)]
pub(crate) struct VolumeMountBody {
    /// The volume's name, or its id.
    name: String,
    /// Where it is in the sandbox: an absolute path.
    path: String,
    /// Whether the sandbox cannot change it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    read_only: bool,
}

/// A directory of the host, as Cube's clients ask for it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct HostMountBody {
    host_path: PathBuf,
    mount_path: String,
    #[serde(default)]
    read_only: bool,
}

/// What a create asks to have mounted: its `volumeMounts`, and what its metadata says, which is
/// taken out of it.
pub(crate) fn requested(
    volumes: Option<Vec<VolumeMountBody>>,
    metadata: &mut BTreeMap<String, String>,
) -> ApiResult<Vec<MountRequest>> {
    let volumes = volumes.unwrap_or_default().into_iter();
    let mut mounts: Vec<_> = volumes
        .map(|mount| MountRequest {
            source: MountSource::volume(mount.name),
            path: mount.path,
            read_only: mount.read_only,
        })
        .collect();
    for key in HOST_MOUNTS {
        let Some(text) = metadata.remove(key) else {
            continue;
        };
        let hosts: Vec<HostMountBody> = serde_json::from_str(&text).map_err(|why| {
            let form = r#"[{"hostPath": "/dir", "mountPath": "/dir", "readOnly": true}]"#;
            ApiError::field(
                "metadata",
                format!("the value of '{key}' is not {form}: {why}"),
            )
        })?;
        mounts.extend(hosts.into_iter().map(|mount| MountRequest {
            source: MountSource::Host {
                path: mount.host_path,
            },
            path: mount.mount_path,
            read_only: mount.read_only,
        }));
    }
    Ok(mounts)
}

/// The volumes that a sandbox has mounted. Directories of the host are the host's business.
pub(crate) fn mounted(sandbox: &Sandbox) -> Vec<VolumeMountBody> {
    let mounts = sandbox.mounts.iter();
    let volumes = mounts.filter_map(|mount| match &mount.source {
        MountSource::Volume { name, .. } => Some(VolumeMountBody {
            name: name.clone(),
            path: mount.path.clone(),
            read_only: mount.read_only,
        }),
        MountSource::Host { .. } => None,
    });
    volumes.collect()
}

/// Make a volume
///
/// An empty directory that sandboxes can mount, and that outlives them.
#[utoipa::path(
    post, path = "/volumes", tag = "volumes", request_body = NewVolumeBody,
    responses(
        (status = 201, body = VolumeAndTokenBody),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "The name is taken"),
    ),
)]
pub(crate) async fn create(
    State(state): State<AppState>,
    body: JsonBody<NewVolumeBody>,
) -> ApiResult<(StatusCode, Json<VolumeAndTokenBody>)> {
    let NewVolumeBody { name, driver } = body.0;
    if let Some(driver) = driver.filter(|driver| !DRIVERS.contains(&driver.as_str())) {
        let shown: String = driver.chars().take(40).collect();
        return Err(ApiError::unsupported(&format!(
            "the volume driver '{shown}'"
        )));
    }
    let volume = state.control.volumes.create(name.as_deref()).await?;
    Ok((StatusCode::CREATED, Json(volume.into())))
}

/// List volumes
///
/// All of them, the oldest first.
#[utoipa::path(
    get, path = "/volumes", tag = "volumes",
    responses((status = 200, body = Vec<VolumeBody>), (status = 401, body = ErrorBody)),
)]
pub(crate) async fn list(State(state): State<AppState>) -> ApiResult<Json<Vec<VolumeBody>>> {
    let volumes = state.control.volumes.list().await?;
    Ok(Json(volumes.into_iter().map(Into::into).collect()))
}

/// A volume
#[utoipa::path(
    get, path = "/volumes/{volumeID}", tag = "volumes",
    params(("volumeID" = String, Path, description = "Its id or its name")),
    responses(
        (status = 200, body = VolumeAndTokenBody),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn read(
    State(state): State<AppState>,
    Segment(id): Segment,
) -> ApiResult<Json<VolumeAndTokenBody>> {
    Ok(Json(state.control.volumes.get(&id).await?.into()))
}

/// Delete a volume
///
/// With all that is in it. Not while a sandbox has it mounted, also a paused one.
#[utoipa::path(
    delete, path = "/volumes/{volumeID}", tag = "volumes",
    params(("volumeID" = String, Path, description = "Its id or its name")),
    responses(
        (status = 204), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "A sandbox has it mounted"),
    ),
)]
pub(crate) async fn delete(
    State(state): State<AppState>,
    Segment(id): Segment,
) -> ApiResult<StatusCode> {
    state.control.volumes.delete(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_the_host_are_taken_out_of_the_metadata() {
        let mut metadata = BTreeMap::from([
            ("user".to_owned(), "me".to_owned()),
            (
                "host-mount".to_owned(),
                r#"[{"hostPath":"/srv/a","mountPath":"/a","readOnly":true}]"#.to_owned(),
            ),
            (
                "hostdir-mount".to_owned(),
                r#"[{"hostPath":"/srv/b","mountPath":"/b"}]"#.to_owned(),
            ),
        ]);
        let volume = VolumeMountBody {
            name: "data".to_owned(),
            path: "/data".to_owned(),
            read_only: false,
        };
        let mounts = requested(Some(vec![volume]), &mut metadata).expect("mounts");
        assert_eq!(metadata.keys().collect::<Vec<_>>(), ["user"]);
        let places: Vec<_> = mounts
            .iter()
            .map(|mount| (mount.path.as_str(), mount.read_only))
            .collect();
        assert_eq!(places, [("/data", false), ("/a", true), ("/b", false)]);
        for bad in ["", "{}", "[{}]", r#"[{"hostPath":"/a"}]"#, "nonsense"] {
            let mut metadata = BTreeMap::from([("host-mount".to_owned(), bad.to_owned())]);
            assert!(requested(None, &mut metadata).is_err(), "{bad}");
        }
    }
}
