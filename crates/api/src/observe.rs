//! What Prometheus is told.

mod operations;

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use cubicle_control::{Control, fleet::Phase};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        gauge::Gauge,
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};

pub(crate) use self::operations::Operation;
use self::operations::Operations;

/// Bounds of histograms of durations, in seconds: from a restore's fastest phase to a cold boot.
const SECONDS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0,
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    method: String,
    /// The route's template, so that ids make no labels.
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Route {
    method: String,
    route: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseName {
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Node {
    node: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Spares {
    node: String,
    kind: &'static str,
}

/// Makes histograms of durations.
#[derive(Debug, Clone)]
struct Durations;

impl MetricConstructor<Histogram> for Durations {
    fn new_metric(&self) -> Histogram {
        Histogram::new(SECONDS)
    }
}

type Histograms<L> = Family<L, Histogram, Durations>;
type Fraction = Gauge<f64, AtomicU64>;

/// Every metric of the server. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    registry: Arc<Registry>,
    requests: Family<Request, Counter>,
    request_seconds: Histograms<Route>,
    creates: Family<Outcome, Counter>,
    create_seconds: Histogram,
    phase_seconds: Histograms<PhaseName>,
    operations: Operations,
    sandboxes: Family<State, Gauge>,
    slots: Family<Node, Gauge>,
    slots_used: Family<Node, Gauge>,
    slots_ready: Family<Node, Gauge>,
    spares: Family<Spares, Gauge>,
    spares_memory: Family<Node, Gauge>,
    cpus_used: Family<Node, Fraction>,
    memory_used: Family<Node, Gauge>,
}

impl Metrics {
    /// The server's own metrics, those of the control plane, and whatever `more` registers beside
    /// them.
    pub(crate) fn new(control: &Control, more: impl FnOnce(&mut Registry)) -> Self {
        let mut registry = Registry::with_prefix("cubicle");
        let mut metrics = Self {
            registry: Arc::default(),
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(Durations),
            creates: Family::default(),
            create_seconds: Durations.new_metric(),
            phase_seconds: Family::new_with_constructor(Durations),
            operations: Operations::default(),
            sandboxes: Family::default(),
            slots: Family::default(),
            slots_used: Family::default(),
            slots_ready: Family::default(),
            spares: Family::default(),
            spares_memory: Family::default(),
            cpus_used: Family::default(),
            memory_used: Family::default(),
        };
        let m = &metrics;
        registry.register(
            "http_requests",
            "Control-plane requests answered",
            m.requests.clone(),
        );
        registry.register_with_unit(
            "http_request_duration",
            "Time from a control-plane request to its answer's head",
            Unit::Seconds,
            m.request_seconds.clone(),
        );
        registry.register("sandbox_creates", "Create requests", m.creates.clone());
        registry.register_with_unit(
            "sandbox_create_duration",
            "Time from a create request to a sandbox that answers",
            Unit::Seconds,
            m.create_seconds.clone(),
        );
        registry.register_with_unit(
            "sandbox_create_phase_duration",
            "Time of each phase of a create; phases may overlap",
            Unit::Seconds,
            m.phase_seconds.clone(),
        );
        m.operations.register(&mut registry);
        registry.register("sandboxes", "Sandboxes by state", m.sandboxes.clone());
        registry.register(
            "node_sandbox_limit",
            "Sandboxes that a node can hold",
            m.slots.clone(),
        );
        registry.register(
            "node_sandboxes",
            "Sandboxes on a node",
            m.slots_used.clone(),
        );
        registry.register(
            "node_slots_ready",
            "Network slots that wait ready-made",
            m.slots_ready.clone(),
        );
        registry.register(
            "node_spares",
            "VMs that wait for sandboxes: restored ahead, or of sandboxes that were just paused",
            m.spares.clone(),
        );
        registry.register_with_unit(
            "node_spares_memory",
            "Memory of VMs that wait for sandboxes",
            Unit::Bytes,
            m.spares_memory.clone(),
        );
        registry.register(
            "node_cpus_promised",
            "CPUs promised to sandboxes",
            m.cpus_used.clone(),
        );
        registry.register_with_unit(
            "node_memory_promised",
            "Memory promised to sandboxes",
            Unit::Bytes,
            m.memory_used.clone(),
        );
        control.metrics.register(&mut registry);
        more(&mut registry);
        metrics.registry = Arc::new(registry);
        metrics
    }

    /// Counts an answer.
    pub(crate) fn request(&self, method: &str, route: &str, status: u16, took: Duration) {
        let (method, route) = (method.to_owned(), route.to_owned());
        let seconds = took.as_secs_f64();
        let labels = Route {
            method: method.clone(),
            route: route.clone(),
        };
        self.request_seconds.get_or_create(&labels).observe(seconds);
        self.requests
            .get_or_create(&Request {
                method,
                route,
                status,
            })
            .inc();
    }

    /// Counts a create.
    pub(crate) fn create(&self, outcome: &'static str, phases: &[Phase], took: Duration) {
        self.creates.get_or_create(&Outcome { outcome }).inc();
        if outcome == "created" {
            self.create_seconds.observe(took.as_secs_f64());
        }
        for phase in phases {
            let histogram = self
                .phase_seconds
                .get_or_create(&PhaseName { phase: phase.name });
            histogram.observe(phase.took.as_secs_f64());
        }
    }

    /// Counts the steps of an operation.
    pub(crate) fn phases(&self, operation: Operation, phases: &[Phase]) {
        self.operations.phases(operation, phases);
    }

    /// Everything, in the text format of OpenMetrics.
    pub(crate) async fn render(&self, control: &Control) -> Result<String, std::fmt::Error> {
        for (state, count) in control.sandboxes.counts() {
            self.sandboxes
                .get_or_create(&State { state })
                .set(signed(count as u64));
        }
        match control.snapshots.usage().await {
            Ok(usage) => self.operations.usage(&usage),
            Err(error) => tracing::warn!(%error, "the store does not say what snapshots take"),
        }
        match control.fleet.machines().await {
            Ok(machines) => {
                for machine in machines {
                    let node = Node { node: machine.id };
                    self.slots.get_or_create(&node).set(machine.slots.into());
                    self.slots_used
                        .get_or_create(&node)
                        .set(machine.slots_used.into());
                    self.slots_ready
                        .get_or_create(&node)
                        .set(machine.slots_ready.into());
                    for (kind, count) in [
                        ("restored", machine.spares),
                        ("paused", machine.spares_asleep),
                    ] {
                        let spares = Spares {
                            node: node.node.clone(),
                            kind,
                        };
                        self.spares.get_or_create(&spares).set(count.into());
                    }
                    self.spares_memory
                        .get_or_create(&node)
                        .set(signed(machine.spares_bytes));
                    let cpus = machine.cpu_milli_used as f64 / 1e3;
                    self.cpus_used.get_or_create(&node).set(cpus);
                    let bytes = machine.memory_mib_used.saturating_mul(1 << 20);
                    self.memory_used.get_or_create(&node).set(signed(bytes));
                }
            }
            Err(error) => tracing::warn!(%error, "the machines do not say how full they are"),
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
