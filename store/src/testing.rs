//! What the tests of all engines share: small batches, a sink that remembers, and the model every engine must behave like.

use std::collections::BTreeMap;

use bytes::Bytes;
use parking_lot::Mutex;
use proptest::test_runner::TestCaseError;

use crate::{Batch, Change, Durability, Engine, Entry, Event, Expect, Op, Sink};

/// Sets a key.
pub(crate) fn put(key: &str, value: &str, expect: Expect) -> Batch {
    let change = Change::Put(Bytes::copy_from_slice(value.as_bytes()));
    Batch { ops: vec![Op { key: key.into(), expect, change, tag: None }], durability: Durability::Synced }
}

/// Removes a key.
pub(crate) fn delete(key: &str, expect: Expect) -> Batch {
    let ops = vec![Op { key: key.into(), expect, change: Change::Delete, tag: None }];
    Batch { ops, durability: Durability::Synced }
}

/// Every live key under a prefix.
pub(crate) fn under(store: &dyn Engine, prefix: &str) -> Vec<Entry> {
    store.range(prefix, None).unwrap().collect::<Result<_, _>>().unwrap()
}

/// Every live key.
pub(crate) fn all(store: &dyn Engine) -> Vec<Entry> {
    under(store, "")
}

/// Remembers revisions and keys.
#[derive(Default)]
pub(crate) struct Log(pub(crate) Mutex<Vec<(u64, String)>>);

impl Sink for Log {
    fn apply(&self, events: Vec<Event>) {
        self.0.lock().extend(events.into_iter().map(|e| (e.revision, e.key.into())));
    }
}

/// Steps are (key, action, whether the compare holds); what is under `prefix` must be what a map would hold, also after the
/// engine was opened again.
pub(crate) fn behaves_like_a_map(
    open: &dyn Fn() -> Box<dyn Engine>,
    prefix: &str,
    steps: Vec<(u8, u8, bool)>,
) -> Result<(), TestCaseError> {
    let mut store = open();
    let mut model: BTreeMap<String, (String, u64)> = BTreeMap::new();
    let mut last = 0;
    for (n, (key, action, good)) in steps.into_iter().enumerate() {
        let key = format!("{prefix}k{key}");
        let at = model.get(&key).map_or(0, |m| m.1);
        let expect = match (at, good) {
            (0, true) => Expect::Absent,
            (at, true) => Expect::Revision(at),
            (at, false) => Expect::Revision(at + 1),
        };
        match action {
            0 | 1 => {
                let value = format!("v{n}");
                let result = store.submit(put(&key, &value, expect)).wait();
                proptest::prop_assert_eq!(result.is_ok(), good);
                if let Ok(revision) = result {
                    proptest::prop_assert!(revision > last);
                    last = revision;
                    model.insert(key, (value, revision));
                }
            }
            2 => {
                let result = store.submit(delete(&key, expect)).wait();
                proptest::prop_assert_eq!(result.is_ok(), good);
                if good {
                    model.remove(&key);
                }
            }
            _ => {
                drop(store);
                store = open();
            }
        }
        let found: BTreeMap<_, _> = under(&*store, prefix)
            .into_iter()
            .map(|e| (String::from(e.key), (String::from_utf8(e.value.to_vec()).unwrap(), e.modified)))
            .collect();
        proptest::prop_assert_eq!(&found, &model);
    }
    Ok(())
}
