//! Requests to sandboxes that are rolled back, paused and woken meanwhile.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use axum::{Router, body::Bytes, routing::any};
use cubicle_ids::SandboxId;
use cubicle_proxy::{Availability, NotWoken};
use futures::StreamExt as _;
use http::Method;
use tokio::sync::watch;

use crate::{
    servers::{ENVD, envd, json_of, on_demand, server},
    world::{Front, Way, serve},
};

/// Longer than anything here may take.
const SOON: Duration = Duration::from_secs(5);

/// A server that answers `late` requests when the gate opens, and others at once.
fn gated() -> (watch::Sender<bool>, Router) {
    let (open, gate) = watch::channel(false);
    let late = any(move || {
        let mut gate = gate.clone();
        async move {
            let _ = gate.wait_for(|open| *open).await;
            "late"
        }
    });
    let router = Router::new()
        .route("/late", late.clone())
        .route("/files", late)
        .fallback(any(|| async { "at once" }));
    (open, router)
}

/// Waits until this many requests are under way.
async fn under_way(front: &Front, count: u64) {
    let since = Instant::now();
    while front.proxy.metrics().snapshot().active < count {
        assert!(since.elapsed() < SOON, "the requests do not arrive");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    // Counted just before they are sent on.
    tokio::time::sleep(Duration::from_millis(50)).await;
}

async fn gated_front() -> (Front, SandboxId, watch::Sender<bool>) {
    let front = Front::start().await;
    let (open, router) = gated();
    let id = front.world.add(router.clone());
    front.world.open_port(&id, 8000, serve(router).await);
    (front, id, open)
}

#[tokio::test]
async fn a_harmless_request_goes_on_in_the_next_life() {
    let (front, id, open) = gated_front().await;
    for (round, (port, path)) in [(8000, "/late"), (ENVD, "/files")].into_iter().enumerate() {
        open.send_replace(false);
        let request = front.get(Way::Headers, &id, port, path);
        let answer = tokio::spawn(request.send());
        under_way(&front, 1).await;
        // The old life ends before the routing table has heard of the new one.
        front.world.switch(&id);
        let since = Instant::now();
        open.send_replace(true);
        let response = tokio::time::timeout(SOON, answer)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert_eq!(response.status(), 200, "port {port}");
        assert_eq!(response.text().await.unwrap(), "late");
        assert!(
            since.elapsed() < Duration::from_secs(1),
            "no stall: {:?}",
            since.elapsed()
        );
        let metrics = front.proxy.metrics().snapshot();
        assert!(metrics.retried > round as u64, "{metrics:?}");
        assert_eq!((metrics.interrupted, metrics.unreachable), (0, 0));
    }
}

#[tokio::test]
async fn a_request_that_did_something_gets_one_clear_error_at_once() {
    let (front, id, _open) = gated_front().await;
    for (count, (port, path)) in (1..).zip([(8000, "/late"), (ENVD, "/files")]) {
        let request = front
            .request(Method::POST, Way::Host, &id, port, path)
            .body("x");
        let answer = tokio::spawn(request.send());
        under_way(&front, 1).await;
        let since = Instant::now();
        front.world.switch(&id);
        let response = tokio::time::timeout(SOON, answer)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert!(
            since.elapsed() < Duration::from_secs(1),
            "{:?}",
            since.elapsed()
        );
        assert_eq!(response.status(), 503, "port {port}");
        assert_eq!(response.headers()["should-retry"], "true");
        assert_eq!(response.headers()["retry-after"], "1");
        let body = json_of(response).await;
        assert_eq!(
            (&body["code"], &body["sandboxId"]),
            (&503.into(), &id.as_str().into())
        );
        assert!(
            body["message"].as_str().unwrap().contains("send it again"),
            "{body}"
        );
        assert_eq!(front.proxy.metrics().snapshot().interrupted, count);
        // What is sent again arrives.
        let request = front
            .request(Method::POST, Way::Host, &id, port, "/health")
            .body("x");
        assert_eq!(request.send().await.unwrap().status(), 200);
    }
    front.idle().await;
}

#[tokio::test]
async fn many_requests_during_many_rollbacks_all_end_well() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    front.world.open_port(&id, 8000, serve(server()).await);
    let (mut fine, mut retryable) = (0, 0);
    for _ in 0..30 {
        let requests: Vec<_> = (0..8)
            .map(|n| {
                let (method, path) = match n % 2 {
                    0 => (Method::GET, "/text"),
                    _ => (Method::POST, "/echo"),
                };
                let request = front.request(method, Way::Path, &id, 8000, path);
                tokio::spawn(
                    if n % 2 == 0 {
                        request
                    } else {
                        request.body("x")
                    }
                    .send(),
                )
            })
            .collect();
        tokio::task::yield_now().await;
        front.world.next_generation(&id);
        for request in requests {
            let response = tokio::time::timeout(SOON, request).await.expect("no stall");
            let response = response.unwrap().unwrap();
            match response.status().as_u16() {
                // A body may still break off; its end tells.
                200 => fine += usize::from(response.bytes().await.is_ok()),
                503 => retryable += 1,
                other => panic!("{other}: {}", response.text().await.unwrap()),
            }
        }
    }
    assert!(fine >= 100, "{fine} answered, {retryable} to be sent again");
    front.idle().await;
}

