//! VMs in memory, for tests: a hypervisor whose guests live in this process, answer the real
//! channel protocol, and misbehave on request.

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use cubicle_cow::{
    BackingConfig, Store, StoreRoot,
    backing::{self, Closed},
};
use cubicle_ids::{SandboxId, SnapshotId};
use cubicle_protocol::{
    ERROR_HEADER, ERROR_PORT_CLOSED,
    channel::{Detector, Event, Hello, introduction},
    guest_api::{InitRequest, InitResponse, Introduced},
    share::Reply,
};
use cubicle_vmm::{
    Boot, ChannelStream, GuestMemory, Hypervisor, MemoryFile, MemoryRange, Vm, VmRecord, VmSpec,
    VmUsage,
};
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio_util::sync::CancellationToken;

use crate::{
    AdoptionReport, ImageSource, Node, NodeConfig, TemplateBuild, TemplateImage, WarmUp,
    link::{Body, BoxError, empty_body, full_body},
};

/// Guest memory of a test VM, in MiB.
pub(crate) const MEMORY_MIB: u32 = 8;

/// A machine: what runs on it survives the node, as processes do.
#[derive(Default)]
pub(crate) struct TestHypervisor {
    /// By pid.
    vms: Mutex<HashMap<i32, Arc<TestVm>>>,
    last_pid: AtomicI32,
    /// How new guests behave.
    pub(crate) behaviour: Arc<Behaviour>,
    /// Launches fail.
    pub(crate) refuse: AtomicBool,
    /// Kills of VMs fail this many times.
    pub(crate) immortal: Arc<AtomicU32>,
}

impl TestHypervisor {
    /// VMs that run. One whose run directory was swept counts as killed: there is no process that
    /// the sweep could find.
    pub(crate) fn alive(&self) -> usize {
        let vms = self.vms.lock().unwrap();
        vms.values()
            .filter(|vm| !vm.exited.is_cancelled() && vm.run_dir.exists())
            .count()
    }

    /// What the guest was told last that is `id` now.
    pub(crate) fn told(&self, id: &SandboxId) -> InitRequest {
        let vms = self.vms.lock().unwrap();
        let mut told = vms.values().filter_map(|vm| vm.told());
        told.find(|told| told.sandbox_id.as_ref() == Some(id))
            .unwrap()
    }

    /// Every guest powers off but the one that is `id` now.
    pub(crate) fn power_off_all_but(&self, id: &SandboxId) {
        for vm in self.vms.lock().unwrap().values() {
            if vm.told().and_then(|told| told.sandbox_id).as_ref() != Some(id) {
                vm.power_off();
            }
        }
    }

    pub(crate) fn vm(&self, id: &SandboxId) -> Arc<TestVm> {
        self.find(id).unwrap()
    }

    pub(crate) fn find(&self, id: &SandboxId) -> Option<Arc<TestVm>> {
        let vms = self.vms.lock().unwrap();
        vms.values()
            .find(|vm| vm.id == *id && !vm.exited.is_cancelled())
            .cloned()
    }
}

#[async_trait::async_trait]
impl Hypervisor for TestHypervisor {
    fn name(&self) -> &'static str {
        "test"
    }

    fn machine(&self) -> String {
        "test-1".to_owned()
    }

    async fn launch(&self, spec: VmSpec) -> cubicle_vmm::Result<Arc<dyn Vm>> {
        if self.refuse.load(SeqCst) {
            return Err(cubicle_vmm::Error::Gone { id: spec.id });
        }
        tokio::task::yield_now().await;
        std::fs::create_dir(&spec.run_dir).unwrap();
        let nonce = match &spec.boot {
            Boot::Cold { .. } => None,
            Boot::Restore {
                memory,
                device_state,
            } => {
                assert_eq!(
                    memory.metadata().unwrap().len(),
                    u64::from(spec.memory_mib) << 20
                );
                Some(std::fs::read_to_string(device_state).unwrap())
            }
        };
        for disk in &spec.disks {
            assert!(disk.path.is_file(), "{disk:?}");
        }
        let pid = self.last_pid.fetch_add(1, SeqCst) + 1;
        let vm = Arc::new(TestVm {
            run_dir: spec.run_dir,
            pid,
            memory: spec.memory_mib,
            immortal: self.immortal.clone(),
            ..TestVm::with(spec.id, self.behaviour.clone())
        });
        *vm.guest.nonce.lock().unwrap() = nonce;
        self.vms.lock().unwrap().insert(pid, vm.clone());
        Ok(vm)
    }

    async fn adopt(&self, record: &VmRecord) -> cubicle_vmm::Result<Option<Arc<dyn Vm>>> {
        let found = self.vms.lock().unwrap().get(&record.pid).cloned();
        let alive = found.filter(|vm| !vm.exited.is_cancelled());
        if alive.is_none() {
            std::fs::remove_dir_all(&record.run_dir).ok();
        }
        Ok(alive.map(|vm| vm as Arc<dyn Vm>))
    }
}

