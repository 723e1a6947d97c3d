//! What depends on what.

use super::*;
use crate::{fleet::Source, template::Step};

fn ground(defaults: Defaults) -> Ground {
    let facts = OriginFacts {
        source: Source::Recipe("base".into()),
        fingerprint: "f".into(),
        defaults,
        command: vec!["/bin/server".into(), "-x".into()],
        start: None,
        ready: Probe::None,
    };
    Ground::of_origin(&facts, 1, 256, 1024)
}

fn plan(actions: &[Action]) -> Plan {
    let spec = BuildSpec {
        steps: actions.iter().cloned().map(Step::from).collect(),
        ..BuildSpec::recipe("base")
    };
    Plan::new(&ground(Defaults::default()), &spec)
}

fn run(command: &str) -> Action {
    Action::Run {
        command: command.into(),
        user: None,
    }
}

fn env(name: &str, value: &str) -> Action {
    Action::Env(vec![(name.into(), value.into())])
}

#[test]
fn a_fingerprint_covers_all_that_came_before() {
    let last = |actions: &[Action]| plan(actions).fingerprint;
    let all = [
        env("A", "1"),
        run("a"),
        Action::Workdir("w".into()),
        run("b"),
    ];
    assert_eq!(last(&all), last(&all));
    for changed in [
        [
            env("A", "2"),
            run("a"),
            Action::Workdir("w".into()),
            run("b"),
        ],
        [
            env("A", "1"),
            run("x"),
            Action::Workdir("w".into()),
            run("b"),
        ],
        [
            env("A", "1"),
            run("a"),
            Action::Workdir("x".into()),
            run("b"),
        ],
        [env("A", "1"), run("a"), Action::User("w".into()), run("b")],
        [
            env("A", "1"),
            run("a"),
            Action::Workdir("w".into()),
            run("x"),
        ],
    ] {
        assert_ne!(last(&all), last(&changed), "{changed:?}");
    }
    let one = Ground::of_shape("f", 1, 256);
    let other = Ground::of_shape("f", 2, 256);
    assert_ne!(one.fingerprint, other.fingerprint);
    assert_ne!(digest("a", &["bc", "d"]), digest("a", &["b", "cd"]));
}

#[test]
fn what_changes_no_disk_is_no_stage() {
    let plan = plan(&[
        env("A", "1"),
        Action::User("me".into()),
        run("a"),
        Action::Env(vec![
            ("B".into(), "$A$C".into()),
            ("A".into(), "${A}2".into()),
        ]),
        env("PATH", "/x:$PATH"),
        run("b"),
    ]);
    let steps: Vec<_> = plan
        .stages
        .iter()
        .map(|stage| stage.step.as_str())
        .collect();
    assert_eq!(steps, ["3", "6"]);
    let held = |n: usize| plan.stages[n].defaults.env.clone();
    assert_eq!(held(0), [("A".to_owned(), "1".to_owned())]);
    let path = format!("/x:{PATH}");
    let wanted = [("A", "12"), ("B", "1"), ("PATH", path.as_str())];
    let wanted: Vec<_> = wanted.map(|(n, v)| (n.to_owned(), v.to_owned())).into();
    assert_eq!((held(1), &plan.defaults.env), (wanted.clone(), &wanted));
    assert!(matches!(&plan.stages[1].work, Work::Run { user, .. } if user == "me"));
}

#[test]
fn working_directories_add_up_and_are_made_before_they_are_used() {
    let plan = plan(&[
        Action::Workdir("/srv".into()),
        Action::Workdir("app/./x/..".into()),
        run("a"),
        Action::User("me".into()),
        Action::Workdir("~/w".into()),
    ]);
    let root = "root".to_owned();
    let made = [
        ("/srv".to_owned(), root.clone()),
        ("/srv/app".to_owned(), root),
    ];
    assert_eq!(plan.stages[0].directories, made);
    assert_eq!(plan.stages[0].defaults.workdir.as_deref(), Some("/srv/app"));
    assert_eq!(plan.stages[1].work, Work::Directories);
    assert_eq!(plan.stages[1].step, FINALIZE);
    assert_eq!(plan.defaults.workdir.as_deref(), Some("/home/me/w"));
}

