//! `GET /metrics`.

use std::{
    fs, io,
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{Json, extract::State as Shared, response::Response};
use http::StatusCode;
use rustix::fs::statvfs;
use serde::Serialize;

use super::uncached;
use crate::{access::State, http::ApiError};

const MIB: u64 = 1 << 20;

/// What the sandbox uses. Sizes are in bytes unless they say otherwise.
#[derive(Debug, PartialEq, Serialize)]
struct Metrics {
    /// Seconds since the Unix epoch.
    ts: u64,
    cpu_count: u32,
    /// Of all processors together since the call before, 0 to 100, with two decimals.
    cpu_used_pct: f64,
    mem_total: u64,
    mem_used: u64,
    mem_cache: u64,
    mem_total_mib: u64,
    mem_used_mib: u64,
    disk_used: u64,
    disk_total: u64,
}

/// How the time since boot was spent, in ticks of all processors.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Ticks {
    busy: u64,
    total: u64,
    processors: u32,
}

#[derive(Debug, Default, PartialEq)]
struct Memory {
    total: u64,
    available: u64,
    cache: u64,
}

/// Processor time at the call before.
#[derive(Debug, Default)]
pub(crate) struct Meter(Mutex<Ticks>);

/// Reports what the sandbox uses.
pub(crate) async fn metrics(Shared(state): Shared<Arc<State>>) -> Result<Response, ApiError> {
    // All of these are answered from memory.
    let metrics = measure(&state.meter).map_err(|error| {
        let message = format!("cannot read the sandbox's metrics: {error}");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    })?;
    Ok(uncached(Json(metrics)))
}

fn measure(meter: &Meter) -> io::Result<Metrics> {
    let ticks = parse_ticks(&fs::read_to_string("/proc/stat")?);
    let memory = parse_memory(&fs::read_to_string("/proc/meminfo")?);
    let disk = statvfs("/")?;
    let before = {
        let mut guard = meter.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *guard, ticks)
    };
    let mem_used = memory.total.saturating_sub(memory.available);
    Ok(Metrics {
        ts: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
        cpu_count: ticks.processors,
        cpu_used_pct: percent(before, ticks),
        mem_total: memory.total,
        mem_used,
        mem_cache: memory.cache,
        mem_total_mib: memory.total / MIB,
        mem_used_mib: mem_used / MIB,
        // What root may still use counts as used, as it does for everybody else.
        disk_used: disk
            .f_blocks
            .saturating_sub(disk.f_bavail)
            .saturating_mul(disk.f_frsize),
        disk_total: disk.f_blocks.saturating_mul(disk.f_frsize),
    })
}

/// The share of the time between two moments that was not idle. After a restore the clock of the
/// later one may be behind.
fn percent(before: Ticks, now: Ticks) -> f64 {
    let total = now.total.saturating_sub(before.total);
    let busy = now.busy.saturating_sub(before.busy);
    if total == 0 {
        return 0.0;
    }
    let hundredths = busy.min(total) as f64 * 10_000.0 / total as f64;
    hundredths.round() / 100.0
}

/// `/proc/stat`: `cpu user nice system idle iowait irq softirq steal guest guest_nice`, and the
/// same for each processor. The last two are contained in the first two.
fn parse_ticks(stat: &str) -> Ticks {
    let mut ticks = Ticks::default();
    for line in stat.lines() {
        let mut fields = line.split_ascii_whitespace();
        match fields.next() {
            Some("cpu") => {
                let fields: Vec<u64> = fields
                    .take(8)
                    .map(|field| field.parse().unwrap_or(0))
                    .collect();
                let idle: u64 = fields.iter().skip(3).take(2).sum();
                ticks.total = fields.iter().sum();
                ticks.busy = ticks.total - idle;
            }
            Some(name) if name.starts_with("cpu") => ticks.processors += 1,
            _ => {}
        }
    }
    ticks
}

/// `/proc/meminfo`: `Name:  number kB`.
fn parse_memory(meminfo: &str) -> Memory {
    let mut memory = Memory::default();
    for line in meminfo.lines() {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        let kib = value
            .split_ascii_whitespace()
            .next()
            .and_then(|value| value.parse().ok());
        let bytes = kib.unwrap_or(0_u64).saturating_mul(1024);
        match name {
            "MemTotal" => memory.total = bytes,
            "MemAvailable" => memory.available = bytes,
            "Cached" => memory.cache = bytes,
            _ => {}
        }
    }
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_told_apart_from_idleness() {
        let ticks = parse_ticks(
            "cpu  100 10 50 800 40 0 0 0 7 3\ncpu0 50 5 25 400 20 0 0 0 0 0\ncpu1 1 1 1 1\n\
             intr 1 2\n",
        );
        assert_eq!(
            ticks,
            Ticks {
                busy: 160,
                total: 1000,
                processors: 2
            }
        );
    }

    #[test]
    fn usage_is_of_the_time_between_two_calls() {
        let ticks = |busy, total| Ticks {
            busy,
            total,
            processors: 1,
        };
        assert_eq!(percent(ticks(0, 0), ticks(1, 3)), 33.33);
        assert_eq!(percent(ticks(100, 1000), ticks(150, 1100)), 50.0);
        assert_eq!(percent(ticks(100, 1000), ticks(100, 1000)), 0.0);
        assert_eq!(percent(ticks(500, 1000), ticks(100, 900)), 0.0);
    }

    #[test]
    fn memory_is_read_by_name() {
        let memory = parse_memory(
            "MemTotal:  1000 kB\nMemFree: 5 kB\nMemAvailable: 600 kB\nCached: 70 kB\nHuge: x\n",
        );
        assert_eq!(
            memory,
            Memory {
                total: 1000 * 1024,
                available: 600 * 1024,
                cache: 70 * 1024
            }
        );
    }

    #[test]
    fn this_machine_has_metrics() {
        let meter = Meter::default();
        let metrics = measure(&meter).unwrap();
        assert!(metrics.cpu_count >= 1);
        assert!((0.0..=100.0).contains(&metrics.cpu_used_pct));
        assert!(metrics.mem_used > 0 && metrics.mem_used < metrics.mem_total);
        assert!(metrics.disk_used > 0 && metrics.disk_used <= metrics.disk_total);
        assert!(meter.0.lock().unwrap().total > 0);
    }
}
