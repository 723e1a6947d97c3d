//! How a template is built: layer by layer, each of which is found or made.
//!
//! A build is a task of its own: clients come, follow its log, and go. The first layer is what its
//! origin boots to; every stage after that runs in a VM restored from the layer before it, which is
//! frozen when the stage is done and goes on with the next. A layer that exists already, whoever
//! made it, is not made again; who needs one that is being made waits for it. The last layer is what
//! sandboxes are restored from.

use std::time::{Duration, Instant};

use cubicle_ids::{SnapshotId, TemplateId};
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use super::{
    Build, BuildSpec, Origin, Resolved, Templates,
    log::Log,
    plan::{BASE, FINALIZE, Ground, Plan, Stage},
    store::Made,
    vm::BuildVm,
};
use crate::{
    error::{Error, Result},
    fleet::{BuildOrder, BuildStep, FleetError, Level, Source},
};

/// How often a build begins again because a layer that it wanted to use was gone.
const ATTEMPTS: u32 = 3;

/// Why a build failed, and where.
struct Failure {
    step: String,
    error: Error,
}

/// Says where an error happened.
trait At<T> {
    fn at(self, step: &str) -> std::result::Result<T, Failure>;
}

impl<T> At<T> for Result<T> {
    fn at(self, step: &str) -> std::result::Result<T, Failure> {
        self.map_err(|error| Failure {
            step: step.to_owned(),
            error,
        })
    }
}

/// What the first layer is.
enum First {
    /// It is there.
    Layer(SnapshotId),
    /// It is booted from this.
    Boot(Source),
}

/// A layer, and the VM that is in the state that it holds, if there is one.
struct Top<'a> {
    layer: SnapshotId,
    vm: Option<BuildVm<'a>>,
    /// Whether it was made just now.
    made: bool,
}

impl Templates {
    /// How long what a template is made from takes to boot. Boots it once and keeps nothing.
    ///
    /// # Errors
    /// [`Error::TemplateNotFound`], or if it does not boot.
    pub async fn measure_boot(&self, reference: &str) -> Result<Duration> {
        let resolved = self.resolve(reference).await?;
        let order = BuildOrder {
            template: resolved.template,
            build: resolved.build,
            snapshot: SnapshotId::generate(),
            source: Source::Snapshot(resolved.snapshot),
            cpu_count: resolved.cpu_count,
            memory_mib: resolved.memory_mib,
            disk_mib: resolved.disk_mib,
        };
        Ok(self.fleet.measure_boot(order).await?)
    }

    /// Has a task of its own carry a build out.
    pub(super) fn launch(&self, build: Build, spec: BuildSpec) {
        self.running().insert(build.id, watch::Sender::new(0));
        let templates = self.clone();
        self.tasks
            .spawn(async move { templates.run_build(build, spec).await });
    }

    async fn run_build(&self, build: Build, spec: BuildSpec) {
        if let Err(error) = self.store.building(build.id).await {
            tracing::warn!(build = %build.id, %error, "the build's status is behind");
        }
        let (progress, mut steps) = mpsc::unbounded_channel();
        let logged = async {
            let mut seq = 0;
            while let Some(step) = steps.recv().await {
                seq = self.write_line(build.id, seq, &step).await;
            }
            seq
        };
        let begun = Instant::now();
        let building = async {
            let builder = Builder {
                templates: self,
                template: &build.template,
                build: build.id,
                size: (build.cpu_count, build.memory_mib, build.disk_mib),
                log: Log::new(progress, BASE),
            };
            self.stopping
                .run_until_cancelled(builder.build(&spec))
                .await
                .unwrap_or_else(|| Err(Error::ShuttingDown).at(BASE))
        };
        let (made, seq) = tokio::join!(building, logged);
        let outcome = match made {
            Ok(made) => self.store.build_ready(&build, &made).await.at(FINALIZE),
            Err(failure) => Err(failure),
        };
        let last = match &outcome {
            Ok(_) => BuildStep {
                level: Level::Info,
                step: Some(FINALIZE.to_owned()),
                message: format!("the template is ready after {:.1?}", begun.elapsed()),
            },
            Err(failure) => BuildStep {
                level: Level::Error,
                step: Some(failure.step.clone()),
                message: failure.error.to_string(),
            },
        };
        // First the last line, so that whoever sees that it has ended finds all of its log.
        self.write_line(build.id, seq, &last).await;
        if let Err(Failure { step, error }) = outcome {
            tracing::error!(build = %build.id, step, %error, "a template could not be built");
            let failed = self.store.build_failed(build.id, &step, &last.message);
            if let Err(error) = failed.await {
                tracing::error!(build = %build.id, %error, "and that is not on record");
            }
        }
        self.running().remove(&build.id);
        self.collect().await;
    }

