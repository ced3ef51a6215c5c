//! The isopod agent: kubelet, image service and pod network of one machine.
//!
//! What comes in: the API server's pods of this node, static manifests, the supervisors' events. What goes out: running
//! containers, status, events. Every loop observes, plans purely and applies idempotently.

pub mod config;
pub mod images;
pub mod network;
pub mod paths;
pub mod quantity;
pub mod server;

pub use config::{Config, KubeletConfiguration};
pub use paths::Paths;
