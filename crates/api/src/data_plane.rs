//! The data plane's counters, for Prometheus.

use cubicle_proxy::{MetricsSnapshot, Proxy};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

/// For [`AppState::new`](crate::AppState::new): adds what this proxy has done to `/metrics`.
pub fn proxy_metrics(proxy: Proxy) -> impl FnOnce(&mut Registry) {
    move |registry| registry.register_collector(Box::new(DataPlane(proxy)))
}

struct DataPlane(Proxy);

impl std::fmt::Debug for DataPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DataPlane")
    }
}

impl Collector for DataPlane {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        encode(self.0.metrics().snapshot(), encoder)
    }
}

fn encode(now: MetricsSnapshot, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
    let gauge = ConstGauge::new(i64::try_from(now.active).unwrap_or(i64::MAX));
    let kind = prometheus_client::metrics::MetricType::Gauge;
    let help = "Requests into sandboxes whose response is not complete yet";
    gauge.encode(encoder.encode_descriptor("proxy_active_requests", help, None, kind)?)?;

    let mut family = |name, help, label: &str, values: &[(&str, u64)]| {
        let kind = prometheus_client::metrics::MetricType::Counter;
        let mut family = encoder.encode_descriptor(name, help, None, kind)?;
        values.iter().try_for_each(|(value, count)| {
            ConstCounter::new(*count).encode(family.encode_family(&[(label, *value)])?)
        })
    };
    family(
        "proxy_requests",
        "Requests into sandboxes, by how they name theirs",
        "via",
        &[
            ("headers", now.via_headers),
            ("host", now.via_host),
            ("path", now.via_path),
            ("signature", now.via_signature),
        ],
    )?;
    family(
        "proxy_failures",
        "Requests into sandboxes that did not end well",
        "reason",
        &[
            ("refused", now.refused),
            ("not_found", now.not_found),
            ("port_closed", now.port_closed),
            ("forbidden", now.forbidden),
            ("unreachable", now.unreachable),
            ("broken_off", now.broken_off),
        ],
    )?;
    family(
        "proxy_body_bytes",
        "Bytes of bodies",
        "direction",
        &[("in", now.bytes_in), ("out", now.bytes_out)],
    )?;
    family(
        "proxy_connections",
        "Connections to ports of sandboxes",
        "kind",
        &[
            ("opened", now.connections),
            ("upgraded", now.upgrades),
            ("retried", now.retried),
        ],
    )
}
