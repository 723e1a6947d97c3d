//! What the proxy has to know about sandboxes, and asks the control plane for.

use cubicle_ids::SandboxId;

use crate::route::SignedFile;

/// Whether requests can reach a sandbox now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Availability {
    /// It runs.
    Running,
    /// It is on its way between two states; a client may try again.
    Busy,
    /// There is nothing to send a request to, for example because it is paused.
    Away,
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
pub trait Routes: Send + Sync + 'static {
    /// The sandbox, if there is one for the outside.
    fn lookup(&self, id: &SandboxId) -> Option<SandboxRoute>;

    /// The running sandbox whose token made this signature.
    fn find_by_signature(&self, file: &SignedFile) -> Option<SandboxId>;
}
