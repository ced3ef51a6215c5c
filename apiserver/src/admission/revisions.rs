//! What was made of objects, kept until they change.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::Value;

use crate::objects::Object;

/// Made of the objects of one resource, in order of their names.
pub(super) struct Revisions<T>(BTreeMap<Box<str>, (u64, Arc<T>)>);

impl<T> Default for Revisions<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> Revisions<T> {
    /// Takes over what is unchanged, makes what is new, drops what is gone.
    pub(super) fn refresh(&mut self, objects: &[Arc<Object>], make: impl Fn(&Value) -> T) {
        let mut old = std::mem::take(&mut self.0);
        for object in objects {
            let kept = old.remove(&object.name).filter(|(revision, _)| *revision == object.revision);
            let entry = kept.unwrap_or_else(|| (object.revision, Arc::new(make(&object.value()))));
            self.0.insert(object.name.clone(), entry);
        }
    }

    /// All of them.
    pub(super) fn values(&self) -> impl Iterator<Item = &Arc<T>> {
        self.0.values().map(|(_, made)| made)
    }
}
