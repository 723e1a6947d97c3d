//! Resource limits by control groups, in whichever layout the host has them.
//!
//! Every VM has a group of its own below a directory named `cubicle`: one directory on a host
//! with the unified hierarchy (v2), one per controller on a host with the older layout (v1), none
//! where neither is writable. [`probe`] tells what can be enforced.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Serialize;

use crate::{
    error::{Error, Result},
    spec::Limits,
};

/// Name of the directory, at the root of each hierarchy, that holds the groups of all VMs.
const PARENT: &str = "cubicle";

/// Accounting period of CPU limits in microseconds: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;

/// Weight of all VMs together against everything else on the host, in multiples of what a group,
/// or a process in none, has by default. Without it, a hundred VMs would get as much of a busy
/// processor as one process beside them.
const PARENT_WEIGHT: u64 = 10;

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Controller {
    /// CPU time.
    Cpu,
    /// Memory.
    Memory,
    /// Number of threads.
    Pids,
}

impl Controller {
    const ALL: [Self; 3] = [Self::Cpu, Self::Memory, Self::Pids];

    fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Pids => "pids",
        }
    }
}

impl fmt::Display for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How the host lays out its control groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// One tree with all controllers.
    Unified,
    /// One tree per controller.
    PerController,
    /// No usable tree.
    None,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unified => "one tree (v2)",
            Self::PerController => "a tree per controller (v1)",
            Self::None => "no usable tree",
        })
    }
}

/// What this host can enforce.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Support {
    /// How its control groups are laid out.
    pub layout: Layout,
    /// Which limits hold.
    pub enforced: Vec<Controller>,
    /// Which do not, and why.
    pub missing: BTreeMap<&'static str, String>,
}

/// Finds out, by making the directory that VMs' groups go into, which limits this host enforces.
#[must_use]
pub fn probe() -> Support {
    Cgroups::open().support
}

/// The trees that VMs' groups are made in.
#[derive(Debug, Clone)]
pub(crate) struct Cgroups {
    trees: Vec<Tree>,
    support: Support,
}

#[derive(Debug, Clone)]
struct Tree {
    /// The `cubicle` directory of this hierarchy.
    parent: PathBuf,
    unified: bool,
    controllers: Vec<Controller>,
}

impl Cgroups {
    /// Makes the `cubicle` directory wherever the host lets us.
    pub(crate) fn open() -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self::from_mounts(&parse_mounts(&mounts))
    }

    fn from_mounts(mounts: &[Mount]) -> Self {
        let mut missing: BTreeMap<&'static str, String> = BTreeMap::new();
        let mut trees = Vec::new();
        for mount in mounts.iter().filter(|mount| mount.unified) {
            match open_unified(&mount.at, &mut missing) {
                Ok(tree) if !tree.controllers.is_empty() => trees.push(tree),
                Ok(_) => {}
                Err(reason) => {
                    missing.insert("unified", reason);
                }
            }
        }
        let layout = if trees.is_empty() {
            for mount in mounts {
                match open_tree(mount) {
                    Ok(tree) => trees.extend(tree),
                    Err(reason) => {
                        missing.insert("v1", reason);
                    }
                }
            }
            if trees.iter().all(|tree| tree.controllers.is_empty()) {
                Layout::None
            } else {
                Layout::PerController
            }
        } else {
            Layout::Unified
        };
        let enforced: Vec<Controller> = Controller::ALL
            .into_iter()
            .filter(|wanted| trees.iter().any(|tree| tree.controllers.contains(wanted)))
            .collect();
        for controller in Controller::ALL {
            if enforced.contains(&controller) {
                missing.remove(controller.name());
            } else {
                let why = || "no hierarchy that we may write has this controller".to_owned();
                missing.entry(controller.name()).or_insert_with(why);
            }
        }
        Self {
            trees,
            support: Support {
                layout,
                enforced,
                missing,
            },
        }
    }

    /// Makes the group of one VM and sets its limits. On failure nothing is left of it.
    pub(crate) fn create(&self, name: &str, limits: &Limits) -> Result<Cgroup> {
        let mut group = Cgroup {
            paths: Vec::with_capacity(self.trees.len()),
        };
        for tree in &self.trees {
            let path = tree.parent.join(name);
            match fs::create_dir(&path) {
                Ok(()) => {}
                // A leftover of a VM by that name that is long gone: take it over.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io("create", path)(error)),
            }
            group.paths.push(path.clone());
            for (file, value) in settings(tree, limits) {
                let file = path.join(file);
                fs::write(&file, value).map_err(Error::io("set the limit", file))?;
            }
        }
        Ok(group)
    }
}

/// The file that holds a group's share of a busy processor, and what to write to it for so many
/// thousandths of the default. Both layouts have bounds.
fn weight(millis: u64, unified: bool) -> (&'static str, String) {
    if unified {
        (
            "cpu.weight",
            (millis * 100 / 1000).clamp(1, 10_000).to_string(),
        )
    } else {
        (
            "cpu.shares",
            (millis * 1024 / 1000).clamp(2, 262_144).to_string(),
        )
    }
}

