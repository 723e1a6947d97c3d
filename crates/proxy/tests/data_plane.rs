//! Requests through the proxy to real servers.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod common;

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Query, Request},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse as _, Response},
    routing::{any, get, post},
};
use common::{Front, WAYS, Way, serve};
use cubicle_proxy::{Availability, FileOperation, SignedFile};
use futures::{SinkExt as _, StreamExt as _};
use rand::RngExt as _;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest as _};

const ENVD: u16 = 49983;

async fn echo(request: Request) -> Response {
    Response::new(request.into_body())
}

async fn describe(request: Request) -> Json<Value> {
    let headers: serde_json::Map<String, Value> = request
        .headers()
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_str().unwrap_or("?").into()))
        .collect();
    Json(
        json!({ "method": request.method().as_str(), "uri": request.uri().to_string(), "headers": headers }),
    )
}

#[derive(serde::Deserialize)]
struct Bounce {
    to: String,
}

async fn bounce(Query(Bounce { to }): Query<Bounce>) -> Response {
    let cookies = [
        ("set-cookie", "a=1; Path=/"),
        ("set-cookie", "b=2; HttpOnly"),
    ];
    let mut response = (StatusCode::FOUND, [("location", to)]).into_response();
    for (name, value) in cookies {
        response.headers_mut().append(name, value.parse().unwrap());
    }
    response
}

fn server() -> Router {
    Router::new()
        .route("/echo", post(echo))
        .route("/bounce", get(bounce))
        .route("/nothing", get(|| async { StatusCode::NO_CONTENT }))
        .route("/text", get(|| async { "some text" }))
        .fallback(any(describe))
}

fn envd() -> Router {
    Router::new()
        .route("/files", get(describe).post(echo))
        .fallback(any(describe))
}

fn noise(len: usize) -> Bytes {
    let mut bytes = vec![0; len];
    rand::rng().fill(&mut bytes[..]);
    bytes.into()
}

async fn json_of(response: reqwest::Response) -> Value {
    assert_eq!(response.headers()["content-type"], "application/json");
    serde_json::from_slice(&response.bytes().await.unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_megabytes_go_both_ways_unharmed() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    front.world.open_port(&id, 8000, serve(server()).await);
    let content = noise(20 << 20);
    for way in WAYS {
        for (port, path) in [(ENVD, "/files"), (8000, "/echo")] {
            for chunked in [false, true] {
                let body = if chunked {
                    let chunks: Vec<Result<Bytes, Infallible>> = content
                        .chunks(99_991)
                        .map(|chunk| Ok(content.slice_ref(chunk)))
                        .collect();
                    reqwest::Body::wrap_stream(futures::stream::iter(chunks))
                } else {
                    content.clone().into()
                };
                let request = front
                    .request(http::Method::POST, way, &id, port, path)
                    .body(body);
                let response = request.send().await.unwrap();
                assert_eq!(response.status(), 200);
                assert_eq!(response.headers()["x-cube-retcode"], "310200");
                let back = response.bytes().await.unwrap();
                assert!(
                    back == content,
                    "{way:?} {port} chunked={chunked}: {} bytes",
                    back.len()
                );
            }
        }
    }
    front.idle().await;
    let metrics = front.proxy.metrics().snapshot();
    assert_eq!(
        (metrics.via_headers, metrics.via_host, metrics.via_path),
        (4, 4, 4)
    );
    assert_eq!(
        (metrics.bytes_in, metrics.bytes_out),
        (12 * (20 << 20), 12 * (20 << 20))
    );
    assert_eq!(metrics.broken_off, 0);
}

#[tokio::test]
async fn websockets_pass_through() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    front
        .world
        .open_port(&id, 8001, listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
                // The close is answered by the library when the stream is read to its end.
                while let Some(Ok(message)) = socket.next().await {
                    if !message.is_close() {
                        socket.send(message).await.unwrap();
                    }
                }
            });
        }
    });
    let address = front.address;
    for way in WAYS {
        let path = match way {
            Way::Path => format!("/sandbox/{id}/8001/socket"),
            _ => "/socket".to_owned(),
        };
        let mut request = format!("ws://{address}{path}")
            .into_client_request()
            .unwrap();
        let headers = request.headers_mut();
        match way {
            Way::Headers => {
                headers.insert("E2b-Sandbox-Id", id.as_str().parse().unwrap());
                headers.insert("E2b-Sandbox-Port", "8001".parse().unwrap());
            }
            Way::Host => {
                headers.insert("Host", format!("8001-{id}.a.example").parse().unwrap());
            }
            Way::Path => {}
        }
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut socket, response) = tokio_tungstenite::client_async(request, stream)
            .await
            .unwrap();
        assert_eq!(response.status(), 101);
        for message in [
            Message::text("hello"),
            Message::binary(noise(1 << 20)),
            Message::text(""),
        ] {
            socket.send(message.clone()).await.unwrap();
            assert_eq!(socket.next().await.unwrap().unwrap(), message);
        }
        socket.close(None).await.unwrap();
        assert!(socket.next().await.unwrap().unwrap().is_close());
    }
    assert_eq!(front.proxy.metrics().snapshot().upgrades, 3);

    // One that is open when the sandbox dies breaks.
    let request = format!("ws://{address}/sandbox/{id}/8001/")
        .into_client_request()
        .unwrap();
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async(request, stream)
        .await
        .unwrap();
    socket.send(Message::text("x")).await.unwrap();
    socket.next().await.unwrap().unwrap();
    front.world.kill(&id);
    let last = tokio::time::timeout(Duration::from_secs(5), socket.next())
        .await
        .unwrap();
    assert!(!matches!(last, Some(Ok(_))), "{last:?}");
}

