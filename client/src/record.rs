//! Records events about objects, without ever making the caller wait.
//!
//! Repetitions update the first event: `count` and `lastTimestamp` for core/v1 events (controllers), `series` for
//! events.k8s.io/v1 (scheduler). Each object has a budget, as upstream's recorder: a burst of 25, then one in five
//! minutes. When the API server is slow or away, events are dropped, work is not.

use crate::objects::{HasMeta, Object, Objects, is_not_found};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use serde_json::{Value, json};
use std::collections::HashMap;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

const WAITING: usize = 1024;
const REMEMBERED: usize = 512;
const BURST: f64 = 25.0;
const REFILL_PER_SECOND: f64 = 1.0 / 300.0;

/// Which API the events are written with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavor {
    /// core/v1, as the controllers write them.
    Core,
    /// events.k8s.io/v1, as the scheduler writes them.
    Events,
}

struct Entry {
    about: ObjectReference,
    kind: &'static str,
    reason: String,
    action: String,
    note: String,
    component: &'static str,
}

/// A handle to the recording task.
#[derive(Clone)]
pub struct Recorder {
    sender: mpsc::Sender<Entry>,
    component: &'static str,
}

/// The reference of an object, as events carry it.
pub fn reference<K: Object>(object: &K) -> ObjectReference {
    let filled = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    ObjectReference {
        api_version: Some(K::api_version(&()).into_owned()),
        kind: Some(K::kind(&()).into_owned()),
        name: filled(object.name()),
        namespace: filled(object.namespace()),
        uid: filled(object.uid()),
        resource_version: HasMeta::object_meta(object).resource_version.clone(),
        field_path: None,
    }
}

impl Recorder {
    /// Starts the recording task.
    pub fn start(objects: Objects, flavor: Flavor, component: &'static str, stop: CancellationToken) -> Self {
        let (sender, receiver) = mpsc::channel(WAITING);
        tokio::spawn(Writer { objects, flavor, seen: HashMap::new(), budget: HashMap::new() }.run(receiver, stop));
        Self { sender, component }
    }

    /// The same recorder under another component's name.
    pub fn component(&self, component: &'static str) -> Self {
        Self { sender: self.sender.clone(), component }
    }

    /// Records a `Normal` event.
    pub fn normal<K: Object>(&self, about: &K, reason: &str, note: impl Into<String>) {
        self.send(reference(about), "Normal", reason, "", note.into());
    }

    /// Records a `Warning` event.
    pub fn warning<K: Object>(&self, about: &K, reason: &str, note: impl Into<String>) {
        self.send(reference(about), "Warning", reason, "", note.into());
    }

    /// Records any event.
    pub fn send(&self, about: ObjectReference, kind: &'static str, reason: &str, action: &str, note: String) {
        let entry = Entry {
            about,
            kind,
            reason: reason.to_owned(),
            action: action.to_owned(),
            note: note.chars().take(1024).collect(),
            component: self.component,
        };
        if self.sender.try_send(entry).is_err() {
            tracing::debug!("event dropped: the queue is full");
        }
    }
}

struct Seen {
    name: String,
    namespace: String,
    count: i64,
}

struct Writer {
    objects: Objects,
    flavor: Flavor,
    seen: HashMap<String, Seen>,
    budget: HashMap<String, (f64, Timestamp)>,
}

impl Writer {
    async fn run(mut self, mut receiver: mpsc::Receiver<Entry>, stop: CancellationToken) {
        loop {
            tokio::select! {
                // Cancel-safe: recv() loses nothing that matters after stop.
                entry = receiver.recv() => match entry {
                    Some(entry) => self.write(entry).await,
                    None => return,
                },
                () = stop.cancelled() => return,
            }
        }
    }

