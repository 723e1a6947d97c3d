//! What is done to sandboxes that exist, and what freezing them costs.

use std::time::Duration;

use cubicle_control::{
    fleet::{Phase, SnapshotTaken},
    snapshot,
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
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
struct Ended {
    operation: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    operation: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Step {
    operation: &'static str,
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Tier {
    operation: &'static str,
    tier: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Memory {
    operation: &'static str,
    what: &'static str,
}

/// Metrics of operations. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Operations {
    ended: Family<Ended, Counter>,
    seconds: Histograms<Kind>,
    phase_seconds: Histograms<Step>,
    freezes: Family<Tier, Counter>,
    freeze_seconds: Histograms<Kind>,
    freeze_bytes: Family<Memory, Counter>,
    snapshots: Gauge,
    own_bytes: Gauge,
    logical_bytes: Gauge,
}

impl Default for Operations {
    fn default() -> Self {
        Self {
            ended: Family::default(),
            seconds: Family::new_with_constructor(Durations),
            phase_seconds: Family::new_with_constructor(Durations),
            freezes: Family::default(),
            freeze_seconds: Family::new_with_constructor(Durations),
            freeze_bytes: Family::default(),
            snapshots: Gauge::default(),
            own_bytes: Gauge::default(),
            logical_bytes: Gauge::default(),
        }
    }
}

impl Operations {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "sandbox_operations",
            "Snapshots, pauses, resumes, forks and rollbacks that clients asked for, by outcome",
            self.ended.clone(),
        );
        registry.register_with_unit(
            "sandbox_operation_duration",
            "Time from such a request until it was done",
            Unit::Seconds,
            self.seconds.clone(),
        );
        registry.register_with_unit(
            "sandbox_operation_phase_duration",
            "Time of each phase of one; phases may overlap",
            Unit::Seconds,
            self.phase_seconds.clone(),
        );
        registry.register(
            "sandbox_freezes",
            "Sandboxes frozen, by how their memory was found",
            self.freezes.clone(),
        );
        registry.register_with_unit(
            "sandbox_freeze_duration",
            "Time for which a sandbox stood still",
            Unit::Seconds,
            self.freeze_seconds.clone(),
        );
        registry.register_with_unit(
            "sandbox_freeze",
            "Memory of frozen sandboxes: looked at, found changed, written",
            Unit::Bytes,
            self.freeze_bytes.clone(),
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

    pub(super) fn count(&self, operation: Operation, worked: bool, took: Duration) {
        let operation = operation.as_str();
        let outcome = if worked { "done" } else { "failed" };
        self.ended
            .get_or_create(&Ended { operation, outcome })
            .inc();
        if worked {
            self.seconds
                .get_or_create(&Kind { operation })
                .observe(took.as_secs_f64());
        }
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

    pub(super) fn freeze(&self, operation: Operation, taken: &SnapshotTaken) {
        let operation = operation.as_str();
        let tier = Tier {
            operation,
            tier: taken.tier,
        };
        self.freezes.get_or_create(&tier).inc();
        self.freeze_seconds
            .get_or_create(&Kind { operation })
            .observe(taken.frozen.as_secs_f64());
        for (what, bytes) in [
            ("scanned", taken.bytes_scanned),
            ("dirty", taken.bytes_dirty),
            ("written", taken.bytes_written),
        ] {
            self.freeze_bytes
                .get_or_create(&Memory { operation, what })
                .inc_by(bytes);
        }
    }

    pub(super) fn usage(&self, usage: &snapshot::SnapshotUsage) {
        self.snapshots.set(signed(usage.count));
        self.own_bytes.set(signed(usage.own_bytes));
        self.logical_bytes.set(signed(usage.logical_bytes));
    }
}
