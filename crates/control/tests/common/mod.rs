//! A control plane over a fleet without machines.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses a part of it"
)]
#![allow(clippy::expect_used, reason = "a helper of tests may panic")]

pub mod past;
pub mod sleep;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use cubicle_control::{
    Control, ControlConfig,
    fleet::{FleetError, FreezeKind, NetworkOptions, SnapshotKind, memory::MemoryFleet},
    sandbox::{
        CreateSandbox, Idempotency, LifecycleOptions, Lifetime, Reconciled, Sandbox, SandboxConfig,
    },
    snapshot::{CreateSnapshot, Snapshot},
    template::{Build, BuildSpec, BuildTemplate, Size},
};
use cubicle_ids::{SandboxId, SnapshotId};
use futures::TryStreamExt as _;

pub struct Plane {
    pub control: Control,
    pub fleet: Arc<MemoryFleet>,
    pub reconciled: Reconciled,
    config: ControlConfig,
    pub dir: tempfile::TempDir,
}

impl Plane {
    /// A fresh control plane with a template `base`.
    pub async fn new() -> Self {
        Self::with(|_| ()).await
    }

    /// The same, with other settings.
    pub async fn with(change: impl FnOnce(&mut ControlConfig)) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut config = ControlConfig {
            sandboxes: SandboxConfig {
                sample_every: Duration::from_millis(50),
                // Long: a busy machine is slow, and no test but one wants to see a kill give up.
                kill_patience: Duration::from_secs(30),
                ..SandboxConfig::default()
            },
            ..ControlConfig::new(dir.path().join("cubicle.db"))
        };
        config.templates.settle = Duration::ZERO;
        config.templates.probe_every = Duration::from_millis(5);
        change(&mut config);
        let plane = Self::open(dir, Arc::default(), config).await;
        plane.build("base").await;
        plane
    }

    pub async fn with_kill_patience(kill_patience: Duration) -> Self {
        Self::with(|config| config.sandboxes.kill_patience = kill_patience).await
    }

    async fn open(dir: tempfile::TempDir, fleet: Arc<MemoryFleet>, config: ControlConfig) -> Self {
        let (control, reconciled) = Control::open(config.clone(), fleet.clone())
            .await
            .expect("control opens");
        Self {
            control,
            fleet,
            reconciled,
            config,
            dir,
        }
    }

    /// Stops the server and starts it again over the same fleet and database; `between` happens
    /// while it is down.
    pub async fn restart(self, between: impl FnOnce(&MemoryFleet)) -> Self {
        self.control.close().await;
        drop(self.control);
        between(&self.fleet);
        Self::open(self.dir, self.fleet, self.config).await
    }

    /// What is left when the server is killed; for [`Remains::start`] in another runtime, after the
    /// one that this plane lives in has been dropped.
    pub fn remains(self) -> Remains {
        Remains {
            fleet: self.fleet,
            config: self.config,
            dir: self.dir,
        }
    }

    /// A sandbox of `base`.
    pub async fn sandbox(&self) -> Arc<Sandbox> {
        self.create(request("base")).await
    }

    pub async fn create(&self, request: CreateSandbox) -> Arc<Sandbox> {
        let created = self.control.sandboxes.create(request).await;
        created.expect("create").sandbox
    }

    /// A snapshot of a sandbox.
    pub async fn snapshot(&self, of: &SandboxId, name: Option<&str>) -> Snapshot {
        let request = CreateSnapshot {
            name: name.map(str::to_owned),
            ..CreateSnapshot::default()
        };
        let taken = self.control.snapshots.create(of, request).await;
        taken.expect("snapshot").snapshot
    }

    /// The snapshots in the store that hold paused sandboxes.
    pub fn pauses(&self) -> Vec<SnapshotId> {
        self.of_kind(FreezeKind::Pause)
    }

    pub fn of_kind(&self, kind: FreezeKind) -> Vec<SnapshotId> {
        self.fleet.snapshots_of(SnapshotKind::Frozen(kind))
    }

    /// Waits until there are no sandboxes but these.
    pub async fn silence_but(&self, these: &[&SandboxId]) {
        let sandboxes = &self.control.sandboxes;
        let others = || {
            sandboxes
                .ids_in_memory()
                .iter()
                .any(|id| !these.contains(&id))
        };
        eventually("silence", || !others()).await;
    }

    /// Waits until there is neither a sandbox nor anything of one.
    pub async fn silence(&self) {
        let sandboxes = &self.control.sandboxes;
        eventually("silence", || sandboxes.in_memory() == (0, 0)).await;
        assert!(self.fleet.alive().is_empty(), "VMs are left");
        eventually("the end of pauses", || self.pauses().is_empty()).await;
        let temporary = || self.of_kind(FreezeKind::Temporary);
        eventually("the end of forks", || temporary().is_empty()).await;
    }

    pub async fn start_build(&self, name: &str) -> Build {
        let size = Size {
            cpu_count: 2,
            memory_mib: 512,
            disk_mib: 1024,
        };
        let request = BuildTemplate {
            name: name.into(),
            tags: Vec::new(),
            size,
            spec: BuildSpec {
                force: true,
                ..BuildSpec::recipe("base")
            },
            request_id: None,
        };
        self.control
            .templates
            .build(request)
            .await
            .expect("build starts")
            .build
    }

    /// Builds a template and waits for its end.
    pub async fn build(&self, name: &str) -> Build {
        let build = self.start_build(name).await;
        let lines: Vec<_> = self
            .control
            .templates
            .follow(build.id)
            .try_collect()
            .await
            .expect("log");
        assert!(!lines.is_empty());
        build
    }
}

/// See [`Plane::remains`].
pub struct Remains {
    pub fleet: Arc<MemoryFleet>,
    config: ControlConfig,
    dir: tempfile::TempDir,
}

impl Remains {
    pub async fn start(self) -> Plane {
        self.fleet.behave();
        self.fleet.forget_operations();
        Plane::open(self.dir, self.fleet, self.config).await
    }
}

pub fn failed() -> FleetError {
    FleetError::Failed {
        doing: "do it".into(),
        why: "told to fail".into(),
    }
}

pub fn request(template: &str) -> CreateSandbox {
    CreateSandbox {
        template: template.into(),
        lifetime: Lifetime::For(Duration::from_secs(60)),
        metadata: BTreeMap::new(),
        env_vars: Vec::new(),
        mounts: Vec::new(),
        network: NetworkOptions::default(),
        lifecycle: LifecycleOptions::default(),
        cpu_count: None,
        memory_mib: None,
        idempotency: None,
    }
}

pub fn idempotent(key: &str, hash: u8) -> CreateSandbox {
    let idempotency = Some(Idempotency {
        key: key.into(),
        body_hash: [hash; 32],
    });
    CreateSandbox {
        idempotency,
        ..request("base")
    }
}

/// Waits until `done`, and fails the test if that takes seconds.
pub async fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{what} did not happen");
}
