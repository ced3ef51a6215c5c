//! Protobuf messages of objects that were asked for not long ago, so that the next list does not encode them again.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use bytes::Bytes;
use parking_lot::Mutex;

/// Bytes of one generation; there are two.
const GENERATION: usize = 12 << 20;

/// Revision of an object, format it is shown in, and [`hash`] of its identity: one commit may change several objects.
pub(crate) type Key = (u64, u32, u64);

/// The identity of an object as a number.
pub(super) fn hash(prefix: &str, namespace: &str, name: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (prefix, namespace, name).hash(&mut hasher);
    hasher.finish()
}

/// Messages of objects at a revision. What is not asked for goes when newer ones come, or after two
/// [`Self::age`]s.
#[derive(Default)]
pub(crate) struct Messages(Mutex<State>);

#[derive(Default)]
struct State {
    young: HashMap<Key, Bytes>,
    old: HashMap<Key, Bytes>,
    /// Bytes of the young ones.
    size: usize,
}

impl State {
    fn insert(&mut self, key: Key, message: Bytes) {
        self.size += message.len();
        self.young.insert(key, message);
        if self.size > GENERATION {
            self.age();
        }
    }

    fn age(&mut self) {
        self.old = std::mem::take(&mut self.young);
        self.size = 0;
    }
}

impl Messages {
    /// The message of an object, encoded unless it is there.
    pub(crate) fn get<E>(&self, key: Key, encode: impl FnOnce() -> Result<Vec<u8>, E>) -> Result<Bytes, E> {
        let mut state = self.0.lock();
        if let Some(message) = state.young.get(&key) {
            return Ok(message.clone());
        }
        if let Some(message) = state.old.remove(&key) {
            state.insert(key, message.clone());
            return Ok(message);
        }
        drop(state);
        let message = Bytes::from(encode()?);
        self.0.lock().insert(key, message.clone());
        Ok(message)
    }

    /// Forgets what has not been asked for since the last call.
    pub(crate) fn age(&self) {
        self.0.lock().age();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(messages: &Messages, revision: u64, size: usize) -> bool {
        let mut encoded = false;
        let encode = || {
            encoded = true;
            Ok::<_, ()>(vec![0; size])
        };
        assert_eq!(messages.get((revision, 0, 0), encode).unwrap().len(), size);
        encoded
    }

    #[test]
    fn messages_are_encoded_once_and_go_when_unused() {
        let messages = Messages::default();
        assert!(get(&messages, 1, 8) && !get(&messages, 1, 8));
        messages.age();
        assert!(!get(&messages, 1, 8), "one age is survived");
        messages.age();
        messages.age();
        assert!(get(&messages, 1, 8), "two are not");
        assert!((2..5).all(|revision| get(&messages, revision, GENERATION)));
        assert!(get(&messages, 1, 8), "memory is bounded");
        assert!(matches!(messages.get((5, 0, 0), || Err("no")), Err("no")));
    }
}
