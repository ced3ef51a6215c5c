//! The writer thread: compares, numbers, writes, publishes, acknowledges.
//!
//! Revisions are handed out from a reservation that is on disk before its first number is seen by anyone. After a crash
//! the writer continues behind the reservation, so that a number whose commit was lost with the power (relaxed class) is
//! never given to something else. Example: state {revision 40, reserved 10_040}; a crash; the next commit gets 10_041.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::{
    file::{File, State},
    lock::Lock,
};
use crate::{Batch, Change, Durability, Entry, Error, Event, Expect, Revision, Sink};

/// Revisions reserved at once.
const RESERVATION: u64 = 10_000;
/// Operations in one transaction at most.
const GROUP: usize = 2_048;
/// Operations between two looks at the file's unused space.
const SHRINK_EVERY: usize = 20_000;

/// What the handle asks for.
pub(super) enum Command {
    /// Commit a batch.
    Commit {
        /// The batch.
        batch: Batch,
        /// Gets its revision.
        reply: oneshot::Sender<Result<Revision, Error>>,
    },
    /// Stream live keys, and subscribe.
    Range {
        /// Prefix of the keys.
        prefix: Box<str>,
        /// Gets later events.
        sink: Option<Arc<dyn Sink>>,
        /// Gets the revision and the complete revision.
        head: mpsc::SyncSender<(Revision, Revision)>,
        /// Gets the entries.
        entries: mpsc::SyncSender<Result<Entry, Error>>,
    },
}

/// A live key.
#[derive(Debug, Clone, Copy)]
struct Slot {
    id: i64,
    created: Revision,
    modified: Revision,
}

/// A batch whose compares held.
struct Accepted {
    revision: Revision,
    reply: oneshot::Sender<Result<Revision, Error>>,
}

/// The state of the writer thread.
pub(super) struct Writer {
    file: File,
    _lock: Lock,
    keys: BTreeMap<Box<str>, Slot>,
    state: State,
    complete: Revision,
    next_id: i64,
    sinks: Vec<Arc<dyn Sink>>,
    published: Arc<AtomicU64>,
    since_shrink: usize,
}

impl Writer {
    /// Reads the keys of an open file.
    pub(super) fn load(file: File, lock: Lock, published: Arc<AtomicU64>) -> Result<Self, Error> {
        let stored = file.state()?;
        let mut keys = BTreeMap::new();
        let mut next_id = 1;
        file.keys(|id, key, created, modified| {
            next_id = next_id.max(id + 1);
            keys.insert(key, Slot { id, created, modified });
        })?;
        let revision = stored.revision.max(stored.reserved);
        published.store(revision, Ordering::Release);
        Ok(Self {
            file,
            _lock: lock,
            keys,
            state: State { revision, reserved: stored.reserved },
            complete: stored.revision,
            next_id,
            sinks: Vec::new(),
            published,
            since_shrink: 0,
        })
    }

    /// Serves commands until every handle is gone.
    pub(super) fn run(&mut self, commands: &mpsc::Receiver<Command>) {
        let mut held = None;
        while let Some(first) = held.take().or_else(|| commands.recv().ok()) {
            match first {
                Command::Range { prefix, sink, head, entries } => self.range(&prefix, sink, &head, &entries),
                Command::Commit { batch, reply } => {
                    let mut group = vec![(batch, reply)];
                    let mut ops = 1;
                    while ops < GROUP {
                        match commands.try_recv() {
                            Ok(Command::Commit { batch, reply }) => {
                                ops += batch.ops.len();
                                group.push((batch, reply));
                            }
                            Ok(other) => {
                                held = Some(other);
                                break;
                            }
                            Err(_) => break,
                        }
                    }
                    self.commit(group);
                }
            }
        }
        self.close();
    }

    fn commit(&mut self, group: Vec<(Batch, oneshot::Sender<Result<Revision, Error>>)>) {
        let mut durability = match group.iter().all(|(b, _)| b.durability == Durability::Relaxed) {
            true => Durability::Relaxed,
            false => Durability::Synced,
        };
        let before = self.state;
        if self.state.revision + group.len() as u64 > self.state.reserved {
            self.state.reserved = self.state.revision + group.len() as u64 + RESERVATION;
            durability = Durability::Synced;
        }
        let mut undo = Vec::new();
        let mut events = Vec::new();
        let mut accepted = Vec::new();
        let mut result = self.file.begin(durability);
        for (batch, reply) in group {
            if result.is_err() {
                accepted.push(Accepted { revision: 0, reply });
                continue;
            }
            if let Err(conflict) = self.compare(&batch) {
                let _ = reply.send(Err(conflict));
                continue;
            }
            self.state.revision += 1;
            accepted.push(Accepted { revision: self.state.revision, reply });
            result = self.write(batch, &mut undo, &mut events);
        }
        let result = result.and_then(|()| self.file.set_state(self.state)).and_then(|()| self.file.commit());
        match result {
            Ok(()) => self.publish(events, accepted),
            Err(error) => self.revert(before, undo, accepted, &error),
        }
        self.shrink();
    }

