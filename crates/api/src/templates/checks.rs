//! What all dialects check of a build that is asked for.

use cubicle_control::template::{Origin, RegistryAuth, Size};
use http::{HeaderMap, StatusCode};

use crate::error::{ApiError, ApiResult};

/// Longest command, path or value of a variable, in bytes.
const MAX_TEXT: usize = 128 << 10;
/// Longest name of an image, in bytes.
const MAX_IMAGE: usize = 512;
/// Most steps of a build. Each may become a snapshot.
pub(super) const MAX_STEPS: usize = 1000;
/// What an image itself may take of a disk before a promise of free space is kept.
const ROOM_FOR_IMAGE_MIB: u64 = 4096;
/// Largest disk that can be asked for.
const MAX_DISK_MIB: u64 = 1 << 24;

/// A text that the guest is given: a command, a path, a value.
pub(super) fn text(field: &str, text: &str) -> ApiResult<()> {
    if text.len() > MAX_TEXT {
        return Err(ApiError::field(
            field,
            format!("is longer than {MAX_TEXT} bytes"),
        ));
    }
    if text.contains('\0') {
        return Err(ApiError::field(field, "has a NUL in it"));
    }
    Ok(())
}

/// The same, and it says something.
pub(super) fn filled(field: &str, value: &str) -> ApiResult<()> {
    if value.trim().is_empty() {
        return Err(ApiError::field(field, "is empty"));
    }
    text(field, value)
}

/// Name and value of an environment variable.
pub(super) fn variable(field: &str, name: &str, value: &str) -> ApiResult<()> {
    if name.is_empty() || name.contains(['=', '\0']) {
        let why = "has a variable whose name is empty or has '=' or a NUL in it";
        return Err(ApiError::field(field, why));
    }
    text(field, name)?;
    text(field, value)
}

/// A port that something can listen on.
pub(super) fn port(field: &str, port: i64) -> ApiResult<u16> {
    u16::try_from(port)
        .ok()
        .filter(|port| *port > 0)
        .ok_or_else(|| ApiError::field(field, format!("{port} is no port: they are 1 to 65535")))
}

/// The name of an image as the origin of a build; E2B's base image is a recipe.
pub(super) fn image(field: &str, name: &str, auth: Option<RegistryAuth>) -> ApiResult<Origin> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._/:@[]+".contains(&b);
    let first = name.bytes().next().unwrap_or(b'x');
    let well_formed = name.len() <= MAX_IMAGE
        && name.bytes().all(allowed)
        && (first.is_ascii_alphanumeric() || first == b'[')
        && !name.contains("..")
        && !name.contains("//");
    if !well_formed {
        let shown: String = name.chars().take(100).collect();
        let why = format!(
            "{shown:?} is no name of an image: write it as python:3.12, registry.example/name:tag or \
             name@sha256:..."
        );
        return Err(ApiError::field(field, why));
    }
    Ok(match Origin::image(name) {
        Origin::Image { reference, .. } => Origin::Image { reference, auth },
        recipe => recipe,
    })
}

/// A size of which some numbers were asked for. `free_mib` is how much of the disk is to be free.
pub(super) fn size(
    otherwise: Size,
    cpu_count: Option<i64>,
    memory_mib: Option<i64>,
    free_mib: Option<(&str, i64)>,
) -> ApiResult<Size> {
    let number = |field: &str, value: i64| {
        u32::try_from(value)
            .map_err(|_| ApiError::field(field, format!("{value} makes no sense as a size")))
    };
    let mut size = otherwise;
    if let Some(cpu_count) = cpu_count {
        size.cpu_count = number("cpuCount", cpu_count)?;
    }
    if let Some(memory_mib) = memory_mib {
        size.memory_mib = number("memoryMB", memory_mib)?;
    }
    if let Some((field, free)) = free_mib {
        let disk = u64::try_from(free).ok().map(|free| match free {
            0 => 0,
            free => free.saturating_add(ROOM_FOR_IMAGE_MIB),
        });
        let disk = disk.filter(|disk| *disk <= MAX_DISK_MIB).ok_or_else(|| {
            let max = MAX_DISK_MIB - ROOM_FOR_IMAGE_MIB;
            ApiError::field(field, format!("{free} MiB is not between 0 and {max} MiB"))
        })?;
        // Disks are sparse: more than was asked for costs nothing.
        size.disk_mib = size.disk_mib.max(u32::try_from(disk).unwrap_or(u32::MAX));
    }
    Ok(size)
}

/// What makes a repetition of a request the same request: the header `Idempotency-Key`, or else
/// `requestID` in its body.
pub(super) fn request_id(
    headers: &HeaderMap,
    in_body: Option<String>,
) -> ApiResult<Option<String>> {
    let Some(key) = headers.get("idempotency-key") else {
        return Ok(in_body);
    };
    let key = key
        .to_str()
        .map_err(|_| ApiError::field("Idempotency-Key", "has characters beyond ASCII"))?;
    if in_body.is_some_and(|other| other != key) {
        return Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "Idempotency-Key and requestID say different things; send one of them",
        ));
    }
    Ok(Some(key.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_images() {
        for good in [
            "python:3.12",
            "127.0.0.1:5000/a/b:tag",
            "[::1]:5000/a",
            "a@sha256:0123",
            "a:b@sha256:0123",
        ] {
            assert!(image("image", good, None).is_ok(), "{good}");
        }
        let long = "x".repeat(10_000);
        for bad in [
            "a;b", "a b", "../a", "a/../b", "-a", "/a", "a//b", "a\n", "a$(b)", "ä", "a`b", "a\0",
            &long,
        ] {
            assert!(image("image", bad, None).is_err(), "{bad:?}");
        }
        assert_eq!(image("image", "", None), Ok(Origin::Recipe("base".into())));
    }

    #[test]
    fn free_space_comes_on_top_of_the_image() {
        let of = |free| size(Size::default(), None, None, Some(("f", free))).map(|s| s.disk_mib);
        assert_eq!(of(0), Ok(8192));
        assert_eq!(of(1024), Ok(8192));
        assert_eq!(of(20 << 10), Ok(24 << 10));
        assert!(of(-1).is_err());
        assert!(of(i64::MAX).is_err());
        assert!(size(Size::default(), Some(-1), None, None).is_err());
    }
}
