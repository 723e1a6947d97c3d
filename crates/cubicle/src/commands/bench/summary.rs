//! What a set of measured values comes down to.

use std::time::Instant;

use serde::{Deserialize, Serialize};

/// Percentiles of a set, in its own unit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) n: usize,
    pub(crate) p50: f64,
    pub(crate) p95: f64,
    pub(crate) max: f64,
}

impl Summary {
    /// None of an empty set.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let last = values.len().checked_sub(1)?;
        // The smallest value that at least this share of the set does not exceed.
        let rank = |percent: usize| values[((last + 1) * percent).div_ceil(100).max(1) - 1];
        Some(Self {
            n: last + 1,
            p50: rank(50),
            p95: rank(95),
            max: values[last],
        })
    }
}

/// Milliseconds since then.
pub(super) fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// The phases in a `Server-Timing` header (W3C Server Timing): `slot;dur=0.4, launch;dur=31.2`.
pub(super) fn server_timing(header: &str) -> Vec<(String, f64)> {
    let metric = |text: &str| {
        let mut parts = text.split(';').map(str::trim);
        let name = parts.next()?.to_owned();
        let duration = parts
            .find_map(|part| part.strip_prefix("dur="))?
            .parse()
            .ok()?;
        Some((name, duration))
    };
    header.split(',').filter_map(metric).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_of_the_set() {
        assert_eq!(Summary::of(vec![]), None);
        let one = Summary {
            n: 1,
            p50: 7.0,
            p95: 7.0,
            max: 7.0,
        };
        assert_eq!(Summary::of(vec![7.0]), Some(one));
        let hundred = (1..=100).rev().map(f64::from).collect();
        let expected = Summary {
            n: 100,
            p50: 50.0,
            p95: 95.0,
            max: 100.0,
        };
        assert_eq!(Summary::of(hundred), Some(expected));
    }

    #[test]
    fn phases_of_a_server_timing_header() {
        assert_eq!(
            server_timing("slot;dur=0.4, launch;desc=\"x\";dur=31.2,broken, odd;dur=x"),
            [("slot".to_owned(), 0.4), ("launch".to_owned(), 31.2)]
        );
    }
}
