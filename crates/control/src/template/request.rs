//! How a build is asked for, and what makes two requests one.

use cubicle_ids::TemplateId;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{
    Build, BuildSpec, BuildStatus, BuildTemplate, DEFAULT_TAG, Origin, Reference, Size, Templates,
    name::{BadName, is_tag},
    plan::{Ground, Plan},
    shorten,
    store::Begun,
};
use crate::{
    db::now,
    error::{Error, Result},
};

/// Longest id of a request.
const MAX_REQUEST_ID: usize = 256;

/// A build that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    /// The build: a new one, or one that was asked for before.
    pub build: Build,
    /// True if it was ready already, so that nothing was started.
    pub cached: bool,
}

/// What makes two requests the same.
#[derive(Debug, Clone)]
pub(crate) struct RequestId {
    pub(crate) id: String,
    pub(crate) body_hash: [u8; 32],
}

impl Templates {
    /// Starts a build and returns at once. Who asks for the same build while it is under way, or
    /// twice with one request id, gets the same build.
    ///
    /// # Errors
    /// [`Error::Invalid`]; [`Error::NameTaken`]; [`Error::BuildInProgress`] if the template is
    /// being built another way; [`Error::IdempotencyMismatch`].
    pub async fn build(&self, request: BuildTemplate) -> Result<Started> {
        let BuildTemplate {
            name,
            tags,
            size,
            spec,
            request_id,
        } = request;
        spec.check()?;
        let request_id = request_id
            .map(|id| request_of(id, &name, &tags, size, &spec))
            .transpose()?;
        let (reference, mut build) = self.new_build(&name, tags, size, Some(spec)).await?;
        let spec = build.spec.clone();
        if request_id.is_none()
            && let Some(build) = self.made_the_same_way(&reference, &build).await?
        {
            return Ok(Started {
                build,
                cached: true,
            });
        }
        let begun = self
            .store
            .begin_build(&reference.name, &mut build, request_id.as_ref(), true)
            .await?;
        match begun {
            Begun::New => {
                self.launch(build.clone(), spec_of(spec)?);
                Ok(Started {
                    build,
                    cached: false,
                })
            }
            Begun::Running(running) if same_order(&running, &build) => Ok(Started {
                build: *running,
                cached: false,
            }),
            Begun::Running(running) => Err(Error::BuildInProgress {
                template: reference.name,
                build: running.id,
            }),
            Begun::Known { same: false, .. } => Err(Error::IdempotencyMismatch {
                key: request_id.map_or_else(String::new, |request| request.id),
            }),
            Begun::Known { build, .. } => Ok(Started {
                cached: build.status == BuildStatus::Ready,
                build: *build,
            }),
        }
    }

    /// Makes room for a build that [`Self::start`] is told of later: a template, if there is none
    /// of this name, and a build that waits.
    ///
    /// # Errors
    /// [`Error::Invalid`]; [`Error::NameTaken`].
    pub async fn prepare(&self, name: &str, tags: Vec<String>, size: Size) -> Result<Build> {
        let (reference, mut build) = self.new_build(name, tags, size, None).await?;
        self.store
            .begin_build(&reference.name, &mut build, None, false)
            .await?;
        Ok(build)
    }

    /// Starts a prepared build. Asking twice for the same is asking once.
    ///
    /// # Errors
    /// [`Error::BuildNotFound`]; [`Error::BuildInProgress`] if it was started another way.
    pub async fn start(
        &self,
        template: &TemplateId,
        build: Uuid,
        spec: BuildSpec,
    ) -> Result<Started> {
        spec.check()?;
        let prepared = self.prepared(template, build).await?;
        let started = self.store.specify(build, &spec).await?;
        let build = self.prepared(template, build).await?;
        if started {
            self.launch(build.clone(), spec);
        } else if prepared.spec.is_some() && !same_spec(build.spec.as_ref(), Some(&spec)) {
            return Err(Error::BuildInProgress {
                template: template.to_string(),
                build: build.id,
            });
        }
        Ok(Started {
            cached: build.status == BuildStatus::Ready,
            build,
        })
    }

    async fn prepared(&self, template: &TemplateId, build: Uuid) -> Result<Build> {
        let found = self.store.build(build).await?;
        found
            .filter(|found| found.template == *template)
            .ok_or_else(|| Error::BuildNotFound {
                template: template.to_string(),
                build: build.to_string(),
            })
    }

