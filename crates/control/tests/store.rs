//! The template store: what is in it, where it is from, and what installing comes to.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "these are tests")]

mod common;

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use common::Plane;
use cubicle_control::{
    Error,
    store::{CatalogueSource, Entry, Install, StoreConfig},
    template::{BuildSpec, BuildStatus, Probe, Size, Started},
};
use futures::TryStreamExt as _;

/// A catalogue that changes when the test says so.
#[derive(Debug)]
struct Shelf {
    document: Mutex<Result<String, String>>,
    local: bool,
    reads: Mutex<u32>,
}

impl Shelf {
    fn new(local: bool, templates: &str) -> Arc<Self> {
        let shelf = Self {
            document: Mutex::new(Ok(String::new())),
            local,
            reads: Mutex::default(),
        };
        shelf.put(templates);
        Arc::new(shelf)
    }

    fn put(&self, templates: &str) {
        let document = format!(r#"{{"version": 1, "templates": [{templates}]}}"#);
        *self.document.lock().unwrap() = Ok(document);
    }

    fn lose(&self) {
        *self.document.lock().unwrap() = Err("connection refused".into());
    }
}

#[async_trait]
impl CatalogueSource for Shelf {
    fn name(&self) -> String {
        "https://store.example/".into()
    }

    fn is_local(&self) -> bool {
        self.local
    }