/// A VM of which only the guest daemon is there.
pub(crate) struct TestVm {
    pub(crate) id: SandboxId,
    pub(crate) guest: Arc<Guest>,
    pub(crate) exited: CancellationToken,
    /// Ends the connection that is being served, as a daemon that dies does.
    sever: Mutex<CancellationToken>,
    pub(crate) connections: AtomicU32,
    stopped: AtomicBool,
    run_dir: std::path::PathBuf,
    pid: i32,
    memory: u32,
    immortal: Arc<AtomicU32>,
    /// Allocated when it is asked for, in this process.
    pages: std::sync::OnceLock<Vec<u8>>,
}

impl TestVm {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self::with(SandboxId::generate(), Arc::default()))
    }

    fn with(id: SandboxId, behaviour: Arc<Behaviour>) -> Self {
        Self {
            id,
            guest: Arc::new(Guest {
                behaviour,
                ..Guest::default()
            }),
            exited: CancellationToken::new(),
            sever: Mutex::default(),
            connections: AtomicU32::new(0),
            stopped: AtomicBool::new(false),
            run_dir: std::path::PathBuf::new(),
            pid: 0,
            memory: 0,
            immortal: Arc::default(),
            pages: std::sync::OnceLock::new(),
        }
    }

    fn told(&self) -> Option<InitRequest> {
        self.guest.inits.lock().unwrap().last().cloned()
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(SeqCst)
    }

    pub(crate) fn sever(&self) {
        self.sever.lock().unwrap().cancel();
    }

    /// The guest powers off.
    pub(crate) fn power_off(&self) {
        self.exited.cancel();
        self.sever();
    }
}

#[async_trait::async_trait]
impl Vm for TestVm {
    fn record(&self) -> VmRecord {
        VmRecord {
            id: self.id.clone(),
            driver: "test".to_owned(),
            pid: self.pid,
            start_time: 0,
            boot_id: String::new(),
            run_dir: self.run_dir.clone(),
            cgroups: Vec::new(),
            uid: 0,
            memory: MemoryFile {
                inode: 0,
                len: u64::from(self.memory) << 20,
            },
        }
    }

    async fn connect_channel(&self) -> cubicle_vmm::Result<ChannelStream> {
        if self.exited.is_cancelled() {
            return Err(cubicle_vmm::Error::Gone {
                id: self.id.clone(),
            });
        }
        self.connections.fetch_add(1, SeqCst);
        let (host, guest) = duplex(1 << 16);
        let severed = CancellationToken::new();
        // One connection at a time, as with QEMU.
        std::mem::replace(&mut *self.sever.lock().unwrap(), severed.clone()).cancel();
        let daemon = self.guest.clone();
        tokio::spawn(async move { severed.run_until_cancelled(daemon.serve(guest)).await });
        Ok(Box::pin(host))
    }

    async fn pause(&self) -> cubicle_vmm::Result<()> {
        self.stopped.store(true, SeqCst);
        Ok(())
    }

    async fn resume(&self) -> cubicle_vmm::Result<()> {
        self.stopped.store(false, SeqCst);
        Ok(())
    }

