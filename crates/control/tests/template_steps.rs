//! Templates that are made in steps: layers, what is found and what is made again.

#![allow(clippy::expect_used, reason = "a helper of tests may panic")]

mod common;

use std::time::Duration;

use common::{Plane, eventually, failed, request};
use cubicle_control::{
    Error,
    fleet::{SnapshotKind, memory::Step},
    sandbox::CreateSandbox,
    template::{
        Action, Build, BuildSpec, BuildStatus, BuildTemplate, FilesHash, LogPage, Origin, Probe,
        Size,
    },
};
use futures::TryStreamExt as _;

const SIZE: Size = Size {
    cpu_count: 2,
    memory_mib: 512,
    disk_mib: 1024,
};

fn run(command: &str) -> Action {
    Action::Run {
        command: command.into(),
        user: None,
    }
}

fn spec(actions: Vec<Action>) -> BuildSpec {
    BuildSpec {
        steps: actions.into_iter().map(Into::into).collect(),
        ..BuildSpec::recipe("base")
    }
}

fn named(name: &str, spec: BuildSpec) -> BuildTemplate {
    BuildTemplate {
        size: SIZE,
        ..BuildTemplate::new(name, spec)
    }
}

async fn ended(plane: &Plane, build: &Build) -> Build {
    let templates = &plane.control.templates;
    let lines: Vec<_> = templates.follow(build.id).try_collect().await.expect("log");
    assert!(!lines.is_empty());
    let template = build.template.to_string();
    let found = templates.build_of(&template, &build.id.to_string()).await;
    found.expect("the build")
}

async fn build(plane: &Plane, name: &str, spec: BuildSpec) -> Build {
    let started = plane.control.templates.build(named(name, spec)).await;
    ended(plane, &started.expect("starts").build).await
}

async fn log(plane: &Plane, build: &Build) -> String {
    let page = LogPage::from(0, u32::MAX);
    let lines = plane.control.templates.build_log(build.id, page).await;
    let lines = lines.expect("log").into_iter();
    lines
        .map(|line| format!("{} {}\n", line.step.unwrap_or_default(), line.message))
        .collect()
}

fn layers(plane: &Plane) -> usize {
    plane.fleet.snapshots_of(SnapshotKind::Template).len()
}

/// Nothing of a build is left but layers.
async fn quiet(plane: &Plane) {
    eventually("the end of VMs", || plane.fleet.alive().is_empty()).await;
}

#[tokio::test]
async fn steps_run_in_order_and_are_found_the_next_time() {
    let plane = Plane::new().await;
    let boots = plane.fleet.boots();
    let steps = vec![
        Action::Env(vec![("A".into(), "1".into())]),
        run("one"),
        Action::User("me".into()),
        Action::Workdir("/srv".into()),
        run("two"),
    ];
    let built = build(&plane, "web", spec(steps.clone())).await;
    assert_eq!(built.status, BuildStatus::Ready, "{built:?}");
    let snapshot = built.snapshot.clone().expect("a snapshot");
    let done = plane.fleet.contents(&snapshot);
    assert_eq!(done[0], "boot recipe base");
    assert_eq!(done[1], "root: one");
    assert!(done[2].contains("mkdir"), "{done:?}");
    assert_eq!(done[3], "me: two");
    assert_eq!(built.defaults.env, [("A".to_owned(), "1".to_owned())]);
    assert_eq!(built.defaults.user.as_deref(), Some("me"));
    assert_eq!(built.defaults.workdir.as_deref(), Some("/srv"));
    quiet(&plane).await;

    // The same under another name is the same.
    let again = build(&plane, "other", spec(steps.clone())).await;
    assert_eq!(again.snapshot, Some(snapshot.clone()));
    assert_eq!(again.fingerprint, built.fingerprint);
    assert!(log(&plane, &again).await.contains("5 CACHED RUN two"));
    assert_eq!(plane.fleet.boots(), boots, "the base template was it");

    // What comes after a change is made again, what comes before is not.
    let mut changed = steps.clone();
    changed[4] = run("three");
    let third = build(&plane, "third", spec(changed)).await;
    let text = log(&plane, &third).await;
    assert!(
        text.contains("2 CACHED RUN one") && text.contains("5 RUN three"),
        "{text}"
    );

    // A forced step and all after it, too.
    let mut forced = spec(steps.clone());
    forced.steps[1].force = true;
    let forced = build(&plane, "forced", forced).await;
    let text = log(&plane, &forced).await;
    assert!(!text.contains("CACHED"), "{text}");
    assert_ne!(forced.snapshot, built.snapshot);
    assert_eq!(forced.fingerprint, built.fingerprint);

    // Layers are there as long as a template is made of them.
    for name in ["web", "other", "third", "forced"] {
        plane.control.templates.delete(name).await.expect("delete");
    }
    assert_eq!(layers(&plane), 1, "what is left is `base`");
    quiet(&plane).await;
}

