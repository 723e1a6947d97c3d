//! What the data plane has done so far.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

use crate::route::Via;

/// Counters of one [`crate::Proxy`]; they only ever grow, but for `active`.
#[derive(Debug, Default)]
pub struct Metrics {
    pub(crate) active: AtomicU64,
    via: [AtomicU64; 4],
    pub(crate) refused: AtomicU64,
    pub(crate) not_found: AtomicU64,
    pub(crate) port_closed: AtomicU64,
    pub(crate) forbidden: AtomicU64,
    pub(crate) unreachable: AtomicU64,
    pub(crate) broken_off: AtomicU64,
    pub(crate) retried: AtomicU64,
    pub(crate) interrupted: AtomicU64,
    pub(crate) woken: AtomicU64,
    pub(crate) not_woken: AtomicU64,
    pub(crate) connections: AtomicU64,
    pub(crate) upgrades: AtomicU64,
    pub(crate) bytes_in: AtomicU64,
    pub(crate) bytes_out: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MetricsSnapshot {
    /// Requests whose response is not complete yet.
    pub active: u64,
    /// Requests that named their sandbox by headers.
    pub via_headers: u64,
    /// Requests that named their sandbox by host.
    pub via_host: u64,
    /// Requests that named their sandbox by path.
    pub via_path: u64,
    /// Requests of signed URLs without a sandbox.
    pub via_signature: u64,
    /// Requests that named no sandbox, or a call of the guest daemon that is not public.
    pub refused: u64,
    /// Requests to sandboxes that are not there.
    pub not_found: u64,
    /// Requests to ports that nothing listens on.
    pub port_closed: u64,
    /// Requests without the traffic token that they need.
    pub forbidden: u64,
    /// Requests to sandboxes that did not answer.
    pub unreachable: u64,
    /// Responses that the sandbox did not complete.
    pub broken_off: u64,
    /// Requests that were sent a second time.
    pub retried: u64,
    /// Requests that a rollback or a resume came between, and that were not sent again.
    pub interrupted: u64,
    /// Requests that woke a paused sandbox, or waited for another one to do so.
    pub woken: u64,
    /// Requests that were to wake a paused sandbox and did not.
    pub not_woken: u64,
    /// Connections that were opened to ports of sandboxes.
    pub connections: u64,
    /// Connections that were handed over to another protocol, such as WebSocket.
    pub upgrades: u64,
    /// Bytes of bodies towards sandboxes.
    pub bytes_in: u64,
    /// Bytes of bodies from sandboxes.
    pub bytes_out: u64,
}

impl Metrics {
    pub(crate) fn routed(&self, via: Via) {
        add(&self.via[via as usize], 1);
    }

    /// Reads all counters.
    #[must_use]
    pub fn snapshot(&self) -> MetricsSnapshot {
        let get = |counter: &AtomicU64| counter.load(Relaxed);
        let via = |via: Via| get(&self.via[via as usize]);
        MetricsSnapshot {
            active: get(&self.active),
            via_headers: via(Via::Headers),
            via_host: via(Via::Host),
            via_path: via(Via::Path),
            via_signature: via(Via::Signature),
            refused: get(&self.refused),
            not_found: get(&self.not_found),
            port_closed: get(&self.port_closed),
            forbidden: get(&self.forbidden),
            unreachable: get(&self.unreachable),
            broken_off: get(&self.broken_off),
            retried: get(&self.retried),
            interrupted: get(&self.interrupted),
            woken: get(&self.woken),
            not_woken: get(&self.not_woken),
            connections: get(&self.connections),
            upgrades: get(&self.upgrades),
            bytes_in: get(&self.bytes_in),
            bytes_out: get(&self.bytes_out),
        }
    }
}

/// Names as in Prometheus, to stand below the registry's prefix.
impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let now = self.snapshot();
        let active = ConstGauge::new(i64::try_from(now.active).unwrap_or(i64::MAX));
        let help = "Data-plane requests whose response is not complete yet";
        active.encode(encoder.encode_descriptor(
            "proxy_active_requests",
            help,
            None,
            active.metric_type(),
        )?)?;
        let mut counters = |name, help, unit: Option<&Unit>, label, rows: &[(&str, u64)]| {
            let kind = ConstCounter::new(0_u64).metric_type();
            let mut metric = encoder.encode_descriptor(name, help, unit, kind)?;
            rows.iter().try_for_each(|(value, count)| {
                ConstCounter::new(*count).encode(metric.encode_family(&[(label, *value)])?)
            })
        };
        counters(
            "proxy_requests",
            "Data-plane requests, by how they named their sandbox",
            None,
            "via",
            &[
                ("headers", now.via_headers),
                ("host", now.via_host),
                ("path", now.via_path),
                ("signature", now.via_signature),
            ],
        )?;
        counters(
            "proxy_failures",
            "Data-plane requests that did not get a whole answer from a sandbox, by reason",
            None,
            "reason",
            &[
                ("refused", now.refused),
                ("not_found", now.not_found),
                ("port_closed", now.port_closed),
                ("forbidden", now.forbidden),
                ("unreachable", now.unreachable),
                ("broken_off", now.broken_off),
                ("interrupted", now.interrupted),
                ("not_woken", now.not_woken),
            ],
        )?;
        counters(
            "proxy_wakes",
            "Data-plane requests that found a paused sandbox which requests wake, by outcome",
            None,
            "outcome",
            &[("woken", now.woken), ("failed", now.not_woken)],
        )?;
        counters(
            "proxy_connections",
            "Connections to ports of sandboxes: opened, sent to again, handed to another protocol",
            None,
            "event",
            &[
                ("opened", now.connections),
                ("retried", now.retried),
                ("upgraded", now.upgrades),
            ],
        )?;
        counters(
            "proxy_bodies",
            "Bytes of bodies, by direction as a sandbox sees it",
            Some(&Unit::Bytes),
            "direction",
            &[("in", now.bytes_in), ("out", now.bytes_out)],
        )
    }
}

pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Relaxed);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use prometheus_client::{encoding::text, registry::Registry};

    use super::*;

    #[test]
    fn every_counter_is_exported() {
        let metrics = Arc::new(Metrics::default());
        let counters = [
            &metrics.active,
            &metrics.refused,
            &metrics.not_found,
            &metrics.port_closed,
            &metrics.forbidden,
            &metrics.unreachable,
            &metrics.broken_off,
            &metrics.retried,
            &metrics.interrupted,
            &metrics.woken,
            &metrics.not_woken,
            &metrics.connections,
            &metrics.upgrades,
            &metrics.bytes_in,
            &metrics.bytes_out,
        ];
        for (value, counter) in (100..).zip(counters) {
            add(counter, value);
        }
        for _ in 0..115 {
            metrics.routed(Via::Host);
        }
        let mut registry = Registry::with_prefix("cubicle");
        registry.register_collector(Box::new(Arc::clone(&metrics)));
        let mut out = String::new();
        text::encode(&mut out, &registry).unwrap();
        for value in 100..=115 {
            assert!(
                out.lines().any(|line| line.ends_with(&format!(" {value}"))),
                "{value}: {out}"
            );
        }
        assert!(
            out.contains("cubicle_proxy_requests_total{via=\"host\"} 115\n"),
            "{out}"
        );
        assert!(
            out.contains("cubicle_proxy_bodies_bytes_total{direction=\"in\"} 113\n"),
            "{out}"
        );
    }
}