    async fn save_device_state(&self, to: &Path) -> cubicle_vmm::Result<u64> {
        let nonce = self.guest.nonce.lock().unwrap().clone().unwrap_or_default();
        std::fs::write(to, &nonce).unwrap();
        Ok(nonce.len() as u64)
    }

    fn memory(&self) -> cubicle_vmm::Result<GuestMemory> {
        const PAGE: usize = 4096;
        let len = (self.memory as usize) << 20;
        let pages = self.pages.get_or_init(|| {
            let mut pages = vec![0; len + PAGE];
            pages[len / 2..len / 2 + (1 << 20)].fill(7);
            pages
        });
        let address = pages.as_ptr().addr().next_multiple_of(PAGE);
        let range = MemoryRange {
            host_address: address as u64,
            offset: 0,
            len: len as u64,
        };
        let pid = i32::try_from(std::process::id()).unwrap();
        Ok(GuestMemory {
            pid,
            ranges: vec![range],
        })
    }

    fn cpu_time_us(&self) -> cubicle_vmm::Result<u64> {
        Ok(1)
    }

    async fn usage(&self) -> cubicle_vmm::Result<VmUsage> {
        Ok(VmUsage {
            cpu_time_us: 1,
            resident_bytes: 3,
            private_bytes: 2,
        })
    }

    async fn kill(&self) -> cubicle_vmm::Result<()> {
        tokio::task::yield_now().await;
        if take_one(&self.immortal) {
            let attempt = "die from SIGKILL";
            let (id, after) = (self.id.clone(), Duration::ZERO);
            return Err(cubicle_vmm::Error::Timeout { id, attempt, after });
        }
        self.power_off();
        std::fs::remove_dir_all(&self.run_dir).ok();
        Ok(())
    }

    async fn exited(&self) {
        self.exited.cancelled().await;
    }
}

/// How the guest behaves.
#[derive(Default)]
pub(crate) struct Behaviour {
    /// This many hellos get no reply.
    pub(crate) deaf_to: AtomicU32,
    /// Connections end after the reply instead of serving.
    pub(crate) hang_up: AtomicU32,
    /// What arrives is swallowed: a daemon that knows nothing of this life.
    pub(crate) oblivious: AtomicBool,
    /// The guest does not want to be who it is told to be.
    pub(crate) refuse_init: AtomicBool,
    /// So many of the next are.
    pub(crate) refuse_inits: AtomicU32,
}

/// The guest daemon.
#[derive(Default)]
pub(crate) struct Guest {
    pub(crate) behaviour: Arc<Behaviour>,
    pub(crate) inits: Mutex<Vec<InitRequest>>,
    pub(crate) nonce: Mutex<Option<String>>,
    /// `/sync` gets no answer.
    pub(crate) silent_sync: AtomicBool,
    /// What the host said of the shares' roots.
    pub(crate) answered: Arc<Mutex<Vec<(String, Reply)>>>,
}

/// Lowers a counter that is not zero; whether it was not.
fn take_one(counter: &AtomicU32) -> bool {
    counter
        .fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1))
        .is_ok()
}

