//! What a controller has asked for and not yet seen in its cache: while any of it is outstanding, the cache is behind and
//! must not be planned from. Outstanding work older than five minutes is given up, as upstream does.

use crate::context::Key;
use isopod_client::Change;
use isopod_client::objects::HasMeta;
use k8s_openapi::api::core::v1::Pod;
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_secs(300);

struct Outstanding {
    creations: i64,
    deletions: HashSet<String>,
    since: Instant,
}

/// Outstanding creations and deletions (by UID) per key.
#[derive(Default)]
pub(crate) struct Expectations {
    state: Mutex<HashMap<Key, Outstanding>>,
}

impl Expectations {
    /// Nothing is outstanding, or it has been for too long.
    pub(crate) fn satisfied(&self, key: &Key) -> bool {
        self.state
            .lock()
            .get(key)
            .is_none_or(|o| (o.creations <= 0 && o.deletions.is_empty()) || o.since.elapsed() > TIMEOUT)
    }

    /// What will be created and deleted now.
    pub(crate) fn expect(&self, key: &Key, creations: usize, deletions: impl IntoIterator<Item = String>) {
        let creations = i64::try_from(creations).unwrap_or(i64::MAX);
        let deletions = deletions.into_iter().collect();
        self.state.lock().insert(key.clone(), Outstanding { creations, deletions, since: Instant::now() });
    }

    /// A creation was seen, or will never be.
    pub(crate) fn created(&self, key: &Key) {
        if let Some(outstanding) = self.state.lock().get_mut(key) {
            outstanding.creations -= 1;
        }
    }

    /// A deletion was seen, or will never be.
    pub(crate) fn deleted(&self, key: &Key, uid: &str) {
        if let Some(outstanding) = self.state.lock().get_mut(key) {
            outstanding.deletions.remove(uid);
        }
    }

    /// A pod of the owner came, changed or went.
    pub(crate) fn seen(&self, key: &Key, change: &Change<'_, Pod>) {
        let pod = change.object();
        match change {
            Change::Added(pod) if !pod.deleting() => self.created(key),
            _ if pod.deleting() || change.is_deleted() => self.deleted(key, pod.uid()),
            _ => {}
        }
    }

    /// The owner is gone.
    pub(crate) fn forget(&self, key: &Key) {
        self.state.lock().remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::Expectations;

    #[test]
    fn outstanding_work_blocks_until_it_is_seen() {
        let k = ("ns".to_owned(), "k".to_owned());
        let e = Expectations::default();
        assert!(e.satisfied(&k));
        e.expect(&k, 2, ["u".to_owned()]);
        e.created(&k);
        e.created(&k);
        assert!(!e.satisfied(&k));
        e.deleted(&k, "other");
        assert!(!e.satisfied(&k));
        e.deleted(&k, "u");
        assert!(e.satisfied(&k));
    }
}
