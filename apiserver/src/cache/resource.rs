//! All objects of one resource, and the recent history of their changes.
//!
//! Writers (the store's thread, through [`super::Cache`]) apply events under the lock and wake watchers; they never wait
//! for one. A watcher is a cursor into the ring: when the ring has moved past it, it is cut off and starts over with 410.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Bound,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::futures::{Notified, OwnedNotified};

use super::{
    Common, Object,
    audience::Audience,
    message::{self, Messages},
};
use crate::registry::strategy::Strategy;

/// Events kept at most.
const RING_EVENTS: usize = 4096;
/// Bytes of objects kept by events at most.
const RING_BYTES: usize = 8 << 20;
/// Events always kept, whatever their size.
const RING_MINIMUM: usize = 64;
/// Events whose frames are kept for the next watcher; who is further behind builds its own.
const RING_FRAMES: usize = 512;
/// Events older than this are dropped when nothing else happens; upstream keeps as much.
const RING_AGE: Duration = Duration::from_secs(75);

/// How a watcher sees an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Seen {
    /// It is new to the watcher.
    Added,
    /// It changed.
    Modified,
    /// It is gone for the watcher.
    Deleted,
}

impl Seen {
    /// The `type` of the watch event.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Seen::Added => "ADDED",
            Seen::Modified => "MODIFIED",
            Seen::Deleted => "DELETED",
        }
    }
}

/// One change of one object.
pub(crate) struct Event {
    /// Revision.
    pub(crate) revision: u64,
    /// The new state, or the last one (at the deletion's revision).
    pub(crate) object: Arc<Object>,
    /// The state before, when there was one.
    pub(crate) previous: Option<Arc<Object>>,
    /// Whether the object is gone.
    pub(crate) deleted: bool,
    at: Instant,
    frames: Mutex<Vec<(u32, Bytes)>>,
}

impl Event {
    /// The frame of a format, built by the first watcher that needs it.
    pub(crate) fn frame(&self, format: u32, build: impl FnOnce() -> Bytes) -> Bytes {
        let mut frames = self.frames.lock();
        if let Some((_, frame)) = frames.iter().find(|(f, _)| *f == format) {
            return frame.clone();
        }
        let frame = build();
        frames.push((format, frame.clone()));
        frame
    }
}

struct State {
    objects: BTreeMap<Box<str>, Arc<Object>>,
    ring: VecDeque<Arc<Event>>,
    ring_bytes: usize,
    /// Sequence number of the ring's first event.
    first: u64,
    /// Revision of the last event.
    revision: u64,
    /// Watches can start at this revision or later.
    floor: u64,
    /// Revisions in `floor+1 ..= gap` were lost in a crash: nothing can start there.
    gap: u64,
}

/// One resource's objects.
pub(crate) struct ResourceCache {
    /// Prefix of the keys in the store, with a trailing slash.
    pub(crate) prefix: Box<str>,
    /// Behaviour of the kind.
    pub(crate) strategy: &'static dyn Strategy,
    /// Whether a lost tail of changes is acceptable (leases, events).
    pub(crate) relaxed: bool,
    state: RwLock<State>,
    generation: AtomicU64,
    pub(super) audience: Audience,
    common: Arc<Common>,
}

/// A consistent view of (a part of) a resource.
pub(crate) struct Snapshot {
    /// Revision of the view.
    pub(crate) revision: u64,
    /// Objects in key order.
    pub(crate) objects: Vec<Arc<Object>>,
}

/// The history does not reach back far enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooOld {
    /// The oldest revision that is still known.
    pub(crate) oldest: u64,
}

/// A position in the ring.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cursor(pub(super) u64);

impl ResourceCache {
    /// An empty resource. `common` is of the whole store.
    pub(crate) fn new(prefix: &str, strategy: &'static dyn Strategy, relaxed: bool, common: Arc<Common>) -> Self {
        let state = State {
            objects: BTreeMap::new(),
            ring: VecDeque::new(),
            ring_bytes: 0,
            first: 0,
            revision: 0,
            floor: 0,
            gap: 0,
        };
        Self {
            prefix: prefix.into(),
            strategy,
            relaxed,
            state: RwLock::new(state),
            generation: AtomicU64::new(1),
            audience: Audience::default(),
            common,
        }
    }

    /// Fills in an object found at start.
    pub(crate) fn load(&self, object: Object) {
        self.state.write().objects.insert(object.key(), Arc::new(object));
    }

