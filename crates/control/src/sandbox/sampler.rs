//! What sandboxes use, over time.
//!
//! A sample is a request to the guest. A sandbox that does nothing is not woken for it: what it uses
//! is what it used, and most sandboxes do nothing most of the time. Nor is one that did very little, a
//! call answered or a line computed, until somebody asks. Whether one does anything is told by the CPU
//! time of its VM.

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
/// Share of a CPU that a VM uses whose guest does nothing: its kernel's timers, under software
/// emulation 0.003, and more in the first seconds of a life.
const IDLE: f64 = 0.02;
/// CPU time since the last sample that is worth another one, which costs some 20 ms of it under
/// software emulation.
const WORTH_A_SAMPLE: Duration = Duration::from_millis(300);
/// The same when somebody asks: what the start of a life or an answered request costs is less.
const WORTH_ASKING: Duration = Duration::from_millis(100);

/// The CPU time of a VM.
#[derive(Debug, Default)]
pub(crate) struct Meter(Mutex<Readings>);

#[derive(Debug, Default)]
struct Readings {
    /// When somebody looked last, and what it was then.
    last: Option<(Instant, Duration)>,
    /// Used since the last sample.
    unsampled: Duration,
}

/// What a look at a meter tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Look {
    /// Since the look before.
    used: Duration,
    elapsed: Duration,
    /// Used since the last sample.
    unsampled: Duration,
}

impl Meter {
    /// Looks at the CPU time. `None`: for the first time, or it is another VM now.
    fn look(&self, cpu: Duration) -> Option<Look> {
        let mut readings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, before) = readings.last.replace((Instant::now(), cpu))?;
        let used = cpu.checked_sub(before)?;
        readings.unsampled += used;
        Some(Look {
            used,
            elapsed: at.elapsed(),
            unsampled: readings.unsampled,
        })
    }

    /// What the VM has used since the last sample, if its CPU time is this.
    fn unsampled(&self, cpu: Duration) -> Duration {
        let readings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let looked = readings.last.map_or(Duration::ZERO, |(_, cpu)| cpu);
        readings.unsampled + cpu.saturating_sub(looked)
    }

    fn sampled(&self) {
        let mut readings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        readings.unsampled = Duration::ZERO;
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

/// Samples those of these sandboxes that never were or have done something since, because somebody
/// asks.
pub(super) async fn catch_up(inner: &Inner, entries: impl IntoIterator<Item = &Arc<Entry>>) {
    let behind = entries.into_iter().filter(|entry| {
        let cpu = || inner.fleet.cpu_time(&entry.sandbox().id);
        entry.latest_sample().is_none()
            || cpu().is_some_and(|cpu| entry.meter.unsampled(cpu) >= WORTH_ASKING)
    });
    futures::stream::iter(behind)
        .for_each_concurrent(AT_ONCE, |entry| sample(inner, entry))
        .await;
}

async fn sample_if_busy(inner: &Inner, entry: &Entry) {
    let Some(cpu) = inner.fleet.cpu_time(&entry.sandbox().id) else {
        return;
    };
    // A life that has just begun may be looked at for the first time a moment later.
    let idle = |elapsed: Duration| elapsed.max(inner.config.sample_every).mul_f64(IDLE);
    match entry.meter.look(cpu) {
        Some(look) if look.used < idle(look.elapsed) || look.unsampled < WORTH_A_SAMPLE => {
            if let Some(mut same) = entry.latest_sample().filter(|_| is_free(entry)) {
                same.at = now();
                let share = look.used.as_secs_f64() / look.elapsed.as_secs_f64().max(1e-3);
                same.usage.cpu_used_pct = (1e4 * share).round() / 1e2;
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
        Ok(Ok(usage)) => {
            entry.meter.sampled();
            entry.record(Sample { at: now(), usage });
        }
        Ok(Err(error)) => tracing::debug!(sandbox = %id, %error, "no sample"),
        Err(_) => tracing::debug!(sandbox = %id, "no sample: the guest is too slow"),
    }
}

/// What is being frozen or replaced has other things to do, and answers late or not at all.
fn is_free(entry: &Entry) -> bool {
    entry.sandbox().state == State::Running && entry.slot.current().is_none()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_meter_tells_work_from_rest_and_one_vm_from_another() {
        let meter = Meter::default();
        let ms = Duration::from_millis;
        assert_eq!(meter.look(ms(100)), None, "the first look");
        std::thread::sleep(ms(20));
        let look = meter.look(ms(110)).unwrap();
        assert!(look.used == ms(10) && look.elapsed >= ms(20));
        assert_eq!(meter.look(ms(30)), None, "it was replaced");
        assert_eq!(meter.look(ms(30)).unwrap().used, Duration::ZERO);
    }

    #[test]
    fn a_meter_adds_up_what_was_used_since_the_last_sample() {
        let meter = Meter::default();
        let ms = Duration::from_millis;
        meter.look(ms(100));
        meter.look(ms(110));
        assert_eq!(meter.look(ms(115)).unwrap().unsampled, ms(15));
        assert_eq!(meter.unsampled(ms(120)), ms(20));
        meter.sampled();
        assert_eq!(meter.unsampled(ms(120)), ms(5));
        assert_eq!(meter.look(ms(120)).unwrap().unsampled, ms(5));
    }
}
