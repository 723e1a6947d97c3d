//! Which accelerator can run the guest kernel on this host.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What runs guest instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accelerator {
    /// The processor, by hardware virtualisation: fast, and a security boundary.
    Kvm,
    /// Software emulation: works everywhere; for development, tests and trusted code.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}
