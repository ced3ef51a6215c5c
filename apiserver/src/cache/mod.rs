//! Every stored object in memory, once, ready to be sent.
//!
//! Filled from the store at start; afterwards the store's committed events arrive through [`isopod_store::Sink`] before the
//! writer gets its acknowledgement, so that a read sees every acknowledged write.

mod audience;
mod message;
mod object;
mod resource;

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use isopod_store::{Batch, Change, Durability, Engine, Expect, Op, Sink, Tag};
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

pub(crate) use audience::Seat;
use message::Messages;
pub use object::Object;
pub(crate) use object::{Draft, key};
pub(crate) use resource::{Cursor, Event, ResourceCache, Seen, Snapshot};

use crate::registry::strategy::Strategy;

/// The caches of all resources over one store.
pub(crate) struct Cache {
    engine: Arc<dyn Engine>,
    feed: Arc<Feed>,
}

/// How long a state can be asked for, also of a resource in which nothing has changed since: as long as upstream, which
/// compacts its store this often. Who pages through a list for longer is told so.
const HISTORY: Duration = Duration::from_secs(300);

/// What all caches of a store share.
#[derive(Default)]
pub(crate) struct Common {
    /// The last revision that all caches show.
    revision: AtomicU64,
    /// Fires when it advances.
    advanced: Notify,
    /// States before this revision are no longer shown.
    horizon: AtomicU64,
    /// Which revision it was when, for the next horizons.
    marks: Mutex<VecDeque<(Instant, u64)>>,
    /// Objects in protobuf, as far as they are wanted.
    messages: Messages,
}

impl Common {
    fn at(revision: u64) -> Self {
        Self { revision: AtomicU64::new(revision), ..Self::default() }
    }

    fn revision(&self) -> u64 {
        self.revision.load(Ordering::Acquire)
    }

    fn advance(&self, revision: u64) {
        self.revision.fetch_max(revision, Ordering::AcqRel);
        self.advanced.notify_waiters();
    }

    fn horizon(&self) -> u64 {
        self.horizon.load(Ordering::Acquire)
    }

    /// Moves the horizon on.
    fn age(&self, now: Instant) {
        let mut marks = self.marks.lock();
        marks.push_back((now, self.revision()));
        while let Some((_, revision)) = marks.pop_front_if(|(at, _)| now.duration_since(*at) >= HISTORY) {
            self.horizon.store(revision, Ordering::Release);
        }
    }
}

/// A key that every allocating write of servers on one store changes: of two at once, one has to look again.
const ALLOCATION: &str = "/registry/allocation";

/// The part the store's thread reaches.
struct Feed {
    common: Arc<Common>,
    /// Last change of [`ALLOCATION`], 0 before the first.
    allocation: AtomicU64,
    resources: RwLock<HashMap<Box<str>, Arc<ResourceCache>>>,
}

/// What travels with an operation: its cache and, for a put, the object without its revision.
struct Ticket {
    cache: Arc<ResourceCache>,
    draft: Mutex<Option<Draft>>,
}

/// A change of one object on its way to the store.
pub(crate) enum Write {
    /// New or changed object.
    Put(Draft),
    /// Deletion.
    Delete,
}

impl Cache {
    /// An empty cache over a store.
    pub(crate) fn new(engine: Arc<dyn Engine>) -> Self {
        let common = Arc::new(Common::at(engine.revision()));
        let feed = Feed { common, allocation: AtomicU64::new(0), resources: RwLock::default() };
        Self { engine, feed: Arc::new(feed) }
    }

    /// Adds a resource before loading.
    pub(crate) fn register(&self, prefix: &str, strategy: &'static dyn Strategy, relaxed: bool) -> Arc<ResourceCache> {
        let mut resources = self.feed.resources.write();
        let cache = resources
            .entry(prefix.into())
            .or_insert_with(|| Arc::new(ResourceCache::new(prefix, strategy, relaxed, Arc::clone(&self.feed.common))));
        Arc::clone(cache)
    }

    /// Adds a resource while everything runs: its history starts now.
    pub(crate) fn register_live(&self, prefix: &str, strategy: &'static dyn Strategy) -> Arc<ResourceCache> {
        let mut resources = self.feed.resources.write();
        let cache = resources.entry(prefix.into()).or_insert_with(|| {
            let cache = ResourceCache::new(prefix, strategy, false, Arc::clone(&self.feed.common));
            let revision = self.revision();
            cache.loaded(revision, revision);
            Arc::new(cache)
        });
        Arc::clone(cache)
    }

    /// Forgets a resource whose definition is gone.
    pub(crate) fn forget(&self, prefix: &str) {
        self.feed.resources.write().remove(prefix);
    }

    /// Reads everything under `/registry/` and follows the store from there.
    pub(crate) fn load(&self) -> Result<(), isopod_store::Error> {
        let sink: Arc<dyn Sink> = Arc::clone(&self.feed) as Arc<dyn Sink>;
        let range = self.engine.range("/registry/", Some(sink))?;
        let (revision, complete) = (range.revision, range.complete);
        for entry in range {
            let entry = entry?;
            if &*entry.key == ALLOCATION {
                self.feed.allocation.fetch_max(entry.modified, Ordering::AcqRel);
                continue;
            }
            let Some((cache, _)) = self.feed.find(&entry.key) else {
                tracing::warn!(key = %entry.key, "nothing serves this key");
                continue;
            };
            match Draft::load(entry.value, cache.strategy) {
                Ok(draft) => cache.load(draft.finish(entry.modified)),
                Err(error) => tracing::error!(key = %entry.key, %error, "cannot read a stored object"),
            }
        }
        self.feed.common.advance(revision);
        for cache in self.feed.resources.read().values() {
            cache.loaded(complete, revision);
        }
        Ok(())
    }

