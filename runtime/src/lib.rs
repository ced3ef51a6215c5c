//! The OCI runtime of isopod: containers straight on namespaces, cgroups and mounts, and the per-pod supervisor.
//!
//! Synchronous and single-threaded. The agent uses only [`supervisor::protocol`], [`supervisor::client`] and
//! [`seccomp::default_profile`] of it and executes the `isopod-runtime` binary for the rest; this library never prints
//! and never exits by itself except in the processes it clones.

pub mod seccomp;
pub mod supervisor;
mod sys;
