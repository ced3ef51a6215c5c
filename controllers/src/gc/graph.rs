//! Who owns whom: every object of the API server by UID, with its owners and dependents. Pure.
//!
//! An owner that is referred to but was never seen is a placeholder; whether it exists is for the collector to find out.

use serde::Deserialize;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// A UID.
pub(crate) type Uid = Arc<str>;

/// A reference to an owner.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Owner {
    pub(crate) api_version: String,
    pub(crate) kind: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) block_owner_deletion: bool,
}

/// What the graph needs of an object.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct Slim {
    #[serde(default)]
    pub(crate) metadata: SlimMeta,
}

/// Its metadata.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct SlimMeta {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) uid: String,
    pub(crate) resource_version: String,
    pub(crate) owner_references: Vec<Owner>,
    pub(crate) finalizers: Vec<String>,
    pub(crate) deletion_timestamp: Option<String>,
}

/// An object.
#[derive(Clone, Debug, Default)]
pub(crate) struct Object {
    /// Index of its resource; `None` for a placeholder.
    pub(crate) resource: Option<usize>,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) revision: String,
    pub(crate) owners: Vec<Owner>,
    pub(crate) dependents: HashSet<Uid>,
    pub(crate) deleting: bool,
    /// Waits for its dependents (`foregroundDeletion`).
    pub(crate) foreground: bool,
    /// Lets its dependents go first (`orphan`).
    pub(crate) orphan: bool,
}

/// What the collector should look at.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Work {
    /// Is it garbage?
    Check(Uid),
    /// Release its dependents.
    Orphan(Uid),
}

/// The graph.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    pub(crate) objects: HashMap<Uid, Object>,
}

impl Graph {
    fn uid(&self, text: &str) -> Uid {
        self.objects.get_key_value(text).map_or_else(|| Arc::from(text), |(uid, _)| uid.clone())
    }

    /// An object was seen.
    pub(crate) fn apply(&mut self, resource: usize, meta: SlimMeta) -> Vec<Work> {
        let mut work = Vec::new();
        let uid = self.uid(&meta.uid);
        let deleting = meta.deletion_timestamp.is_some();
        let has = |finalizer: &str| meta.finalizers.iter().any(|f| f == finalizer);
        let (foreground, orphan) = (deleting && has("foregroundDeletion"), deleting && has("orphan"));
        let old = self.objects.get(&uid);
        let was_foreground = old.is_some_and(|o| o.foreground);
        let was_orphan = old.is_some_and(|o| o.orphan);
        let old_owners = old.map(|o| o.owners.clone()).unwrap_or_default();
        let new_here = old.is_none_or(|o| o.resource.is_none());
        let object = self.objects.entry(uid.clone()).or_default();
        object.resource = Some(resource);
        object.namespace = meta.namespace;
        object.name = meta.name;
        object.revision = meta.resource_version;
        object.deleting = deleting;
        object.foreground = foreground;
        object.orphan = orphan;
        if old_owners != meta.owner_references {
            work.extend(self.relink(&uid, &old_owners, meta.owner_references));
        } else if new_here {
            work.extend((!old_owners.is_empty()).then(|| Work::Check(uid.clone())));
        }
        if orphan && !was_orphan {
            work.push(Work::Orphan(uid.clone()));
        }
        if foreground && !was_foreground {
            let dependents = self.objects.get(&uid).map(|o| o.dependents.clone()).unwrap_or_default();
            work.extend(dependents.into_iter().map(Work::Check));
            work.push(Work::Check(uid));
        }
        work
    }

    fn relink(&mut self, uid: &Uid, old: &[Owner], new: Vec<Owner>) -> Vec<Work> {
        let mut work = Vec::new();
        for owner in old.iter().filter(|o| !new.iter().any(|n| n.uid == o.uid)) {
            self.unlink(uid, &owner.uid);
        }
        // An owner that waits may have waited for this.
        for owner in old {
            if self.objects.get(owner.uid.as_str()).is_some_and(|o| o.foreground) {
                work.push(Work::Check(self.uid(&owner.uid)));
            }
        }
        let mut doubtful = false;
        for owner in &new {
            let owner_uid = self.uid(&owner.uid);
            let object = self.objects.entry(owner_uid).or_default();
            object.dependents.insert(uid.clone());
            // Not seen yet, or on its way out: look closer.
            doubtful |= object.resource.is_none() || object.foreground;
        }
        if doubtful {
            work.push(Work::Check(uid.clone()));
        }
        if let Some(object) = self.objects.get_mut(uid) {
            object.owners = new;
        }
        work
    }

    fn unlink(&mut self, uid: &str, owner: &str) {
        let Some(object) = self.objects.get_mut(owner) else { return };
        object.dependents.remove(uid);
        if object.resource.is_none() && object.dependents.is_empty() {
            self.objects.remove(owner);
        }
    }

