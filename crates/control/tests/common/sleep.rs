//! What tests of sandboxes that sleep share.

use std::time::Duration;

use cubicle_control::{
    Error,
    lifecycle::State,
    sandbox::{CreateSandbox, LifecycleOptions, Lifetime, PauseSandbox, ResumeSandbox, Sandbox},
};
use time::OffsetDateTime;

use super::request;

pub const MINUTE: Lifetime = Lifetime::For(Duration::from_secs(60));
pub const HOUR: Lifetime = Lifetime::For(Duration::from_secs(3600));
pub const FULL: PauseSandbox = PauseSandbox {
    memory: true,
    require_healthy: false,
};
pub const FILESYSTEM: PauseSandbox = PauseSandbox {
    memory: false,
    require_healthy: false,
};

pub fn resume_for(lifetime: Lifetime) -> ResumeSandbox {
    ResumeSandbox {
        lifetime,
        auto_pause: None,
    }
}

pub fn sleepy(lifetime: Duration, lifecycle: LifecycleOptions) -> CreateSandbox {
    CreateSandbox {
        lifetime: Lifetime::For(lifetime),
        lifecycle,
        ..request("base")
    }
}

pub const AUTO_PAUSE: LifecycleOptions = LifecycleOptions {
    auto_pause: true,
    auto_pause_memory: true,
    auto_resume: false,
};

pub fn left(sandbox: &Sandbox) -> time::Duration {
    sandbox.end_at.expect("an end") - OffsetDateTime::now_utc()
}

pub fn is_gone<T: std::fmt::Debug>(result: Result<T, Error>) {
    assert!(
        matches!(result, Err(Error::SandboxNotFound { .. })),
        "{result:?}"
    );
}

pub fn is_conflict<T: std::fmt::Debug>(result: Result<T, Error>, found: State) {
    assert!(
        matches!(result, Err(Error::Conflict { state, .. }) if state == found),
        "{result:?}"
    );
}
