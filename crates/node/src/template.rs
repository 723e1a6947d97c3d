//! Template build: an image becomes the snapshot that sandboxes are made from.
//!
//! The only place where a VM is booted. What is frozen is a guest that has booted, has answered, and
//! has run what its sandboxes will run first, so that their first commands find programs in the
//! guest's page cache. The snapshot is restored once before anybody gets to know it: that proves it,
//! and leaves its memory image in the host's page cache.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use cubicle_cow::{Manifest, Snapshot, SnapshotKind, VmShape, VolumeName};
use cubicle_ids::{SandboxId, SnapshotId, TemplateId};
use cubicle_image::{GuestBinary, KernelSource, Progress, Recipe, Step};
use cubicle_net::EgressPolicy;
use cubicle_protocol::guest_api::InitRequest;
use cubicle_vmm::{Boot, Disk, VM_UID_BASE, Vm, VmSpec};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    create::random_hex,
    error::{Error, Result},
    facts::{PhaseTimings, Shape},
    freeze::{After, FreezeTimings, freeze, publish},
    guest::Guest,
    holdings::Holdings,
    journal::{self, Key},
    link::{Identity, Link},
    memory::Memory,
    node::{Inner, blocking},
    restore::{CMDLINE, MACHINE, Restore, restore},
    sandbox::{check_stop, contained, unless_stopped},
};

/// How often removing what a build held is tried before it is left to the next start.
const RELEASE_ATTEMPTS: u32 = 5;
const RELEASE_PAUSE: Duration = Duration::from_millis(100);

/// A template to build.
#[derive(Debug, Clone)]
pub struct TemplateBuild {
    /// Id of the snapshot that it becomes.
    pub snapshot: SnapshotId,
    /// The template that it is for, noted in the manifest.
    pub template: Option<TemplateId>,
    /// What is booted.
    pub source: ImageSource,
    /// Virtual CPUs of its sandboxes.
    pub cpus: u32,
    /// Memory of its sandboxes, in MiB.
    pub memory_mib: u32,
    /// What is run before the freeze, in this order.
    pub warm_up: Vec<WarmUp>,
    /// How long the guest is left alone after that, so that what its kernel has put off (writing
    /// back, counting up) happens once and not in every sandbox.
    pub settle: Duration,
}

impl TemplateBuild {
    /// Long enough for a Linux kernel to have done what it puts off by a second or two.
    pub const SETTLE: Duration = Duration::from_secs(3);
    /// Step: booting, until the guest has answered.
    pub const BOOT: Step = Step::new("boot");
    /// Step: running what is to be warm in the snapshot.
    pub const WARM_UP: Step = Step::new("warm-up");
    /// Step: freezing the VM and writing the snapshot.
    pub const SNAPSHOT: Step = Step::new("snapshot");
    /// Step: restoring the snapshot once.
    pub const PROOF: Step = Step::new("proof");
}

/// Where the image of a template comes from.
#[derive(Debug, Clone)]
pub enum ImageSource {
    /// Made on this machine, unless it has been made before.
    Recipe {
        /// The root file system.
        recipe: Box<Recipe>,
        /// The kernel.
        kernel: KernelSource,
        /// The guest daemon.
        guest: GuestBinary,
        /// The image directory.
        dir: PathBuf,
    },
    /// Files that are there already.
    Ready(TemplateImage),
}

/// What a template is booted from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateImage {
    /// Uncompressed kernel.
    pub kernel: PathBuf,
    /// Initial file system with the guest daemon.
    pub initramfs: PathBuf,
    /// Tells this kernel, its modules and the daemon from others.
    pub kernel_fingerprint: String,
    /// Root file system: a raw disk image. Only read.
    pub rootfs: PathBuf,
    /// Tells this root file system from others.
    pub rootfs_fingerprint: String,
}

/// A program that is run while a template is prepared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WarmUp {
    /// Who runs it.
    pub user: String,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Whether the template is built all the same if it is missing or fails.
    pub optional: bool,
}

impl WarmUp {
    /// `command`, run by `user`.
    #[must_use]
    pub fn new(user: &str, command: &[&str]) -> Self {
        Self {
            user: user.to_owned(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            optional: false,
        }
    }

    /// The same, for an image that may lack the program or the user.
    #[must_use]
    pub fn if_possible(mut self) -> Self {
        self.optional = true;
        self
    }

    /// What agents run first: a login shell with the usual tools, and Python if the image has it.
    /// Then everything is written to disk, so that sandboxes need not all write it again.
    #[must_use]
    pub fn usual(user: &str) -> Vec<Self> {
        const SHELL: &str = "for i in 1 2; do ls -la / >/dev/null; cat /etc/os-release >/dev/null; \
            id >/dev/null; if command -v python3 >/dev/null; then \
            python3 -c 'import json, os, re, subprocess, sys, time'; fi; done";
        vec![
            Self::new(user, &["/bin/bash", "-l", "-c", SHELL]),
            Self::new("root", &["/bin/sync"]),
        ]
    }
}

/// A template that was built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltTemplate {
    /// What its sandboxes are made from.
    pub snapshot: SnapshotId,
    /// From the start of the VM until its guest had answered.
    pub boot: Duration,
    /// How long the programs of the warm-up took together.
    pub warm_up: Duration,
    /// How long freezing and publishing took.
    pub freeze: FreezeTimings,
    /// How long restoring it for the first time took.
    pub proof: PhaseTimings,
}

