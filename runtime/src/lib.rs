//! The OCI runtime of isopod: containers straight on namespaces, cgroups and mounts, and the per-pod supervisor.
//!
//! Synchronous and single-threaded. The agent uses only [`supervisor::protocol`], [`supervisor::client`] and
//! [`seccomp::default_profile`] of it and executes the `isopod-runtime` binary for the rest; this library never prints
//! and never exits by itself except in the processes it clones.

pub mod cgroups;
pub mod cli;
mod config;
pub mod cpu_list;
mod dbus;
mod devices;
pub mod error;
#[cfg(test)]
mod fuzz;
mod hooks;
mod init;
mod launch;
pub mod logind;
mod lsm;
mod masks;
mod memory_policy;
mod mount_options;
mod mounts;
mod net_devices;
mod netlink;
mod passwd;
mod process;
mod resctrl;
mod root;
mod rootfs;
mod seal;
pub mod seccomp;
pub mod spec;
pub mod state;
pub mod supervisor;
mod sync;
mod sys;
mod time;
mod tty;
mod userns;

pub use seal::{ensure_sealed, protect_descriptors};
pub use sys::forget_code;
