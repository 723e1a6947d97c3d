//! What the control plane counts: everything that freezes or restores a sandbox.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};

use crate::{fleet::SnapshotTaken, sandbox::operation::Operation};

/// Bounds of histograms of durations, in seconds: from the shortest freeze to a slow cold boot.
const SECONDS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0,
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct What {
    operation: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WhatAndHow {
    operation: &'static str,
    /// `done` or `failed`.
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Tier {
    /// What the snapshot was taken for.
    operation: &'static str,
    tier: &'static str,
}

/// Makes histograms of durations.
#[derive(Debug, Clone)]
struct Durations;

impl MetricConstructor<Histogram> for Durations {
    fn new_metric(&self) -> Histogram {
        Histogram::new(SECONDS)
    }
}

/// Counters and histograms of the control plane.
#[derive(Debug)]
pub struct Metrics {
    operations: Family<WhatAndHow, Counter>,
    seconds: Family<What, Histogram, Durations>,
    freezes: Family<Tier, Counter>,
    freeze_seconds: Family<Tier, Histogram, Durations>,
    scanned: Family<Tier, Counter>,
    dirty: Family<Tier, Counter>,
    written: Family<Tier, Counter>,
    children: Family<Outcome, Counter>,
    auto_pauses: Family<Outcome, Counter>,
    wakes: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    /// `done` or `failed`.
    outcome: &'static str,
}

impl Outcome {
    fn of(done: bool) -> Self {
        Self {
            outcome: word(done),
        }
    }
}

const fn word(done: bool) -> &'static str {
    if done { "done" } else { "failed" }
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            operations: Family::default(),
            seconds: Family::new_with_constructor(Durations),
            freezes: Family::default(),
            freeze_seconds: Family::new_with_constructor(Durations),
            scanned: Family::default(),
            dirty: Family::default(),
            written: Family::default(),
            children: Family::default(),
            auto_pauses: Family::default(),
            wakes: Counter::default(),
        }
    }
}

impl Metrics {
    /// Puts all of them into a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "sandbox_operations",
            "Snapshots, pauses, resumes, rollbacks and forks that ended",
            self.operations.clone(),
        );
        registry.register_with_unit(
            "sandbox_operation_duration",
            "Time that each of them took if it succeeded",
            Unit::Seconds,
            self.seconds.clone(),
        );
        registry.register(
            "freezes",
            "Sandboxes frozen, by what for and by how their memory was found",
            self.freezes.clone(),
        );
        registry.register_with_unit(
            "freeze_duration",
            "Time that a guest stood still",
            Unit::Seconds,
            self.freeze_seconds.clone(),
        );
        registry.register_with_unit(
            "freeze_scanned",
            "Memory looked at for changes",
            Unit::Bytes,
            self.scanned.clone(),
        );
        registry.register_with_unit(
            "freeze_dirty",
            "Memory that had changed",
            Unit::Bytes,
            self.dirty.clone(),
        );
        registry.register_with_unit(
            "freeze_written",
            "Written to the store by freezes",
            Unit::Bytes,
            self.written.clone(),
        );
        registry.register(
            "fork_children",
            "Copies that forks were to make",
            self.children.clone(),
        );
        registry.register(
            "auto_pauses",
            "Attempts to pause a sandbox because its time was up",
            self.auto_pauses.clone(),
        );
        registry.register(
            "wakes",
            "Sandboxes that traffic has woken",
            self.wakes.clone(),
        );
    }

    pub(crate) fn ended(&self, operation: Operation, done: bool, took: Duration) {
        let operation = operation.as_str();
        let outcome = word(done);
        self.operations
            .get_or_create(&WhatAndHow { operation, outcome })
            .inc();
        if done {
            self.seconds
                .get_or_create(&What { operation })
                .observe(took.as_secs_f64());
        }
    }

    pub(crate) fn frozen(&self, operation: Operation, taken: &SnapshotTaken) {
        let labels = Tier {
            operation: operation.as_str(),
            tier: taken.tier,
        };
        self.freezes.get_or_create(&labels).inc();
        self.freeze_seconds
            .get_or_create(&labels)
            .observe(taken.frozen.as_secs_f64());
        self.scanned
            .get_or_create(&labels)
            .inc_by(taken.bytes_scanned);
        self.dirty.get_or_create(&labels).inc_by(taken.bytes_dirty);
        self.written
            .get_or_create(&labels)
            .inc_by(taken.bytes_written);
    }

    pub(crate) fn child(&self, done: bool) {
        self.children.get_or_create(&Outcome::of(done)).inc();
    }

    pub(crate) fn auto_paused(&self, done: bool) {
        self.auto_pauses.get_or_create(&Outcome::of(done)).inc();
    }

    pub(crate) fn woken(&self) {
        self.wakes.inc();
    }
}