impl Guest {
    /// What the daemon does with one connection of the port.
    async fn serve(self: Arc<Self>, io: DuplexStream) {
        let (mut from_host, mut to_host) = tokio::io::split(io);
        let (daemon, ours) = duplex(1 << 16);
        let (mut from_daemon, mut to_daemon) = tokio::io::split(ours);
        let mut detector = Detector::new();
        let mut buffer = vec![0; 1 << 16];
        // Up to the hello; what comes behind it in the same read is payload.
        let mut early = Vec::new();
        'hello: loop {
            let Ok(n @ 1..) = from_host.read(&mut buffer).await else {
                return;
            };
            let mut input = &buffer[..n];
            while let Some(event) = detector.next(&mut input) {
                let Event::Hello(hello) = event else { continue };
                if take_one(&self.behaviour.deaf_to) {
                    continue;
                }
                to_host
                    .write_all(b"left over from an older life")
                    .await
                    .unwrap();
                to_host
                    .write_all(&Hello::new(hello.nonce).to_reply_bytes())
                    .await
                    .unwrap();
                while let Some(Event::Data(data)) = detector.next(&mut input) {
                    early.extend_from_slice(data);
                }
                break 'hello;
            }
        }
        if take_one(&self.behaviour.hang_up) {
            return;
        }
        let pump_in = async {
            to_daemon.write_all(&early).await?;
            loop {
                let n = from_host.read(&mut buffer).await?;
                if n == 0 {
                    return Ok::<_, std::io::Error>(());
                }
                if self.behaviour.oblivious.load(SeqCst) {
                    continue;
                }
                let mut input = &buffer[..n];
                while let Some(Event::Data(data)) = detector.next(&mut input) {
                    to_daemon.write_all(data).await?;
                }
            }
        };
        let pump_out = tokio::io::copy(&mut from_daemon, &mut to_host);
        let serve = async {
            let mut daemon = daemon;
            let Ok(request) = introduction::hear(&mut daemon).await else {
                return;
            };
            let answer = self.introduce(request);
            if introduction::say(&mut daemon, &answer).await.is_ok() {
                self.clone().requests(daemon).await;
            }
        };
        tokio::select! { _ = pump_in => {}, _ = pump_out => {}, () = serve => {} }
    }

    fn introduce(&self, init: InitRequest) -> Introduced {
        if self.behaviour.refuse_init.load(SeqCst) || take_one(&self.behaviour.refuse_inits) {
            return Introduced::Refused("the random number generator is gone".to_owned());
        }
        let mut nonce = self.nonce.lock().unwrap();
        let answer = InitResponse {
            previous_nonce: nonce.clone(),
            envd_version: "0".to_owned(),
        };
        *nonce = init.nonce.clone();
        self.inits.lock().unwrap().push(init);
        Introduced::Became(answer)
    }

    async fn requests(self: Arc<Self>, daemon: DuplexStream) {
        let service = service_fn(|request| self.clone().answer(request));
        http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .serve_connection(TokioIo::new(daemon), service)
            .await
            .ok();
    }

    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, std::convert::Infallible> {
        let mut response = Response::new(empty_body());
        match (request.method().clone(), request.uri().path()) {
            (Method::CONNECT, _) if request.uri().port_u16() == Some(7) => {
                tokio::spawn(async move {
                    let stream = hyper::upgrade::on(request).await.unwrap();
                    let (mut read, mut write) = tokio::io::split(TokioIo::new(stream));
                    tokio::io::copy(&mut read, &mut write).await.ok();
                    write.shutdown().await.ok();
                });
            }
            (Method::CONNECT, _) => {
                *response.status_mut() = StatusCode::BAD_GATEWAY;
                let closed = request.uri().port_u16() == Some(8);
                let why = if closed {
                    ERROR_PORT_CLOSED
                } else {
                    "no-descriptors"
                };
                response
                    .headers_mut()
                    .insert(ERROR_HEADER, HeaderValue::from_static(why));
            }
            (Method::POST, path) if path.starts_with("/shares/") => {
                *response.body_mut() = crate::tests::shares::ask(request, &self.answered);
            }
            (Method::GET, "/forever") => {
                let endless = futures::stream::unfold((), |()| async {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    let frame = http_body::Frame::data(Bytes::from_static(&[7; 16 << 10]));
                    Some((Ok::<_, BoxError>(frame), ()))
                });
                *response.body_mut() = http_body_util::StreamBody::new(endless).boxed_unsync();
            }
            (Method::GET, "/health") => *response.status_mut() = StatusCode::NO_CONTENT,
            (Method::GET, "/metrics") => {
                *response.body_mut() = full_body(r#"{"cpu_count":2,"mem_total":100}"#);
            }
            (Method::POST, "/process.Process/Start") => {
                let mut stream = Vec::new();
                let end = r#"{"event":{"end":{"exited":true,"status":"exit status 0"}}}"#;
                for (flags, message) in [(0, end), (2, "{}")] {
                    stream.push(flags);
                    stream.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
                    stream.extend_from_slice(message.as_bytes());
                }
                *response.body_mut() = full_body(stream);
            }
            (Method::POST, "/sync") if self.silent_sync.load(SeqCst) => {
                std::future::pending().await
            }
            (Method::POST, "/sync") => *response.status_mut() = StatusCode::NO_CONTENT,
            (Method::GET, "/never") => std::future::pending().await,
            _ => {
                let authority = request.uri().authority().unwrap().to_string();
                let host = request.headers().contains_key(header::HOST);
                let path = request.uri().path_and_query().unwrap().to_string();
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let text = format!("{authority} {host} {path} {}", body.len());
                *response.body_mut() = full_body(text);
            }
        }
        Ok(response)
    }
}

