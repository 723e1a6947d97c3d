//! Control's view of the one node in this process.
//!
//! `control` says what it needs of machines ([`Fleet`]) and `node` says what it does; here the two
//! meet, so that neither has to know the other.

mod templates;

use std::{net::Ipv4Addr, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use cubicle_control::fleet::{
    BuildOrder, BuildStep, CopyFiles, CreateOrder, Created, Ended, Fact, Fleet, FleetError,
    FleetEvent, FreezeKind, FreezeOrder, HostUsage, Machine, NetworkOptions, OriginFacts, Output,
    Phase, Program, SnapshotFact, SnapshotKind, SnapshotTaken, Usage,
};
use cubicle_control::template::Origin;
use cubicle_control::volume::{Directories, Mount, VolumeConfig};
use cubicle_cow::memory::Tier;
use cubicle_ids::{SandboxId, SnapshotId};
use cubicle_image::{GuestBinary, KernelSource, Progress};
use cubicle_net::EgressPolicy;
use cubicle_node::{
    BootFiles, CreateSandbox, KillOutcome, Node, NodeEvent, SandboxState, TakeSnapshot, Taken,
};
use cubicle_protocol::guest_api::Mount as NodeMount;
use cubicle_vmm::Limits;
use time::OffsetDateTime;
use tokio::sync::{broadcast, mpsc};

use self::templates::Pulled;
use crate::error::Chain;

/// What templates are built with.
#[derive(Debug, Clone)]
pub(crate) struct Images {
    /// The image directory.
    pub(crate) dir: PathBuf,
    pub(crate) kernel: KernelSource,
    pub(crate) guest: GuestBinary,
    /// Images that others have made.
    pub(crate) oci: Arc<cubicle_oci::Images>,
    /// User that commands run as unless they say otherwise.
    pub(crate) user: String,
}

/// The node as a fleet of one.
pub(crate) struct NodeFleet {
    node: Node,
    images: Images,
    machine: Facts,
    directories: Directories,
    pulled: Pulled,
    events: broadcast::Sender<FleetEvent>,
}

/// What does not change about this machine.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) id: String,
    pub(crate) address: Ipv4Addr,
    pub(crate) cpus: usize,
    pub(crate) memory_mib: u64,
    pub(crate) hypervisor: String,
    pub(crate) cpu_model: String,
    pub(crate) kernel: String,
}

/// Events that a slow receiver may lag behind.
const BACKLOG: usize = 1024;

impl NodeFleet {
    pub(crate) fn new(
        node: Node,
        images: Images,
        machine: Facts,
        volumes: VolumeConfig,
    ) -> Arc<Self> {
        let events = broadcast::Sender::new(BACKLOG);
        let forward = events.clone();
        let mut from = node.events();
        tokio::spawn(async move {
            loop {
                match from.recv().await {
                    Ok(NodeEvent::Exited { id, generation }) => {
                        // Nobody listens yet, or any more: then nobody misses it.
                        let _ = forward.send(FleetEvent::Exited { id, generation });
                    }
                    Err(broadcast::error::RecvError::Lagged(lost)) => {
                        tracing::warn!(lost, "events of the node came too fast");
                    }
                    Err(broadcast::error::RecvError::Closed) => return,
                }
            }
        });
        Arc::new(Self {
            node,
            images,
            machine,
            directories: Directories::new(volumes),
            pulled: Pulled::default(),
            events,
        })
    }

    /// What the node is asked for when control orders a VM.
    async fn request(&self, order: CreateOrder) -> Result<CreateSandbox, FleetError> {
        let snapshot = self.node.store().snapshot(&order.snapshot);
        let limits = match &snapshot {
            // With bounds of its own it is neither taken from the spares nor the reason for one.
            Ok(snapshot) if order.transient => {
                let vm = &snapshot.manifest().vm;
                Some(Limits::for_shape(vm.cpus, vm.memory_mib))
            }
            _ => None,
        };
        let kernel = match snapshot {
            Ok(snapshot) if !snapshot.manifest().has_memory() => Some(self.boot_files().await?),
            // What is wrong with a snapshot, the node says.
            _ => None,
        };
        let mut mounts = Vec::with_capacity(order.mounts.len());
        for mount in &order.mounts {
            mounts.push(self.mount(mount).await?);
        }
        Ok(CreateSandbox {
            id: order.id,
            snapshot: order.snapshot,
            template: Some(order.template),
            env_vars: order.env_vars.into_iter().collect(),
            default_user: order.user,
            default_workdir: order.workdir,
            dns_servers: order.dns,
            access_token: Some(order.envd_token),
            egress: egress(&order.network),
            limits,
            last_generation: 0,
            kernel,
            mounts,
        })
    }

