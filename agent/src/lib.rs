//! isopod agent.

pub mod server;
