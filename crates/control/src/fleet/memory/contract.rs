//! The contract of [`Fleet`], kept by machines that exist in memory only.

use std::{net::Ipv4Addr, sync::atomic::Ordering, time::Duration};

use async_trait::async_trait;
use cubicle_ids::{SandboxId, SnapshotId};
use time::OffsetDateTime;
use tokio::sync::{broadcast, mpsc};

use super::{MemoryFleet, Step, Vm};
use crate::{
    fleet::{
        BuildOrder, BuildStep, CopyFiles, CreateOrder, Created, Ended, Fact, Fleet, FleetError,
        FleetEvent, FreezeOrder, HostUsage, Machine, NetworkOptions, OriginFacts, Output, Program,
        SnapshotFact, SnapshotTaken, Usage,
    },
    template::Origin,
};

#[async_trait]
impl Fleet for MemoryFleet {
    async fn create(&self, order: CreateOrder) -> Result<Created, FleetError> {
        self.creates.fetch_add(1, Ordering::Relaxed);
        self.reach(Step::Create).await?;
        if self.lock().sandboxes.contains_key(&order.id) {
            return Err(FleetError::Failed {
                doing: format!("create {}", order.id),
                why: "it exists already".into(),
            });
        }
        self.restore(order, 1)
    }

    async fn kill(&self, id: &SandboxId) -> Result<bool, FleetError> {
        self.kills.fetch_add(1, Ordering::Relaxed);
        self.reach(Step::Kill).await?;
        let mut state = self.lock();
        if state.fail_kills > 0 {
            state.fail_kills -= 1;
            let doing = format!("kill {id}");
            return Err(FleetError::Failed {
                doing,
                why: "told to fail".into(),
            });
        }
        state.orders.remove(id);
        Ok(state.sandboxes.remove(id).is_some())
    }

    async fn snapshot(&self, order: FreezeOrder) -> Result<SnapshotTaken, FleetError> {
        let _doing = self.begin(&order.id)?;
        self.freeze(&order).await
    }

    async fn pause(&self, order: FreezeOrder) -> Result<SnapshotTaken, FleetError> {
        let _doing = self.begin(&order.id)?;
        let taken = self.freeze(&order).await?;
        if self.lock().sandboxes.remove(&order.id).is_none() {
            return Err(FleetError::NoSandbox { id: order.id });
        }
        self.reach(Step::Dropped).await?;
        Ok(taken)
    }

    async fn resume(
        &self,
        order: CreateOrder,
        last_generation: u64,
    ) -> Result<Created, FleetError> {
        self.reach(Step::Resume).await?;
        if self.lock().sandboxes.contains_key(&order.id) {
            return Err(FleetError::Failed {
                doing: format!("resume {}", order.id),
                why: "it runs already".into(),
            });
        }
        let created = self.restore(order, last_generation + 1)?;
        self.reach(Step::Resumed).await?;
        Ok(created)
    }

    async fn rollback(&self, order: CreateOrder) -> Result<Created, FleetError> {
        let _doing = self.begin(&order.id)?;
        self.reach(Step::Rollback).await?;
        let Some(generation) = self.generation(&order.id) else {
            return Err(FleetError::NoSandbox { id: order.id });
        };
        let created = self.restore(order, generation + 1)?;
        self.reach(Step::Switched).await?;
        Ok(created)
    }

    async fn set_network(
        &self,
        id: &SandboxId,
        network: &NetworkOptions,
    ) -> Result<(), FleetError> {
        let _doing = self.begin(id)?;
        self.reach(Step::Network).await?;
        let mut state = self.lock();
        let order = state.orders.get_mut(id);
        let order = order.ok_or_else(|| FleetError::NoSandbox { id: id.clone() })?;
        order.network = network.clone();
        Ok(())
    }

    async fn snapshots(&self) -> Result<Vec<SnapshotFact>, FleetError> {
        Ok(self.lock().snapshots.values().cloned().collect())
    }

