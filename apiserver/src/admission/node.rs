//! What nodes are given and what agents may write: TaintNodesByCondition and NodeRestriction.

use futures::future::BoxFuture;
use isopod_api::{gvk::Gvr, meta, status::Status};
use serde_json::{Value, json};

use super::{MIRROR_ANNOTATION, Operation, Plugin, Request, list, push};
use crate::authz::node::node_name;

const NOT_READY: &str = "node.kubernetes.io/not-ready";
/// Labels under these domains belong to administrators, but for the ones below.
const RESERVED_DOMAINS: [&str; 2] = ["kubernetes.io", "k8s.io"];
const RESTRICTION_DOMAIN: &str = "node-restriction.kubernetes.io";
const ALLOWED_LABELS: [&str; 16] = [
    "kubernetes.io/hostname",
    "kubernetes.io/os",
    "kubernetes.io/arch",
    "kubernetes.io/instance-type",
    "beta.kubernetes.io/os",
    "beta.kubernetes.io/arch",
    "beta.kubernetes.io/instance-type",
    "node.kubernetes.io/instance-type",
    "failure-domain.beta.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.kubernetes.io/region",
    "failure-domain.kubernetes.io/zone",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
    "node.kubernetes.io/windows-build",
    "windows.kubernetes.io/os",
];
const ALLOWED_PREFIXES: [&str; 2] = ["kubelet.kubernetes.io/", "node.kubernetes.io/"];

/// New nodes are not ready until they say so.
pub(super) struct TaintNodesByCondition;

impl Plugin for TaintNodesByCondition {
    fn name(&self) -> &'static str {
        "TaintNodesByCondition"
    }

    fn admit<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        if request.creates("", "nodes") {
            let spec = &mut request.object["spec"];
            let tainted =
                list(spec, "taints").iter().any(|taint| taint["key"] == NOT_READY && taint["effect"] == "NoSchedule");
            if !tainted {
                push(spec, "taints", json!({ "key": NOT_READY, "effect": "NoSchedule" }));
            }
        }
        Box::pin(async { Ok(()) })
    }
}

/// Agents write their own node and its pods, nothing else.
pub(super) struct NodeRestriction;

impl NodeRestriction {
    fn check(request: &Request<'_>, node: &str) -> Result<(), Status> {
        match (request.gvr.group.as_str(), request.gvr.resource.as_str(), request.subresource) {
            ("", "pods", "") => pod(request, node),
            ("", "pods", "status") => status(request, node),
            ("", "pods", "eviction") => eviction(request, node),
            ("", "nodes", _) => node_object(request, node),
            ("", "serviceaccounts", "token") => token(request, node),
            ("coordination.k8s.io", "leases", "") => lease(request, node),
            ("storage.k8s.io", "csinodes", "") if request.display_name() != node => {
                Err(request
                    .forbidden(format!("can only access CSINode with the same name as the requesting node: {node}")))
            }
            _ => Ok(()),
        }
    }
}

fn stored_pod(request: &Request<'_>) -> Option<Value> {
    let pod = request.objects.get(&Gvr::new("", "v1", "pods"), request.namespace, request.name)?;
    Some(pod.value())
}

fn pod(request: &Request<'_>, node: &str) -> Result<(), Status> {
    match request.operation {
        Operation::Create => {
            if meta::annotation(request.object, MIRROR_ANNOTATION).is_none() {
                return Err(request.forbidden(format!(
                    "pod does not have {MIRROR_ANNOTATION:?} annotation, node {node:?} can only create mirror pods"
                )));
            }
            if request.object["spec"]["nodeName"] != node {
                return Err(
                    request.forbidden(format!("node {node:?} can only create pods with spec.nodeName set to itself"))
                );
            }
            let owners = meta::owner_references(request.object);
            let foreign = |owner: &Value| owner["kind"] != "Node" || owner["name"] != node;
            if owners.len() > 1 || owners.iter().any(foreign) {
                return Err(request
                    .forbidden(format!("node {node:?} can only create pods with an owner reference set to itself")));
            }
            Ok(())
        }
        Operation::Delete => {
            let stored = stored_pod(request);
            if stored.is_some_and(|pod| pod["spec"]["nodeName"] != node) {
                return Err(
                    request.forbidden(format!("node {node:?} can only delete pods with spec.nodeName set to itself"))
                );
            }
            Ok(())
        }
        _ => Err(request.forbidden(format!(
            "unexpected operation {:?}, node {node:?} can only create and delete mirror pods",
            request.operation
        ))),
    }
}

fn status(request: &Request<'_>, node: &str) -> Result<(), Status> {
    if request.old["spec"]["nodeName"] != node {
        return Err(request
            .forbidden(format!("node {node:?} can only update pod status for pods with spec.nodeName set to itself")));
    }
    if meta::labels(request.old) != meta::labels(request.object) {
        return Err(request.forbidden(format!("node {node:?} cannot update labels through pod status")));
    }
    Ok(())
}

fn eviction(request: &Request<'_>, node: &str) -> Result<(), Status> {
    if stored_pod(request).is_some_and(|pod| pod["spec"]["nodeName"] != node) {
        return Err(request.forbidden(format!("node {node:?} can only evict pods with spec.nodeName set to itself")));
    }
    Ok(())
}

