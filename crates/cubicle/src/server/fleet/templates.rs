//! Templates on this machine: what they begin with, and what is done in the VMs they are made in.

use std::{
    collections::VecDeque,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_compression::tokio::bufread::GzipDecoder;
use cubicle_control::{
    fleet::{
        BuildOrder, BuildStep, Command, CopyFiles, Ended, FleetError, Level, OriginFacts, Output,
        Program, Source,
    },
    template::{Defaults, Origin, Probe, RegistryAuth},
};
use cubicle_ids::SandboxId;
use cubicle_image::{Host, Kernel, Progress, Ready, Recipe};
use cubicle_node::{
    Body, ImageSource, Printed, ProgramEnd, RunProgram, TemplateBuild, TemplateImage, WarmUp,
};
use cubicle_protocol::guest_api::CopyQuery;
use futures::TryStreamExt as _;
use http_body_util::{BodyExt as _, StreamBody};
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    sync::mpsc,
};
use tokio_util::io::ReaderStream;

use super::{NodeFleet, failed};
use crate::error::Chain;

/// Step of everything that happens before the first step of a build.
const BASE: &str = "base";
/// How long a server in a sandbox may take to answer one look.
const PROBE_WITHIN: Duration = Duration::from_secs(10);
/// How much of an answer is read to find its status.
const STATUS_LINE: u64 = 256;

/// The images that builds have found last; their blobs stay as long as they are here.
#[derive(Debug, Default)]
pub(super) struct Pulled(Mutex<VecDeque<Arc<cubicle_oci::Image>>>);

impl Pulled {
    /// More than builds that run at the same time.
    const MOST: usize = 32;

    fn keep(&self, image: cubicle_oci::Image) -> Arc<cubicle_oci::Image> {
        let image = Arc::new(image);
        let mut images = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        images.retain(|known| known.digest != image.digest);
        images.push_back(Arc::clone(&image));
        if images.len() > Self::MOST {
            images.pop_front();
        }
        image
    }

    fn find(&self, digest: &str) -> Option<Arc<cubicle_oci::Image>> {
        let images = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = images
            .iter()
            .find(|image| image.digest.to_string() == digest);
        found.cloned()
    }
}

impl NodeFleet {
    pub(super) async fn look_at(
        &self,
        origin: &Origin,
        steps: &mpsc::UnboundedSender<BuildStep>,
    ) -> Result<OriginFacts, FleetError> {
        match origin {
            Origin::Recipe(name) => self.look_at_recipe(name).await,
            Origin::Image { reference, auth } => {
                let looking = |progress: Progress| async move {
                    self.look_at_image(reference, auth.as_ref(), &progress)
                        .await
                };
                reported(steps, looking).await
            }
            Origin::Template(reference) => Err(FleetError::Unsupported {
                what: format!("booting the template {reference} as an image"),
            }),
        }
    }

    async fn look_at_recipe(&self, name: &str) -> Result<OriginFacts, FleetError> {
        let recipe = recipe(name)?;
        let host = Host::detect().map_err(|error| failed("look at this host")(error.into()))?;
        let kernel = self.kernel().await?;
        let recipe_fingerprint = recipe.fingerprint(&host);
        let ready = match recipe.ready {
            None => Probe::None,
            Some(Ready::Http { port, path }) => Probe::Http { port, path },
            Some(Ready::Tcp { port }) => Probe::Tcp { port },
            Some(Ready::Command(command)) => Probe::Command(command),
        };
        Ok(OriginFacts {
            source: Source::Recipe(name.to_owned()),
            fingerprint: format!("{} {recipe_fingerprint}", kernel.fingerprint),
            defaults: Defaults {
                env: recipe.env,
                ports: recipe.ports,
                ..Defaults::default()
            },
            command: Vec::new(),
            start: recipe.start.map(Command::Shell),
            ready,
        })
    }

