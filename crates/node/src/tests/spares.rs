//! VMs that were restored before anybody asked for them.

use super::*;
use crate::{NodeConfig, SparePolicy};

fn config(machine: &Machine) -> NodeConfig {
    NodeConfig {
        spares: SparePolicy {
            max: 2,
            idle: Duration::from_secs(60),
        },
        ..machine.config()
    }
}

async fn ready(node: &Node, count: usize) {
    until("the spares are ready", || {
        node.capacity().spares.ready == count
    })
    .await;
}

async fn open(machine: &Machine) -> Node {
    machine.open_with(config(machine)).await.0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_claims_a_spare_and_others_are_made() {
    let machine = Machine::new();
    let node = open(&machine).await;
    let snapshot = template(&node, &machine).await;
    assert_eq!(node.capacity().spares.ready, 0, "nobody has asked for any");
    let first = CreateSandbox::new(snapshot.clone());
    let made = node.create(first.clone()).await.unwrap();
    assert!(made.timings.claim.is_zero() && !made.timings.launch.is_zero());
    ready(&node, 1).await;
    assert_eq!(node.sandboxes().len(), 1, "a spare is no sandbox");

    let order = CreateSandbox {
        access_token: Some("secret".to_owned()),
        ..CreateSandbox::new(snapshot.clone())
    };
    let id = order.id.clone();
    let made = node.create(order).await.unwrap();
    assert!(!made.timings.claim.is_zero() && made.timings.launch.is_zero());
    assert_eq!((made.generation, node.generation(&id)), (1, Some(1)));
    assert_eq!(get(&node, &id, "/health").await.unwrap(), 204);
    let told = machine.hypervisor.told(&id);
    assert_eq!(told.access_token.as_deref(), Some("secret"));
    assert_eq!(told.hostname.as_deref(), Some(id.as_str()));
    assert!(told.entropy.is_some() && told.machine_id.is_some());
    ready(&node, 2).await;

    // What was claimed is a sandbox like any other.
    let taken = node
        .snapshot(
            &id,
            crate::TakeSnapshot::new(cubicle_cow::SnapshotKind::User),
        )
        .await
        .unwrap();
    assert_eq!(taken.manifest.parent.as_ref(), Some(&snapshot));
    let back = CreateSandbox {
        id: id.clone(),
        ..CreateSandbox::new(snapshot.clone())
    };
    let back = node.rollback(back).await.unwrap();
    assert!(
        !back.timings.claim.is_zero(),
        "a rollback to a template claims one, too"
    );
    assert_eq!((back.generation, node.generation(&id)), (2, Some(2)));

    // Without its snapshot a spare is of no use.
    ready(&node, 2).await;
    node.delete_snapshot(&snapshot).await.unwrap();
    node.kill(&id).await.unwrap();
    node.kill(&first.id).await.unwrap();
    until("the spares are gone", || machine.remains().is_empty()).await;
    assert_clean(&node, &machine).await;
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claimed_sandbox_is_adopted_and_a_spare_is_not() {
    let machine = Machine::new();
    let node = open(&machine).await;
    let snapshot = template(&node, &machine).await;
    let order = CreateSandbox::new(snapshot.clone());
    node.create(order.clone()).await.unwrap();
    ready(&node, 1).await;
    let claimed = CreateSandbox::new(snapshot);
    node.create(claimed.clone()).await.unwrap();
    ready(&node, 2).await;
    assert_eq!(machine.hypervisor.alive(), 4);
    node.detach().await.unwrap();
    node.store().clone().close().await;
    drop(node);
    assert_eq!(machine.hypervisor.alive(), 2, "spares end with their node");

    let (node, report) = machine.open().await;
    assert_eq!(report.adopted.len(), 2);
    for id in [&order.id, &claimed.id] {
        assert!(report.adopted.contains(id), "{report:?}");
        assert_eq!(get(&node, id, "/health").await.unwrap(), 204);
        node.kill(id).await.unwrap();
    }
    assert_clean(&node, &machine).await;
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spare_that_is_no_good_costs_a_create_nothing_but_time() {
    let machine = Machine::new();
    let node = open(&machine).await;
    let snapshot = template(&node, &machine).await;
    node.create(CreateSandbox::new(snapshot.clone()))
        .await
        .unwrap();
    ready(&node, 1).await;
    // Its VM ends while it waits.
    let sandboxes = node.sandboxes();
    machine.hypervisor.power_off_all_but(&sandboxes[0].id);
    let made = node
        .create(CreateSandbox::new(snapshot.clone()))
        .await
        .unwrap();
    assert!(!made.timings.launch.is_zero(), "restored instead");

    // Its guest does not want to be anybody else.
    ready(&node, 2).await;
    machine.hypervisor.behaviour.refuse_inits.store(1, SeqCst);
    let made = node.create(CreateSandbox::new(snapshot)).await.unwrap();
    assert!(!made.timings.launch.is_zero(), "restored instead");
    let ids: Vec<_> = node.sandboxes().into_iter().map(|fact| fact.id).collect();
    assert_eq!(ids.len(), 3);
    for id in ids {
        node.kill(&id).await.unwrap();
    }
    end(node, &machine).await;
}
