//! Answers that speak of paths, when the sandbox's root is not the client's.

use http::{
    HeaderMap, HeaderValue,
    header::{CONTENT_LOCATION, LOCATION, SET_COOKIE},
};

/// Where a sandbox's port appears to its client.
pub(crate) struct Place<'a> {
    /// What stands before its paths: `/sandbox/<id>/<port>`.
    pub(crate) prefix: &'a str,
    /// The host that the client talks to, with its port.
    pub(crate) host: Option<&'a str>,
    /// What the server in the sandbox was told as `Host`.
    pub(crate) inner_host: Option<&'a str>,
    /// The port inside the sandbox.
    pub(crate) port: u16,
}

/// Makes redirects and cookies of the sandbox's server valid for its client.
pub(crate) fn response(headers: &mut HeaderMap, place: &Place<'_>) {
    for name in [LOCATION, CONTENT_LOCATION] {
        let old = headers.get(&name).and_then(|old| old.to_str().ok());
        let new = old.and_then(|old| location(old, place));
        if let Some(new) = new.and_then(|new| HeaderValue::from_str(&new).ok()) {
            headers.insert(name, new);
        }
    }
    if !headers.contains_key(SET_COOKIE) {
        return;
    }
    let cookies: Vec<HeaderValue> = headers
        .get_all(SET_COOKIE)
        .iter()
        .map(|old| {
            let new = old.to_str().ok().and_then(|old| cookie(old, place.prefix));
            new.and_then(|new| HeaderValue::from_str(&new).ok())
                .unwrap_or_else(|| old.clone())
        })
        .collect();
    headers.remove(SET_COOKIE);
    for cookie in cookies {
        headers.append(SET_COOKIE, cookie);
    }
}

/// `None`: it is right as it is, being relative or elsewhere.
fn location(old: &str, place: &Place<'_>) -> Option<String> {
    let prefix = place.prefix;
    if old.starts_with('/') && !old.starts_with("//") {
        // Servers that honour X-Forwarded-Prefix have done it themselves.
        return (!is_below(old, prefix)).then(|| format!("{prefix}{old}"));
    }
    let (scheme, rest) = old.split_once("://")?;
    if !scheme.eq_ignore_ascii_case("http") && !scheme.eq_ignore_ascii_case("https") {
        return None;
    }
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, rest) = rest.split_at(end);
    let local = [
        format!("localhost:{}", place.port),
        format!("127.0.0.1:{}", place.port),
    ];
    let own = [place.host, place.inner_host]
        .into_iter()
        .flatten()
        .chain(local.iter().map(String::as_str));
    if !own
        .into_iter()
        .any(|own| own.eq_ignore_ascii_case(authority))
    {
        return None;
    }
    let rest = if rest.starts_with('/') {
        rest.to_owned()
    } else {
        format!("/{rest}")
    };
    Some(location(&rest, place).unwrap_or(rest))
}

fn is_below(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '?', '#']))
}

/// Puts the prefix before the cookie's path. Without a path it is valid below the request's, which
/// is right already.
fn cookie(old: &str, prefix: &str) -> Option<String> {
    let mut changed = false;
    let attributes: Vec<String> = old
        .split(';')
        .enumerate()
        .map(|(index, attribute)| match attribute.split_once('=') {
            Some((name, path))
                if index > 0
                    && name.trim().eq_ignore_ascii_case("path")
                    && path.trim().starts_with('/')
                    && !is_below(path.trim(), prefix) =>
            {
                changed = true;
                format!("{name}={prefix}{}", path.trim())
            }
            _ => attribute.to_owned(),
        })
        .collect();
    changed.then(|| attributes.join(";"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place<'_> = Place {
        prefix: "/sandbox/i0/80",
        host: Some("cubicle.example:3000"),
        inner_host: Some("masked.local"),
        port: 80,
    };

    #[test]
    fn redirects_stay_inside() {
        for (old, new) in [
            ("/login?next=/a", "/sandbox/i0/80/login?next=/a"),
            ("/", "/sandbox/i0/80/"),
            ("http://cubicle.example:3000/a#b", "/sandbox/i0/80/a#b"),
            ("HTTP://Masked.Local", "/sandbox/i0/80/"),
            ("http://localhost:80?x", "/sandbox/i0/80/?x"),
            ("https://127.0.0.1:80/a", "/sandbox/i0/80/a"),
            ("/sandbox/i0/801", "/sandbox/i0/80/sandbox/i0/801"),
            (
                "http://cubicle.example:3000/sandbox/i0/80/a",
                "/sandbox/i0/80/a",
            ),
        ] {
            assert_eq!(location(old, &PLACE).as_deref(), Some(new), "{old}");
        }
        for same in [
            "next",
            "../up",
            "?q",
            "#f",
            "//elsewhere/x",
            "https://e2b.dev/",
            "mailto:a@b",
            "",
            "/sandbox/i0/80/done",
        ] {
            assert_eq!(location(same, &PLACE), None, "{same}");
        }
    }

    #[test]
    fn cookies_stay_inside() {
        let prefix = PLACE.prefix;
        assert_eq!(
            cookie("a=/x; Path=/; HttpOnly", prefix).unwrap(),
            "a=/x; Path=/sandbox/i0/80/; HttpOnly"
        );
        assert_eq!(
            cookie("a=1;path= /app", prefix).unwrap(),
            "a=1;path=/sandbox/i0/80/app"
        );
        assert_eq!(
            cookie("path=/; Secure", prefix),
            None,
            "a cookie named path"
        );
        assert_eq!(cookie("a=1", prefix), None);
        assert_eq!(cookie("a=1; Path=/sandbox/i0/80/x", prefix), None);
        let mut headers = HeaderMap::new();
        for value in ["a=1; Path=/", "b=2"] {
            headers.append(SET_COOKIE, HeaderValue::from_static(value));
        }
        response(&mut headers, &PLACE);
        let cookies: Vec<_> = headers.get_all(SET_COOKIE).iter().collect();
        assert_eq!(cookies, ["a=1; Path=/sandbox/i0/80/", "b=2"]);
    }
}
