//! From a kernel package, or a kernel file, to what a VM boots.

use std::{
    io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    apt::{self, Host, KernelPackage},
    bzimage,
    cache::{Cache, Lock},
    command::Program,
    error::{During as _, Error, Result},
    fingerprint::Fingerprint,
    guest::GuestBinary,
    initramfs,
    modules::{self, ModuleTree},
    progress::{Progress, Step},
};

/// Changes whenever the same package would be unpacked into something else.
const LAYOUT: u32 = 1;
const RECORD: &str = "kernel.json";
const VMLINUX: &str = "vmlinux";
const MODULES: &str = "modules";
/// Link to the kernel that was taken from the distribution; it stays until a newer one is asked for.
const CURRENT: &str = "distribution";
/// How many initramfs files of earlier daemons are kept.
const KEPT_INITRAMFS: usize = 4;

/// Where a guest kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelSource {
    /// The distribution's kernel for clouds: the one that was taken before, or the newest that any
    /// configured suite has.
    Distribution {
        /// Looks for a newer one also if there is one already.
        refresh: bool,
    },
    /// The distribution's package with this name.
    Package {
        /// For example `linux-image-6.1.0-50-cloud-amd64`.
        name: String,
    },
    /// A file that the user names.
    File {
        /// A bzImage, or an ELF kernel that can start by PVH.
        path: PathBuf,
        /// Its modules, a directory like `/lib/modules/<release>`. None: all drivers that a
        /// sandbox needs are built in.
        modules: Option<PathBuf>,
    },
}

impl Default for KernelSource {
    fn default() -> KernelSource {
        KernelSource::Distribution { refresh: false }
    }
}

/// What a VM is cold-booted with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The kernel as an uncompressed ELF file.
    pub vmlinux: PathBuf,
    /// The initramfs: cpio, not compressed.
    pub initramfs: PathBuf,
    /// What `uname -r` says, such as `6.1.0-50-cloud-amd64`.
    pub version: String,
    /// The package that it is from, as `name version`.
    pub package: Option<String>,
    /// Of the kernel with its modules: changes when a guest's kernel would be another one.
    pub kernel_fingerprint: Fingerprint,
    /// Of everything in a cold boot: the kernel, its modules and the guest daemon.
    pub fingerprint: Fingerprint,
}

/// Makes the kernel and the initramfs ready in `dir`, the image directory. Takes milliseconds
/// when they are there already, and then needs neither network nor package manager.
///
/// # Errors
/// [`Error::NoKernelPackage`], [`Error::DriverMissing`], [`Error::Kernel`], and whatever apt says.
pub async fn prepare_kernel(
    dir: &Path,
    source: &KernelSource,
    guest: &GuestBinary,
    progress: &Progress,
) -> Result<Kernel> {
    let cache = Cache::open(dir, "kernels")?;
    let unpacked = match source {
        KernelSource::Distribution { refresh } => {
            match Unpacked::load(&cache.path(CURRENT)).filter(|_| !refresh) {
                Some(current) => current,
                None => {
                    let newest = from_package(&cache, None, progress).await?;
                    select(&cache, &newest).during("remember the chosen kernel")?;
                    newest
                }
            }
        }
        KernelSource::Package { name } => from_package(&cache, Some(name), progress).await?,
        KernelSource::File { path, modules } => {
            from_file(&cache, path, modules.as_deref(), progress).await?
        }
    };
    with_initramfs(dir, unpacked, guest, progress).await
}

/// A kernel in the cache, as its `kernel.json` describes it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    version: String,
    package: Option<String>,
    fingerprint: Fingerprint,
    /// Files in `modules/`, in the order in which they are loaded.
    modules: Vec<String>,
}

#[derive(Debug, Clone)]
struct Unpacked {
    directory: PathBuf,
    record: Record,
}

impl Unpacked {
    fn load(directory: &Path) -> Option<Unpacked> {
        let directory = fs_err::canonicalize(directory).ok()?;
        let record = fs_err::read(directory.join(RECORD)).ok()?;
        Some(Unpacked {
            record: serde_json::from_slice(&record).ok()?,
            directory,
        })
    }
}

/// Points the link at the kernel, by a rename so that it is never absent.
fn select(cache: &Cache, kernel: &Unpacked) -> io::Result<()> {
    let name = kernel.record.fingerprint.short();
    let link = tempfile::Builder::new()
        .prefix(".distribution-")
        .make_in(cache.path(""), |path| {
            fs_err::os::unix::fs::symlink(name, path)
        })?;
    link.into_temp_path()
        .persist(cache.path(CURRENT))
        .map_err(|error| error.error)
}