    /// What is mounted, with its place on this machine.
    async fn mount(&self, mount: &Mount) -> Result<NodeMount, FleetError> {
        let root = self.directories.root(mount).await;
        let root = root.map_err(|error| FleetError::Failed {
            doing: format!("mount anything on {}", mount.path),
            why: Chain(&error).to_string(),
        })?;
        Ok(NodeMount {
            tag: mount.tag(),
            path: mount.path.clone(),
            read_only: mount.read_only,
            root: Some(root),
        })
    }

    async fn boot_files(&self) -> Result<BootFiles, FleetError> {
        let kernel = self.kernel().await?;
        Ok(BootFiles {
            kernel: kernel.vmlinux,
            initramfs: kernel.initramfs,
        })
    }
}

/// An error of the node in control's words, for something that was `doing`.
fn failed(doing: impl Into<String>) -> impl FnOnce(cubicle_node::Error) -> FleetError {
    use cubicle_node::Error as E;
    let doing = doing.into();
    move |error| match error {
        error if error.is_capacity() => FleetError::Capacity {
            why: Chain(&error).to_string(),
        },
        E::NotFound { id } | E::NotReady { id } | E::Killed { id } => FleetError::NoSandbox { id },
        E::Store(cubicle_cow::Error::NotFound(id)) => FleetError::NoSnapshot { id },
        E::Store(cubicle_cow::Error::Failed { id, reason }) => FleetError::Damaged { id, reason },
        E::Busy { id } => FleetError::Busy { id },
        E::Unresponsive { id, .. } => FleetError::Unresponsive { id },
        error => FleetError::Failed {
            doing,
            why: Chain(&error).to_string(),
        },
    }
}

/// What a sandbox may reach, in the words of the network.
fn egress(options: &NetworkOptions) -> Option<EgressPolicy> {
    let mut policy = match options.allow_internet {
        Some(false) => EgressPolicy::deny_all(),
        _ => EgressPolicy::allow_all(),
    };
    policy.allow_out.extend(&options.allow_out);
    policy.deny_out.extend(&options.deny_out);
    (!policy.is_allow_all()).then_some(policy)
}

/// A VM that answers, in control's words. What was not done has no phase.
fn told(created: cubicle_node::Created) -> Created {
    let timings = created.timings;
    let claimed = !timings.claim.is_zero();
    let phases = timings
        .phases()
        .into_iter()
        .filter(|(name, _)| match *name {
            "claim" => claimed,
            "volume" | "launch" | "restore" => !claimed,
            _ => true,
        });
    Created {
        generation: created.generation,
        phases: phases.map(|(name, took)| Phase { name, took }).collect(),
    }
}

/// What the node is asked for when control orders a freeze.
fn freeze(order: &FreezeOrder) -> TakeSnapshot {
    TakeSnapshot {
        snapshot: order.snapshot.clone(),
        kind: match order.kind {
            FreezeKind::User => cubicle_cow::SnapshotKind::User,
            FreezeKind::Pause => cubicle_cow::SnapshotKind::Pause,
            FreezeKind::Temporary => cubicle_cow::SnapshotKind::Temporary,
            FreezeKind::Template => cubicle_cow::SnapshotKind::Template,
        },
        memory: order.memory,
        quiesce: order.quiesce,
        require_healthy: order.require_healthy,
    }
}

/// A snapshot that was taken, in control's words.
fn report(taken: &Taken) -> SnapshotTaken {
    let manifest = &taken.manifest;
    let memory = manifest.memory;
    let phases = taken.timings.phases().into_iter();
    SnapshotTaken {
        snapshot: manifest.id.clone(),
        tier: match memory.tier {
            _ if !manifest.has_memory() => "none",
            Tier::SoftDirty => "soft_dirty",
            Tier::AnonymousPages => "anonymous_pages",
            _ => "full",
        },
        bytes_scanned: memory.bytes_scanned,
        bytes_dirty: memory.bytes_dirty,
        bytes_written: memory.bytes_written,
        frozen: taken.timings.frozen,
        phases: phases.map(|(name, took)| Phase { name, took }).collect(),
        parent: manifest.parent.clone(),
    }
}

