//! Bodies, events and sockets: what flows.

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use axum::{Router, body::Bytes, extract::Request, routing::post};
use futures::{SinkExt as _, StreamExt as _};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest as _};

use crate::{
    servers::{ENVD, envd, json_of, noise, on_demand, server},
    world::{Front, WAYS, Way, serve},
};

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
