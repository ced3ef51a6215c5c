//! The built-in resources: names, verbs, subresources, short names, categories and the order of groups in discovery.

use std::sync::LazyLock;

use serde::Deserialize;

use crate::gvk::{GroupResource, Gvk, Gvr, api_version};

/// One subresource.
#[derive(Debug, Clone, Deserialize)]
pub struct Subresource {
    /// `status`, `scale`, ...
    pub name: String,
    /// Kind that is read or written.
    pub kind: String,
    /// Verbs.
    pub verbs: Vec<String>,
    /// `group/version` of the kind when it is not the resource's own.
    #[serde(rename = "kindGV", default)]
    pub kind_gv: Option<String>,
}

/// One resource in one version.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resource {
    /// API group, `""` for core.
    pub group: String,
    /// Version.
    pub version: String,
    /// Whether this is the group's preferred version.
    pub preferred: bool,
    /// Kind.
    pub kind: String,
    /// Plural: the resource's name in paths.
    pub plural: String,
    /// Singular.
    pub singular: String,
    /// Short names.
    pub short_names: Vec<String>,
    /// Categories.
    pub categories: Vec<String>,
    /// Whether objects live in namespaces.
    pub namespaced: bool,
    /// Verbs.
    pub verbs: Vec<String>,
    /// Subresources.
    pub subresources: Vec<Subresource>,
    /// Key pattern in upstream's etcd; `None` for kinds that are not stored.
    #[serde(default)]
    pub etcd_prefix: Option<String>,
    /// Upstream's storage version hash.
    #[serde(default)]
    pub storage_version_hash: Option<String>,
}

/// One API group in discovery order.
#[derive(Debug, Clone, Deserialize)]
pub struct Group {
    /// Name.
    pub name: String,
    /// Versions, best first.
    pub versions: Vec<String>,
    /// Preferred version.
    pub preferred: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Table {
    group_order: Vec<Group>,
    resources: Vec<Resource>,
}

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../data/resources.json")).expect("the resource table is part of the program")
});

impl Resource {
    /// Group, version, resource.
    pub fn gvr(&self) -> Gvr {
        Gvr::new(&self.group, &self.version, &self.plural)
    }

    /// Group, version, kind.
    pub fn gvk(&self) -> Gvk {
        Gvk::new(&self.group, &self.version, &self.kind)
    }

    /// Group and resource.
    pub fn group_resource(&self) -> GroupResource {
        GroupResource::new(&self.group, &self.plural)
    }

    /// `apps/v1`.
    pub fn api_version(&self) -> String {
        api_version(&self.group, &self.version)
    }

    /// A subresource by name.
    pub fn subresource(&self, name: &str) -> Option<&Subresource> {
        self.subresources.iter().find(|s| s.name == name)
    }

    /// Whether a verb is offered.
    pub fn has_verb(&self, verb: &str) -> bool {
        self.verbs.iter().any(|v| v == verb)
    }

    /// Whether objects of it are stored.
    pub fn is_stored(&self) -> bool {
        self.etcd_prefix.is_some()
    }

    /// Upstream's key of an object in etcd (`namespace` is ignored for cluster-scoped resources).
    pub fn key(&self, namespace: &str, name: &str) -> Option<String> {
        Some(self.etcd_prefix.as_ref()?.replace("{namespace}", namespace).replace("{name}", name))
    }
}

/// Every resource in every served version, in discovery order of the table.
pub fn all() -> &'static [Resource] {
    &TABLE.resources
}

/// API groups in discovery order, without the core group.
pub fn groups() -> &'static [Group] {
    &TABLE.group_order
}

/// By group, version and plural.
pub fn by_gvr(gvr: &Gvr) -> Option<&'static Resource> {
    find(&gvr.group, &gvr.version, &gvr.resource)
}

/// By group, version and plural.
pub fn find(group: &str, version: &str, plural: &str) -> Option<&'static Resource> {
    all().iter().find(|r| r.plural == plural && r.group == group && r.version == version)
}

/// By group, version and kind.
pub fn by_gvk(gvk: &Gvk) -> Option<&'static Resource> {
    all().iter().find(|r| r.kind == gvk.kind && r.group == gvk.group && r.version == gvk.version)
}

/// All resources of a group and version.
pub fn in_version(group: &str, version: &str) -> impl Iterator<Item = &'static Resource> {
    all().iter().filter(move |r| r.group == group && r.version == version)
}

/// The preferred version of a group and plural.
pub fn preferred(gr: &GroupResource) -> Option<&'static Resource> {
    let mut found = all().iter().filter(|r| r.plural == gr.resource && r.group == gr.group);
    let first = found.clone().find(|r| r.preferred);
    first.or_else(|| found.next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_complete() {
        assert!(all().len() > 60);
        let pods = find("", "v1", "pods").unwrap();
        assert_eq!(pods.kind, "Pod");
        assert!(pods.subresource("exec").is_some());
        assert_eq!(pods.key("ns", "a").unwrap(), "/registry/pods/ns/a");
        assert_eq!(by_gvk(&Gvk::new("apps", "v1", "Deployment")).unwrap().plural, "deployments");
        assert!(!groups().is_empty());
    }
}