/// Sends an item when it is told to, and no earlier.
fn on_demand(kind: &'static str) -> (mpsc::Sender<Bytes>, Router) {
    let (sender, receiver) = mpsc::channel::<Bytes>(1);
    let receiver = Arc::new(tokio::sync::Mutex::new(receiver));
    let route = any(move || {
        let receiver = Arc::clone(&receiver);
        async move {
            let items = futures::stream::unfold(receiver, |receiver| async {
                let item = receiver.lock().await.recv().await?;
                Some((Ok::<_, Infallible>(item), receiver))
            });
            ([("content-type", kind)], Body::from_stream(items))
        }
    });
    (
        sender,
        Router::new().route("/files", route.clone()).fallback(route),
    )
}

#[tokio::test]
async fn every_event_arrives_before_the_next_is_sent() {
    let front = Front::start().await;
    let (events, router) = on_demand("text/event-stream");
    let id = front.world.add(router.clone());
    front.world.open_port(&id, 8000, serve(router).await);
    for port in [8000, ENVD] {
        let mut slowest = Duration::ZERO;
        let response = front
            .get(Way::Headers, &id, port, "/files")
            .send()
            .await
            .unwrap();
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let mut stream = response.bytes_stream();
        for number in 0..50 {
            let event = Bytes::from(format!("data: {number}\n\n"));
            let sent = Instant::now();
            events.send(event.clone()).await.unwrap();
            // If it were held back for company, this would wait for ever: none comes.
            let arrived = tokio::time::timeout(Duration::from_secs(10), stream.next()).await;
            assert_eq!(
                arrived.expect("an event is held back").unwrap().unwrap(),
                event
            );
            slowest = slowest.max(sent.elapsed());
        }
        eprintln!("port {port}: slowest of 50 events {slowest:?}");
        drop(stream);
        // The client left: so does the request, once the server notices.
        let _ = events.send(Bytes::from_static(b"x")).await;
        front.idle().await;
    }
}

#[tokio::test]
async fn a_sandbox_that_dies_breaks_its_responses_off() {
    for port in [8000, ENVD] {
        let front = Front::start().await;
        let (items, router) = on_demand("application/x-ndjson");
        let id = front.world.add(router.clone());
        front.world.open_port(&id, 8000, serve(router).await);
        let response = front
            .get(Way::Host, &id, port, "/files")
            .send()
            .await
            .unwrap();
        let mut stream = response.bytes_stream();
        items.send(Bytes::from_static(b"{}\n")).await.unwrap();
        assert_eq!(stream.next().await.unwrap().unwrap(), "{}\n");
        front.world.kill(&id);
        let last = tokio::time::timeout(Duration::from_secs(5), stream.next())
            .await
            .unwrap();
        assert!(
            matches!(last, Some(Err(_))),
            "port {port}: a clean end would be a lie: {last:?}"
        );
        assert_eq!(front.proxy.metrics().snapshot().broken_off, 1);
        let after = front
            .get(Way::Host, &id, port, "/health")
            .send()
            .await
            .unwrap();
        assert_eq!(after.status(), 502);
        assert_eq!(json_of(after).await["message"], "The sandbox was not found");
        front.idle().await;
    }
}

