//! The test harness: virtual hosts, clusters on them, images for them, and waiting with a deadline.
//!
//! Every host is made by `tests/vhost` (namespaces of its own, no route out). A [`Net`] removes its hosts when it is
//! dropped, also when a test panics; before that, a failed test prints what its hosts looked like.
#![allow(clippy::unwrap_used, reason = "a harness fails its test by panicking where it stands")]

pub mod cluster;
pub mod feed;
pub mod grpc;
pub mod host;
pub mod image;
pub mod registry;
pub mod snapshot;
pub mod tidy;
pub mod wait;

pub use cluster::Cluster;
pub use host::{Host, Net, Ran};
pub use wait::{eventually, eventually_within};
