//! Compression of bodies.

use http::{
    HeaderMap,
    header::{ACCEPT_ENCODING, CONTENT_ENCODING},
};

use super::Error;

/// What a client accepts of a response.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Accepted {
    gzip: f32,
    /// None: not mentioned, and so accepted if there is nothing better.
    identity: Option<f32>,
}

impl Accepted {
    /// Reads `Accept-Encoding`.
    pub(super) fn from_headers(headers: &HeaderMap) -> Self {
        let (mut gzip, mut identity, mut any) = (None, None, None);
        let values = headers
            .get_all(ACCEPT_ENCODING)
            .iter()
            .filter_map(|value| value.to_str().ok());
        for coding in values.flat_map(|value| value.split(',')) {
            let mut parameters = coding.split(';').map(str::trim);
            let name = parameters.next().unwrap_or_default().to_ascii_lowercase();
            let quality = parameters
                .find_map(|parameter| {
                    parameter
                        .strip_prefix("q=")
                        .or(parameter.strip_prefix("Q="))
                })
                .and_then(|quality| quality.parse().ok())
                .unwrap_or(1.0);
            match name.as_str() {
                "gzip" | "x-gzip" => gzip = Some(quality),
                "identity" => identity = Some(quality),
                "*" => any = Some(quality),
                _ => {}
            }
        }
        // Anything in general is no wish for compression, unless it is all that is left.
        let refused = any == Some(0.0) && identity.is_none();
        let identity = if refused { Some(0.0) } else { identity };
        let only_any = identity == Some(0.0) && gzip.is_none();
        Self {
            gzip: gzip.or(any.filter(|_| only_any)).unwrap_or(0.0),
            identity,
        }
    }

    /// Whether to compress a response that is `worth` it or isn't.
    ///
    /// # Errors
    /// [`Error::NotAcceptable`] if neither is accepted.
    pub(super) fn compress(self, worth: bool) -> Result<bool, Error> {
        match (self.gzip > 0.0, self.identity) {
            (false, Some(0.0)) => Err(Error::NotAcceptable),
            (true, Some(0.0)) => Ok(true),
            (gzip, identity) => Ok(gzip && worth && self.gzip >= identity.unwrap_or(0.0)),
        }
    }
}

/// Whether a request's body is compressed.
///
/// # Errors
/// [`Error::ContentEncoding`] if it is, in another way than gzip.
pub(super) fn is_compressed(headers: &HeaderMap) -> Result<bool, Error> {
    let Some(value) = headers.get(CONTENT_ENCODING) else {
        return Ok(false);
    };
    let name = value
        .to_str()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    match name.as_str() {
        "" | "identity" => Ok(false),
        "gzip" | "x-gzip" => Ok(true),
        _ => Err(Error::ContentEncoding(
            String::from_utf8_lossy(value.as_bytes()).into_owned(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_get_what_they_prefer() {
        let choose = |value: &str, worth| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT_ENCODING, value.parse().unwrap());
            Accepted::from_headers(&headers).compress(worth).ok()
        };
        for (value, worth, want) in [
            ("", true, Some(false)),
            ("gzip", true, Some(true)),
            ("gzip", false, Some(false)),
            ("GZIP;q=0.5", true, Some(true)),
            ("gzip, deflate, br", true, Some(true)),
            ("deflate, br", true, Some(false)),
            ("gzip;q=0", true, Some(false)),
            ("identity, gzip;q=0.5", true, Some(false)),
            ("identity;q=0.5, gzip", true, Some(true)),
            ("*", true, Some(false)),
            ("*;q=0", true, None),
            ("identity;q=0", true, None),
            ("identity;q=0, gzip", false, Some(true)),
            ("gzip, *;q=0", false, Some(true)),
            ("identity;q=0, *", false, Some(true)),
            ("identity, *;q=0", true, Some(false)),
        ] {
            assert_eq!(choose(value, worth), want, "{value:?}, worth it: {worth}");
        }
    }

    #[test]
    fn bodies_are_plain_or_gzip() {
        let compressed = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_ENCODING, value.parse().unwrap());
            is_compressed(&headers).ok()
        };
        assert!(!is_compressed(&HeaderMap::new()).unwrap());
        assert_eq!(compressed("identity"), Some(false));
        assert_eq!(compressed("Gzip"), Some(true));
        assert_eq!(compressed("br"), None);
        assert_eq!(compressed("gzip, gzip"), None);
    }
}
