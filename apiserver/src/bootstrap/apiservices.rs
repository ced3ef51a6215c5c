//! APIServices of what this server answers itself: one per version of a group, `Local`.
//!
//! Those of built-in groups are made at start and may be deleted until the next one; those of custom resources follow the
//! CustomResourceDefinitions. APIServices of others (without our label) are left alone.

use std::collections::{BTreeMap, BTreeSet};

use isopod_api::{gvk::Gvr, meta, resources, status::Status};
use serde_json::{Value, json};

use super::ensure;
use crate::{authn::UserInfo, objects::Objects};

const MANAGED: &str = "kube-aggregator.kubernetes.io/automanaged";

/// Priority of each built-in group; the higher, the earlier in discovery.
const PRIORITIES: [(&str, i64); 20] = [
    ("", 18_000),
    ("apps", 17_800),
    ("events.k8s.io", 17_750),
    ("authentication.k8s.io", 17_700),
    ("authorization.k8s.io", 17_600),
    ("autoscaling", 17_500),
    ("batch", 17_400),
    ("certificates.k8s.io", 17_300),
    ("networking.k8s.io", 17_200),
    ("policy", 17_100),
    ("rbac.authorization.k8s.io", 17_000),
    ("storage.k8s.io", 16_800),
    ("apiextensions.k8s.io", 16_700),
    ("admissionregistration.k8s.io", 16_700),
    ("scheduling.k8s.io", 16_600),
    ("coordination.k8s.io", 16_500),
    ("node.k8s.io", 16_300),
    ("discovery.k8s.io", 16_200),
    ("resource.k8s.io", 16_200),
    ("flowcontrol.apiserver.k8s.io", 16_100),
];

/// `apiservices`.
pub(super) fn gvr() -> Gvr {
    Gvr::new("apiregistration.k8s.io", "v1", "apiservices")
}

fn local(group: &str, version: &str, managed: &str, priority: i64, version_priority: i64) -> Value {
    let mut spec = json!({"version": version, "groupPriorityMinimum": priority, "versionPriority": version_priority});
    if !group.is_empty() {
        spec["group"] = json!(group);
    }
    json!({
        "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService",
        "metadata": {"name": format!("{version}.{group}"), "labels": {MANAGED: managed}},
        "spec": spec,
    })
}

/// Makes those of the built-in groups.
pub(super) async fn builtin(objects: &dyn Objects) -> Result<(), Status> {
    for (group, priority) in PRIORITIES {
        let versions: BTreeSet<&str> =
            resources::all().iter().filter(|r| r.group == group).map(|r| r.version.as_str()).collect();
        for version in versions {
            let rank = match (group, version) {
                ("", _) => 1,
                ("autoscaling", "v2") => 30,
                ("flowcontrol.apiserver.k8s.io", _) => 21,
                _ => 15,
            };
            ensure(objects, &gvr(), "", local(group, version, "onstart", priority, rank)).await?;
        }
    }
    Ok(())
}

/// A group and a version of it.
type GroupVersion = (String, String);

/// Keeps those of custom resources as the CustomResourceDefinitions say.
#[derive(Default)]
pub(super) struct Custom {
    /// What is served by name and revision of the definition.
    known: BTreeMap<Box<str>, (u64, Vec<GroupVersion>)>,
}

impl Custom {
    /// What has to be watched for [`Self::follow`].
    pub(super) fn watched() -> [Gvr; 2] {
        [crate::custom::gvr(), gvr()]
    }

    /// One look.
    pub(super) async fn follow(&mut self, objects: &dyn Objects) -> Result<(), Status> {
        let definitions = objects.list(&crate::custom::gvr(), "");
        let present: BTreeSet<&str> = definitions.iter().map(|d| &*d.name).collect();
        self.known.retain(|name, _| present.contains(&**name));
        for definition in &definitions {
            if self.known.get(&definition.name).is_none_or(|(revision, _)| *revision != definition.revision) {
                let served = served(&definition.value());
                self.known.insert(definition.name.clone(), (definition.revision, served));
            }
        }
        let wanted: BTreeSet<&GroupVersion> = self.known.values().flat_map(|(_, served)| served).collect();
        for (group, version) in &wanted {
            ensure(objects, &gvr(), "", local(group, version, "true", 1000, 100)).await?;
        }
        let names: BTreeSet<String> = wanted.iter().map(|(group, version)| format!("{version}.{group}")).collect();
        let user = UserInfo::system();
        for object in objects.list(&gvr(), "") {
            let managed = object.labels.iter().any(|(k, v)| &**k == MANAGED && &**v == "true");
            if managed && !names.contains(&*object.name) {
                match objects.delete(&gvr(), "", &object.name, json!({}), &user).await {
                    Err(status) if status.code != 404 => return Err(status),
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// The group and served versions of a definition that is established.
fn served(crd: &Value) -> Vec<GroupVersion> {
    if !crate::custom::names::holds(crd, "Established") || meta::deletion_timestamp(crd).is_some() {
        return Vec::new();
    }
    let group = crd["spec"]["group"].as_str().unwrap_or_default();
    let versions = crd["spec"]["versions"].as_array().into_iter().flatten();
    versions
        .filter(|version| version["served"] == true)
        .filter_map(|version| Some((group.to_owned(), version["name"].as_str()?.to_owned())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::FakeObjects;

    #[test]
    fn every_built_in_group_has_a_priority() {
        let groups: BTreeSet<&str> = resources::all().iter().map(|r| r.group.as_str()).collect();
        let known: BTreeSet<&str> = PRIORITIES.iter().map(|(group, _)| *group).collect();
        let missing: Vec<_> = groups.difference(&known).filter(|g| **g != "apiregistration.k8s.io").collect();
        assert!(missing.is_empty(), "{missing:?}");
    }

    #[tokio::test]
    async fn custom_groups_come_and_go() {
        let objects = FakeObjects::default();
        let foreign = json!({"metadata": {"name": "v1.metrics.example.com"}, "spec": {"service": {"name": "m"}}});
        objects.put_as("apiservices", foreign);
        objects.put_as(
            "customresourcedefinitions",
            json!({"metadata": {"name": "things.example.com"},
                "spec": {"group": "example.com", "versions": [{"name": "v1", "served": true}, {"name": "v0", "served": false}]},
                "status": {"conditions": [{"type": "Established", "status": "True"}]}}),
        );
        let mut custom = Custom::default();
        let names = || objects.list(&gvr(), "").iter().map(|o| o.name.to_string()).collect::<Vec<_>>();
        custom.follow(&objects).await.unwrap();
        assert_eq!(names(), ["v1.example.com", "v1.metrics.example.com"]);
        objects.remove("customresourcedefinitions", "", "things.example.com");
        custom.follow(&objects).await.unwrap();
        assert_eq!(names(), ["v1.metrics.example.com"]);
    }
}