    async fn look_at_image(
        &self,
        reference: &str,
        auth: Option<&RegistryAuth>,
        progress: &Progress,
    ) -> Result<OriginFacts, FleetError> {
        let wrong = |error: cubicle_oci::Error| FleetError::Failed {
            doing: format!("get the image {reference}"),
            why: Chain(&error).to_string(),
        };
        let auth = auth.map(|auth| cubicle_oci::Auth {
            username: auth.username.clone(),
            password: auth.password.clone(),
        });
        let images = &self.images.oci;
        let resolved = images.resolve(reference, auth.as_ref()).await;
        let found = match resolved.map_err(wrong)? {
            cubicle_oci::Resolved::Recipe(name) => return self.look_at_recipe(&name).await,
            cubicle_oci::Resolved::Image(found) => found,
        };
        let image = images.pull(&found, auth.as_ref(), progress).await;
        let image = self.pulled.keep(image.map_err(wrong)?);
        let kernel = self.kernel().await?;
        let config = &image.config;
        // What it holds and says, however it came here.
        let layers = image.layers.iter().map(|layer| layer.content.to_string());
        let content = format!("{:?} {config:?}", layers.collect::<Vec<_>>());
        let content = hex::encode(Sha256::digest(content));
        Ok(OriginFacts {
            source: Source::Image(image.digest.to_string()),
            fingerprint: format!("{} {content}", kernel.fingerprint),
            defaults: Defaults {
                env: config.env.clone(),
                user: Some(config.user.clone().unwrap_or_else(|| "root".to_owned())),
                workdir: Some(config.workdir.clone().unwrap_or_else(|| "/".to_owned())),
                ports: config.ports.clone(),
                ..Defaults::default()
            },
            command: [&config.entrypoint[..], &config.cmd[..]].concat(),
            start: None,
            ready: Probe::None,
        })
    }

    pub(super) async fn boot(
        &self,
        order: BuildOrder,
        steps: &mpsc::UnboundedSender<BuildStep>,
    ) -> Result<(), FleetError> {
        let doing = format!("build template {}", order.template);
        let building = |progress: Progress| async move {
            let build = self.template(&order, &progress).await?;
            let built = self.node.build_template(build, progress).await;
            built.map(drop).map_err(failed(doing))
        };
        reported(steps, building).await
    }

    /// The node's build that an order stands for.
    pub(super) async fn template(
        &self,
        order: &BuildOrder,
        progress: &Progress,
    ) -> Result<TemplateBuild, FleetError> {
        let images = &self.images;
        // Who else there is in an image that others have made, nobody knows.
        let usual = || match &order.source {
            Source::Recipe(_) => WarmUp::usual(&images.user),
            _ => WarmUp::usual("root")
                .into_iter()
                .map(WarmUp::if_possible)
                .collect(),
        };
        let (source, warm_up) = match &order.source {
            Source::Recipe(name) => {
                let source = ImageSource::Recipe {
                    recipe: Box::new(Recipe {
                        disk_mib: order.disk_mib,
                        ..recipe(name)?
                    }),
                    kernel: images.kernel.clone(),
                    guest: images.guest.clone(),
                    dir: images.dir.clone(),
                };
                (source, usual())
            }
            Source::Image(digest) => {
                let gone = || FleetError::Failed {
                    doing: format!("unpack the image {digest}"),
                    why: "too many others were looked at since; build it again".to_owned(),
                };
                let image = self.pulled.find(digest).ok_or_else(gone)?;
                let disk = images.oci.disk(&image, order.disk_mib, progress).await;
                let disk = disk.map_err(|error| FleetError::Failed {
                    doing: format!("unpack the image {}", image.name),
                    why: Chain(&error).to_string(),
                })?;
                let image = self
                    .image(&disk.image, disk.fingerprint.to_string())
                    .await?;
                (image, usual())
            }
            Source::Snapshot(id) => {
                let snapshot = self.node.store().snapshot(id);
                let snapshot =
                    snapshot.map_err(|error| failed(format!("boot {id}"))(error.into()))?;
                let labels = &snapshot.manifest().labels;
                let rootfs = labels.get("rootfs").cloned().unwrap_or_default();
                (self.image(&snapshot.disk(0), rootfs).await?, usual())
            }
        };
        Ok(TemplateBuild {
            snapshot: order.snapshot.clone(),
            template: Some(order.template.clone()),
            source,
            cpus: order.cpu_count,
            memory_mib: order.memory_mib,
            warm_up,
            settle: TemplateBuild::SETTLE,
        })
    }

