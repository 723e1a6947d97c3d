//! VMs that were restored before anybody asked for them.

use cubicle_cow::SnapshotKind;

use super::*;
use crate::{NodeConfig, SparePolicy, TakeSnapshot};

fn config(machine: &Machine) -> NodeConfig {
    NodeConfig {
        spares: SparePolicy {
            max: 2,
            idle: Duration::from_secs(60),
            asleep: Duration::from_secs(60),
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
        .snapshot(&id, TakeSnapshot::new(SnapshotKind::User))
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
    nothing_left(&node, &machine).await;
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

/// Makes a sandbox and pauses it; returns what resumes it.
async fn paused(node: &Node, snapshot: &SnapshotId) -> CreateSandbox {
    let order = CreateSandbox::new(snapshot.clone());
    let created = node.create(order.clone()).await.unwrap();
    pause(node, &order.id, created.generation).await
}

async fn pause(node: &Node, id: &SandboxId, generation: u64) -> CreateSandbox {
    let order = TakeSnapshot::new(SnapshotKind::Pause);
    let taken = node.pause(id, order).await.unwrap();
    CreateSandbox {
        id: id.clone(),
        last_generation: generation,
        ..CreateSandbox::new(taken.manifest.id.clone())
    }
}

/// The VM is with its next owner a moment after its pause was answered.
async fn sleepers(node: &Node, count: usize) {
    until("the paused VMs are kept", || {
        node.capacity().spares.asleep == count
    })
    .await;
}

async fn open_for_sleepers(machine: &Machine, asleep: Duration) -> (Node, SnapshotId) {
    let mut config = config(machine);
    config.spares.asleep = asleep;
    let (node, _) = machine.open_with(config).await;
    let template = template(&node, machine).await;
    (node, template)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resume_soon_after_its_pause_gets_the_same_vm_back() {
    let machine = Machine::new();
    let (node, template) = open_for_sleepers(&machine, Duration::from_secs(60)).await;
    let mut resume = paused(&node, &template).await;
    let id = resume.id.clone();
    for generation in 2..5 {
        sleepers(&node, 1).await;
        assert_eq!(node.sandboxes(), [], "it is paused for everyone");
        assert_eq!(node.generation(&id), None);
        let pause_snapshot = resume.snapshot.clone();
        let made = node.create(resume).await.unwrap();
        assert!(made.timings.launch.is_zero() && !made.timings.claim.is_zero());
        assert_eq!(made.generation, generation);
        sleepers(&node, 0).await;
        assert_eq!(get(&node, &id, "/health").await.unwrap(), 204);
        let told = machine.hypervisor.told(&id);
        assert_eq!(told.generation, Some(generation));
        assert!(told.entropy.is_some() && told.timestamp.is_some());
        // It is made from the pause now, whether or not that is still there.
        assert_eq!(node.sandbox(&id).unwrap().snapshot, pause_snapshot);
        node.delete_snapshot(&pause_snapshot).await.unwrap();
        let taken = node.snapshot(&id, TakeSnapshot::new(SnapshotKind::User));
        let parent = taken.await.unwrap().manifest.parent.clone();
        assert_eq!(parent, Some(pause_snapshot));
        resume = pause(&node, &id, generation).await;
    }
    // Nobody else gets it.
    let other = CreateSandbox::new(resume.snapshot.clone());
    let made = node.create(other.clone()).await.unwrap();
    assert!(!made.timings.launch.is_zero());
    node.kill(&other.id).await.unwrap();
    // Who deletes the snapshot wants the sandbox gone.
    sleepers(&node, 1).await;
    node.delete_snapshot(&resume.snapshot).await.unwrap();
    sleepers(&node, 0).await;
    node.delete_snapshot(&template).await.unwrap();
    nothing_left(&node, &machine).await;
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_vm_goes_when_its_time_is_up_when_others_come_and_when_it_ends() {
    let machine = Machine::new();
    let (node, template) = open_for_sleepers(&machine, Duration::from_millis(300)).await;
    let resume = paused(&node, &template).await;
    sleepers(&node, 1).await;
    sleepers(&node, 0).await;
    let made = node.create(resume).await.unwrap();
    assert!(!made.timings.launch.is_zero(), "restored from its snapshot");
    end(node, &machine).await;

    let machine = Machine::new();
    let (node, template) = open_for_sleepers(&machine, Duration::from_secs(60)).await;
    let mut resumes = Vec::new();
    for kept in [1, 2, 2] {
        resumes.push(paused(&node, &template).await);
        // As many as there may be spares.
        sleepers(&node, kept).await;
    }
    // The VM of another one ends while it sleeps.
    machine.hypervisor.power_off_all_but(&resumes[2].id);
    for (resume, restored) in resumes.into_iter().zip([true, true, false]) {
        let made = node.create(resume).await.unwrap();
        assert_eq!(!made.timings.launch.is_zero(), restored);
    }
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_vm_ends_with_its_node_or_at_once_where_there_are_no_spares() {
    let machine = Machine::new();
    let (node, template) = open_for_sleepers(&machine, Duration::from_secs(60)).await;
    let resume = paused(&node, &template).await;
    sleepers(&node, 1).await;
    // Each of these VMs says that it has 2 bytes.
    assert!(node.spare_memory().await >= 2);
    node.detach().await.unwrap();
    node.store().clone().close().await;
    drop(node);
    assert_eq!(machine.hypervisor.alive(), 0);

    let (node, report) = machine.open().await;
    assert!(report.adopted.is_empty() && report.lost.is_empty());
    let made = node.create(resume).await.unwrap();
    assert_eq!(made.generation, 2);
    let (id, generation) = (node.sandboxes()[0].id.clone(), made.generation);
    let resume = pause(&node, &id, generation).await;
    until("no VM is kept", || machine.remains().is_empty()).await;
    node.delete_snapshot(&resume.snapshot).await.unwrap();
    nothing_left(&node, &machine).await;
    end(node, &machine).await;
}
