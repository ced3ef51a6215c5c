//! Follows the CRDs: accepts their names, publishes what they define, removes the objects of deleted ones.
//!
//! One pass looks at every CRD that changed since the last one, computes all statuses, swaps the table of served resources
//! and writes the statuses: what a condition announces is already there.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use isopod_api::{meta, status::Status};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{
    Definition, gvr,
    names::{self, Taken},
    table::Publication,
};
use crate::{
    authn::UserInfo,
    objects::Objects,
    registry::{Registry, Writer},
};

/// The finalizer that keeps a CRD until its objects are gone.
pub(crate) const FINALIZER: &str = "customresourcecleanup.apiextensions.k8s.io";
/// Wait after a failed pass.
const RETRY: Duration = Duration::from_millis(500);

/// What is remembered of a CRD: everything but its versions.
struct Known {
    revision: u64,
    head: Value,
}

/// The controller's memory.
pub(crate) struct Controller {
    registry: Arc<Registry>,
    known: BTreeMap<Box<str>, Known>,
    cleaning: HashSet<String>,
    stop: CancellationToken,
    started: bool,
}

impl Controller {
    /// A controller that has seen nothing.
    pub(crate) fn new(registry: Arc<Registry>, stop: CancellationToken) -> Self {
        Self { registry, known: BTreeMap::new(), cleaning: HashSet::new(), stop, started: false }
    }

    /// Follows the CRDs until the server stops.
    pub(crate) async fn run(mut self) {
        let Some(store) = self.registry.resource(&gvr()).and_then(|r| r.store.clone()) else { return };
        let stop = self.stop.clone();
        loop {
            let changed = store.changed();
            tokio::pin!(changed);
            // Register before looking, so that no change falls in between.
            changed.as_mut().enable();
            let failed = self.pass().await.inspect_err(|error| tracing::warn!(%error, "custom resources")).is_err();
            // Every arm only waits.
            tokio::select! {
                () = changed => {}
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RETRY), if failed => {}
            }
        }
    }

    /// One look at everything that changed.
    pub(crate) async fn pass(&mut self) -> Result<(), Status> {
        let objects = self.registry.list(&gvr(), "");
        let present: HashSet<&str> = objects.iter().map(|o| &*o.name).collect();
        self.known.retain(|name, _| present.contains(&**name));
        let mut full: HashMap<Box<str>, Value> = HashMap::new();
        let mut order: Vec<(u64, Box<str>)> = Vec::new();
        for object in &objects {
            order.push((object.revision, object.name.clone()));
            if self.known.get(&object.name).is_some_and(|k| k.revision == object.revision) {
                continue;
            }
            let crd = object.value();
            let mut head = crd.clone();
            if let Some(spec) = head["spec"].as_object_mut() {
                spec.shift_remove("versions");
            }
            full.insert(object.name.clone(), crd);
            self.known.insert(object.name.clone(), Known { revision: object.revision, head });
        }
        order.sort();
        let mut writes = Vec::new();
        for (_, name) in &order {
            let Some(head) = self.known.get(name).map(|k| k.head.clone()) else { continue };
            let group = head["spec"]["group"].as_str().unwrap_or_default();
            let heads: Vec<Value> =
                self.known.values().filter(|k| k.head["spec"]["group"] == group).map(|k| k.head.clone()).collect();
            let status = names::accept(&head, &Taken::by_others(&heads, group, name));
            if status != head["status"] {
                if let Some(known) = self.known.get_mut(name) {
                    known.head["status"] = status.clone();
                }
                writes.push((name.clone(), status));
            }
        }
        self.publish(&mut full);
        let user = UserInfo::system();
        for (name, status) in writes {
            let change = Box::new(move |crd: &mut Value| {
                for field in ["conditions", "acceptedNames"] {
                    crd["status"][field] = status[field].clone();
                }
                Ok(())
            });
            match self.registry.modify(&gvr(), "", &name, "status", &user, change).await {
                Err(status) if status.code != 404 => return Err(status),
                _ => {}
            }
        }
        self.clean();
        self.started = true;
        Ok(())
    }

    /// Swaps the table.
    fn publish(&self, full: &mut HashMap<Box<str>, Value>) {
        let served = self.registry.custom();
        let mut publications = Vec::new();
        for (name, known) in &self.known {
            if !names::holds(&known.head, "Established") {
                continue;
            }
            let before = served.definition(name);
            let definition = match (full.remove(name), before) {
                (None, Some(before)) => Arc::clone(before),
                (crd, before) => {
                    let crd = crd.or_else(|| self.registry.get(&gvr(), "", name).map(|o| o.value()));
                    let Some(mut crd) = crd else { continue };
                    crd["status"] = known.head["status"].clone();
                    let new = Definition::new(&crd, self.registry.converter());
                    match before.filter(|b| b.hash == new.hash) {
                        Some(before) => Arc::clone(before),
                        None if new.versions.is_empty() => continue,
                        None => Arc::new(new),
                    }
                }
            };
            let since = if self.started { self.registry.cache().revision() } else { known.revision };
            let store = self.registry.cache().register_live(&definition.prefix(), &super::STORED);
            publications.push(Publication { definition, store, since });
        }
        self.registry.publish(publications);
    }

    /// Starts to remove the objects of CRDs that are being deleted.
    fn clean(&mut self) {
        let deleted = self
            .known
            .values()
            .filter(|k| meta::deletion_timestamp(&k.head).is_some() && meta::finalizers(&k.head).contains(&FINALIZER));
        let uids: HashSet<String> = deleted.clone().map(|k| meta::uid(&k.head).to_owned()).collect();
        for known in deleted {
            if self.cleaning.insert(meta::uid(&known.head).to_owned()) {
                let (registry, stop) = (Arc::clone(&self.registry), self.stop.clone());
                let name = meta::name(&known.head).to_owned();
                tokio::spawn(async move {
                    tokio::select! {
                        () = cleanup(registry, name) => {}
                        () = stop.cancelled() => {}
                    }
                });
            }
        }
        self.cleaning.retain(|uid| uids.contains(uid));
    }
}

