//! The parts of a server: opened one upon the other, and closed again if one of them fails.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use cubicle_control::{Control, ControlConfig, store::StoreConfig};
use cubicle_cow::{
    Store,
    backing::{self, StoreKind},
};
use cubicle_net::{PoolConfig, SlotPool};
use cubicle_node::{Node, NodeConfig, SparePolicy};
use cubicle_vmm::qemu::Qemu;

use super::{
    Dirs, USER,
    fleet::{Facts, Images, NodeFleet},
    pool_name, store,
};
use crate::{cli::Up, client::Connection, error::Error};

pub(super) async fn open_store(dirs: &Dirs, gib: u64) -> Result<Store, Error> {
    let config = backing::BackingConfig {
        max_size: gib << 30,
        ..Default::default()
    };
    let data = dirs.data.clone();
    let root = tokio::task::spawn_blocking(move || backing::prepare(&data, &config))
        .await
        .map_err(|error| Error::setup("prepare the store", error))?
        .map_err(|error| {
            Error::setup("prepare the store", error)
                .with_hint("`cubicle doctor` says what is missing")
        })?;
    let (store, swept) = Store::open(&root)
        .await
        .map_err(|error| Error::setup("open the store", error))?;
    tracing::info!(?swept, "the store is open");
    Ok(store)
}

/// Closes the store, and unmounts it unless VMs that run on keep it mounted; the next start takes it
/// back.
pub(super) async fn close_store(store: Store) {
    let root = store.root().clone();
    store.close().await;
    match tokio::task::spawn_blocking(move || root.close()).await {
        Ok(Ok(closed)) => tracing::info!(?closed, "the store is closed"),
        Ok(Err(error)) => tracing::warn!(%error, "the store stays mounted"),
        Err(error) => tracing::warn!(%error, "the store stays mounted"),
    }
}

pub(super) fn store_kind(store: &Store) -> String {
    match store.info() {
        Ok(info) => match info.kind {
            StoreKind::Native { filesystem } => format!("{filesystem}, with reflinks"),
            StoreKind::Loop {
                size, direct_io, ..
            } => format!(
                "an XFS image of {} GiB{}",
                size >> 30,
                if direct_io {
                    ""
                } else {
                    " (through the page cache: no direct I/O here)"
                }
            ),
            StoreKind::Copy { filesystem, reason } => {
                format!("{filesystem}, by copying whole files: {reason}")
            }
        },
        Err(error) => error.to_string(),
    }
}

async fn open_slots(dirs: &Dirs, options: &Up) -> Result<SlotPool, Error> {
    let config = PoolConfig {
        run_dir: dirs.run.clone(),
        size_max: options.max_sandboxes as usize + 16,
        ..PoolConfig::named(pool_name(&dirs.data))
    };
    let (slots, swept) = SlotPool::open(config).await.map_err(|error| {
        Error::setup("set up the network", error).with_hint("`cubicle doctor` says what is missing")
    })?;
    tracing::info!(?swept, "the network is ready");
    Ok(slots)
}

/// Opens everything above the store. If that fails, all of it is closed again; sandboxes of an earlier
/// server run on.
#[expect(clippy::too_many_arguments, reason = "the parts of a server, met once")]
pub(super) async fn open_services(
    dirs: &Dirs,
    options: &Up,
    qemu: Qemu,
    store: Store,
    images: &Images,
    hypervisor: &str,
    catalogue: StoreConfig,
    done: &(dyn Fn(&str, String) + Send + Sync),
) -> Result<(Node, Control, String), Error> {
    let node = open_node(dirs, options, qemu, store, done).await?;
    let control = async {
        let control =
            open_control(dirs, options, node.clone(), images, hypervisor, catalogue).await?;
        match ensure_key(&control, options, dirs).await {
            Ok(key) => Ok((control, key)),
            Err(error) => {
                control.close().await;
                Err(error)
            }
        }
    };
    match control.await {
        Ok((control, key)) => Ok((node, control, key)),
        Err(error) => {
            if let Err(error) = node.detach().await {
                tracing::warn!(%error, "the node is not closed");
            }
            Err(error)
        }
    }
}

async fn open_node(
    dirs: &Dirs,
    options: &Up,
    qemu: Qemu,
    store: Store,
    done: &(dyn Fn(&str, String) + Send + Sync),
) -> Result<Node, Error> {
    let slots = open_slots(dirs, options).await?;
    let mut config = NodeConfig::new(&dirs.data, &dirs.run)
        .map_err(|error| Error::setup("configure the node", error))?;
    config.limits.max_sandboxes = options.max_sandboxes as usize;
    config.spares = SparePolicy::for_host();
    config.spares.max = options.spares.unwrap_or(config.spares.max);
    config.memory_tier = options.memory_tier;
    config.guest.user = USER.to_owned();
    config.guest.dns_servers.clone_from(&options.dns);
    let (node, adopted) = Node::open(config, Arc::new(qemu), store, Some(slots))
        .await
        .map_err(|error| Error::setup("open the node", error))?;
    if !adopted.adopted.is_empty() {
        done(
            "adopted",
            format!("{} sandboxes ran on", adopted.adopted.len()),
        );
    }
    for (id, why) in &adopted.lost {
        done("lost", format!("{id}: {why}"));
    }
    Ok(node)
}

async fn open_control(
    dirs: &Dirs,
    options: &Up,
    node: Node,
    images: &Images,
    hypervisor: &str,
    catalogue: StoreConfig,
) -> Result<Control, Error> {
    let facts = Facts {
        id: hostname(),
        address: match options.listen.ip() {
            IpAddr::V4(address) if !address.is_unspecified() => address,
            _ => Ipv4Addr::LOCALHOST,
        },
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        memory_mib: total_memory_mib(),
        hypervisor: hypervisor.to_owned(),
        cpu_model: cpu_model(),
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
    };
    let mut config = ControlConfig::new(dirs.data.join("cubicle.db"));
    config.store = catalogue;
    config.snapshots = options.snapshots.config();
    config
        .volumes
        .host_allow
        .clone_from(&options.host_mount_allow);
    let fleet = NodeFleet::new(node, images.clone(), facts, config.volumes.clone());
    let (control, reconciled) = Control::open(config, fleet)
        .await
        .map_err(|error| Error::setup("open the control plane", error))?;
    tracing::info!(?reconciled, "intent and fact agree");
    if let Err(error) = store::check(&control, options.store.as_deref()).await {
        control.close().await;
        return Err(error);
    }
    Ok(control)
}

/// The local client's key: made at the first start, and again if its copy was lost.
async fn ensure_key(control: &Control, options: &Up, dirs: &Dirs) -> Result<String, Error> {
    if options.no_auth {
        return Ok(String::new());
    }
    let failed = |error| Error::setup("make an API key", error);
    if let Some(new) = control.keys.ensure_default().await.map_err(failed)? {
        return Ok(new.key);
    }
    if let Ok(known) = Connection::load(&dirs.data)
        && control.keys.verify(&known.api_key).is_some()
    {
        return Ok(known.api_key);
    }
    Ok(control.keys.create("local").await.map_err(failed)?.key)
}

pub(super) fn hostname() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}

/// Model of the processor as the kernel names it; empty where it does not.
fn cpu_model() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model
        .map(|(_, name)| name.trim().to_owned())
        .unwrap_or_default()
}

fn total_memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram * u64::from(info.mem_unit)) >> 20
}
