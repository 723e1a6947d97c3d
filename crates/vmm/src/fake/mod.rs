//! Driver: VMs in memory, for tests of everything above this crate.
//!
//! A fake VM has no CPU, but what others see of a VM is real: a run directory; guest memory that is
//! mapped private from the image it was restored from, so that it can be scanned and copied like a
//! VM's; a device state to save and restore; and a guest that speaks the channel's handshake and
//! HTTP/2, remembers in its memory what it was told to be, and echoes on every tunnel. It starts in
//! microseconds.
//!
//! [`Behaviour`] makes a step fail, a guest silent or a VM short-lived; [`Fake::counts`] tells
//! whether anything was left. VMs live in the driver, as processes live in the host: dropping a
//! handle changes nothing, and [`Hypervisor::adopt`] finds them again.

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use cubicle_ids::SandboxId;
use serde::{Deserialize, Serialize};

use crate::{
    Hypervisor, Vm,
    error::{Error, Result},
    process,
    spec::{Boot, MemoryFile, VmRecord, VmSpec},
};

mod guest;
mod memory;
mod vm;

use memory::Memory;
pub use vm::FakeVm;

/// Value of [`VmRecord::driver`].
const NAME: &str = "fake";

/// A step at which a test may want a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Step {
    /// [`Hypervisor::launch`].
    Launch,
    /// [`Hypervisor::adopt`].
    Adopt,
    /// [`Vm::connect_channel`].
    Connect,
    /// [`Vm::pause`].
    Pause,
    /// [`Vm::resume`].
    Resume,
    /// [`Vm::save_device_state`].
    SaveDeviceState,
    /// [`Vm::memory`].
    Memory,
    /// [`Vm::usage`].
    Usage,
    /// [`Vm::kill`]: the VM lives on.
    Kill,
}

impl Step {
    fn attempt(self) -> &'static str {
        match self {
            Self::Launch => "be launched",
            Self::Adopt => "be adopted",
            Self::Connect => "accept a connection",
            Self::Pause => "stop",
            Self::Resume => "run on",
            Self::SaveDeviceState => "save the state of its devices",
            Self::Memory => "show its memory",
            Self::Usage => "tell what it uses",
            Self::Kill => "die",
        }
    }
}

/// How VMs behave. The steps that fail, the delays and the closed ports apply from the next call
/// on; `dies_after` to VMs launched from then on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Behaviour {
    /// Steps that fail, with [`Error::Injected`].
    pub fails: BTreeSet<Step>,
    /// Guests accept connections and never answer.
    pub silent: bool,
    /// Guests refuse to be who they are told to be.
    pub refuses_init: bool,
    /// VMs end by themselves, that long after their launch.
    pub dies_after: Option<Duration>,
    /// Time that a launch takes.
    pub launch_takes: Duration,
    /// Guest ports on which nothing listens. All others echo.
    pub closed_ports: BTreeSet<u16>,
}

impl Behaviour {
    /// Everything works but this step.
    #[must_use]
    pub fn failing(step: Step) -> Self {
        Self {
            fails: BTreeSet::from([step]),
            ..Self::default()
        }
    }
}

/// How many of what there were, and are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Launches that succeeded.
    pub launched: u64,
    /// Adoptions that found a VM.
    pub adopted: u64,
    /// VMs that were killed while they ran.
    pub killed: u64,
    /// VMs that ended by themselves.
    pub died: u64,
    /// VMs that run, or wait to be resumed, now.
    pub running: u64,
    /// Channel connections that are open now.
    pub connections: u64,
}

#[derive(Debug, Default)]
struct Tally {
    launched: AtomicU64,
    adopted: AtomicU64,
    killed: AtomicU64,
    died: AtomicU64,
    connections: AtomicU64,
}

/// What the driver and its VMs share.
#[derive(Debug, Default)]
struct World {
    behaviour: Mutex<Behaviour>,
    /// VMs that have not ended, by the start time of their record, which is a serial number here.
    vms: Mutex<HashMap<u64, Arc<FakeVm>>>,
    serial: AtomicU64,
    tally: Tally,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section leaves a whole value, even one that panics.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl World {
    fn behaviour(&self) -> Behaviour {
        lock(&self.behaviour).clone()
    }

    fn check(&self, step: Step, id: &SandboxId) -> Result<()> {
        if lock(&self.behaviour).fails.contains(&step) {
            return Err(Error::Injected {
                id: id.clone(),
                attempt: step.attempt(),
            });
        }
        Ok(())
    }
}

/// The driver: a handle that is cheap to clone. VMs end when the last handle of the driver and
/// of them is gone.
#[derive(Debug, Clone, Default)]
pub struct Fake(Arc<World>);

impl Fake {
    /// A driver whose VMs work.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Changes how VMs behave from now on.
    pub fn behave(&self, behaviour: Behaviour) {
        *lock(&self.0.behaviour) = behaviour;
    }

