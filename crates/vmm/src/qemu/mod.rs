//! Driver: QEMU's `microvm` machine, under KVM or software emulation.
//!
//! - `args` is the machine; `features` what the installed QEMU can do.
//! - `launch` opens everything a VM needs, starts the confined process, waits until it is loaded.
//! - `vm` is a VM that runs, `qmp` the protocol it is commanded with.
//!
//! QEMU gets descriptors instead of paths: its user may enter no directory of ours, and its root
//! holds none. Sockets are bound and listening before QEMU starts, so connecting never races with
//! its start, and a server that was killed can connect again.

use std::{
    fs::OpenOptions,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use tokio::net::UnixStream;

mod args;
mod features;
mod launch;
mod qmp;
mod vm;

pub use args::GUEST_MAC;
pub use features::{Features, Version};
pub(crate) use vm::QemuVm;

use crate::{
    Hypervisor, Vm,
    cgroup::Cgroups,
    error::{Error, Result},
    jail::Jail,
    probe::Accelerator,
    process::{self, Process},
    remains::Remains,
    spec::{VmRecord, VmSpec},
    tsc,
    zygote::Zygotes,
};

/// Value of [`VmRecord::driver`].
const NAME: &str = "qemu";

/// How long QEMU may take to come up and load a snapshot, which takes 25 ms on an idle machine,
/// or to answer a command. Generous, as hundreds may start on a machine at the same time.
const PATIENCE: Duration = Duration::from_secs(20);

const MONITOR_SOCKET: &str = "monitor.sock";
const CHANNEL_SOCKET: &str = "channel.sock";
const CONSOLE_SOCKET: &str = "console.sock";

/// How VM processes get at `/dev/kvm`, which only root and perhaps a group may open.
#[derive(Debug)]
enum KvmAccess {
    /// They need not, or anybody may.
    Open,
    /// They are handed a descriptor.
    Descriptor(OwnedFd),
    /// They are in this group.
    Group(u32),
}

impl KvmAccess {
    fn find(accelerator: Accelerator, features: &Features) -> Result<Self> {
        let device = Path::new("/dev/kvm");
        if accelerator == Accelerator::Tcg {
            return Ok(Self::Open);
        }
        let kvm = OpenOptions::new()
            .read(true)
            .write(true)
            .open(device)
            .map_err(Error::io("open", device))?;
        if features.kvm_descriptor() {
            return Ok(Self::Descriptor(kvm.into()));
        }
        let metadata = kvm.metadata().map_err(Error::io("look at", device))?;
        let may = |bits: u32| metadata.mode() & bits == bits;
        // Never root's group, whatever the mode says.
        let group = (may(0o060) && metadata.gid() != 0).then_some(metadata.gid());
        Ok(group
            .filter(|_| !may(0o006))
            .map_or(Self::Open, Self::Group))
    }
}

/// How to open the driver.
#[derive(Debug, Clone)]
pub struct QemuConfig {
    /// Program, by path or by a name to be found in `PATH`.
    pub binary: PathBuf,
    /// What runs guest instructions; see [`probe`](crate::probe) for how to choose.
    pub accelerator: Accelerator,
}

impl Default for QemuConfig {
    fn default() -> Self {
        Self {
            binary: PathBuf::from("qemu-system-x86_64"),
            accelerator: Accelerator::Tcg,
        }
    }
}

/// The driver: a handle that is cheap to clone.
#[derive(Debug, Clone)]
pub struct Qemu(Arc<Host>);

/// What all VMs of the driver share.
#[derive(Debug)]
struct Host {
    accelerator: Accelerator,
    features: Features,
    cgroups: Cgroups,
    zygotes: Zygotes,
    boot_id: String,
    tsc_khz: u64,
    kvm: KvmAccess,
    /// `/dev/null`, standard input of every VM.
    nothing: OwnedFd,
}

impl Qemu {
    /// Looks at the installed QEMU and at the host, builds the root that VMs will see, and has a
    /// QEMU wait in it to become VMs. Needs the privileges of root. About 100 ms.
    ///
    /// # Errors
    /// When QEMU is missing or too old, or the host refuses the namespaces.
    pub async fn open(config: QemuConfig) -> Result<Self> {
        let features = Features::detect(&config.binary).await?;
        let (binary, data) = (features.binary.clone(), features.data_dirs.clone());
        let devices: &[&str] = match config.accelerator {
            Accelerator::Kvm => &["/dev/kvm"],
            Accelerator::Tcg => &[],
        };
        let host = move || {
            let null = Path::new("/dev/null");
            let nothing = std::fs::File::open(null).map_err(Error::io("open", null))?;
            let boot_id =
                process::boot_id().map_err(Error::io("read", "/proc/sys/kernel/random/boot_id"))?;
            let jail = Jail::build(&binary, &data, devices)?;
            Ok((
                Zygotes::open(binary, jail)?,
                Cgroups::open(),
                boot_id,
                tsc::khz(),
                OwnedFd::from(nothing),
            ))
        };
        let (zygotes, cgroups, boot_id, tsc_khz, nothing) =
            blocking(host).await.unwrap_or_else(|reason| {
                Err(Error::Unusable {
                    binary: features.binary.clone(),
                    reason,
                })
            })?;
        let accelerator = config.accelerator;
        let kvm = KvmAccess::find(accelerator, &features)?;
        let host = Host {
            accelerator,
            features,
            cgroups,
            zygotes,
            boot_id,
            tsc_khz,
            kvm,
            nothing,
        };
        Ok(Self(Arc::new(host)))
    }

    /// What the installed QEMU is and can do.
    #[must_use]
    pub fn features(&self) -> &Features {
        &self.0.features
    }

    /// What runs guest instructions.
    #[must_use]
    pub fn accelerator(&self) -> Accelerator {
        self.0.accelerator
    }

    /// Starts a VM. `keep_log`: copy its console to the kernel log; otherwise the console, if
    /// the spec asks for one, is the caller's.
    pub(crate) async fn start(
        &self,
        spec: VmSpec,
        keep_log: bool,
    ) -> Result<(QemuVm, Option<UnixStream>)> {
        let (mut vm, console) = launch::launch(&self.0, spec).await?;
        match console {
            Some(console) if keep_log => {
                vm.keep_console(console);
                Ok((vm, None))
            }
            console => Ok((vm, console)),
        }
    }
}

/// Runs what may wait for the host outside the runtime's own threads. The error is a panic's.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| error.to_string())
}