/// A snapshot of the store, in control's words. Blocking.
fn fact(store: &cubicle_cow::Store, entry: &cubicle_cow::SnapshotEntry) -> SnapshotFact {
    use cubicle_cow::{SnapshotKind as Kind, SnapshotState as State};
    let manifest = &entry.manifest;
    let sizes = store.sizes(&manifest.id).unwrap_or_default();
    let (durable, failure) = match &entry.state {
        State::Published { durable } => (*durable, None),
        State::Failed { reason } => (false, Some(reason.clone())),
    };
    let disk = manifest.disks.first().map_or(0, |disk| disk.size >> 20);
    SnapshotFact {
        id: manifest.id.clone(),
        kind: match manifest.kind {
            Kind::Template => SnapshotKind::Template,
            Kind::User => SnapshotKind::Frozen(FreezeKind::User),
            Kind::Pause => SnapshotKind::Frozen(FreezeKind::Pause),
            Kind::Temporary => SnapshotKind::Frozen(FreezeKind::Temporary),
        },
        parent: manifest.parent.clone(),
        lineage: manifest.lineage.clone(),
        created_at: manifest.created_at,
        logical_bytes: sizes.logical_bytes,
        own_bytes: sizes.own_bytes,
        durable,
        failure,
        memory: manifest.has_memory(),
        memory_mib: manifest.vm.memory_mib,
        cpus: manifest.vm.cpus,
        disk_mib: u32::try_from(disk).unwrap_or(u32::MAX),
    }
}

#[async_trait]
impl Fleet for NodeFleet {
    async fn create(&self, order: CreateOrder) -> Result<Created, FleetError> {
        let doing = format!("create sandbox {}", order.id);
        let request = self.request(order).await?;
        let created = self.node.create(request).await;
        created.map(told).map_err(failed(doing))
    }

    async fn snapshot(&self, order: FreezeOrder) -> Result<SnapshotTaken, FleetError> {
        let taken = self.node.snapshot(&order.id, freeze(&order)).await;
        taken
            .map(|taken| report(&taken))
            .map_err(failed(format!("take a snapshot of sandbox {}", order.id)))
    }

    async fn pause(&self, order: FreezeOrder) -> Result<SnapshotTaken, FleetError> {
        let taken = self.node.pause(&order.id, freeze(&order)).await;
        taken
            .map(|taken| report(&taken))
            .map_err(failed(format!("pause sandbox {}", order.id)))
    }

    async fn resume(
        &self,
        order: CreateOrder,
        last_generation: u64,
    ) -> Result<Created, FleetError> {
        let doing = format!("resume sandbox {}", order.id);
        let request = CreateSandbox {
            last_generation,
            ..self.request(order).await?
        };
        let created = self.node.create(request).await;
        created.map(told).map_err(failed(doing))
    }

    async fn rollback(&self, order: CreateOrder) -> Result<Created, FleetError> {
        let doing = format!("roll sandbox {} back to {}", order.id, order.snapshot);
        let request = self.request(order).await?;
        let created = self.node.rollback(request).await;
        created.map(told).map_err(failed(doing))
    }

    async fn set_network(
        &self,
        id: &SandboxId,
        network: &NetworkOptions,
    ) -> Result<(), FleetError> {
        let policy = egress(network).unwrap_or_else(EgressPolicy::allow_all);
        let set = self.node.set_egress(id, policy).await;
        set.map_err(failed(format!("change the network of sandbox {id}")))
    }

    async fn snapshots(&self) -> Result<Vec<SnapshotFact>, FleetError> {
        let store = self.node.store().clone();
        let facts = tokio::task::spawn_blocking(move || {
            let entries = store.list();
            entries.iter().map(|entry| fact(&store, entry)).collect()
        });
        facts.await.map_err(|error| FleetError::Failed {
            doing: "list the snapshots".to_owned(),
            why: error.to_string(),
        })
    }

    async fn verify_snapshot(&self, id: &SnapshotId) -> Result<(), FleetError> {
        let verified = self.node.store().verify(id).await;
        verified.map_err(|error| failed(format!("verify snapshot {id}"))(error.into()))
    }

    async fn kill(&self, id: &SandboxId) -> Result<bool, FleetError> {
        match self
            .node
            .kill(id)
            .await
            .map_err(failed(format!("kill sandbox {id}")))?
        {
            KillOutcome::Killed => Ok(true),
            KillOutcome::NotFound => Ok(false),
        }
    }

    async fn sandboxes(&self) -> Result<Vec<Fact>, FleetError> {
        let facts = self.node.sandboxes().into_iter();
        Ok(facts
            .filter(|fact| fact.state == SandboxState::Running)
            .map(|fact| Fact {
                id: fact.id,
                generation: fact.generation,
            })
            .collect())
    }

    fn generation(&self, id: &SandboxId) -> Option<u64> {
        self.node.generation(id)
    }

