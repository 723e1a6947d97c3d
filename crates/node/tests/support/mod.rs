//! Nodes to test: a directory, a store, a pool of slots, a hypervisor, and proof at the end that
//! nothing of them is left.

#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(unreachable_pub, reason = "this is a module of each test program")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a broken world ends the test"
)]

pub mod world;

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use cubicle_cow::{
    BackingConfig, Store, StoreRoot,
    backing::{self, Closed},
};
use cubicle_ids::SandboxId;
use cubicle_image::{GuestBinary, KernelSource, Progress, Recipe, build_rootfs, prepare_kernel};
use cubicle_net::{PoolConfig, SlotPool};
use cubicle_node::{AdoptionReport, Node, NodeConfig, TemplateImage, full_body};
use cubicle_vmm::{Hypervisor, VM_UID_BASE};
use http_body_util::BodyExt as _;
use tempfile::TempDir;
use tokio::sync::OnceCell;

/// Pools of tests that run at the same time need names and networks of their own.
static POOLS: AtomicU8 = AtomicU8::new(0);

/// Everything under one node that outlives it, as a machine does.
pub struct Machine {
    dir: Option<TempDir>,
    pub network: bool,
    /// Most slots that there may be.
    pub slots: usize,
    pool: u8,
}

impl Machine {
    /// With a network for its sandboxes, or without.
    pub fn new(network: bool) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("cubicle-node-")
            .tempdir_in("/tmp")
            .unwrap();
        Self {
            dir: Some(dir),
            network,
            slots: 64,
            pool: POOLS.fetch_add(1, Ordering::Relaxed),
        }
    }

    pub fn path(&self) -> &Path {
        self.dir.as_ref().unwrap().path()
    }

    pub fn config(&self) -> NodeConfig {
        let mut config =
            NodeConfig::new(self.path().join("data"), self.path().join("run")).unwrap();
        config.deadlines.kill = Duration::from_secs(20);
        config
    }

    fn store_root(&self) -> StoreRoot {
        let config = BackingConfig {
            initial_size: 4 << 30,
            max_size: 4 << 30,
            headroom: 0,
            ..BackingConfig::default()
        };
        backing::prepare(&self.path().join("data"), &config).unwrap()
    }

    fn pool_config(&self) -> PoolConfig {
        // Test programs run one after another, but cargo may run those of other crates beside.
        let number = std::process::id() % 1000;
        PoolConfig {
            name: format!("n{number}{}", char::from(b'a' + self.pool % 26))
                .parse()
                .unwrap(),
            run_dir: self.path().join("run"),
            size_min: self.slots.min(4),
            size_max: self.slots,
            subnet: format!("10.{}.{}.0/24", 100 + number % 100, self.pool)
                .parse()
                .unwrap(),
            ..PoolConfig::default()
        }
    }

    /// Opens the node, as at the start of the server.
    pub async fn open(&self, hypervisor: Arc<dyn Hypervisor>) -> (Node, AdoptionReport) {
        self.open_with(hypervisor, self.config()).await
    }

    pub async fn open_with(
        &self,
        hypervisor: Arc<dyn Hypervisor>,
        config: NodeConfig,
    ) -> (Node, AdoptionReport) {
        let (store, _) = Store::open(&self.store_root()).await.unwrap();
        let pool = if self.network {
            Some(SlotPool::open(self.pool_config()).await.unwrap().0)
        } else {
            None
        };
        Node::open(config, hypervisor, store, pool).await.unwrap()
    }

    /// Ends what a test that failed has left running, which would outlive it as it should outlive a
    /// server.
    fn clear(&self) {
        for pid in vm_processes(self) {
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
        }
        let Ok(namespaces) = std::fs::read_dir(self.path().join("run/netns")) else {
            return;
        };
        for namespace in namespaces.flatten() {
            let detach = rustix::mount::UnmountFlags::DETACH;
            rustix::mount::unmount(namespace.path(), detach).ok();
        }
        let table = self.pool_config().name;
        Command::new("nft")
            .args(["delete", "table", "inet", table.as_str()])
            .status()
            .ok();
    }

    /// What there is on the machine that belongs to sandboxes.
    pub fn remains(&self) -> Vec<String> {
        let mut found = Vec::new();
        for dir in [
            "data/store/volumes",
            "data/store/tmp",
            "run/vms",
            "run/netns",
        ] {
            let Ok(entries) = std::fs::read_dir(self.path().join(dir)) else {
                continue;
            };
            found.extend(entries.map(|entry| entry.unwrap().path().display().to_string()));
        }
        found
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.clear();
        }
        let path = self.path().to_owned();
        let deadline = Instant::now() + Duration::from_secs(10);
        // The store's last task may hold a file for a moment longer.
        while self.store_root().close().unwrap() == Closed::InUse {
            if Instant::now() > deadline {
                if !std::thread::panicking() {
                    panic!("something of the store in {} is still open", path.display());
                }
                let dir = self.dir.take().map(TempDir::keep);
                eprintln!("left behind: {dir:?}");
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Asserts, after the node has shut down, that nothing but snapshots is left of it.
pub fn assert_clean(machine: &Machine) {
    assert_eq!(machine.remains(), Vec::<String>::new());
    assert_eq!(vm_processes(machine), Vec::<i32>::new());
}

/// VM processes whose sockets lie in the machine's directory.
pub fn vm_processes(machine: &Machine) -> Vec<i32> {
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let run_dir = machine.path().join("run/vms").display().to_string();
    let inodes: Vec<String> = sockets
        .lines()
        .filter(|line| line.contains(&run_dir))
        .filter_map(|line| Some(format!("socket:[{}]", line.split_whitespace().nth(6)?)))
        .collect();
    let mut pids = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap() {
        let entry = entry.unwrap();
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        let status = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let uid = status.lines().find_map(|line| {
            line.strip_prefix("Uid:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        });
        if uid.is_none_or(|uid: u32| uid < VM_UID_BASE) {
            continue;
        }
        let Ok(fds) = std::fs::read_dir(entry.path().join("fd")) else {
            continue;
        };
        let holds_one = fds.flatten().any(|fd| {
            std::fs::read_link(fd.path())
                .is_ok_and(|file| inodes.contains(&file.display().to_string()))
        });
        if holds_one {
            pids.push(pid);
        }
    }
    pids
}

/// What real guests boot from: the distribution's kernel, the guest daemon and the `base` image,
/// made once and kept in a cache that the tests of the image crate share.
pub async fn image() -> TemplateImage {
    static IMAGE: OnceCell<TemplateImage> = OnceCell::const_new();
    IMAGE.get_or_init(make_image).await.clone()
}

async fn make_image() -> TemplateImage {
    let cache = std::env::var_os("CUBICLE_TEST_CACHE").map_or_else(
        || Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("cubicle-test-images"),
        PathBuf::from,
    );
    std::fs::create_dir_all(&cache).unwrap();
    let guest = GuestBinary::load(&guest_daemon()).unwrap();
    let progress = Progress::silent();
    let kernel = prepare_kernel(&cache, &KernelSource::default(), &guest, &progress)
        .await
        .unwrap();
    let rootfs = build_rootfs(&Recipe::base(), &cache, &progress)
        .await
        .unwrap();
    TemplateImage {
        kernel: kernel.vmlinux,
        initramfs: kernel.initramfs,
        kernel_fingerprint: kernel.fingerprint.to_string(),
        rootfs: rootfs.image,
        rootfs_fingerprint: rootfs.fingerprint.to_string(),
    }
}

/// The guest daemon as `make guest` builds it.
fn guest_daemon() -> PathBuf {
    if let Some(path) = std::env::var_os(GuestBinary::ENV) {
        return path.into();
    }
    const TRIPLE: &str = "x86_64-unknown-linux-gnu";
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("..");
    let built = Command::new(env!("CARGO"))
        .current_dir(&workspace)
        .args(["build", "--quiet", "--profile", "guest", "--target", TRIPLE])
        .args(["--package", "cubicle-guest", "--bin", "cubicle-guest"])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_TARGET_DIR", &target)
        .status()
        .unwrap();
    assert!(built.success(), "the guest daemon does not build");
    target.join(TRIPLE).join("guest/cubicle-guest")
}

/// Runs a program in a sandbox to its end and returns what it printed. Panics if it fails.
pub async fn run(node: &Node, id: &SandboxId, program: &[&str]) -> String {
    let (code, output) = try_run(node, id, program).await;
    assert_eq!(code, 0, "{program:?} printed {output}");
    output
}

/// Runs a program in a sandbox as `user`; its exit code and all that it printed.
pub async fn try_run(node: &Node, id: &SandboxId, program: &[&str]) -> (i64, String) {
    let message = serde_json::json!({
        "process": { "cmd": program[0], "args": program[1..] },
        "stdin": false,
    });
    let message = message.to_string();
    let mut framed = vec![0];
    framed.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    framed.extend_from_slice(message.as_bytes());
    let request = http::Request::post("/process.Process/Start")
        .header("content-type", "application/connect+json")
        .header("connect-protocol-version", "1")
        .header(
            "authorization",
            format!("Basic {}", BASE64_STANDARD.encode("user:")),
        )
        .body(full_body(framed))
        .unwrap();
    let response = node.request(id, request).await.unwrap();
    assert_eq!(response.status(), 200);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let (mut rest, mut output, mut code) = (&body[..], Vec::new(), None);
    while let Some((head, tail)) = rest.split_first_chunk::<5>() {
        let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let message: serde_json::Value = serde_json::from_slice(&tail[..len]).unwrap();
        rest = &tail[len..];
        for stream in ["stdout", "stderr"] {
            if let Some(data) = message.pointer(&format!("/event/data/{stream}")) {
                output.extend(BASE64_STANDARD.decode(data.as_str().unwrap()).unwrap());
            }
        }
        if let Some(end) = message.pointer("/event/end") {
            code = Some(
                end.get("exitCode")
                    .and_then(serde_json::Value::as_i64)
                    .unwrap_or(0),
            );
        }
        assert!(message.get("error").is_none(), "{message}");
    }
    (
        code.expect("the end of the program is told"),
        String::from_utf8(output).unwrap(),
    )
}