#[test]
fn destinations_begin_in_the_working_directory_and_keep_their_slash() {
    let copied = |dest: &str, with_user: bool| {
        let copy = Action::Copy {
            src: "a".into(),
            dest: dest.into(),
            user: None,
            mode: None,
            files: "a".repeat(64).parse().unwrap(),
        };
        let spec = BuildSpec {
            steps: vec![Action::Workdir("/app".into()).into(), copy.into()],
            with_user,
            ..BuildSpec::recipe("base")
        };
        let plan = Plan::new(&ground(Defaults::default()), &spec);
        match &plan.stages[0].work {
            Work::Copy { dest, user, .. } => (dest.clone(), user.clone()),
            other => panic!("{other:?}"),
        }
    };
    for (dest, wanted) in [
        (".", "/app/"),
        ("./", "/app/"),
        ("b", "/app/b"),
        ("/b//c/", "/b/c/"),
        ("../../..", "/"),
        ("~/x", "/root/x"),
    ] {
        assert_eq!(
            copied(dest, false),
            (wanted.into(), "root".into()),
            "{dest}"
        );
    }
    assert_eq!(copied("~/x", true), ("/home/user/x".into(), "user".into()));
}

#[test]
fn an_image_begins_as_it_says_or_as_a_user() {
    let image = |with_user, run_image_command| {
        let spec = BuildSpec {
            with_user,
            run_image_command,
            ..BuildSpec::new(Origin::image("x"))
        };
        let defaults = Defaults {
            user: Some("www".into()),
            workdir: Some("/www".into()),
            ..Defaults::default()
        };
        Plan::new(&ground(defaults), &spec)
    };
    let plain = image(false, false);
    assert!(plain.stages.is_empty() && plain.launches.is_empty());
    assert_eq!(plain.defaults.user.as_deref(), Some("www"));
    let e2b = image(true, false);
    assert_eq!(e2b.stages[0].work, Work::MakeUser);
    assert_eq!(e2b.defaults.user.as_deref(), Some("user"));
    assert_eq!(e2b.defaults.workdir.as_deref(), Some("/home/user"));
    let started = image(false, true);
    let words = vec!["/bin/server".to_owned(), "-x".to_owned()];
    assert_eq!(started.launches[0].command, Some(Command::Exec(words)));
    assert_eq!(started.launches[0].defaults.user.as_deref(), Some("www"));

    let spec = BuildSpec {
        run_image_command: true,
        ..BuildSpec::new(Origin::image("x"))
    };
    assert_eq!(own_command(&spec, &["/bin/bash".into()]), None);
    assert_eq!(own_command(&spec, &[]), None);
    assert!(own_command(&spec, &["bash".into(), "-c".into()]).is_some());
    let own = BuildSpec {
        start: Some("mine".into()),
        ..spec
    };
    assert_eq!(
        own_command(&own, &["x".into()]),
        Some(Command::Shell("mine".into()))
    );
}

#[test]
fn a_forced_step_forces_what_comes_after_it() {
    let mut spec = BuildSpec {
        steps: ["a", "b", "c"].map(|command| run(command).into()).into(),
        ..BuildSpec::recipe("base")
    };
    let forced = |spec: &BuildSpec| {
        let plan = Plan::new(&ground(Defaults::default()), spec);
        plan.stages
            .iter()
            .map(|stage| stage.forced)
            .collect::<Vec<_>>()
    };
    spec.steps[1].force = true;
    assert_eq!(forced(&spec), [false, true, true]);
    spec.force = true;
    assert_eq!(forced(&spec), [true, true, true]);
}
