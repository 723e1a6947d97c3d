//! Who gets in, and what is said to who does not.

use cubicle_proxy::{Availability, FileOperation, SignedFile};
use serde_json::{Value, json};

use crate::{
    servers::{ENVD, envd, json_of, raw, server},
    world::{Front, Way, serve},
};

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

    front.world.becomes.send_replace(Some(Availability::Busy));
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
