//! What requests carry, parsed once at the edge, with messages that say what is wrong.

use axum::{
    body::{Body, Bytes},
    extract::{FromRequest, FromRequestParts, Path, Request},
};
use cubicle_ids::SandboxId;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, request::Parts};
use http_body_util::BodyExt as _;
use serde::de::DeserializeOwned;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::error::{ApiError, ApiResult};

/// Largest body of a control-plane request.
pub(crate) const MAX_BODY: usize = 1 << 20;

/// A body, whole. Its length may be unknown in advance: some clients send chunks.
async fn read(body: Body) -> ApiResult<Bytes> {
    let limited = http_body_util::Limited::new(body, MAX_BODY);
    match limited.collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the request body is larger than {MAX_BODY} bytes"),
        )),
        Err(error) => Err(ApiError::bad_request(format!(
            "the request body broke off: {error}"
        ))),
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> ApiResult<T> {
    // A list would be taken for an object's fields in the order in which we wrote them down.
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        return Err(ApiError::bad_request(
            "the request body is a list, not an object",
        ));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let at = if path == "." {
            String::new()
        } else {
            format!("{path}: ")
        };
        let why = error.into_inner();
        if why.is_syntax() || why.is_eof() {
            ApiError::bad_request(format!("the request body is no JSON: {why}"))
        } else {
            let why = why
                .to_string()
                .replace("expected i64", "expected a whole number");
            ApiError::bad_request(format!("{at}{why}"))
        }
    })?;
    deserializer
        .end()
        .map_err(|why| ApiError::bad_request(format!("the request body is no JSON: {why}")))?;
    Ok(value)
}

/// A JSON body, whatever its content type says.
pub(crate) struct JsonBody<T>(pub(crate) T);

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> ApiResult<Self> {
        parse(&read(request.into_body()).await?).map(Self)
    }
}

/// A JSON body together with what was sent.
pub(crate) struct RawJsonBody<T> {
    pub(crate) value: T,
    pub(crate) bytes: Bytes,
}

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for RawJsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> ApiResult<Self> {
        let bytes = read(request.into_body()).await?;
        Ok(Self {
            value: parse(&bytes)?,
            bytes,
        })
    }
}

/// A JSON body that may be left out.
pub(crate) struct OptionalJsonBody<T>(pub(crate) T);

impl<S: Sync, T: DeserializeOwned + Default> FromRequest<S> for OptionalJsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> ApiResult<Self> {
        let bytes = read(request.into_body()).await?;
        if bytes.trim_ascii().is_empty() {
            Ok(Self(T::default()))
        } else {
            parse(&bytes).map(Self)
        }
    }
}

/// The sandbox in the path. Older clients append `-<clientID>` to its id.
pub(crate) struct SandboxPath(pub(crate) SandboxId);

impl<S: Send + Sync> FromRequestParts<S> for SandboxPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> ApiResult<Self> {
        let Path(text) = path::<String, S>(parts, state).await?;
        sandbox_id(&text).map(Self)
    }
}

/// The one parameter of the path, decoded. A `%2F` in it is part of it.
pub(crate) struct Segment(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> ApiResult<Self> {
        path::<String, S>(parts, state)
            .await
            .map(|Path(text)| Self(text))
    }
}

/// The two parameters of the path, decoded.
pub(crate) struct Segments(pub(crate) String, pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Segments {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> ApiResult<Self> {
        path::<(String, String), S>(parts, state)
            .await
            .map(|Path((a, b))| Self(a, b))
    }
}

async fn path<T, S>(parts: &mut Parts, state: &S) -> ApiResult<Path<T>>
where
    T: DeserializeOwned + Send,
    S: Send + Sync,
{
    Path::from_request_parts(parts, state)
        .await
        .map_err(|why| ApiError::bad_request(format!("the path makes no sense: {why}")))
}

/// A sandbox id with or without a client id behind it.
pub(crate) fn sandbox_id(text: &str) -> ApiResult<SandboxId> {
    let id = text.split_once('-').map_or(text, |(id, _client)| id);
    id.parse()
        .map_err(|why| ApiError::bad_request(format!("this is no sandbox id: {why}")))
}

/// The query string, as pairs.
#[derive(Debug, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl<S: Sync> FromRequestParts<S> for Query {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> ApiResult<Self> {
        Ok(Self::parse(parts.uri.query().unwrap_or_default()))
    }
}

impl Query {
    fn parse(query: &str) -> Self {
        Self(
            form_urlencoded::parse(query.as_bytes())
                .into_owned()
                .collect(),
        )
    }

    /// A parameter that is given at most once; an empty one counts as left out.
    pub(crate) fn text(&self, name: &str) -> ApiResult<Option<&str>> {
        let mut values = self
            .0
            .iter()
            .filter(|(key, _)| key == name)
            .map(|(_, value)| value);
        let first = values.next();
        if values.next().is_some() {
            return Err(ApiError::field(name, "is given more than once"));
        }
        Ok(first.map(String::as_str).filter(|value| !value.is_empty()))
    }

