//! What the data plane has done so far.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

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
            connections: get(&self.connections),
            upgrades: get(&self.upgrades),
            bytes_in: get(&self.bytes_in),
            bytes_out: get(&self.bytes_out),
        }
    }
}

pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Relaxed);
}
