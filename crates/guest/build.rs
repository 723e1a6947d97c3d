//! Generates the message types and service traits of `proto/*.proto`.
//!
//! The descriptors come from `protox`, a compiler in Rust, so that no `protoc` has to be installed.

use std::error::Error;
use std::path::PathBuf;

use protox::prost::Message as _;

const FILES: [&str; 2] = ["process.proto", "filesystem.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out_dir = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);

    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler
        .include_imports(true)
        .include_source_info(true)
        .open_files(FILES)?;
    let descriptors = out_dir.join("descriptors.bin");
    std::fs::write(&descriptors, compiler.file_descriptor_set().encode_to_vec())?;

    connectrpc_build::Config::new()
        .files(&FILES)
        .descriptor_set(&descriptors)
        .emit_rerun_directives(false)
        .gate_client_feature(true)
        .include_file("services.rs")
        .compile()?;
    Ok(())
}