    /// Every value of a parameter: it may be given several times, with commas, or with `[]`.
    pub(crate) fn list(&self, name: &str) -> Vec<&str> {
        self.0
            .iter()
            .filter(|(key, _)| key.strip_suffix("[]").unwrap_or(key) == name)
            .flat_map(|(_, value)| value.split(','))
            .filter(|value| !value.is_empty())
            .collect()
    }

    /// A parameter that is a number within `range`.
    pub(crate) fn number(
        &self,
        name: &str,
        range: std::ops::RangeInclusive<u64>,
    ) -> ApiResult<Option<u64>> {
        let Some(text) = self.text(name)? else {
            return Ok(None);
        };
        match text.parse() {
            Ok(number) if range.contains(&number) => Ok(Some(number)),
            _ => {
                let (min, max) = range.into_inner();
                Err(ApiError::field(
                    name,
                    format!("is no whole number between {min} and {max}"),
                ))
            }
        }
    }

    /// A parameter that is `true` or `false`, as programs write these.
    pub(crate) fn flag(&self, name: &str) -> ApiResult<Option<bool>> {
        match self.text(name)?.map(str::to_ascii_lowercase).as_deref() {
            None => Ok(None),
            Some("true" | "1") => Ok(Some(true)),
            Some("false" | "0") => Ok(Some(false)),
            Some(_) => Err(ApiError::field(name, "is neither true nor false")),
        }
    }

    /// A parameter that is a time in RFC 3339.
    pub(crate) fn time(&self, name: &str) -> ApiResult<Option<OffsetDateTime>> {
        let Some(text) = self.text(name)? else {
            return Ok(None);
        };
        // The `+` of a zone that was not encoded has become a space.
        OffsetDateTime::parse(&text.replace(' ', "+"), &Rfc3339)
            .map(Some)
            .map_err(|_| {
                ApiError::field(
                    name,
                    "is no time in RFC 3339, for example 2030-01-31T12:00:00Z",
                )
            })
    }

    /// A parameter that is seconds since 1970.
    pub(crate) fn unix_seconds(&self, name: &str) -> ApiResult<Option<OffsetDateTime>> {
        self.unix(name, 1_000_000_000)
    }

    /// A parameter that is milliseconds since 1970.
    pub(crate) fn unix_millis(&self, name: &str) -> ApiResult<Option<OffsetDateTime>> {
        self.unix(name, 1_000_000)
    }

    fn unix(&self, name: &str, nanos: i128) -> ApiResult<Option<OffsetDateTime>> {
        let Some(number) = self.number(name, 0..=u64::MAX)? else {
            return Ok(None);
        };
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(number) * nanos)
            .map(Some)
            .map_err(|_| ApiError::field(name, "is a time beyond the calendar"))
    }
}

/// The header that says where the next page begins. The last page has none: clients take an empty
/// one for a token.
pub(crate) fn next_page(token: Option<&impl std::fmt::Display>) -> HeaderMap {
    // Tokens are ids and base64, so they always fit in a header.
    let value = token.and_then(|token| HeaderValue::try_from(token.to_string()).ok());
    let name = HeaderName::from_static("x-next-token");
    value
        .into_iter()
        .map(|value| (name.clone(), value))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sandbox_ids_lose_their_client() {
        assert_eq!(sandbox_id("iabc-local").expect("id").as_str(), "iabc");
        assert_eq!(sandbox_id("iabc-a-b").expect("id").as_str(), "iabc");
        for bad in ["", "-x", "A", "i/..", "i%", &"i".repeat(10_000)] {
            assert!(sandbox_id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn query_parameters_of_every_kind() {
        let query = Query::parse("n=5&s=a,b&s=c&x[]=1&t=2030-01-31T12:00:00+00:00&e=&d=1&d=2");
        assert_eq!(query.number("n", 1..=5), Ok(Some(5)));
        assert!(query.number("n", 1..=4).is_err());
        assert!(query.number("s", 1..=4).is_err(), "given twice");
        assert_eq!(query.list("s"), ["a", "b", "c"]);
        assert_eq!(query.list("x"), ["1"]);
        assert_eq!(query.text("e"), Ok(None));
        assert!(query.text("d").is_err());
        assert!(query.time("t").expect("a zone with a bare plus").is_some());
        assert!(Query::parse("t=yesterday").time("t").is_err());
        let flags = Query::parse("a=true&b=False&c=1&d=yes");
        let flag = |name| flags.flag(name).ok();
        assert_eq!(
            ["a", "b", "c", "e"].map(flag),
            [Some(true), Some(false), Some(true), None].map(Some)
        );
        assert_eq!(flag("d"), None);
        let far = format!("t={}", u64::MAX);
        assert!(Query::parse(&far).unix_seconds("t").is_err());
    }

    proptest! {
        #[test]
        fn no_query_panics(text in ".{0,120}", name in "[a-z]{1,3}") {
            let query = Query::parse(&text);
            let _ = (query.text(&name), query.list(&name), query.number(&name, 0..=9));
            let _ = (query.time(&name), query.unix_seconds(&name), query.unix_millis(&name));
        }
    }
}
