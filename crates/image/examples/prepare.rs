//! Makes a kernel, an initramfs and the root file system of a recipe, to be booted by hand:
//!
//! ```sh
//! cargo run -p cubicle-image --example prepare -- IMAGE_DIRECTORY [RECIPE [KERNEL_PACKAGE]]
//! ```
//!
//! `CUBICLE_GUEST` names the guest daemon. With `-` for the kernel, only the root file system is made.

use std::{env, error::Error, path::Path};

use cubicle_image::{GuestBinary, KernelSource, Progress, Recipe, build_rootfs, prepare_kernel};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let directory = arguments.next().ok_or("say where the images shall be")?;
    let directory = Path::new(&directory);
    let recipe = arguments.next().unwrap_or_else(|| "base".into());
    let recipe =
        Recipe::by_name(&recipe).ok_or_else(|| format!("no recipe is called `{recipe}`"))?;
    let wanted = arguments.next();
    let no_kernel = wanted.as_deref() == Some("-");
    let source = wanted.map_or_else(KernelSource::default, |name| {
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
    let kernel = if no_kernel {
        None
    } else {
        let guest = GuestBinary::locate()?;
        Some(prepare_kernel(directory, &source, &guest, &progress).await?)
    };
    let rootfs = build_rootfs(&recipe, directory, &progress).await;
    drop(progress);
    printer.await?;
    let rootfs = rootfs?;

    if let Some(kernel) = kernel {
        println!(
            "kernel     {} ({})",
            kernel.vmlinux.display(),
            kernel.version
        );
        println!("initramfs  {}", kernel.initramfs.display());
    }
    println!(
        "rootfs     {} ({} MB)",
        rootfs.image.display(),
        rootfs.used_bytes / 1_000_000
    );
    Ok(())
}
