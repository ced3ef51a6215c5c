//! What a controller wrote and its cache has not shown yet, so that it never plans from objects older than its own writes.

use isopod_client::objects::HasMeta;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// A write the cache never shows (its object was deleted at once) is forgotten after this time.
const PATIENCE: Duration = Duration::from_secs(5);

type Key = (String, String);

/// Object UID -> revision, and when it was written.
type Revisions = HashMap<String, (u64, Instant)>;

/// Revisions written, per key and object UID.
#[derive(Default)]
pub(crate) struct Written {
    state: Mutex<HashMap<Key, Revisions>>,
}

fn revision<T: HasMeta>(object: &T) -> u64 {
    object.object_meta().resource_version.as_ref().and_then(|rv| rv.parse().ok()).unwrap_or(0)
}

impl Written {
    /// This was the answer to a write.
    pub(crate) fn record<T: HasMeta>(&self, key: &Key, object: &T) {
        let entry = (revision(object), Instant::now());
        self.state.lock().entry(key.clone()).or_default().insert(object.uid().to_owned(), entry);
    }

    /// The object is gone.
    pub(crate) fn gone(&self, key: &Key, uid: &str) {
        if let Some(objects) = self.state.lock().get_mut(key) {
            objects.remove(uid);
        }
    }

    /// Whether the cache, whose objects for the key these are, holds everything that was written.
    pub(crate) fn caught_up<'a, T: HasMeta + 'a>(&self, key: &Key, cached: impl Iterator<Item = &'a T>) -> bool {
        let mut state = self.state.lock();
        let Some(objects) = state.get_mut(key) else { return true };
        for object in cached {
            if objects.get(object.uid()).is_some_and(|(written, _)| *written <= revision(object)) {
                objects.remove(object.uid());
            }
        }
        objects.retain(|_, (_, at)| at.elapsed() < PATIENCE);
        let done = objects.is_empty();
        if done {
            state.remove(key);
        }
        done
    }
}
