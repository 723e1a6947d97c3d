//! Makes a kernel, an initramfs and the root file system `base`, to be booted by hand:
//!
//! ```sh
//! cargo run -p cubicle-image --example prepare -- IMAGE_DIRECTORY [KERNEL_PACKAGE]
//! ```
//!
//! `CUBICLE_GUEST` names the guest daemon.

use std::{env, error::Error, path::Path};

use cubicle_image::{GuestBinary, KernelSource, Progress, Recipe, build_rootfs, prepare_kernel};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let directory = arguments.next().ok_or("say where the images shall be")?;
    let directory = Path::new(&directory);
    let source = arguments.next().map_or_else(KernelSource::default, |name| {
        // A path is told from the name of a package by its slash.
        if name.contains('/') {
            KernelSource::File {
                path: name.into(),
                modules: None,
            }
        } else {
            KernelSource::Package { name }
        }
    });

    let (progress, mut events) = Progress::channel();
    let printer = tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            let percent = event
                .fraction
                .map_or(String::new(), |part| format!("{:3.0} % ", part * 100.0));
            eprintln!("{:<16} {percent}{}", event.step.name(), event.message);
        }
    });
    let kernel = prepare_kernel(directory, &source, &GuestBinary::locate()?, &progress).await?;
    let rootfs = build_rootfs(&Recipe::base(), directory, &progress).await?;
    drop(progress);
    printer.await?;

    println!(
        "kernel     {} ({})",
        kernel.vmlinux.display(),
        kernel.version
    );
    println!("initramfs  {}", kernel.initramfs.display());
    println!(
        "rootfs     {} ({} MB)",
        rootfs.image.display(),
        rootfs.used_bytes / 1_000_000
    );
    Ok(())
}