/// Gives the parent of all groups its weight. A host that refuses still enforces limits.
fn weigh(parent: &Path, unified: bool) {
    let (file, value) = weight(PARENT_WEIGHT * 1000, unified);
    let file = parent.join(file);
    if let Err(error) = fs::write(&file, value) {
        tracing::warn!(path = %file.display(), %error, "VMs have the weight of one process");
    }
}

/// Files to write, and what.
fn settings(tree: &Tree, limits: &Limits) -> Vec<(&'static str, String)> {
    let mut settings = Vec::new();
    for controller in &tree.controllers {
        match (controller, tree.unified) {
            (Controller::Cpu, unified) => {
                let Some(millis) = limits.cpu_millis else {
                    continue;
                };
                let quota = u64::from(millis.max(10)) * CPU_PERIOD_US / 1000;
                settings.push(weight(millis.into(), unified));
                if unified {
                    settings.push(("cpu.max", format!("{quota} {CPU_PERIOD_US}")));
                } else {
                    settings.push(("cpu.cfs_period_us", CPU_PERIOD_US.to_string()));
                    settings.push(("cpu.cfs_quota_us", quota.to_string()));
                }
            }
            (Controller::Memory, unified) => {
                let Some(mib) = limits.memory_mib else {
                    continue;
                };
                let file = if unified {
                    "memory.max"
                } else {
                    "memory.limit_in_bytes"
                };
                settings.push((file, (u64::from(mib) << 20).to_string()));
            }
            (Controller::Pids, _) => {
                let Some(pids) = limits.pids else { continue };
                settings.push(("pids.max", pids.to_string()));
            }
        }
    }
    settings
}

/// The group of one VM: removed on drop unless [`Cgroup::keep`] hands it on.
#[derive(Debug)]
pub(crate) struct Cgroup {
    paths: Vec<PathBuf>,
}

impl Cgroup {
    /// Its directories; from now on whoever has these removes them.
    pub(crate) fn keep(mut self) -> Vec<PathBuf> {
        std::mem::take(&mut self.paths)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(error) = fs::remove_dir(path) {
                tracing::warn!(path = %path.display(), %error, "could not remove a cgroup");
            }
        }
    }
}

/// Moves a process with all its threads into the group that these directories make up.
pub(crate) fn attach(paths: &[PathBuf], pid: i32) -> Result<()> {
    for path in paths {
        let file = path.join("cgroup.procs");
        fs::write(&file, pid.to_string()).map_err(Error::io("add a process to", file))?;
    }
    Ok(())
}

