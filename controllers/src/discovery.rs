//! Which resources the API server has, for controllers that work on all of them.

use isopod_client::Objects;
use serde::Deserialize;
use std::collections::HashSet;

/// One resource, in its preferred version.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ResourceType {
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) resource: String,
    pub(crate) kind: String,
    pub(crate) namespaced: bool,
    pub(crate) verbs: Vec<String>,
}

impl ResourceType {
    /// `/api/v1` or `/apis/GROUP/VERSION`.
    fn root(&self) -> String {
        if self.group.is_empty() {
            format!("/api/{}", self.version)
        } else {
            format!("/apis/{}/{}", self.group, self.version)
        }
    }

    /// The path of the whole collection.
    pub(crate) fn collection(&self) -> String {
        format!("{}/{}", self.root(), self.resource)
    }

    /// The path of a namespace's part of the collection.
    pub(crate) fn collection_in(&self, namespace: &str) -> String {
        if namespace.is_empty() {
            return self.collection();
        }
        format!("{}/namespaces/{namespace}/{}", self.root(), self.resource)
    }

    /// The path of one object.
    pub(crate) fn object(&self, namespace: &str, name: &str) -> String {
        format!("{}/{name}", self.collection_in(namespace))
    }

    /// `pods` or `deployments.apps`, as people say it.
    pub(crate) fn display(&self) -> String {
        if self.group.is_empty() { self.resource.clone() } else { format!("{}.{}", self.resource, self.group) }
    }

    /// Whether all these verbs exist.
    pub(crate) fn can(&self, verbs: &[&str]) -> bool {
        verbs.iter().all(|verb| self.verbs.iter().any(|v| v == verb))
    }
}

#[derive(Deserialize)]
struct Groups {
    #[serde(default)]
    groups: Vec<Group>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Group {
    versions: Vec<Version>,
    preferred_version: Option<Version>,
}

#[derive(Clone, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
struct Version {
    group_version: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ResourceList {
    #[serde(default)]
    resources: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    name: String,
    kind: String,
    namespaced: bool,
    #[serde(default)]
    verbs: Vec<String>,
}

/// What discovery found, and the group versions it could not read.
#[derive(Debug, Default)]
pub(crate) struct Discovered {
    pub(crate) resources: Vec<ResourceType>,
    pub(crate) failed: Vec<String>,
}

/// Asks the API server for all its resources.
pub(crate) async fn discover(objects: &Objects) -> Result<Discovered, kube::Error> {
    let groups: Groups = objects.get_path("/apis").await?;
    let mut versions = vec!["v1".to_owned()];
    for group in groups.groups {
        let preferred = group.preferred_version.clone();
        versions.extend(preferred.iter().map(|v| v.group_version.clone()));
        versions.extend(group.versions.into_iter().filter(|v| Some(v) != preferred.as_ref()).map(|v| v.group_version));
    }
    let mut found = Discovered::default();
    let mut seen = HashSet::new();
    for group_version in versions {
        let path = match group_version.as_str() {
            "v1" => "/api/v1".to_owned(),
            other => format!("/apis/{other}"),
        };
        let Ok(list) = objects.get_path::<ResourceList>(&path).await else {
            found.failed.push(group_version);
            continue;
        };
        let (group, version) = group_version.split_once('/').unwrap_or(("", &group_version));
        for listed in list.resources.into_iter().filter(|r| !r.name.contains('/')) {
            if seen.insert((group.to_owned(), listed.name.clone())) {
                found.resources.push(ResourceType {
                    group: group.to_owned(),
                    version: version.to_owned(),
                    resource: listed.name,
                    kind: listed.kind,
                    namespaced: listed.namespaced,
                    verbs: listed.verbs,
                });
            }
        }
    }
    Ok(found)
}
