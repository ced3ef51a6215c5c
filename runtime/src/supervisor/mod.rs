//! The per-pod supervisor: its wire protocol, the agent's client and the server itself.

pub mod client;
mod container;
mod log;
mod operations;
mod pod;
pub mod protocol;
mod server;
mod status;
mod streams;
pub mod wire;

pub use pod::supervise;
pub use status::file as status_file;
