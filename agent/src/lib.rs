//! The isopod agent: kubelet, image service and pod network of one machine.
//!
//! What comes in: the API server's pods of this node, static manifests, the supervisors' events. What goes out: running
//! containers, status, events. Every loop observes, plans purely and applies idempotently.

mod accept;
mod access;
mod agent;
mod api;
/// The node's certificates.
pub mod certificates;
mod cgroups;
mod claims;
pub mod config;
mod context;
mod cri;
mod csi;
mod devices;
mod events;
mod grpc;
mod host;
pub mod images;
mod machine;
mod metrics;
pub mod network;
mod node;
mod objects;
pub mod paths;
mod plugins;
mod pods;
mod probes;
mod qos;
pub mod quantity;
mod rate;
mod runtime;
pub mod server;
mod services;
mod sources;
mod spec;
mod stats;
mod tokens;
mod topology;
mod volumes;

pub use agent::{Error, cleanup, run, run_on, stop_all_pods, wait_for_file};
pub use api::wait_for_server;
pub use config::{Config, KubeletConfiguration};
pub use paths::Paths;
