//! The QEMU command line: what the machine is made of.
//!
//! A snapshot holds the state of exactly the devices listed here. Changing what a machine is made
//! of, or the order of its devices, means that older snapshots cannot be restored:
//! [`MACHINE_REVISION`] must be raised with it.

use std::{
    fmt::Write as _,
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
};

use cubicle_protocol::CHANNEL_PORT_NAME;

use super::features::Features;
use crate::{
    probe::Accelerator,
    spec::{Limits, VmSpec},
};

/// Revision of the machine described in this file.
pub(crate) const MACHINE_REVISION: u32 = 2;

/// Address of the guest's network card; the same in every VM, so that a clone needs no
/// reconfiguration. Each VM's network namespace keeps it apart from the others'.
pub const GUEST_MAC: &str = "02:cb:1c:1e:00:21";

/// What QEMU's own system call filter forbids. Its VM needs none of it.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// First descriptor set of the disks; the sets below are single descriptors.
const FIRST_DISK_SET: usize = 10;
const DEVICE_STATE_SET: usize = 1;
const KVM_SET: usize = 2;

/// Where guest memory comes from.
#[derive(Debug)]
pub(crate) enum MemorySource {
    /// A memory image, mapped private.
    Image(OwnedFd),
    /// Zeroes: a private mapping of `/dev/zero` is anonymous memory that can still be told apart
    /// in /proc/PID/maps, and costs no page cache as an empty file would.
    Zero,
}

/// An open disk image.
#[derive(Debug)]
pub(crate) struct OpenDisk {
    pub(crate) fd: OwnedFd,
    pub(crate) read_only: bool,
    /// Opened with `O_DIRECT`.
    pub(crate) direct: bool,
    /// Bytes.
    pub(crate) len: u64,
}

/// Kernel, initial file system and command line, or the frozen state of devices.
#[derive(Debug)]
pub(crate) enum OpenBoot {
    Cold {
        kernel: OwnedFd,
        initramfs: OwnedFd,
        cmdline: String,
    },
    Restore {
        device_state: OwnedFd,
    },
}

/// Every descriptor that QEMU is given.
#[derive(Debug)]
pub(crate) struct Descriptors {
    pub(crate) memory: MemorySource,
    pub(crate) boot: OpenBoot,
    pub(crate) disks: Vec<OpenDisk>,
    pub(crate) tap: Option<OwnedFd>,
    /// Listening sockets.
    pub(crate) monitor: OwnedFd,
    pub(crate) channel: OwnedFd,
    pub(crate) console: Option<OwnedFd>,
    /// `/dev/kvm`, if QEMU takes it as a descriptor.
    pub(crate) kvm: Option<OwnedFd>,
}

impl Descriptors {
    /// All of them, for the process to inherit.
    pub(crate) fn inherited(&self) -> Vec<BorrowedFd<'_>> {
        use std::os::fd::AsFd as _;
        let mut all = vec![self.monitor.as_fd(), self.channel.as_fd()];
        if let MemorySource::Image(image) = &self.memory {
            all.push(image.as_fd());
        }
        match &self.boot {
            OpenBoot::Cold {
                kernel, initramfs, ..
            } => {
                all.extend([kernel.as_fd(), initramfs.as_fd()]);
            }
            OpenBoot::Restore { device_state } => all.push(device_state.as_fd()),
        }
        all.extend(self.disks.iter().map(|disk| disk.fd.as_fd()));
        all.extend(
            self.tap
                .iter()
                .chain(&self.console)
                .chain(&self.kvm)
                .map(|fd| fd.as_fd()),
        );
        all
    }
}

