//! How a template is built.
//!
//! A build is a task of its own: clients come, follow its log, and go. Its log is in the database
//! before anyone sees it, so that following and reading back are the same thing.

use std::{
    ops::RangeInclusive,
    sync::{MutexGuard, PoisonError},
    time::Duration,
};

use cubicle_ids::TemplateId;
use futures::Stream;
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use super::{
    Build, BuildLine, BuildStatus, DEFAULT_TAG, Reference, Templates,
    name::{BadName, is_tag},
};
use crate::{
    db::now,
    error::{Error, Result},
    fleet::{BuildOrder, BuildStep, Level},
};

const CPUS: RangeInclusive<u32> = 1..=64;
const MEMORY_MIB: RangeInclusive<u32> = 128..=1 << 20;
const DISK_MIB: RangeInclusive<u32> = 512..=1 << 24;
/// Most log lines read from the database at once.
const LOG_PAGE: u32 = 100;

/// A template to build.
#[derive(Debug, Clone)]
pub struct BuildTemplate {
    /// `alias[:tag]`; an alias that exists gets a new build.
    pub name: String,
    /// More tags for it.
    pub tags: Vec<String>,
    /// Name of the recipe that makes its root file system.
    pub recipe: String,
    /// Size of its sandboxes.
    pub size: Size,
    /// Build even if the current build was made the same way.
    pub force: bool,
}

/// A build that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    /// The build: a new one, or the current one.
    pub build: Build,
    /// True if the current build was made the same way, so that nothing was started.
    pub cached: bool,
}

/// Size of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// CPUs.
    pub cpu_count: u32,
    /// Memory.
    pub memory_mib: u32,
    /// Root disk.
    pub disk_mib: u32,
}

impl Size {
    fn check(self) -> Result<()> {
        let check = |field, value, range: RangeInclusive<u32>, unit: &str| {
            if range.contains(&value) {
                return Ok(());
            }
            let (min, max) = range.into_inner();
            Err(Error::invalid(
                field,
                format!("{value} is not between {min} and {max}{unit}"),
            ))
        };
        check("cpuCount", self.cpu_count, CPUS, "")?;
        check("memoryMB", self.memory_mib, MEMORY_MIB, " MiB")?;
        check("diskSizeMB", self.disk_mib, DISK_MIB, " MiB")
    }
}

impl Default for Size {
    /// One CPU and 512 MiB: what a sandbox needs for Python, and little enough to have many. The
    /// disk takes no room until it is written to.
    fn default() -> Self {
        Self {
            cpu_count: 1,
            memory_mib: 512,
            disk_mib: 8 * 1024,
        }
    }
}

impl Templates {
    /// How long what a template is made from takes to boot. Boots it once and keeps nothing.
    ///
    /// # Errors
    /// [`Error::TemplateNotFound`], or if it does not boot.
    pub async fn measure_boot(&self, reference: &str) -> Result<Duration> {
        let template = self.get(reference).await?;
        let build = template.build().ok_or_else(|| Error::TemplateNotFound {
            reference: reference.to_owned(),
        })?;
        let order = BuildOrder {
            template: template.id.clone(),
            build: build.id,
            recipe: build.recipe.clone(),
            cpu_count: build.cpu_count,
            memory_mib: build.memory_mib,
            disk_mib: build.disk_mib,
        };
        Ok(self.fleet.measure_boot(order).await?)
    }

    /// Starts a build and returns at once.
    pub async fn build(&self, request: BuildTemplate) -> Result<Started> {
        request.size.check()?;
        let bad_name = |error: BadName| Error::invalid("name", error.to_string());
        let reference: Reference = request.name.parse().map_err(bad_name)?;
        reference.check_alias().map_err(bad_name)?;
        if self.snapshots.has_name(&reference.name).await? {
            return Err(Error::NameTaken {
                name: reference.name,
                what: "snapshot",
            });
        }
        if !request.tags.iter().all(|tag| is_tag(tag)) {
            return Err(Error::invalid("tags", BadName::Tag.to_string()));
        }
        let mut tags = request.tags;
        tags.extend(reference.tag.clone());
        if tags.is_empty() {
            tags.push(DEFAULT_TAG.to_owned());
        }

        if !request.force
            && let Some(build) = self
                .made_the_same_way(&reference, &request.recipe, request.size)
                .await?
        {
            return Ok(Started {
                build,
                cached: true,
            });
        }

        let at = now();
        let mut build = Build {
            id: Uuid::new_v4(),
            template: TemplateId::generate(),
            recipe: request.recipe.clone(),
            status: BuildStatus::Waiting,
            reason: None,
            snapshot: None,
            cpu_count: request.size.cpu_count,
            memory_mib: request.size.memory_mib,
            disk_mib: request.size.disk_mib,
            envd_version: cubicle_protocol::ENVD_VERSION.to_owned(),
            created_at: at,
            updated_at: at,
            finished_at: None,
        };
        if let Err(running) = self.store.begin_build(&reference.name, &mut build).await? {
            return Err(Error::BuildInProgress {
                template: reference.name,
                build: running,
            });
        }
        let order = BuildOrder {
            template: build.template.clone(),
            build: build.id,
            recipe: request.recipe,
            cpu_count: build.cpu_count,
            memory_mib: build.memory_mib,
            disk_mib: build.disk_mib,
        };
        self.running().insert(build.id, watch::Sender::new(0));
        let (templates, started) = (self.clone(), build.clone());
        self.tasks
            .spawn(async move { templates.run_build(started, order, tags).await });
        Ok(Started {
            build,
            cached: false,
        })
    }

