//! Mirror pods: what the API server shows of static pods.

use k8s_openapi::{
    api::core::v1::{Node, Pod},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::{
    Client,
    api::{Api, DeleteParams, PostParams, Preconditions},
};

use super::MIRROR;
use crate::api::is_code;

/// The hash a mirror pod carries.
pub(crate) fn hash(pod: &Pod) -> Option<&str> {
    pod.metadata.annotations.as_ref()?.get(MIRROR).map(String::as_str)
}

/// Creates the mirror of a static pod.
pub(crate) async fn create(client: Client, pod: &Pod, node: &str) -> Result<(), kube::Error> {
    let nodes: Api<Node> = Api::all(client.clone());
    let owner = nodes.get_opt(node).await?.and_then(|n| {
        Some(OwnerReference {
            api_version: "v1".into(),
            kind: "Node".into(),
            name: node.into(),
            uid: n.metadata.uid?,
            controller: Some(true),
            ..OwnerReference::default()
        })
    });
    let m = &pod.metadata;
    let mut annotations = m.annotations.clone().unwrap_or_default();
    annotations.insert(MIRROR.into(), annotations.get(super::HASH).cloned().unwrap_or_default());
    let mirror = Pod {
        metadata: ObjectMeta {
            name: m.name.clone(),
            namespace: m.namespace.clone(),
            labels: m.labels.clone(),
            annotations: Some(annotations),
            owner_references: owner.map(|o| vec![o]),
            ..ObjectMeta::default()
        },
        spec: pod.spec.clone(),
        status: None,
    };
    let pods: Api<Pod> = Api::namespaced(client, m.namespace.as_deref().unwrap_or("default"));
    match pods.create(&PostParams::default(), &mirror).await {
        Ok(_) => Ok(()),
        Err(e) if is_code(&e, 409) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Deletes a mirror at once.
pub(crate) async fn delete(client: Client, pod: &Pod) -> Result<(), kube::Error> {
    let m = &pod.metadata;
    let pods: Api<Pod> = Api::namespaced(client, m.namespace.as_deref().unwrap_or("default"));
    let parameters = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions { uid: m.uid.clone(), resource_version: None }),
        ..DeleteParams::default()
    };
    match pods.delete(m.name.as_deref().unwrap_or_default(), &parameters).await {
        Ok(_) => Ok(()),
        Err(e) if is_code(&e, 404) || is_code(&e, 409) => Ok(()),
        Err(e) => Err(e),
    }
}
