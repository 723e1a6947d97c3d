//! How long each step of an operation took, and what snapshots take. The operations themselves are
//! counted by the control plane, which also does some that nobody asked for.

use cubicle_control::{fleet::Phase, snapshot::SnapshotUsage};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

use super::{Durations, Histograms, signed};

/// An operation on a sandbox that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Snapshot,
    Pause,
    Resume,
    Fork,
    Rollback,
}

impl Operation {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Fork => "fork",
            Self::Rollback => "rollback",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Step {
    operation: &'static str,
    phase: &'static str,
}

/// Metrics of operations. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Operations {
    phase_seconds: Histograms<Step>,
    snapshots: Gauge,
    own_bytes: Gauge,
    logical_bytes: Gauge,
}

impl Default for Operations {
    fn default() -> Self {
        Self {
            phase_seconds: Family::new_with_constructor(Durations),
            snapshots: Gauge::default(),
            own_bytes: Gauge::default(),
            logical_bytes: Gauge::default(),
        }
    }
}

impl Operations {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "sandbox_operation_phase_duration",
            "Time of each phase of a snapshot, pause, resume, fork or rollback; phases may overlap",
            Unit::Seconds,
            self.phase_seconds.clone(),
        );
        registry.register("snapshots", "Snapshots of users", self.snapshots.clone());
        registry.register_with_unit(
            "snapshots_own",
            "What deleting each snapshot would free, added up",
            Unit::Bytes,
            self.own_bytes.clone(),
        );
        registry.register_with_unit(
            "snapshots_logical",
            "What all snapshots hold, holes included",
            Unit::Bytes,
            self.logical_bytes.clone(),
        );
    }

    pub(super) fn phases(&self, operation: Operation, phases: &[Phase]) {
        for phase in phases {
            let step = Step {
                operation: operation.as_str(),
                phase: phase.name,
            };
            self.phase_seconds
                .get_or_create(&step)
                .observe(phase.took.as_secs_f64());
        }
    }

    pub(super) fn usage(&self, usage: &SnapshotUsage) {
        self.snapshots.set(signed(usage.count));
        self.own_bytes.set(signed(usage.own_bytes));
        self.logical_bytes.set(signed(usage.logical_bytes));
    }
}
