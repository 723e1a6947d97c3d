//! The server: every part put together in one process, and taken apart again in order.

mod base;
mod fleet;
mod images;
mod listener;
mod parts;
mod routes;
mod selfcheck;
mod store;

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::serve::ListenerExt as _;
use cubicle_api::{ApiConfig, AppState, AuthMode};
use cubicle_control::Control;
use cubicle_cow::Store;
use cubicle_image::{GuestBinary, KernelSource, Progress};
use cubicle_node::Node;
use cubicle_proxy::Proxy;
use cubicle_vmm::{
    probe::{self, ProbeConfig, Verdict},
    qemu::{Qemu, QemuConfig},
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

pub(crate) use self::images::ImageOptions;
pub(crate) use self::selfcheck::{SelfCheck, self_check};
use self::{
    fleet::Images,
    listener::Listener,
    parts::{close_store, hostname, open_services, open_store, store_kind},
    routes::SandboxRoutes,
};
use crate::{
    cli::{Accelerator, DEFAULT_DATA_DIR, Up},
    client::Connection,
    error::Error,
};

/// The template that every installation has.
pub(crate) const BASE: &str = "base";
/// Who commands in sandboxes run as unless they say otherwise.
const USER: &str = "user";
/// Where sockets and other things live that must not outlive the machine's uptime.
const RUN_DIR: &str = "/run/cubicle";

/// What happens while the server starts, for whoever shows it.
#[derive(Debug, Clone)]
pub(crate) enum Starting {
    /// Something is being done; 0 to 1 of it, where that is known.
    Progress {
        step: String,
        message: String,
        fraction: Option<f64>,
    },
    /// Something has been done or found.
    Done { step: String, message: String },
}

/// Told what happens while the server starts.
pub(crate) type Report<'a> = &'a (dyn Fn(Starting) + Send + Sync);

/// A server that accepts requests.
pub(crate) struct Server {
    /// How to reach it.
    pub(crate) connection: Connection,
    /// What runs guest instructions: `kvm` or `tcg`.
    pub(crate) accelerator: String,
    node: Node,
    control: Control,
    store: Store,
    keep: bool,
    closing: watch::Sender<bool>,
    serving: JoinHandle<()>,
}

/// The parts below the node, with their directories.
struct Dirs {
    data: PathBuf,
    images: PathBuf,
    run: PathBuf,
}

impl Dirs {
    fn create(data: &Path) -> Result<Self, Error> {
        use std::os::unix::fs::DirBuilderExt as _;
        // Two servers with different data directories must not meet in one run directory.
        let run = match data {
            data if data == Path::new(DEFAULT_DATA_DIR) => PathBuf::from(RUN_DIR),
            data => PathBuf::from(format!("{RUN_DIR}-{}", pool_name(data).as_str())),
        };
        let dirs = Self {
            data: data.to_owned(),
            images: data.join("images"),
            run,
        };
        for dir in [&dirs.data, &dirs.images, &dirs.run] {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(|source| Error::File {
                    action: "make",
                    path: dir.clone(),
                    source,
                })?;
        }
        Ok(dirs)
    }
}

/// What runs guest instructions on this machine: what was asked for, or what the probe finds.
async fn accelerator(
    options: &Up,
    kernel: &cubicle_image::Kernel,
    dirs: &Dirs,
) -> Result<Verdict, Error> {
    let asked = |accelerator| Verdict {
        accelerator,
        reason: "asked for with --accelerator".to_owned(),
        boot_ms: None,
    };
    match options.accelerator {
        Accelerator::Kvm => Ok(asked(probe::Accelerator::Kvm)),
        Accelerator::Tcg => Ok(asked(probe::Accelerator::Tcg)),
        Accelerator::Auto => probe_accelerator(kernel, dirs).await,
    }
}

async fn probe_accelerator(kernel: &cubicle_image::Kernel, dirs: &Dirs) -> Result<Verdict, Error> {
    let config = ProbeConfig {
        binary: QemuConfig::default().binary,
        kernel: kernel.vmlinux.clone(),
        kernel_fingerprint: kernel.kernel_fingerprint.as_str().to_owned(),
        run_root: dirs.run.clone(),
        cache: dirs.data.join("accelerator.json"),
    };
    probe::probe(&config)
        .await
        .map_err(|error| Error::setup("probe the accelerator", error))
}

/// Where the guest kernel comes from: the file that was named, or the distribution.
fn kernel_source(options: &Up) -> KernelSource {
    match &options.kernel {
        Some(path) => KernelSource::File {
            path: path.clone(),
            modules: options.kernel_modules.clone(),
        },
        None => KernelSource::default(),
    }
}

/// The accelerator of this machine, for `doctor`: none while there is no kernel to probe with.
/// That is the distribution's, which is not downloaded for it.
pub(crate) async fn accelerator_verdict(data_dir: &Path) -> Result<Option<Verdict>, Error> {
    if !data_dir.join("images/kernels/distribution").exists() {
        return Ok(None);
    }
    let dirs = Dirs::create(data_dir)?;
    let failed = |error| Error::setup("prepare the guest kernel", error);
    let guest = GuestBinary::locate().map_err(failed)?;
    let source = KernelSource::default();
    let kernel = cubicle_image::prepare_kernel(&dirs.images, &source, &guest, &Progress::silent())
        .await
        .map_err(failed)?;
    probe_accelerator(&kernel, &dirs).await.map(Some)
}

/// Name of the slot pool that belongs to a data directory: `cubicle` for the usual one.
fn pool_name(data: &Path) -> cubicle_net::PoolName {
    use sha2::{Digest as _, Sha256};
    if data == Path::new(DEFAULT_DATA_DIR) {
        return cubicle_net::PoolName::default();
    }
    // The same after every upgrade: what it names is found again by it.
    let digest = Sha256::digest(data.as_os_str().as_encoded_bytes());
    let number = u32::from_be_bytes([0, digest[0], digest[1], digest[2]]) & 0xf_ffff;
    format!("cub{number:05x}").parse().unwrap_or_default()
}

impl Server {
    /// Prepares whatever is missing and starts to serve.
    pub(crate) async fn start(
        data_dir: &Path,
        options: &Up,
        report: Report<'_>,
    ) -> Result<Self, Error> {
        if !rustix::process::geteuid().is_root() {
            return Err(
                Error::setup("start the server", "it makes VMs and networks")
                    .with_hint("run it as root: `sudo cubicle up`"),
            );
        }
        let catalogue = store::config(options.store.as_deref())?;
        if options.no_auth && !options.listen.ip().is_loopback() {
            return Err(Error::Usage(format!(
                "--no-auth is for loopback addresses only, and {} is none",
                options.listen.ip()
            )));
        }
        let done = |step: &str, message: String| {
            report(Starting::Done {
                step: step.to_owned(),
                message,
            });
        };
        let listener = TcpListener::bind(options.listen).await.map_err(|source| {
            Error::setup(format!("listen on {}", options.listen), source)
                .with_hint("stop what uses the port, or choose another with --listen")
        })?;
        let address = listener
            .local_addr()
            .map_err(|source| Error::setup("ask for the server's own address", source))?;

        let dirs = Dirs::create(data_dir)?;
        let guest = match &options.guest {
            Some(path) => GuestBinary::load(path),
            None => GuestBinary::locate(),
        }
        .map_err(|error| {
            Error::setup("find the guest daemon", error)
                .with_hint("build it with `make build`, or name it with --guest")
        })?;
        let images = Images {
            dir: dirs.images.clone(),
            kernel: kernel_source(options),
            guest,
            oci: options.images.open(&dirs.images)?,
            user: USER.to_owned(),
        };
        let kernel = with_progress(report, |progress| {
            let images = images.clone();
            async move {
                cubicle_image::prepare_kernel(&images.dir, &images.kernel, &images.guest, &progress)
                    .await
            }
        })
        .await
        .map_err(|error| Error::setup("prepare the guest kernel", error))?;
        done("kernel", format!("Linux {}", kernel.version));

        let Verdict {
            accelerator,
            reason,
            ..
        } = accelerator(options, &kernel, &dirs).await?;
        done("accelerator", format!("{accelerator}: {reason}"));
        let qemu = Qemu::open(QemuConfig {
            accelerator,
            ..QemuConfig::default()
        })
        .await
        .map_err(|error| {
            Error::setup("use QEMU", error).with_hint("`cubicle doctor` says what is missing")
        })?;
        let hypervisor = format!("QEMU {} ({accelerator})", qemu.features().version);
        done("hypervisor", hypervisor.clone());

        let store = open_store(&dirs, options.store_gib).await?;
        done(
            "store",
            format!("{} on {}", dirs.data.display(), store_kind(&store)),
        );
        let opened = open_services(
            &dirs,
            options,
            qemu,
            store.clone(),
            &images,
            &hypervisor,
            catalogue,
            &done,
        );
        let (node, control, key) = match opened.await {
            Ok(opened) => opened,
            Err(error) => {
                close_store(store).await;
                return Err(error);
            }
        };
        let connection = Connection {
            url: format!("http://{}", reachable(address)),
            api_key: key,
            domain: options.domain.clone(),
        };
        let config = ApiConfig {
            auth: if options.no_auth {
                AuthMode::Open
            } else {
                AuthMode::Key
            },
            open_metrics: address.ip().is_loopback(),
            domain: Some(options.domain.clone()),
            node_id: hostname(),
            commit: option_env!("CUBICLE_COMMIT"),
        };
        let proxy = Proxy::new(
            Arc::new(SandboxRoutes::new(control.clone())),
            Arc::new(node.clone()),
        );
        let state = AppState::new(control.clone(), config, |registry| {
            registry.register_collector(Box::new(proxy.metrics().clone()));
        });
        // Around the whole router: what is for a sandbox is answered before any route is matched.
        let router = cubicle_api::router(state).layer(axum::middleware::from_fn_with_state(
            proxy,
            cubicle_proxy::intercept,
        ));
        let (closing, mut closed) = watch::channel(false);
        let unused = options.images.kept_for();
        tokio::spawn(images::clean(images.oci.clone(), unused, closed.clone()));
        let serving = tokio::spawn(async move {
            let stop = async move {
                // An error means that the sender is gone, which is the end, too.
                let _ = closed.wait_for(|closing| *closing).await;
            };
            // The tap does nothing; it is what makes a listener of one's own tell addresses.
            let listener = Listener(listener).tap_io(|_| ());
            let service = router.into_make_service_with_connect_info::<SocketAddr>();
            if let Err(error) = axum::serve(listener, service)
                .with_graceful_shutdown(stop)
                .await
            {
                tracing::error!(%error, "the listener failed");
            }
        });
        let server = Self {
            connection,
            accelerator: accelerator.to_string(),
            node,
            control,
            store,
            keep: options.keep,
            closing,
            serving,
        };
        let introduced = async {
            server.connection.save(&dirs.data)?;
            server.ensure_base(&kernel, report).await
        };
        if let Err(error) = introduced.await {
            server.stop().await?;
            return Err(error);
        }
        Ok(server)
    }

    /// Stops serving and takes everything apart: sandboxes, networks, mounts. With `--keep` the
    /// sandboxes run on.
    pub(crate) async fn stop(self) -> Result<(), Error> {
        let failed = |error| Error::setup("stop the sandboxes", error);
        self.closing.send_replace(true);
        self.control.templates.end_builds().await;
        let stopped = if self.keep {
            self.node.detach().await.map_err(failed)
        } else {
            self.node.shutdown().await.map_err(failed)
        };
        self.control.close().await;
        // Connections that clients keep open must not hold the server up.
        self.serving.abort();
        drop(self.node);
        close_store(self.store).await;
        stopped
    }
}

/// Runs work that reports its progress.
async fn with_progress<F, T, E>(
    report: Report<'_>,
    work: impl FnOnce(Progress) -> F,
) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    let (progress, mut events) = Progress::channel();
    let work = work(progress);
    let show = async {
        while let Some(event) = events.recv().await {
            report(Starting::Progress {
                step: event.step.name().to_owned(),
                message: event.message,
                fraction: event.fraction.map(f64::from),
            });
        }
    };
    tokio::join!(work, show).0
}

/// The address that clients of this machine use for one that was listened on.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        ip if ip.is_unspecified() => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), address.port()),
        _ => address,
    }
}