    /// The build that a name stands for, if it was made by this recipe, of this size, with the
    /// guest daemon of today.
    async fn made_the_same_way(
        &self,
        reference: &Reference,
        recipe: &str,
        size: Size,
    ) -> Result<Option<Build>> {
        let Some(resolved) = self.store.resolve(reference).await? else {
            return Ok(None);
        };
        let mut builds = self
            .get(resolved.template.as_str())
            .await?
            .builds
            .into_iter();
        Ok(builds.find(|build| {
            build.id == resolved.build
                && build.recipe == recipe
                && build.envd_version == cubicle_protocol::ENVD_VERSION
                && (build.cpu_count, build.memory_mib, build.disk_mib)
                    == (size.cpu_count, size.memory_mib, size.disk_mib)
        }))
    }

    /// The log of a build, line by line, until it ends.
    pub fn follow(&self, build: Uuid) -> impl Stream<Item = Result<BuildLine>> + Send + use<> {
        let (templates, lines) = (
            self.clone(),
            self.running().get(&build).map(|s| s.subscribe()),
        );
        futures::stream::try_unfold((0, lines, Vec::new().into_iter()), move |state| {
            let templates = templates.clone();
            async move {
                let (mut offset, mut lines, mut page): (u64, _, std::vec::IntoIter<BuildLine>) =
                    state;
                loop {
                    if let Some(line) = page.next() {
                        offset = line.seq + 1;
                        return Ok(Some((line, (offset, lines, page))));
                    }
                    page = templates
                        .build_log(build, offset, LOG_PAGE)
                        .await?
                        .into_iter();
                    if page.len() > 0 {
                        continue;
                    }
                    let Some(counter) = &mut lines else {
                        return Ok(None);
                    };
                    // An error means that the build has ended: one more look, then no waiting.
                    if counter.wait_for(|written| *written > offset).await.is_err() {
                        lines = None;
                    }
                }
            }
        })
    }

    async fn run_build(&self, build: Build, order: BuildOrder, tags: Vec<String>) {
        let (progress, mut steps) = mpsc::unbounded_channel();
        if let Err(error) = self.store.building(build.id).await {
            tracing::warn!(build = %build.id, %error, "the build's status is behind");
        }
        let logged = async {
            let mut seq = 0;
            while let Some(step) = steps.recv().await {
                seq = self.write_line(build.id, seq, &step).await;
            }
            seq
        };
        let (built, seq) = tokio::join!(self.fleet.build(order, progress), logged);

        let outcome = match built {
            Ok(built) => self.store.build_ready(&build, &built.snapshot, &tags).await,
            Err(error) => Err(error.into()),
        };
        let line = match &outcome {
            Ok(_) => (Level::Info, "the template is ready".to_owned()),
            Err(error) => (Level::Error, error.to_string()),
        };
        let step = BuildStep {
            level: line.0,
            step: Some("finalize".to_owned()),
            message: line.1,
        };
        match outcome {
            Ok(superseded) => self.delete_snapshots(superseded).await,
            Err(error) => {
                tracing::error!(build = %build.id, %error, "a template could not be built");
                if let Err(error) = self.store.build_failed(build.id, &step.message).await {
                    tracing::error!(build = %build.id, %error, "and that is not on record");
                }
            }
        }
        self.write_line(build.id, seq, &step).await;
        self.running().remove(&build.id);
    }

    /// Appends a line and wakes who follows. Returns the number of lines.
    async fn write_line(&self, build: Uuid, seq: u64, step: &BuildStep) -> u64 {
        if let Err(error) = self.store.log(build, seq, step).await {
            tracing::warn!(%build, %error, "a line of the build's log is lost");
            return seq;
        }
        if let Some(counter) = self.running().get(&build) {
            counter.send_replace(seq + 1);
        }
        seq + 1
    }

    fn running(&self) -> MutexGuard<'_, std::collections::HashMap<Uuid, watch::Sender<u64>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