async fn from_package(cache: &Cache, name: Option<&str>, progress: &Progress) -> Result<Unpacked> {
    progress.message(Step::KERNEL_DOWNLOAD, "looking for a kernel package");
    let host = Host::detect()?;
    match package(cache, &host, name, progress).await {
        // The lists may be absent, or so old that the mirror has dropped what they promise.
        Err(Error::NoKernelPackage { .. } | Error::Program { .. }) => {
            apt::update(progress).await?;
            package(cache, &host, name, progress).await
        }
        result => result,
    }
}

async fn package(
    cache: &Cache,
    host: &Host,
    name: Option<&str>,
    progress: &Progress,
) -> Result<Unpacked> {
    let package = host.kernel_package(name).await?;
    #[derive(Serialize)]
    struct Inputs<'a> {
        layout: u32,
        package: &'a str,
        version: &'a str,
        sha256: &'a str,
    }
    let KernelPackage {
        name,
        version,
        sha256,
    } = &package;
    let inputs = Inputs {
        layout: LAYOUT,
        package: name,
        version,
        sha256,
    };
    let fingerprint = Fingerprint::of(&inputs);
    if let Some(unpacked) = Unpacked::load(&cache.path(fingerprint.short())) {
        return Ok(unpacked);
    }
    let lock = cache.lock(&fingerprint, progress).await?;
    if let Some(unpacked) = Unpacked::load(&cache.path(fingerprint.short())) {
        return Ok(unpacked);
    }

    let draft = cache.draft(&lock, "-package")?;
    let (archives, tree) = (draft.path().join("archives"), draft.path().join("tree"));
    for (at, wanted) in [
        Some(format!("{name}={version}")),
        package.modules_package(host.distribution),
    ]
    .into_iter()
    .flatten()
    .enumerate()
    {
        let archives = archives.join(at.to_string());
        fs_err::create_dir_all(&archives).during("make a download directory")?;
        let archive = apt::download(&wanted, &archives, progress).await?;
        if at == 0 {
            check_digest(&package, &archive).await?;
        }
        progress.message(Step::KERNEL_UNPACK, format!("unpacking {wanted}"));
        Program::new("dpkg-deb", "dpkg", "unpack a kernel package")
            .arg("--extract")
            .arg(&archive)
            .arg(&tree)
            .output()
            .await?;
    }
    progress.done(Step::KERNEL_DOWNLOAD, format!("{name} {version}"));

    let image = kernel_file(&tree)?;
    let package = Some(format!("{name} {version}"));
    let origin = Origin {
        package,
        fingerprint,
        lock,
    };
    unpack(cache, image, Some(&tree), origin, progress).await
}

async fn check_digest(package: &KernelPackage, archive: &Path) -> Result<()> {
    let archive = archive.to_owned();
    let actual = blocking(move || Fingerprint::of_file(&archive)).await?;
    if actual.as_str() == package.sha256 {
        return Ok(());
    }
    Err(Error::PackageDigest {
        package: package.name.clone(),
        expected: package.sha256.clone(),
        actual: actual.to_string(),
    })
}

async fn from_file(
    cache: &Cache,
    path: &Path,
    modules: Option<&Path>,
    progress: &Progress,
) -> Result<Unpacked> {
    #[derive(Serialize)]
    struct Inputs<'a> {
        layout: u32,
        kernel: Fingerprint,
        modules: Option<&'a [u8]>,
    }
    let file = path.to_owned();
    let inputs = Inputs {
        layout: LAYOUT,
        kernel: blocking(move || Fingerprint::of_file(&file)).await?,
        modules: modules.map(|directory| directory.as_os_str().as_bytes()),
    };
    let fingerprint = Fingerprint::of(&inputs);
    let lock = cache.lock(&fingerprint, progress).await?;
    match Unpacked::load(&cache.path(fingerprint.short())) {
        Some(unpacked) => Ok(unpacked),
        None => {
            let origin = Origin {
                package: None,
                fingerprint,
                lock,
            };
            unpack(cache, path.to_owned(), modules, origin, progress).await
        }
    }
}

struct Origin {
    package: Option<String>,
    fingerprint: Fingerprint,
    lock: Arc<Lock>,
}