#[tokio::test]
async fn a_failing_step_says_which_and_why_and_the_next_build_goes_on_from_there() {
    let plane = Plane::new().await;
    let steps = vec![run("one"), run("echo hello"), run("exit 7"), run("never")];
    let broken = build(&plane, "web", spec(steps)).await;
    assert_eq!(broken.status, BuildStatus::Error);
    assert_eq!(broken.failed_step.as_deref(), Some("3"));
    assert!(
        broken
            .reason
            .as_deref()
            .unwrap_or_default()
            .contains("exit status 7")
    );
    let text = log(&plane, &broken).await;
    assert!(
        text.contains("2 hello\n") && !text.contains("never"),
        "{text}"
    );
    quiet(&plane).await;

    let steps = vec![run("one"), run("echo hello"), run("fixed")];
    let fixed = build(&plane, "web", spec(steps)).await;
    let text = log(&plane, &fixed).await;
    assert!(text.contains("2 CACHED RUN echo hello"), "{text}");
    assert_eq!(fixed.status, BuildStatus::Ready);
    plane.control.templates.delete("web").await.expect("delete");
    assert_eq!(layers(&plane), 1);

    let base = build(&plane, "x", spec(vec![])).await;
    assert_eq!(base.status, BuildStatus::Ready);
    plane.fleet.fail_at(Step::Origin, failed());
    let lost = build(&plane, "y", spec(vec![run("one")])).await;
    assert_eq!(lost.failed_step.as_deref(), Some("base"));

    // Whether `x` would be made the same again cannot be told without its recipe: neither when the
    // build is asked for nor when it runs.
    plane.fleet.fail_at(Step::Origin, failed());
    plane.fleet.fail_at(Step::Origin, failed());
    let again = build(&plane, "x", spec(vec![])).await;
    assert_eq!(again.failed_step.as_deref(), Some("base"), "{again:?}");
    let kept = plane.control.templates.resolve("x").await.expect("x");
    assert_eq!(Some(kept.snapshot), base.snapshot);
}

