//! What a node makes of what an earlier one left.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_detached_nodes_sandboxes_are_adopted_under_the_same_generation() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let snapshot = template(&node, &machine).await;
    let orders: Vec<_> = (0..4)
        .map(|_| CreateSandbox::new(snapshot.clone()))
        .collect();
    let ids: Vec<_> = orders.iter().map(|order| order.id.clone()).collect();
    for order in orders {
        node.create(order).await.unwrap();
    }
    let before = node.sandboxes();
    node.detach().await.unwrap();
    node.store().clone().close().await;
    drop(node);

    assert_eq!(machine.hypervisor.alive(), 4);
    machine.hypervisor.vm(&ids[3]).power_off();
    let (node, mut report) = machine.open().await;
    report.adopted.sort();
    let mut want = ids[..3].to_vec();
    want.sort();
    assert_eq!(report.adopted, want);
    assert!(matches!(&report.lost[..], [(id, why)] if *id == ids[3] && why.contains("no longer")));
    assert_eq!(node.sandboxes(), before[..3], "facts are what they were");
    for id in &ids[..3] {
        assert_eq!(node.generation(id), Some(1));
        assert_eq!(get(&node, id, "/health").await.unwrap(), 204);
    }
    assert_eq!(node.kill(&ids[0]).await.unwrap(), KillOutcome::Killed);
    let mut events = node.events();
    machine.hypervisor.vm(&ids[1]).power_off();
    assert!(
        matches!(events.recv().await, Ok(NodeEvent::Exited { .. })),
        "watched as before"
    );
    assert_eq!(node.capacity().running, 1);
    end(node, &machine).await;
}

/// What a step leaves when the process dies in it, and what the next one makes of it. The first
/// node's runtime is torn down in the middle of the step, as `kill -9` would.
#[test]
fn a_crash_at_any_step_leaves_nothing_that_the_next_start_does_not_find() {
    let machine = Machine::new();
    let snapshot = runtime().block_on(async {
        let (node, _) = machine.open().await;
        let snapshot = template(&node, &machine).await;
        end(node, &machine).await;
        snapshot
    });
    let long = Failure::Delay(Duration::from_secs(3600));
    for step in CREATE_STEPS
        .into_iter()
        .chain(KILL_STEPS)
        .chain(BUILD_STEPS)
    {
        let first = runtime();
        let survivor = first.block_on(async {
            let (node, _) = machine.open().await;
            let survivor = CreateSandbox::new(snapshot.clone());
            let (id, victim) = (survivor.id.clone(), CreateSandbox::new(snapshot.clone()));
            node.create(survivor).await.unwrap();
            if step.starts_with("kill/") {
                node.create(victim.clone()).await.unwrap();
            }
            node.failpoints().arm(step, long);
            let before = node.failpoints().passes(step);
            let (task, build) = (node.clone(), machine.template());
            tokio::spawn(async move {
                match step.split_once('/').unwrap().0 {
                    "create" => drop(task.create(victim).await),
                    "kill" => drop(task.kill(&victim.id).await),
                    _ => drop(task.build_template(build, Progress::silent()).await),
                }
            });
            until(step, || node.failpoints().passes(step) > before).await;
            id
        });
        first.shutdown_timeout(Duration::from_secs(10));

        runtime().block_on(async {
            let (node, report) = machine.open().await;
            assert_eq!(
                report.adopted,
                std::slice::from_ref(&survivor),
                "{step}: {report:?}"
            );
            assert_eq!(report.lost, [], "{step}");
            assert_eq!(get(&node, &survivor, "/health").await.unwrap(), 204);
            assert_eq!(node.sandboxes().len(), 1);
            node.kill(&survivor).await.unwrap();
            assert_eq!(machine.hypervisor.alive(), 0, "{step}");
            assert_clean(&node, &machine).await;
            assert_eq!(node.store().list().len(), 1, "{step}");
            end(node, &machine).await;
        });
    }
}