/// Removes the objects of a CRD, waits until they are gone and lets the CRD go.
async fn cleanup(registry: Arc<Registry>, name: String) {
    let user = UserInfo::system();
    let definition = registry.custom().definition(&name).cloned();
    let (reason, message) = match &definition {
        None => ("NeverEstablished", "resource was never established"),
        Some(definition) => {
            let progress = ("InstanceDeletionInProgress", "CustomResource deletion is in progress");
            condition(&registry, &name, true, progress.0, progress.1, &user).await;
            remove_all(&registry, definition, &user).await;
            ("InstanceDeletionCompleted", "removed all instances")
        }
    };
    condition(&registry, &name, false, reason, message, &user).await;
    let change = |crd: &mut Value| {
        let kept: Vec<String> =
            meta::finalizers(crd).iter().filter(|f| **f != FINALIZER).map(|f| (*f).to_owned()).collect();
        meta::set(crd, "finalizers", if kept.is_empty() { Value::Null } else { json!(kept) });
        Ok(())
    };
    if let Err(error) = registry.modify(&gvr(), "", &name, "", &user, Box::new(change)).await
        && error.code != 404
    {
        tracing::warn!(crd = name, %error, "cannot remove the finalizer");
    }
}

async fn condition(registry: &Registry, name: &str, state: bool, reason: &str, message: &str, user: &UserInfo) {
    let change = |crd: &mut Value| {
        names::set(&mut crd["status"], "Terminating", state, reason, message);
        Ok(())
    };
    if let Err(error) = registry.modify(&gvr(), "", name, "status", user, Box::new(change)).await {
        tracing::debug!(crd = name, %error, "cannot write the status");
    }
}

async fn remove_all(registry: &Arc<Registry>, definition: &Definition, user: &UserInfo) {
    let served = registry.custom();
    let found = served.resources().find(|r| r.custom.as_ref().is_some_and(|c| c.definition.name == definition.name));
    let Some(resource) = found.cloned() else { return };
    let Some(store) = resource.store.clone() else { return };
    loop {
        let changed = store.changed();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let left = store.snapshot("", None).0.objects;
        if left.is_empty() {
            return;
        }
        for object in left {
            let value = object.value();
            if meta::deletion_timestamp(&value).is_some() {
                continue;
            }
            let mut writer = Writer::internal(user);
            let deleted =
                registry.delete_object(&resource, &object.namespace, &object.name, &json!({}), &mut writer).await;
            if let Err(error) = deleted
                && error.code != 404
            {
                tracing::warn!(object = &*object.name, %error, "cannot delete a custom resource");
                tokio::time::sleep(RETRY).await;
            }
        }
        changed.await;
    }
}
