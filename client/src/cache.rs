//! One collection of the API server, in memory, shared by everyone in the process who needs it.
//!
//! Objects are `Arc`s without managedFields. Indexed by namespace (key order) and by controlling owner. Subscribers run
//! synchronously on the watch task after the cache holds the change: they must only enqueue.

use crate::objects::{HasMeta, Object};
use crate::reflect::{Sink, Source, reflect};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use parking_lot::RwLock;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Namespace (empty for cluster scope) and name.
pub type Key = (String, String);

/// What happened to an object.
#[derive(Debug)]
pub enum Change<'a, T> {
    /// It is new.
    Added(&'a Arc<T>),
    /// It was the first and is the second.
    Updated(&'a Arc<T>, &'a Arc<T>),
    /// It is gone; this was its last state.
    Deleted(&'a Arc<T>),
}

impl<'a, T> Change<'a, T> {
    /// The newest state.
    pub fn object(&self) -> &'a Arc<T> {
        match self {
            Change::Added(object) | Change::Updated(_, object) | Change::Deleted(object) => object,
        }
    }

    /// Whether the object is gone.
    pub fn is_deleted(&self) -> bool {
        matches!(self, Change::Deleted(_))
    }
}

type Handler<T> = Box<dyn Fn(&Change<'_, T>) + Send + Sync>;
type Trim<T> = Box<dyn Fn(&mut T) + Send + Sync>;

struct State<T> {
    objects: BTreeMap<Key, Arc<T>>,
    /// Controller UID -> keys; orphans of a namespace under [`orphan_key`].
    owned: HashMap<String, BTreeSet<Key>>,
}

/// The shared cache of one collection.
pub struct Cache<T> {
    state: RwLock<State<T>>,
    handlers: RwLock<Vec<Handler<T>>>,
    trim: RwLock<Option<Trim<T>>>,
    synced: watch::Sender<bool>,
    changes: watch::Sender<()>,
}

/// The owner that controls an object.
pub fn controller_of(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references.as_ref()?.iter().find(|owner| owner.controller == Some(true))
}

fn orphan_key(namespace: &str) -> String {
    format!("orphans of {namespace}")
}

fn owner_key(meta: &ObjectMeta) -> String {
    match controller_of(meta) {
        Some(owner) => owner.uid.clone(),
        None => orphan_key(meta.namespace.as_deref().unwrap_or_default()),
    }
}

fn key_of<T: HasMeta>(object: &T) -> Key {
    (object.namespace().to_owned(), object.name().to_owned())
}

impl<T> Default for Cache<T> {
    fn default() -> Self {
        Self {
            state: RwLock::new(State { objects: BTreeMap::new(), owned: HashMap::new() }),
            handlers: RwLock::new(Vec::new()),
            trim: RwLock::new(None),
            synced: watch::Sender::new(false),
            changes: watch::Sender::new(()),
        }
    }
}

impl<T: HasMeta + Clone + Send + Sync + 'static> Cache<T> {
    /// An empty cache.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Drops what nobody reads from every object before it is kept.
    pub fn trim(&self, trim: impl Fn(&mut T) + Send + Sync + 'static) {
        *self.trim.write() = Some(Box::new(trim));
    }

    /// Calls `handler` for every object there is, then for every change.
    pub fn subscribe(&self, handler: impl Fn(&Change<'_, T>) + Send + Sync + 'static) {
        let mut handlers = self.handlers.write();
        for object in self.list() {
            handler(&Change::Added(&object));
        }
        handlers.push(Box::new(handler));
    }

    /// Wakes after every change; for those who wait for something and then leave.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// One object.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<T>> {
        self.state.read().objects.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// Every object.
    pub fn list(&self) -> Vec<Arc<T>> {
        self.state.read().objects.values().cloned().collect()
    }

    /// How many objects there are.
    pub fn len(&self) -> usize {
        self.state.read().objects.len()
    }

    /// Whether there is no object.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The objects of a namespace, by name.
    pub fn in_namespace(&self, namespace: &str) -> Vec<Arc<T>> {
        self.select(namespace, |_| true)
    }

    /// The objects of a namespace that `keep` is for, by name: of thousands only those are touched.
    pub fn select(&self, namespace: &str, keep: impl Fn(&T) -> bool) -> Vec<Arc<T>> {
        let state = self.state.read();
        let from = (namespace.to_owned(), String::new());
        let all = state.objects.range(from..).take_while(|((ns, _), _)| ns == namespace).map(|(_, object)| object);
        all.filter(|object| keep(object)).cloned().collect()
    }

    /// The objects whose controller has this UID.
    pub fn owned_by(&self, uid: &str) -> Vec<Arc<T>> {
        self.indexed(uid)
    }

    /// The objects of a namespace that have no controller.
    pub fn orphans(&self, namespace: &str) -> Vec<Arc<T>> {
        self.indexed(&orphan_key(namespace))
    }

    fn indexed(&self, owner: &str) -> Vec<Arc<T>> {
        let state = self.state.read();
        let Some(keys) = state.owned.get(owner) else { return Vec::new() };
        keys.iter().filter_map(|key| state.objects.get(key).cloned()).collect()
    }

    /// Waits until the first list is in.
    pub async fn synced(&self) {
        let mut synced = self.synced.subscribe();
        // The sender lives as long as self.
        let _ = synced.wait_for(|done| *done).await;
    }

    /// Whether the first list is in.
    pub fn is_synced(&self) -> bool {
        *self.synced.borrow()
    }

    /// Keeps the cache equal to a collection until `stop`.
    pub fn start(self: &Arc<Self>, client: kube::Client, source: Source, stop: CancellationToken)
    where
        T: serde::de::DeserializeOwned,
    {
        let cache = self.clone();
        tokio::spawn(async move { reflect(client, source, &*cache, stop).await });
    }

    /// Keeps the cache equal to all objects of the kind until `stop`.
    pub fn start_all(self: &Arc<Self>, client: kube::Client, stop: CancellationToken)
    where
        T: Object,
    {
        self.start_selected(client, "", "", stop);
    }

    /// Keeps the cache equal to the objects of a namespace (or all) that a query selects until `stop`.
    pub fn start_selected(self: &Arc<Self>, client: kube::Client, namespace: &str, query: &str, stop: CancellationToken)
    where
        T: Object,
    {
        let path = T::url_path(&(), (!namespace.is_empty()).then_some(namespace));
        self.start(client, Source { path, query: query.to_owned(), metadata_only: false }, stop);
    }

    /// Puts an object in and tells the subscribers. For the writer of an object, so that it sees its own write at once,
    /// and for tests; an older revision never replaces a newer one.
    pub fn put(&self, mut object: T) {
        object.object_meta_mut().managed_fields = None;
        if let Some(trim) = &*self.trim.read() {
            trim(&mut object);
        }
        let object = Arc::new(object);
        let key = key_of(&*object);
        let old = {
            let mut state = self.state.write();
            if let Some(old) = state.objects.get(&key)
                && newer(old.object_meta(), object.object_meta())
            {
                return;
            }
            let old = state.objects.insert(key.clone(), object.clone());
            let owner = owner_key(object.object_meta());
            if let Some(old) = &old {
                let before = owner_key(old.object_meta());
                if before != owner {
                    state.unindex(&before, &key);
                }
            }
            state.owned.entry(owner).or_default().insert(key);
            old
        };
        match &old {
            Some(old) if old.uid() != object.uid() => {
                self.tell(&Change::Deleted(old));
                self.tell(&Change::Added(&object));
            }
            Some(old) => self.tell(&Change::Updated(old, &object)),
            None => self.tell(&Change::Added(&object)),
        }
    }

    /// Takes an object out and tells the subscribers.
    pub fn remove(&self, mut object: T) {
        object.object_meta_mut().managed_fields = None;
        let key = key_of(&object);
        {
            let mut state = self.state.write();
            let Some(old) = state.objects.remove(&key) else { return };
            let owner = owner_key(old.object_meta());
            state.unindex(&owner, &key);
        }
        self.tell(&Change::Deleted(&Arc::new(object)));
    }

    fn tell(&self, change: &Change<'_, T>) {
        for handler in self.handlers.read().iter() {
            handler(change);
        }
        self.changes.send_replace(());
    }
}

impl<T> State<T> {
    fn unindex(&mut self, owner: &str, key: &Key) {
        if let Some(keys) = self.owned.get_mut(owner) {
            keys.remove(key);
            if keys.is_empty() {
                self.owned.remove(owner);
            }
        }
    }
}

/// Whether `old` is a later revision of the same object than `new`.
fn newer(old: &ObjectMeta, new: &ObjectMeta) -> bool {
    let number = |meta: &ObjectMeta| meta.resource_version.as_ref().and_then(|rv| rv.parse::<u64>().ok());
    old.uid == new.uid && matches!((number(old), number(new)), (Some(a), Some(b)) if a > b)
}

impl<T: HasMeta + Clone + Send + Sync + 'static> Sink<T> for Cache<T> {
    fn replace(&self, objects: Vec<T>) {
        let mut gone: BTreeSet<Key> = self.state.read().objects.keys().cloned().collect();
        for object in objects {
            gone.remove(&key_of(&object));
            self.put(object);
        }
        for (namespace, name) in gone {
            if let Some(object) = self.get(&namespace, &name) {
                self.remove((*object).clone());
            }
        }
        self.synced.send_replace(true);
    }

    fn apply(&self, object: T) {
        self.put(object);
    }

    fn delete(&self, object: T) {
        self.remove(object);
    }

    fn revision(object: &T) -> Option<String> {
        object.object_meta().resource_version.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Pod;
    use parking_lot::Mutex;

    fn pod(name: &str, uid: &str, rv: &str, owner: Option<&str>) -> Pod {
        let owner_references = owner
            .map(|uid| vec![OwnerReference { uid: uid.into(), controller: Some(true), ..OwnerReference::default() }]);
        Pod {
            metadata: ObjectMeta {
                name: Some(name.into()),
                namespace: Some("ns".into()),
                uid: Some(uid.into()),
                resource_version: Some(rv.into()),
                owner_references,
                ..ObjectMeta::default()
            },
            ..Pod::default()
        }
    }

    #[test]
    fn index_follows_the_controller() {
        let cache = Cache::<Pod>::new();
        cache.put(pod("a", "1", "1", None));
        assert_eq!(cache.orphans("ns").len(), 1);
        cache.put(pod("a", "1", "2", Some("rs")));
        assert_eq!((cache.orphans("ns").len(), cache.owned_by("rs").len()), (0, 1));
        cache.remove(pod("a", "1", "3", Some("rs")));
        assert!(cache.owned_by("rs").is_empty() && cache.is_empty());
    }

    #[test]
    fn replace_tells_what_was_missed_and_stale_writes_are_ignored() {
        let cache = Cache::<Pod>::new();
        let log = Arc::new(Mutex::new(Vec::new()));
        let seen = log.clone();
        cache.subscribe(move |change| {
            let word = match change {
                Change::Added(_) => "added",
                Change::Updated(..) => "updated",
                Change::Deleted(_) => "deleted",
            };
            seen.lock().push(format!("{word} {}", change.object().name()));
        });
        cache.replace(vec![pod("a", "1", "1", None), pod("b", "2", "2", None)]);
        cache.replace(vec![pod("a", "9", "5", None)]);
        cache.put(pod("a", "9", "4", None));
        assert_eq!(*log.lock(), ["added a", "added b", "deleted a", "added a", "deleted b"]);
        assert!(cache.is_synced());
    }
}