/// Builds a template, in a task of its own: when the caller goes away, the build is undone in good
/// order.
pub(crate) async fn build(
    node: &Arc<Inner>,
    build: TemplateBuild,
    progress: Progress,
) -> Result<BuiltTemplate> {
    let (builder, _stop_if_dropped) = Builder::new(node, build, progress);
    let task = node.tasks.spawn(async move { builder.run().await });
    task.await.unwrap_or(Err(Error::Closed))
}

/// Boots what a template is built from, until its guest has answered, and throws it away again.
/// Returns how long that took from the start of the VM.
pub(crate) async fn measure_boot(node: &Arc<Inner>, build: TemplateBuild) -> Result<Duration> {
    let (builder, _stop_if_dropped) = Builder::new(node, build, Progress::silent());
    let task = node.tasks.spawn(async move { builder.boot_only().await });
    task.await.unwrap_or(Err(Error::Closed))
}

struct Builder {
    node: Arc<Inner>,
    /// Owner of the VMs that the build needs.
    id: SandboxId,
    build: TemplateBuild,
    progress: Progress,
    stop: CancellationToken,
}

/// A booted VM, ready to be frozen.
struct Booted {
    vm: Arc<dyn Vm>,
    link: Link,
    disk: Disk,
    nonce: String,
    boot: Duration,
}

impl Builder {
    fn new(node: &Arc<Inner>, build: TemplateBuild, progress: Progress) -> (Self, DropGuard) {
        let stop = node.closing.child_token();
        let stop_if_dropped = stop.clone().drop_guard();
        let builder = Self {
            node: node.clone(),
            id: SandboxId::generate(),
            build,
            progress,
            stop,
        };
        (builder, stop_if_dropped)
    }

    async fn boot_only(self) -> Result<Duration> {
        let image = self.image().await?;
        let key = Key {
            sandbox: self.id.clone(),
            generation: 1,
        };
        let mut held = Holdings::new(key);
        let booting = async {
            let booted = self.boot(&image, &mut held).await?;
            booted.link.close();
            Ok(booted.boot)
        };
        let boot = contained(&self.id, booting).await;
        self.give_back(held, boot).await
    }

    async fn run(self) -> Result<BuiltTemplate> {
        let image = self.image().await?;
        let snapshot = &self.build.snapshot;
        if self.node.store.entry(snapshot).is_some() {
            return Err(cubicle_cow::Error::Exists(snapshot.clone()).into());
        }
        self.node.journal.begin_build(snapshot).await?;
        let built = contained(&self.id, self.build_and_prove(&image)).await;
        // Whatever was published by a build that failed is no snapshot.
        if built.is_err()
            && let Err(error) = self.node.delete_snapshot(snapshot).await
        {
            tracing::error!(%snapshot, %error, "an unusable snapshot stays until the next start");
            return built;
        }
        let ended = self.node.journal.end_build(snapshot).await;
        built.and_then(|built| ended.map(|()| built))
    }

    async fn build_and_prove(&self, image: &TemplateImage) -> Result<BuiltTemplate> {
        let key = Key {
            sandbox: self.id.clone(),
            generation: 1,
        };
        let mut held = Holdings::new(key);
        let frozen = contained(&self.id, self.boot_and_freeze(image, &mut held)).await;
        let (snapshot, mut built) = self.give_back(held, frozen).await?;

        self.progress
            .message(TemplateBuild::PROOF, "restoring the snapshot");
        let key = Key {
            sandbox: self.id.clone(),
            generation: 2,
        };
        let mut held = Holdings::new(key);
        let proof = contained(&self.id, self.prove(&snapshot, &mut held)).await;
        built.proof = self.give_back(held, proof).await?;
        let took = format!("restored in {:.0?}", built.proof.total);
        self.progress.done(TemplateBuild::PROOF, took);
        let (freeze, proof) = (&built.freeze, &built.proof);
        tracing::info!(snapshot = %snapshot.id(), %freeze, %proof, "built a template");
        Ok(built)
    }

