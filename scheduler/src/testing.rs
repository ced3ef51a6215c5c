//! Nodes and pods for tests.

use crate::model::PodInfo;
use k8s_openapi::api::core::v1::{Node, Pod};
use serde_json::{Value, json};
use std::sync::Arc;

/// A node with this allocatable (roomy by default) and its host name label.
pub(crate) fn node(name: &str, allocatable: Value) -> Node {
    let allocatable = match allocatable.as_object() {
        Some(map) if !map.is_empty() => allocatable,
        _ => json!({"cpu": "4", "memory": "8Gi", "pods": "110"}),
    };
    serde_json::from_value(json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "status": {"allocatable": allocatable},
    }))
    .unwrap()
}

/// A node with further labels.
pub(crate) fn labelled(name: &str, labels: &[(&str, &str)]) -> Node {
    let mut node = node(name, json!({}));
    for (key, value) in labels {
        node.metadata.labels.get_or_insert_default().insert((*key).into(), (*value).into());
    }
    node
}

/// A pod in namespace `ns` whose UID is its name, labelled `app: a`.
pub(crate) fn pod(name: &str, spec: Value) -> Arc<PodInfo> {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "ns", "uid": name, "labels": {"app": "a"}},
        "spec": spec,
    }))
    .unwrap();
    PodInfo::new(&pod)
}
