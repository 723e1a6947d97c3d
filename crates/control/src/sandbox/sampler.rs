//! What sandboxes use, over time.
//!
//! A sample is a request to the guest. A sandbox that does nothing is not woken for it: what it uses
//! is what it used, and most sandboxes do nothing most of the time. Whether one does anything is told
//! by the CPU time of its VM.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::StreamExt as _;

use super::{Entry, Inner, Sample};
use crate::{db::now, lifecycle::State};

/// Sandboxes asked at once: a sample is a request to the guest, and should not wake all at once.
const AT_ONCE: usize = 16;
/// A guest that takes longer has no sample this time.
const PATIENCE: Duration = Duration::from_secs(2);
/// Share of a CPU, in percent, that a VM uses whose guest does nothing: its kernel's timers, under
/// software emulation 0.3.
const IDLE_PCT: f64 = 1.0;

/// The CPU time of a VM at the last look.
#[derive(Debug, Default)]
pub(crate) struct Meter(Mutex<Option<(Instant, Duration)>>);

impl Meter {
    /// Looks at the CPU time, and tells which share of a CPU the VM has used since the last look, in
    /// percent. `None`: there was none, or it is another VM now.
    fn look(&self, cpu: Duration) -> Option<f64> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, before) = last.replace((Instant::now(), cpu))?;
        let used = cpu.checked_sub(before)?;
        Some(100.0 * used.as_secs_f64() / at.elapsed().as_secs_f64().max(1e-3))
    }
}

/// A sandbox has just come to run: from here on it is measured whether it does anything.
pub(super) fn begin(inner: &Inner, entry: &Entry) {
    if let Some(cpu) = inner.fleet.cpu_time(&entry.sandbox().id) {
        entry.meter.look(cpu);
    }
}

/// Samples every running sandbox, for ever.
pub(super) async fn sample_all(inner: Arc<Inner>) {
    let mut ticks = tokio::time::interval(inner.config.sample_every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        futures::stream::iter(inner.registry.entries())
            .for_each_concurrent(AT_ONCE, |entry| {
                let inner = &inner;
                async move { sample_if_busy(inner, &entry).await }
            })
            .await;
    }
}

/// Samples those of these sandboxes that never were, because somebody asks.
pub(super) async fn at_least_one(inner: &Inner, entries: impl IntoIterator<Item = &Arc<Entry>>) {
    let never = entries
        .into_iter()
        .filter(|entry| entry.latest_sample().is_none());
    futures::stream::iter(never)
        .for_each_concurrent(AT_ONCE, |entry| sample(inner, entry))
        .await;
}

async fn sample_if_busy(inner: &Inner, entry: &Entry) {
    let Some(cpu) = inner.fleet.cpu_time(&entry.sandbox().id) else {
        return;
    };
    match entry.meter.look(cpu) {
        Some(pct) if pct < IDLE_PCT => {
            if let Some(mut same) = entry.latest_sample().filter(|_| is_free(entry)) {
                same.at = now();
                same.usage.cpu_used_pct = 0.0;
                entry.record(same);
            }
        }
        _ => sample(inner, entry).await,
    }
}

async fn sample(inner: &Inner, entry: &Entry) {
    if !is_free(entry) {
        return;
    }
    let id = entry.sandbox().id.clone();
    match tokio::time::timeout(PATIENCE, inner.fleet.usage(&id)).await {
        Ok(Ok(usage)) => entry.record(Sample { at: now(), usage }),
        Ok(Err(error)) => tracing::debug!(sandbox = %id, %error, "no sample"),
        Err(_) => tracing::debug!(sandbox = %id, "no sample: the guest is too slow"),
    }
}

/// What is being frozen or replaced has other things to do, and answers late or not at all.
fn is_free(entry: &Entry) -> bool {
    entry.sandbox().state == State::Running && entry.slot.current().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meter_tells_work_from_rest_and_one_vm_from_another() {
        let meter = Meter::default();
        let ms = Duration::from_millis;
        assert_eq!(meter.look(ms(100)), None, "the first look");
        std::thread::sleep(ms(20));
        assert_eq!(meter.look(ms(100)), Some(0.0));
        std::thread::sleep(ms(20));
        assert!(meter.look(ms(110)).is_some_and(|pct| pct > IDLE_PCT));
        assert_eq!(meter.look(ms(30)), None, "it was replaced");
    }
}
