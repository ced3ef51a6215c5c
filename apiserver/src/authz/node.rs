//! The node authorizer: what agents (`system:node:NAME` in `system:nodes`) may do.
//!
//! The rules are those of the ClusterRole `system:node`. Secrets, config maps and claims are narrowed to those that pods on
//! the agent's own node refer to, and tokens to the service accounts those pods run as.

use std::sync::{Arc, OnceLock};

use isopod_api::gvk::Gvr;
use serde_json::Value;

use super::{Attributes, Decision, rule::Rule};
use crate::{authn::UserInfo, bootstrap, objects::Objects};

/// The node a user is the agent of.
pub fn node_name(user: &UserInfo) -> Option<&str> {
    user.in_group("system:nodes").then(|| user.name.strip_prefix("system:node:")).flatten()
}

/// Decides for agents.
pub struct NodeAuthorizer {
    objects: Arc<dyn Objects>,
}

fn rules() -> &'static [Rule] {
    static RULES: OnceLock<Vec<Rule>> = OnceLock::new();
    RULES.get_or_init(|| {
        let data = bootstrap::data();
        let role = data["clusterRoles"].as_array().into_iter().flatten().find(|role| role["name"] == "system:node");
        role.map(|role| Rule::list(&role["rules"])).unwrap_or_default()
    })
}

impl NodeAuthorizer {
    /// Over the cache.
    pub fn new(objects: Arc<dyn Objects>) -> Self {
        Self { objects }
    }

    /// The verdict; no opinion on everybody who is no agent.
    pub fn authorize(&self, attributes: &Attributes) -> Decision {
        let Some(node) = node_name(&attributes.user) else { return Decision::NoOpinion(String::new()) };
        let allowed = || rules().iter().any(|rule| rule.allows(attributes)) || follows_volume(attributes);
        if !attributes.resource_request || !allowed() {
            return Decision::NoOpinion(String::new());
        }
        let resource = attributes.resource.as_str();
        let narrowed = attributes.group.is_empty()
            && matches!(resource, "secrets" | "configmaps" | "persistentvolumeclaims" | "serviceaccounts");
        if !narrowed {
            return Decision::Allow(String::new());
        }
        if attributes.name.is_empty() {
            let message = format!("No Object name found: node {node:?} can only access {resource} by name");
            return Decision::NoOpinion(message);
        }
        if self.referenced(node, attributes) {
            return Decision::Allow(String::new());
        }
        Decision::NoOpinion(format!("no relationship found between node '{node}' and this object"))
    }

    fn referenced(&self, node: &str, attributes: &Attributes) -> bool {
        let pods = Gvr::new("", "v1", "pods");
        let pods = self.objects.list(&pods, &attributes.namespace);
        pods.iter()
            .filter(|pod| pod.field("spec.nodeName") == Some(node))
            .any(|pod| refers(&pod.value(), &attributes.resource, &attributes.name))
            || (attributes.resource == "secrets" && self.of_volume(node, attributes))
    }

    /// Whether a secret is one that a volume of one of the node's pods is mounted with.
    fn of_volume(&self, node: &str, attributes: &Attributes) -> bool {
        let core = |resource| Gvr::new("", "v1", resource);
        let volumes = self.objects.list(&core("persistentvolumes"), "");
        volumes.iter().map(|volume| volume.value()).any(|volume| {
            let claim = &volume["spec"]["claimRef"];
            let field = |name: &str| claim[name].as_str().unwrap_or_default();
            mounted_with(&volume, &attributes.namespace, &attributes.name) && {
                let pods = self.objects.list(&core("pods"), field("namespace"));
                let mut own = pods.iter().filter(|pod| pod.field("spec.nodeName") == Some(node));
                own.any(|pod| refers(&pod.value(), "persistentvolumeclaims", field("name")))
            }
        })
    }
}

/// Beyond the role: who may get every PersistentVolume may watch one by its name, too. Else an agent would have to ask again
/// and again whether a volume has grown.
fn follows_volume(a: &Attributes) -> bool {
    let one = a.group.is_empty() && a.resource == "persistentvolumes" && a.subresource.is_empty() && !a.name.is_empty();
    one && matches!(a.verb.as_str(), "list" | "watch")
}

fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value[field].as_array().map_or(&[], Vec::as_slice)
}

/// Whether a pod refers to an object of its namespace.
fn refers(pod: &Value, resource: &str, name: &str) -> bool {
    let spec = &pod["spec"];
    match resource {
        "serviceaccounts" => spec["serviceAccountName"] == name,
        "persistentvolumeclaims" => list(spec, "volumes").iter().any(|volume| {
            volume["persistentVolumeClaim"]["claimName"] == name
                || (volume["ephemeral"].is_object()
                    && format!("{}-{}", isopod_api::meta::name(pod), crate::admission::text(volume, "name")) == name)
        }),
        "configmaps" => names(spec, "configMap", "name", name),
        _ => {
            names(spec, "secret", "secretName", name)
                || list(spec, "imagePullSecrets").iter().any(|secret| secret["name"] == name)
        }
    }
}

