//! The embedded engine: live keys' revisions in memory, everything in one SQLite file, written by one thread.
//!
//! In: batches through a queue. The writer drains whatever is waiting into one SQLite transaction (group commit), hands the
//! events to the sinks, then acknowledges. Values are not kept in memory: whoever serves reads keeps its own copy, filled by
//! [`Engine::range`] and the sink.

mod file;
mod lock;
mod writer;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::{Batch, Engine, Entry, Error, Pending, Range, Revision, Sink};
use writer::{Command, Writer};

/// Name of the file inside the data directory.
pub const FILE_NAME: &str = "store.db";

/// The engine in one SQLite file.
pub struct Embedded {
    queue: Mutex<Option<mpsc::Sender<Command>>>,
    revision: Arc<AtomicU64>,
    thread: Mutex<Option<JoinHandle<()>>>,
    path: PathBuf,
}

impl Embedded {
    /// Opens or creates the store in a directory. Fails when another process has it open or the file is not ours.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(FILE_NAME);
        std::fs::create_dir_all(dir).map_err(|source| Error::File {
            operation: "create directory",
            path: dir.to_owned(),
            source,
        })?;
        let lock = lock::Lock::take(&path)?;
        let file = file::File::open(&path)?;
        let revision = Arc::new(AtomicU64::new(0));
        let mut writer = Writer::load(file, lock, Arc::clone(&revision))?;
        let (queue, commands) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || writer.run(&commands))
            .map_err(|source| Error::File { operation: "start the writer of", path: path.clone(), source })?;
        Ok(Self { queue: Mutex::new(Some(queue)), revision, thread: Mutex::new(Some(thread)), path })
    }

    /// Makes a store of entries with their revisions; there must be none in the directory.
    pub fn import(dir: &Path, revision: Revision, entries: &[Entry]) -> Result<(), Error> {
        let path = dir.join(FILE_NAME);
        if path.exists() {
            return Err(Error::Foreign { path, reason: "there is a store already".into() });
        }
        std::fs::create_dir_all(dir).map_err(|source| Error::File {
            operation: "create directory",
            path: dir.to_owned(),
            source,
        })?;
        let _lock = lock::Lock::take(&path)?;
        let mut file = file::File::open(&path)?;
        file.begin(crate::Durability::Synced)?;
        for (id, entry) in (1..).zip(entries) {
            file.insert(id, &entry.key, entry.created, &entry.value)?;
            file.update(id, entry.modified, &entry.value)?;
        }
        file.set_state(file::State { revision, reserved: revision })?;
        file.commit()?;
        file.checkpoint()
    }

    fn send(&self, command: Command) -> Result<(), Error> {
        let queue = self.queue.lock();
        let queue = queue.as_ref().ok_or(Error::Closed)?;
        queue.send(command).map_err(|_| Error::Closed)
    }
}

impl Engine for Embedded {
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
        let (revision, complete) = at.recv().map_err(|_| Error::Closed)?;
        Ok(Range { revision, complete, entries: receiver })
    }

    fn revision(&self) -> Revision {
        self.revision.load(Ordering::Acquire)
    }

    fn size(&self) -> u64 {
        let wal = self.path.with_extension("db-wal");
        [&self.path, &wal].iter().filter_map(|p| std::fs::metadata(p).ok()).map(|m| m.len()).sum()
    }

    fn close(&self) {
        self.queue.lock().take();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the store's writer panicked");
        }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests;
