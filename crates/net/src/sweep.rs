//! What an earlier process left behind: found at the start, and removed unless a VM uses it.
//!
//! The facts decide, not a record of them. A tap exists as long as a process holds it, so a
//! namespace with a tap has a VM and one without has none.

use std::{collections::BTreeSet, fs, sync::Arc};

use crate::{
    Error, PoolConfig, Result, SlotIndex,
    address::TAP,
    links,
    netns::{Netns, in_thread},
    provision::{ALIAS_PREFIX, Condemned, alias, destroy_all},
};

/// What was found when a pool was opened or swept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SweepReport {
    /// Slots, or parts of slots, that were removed.
    pub removed: Vec<SlotIndex>,
    /// Slots that a VM still uses. They keep working; adopt them.
    pub adoptable: Vec<SlotIndex>,
}

/// Looks through everything with our name and removes what no VM uses. `host` is the namespace
/// that the slots' links end in.
pub(crate) async fn sweep(config: &Arc<PoolConfig>, host: &Netns) -> Result<SweepReport> {
    let found = {
        let (config, host) = (Arc::clone(config), host.clone());
        in_thread("look for left-over network slots", move || {
            host.enter()?;
            Ok((ours(&config)?, namespaces(&config)?))
        })
        .await?
    };
    let (interfaces, namespaces) = found;
    let mut adoptable = Vec::new();
    for &index in &namespaces {
        if let Some(namespace) = Netns::open(&config.netns_path(index))?
            && namespace.run("look into a network slot", has_tap).await?
        {
            adoptable.push(index);
        }
    }
    let unused = namespaces
        .union(&interfaces)
        .filter(|index| !adoptable.contains(index))
        .copied();
    let outcomes = destroy_all(config, host, unused.map(Condemned::from)).await;
    let mut removed: Vec<SlotIndex> = outcomes
        .into_iter()
        .map(|(index, gone)| gone.map(|()| index))
        .collect::<Result<_>>()?;
    removed.sort_unstable();
    Ok(SweepReport { removed, adoptable })
}

fn has_tap() -> Result<bool> {
    Ok(links::index_of(&mut links::open()?, TAP)?.is_some())
}

/// Slots that have an interface in the calling thread's namespace.
fn ours(config: &PoolConfig) -> Result<BTreeSet<SlotIndex>> {
    let own = alias(config);
    let mut found = BTreeSet::new();
    for interface in links::list(&mut links::open()?)? {
        let Some(index) = config.name.index_of(&interface.name) else {
            continue;
        };
        match interface.alias {
            Some(alias) if alias != own => {
                let owner = alias
                    .strip_prefix(ALIAS_PREFIX)
                    .unwrap_or(&alias)
                    .to_owned();
                return Err(Error::NameTaken {
                    interface: interface.name,
                    owner,
                });
            }
            // One without an alias is ours too: making it was interrupted.
            _ => found.insert(index),
        };
    }
    Ok(found)
}

/// Slots that have a file for their namespace. Other files are none of our business.
fn namespaces(config: &PoolConfig) -> Result<BTreeSet<SlotIndex>> {
    let dir = config.netns_dir();
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(&dir).map_err(Error::file("list", &dir))? {
        let name = entry.map_err(Error::file("list", &dir))?.file_name();
        let index = name
            .to_str()
            .and_then(|name| name.parse().ok())
            .map(SlotIndex);
        if let Some(index) = index.filter(|index| name == *index.to_string()) {
            found.insert(index);
        }
    }
    Ok(found)
}

/// Removes the directory of the namespaces if nothing is in it.
pub(crate) fn remove_dir(config: &PoolConfig) -> Result<()> {
    let dir = config.netns_dir();
    match fs::remove_dir(&dir) {
        Err(error)
            if !matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::DirectoryNotEmpty
            ) =>
        {
            Err(Error::file("remove", dir)(error))
        }
        _ => Ok(()),
    }
}