    /// A root file system with this server's kernel.
    async fn image(&self, rootfs: &Path, fingerprint: String) -> Result<ImageSource, FleetError> {
        let kernel = self.kernel().await?;
        Ok(ImageSource::Ready(TemplateImage {
            kernel: kernel.vmlinux,
            initramfs: kernel.initramfs,
            kernel_fingerprint: kernel.fingerprint.to_string(),
            rootfs: rootfs.to_owned(),
            rootfs_fingerprint: fingerprint,
        }))
    }

    /// The kernel of this server's templates; made already, unless something of it was lost.
    pub(super) async fn kernel(&self) -> Result<Kernel, FleetError> {
        let images = &self.images;
        let (dir, silent) = (&images.dir, Progress::silent());
        let kernel =
            cubicle_image::prepare_kernel(dir, &images.kernel, &images.guest, &silent).await;
        kernel.map_err(|error| failed("prepare the kernel")(error.into()))
    }

    pub(super) async fn run_in(
        &self,
        id: &SandboxId,
        program: Program,
        output: &mpsc::UnboundedSender<Output>,
    ) -> Result<Ended, FleetError> {
        let mut order = RunProgram {
            program: String::new(),
            args: Vec::new(),
            user: program.user,
            env: program.env.into_iter().collect(),
            cwd: program.workdir,
            deadline: program.within,
        };
        let tell = |printed: Printed| {
            let printed = match printed {
                Printed::Stdout(bytes) => Output::Stdout(bytes),
                Printed::Stderr(bytes) => Output::Stderr(bytes),
            };
            // Whoever reads it may have seen enough.
            let _ = output.send(printed);
        };
        let doing = format!("run a program in sandbox {id}");
        let ended = match program.command {
            Command::Exec(words) => {
                let mut words = words.into_iter();
                order.program = words.next().unwrap_or_default();
                order.args = words.collect();
                self.node.run(id, &order, tell).await
            }
            Command::Shell(command) => {
                order.program = "/bin/bash".to_owned();
                order.args = ["-l", "-c", &command].map(str::to_owned).to_vec();
                // The guest takes what shell there is.
                self.node.run(id, &order, tell).await
            }
        };
        let ended = ended.map_err(|error| match error {
            cubicle_node::Error::NoProgram { program, .. } if program == "/bin/bash" => {
                FleetError::Failed {
                    doing: doing.clone(),
                    why: "the image has no shell, neither /bin/bash nor /bin/sh".to_owned(),
                }
            }
            cubicle_node::Error::Program { reason, .. } => FleetError::Failed {
                doing: doing.clone(),
                why: reason,
            },
            error => failed(doing.clone())(error),
        });
        ended.map(|ProgramEnd { exit_code, status }| Ended {
            success: exit_code == Some(0),
            status,
        })
    }

    pub(super) async fn copy_into(
        &self,
        id: &SandboxId,
        files: CopyFiles,
    ) -> Result<(), FleetError> {
        let unreadable = |error: std::io::Error| FleetError::Failed {
            doing: format!("read the files of COPY {}", files.src),
            why: error.to_string(),
        };
        let file = tokio::fs::File::open(&files.archive).await;
        let archive = decompressed(file.map_err(unreadable)?).await;
        let query = CopyQuery {
            src: files.src.clone(),
            dest: files.dest.clone(),
            owner: files.user.clone(),
            mode: files.mode,
        };
        let body = archive.map_err(unreadable)?;
        let copying = self.node.copy(id, &query, body);
        let doing = format!("copy {} to {}", files.src, files.dest);
        match tokio::time::timeout(files.within, copying).await {
            Ok(copied) => copied.map_err(failed(doing)),
            Err(_elapsed) => Err(FleetError::Failed {
                doing,
                why: format!("it took longer than {:?}", files.within),
            }),
        }
    }

