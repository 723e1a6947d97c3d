//! A fake VM: what is asked of it, and when it ends.

use std::{
    fs,
    io::Write as _,
    path::Path,
    sync::{Arc, Weak},
};

use async_trait::async_trait;
use cubicle_ids::SandboxId;
use tokio::sync::watch;

use super::{DeviceState, Memory, Step, World, add, guest, lock, remove_run_dir};
use crate::{
    ChannelStream, Vm,
    error::{Error, Result},
    maps, process,
    spec::{GuestMemory, MemoryRange, VmRecord, VmUsage},
};

/// Room between host and guest, in bytes: what a virtio-serial port and its socket hold.
const CHANNEL_ROOM: usize = 256 << 10;

/// Whether the guest's CPUs would run, had it any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Running,
    Paused,
    Ended,
}

/// A VM in memory.
#[derive(Debug)]
pub struct FakeVm {
    record: VmRecord,
    state: DeviceState,
    memory: Arc<Memory>,
    phase: watch::Sender<Phase>,
    world: Weak<World>,
}

impl FakeVm {
    pub(super) fn new(
        record: VmRecord,
        state: DeviceState,
        memory: Memory,
        runs: bool,
        world: Weak<World>,
    ) -> Self {
        let (phase, _) = watch::channel(if runs { Phase::Running } else { Phase::Paused });
        Self {
            record,
            state,
            memory: Arc::new(memory),
            phase,
            world,
        }
    }

    /// Writes to guest memory, as a program in the guest would; `None` if it does not fit. The
    /// first [`FakeVm::RESERVED`] bytes are the guest's own.
    pub fn write_memory(&self, offset: usize, bytes: &[u8]) -> Option<()> {
        self.memory.write(offset, bytes)
    }

    /// Reads guest memory; `None` if there is not as much.
    #[must_use]
    pub fn read_memory(&self, offset: usize, len: usize) -> Option<Vec<u8>> {
        self.memory.read(offset, len)
    }

    /// Bytes at the beginning of memory in which the guest keeps what it was told.
    pub const RESERVED: usize = guest::STATE_LEN;

    /// Ends the VM, as a guest that powers off would. Its run directory stays until it is killed.
    pub fn die(&self) {
        if self.end()
            && let Some(world) = self.world.upgrade()
        {
            add(&world.tally.died);
        }
    }

    /// Whether it had not ended before.
    fn end(&self) -> bool {
        let first = self.phase.send_replace(Phase::Ended) != Phase::Ended;
        if let Some(world) = self.world.upgrade() {
            lock(&world.vms).remove(&self.record.start_time);
        }
        first
    }

    /// The driver, if the VM runs and the step is not to fail.
    fn check(&self, step: Step) -> Result<Arc<World>> {
        let id: &SandboxId = &self.record.id;
        let gone = || Error::Gone { id: id.clone() };
        if *self.phase.borrow() == Phase::Ended {
            return Err(gone());
        }
        let world = self.world.upgrade().ok_or_else(gone)?;
        world.check(step, id)?;
        Ok(world)
    }

    fn set_phase(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let change = *now != Phase::Ended && *now != phase;
            if change {
                *now = phase;
            }
            change
        });
    }
}

#[async_trait]
impl Vm for FakeVm {
    fn record(&self) -> VmRecord {
        self.record.clone()
    }

    async fn connect_channel(&self) -> Result<ChannelStream> {
        let world = self.check(Step::Connect)?;
        let (host, inside) = tokio::io::duplex(CHANNEL_ROOM);
        let connection = guest::Connection {
            world: Arc::clone(&world),
            memory: Arc::clone(&self.memory),
            phase: self.phase.subscribe(),
            cpus: self.state.cpus,
        };
        tokio::spawn(guest::serve(connection, inside));
        Ok(Box::pin(host))
    }

    async fn pause(&self) -> Result<()> {
        self.check(Step::Pause)?;
        self.set_phase(Phase::Paused);
        Ok(())
    }

    async fn resume(&self) -> Result<()> {
        self.check(Step::Resume)?;
        self.set_phase(Phase::Running);
        Ok(())
    }

    async fn save_device_state(&self, to: &Path) -> Result<u64> {
        self.check(Step::SaveDeviceState)?;
        let text = serde_json::to_vec(&self.state)
            .map_err(|error| Error::io("write", to)(error.into()))?;
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(to)
            .map_err(Error::io("create", to))?;
        file.write_all(&text).map_err(Error::io("write", to))?;
        Ok(text.len() as u64)
    }

    fn memory(&self) -> Result<GuestMemory> {
        self.check(Step::Memory)?;
        let (host_address, len) = (self.memory.address(), self.memory.len());
        let ranges = vec![MemoryRange {
            host_address,
            offset: 0,
            len,
        }];
        Ok(GuestMemory {
            pid: self.record.pid,
            ranges,
        })
    }

    fn cpu_time_us(&self) -> Result<u64> {
        self.check(Step::Usage)?;
        process::cpu_time_us(self.record.pid)
            .map_err(Error::host("read what this process uses", &self.record.id))
    }

    async fn usage(&self) -> Result<VmUsage> {
        self.check(Step::Usage)?;
        // It lives in this process, so it uses what this process uses.
        let failed = Error::host("read what this process uses", &self.record.id);
        let used = || {
            let (resident_bytes, private_bytes) = maps::footprint(self.record.pid)?;
            let cpu_time_us = process::cpu_time_us(self.record.pid)?;
            Ok(VmUsage {
                cpu_time_us,
                resident_bytes,
                private_bytes,
            })
        };
        used().map_err(failed)
    }

    async fn kill(&self) -> Result<()> {
        if let Some(world) = self.world.upgrade() {
            world.check(Step::Kill, &self.record.id)?;
            if self.end() {
                add(&world.tally.killed);
            }
        } else {
            self.end();
        }
        remove_run_dir(&self.record.run_dir)
    }

    async fn exited(&self) {
        // The sender is ours and lives as long as we do, so this cannot fail before it is true.
        let _ = self
            .phase
            .subscribe()
            .wait_for(|phase| *phase == Phase::Ended)
            .await;
    }
}
