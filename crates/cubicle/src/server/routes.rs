//! The data plane's view of control's sandboxes.

use cubicle_control::{Control, lifecycle::State};
use cubicle_ids::SandboxId;
use cubicle_protocol::signature::SignedAccess;
use cubicle_proxy::{Availability, Routes, SandboxRoute, SignedFile};
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

impl Routes for SandboxRoutes {
    fn lookup(&self, id: &SandboxId) -> Option<SandboxRoute> {
        let sandbox = self.control.sandboxes.get(id).ok()?;
        let availability = match sandbox.state {
            State::Running => Availability::Running,
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
}
