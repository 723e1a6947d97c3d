//! Who may have an image, and which way it comes.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "this is all tests")]

mod support;

use std::path::{Path, PathBuf};

use cubicle_image::Progress;
use cubicle_oci::{Auth, Config, Error, ImageMap, Images, Resolved};
use support::{
    place::{Place, image},
    registry::Registry,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_asked_for_and_checked() {
    let registry = support::secured::with_password("alice", "correct horse");
    let name = format!("{}/app:v1", registry.host());
    let mut pusher = support::registry::Pusher::new(format!("http://{}", registry.host()));
    pusher.auth = Some(("alice".into(), "correct horse".into()));
    pusher.push("app", "v1", &image()).await;
    check_credentials(&name, "alice", "correct horse").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_fetched_with_the_password() {
    let (registry, tokens) = support::secured::with_tokens("bob", "hunter2").await;
    let name = format!("{}/team/app:v1", registry.host());
    let mut pusher = support::registry::Pusher::new(format!("http://{}", registry.host()));
    pusher.auth = Some((tokens.for_everything(), String::new()));
    pusher.push("team/app", "v1", &image()).await;
    check_credentials(&name, "bob", "hunter2").await;
}

async fn check_credentials(name: &str, username: &str, password: &str) {
    let auth = |password: &str| Auth {
        username: username.to_owned(),
        password: password.to_owned(),
    };
    let place = Place::new();
    for (given, had) in [(None, false), (Some(auth("wrong")), true)] {
        let error = place
            .images
            .resolve(name, given.as_ref())
            .await
            .unwrap_err();
        assert!(
            matches!(&error, Error::Unauthorized { had_credentials, .. }
            if *had_credentials == had),
            "{error:?}"
        );
        assert!(
            !format!("{error} {error:?}").contains("wrong\""),
            "{error:?}"
        );
    }
    let right = auth(password);
    let Resolved::Image(found) = place.images.resolve(name, Some(&right)).await.unwrap() else {
        panic!("it is an image");
    };
    let silent = Progress::silent();
    for given in [None, Some(auth("wrong"))] {
        let error = place.images.pull(&found, given.as_ref(), &silent).await;
        let error = error.unwrap_err();
        assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
        assert_eq!(place.files(), Vec::<PathBuf>::new());
    }
    let image = place
        .images
        .pull(&found, Some(&right), &silent)
        .await
        .unwrap();
    place.images.disk(&image, 64, &silent).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_ones_own_is_trusted_if_it_is_named() {
    let (registry, ca) = support::secured::with_tls();
    let mut pusher = support::registry::Pusher::new(format!("https://{}", registry.host()));
    pusher.client = ca.client();
    pusher.push("app", "v1", &image()).await;
    let name = format!("{}/app:v1", registry.host());

    let stranger = Place::new();
    let error = stranger.images.resolve(&name, None).await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    let place = Place::with(|config| config.ca_files = vec![ca.file()]);
    place.disk(&name, 64).await.unwrap();

    let config = Config {
        dir: place.directory.path().join("other"),
        ca_files: vec!["/etc/hostname".into()],
        ..Config::default()
    };
    let error = Images::open(config).unwrap_err();
    assert!(matches!(error, Error::Setting { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_and_the_map_lead_elsewhere() {
    let registry = Registry::start();
    let image = image();
    registry.push("hub/library/python", "3", &image).await;
    registry.push("local/node", "latest", &image).await;
    let host = registry.host();
    let nowhere = format!("127.0.0.1:{}", support::registry::free_port());
    let place = Place::with(|config| {
        config.mirrors = vec![
            format!("docker.io={nowhere}").parse().unwrap(),
            format!("docker.io={host}/hub").parse().unwrap(),
        ];
        let map = format!(
            r#"{{"node:*": "{host}/local/node", "debian": "recipe:base", "a": "b", "b": "a"}}"#
        );
        config.map = ImageMap::parse(&map, Path::new("/")).unwrap();
    });
    for name in [
        "python:3",
        "docker.io/library/python:3",
        "node:22",
        "docker.io/library/node:1",
    ] {
        assert_eq!(place.find(name).await.digest, image.digest(), "{name}");
    }
    place.disk("python:3", 64).await.unwrap();
    let recipe = place.images.resolve("debian", None).await.unwrap();
    assert!(matches!(recipe, Resolved::Recipe(name) if name == "base"));
    let error = place.images.resolve("a", None).await.unwrap_err();
    assert!(error.to_string().contains("circle"), "{error}");
    // Who asks for a digest gets that or nothing, whatever the map says.
    let other = format!("node:22@sha256:{}", "1".repeat(64));
    let error = place.images.resolve(&other, None).await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error:?}");
}
