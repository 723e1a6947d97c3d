//! A control plane over a fleet without machines.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses a part of it"
)]
#![allow(clippy::expect_used, reason = "a helper of tests may panic")]

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use cubicle_control::{
    Control, ControlConfig,
    fleet::{NetworkOptions, memory::MemoryFleet},
    sandbox::{CreateSandbox, Idempotency, LifecycleOptions, Lifetime, Reconciled, SandboxConfig},
    template::{Build, BuildTemplate, Size},
};
use futures::TryStreamExt as _;

pub struct Plane {
    pub control: Control,
    pub fleet: Arc<MemoryFleet>,
    pub reconciled: Reconciled,
    kill_patience: Duration,
    pub dir: tempfile::TempDir,
}

impl Plane {
    /// A fresh control plane with a template `base`.
    pub async fn new() -> Self {
        // Long: a busy machine is slow, and no test but one wants to see a kill give up.
        Self::with_kill_patience(Duration::from_secs(30)).await
    }

    pub async fn with_kill_patience(kill_patience: Duration) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let plane = Self::open(dir, Arc::default(), kill_patience).await;
        plane.build("base").await;
        plane
    }

    async fn open(
        dir: tempfile::TempDir,
        fleet: Arc<MemoryFleet>,
        kill_patience: Duration,
    ) -> Self {
        let config = ControlConfig {
            sandboxes: SandboxConfig {
                sample_every: Duration::from_millis(50),
                first_sample_after: Duration::from_millis(5),
                kill_patience,
                ..SandboxConfig::default()
            },
            ..ControlConfig::new(dir.path().join("cubicle.db"))
        };
        let (control, reconciled) = Control::open(config, fleet.clone())
            .await
            .expect("control opens");
        Self {
            control,
            fleet,
            reconciled,
            kill_patience,
            dir,
        }
    }

    /// Stops the server and starts it again over the same fleet and database; `between` happens
    /// while it is down.
    pub async fn restart(self, between: impl FnOnce(&MemoryFleet)) -> Self {
        self.control.close().await;
        drop(self.control);
        between(&self.fleet);
        Self::open(self.dir, self.fleet, self.kill_patience).await
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
            recipe: "base".into(),
            size,
            force: true,
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

pub fn request(template: &str) -> CreateSandbox {
    CreateSandbox {
        template: template.into(),
        lifetime: Lifetime::For(Duration::from_secs(60)),
        metadata: BTreeMap::new(),
        env_vars: Vec::new(),
        network: NetworkOptions::default(),
        lifecycle: LifecycleOptions::default(),
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
