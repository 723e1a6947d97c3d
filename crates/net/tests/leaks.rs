//! That slots leave nothing behind. In a program of its own, because it counts what its process
//! holds.

#![allow(clippy::unwrap_used, reason = "these are tests")]

mod support;

use std::time::{Duration, Instant};

use cubicle_net::{EgressPolicy, PoolConfig, SlotPool};
use support::*;

#[test]
fn two_hundred_lives_of_slots_leave_nothing() {
    in_world(async |world| {
        world
            .internet
            .run(|| serve(std::net::Ipv4Addr::UNSPECIFIED, 80));
        let dir = world.dir.path().to_owned();
        let config = PoolConfig {
            size_min: 3,
            size_max: 6,
            ..world.config()
        };
        // What the first pool of a process sets up for good is not a leak: warm up.
        let (pool, _) = SlotPool::open(config.clone()).await.unwrap();
        pool.close().await.unwrap();
        let empty = Inventory::take(&dir);

        let (pool, _) = SlotPool::open(config.clone()).await.unwrap();
        until(&pool, |counts| counts.ready == 3 && counts.pending == 0).await;
        let open = Inventory::take(&dir);
        assert_eq!(open.links.len(), empty.links.len() + 3);
        assert_eq!(open.mounts, empty.mounts + 3);
        for life in 0..200 {
            let mut slot = pool.acquire().await.unwrap();
            match life % 4 {
                0 => slot.set_policy(&EgressPolicy::deny_all()).await.unwrap(),
                1 => drop(slot.take_tap()),
                _ => {}
            }
            if life % 8 == 3 {
                drop(slot);
            } else {
                pool.release(slot).await.unwrap();
            }
        }
        until(&pool, |counts| counts.pending == 0 && counts.leased == 0).await;
        assert!(
            (3..=6).contains(&pool.counts().ready),
            "{:?}",
            pool.counts()
        );
        let ready = pool.counts().ready;
        let after = Inventory::take(&dir);
        assert_eq!(after.mounts, empty.mounts + ready);
        assert_eq!(after.files.len(), ready);
        assert_eq!(after.links.len(), empty.links.len() + ready);

        let report = pool.close().await.unwrap();
        assert_eq!((report.removed, report.left.len()), (ready, 0));
        let mut gone = Inventory::take(&dir);
        // Threads that worked in a slot may be on their way out.
        let deadline = Instant::now() + Duration::from_secs(5);
        while gone != empty && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
            gone = Inventory::take(&dir);
        }
        // Idle threads of the runtime come and go.
        assert!(gone.threads <= empty.threads + 1, "{gone:?} {empty:?}");
        gone.threads = empty.threads;
        assert_eq!(gone, empty);
    });
}
