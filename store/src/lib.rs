//! Revisioned key-value store: commit (compare-and-swap batch), range, watch. Opaque bytes: knows nothing of Kubernetes.
//!
//! [`Engine`] is the wall; [`Embedded`] is the engine in one SQLite file, [`Etcd`] the one over etcd, which several servers
//! may share. Every committed batch gets one revision; revisions never go back, also not after a crash. A [`Sink`] sees the
//! events of every commit in order, before the commit is acknowledged. [`transfer`] moves a store from one engine to the
//! other with its revisions.

#![forbid(unsafe_code)]

mod embedded;
mod engine;
mod error;
mod etcd;
#[cfg(test)]
mod testing;
pub mod transfer;

pub use embedded::{Embedded, FILE_NAME};
pub use engine::{Batch, Change, Durability, Engine, Entry, Event, Expect, Op, Pending, Range, Revision, Sink, Tag};
pub use error::Error;
pub use etcd::{Etcd, EtcdConfig};
