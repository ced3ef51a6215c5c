//! Events about pods and the node: recorded without waiting, counted up instead of repeated.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, RandomState},
    sync::Arc,
};

use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference, Pod},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use kube::api::{Api as KubeApi, Patch, PatchParams, PostParams};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{api::Api, rate::Rate};

/// Events waiting for the API server at most; more are dropped.
const QUEUE: usize = 1024;
/// Events remembered for counting at most.
const REMEMBERED: usize = 1024;

/// Events kept for who asks this node.
const RECENT: usize = 200;

/// `type` of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Normal,
    Warning,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct About {
    kind: &'static str,
    namespace: String,
    name: String,
    uid: String,
    field_path: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Entry {
    about: About,
    kind: Kind,
    reason: String,
    message: String,
}

/// Events as JSON, each with the hash of what it says.
type Recent = VecDeque<(u64, Box<str>)>;

/// Where events go in. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Recorder {
    queue: mpsc::Sender<(Entry, Timestamp)>,
    recent: Arc<Mutex<Recent>>,
    hasher: RandomState,
    node: Arc<str>,
}

impl Recorder {
    /// Starts writing events of `node` once there is an API server.
    pub(crate) fn start(api: Api, node: Arc<str>, rate: Option<Rate>, stop: CancellationToken) -> Self {
        let (queue, receiver) = mpsc::channel(QUEUE);
        let own = node.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = write(api, node, rate, receiver) => {}
            }
        });
        Self { queue, recent: Arc::default(), hasher: RandomState::new(), node: own }
    }

    /// What was told last, the newest at the end; also without an API server.
    pub(crate) fn recent(&self) -> Vec<Event> {
        self.recent.lock().iter().filter_map(|(_, text)| serde_json::from_str(text).ok()).collect()
    }

    /// About a pod.
    pub(crate) fn pod(&self, pod: &Pod, kind: Kind, reason: &str, message: impl Into<String>) {
        self.put(pod, None, kind, reason, message.into());
    }

    /// About a container of a pod.
    pub(crate) fn container(&self, pod: &Pod, container: &str, kind: Kind, reason: &str, message: impl Into<String>) {
        self.put(pod, Some(field_path(pod, container)), kind, reason, message.into());
    }

    /// About the node.
    pub(crate) fn node(&self, node: &str, kind: Kind, reason: &str, message: impl Into<String>) {
        let about =
            About { kind: "Node", namespace: "default".into(), name: node.into(), uid: node.into(), field_path: None };
        self.send(Entry { about, kind, reason: reason.into(), message: message.into() });
    }

    fn put(&self, pod: &Pod, field_path: Option<String>, kind: Kind, reason: &str, message: String) {
        let about = About {
            kind: "Pod",
            namespace: pod.metadata.namespace.clone().unwrap_or_else(|| "default".into()),
            name: pod.metadata.name.clone().unwrap_or_default(),
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            field_path,
        };
        self.send(Entry { about, kind, reason: reason.into(), message });
    }

    fn send(&self, mut entry: Entry) {
        tracing::debug!(about = %entry.about.name, reason = %entry.reason, message = %entry.message, "event");
        if entry.message.len() > 1024 {
            let mut end = 1024;
            while !entry.message.is_char_boundary(end) {
                end -= 1;
            }
            entry.message.truncate(end);
        }
        let now = Timestamp::now();
        // What stays is one piece of memory each: many small ones, made among those of a busy moment, keep whole pages.
        let key = self.hasher.hash_one(&entry);
        if let Ok(text) = serde_json::to_string(&new_event(&entry, now, &self.node)) {
            let mut recent = self.recent.lock();
            recent.retain(|(known, _)| *known != key);
            if recent.len() >= RECENT {
                recent.pop_front();
            }
            recent.push_back((key, text.into()));
        }
        // A full queue means no API server for long: events are news, not state.
        let _ = self.queue.try_send((entry, now));
    }
}

