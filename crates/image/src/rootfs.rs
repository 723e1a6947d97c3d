//! From a recipe to a disk image.

use std::{
    fs::Permissions,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    apt::{self, Host, Source},
    bootstrap::Meter,
    cache::{Cache, remove},
    command::Program,
    error::{During as _, Result},
    ext4,
    fingerprint::Fingerprint,
    kernel::blocking,
    progress::{Progress, Step},
    recipe::{CUSTOMIZE, Recipe},
    scratch::Scratch,
    setup::Workshop,
};

/// How many images are kept, the most recently used ones.
const KEPT_IMAGES: usize = 8;
/// What nobody reads in a sandbox. The copyright files stay: the packages' licences ask for it.
const DPKG_OPTIONS: [&str; 8] = [
    "force-unsafe-io",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/man/*",
];

/// A root file system that is ready to be booted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFs {
    /// The disk: a raw, sparse ext4 image. Never written to again; clone or copy it. It is a
    /// cached file: images that have not been used for long are removed when others are built.
    pub image: PathBuf,
    /// Size of the disk, in MiB.
    pub disk_mib: u32,
    /// What the image takes on the host, in bytes.
    pub used_bytes: u64,
    /// Code name of the release, such as `bookworm`.
    pub suite: String,
    /// Everything that the programs said that made it.
    pub log: PathBuf,
    /// Of the recipe on this host.
    pub fingerprint: Fingerprint,
}

/// Builds the root file system of a recipe in `dir`, the image directory, or finds it there.
///
/// Needs to run as root and, if it builds, the host's package mirror. Takes half a minute or so.
///
/// # Errors
/// [`crate::Error::Recipe`], [`crate::Error::Host`], and [`crate::Error::Program`] with the last
/// lines of what failed and the path of the full log.
pub async fn build_rootfs(recipe: &Recipe, dir: &Path, progress: &Progress) -> Result<RootFs> {
    let host = Host::detect()?;
    recipe.validate(&host)?;
    let fingerprint = recipe.fingerprint(&host);
    let cache = Cache::open(dir, "rootfs")?;
    if let Some(found) = find(&cache, &fingerprint) {
        return Ok(found);
    }
    let lock = cache.lock(&fingerprint, progress).await?;
    if let Some(found) = find(&cache, &fingerprint) {
        return Ok(found);
    }
    let log = cache.path(&format!("{}.log", fingerprint.short()));
    remove(&log).during("remove the log of an earlier build")?;

    let scratch = Scratch::new(
        cache.path(&format!(".{}.scratch", fingerprint.short())),
        u64::from(recipe.room_mib) << 20,
    )?;
    let tree = bootstrap(recipe, &host, &scratch, &log, progress).await?;
    if !recipe.setup.is_empty() {
        let work = scratch.path().join("setup");
        let workshop = Workshop::open(&tree, work.clone(), &recipe.constraints, &log)?;
        workshop.run(&recipe.setup, progress).await?;
        remove(&work).during("remove what a setup left")?;
    }

    progress.message(Step::DISK_IMAGE, "packing the disk image");
    let draft = cache.draft(&lock, ".img")?;
    let bytes = u64::from(recipe.disk_mib) << 20;
    ext4::pack(
        &tree,
        draft.path(),
        bytes,
        &fingerprint,
        scratch.path(),
        &log,
    )
    .await?;
    let image = cache.path(&format!("{}.img", fingerprint.short()));
    let suite = recipe.suite_on(&host).to_owned();
    let disk_mib = recipe.disk_mib;
    let built = blocking(move || {
        drop(scratch);
        let file = fs_err::File::open(draft.path()).during("open the disk image")?;
        file.sync_all().during("write the disk image to disk")?;
        let used_bytes = file.metadata().during("measure the disk image")?.blocks() * 512;
        let built = RootFs {
            image: image.clone(),
            disk_mib,
            used_bytes,
            suite,
            log,
            fingerprint,
        };
        let record = serde_json::to_vec_pretty(&built).during("describe the disk image")?;
        // The description goes first: an image without one is not found, one with it is whole.
        fs_err::write(image.with_extension("json"), record).during("describe the disk image")?;
        draft.publish(&image)?;
        Ok(built)
    })
    .await?;
    cache
        .prune(".img", KEPT_IMAGES)
        .during("remove old images")?;
    progress.done(
        Step::DISK_IMAGE,
        format!("{} MB on disk", built.used_bytes / 1_000_000),
    );
    Ok(built)
}

fn find(cache: &Cache, fingerprint: &Fingerprint) -> Option<RootFs> {
    let name = format!("{}.img", fingerprint.short());
    let image = cache.path(&name);
    let record = fs_err::read(image.with_extension("json")).ok()?;
    let found: RootFs = serde_json::from_slice(&record).ok()?;
    if !image.exists() {
        return None;
    }
    cache.touch(&name);
    // The directory may have been moved since.
    Some(RootFs {
        log: image.with_extension("log"),
        image,
        ..found
    })
}

/// Installs the recipe's packages into a directory and returns it.
async fn bootstrap(
    recipe: &Recipe,
    host: &Host,
    scratch: &Scratch,
    log: &Path,
    progress: &Progress,
) -> Result<PathBuf> {
    let suite = recipe.suite_on(host);
    let sources = host.sources(suite).await?;
    let place = if scratch.in_memory() {
        "in memory"
    } else {
        "on disk"
    };
    progress.message(Step::BOOTSTRAP, format!("bootstrapping {suite} {place}"));

    let work = scratch.path();
    let keyring = host.keyring();
    let render = |sources: Vec<Source>| {
        sources
            .iter()
            .map(|source| source.render(keyring))
            .collect::<Vec<_>>()
            .join("\n")
    };
    let inside = render(sources.iter().map(Source::without_credentials).collect());
    let (outside_file, inside_file) = (work.join("build.sources"), work.join("sandbox.sources"));
    let customize = work.join("customize.sh");
    let temporary = work.join("tmp");
    let write = || {
        fs_err::write(&outside_file, render(sources))?;
        fs_err::set_permissions(&outside_file, Permissions::from_mode(0o600))?;
        fs_err::write(&inside_file, inside)?;
        fs_err::write(&customize, CUSTOMIZE)?;
        fs_err::set_permissions(&customize, Permissions::from_mode(0o755))?;
        fs_err::create_dir(&temporary)
    };
    write().during("prepare a bootstrap")?;

    let tree = work.join("tree");
    let mut program = Program::new("mmdebstrap", "mmdebstrap", "bootstrap the root file system")
        .isolated()
        .args([
            "--verbose",
            "--mode=root",
            "--variant=minbase",
            "--format=directory",
        ])
        .args([
            "--architectures=amd64",
            "--aptopt=Acquire::Languages \"none\"",
        ])
        .args(DPKG_OPTIONS.map(|option| format!("--dpkgopt={option}")))
        .args(
            apt::transport_options()
                .await?
                .iter()
                .map(|option| format!("--aptopt={option}")),
        )
        .arg(format!("--include={}", recipe.packages.join(",")));
    for name in ["auth.conf", "auth.conf.d"] {
        let path = Path::new("/etc/apt").join(name);
        if path.exists() {
            program = program.arg(format!("--setup-hook=copy-in {} /etc/apt", path.display()));
        }
    }
    // Packages that offer alternatives fail to install where not even the directory is.
    program = program.arg("--essential-hook=mkdir -p \"$1/usr/share/man/man1\"");
    let mut hook = std::ffi::OsString::from("--customize-hook=");
    hook.push(&customize);
    let mut meter = Meter::default();
    program
        .arg(hook)
        .arg(suite)
        .arg(&tree)
        .arg(&outside_file)
        .env("TMPDIR", &temporary)
        .env("CUBICLE_SOURCES", &inside_file)
        .log(log)
        .run(|line| {
            if let Some((message, fraction)) = meter.line(line) {
                progress.fraction(Step::BOOTSTRAP, message, fraction);
            }
        })
        .await?;
    progress.done(Step::BOOTSTRAP, format!("{suite} installed"));
    Ok(tree)
}
