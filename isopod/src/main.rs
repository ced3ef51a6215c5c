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
mod table;

use std::{
    env,
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Read by the allocator before `main`: milliseconds until it gives freed pages back. Its own default waits for the next
/// allocation, and an idle node makes none: what a start or a burst of work needed would stay for ever.
const PURGE_DELAY: &str = "MIMALLOC_PURGE_DELAY";

fn main() -> ExitCode {
    keep_small();
    match cli::parse().and_then(cli::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("isopod: {error:#}");
            error::exit_code(&error)
        }
    }
}

/// Arranges that this process has no more memory than it uses. Where the machine does not allow it, memory is all it costs.
fn keep_small() {
    // A heap of a few MiB in pages of 2 MiB is mostly air.
    let _ = nix::sys::prctl::set_thp_disable(true);
    if env::var_os(PURGE_DELAY).is_none()
        && let Ok(own) = env::current_exe()
    {
        // Returns only when it failed.
        let _ = Command::new(own)
            .arg0(env::args_os().next().unwrap_or_default())
            .args(env::args_os().skip(1))
            .env(PURGE_DELAY, "0")
            .exec();
    }
}
