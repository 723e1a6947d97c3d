//! The description of the API that is checked in is the one that the server gives.

mod common;

use common::Server;

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");

#[tokio::test]
async fn the_checked_in_description_is_up_to_date() {
    let mut fresh =
        serde_json::to_string_pretty(&cubicle_api::openapi()).expect("the description is JSON");
    fresh.push('\n');
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(PATH, &fresh).expect("write docs/openapi.json");
    }
    let checked_in = std::fs::read_to_string(PATH).unwrap_or_default();
    assert!(
        checked_in == fresh,
        "docs/openapi.json is stale; refresh it with\n    \
         UPDATE_OPENAPI=1 cargo test -p cubicle-api --test openapi"
    );
    let served = Server::new()
        .await
        .get("/openapi.json")
        .await
        .expect(200)
        .json();
    assert_eq!(
        served,
        serde_json::from_str::<serde_json::Value>(&fresh).expect("JSON")
    );
}

#[test]
fn every_path_is_described_with_its_parameters() {
    let description = serde_json::to_value(cubicle_api::openapi()).expect("JSON");
    let paths = description["paths"].as_object().expect("paths");
    for wanted in [
        "/sandboxes",
        "/v2/sandboxes/{sandboxID}/connect",
        "/templates/{templateID}/builds/{buildID}/status",
        "/cubeapi/v1/cluster/overview",
        "/cubicle/v1/templates/{name}/build",
        "/health",
    ] {
        assert!(paths.contains_key(wanted), "{wanted}");
    }
    for (path, operations) in paths {
        let in_path = path.matches('{').count();
        for (method, operation) in operations.as_object().expect("operations") {
            let described = operation["parameters"]
                .as_array()
                .map_or(0, |all| all.iter().filter(|p| p["in"] == "path").count());
            assert_eq!(described, in_path, "{method} {path}");
        }
    }
}