    /// Commits a change of one object; the cache shows it when this returns.
    pub(crate) async fn commit(
        &self,
        cache: &Arc<ResourceCache>,
        key: &str,
        expect: Expect,
        write: Write,
    ) -> Result<u64, isopod_store::Error> {
        self.commit_with(cache, key, expect, write, None).await
    }

    /// What to compare with so that no other server has allocated since now; `None` when there are no other servers.
    pub(crate) fn allocation(&self) -> Option<Expect> {
        if !self.engine.shared() {
            return None;
        }
        Some(match self.feed.allocation.load(Ordering::Acquire) {
            0 => Expect::Absent,
            revision => Expect::Revision(revision),
        })
    }

    /// Commits a change of one object that allocated something after [`Self::allocation`] was asked. A conflict at index
    /// 1 says that another server has allocated meanwhile.
    pub(crate) async fn commit_with(
        &self,
        cache: &Arc<ResourceCache>,
        key: &str,
        expect: Expect,
        write: Write,
        allocation: Option<Expect>,
    ) -> Result<u64, isopod_store::Error> {
        let (change, draft) = match write {
            Write::Put(draft) => (Change::Put(draft.stored.clone()), Some(draft)),
            Write::Delete => (Change::Delete, None),
        };
        let ticket: Tag = Arc::new(Ticket { cache: Arc::clone(cache), draft: Mutex::new(draft) });
        let op = Op { key: format!("{}{key}", cache.prefix).into(), expect, change, tag: Some(ticket) };
        let durability = if cache.relaxed { Durability::Relaxed } else { Durability::Synced };
        let mut ops = vec![op];
        ops.extend(allocation.map(|expect| Op {
            key: ALLOCATION.into(),
            expect,
            change: Change::Put(bytes::Bytes::new()),
            tag: None,
        }));
        let outcome = self.engine.submit(Batch { ops, durability }).await;
        // Whoever tries again does it from what the other server wrote.
        if matches!(outcome, Err(isopod_store::Error::Conflict { .. })) {
            self.catch_up().await?;
        }
        outcome
    }

    /// Waits until the caches show everything that any server on the same store had acknowledged before.
    pub(crate) async fn catch_up(&self) -> Result<(), isopod_store::Error> {
        match self.engine.sync() {
            Some(pending) => pending.await.map(drop),
            None => Ok(()),
        }
    }

    /// The last revision of the whole store.
    pub(crate) fn revision(&self) -> u64 {
        self.feed.common.revision()
    }

    /// The store below.
    pub(crate) fn engine(&self) -> &Arc<dyn Engine> {
        &self.engine
    }

    /// Drops history nobody will come back for, and messages nobody came for.
    pub(crate) fn forget_old(&self) {
        self.feed.resources.read().values().for_each(|c| c.forget_old());
        self.feed.common.messages.age();
        self.feed.common.age(Instant::now());
    }

    /// Makes every watcher look whether it has to end.
    pub(crate) fn wake_all(&self) {
        self.feed.resources.read().values().for_each(|c| c.wake_all());
    }
}

impl Feed {
    /// The cache of a store key, and the key inside it.
    fn find<'k>(&self, key: &'k str) -> Option<(Arc<ResourceCache>, &'k str)> {
        let resources = self.resources.read();
        let name = key.rfind('/')?;
        if let Some(cache) = resources.get(&key[..=name]) {
            return Some((Arc::clone(cache), &key[name + 1..]));
        }
        let namespace = key[..name].rfind('/')?;
        resources.get(&key[..=namespace]).map(|c| (Arc::clone(c), &key[namespace + 1..]))
    }
}

impl Sink for Feed {
    fn apply(&self, events: Vec<isopod_store::Event>) {
        let last = events.last().map(|e| e.revision);
        for event in events {
            if &*event.key == ALLOCATION {
                self.allocation.fetch_max(event.revision, Ordering::AcqRel);
                continue;
            }
            let ticket = event.tag.as_deref().and_then(|t| t.downcast_ref::<Ticket>());
            let Some((cache, key)) = (match ticket {
                Some(ticket) => event.key.strip_prefix(&*ticket.cache.prefix).map(|k| (Arc::clone(&ticket.cache), k)),
                None => self.find(&event.key),
            }) else {
                continue;
            };
            let object = match event.change {
                Change::Delete => None,
                Change::Put(value) => {
                    let draft = match ticket.and_then(|t| t.draft.lock().take()) {
                        Some(draft) => Ok(draft),
                        None => Draft::load(value, cache.strategy),
                    };
                    match draft {
                        Ok(draft) => Some(draft.finish(event.revision)),
                        Err(error) => {
                            tracing::error!(key = %event.key, %error, "cannot read a committed object");
                            continue;
                        }
                    }
                }
            };
            cache.apply(key, event.revision, object);
        }
        if let Some(last) = last {
            self.common.advance(last);
        }
    }
}
