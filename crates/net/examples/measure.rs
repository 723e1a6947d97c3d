//! Measures what slots cost on this host, in a network namespace of its own. Needs root.

#![allow(
    clippy::expect_used,
    reason = "a measurement that fails has nothing to say"
)]

use std::time::{Duration, Instant};

use cubicle_net::{EgressPolicy, PoolConfig, SlotPool};
use rustix::thread::{UnshareFlags, unshare_unsafe};

const ROUNDS: usize = 60;

fn show(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!(
        "{what:44} median {median:>10.1?}  worst {worst:>10.1?}  n={}",
        times.len()
    );
}

async fn timed<T>(times: &mut Vec<Duration>, work: impl Future<Output = T>) -> T {
    let started = Instant::now();
    let result = work.await;
    times.push(started.elapsed());
    result
}

fn main() {
    // SAFETY: the process has one thread, and only the network namespace changes.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("root is needed");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(measure());
}

async fn measure() {
    let run_dir = std::env::temp_dir().join(format!("cubicle-net-measure-{}", std::process::id()));
    let config = |size_min| PoolConfig {
        run_dir: run_dir.clone(),
        size_min,
        size_max: 64,
        ..PoolConfig::default()
    };

    let (pool, _) = SlotPool::open(config(0)).await.expect("a pool");
    let (mut create, mut remove) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let slot = timed(&mut create, pool.acquire()).await.expect("a slot");
        timed(&mut remove, pool.release(slot))
            .await
            .expect("released");
        settle(&pool).await;
        // The kernel takes a namespace apart in the background, which slows the next one down.
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    show("acquire from an empty pool (make a slot)", create);
    show("release into a pool that has enough", remove);
    pool.close().await.expect("closed");

    let (pool, _) = SlotPool::open(config(8)).await.expect("a pool");
    while pool.counts().ready < 8 || pool.counts().pending > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (mut acquire, mut deny, mut many, mut traffic, mut release) = Default::default();
    let long = EgressPolicy {
        allow_out: (0..100)
            .map(|n: u32| std::net::Ipv4Addr::from(n << 16).into())
            .collect(),
        ..EgressPolicy::deny_all()
    };
    for _ in 0..ROUNDS {
        let mut slot = timed(&mut acquire, pool.acquire()).await.expect("a slot");
        timed(&mut deny, slot.set_policy(&EgressPolicy::deny_all()))
            .await
            .expect("a policy");
        timed(&mut many, slot.set_policy(&long))
            .await
            .expect("a policy");
        timed(&mut traffic, slot.traffic()).await.expect("counters");
        drop(slot.take_tap());
        timed(&mut release, pool.release(slot))
            .await
            .expect("released");
        settle(&pool).await;
    }
    show("acquire a ready slot", acquire);
    show("policy: deny all", deny);
    show("policy: deny all but 100 addresses", many);
    show("read counters", traffic);
    show("release (renew) a slot whose tap was used", release);

    let started = Instant::now();
    let mut slots = Vec::new();
    for _ in 0..48 {
        slots.push(pool.acquire().await.expect("a slot"));
    }
    println!(
        "a burst of 48 acquires with 8 ready: {:.1?}",
        started.elapsed()
    );
    for slot in slots {
        pool.release(slot).await.expect("released");
    }
    settle(&pool).await;
    let started = Instant::now();
    let removed = pool.close().await.expect("closed").removed;
    println!(
        "close a pool with {removed} slots: {:.1?}",
        started.elapsed()
    );
    let _ = std::fs::remove_dir_all(run_dir);
}

/// Waits until nothing happens in the background.
async fn settle(pool: &SlotPool) {
    while pool.counts().pending > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