    /// Ends loading: history starts here.
    pub(crate) fn loaded(&self, complete: u64, revision: u64) {
        let mut state = self.state.write();
        (state.revision, state.floor, state.gap) = (complete, complete, revision);
    }

    /// Applies a committed change. `object` is `None` for a deletion.
    pub(crate) fn apply(&self, key: &str, revision: u64, object: Option<Object>) {
        let mut state = self.state.write();
        let (object, previous, deleted) = match object {
            Some(object) => {
                let object = Arc::new(object);
                let previous = match state.objects.get_mut(key) {
                    Some(slot) => Some(std::mem::replace(slot, Arc::clone(&object))),
                    None => {
                        state.objects.insert(key.into(), Arc::clone(&object));
                        None
                    }
                };
                (object, previous, false)
            }
            None => {
                let Some(previous) = state.objects.remove(key) else { return };
                (Arc::new(previous.at_revision(revision)), Some(previous), true)
            }
        };
        state.revision = revision;
        state.ring_bytes += object.bytes.len();
        let frames = Mutex::new(Vec::new());
        let event = Arc::new(Event { revision, object, previous, deleted, at: Instant::now(), frames });
        state.ring.push_back(Arc::clone(&event));
        if let Some(event) = state.ring.len().checked_sub(RING_FRAMES).and_then(|at| state.ring.get(at)) {
            *event.frames.lock() = Vec::new();
        }
        while state.ring.len() > RING_EVENTS || (state.ring_bytes > RING_BYTES && state.ring.len() > RING_MINIMUM) {
            state.drop_oldest(&self.audience);
        }
        drop(state);
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.audience.wake(&event);
    }

    /// Drops events nobody will come back for.
    pub(crate) fn forget_old(&self) {
        let stale = |state: &State| state.ring.front().is_some_and(|e| e.at.elapsed() > RING_AGE);
        if !stale(&self.state.read()) {
            return;
        }
        let mut state = self.state.write();
        while stale(&state) {
            state.drop_oldest(&self.audience);
        }
        if state.ring.is_empty() {
            state.ring.shrink_to_fit();
        }
    }

    /// A number that changes with every change.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Number of objects.
    pub(crate) fn len(&self) -> usize {
        self.state.read().objects.len()
    }

    /// One object.
    pub(crate) fn get(&self, key: &str) -> Option<Arc<Object>> {
        self.state.read().objects.get(key).cloned()
    }

    /// One object as a commit left it; the present one when history does not know.
    pub(crate) fn at(&self, key: &str, revision: u64) -> Option<Arc<Object>> {
        let state = self.state.read();
        let current = state.objects.get(key);
        if let Some(object) = current.filter(|o| o.revision == revision) {
            return Some(Arc::clone(object));
        }
        let at = state.ring.partition_point(|e| e.revision < revision);
        let event = state.ring.get(at).filter(|e| e.revision == revision);
        event.map(|e| &e.object).or(current).cloned()
    }

    /// The revision reads are as fresh as.
    pub(crate) fn revision(&self) -> u64 {
        // Read before the lock: everything up to it has been applied.
        let global = self.common.revision();
        self.state.read().revision.max(global)
    }

    /// The objects under a key prefix (`""` or `namespace/`) behind `after`, now, and the cursor of what follows.
    pub(crate) fn snapshot(&self, prefix: &str, after: Option<&str>) -> (Snapshot, Cursor) {
        let global = self.common.revision();
        let state = self.state.read();
        let from = match after {
            Some(after) => Bound::Included(after),
            None => Bound::Included(prefix),
        };
        let objects = state
            .objects
            .range::<str, _>((from, Bound::Unbounded))
            .take_while(|(k, _)| k.starts_with(prefix))
            .map(|(_, o)| Arc::clone(o))
            .collect();
        let cursor = Cursor(state.first + state.ring.len() as u64);
        (Snapshot { revision: state.revision.max(global), objects }, cursor)
    }

    /// The objects under a prefix as they were at a revision: the present, with newer events undone.
    pub(crate) fn snapshot_at(&self, prefix: &str, after: Option<&str>, revision: u64) -> Result<Snapshot, TooOld> {
        let state = self.state.read();
        let oldest = state.floor.max(self.common.horizon());
        if revision < oldest || (revision > state.floor && revision < state.gap) {
            return Err(TooOld { oldest });
        }
        let from = after.unwrap_or(prefix);
        let mut objects: BTreeMap<Box<str>, Arc<Object>> = state
            .objects
            .range::<str, _>((Bound::Included(from), Bound::Unbounded))
            .take_while(|(k, _)| k.starts_with(prefix))
            .map(|(k, o)| (k.clone(), Arc::clone(o)))
            .collect();
        for event in state.ring.iter().rev().take_while(|e| e.revision > revision) {
            let key = event.object.key();
            if key.starts_with(prefix) && &*key >= from {
                match &event.previous {
                    Some(previous) => objects.insert(key, Arc::clone(previous)),
                    None => objects.remove(&key),
                };
            }
        }
        Ok(Snapshot { revision, objects: objects.into_values().collect() })
    }

