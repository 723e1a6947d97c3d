//! How a template is built.
//!
//! A build is a task of its own: clients come, follow its log, and go. Its log is in the database
//! before anyone sees it, so that following and reading back are the same thing.

use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::{Build, BuildSpec, Origin, Templates, store::Made};
use crate::{
    error::{Error, Result},
    fleet::{BuildOrder, BuildStep, Level},
};

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
            recipe: "base".to_owned(),
            cpu_count: build.cpu_count,
            memory_mib: build.memory_mib,
            disk_mib: build.disk_mib,
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
        let Origin::Recipe(recipe) = spec.origin else {
            return;
        };
        let order = BuildOrder {
            template: build.template.clone(),
            build: build.id,
            recipe,
            cpu_count: build.cpu_count,
            memory_mib: build.memory_mib,
            disk_mib: build.disk_mib,
        };
        let (built, seq) = tokio::join!(self.fleet.build(order, progress), logged);

        let outcome = match built {
            Ok(built) => {
                let fingerprint = format!("build:{}", build.id);
                let made = Made {
                    snapshot: built.snapshot,
                    fingerprint,
                    defaults: super::Defaults::default(),
                    disk_mib: build.disk_mib,
                };
                let begun = self
                    .store
                    .begin_layer(build.id, &made.fingerprint, &made.snapshot)
                    .await;
                let _ = begun;
                let _ = self.store.layer_ready(&made.snapshot).await;
                self.store.build_ready(&build, &made).await
            }
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
            Ok(_) => self.collect().await,
            Err(error) => {
                tracing::error!(build = %build.id, %error, "a template could not be built");
                if let Err(error) = self
                    .store
                    .build_failed(build.id, "base", &step.message)
                    .await
                {
                    tracing::error!(build = %build.id, %error, "and that is not on record");
                }
            }
        }
        self.write_line(build.id, seq, &step).await;
        self.running().remove(&build.id);
    }
}
