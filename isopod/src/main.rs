//! The `isopod` binary: one executable for a node and its control plane.

mod bootstrap;
mod cli;
mod commands;
mod error;
mod kubeconfig;
mod lock;
mod logging;
mod manifests;
mod node;
mod pki;
mod preflight;
mod progress;
mod service;

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // A heap of a few MiB in pages of 2 MiB is mostly air. Where the kernel cannot do without, memory is all it costs.
    let _ = nix::sys::prctl::set_thp_disable(true);
    match cli::parse().and_then(cli::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("isopod: {error:#}");
            error::exit_code(&error)
        }
    }
}