#[tokio::test]
async fn what_is_started_must_become_ready() {
    let plane = Plane::with(|config| {
        config.templates.settle = Duration::from_millis(10);
        config.templates.probe_every = Duration::from_millis(5);
    })
    .await;
    let started = BuildSpec {
        start: Some("serve".into()),
        ready: Probe::Tcp { port: 80 },
        ..spec(vec![])
    };
    let built = build(&plane, "web", started.clone()).await;
    assert_eq!(built.status, BuildStatus::Ready, "{built:?}");
    let snapshot = built.snapshot.clone().expect("a snapshot");
    assert!(
        plane
            .fleet
            .contents(&snapshot)
            .contains(&": serve".to_owned())
    );
    assert_eq!(built.launches.len(), 1);

    let never = BuildSpec {
        start: Some("true".into()),
        ready_within: Duration::from_millis(50),
        ..started.clone()
    };
    let late = build(&plane, "late", never).await;
    assert_eq!(late.failed_step.as_deref(), Some("finalize"));
    assert!(
        late.reason
            .as_deref()
            .unwrap_or_default()
            .contains("not ready"),
        "{late:?}"
    );

    let dead = BuildSpec {
        start: Some("exit 3".into()),
        ..started.clone()
    };
    let dead = build(&plane, "dead", dead).await;
    assert!(
        dead.reason
            .as_deref()
            .unwrap_or_default()
            .contains("exit status 3"),
        "{dead:?}"
    );

    // An image starts what it says, if it is wanted.
    let image = BuildSpec {
        run_image_command: true,
        ..BuildSpec::new(Origin::image("x/y:1"))
    };
    let image = build(&plane, "image", image).await;
    let snapshot = image.snapshot.clone().expect("a snapshot");
    assert_eq!(
        plane.fleet.contents(&snapshot).last().map(String::as_str),
        Some("root: serve image")
    );
    quiet(&plane).await;

    // Another size: its disk is booted, and what ran there is started again. Once.
    let boots = plane.fleet.boots();
    let larger = || CreateSandbox {
        cpu_count: Some(4),
        memory_mib: Some(1024),
        ..request("web")
    };
    let sandboxes = &plane.control.sandboxes;
    let (one, two) = tokio::join!(sandboxes.create(larger()), sandboxes.create(larger()));
    let (one, two) = (one.expect("one").sandbox, two.expect("two").sandbox);
    assert_eq!(plane.fleet.boots(), boots + 1);
    assert_eq!((one.cpu_count, one.memory_mib), (4, 1024));
    assert_eq!(one.snapshot, two.snapshot);
    let done = plane.fleet.contents(&one.snapshot);
    assert_eq!(done[1..], ["boot".to_owned(), ": serve".to_owned()]);
    for sandbox in [one, two] {
        sandboxes.kill(&sandbox.id).await.expect("kill");
    }
    for name in ["web", "image", "late", "dead"] {
        plane.control.templates.delete(name).await.expect("delete");
    }
    assert_eq!(layers(&plane), 1);
}

#[tokio::test]
async fn a_template_can_be_made_of_another_and_outlives_it() {
    let plane = Plane::new().await;
    let below = vec![Action::Env(vec![("A".into(), "1".into())]), run("below")];
    build(&plane, "below", spec(below)).await;
    let above = BuildSpec {
        steps: vec![
            Action::Env(vec![("A".into(), "$A-2".into())]).into(),
            run("above").into(),
        ],
        ..BuildSpec::new(Origin::Template("below".into()))
    };
    let above = build(&plane, "above", above).await;
    let copy = build(
        &plane,
        "copy",
        BuildSpec::new(Origin::Template("below".into())),
    )
    .await;
    plane
        .control
        .templates
        .delete("below")
        .await
        .expect("delete");
    let snapshot = above.snapshot.clone().expect("a snapshot");
    let done = plane.fleet.contents(&snapshot);
    assert_eq!(
        done[1..],
        ["root: below".to_owned(), "root: above".to_owned()]
    );
    assert_eq!(above.defaults.env, [("A".to_owned(), "1-2".to_owned())]);
    assert_eq!(copy.defaults.env, [("A".to_owned(), "1".to_owned())]);
    let mut order = request("above");
    order.env_vars = vec![("B".into(), "3".into())];
    let sandbox = plane.create(order).await;
    let order = plane.fleet.order(&sandbox.id).expect("order");
    assert_eq!(
        order.env_vars,
        [("A".into(), "1-2".into()), ("B".into(), "3".into())]
    );
    // What is made of a snapshot of it has that, too.
    let snapshot = plane.snapshot(&sandbox.id, None).await;
    let child = plane.create(request(snapshot.id.as_str())).await;
    let order = plane.fleet.order(&child.id).expect("order");
    assert_eq!(order.env_vars, [("A".to_owned(), "1-2".to_owned())]);
    plane.create(request("copy")).await;
    let gone = build(
        &plane,
        "z",
        BuildSpec::new(Origin::Template("below".into())),
    )
    .await;
    assert_eq!(gone.failed_step.as_deref(), Some("base"));
}