    pub(super) async fn answers(
        &self,
        id: &SandboxId,
        port: u16,
        path: Option<&str>,
    ) -> Result<bool, FleetError> {
        let mut stream = match self.node.connect(id, port).await {
            Ok(stream) => stream,
            Err(cubicle_node::Error::PortClosed { .. }) => return Ok(false),
            Err(error) => {
                return Err(failed(format!("look at port {port} of sandbox {id}"))(
                    error,
                ));
            }
        };
        let Some(path) = path else { return Ok(true) };
        let asking = async {
            let request = format!(
                "GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\nUser-Agent: cubicle\r\n\
                 Accept: */*\r\nConnection: close\r\n\r\n"
            );
            stream.write_all(request.as_bytes()).await?;
            stream.flush().await?;
            let mut line = String::new();
            let mut answer = BufReader::new(stream).take(STATUS_LINE);
            answer.read_line(&mut line).await?;
            std::io::Result::Ok(line)
        };
        // A server that is still coming up may do anything.
        let answered = tokio::time::timeout(PROBE_WITHIN, asking).await;
        Ok(answered.is_ok_and(|line| line.is_ok_and(|line| is_good(&line))))
    }
}

/// Whether an HTTP status line says that all is well.
fn is_good(line: &str) -> bool {
    let mut words = line.split_ascii_whitespace();
    let is_http = words.next().is_some_and(|word| word.starts_with("HTTP/"));
    let status = words.next().and_then(|word| word.parse::<u16>().ok());
    is_http && status.is_some_and(|status| (200..400).contains(&status))
}

fn recipe(name: &str) -> Result<Recipe, FleetError> {
    Recipe::by_name(name).ok_or_else(|| FleetError::Unsupported {
        what: format!("the recipe `{name}`"),
    })
}

/// The content of an archive, with or without gzip around it.
async fn decompressed(file: tokio::fs::File) -> std::io::Result<Body> {
    let mut file = BufReader::new(file);
    let is_gzip = file.fill_buf().await?.starts_with(&[0x1f, 0x8b]);
    Ok(if is_gzip {
        body(BufReader::new(GzipDecoder::new(file)))
    } else {
        body(file)
    })
}

fn body(reader: impl AsyncBufRead + Send + 'static) -> Body {
    let frames = ReaderStream::with_capacity(reader, 64 << 10)
        .map_ok(http_body::Frame::data)
        .map_err(|error| Box::new(error) as cubicle_node::BoxError);
    StreamBody::new(frames).boxed_unsync()
}

/// Does something whose progress becomes lines of a log.
async fn reported<T, F>(
    steps: &mpsc::UnboundedSender<BuildStep>,
    work: impl FnOnce(Progress) -> F,
) -> T
where
    F: Future<Output = T>,
{
    let (progress, mut events) = Progress::channel();
    let report = async {
        let mut last = None;
        while let Some(event) = events.recv().await {
            // Who counts bytes says the same over and over.
            if last.as_ref() == Some(&event.message) {
                continue;
            }
            last = Some(event.message.clone());
            let step = BuildStep {
                level: Level::Info,
                step: Some(BASE.to_owned()),
                message: format!("{}: {}", event.step.name(), event.message),
            };
            // Whoever asked may have gone; the work goes on.
            let _ = steps.send(step);
        }
    };
    let (done, ()) = tokio::join!(work(progress), report);
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_good_status_is_below_400() {
        for good in [
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.0 204\r\n",
            "HTTP/1.1 302 Found\r\n",
        ] {
            assert!(is_good(good), "{good}");
        }
        for bad in [
            "",
            "HTTP/1.1 404 Not Found\r\n",
            "HTTP/1.1 503\r\n",
            "220 smtp\r\n",
        ] {
            assert!(!is_good(bad), "{bad}");
        }
    }

    #[tokio::test]
    async fn archives_come_with_and_without_gzip() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut zipped = async_compression::tokio::write::GzipEncoder::new(Vec::new());
        zipped.write_all(b"content").await.expect("compress");
        zipped.shutdown().await.expect("compress");
        for (name, bytes) in [
            ("plain", b"content".to_vec()),
            ("zipped", zipped.into_inner()),
        ] {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).expect("write");
            let file = tokio::fs::File::open(&path).await.expect("open");
            let body = decompressed(file).await.expect("body");
            let read = body.collect().await.expect("read").to_bytes();
            assert_eq!(read, &b"content"[..], "{name}");
        }
    }
}