/// Whether a pod's volumes or environment name a config map or secret.
fn names(spec: &Value, kind: &str, volume_field: &str, name: &str) -> bool {
    let volumes = list(spec, "volumes").iter().any(|volume| {
        volume[kind][volume_field] == name
            || list(&volume["projected"], "sources").iter().any(|source| source[kind]["name"] == name)
            || (kind == "secret" && nested_secret_ref(volume, name))
    });
    let containers = ["containers", "initContainers", "ephemeralContainers"].iter().flat_map(|field| list(spec, field));
    volumes
        || containers.into_iter().any(|container| {
            list(container, "envFrom").iter().any(|source| source[format!("{kind}Ref")]["name"] == name)
                || list(container, "env").iter().any(|env| env["valueFrom"][format!("{kind}KeyRef")]["name"] == name)
        })
}

/// Whether a driver is given a secret for a volume on a node.
fn mounted_with(volume: &Value, namespace: &str, name: &str) -> bool {
    let source = &volume["spec"]["csi"];
    let references = ["nodeStageSecretRef", "nodePublishSecretRef", "nodeExpandSecretRef"].map(|field| &source[field]);
    references.iter().any(|r| r["name"] == name && r["namespace"] == namespace)
}

/// Secrets of storage drivers: `secretRef`, `nodePublishSecretRef` and `secretName` one level down.
fn nested_secret_ref(volume: &Value, name: &str) -> bool {
    volume.as_object().into_iter().flat_map(|map| map.values()).any(|source| {
        source["secretRef"]["name"] == name
            || source["nodePublishSecretRef"]["name"] == name
            || source["secretName"] == name
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn references_are_found_wherever_they_are() {
        let pod = json!({"metadata": {"name": "p"}, "spec": {
            "serviceAccountName": "sa",
            "imagePullSecrets": [{"name": "pull"}],
            "volumes": [
                {"name": "a", "secret": {"secretName": "vol"}},
                {"name": "b", "projected": {"sources": [{"configMap": {"name": "proj"}}]}},
                {"name": "c", "ephemeral": {}},
                {"name": "d", "csi": {"nodePublishSecretRef": {"name": "csi"}}},
            ],
            "initContainers": [{"env": [{"valueFrom": {"secretKeyRef": {"name": "env"}}}]}],
            "containers": [{"envFrom": [{"configMapRef": {"name": "from"}}]}],
        }});
        for (resource, name, found) in [
            ("secrets", "pull", true),
            ("secrets", "vol", true),
            ("secrets", "env", true),
            ("secrets", "csi", true),
            ("secrets", "proj", false),
            ("configmaps", "proj", true),
            ("configmaps", "from", true),
            ("configmaps", "vol", false),
            ("persistentvolumeclaims", "p-c", true),
            ("serviceaccounts", "sa", true),
            ("serviceaccounts", "other", false),
        ] {
            assert_eq!(refers(&pod, resource, name), found, "{resource} {name}");
        }
    }

    #[test]
    fn a_volume_is_mounted_with_the_nodes_secrets_only() {
        let secret = |name: &str| json!({"namespace": "ns", "name": name});
        let csi = json!({"nodeStageSecretRef": secret("stage"), "controllerPublishSecretRef": secret("control")});
        let volume = json!({"spec": {"csi": csi}});
        assert!(mounted_with(&volume, "ns", "stage"));
        assert!(!mounted_with(&volume, "other", "stage"));
        assert!(!mounted_with(&volume, "ns", "control"));
    }

    #[test]
    fn one_volume_may_be_watched_and_all_may_not() {
        let of = |verb: &str, name: &str, subresource: &str| Attributes {
            verb: verb.into(),
            resource: "persistentvolumes".into(),
            name: name.into(),
            subresource: subresource.into(),
            ..Attributes::default()
        };
        assert!(follows_volume(&of("watch", "a", "")) && follows_volume(&of("list", "a", "")));
        for (verb, name, subresource) in [("watch", "", ""), ("update", "a", ""), ("watch", "a", "status")] {
            assert!(!follows_volume(&of(verb, name, subresource)), "{verb} {name} {subresource}");
        }
    }

    #[test]
    fn the_role_has_rules() {
        let get = Attributes {
            verb: "get".into(),
            resource_request: true,
            resource: "nodes".into(),
            ..Attributes::default()
        };
        assert!(rules().iter().any(|rule| rule.allows(&get)));
    }
}