#[async_trait]
impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn machine(&self) -> String {
        let Version { major, minor, .. } = self.0.features.version;
        let cpu = args::cpu_model(self.0.accelerator);
        let accelerator = self.0.accelerator;
        format!(
            "qemu-{major}.{minor}/microvm-{}/{accelerator}/{cpu}",
            args::MACHINE_REVISION
        )
    }

    async fn launch(&self, spec: VmSpec) -> Result<Arc<dyn Vm>> {
        let (vm, _) = self.start(spec, true).await?;
        Ok(Arc::new(vm))
    }

    async fn adopt(&self, record: &VmRecord) -> Result<Option<Arc<dyn Vm>>> {
        let process = if record.boot_id == self.0.boot_id {
            Process::find(record.pid, record.start_time)
                .map_err(Error::host("look for its process", &record.id))?
        } else {
            None
        };
        let Some(process) = process else {
            let remains = Remains {
                id: record.id.clone(),
                process: None,
                cgroups: record.cgroups.clone(),
                run_dir: Some(record.run_dir.clone()),
            };
            remains.remove().await?;
            return Ok(None);
        };
        let socket = record.run_dir.join(MONITOR_SOCKET);
        let (qmp, greeted) = qmp::Qmp::connect(&socket)
            .await
            .map_err(Error::io("connect to", socket))?;
        let mut vm = QemuVm::new(record.clone(), process, qmp, None);
        vm.greet(greeted).await?;
        let console = record.run_dir.join(CONSOLE_SOCKET);
        if console.exists() {
            let stream = UnixStream::connect(&console).await;
            vm.keep_console(stream.map_err(Error::io("connect to", console))?);
        }
        Ok(Some(Arc::new(vm)))
    }
}