#[tokio::test]
async fn many_ask_and_one_builds() {
    let plane = Plane::new().await;
    let templates = plane.control.templates.clone();
    let order = |name: &str, id: Option<&str>| BuildTemplate {
        request_id: id.map(str::to_owned),
        ..named(name, spec(vec![run("slow"), run("slower")]))
    };
    plane.fleet.takes(Step::Run, Duration::from_millis(20));
    let asked = (0..10).map(|_| templates.build(order("web", Some("request-1"))));
    let builds = futures::future::try_join_all(asked).await.expect("builds");
    assert!(
        builds
            .iter()
            .all(|started| started.build.id == builds[0].build.id)
    );
    let different = templates.build(order("other", Some("request-1"))).await;
    assert!(matches!(different, Err(Error::IdempotencyMismatch { .. })));
    // Asked for without an id, while it is under way.
    let same = templates.build(order("web", None)).await.expect("the same");
    assert_eq!(same.build.id, builds[0].build.id);
    let other_way = templates.build(named("web", spec(vec![run("x")]))).await;
    assert!(matches!(other_way, Err(Error::BuildInProgress { .. })));
    // Under other names: each layer is made once.
    let names: Vec<_> = (0..5).map(|n| format!("web{n}")).collect();
    let others = names
        .iter()
        .map(|name| build(&plane, name, order(name, None).spec));
    let others = futures::future::join_all(others).await;
    let first = ended(&plane, &builds[0].build).await;
    assert!(
        others
            .iter()
            .all(|other| other.snapshot == first.snapshot && first.snapshot.is_some())
    );
    assert_eq!(layers(&plane), 3, "base and two steps");
    quiet(&plane).await;
    let again = templates
        .build(order("web", Some("request-1")))
        .await
        .expect("again");
    assert!(again.cached);
}

#[tokio::test]
async fn what_is_prepared_is_started_once() {
    let plane = Plane::new().await;
    let templates = &plane.control.templates;
    let prepared = templates
        .prepare("web:v1", vec!["v2".into()], SIZE)
        .await
        .expect("prepare");
    assert_eq!(
        (prepared.status, &prepared.spec),
        (BuildStatus::Waiting, &None)
    );
    let second = templates
        .prepare("web", Vec::new(), SIZE)
        .await
        .expect("another");
    assert_eq!(second.template, prepared.template);
    let what = spec(vec![run("one")]);
    let started = templates
        .start(&prepared.template, prepared.id, what.clone())
        .await;
    let started = started.expect("start");
    let again = templates
        .start(&prepared.template, prepared.id, what.clone())
        .await;
    assert_eq!(again.expect("again").build.id, started.build.id);
    let otherwise = templates
        .start(&prepared.template, prepared.id, spec(vec![]))
        .await;
    assert!(matches!(otherwise, Err(Error::BuildInProgress { .. })));
    let wrong = templates
        .start(&cubicle_ids::TemplateId::generate(), prepared.id, what)
        .await;
    assert!(matches!(wrong, Err(Error::BuildNotFound { .. })));
    let built = ended(&plane, &prepared).await;
    assert_eq!(built.status, BuildStatus::Ready);
    let tags = templates.tags("web").await.expect("tags");
    let mut names: Vec<_> = tags.iter().map(|tag| tag.tag.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["v1", "v2"]);
    let assigned = templates
        .assign_tags("web:v1", &["best".into()])
        .await
        .expect("assign");
    assert_eq!(assigned, built.id);
    templates
        .delete_tags("web", &["v1".into(), "v2".into()])
        .await
        .expect("drop");
    templates.resolve("web:best").await.expect("still there");
    assert!(templates.delete_tags("web", &["v1".into()]).await.is_err());
    templates
        .delete_tags("web", &["best".into()])
        .await
        .expect("drop the last");
    assert_eq!(layers(&plane), 1);
}

#[tokio::test]
async fn files_must_have_been_uploaded() {
    let plane = Plane::new().await;
    let templates = &plane.control.templates;
    let hash: FilesHash = "0123456789abcdef".repeat(4).parse().expect("hash");
    let copy = || {
        let action = Action::Copy {
            src: "a".into(),
            dest: "b/".into(),
            user: Some("me:us".into()),
            mode: Some(0o644),
            files: hash.clone(),
        };
        spec(vec![run("one"), action])
    };
    let missing = build(&plane, "web", copy()).await;
    assert_eq!(missing.failed_step.as_deref(), Some("2"));
    assert!(
        !log(&plane, &missing).await.contains("RUN one"),
        "nothing was done before"
    );
    assert!(!templates.has_files(&hash).await.expect("look"));
    let body = futures::stream::iter([Ok("tar".into())]);
    templates.put_files(&hash, body).await.expect("put");
    let built = build(&plane, "web", copy()).await;
    let done = plane.fleet.contents(&built.snapshot.expect("a snapshot"));
    assert_eq!(done.last().map(String::as_str), Some("copy a /b/ me:us"));

    let token = templates.upload_token(&missing.template, &hash);
    assert!(templates.check_upload_token(&missing.template, &hash, &token));
    let other: FilesHash = "f".repeat(64).parse().expect("hash");
    assert!(!templates.check_upload_token(&missing.template, &other, &token));
    let old = format!("1.{}", token.split_once('.').expect("two parts").1);
    assert!(!templates.check_upload_token(&missing.template, &hash, &old));
    assert!(!templates.check_upload_token(&missing.template, &hash, ""));
}