    fn compare(&self, batch: &Batch) -> Result<(), Error> {
        for (index, op) in batch.ops.iter().enumerate() {
            let found = self.keys.get(&op.key).map_or(0, |s| s.modified);
            let expected = match op.expect {
                Expect::Any => continue,
                Expect::Absent => 0,
                Expect::Revision(r) => r,
            };
            if found != expected {
                return Err(Error::Conflict { index, expected, found });
            }
        }
        Ok(())
    }

    fn write(
        &mut self,
        batch: Batch,
        undo: &mut Vec<(Box<str>, Option<Slot>)>,
        events: &mut Vec<Event>,
    ) -> Result<(), Error> {
        let revision = self.state.revision;
        for op in batch.ops {
            self.since_shrink += 1;
            let slot = self.keys.get(&op.key).copied();
            undo.push((op.key.clone(), slot));
            let created = match (&op.change, slot) {
                (Change::Put(value), Some(slot)) => {
                    self.file.update(slot.id, revision, value)?;
                    self.keys.insert(op.key.clone(), Slot { modified: revision, ..slot });
                    slot.created
                }
                (Change::Put(value), None) => {
                    let id = self.next_id;
                    self.next_id += 1;
                    self.file.insert(id, &op.key, revision, value)?;
                    self.keys.insert(op.key.clone(), Slot { id, created: revision, modified: revision });
                    revision
                }
                (Change::Delete, Some(slot)) => {
                    self.file.delete(slot.id)?;
                    self.keys.remove(&op.key);
                    slot.created
                }
                (Change::Delete, None) => continue,
            };
            events.push(Event { revision, key: op.key, change: op.change, created, tag: op.tag });
        }
        Ok(())
    }

    fn publish(&mut self, events: Vec<Event>, accepted: Vec<Accepted>) {
        if let Some((last, others)) = self.sinks.split_last() {
            for sink in others {
                sink.apply(events.clone());
            }
            last.apply(events);
        }
        self.published.store(self.state.revision, Ordering::Release);
        for batch in accepted {
            let _ = batch.reply.send(Ok(batch.revision));
        }
    }

    fn revert(&mut self, before: State, undo: Vec<(Box<str>, Option<Slot>)>, accepted: Vec<Accepted>, error: &Error) {
        self.file.rollback();
        for (key, slot) in undo.into_iter().rev() {
            match slot {
                Some(slot) => self.keys.insert(key, slot),
                None => self.keys.remove(&key),
            };
        }
        self.state = before;
        let reason = chain(error);
        tracing::error!(%reason, commits = accepted.len(), "cannot commit");
        for batch in accepted {
            let _ = batch.reply.send(Err(Error::Write { reason: reason.clone() }));
        }
    }

    fn range(
        &mut self,
        prefix: &str,
        sink: Option<Arc<dyn Sink>>,
        head: &mpsc::SyncSender<(Revision, Revision)>,
        entries: &mpsc::SyncSender<Result<Entry, Error>>,
    ) {
        if head.send((self.state.revision, self.complete)).is_err() {
            return;
        }
        self.sinks.extend(sink);
        let from = (Bound::Included(prefix), Bound::Unbounded);
        for (key, slot) in self.keys.range::<str, _>(from).take_while(|(k, _)| k.starts_with(prefix)) {
            let entry = self.file.value(slot.id).map(|value| Entry {
                key: key.clone(),
                value: Bytes::from(value),
                created: slot.created,
                modified: slot.modified,
            });
            // The reader may stop early: nobody needs the rest then.
            if entries.send(entry).is_err() {
                return;
            }
        }
    }

    fn shrink(&mut self) {
        if self.since_shrink >= SHRINK_EVERY {
            self.since_shrink = 0;
            if let Err(error) = self.file.shrink() {
                tracing::warn!(error = chain(&error), "cannot shrink the store");
            }
        }
    }

    /// A clean end gives the unused part of the reservation back.
    fn close(&mut self) {
        self.state.reserved = self.state.revision;
        let result = self
            .file
            .begin(Durability::Synced)
            .and_then(|()| self.file.set_state(self.state))
            .and_then(|()| self.file.commit())
            .and_then(|()| self.file.shrink())
            .and_then(|()| self.file.checkpoint());
        if let Err(error) = result {
            self.file.rollback();
            tracing::warn!(error = chain(&error), "the store was not closed cleanly");
        }
    }
}

/// The whole chain of an error in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}
