//! Generates etcd's messages and clients from `proto/`, with no protoc: protox parses, tonic writes Rust.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["etcd.proto"], ["proto"])?;
    let mut messages = tonic_prost_build::Config::new();
    messages.bytes(["."]);
    tonic_prost_build::configure()
        .build_transport(false)
        .build_server(false)
        .compile_fds_with_config(files, messages)?;
    Ok(())
}