#[tokio::test]
async fn connections_are_kept_within_a_generation() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    front.world.open_port(&id, 8000, serve(server()).await);
    let get = || async {
        let response = front
            .get(Way::Path, &id, 8000, "/text")
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.text().await.unwrap(), "some text");
    };
    for _ in 0..10 {
        get().await;
    }
    assert_eq!(front.world.connections(), 1);
    front.world.next_generation(&id);
    for _ in 0..10 {
        get().await;
    }
    assert_eq!(front.world.connections(), 2);
    assert_eq!(front.proxy.metrics().snapshot().connections, 2);
}

/// A server that answers the first request of each connection and closes it when the second comes.
async fn forgetful() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = vec![0; 64 << 10];
                let _ = stream.read(&mut buffer).await.unwrap();
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                    .await
                    .unwrap();
                let _ = stream.read(&mut buffer).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn a_stale_connection_is_replaced_when_that_is_harmless() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    front.world.open_port(&id, 8000, forgetful().await);
    for _ in 0..3 {
        let response = front
            .get(Way::Headers, &id, 8000, "/")
            .send()
            .await
            .unwrap();
        assert_eq!(
            (response.status().as_u16(), response.text().await.unwrap()),
            (200, "ok".into())
        );
    }
    assert_eq!(front.proxy.metrics().snapshot().retried, 2);
    // Who knows what a POST has done already.
    let post = front
        .request(http::Method::POST, Way::Headers, &id, 8000, "/")
        .body("x");
    let response = post.send().await.unwrap();
    assert_eq!(response.status(), 502);
    let body = json_of(response).await;
    assert_eq!(body["message"], "The sandbox did not answer the request");
    assert_eq!(front.proxy.metrics().snapshot().retried, 2);
}

#[tokio::test]
async fn redirects_and_cookies_stay_below_the_path() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    front.world.open_port(&id, 8000, serve(server()).await);
    let prefix = format!("/sandbox/{id}/8000");
    let own = format!("http://{}/a?b", front.address);
    for (to, expected) in [
        ("/login?x=1", format!("{prefix}/login?x=1")),
        (own.as_str(), format!("{prefix}/a?b")),
        ("http://localhost:8000/", format!("{prefix}/")),
        ("https://example.com/", "https://example.com/".to_owned()),
        ("relative", "relative".to_owned()),
    ] {
        let request = front
            .get(Way::Path, &id, 8000, "/bounce")
            .query(&[("to", to)]);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 302);
        assert_eq!(response.headers()["location"], expected, "{to}");
        let cookies: Vec<_> = response.headers().get_all("set-cookie").iter().collect();
        assert_eq!(
            cookies,
            [format!("a=1; Path={prefix}/").as_str(), "b=2; HttpOnly"]
        );
    }
    // Otherwise the sandbox's root is the client's.
    let request = front
        .get(Way::Host, &id, 8000, "/bounce")
        .query(&[("to", "/login")]);
    let response = request.send().await.unwrap();
    assert_eq!(response.headers()["location"], "/login");
    assert_eq!(response.headers()["set-cookie"], "a=1; Path=/");
}