    async fn new_build(
        &self,
        name: &str,
        mut tags: Vec<String>,
        size: Size,
        spec: Option<BuildSpec>,
    ) -> Result<(Reference, Build)> {
        size.check()?;
        let bad_name = |error: BadName| Error::invalid("name", error.to_string());
        let reference: Reference = name.parse().map_err(bad_name)?;
        reference.check_alias().map_err(bad_name)?;
        if self.snapshots.has_name(&reference.name).await? {
            return Err(Error::NameTaken {
                name: reference.name,
                what: "snapshot",
            });
        }
        if !tags.iter().all(|tag| is_tag(tag)) {
            return Err(Error::invalid("tags", BadName::Tag.to_string()));
        }
        tags.extend(reference.tag.clone());
        if tags.is_empty() {
            tags.push(DEFAULT_TAG.to_owned());
        }
        let at = now();
        let build = Build {
            id: Uuid::new_v4(),
            template: TemplateId::generate(),
            spec,
            tags,
            status: BuildStatus::Waiting,
            reason: None,
            failed_step: None,
            fingerprint: None,
            defaults: super::Defaults::default(),
            launches: Vec::new(),
            snapshot: None,
            cpu_count: size.cpu_count,
            memory_mib: size.memory_mib,
            disk_mib: size.disk_mib,
            envd_version: cubicle_protocol::ENVD_VERSION.to_owned(),
            created_at: at,
            updated_at: at,
            finished_at: None,
        };
        Ok((reference, build))
    }

    /// The build that a name stands for, if nothing but a recipe was asked for and that would make
    /// the same again: the recipe, the kernel and the guest daemon are what they were. What else
    /// there is can only be compared once its origin was fetched. A recipe that cannot be read now
    /// is left to the build, which tells why in its log.
    async fn made_the_same_way(
        &self,
        reference: &Reference,
        wanted: &Build,
    ) -> Result<Option<Build>> {
        let plain = |spec: &&BuildSpec| {
            !spec.force && spec.steps.is_empty() && matches!(spec.origin, Origin::Recipe(_))
        };
        let Some(spec) = wanted.spec.as_ref().filter(plain) else {
            return Ok(None);
        };
        let Some(resolved) = self.store.resolve(reference).await? else {
            return Ok(None);
        };
        let found = self.store.build(resolved.build).await?;
        let alike = |build: &Build| {
            same_size(build, wanted) && same_spec(build.spec.as_ref(), wanted.spec.as_ref())
        };
        let Some(found) = found.filter(alike) else {
            return Ok(None);
        };
        let (unheard, _) = mpsc::unbounded_channel();
        let Ok(facts) = self.fleet.origin(&spec.origin, unheard).await else {
            return Ok(None);
        };
        let ground =
            Ground::of_origin(&facts, wanted.cpu_count, wanted.memory_mib, wanted.disk_mib);
        let fingerprint = Plan::new(&ground, spec).fingerprint;
        Ok((found.fingerprint == Some(fingerprint)).then_some(found))
    }
}

fn spec_of(spec: Option<BuildSpec>) -> Result<BuildSpec> {
    spec.ok_or_else(|| Error::damaged("a build", "nobody said what it is made of"))
}

fn request_of(
    id: String,
    name: &str,
    tags: &[String],
    size: Size,
    spec: &BuildSpec,
) -> Result<RequestId> {
    if id.is_empty() || id.len() > MAX_REQUEST_ID {
        let why = format!(
            "'{}' does not have 1 to {MAX_REQUEST_ID} bytes",
            shorten(&id)
        );
        return Err(Error::invalid("requestID", why));
    }
    let size = (size.cpu_count, size.memory_mib, size.disk_mib);
    let body = serde_json::to_vec(&(name, tags, size, spec)).unwrap_or_default();
    Ok(RequestId {
        id,
        body_hash: Sha256::digest(body).into(),
    })
}

fn same_size(one: &Build, other: &Build) -> bool {
    let size = |build: &Build| (build.cpu_count, build.memory_mib, build.disk_mib);
    size(one) == size(other)
}

fn same_order(one: &Build, other: &Build) -> bool {
    same_size(one, other)
        && one.tags == other.tags
        && same_spec(one.spec.as_ref(), other.spec.as_ref())
}

/// Whether two specs ask for the same. Who asks, and whether it must not come from the cache, make
/// no difference.
fn same_spec(one: Option<&BuildSpec>, other: Option<&BuildSpec>) -> bool {
    let plain = |spec: &BuildSpec| {
        let mut spec = spec.clone();
        spec.force = false;
        if let Origin::Image { auth, .. } = &mut spec.origin {
            *auth = None;
        }
        spec
    };
    one.map(plain) == other.map(plain)
}
