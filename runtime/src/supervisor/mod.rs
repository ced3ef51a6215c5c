//! The per-pod supervisor: its wire protocol, the agent's client and the server itself.

pub mod client;
pub mod protocol;
pub mod wire;