    async fn verify_snapshot(&self, id: &SnapshotId) -> Result<(), FleetError> {
        let state = self.lock();
        let no_snapshot = || FleetError::NoSnapshot { id: id.clone() };
        match &state.snapshots.get(id).ok_or_else(no_snapshot)?.failure {
            Some(reason) => Err(FleetError::Damaged {
                id: id.clone(),
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }

    async fn sandboxes(&self) -> Result<Vec<Fact>, FleetError> {
        let state = self.lock();
        let fact = |(id, vm): (&SandboxId, &Vm)| Fact {
            id: id.clone(),
            generation: vm.generation,
        };
        Ok(state.sandboxes.iter().map(fact).collect())
    }

    fn generation(&self, id: &SandboxId) -> Option<u64> {
        Some(self.lock().sandboxes.get(id)?.generation)
    }

    fn cpu_time(&self, id: &SandboxId) -> Option<Duration> {
        self.generation(id)?;
        let mut state = self.lock();
        let work = state.work;
        state.worked += work;
        Some(state.worked)
    }

    async fn usage(&self, id: &SandboxId) -> Result<Usage, FleetError> {
        if self.generation(id).is_none() {
            return Err(FleetError::NoSandbox { id: id.clone() });
        }
        Ok(Usage {
            cpu_count: 2,
            cpu_used_pct: 12.5,
            mem_used: 64 << 20,
            mem_total: 512 << 20,
            mem_cache: 32 << 20,
            disk_used: 1 << 30,
            disk_total: 2 << 30,
        })
    }

    async fn host_usage(&self, id: &SandboxId) -> Result<HostUsage, FleetError> {
        if self.generation(id).is_none() {
            return Err(FleetError::NoSandbox { id: id.clone() });
        }
        Ok(HostUsage {
            cpu_time_us: 1_000,
            private_bytes: 16 << 20,
            resident_bytes: 64 << 20,
        })
    }

    async fn measure_boot(&self, _: BuildOrder) -> Result<Duration, FleetError> {
        Ok(Duration::from_secs(1))
    }

    async fn origin(
        &self,
        origin: &Origin,
        progress: mpsc::UnboundedSender<BuildStep>,
    ) -> Result<OriginFacts, FleetError> {
        self.look_at(origin, &progress).await
    }

    async fn build(
        &self,
        order: BuildOrder,
        progress: mpsc::UnboundedSender<BuildStep>,
    ) -> Result<(), FleetError> {
        self.boot(order, &progress).await
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
        self.reach(Step::Copy).await?;
        self.note(
            id,
            format!("copy {} {} {}", files.src, files.dest, files.user),
        )
    }

    async fn probe(&self, id: &SandboxId, _: u16, _: Option<&str>) -> Result<bool, FleetError> {
        self.reach(Step::Probe).await?;
        let state = self.lock();
        let no_sandbox = || FleetError::NoSandbox { id: id.clone() };
        let vm = state.sandboxes.get(id).ok_or_else(no_sandbox)?;
        Ok(vm.done.iter().any(|done| done.contains("serve")))
    }

    async fn delete_snapshot(&self, id: &SnapshotId) -> Result<bool, FleetError> {
        self.reach(Step::Delete).await?;
        self.lock().contents.remove(id);
        Ok(self.lock().snapshots.remove(id).is_some())
    }

    fn events(&self) -> broadcast::Receiver<FleetEvent> {
        self.events.subscribe()
    }

    async fn machines(&self) -> Result<Vec<Machine>, FleetError> {
        let used = u32::try_from(self.lock().sandboxes.len()).unwrap_or(u32::MAX);
        Ok(vec![Machine {
            id: "memory".into(),
            address: Ipv4Addr::LOCALHOST,
            cpu_milli: 4000,
            cpu_milli_used: u64::from(used) * 2000,
            memory_mib: 8192,
            memory_mib_used: u64::from(used) * 512,
            slots: 100,
            slots_used: used,
            slots_ready: 4,
            spares: 2,
            spares_asleep: 1,
            spares_bytes: 60 << 20,
            hypervisor: "memory".into(),
            cpu_model: "none".into(),
            kernel: "none".into(),
            heartbeat: OffsetDateTime::now_utc(),
        }])
    }
}