#[tokio::test]
async fn the_server_sees_where_a_request_came_from() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    front.world.open_port(&id, 8000, serve(server()).await);
    let request = front.get(Way::Path, &id, 8000, "/a%2Fb//c?d=e%20f");
    let request = request
        .header("connection", "x-private")
        .header("x-private", "1");
    let seen = json_of(request.header("x-kept", "2").send().await.unwrap()).await;
    assert_eq!(
        seen["uri"], "/a%2Fb//c?d=e%20f",
        "a path is passed on as it is spelled"
    );
    let headers = &seen["headers"];
    assert_eq!(headers["host"], front.address.to_string());
    assert_eq!(headers["x-forwarded-for"], "127.0.0.1");
    assert_eq!(headers["x-forwarded-host"], front.address.to_string());
    assert_eq!(headers["x-forwarded-proto"], "http");
    assert_eq!(headers["x-forwarded-prefix"], format!("/sandbox/{id}/8000"));
    assert_eq!(
        (&headers["x-private"], &headers["x-kept"]),
        (&Value::Null, &json!("2"))
    );

    let host = format!("8000-{id}.sandboxes.example");
    let seen = json_of(front.get(Way::Host, &id, 8000, "/").send().await.unwrap()).await;
    assert_eq!(seen["headers"]["host"], host, "as the client sent it");
    let mask = |sandbox: &mut common::Sandbox| {
        sandbox.route.mask_request_host = Some("localhost:${PORT}".to_owned());
    };
    front.world.change(&id, mask);
    let seen = json_of(front.get(Way::Host, &id, 8000, "/").send().await.unwrap()).await;
    assert_eq!(seen["headers"]["host"], "localhost:8000");
    assert_eq!(seen["headers"]["x-forwarded-host"], host);
    // No port after the prefix is the root.
    let bare = front.get(Way::Path, &id, 8000, "").send().await.unwrap();
    assert_eq!(json_of(bare).await["uri"], "/");
}

#[tokio::test]
async fn bodies_that_must_be_empty_are() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    front.world.open_port(&id, 8000, serve(server()).await);
    let head = front.request(http::Method::HEAD, Way::Host, &id, 8000, "/text");
    let response = head.send().await.unwrap();
    assert_eq!(response.headers()["content-length"], "9");
    assert_eq!(response.text().await.unwrap(), "");
    let response = front
        .get(Way::Host, &id, 8000, "/nothing")
        .send()
        .await
        .unwrap();
    assert_eq!(
        (response.status().as_u16(), response.text().await.unwrap()),
        (204, String::new())
    );
    let response = front
        .get(Way::Host, &id, 8000, "/text")
        .send()
        .await
        .unwrap();
    assert_eq!(
        response.headers()["content-length"],
        "9",
        "a known length stays known"
    );
    let get = json_of(front.get(Way::Host, &id, 8000, "/x").send().await.unwrap()).await;
    assert_eq!(get["headers"]["transfer-encoding"], Value::Null);
}

#[tokio::test]
async fn what_goes_wrong_is_said_as_clients_expect_it() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    let gone = cubicle_ids::SandboxId::generate();

    let response = front
        .get(Way::Headers, &gone, ENVD, "/health")
        .send()
        .await
        .unwrap();
    assert_eq!(
        (
            response.status().as_u16(),
            &response.headers()["x-cube-retcode"]
        ),
        (502, &"310507".parse().unwrap())
    );
    assert_eq!(response.headers()["access-control-allow-origin"], "*");
    let expected =
        json!({ "sandboxId": gone.as_str(), "message": "The sandbox was not found", "code": 502 });
    assert_eq!(json_of(response).await, expected);

    let response = front.get(Way::Host, &id, 8080, "/").send().await.unwrap();
    assert_eq!(
        (
            response.status().as_u16(),
            &response.headers()["x-cube-retcode"]
        ),
        (502, &"340500".parse().unwrap())
    );
    let message = "The sandbox is running but port is not open";
    let expected =
        json!({ "sandboxId": id.as_str(), "message": message, "code": 502, "port": 8080 });
    assert_eq!(json_of(response).await, expected);

    let browser = front
        .get(Way::Host, &id, 8080, "/")
        .header("accept", "text/html,*/*");
    let response = browser
        .header("user-agent", "Mozilla/5.0 (X11)")
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 502);
    assert!(
        response.headers()["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/html")
    );
    assert!(response.text().await.unwrap().contains("<code>8080</code>"));

    let bad = front
        .client
        .get(format!("http://{}/sandbox/{id}/http/", front.address));
    let response = bad.send().await.unwrap();
    assert_eq!(
        (
            response.status().as_u16(),
            &response.headers()["x-cube-retcode"]
        ),
        (400, &"310400".parse().unwrap())
    );
    assert_eq!(json_of(response).await["code"], 400);
    let bad = front
        .client
        .get(format!("http://{}/", front.address))
        .header("Host", "0-i0.example");
    assert_eq!(bad.send().await.unwrap().status(), 400);

    front.world.change(&id, |sandbox| {
        sandbox.route.availability = Availability::Busy
    });
    assert_eq!(
        front
            .get(Way::Host, &id, ENVD, "/health")
            .send()
            .await
            .unwrap()
            .status(),
        409
    );
    front.world.change(&id, |sandbox| {
        sandbox.route.availability = Availability::Away
    });
    assert_eq!(
        front
            .get(Way::Host, &id, ENVD, "/health")
            .send()
            .await
            .unwrap()
            .status(),
        502
    );

    let api = front
        .client
        .get(format!("http://{}/sandboxes", front.address))
        .send()
        .await
        .unwrap();
    assert_eq!(api.text().await.unwrap(), "the API");
    let metrics = front.proxy.metrics().snapshot();
    assert_eq!(
        (metrics.not_found, metrics.port_closed, metrics.refused),
        (2, 2, 2)
    );
}