    async fn write(&mut self, entry: Entry) {
        if !self.allowed(&entry) {
            return;
        }
        let key = self.key(&entry);
        if let Some(seen) = self.seen.get_mut(&key) {
            seen.count += 1;
            let patch = repeat(self.flavor, seen.count);
            let path = format!("{}/{}", collection(self.flavor, &seen.namespace), seen.name);
            match self.objects.merge_path::<Value>(&path, &patch).await {
                Ok(_) => return,
                Err(error) if is_not_found(&error) => {}
                Err(error) => return tracing::debug!(%error, "event not updated"),
            }
        }
        let (namespace, name, body) = first(self.flavor, &entry);
        if let Err(error) = self.objects.post(&collection(self.flavor, &namespace), &body).await {
            return tracing::debug!(%error, reason = entry.reason, "event not recorded");
        }
        if self.seen.len() >= REMEMBERED {
            self.seen.clear();
        }
        self.seen.insert(key, Seen { name, namespace, count: 1 });
    }

    fn key(&self, entry: &Entry) -> String {
        let about = &entry.about;
        let part = |text: &Option<String>| text.clone().unwrap_or_default();
        let note = if self.flavor == Flavor::Core { entry.note.as_str() } else { "" };
        [&part(&about.kind), &part(&about.namespace), &part(&about.name), &part(&about.uid)]
            .map(String::as_str)
            .into_iter()
            .chain([entry.kind, &entry.reason, &entry.action, entry.component, note])
            .collect::<Vec<_>>()
            .join("\u{0}")
    }

    fn allowed(&mut self, entry: &Entry) -> bool {
        let now = Timestamp::now();
        if self.budget.len() >= REMEMBERED {
            self.budget.clear();
        }
        let uid = entry.about.uid.clone().or_else(|| entry.about.name.clone()).unwrap_or_default();
        let (tokens, at) = self.budget.entry(format!("{}/{uid}", entry.component)).or_insert((BURST, now));
        let passed = now.duration_since(*at).as_secs_f64().max(0.0);
        *tokens = (*tokens + passed * REFILL_PER_SECOND).min(BURST);
        *at = now;
        if *tokens < 1.0 {
            return false;
        }
        *tokens -= 1.0;
        true
    }
}

fn collection(flavor: Flavor, namespace: &str) -> String {
    match flavor {
        Flavor::Core => format!("/api/v1/namespaces/{namespace}/events"),
        Flavor::Events => format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events"),
    }
}

fn micro(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

fn seconds(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn repeat(flavor: Flavor, count: i64) -> Value {
    let now = Timestamp::now();
    match flavor {
        Flavor::Core => json!({"count": count, "lastTimestamp": seconds(now)}),
        Flavor::Events => json!({"series": {"count": count, "lastObservedTime": micro(now)}}),
    }
}

fn first(flavor: Flavor, entry: &Entry) -> (String, String, Value) {
    let now = Timestamp::now();
    let namespace = entry.about.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let name = format!("{}.{:x}", entry.about.name.as_deref().unwrap_or_default(), now.as_nanosecond());
    let metadata = json!({"name": name, "namespace": namespace});
    let body = match flavor {
        Flavor::Core => json!({
            "apiVersion": "v1", "kind": "Event", "metadata": metadata,
            "involvedObject": entry.about, "type": entry.kind, "reason": entry.reason, "message": entry.note,
            "source": {"component": entry.component}, "reportingComponent": entry.component, "reportingInstance": "",
            "firstTimestamp": seconds(now), "lastTimestamp": seconds(now), "count": 1,
        }),
        Flavor::Events => json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": metadata,
            "regarding": entry.about, "type": entry.kind, "reason": entry.reason, "note": entry.note,
            "action": entry.action, "eventTime": micro(now),
            "reportingController": entry.component, "reportingInstance": format!("{}-{}", entry.component, host()),
        }),
    };
    (namespace, name, body)
}

/// The machine's name, for identities.
pub fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map(|text| text.trim().to_owned()).unwrap_or_default()
}