    /// The same template for sandboxes of another size: made when it is first asked for, by booting
    /// its disk and starting again what it has running.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is a snapshot of a sandbox, which has the size that it has.
    pub(crate) async fn shaped(
        &self,
        resolved: Resolved,
        cpu_count: Option<u32>,
        memory_mib: Option<u32>,
    ) -> Result<Resolved> {
        let size = super::Size {
            cpu_count: cpu_count.unwrap_or(resolved.cpu_count),
            memory_mib: memory_mib.unwrap_or(resolved.memory_mib),
            disk_mib: resolved.disk_mib,
        };
        let (cpus, memory) = (size.cpu_count, size.memory_mib);
        if (cpus, memory) == (resolved.cpu_count, resolved.memory_mib) {
            return Ok(resolved);
        }
        size.check()?;
        let Some(build) = self.store.build(resolved.build).await? else {
            let why = "a sandbox made from a snapshot has the size that the snapshot has";
            return Err(Error::invalid("cpuCount", why));
        };
        let fingerprint = build.fingerprint.clone().unwrap_or_default();
        let ground = Ground::of_shape(&fingerprint, cpus, memory);
        let plan = Plan::of_launches(&ground, &build.launches);
        let snapshot = match self.store.find_layer(&plan.fingerprint).await? {
            Some(snapshot) => snapshot,
            None => self.make_shape(&resolved, size, &ground, &plan).await?,
        };
        Ok(Resolved {
            snapshot,
            cpu_count: cpus,
            memory_mib: memory,
            ..resolved
        })
    }

    async fn make_shape(
        &self,
        resolved: &Resolved,
        size: super::Size,
        ground: &Ground,
        plan: &Plan,
    ) -> Result<SnapshotId> {
        let (progress, mut steps) = mpsc::unbounded_channel::<BuildStep>();
        let logged = async {
            while let Some(BuildStep { step, message, .. }) = steps.recv().await {
                tracing::debug!(template = %resolved.template, step, message);
            }
        };
        let making = async {
            let builder = Builder {
                templates: self,
                template: &resolved.template,
                build: resolved.build,
                size: (size.cpu_count, size.memory_mib, size.disk_mib),
                log: Log::new(progress, BASE),
            };
            let first = First::Boot(Source::Snapshot(resolved.snapshot.clone()));
            builder.stack(first, ground, plan, false).await
        };
        let (made, ()) = tokio::join!(making, logged);
        made.map_err(|failure| failure.error)
    }
}

/// One build, or the making of a shape.
struct Builder<'a> {
    templates: &'a Templates,
    template: &'a TemplateId,
    build: Uuid,
    /// CPUs, memory and disk.
    size: (u32, u32, u32),
    log: Log,
}

impl<'a> Builder<'a> {
    async fn build(&self, spec: &BuildSpec) -> std::result::Result<Made, Failure> {
        let mut attempt = 1;
        loop {
            match self.attempt(spec).await {
                Err(Failure {
                    error: Error::Fleet(FleetError::NoSnapshot { id }),
                    ..
                }) if attempt < ATTEMPTS => {
                    tracing::warn!(build = %self.build, layer = %id, "a layer is gone");
                    self.templates.store.forget_layer(&id).await.at(BASE)?;
                    attempt += 1;
                }
                done => return done,
            }
        }
    }

    async fn attempt(&self, spec: &BuildSpec) -> std::result::Result<Made, Failure> {
        let (first, ground, disk_mib) = self.origin(&spec.origin).await.at(BASE)?;
        let plan = Plan::new(&ground, spec);
        for (number, step) in (1..).zip(&spec.steps) {
            self.check_files(step).await.at(&format!("{number}"))?;
        }
        let snapshot = self.stack(first, &ground, &plan, spec.force).await?;
        Ok(Made {
            snapshot,
            fingerprint: plan.fingerprint,
            defaults: plan.defaults,
            launches: plan.launches,
            disk_mib,
        })
    }

    /// What the origin is, and what it gives. Also the size of its disk.
    async fn origin(&self, origin: &Origin) -> Result<(First, Ground, u32)> {
        self.log.line(Level::Info, format!("FROM {origin}"));
        let (cpus, memory, disk) = self.size;
        let Origin::Template(reference) = origin else {
            let progress = self.log.sender();
            let facts = self.templates.fleet.origin(origin, progress).await?;
            let ground = Ground::of_origin(&facts, cpus, memory, disk);
            return Ok((First::Boot(facts.source), ground, disk));
        };
        let resolved = self.templates.resolve(reference).await?;
        let of_template = self.templates.store.build(resolved.build).await?;
        let shaped = self.templates.shaped(resolved, Some(cpus), Some(memory));
        let shaped = Box::pin(shaped).await?;
        let ground = Ground {
            fingerprint: shaped.snapshot.to_string(),
            defaults: shaped.defaults.clone(),
            launches: of_template.map_or_else(Vec::new, |build| build.launches),
            ..Ground::of_shape("", cpus, memory)
        };
        Ok((First::Layer(shaped.snapshot), ground, shaped.disk_mib))
    }

    /// Whether the files of a step are here: better to say so before anything is done.
    async fn check_files(&self, step: &super::Step) -> Result<()> {
        if let super::Action::Copy { files, .. } = &step.action
            && !self.templates.has_files(files).await?
        {
            let why = format!("the files of '{}' ({files}) were not uploaded", step.action);
            return Err(Error::invalid("filesHash", why));
        }
        Ok(())
    }

