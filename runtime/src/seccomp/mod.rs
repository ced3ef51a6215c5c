//! Seccomp: the default profile and the compiler from OCI profiles to BPF.

mod compile;
mod profile;
mod table;

pub use crate::sys::SockFilter;
pub use compile::{Program, compile};
pub use profile::{default_profile, default_profile_for};