fn node_object(request: &Request<'_>, node: &str) -> Result<(), Status> {
    if request.display_name() != node {
        return Err(
            request.forbidden(format!("node {node:?} is not allowed to modify node {:?}", request.display_name()))
        );
    }
    if request.operation == Operation::Create {
        let bad = forbidden_labels(&Value::Null, request.object);
        if !bad.is_empty() {
            return Err(request
                .forbidden(format!("node {node:?} is not allowed to set the following labels: {}", bad.join(", "))));
        }
    }
    if request.operation == Operation::Update {
        if request.subresource.is_empty()
            && list(&request.old["spec"], "taints") != list(&request.object["spec"], "taints")
        {
            return Err(request.forbidden(format!("node {node:?} is not allowed to modify taints")));
        }
        let bad = forbidden_labels(request.old, request.object);
        if !bad.is_empty() {
            return Err(request.forbidden(format!("is not allowed to modify labels: {}", bad.join(", "))));
        }
        if meta::owner_references(request.old) != meta::owner_references(request.object) {
            return Err(request.forbidden(format!("node {node:?} is not allowed to set node ownerReferences")));
        }
    }
    Ok(())
}

/// Changed labels that are not the agent's to change.
fn forbidden_labels(old: &Value, new: &Value) -> Vec<String> {
    let (before, after) = (meta::labels(old), meta::labels(new));
    let mut keys: Vec<&String> =
        before.keys().chain(after.keys()).filter(|key| before.get(*key) != after.get(*key)).collect();
    keys.sort();
    keys.dedup();
    keys.into_iter().filter(|key| !label_allowed(key)).cloned().collect()
}

fn label_allowed(key: &str) -> bool {
    let domain = key.split_once('/').map_or("", |(domain, _)| domain);
    let within = |parent: &str| domain == parent || domain.ends_with(&format!(".{parent}"));
    if within(RESTRICTION_DOMAIN) {
        return false;
    }
    if !RESERVED_DOMAINS.iter().any(|reserved| within(reserved)) {
        return true;
    }
    ALLOWED_LABELS.contains(&key) || ALLOWED_PREFIXES.iter().any(|prefix| key.starts_with(prefix))
}

fn token(request: &Request<'_>, node: &str) -> Result<(), Status> {
    let bound = &request.object["spec"]["boundObjectRef"];
    if bound["kind"] != "Pod" || bound["name"].as_str().unwrap_or_default().is_empty() {
        return Err(request.forbidden("node requested token not bound to a pod"));
    }
    let Some(uid) = bound["uid"].as_str().filter(|uid| !uid.is_empty()) else {
        return Err(request.forbidden("node requested token with a pod binding without a uid"));
    };
    let name = bound["name"].as_str().unwrap_or_default();
    let gvr = Gvr::new("", "v1", "pods");
    let pod = request.objects.get(&gvr, request.namespace, name);
    let pod = pod.ok_or_else(|| Status::not_found(&gvr.group_resource(), name))?.value();
    if meta::uid(&pod) != uid {
        let message = format!(
            "the UID in the bound object reference ({uid}) does not match the UID in record ({}). The object might have been deleted and then recreated",
            meta::uid(&pod)
        );
        return Err(request.forbidden(message));
    }
    if pod["spec"]["nodeName"] != node {
        return Err(request.forbidden("node requested token bound to a pod scheduled on a different node"));
    }
    Ok(())
}

fn lease(request: &Request<'_>, node: &str) -> Result<(), Status> {
    if request.namespace != "kube-node-lease" {
        return Err(request.forbidden(format!(
            "can only access leases in the \"kube-node-lease\" system namespace, got {:?}",
            request.namespace
        )));
    }
    if request.display_name() != node {
        return Err(request.forbidden(format!(
            "can only access node lease with the same name as the requesting node, node {node:?}"
        )));
    }
    Ok(())
}

impl Plugin for NodeRestriction {
    fn name(&self) -> &'static str {
        "NodeRestriction"
    }

    fn admit<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let result = match node_name(request.user) {
            Some(node) => Self::check(request, node),
            None => Ok(()),
        };
        Box::pin(async { result })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admission::testing::{Case, FakeObjects, admit},
        authn::UserInfo,
    };

    #[tokio::test]
    async fn new_nodes_are_tainted_once() {
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"}});
        let node = admit(&TaintNodesByCondition, &FakeObjects::default(), node).await.unwrap();
        assert_eq!(node["spec"]["taints"], json!([{"key": NOT_READY, "effect": "NoSchedule"}]));
        let again = admit(&TaintNodesByCondition, &FakeObjects::default(), node.clone()).await.unwrap();
        assert_eq!(again, node);
    }

    #[test]
    fn labels_agents_may_set() {
        for (label, allowed) in [
            ("example.com/x", true),
            ("plain", true),
            ("kubernetes.io/hostname", true),
            ("node.kubernetes.io/anything", true),
            ("node-role.kubernetes.io/control-plane", false),
            ("x.node-restriction.kubernetes.io/y", false),
            ("k8s.io/z", false),
        ] {
            assert_eq!(label_allowed(label), allowed, "{label}");
        }
    }

    #[tokio::test]
    async fn agents_keep_to_themselves() {
        let agent =
            || UserInfo { name: "system:node:a".into(), groups: vec!["system:nodes".into()], ..UserInfo::default() };
        let node = |name: &str| json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
        let mirror = |node: &str| {
            json!({"apiVersion": "v1", "kind": "Pod", "spec": {"nodeName": node},
                "metadata": {"name": "p", "namespace": "ns", "annotations": {MIRROR_ANNOTATION: "x"}}})
        };
        let plain = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"nodeName": "a"}});
        for (object, allowed) in
            [(node("a"), true), (node("b"), false), (mirror("a"), true), (mirror("b"), false), (plain, false)]
        {
            let mut case = Case { user: agent(), ..Case::create(object.clone()) };
            let result = case.run(&NodeRestriction, &FakeObjects::default()).await;
            assert_eq!(result.is_ok(), allowed, "{object}");
        }
    }
}