    /// Gives back what work left in its holdings, whether it succeeded or failed; returns what
    /// came of it.
    async fn give_back<T>(&self, mut held: Holdings, done: Result<T>) -> Result<T> {
        for attempt in 1.. {
            let Err(error) = held.release(&self.node).await else {
                break;
            };
            tracing::error!(sandbox = %self.id, %error, attempt, "could not remove all of a build");
            if attempt == RELEASE_ATTEMPTS {
                return done.and(Err(error));
            }
            tokio::time::sleep(RELEASE_PAUSE * attempt).await;
        }
        done
    }

    async fn image(&self) -> Result<TemplateImage> {
        let (recipe, source, guest, dir) = match &self.build.source {
            ImageSource::Ready(image) => return Ok(image.clone()),
            ImageSource::Recipe {
                recipe,
                kernel,
                guest,
                dir,
            } => (recipe, kernel, guest, dir),
        };
        // Dropping their futures undoes what they began.
        unless_stopped(&self.id, &self.stop, async {
            let kernel = cubicle_image::prepare_kernel(dir, source, guest, &self.progress).await?;
            let rootfs = cubicle_image::build_rootfs(recipe, dir, &self.progress).await?;
            Ok(TemplateImage {
                kernel: kernel.vmlinux,
                initramfs: kernel.initramfs,
                kernel_fingerprint: kernel.fingerprint.to_string(),
                rootfs: rootfs.image,
                rootfs_fingerprint: rootfs.fingerprint.to_string(),
            })
        })
        .await
    }

    async fn boot_and_freeze(
        &self,
        image: &TemplateImage,
        held: &mut Holdings,
    ) -> Result<(Snapshot, BuiltTemplate)> {
        let (node, build) = (&self.node, &self.build);
        self.progress
            .message(TemplateBuild::BOOT, "starting the VM");
        let booted = self.boot(image, held).await?;
        self.progress.done(
            TemplateBuild::BOOT,
            format!("the guest answered after {:.1?}", booted.boot),
        );

        let begun = Instant::now();
        let guest = Guest {
            id: &self.id,
            link: &booted.link,
        };
        let warming = async {
            node.failpoints.pass("build/health").await?;
            guest.health().await?;
            for warm_up in &build.warm_up {
                self.progress
                    .message(TemplateBuild::WARM_UP, warm_up.command.join(" "));
                node.failpoints.pass("build/warm-up").await?;
                let patience = node.config.deadlines.warm_up;
                let run = guest.run(&warm_up.user, &warm_up.command, patience).await;
                match run {
                    Err(Error::WarmUp { reason, .. }) if warm_up.optional => {
                        let skipped = format!("left out: {reason}");
                        self.progress.message(TemplateBuild::WARM_UP, skipped);
                    }
                    run => run?,
                }
            }
            tokio::time::sleep(build.settle).await;
            Ok(())
        };
        unless_stopped(&self.id, &self.stop, warming).await?;
        let warm_up = begun.elapsed();
        self.progress
            .done(TemplateBuild::WARM_UP, format!("took {warm_up:.1?}"));

        self.progress
            .message(TemplateBuild::SNAPSHOT, "freezing the VM");
        let draft = node
            .store
            .begin_snapshot(build.snapshot.clone(), SnapshotKind::Template)?;
        // The life is over before the freeze: no half of a conversation goes into the snapshot.
        booted.link.close();
        drop(booted.link);
        let memory = Memory::booted(node.config.memory_tier)?;
        let frozen = freeze(
            node,
            &self.id,
            &booted.vm,
            &[booted.disk],
            draft,
            Some(&memory),
            After::Stop,
        )
        .await?;
        node.failpoints.pass("build/kill").await?;
        booted.vm.kill().await?;
        check_stop(&self.id, &self.stop)?;

        let manifest = self.manifest(image, booted.nonce);
        let published = publish(node, frozen, Some(&memory), manifest).await?;
        let (snapshot, freeze) = (published.snapshot, published.timings);
        self.progress.done(
            TemplateBuild::SNAPSHOT,
            format!("published as {}", snapshot.id()),
        );
        let built = BuiltTemplate {
            snapshot: snapshot.id().clone(),
            boot: booted.boot,
            warm_up,
            freeze,
            proof: PhaseTimings::default(),
        };
        Ok((snapshot, built))
    }

