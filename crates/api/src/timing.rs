//! How long an operation took and what it cost, in the headers of its answer.

use std::{fmt::Write as _, time::Duration};

use axum::response::Response;
use cubicle_control::fleet::{Phase, SnapshotTaken};
use http::{HeaderName, HeaderValue};

/// Names of the headers that say what freezing a sandbox came to, in the order in which
/// [`cost`] fills them.
pub(crate) const COST: [&str; 5] = [
    "cubicle-tier",
    "cubicle-bytes-scanned",
    "cubicle-bytes-dirty",
    "cubicle-bytes-written",
    "cubicle-frozen-ms",
];

/// Adds the phases of an operation and their total to its answer.
pub(crate) fn add(response: &mut Response, phases: &[Phase], total: Duration) {
    let total = Phase {
        name: "total",
        took: total,
    };
    if let Ok(timing) = server_timing(phases.iter().chain([&total])) {
        response.headers_mut().insert("server-timing", timing);
    }
}

/// Adds what freezing a sandbox came to.
pub(crate) fn cost(response: &mut Response, taken: &SnapshotTaken) {
    let values = [
        taken.tier.to_owned(),
        taken.bytes_scanned.to_string(),
        taken.bytes_dirty.to_string(),
        taken.bytes_written.to_string(),
        format!("{:.3}", millis(taken.frozen)),
    ];
    for (name, value) in COST.into_iter().zip(values) {
        if let Ok(value) = HeaderValue::try_from(value) {
            let name = HeaderName::from_static(name);
            response.headers_mut().insert(name, value);
        }
    }
}

/// A duration in milliseconds.
pub(crate) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The W3C's `Server-Timing`, in milliseconds.
fn server_timing<'a>(
    phases: impl Iterator<Item = &'a Phase>,
) -> Result<HeaderValue, http::header::InvalidHeaderValue> {
    let mut text = String::new();
    for phase in phases {
        let gap = if text.is_empty() { "" } else { ", " };
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "{gap}{};dur={:.3}",
            phase.name,
            phase.took.as_secs_f64() * 1e3
        );
    }
    HeaderValue::try_from(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_become_server_timing() {
        let phases = [
            Phase {
                name: "slot",
                took: Duration::from_micros(400),
            },
            Phase {
                name: "total",
                took: Duration::from_millis(31),
            },
        ];
        let header = server_timing(phases.iter()).expect("header");
        assert_eq!(header, "slot;dur=0.400, total;dur=31.000");
    }
}
