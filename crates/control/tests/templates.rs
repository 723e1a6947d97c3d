//! Lives of templates.

mod common;

use std::time::Duration;

use common::{Plane, request};
use cubicle_control::{
    Error,
    fleet::memory::Step,
    template::{BuildSpec, BuildStatus, BuildTemplate, LogPage, Size},
};
use futures::TryStreamExt as _;

const SIZE: Size = Size {
    cpu_count: 1,
    memory_mib: 256,
    disk_mib: 1024,
};

fn order(name: &str) -> BuildTemplate {
    BuildTemplate {
        name: name.into(),
        tags: Vec::new(),
        size: SIZE,
        spec: BuildSpec {
            force: true,
            ..BuildSpec::recipe("base")
        },
        request_id: None,
    }
}

#[tokio::test]
async fn a_build_can_be_followed_and_read_back() {
    let plane = Plane::new().await;
    let templates = &plane.control.templates;
    let build = plane.start_build("web").await;
    assert_eq!(build.status, BuildStatus::Waiting);
    let followed: Vec<_> = templates
        .follow(build.id)
        .try_collect()
        .await
        .expect("follow");
    let read = templates
        .build_log(build.id, LogPage::from(0, 100))
        .await
        .expect("read");
    assert_eq!(followed, read);
    let messages: Vec<_> = read.iter().map(|line| line.message.as_str()).collect();
    assert_eq!(messages[0], "FROM recipe base");
    let last = messages.last().expect("line");
    assert!(last.starts_with("the template is ready after "), "{last}");
    assert!(
        templates
            .build_log(build.id, LogPage::from(read.len() as u64, 100))
            .await
            .expect("tail")
            .is_empty()
    );
    let late: Vec<_> = templates
        .follow(build.id)
        .try_collect()
        .await
        .expect("after its end");
    assert_eq!(late, read);

    let template = templates.get("web").await.expect("get");
    assert_eq!(template.aliases, ["web"]);
    assert_eq!(template.current, Some(build.id));
    let built = templates
        .build_of("web", &build.id.to_string())
        .await
        .expect("build");
    assert_eq!(built.status, BuildStatus::Ready);
    assert_eq!(built.envd_version, cubicle_protocol::ENVD_VERSION);
    assert!(built.finished_at.is_some());
    for wrong in ["", "x", &uuid::Uuid::new_v4().to_string()] {
        let missing = templates.build_of("web", wrong).await;
        assert!(matches!(missing, Err(Error::BuildNotFound { .. })));
    }
}

#[tokio::test]
async fn a_failed_build_says_why_and_harms_nothing() {
    let plane = Plane::new().await;
    let templates = &plane.control.templates;
    plane.fleet.fail_next_build("no space left");
    let failed = plane.build("web").await;
    let unusable = templates.resolve("web").await;
    let Err(Error::TemplateNotReady { status, .. }) = &unusable else {
        panic!("{unusable:?}")
    };
    assert!(status.contains("no space left"), "{status}");
    let template = templates.get("web").await.expect("get");
    assert_eq!(template.build().expect("build").id, failed.id);
    assert_eq!(template.builds[0].status, BuildStatus::Error);

    let good = templates.resolve("base").await.expect("base");
    plane.fleet.fail_next_build("again");
    plane.build("base").await;
    assert_eq!(
        templates
            .resolve("base")
            .await
            .expect("still the old build"),
        good
    );
}

#[tokio::test]
async fn a_new_build_supersedes_the_old_one_whose_sandboxes_run_on() {
    let plane = Plane::new().await;
    let templates = &plane.control.templates;
    let old = plane
        .control
        .sandboxes
        .create(request("base"))
        .await
        .expect("create")
        .sandbox;
    plane.build("base").await;
    let new = plane
        .control
        .sandboxes
        .create(request("base"))
        .await
        .expect("create")
        .sandbox;
    assert_eq!(new.template, old.template);
    assert_ne!(new.snapshot, old.snapshot);
    assert_eq!(
        plane.fleet.snapshot_ids(),
        std::slice::from_ref(&new.snapshot)
    );
    assert!(plane.control.sandboxes.get(&old.id).is_ok());
    let template = templates.get("base").await.expect("get");
    assert_eq!(template.builds.len(), 2);
    templates.delete("base").await.expect("delete");
    assert!(plane.control.sandboxes.get(&new.id).is_ok());
    assert!(plane.fleet.snapshot_ids().is_empty());
    for gone in ["base", template.id.as_str(), new.snapshot.as_str()] {
        assert!(matches!(
            templates.get(gone).await,
            Err(Error::TemplateNotFound { .. })
        ));
        assert!(matches!(
            templates.delete(gone).await,
            Err(Error::TemplateNotFound { .. })
        ));
    }
}

