//! Upstream's roles and bindings: created when missing, completed when something of them is.

use isopod_api::{gvk::Gvr, status::Status};
use serde_json::{Map, Value, json};

use super::modify;
use crate::{
    authn::UserInfo,
    authz::{
        rbac::{GROUP, gvr},
        rule::{Rule, uncovered},
    },
    objects::Objects,
};

const AUTOUPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";

/// What isopod adds to upstream's policy. An agent is also its node's service proxy, under its own identity. All
/// controllers run under one identity; it holds the key of the CA, so nothing less than everything would be a limit.
fn own() -> Value {
    let labels = json!({ "kubernetes.io/bootstrapping": "rbac-defaults" });
    let annotations = json!({ AUTOUPDATE: "true" });
    let reads = |group: &str, resources: &[&str]| json!({ "verbs": ["get", "list", "watch"], "apiGroups": [group], "resources": resources });
    json!({
        "clusterRoles": [{
            "name": "isopod:node", "labels": labels, "annotations": annotations,
            "rules": [
                reads("", &["namespaces", "nodes", "pods", "services"]),
                reads("discovery.k8s.io", &["endpointslices"]),
                reads("networking.k8s.io", &["networkpolicies", "servicecidrs"]),
            ],
        }, {
            "name": "isopod:controllers", "labels": labels, "annotations": annotations,
            "rules": [{ "verbs": ["*"], "apiGroups": ["*"], "resources": ["*"] }],
        }],
        // Servers for other domains, where cluster DNS add-ons look for them.
        "roles": [{
            "name": "isopod:dns", "namespace": "kube-system", "labels": labels, "annotations": annotations,
            "rules": [{ "verbs": ["get", "list", "watch"], "apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["kube-dns"] }],
        }],
        "roleBindings": [{
            "name": "isopod:dns", "namespace": "kube-system", "labels": labels, "annotations": annotations,
            "roleRef": { "apiGroup": GROUP, "kind": "Role", "name": "isopod:dns" },
            "subjects": [{ "kind": "Group", "apiGroup": GROUP, "name": "system:nodes" }],
        }],
        "clusterRoleBindings": [{
            "name": "isopod:node", "labels": labels, "annotations": annotations,
            "roleRef": { "apiGroup": GROUP, "kind": "ClusterRole", "name": "isopod:node" },
            "subjects": [{ "kind": "Group", "apiGroup": GROUP, "name": "system:nodes" }],
        }, {
            "name": "isopod:controllers", "labels": labels, "annotations": annotations,
            "roleRef": { "apiGroup": GROUP, "kind": "ClusterRole", "name": "isopod:controllers" },
            "subjects": [{ "kind": "User", "apiGroup": GROUP, "name": "system:kube-controller-manager" }],
        }],
    })
}

/// Brings all roles and bindings up to date.
pub(super) async fn reconcile(objects: &dyn Objects, data: &Value) -> Result<(), Status> {
    let own = own();

    for (field, resource, kind) in [
        ("clusterRoles", "clusterroles", "ClusterRole"),
        ("roles", "roles", "Role"),
        ("clusterRoleBindings", "clusterrolebindings", "ClusterRoleBinding"),
        ("roleBindings", "rolebindings", "RoleBinding"),
    ] {
        let gvr = gvr(resource);
        for expected in super::rows(data, field).chain(super::rows(&own, field)) {
            one(objects, &gvr, kind, &object(kind, expected)).await?;
        }
    }
    Ok(())
}

/// The table's row as an object.
fn object(kind: &str, row: &Value) -> Value {
    let mut metadata = Map::new();
    let mut object = json!({ "apiVersion": format!("{GROUP}/v1"), "kind": kind, "metadata": {} });
    for (field, value) in row.as_object().into_iter().flatten() {
        match field.as_str() {
            "name" | "namespace" | "labels" | "annotations" => {
                metadata.insert(field.clone(), value.clone());
            }
            _ => object[field] = value.clone(),
        }
    }
    object["metadata"] = Value::Object(metadata);
    object
}

async fn one(objects: &dyn Objects, gvr: &Gvr, kind: &str, expected: &Value) -> Result<(), Status> {
    let (namespace, name) = (isopod_api::meta::namespace(expected), isopod_api::meta::name(expected));
    let Some(stored) = objects.get(gvr, namespace, name) else {
        return super::ensure(objects, gvr, namespace, expected.clone()).await;
    };
    let stored = stored.value();
    if isopod_api::meta::annotation(&stored, AUTOUPDATE) == Some("false") {
        return Ok(());
    }
    if kind.ends_with("Binding") && stored["roleRef"] != expected["roleRef"] {
        // A binding's role cannot be changed; upstream replaces the binding.
        objects.delete(gvr, namespace, name, json!({}), &UserInfo::system()).await?;
        return super::ensure(objects, gvr, namespace, expected.clone()).await;
    }
    let mut wanted = stored.clone();
    complete(&mut wanted, expected);
    if wanted == stored {
        return Ok(());
    }
    modify(objects, gvr, namespace, name, |value| complete(value, expected)).await
}

/// Adds to `stored` what it lacks of `expected`.
fn complete(stored: &mut Value, expected: &Value) {
    for field in ["labels", "annotations"] {
        for (key, value) in expected["metadata"][field].as_object().into_iter().flatten() {
            if stored["metadata"][field].get(key) != Some(value) {
                stored["metadata"][field][key] = value.clone();
            }
        }
    }
    if expected["aggregationRule"].is_object() {
        if stored["aggregationRule"] != expected["aggregationRule"] {
            stored["aggregationRule"] = expected["aggregationRule"].clone();
        }
        return;
    }
    if expected["roleRef"].is_object() {
        let missing: Vec<Value> =
            subjects(expected).filter(|s| !subjects(stored).any(|t| same(s, t))).cloned().collect();
        append(stored, "subjects", missing);
        return;
    }
    let held = Rule::list(&stored["rules"]);
    let missing = uncovered(&held, &Rule::list(&expected["rules"]));
    append(stored, "rules", missing.iter().map(Rule::to_value).collect());
}

fn subjects(binding: &Value) -> impl Iterator<Item = &Value> {
    binding["subjects"].as_array().into_iter().flatten()
}

fn same(a: &Value, b: &Value) -> bool {
    ["kind", "name", "namespace"].iter().all(|field| a.get(field) == b.get(field))
}

fn append(stored: &mut Value, field: &str, items: Vec<Value>) {
    if items.is_empty() {
        return;
    }
    match stored[field].as_array_mut() {
        Some(list) => list.extend(items),
        None => stored[field] = Value::Array(items),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_is_added() {
        let expected = json!({"metadata": {"labels": {"a": "b"}}, "rules": [
            {"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods"]}]});
        let mut stored = json!({"metadata": {"labels": {"mine": "x"}}, "rules": [
            {"verbs": ["get"], "apiGroups": [""], "resources": ["pods", "nodes"]}]});
        complete(&mut stored, &expected);
        assert_eq!(stored["metadata"]["labels"], json!({"mine": "x", "a": "b"}));
        assert_eq!(stored["rules"][1], json!({"verbs": ["list"], "apiGroups": [""], "resources": ["pods"]}));
        let again = stored.clone();
        complete(&mut stored, &expected);
        assert_eq!(stored, again);
    }

    #[test]
    fn subjects_are_compared_without_their_group() {
        let expected = json!({"metadata": {}, "roleRef": {}, "subjects": [{"kind": "User", "name": "a"}]});
        let mut stored = json!({"metadata": {}, "roleRef": {},
            "subjects": [{"kind": "User", "name": "a", "apiGroup": GROUP}]});
        let before = stored.clone();
        complete(&mut stored, &expected);
        assert_eq!(stored, before);
    }
}