#[tokio::test]
async fn a_stream_of_the_old_life_breaks_off() {
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
        front.world.next_generation(&id);
        let last = tokio::time::timeout(Duration::from_secs(1), stream.next()).await;
        assert!(matches!(last, Ok(Some(Err(_)))), "port {port}: {last:?}");
        front.idle().await;
    }
}

#[tokio::test]
async fn nothing_of_an_old_life_stays_open() {
    let front = Front::start().await;
    let (items, router) = on_demand("application/x-ndjson");
    let id = front.world.add(envd());
    front.world.open_port(&id, 8000, serve(router).await);
    front.world.open_port(&id, 8001, serve(server()).await);
    for round in 0..50 {
        let mut streams = Vec::new();
        for _ in 0..3 {
            let response = front.get(Way::Host, &id, 8000, "/").send().await.unwrap();
            streams.push(response.bytes_stream());
        }
        // And one that is kept for the next request.
        let text = front
            .get(Way::Host, &id, 8001, "/text")
            .send()
            .await
            .unwrap();
        assert_eq!(text.text().await.unwrap(), "some text");
        assert_eq!(front.world.open.load(Ordering::SeqCst), 4, "round {round}");
        let since = Instant::now();
        front.world.next_generation(&id);
        for mut stream in streams {
            let last = tokio::time::timeout(Duration::from_secs(1), stream.next()).await;
            assert!(matches!(last, Ok(Some(Err(_)))), "round {round}: {last:?}");
        }
        while front.world.open.load(Ordering::SeqCst) > 0 {
            assert!(since.elapsed() < Duration::from_secs(1), "round {round}");
            tokio::task::yield_now().await;
        }
    }
    drop(items);
    front.idle().await;
}

#[tokio::test]
async fn a_request_wakes_a_sandbox_that_may_be_woken() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    front.world.open_port(&id, 8000, serve(server()).await);
    front.world.wakes.lock().unwrap().takes = Duration::from_millis(50);
    for (port, path, method) in [
        (8000, "/text", Method::GET),
        (ENVD, "/health", Method::GET),
        (8000, "/echo", Method::POST),
    ] {
        front.world.sleep(&id);
        let request = front.request(method, Way::Host, &id, port, path).body("x");
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200, "{port}{path}");
    }
    assert_eq!(front.proxy.metrics().snapshot().woken, 3);
    assert_eq!(front.world.wakes.lock().unwrap().asked, 3);

    // One that falls asleep during a request is woken for it, if it can be sent again.
    let (front, id, open) = gated_front().await;
    let answer = tokio::spawn(front.get(Way::Path, &id, 8000, "/late").send());
    under_way(&front, 1).await;
    front.world.sleep(&id);
    open.send_replace(true);
    let response = tokio::time::timeout(SOON, answer)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(front.proxy.metrics().snapshot().woken, 1);
}

