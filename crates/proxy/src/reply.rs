//! Answers that the proxy gives itself.

use axum::body::Body;
use cubicle_ids::SandboxId;
use http::{
    HeaderMap, HeaderName, HeaderValue, Response, StatusCode,
    header::{
        ACCEPT, ACCESS_CONTROL_ALLOW_ORIGIN, CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER, USER_AGENT,
    },
};
use serde_json::json;

use crate::routes::NotWoken;

/// Tells E2B's clients whether the same request may succeed in a moment.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("should-retry");
/// Tells clients of CubeSandbox what became of a request.
const RETCODE: HeaderName = HeaderName::from_static("x-cube-retcode");

/// Values of `X-Cube-Retcode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Retcode {
    Ok,
    BadHost,
    NoSandbox,
    BackendFaulty,
}

impl Retcode {
    fn value(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::Ok => "310200",
            Self::BadHost => "310400",
            Self::NoSandbox => "310507",
            Self::BackendFaulty => "340500",
        })
    }
}

/// Marks a response that a sandbox gave.
pub(crate) fn mark_ok(headers: &mut HeaderMap) {
    headers.insert(RETCODE, Retcode::Ok.value());
}

/// An answer of the proxy's own.
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) retcode: Option<Retcode>,
    pub(crate) body: serde_json::Value,
    /// What a browser shows instead of the JSON.
    pub(crate) page: Option<String>,
    /// Whether the same request may succeed in a moment.
    pub(crate) retry: bool,
}

impl Reply {
    fn new(status: StatusCode, retcode: Option<Retcode>, body: serde_json::Value) -> Self {
        Self {
            status,
            retcode,
            body,
            page: None,
            retry: false,
        }
    }

    fn try_again(self) -> Self {
        Self {
            retry: true,
            ..self
        }
    }

    /// A request that names no sandbox.
    pub(crate) fn refused(reason: &str) -> Self {
        let status = StatusCode::BAD_REQUEST;
        let body = json!({ "code": status.as_u16(), "message": reason });
        Self::new(status, Some(Retcode::BadHost), body)
    }

    /// A signature that no sandbox made.
    pub(crate) fn unsigned() -> Self {
        let status = StatusCode::UNAUTHORIZED;
        let message = "the signature is not valid for any running sandbox";
        Self::new(
            status,
            None,
            json!({ "code": status.as_u16(), "message": message }),
        )
    }

    /// A call of the guest daemon that is not public.
    pub(crate) fn no_such_call(path: &str) -> Self {
        let status = StatusCode::NOT_FOUND;
        let message = format!("{path} is not a call of the sandbox's daemon");
        Self::new(
            status,
            None,
            json!({ "code": status.as_u16(), "message": message }),
        )
    }

    /// Clients look for "was not found" to tell that a sandbox has ended.
    pub(crate) fn no_sandbox(id: &SandboxId) -> Self {
        let reply = Self::about(
            id,
            StatusCode::BAD_GATEWAY,
            "The sandbox was not found",
            Retcode::NoSandbox,
        );
        reply.with_page(
            "Sandbox not found",
            &format!(
                "The sandbox <code>{id}</code> was not found. It has ended, or has never existed."
            ),
        )
    }

    /// A sandbox between two states.
    pub(crate) fn busy(id: &SandboxId) -> Self {
        let message = "The sandbox is changing its state, try again in a moment";
        Self::about(id, StatusCode::CONFLICT, message, Retcode::BackendFaulty).try_again()
    }

    /// A sandbox that began another life, by a rollback or a resume, while a request was under way
    /// that must not be sent twice.
    pub(crate) fn interrupted(id: &SandboxId) -> Self {
        let message = "The sandbox was rolled back or resumed during the request, and may have seen a part of \
                       it: send it again";
        let status = StatusCode::SERVICE_UNAVAILABLE;
        Self::about(id, status, message, Retcode::BackendFaulty).try_again()
    }

    /// A paused sandbox that a request was to wake.
    pub(crate) fn not_woken(id: &SandboxId, why: &NotWoken) -> Self {
        let about = |status| Self::about(id, status, &capital(why), Retcode::BackendFaulty);
        match why {
            NotWoken::Gone => Self::no_sandbox(id),
            NotWoken::Busy => Self::busy(id),
            NotWoken::Refused(_) => about(StatusCode::FORBIDDEN),
            NotWoken::NoRoom(_) => about(StatusCode::SERVICE_UNAVAILABLE).try_again(),
            NotWoken::Failed(_) => about(StatusCode::BAD_GATEWAY),
        }
    }

    /// Clients look for "port is not open".
    pub(crate) fn port_closed(id: &SandboxId, port: u16) -> Self {
        let message = "The sandbox is running but port is not open";
        let mut reply = Self::about(id, StatusCode::BAD_GATEWAY, message, Retcode::BackendFaulty);
        reply.body["port"] = port.into();
        reply.with_page(
            "Port closed",
            &format!(
                "The sandbox <code>{id}</code> is running, but nothing listens on port <code>{port}</code>. \
                 Start a server there, then reload this page."
            ),
        )
    }

    /// A port that is not public.
    pub(crate) fn forbidden(id: &SandboxId) -> Self {
        let message = "The sandbox's ports are not public: send its traffic access token in the header \
                       e2b-traffic-access-token";
        let mut reply = Self::about(id, StatusCode::FORBIDDEN, message, Retcode::Ok);
        reply.retcode = None;
        reply
    }

    /// A sandbox that is there and does not answer.
    pub(crate) fn unreachable(id: &SandboxId) -> Self {
        let message = "The sandbox did not answer the request";
        Self::about(id, StatusCode::BAD_GATEWAY, message, Retcode::BackendFaulty)
    }

    fn about(id: &SandboxId, status: StatusCode, message: &str, retcode: Retcode) -> Self {
        let body = json!({ "sandboxId": id.as_str(), "message": message, "code": status.as_u16() });
        Self::new(status, Some(retcode), body)
    }

    fn with_page(mut self, title: &str, text: &str) -> Self {
        self.page = Some(format!(
            "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title>\
             <style>body{{font:16px/1.5 system-ui,sans-serif;max-width:36em;margin:20vh auto;padding:0 1em;\
             color-scheme:light dark}}</style></head><body><h1>{title}</h1><p>{text}</p></body></html>\n"
        ));
        self
    }

    /// The response, for a client that sent these headers.
    pub(crate) fn into_response(self, request: &HeaderMap) -> Response<Body> {
        let (kind, body) = match self.page {
            Some(page) if is_browser(request) => ("text/html; charset=utf-8", page),
            _ => ("application/json", self.body.to_string()),
        };
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        // A script on a page of another origin has to be able to read what went wrong.
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
        if let Some(retcode) = self.retcode {
            headers.insert(RETCODE, retcode.value());
        }
        if self.retry {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("true"));
        }
        response
    }
}

/// An error as a sentence.
fn capital(error: &NotWoken) -> String {
    let text = error.to_string();
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_uppercase().chain(letters).collect(),
        None => text,
    }
}

fn is_browser(request: &HeaderMap) -> bool {
    let has = |name, text| {
        request
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
            .is_some_and(|value| value.contains(text))
    };
    has(ACCEPT, "text/html") && has(USER_AGENT, "Mozilla")
}