/// Removes the directories of a group whose process is gone.
///
/// The kernel lets go of a process's group a moment after it tells of the process's end, so a
/// busy directory is tried again for up to a second.
pub(crate) async fn remove(paths: &[PathBuf]) -> Result<()> {
    const PAUSE: Duration = Duration::from_millis(2);
    for path in paths {
        let mut tries = 500;
        loop {
            match fs::remove_dir(path) {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && tries > 0 => {
                    tries -= 1;
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => return Err(Error::io("remove", path)(error)),
            }
        }
    }
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
struct Mount {
    at: PathBuf,
    unified: bool,
    /// Options of the file system: on v1, its controllers are among them.
    options: String,
}

/// Mounted hierarchies, from the text of /proc/self/mountinfo. Fields before ` - `: id, parent,
/// device, root, mount point, ...; after it: type, source, options of the file system.
fn parse_mounts(mountinfo: &str) -> Vec<Mount> {
    let mut mounts = Vec::new();
    for line in mountinfo.lines() {
        let Some((head, tail)) = line.split_once(" - ") else {
            continue;
        };
        let mut tail = tail.split(' ');
        let (kind, options) = (tail.next().unwrap_or(""), tail.nth(1).unwrap_or(""));
        let Some(at) = head.split(' ').nth(4) else {
            continue;
        };
        if kind == "cgroup" || kind == "cgroup2" {
            let unified = kind == "cgroup2";
            mounts.push(Mount {
                at: PathBuf::from(at),
                unified,
                options: options.to_owned(),
            });
        }
    }
    mounts
}

fn controllers(list: &str, separator: char) -> Vec<Controller> {
    let has = |wanted: &Controller| {
        list.split(separator)
            .any(|name| name.trim() == wanted.name())
    };
    Controller::ALL.into_iter().filter(has).collect()
}

/// Opens a tree of the older layout: one with a controller of ours, or one that service managers
/// use to find the processes of a service, which a VM must leave to outlive its server.
fn open_tree(mount: &Mount) -> Result<Option<Tree>, String> {
    let controllers = if mount.unified {
        Vec::new()
    } else {
        controllers(&mount.options, ',')
    };
    let tracks = mount.unified
        || mount
            .options
            .split(',')
            .any(|option| option == "name=systemd");
    if controllers.is_empty() && !tracks {
        return Ok(None);
    }
    let parent = mount.at.join(PARENT);
    fs::create_dir_all(&parent)
        .map_err(|error| format!("could not create {}: {error}", parent.display()))?;
    if controllers.contains(&Controller::Cpu) {
        weigh(&parent, false);
    }
    Ok(Some(Tree {
        parent,
        unified: mount.unified,
        controllers,
    }))
}

fn open_unified(root: &Path, missing: &mut BTreeMap<&'static str, String>) -> Result<Tree, String> {
    let explain = |what: &str, path: &Path, error: io::Error| {
        format!("could not {what} {}: {error}", path.display())
    };
    let parent = root.join(PARENT);
    let list = root.join("cgroup.controllers");
    let offered = fs::read_to_string(&list).map_err(|error| explain("read", &list, error))?;
    let offered = controllers(&offered, ' ');
    if offered.is_empty() {
        return Ok(Tree {
            parent,
            unified: true,
            controllers: offered,
        });
    }
    fs::create_dir_all(&parent).map_err(|error| explain("create", &parent, error))?;
    let mut usable = Vec::new();
    for controller in offered {
        // A controller is handed down one level at a time.
        let handed_down = [root, &parent].into_iter().try_for_each(|directory| {
            let file = directory.join("cgroup.subtree_control");
            fs::write(&file, format!("+{}", controller.name()))
                .map_err(|error| explain("write", &file, error))
        });
        match handed_down {
            Ok(()) => usable.push(controller),
            Err(reason) => {
                missing.insert(controller.name(), reason);
            }
        }
    }
    if usable.contains(&Controller::Cpu) {
        weigh(&parent, true);
    }
    Ok(Tree {
        parent,
        unified: true,
        controllers: usable,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 1 0:6 / /dev rw,relatime - devtmpfs none rw
30 20 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
31 20 0:27 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
32 20 0:28 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";

    #[test]
    fn hierarchies_are_found_among_mounts() {
        let mounts = parse_mounts(MOUNTINFO);
        assert_eq!(mounts.len(), 3);
        assert_eq!(controllers(&mounts[0].options, ','), [Controller::Cpu]);
        assert_eq!(controllers(&mounts[1].options, ','), []);
        assert!(mounts[2].unified);
        assert_eq!(mounts[2].at, Path::new("/sys/fs/cgroup/unified"));
    }

    #[test]
    fn limits_become_what_the_layout_understands() {
        let tree = |unified| Tree {
            parent: PathBuf::new(),
            unified,
            controllers: Controller::ALL.to_vec(),
        };
        let limits = Limits {
            cpu_millis: Some(1500),
            memory_mib: Some(512),
            pids: Some(99),
        };
        let v2 = settings(&tree(true), &limits);
        assert_eq!(
            v2,
            [
                ("cpu.weight", "150".to_owned()),
                ("cpu.max", "150000 100000".to_owned()),
                ("memory.max", "536870912".to_owned()),
                ("pids.max", "99".to_owned())
            ]
        );
        let v1 = settings(&tree(false), &limits);
        assert!(v1.contains(&("cpu.shares", "1536".to_owned())));
        assert!(v1.contains(&("cpu.cfs_quota_us", "150000".to_owned())));
        assert!(v1.contains(&("memory.limit_in_bytes", "536870912".to_owned())));
        assert!(settings(&tree(true), &Limits::none()).is_empty());
    }

    #[test]
    fn unified_controllers_are_handed_down_and_the_rest_is_explained() {
        let root = tempfile::tempdir().unwrap();
        fs::write(
            root.path().join("cgroup.controllers"),
            "cpuset cpu memory hugetlb\n",
        )
        .unwrap();
        let mount = Mount {
            at: root.path().to_owned(),
            unified: true,
            options: "rw".to_owned(),
        };
        let cgroups = Cgroups::from_mounts(&[mount]);
        assert_eq!(cgroups.support.layout, Layout::Unified);
        assert_eq!(
            cgroups.support.enforced,
            [Controller::Cpu, Controller::Memory]
        );
        assert!(cgroups.support.missing.contains_key("pids"));
        let handed = fs::read_to_string(root.path().join("cubicle/cgroup.subtree_control"));
        assert_eq!(handed.unwrap(), "+memory");
        let weight = fs::read_to_string(root.path().join("cubicle/cpu.weight"));
        assert_eq!(weight.unwrap(), "1000");
    }

    #[test]
    fn a_host_without_cgroups_enforces_nothing_and_says_so() {
        let cgroups = Cgroups::from_mounts(&[]);
        assert_eq!(cgroups.support.layout, Layout::None);
        assert_eq!(cgroups.support.missing.len(), 3);
        assert!(
            cgroups
                .create("x", &Limits::none())
                .unwrap()
                .keep()
                .is_empty()
        );
    }
}
