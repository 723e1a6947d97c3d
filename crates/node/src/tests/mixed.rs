//! Any mix of operations at the same time.

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Op {
    Create(usize),
    Abandon(usize, u64),
    Kill(usize),
    PowerOff(usize),
    Sever(usize),
    Ask(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let who = 0..4_usize;
    prop_oneof![
        3 => who.clone().prop_map(Op::Create),
        1 => (who.clone(), 0..3000_u64).prop_map(|(who, us)| Op::Abandon(who, us)),
        3 => who.clone().prop_map(Op::Kill),
        1 => who.clone().prop_map(Op::PowerOff),
        1 => who.clone().prop_map(Op::Sever),
        2 => who.prop_map(Op::Ask),
    ]
}

async fn apply(node: &Node, machine: &Machine, snapshot: &SnapshotId, ids: &[SandboxId], op: Op) {
    let order = |who: usize| CreateSandbox {
        id: ids[who].clone(),
        ..CreateSandbox::new(snapshot.clone())
    };
    let vm = |who: usize| {
        let alive = node
            .inner
            .registry
            .get(&ids[who])
            .and_then(|sandbox| sandbox.live());
        alive.ok().map(|_| machine.hypervisor.find(&ids[who]))
    };
    match op {
        Op::Create(who) => match node.create(order(who)).await {
            Ok(_) | Err(Error::Exists { .. } | Error::Killed { .. }) => {}
            // The VM was powered off or its daemon died before it had answered.
            Err(Error::Broken { .. } | Error::Unanswered { .. } | Error::Vm(_)) => {}
            Err(error) => panic!("create: {error}"),
        },
        Op::Abandon(who, us) => {
            tokio::time::timeout(Duration::from_micros(us), node.create(order(who)))
                .await
                .ok();
        }
        Op::Kill(who) => {
            node.kill(&ids[who]).await.unwrap();
        }
        Op::PowerOff(who) => {
            if let Some(vm) = vm(who).flatten() {
                vm.power_off();
            }
        }
        Op::Sever(who) => {
            if let Some(vm) = vm(who).flatten() {
                vm.sever();
            }
        }
        Op::Ask(who) => {
            let asked =
                tokio::time::timeout(Duration::from_secs(20), get(node, &ids[who], "/health"));
            match asked.await.expect("every request ends") {
                Ok(status) => assert_eq!(status, 204),
                Err(error) => assert!(
                    matches!(
                        error,
                        Error::NotFound { .. }
                            | Error::NotReady { .. }
                            | Error::Killed { .. }
                            | Error::Broken { .. }
                    ),
                    "{error}"
                ),
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever is done to a few sandboxes at the same time: everything ends, and once all are
    /// killed nothing is left.
    #[test]
    fn any_mix_of_operations_ends_clean(
        lanes in prop::collection::vec(prop::collection::vec(op(), 1..12), 1..6),
    ) {
        let machine = Arc::new(Machine::new());
        runtime().block_on(async {
            let (node, _) = machine.open().await;
            let snapshot = template(&node, &machine).await;
            let ids: Arc<Vec<_>> = Arc::new((0..4).map(|_| SandboxId::generate()).collect());
            let lanes = lanes.into_iter().map(|lane| {
                let (node, machine) = (node.clone(), machine.clone());
                let (snapshot, ids) = (snapshot.clone(), ids.clone());
                tokio::spawn(async move {
                    for op in lane {
                        apply(&node, &machine, &snapshot, &ids, op).await;
                    }
                })
            });
            for lane in lanes.collect::<Vec<_>>() {
                lane.await.unwrap();
            }
            for id in ids.iter() {
                node.kill(id).await.unwrap();
            }
            assert_clean(&node, &machine).await;
            end(node, &machine).await;
        });
    }
}