    /// How many of what there were, and are.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let tally = &self.0.tally;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            launched: load(&tally.launched),
            adopted: load(&tally.adopted),
            killed: load(&tally.killed),
            died: load(&tally.died),
            running: lock(&self.0.vms).len() as u64,
            connections: load(&tally.connections),
        }
    }

    /// The VM that runs for this sandbox: the youngest, if there are several.
    #[must_use]
    pub fn vm(&self, id: &SandboxId) -> Option<Arc<FakeVm>> {
        let vms = lock(&self.0.vms);
        let own = vms.iter().filter(|(_, vm)| vm.record().id == *id);
        own.max_by_key(|(serial, _)| **serial)
            .map(|(_, vm)| Arc::clone(vm))
    }
}

/// What a fake VM saves as the state of its devices: the shape it must be restored to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct DeviceState {
    fake_device_state: u32,
    cpus: u32,
    memory_mib: u32,
    disks: usize,
}

impl DeviceState {
    fn of(spec: &VmSpec) -> Self {
        let disks = spec.disks.len();
        Self {
            fake_device_state: 1,
            cpus: spec.cpus,
            memory_mib: spec.memory_mib,
            disks,
        }
    }
}

#[async_trait]
impl Hypervisor for Fake {
    fn name(&self) -> &'static str {
        NAME
    }

    fn machine(&self) -> String {
        "fake-1".to_owned()
    }

    async fn launch(&self, spec: VmSpec) -> Result<Arc<dyn Vm>> {
        let behaviour = self.0.behaviour();
        tokio::time::sleep(behaviour.launch_takes).await;
        self.0.check(Step::Launch, &spec.id)?;
        let memory = load(&spec)?;
        let serial = self.0.serial.fetch_add(1, Ordering::Relaxed) + 1;
        let record = VmRecord {
            id: spec.id.clone(),
            driver: NAME.to_owned(),
            pid: i32::try_from(std::process::id()).unwrap_or(i32::MAX),
            start_time: serial,
            boot_id: process::boot_id()
                .map_err(Error::io("read", "/proc/sys/kernel/random/boot_id"))?,
            run_dir: spec.run_dir.clone(),
            cgroups: Vec::new(),
            uid: spec.uid,
            memory: MemoryFile {
                inode: serial,
                len: u64::from(spec.memory_mib) << 20,
            },
        };
        make_run_dir(&spec.run_dir)?;
        let runs = matches!(spec.boot, Boot::Cold { .. }) || spec.start;
        let state = DeviceState::of(&spec);
        let vm = Arc::new(FakeVm::new(
            record,
            state,
            memory,
            runs,
            Arc::downgrade(&self.0),
        ));
        lock(&self.0.vms).insert(serial, Arc::clone(&vm));
        add(&self.0.tally.launched);
        if let Some(delay) = behaviour.dies_after {
            let vm = Arc::downgrade(&vm);
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                if let Some(vm) = vm.upgrade() {
                    vm.die();
                }
            });
        }
        Ok(vm)
    }

    async fn adopt(&self, record: &VmRecord) -> Result<Option<Arc<dyn Vm>>> {
        self.0.check(Step::Adopt, &record.id)?;
        let found = lock(&self.0.vms).get(&record.start_time).cloned();
        if let Some(vm) = found.filter(|vm| vm.record() == *record) {
            add(&self.0.tally.adopted);
            return Ok(Some(vm));
        }
        remove_run_dir(&record.run_dir)?;
        Ok(None)
    }
}

/// Opens what the spec names, as a real driver would, and maps the memory.
fn load(spec: &VmSpec) -> Result<Memory> {
    for disk in &spec.disks {
        fs::OpenOptions::new()
            .read(true)
            .write(!disk.read_only)
            .open(&disk.path)
            .map_err(Error::io("open", &disk.path))?;
    }
    let len = u64::from(spec.memory_mib) << 20;
    let invalid = |reason: String| Error::InvalidSpec {
        id: spec.id.clone(),
        reason,
    };
    match &spec.boot {
        Boot::Cold {
            kernel, initramfs, ..
        } => {
            for file in [kernel, initramfs] {
                fs::metadata(file).map_err(Error::io("look at", file))?;
            }
            Memory::empty(len).map_err(Error::host("map its memory", &spec.id))
        }
        Boot::Restore {
            memory,
            device_state,
        } => {
            let text = fs::read(device_state).map_err(Error::io("read", device_state))?;
            let state: DeviceState = serde_json::from_slice(&text)
                .map_err(|error| invalid(format!("{}: {error}", device_state.display())))?;
            if state != DeviceState::of(spec) {
                return Err(invalid(format!(
                    "its snapshot was taken of another shape: {state:?}"
                )));
            }
            let image = fs::File::open(memory).map_err(Error::io("open", memory))?;
            let found = image
                .metadata()
                .map_err(Error::io("look at", memory))?
                .len();
            if found != len {
                let path = memory.display();
                return Err(invalid(format!(
                    "{path} holds {found} bytes, its memory is {len}"
                )));
            }
            Memory::of(&image, len).map_err(Error::io("map", memory))
        }
    }
}

fn make_run_dir(run_dir: &Path) -> Result<()> {
    remove_run_dir(run_dir)?;
    DirBuilder::new()
        .mode(0o700)
        .create(run_dir)
        .map_err(Error::io("create", run_dir))
}

fn remove_run_dir(run_dir: &Path) -> Result<()> {
    match fs::remove_dir_all(run_dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", run_dir)(error))
        }
        _ => Ok(()),
    }
}