#[tokio::test]
async fn ports_that_are_not_public_want_the_token() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    front.world.open_port(&id, 8000, serve(server()).await);
    front.world.change(&id, |sandbox| {
        sandbox.route.traffic_token = Some("secret".to_owned())
    });
    let send = async |port, name: &'static str, token: &'static str| {
        let request = front.get(Way::Headers, &id, port, "/health");
        request.header(name, token).send().await.unwrap()
    };
    let response = send(8000, "x-other", "secret").await;
    assert_eq!(response.status(), 403);
    let body = json_of(response).await;
    assert_eq!(
        (&body["sandboxId"], &body["code"]),
        (&json!(id.as_str()), &json!(403))
    );
    assert_eq!(
        send(8000, "e2b-traffic-access-token", "wrong")
            .await
            .status(),
        403
    );
    assert_eq!(
        send(8001, "e2b-traffic-access-token", "wrong")
            .await
            .status(),
        403,
        "open or not"
    );
    for name in ["e2b-traffic-access-token", "cube-traffic-access-token"] {
        let response = send(8000, name, "secret").await;
        assert_eq!(response.status(), 200);
        assert_eq!(
            json_of(response).await["headers"][name],
            Value::Null,
            "it stays outside"
        );
    }
    assert_eq!(
        send(ENVD, "x-other", "").await.status(),
        200,
        "envd has a token of its own"
    );
}

/// Sends a request line as it is; HTTP libraries tidy paths up.
async fn raw(front: &Front, line: &str, headers: &str) -> String {
    let mut stream = TcpStream::connect(front.address).await.unwrap();
    let request =
        format!("{line} HTTP/1.1\r\n{headers}Connection: close\r\nContent-Length: 2\r\n\r\n{{}}");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    response
}

#[tokio::test]
async fn calls_of_the_host_stay_with_the_host() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    let host = format!("Host: {ENVD}-{id}.a.example\r\n");
    for path in [
        "/init",
        "//init",
        "/./init",
        "/%69nit",
        "/init/",
        "/init?x=/health",
        "/health/../init",
        "/files/..%2finit",
        "/INIT",
        "/freeze",
        "/unfreeze",
        "/logs",
        "/fsfreeze",
        "/fsthaw",
        "/collapse",
        "/process.Process/..%2f..%2finit",
        "http://envd/init",
        "/",
        "*",
    ] {
        let response = raw(&front, &format!("POST {path}"), &host).await;
        assert!(response.starts_with("HTTP/1.1 404 "), "{path}: {response}");
        assert!(response.contains("\"code\":404"), "{path}: {response}");
        let prefixed = format!("POST /sandbox/{id}/{ENVD}{path}");
        let response = raw(&front, &prefixed, "Host: localhost\r\n").await;
        assert!(
            response.starts_with("HTTP/1.1 404 ") || response.starts_with("HTTP/1.1 400 "),
            "{path}: {response}"
        );
    }
    let ok = raw(&front, "POST /process.Process/List", &host).await;
    assert!(ok.starts_with("HTTP/1.1 200 "), "{ok}");
    // An upgrade is no way around it either.
    let upgrade = format!("{host}Upgrade: h2c\r\n");
    assert!(
        raw(&front, "GET /init", &upgrade)
            .await
            .starts_with("HTTP/1.1 404 ")
    );
}

