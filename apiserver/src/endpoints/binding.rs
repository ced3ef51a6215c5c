//! `pods/binding` and `bindings`: a pod gets its node.
//!
//! In: a Binding whose target is a node. Out: a success Status; the pod has nodeName, the binding's labels and annotations
//! and a true PodScheduled condition. Refused when the pod is bound already, gated or being deleted.

use std::sync::Arc;

use futures::future::BoxFuture;
use isopod_api::{
    gvk::{GroupResource, Gvr},
    meta,
    status::Status,
};
use serde_json::{Value, json};

use super::{Create, CreateRequest};
use crate::{
    objects::Objects,
    validation::{At, Errs},
};

/// Answers creates of bindings.
pub(crate) struct Binding;

const ZONE_LABELS: [&str; 2] = ["topology.kubernetes.io/zone", "topology.kubernetes.io/region"];

impl Create for Binding {
    fn create<'a>(&'a self, request: CreateRequest<'a>) -> BoxFuture<'a, Result<Value, Status>> {
        Box::pin(async move { bind(request).await })
    }
}

async fn bind(request: CreateRequest<'_>) -> Result<Value, Status> {
    let body = &request.object;
    let name = if request.name.is_empty() { meta::name(body) } else { request.name };
    if !meta::name(body).is_empty() && meta::name(body) != name {
        return Err(Status::bad_request("name in URL does not match name in Binding object"));
    }
    check(body)?;
    let pods = Gvr { group: String::new(), version: "v1".to_owned(), resource: "pods".to_owned() };
    let resource = GroupResource { group: String::new(), resource: "pods/binding".to_owned() };
    let node = body["target"]["name"].as_str().unwrap_or_default();
    let topology = topology(&request.objects, node);
    let uid = meta::uid(body);
    let change = |pod: &mut Value| -> Result<(), Status> {
        let refuse = |message: String| Status::conflict(&resource, name, message);
        if !uid.is_empty() && uid != meta::uid(pod) {
            return Err(refuse(format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                meta::uid(pod)
            )));
        }
        if meta::deletion_timestamp(pod).is_some() {
            return Err(refuse(format!("pod {name} is being deleted, cannot be assigned to a host")));
        }
        let current = pod["spec"]["nodeName"].as_str().unwrap_or_default();
        if !current.is_empty() {
            return Err(refuse(format!("pod {name} is already assigned to node {current:?}")));
        }
        if pod["spec"]["schedulingGates"].as_array().is_some_and(|g| !g.is_empty()) {
            return Err(refuse(format!("pod {name} has non-empty .spec.schedulingGates")));
        }
        assign(pod, node, body, &topology);
        Ok(())
    };
    if request.dry_run {
        let pod = request.objects.get(&pods, request.namespace, name);
        let mut pod = pod.ok_or_else(|| not_found(name))?.value();
        change(&mut pod)?;
    } else {
        request.objects.modify(&pods, request.namespace, name, "binding", request.user, Box::new(change)).await?;
    }
    Ok(json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}))
}

fn not_found(name: &str) -> Status {
    Status::not_found(&GroupResource { group: String::new(), resource: "pods".to_owned() }, name)
}

/// Upstream answers these as plain errors, not as an invalid object.
fn check(body: &Value) -> Result<(), Status> {
    let mut e = Errs::new();
    let target = At::field(body, "target");
    let kind = target.get("kind");
    if !["", "Node"].contains(&kind.s()) {
        e.unsupported(&kind, &["Node", "<empty>"]);
    }
    if target.get("name").s().is_empty() {
        e.required(&target.get("name"), "");
    }
    if e.is_empty() { Ok(()) } else { Err(Status::unknown(isopod_api::field::aggregate(&e.0))) }
}

/// Zone and region of the node: pods carry them as labels.
fn topology(objects: &Arc<dyn Objects>, node: &str) -> Vec<(&'static str, String)> {
    let nodes = Gvr { group: String::new(), version: "v1".to_owned(), resource: "nodes".to_owned() };
    let Some(node) = objects.get(&nodes, "", node) else { return Vec::new() };
    ZONE_LABELS.iter().filter_map(|label| node.label(label).map(|value| (*label, value.to_owned()))).collect()
}

fn assign(pod: &mut Value, node: &str, body: &Value, topology: &[(&str, String)]) {
    pod["spec"]["nodeName"] = json!(node);
    for (label, value) in topology {
        meta::set_label(pod, label, value);
    }
    for (key, value) in meta::labels(body) {
        meta::set_label(pod, key, value.as_str().unwrap_or_default());
    }
    for (key, value) in meta::annotations(body) {
        meta::set_annotation(pod, key, value.as_str().unwrap_or_default());
    }
    if !pod["status"].is_object() {
        pod["status"] = json!({});
    }
    if let Some(status) = pod["status"].as_object_mut() {
        status.remove("nominatedNodeName");
    }
    scheduled(&mut pod["status"]);
}

fn scheduled(status: &mut Value) {
    let condition =
        json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null, "lastTransitionTime": meta::now()});
    if status["conditions"].is_null() {
        status["conditions"] = json!([]);
    }
    let Some(list) = status["conditions"].as_array_mut() else { return };
    match list.iter_mut().find(|c| c["type"] == "PodScheduled") {
        Some(found) if found["status"] == "True" => {}
        Some(found) => *found = condition,
        None => list.push(condition),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{admission::testing::FakeObjects, authn::UserInfo};

    async fn create(objects: &Arc<FakeObjects>, body: Value) -> Result<Value, Status> {
        let gvr = Gvr { group: String::new(), version: "v1".into(), resource: "pods".into() };
        let user = UserInfo::default();
        let objects: Arc<dyn Objects> = objects.clone();
        Binding
            .create(CreateRequest {
                gvr: &gvr,
                namespace: "d",
                name: "a",
                user: &user,
                object: body,
                dry_run: false,
                objects,
            })
            .await
    }

    #[tokio::test]
    async fn binds_once() {
        let objects = Arc::new(FakeObjects::default());
        objects.put_as("pods", json!({"metadata": {"name": "a", "namespace": "d"}, "spec": {}}));
        objects.put_as("nodes", json!({"metadata": {"name": "n", "labels": {"topology.kubernetes.io/zone": "z"}}}));
        let body =
            json!({"metadata": {"name": "a", "annotations": {"x": "y"}}, "target": {"kind": "Node", "name": "n"}});
        assert_eq!(create(&objects, body.clone()).await.map(|v| v["status"].clone()), Ok(json!("Success")));
        let gvr = Gvr { group: String::new(), version: "v1".into(), resource: "pods".into() };
        let pod = objects.get(&gvr, "d", "a").map(|p| p.value()).unwrap_or_default();
        assert_eq!(pod["spec"]["nodeName"], "n");
        assert_eq!(pod["metadata"]["labels"]["topology.kubernetes.io/zone"], "z");
        assert_eq!(pod["status"]["conditions"][0]["status"], "True");
        let again = create(&objects, body).await;
        let message = again.err().map(|s| s.message).unwrap_or_default();
        assert_eq!(
            message,
            "Operation cannot be fulfilled on pods/binding \"a\": pod a is already assigned to node \"n\""
        );
    }

    #[tokio::test]
    async fn bad_targets() {
        let objects = Arc::new(FakeObjects::default());
        let error = create(&objects, json!({"target": {"kind": "Pod", "name": "x"}})).await.err();
        assert_eq!(
            error.map(|s| s.message).unwrap_or_default(),
            "target.kind: Unsupported value: \"Pod\": supported values: \"Node\", \"<empty>\""
        );
    }
}