    /// An object is gone: its dependents may be garbage, its owners may have waited for it.
    pub(crate) fn remove(&mut self, uid: &str) -> Vec<Work> {
        let Some(object) = self.objects.remove(uid) else { return Vec::new() };
        let uid: Uid = Arc::from(uid);
        let mut work = Vec::new();
        for owner in &object.owners {
            self.unlink(&uid, &owner.uid);
            if self.objects.get(owner.uid.as_str()).is_some_and(|o| o.foreground) {
                work.push(Work::Check(self.uid(&owner.uid)));
            }
        }
        if !object.dependents.is_empty() {
            work.extend(object.dependents.iter().cloned().map(Work::Check));
            self.objects.insert(uid, Object { dependents: object.dependents, ..Object::default() });
        }
        work
    }

    /// The dependents that keep their owner from going.
    pub(crate) fn blocking(&self, uid: &str) -> Vec<Uid> {
        let Some(object) = self.objects.get(uid) else { return Vec::new() };
        let blocks = |dependent: &&Uid| {
            self.objects
                .get(*dependent)
                .is_some_and(|d| d.owners.iter().any(|owner| owner.uid == uid && owner.block_owner_deletion))
        };
        object.dependents.iter().filter(blocks).cloned().collect()
    }

    /// The UIDs of one resource.
    pub(crate) fn of_resource(&self, resource: usize) -> Vec<Uid> {
        self.objects.iter().filter(|(_, o)| o.resource == Some(resource)).map(|(uid, _)| uid.clone()).collect()
    }

    /// The namespace of an object that has been seen; none for what is only referred to.
    pub(crate) fn namespace(&self, uid: &str) -> Option<&str> {
        self.objects.get(uid).filter(|o| o.resource.is_some()).map(|o| &*o.namespace)
    }

    /// The namespaces that have objects.
    pub(crate) fn namespaces(&self) -> BTreeSet<String> {
        self.objects.values().filter(|o| o.resource.is_some()).map(|o| o.namespace.clone()).collect()
    }

    /// How many objects of a resource a namespace has.
    pub(crate) fn count(&self, resource: usize, namespace: &str) -> usize {
        self.objects.values().filter(|o| o.resource == Some(resource) && o.namespace == namespace).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(uid: &str, owners: &[&str], finalizers: &[&str], deleting: bool) -> SlimMeta {
        SlimMeta {
            name: uid.into(),
            namespace: "ns".into(),
            uid: uid.into(),
            owner_references: owners
                .iter()
                .map(|o| Owner { uid: (*o).into(), block_owner_deletion: true, ..Owner::default() })
                .collect(),
            finalizers: finalizers.iter().map(|f| (*f).to_owned()).collect(),
            deletion_timestamp: deleting.then(String::new),
            ..SlimMeta::default()
        }
    }

    fn check(uid: &str) -> Work {
        Work::Check(Arc::from(uid))
    }

    #[test]
    fn dependents_are_checked_when_their_owner_goes() {
        let mut graph = Graph::default();
        assert!(graph.apply(0, meta("owner", &[], &[], false)).is_empty());
        assert!(graph.apply(1, meta("child", &["owner"], &[], false)).is_empty());
        assert_eq!(graph.remove("owner"), [check("child")]);
        graph.remove("child");
        assert!(graph.objects.is_empty(), "the placeholder goes with its last dependent");
    }

    #[test]
    fn an_unseen_owner_is_a_reason_to_look() {
        let mut graph = Graph::default();
        assert_eq!(graph.apply(1, meta("child", &["owner"], &[], false)), [check("child")]);
        assert!(graph.apply(0, meta("owner", &[], &[], false)).is_empty());
        assert_eq!(graph.objects["owner"].dependents.len(), 1);
    }

    #[test]
    fn foreground_deletion_waits_for_blocking_dependents() {
        let mut graph = Graph::default();
        graph.apply(0, meta("owner", &[], &[], false));
        graph.apply(1, meta("child", &["owner"], &[], false));
        let work = graph.apply(0, meta("owner", &[], &["foregroundDeletion"], true));
        assert_eq!(work, [check("child"), check("owner")]);
        assert_eq!(graph.blocking("owner").len(), 1);
        assert_eq!(graph.remove("child"), [check("owner")]);
        assert!(graph.blocking("owner").is_empty());
    }

    #[test]
    fn orphaning_is_asked_for_once() {
        let mut graph = Graph::default();
        let dying = meta("owner", &[], &["orphan"], true);
        assert_eq!(graph.apply(0, dying.clone()), [Work::Orphan(Arc::from("owner"))]);
        assert!(graph.apply(0, dying).is_empty());
    }
}