    /// The cursor of the first event after a revision.
    pub(crate) fn cursor(&self, revision: u64) -> Result<Cursor, TooOld> {
        let state = self.state.read();
        if revision < state.floor || (revision > state.floor && revision < state.gap) {
            return Err(TooOld { oldest: state.floor.max(state.gap) });
        }
        let skip = state.ring.partition_point(|e| e.revision <= revision);
        Ok(Cursor(state.first + skip as u64))
    }

    /// The oldest revision a watch can start at.
    pub(crate) fn oldest(&self) -> u64 {
        let state = self.state.read();
        state.floor.max(state.gap)
    }

    /// Up to `max` wanted events from a cursor on, and the revision the watcher is at when it has seen them all. `None`: one
    /// of them is lost.
    pub(super) fn read(
        &self,
        cursor: &mut Cursor,
        max: usize,
        lost: impl Fn(Cursor) -> bool,
        wanted: impl Fn(&Event) -> bool,
        into: &mut Vec<Arc<Event>>,
    ) -> Option<u64> {
        let global = self.common.revision();
        let state = self.state.read();
        if cursor.0 < state.first {
            if lost(*cursor) {
                return None;
            }
            cursor.0 = state.first;
        }
        for event in state.ring.iter().skip((cursor.0 - state.first) as usize) {
            if into.len() == max {
                return into.last().map(|event| event.revision);
            }
            cursor.0 += 1;
            if wanted(event) {
                into.push(Arc::clone(event));
            }
        }
        Some(state.revision.max(global))
    }

    /// Ends at the next change after this call, also when it is first polled later.
    pub(crate) fn next_change(self: Arc<Self>) -> Pin<Box<OwnedNotified>> {
        let mut next = Box::pin(Arc::clone(&self.audience.everyone.changed).notified_owned());
        next.as_mut().enable();
        next
    }

    /// Completes at the next change after this call.
    pub(crate) fn changed(&self) -> Notified<'_> {
        self.audience.everyone.changed.notified()
    }

    /// Waits until the store has reached a revision.
    pub(crate) async fn reached(&self, revision: u64) {
        while self.revision() < revision {
            let advanced = self.common.advanced.notified();
            tokio::pin!(advanced);
            // Register before looking, so that no advance falls in between.
            advanced.as_mut().enable();
            if self.revision() < revision {
                advanced.await;
            }
        }
    }

    /// Objects in protobuf.
    pub(crate) fn messages(&self) -> &Messages {
        &self.common.messages
    }

    /// Where an object's message in a format is kept.
    pub(crate) fn message_key(&self, object: &Object, format: u32) -> message::Key {
        (object.revision, format, message::hash(&self.prefix, &object.namespace, &object.name))
    }

    /// Makes every watcher look: at a change, or at what ends it.
    pub(crate) fn wake_all(&self) {
        self.audience.wake_all();
    }
}

impl State {
    fn drop_oldest(&mut self, audience: &Audience) {
        if let Some(event) = self.ring.pop_front() {
            self.ring_bytes -= event.object.bytes.len();
            self.first += 1;
            self.floor = event.revision;
            audience.lose(&event, self.first);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        cache::{Seat, object::Draft},
        registry::strategy::Generic,
    };

    fn object(name: &str, revision: u64) -> Object {
        let value = json!({"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": name, "namespace": "n"}});
        Draft::new(value, &Generic).finish(revision)
    }

    fn cache() -> Arc<ResourceCache> {
        let cache = ResourceCache::new("/registry/configmaps/", &Generic, false, Arc::default());
        cache.load(object("a", 5));
        cache.loaded(10, 10);
        Arc::new(cache)
    }

    fn names(snapshot: &Snapshot) -> Vec<(String, u64)> {
        snapshot.objects.iter().map(|o| (o.name.to_string(), o.revision)).collect()
    }