    async fn read(&self) -> Result<Vec<u8>, String> {
        *self.reads.lock().unwrap() += 1;
        self.document.lock().unwrap().clone().map(Into::into)
    }
}

const MINE: &str = r#"{"name": "mine", "from": {"recipe": "node"}, "memoryMB": 2048}"#;
const OTHER: &str = r#"{"name": "other", "from": {"recipe": "node"}, "steps": [{"run": "true"}]}"#;

fn recipe(name: &str) -> Entry {
    Entry {
        name: name.into(),
        description: "what it is".into(),
        category: "code".into(),
        size: Size::default(),
        spec: BuildSpec::recipe(name),
    }
}

async fn plane(source: Option<Arc<Shelf>>) -> Plane {
    Plane::with(|config| {
        config.store = StoreConfig {
            recipes: ["base", "code-interpreter-v1", "desktop-browser", "node"]
                .map(recipe)
                .into(),
            source: source.map(|shelf| shelf as Arc<dyn CatalogueSource>),
        };
    })
    .await
}

async fn names(plane: &Plane) -> Vec<String> {
    let catalogue = plane.control.store.list().await.expect("a catalogue");
    let names = catalogue.templates.into_iter().map(|t| t.entry.name);
    names.collect()
}

async fn installed(plane: &Plane, name: &str, wanted: Install) -> Started {
    let started = plane.control.store.install(name, wanted).await.unwrap();
    let lines = plane.control.templates.follow(started.build.id);
    let _: Vec<_> = lines.try_collect().await.unwrap();
    started
}

#[tokio::test]
async fn the_shipped_catalogue_names_what_is_installed() {
    let plane = plane(None).await;
    let catalogue = plane.control.store.list().await.unwrap();
    assert_eq!((catalogue.version, &*catalogue.source), (1, "shipped"));
    let listed: Vec<_> = catalogue
        .templates
        .iter()
        .map(|t| (&*t.entry.name, t.template.is_some()))
        .collect();
    assert_eq!(
        listed,
        [
            ("base", true),
            ("code-interpreter-v1", false),
            ("node", false),
            ("desktop-browser", false)
        ]
    );
}

#[tokio::test]
async fn installing_builds_the_template_once() {
    let plane = plane(Some(Shelf::new(true, MINE))).await;
    let started = installed(&plane, "mine", Install::default()).await;
    assert!(!started.cached);
    let template = plane.control.store.get("mine").await.unwrap().template;
    let template = template.expect("it is there now");
    let build = template.build().unwrap();
    assert_eq!((build.status, build.memory_mib), (BuildStatus::Ready, 2048));

    assert!(installed(&plane, "mine", Install::default()).await.cached);
    let renamed = Install {
        alias: Some("ours:v2".into()),
        memory_mib: Some(512),
        ..Install::default()
    };
    let other = installed(&plane, "mine", renamed).await;
    assert_ne!(other.build.template, template.id);
    let resolved = plane.control.templates.resolve("ours:v2").await.unwrap();
    assert_eq!(resolved.memory_mib, 512);
}

/// A machine starts what its recipe says without being asked.
#[tokio::test]
async fn what_a_recipe_starts_is_not_asked_for_again() {
    let shelf = Shelf::new(
        true,
        r#"{"name": "same", "from": {"recipe": "web"}},
           {"name": "more", "from": {"recipe": "web"}, "start": "serve more"}"#,
    );
    let plane = Plane::with(|config| {
        let mut web = recipe("web");
        web.spec.start = Some("serve".into());
        web.spec.ready = Probe::Tcp { port: 80 };
        config.store = StoreConfig {
            recipes: vec![web],
            source: Some(shelf),
        };
    })
    .await;
    let listed = plane.control.store.get("same").await.unwrap().entry.spec;
    assert_eq!(
        (listed.start.as_deref(), &listed.ready),
        (Some("serve"), &Probe::Tcp { port: 80 })
    );
    for (name, expected) in [("same", None), ("more", Some("serve more"))] {
        let started = plane
            .control
            .store
            .install(name, Install::default())
            .await
            .unwrap();
        let spec = started.build.spec.unwrap();
        assert_eq!(
            (spec.start.as_deref(), spec.ready),
            (expected, Probe::None),
            "{name}"
        );
    }
}

#[tokio::test]
async fn what_is_not_there_is_said() {
    let plane = plane(Some(Shelf::new(true, MINE))).await;
    let error = plane.control.store.get("nope").await.unwrap_err();
    assert!(
        matches!(&error, Error::NotInStore { name } if name == "nope"),
        "{error}"
    );
    let wanted = Install::default();
    let error = plane
        .control
        .store
        .install("nope", wanted)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::NotInStore { .. }));
    let small = Install {
        memory_mib: Some(1),
        ..Install::default()
    };
    let error = plane
        .control
        .store
        .install("mine", small)
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::Invalid {
                field: "memoryMB",
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn a_file_is_read_each_time_and_an_address_when_it_is_time_to() {
    for local in [true, false] {
        let shelf = Shelf::new(local, MINE);
        let plane = plane(Some(shelf.clone())).await;
        assert_eq!(names(&plane).await, ["mine"]);
        shelf.put(&format!("{MINE},{OTHER}"));
        let expected: &[&str] = if local { &["mine", "other"] } else { &["mine"] };
        assert_eq!(names(&plane).await, expected);
        plane.control.store.refresh().await.unwrap();
        assert_eq!(names(&plane).await, ["mine", "other"]);
        assert_eq!(*shelf.reads.lock().unwrap(), if local { 4 } else { 2 });
    }
}

#[tokio::test]
async fn a_catalogue_that_went_away_is_remembered_and_one_that_never_came_is_an_error() {
    let shelf = Shelf::new(true, MINE);
    let plane = plane(Some(shelf.clone())).await;
    shelf.lose();
    let error = plane.control.store.list().await.unwrap_err().to_string();
    assert_eq!(
        error,
        "cannot read the catalogue of the template store from https://store.example/: \
         connection refused"
    );
    shelf.put(MINE);
    assert_eq!(names(&plane).await, ["mine"]);
    shelf.lose();
    let catalogue = plane.control.store.list().await.unwrap();
    assert!(catalogue.stale.unwrap().contains("connection refused"));
    assert_eq!(catalogue.templates.len(), 1);
    assert!(plane.control.store.refresh().await.is_err());
}
