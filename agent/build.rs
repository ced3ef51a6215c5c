//! Generates messages, clients and servers from `proto/`, with no protoc: protox parses, tonic writes Rust.

use std::error::Error;

const FILES: [&str; 7] = [
    "health.proto",
    "registration.proto",
    "csi.proto",
    "cri.proto",
    "deviceplugin.proto",
    "dra.proto",
    "podresources.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    tonic_prost_build::configure().build_transport(false).compile_fds(protox::compile(FILES, ["proto"])?)?;
    Ok(())
}
