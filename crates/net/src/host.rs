//! What a pool needs of the host besides its slots: the run directory to itself, rules, uplinks that
//! forward. All but the lock runs in the host's namespace.

use std::{fs::File, time::Duration};

use rustix::fs::{FlockOperation, flock};
use tokio::time::{Instant, sleep};

use crate::{
    Error, PoolConfig, Result, firewall, forwarding, links, netlink::Route, provision, sweep,
};

/// How long a pool that opens waits for another process to let go of the run directory.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// Locks the run directory. A process that was just killed may have started a program that has
/// not closed its copy of the lock yet, so a lock that is held is tried for a while.
pub(crate) async fn lock(config: &PoolConfig) -> Result<File> {
    let path = config.run_dir.join("netns.lock");
    let file = File::create(&path).map_err(Error::file("create", &path))?;
    let give_up = Instant::now() + LOCK_PATIENCE;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < give_up => {
                sleep(LOCK_PATIENCE / 20).await;
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::InUse { lock: path }),
            Err(error) => return Err(Error::file("lock", path)(error)),
        }
    }
}

/// Puts the host's rules in place and lets its uplinks forward; returns those that did not.
pub(crate) fn prepare(config: &PoolConfig) -> Result<Vec<String>> {
    let mut route = links::open()?;
    check_subnet(config, &mut route)?;
    let mut netfilter = provision::open_netfilter()?;
    let ours = firewall::host::fenced_uplinks(&mut netfilter, None)
        .map_err(Error::kernel("read the host's rules"))?;
    let plan = forwarding::plan(&mut route, &ours)?;
    if !plan.has_uplink {
        tracing::warn!(
            "the host has no default route: sandboxes reach nothing until it has one \
                        and the pool is opened again"
        );
    }
    let rules = firewall::host::Rules {
        name: config.name.clone(),
        subnet: config.subnet,
        deny: config.always_denied(),
        resolvers: config.allow_hosts.clone(),
        fenced_uplinks: plan.fenced_uplinks.clone(),
        fenced_off: plan.fenced_off.clone(),
    };
    firewall::host::install(&mut netfilter, &rules)
        .map_err(Error::kernel("install the host's rules"))?;
    forwarding::enable(&plan)?;
    Ok(plan.fenced_uplinks)
}

/// Takes back what [`prepare`] did, for a pool that has no slot left.
pub(crate) fn leave(config: &PoolConfig, uplinks: &[String]) -> Result<()> {
    let mut netfilter = provision::open_netfilter()?;
    let others = firewall::host::fenced_uplinks(&mut netfilter, Some(&config.name))
        .map_err(Error::kernel("read the host's rules"))?;
    forwarding::restore(uplinks, &others)?;
    firewall::host::remove(&mut netfilter, &config.name)
        .map_err(Error::kernel("remove the host's rules"))?;
    sweep::remove_dir(config)
}

/// Makes sure that nobody else on this host uses addresses of the slots' subnet. A route to a
/// larger range is fine: those to the slots are more specific.
fn check_subnet(config: &PoolConfig, route: &mut Route) -> Result<()> {
    let interfaces = links::list(route)?;
    for destination in links::routes(route)? {
        if !config.subnet.contains(&destination.net) {
            continue;
        }
        let other = interfaces.iter().find(|interface| {
            destination.interfaces.contains(&interface.index)
                && config.name.index_of(&interface.name).is_none()
        });
        if let Some(other) = other {
            return Err(Error::SubnetTaken {
                subnet: config.subnet,
                taken: destination.net,
                interface: other.name.clone(),
            });
        }
    }
    Ok(())
}
