//! What runs in the sandboxes of these tests.

use std::{convert::Infallible, sync::Arc};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Query, Request},
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::{any, get, post},
};
use rand::RngExt as _;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

use crate::world::Front;

/// The port of the guest daemon.
pub(crate) const ENVD: u16 = 49983;

pub(crate) async fn echo(request: Request) -> Response {
    Response::new(request.into_body())
}

pub(crate) async fn describe(request: Request) -> Json<Value> {
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
pub(crate) struct Bounce {
    pub(crate) to: String,
}

pub(crate) async fn bounce(Query(Bounce { to }): Query<Bounce>) -> Response {
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

pub(crate) fn server() -> Router {
    Router::new()
        .route("/echo", post(echo))
        .route("/bounce", get(bounce))
        .route("/nothing", get(|| async { StatusCode::NO_CONTENT }))
        .route("/text", get(|| async { "some text" }))
        .fallback(any(describe))
}

pub(crate) fn envd() -> Router {
    Router::new()
        .route("/files", get(describe).post(echo))
        .fallback(any(describe))
}

pub(crate) fn noise(len: usize) -> Bytes {
    let mut bytes = vec![0; len];
    rand::rng().fill(&mut bytes[..]);
    bytes.into()
}

pub(crate) async fn json_of(response: reqwest::Response) -> Value {
    assert_eq!(response.headers()["content-type"], "application/json");
    serde_json::from_slice(&response.bytes().await.unwrap()).unwrap()
}

/// Sends an item when it is told to, and no earlier.
pub(crate) fn on_demand(kind: &'static str) -> (mpsc::Sender<Bytes>, Router) {
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

/// A server that answers the first request of each connection and closes it when the second comes.
pub(crate) async fn forgetful() -> std::net::SocketAddr {
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

/// Sends a request line as it is; HTTP libraries tidy paths up.
pub(crate) async fn raw(front: &Front, line: &str, headers: &str) -> String {
    let mut stream = TcpStream::connect(front.address).await.unwrap();
    let request =
        format!("{line} HTTP/1.1\r\n{headers}Connection: close\r\nContent-Length: 2\r\n\r\n{{}}");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    response
}
