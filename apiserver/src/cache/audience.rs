//! Who waits for changes of which objects.
//!
//! A change wakes only who may see it: those who watch the whole resource, and those who watch one namespace or one value of
//! a field (`metadata.name`, `spec.nodeName`) that the object has before or after the change. The others sleep on, however
//! far the ring moves: a [`Topic`] remembers whether the ring has lost anything they would have wanted.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{
    Object,
    resource::{Cursor, Event, ResourceCache},
};

/// A field and the value objects must have in it.
pub(crate) type Value<'a> = (&'static str, &'a str);

/// Watchers of the same objects.
#[derive(Default)]
pub(super) struct Topic {
    /// What the objects have in common; `None` for all objects.
    of: Option<(&'static str, Box<str>)>,
    /// Fires when one of them changes.
    pub(super) changed: Arc<Notify>,
    /// Place behind the last event of the topic that the ring has dropped.
    lost: AtomicU64,
}

impl Topic {
    fn covers(&self, event: &Event) -> bool {
        let Some((field, value)) = &self.of else { return true };
        let has = |object: &Object| object.field(field).unwrap_or_default() == &**value;
        has(&event.object) || event.previous.as_deref().is_some_and(has)
    }
}

/// Topics of one field.
type ByValue = HashMap<Box<str>, Arc<Topic>>;

/// All who wait at one resource.
#[derive(Default)]
pub(super) struct Audience {
    /// Those of all objects.
    pub(super) everyone: Arc<Topic>,
    /// The others, by field and value.
    topics: Mutex<HashMap<&'static str, ByValue>>,
}

impl Audience {
    fn join(&self, of: Option<Value<'_>>) -> Arc<Topic> {
        let Some((field, value)) = of else { return Arc::clone(&self.everyone) };
        let mut topics = self.topics.lock();
        let values = topics.entry(field).or_default();
        if let Some(topic) = values.get(value) {
            return Arc::clone(topic);
        }
        let topic = Arc::new(Topic { of: Some((field, value.into())), ..Topic::default() });
        values.insert(value.into(), Arc::clone(&topic));
        topic
    }

    fn leave(&self, topic: &Arc<Topic>) {
        let Some((field, value)) = &topic.of else { return };
        let mut topics = self.topics.lock();
        // The last one of it: itself and the table.
        if Arc::strong_count(topic) == 2
            && let Some(values) = topics.get_mut(field)
        {
            values.remove(value);
            if values.is_empty() {
                topics.remove(field);
            }
        }
    }

    /// Calls with every topic of an event.
    fn each(&self, event: &Event, mut call: impl FnMut(&Topic)) {
        call(&self.everyone);
        for (field, values) in &*self.topics.lock() {
            let value = event.object.field(field).unwrap_or_default();
            if let Some(topic) = values.get(value) {
                call(topic);
            }
            let before = event.previous.as_ref().map(|previous| previous.field(field).unwrap_or_default());
            if let Some(topic) = before.filter(|before| *before != value).and_then(|before| values.get(before)) {
                call(topic);
            }
        }
    }

    /// Wakes who may see an event.
    pub(super) fn wake(&self, event: &Event) {
        self.each(event, |topic| topic.changed.notify_waiters());
    }

    /// Wakes everyone: there is something else to look at.
    pub(super) fn wake_all(&self) {
        self.everyone.changed.notify_waiters();
        self.topics.lock().values().flat_map(HashMap::values).for_each(|topic| topic.changed.notify_waiters());
    }

    /// How many topics there are.
    #[cfg(test)]
    pub(super) fn topics(&self) -> usize {
        self.topics.lock().values().map(HashMap::len).sum()
    }

    /// The ring has dropped an event; `next` is the place behind it.
    pub(super) fn lose(&self, event: &Event, next: u64) {
        self.each(event, |topic| {
            topic.lost.fetch_max(next, Ordering::AcqRel);
        });
    }
}

/// One watcher's place in the audience. Taken before its cursor is, so that nothing gets lost unseen in between.
pub(crate) struct Seat {
    store: Arc<ResourceCache>,
    topic: Arc<Topic>,
}

impl Seat {
    /// A seat at a resource, for the objects with a value or all.
    pub(crate) fn take(store: Arc<ResourceCache>, of: Option<Value<'_>>) -> Self {
        let topic = store.audience.join(of);
        Self { store, topic }
    }

    /// The resource.
    pub(crate) fn store(&self) -> &ResourceCache {
        &self.store
    }

    /// Fires at the next change, or when there is something else to look at.
    pub(crate) fn changed(&self) -> Arc<Notify> {
        Arc::clone(&self.topic.changed)
    }

    /// Up to `max` events from a cursor on, and the revision the watcher is at when it has seen them all. `None`: it is cut
    /// off, the ring has lost one of its events.
    pub(crate) fn read(&self, cursor: &mut Cursor, max: usize, into: &mut Vec<Arc<Event>>) -> Option<u64> {
        let lost = |cursor: Cursor| self.topic.lost.load(Ordering::Acquire) > cursor.0;
        self.store.read(cursor, max, lost, |event| self.topic.covers(event), into)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.store.audience.leave(&self.topic);
    }
}
