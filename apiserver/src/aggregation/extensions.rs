//! What discovery shows of extension servers: their groups, and the resources they say they have.

use std::collections::BTreeMap;

use isopod_api::resources::{Group, Resource, Subresource};
use serde_json::Value;

/// The groups of all available extension servers.
#[derive(Default)]
pub(crate) struct Extensions {
    groups: Vec<Group>,
    resources: Vec<Resource>,
}

impl Extensions {
    /// From group, version and resource list (`APIResourceList`) of each.
    pub(super) fn build(found: &[(String, String, Value)]) -> Self {
        let mut versions: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (group, version, _) in found {
            versions.entry(group).or_default().push(version.clone());
        }
        let group = |(name, versions): (&str, Vec<String>)| Group {
            name: name.to_owned(),
            preferred: versions.first().cloned().unwrap_or_default(),
            versions,
        };
        Self {
            resources: found.iter().flat_map(|(group, version, list)| resources(group, version, list)).collect(),
            groups: versions.into_iter().map(group).collect(),
        }
    }

    /// Their groups.
    pub(crate) fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Their resources of a group and version.
    pub(crate) fn in_version<'a>(&'a self, group: &'a str, version: &'a str) -> impl Iterator<Item = &'a Resource> {
        self.resources.iter().filter(move |r| r.group == group && r.version == version)
    }
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// The resources of a list, with their subresources.
fn resources(group: &str, version: &str, list: &Value) -> Vec<Resource> {
    let entries = || list["resources"].as_array().into_iter().flatten();
    let text = |entry: &Value, field: &str| entry[field].as_str().unwrap_or_default().to_owned();
    let whole = entries().filter(|entry| !text(entry, "name").contains('/'));
    whole
        .map(|entry| {
            let plural = text(entry, "name");
            let prefix = format!("{plural}/");
            let subresources = entries().filter_map(|sub| {
                Some(Subresource {
                    name: sub["name"].as_str()?.strip_prefix(&prefix)?.to_owned(),
                    kind: text(sub, "kind"),
                    verbs: strings(&sub["verbs"]),
                    kind_gv: None,
                })
            });
            Resource {
                group: group.to_owned(),
                version: version.to_owned(),
                preferred: true,
                kind: text(entry, "kind"),
                singular: text(entry, "singularName"),
                short_names: strings(&entry["shortNames"]),
                categories: strings(&entry["categories"]),
                namespaced: entry["namespaced"] == true,
                verbs: strings(&entry["verbs"]),
                subresources: subresources.collect(),
                etcd_prefix: None,
                storage_version_hash: None,
                plural,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lists_become_resources() {
        let list = json!({"resources": [
            {"name": "pods", "singularName": "", "namespaced": true, "kind": "PodMetrics", "verbs": ["get", "list"]},
            {"name": "pods/x", "kind": "X", "verbs": ["get"]},
        ]});
        let extensions = Extensions::build(&[("metrics.k8s.io".into(), "v1beta1".into(), list)]);
        assert_eq!(extensions.groups()[0].versions, ["v1beta1"]);
        let all: Vec<_> = extensions.in_version("metrics.k8s.io", "v1beta1").collect();
        assert_eq!((all.len(), all[0].kind.as_str(), all[0].subresources[0].name.as_str()), (1, "PodMetrics", "x"));
    }
}
