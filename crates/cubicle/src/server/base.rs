//! The template that every installation has.

use cubicle_control::template::{BuildSpec, BuildTemplate};
use futures::StreamExt as _;

use super::{BASE, Report, Server, Starting};
use crate::error::Error;

impl Server {
    /// Builds the base template unless the one that is there was made of the same things.
    pub(super) async fn ensure_base(
        &self,
        kernel: &cubicle_image::Kernel,
        report: Report<'_>,
    ) -> Result<(), Error> {
        let current = match self.control.templates.resolve(BASE).await {
            Ok(resolved) => self.store.snapshot(&resolved.snapshot).ok(),
            Err(_) => None,
        };
        let fresh = current.as_ref().is_some_and(|snapshot| {
            snapshot.manifest().kernel == kernel.fingerprint.as_str()
                && self.node.can_restore(snapshot.id())
        });
        if fresh {
            report(Starting::Done {
                step: "template".to_owned(),
                message: format!("`{BASE}` is ready"),
            });
            return Ok(());
        }
        let failed = |error| Error::setup(format!("build the template `{BASE}`"), error);
        let spec = BuildSpec {
            force: true,
            ..BuildSpec::recipe(BASE)
        };
        let request = BuildTemplate::new(BASE, spec);
        let started = self
            .control
            .templates
            .build(request)
            .await
            .map_err(failed)?;
        let mut lines = std::pin::pin!(self.control.templates.follow(started.build.id));
        while let Some(line) = lines.next().await {
            let line = line.map_err(failed)?;
            // What the machine does has a step of its own.
            let (step, message) = match line.message.split_once(": ") {
                Some((step, message)) => (step.to_owned(), message.to_owned()),
                None => ("template".to_owned(), line.message),
            };
            report(Starting::Progress {
                step,
                message,
                fraction: None,
            });
        }
        self.control.templates.resolve(BASE).await.map_err(failed)?;
        report(Starting::Done {
            step: "template".to_owned(),
            message: format!("`{BASE}` was built"),
        });
        Ok(())
    }
}
