//! The data plane's view of control's sandboxes.

use cubicle_control::{
    Control, Error,
    fleet::FleetError,
    lifecycle::State,
    sandbox::{PauseMode, Sandbox},
};
use cubicle_ids::SandboxId;
use cubicle_protocol::signature::SignedAccess;
use cubicle_proxy::{Availability, NotWoken, Routes, SandboxRoute, SignedFile};
use subtle::ConstantTimeEq as _;

/// Answers the proxy from control's memory.
pub(crate) struct SandboxRoutes {
    control: Control,
}

impl SandboxRoutes {
    pub(crate) fn new(control: Control) -> Self {
        Self { control }
    }
}

/// Whether requests wake this sandbox while it is paused, or about to be.
fn wakes(sandbox: &Sandbox) -> bool {
    let full = |pause: &cubicle_control::sandbox::Pause| pause.mode == PauseMode::Full;
    sandbox.lifecycle.auto_resume && sandbox.pause.as_ref().is_none_or(full)
}

#[async_trait::async_trait]
impl Routes for SandboxRoutes {
    fn lookup(&self, id: &SandboxId) -> Option<SandboxRoute> {
        let sandbox = self.control.sandboxes.get(id).ok()?;
        let availability = match sandbox.state {
            State::Running => Availability::Running,
            // Waking one of these waits until it is one thing or the other.
            State::Pausing | State::Resuming | State::Paused if wakes(&sandbox) => {
                Availability::Asleep
            }
            State::Creating | State::Pausing | State::Resuming => Availability::Busy,
            State::Paused => Availability::Away,
            State::Killing | State::Dead => return None,
        };
        Some(SandboxRoute {
            generation: sandbox.generation,
            availability,
            traffic_token: sandbox.traffic_token.clone(),
            mask_request_host: sandbox.network.mask_request_host.clone(),
        })
    }

    fn find_by_signature(&self, file: &SignedFile) -> Option<SandboxId> {
        let access = SignedAccess {
            path: &file.path,
            operation: file.operation.as_str(),
            user: file.user.as_deref().unwrap_or_default(),
            expiration: file.expiration.as_deref(),
        };
        let sandboxes = self.control.sandboxes.all();
        let signed = sandboxes.iter().find(|sandbox| {
            let expected = access.sign(&sandbox.envd_token);
            bool::from(expected.as_bytes().ct_eq(file.signature.as_bytes()))
        });
        signed.map(|sandbox| sandbox.id.clone())
    }

    async fn settled(&self, id: &SandboxId) {
        // What became of it, the next lookup says.
        let _ = self.control.sandboxes.settled(id).await;
    }

    async fn wake(&self, id: &SandboxId) -> Result<(), NotWoken> {
        match self.control.sandboxes.wake(id).await {
            Ok(_) => Ok(()),
            Err(error) => Err(match error {
                Error::SandboxNotFound { .. } | Error::Fleet(FleetError::NoSandbox { .. }) => {
                    NotWoken::Gone
                }
                Error::Busy { .. } | Error::Fleet(FleetError::Busy { .. }) => NotWoken::Busy,
                Error::Conflict { .. } | Error::Unsupported { .. } => {
                    NotWoken::Refused(error.to_string())
                }
                Error::Fleet(FleetError::Capacity { why }) => NotWoken::NoRoom(why),
                other => NotWoken::Failed(other.to_string()),
            }),
        }
    }
}