/// QEMU reopens what it is given this way: the inode's mode counts, the path does not.
fn reopened(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// One of the machine's 8 transports.
fn transport(index: usize) -> String {
    format!("virtio-mmio-bus.{index}")
}

/// Last transport. Disks are attached from here downwards: the firmware's table lists transports
/// in descending order, and guests name disks in the order in which they find them.
const LAST_TRANSPORT: usize = 7;

/// The arguments, program name included.
pub(crate) fn arguments(
    spec: &VmSpec,
    accelerator: Accelerator,
    features: &Features,
    fds: &Descriptors,
    tsc_khz: u64,
) -> Vec<String> {
    let mut args: Vec<String> = Vec::with_capacity(64);
    let mut push = |option: &str, value: String| args.extend([option.to_owned(), value]);

    push("-name", spec.id.to_string());
    push("-sandbox", SANDBOX.to_owned());
    push("-display", "none".to_owned());
    // Interrupt timer and controller of the PC are off: with them, kernels were seen to panic at
    // boot; the real-time clock is on: without it a kernel waits for it for a second. Half of the
    // transports' worth of interrupts is enough, and fewer empty ones are faster to find empty.
    push(
        "-machine",
        "microvm,acpi=on,pit=off,pic=off,rtc=on,ioapic2=off,suppress-vmdesc=on,memory-backend=ram"
            .to_owned(),
    );
    push("-global", "migration.send-configuration=off".to_owned());
    push("-global", "migration.x-events=on".to_owned());
    if let Some(kvm) = &fds.kvm {
        push("-add-fd", format!("fd={},set={KVM_SET}", kvm.as_raw_fd()));
    }
    push("-accel", accelerator_option(accelerator, fds.kvm.is_some()));
    push("-cpu", cpu_model(accelerator).to_owned());
    push("-smp", spec.cpus.to_string());
    push("-m", format!("{}M", spec.memory_mib));
    push("-object", memory_object(spec, features, fds));
    monitor_and_console(&mut push, fds);
    devices(&mut push, fds);
    match &fds.boot {
        OpenBoot::Cold {
            kernel,
            initramfs,
            cmdline,
        } => {
            push("-kernel", reopened(kernel));
            push("-initrd", reopened(initramfs));
            push(
                "-append",
                kernel_command_line(cmdline, accelerator, tsc_khz),
            );
        }
        OpenBoot::Restore { device_state } => {
            let fd = device_state.as_raw_fd();
            if features.incoming_file() {
                push("-add-fd", format!("fd={fd},set={DEVICE_STATE_SET}"));
                push("-incoming", format!("file:/dev/fdset/{DEVICE_STATE_SET}"));
            } else {
                push("-incoming", format!("fd:{fd}"));
            }
        }
    }
    args.insert(0, features.binary.display().to_string());
    args.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
    if matches!(fds.boot, OpenBoot::Restore { .. }) && !spec.start {
        args.push("-S".to_owned());
    }
    args
}

fn accelerator_option(accelerator: Accelerator, by_descriptor: bool) -> String {
    match accelerator {
        Accelerator::Kvm if by_descriptor => format!("kvm,device=/dev/fdset/{KVM_SET}"),
        Accelerator::Kvm => "kvm".to_owned(),
        Accelerator::Tcg => format!("tcg,tb-size={}", Limits::JIT_CACHE_MIB),
    }
}

/// The guest's processor. `host` ties snapshots to the host's processor model; `max` to QEMU's
/// release.
pub(crate) fn cpu_model(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "host",
        Accelerator::Tcg => "max",
    }
}

fn memory_object(spec: &VmSpec, features: &Features, fds: &Descriptors) -> String {
    let path = match &fds.memory {
        MemorySource::Image(image) => reopened(image),
        MemorySource::Zero => "/dev/zero".to_owned(),
    };
    let mut object = format!(
        "memory-backend-file,id=ram,mem-path={path},size={}M,share=off,prealloc=off",
        spec.memory_mib
    );
    if features.read_only_images() {
        object.push_str(",readonly=on,rom=off");
    }
    object
}

fn listening(id: &str, socket: &OwnedFd) -> String {
    // `wait=off`: QEMU starts before anybody connects, and accepts the next one after a client
    // has gone, such as a server that was killed.
    format!(
        "socket,id={id},fd={},server=on,wait=off",
        socket.as_raw_fd()
    )
}

fn monitor_and_console(push: &mut impl FnMut(&str, String), fds: &Descriptors) {
    push("-chardev", listening("monitor", &fds.monitor));
    push("-mon", "chardev=monitor,mode=control".to_owned());
    // The serial port is always there, as it is part of the machine that a snapshot holds.
    if let Some(console) = &fds.console {
        push("-chardev", listening("console", console));
        push("-serial", "chardev:console".to_owned());
    } else {
        push("-serial", "null".to_owned());
    }
}

fn devices(push: &mut impl FnMut(&str, String), fds: &Descriptors) {
    push("-chardev", listening("channel", &fds.channel));
    // One port besides port 0, which is reserved for consoles: each port costs two queues.
    push(
        "-device",
        format!("virtio-serial-device,bus={},max_ports=2", transport(0)),
    );
    push(
        "-device",
        format!("virtserialport,nr=1,chardev=channel,name={CHANNEL_PORT_NAME}"),
    );
    push("-device", format!("virtio-rng-device,bus={}", transport(1)));
    // A restored guest would announce itself to its network, which costs it a quarter of all that it
    // does until it answers; the slot on the other side knows its addresses.
    let bus = transport(2);
    let mut card = format!("virtio-net-device,bus={bus},mac={GUEST_MAC},guest_announce=off");
    if let Some(tap) = &fds.tap {
        push(
            "-netdev",
            format!("tap,id=net,fd={},vhost=off", tap.as_raw_fd()),
        );
        card.push_str(",netdev=net");
    }
    push("-device", card);
    for (index, disk) in fds.disks.iter().enumerate() {
        let set = FIRST_DISK_SET + index;
        push("-add-fd", format!("fd={},set={set}", disk.fd.as_raw_fd()));
        push("-blockdev", blockdev(index, set, disk));
        let bus = transport(LAST_TRANSPORT - index);
        push(
            "-device",
            format!("virtio-blk-device,bus={bus},drive=disk{index}"),
        );
    }
}

