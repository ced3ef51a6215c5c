//! What every loop over API objects needs and none of them owns: the connection, a shared watch cache per resource type, a
//! work queue with per-key back-off, thin verbs over the network client, event recording and a Lease-based elector.
//!
//! In: a `kube::Client`. Out: caches that call their subscribers synchronously, in the order of the watch. It knows no
//! kind in particular and takes no decision; the scheduler and the controllers (which may not use each other) both stand
//! on it. It never polls: it waits for watches and timers.

pub mod cache;
pub mod connect;
pub mod elect;
mod identity;
pub mod merge;
pub mod objects;
pub mod placement;
pub mod quantity;
pub mod queue;
pub mod record;
pub mod reflect;
pub mod select;
#[cfg(feature = "testing")]
pub mod testing;

pub use cache::{Cache, Change};
pub use connect::connect;
pub use identity::connect_file;
pub use objects::{DeleteOptions, Objects};
pub use queue::{Queue, spawn_workers};
pub use record::Recorder;