    #[test]
    fn the_past_can_be_listed() {
        let cache = cache();
        cache.apply("n/b", 11, Some(object("b", 11)));
        cache.apply("n/a", 12, Some(object("a", 12)));
        cache.apply("n/b", 13, None);
        let at = |revision| names(&cache.snapshot_at("n/", None, revision).unwrap());
        assert_eq!(at(10), vec![("a".into(), 5)]);
        assert_eq!(at(11), vec![("a".into(), 5), ("b".into(), 11)]);
        assert_eq!(at(12), vec![("a".into(), 12), ("b".into(), 11)]);
        assert_eq!(at(13), vec![("a".into(), 12)]);
        assert!(cache.snapshot_at("n/", None, 9).is_err());
        // What is long ago is not told, also where nothing has changed since.
        let begun = Instant::now();
        cache.common.advance(20);
        cache.common.age(begun);
        cache.common.advance(30);
        cache.common.age(begun + super::super::HISTORY / 2);
        assert!(cache.snapshot_at("n/", None, 19).is_ok());
        cache.common.age(begun + super::super::HISTORY);
        assert_eq!(cache.snapshot_at("n/", None, 19).err(), Some(TooOld { oldest: 20 }));
        assert!(cache.snapshot_at("n/", None, 20).is_ok());
        assert_eq!(names(&cache.snapshot("n/", Some("n/b")).0), vec![]);
    }

    #[test]
    fn slow_watchers_are_cut_off() {
        let cache = cache();
        let everyone = Seat::take(Arc::clone(&cache), None);
        let mut cursor = cache.cursor(10).unwrap();
        for revision in 11..11 + RING_EVENTS as u64 + 1 {
            cache.apply("n/a", revision, Some(object("a", revision)));
        }
        assert_eq!(everyone.read(&mut cursor, 10, &mut Vec::new()), None);
        assert_eq!(cache.cursor(10).unwrap_err(), TooOld { oldest: 11 });
        let mut cursor = cache.cursor(11).unwrap();
        let mut events = Vec::new();
        assert_eq!(everyone.read(&mut cursor, 2, &mut events), Some(13));
        assert_eq!(events.iter().map(|e| e.revision).collect::<Vec<_>>(), vec![12, 13]);
    }

    #[tokio::test]
    async fn changes_wake_only_who_sees_them() {
        let cache = cache();
        let named = |name| Seat::take(Arc::clone(&cache), Some(("metadata.name", name)));
        let (a, b, there) = (named("a"), named("b"), Seat::take(Arc::clone(&cache), Some(("metadata.namespace", "n"))));
        let mut cursor = [(); 3].map(|()| cache.cursor(10).unwrap());
        let woken = [&a, &b, &there].map(Seat::changed);
        let mut waiting = woken.map(|changed| Box::pin(changed.notified_owned()));
        for waiting in &mut waiting {
            waiting.as_mut().enable();
        }
        let last = 11 + RING_EVENTS as u64;
        for revision in 11..=last {
            cache.apply("n/a", revision, Some(object("a", revision)));
        }
        let woken = waiting.map(|mut waiting| waiting.as_mut().enable());
        assert_eq!(woken, [true, false, true]);
        // The ring has moved past all of them, but only two have missed something.
        let mut events = Vec::new();
        assert_eq!(a.read(&mut cursor[0], 10, &mut events), None);
        assert_eq!(b.read(&mut cursor[1], 10, &mut events), Some(last));
        assert_eq!(there.read(&mut cursor[2], 10, &mut events), None);
        cache.apply("n/b", last + 1, Some(object("b", last + 1)));
        assert_eq!(b.read(&mut cursor[1], 10, &mut events), Some(last + 1));
        assert_eq!(events.iter().map(|e| e.revision).collect::<Vec<_>>(), [last + 1]);
        drop((a, b, there));
        assert_eq!(cache.audience.topics(), 0, "nobody is left");
    }

    #[tokio::test]
    async fn a_revision_is_waited_for() {
        let common = Arc::new(Common::at(10));
        let cache = ResourceCache::new("/registry/configmaps/", &Generic, false, Arc::clone(&common));
        let mut waiting = Box::pin(cache.reached(12));
        common.advance(11);
        assert!(futures::poll!(&mut waiting).is_pending());
        common.advance(12);
        waiting.await;
    }

    #[test]
    fn revisions_lost_in_a_crash_are_too_old() {
        let cache = ResourceCache::new("/registry/configmaps/", &Generic, false, Arc::default());
        cache.loaded(10, 1010);
        assert!(cache.cursor(10).is_ok());
        assert!(cache.cursor(500).is_err());
        assert!(cache.cursor(1010).is_ok());
    }
}
