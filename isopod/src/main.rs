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

/// Read by the allocator before `main`. Freed pages are given back at once: its own default waits for the next allocation, and
/// an idle node makes none. A page that was full belongs to nobody, and so it remains when something of it is freed: whoever
/// frees the rest gives it back, while its thread may never look at it again.
const ALLOCATION: [(&str, &str); 2] = [("MIMALLOC_PURGE_DELAY", "0"), ("MIMALLOC_PAGE_RECLAIM_ON_FREE", "-1")];

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
    if ALLOCATION.iter().any(|(name, _)| env::var_os(name).is_none())
        && let Ok(own) = env::current_exe()
    {
        // Returns only when it failed.
        let _ = Command::new(own)
            .arg0(env::args_os().next().unwrap_or_default())
            .args(env::args_os().skip(1))
            .envs(ALLOCATION.iter().filter(|(name, _)| env::var_os(name).is_none()).copied())
            .exec();
    }
}