    /// Puts layer on layer; returns the last.
    async fn stack(
        &self,
        first: First,
        ground: &Ground,
        plan: &Plan,
        forced: bool,
    ) -> std::result::Result<SnapshotId, Failure> {
        let mut top = match first {
            First::Layer(layer) => Top {
                layer,
                vm: None,
                made: false,
            },
            First::Boot(source) => self.boot(source, ground, forced).await.at(BASE)?,
        };
        for (n, stage) in plan.stages.iter().enumerate() {
            let last = n + 1 == plan.stages.len();
            let put = self.put(&mut top, stage, last).await;
            if let Err(error) = put {
                if let Some(vm) = top.vm.take() {
                    vm.end().await;
                }
                return Err(error).at(&stage.step);
            }
        }
        if let Some(vm) = top.vm.take() {
            vm.end().await;
        }
        if top.made && !plan.stages.is_empty() {
            let proved = self.prove(&top.layer).await;
            if proved.is_err() {
                self.give_up(&top.layer).await.at(FINALIZE)?;
            }
            proved.at(FINALIZE)?;
        }
        Ok(top.layer)
    }

    /// The first layer.
    async fn boot(&self, source: Source, ground: &Ground, forced: bool) -> Result<Top<'a>> {
        let store = &self.templates.store;
        let _turn = self.templates.turns.take(&ground.fingerprint).await;
        if !forced && let Some(layer) = store.use_layer(self.build, &ground.fingerprint).await? {
            self.log.line(Level::Info, "found what it boots to");
            return Ok(Top {
                layer,
                vm: None,
                made: false,
            });
        }
        let (cpu_count, memory_mib, disk_mib) = self.size;
        let make = async |snapshot: &SnapshotId| {
            let order = BuildOrder {
                template: self.template.clone(),
                build: self.build,
                snapshot: snapshot.clone(),
                source,
                cpu_count,
                memory_mib,
                disk_mib,
            };
            let progress = self.log.sender();
            Ok(self.templates.fleet.build(order, progress).await?)
        };
        let layer = self.make_layer(&ground.fingerprint, make).await?;
        Ok(Top {
            layer,
            vm: None,
            made: true,
        })
    }

    /// Puts one more layer on top: finds it or makes it.
    async fn put(&self, top: &mut Top<'a>, stage: &Stage, last: bool) -> Result<()> {
        let store = &self.templates.store;
        let log = self.log.of_step(&stage.step);
        let _turn = self.templates.turns.take(&stage.fingerprint).await;
        if !stage.forced
            && let Some(layer) = store.use_layer(self.build, &stage.fingerprint).await?
        {
            log.line(Level::Info, format!("CACHED {}", stage.title));
            let old = std::mem::replace(
                top,
                Top {
                    layer,
                    vm: None,
                    made: false,
                },
            );
            if let Some(vm) = old.vm {
                vm.end().await;
            }
            return Ok(());
        }
        log.line(Level::Info, stage.title.clone());
        let begun = Instant::now();
        if top.vm.is_none() {
            top.vm = Some(BuildVm::restore(self.templates, &top.layer).await?);
        }
        let Some(vm) = &top.vm else {
            return Err(Error::ShuttingDown);
        };
        vm.carry_out(stage, &log).await?;
        if last {
            tokio::time::sleep(self.templates.config.settle).await;
        }
        let make = async |snapshot: &SnapshotId| vm.freeze(snapshot).await;
        top.layer = self.make_layer(&stage.fingerprint, make).await?;
        top.made = true;
        log.line(Level::Debug, format!("done after {:.1?}", begun.elapsed()));
        Ok(())
    }

    /// Owns a layer before it exists, has it made, and says that it is there.
    async fn make_layer(
        &self,
        fingerprint: &str,
        make: impl AsyncFnOnce(&SnapshotId) -> Result<()>,
    ) -> Result<SnapshotId> {
        let store = &self.templates.store;
        let snapshot = SnapshotId::generate();
        if !store
            .begin_layer(self.build, fingerprint, &snapshot)
            .await?
        {
            return Err(Error::BuildNotFound {
                template: self.template.to_string(),
                build: self.build.to_string(),
            });
        }
        let made = match make(&snapshot).await {
            Ok(()) => store.layer_ready(&snapshot).await,
            Err(error) => Err(error),
        };
        if let Err(error) = made {
            self.give_up(&snapshot).await?;
            return Err(error);
        }
        Ok(snapshot)
    }

    /// Drops a layer that is no good, whether there is anything of it or not.
    async fn give_up(&self, layer: &SnapshotId) -> Result<()> {
        self.templates.discard(layer).await;
        self.templates.store.forget_layer(layer).await
    }

    /// Restores a new layer once: that proves it, and warms its memory image.
    async fn prove(&self, layer: &SnapshotId) -> Result<()> {
        let proof = BuildVm::restore(self.templates, layer).await?;
        proof.end().await;
        Ok(())
    }
}
