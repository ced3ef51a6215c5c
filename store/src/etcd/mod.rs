//! The engine over etcd's v3 API: several API servers may share one etcd.
//!
//! One thread drives everything. A batch is one transaction whose compares are the batch's expectations. What is committed,
//! here or by another server, comes back through one watch over all keys, and only from there reaches the sinks; a commit
//! is acknowledged when the watch has delivered it. Because every revision of etcd is an event of that watch, waiting for
//! a revision needs no progress notifications.
//!
//! ```text
//! submit -> Txn ----------------> etcd -> watch -> sinks -> acknowledge what has got that far
//! sync   -> Range (linearizable) -> revision ---------------^
//! ```
//!
//! Values have a byte in front that says whether they were [moved](super::transfer) here from another engine; those carry
//! the revisions they had there.

mod base;
mod client;
mod driver;
#[cfg(test)]
mod tests;
mod watch;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::{mpsc::UnboundedSender, oneshot};

use crate::{Batch, Engine, Error, Pending, Range, Revision, Sink};
pub(crate) use base::{KEY, Numbers, moved};
pub(crate) use client::Client;
use driver::{Command, Driver};

/// Messages and clients, generated from `proto/`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub(crate) mod proto {
    tonic::include_proto!("etcdserverpb");
}

/// Time between two compactions of a server; etcd then keeps between one and two of them as history.
const COMPACT_EVERY: Duration = Duration::from_secs(300);

/// Where etcd is and how it is spoken to.
#[derive(Debug, Clone, Default)]
pub struct EtcdConfig {
    /// `http://host:port` or `https://host:port`, tried in turn.
    pub endpoints: Vec<String>,
    /// CA bundle of the servers' certificates (PEM).
    pub ca: Option<PathBuf>,
    /// Client certificate and key (PEM).
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// The engine over etcd.
pub struct Etcd {
    commands: Mutex<Option<UnboundedSender<Command>>>,
    revision: Arc<AtomicU64>,
    size: Arc<AtomicU64>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Etcd {
    /// Connects and reads where the store stands. Fails when no endpoint answers.
    pub fn open(config: EtcdConfig) -> Result<Self, Error> {
        Self::start(config, COMPACT_EVERY)
    }

    fn start(config: EtcdConfig, compact_every: Duration) -> Result<Self, Error> {
        let (commands, queue) = tokio::sync::mpsc::unbounded_channel();
        let (revision, size) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (opened, outcome) = mpsc::sync_channel(1);
        let shown = (Arc::clone(&revision), Arc::clone(&size));
        let run = move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(opened.send(Err(Error::Write { reason: error.to_string() }))),
            };
            tokio::task::LocalSet::new().block_on(&runtime, async move {
                match Driver::open(config, shown).await {
                    Ok(driver) => {
                        let _ = opened.send(Ok(()));
                        driver.run(queue, compact_every).await;
                    }
                    Err(error) => drop(opened.send(Err(error))),
                }
            });
        };
        let thread = std::thread::Builder::new()
            .name("store-etcd".into())
            .spawn(run)
            .map_err(|error| Error::Write { reason: error.to_string() })?;
        outcome.recv().map_err(|_| Error::Closed)??;
        Ok(Self { commands: Mutex::new(Some(commands)), revision, size, thread: Mutex::new(Some(thread)) })
    }

    fn send(&self, command: Command) -> Result<(), Error> {
        let commands = self.commands.lock();
        commands.as_ref().ok_or(Error::Closed)?.send(command).map_err(|_| Error::Closed)
    }
}

impl Engine for Etcd {
    fn submit(&self, batch: Batch) -> Pending {
        let (reply, pending) = oneshot::channel();
        // A closed queue drops the command and with it `reply`: the pending answer is then `Error::Closed`.
        let _ = self.send(Command::Commit { batch, reply });
        Pending(pending)
    }

    fn range(&self, prefix: &str, sink: Option<Arc<dyn Sink>>) -> Result<Range, Error> {
        let (head, at) = mpsc::sync_channel(1);
        let (entries, receiver) = mpsc::sync_channel(64);
        self.send(Command::Range { prefix: prefix.into(), sink, head, entries })?;
        let revision = at.recv().map_err(|_| Error::Closed)??;
        Ok(Range { revision, complete: revision, entries: receiver })
    }

    fn revision(&self) -> Revision {
        self.revision.load(Ordering::Acquire)
    }

    fn shared(&self) -> bool {
        true
    }

    fn sync(&self) -> Option<Pending> {
        let (reply, pending) = oneshot::channel();
        let _ = self.send(Command::Sync { reply });
        Some(Pending(pending))
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn close(&self) {
        self.commands.lock().take();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the store's driver panicked");
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.close();
    }
}
