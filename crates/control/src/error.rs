//! What can go wrong above the node.

use cubicle_ids::{SandboxId, SnapshotId};

use crate::fleet::FleetError;

/// Why a domain service refused or failed. Each message names what was attempted and on what.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No live sandbox has this id.
    #[error("Sandbox {id} was not found: it never existed, was killed, or reached its end of life")]
    SandboxNotFound {
        /// The id that was asked for.
        id: SandboxId,
    },
    /// Nothing that a sandbox could be made from has this name.
    #[error(
        "Template '{reference}' was not found: no template id, alias, name:tag or snapshot id reads like that"
    )]
    TemplateNotFound {
        /// The reference as it was given.
        reference: String,
    },
    /// The template exists, but no build of it has succeeded.
    #[error("Template '{reference}' has no finished build yet: {status}")]
    TemplateNotReady {
        /// The reference as it was given.
        reference: String,
        /// What its latest build is doing.
        status: String,
    },
    /// The template exists, this build of it does not.
    #[error("Template '{template}' has no build {build}")]
    BuildNotFound {
        /// The template as it was given.
        template: String,
        /// The build that was asked for.
        build: String,
    },
    /// Another build of this template is under way.
    #[error("Template '{template}' is being built already (build {build}); wait for it to end")]
    BuildInProgress {
        /// The template.
        template: String,
        /// The build that runs.
        build: uuid::Uuid,
    },
    /// A value makes no sense.
    #[error("{field}: {why}")]
    Invalid {
        /// The field, as the client spells it.
        field: &'static str,
        /// What is wrong with it and what would be right.
        why: String,
    },
    /// A value makes sense, but this server cannot do it.
    #[error("{what} is not supported by this server")]
    Unsupported {
        /// What was asked for.
        what: String,
    },
    /// The sandbox is in a state in which this cannot be done.
    #[error("Sandbox {id} is {state}: {why}")]
    Conflict {
        /// The sandbox.
        id: SandboxId,
        /// Its state.
        state: crate::lifecycle::State,
        /// What cannot be done.
        why: &'static str,
    },
    /// Another operation on this sandbox is under way.
    #[error("Sandbox {id} has a {doing} operation in progress; try again when it has ended")]
    Busy {
        /// The sandbox.
        id: SandboxId,
        /// What is being done, as one word.
        doing: &'static str,
    },
    /// No snapshot has this id or name.
    #[error(
        "Snapshot '{reference}' was not found: no snapshot id, name or name:tag reads like that"
    )]
    SnapshotNotFound {
        /// The reference as it was given.
        reference: String,
    },
    /// The snapshot exists, but nothing can be restored from it.
    #[error("Snapshot '{reference}' cannot be used: {why}")]
    SnapshotUnusable {
        /// The snapshot as it was asked for.
        reference: String,
        /// Why not.
        why: String,
    },
    /// A paused sandbox consists of this snapshot.
    #[error("Snapshot {id} holds the paused sandbox {sandbox}; resume or kill that first")]
    SnapshotInUse {
        /// The snapshot.
        id: SnapshotId,
        /// The sandbox.
        sandbox: SandboxId,
    },
    /// A sandbox can go back to its own past only.
    #[error(
        "Sandbox {sandbox} cannot be rolled back to {snapshot}, which is neither a snapshot of it \
         nor one that it descends from; create a sandbox from that snapshot instead"
    )]
    NotInHistory {
        /// The sandbox.
        sandbox: SandboxId,
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// The name means something else already.
    #[error("the name '{name}' belongs to a {what}; choose another")]
    NameTaken {
        /// The name.
        name: String,
        /// What has it.
        what: &'static str,
    },
    /// There are as many snapshots as this server may keep.
    #[error("the snapshot quota is used up: {why}; delete snapshots that are not needed any more")]
    Quota {
        /// What is allowed.
        why: String,
    },
    /// The idempotency key was used for another request.
    #[error("Idempotency key '{key}' was used for a different request body")]
    IdempotencyMismatch {
        /// The key.
        key: String,
    },
    /// The request that first used the idempotency key is still running.
    #[error("the first request with idempotency key '{key}' is still in progress")]
    IdempotencyInProgress {
        /// The key.
        key: String,
    },
    /// The sandbox was killed before its creation ended.
    #[error("Sandbox {id} was killed while it was being created")]
    KilledDuringCreate {
        /// The sandbox.
        id: SandboxId,
    },
    /// The snapshot behind a template is gone from the node.
    #[error(
        "the snapshot {id} behind '{reference}' is missing on the node; build the template again"
    )]
    SnapshotLost {
        /// The snapshot.
        id: SnapshotId,
        /// What the client asked for.
        reference: String,
    },
    /// No volume has this id or name.
    #[error("Volume '{reference}' was not found: no volume id or name reads like that")]
    VolumeNotFound {
        /// The reference as it was given.
        reference: String,
    },
    /// Who asks for the content of a volume has to present its token.
    #[error(
        "this is not the token of volume {volume}: it comes with `POST /volumes` and \
         `GET /volumes/{volume}`, and goes into `Authorization: Bearer`"
    )]
    VolumeToken {
        /// The volume's id.
        volume: String,
    },
    /// Something in a volume is not as it would have to be.
    #[error("/{path} in volume {volume}: {problem}")]
    VolumePath {
        /// The volume's id.
        volume: String,
        /// What was asked for.
        path: cubicle_protocol::share::RelativePath,
        /// What is wrong.
        problem: cubicle_share::Problem,
    },
    /// A sandbox has the volume mounted.
    #[error("Volume '{name}' is mounted in sandbox {sandbox}; kill that first")]
    VolumeInUse {
        /// The volume.
        name: String,
        /// One of the sandboxes.
        sandbox: SandboxId,
    },
    /// The server does not share this directory of its host.
    #[error("{} cannot be mounted: {why}", path.display())]
    HostMountRefused {
        /// The directory.
        path: std::path::PathBuf,
        /// Why not.
        why: String,
    },
    /// The directory of a volume could not be made or removed.
    #[error("cannot {doing} {}: {source}", path.display())]
    Volume {
        /// `make` or `remove`.
        doing: &'static str,
        /// The directory.
        path: std::path::PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A file that was uploaded for a build could not be kept or found.
    #[error("cannot {doing} {}: {source}", path.display())]
    Files {
        /// What was attempted.
        doing: &'static str,
        /// The file.
        path: std::path::PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// What a step of a template ran did not succeed.
    #[error("{why}")]
    StepFailed {
        /// How it ended, and the last that it printed.
        why: String,
    },
    /// Sandboxes of the template run.
    #[error("Template '{template}' is used by sandbox {sandbox}; kill that first")]
    TemplateInUse {
        /// The template as it was given.
        template: String,
        /// One of its sandboxes.
        sandbox: SandboxId,
    },
    /// The template store has nothing of this name.
    #[error("the template store has no template '{name}'")]
    NotInStore {
        /// The name that was asked for.
        name: String,
    },
    /// The catalogue of the template store cannot be used.
    #[error("cannot read the catalogue of the template store from {from}: {why}")]
    Catalogue {
        /// Where it should come from.
        from: String,
        /// What is wrong with it.
        why: String,
    },
    /// The node failed or refused.
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// The database failed.
    #[error("cannot {doing} in the database: {source}")]
    Database {
        /// What was attempted.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: sqlx::Error,
    },
    /// The database's schema could not be brought up to date.
    #[error("cannot bring the schema of {path} up to date: {source}")]
    Migrate {
        /// The database file.
        path: std::path::PathBuf,
        /// Why it failed.
        #[source]
        source: sqlx::migrate::MigrateError,
    },
    /// A row of the database cannot be understood.
    #[error("the database row of {what} is damaged: {why}")]
    Damaged {
        /// Which row.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// The server is stopping.
    #[error("the server is shutting down")]
    ShuttingDown,
}

impl Error {
    /// For `map_err` on work with an uploaded file: says what was attempted.
    pub(crate) fn io(
        doing: &'static str,
        path: impl Into<std::path::PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Files {
            doing,
            path,
            source,
        }
    }

    /// For `map_err` on a query: says what was attempted.
    pub(crate) fn database(doing: &'static str) -> impl FnOnce(sqlx::Error) -> Self {
        move |source| Self::Database { doing, source }
    }

    pub(crate) fn invalid(field: &'static str, why: impl Into<String>) -> Self {
        Self::Invalid {
            field,
            why: why.into(),
        }
    }

    pub(crate) fn damaged(what: impl Into<String>, why: impl ToString) -> Self {
        Self::Damaged {
            what: what.into(),
            why: why.to_string(),
        }
    }
}

/// Result of a domain service.
pub type Result<T, E = Error> = std::result::Result<T, E>;
