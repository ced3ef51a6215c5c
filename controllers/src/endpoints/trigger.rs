//! When the change that is being published happened: the oldest of the changes not published before.

use super::Key;
use crate::pods;
use isopod_client::objects::HasMeta;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Service};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;

#[derive(Default)]
struct Seen {
    service: Option<Timestamp>,
    pods: HashMap<String, Timestamp>,
}

/// What was seen of each Service the last time.
#[derive(Default)]
pub(crate) struct Triggers {
    seen: Mutex<HashMap<Key, Seen>>,
}

fn pod_time(pod: &Pod) -> Option<Timestamp> {
    pods::condition(pod, "Ready")?.last_transition_time.as_ref().map(|t| t.0)
}

impl Triggers {
    /// The oldest change since the last call for this Service.
    pub(crate) fn next(&self, key: &Key, service: &Service, pods: &[Arc<Pod>]) -> Option<Timestamp> {
        let now = Seen {
            service: service.metadata.creation_timestamp.as_ref().map(|t| t.0),
            pods: pods.iter().filter_map(|pod| Some((pod.name().to_owned(), pod_time(pod)?))).collect(),
        };
        let mut all = self.seen.lock();
        let before = all.entry(key.clone()).or_default();
        let fresh_pods = now.pods.iter().filter(|(name, time)| before.pods.get(*name).is_none_or(|old| *time > old));
        let fresh_service = now.service.filter(|time| before.service.is_none_or(|old| *time > old));
        let oldest = fresh_pods.map(|(_, time)| *time).chain(fresh_service).min();
        *before = now;
        oldest
    }

    /// The Service is gone.
    pub(crate) fn forget(&self, key: &Key) {
        self.seen.lock().remove(key);
    }
}

/// The annotation's text.
pub(crate) fn text(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
