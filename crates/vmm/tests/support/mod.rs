//! What the tests with real VMs share: a kernel, a small guest, a snapshot to restore from.

use std::{
    fs,
    io::Write as _,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{FileExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use cubicle_ids::SandboxId;
use cubicle_vmm::{
    Boot, ChannelStream, Hypervisor as _, Vm, VmSpec,
    qemu::{Qemu, QemuConfig},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    sync::OnceCell,
};

/// A kernel and an initial file system whose process 1 is `guest.rs`.
pub(crate) struct Guest {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
}

/// Modules that the guest loads, in order.
const MODULES: [&str; 6] = [
    "drivers/virtio/virtio_mmio",
    "drivers/block/virtio_blk",
    "drivers/char/hw_random/virtio-rng",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
];

pub(crate) const MEMORY_MIB: u32 = 256;

fn run(command: &mut Command) -> Vec<u8> {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// A directory that outlives test runs, so that the kernel is fetched once.
fn cache() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vmm-guest");
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// Fetches the distribution's newest cloud kernel and packs the guest, or finds both done.
pub(crate) fn guest() -> Guest {
    let cache = cache();
    let lock = fs::File::create(cache.join("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let kernel = cache.join("vmlinux");
    if !kernel.exists() {
        fetch_kernel(&cache, &kernel);
    }
    let initramfs = cache.join("initramfs.cpio");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/guest.rs");
    let newer = |path: &Path| {
        fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            .ok()
    };
    if newer(&initramfs) < newer(&source) {
        pack_guest(&cache, &source, &initramfs);
    }
    Guest { kernel, initramfs }
}

fn fetch_kernel(cache: &Path, kernel: &Path) {
    let pattern = r"^linux-image-6\.[0-9.]+.*-cloud-amd64$";
    let found = run(Command::new("apt-cache").args(["search", "--names-only", pattern]));
    let found = String::from_utf8(found).unwrap();
    let names = found.lines().filter_map(|line| line.split(' ').next());
    let package = names
        .max_by_key(|name| version_key(name))
        .expect("a cloud kernel package");
    run(Command::new("apt-get")
        .args(["download", package])
        .current_dir(cache));
    let deb = fs::read_dir(cache)
        .unwrap()
        .flatten()
        .map(|entry| entry.path());
    let deb = deb
        .filter(|path| path.extension().is_some_and(|ext| ext == "deb"))
        .max()
        .unwrap();
    run(Command::new("dpkg-deb")
        .arg("-x")
        .args([&deb, &cache.join("root")]));
    fs::remove_file(deb).unwrap();
    let boot = fs::read_dir(cache.join("root/boot"))
        .unwrap()
        .flatten()
        .map(|entry| entry.path());
    let image = boot
        .filter(|path| path.to_string_lossy().contains("vmlinuz"))
        .max()
        .unwrap();
    extract_kernel(&fs::read(image).unwrap(), kernel);
}

fn version_key(name: &str) -> Vec<u32> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

/// Takes the compressed ELF out of a bzImage: the boot protocol's header tells the number of
/// setup sectors (0x1f1), the payload's offset (0x248) and its length (0x24c).
fn extract_kernel(image: &[u8], to: &Path) {
    let word = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize;
    let start = (usize::from(image[0x1f1]) + 1) * 512 + word(0x248);
    let payload = &image[start..start + word(0x24c)];
    let program = if payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        "zstd"
    } else {
        "xz"
    };
    // The length of the unpacked kernel is appended to the payload.
    let packed = to.with_extension("packed");
    fs::write(&packed, &payload[..payload.len() - 4]).unwrap();
    let kernel = run(Command::new(program)
        .arg("-dc")
        .stdin(fs::File::open(&packed).unwrap()));
    assert!(kernel.starts_with(b"\x7fELF"));
    let partial = to.with_extension("partial");
    fs::write(&partial, kernel).unwrap();
    fs::rename(partial, to).unwrap();
}

fn pack_guest(cache: &Path, source: &Path, initramfs: &Path) {
    let program = cache.join("guest");
    run(Command::new("rustc")
        .args([
            "--edition=2024",
            "-O",
            "-Ctarget-feature=+crt-static",
            "-Cpanic=abort",
        ])
        .args(["-Cstrip=symbols", "--target=x86_64-unknown-linux-gnu", "-o"])
        .args([&program, source]));
    let mut archive = Vec::new();
    let mut add = |name: &str, mode: u32, data: &[u8], device: (u32, u32)| {
        let fields = [
            0,
            mode,
            0,
            0,
            1,
            0,
            data.len() as u32,
            0,
            0,
            device.0,
            device.1,
        ];
        write!(archive, "070701").unwrap();
        for field in fields.into_iter().chain([name.len() as u32 + 1, 0]) {
            write!(archive, "{field:08x}").unwrap();
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    };
    add("dev", 0o40755, b"", (0, 0));
    add("dev/console", 0o20600, b"", (5, 1));
    add("init", 0o100_755, &fs::read(program).unwrap(), (0, 0));
    add("modules", 0o40755, b"", (0, 0));
    let mut order = String::new();
    let modules = fs::read_dir(cache.join("root/lib/modules"))
        .unwrap()
        .flatten()
        .next()
        .unwrap();
    for module in MODULES {
        let packed = modules.path().join(format!("kernel/{module}.ko.xz"));
        let name = format!("{}.ko", module.rsplit('/').next().unwrap());
        let data = run(Command::new("xz").arg("-dc").arg(packed));
        add(&format!("modules/{name}"), 0o100_644, &data, (0, 0));
        order.push_str(&format!("{name}\n"));
    }
    add("modules/order", 0o100_644, order.as_bytes(), (0, 0));
    add("TRAILER!!!", 0, b"", (0, 0));
    fs::write(initramfs, archive).unwrap();
}

/// The driver, opened afresh: handles belong to the runtime of the test that made them. The
/// environment variable `CUBICLE_TEST_QEMU` names another QEMU than the installed one.
pub(crate) async fn driver() -> Qemu {
    assert!(
        rustix::process::geteuid().is_root(),
        "tests with real VMs need root"
    );
    let mut config = QemuConfig::default();
    if let Some(binary) = std::env::var_os("CUBICLE_TEST_QEMU") {
        config.binary = binary.into();
    }
    Qemu::open(config).await.unwrap()
}

/// A temporary directory for one test's VMs. VMs that a failed test leaves behind end with it.
pub(crate) struct Dir {
    dir: tempfile::TempDir,
    launched: Mutex<Vec<(SandboxId, u32)>>,
}

impl Dir {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            launched: Mutex::default(),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A VM with a user that no other VM of the test run has.
    pub(crate) fn spec(&self, boot: Boot) -> VmSpec {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let run = std::process::id() % 10_000 * 64;
        let uid = cubicle_vmm::VM_UID_BASE + 50_000 + run + NEXT.fetch_add(1, Ordering::Relaxed);
        let id = SandboxId::generate();
        self.launched.lock().unwrap().push((id.clone(), uid));
        VmSpec::new(
            id.clone(),
            self.path().join(id.as_str()),
            uid,
            1,
            MEMORY_MIB,
            boot,
        )
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let launched = self.launched.lock().unwrap();
        for (id, uid) in launched.iter() {
            for pid in processes_of(*uid) {
                // SAFETY: sending a signal touches no memory.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
            while !processes_of(*uid).is_empty() {
                std::thread::sleep(Duration::from_millis(5));
            }
            for cgroup in cgroups_of(id.as_str()) {
                let _ = fs::remove_dir(cgroup);
            }
        }
    }
}

/// Processes of a user, our own zombies included; others' are for their parents to reap.
fn processes_of(uid: u32) -> Vec<i32> {
    let own = format!("PPid:\t{}\n", std::process::id());
    let owner = |pid: &i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        if status.contains("State:\tZ") && !status.contains(&own) {
            return None;
        }
        let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        uids.split_ascii_whitespace().next()?.parse::<u32>().ok()
    };
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| owner(pid) == Some(uid)).collect()
}

fn cgroups_of(id: &str) -> Vec<PathBuf> {
    let trees = ["cpu", "memory", "pids", "systemd", "unified", ""].into_iter();
    let paths = trees.map(|tree| {
        Path::new("/sys/fs/cgroup")
            .join(tree)
            .join("cubicle")
            .join(id)
    });
    paths.filter(|path| path.exists()).collect()
}

pub(crate) fn cold() -> Boot {
    let Guest { kernel, initramfs } = guest();
    Boot::Cold {
        kernel,
        initramfs,
        cmdline: "quiet".to_owned(),
    }
}

/// A conversation with the guest, one line each way.
pub(crate) struct Conversation(BufReader<ChannelStream>);

impl Conversation {
    pub(crate) async fn with(vm: &dyn Vm) -> Self {
        Self(BufReader::new(vm.connect_channel().await.unwrap()))
    }

    pub(crate) async fn ask(&mut self, question: &str) -> String {
        self.ask_within(question, Duration::from_secs(60))
            .await
            .expect("an answer of the guest")
    }

    /// Asks, and has the answer if it comes in time.
    pub(crate) async fn ask_within(
        &mut self,
        question: &str,
        patience: Duration,
    ) -> Option<String> {
        let asked = async {
            self.0
                .write_all(format!("{question}\n").as_bytes())
                .await
                .ok()?;
            self.answer().await
        };
        tokio::time::timeout(patience, asked).await.ok().flatten()
    }

    /// The next answer.
    pub(crate) async fn answer(&mut self) -> Option<String> {
        let mut line = String::new();
        self.0
            .read_line(&mut line)
            .await
            .ok()
            .filter(|read| *read > 0)?;
        Some(line.trim_end().to_owned())
    }
}

/// A frozen guest that remembers the word `template` and holds 8 MiB of a pattern.
pub(crate) struct Snapshot {
    dir: PathBuf,
}

impl Snapshot {
    pub(crate) fn boot(&self) -> Boot {
        Boot::Restore {
            memory: self.dir.join("memory.img"),
            device_state: self.dir.join("device.state"),
        }
    }
}

/// Freezes a running VM into `dir`, which it makes.
pub(crate) async fn freeze(vm: &dyn Vm, dir: &Path) -> Snapshot {
    fs::create_dir_all(dir).unwrap();
    vm.pause().await.unwrap();
    vm.save_device_state(&dir.join("device.state"))
        .await
        .unwrap();
    let image = dir.join("memory.img");
    copy_memory(vm, &image);
    fs::set_permissions(image, fs::Permissions::from_mode(0o444)).unwrap();
    Snapshot {
        dir: dir.to_owned(),
    }
}

/// Copies guest memory from outside, leaving holes for zeroes.
fn copy_memory(vm: &dyn Vm, to: &Path) {
    const CHUNK: usize = 1 << 16;
    let memory = vm.memory().unwrap();
    let pid = rustix::process::Pid::from_raw(memory.pid).unwrap();
    let image = fs::File::create(to).unwrap();
    image.set_len(memory.len()).unwrap();
    let mut buffer = vec![0; CHUNK];
    for range in &memory.ranges {
        for at in (0..range.len).step_by(CHUNK) {
            let mut local = [std::io::IoSliceMut::new(&mut buffer)];
            let base = (range.host_address + at) as *mut std::ffi::c_void;
            let remote = libc::iovec {
                iov_base: base,
                iov_len: CHUNK,
            };
            // SAFETY: the kernel checks the other process's addresses; ours is a live buffer.
            let read = unsafe {
                let (pid, local) = (pid.as_raw_nonzero().get(), local.as_mut_ptr().cast());
                libc::process_vm_readv(pid, local, 1, &raw const remote, 1, 0)
            };
            assert_eq!(read, CHUNK as isize, "{}", std::io::Error::last_os_error());
            if buffer.iter().any(|byte| *byte != 0) {
                image.write_all_at(&buffer, range.offset + at).unwrap();
            }
        }
    }
}

/// The snapshot that tests restore from, made once per test run.
pub(crate) async fn template() -> &'static Snapshot {
    static TEMPLATE: OnceCell<Snapshot> = OnceCell::const_new();
    TEMPLATE
        .get_or_init(|| async {
            let driver = driver().await;
            let dir = Dir::new();
            let vm = driver.launch(dir.spec(cold())).await.unwrap();
            let mut guest = Conversation::with(&*vm).await;
            assert_eq!(guest.ask("set template").await, "ok");
            assert_eq!(guest.ask("fill 8").await, "ok");
            drop(guest);
            let snapshot =
                freeze(&*vm, &cache().join(format!("snapshot-{}", vm.record().id))).await;
            vm.kill().await.unwrap();
            snapshot
        })
        .await
}

/// Asserts that nothing of a VM is left on the host.
pub(crate) fn assert_gone(record: &cubicle_vmm::VmRecord) {
    assert_nothing_left(&record.run_dir, record.id.as_str(), record.uid);
    for cgroup in &record.cgroups {
        assert!(!cgroup.exists(), "{} is left", cgroup.display());
    }
}

/// As [`assert_gone`], for a launch that never told its record.
pub(crate) fn assert_nothing_left(run_dir: &Path, id: &str, uid: u32) {
    assert!(!run_dir.exists(), "{} is left", run_dir.display());
    assert_eq!(processes_of(uid), [] as [i32; 0], "processes are left");
    assert_eq!(cgroups_of(id), [] as [PathBuf; 0], "cgroups are left");
}

/// An empty network namespace with one tap device, as the network pool hands them out.
pub(crate) fn network() -> (OwnedFd, OwnedFd) {
    /// `struct ifreq` as far as `TUNSETIFF` reads it.
    #[repr(C)]
    struct Request {
        name: [u8; libc::IFNAMSIZ],
        flags: libc::c_short,
        rest: [u8; 22],
    }
    let thread = std::thread::spawn(|| {
        // SAFETY: the flag leaves the descriptor table shared.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
        let netns = fs::File::open("/proc/thread-self/ns/net").unwrap();
        let tap = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap();
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let flags = libc::c_short::try_from(flags).unwrap();
        let mut request = Request {
            name: [0; libc::IFNAMSIZ],
            flags,
            rest: [0; 22],
        };
        request.name[..4].copy_from_slice(b"tap0");
        // SAFETY: the kernel reads and writes a structure of this layout and length.
        let done = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        (netns.into(), tap.into())
    });
    thread.join().unwrap()
}
