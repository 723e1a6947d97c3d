//! What the proxy has to know about sandboxes, and asks the control plane for.

use cubicle_ids::SandboxId;

use crate::route::SignedFile;

/// Whether requests can reach a sandbox now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Availability {
    /// It runs.
    Running,
    /// It is on its way between two states, and will be in one of them in a moment.
    Busy,
    /// It is paused, and a request wakes it.
    Asleep,
    /// There is nothing to send a request to, for example because it is paused for good.
    Away,
}

/// Why a sandbox did not wake up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotWoken {
    /// There is no such sandbox (any more).
    #[error("the sandbox is gone")]
    Gone,
    /// Requests may not wake it.
    #[error("requests do not wake the sandbox: {0}")]
    Refused(String),
    /// Something else is being done to it; a client may try again.
    #[error("the sandbox is changing its state")]
    Busy,
    /// No machine has room for it now; a client may try again.
    #[error("there is no room for the sandbox: {0}")]
    NoRoom(String),
    /// It was tried and did not work.
    #[error("the sandbox could not be resumed: {0}")]
    Failed(String),
}

/// What the proxy has to know about one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxRoute {
    /// The life it is in. Connections are not reused across generations.
    pub generation: u64,
    /// Whether requests can reach it now.
    pub availability: Availability,
    /// What requests to its ports, other than the guest daemon's, must present; `None` if they are
    /// public. The guest daemon checks its own token.
    pub traffic_token: Option<String>,
    /// What its servers are told as `Host` in place of what the client sent; `${PORT}` stands for
    /// the port.
    pub mask_request_host: Option<String>,
}

/// What a signed URL allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileOperation {
    /// Downloading.
    Read,
    /// Uploading.
    Write,
}

impl FileOperation {
    /// The word that is signed.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// The routing table. Asked for every request, so it answers from memory.
#[async_trait::async_trait]
pub trait Routes: Send + Sync + 'static {
    /// The sandbox, if there is one for the outside.
    fn lookup(&self, id: &SandboxId) -> Option<SandboxRoute>;

    /// The sandbox whose token made this signature.
    fn find_by_signature(&self, file: &SignedFile) -> Option<SandboxId>;

    /// Returns once a sandbox is not [`Availability::Busy`] any more.
    async fn settled(&self, _id: &SandboxId) {}

    /// Resumes a sandbox that is [`Availability::Asleep`]; returns once it runs. Many requests may
    /// ask at the same time.
    ///
    /// # Errors
    /// [`NotWoken`] if it does not run.
    async fn wake(&self, id: &SandboxId) -> Result<(), NotWoken> {
        Err(NotWoken::Refused(format!("sandbox {id} stays paused")))
    }
}