#[tokio::test]
async fn a_signature_finds_its_sandbox() {
    let front = Front::start().await;
    let [_, id] = [(); 2].map(|()| front.world.add(envd()));
    let file = SignedFile {
        path: "/home/user/a b".to_owned(),
        operation: FileOperation::Write,
        user: None,
        expiration: None,
        signature: "v1_abc".to_owned(),
    };
    front
        .world
        .change(&id, |sandbox| sandbox.signature = Some(file));
    let url = format!(
        "http://{}/files?path=%2Fhome%2Fuser%2Fa+b&signature=v1_abc",
        front.address
    );
    let response = front
        .client
        .post(&url)
        .body("content")
        .send()
        .await
        .unwrap();
    assert_eq!(
        (response.status().as_u16(), response.text().await.unwrap()),
        (200, "content".into())
    );
    let response = front.client.get(&url).send().await.unwrap();
    assert_eq!(response.status(), 401, "it was signed for writing");
    assert_eq!(json_of(response).await["code"], 401);
    assert_eq!(front.proxy.metrics().snapshot().via_signature, 1);
}

#[tokio::test]
async fn the_body_of_a_post_is_answered_while_it_is_sent() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    front.world.open_port(&id, 8000, serve(server()).await);
    for (port, path) in [(8000, "/echo"), (ENVD, "/files")] {
        let (sender, receiver) = mpsc::channel::<Result<Bytes, Infallible>>(1);
        let items = futures::stream::unfold(receiver, |mut receiver| async {
            Some((receiver.recv().await?, receiver))
        });
        let request = front.request(http::Method::POST, Way::Headers, &id, port, path);
        let sending = tokio::spawn(request.body(reqwest::Body::wrap_stream(items)).send());
        sender.send(Ok(Bytes::from_static(b"first"))).await.unwrap();
        let mut back = sending.await.unwrap().unwrap().bytes_stream();
        assert_eq!(back.next().await.unwrap().unwrap(), "first");
        sender
            .send(Ok(Bytes::from_static(b"second")))
            .await
            .unwrap();
        assert_eq!(back.next().await.unwrap().unwrap(), "second");
        drop(sender);
        assert!(back.next().await.is_none());
    }
}

#[tokio::test]
async fn an_upload_that_breaks_off_is_not_taken_for_complete() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    let (lengths, mut seen) = mpsc::channel(1);
    let take = post(move |request: Request| {
        let lengths = lengths.clone();
        async move {
            let outcome = axum::body::to_bytes(request.into_body(), usize::MAX).await;
            lengths
                .send(outcome.map(|body| body.len()).ok())
                .await
                .unwrap();
        }
    });
    front
        .world
        .open_port(&id, 8000, serve(Router::new().route("/", take)).await);
    let mut stream = TcpStream::connect(front.address).await.unwrap();
    let head = format!(
        "POST /sandbox/{id}/8000/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    drop(stream);
    let outcome = tokio::time::timeout(Duration::from_secs(5), seen.recv())
        .await
        .unwrap();
    assert_eq!(
        outcome,
        Some(None),
        "the server must learn that the client left"
    );
    front.idle().await;
}

#[tokio::test]
async fn headers_of_the_test_servers_are_as_assumed() {
    // The echo server of these tests must not invent what they check.
    let response = reqwest::Client::builder().no_proxy().build().unwrap();
    let address = serve(server()).await;
    let seen = response
        .get(format!("http://{address}/x"))
        .send()
        .await
        .unwrap();
    let headers: HeaderMap = seen.headers().clone();
    assert!(headers.get("x-cube-retcode").is_none());
    assert_eq!(
        json_of(seen).await["headers"]["x-forwarded-for"],
        Value::Null
    );
}