/// Turns a kernel file and its modules into a directory of the cache. `modules` is the directory
/// of the release, or a tree that has it in `lib/modules` or `usr/lib/modules`.
async fn unpack(
    cache: &Cache,
    image: PathBuf,
    modules: Option<&Path>,
    origin: Origin,
    progress: &Progress,
) -> Result<Unpacked> {
    progress.message(Step::KERNEL_UNPACK, "unpacking the kernel");
    let draft = cache.draft(&origin.lock, "")?;
    let directory = cache.path(origin.fingerprint.short());
    let modules = modules.map(Path::to_owned);
    let unpacked = blocking(move || {
        let file = fs_err::read(&image).during("read the kernel")?;
        let vmlinux = bzimage::vmlinux(&file, &image)?;
        let version = bzimage::release(&vmlinux).ok_or_else(|| Error::Kernel {
            path: image.clone(),
            reason: "it does not say which release it is".into(),
        })?;
        let order = match modules {
            Some(tree) => ModuleTree::open(&modules_directory(&tree, &version), &version)?
                .load_order(&modules::REQUIRED, &modules::OPTIONAL)?,
            None => Vec::new(),
        };
        let Origin {
            package,
            fingerprint,
            ..
        } = origin;
        let names = order
            .iter()
            .map(|module| format!("{}.ko", module.name))
            .collect();
        let record = Record {
            version,
            package,
            fingerprint,
            modules: names,
        };
        let write = || {
            fs_err::create_dir_all(draft.path().join(MODULES))?;
            write_synced(&draft.path().join(VMLINUX), &vmlinux)?;
            for (name, module) in record.modules.iter().zip(&order) {
                write_synced(&draft.path().join(MODULES).join(name), &module.bytes)?;
            }
            write_synced(
                &draft.path().join(RECORD),
                &serde_json::to_vec_pretty(&record)?,
            )
        };
        write().during("store the unpacked kernel")?;
        draft.publish(&directory)?;
        Ok(Unpacked { directory, record })
    })
    .await?;
    let Record {
        version, modules, ..
    } = &unpacked.record;
    progress.done(
        Step::KERNEL_UNPACK,
        format!("kernel {version}, {} modules", modules.len()),
    );
    Ok(unpacked)
}

async fn with_initramfs(
    dir: &Path,
    unpacked: Unpacked,
    guest: &GuestBinary,
    progress: &Progress,
) -> Result<Kernel> {
    #[derive(Serialize)]
    struct Inputs<'a> {
        layout: u32,
        kernel: &'a Fingerprint,
        guest: &'a Fingerprint,
    }
    let Unpacked { directory, record } = unpacked;
    let inputs = Inputs {
        layout: initramfs::LAYOUT,
        kernel: &record.fingerprint,
        guest: guest.fingerprint(),
    };
    let fingerprint = Fingerprint::of(&inputs);
    let cache = Cache::open(dir, "initramfs")?;
    let name = format!("{}.cpio", fingerprint.short());
    let initramfs = cache.path(&name);
    let kernel = Kernel {
        vmlinux: directory.join(VMLINUX),
        initramfs: initramfs.clone(),
        version: record.version,
        package: record.package,
        kernel_fingerprint: record.fingerprint,
        fingerprint: fingerprint.clone(),
    };
    if !initramfs.exists() {
        let lock = cache.lock(&fingerprint, progress).await?;
        let draft = cache.draft(&lock, ".cpio")?;
        let guest = guest.clone();
        blocking(move || {
            // Somebody else may have been faster.
            if initramfs.exists() {
                return Ok(());
            }
            let read = |file: &String| {
                let bytes = fs_err::read(directory.join(MODULES).join(file))?;
                Ok((file.clone(), bytes))
            };
            let modules: io::Result<Vec<_>> = record.modules.iter().map(read).collect();
            let modules = modules.during("read the kernel's modules")?;
            initramfs::write(draft.path(), &guest, &modules).during("write the initramfs")?;
            draft.publish(&initramfs)
        })
        .await?;
        progress.done(Step::INITRAMFS, "initramfs written");
    }
    cache.touch(&name);
    cache
        .prune(".cpio", KEPT_INITRAMFS)
        .during("remove old initramfs files")?;
    Ok(kernel)
}

/// The kernel in an unpacked package: `boot/vmlinuz-*`.
fn kernel_file(tree: &Path) -> Result<PathBuf> {
    let boot = tree.join("boot");
    let entries = fs_err::read_dir(&boot).during("look into the kernel package")?;
    let mut names = entries
        .filter_map(|entry| entry.ok())
        .map(|entry| entry.path());
    names
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.as_bytes().starts_with(b"vmlinuz-"))
        })
        .ok_or_else(|| Error::Kernel {
            path: boot,
            reason: "it has no vmlinuz file".into(),
        })
}

fn modules_directory(tree: &Path, version: &str) -> PathBuf {
    let places = ["lib/modules", "usr/lib/modules"].map(|place| tree.join(place).join(version));
    places
        .into_iter()
        .find(|place| place.is_dir())
        .unwrap_or_else(|| tree.to_owned())
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use io::Write as _;
    let mut file = fs_err::File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Runs work that computes or does disk I/O for long on a thread that may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(error) => Err(error).during("finish background work"),
    }
}