#[tokio::test]
async fn a_failure_at_any_point_leaves_nothing_but_the_reason() {
    let plane = Plane::with(|config| config.templates.settle = Duration::ZERO).await;
    let templates = &plane.control.templates;
    let steps = || BuildSpec {
        start: Some("serve".into()),
        ready: Probe::Tcp { port: 80 },
        ..BuildSpec {
            steps: vec![run("one").into()],
            ..BuildSpec::new(Origin::image("some/image"))
        }
    };
    for step in [
        Step::Origin,
        Step::Boot,
        Step::Booted,
        Step::Create,
        Step::Run,
        Step::Probe,
        Step::Freeze,
        Step::Published,
    ] {
        plane.fleet.fail_at(step, failed());
        let broken = build(&plane, "web", steps()).await;
        assert_eq!(broken.status, BuildStatus::Error, "{step:?}");
        assert!(
            broken.snapshot.is_none() && broken.failed_step.is_some(),
            "{step:?}"
        );
        quiet(&plane).await;
        templates.delete("web").await.expect("delete");
        assert_eq!(layers(&plane), 1, "{step:?}");
    }
    let built = build(&plane, "web", steps()).await;
    assert_eq!(built.status, BuildStatus::Ready, "{built:?}");
    let used = plane.create(request("web")).await;
    let refused = plane.control.delete_unused("web").await;
    assert!(matches!(refused, Err(Error::TemplateInUse { sandbox, .. }) if sandbox == used.id));
    plane.control.sandboxes.kill(&used.id).await.expect("kill");
    plane.control.delete_unused("web").await.expect("delete");
}

/// The server dies while a build is anywhere.
#[test]
fn after_a_crash_a_build_has_failed_and_nothing_is_left() {
    for step in [
        Step::Origin,
        Step::Boot,
        Step::Booted,
        Step::Create,
        Step::Run,
        Step::Probe,
        Step::Freeze,
        Step::Published,
        Step::Kill,
    ] {
        let runtime = || tokio::runtime::Runtime::new().expect("runtime");
        let old = runtime();
        let (remains, build) = old.block_on(async {
            let plane = Plane::with(|config| config.templates.settle = Duration::ZERO).await;
            plane.fleet.takes(step, Duration::from_secs(3600));
            let reached = plane.fleet.reached(step);
            let what = BuildSpec {
                steps: vec![run("one").into(), run("two").into()],
                start: Some("serve".into()),
                ready: Probe::Tcp { port: 80 },
                ..BuildSpec::new(Origin::image("some/image"))
            };
            let started = plane.control.templates.build(named("web", what)).await;
            let build = started.expect("starts").build;
            let fleet = plane.fleet.clone();
            eventually("that point", || fleet.reached(step) > reached).await;
            (plane.remains(), build)
        });
        old.shutdown_background();
        runtime().block_on(async {
            let plane = remains.start().await;
            let template = build.template.to_string();
            let templates = &plane.control.templates;
            let found = templates.build_of(&template, &build.id.to_string()).await;
            let found = found.expect("the build");
            assert_eq!(found.status, BuildStatus::Error, "{step:?}");
            assert!(found.reason.is_some_and(|why| why.contains("stopped")));
            quiet(&plane).await;
            templates.delete("web").await.expect("delete");
            assert_eq!(layers(&plane), 1, "{step:?}: only `base` is left");
            let again = build_web(&plane).await;
            assert_eq!(again.status, BuildStatus::Ready);
        });
    }
}

async fn build_web(plane: &Plane) -> Build {
    build(plane, "web", spec(vec![run("one")])).await
}
