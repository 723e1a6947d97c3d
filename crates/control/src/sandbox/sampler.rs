//! What sandboxes use, over time.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;

use super::{Entry, Inner, Sample};
use crate::{db::now, lifecycle::State};

/// Sandboxes asked at once: a sample is a request to the guest, and should not wake all at once.
const AT_ONCE: usize = 16;
/// A guest that takes longer has no sample this time.
const PATIENCE: Duration = Duration::from_secs(2);

/// Takes the first sample of a new sandbox soon, instead of whenever its turn comes.
pub(super) fn sample_soon(inner: &Arc<Inner>, entry: Arc<Entry>) {
    let sampler = Arc::clone(inner);
    inner.tasks.spawn(async move {
        let first = async {
            tokio::time::sleep(sampler.config.first_sample_after).await;
            sample(&sampler, &entry).await;
        };
        tokio::select! {
            () = first => {}
            () = sampler.stopping.cancelled() => {}
            () = entry.dead.cancelled() => {}
        }
    });
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
                async move { sample(inner, &entry).await }
            })
            .await;
    }
}

async fn sample(inner: &Inner, entry: &Entry) {
    let sandbox = entry.sandbox();
    // What is being frozen or replaced has other things to do, and answers late or not at all.
    if sandbox.state != State::Running || entry.slot.current().is_some() {
        return;
    }
    match tokio::time::timeout(PATIENCE, inner.fleet.usage(&sandbox.id)).await {
        Ok(Ok(usage)) => entry.record(Sample { at: now(), usage }),
        Ok(Err(error)) => tracing::debug!(sandbox = %sandbox.id, %error, "no sample"),
        Err(_) => tracing::debug!(sandbox = %sandbox.id, "no sample: the guest is too slow"),
    }
}
