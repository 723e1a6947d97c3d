//! Builds the library that is preloaded into QEMU, for the crate to carry inside itself.

use std::{env, path::PathBuf, process::Command};

fn main() {
    let zygote = "../zygote";
    for input in ["src", "Cargo.toml"] {
        println!("cargo::rerun-if-changed={zygote}/{input}");
    }
    let variable = |name: &str| env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"));
    let target = PathBuf::from(variable("OUT_DIR")).join("zygote");
    // A build within the build, in a directory of its own: as a dependency, the library would be
    // linked in, and replace the C library's entry in every program that uses this crate.
    let status = Command::new(variable("CARGO"))
        .args([
            "rustc",
            "--locked",
            "--quiet",
            "--lib",
            "--crate-type=cdylib",
        ])
        .args(["--profile=zygote", "--features=preload", "--manifest-path"])
        .arg(format!("{zygote}/Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        // Clippy runs build scripts, and has its driver take the compiler's place.
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("the build of {zygote} failed: {status}"),
        Err(error) => panic!("cannot run cargo to build {zygote}: {error}"),
    }
    let library = target.join("zygote/libcubicle_zygote.so");
    println!("cargo::rustc-env=CUBICLE_ZYGOTE={}", library.display());
}
