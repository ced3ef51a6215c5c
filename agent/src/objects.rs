//! ConfigMaps and Secrets that pods refer to, each watched while someone holds it.
//!
//! The first holder of an object starts its watch, the last one ends it. What holders see changes as the object does.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Weak},
};

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::runtime::{WatchStreamExt, watcher};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::api::Api;

/// Which kind of object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum ObjectKind {
    ConfigMap,
    Secret,
}

/// A reference to one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ObjectRef {
    pub(crate) kind: ObjectKind,
    pub(crate) namespace: String,
    pub(crate) name: String,
}

/// The content of a ConfigMap or a Secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Object {
    pub(crate) keys: BTreeMap<String, Vec<u8>>,
    /// `type` of a Secret.
    pub(crate) kind: String,
}

impl Object {
    /// A key's value as text.
    pub(crate) fn text(&self, key: &str) -> Option<String> {
        self.keys.get(key).map(|v| String::from_utf8_lossy(v).into_owned())
    }

    /// All keys whose value is text.
    pub(crate) fn text_keys(&self) -> impl Iterator<Item = (String, String)> + '_ {
        self.keys.iter().filter_map(|(k, v)| Some((k.clone(), String::from_utf8(v.clone()).ok()?)))
    }

    #[cfg(test)]
    pub(crate) fn of_text<const N: usize>(keys: [(&str, &str); N]) -> Self {
        Self { keys: keys.map(|(k, v)| (k.into(), v.as_bytes().to_vec())).into(), kind: String::new() }
    }
}

impl From<ConfigMap> for Object {
    fn from(c: ConfigMap) -> Self {
        let mut keys: BTreeMap<String, Vec<u8>> =
            c.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.into_bytes())).collect();
        keys.extend(c.binary_data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0)));
        Self { keys, kind: String::new() }
    }
}

impl From<Secret> for Object {
    fn from(s: Secret) -> Self {
        let mut keys: BTreeMap<String, Vec<u8>> =
            s.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0)).collect();
        keys.extend(s.string_data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.into_bytes())));
        Self { keys, kind: s.type_.unwrap_or_default() }
    }
}

/// What is known of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Known {
    /// Nothing yet.
    Unknown,
    /// It cannot be read, and why.
    Failed(String),
    /// It does not exist.
    Absent,
    /// Its content.
    Present(Arc<Object>),
}

/// A hold on an object: it is watched as long as this lives.
#[derive(Clone)]
pub(crate) struct Held {
    inner: Arc<Entry>,
}

struct Entry {
    state: watch::Receiver<Known>,
    task: tokio::task::AbortHandle,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Held {
    /// The object once something is known of it: `Ok(None)` when it does not exist.
    pub(crate) async fn get(&self) -> Result<Option<Arc<Object>>, String> {
        let mut state = self.inner.state.clone();
        let known = state.wait_for(|k| *k != Known::Unknown).await.map_err(|_| "the watch has ended".to_string())?;
        match &*known {
            Known::Present(o) => Ok(Some(o.clone())),
            Known::Absent => Ok(None),
            Known::Failed(e) => Err(e.clone()),
            Known::Unknown => Ok(None),
        }
    }

    /// For waiting on changes.
    pub(crate) fn changes(&self) -> watch::Receiver<Known> {
        self.inner.state.clone()
    }
}

/// All objects being watched.
#[derive(Clone)]
pub(crate) struct Objects {
    api: Api,
    entries: Arc<Mutex<HashMap<ObjectRef, Weak<Entry>>>>,
    local: watch::Sender<Local>,
}

/// Objects of the manifest directory; they come before the API server's.
pub(crate) type Local = BTreeMap<ObjectRef, Arc<Object>>;

/// How long a reference waits for an API server before it is said that there is none.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

impl Objects {
    /// None yet.
    pub(crate) fn new(api: Api) -> Self {
        Self { api, entries: Arc::default(), local: watch::channel(Local::new()).0 }
    }

    /// Replaces the objects of the manifest directory.
    pub(crate) fn set_local(&self, all: Local) {
        self.local.send_if_modified(|now| {
            let changed = *now != all;
            *now = all;
            changed
        });
    }

    /// Holds an object.
    pub(crate) fn hold(&self, key: &ObjectRef) -> Held {
        let mut entries = self.entries.lock();
        if let Some(inner) = entries.get(key).and_then(Weak::upgrade) {
            return Held { inner };
        }
        entries.retain(|_, e| e.strong_count() > 0);
        let (sender, state) = watch::channel(Known::Unknown);
        let task = tokio::spawn(follow(self.api.clone(), self.local.subscribe(), key.clone(), sender)).abort_handle();
        let inner = Arc::new(Entry { state, task });
        entries.insert(key.clone(), Arc::downgrade(&inner));
        Held { inner }
    }
}

async fn follow(api: Api, mut local: watch::Receiver<Local>, key: ObjectRef, sender: watch::Sender<Known>) {
    loop {
        let here = local.borrow_and_update().get(&key).cloned();
        let Some(here) = here else {
            // Cancel-safe: a watch that is dropped has changed nothing.
            tokio::select! {
                () = remote(&api, &key, &sender) => return,
                changed = local.changed() => if changed.is_err() { return },
            }
            continue;
        };
        publish(&sender, Known::Present(here));
        if local.changed().await.is_err() {
            return;
        }
    }
}

async fn remote(api: &Api, key: &ObjectRef, sender: &watch::Sender<Known>) {
    let Ok(client) = tokio::time::timeout(PATIENCE, api.wait()).await else {
        let why = format!(
            "{:?} {}/{} is not in the manifest directory and there is no API server to ask",
            key.kind, key.namespace, key.name
        );
        publish(sender, Known::Failed(why));
        return Box::pin(once_there(api, key, sender)).await;
    };
    if let Some(client) = client {
        observe(client, key, sender).await;
    }
}

async fn once_there(api: &Api, key: &ObjectRef, sender: &watch::Sender<Known>) {
    if let Some(client) = api.wait().await {
        observe(client, key, sender).await;
    }
}

async fn observe(client: kube::Client, key: &ObjectRef, sender: &watch::Sender<Known>) {
    match key.kind {
        ObjectKind::ConfigMap => {
            let objects: kube::Api<ConfigMap> = kube::Api::namespaced(client, &key.namespace);
            one(objects, &key.name, sender).await;
        }
        ObjectKind::Secret => {
            let objects: kube::Api<Secret> = kube::Api::namespaced(client, &key.namespace);
            one(objects, &key.name, sender).await;
        }
    }
}

async fn one<K>(api: kube::Api<K>, name: &str, sender: &watch::Sender<Known>)
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + Into<Object> + 'static,
{
    let mut stream = std::pin::pin!(watcher::watch_object(api, name).backoff(crate::api::pauses()));
    while let Some(next) = stream.next().await {
        match next {
            Ok(Some(o)) => publish(sender, Known::Present(Arc::new(o.into()))),
            Ok(None) => publish(sender, Known::Absent),
            // Content once seen stays good while the API server is away.
            Err(e) if matches!(*sender.borrow(), Known::Unknown | Known::Failed(_)) => {
                publish(sender, Known::Failed(e.to_string()));
            }
            Err(e) => tracing::debug!(error = %e, name, "watch of a referenced object"),
        }
    }
}

fn publish(sender: &watch::Sender<Known>, next: Known) {
    sender.send_if_modified(|now| {
        let changed = *now != next;
        *now = next;
        changed
    });
}