/// The directories of a node, and a store in them. They survive the node.
pub(crate) struct Machine {
    dir: tempfile::TempDir,
    pub(crate) hypervisor: Arc<TestHypervisor>,
}

impl Machine {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("cubicle-node-")
            .tempdir_in("/tmp")
            .unwrap();
        Self {
            dir,
            hypervisor: Arc::default(),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn config(&self) -> NodeConfig {
        let mut config =
            NodeConfig::new(self.path().join("data"), self.path().join("run")).unwrap();
        config.deadlines.answer = Duration::from_secs(10);
        config
    }

    fn store_root(&self) -> StoreRoot {
        let size = 512 << 20;
        let config = BackingConfig {
            initial_size: size,
            max_size: size,
            headroom: 0,
            ..Default::default()
        };
        backing::prepare(&self.path().join("data"), &config).unwrap()
    }

    pub(crate) async fn open(&self) -> (Node, AdoptionReport) {
        self.open_with(self.config()).await
    }

    /// The store of a node that was dropped a moment ago: unlike a process that was killed, it may leave
    /// a thread that still flushes a file, and holds the lock until it has.
    async fn reopened_store(&self) -> Store {
        let patience = Instant::now() + Duration::from_secs(10);
        loop {
            match Store::open(&self.store_root()).await {
                Ok((store, _)) => return store,
                Err(cubicle_cow::Error::Locked { .. }) if Instant::now() < patience => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub(crate) async fn open_with(&self, config: NodeConfig) -> (Node, AdoptionReport) {
        let store = self.reopened_store().await;
        Node::open(config, self.hypervisor.clone(), store, None)
            .await
            .unwrap()
    }

    /// A template of a guest without memories.
    pub(crate) fn template(&self) -> TemplateBuild {
        let file = |name: &str| {
            let path = self.path().join(name);
            std::fs::write(&path, vec![1; 1 << 20]).unwrap();
            path
        };
        TemplateBuild {
            snapshot: SnapshotId::generate(),
            template: None,
            source: ImageSource::Ready(TemplateImage {
                kernel: file("vmlinux"),
                initramfs: file("initramfs"),
                kernel_fingerprint: "k".to_owned(),
                rootfs: file("rootfs"),
                rootfs_fingerprint: "r".to_owned(),
            }),
            cpus: 1,
            memory_mib: MEMORY_MIB,
            warm_up: WarmUp::usual("user"),
            settle: Duration::ZERO,
        }
    }

    /// What there is on the machine that belongs to sandboxes.
    pub(crate) fn remains(&self) -> Vec<String> {
        let mut found = vec![format!("{} VMs", self.hypervisor.alive())];
        found.retain(|vms| vms != "0 VMs");
        for dir in ["data/store/volumes", "data/store/tmp", "run/vms"] {
            let entries = std::fs::read_dir(self.path().join(dir)).unwrap();
            found.extend(entries.map(|entry| entry.unwrap().path().display().to_string()));
        }
        found
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        // The store's last task may hold a file for a moment longer.
        while self.store_root().close().unwrap() == Closed::InUse {
            if std::time::Instant::now() > deadline {
                assert!(
                    std::thread::panicking(),
                    "something of the store is still open"
                );
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