#[tokio::test]
async fn a_token_is_asked_for_before_anything_is_woken() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    front.world.open_port(&id, 8000, serve(server()).await);
    front.world.sleep(&id);
    front.world.change(&id, |sandbox| {
        sandbox.route.traffic_token = Some("t".into());
    });
    let refused = front
        .get(Way::Host, &id, 8000, "/text")
        .send()
        .await
        .unwrap();
    assert_eq!(refused.status(), 403);
    assert_eq!(front.world.wakes.lock().unwrap().asked, 0);
    let request = front.get(Way::Host, &id, 8000, "/text");
    let response = request
        .header("e2b-traffic-access-token", "t")
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn why_a_sandbox_did_not_wake_is_said_as_clients_expect_it() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    let cases = [
        (NotWoken::Gone, 502, "The sandbox was not found", false),
        (
            NotWoken::Refused("no memory was kept".into()),
            403,
            "no memory was kept",
            false,
        ),
        (NotWoken::Busy, 409, "try again", true),
        (
            NotWoken::NoRoom("every slot is taken".into()),
            503,
            "every slot is taken",
            true,
        ),
        (
            NotWoken::Failed("the snapshot is damaged".into()),
            502,
            "the snapshot is damaged",
            false,
        ),
    ];
    for (count, (why, status, words, retry)) in (1..).zip(cases) {
        front.world.sleep(&id);
        front.world.wakes.lock().unwrap().refuse = Some(why.clone());
        let response = front
            .get(Way::Headers, &id, ENVD, "/health")
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), status, "{why}");
        assert_eq!(
            response.headers().contains_key("should-retry"),
            retry,
            "{why}"
        );
        let body = json_of(response).await;
        assert!(body["message"].as_str().unwrap().contains(words), "{body}");
        assert_eq!(front.proxy.metrics().snapshot().not_woken, count);
    }
    // A sandbox that stays paused looks like one that is gone.
    front.world.change(&id, |sandbox| {
        sandbox.route.availability = Availability::Away;
    });
    let response = front
        .get(Way::Headers, &id, ENVD, "/health")
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 502);
    assert_eq!(
        json_of(response).await["message"],
        "The sandbox was not found"
    );
}

#[tokio::test]
async fn a_request_waits_for_a_sandbox_that_is_between_two_states() {
    let front = Front::start().await;
    let id = front.world.add(envd());
    for (becomes, status) in [
        (Availability::Running, 200),
        (Availability::Asleep, 200),
        (Availability::Away, 502),
    ] {
        front.world.becomes.send_replace(None);
        front.world.change(&id, |sandbox| {
            sandbox.route.availability = Availability::Busy;
        });
        let request = front.get(Way::Headers, &id, ENVD, "/health");
        let mut answer = tokio::spawn(request.send());
        let early = tokio::time::timeout(Duration::from_millis(100), &mut answer).await;
        assert!(early.is_err(), "it does not wait");
        front.world.becomes.send_replace(Some(becomes));
        let response = tokio::time::timeout(SOON, answer).await;
        assert_eq!(
            response.unwrap().unwrap().unwrap().status(),
            status,
            "{becomes:?}"
        );
    }
    // One that never gets anywhere is said to be busy.
    front.world.becomes.send_replace(Some(Availability::Busy));
    front.world.change(&id, |sandbox| {
        sandbox.route.availability = Availability::Busy;
    });
    let request = front.get(Way::Headers, &id, ENVD, "/health");
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), 409);
    assert_eq!(response.headers()["retry-after"], "1");
}
