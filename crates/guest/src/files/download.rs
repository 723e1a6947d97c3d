//! `GET /files`.

use std::{
    fs::{File, Metadata as Stat},
    io,
    ops::Range,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use async_compression::{Level, tokio::bufread::GzipEncoder};
use axum::{
    body::Body,
    extract::State as Shared,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use mime_guess::{Mime, mime};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tokio_util::io::{ReaderStream, StreamReader};

use super::{
    CHUNK, Error,
    encoding::Accepted,
    query::FileQuery,
    range::{self, Requested},
};
use crate::{
    access::{Operation, State},
    blocking::blocking,
    filesystem::resolve,
    http::ApiError,
};

/// Smaller files gain nothing from compression, in bytes.
const WORTH_COMPRESSING: u64 = 1024;

/// What RFC 8187 wants encoded in a file name.
const NOT_IN_NAMES: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// Serves a file, or a part of it.
pub(crate) async fn download(
    Shared(state): Shared<Arc<State>>,
    query: FileQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let settings = query
        .authorize(&state, &headers, Operation::Read)
        .map_err(Error::from)?;
    let response = blocking(move || {
        let user = state.user(query.username())?;
        let path = resolve(query.path.as_deref().unwrap_or_default(), &user, &settings)?;
        Opened::open(path)?.respond(&headers)
    });
    Ok(response.await?)
}

struct Opened {
    file: Arc<File>,
    path: PathBuf,
    stat: Stat,
    /// The beginning of a file that says that it is empty and isn't, as those of /proc do.
    unannounced: Bytes,
}

impl Opened {
    fn open(path: PathBuf) -> Result<Self, Error> {
        // Looked at first: opening a pipe would wait for its other end.
        let found = std::fs::metadata(&path).map_err(Error::io("look at", &path))?;
        if found.is_dir() {
            return Err(Error::IsDirectory(path));
        }
        if !found.is_file() {
            return Err(Error::NotRegular(path));
        }
        let file = File::open(&path).map_err(Error::io("open", &path))?;
        let stat = file.metadata().map_err(Error::io("look at", &path))?;
        let unannounced = if stat.len() == 0 {
            read_at(&file, 0, CHUNK).map_err(Error::io("read", &path))?
        } else {
            Bytes::new()
        };
        Ok(Self {
            file: Arc::new(file),
            path,
            stat,
            unannounced,
        })
    }

    fn respond(self, request: &HeaderMap) -> Result<Response, Error> {
        let len = self.stat.len();
        let mime = mime_guess::from_path(&self.path).first_or_octet_stream();
        let modified = self.stat.modified().ok().map(truncate_to_seconds);
        let partial = [header::RANGE, header::IF_MODIFIED_SINCE, header::IF_RANGE]
            .iter()
            .any(|name| request.contains_key(name));
        let worth = !partial && len >= WORTH_COMPRESSING && !is_packed(&mime);
        let compress = Accepted::from_headers(request).compress(worth)?;
        if compress && partial {
            return Err(Error::NotAcceptable);
        }

        let mut response = Response::new(Body::empty());
        let headers = response.headers_mut();
        headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
        headers.insert(header::CONTENT_DISPOSITION, disposition(&self.path));
        headers.insert(header::CONTENT_TYPE, content_type(&mime));
        if let Some(modified) = modified.and_then(date) {
            headers.insert(header::LAST_MODIFIED, modified);
        }
        if compress {
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            let plain = StreamReader::new(Box::pin(self.contents(0, None)));
            let packed = GzipEncoder::with_quality(plain, Level::Fastest);
            *response.body_mut() = Body::from_stream(ReaderStream::with_capacity(packed, CHUNK));
            return Ok(response);
        }
        if !self.unannounced.is_empty() {
            *response.body_mut() = Body::from_stream(self.contents(0, None));
            return Ok(response);
        }

        headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        let time = |name| httpdate::parse_http_date(request.get(name)?.to_str().ok()?).ok();
        if let (Some(since), Some(modified)) = (time(header::IF_MODIFIED_SINCE), modified)
            && modified <= since
        {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            return Ok(response);
        }
        let unchanged = !request.contains_key(header::IF_RANGE)
            || modified.is_some() && time(header::IF_RANGE) == modified;
        let requested = match request
            .get(header::RANGE)
            .and_then(|value| value.to_str().ok())
        {
            Some(value) if unchanged => range::parse(value, len),
            _ => Requested::Whole,
        };
        let part = match requested {
            Requested::Whole => 0..len,
            Requested::Part(part) => {
                *response.status_mut() = StatusCode::PARTIAL_CONTENT;
                let range = format!("bytes {}-{}/{len}", part.start, part.end - 1);
                response
                    .headers_mut()
                    .insert(header::CONTENT_RANGE, ascii(&range));
                part
            }
            Requested::Nothing => {
                *response.status_mut() = StatusCode::RANGE_NOT_SATISFIABLE;
                let range = ascii(&format!("bytes */{len}"));
                response.headers_mut().insert(header::CONTENT_RANGE, range);
                response.headers_mut().remove(header::CONTENT_TYPE);
                return Ok(response);
            }
        };
        let part_len = part.end - part.start;
        response
            .headers_mut()
            .insert(header::CONTENT_LENGTH, part_len.into());
        *response.body_mut() = if part_len <= CHUNK as u64 {
            // Most files are small: read at once, their answers are sent at once.
            self.read(part)?.into()
        } else {
            Body::from_stream(self.contents(part.start, Some(part_len)))
        };
        Ok(response)
    }

    /// A part that is small enough to be held in memory.
    fn read(&self, part: Range<u64>) -> Result<Bytes, Error> {
        // At most CHUNK.
        let mut bytes = vec![0; (part.end - part.start) as usize];
        self.file
            .read_exact_at(&mut bytes, part.start)
            .map_err(Error::io("read", &self.path))?;
        Ok(bytes.into())
    }

    /// The bytes from `offset` on: `len` of them, or an error if there are fewer by now; or all
    /// that there are.
    fn contents(
        self,
        offset: u64,
        len: Option<u64>,
    ) -> impl Stream<Item = io::Result<Bytes>> + Send + use<> {
        let Self {
            file, unannounced, ..
        } = self;
        let begun = unannounced.len() as u64;
        let rest = stream::try_unfold((file, offset + begun, len), async |(file, offset, left)| {
            let wanted = left.map_or(CHUNK as u64, |left| left.min(CHUNK as u64));
            if wanted == 0 {
                return Ok(None);
            }
            let reader = Arc::clone(&file);
            // `wanted` is at most CHUNK.
            let chunk = blocking(move || read_at(&reader, offset, wanted as usize)).await?;
            let read = chunk.len() as u64;
            match left {
                None if read == 0 => Ok(None),
                Some(_) if read == 0 => Err(io::ErrorKind::UnexpectedEof.into()),
                _ => Ok(Some((
                    chunk,
                    (file, offset + read, left.map(|left| left - read)),
                ))),
            }
        });
        stream::iter((begun > 0).then_some(Ok(unannounced))).chain(rest)
    }
}

fn read_at(file: &File, offset: u64, len: usize) -> io::Result<Bytes> {
    let mut buffer = vec![0; len];
    loop {
        match file.read_at(&mut buffer, offset) {
            Ok(read) => {
                buffer.truncate(read);
                return Ok(buffer.into());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Whether files of this type are compressed already.
fn is_packed(mime: &Mime) -> bool {
    match (mime.type_(), mime.subtype().as_str()) {
        (mime::IMAGE, subtype) => subtype != "svg" && subtype != "bmp",
        (mime::AUDIO | mime::VIDEO, _) => true,
        (_, subtype) => [
            "zip", "gzip", "x-7z", "x-xz", "x-bzip", "zstd", "x-rar", "pdf", "woff", "jar",
        ]
        .iter()
        .any(|packed| subtype.contains(packed)),
    }
}

fn content_type(mime: &Mime) -> HeaderValue {
    if mime.type_() == mime::TEXT && mime.get_param(mime::CHARSET).is_none() {
        return ascii(&format!("{mime}; charset=utf-8"));
    }
    ascii(mime.as_ref())
}

/// `Content-Disposition` with the file's name, see RFC 6266.
fn disposition(path: &Path) -> HeaderValue {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let plain = name
        .bytes()
        .all(|byte| matches!(byte, b' '..=b'~') && !b"\"\\".contains(&byte));
    ascii(&if plain {
        format!("inline; filename=\"{name}\"")
    } else {
        format!(
            "inline; filename*=utf-8''{}",
            utf8_percent_encode(&name, NOT_IN_NAMES)
        )
    })
}

/// HTTP dates have no fractions.
fn truncate_to_seconds(time: SystemTime) -> SystemTime {
    let seconds = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds)
}

/// None for times that HTTP cannot say: its years have four digits.
fn date(time: SystemTime) -> Option<HeaderValue> {
    const YEAR_10_000: u64 = 253_402_300_800;
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs();
    (seconds < YEAR_10_000).then(|| ascii(&httpdate::fmt_http_date(time)))
}

/// A header value of text that is made of printable ASCII.
fn ascii(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_in_headers() {
        let disposition = |name: &str| disposition(Path::new(name));
        assert_eq!(disposition("/a/b c.txt"), "inline; filename=\"b c.txt\"");
        assert_eq!(
            disposition("/ä\".txt"),
            "inline; filename*=utf-8''%C3%A4%22.txt"
        );
        assert_eq!(disposition("/a\nb"), "inline; filename*=utf-8''a%0Ab");
    }

    #[test]
    fn what_is_packed_is_not_packed_again() {
        let packed = |name: &str| is_packed(&mime_guess::from_path(name).first_or_octet_stream());
        for name in [
            "a.png", "a.jpg", "a.zip", "a.gz", "a.mp4", "a.mp3", "a.pdf", "a.woff2",
        ] {
            assert!(packed(name), "{name}");
        }
        for name in ["a.txt", "a.svg", "a.json", "a", "a.csv", "a.wasm", "a.bmp"] {
            assert!(!packed(name), "{name}");
        }
    }
}
