//! Heads of messages, and the connections that they travel on.

use serde_json::{Value, json};

use crate::{
    servers::{envd, forgetful, json_of, server},
    world::{Front, Sandbox, Way, serve},
};

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
    let mask = |sandbox: &mut Sandbox| {
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
async fn http_2_without_tls_is_served_too() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    front.world.open_port(&id, 8000, serve(server()).await);
    let stream = tokio::net::TcpStream::connect(front.address).await.unwrap();
    let executor = hyper_util::rt::TokioExecutor::new();
    let stream = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, stream)
        .await
        .unwrap();
    tokio::spawn(connection);
    for port in [8000, 49983] {
        let uri = format!("http://{port}-{id}.sandboxes.example/process.Process/List?a=b");
        let request = http::Request::post(uri)
            .body(axum::body::Body::from("{}"))
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), 200);
        let body = axum::body::Body::new(response.into_body());
        let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        let seen: Value = serde_json::from_slice(&body).unwrap();
        assert!(
            seen["uri"]
                .as_str()
                .unwrap()
                .ends_with("/process.Process/List?a=b"),
            "{seen}"
        );
        assert_eq!(
            seen["headers"]["x-forwarded-host"],
            format!("{port}-{id}.sandboxes.example")
        );
    }
}
