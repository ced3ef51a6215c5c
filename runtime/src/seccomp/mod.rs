//! Seccomp: the default profile and the compiler from OCI profiles to BPF.

mod profile;
mod table;

pub use profile::{default_profile, default_profile_for};
