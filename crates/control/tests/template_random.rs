//! Random builds, some of which fail: what is kept is what is used, and what is made is right.

#![allow(clippy::expect_used, reason = "a helper of tests may panic")]

mod common;

use std::{collections::BTreeSet, time::Duration};

use common::{Plane, eventually, failed};
use cubicle_control::{
    fleet::{SnapshotKind, memory::Step},
    template::{Action, BuildSpec, BuildStatus, BuildTemplate, Origin},
};
use futures::TryStreamExt as _;
use proptest::prelude::*;

/// Something that a user does.
#[derive(Debug, Clone)]
enum Deed {
    Build {
        name: usize,
        /// Which commands it runs, after the recipe or another template.
        commands: Vec<u8>,
        from: Option<usize>,
        force: bool,
        /// Where it fails, if that is reached.
        fails: Option<Step>,
    },
    Delete(usize),
    Tag(usize),
    Restart,
}

const NAMES: [&str; 3] = ["a", "b", "c"];

fn deed() -> impl Strategy<Value = Deed> {
    let steps = [
        Step::Origin,
        Step::Boot,
        Step::Booted,
        Step::Create,
        Step::Run,
        Step::Freeze,
        Step::Published,
    ];
    let build = (
        0..NAMES.len(),
        prop::collection::vec(0..3_u8, 0..4),
        prop::option::weighted(0.3, 0..NAMES.len()),
        prop::bool::weighted(0.2),
        prop::option::weighted(0.3, prop::sample::select(steps.to_vec())),
    );
    let build = build.prop_map(|(name, commands, from, force, fails)| Deed::Build {
        name,
        commands,
        from,
        force,
        fails,
    });
    prop_oneof![
        6 => build,
        1 => (0..NAMES.len()).prop_map(Deed::Delete),
        1 => (0..NAMES.len()).prop_map(Deed::Tag),
        1 => Just(Deed::Restart),
    ]
}

/// What each template holds, as far as it is usable.
type Model = [Option<Vec<String>>; NAMES.len()];

async fn carry_out(mut plane: Plane, deed: &Deed, model: &mut Model) -> Plane {
    let templates = plane.control.templates.clone();
    match deed {
        Deed::Restart => plane = plane.restart(|_| ()).await,
        Deed::Delete(name) => {
            let _ = templates.delete(NAMES[*name]).await;
            model[*name] = None;
        }
        Deed::Tag(name) => {
            let tagged = templates.assign_tags(NAMES[*name], &["kept".into()]).await;
            assert_eq!(tagged.is_ok(), model[*name].is_some());
        }
        Deed::Build {
            name,
            commands,
            from,
            force,
            fails,
        } => {
            plane.fleet.behave();
            if let Some(step) = fails {
                plane.fleet.fail_at(*step, failed());
            }
            let origin = from.map_or(Origin::Recipe("base".into()), |from| {
                Origin::Template(NAMES[from].into())
            });
            let steps = commands.iter().map(|command| Action::Run {
                command: command.to_string(),
                user: None,
            });
            let spec = BuildSpec {
                steps: steps.map(Into::into).collect(),
                force: *force,
                ..BuildSpec::new(origin)
            };
            let started = templates
                .build(BuildTemplate::new(NAMES[*name], spec))
                .await;
            let build = started.expect("starts").build;
            let _: Vec<_> = templates.follow(build.id).try_collect().await.expect("log");
            let template = build.template.to_string();
            let ended = templates.build_of(&template, &build.id.to_string()).await;
            let ended = ended.expect("the build");
            plane.fleet.behave();
            if ended.status == BuildStatus::Ready {
                let below = match from {
                    None => Some(vec!["boot recipe base".to_owned()]),
                    Some(from) => model[*from].clone(),
                };
                let mut done = below.expect("of what is not there nothing can be made");
                done.extend(commands.iter().map(|command| format!("root: {command}")));
                model[*name] = Some(done);
            } else {
                let below = from.is_some_and(|from| model[from].is_none());
                assert!(fails.is_some() || below, "{ended:?}");
            }
        }
    }
    plane
}

async fn check(plane: &Plane, model: &Model) {
    eventually("the end of VMs", || plane.fleet.alive().is_empty()).await;
    for (name, wanted) in NAMES.iter().zip(model) {
        let resolved = plane.control.templates.resolve(name).await;
        let found = resolved
            .ok()
            .map(|found| plane.fleet.contents(&found.snapshot));
        assert_eq!(&found, wanted, "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn templates_hold_what_was_asked_for_and_leave_nothing(
        deeds in prop::collection::vec(deed(), 1..12),
    ) {
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        runtime.block_on(async {
            let mut plane = Plane::with(|config| {
                config.templates.probe_every = Duration::from_millis(1);
            })
            .await;
            let mut model = Model::default();
            for deed in &deeds {
                plane = carry_out(plane, deed, &mut model).await;
                check(&plane, &model).await;
            }
            // A deletion that failed is made good by the next start.
            for name in NAMES {
                let _ = plane.control.templates.delete(name).await;
            }
            let kept: BTreeSet<_> = plane.fleet.snapshots_of(SnapshotKind::Template).into_iter().collect();
            assert_eq!(kept.len(), 1, "only `base` is left: {kept:?}");
        });
    }
}