/// `spec.containers{NAME}` and its kin.
fn field_path(pod: &Pod, container: &str) -> String {
    let spec = pod.spec.as_ref();
    let init = spec.is_some_and(|s| s.init_containers.iter().flatten().any(|c| c.name == container));
    let ephemeral = spec.is_some_and(|s| s.ephemeral_containers.iter().flatten().any(|c| c.name == container));
    let list = if init {
        "initContainers"
    } else if ephemeral {
        "ephemeralContainers"
    } else {
        "containers"
    };
    format!("spec.{list}{{{container}}}")
}

/// An event that was written; the entry it is of is known by its hash only.
struct Written {
    /// What its name ends with.
    at: Timestamp,
    count: i32,
    touched: u64,
}

async fn write(api: Api, node: Arc<str>, rate: Option<Rate>, mut queue: mpsc::Receiver<(Entry, Timestamp)>) {
    let Some(mut client) = api.wait().await else { return };
    let mut known: HashMap<u64, Written> = HashMap::new();
    let hasher = RandomState::new();
    let mut clock = 0u64;
    while let Some((entry, at)) = queue.recv().await {
        if let Some(newer) = api.get() {
            client = newer;
        }
        if let Some(rate) = &rate {
            rate.wait().await;
        }
        clock += 1;
        let events: KubeApi<Event> = KubeApi::namespaced(client.clone(), &entry.about.namespace);
        let key = hasher.hash_one(&entry);
        if let Some(w) = known.get_mut(&key) {
            w.count += 1;
            w.touched = clock;
            let patch = serde_json::json!({"count": w.count, "lastTimestamp": Time(at)});
            match events.patch(&event_name(&entry, w.at), &PatchParams::default(), &Patch::Merge(patch)).await {
                Ok(_) => continue,
                Err(e) if crate::api::is_code(&e, 404) => {}
                Err(error) => {
                    tracing::debug!(%error, "event not counted");
                    continue;
                }
            }
        }
        let event = new_event(&entry, at, &node);
        match events.create(&PostParams::default(), &event).await {
            Ok(_) => {
                known.insert(key, Written { at, count: 1, touched: clock });
            }
            Err(error) => tracing::debug!(%error, "event not written"),
        }
        if known.len() > REMEMBERED {
            let floor = clock.saturating_sub(REMEMBERED as u64 / 2);
            known.retain(|_, w| w.touched >= floor);
        }
    }
}

fn event_name(e: &Entry, at: Timestamp) -> String {
    format!("{}.{:x}", e.about.name, at.as_nanosecond())
}

fn new_event(e: &Entry, at: Timestamp, node: &str) -> Event {
    let about = &e.about;
    let second = Timestamp::from_second(at.as_second()).unwrap_or(at);
    Event {
        metadata: ObjectMeta {
            name: Some(event_name(e, at)),
            namespace: Some(about.namespace.clone()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("v1".into()),
            kind: Some(about.kind.into()),
            name: Some(about.name.clone()),
            namespace: Some(about.namespace.clone()).filter(|_| about.kind != "Node"),
            uid: Some(about.uid.clone()),
            field_path: about.field_path.clone(),
            ..ObjectReference::default()
        },
        type_: Some(if e.kind == Kind::Normal { "Normal" } else { "Warning" }.into()),
        reason: Some(e.reason.clone()),
        message: Some(e.message.clone()),
        count: Some(1),
        first_timestamp: Some(Time(second)),
        last_timestamp: Some(Time(second)),
        source: Some(EventSource { component: Some("kubelet".into()), host: Some(node.into()) }),
        reporting_component: Some("kubelet".into()),
        reporting_instance: Some(node.into()),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_are_remembered_once_each() {
        let recorder =
            Recorder::start(Api::start(None, CancellationToken::new()), "n".into(), None, CancellationToken::new());
        for i in 0..RECENT + 10 {
            recorder.node("n", Kind::Normal, "Test", format!("event {i}"));
        }
        recorder.node("n", Kind::Normal, "Test", "event 100");
        let recent = recorder.recent();
        let said: Vec<&str> = recent.iter().filter_map(|e| e.message.as_deref()).collect();
        assert_eq!((said.len(), said[0], said[RECENT - 1]), (RECENT, "event 10", "event 100"));
        assert_eq!(said.iter().filter(|m| **m == "event 100").count(), 1);
    }
}
