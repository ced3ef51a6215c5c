//! What every engine offers: the vocabulary of commits, ranges and events.

use std::{
    any::Any,
    future::Future,
    pin::Pin,
    sync::{Arc, mpsc},
    task::{Context, Poll},
};

use bytes::Bytes;
use tokio::sync::oneshot;

use crate::Error;

/// A store-wide, strictly increasing number; every committed batch gets the next one.
pub type Revision = u64;

/// Something the committer wants handed to the [`Sink`] with the event of its operation. The store never looks at it.
pub type Tag = Arc<dyn Any + Send + Sync>;

/// A live key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Key.
    pub key: Box<str>,
    /// Value.
    pub value: Bytes,
    /// Revision of its creation.
    pub created: Revision,
    /// Revision of its last change.
    pub modified: Revision,
}

/// What must hold for an operation to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Nothing.
    Any,
    /// The key is absent.
    Absent,
    /// The key was last changed at this revision.
    Revision(Revision),
}

/// What an operation does to its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Sets the value.
    Put(Bytes),
    /// Removes the key.
    Delete,
}

/// One operation of a batch.
#[derive(Clone)]
pub struct Op {
    /// Key.
    pub key: Box<str>,
    /// Condition.
    pub expect: Expect,
    /// Change.
    pub change: Change,
    /// Handed to the sink with the event.
    pub tag: Option<Tag>,
}

/// How long an acknowledgement waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// For the disk: an acknowledged commit survives a power failure.
    Synced,
    /// For the kernel: an acknowledged commit survives the process, not a power failure.
    Relaxed,
}

/// Operations that happen together or not at all.
#[derive(Clone)]
pub struct Batch {
    /// The operations; keys must be distinct.
    pub ops: Vec<Op>,
    /// How long the acknowledgement waits.
    pub durability: Durability,
}

/// One committed operation.
#[derive(Clone)]
pub struct Event {
    /// Revision of its batch.
    pub revision: Revision,
    /// Key.
    pub key: Box<str>,
    /// What happened.
    pub change: Change,
    /// Revision of the key's creation.
    pub created: Revision,
    /// The tag of the operation.
    pub tag: Option<Tag>,
}

/// Sees committed events in order, each commit before it is acknowledged. Called on the engine's thread: must not block.
pub trait Sink: Send + Sync {
    /// Events of one or more commits in revision order.
    fn apply(&self, events: Vec<Event>);
}

/// All live keys under a prefix at one revision, streamed.
pub struct Range {
    /// The engine's revision at the time of the range.
    pub revision: Revision,
    /// The last revision whose events are known to be complete: watches from it on can be continued.
    pub complete: Revision,
    pub(crate) entries: mpsc::Receiver<Result<Entry, Error>>,
}

impl Iterator for Range {
    type Item = Result<Entry, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.entries.recv().ok()
    }
}

/// A submitted batch: a future of its revision.
pub struct Pending(pub(crate) oneshot::Receiver<Result<Revision, Error>>);

impl Pending {
    /// Waits without an async runtime.
    pub fn wait(self) -> Result<Revision, Error> {
        self.0.blocking_recv().unwrap_or(Err(Error::Closed))
    }
}

impl Future for Pending {
    type Output = Result<Revision, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|r| r.unwrap_or(Err(Error::Closed)))
    }
}

/// A store engine.
pub trait Engine: Send + Sync {
    /// Queues a batch. Batches that share a key are committed in the order they were submitted.
    fn submit(&self, batch: Batch) -> Pending;

    /// All live keys under a prefix, and from the same moment on every event to `sink`.
    fn range(&self, prefix: &str, sink: Option<Arc<dyn Sink>>) -> Result<Range, Error>;

    /// The last committed revision.
    fn revision(&self) -> Revision;

    /// Whether others may write to the same store.
    fn shared(&self) -> bool {
        false
    }

    /// When others write to the same store too: a future that is ready when the sinks have seen everything that anybody
    /// had committed before. `None` when they have always seen everything.
    fn sync(&self) -> Option<Pending> {
        None
    }

    /// Bytes the store occupies on disk.
    fn size(&self) -> u64;

    /// Commits what is queued and closes the store; later submissions fail with [`Error::Closed`].
    fn close(&self);
}