#[tokio::test]
async fn tags_keep_builds_and_fall_one_by_one() {
    let plane = Plane::new().await;
    let templates = &plane.control.templates;
    plane.build("web:v1").await;
    let untagged = templates.resolve("web").await;
    assert!(
        matches!(untagged, Err(Error::TemplateNotReady { .. })),
        "{untagged:?}"
    );
    plane.build("web").await;
    let (v1, current) = (
        templates.resolve("web:v1").await.expect("v1"),
        templates.resolve("web").await.expect("default"),
    );
    assert_eq!(v1.template, current.template);
    assert_ne!(v1.snapshot, current.snapshot);
    assert!(matches!(
        templates.delete("web:v9").await,
        Err(Error::TemplateNotFound { .. })
    ));
    templates.delete("web:v1").await.expect("drop a tag");
    assert!(!plane.fleet.snapshot_ids().contains(&v1.snapshot));
    assert_eq!(templates.resolve("web").await.expect("untouched"), current);
    templates
        .delete("web:default")
        .await
        .expect("drop the last tag");
    assert!(matches!(
        templates.get("web").await,
        Err(Error::TemplateNotFound { .. })
    ));
}

#[tokio::test]
async fn one_build_at_a_time_and_only_of_sane_orders() {
    let plane = Plane::new().await;
    let templates = &plane.control.templates;
    // Longer than it takes to ask for another.
    plane.fleet.takes(Step::Boot, Duration::from_millis(500));
    let first = plane.start_build("web").await;
    let second = templates.build(order("web")).await;
    assert!(matches!(second, Err(Error::BuildInProgress { build, .. }) if build == first.id));
    let _: Vec<_> = templates.follow(first.id).try_collect().await.expect("end");

    let sized = |cpu_count, memory_mib, disk_mib| BuildTemplate {
        size: Size {
            cpu_count,
            memory_mib,
            disk_mib,
        },
        ..order("x")
    };
    let tagged = BuildTemplate {
        tags: vec!["no tag".into()],
        ..order("x")
    };
    let long = order(&"n".repeat(10_000));
    for (bad, field) in [
        (order("No"), "name"),
        (order("snap-x"), "name"),
        (order(""), "name"),
        (long, "name"),
        (tagged, "tags"),
        (sized(0, 256, 1024), "cpuCount"),
        (sized(1, 1, 1024), "memoryMB"),
        (sized(1, 256, u32::MAX), "diskSizeMB"),
    ] {
        let refused = templates.build(bad).await;
        assert!(
            matches!(refused, Err(Error::Invalid { field: f, .. }) if f == field),
            "{field}"
        );
    }
}

#[tokio::test]
async fn what_was_built_the_same_way_is_not_built_again_unless_forced() {
    let plane = Plane::new().await;
    let templates = &plane.control.templates;
    let first = templates.build(order("web")).await.expect("first");
    let _: Vec<_> = templates
        .follow(first.build.id)
        .try_collect()
        .await
        .expect("end");
    let same = || BuildTemplate {
        spec: BuildSpec::recipe("base"),
        ..order("web")
    };
    let again = templates.build(same()).await.expect("again");
    assert!(again.cached && again.build.id == first.build.id);
    let bigger = Size {
        memory_mib: 512,
        ..SIZE
    };
    let other = templates
        .build(BuildTemplate {
            size: bigger,
            ..same()
        })
        .await
        .expect("other");
    assert!(!other.cached);
    let _: Vec<_> = templates
        .follow(other.build.id)
        .try_collect()
        .await
        .expect("end");
    let forced = templates.build(order("web")).await.expect("forced");
    assert!(!forced.cached && !first.cached);
    let _: Vec<_> = templates
        .follow(forced.build.id)
        .try_collect()
        .await
        .expect("end");
    assert!(templates.build(same()).await.expect("again").cached);
    // The server is another, and with it its recipes and what its guests run.
    plane.fleet.push_images();
    assert!(!templates.build(same()).await.expect("newer").cached);
}

#[tokio::test]
async fn spawns_are_counted_and_publicity_is_remembered() {
    let plane = Plane::new().await;
    let templates = &plane.control.templates;
    for _ in 0..3 {
        plane
            .control
            .sandboxes
            .create(request("base"))
            .await
            .expect("create");
    }
    for _ in 0..100 {
        if templates.get("base").await.expect("get").spawn_count == 3 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert!(
        templates
            .set_public("base", true)
            .await
            .expect("set")
            .public
    );
    let plane = plane.restart(|_| ()).await;
    let template = plane.control.templates.get("base").await.expect("get");
    assert_eq!((template.spawn_count, template.public), (3, true));
    assert!(template.last_spawned_at.is_some());
}
