//! Control's view of the one node in this process.
//!
//! `control` says what it needs of machines ([`Fleet`]) and `node` says what it does; here the two
//! meet, so that neither has to know the other.

use std::{net::Ipv4Addr, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use cubicle_control::fleet::{
    BuildOrder, BuildStep, Built, CreateOrder, Created, Fact, Fleet, FleetError, FleetEvent,
    HostUsage, Level, Machine, NetworkOptions, Phase, Usage,
};
use cubicle_ids::{SandboxId, SnapshotId};
use cubicle_image::{GuestBinary, KernelSource, Progress, Recipe};
use cubicle_net::EgressPolicy;
use cubicle_node::{
    CreateSandbox, ImageSource, KillOutcome, Node, NodeEvent, SandboxState, TemplateBuild, WarmUp,
};
use time::OffsetDateTime;
use tokio::sync::{broadcast, mpsc};

use crate::error::Chain;

/// What templates are built with.
#[derive(Debug, Clone)]
pub(crate) struct Images {
    /// The image directory.
    pub(crate) dir: PathBuf,
    pub(crate) kernel: KernelSource,
    pub(crate) guest: GuestBinary,
    /// User that commands run as unless they say otherwise.
    pub(crate) user: String,
}

/// The node as a fleet of one.
pub(crate) struct NodeFleet {
    node: Node,
    images: Images,
    machine: Facts,
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
    pub(crate) fn new(node: Node, images: Images, machine: Facts) -> Arc<Self> {
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
            events,
        })
    }

    /// The build that an order stands for.
    fn template(&self, order: &BuildOrder) -> Result<TemplateBuild, FleetError> {
        let recipe = match order.recipe.as_str() {
            "base" => Recipe {
                disk_mib: order.disk_mib,
                ..Recipe::base()
            },
            other => {
                return Err(FleetError::Unsupported {
                    what: format!("the recipe `{other}`"),
                });
            }
        };
        Ok(TemplateBuild {
            snapshot: SnapshotId::generate(),
            template: Some(order.template.clone()),
            source: ImageSource::Recipe {
                recipe,
                kernel: self.images.kernel.clone(),
                guest: self.images.guest.clone(),
                dir: self.images.dir.clone(),
            },
            cpus: order.cpu_count,
            memory_mib: order.memory_mib,
            warm_up: WarmUp::usual(&self.images.user),
            settle: TemplateBuild::SETTLE,
        })
    }
}

fn failed(doing: impl Into<String>) -> impl FnOnce(cubicle_node::Error) -> FleetError {
    let doing = doing.into();
    move |error| {
        if error.is_capacity() {
            FleetError::Capacity {
                why: Chain(&error).to_string(),
            }
        } else {
            FleetError::Failed {
                doing,
                why: Chain(&error).to_string(),
            }
        }
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

#[async_trait]
impl Fleet for NodeFleet {
    async fn create(&self, order: CreateOrder) -> Result<Created, FleetError> {
        let snapshot = order.snapshot.clone();
        let request = CreateSandbox {
            id: order.id.clone(),
            snapshot: order.snapshot,
            template: Some(order.template),
            env_vars: order.env_vars.into_iter().collect(),
            access_token: Some(order.envd_token),
            egress: egress(&order.network),
            limits: None,
        };
        let created = self
            .node
            .create(request)
            .await
            .map_err(|error| match error {
                cubicle_node::Error::Store(cubicle_cow::Error::NotFound(_)) => {
                    FleetError::NoSnapshot { id: snapshot }
                }
                other => failed(format!("create sandbox {}", order.id))(other),
            })?;
        let timings = created.timings;
        let mut phases: Vec<Phase> = timings
            .phases()
            .into_iter()
            .map(|(name, took)| Phase { name, took })
            .collect();
        phases.push(Phase {
            name: "restore",
            took: timings.launch + timings.channel,
        });
        Ok(Created {
            generation: created.generation,
            phases,
        })
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
        let template = self.template(&order)?;
        let booted = self.node.measure_boot(template).await;
        booted.map_err(failed(format!("boot template {}", order.template)))
    }

    async fn build(
        &self,
        order: BuildOrder,
        steps: mpsc::UnboundedSender<BuildStep>,
    ) -> Result<Built, FleetError> {
        let (progress, mut events) = Progress::channel();
        let template = self.template(&order)?;
        let build = self.node.build_template(template, progress);
        let report = async {
            while let Some(event) = events.recv().await {
                let step = BuildStep {
                    level: Level::Info,
                    step: Some(event.step.name().to_owned()),
                    message: event.message,
                };
                // Whoever asked may have gone; the build goes on.
                let _ = steps.send(step);
            }
        };
        let (built, ()) = tokio::join!(build, report);
        let built = built.map_err(failed(format!("build template {}", order.template)))?;
        Ok(Built {
            snapshot: built.snapshot,
        })
    }

    async fn delete_snapshot(&self, id: &SnapshotId) -> Result<bool, FleetError> {
        match self.node.store().delete(id).await {
            Ok(()) => Ok(true),
            Err(cubicle_cow::Error::NotFound(_)) => Ok(false),
            Err(error) => Err(FleetError::Failed {
                doing: format!("delete snapshot {id}"),
                why: Chain(&error).to_string(),
            }),
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