    fn cpu_time(&self, id: &SandboxId) -> Option<Duration> {
        self.node.cpu_time(id)
    }

    async fn usage(&self, id: &SandboxId) -> Result<Usage, FleetError> {
        let metrics = self.node.metrics(id).await.map_err(|error| match error {
            error if error.is_not_found() => FleetError::NoSandbox { id: id.clone() },
            error => failed(format!("measure sandbox {id}"))(error),
        })?;
        Ok(Usage {
            cpu_count: metrics.cpu_count,
            cpu_used_pct: metrics.cpu_used_pct,
            mem_used: metrics.mem_used,
            mem_total: metrics.mem_total,
            mem_cache: metrics.mem_cache,
            disk_used: metrics.disk_used,
            disk_total: metrics.disk_total,
        })
    }

    async fn host_usage(&self, id: &SandboxId) -> Result<HostUsage, FleetError> {
        let usage = self.node.usage(id).await.map_err(|error| match error {
            error if error.is_not_found() => FleetError::NoSandbox { id: id.clone() },
            error => failed(format!("measure sandbox {id}"))(error),
        })?;
        Ok(HostUsage {
            cpu_time_us: usage.cpu_time_us,
            private_bytes: usage.private_bytes,
            resident_bytes: usage.resident_bytes,
        })
    }

    async fn measure_boot(&self, order: BuildOrder) -> Result<Duration, FleetError> {
        let template = self.template(&order, &Progress::silent()).await?;
        let booted = self.node.measure_boot(template).await;
        booted.map_err(failed(format!("boot template {}", order.template)))
    }

    async fn origin(
        &self,
        origin: &Origin,
        steps: mpsc::UnboundedSender<BuildStep>,
    ) -> Result<OriginFacts, FleetError> {
        self.look_at(origin, &steps).await
    }

    async fn build(
        &self,
        order: BuildOrder,
        steps: mpsc::UnboundedSender<BuildStep>,
    ) -> Result<(), FleetError> {
        self.boot(order, &steps).await
    }

    async fn run(
        &self,
        id: &SandboxId,
        program: Program,
        output: mpsc::UnboundedSender<Output>,
    ) -> Result<Ended, FleetError> {
        self.run_in(id, program, &output).await
    }

    async fn copy_files(&self, id: &SandboxId, files: CopyFiles) -> Result<(), FleetError> {
        self.copy_into(id, files).await
    }

    async fn probe(
        &self,
        id: &SandboxId,
        port: u16,
        path: Option<&str>,
    ) -> Result<bool, FleetError> {
        self.answers(id, port, path).await
    }

    async fn delete_snapshot(&self, id: &SnapshotId) -> Result<bool, FleetError> {
        match self.node.delete_snapshot(id).await {
            Ok(()) => Ok(true),
            Err(cubicle_node::Error::Store(cubicle_cow::Error::NotFound(_))) => Ok(false),
            Err(error) => Err(failed(format!("delete snapshot {id}"))(error)),
        }
    }

    fn events(&self) -> broadcast::Receiver<FleetEvent> {
        self.events.subscribe()
    }

    async fn machines(&self) -> Result<Vec<Machine>, FleetError> {
        let capacity = self.node.capacity();
        let machine = &self.machine;
        let taken = capacity.creating + capacity.running + capacity.removing;
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Ok(vec![Machine {
            id: machine.id.clone(),
            address: machine.address,
            cpu_milli: machine.cpus as u64 * 1000,
            cpu_milli_used: capacity.cpus_promised * 1000,
            memory_mib: machine.memory_mib,
            memory_mib_used: capacity.memory_promised_mib,
            slots: count(capacity.max_sandboxes),
            slots_used: count(taken),
            slots_ready: count(capacity.slots.ready),
            spares: count(capacity.spares.ready),
            spares_asleep: count(capacity.spares.asleep),
            spares_bytes: self.node.spare_memory().await,
            hypervisor: machine.hypervisor.clone(),
            cpu_model: machine.cpu_model.clone(),
            kernel: machine.kernel.clone(),
            heartbeat: OffsetDateTime::now_utc(),
        }])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allowed_destinations_stay_reachable_without_internet() {
        let options = NetworkOptions {
            allow_internet: Some(false),
            allow_out: vec!["1.1.1.1/32".parse().expect("a network")],
            ..NetworkOptions::default()
        };
        let policy = egress(&options).expect("a policy");
        assert_eq!(policy.allow_out, options.allow_out);
        assert_eq!(policy.deny_out, EgressPolicy::deny_all().deny_out);
        assert_eq!(egress(&NetworkOptions::default()), None);
    }
}