    async fn boot(&self, image: &TemplateImage, held: &mut Holdings) -> Result<Booted> {
        let key = held.key.clone();
        let (node, build, id) = (&self.node, &self.build, &self.id);
        let nonce = random_hex();
        let init = InitRequest {
            default_user: Some(node.config.guest.user.clone()),
            // Whatever is written about a sandbox is there already when it becomes one: replacing it
            // is faster.
            sandbox_id: Some(id.clone()),
            template_id: build.template.clone(),
            machine_id: Some(random_hex()),
            // As long as every other.
            hostname: Some(id.to_string()),
            dns_servers: node.config.guest.dns_servers.clone(),
            nonce: Some(nonce.clone()),
            ..InitRequest::default()
        };
        node.failpoints.pass("build/journal").await?;
        held.journaled = true;
        let row = journal::Row {
            key: key.clone(),
            serves: None,
            origin: None,
            snapshot: build.snapshot.clone(),
            step: journal::Step::Creating,
            shape: Shape {
                cpus: build.cpus,
                memory_mib: build.memory_mib,
                disk_mib: 0,
            },
            slot: None,
            vm: None,
            identity: init.clone(),
            created_at: journal::now(),
            running_at: None,
        };
        node.journal.begin(&row).await?;

        node.failpoints.pass("build/slot").await?;
        let slot = held.slot.insert(node.slots.acquire().await?);
        slot.set_egress(&EgressPolicy::deny_all()).await?;
        let (index, attachment) = (slot.index(), slot.attach()?);

        node.failpoints.pass("build/volume").await?;
        held.volumes = true;
        let (store, rootfs) = (node.store.clone(), image.rootfs.clone());
        let volume = VolumeName::new(id.clone(), key.generation, 0);
        let path = blocking(move || Ok(store.import_volume(&rootfs, &volume)?.0)).await?;
        let disk = Disk {
            path,
            read_only: false,
        };
        check_stop(id, &self.stop)?;

        let begun = Instant::now();
        node.failpoints.pass("build/launch").await?;
        let boot = Boot::Cold {
            kernel: image.kernel.clone(),
            initramfs: image.initramfs.clone(),
            cmdline: CMDLINE.to_owned(),
        };
        let run_dir = node.vm_run_dir(&key);
        let spec = VmSpec {
            disks: vec![disk.clone()],
            tap: attachment.tap,
            netns: attachment.netns,
            kernel_log: true,
            ..VmSpec::new(
                id.clone(),
                run_dir.clone(),
                VM_UID_BASE + index,
                build.cpus,
                build.memory_mib,
                boot,
            )
        };
        let vm = held.vm.insert(node.hypervisor.launch(spec).await?).clone();
        node.journal.started(&key, index, &vm.record()).await?;

        node.failpoints.pass("build/answer").await?;
        let identity = Identity {
            init,
            restored: None,
        };
        let patience = node.config.deadlines.boot;
        let opened = unless_stopped(id, &self.stop, async {
            tokio::select! {
                opened = Link::open(vm.clone(), id, identity, patience) => opened,
                () = vm.exited() => Err(cubicle_vmm::Error::Gone { id: id.clone() }.into()),
            }
        })
        .await;
        let (link, ..) = opened.inspect_err(|_| {
            let log = VmSpec::kernel_log_path(&run_dir);
            let text = std::fs::read(&log).unwrap_or_default();
            let tail = &text[text.len().saturating_sub(2000)..];
            tracing::error!(console = %String::from_utf8_lossy(tail), "the guest did not come up");
        })?;
        Ok(Booted {
            vm,
            link,
            disk,
            nonce,
            boot: begun.elapsed(),
        })
    }

    fn manifest(&self, image: &TemplateImage, nonce: String) -> Manifest {
        let build = &self.build;
        let shape = VmShape {
            cpus: build.cpus,
            memory_mib: build.memory_mib,
            hypervisor: self.node.hypervisor.name().to_owned(),
            options: [(MACHINE.to_owned(), self.node.hypervisor.machine())].into(),
        };
        let mut manifest = Manifest::new(
            build.snapshot.clone(),
            SnapshotKind::Template,
            shape,
            &image.kernel_fingerprint,
        );
        manifest.guest_nonce = nonce;
        manifest
            .labels
            .insert("rootfs".to_owned(), image.rootfs_fingerprint.clone());
        if let Some(template) = &build.template {
            manifest
                .labels
                .insert("template".to_owned(), template.to_string());
        }
        manifest
    }

    /// Restores the new snapshot as a sandbox that nobody will have known.
    async fn prove(&self, snapshot: &Snapshot, held: &mut Holdings) -> Result<PhaseTimings> {
        let begun = Instant::now();
        let identity = Identity {
            init: InitRequest {
                hostname: Some(self.id.to_string()),
                ..InitRequest::default()
            },
            restored: Some((
                snapshot.id().clone(),
                snapshot.manifest().guest_nonce.clone(),
            )),
        };
        let order = Restore {
            serves: None,
            snapshot,
            identity,
            egress: Some(EgressPolicy::deny_all()),
            limits: None,
            kernel: None,
            started_at: journal::now(),
        };
        let restored = restore(&self.node, order, held, &self.stop).await?;
        let total = begun.elapsed();
        Guest {
            id: &self.id,
            link: &restored.live.link,
        }
        .health()
        .await?;
        restored.live.link.close();
        Ok(PhaseTimings {
            total,
            ..restored.timings
        })
    }
}