fn blockdev(index: usize, set: usize, disk: &OpenDisk) -> String {
    let on = |flag: bool| if flag { "on" } else { "off" };
    // Flushes are ignored: a sandbox's disk does not outlive a crash of the host, and a freeze
    // must not wait for one. Locks are not taken: the catalog says who owns an image.
    let mut option = format!(
        "driver=file,node-name=disk{index},filename=/dev/fdset/{set},locking=off,aio=threads,\
         read-only={},cache.direct={},cache.no-flush=on",
        on(disk.read_only),
        on(disk.direct)
    );
    if !disk.read_only {
        // What the guest trims is given back to the host.
        option.push_str(",discard=unmap");
    }
    option
}

fn kernel_command_line(cmdline: &str, accelerator: Accelerator, tsc_khz: u64) -> String {
    let mut line = cmdline.trim().to_owned();
    if !line
        .split_ascii_whitespace()
        .any(|word| word.starts_with("console="))
    {
        line.push_str(" console=ttyS0");
    }
    // A kernel that panics ends its VM, which is how anybody notices.
    line.push_str(" reboot=t panic=-1");
    if accelerator == Accelerator::Tcg {
        // Without an interval timer the kernel has nothing to calibrate its clock against. On a busy
        // host its watchdog would compare the counter with timer ticks that came late, find the
        // counter unstable and fall back to a clock of 4 ms; the counter is the host's and reliable.
        let _ = write!(line, " tsc_early_khz={tsc_khz} tsc=reliable");
    }
    line.trim_start().to_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::{qemu::features::Version, spec::Boot};

    fn features(major: u16, minor: u16) -> Features {
        Features {
            binary: PathBuf::from("/usr/bin/qemu-system-x86_64"),
            version: Version {
                major,
                minor,
                micro: 0,
            },
            data_dirs: vec![],
        }
    }

    fn null() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    fn restore(disks: usize) -> (VmSpec, Descriptors) {
        let boot = Boot::Restore {
            memory: PathBuf::new(),
            device_state: PathBuf::new(),
        };
        let id = cubicle_ids::SandboxId::generate();
        let spec = VmSpec::new(id, PathBuf::from("/run/x"), 200_000, 2, 512, boot);
        let disk = |_| OpenDisk {
            fd: null(),
            read_only: false,
            direct: true,
            len: 0,
        };
        let fds = Descriptors {
            memory: MemorySource::Image(null()),
            boot: OpenBoot::Restore {
                device_state: null(),
            },
            disks: (0..disks).map(disk).collect(),
            tap: None,
            monitor: null(),
            channel: null(),
            console: None,
            kvm: None,
        };
        (spec, fds)
    }

    fn value<'a>(args: &'a [String], option: &str) -> Vec<&'a str> {
        let values = args.windows(2).filter(|pair| pair[0] == option);
        values.map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn an_old_qemu_gets_what_it_knows() {
        let (spec, fds) = restore(0);
        let old = arguments(&spec, Accelerator::Tcg, &features(7, 2), &fds, 1);
        assert!(!value(&old, "-object")[0].contains("readonly"));
        assert!(value(&old, "-incoming")[0].starts_with("fd:"));
        let new = arguments(&spec, Accelerator::Tcg, &features(10, 0), &fds, 1);
        assert!(value(&new, "-object")[0].ends_with("readonly=on,rom=off"));
        assert_eq!(value(&new, "-incoming"), ["file:/dev/fdset/1"]);
    }

    #[test]
    fn devices_have_fixed_places_and_every_descriptor_is_inherited() {
        let (mut spec, mut fds) = restore(VmSpec::MAX_DISKS);
        fds.tap = Some(null());
        fds.console = Some(null());
        fds.kvm = Some(null());
        spec.start = false;
        let args = arguments(&spec, Accelerator::Kvm, &features(10, 0), &fds, 1);
        assert_eq!(value(&args, "-accel"), ["kvm,device=/dev/fdset/2"]);
        let devices = value(&args, "-device");
        assert!(
            devices
                .last()
                .unwrap()
                .contains("virtio-mmio-bus.3,drive=disk4")
        );
        assert_eq!(
            devices
                .iter()
                .filter(|device| device.contains("bus="))
                .count(),
            8
        );
        assert!(args.contains(&"-S".to_owned()));
        for fd in fds.inherited() {
            let number = fd.as_raw_fd().to_string();
            let mentioned =
                |arg: &String| arg.split([',', '=', '/', ':']).any(|word| word == number);
            assert!(
                args.iter().any(mentioned),
                "descriptor {number} is in no argument"
            );
        }
        assert_eq!(fds.inherited().len(), 4 + 5 + 3);
    }

    #[test]
    fn the_kernel_is_told_its_console_and_clock() {
        let line = kernel_command_line("quiet root=/dev/vda", Accelerator::Tcg, 2_600_000);
        let wanted = "quiet root=/dev/vda console=ttyS0 reboot=t panic=-1 tsc_early_khz=2600000 \
                      tsc=reliable";
        assert_eq!(line, wanted);
        let line = kernel_command_line("console=hvc0", Accelerator::Kvm, 1);
        assert_eq!(line, "console=hvc0 reboot=t panic=-1");
    }
}
