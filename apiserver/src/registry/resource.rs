//! One served resource: what it is called, how it behaves, where its objects are.

use std::sync::Arc;

use isopod_api::{
    gvk::{GroupKind, GroupResource, Gvk, Gvr},
    resources,
};

use super::strategy::Strategy;
use crate::cache::ResourceCache;

/// A resource in one served version. Versions of one resource share the stored objects.
pub(crate) struct Resource {
    /// Names, verbs, subresources.
    pub(crate) info: resources::Resource,
    /// Group, version, resource.
    pub(crate) gvr: Gvr,
    /// Group, version, kind.
    pub(crate) gvk: Gvk,
    /// The kind objects are stored as; differs from `gvk` in versions that are converted.
    pub(crate) storage: Gvk,
    /// Behaviour (that of the stored version).
    pub(crate) strategy: &'static dyn Strategy,
    /// The stored objects; `None` for kinds that are only answered (reviews).
    pub(crate) store: Option<Arc<ResourceCache>>,
}

impl Resource {
    /// Group and resource.
    pub(crate) fn group_resource(&self) -> GroupResource {
        self.gvr.group_resource()
    }

    /// Group and kind.
    pub(crate) fn group_kind(&self) -> GroupKind {
        self.storage.group_kind()
    }

    /// Whether objects must be converted between the served and the stored version.
    pub(crate) fn converted(&self) -> bool {
        self.gvk != self.storage
    }

    /// Whether a verb is offered on the resource (or a subresource).
    pub(crate) fn offers(&self, subresource: &str, verb: &str) -> bool {
        if subresource.is_empty() {
            return self.info.has_verb(verb);
        }
        self.info.subresource(subresource).is_some_and(|s| s.verbs.iter().any(|v| v == verb))
    }

    /// Whether `status` is its own subresource.
    pub(crate) fn has_status(&self) -> bool {
        self.info.subresource("status").is_some()
    }
}
