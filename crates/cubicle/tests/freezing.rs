//! The commands that freeze and wake sandboxes, as a person and as a program sees them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Server, filters};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_session() {
    let server = Server::start().await;
    let id = server.id("sandbox create -t 3600").await;
    let first = server
        .id(&format!("snapshot create {id} --name first"))
        .await;
    let lines = [
        format!("snapshot create {id} --no-memory --ttl 3600"),
        "snapshot ls".to_owned(),
        format!("snapshot ls --sandbox {id} --all"),
        "snapshot tree".to_owned(),
        format!("sandbox rollback {id} {first}"),
        format!("sandbox rollback {id}"),
        format!("sandbox clone {id} -n 2"),
        format!("sandbox pause {id}"),
        "sandbox ls".to_owned(),
        format!("sandbox resume {id} -t 7200"),
        format!("sandbox connect {id}"),
        "snapshot verify --all".to_owned(),
        "snapshot rm first:default nothing".to_owned(),
        "snapshot tree".to_owned(),
    ];
    let session = server.session(&lines).await;
    filters().bind(|| insta::assert_snapshot!(session));
    assert_eq!(server.fleet.alive().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_wrong_is_said_with_what_to_do() {
    let server = Server::start().await;
    let id = server.id("sandbox create -t 3600").await;
    let other = server.id("sandbox create -t 3600").await;
    let foreign = server.id(&format!("snapshot create {other}")).await;
    let unknown = "i0000000000000000000";
    server.fleet.damage(&foreign.parse().unwrap());
    let lines = [
        format!("snapshot create {unknown}"),
        format!("snapshot create {id} --name base"),
        format!("snapshot create {id} --name ../etc"),
        "snapshot info nothing".to_owned(),
        "snapshot info a?b".to_owned(),
        format!("snapshot verify {foreign}"),
        format!("sandbox rollback {id}"),
        format!("sandbox rollback {id} snap-nothing"),
        format!("sandbox pause {unknown}"),
        format!("sandbox resume {unknown}"),
        format!("sandbox clone {unknown}"),
        format!("--json sandbox pause {unknown}"),
        // What cannot be done for one is no reason not to do it for the others.
        format!("sandbox pause {unknown} {other} {id}"),
        format!("sandbox resume {other} {unknown} {id}"),
        format!("sandbox kill {unknown} {other}"),
    ];
    let session = server.session(&lines).await;
    filters().bind(|| insta::assert_snapshot!(session));
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_get_json() {
    let server = Server::start().await;
    let id = server
        .id("sandbox create -t 3600 --auto-pause --auto-resume")
        .await;
    let info = server.json(&format!("sandbox info {id}")).await;
    assert_eq!(
        info["lifecycle"],
        json!({"onTimeout": "pause", "autoResume": true})
    );

    let taken = server
        .json(&format!("snapshot create {id} --name a/b"))
        .await;
    assert_eq!(
        (&taken["tier"], &taken["frozenMs"]),
        (&json!("anonymous_pages"), &json!(5.0))
    );
    assert_eq!(taken["bytesWritten"], 7 << 20);
    let snapshot = taken["snapshotID"].as_str().unwrap();
    for name in [snapshot, "a/b", "a/b:default"] {
        let info = server.json(&format!("snapshot info {name}")).await;
        assert_eq!(info["snapshotID"], snapshot);
        assert_eq!(info["names"], json!(["a/b:default"]));
    }
    let list = server.json("snapshot ls").await;
    assert_eq!(
        (list[0]["snapshotID"].as_str(), &list[1]),
        (Some(snapshot), &json!(null))
    );
    let tree = server.json(&format!("snapshot tree --sandbox {id}")).await;
    assert_eq!(
        (&tree[0]["depth"], &tree[0]["kind"]),
        (&json!(0), &json!("template"))
    );
    assert_eq!(
        (&tree[1]["depth"], tree[1]["snapshotID"].as_str()),
        (&json!(1), Some(snapshot))
    );

    let back = server.json(&format!("sandbox rollback {id} a/b")).await;
    assert_eq!(
        (back["sandboxID"].as_str(), &back["generation"]),
        (Some(id.as_str()), &json!(2))
    );
    let forked = server.json(&format!("sandbox clone {id} -n 3")).await;
    assert_eq!(forked["sandboxes"].as_array().map(Vec::len), Some(3));
    assert!(!forked.to_string().contains("AccessToken"), "{forked}");
    let paused = server
        .json(&format!("sandbox pause {id} --no-memory"))
        .await;
    assert_eq!(
        (paused[0]["sandboxID"].as_str(), &paused[0]["tier"]),
        (Some(id.as_str()), &json!("none"))
    );
    let woken = server
        .json(&format!("sandbox resume {id} --no-memory"))
        .await;
    assert_eq!(woken, json!([{"sandboxID": id, "resumed": true}]));
    let verified = server.json(&format!("snapshot verify {snapshot}")).await;
    assert_eq!(
        (&verified[0]["ok"], &verified[1]),
        (&json!(true), &json!(null))
    );
    let removed = server.json("snapshot rm a/b").await;
    assert_eq!(removed, json!({"removed": ["a/b"], "notFound": []}));
}
