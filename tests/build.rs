//! Generates the other side of the agent's gRPC: mock plugins and a client.

use std::error::Error;

const FILES: [&str; 6] =
    ["registration.proto", "cri.proto", "csi.proto", "deviceplugin.proto", "dra.proto", "podresources.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=../agent/proto");
    tonic_prost_build::configure().build_transport(false).compile_fds(protox::compile(FILES, ["../agent/proto"])?)?;
    Ok(())
}
